"""MLA expanded to MHA, equal in output: for checking, and for tools that have no MLA.

A latent that is not normalised is linear in the hidden state, and so are the keys and values that
are made of it: `headwise_mla` becomes a stock checkpoint of GLM's architecture. Half of its head's
dims are rotated, and hold what the query meets of the rope key; the other half holds what the key
has besides. DeepSeek normalises its latents, which no stock MHA can hold: its weights stay as they
are, under a model type of ours that caches keys and values in place of the latents.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad
from transformers import GenerationConfig, GlmConfig

from headwise.base.progress import Progress, silent
from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.conversion.checkpoint.weights import layer_prefix, write_weights
from headwise.conversion.methods.method import adapted_config
from headwise.conversion.methods.projections import Projections, augmented
from headwise.errors import ConversionError
from headwise.hf.deepseek_mha import MHA_CONFIGS
from headwise.hf.stock_names import GlmRotaryEmbedding, LlamaRotaryEmbedding
from headwise.spec import FAMILIES


def expanded_config(config: Any) -> Any:
    """The config of the MHA model that equals an MLA model.

    Raises:
        ConversionError: no such model is known; says why.
    """
    covered = {name: each.expands for name, each in FAMILIES.items() if each.expands is not None}
    if config.model_type not in covered:
        expected = ", ".join(sorted(covered, key=covered.__getitem__))
        raise ConversionError(
            f"model_type {config.model_type!r} is not covered: expected {expected} to make mha of"
        )
    if covered[config.model_type] == "linear":
        return _glm_config(config)
    return adapted_config(MHA_CONFIGS[config.model_type], config)


def _glm_config(config: Any) -> Any:
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name):
            raise ConversionError(
                f"{name} is true: no stock MHA whose heads are rotated by half has that bias"
            )
    if config.v_head_dim > 2 * config.head_dim:
        raise ConversionError(
            f"v_head_dim is {config.v_head_dim}: expected at most {2 * config.head_dim}, twice "
            "head_dim, which the expanded heads have"
        )
    made = adapted_config(
        GlmConfig,
        config,
        like=GlmConfig,
        num_key_value_heads=config.num_attention_heads,
        head_dim=2 * config.head_dim,
        attention_bias=config.query_key_bias,
        rope_parameters={**config.rope_parameters, "partial_rotary_factor": 0.5},
    )
    old, new = LlamaRotaryEmbedding(config), GlmRotaryEmbedding(made)
    same = old.inv_freq.shape == new.inv_freq.shape and torch.allclose(old.inv_freq, new.inv_freq)
    if not same or old.attention_scaling != new.attention_scaling:
        raise ConversionError(
            f"rope_type is {old.rope_type!r}: heads that are rotated by half turn with other "
            "frequencies"
        )
    return made


def expand(original: Checkpoint, part: Path, progress: Progress = silent) -> None:
    """Write the MHA model that equals an MLA checkpoint into the folder `part`.

    One layer is in memory at a time. The weights have the dtype of those that they are made of.

    Raises:
        ConversionError: as `expanded_config`.
    """
    config = original.config
    expanded_config(config).save_pretrained(part)
    # GLM's config has ends of its own where it is given none
    GenerationConfig.from_model_config(config).save_pretrained(part)
    write_weights(part, _expanded(original, progress))


def _expanded(original: Checkpoint, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    config, weights = original.config, original.weights
    if FAMILIES[config.model_type].expands == "normalised":
        yield from ((name, weights[name]) for name in weights)
        return
    layers = config.num_hidden_layers
    for index in range(layers):
        progress("expanding layers", index, layers)
        dtype = weights.attention_dtype(index)
        for name, tensor in _glm_layer(weights.layer(index), config, index).items():
            yield layer_prefix(index) + name, tensor.to(dtype)
    yield from weights.outside_layers()
    progress("expanding layers", layers, layers)


def _glm_layer(layer: dict[str, Tensor], config: Any, index: int) -> dict[str, Tensor]:
    """A layer's tensors by GLM's names, of those of `headwise_mla`."""
    tensors = _attention(layer, config, index).tensors
    tensors = {f"self_attn.{name}": tensor for name, tensor in tensors.items()}
    gate_up = [layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]
    tensors["mlp.gate_up_proj.weight"] = torch.cat(gate_up)
    for name in ("input_layernorm", "post_attention_layernorm", "mlp.down_proj"):
        tensors[f"{name}.weight"] = layer[f"{name}.weight"]
    return tensors


def _attention(layer: dict[str, Tensor], config: Any, index: int) -> Projections:
    """Queries, keys and values of 2D dims a head, the first D of them rotated."""
    heads, dim, value_dim = config.num_attention_heads, config.head_dim, config.v_head_dim
    rank, nope = config.kv_lora_rank[index], config.qk_nope_head_dim[index]
    pairs = config.qk_rope_head_dim[index] // 2

    query = augmented(layer, "self_attn.q_proj").unflatten(0, (heads, 2, dim // 2))
    # GLM's pairs are neighbours: real and imaginary part of one, then those of the next
    query = torch.cat([query.transpose(1, 2).flatten(1, 2), query.flatten(1, 2)], dim=1)

    latent, real, imaginary = augmented(layer, "self_attn.kv_a_proj").split([rank, pairs, pairs])
    # q m k* = q (m* k)*: what a head's query multiplies is put into its key, and pairs that turn
    # alike meet the same pair of the query, so that their sum is met in their place
    turning = one_hot(layer["self_attn.rope_planes"].long(), dim // 2).T
    mix = torch.view_as_complex(layer["self_attn.rope_mix"]).conj()
    rotated = (mix[:, None] * turning) @ torch.complex(real, imaginary)
    up = layer["self_attn.kv_b_proj.weight"].unflatten(0, (heads, nope + value_dim))
    content = pad(up[:, :nope] @ latent, (0, 0, 0, dim - nope))
    key = torch.cat([torch.view_as_real(rotated).movedim(-1, 2).flatten(1, 2), content], dim=1)
    # GLM's scores are divided by sqrt(2D)
    key = key * (config.attention_scale * math.sqrt(2 * dim))

    beyond = 2 * dim - value_dim
    value = pad(up[:, nope:] @ latent, (0, 0, 0, beyond))
    output = pad(layer["self_attn.o_proj.weight"].unflatten(1, (heads, value_dim)), (0, beyond))
    return Projections(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        output.flatten(1),
        heads,
        heads,
        biased=config.query_key_bias,
    )
