"""A decoding step beside attention: each kind of module that runs on headwise in few rows.

A file for each kind finds the modules, says why one stays with Transformers, and has what stands
in for the `forward` of the others.
"""

from torch import nn

from headwise.hf.step.experts import replaced_experts
from headwise.hf.step.gated import replaced_gated
from headwise.hf.step.layers import replaced_layers
from headwise.hf.step.linear import replaced_linear
from headwise.hf.step.norms import replaced_norms
from headwise.hf.step.replaced import Replaced
from headwise.spec.config.decoder_layer import DecoderLayer

__all__ = ["Replaced", "replaced"]


def replaced(model: nn.Module, form: DecoderLayer | None) -> tuple[Replaced, ...]:
    """All that can be replaced in a model, whose family describes its layers by `form`."""
    kinds = (
        replaced_layers(model, form),
        *(find(model) for find in (replaced_linear, replaced_experts)),
        *(find(model) for find in (replaced_gated, replaced_norms)),
    )
    return tuple(kind for kind in kinds if kind.reasons)
