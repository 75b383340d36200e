"""One attention layer as data: MHA, MQA, GQA and MLA are one description with other numbers."""

from dataclasses import dataclass, replace

from headwise.errors import ShapeError, SpecError
from headwise.spec.cache_rows import CacheRows
from headwise.spec.checks import boolean, finite, positive_int, token_count
from headwise.spec.dtypes import Dtype, bytes_per_element
from headwise.spec.indexer import IndexerSpec
from headwise.spec.sparse import SparseChoice

_FLAGS = ("causal", "prefix", "chunked", "sinks", "alibi", "relative_bias", "qk_norm", "cross")


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one attention layer computes and what its cache holds.

    >>> spec = AttentionSpec(heads=9, kv_heads=3, head_dim=64, value_dim=64)
    >>> print(spec)
    GQA 9/3 heads, D 64
    >>> spec.scale, spec.group_size, spec.cache_elements_per_token
    (0.125, 3, 384)

    For multi-head latent attention (MLA) give the dimensions of the expanded heads
    (`kv_heads` = `heads`, `head_dim` = N + P) and the latent fields:

    >>> print(
    ...     AttentionSpec(
    ...         heads=16, kv_heads=16, head_dim=192, value_dim=128, latent_rank=512, rope_dim=64
    ...     )
    ... )
    MLA 16 heads, R 512 + P 64

    Args:
        heads: H, query heads.
        kv_heads: K, key and value heads; H is a multiple of it.
        head_dim: D, dimensions of each query and key head.
        value_dim: V, dimensions of each value head.
        scale: what q.k is multiplied by; left out, D ** -0.5.
        causal: whether a query sees only its own and earlier positions.
        prefix: whether the tokens of a prompt see one another and those that are generated all
            before them (a prefix language model); not causal, and cached like a causal layer.
        window: w; a causal query at position p sees keys p-w+1 .. p, one that is not causal
            sees both sides, |p - key| < w. None: no limit.
        chunked: whether positions are cut into chunks of w instead (Llama 4): a causal query sees
            its own chunk up to itself. A cache holds as much as for a window of w.
        sinks: whether each head has a learned logit in its softmax denominator.
        softcap: c in c * tanh(score / c), applied before the masks.
        alibi: whether scores get ALiBi's linear bias.
        relative_bias: whether scores get a learned relative position bias (T5).
        qk_norm: whether queries and keys are normalised before attention, per head or, as in
            OLMo 2, all heads together.
        cross: whether keys and values come from an encoder.
        latent_rank: R, size of the cached latent (MLA).
        rope_dim: P, size of the shared rotary key beside the latent (MLA).
        query_rank: rank of the compressed query projection (MLA), None if it is not compressed.
        indexer: what chooses the keys that a query attends to (DeepSeek-V3.2), None for all.
        sparse: how many keys a query of a decoding step gets by a sketch of them, None for all.

    Raises:
        SpecError: naming the field that is out of range or does not fit the others.

    Sources: GQA https://arxiv.org/abs/2305.13245, MQA https://arxiv.org/abs/1911.02150,
    MLA https://arxiv.org/abs/2405.04434 (section 2.1).
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    # Typed as what readers see: None never outlives __post_init__.
    scale: float = None  # type: ignore[assignment]
    causal: bool = True
    prefix: bool = False
    window: int | None = None
    chunked: bool = False
    sinks: bool = False
    softcap: float | None = None
    alibi: bool = False
    relative_bias: bool = False
    qk_norm: bool = False
    cross: bool = False
    latent_rank: int | None = None
    rope_dim: int | None = None
    query_rank: int | None = None
    indexer: IndexerSpec | None = None
    sparse: SparseChoice | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "value_dim"):
            positive_int(name, getattr(self, name))
        for name in ("window", "latent_rank", "rope_dim", "query_rank"):
            if getattr(self, name) is not None:
                positive_int(name, getattr(self, name))
        for name in _FLAGS:
            boolean(name, getattr(self, name))
        scale = self.head_dim**-0.5 if self.scale is None else finite("scale", self.scale)
        object.__setattr__(self, "scale", scale)
        if self.softcap is not None:
            object.__setattr__(self, "softcap", finite("softcap", self.softcap))
        if self.heads % self.kv_heads:
            raise SpecError(
                f"kv_heads={self.kv_heads} does not divide heads={self.heads}: "
                "expected each kv head to serve equally many query heads"
            )
        if self.cross and (self.causal or self.window is not None):
            raise SpecError(
                f"cross=True with causal={self.causal}, window={self.window}: every query sees "
                "all encoder tokens; give causal=False and no window"
            )
        if self.prefix and (self.causal or self.cross):
            raise SpecError(
                f"prefix=True with causal={self.causal}, cross={self.cross}: a prompt whose tokens "
                "see one another is self-attention that is not causal; give causal=False"
            )
        if self.chunked and (self.window is None or not self.causal):
            raise SpecError(
                f"chunked=True with window={self.window}, causal={self.causal}: chunks are of "
                "causal attention; give their size as the window, and causal=True"
            )
        self._check_latent()
        reason = None if self.sparse is None else self.sparse.obstacle(self, self.sparse.dense)
        if reason is not None:
            raise SpecError(f"sparse={str(self.sparse)!r} does not go with this layer: {reason}")

    def _check_latent(self) -> None:
        if self.latent_rank is None:
            for name in ("rope_dim", "query_rank"):
                if getattr(self, name) is not None:
                    raise SpecError(
                        f"{name}={getattr(self, name)} without latent_rank: it belongs to MLA; "
                        f"give latent_rank or leave {name} out"
                    )
            return
        if self.rope_dim is None:
            raise SpecError(
                f"rope_dim=None with latent_rank={self.latent_rank}: "
                "MLA caches a rotary key beside the latent; give its size"
            )
        if self.kv_heads != self.heads:
            raise SpecError(
                f"kv_heads={self.kv_heads} with latent_rank={self.latent_rank}: MLA expands the "
                f"latent to one key per query head; expected kv_heads={self.heads}"
            )
        if self.rope_dim > self.head_dim:
            raise SpecError(
                f"rope_dim={self.rope_dim} is above head_dim={self.head_dim}: head_dim counts "
                "the rotary and the other dimensions of a key"
            )

    @property
    def mechanism(self) -> str:
        """One of "MHA", "MQA", "GQA" and "MLA", from the head counts and the latent."""
        if self.latent_rank is not None:
            return "MLA"
        if self.kv_heads == self.heads:
            return "MHA"
        return "MQA" if self.kv_heads == 1 else "GQA"

    @property
    def group_size(self) -> int:
        """G = H / K, query heads that share one kv head."""
        return self.heads // self.kv_heads

    @property
    def nope_dim(self) -> int:
        """N, dimensions of an MLA key head that carry no position; may be 0.

        Raises:
            SpecError: when the layer is not MLA.
        """
        return self.head_dim - self._latent()[1]

    @property
    def cached(self) -> bool:
        """Whether keys and values of the tokens are kept for those that are generated later."""
        return self.causal or self.prefix

    @property
    def cache_rows(self) -> CacheRows:
        """What one token adds to the cache: K rows of D and V elements, for MLA one of R and P.

        >>> AttentionSpec(heads=8, kv_heads=2, head_dim=64, value_dim=64).cache_rows
        CacheRows(heads=2, dims=(64, 64), index_dim=0)
        """
        index_dim = 0 if self.indexer is None else self.indexer.cached_dim
        if self.mechanism == "MLA":
            return CacheRows(1, self._latent(), index_dim)
        return CacheRows(self.kv_heads, (self.head_dim, self.value_dim), index_dim)

    @property
    def cache_elements_per_token(self) -> int:
        """Elements that one cached token takes: K * (D + V), for MLA R + P.

        With an indexer, its key as well.
        """
        return self.cache_rows.elements

    @property
    def rotary_dim(self) -> int:
        """Elements of a key that a rotary embedding may turn: D, for MLA P."""
        return self.head_dim if self.rope_dim is None else self.rope_dim

    def cached_tokens(self, context: int) -> int:
        """Tokens that the cache holds between two calls once `context` tokens have been read.

        A causal window of w needs the w - 1 tokens before the next one. Cross-attention keeps
        all encoder tokens (`context` counts those). A bidirectional layer caches nothing, unless
        it is so in the prompt only (`prefix`).

        >>> spec = AttentionSpec(heads=2, kv_heads=1, head_dim=8, value_dim=8, window=128)
        >>> spec.cached_tokens(100), spec.cached_tokens(4096)
        (100, 127)

        Raises:
            ShapeError: for a negative or fractional `context`.
        """
        token_count("context", context)
        if not self.cached and not self.cross:
            return 0
        return context if self.window is None else min(context, self.window - 1)

    def cache_bytes(self, context: int, batch: int = 1, dtype: Dtype = "bfloat16") -> int:
        """Bytes that the cache of this layer holds for `batch` sequences of `context` tokens.

        >>> AttentionSpec(heads=32, kv_heads=8, head_dim=128, value_dim=128).cache_bytes(1)
        4096

        Raises:
            ShapeError: for a negative `context` or a `batch` below 1.
            SpecError: for an unknown dtype.
        """
        tokens = token_count("batch", batch, least=1) * self.cached_tokens(context)
        return tokens * self.cache_elements_per_token * bytes_per_element(dtype)

    def pairs(self, query_length: int, context: int) -> int:
        """Pairs of a query and a key that it attends to, where the last tokens of `context` ask.

        For one head; where queries choose, as many as each gets. A layer that is not causal has
        every token ask, one with a bidirectional prefix only where all tokens are the prompt;
        cross-attention sees all.

        >>> spec = AttentionSpec(heads=2, kv_heads=1, head_dim=8, value_dim=8, window=128)
        >>> spec.pairs(1, 4096), spec.pairs(3, 3)
        (128, 6)

        Raises:
            ShapeError: numbers that are negative or fractional, or more queries than tokens.
        """
        token_count("context", context)
        token_count("query_length", query_length)
        if self.cross:
            return query_length * context
        if query_length > context:
            raise ShapeError(
                f"query_length={query_length} with context={context}: expected at most as many "
                "queries as tokens"
            )
        if self.chunked:
            assert self.window is not None
            return _chunks(context, self.window) - _chunks(context - query_length, self.window)
        most = min(each for each in (self.window, self._most(context), context) if each is not None)
        if not self.causal and not (self.prefix and query_length < context):
            # both sides of a token, itself counted twice
            return 2 * _staircase(context, most) - context
        return _staircase(context, most) - _staircase(context - query_length, most)

    def flops(self, query_length: int, context: int) -> int:
        """Operations of the scores and the weighted sums: 2 per multiply-add, softmax not counted.

        The projections around them are the model's weights and count there. MLA counts as it is
        expanded; `absorbed()` as it is decoded. An indexer's scores are counted with it.

        >>> AttentionSpec(heads=32, kv_heads=8, head_dim=128, value_dim=128).flops(1, 16384)
        268435456

        Raises:
            ShapeError: as `pairs`.
        """
        done = self.heads * self.pairs(query_length, context) * (self.head_dim + self.value_dim)
        if self.indexer is not None:
            every = replace(self, indexer=None).pairs(query_length, context)
            done += self.indexer.heads * every * self.indexer.cached_dim
        if self.sparse is not None and context > self.sparse.least:
            done += (
                self.heads * replace(self, sparse=None).pairs(query_length, context) * self.head_dim
            )
        return 2 * done

    def _most(self, context: int) -> int | None:
        """Keys that a query chooses at most."""
        if self.sparse is not None:
            return self.sparse.read_at(context)
        return None if self.indexer is None else self.indexer.topk

    def absorbed(self) -> "AttentionSpec":
        """MLA as the MQA that decodes it: one kv head, key [latent | rope key], value the latent.

        The value is the first R elements of the key, not a second tensor, so ask the MLA spec
        itself what the cache costs. Where N is 0, the latent takes no part in the scores, and the
        key is the rope key alone.

        >>> mla = AttentionSpec(
        ...     heads=16, kv_heads=16, head_dim=192, value_dim=128, latent_rank=512, rope_dim=64
        ... )
        >>> print(mla.absorbed())
        MQA 16/1 heads, D 576, V 512

        Raises:
            SpecError: when the layer is not MLA.

        Source: https://arxiv.org/abs/2405.04434, section 2.1.2.
        """
        rank, rope = self._latent()
        return replace(
            self,
            kv_heads=1,
            head_dim=rank + rope if self.nope_dim else rope,
            value_dim=rank,
            latent_rank=None,
            rope_dim=None,
            query_rank=None,
        )

    def decoded(self) -> "AttentionSpec":
        """The attention that a decode step runs: MLA absorbed, any other as it is."""
        return self.absorbed() if self.mechanism == "MLA" else self

    def _latent(self) -> tuple[int, int]:
        if self.latent_rank is None or self.rope_dim is None:
            raise SpecError(f"{self} has no latent: expected an MLA layer, one with latent_rank")
        return self.latent_rank, self.rope_dim

    def __str__(self) -> str:
        if self.latent_rank is not None:
            parts = [f"MLA {self.heads} heads", f"R {self.latent_rank} + P {self.rope_dim}"]
        else:
            shared = "" if self.kv_heads == self.heads else f"/{self.kv_heads}"
            parts = [f"{self.mechanism} {self.heads}{shared} heads", f"D {self.head_dim}"]
            if self.value_dim != self.head_dim:
                parts.append(f"V {self.value_dim}")
        if self.cross:
            parts.append("cross")
        elif not self.causal:
            parts.append("bidirectional prefix" if self.prefix else "bidirectional")
        if self.window is not None:
            parts.append(f"{'chunks of' if self.chunked else 'window'} {self.window}")
        if self.softcap is not None:
            parts.append(f"softcap {self.softcap:g}")
        labels = {
            "sinks": self.sinks,
            "ALiBi": self.alibi,
            "relative bias": self.relative_bias,
            "qk-norm": self.qk_norm,
            str(self.indexer): self.indexer is not None,
            self.sparse.short if self.sparse is not None else "": self.sparse is not None,
        }
        return ", ".join(parts + [label for label, present in labels.items() if present])


def _staircase(tokens: int, most: int) -> int:
    """min(1, most) + min(2, most) + ... up to `tokens`."""
    rising = min(tokens, most)
    return rising * (rising + 1) // 2 + (tokens - rising) * most


def _chunks(tokens: int, size: int) -> int:
    """1 + 2 + ... + size, over and over, up to `tokens` numbers."""
    whole, rest = divmod(tokens, size)
    return whole * _staircase(size, size) + _staircase(rest, rest)
