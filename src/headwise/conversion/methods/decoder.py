"""A decoder taken apart: one layer in memory at a time, in float32.

For models built as Llama is: norm, attention, sum, norm, MLP, sum.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise.conversion.checkpoint.weights import Weights
from headwise.errors import LoadError
from headwise.loading.loaded import check_left

PREFIX = "model.layers.{}."


class Stack:
    """The layers of a checkpoint, each made and filled when it is asked for.

    Args:
        folder: with config and safetensors.
        config: its Transformers config.

    Raises:
        LoadError: weights that the config's model would not use.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.config, self.weights = config, Weights(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        check_left(folder, set(self.weights) - set(model.state_dict()), model)
        outline = model.model
        self.layer_class = type(outline.layers[0])
        self._table = self.weights["model.embed_tokens.weight"]
        self._rotary = type(outline.rotary_emb)(config)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] to the first layer's input [B, S, E]."""
        return self._table[tokens].to(torch.float32)

    def positions(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, S, D] for hidden [B, S, E]."""
        index = torch.arange(hidden.shape[1])[None]
        found: tuple[Tensor, Tensor] = self._rotary(hidden, position_ids=index)
        return found

    @property
    def frequencies(self) -> Tensor:
        """[D/2], radians a token."""
        found: Tensor = self._rotary.inv_freq
        return found

    @property
    def rotary_scale(self) -> float:
        """What cos and sin are multiplied with, 1 for most models."""
        return float(self._rotary.attention_scaling)

    def layer(self, index: int) -> Any:
        """The decoder layer, with its weights."""
        tensors = self.weights.below(PREFIX.format(index))
        return filled(self.layer_class, self.config, index, tensors)


def filled(kind: Any, config: Any, index: int, tensors: dict[str, Tensor]) -> Any:
    """A decoder layer of this class around these tensors, for inference.

    Tensors that the layer does not have are left out, as old checkpoints' rotary tables.

    Raises:
        LoadError: a tensor that is missing, or of another shape than the config says.
    """
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        layer: nn.Module = kind(config, index)
    own = layer.state_dict()
    for name, tensor in own.items():
        found = None if name not in tensors else list(tensors[name].shape)
        if found != list(tensor.shape):
            raise LoadError(
                f"layer {index}: {name} is {'missing' if found is None else found}, and the "
                f"model's config.json asks for {list(tensor.shape)}"
            )
    layer.load_state_dict({name: tensors[name] for name in own}, assign=True)
    return layer.eval().requires_grad_(False)


def attend(layer: Any, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A layer's attention on its input [B, S, E]: heads' outputs [B, S, H*V], and [B, S, E]."""
    seen: list[Tensor] = []
    attention = layer.self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        out = attention(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=positions,
            attention_mask=None,
        )[0]
    finally:
        handle.remove()
    return seen[0], out


def feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    """What follows a layer's attention and its sum: [B, S, E] to the next layer's input."""
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out
