"""MLA of MHA or GQA, in headwise's own architecture: the sizes of its latents, and its layers."""

import torch
from torch import Tensor
from transformers import LlamaConfig

from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.methods import decomposition
from headwise.conversion.methods.method import Method, adapted_config
from headwise.conversion.methods.projections import Projections
from headwise.conversion.methods.statistics import LayerStatistics
from headwise.conversion.target import Target
from headwise.errors import ConversionError
from headwise.hf.mla_config import HeadwiseMlaConfig
from headwise.hf.mla_model import HeadwiseMlaDecoderLayer
from headwise.spec import AttentionSpec

# Of the elements of a layer, how many are rotary: what measured best on SmolLM2 at half its cache.
_ROPE_SHARE = 1 / 3


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


def even_sizes(spec: AttentionSpec, target: Target, layers: int) -> list[tuple[int, int]] | None:
    """(R, P) alike in all layers; None where everything is kept.

    >>> spec = AttentionSpec(heads=9, kv_heads=3, head_dim=64, value_dim=64)
    >>> even_sizes(spec, Target.parse("mla:50%"), layers=2)
    [(128, 64), (128, 64)]

    Raises:
        ConversionError: a share that leaves nothing, or everything.
    """
    if target.exact:
        return None
    if target.rank is not None and target.rope_dim is not None:
        return [(target.rank, target.rope_dim)] * layers
    assert target.share is not None
    wanted = target.share * spec.cache_elements_per_token
    step = 8 if wanted >= 64 else 2  # of a vector, where that is a fine step
    budget = round(wanted / step) * step
    if not 2 * step <= budget < spec.cache_elements_per_token:
        raise ConversionError(
            f"to is {str(target)!r}: expected a share that leaves between {2 * step} and "
            f"{spec.cache_elements_per_token - step} of the {spec.cache_elements_per_token} "
            "elements that a token takes in a layer; mla alone keeps all"
        )
    rope = max(step, round(_ROPE_SHARE * budget / step) * step)
    return [(budget - rope, rope)] * layers
