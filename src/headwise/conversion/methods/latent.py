"""MLA of MHA or GQA, in headwise's own architecture."""

import torch
from torch import Tensor
from transformers import LlamaConfig

from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.methods import decomposition
from headwise.conversion.methods.latent_sizes import even_sizes
from headwise.conversion.methods.method import Method, adapted_config
from headwise.conversion.methods.projections import Projections
from headwise.conversion.methods.statistics import LayerStatistics
from headwise.conversion.target import Target
from headwise.hf.mla_config import HeadwiseMlaConfig
from headwise.hf.mla_model import HeadwiseMlaDecoderLayer


def latent(original: Checkpoint, target: Target) -> Method:
    """A latent and a rotary key for all heads, of the sizes that the target says."""
    spec, layers = original.attention, original.config.num_hidden_layers
    sizes = even_sizes(spec, target, layers)
    whole = [(spec.kv_heads * spec.value_dim, spec.kv_heads * spec.head_dim)] * layers
    ranks, rope_dims = zip(*(sizes or whole))
    config = adapted_config(
        HeadwiseMlaConfig,
        original.config,
        like=LlamaConfig,
        num_key_value_heads=None,
        kv_lora_rank=list(ranks),
        qk_rope_head_dim=list(rope_dims),
        qk_nope_head_dim=[spec.head_dim if sizes else 0] * layers,
        head_dim=spec.head_dim,
        v_head_dim=spec.value_dim,
        attention_scale=spec.scale,
        query_key_bias="model.layers.0.self_attn.k_proj.bias" in original.weights,
    )

    def convert(
        index: int, layer: Projections, statistics: LayerStatistics | None
    ) -> dict[str, Tensor]:
        if sizes is None:
            made = decomposition.exact(layer)
        elif statistics is None:
            made = decomposition.plain(layer).weights(*sizes[index])
        else:
            made = decomposition.aware(layer, statistics).weights(*sizes[index])
        return {
            **layer.split("q_proj", layer.query),
            **layer.split("kv_a_proj", made.down),
            "kv_b_proj.weight": made.up.flatten(0, 1),
            "o_proj.weight": layer.output,
            "rope_planes": made.planes,
            "rope_mix": torch.view_as_real(made.mix).contiguous(),
        }

    return Method(config, HeadwiseMlaDecoderLayer, convert)
