"""The same model with another mechanism: its heads and windows stay, what is cached changes."""

from dataclasses import dataclass, replace

from headwise.planning.estimates import Estimator, Step
from headwise.spec import AttentionSpec, LayerSpec, ModelSpec
from headwise.spec.mechanism import with_mechanism

MECHANISMS = ("mha", "gqa:8", "mqa", "mla")
_AS_IT_IS = "as it is"
_GROUPED = 8


@dataclass(frozen=True)
class Alternative:
    """The model as planned, or re-planned with another mechanism."""

    name: str
    spec: ModelSpec
    bytes_per_token: int
    bytes: int
    decode: Step
    largest_context: int | None

    @property
    def as_it_is(self) -> bool:
        """Whether this is the model as planned."""
        return _AS_IT_IS in self.name

    @property
    def kind(self) -> str:
        """The mechanism without its number: "gqa" of "gqa:8 (as it is)"; "as" of no mechanism."""
        return self.name.replace(" ", ":").split(":")[0]


def alternatives(spec: ModelSpec, estimator: Estimator) -> tuple[Alternative, ...]:
    """The model as it is and as each mechanism; nothing of a model that caches no keys."""
    return tuple(
        Alternative(
            name,
            other,
            estimator.workload.cache.token_bytes(other),
            estimator.workload.cache_bytes(other),
            estimator.decode(other),
            estimator.largest_context(other),
        )
        for name, other in _named(spec).items()
    )


def replanned(spec: ModelSpec, mechanism: str) -> ModelSpec:
    """The model with every layer of self-attention as one of `MECHANISMS`.

    The query heads, their sizes, windows and the layers that share keys or keep a state stay as
    they are. gqa:8 has 8 kv heads, or the most below 8 that divide the query heads. MLA has the
    latent of DeepSeek-V2 for heads of that size: R = 4 D and a rope key of P = D / 2, beside heads
    whose D counts what is not rotated. An MLA model as another mechanism caches the heads that its
    latents are expanded to. An indexer is left out of all but MLA.

    >>> from headwise.planning.model import find_model
    >>> llama = find_model("llama-2-7b").spec
    >>> [replanned(llama, each).cache_bytes_per_token() for each in MECHANISMS]
    [524288, 131072, 16384, 36864]

    Source: https://arxiv.org/abs/2405.04434, table 1.
    """
    return replace(spec, layers=tuple(_layer(layer, mechanism) for layer in spec.layers))


def _layer(layer: LayerSpec, mechanism: str) -> LayerSpec:
    spec = layer.mixer
    latent = mechanism == "mla"
    if not isinstance(spec, AttentionSpec) or not spec.cached:
        return layer
    if latent and spec.mechanism == "MLA":
        return layer
    if mechanism == "gqa:8":
        mechanism = f"gqa:{max(n for n in range(1, _GROUPED + 1) if spec.heads % n == 0)}"
    return replace(layer, mixer=with_mechanism(spec, mechanism))


def _named(spec: ModelSpec) -> dict[str, ModelSpec]:
    if not any(layer.cached for layer in spec.layers):
        return {}
    others: dict[str, ModelSpec] = {}
    for name in MECHANISMS:
        other = replanned(spec, name)
        if other in others.values():
            continue
        if name.startswith("gqa"):
            name = f"gqa:{max(each.cached.kv_heads for each in other.layers if each.cached)}"
        others[f"{name} ({_AS_IT_IS})" if other == spec else name] = other
    return others if spec in others.values() else {_AS_IT_IS: spec, **others}
