"""Decoder layers whose step runs as two operators, with the cache between them.

`parts` finds what a family's file names in a layer, `forward` stands in for the layer's own, and
`trial` compares the two before anything is replaced.
"""

from headwise.hf.layers.forward import LayerForward, layers_of
from headwise.hf.layers.trial import trial

__all__ = ["LayerForward", "layers_of", "trial"]
