"""What chooses the keys of a sparse attention: an indexer with keys of its own, cached as well."""

from dataclasses import dataclass

from headwise.spec.checks import boolean, positive_int


@dataclass(frozen=True, kw_only=True)
class IndexerSpec:
    """An indexer scores every cached token and leaves `topk` of them to the attention.

    Its keys have one head that all its query heads share, so a token adds `dim` elements. A layer
    may reuse what the one before chose, and then has neither.

    >>> print(IndexerSpec(heads=64, dim=128, topk=2048))
    indexer 64 heads, D 128, top 2048

    Args:
        heads: query heads of the indexer.
        dim: dimensions of its keys.
        topk: tokens that a query attends to at most.
        shared: whether the choice is that of a layer before.

    Raises:
        SpecError: a number below 1, or `shared` is no boolean.

    Source: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, section 2.1.
    """

    heads: int
    dim: int
    topk: int
    shared: bool = False

    def __post_init__(self) -> None:
        for name in ("heads", "dim", "topk"):
            positive_int(f"indexer.{name}", getattr(self, name))
        boolean("indexer.shared", self.shared)

    @property
    def cached_dim(self) -> int:
        """Elements that a token adds to the layer's cache."""
        return 0 if self.shared else self.dim

    def __str__(self) -> str:
        if self.shared:
            return f"top {self.topk} of the layer before"
        return f"indexer {self.heads} heads, D {self.dim}, top {self.topk}"
