"""A decoder that is streamed: one layer in memory at a time, in float32.

For models built as Llama is: norm, attention, sum, norm, MLP, sum.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from headwise.conversion.checkpoint.checkpoint import Checkpoint
from headwise.errors import LoadError
from headwise.loading.loaded import check_left


class StreamedDecoder:
    """The layers of a checkpoint, each made and filled when it is asked for.

    Attributes:
        layer_class: Transformers' class of its decoder layers.
        rotary: Transformers' module that gives cos and sin of positions.

    Raises:
        LoadError: weights that the config's model would not use.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.config, self.weights = checkpoint.config, checkpoint.weights
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa")
        check_left(checkpoint.folder, set(self.weights) - set(model.state_dict()), model)
        self.layer_class = type(model.model.layers[0])
        self._table = self.weights["model.embed_tokens.weight"]
        self.rotary = type(model.model.rotary_emb)(self.config)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, S] to the first layer's input [B, S, E]."""
        return self._table[tokens].to(torch.float32)

    def layer(self, index: int) -> Any:
        """The decoder layer, with its weights."""
        return filled(self.layer_class, self.config, index, self.weights.layer(index))


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
        shape = list(tensors[name].shape) if name in tensors else "missing"
        if shape != list(tensor.shape):
            raise LoadError(
                f"layer {index}: {name} is {shape}, and the "
                f"model's config.json asks for {list(tensor.shape)}"
            )
    layer.load_state_dict({name: tensors[name] for name in own}, assign=True)
    return layer.eval().requires_grad_(False)


def attend(layer: Any, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A layer's attention on its input [B, S, E]: heads' outputs [B, S, H*V], and [B, S, E]."""
    heads: list[Tensor] = []
    attention = layer.self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, inputs: heads.append(*inputs))
    try:
        out = attention(
            hidden_states=layer.input_layernorm(hidden),
            position_embeddings=positions,
            attention_mask=None,
        )[0]
    finally:
        handle.remove()
    return heads[0], out


def feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    """What follows a layer's attention and its sum: [B, S, E] to the next layer's input."""
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out
