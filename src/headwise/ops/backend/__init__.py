"""The backends as candidates: which one serves a call, and why the others do not."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from headwise.errors import UnsupportedError
from headwise.ops.attend.call import Problem
from headwise.ops.backend import cpu, reference, torch
from headwise.ops.backend.protocol import Backend, Explanation, LayerOffer, Offer

# In order of speed: the first that accepts a call runs it.
BACKENDS = (cpu.BACKEND, torch.BACKEND, reference.BACKEND)


def explain_problem(problem: Problem) -> Explanation:
    """Ask every backend about `problem`."""
    return Explanation(tuple(backend.accepts(problem) for backend in BACKENDS))


def choose(problem: Problem, backend: str | None) -> Backend:
    """The first backend that accepts, or the named one.

    Raises:
        UnsupportedError: the name is unknown, or that backend rejects the problem.
    """
    for known in BACKENDS:
        if backend is None and known.accepts(problem).accepted:
            return known
        if known.name == backend:
            verdict = known.accepts(problem)
            if verdict.accepted:
                return known
            able = [other.name for other in BACKENDS if other.accepts(problem).accepted]
            raise UnsupportedError(
                f"backend {backend!r} cannot serve this call: {verdict.reason}; "
                f"{', '.join(able)} can"
            )
    raise _unknown(backend)


def _unknown(backend: str | None) -> UnsupportedError:
    names = ", ".join(known.name for known in BACKENDS)
    return UnsupportedError(f"no backend is called {backend!r}: choose one of {names}")


def choose_offer(
    operator: Literal[
        "project", "reorder", "quantize", "pack", "unpack", "index", "choose", "top_keys"
    ],
    backend: str | None,
    *arguments: Any,
) -> Callable[..., Any]:
    """The fastest of what the backends offer for an operator; of a named one only, where it serves.

    The general offer, which serves anything, is always a candidate.
    """
    for known in BACKENDS:
        offer: Offer | None = getattr(known, operator)
        if offer is None:
            continue
        if offer.serves is None or (backend in (None, known.name) and offer.serves(*arguments)):
            return offer.run
    raise AssertionError(f"no backend offers {operator} for everything")


def offer_of(
    operator: Literal["linear_attention", "causal_conv1d"], backend: str | None, *arguments: Any
) -> Any:
    """The fastest offer that serves, or that of the named backend.

    Raises:
        UnsupportedError: the name is unknown, or that backend does not serve the arguments.
    """
    able = []
    for known in BACKENDS:
        offer: Offer | None = getattr(known, operator)
        if offer is not None and (offer.serves is None or offer.serves(*arguments)):
            if backend in (None, known.name):
                return offer.run
            able.append(known.name)
    if backend not in [known.name for known in BACKENDS]:
        raise _unknown(backend)
    raise UnsupportedError(
        f"backend {backend!r} cannot serve this call of {operator}; {', '.join(able)} can"
    )


def layer_offer(x: Tensor, tensors: Sequence[Tensor]) -> LayerOffer | None:
    """What runs a decoder layer of these tensors in two operators; None where nothing does."""
    for known in BACKENDS:
        if known.layer is not None and known.layer.serves(x, tensors):
            return known.layer
    return None


def faster(
    operator: Literal["linear", "experts", "norm", "mlp"], *arguments: Any
) -> Callable[..., Any] | None:
    """What serves these arguments faster than PyTorch's own operators; None where nothing does."""
    for known in BACKENDS:
        offer: Offer | None = getattr(known, operator)
        if offer is not None and offer.serves is not None and offer.serves(*arguments):
            return offer.run
    return None
