"""Decoder layers whose step runs as two operators, with the cache between them.

`parts` finds what a family's file names in a layer, `forward` stands in for the layer's own, and
`trial` compares the two before anything is replaced.
"""

from torch import nn

from headwise.hf.module_hook import ModuleHook
from headwise.hf.step.layers.forward import LayerForward, layers_of
from headwise.hf.step.layers.trial import trial
from headwise.hf.step.replaced import Replaced
from headwise.spec.config.decoder_layer import DecoderLayer

__all__ = ["LayerForward", "layers_of", "replaced_layers", "trial"]


def replaced_layers(model: nn.Module, form: DecoderLayer | None) -> Replaced:
    """The decoder layers that the family's file describes."""
    what = "decoder layers of up to 16 rows"
    if form is None:
        return Replaced(what, "layers", {}, ModuleHook)
    reasons = trial(layers_of(model, form), form)
    return Replaced(what, "layers", reasons, lambda layer: LayerForward(layer, form))
