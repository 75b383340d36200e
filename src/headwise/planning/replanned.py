"""The same model with another mechanism: its heads and windows stay, what is cached changes."""

from dataclasses import replace

from headwise.spec import AttentionSpec, LayerSpec, ModelSpec

MECHANISMS = ("MHA", "GQA-8", "MQA", "MLA")
_GROUPED = 8


def replanned(spec: ModelSpec, mechanism: str) -> ModelSpec:
    """The model with every layer of self-attention as one of `MECHANISMS`.

    The query heads, their sizes, windows and the layers that share keys or keep a state stay as
    they are. GQA-8 has 8 kv heads, or the most below 8 that divide the query heads. MLA has the
    latent of DeepSeek-V2 for heads of that size: R = 4 D and a rope key of P = D / 2, beside heads
    whose D counts what is not rotated. An MLA model as another mechanism caches the heads that its
    latents are expanded to. An indexer is left out of all but MLA.

    >>> from headwise.planning.model import find_model
    >>> llama = find_model("llama-2-7b").spec
    >>> [replanned(llama, each).cache_bytes_per_token() for each in MECHANISMS]
    [524288, 131072, 16384, 36864]

    Source: https://arxiv.org/abs/2405.04434, table 1.
    """
    layers = tuple(_layer(layer, mechanism) for layer in spec.layers)
    return replace(spec, layers=layers)


def kv_heads(spec: AttentionSpec, mechanism: str) -> int:
    """kv heads of a layer as MHA, GQA-8 or MQA."""
    if mechanism == "MHA":
        return spec.heads
    if mechanism == "MQA":
        return 1
    return max(count for count in range(1, _GROUPED + 1) if spec.heads % count == 0)


def _layer(layer: LayerSpec, mechanism: str) -> LayerSpec:
    spec = layer.attention
    if spec is None or not spec.cached:
        return layer
    return replace(layer, mixer=_mla(spec) if mechanism == "MLA" else _heads(spec, mechanism))


def _heads(spec: AttentionSpec, mechanism: str) -> AttentionSpec:
    return replace(
        spec,
        kv_heads=kv_heads(spec, mechanism),
        latent_rank=None,
        rope_dim=None,
        query_rank=None,
        indexer=None,
    )


def _mla(spec: AttentionSpec) -> AttentionSpec:
    if spec.mechanism == "MLA":
        return spec
    rope = max(1, spec.head_dim // 2)
    return replace(
        spec,
        kv_heads=spec.heads,
        head_dim=spec.head_dim + rope,
        latent_rank=4 * spec.head_dim,
        rope_dim=rope,
    )
