"""The methods, each as: the config of the result, and a layer's new tensors from its old ones."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from headwise.conversion.methods import latent
from headwise.conversion.methods import merging as merge
from headwise.conversion.methods.projections import Moments, Projections
from headwise.conversion.methods.sensitivity import Sensitivity
from headwise.spec import AttentionSpec


@dataclass(frozen=True)
class Seen:
    """What calibration says of one layer's inputs.

    Args:
        moments: of the inputs of the layer as it will be, after the layers before it.
        sensitivity: what errors of scores and values do.
        frequencies: [D/2], of the rotary planes, radians a token.
        length: tokens of a calibration sequence.
    """

    moments: Moments
    sensitivity: Sensitivity
    frequencies: Tensor
    length: int
    rotary_scale: float


class Method(Protocol):
    """A way to make another attention of a layer's."""

    config: Any
    layer_class: Any

    def convert(self, index: int, layer: Projections, seen: Seen | None) -> dict[str, Tensor]:
        """The tensors of the new `self_attn`; `seen` is None where no text is needed."""
        ...


class Merge:
    """Fewer kv heads, in the same architecture."""

    def __init__(self, config: Any, kv_heads: int, layer_class: Any, *, naive: bool) -> None:
        self.config = copy.deepcopy(config)
        self.config.num_key_value_heads = kv_heads
        self.layer_class, self.kv_heads, self.naive = layer_class, kv_heads, naive

    def convert(self, index: int, layer: Projections, seen: Seen | None) -> dict[str, Tensor]:
        """Llama's four projections."""
        if self.naive or seen is None:
            merged = merge.pooled(layer, self.kv_heads)
        else:
            merged = merge.aligned(layer, seen.moments, self.kv_heads)
        tensors = {"o_proj.weight": merged.output}
        for name in ("query", "key", "value"):
            tensors |= merged.split(f"{name[0]}_proj", getattr(merged, name))
        return tensors


class Latent:
    """MLA in our architecture.

    Args:
        sizes: (R, P) of each layer; None keeps everything.
    """

    def __init__(
        self,
        config: Any,
        spec: AttentionSpec,
        sizes: list[tuple[int, int]] | None,
        *,
        biased: bool,
        naive: bool,
    ) -> None:
        from headwise.hf.mla_config import HeadwiseMlaConfig
        from headwise.hf.mla_model import HeadwiseMlaDecoderLayer

        self.layer_class, self.sizes, self.naive = HeadwiseMlaDecoderLayer, sizes, naive
        layers = config.num_hidden_layers
        whole = (spec.kv_heads * spec.value_dim, spec.kv_heads * spec.head_dim)
        given = {name: value for name, value in config.to_dict().items() if name not in _NOT_KEPT}
        self.config = HeadwiseMlaConfig(
            **given,
            kv_lora_rank=[at[0] for at in sizes or [whole] * layers],
            qk_rope_head_dim=[at[1] for at in sizes or [whole] * layers],
            qk_nope_head_dim=[0 if sizes is None else spec.head_dim] * layers,
            head_dim=spec.head_dim,
            v_head_dim=spec.value_dim,
            attention_scale=spec.scale,
            query_key_bias=biased,
        )
        self.config.dtype = config.dtype
        self.config.architectures = ["HeadwiseMlaForCausalLM"]

    def convert(self, index: int, layer: Projections, seen: Seen | None) -> dict[str, Tensor]:
        """The projections of `HeadwiseMlaAttention`."""
        if self.sizes is None:
            made = latent.exact(layer)
        elif self.naive or seen is None:
            made = latent.PlainDecomposition(layer).weights(*self.sizes[index])
        else:
            made = decomposition(layer, seen).weights(*self.sizes[index])
        return {
            **layer.split("q_proj", layer.query),
            **layer.split("kv_a_proj", made.down),
            "kv_b_proj.weight": made.up.flatten(0, 1),
            "o_proj.weight": layer.output,
            "rope_planes": made.planes,
            "rope_mix": torch.view_as_real(made.mix).contiguous(),
        }


# Of the original's config; the sizes of heads are given anew, the rest is about the file.
_NOT_KEPT = {
    "model_type",
    "head_dim",
    "architectures",
    "num_key_value_heads",
    "transformers_version",
    "dtype",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
}


def decomposition(layer: Projections, seen: Seen) -> latent.Decomposition:
    """The layer's keys and values, ready to be cut."""
    # a query at the end of a sequence meets every distance, one at its start only short ones
    distances = torch.arange(seen.length, 0, -1, dtype=torch.float32)
    return latent.Decomposition(
        layer,
        seen.moments.second,
        seen.moments.centred,
        seen.sensitivity,
        seen.frequencies,
        distances / distances.sum(),
        rotary_scale=seen.rotary_scale,
    )


def attention_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a decoder layer's tensors that belong to its attention, by their names in it."""
    prefix = "self_attn."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
