"""The backend `reference`: the definition, for any call, in float32 or float64."""

from torch import Tensor

from headwise.ops.attend import reference
from headwise.ops.attend.call import AttentionCall, Problem
from headwise.ops.backend.protocol import Accepted, Backend, Offer, Verdict, always, densely
from headwise.ops.convolution import reference as convolution
from headwise.ops.linear_attention import reference as linear_reference


def _accepts(problem: Problem) -> Verdict:
    definition = "the definition: every score in full, in float32 or float64"
    return Accepted("reference", definition + densely(problem))


def _attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    return reference.attend(call.dense())


BACKEND = Backend(
    "reference",
    always,
    _accepts,
    _attend,
    linear_attention=Offer(linear_reference.run),
    causal_conv1d=Offer(convolution.run),
)
