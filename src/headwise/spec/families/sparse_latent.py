"""DeepSeek-V3.2 and kin: MLA that attends to the tokens which an indexer chooses.

In some families a layer reuses the choice of the layer before.
"""

from dataclasses import replace

from headwise.errors import SpecError
from headwise.spec.checks import shown
from headwise.spec.config.family import Family
from headwise.spec.config.fields import ConfigFields
from headwise.spec.config.latent import LATENT_DEFAULTS, latent_heads
from headwise.spec.config.layout import Layout, one_stack
from headwise.spec.indexer import IndexerSpec

_V32 = LATENT_DEFAULTS | {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "max_position_embeddings": 163840,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
_AXK2 = _V32 | {
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
    "kv_lora_rank": 128,
    "q_lora_rank": 384,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "index_n_heads": 16,
}
_GLM_MOE_DSA = _V32 | {
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "max_position_embeddings": 202752,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "indexer_types": None,
    "index_topk_pattern": None,
    "index_topk_freq": 1,
    "index_skip_topk_offset": 2,
}
_HY_V4 = _V32 | {
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 262144,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_n_heads": 16,
    "indexer_types": None,
}
_KINDS = {"full": False, "shared": True, "F": False, "S": True}


def _read(fields: ConfigFields) -> Layout:
    return _layout(fields, [False] * fields.layers("num_hidden_layers"))


def _read_glm(fields: ConfigFields) -> Layout:
    layers = fields.layers("num_hidden_layers")
    every = max(1, fields.whole("index_topk_freq"))
    offset = fields.whole("index_skip_topk_offset")
    schedule = [max(index - offset + 1, 0) % every > 0 for index in range(layers)]
    name = "index_topk_pattern" if fields.raw("indexer_types") is None else "indexer_types"
    return _layout(fields, _shared(fields, name, schedule))


def _read_hy_v4(fields: ConfigFields) -> Layout:
    layers = fields.layers("num_hidden_layers")
    schedule = [index > 0 and (index - 1) % 4 > 0 for index in range(layers)]
    return _layout(fields, _shared(fields, "indexer_types", schedule), sinks=True)


def _shared(fields: ConfigFields, name: str, schedule: list[bool]) -> list[bool]:
    """Whether each layer reuses a choice, as a field says it, or a schedule where there is none."""
    given = fields.raw(name)
    if given is None:
        return schedule
    kinds = list(given) if isinstance(given, str | list | tuple) else []
    if len(kinds) != len(schedule) or not all(
        isinstance(kind, str) and kind in _KINDS for kind in kinds
    ):
        raise SpecError(
            f"{name}={shown(given)}: expected {len(schedule)} of 'full' and 'shared', one per layer"
        )
    if _KINDS[kinds[0]]:
        raise SpecError(f"{name}={shown(given)}: no layer chooses before the first one")
    return [_KINDS[kind] for kind in kinds]


def _layout(fields: ConfigFields, shared: list[bool], *, sinks: bool = False) -> Layout:
    indexer = IndexerSpec(
        heads=fields.positive("index_n_heads"),
        dim=fields.positive("index_head_dim"),
        topk=fields.positive("index_topk"),
    )
    attention = replace(latent_heads(fields), sinks=sinks)
    layers = [replace(attention, indexer=replace(indexer, shared=own)) for own in shared]
    return one_stack(layers, fields.positive("max_position_embeddings"))


DEEPSEEK_V32 = Family(model_type="deepseek_v32", read=_read, defaults=_V32)
AXK2 = Family(model_type="axk2", read=_read, defaults=_AXK2)
GLM_MOE_DSA = Family(
    model_type="glm_moe_dsa", read=_read_glm, defaults=_GLM_MOE_DSA, interleaved_rope=True
)
HY_V4 = Family(model_type="hy_v4", read=_read_hy_v4, defaults=_HY_V4)
