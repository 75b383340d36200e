"""What a backend is, and what it says to a call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.ops.attend.call import AttentionCall, Problem


@dataclass(frozen=True)
class Accepted:
    """A backend that can serve a call; `reason` says how it would."""

    backend: str
    reason: str
    accepted = True


@dataclass(frozen=True)
class Rejected:
    """A backend that cannot serve a call; `reason` says why."""

    backend: str
    reason: str
    accepted = False


Verdict = Accepted | Rejected


@dataclass(frozen=True)
class Offer:
    """An operator beside attention; `serves` says of arguments whether it runs them, and fast.

    Without `serves` it runs whatever it is given: what is taken where nothing faster serves.
    """

    run: Callable[..., Any]
    serves: Callable[..., bool] | None = None


@dataclass(frozen=True)
class LayerOffer:
    """A decoder layer in two operators, between which its cache stands.

    `attention` is the first of them, a cache's buffers or pages and attention in one. `sums` is the
    second up to an MLP that is a module of its own. `serves` says of x [B,S,E] and the layer's
    tensors whether they run them, and fast.
    """

    attention: Callable[..., Tensor]
    inputs: Callable[..., tuple[Tensor, Tensor, Tensor]]
    outputs: Callable[..., Tensor]
    sums: Callable[..., tuple[Tensor, Tensor]]
    serves: Callable[[Tensor, Sequence[Tensor]], bool]


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    `available` says whether it can run on this machine at all, and why not; `accepts` answers for
    one problem, from the problem alone; `attend` runs a call that was accepted and returns
    out [B,H,S,V] and lse [B,H,S] or None. The others are there where a backend offers them:

    linear(x, weights, biases): x [...,E] by the transposes of weights [F,E] or packed, plus biases.
    experts(x, chosen, weight, bias): the same by weight[chosen], read in place: `cpu.experts`.
    norm(x, kind, weight, bias, eps): rows of x normalised.
    mlp(x, weights, biases, gates, activation): products with an activation between them.
    layer: norms, products, rotation and residuals of a decoder layer.
    project(x, weight, up=): [B,H,S,N] by [H,N,R], or by the transpose of [H,V,R] without `up`.
    reorder(first, second, index, length): sequences of two buffers in the places of others.
    quantize(rows, bits): integers and scales of rows, see `headwise.ops.quantize`.
    index(query, key, weights, top, causal=, mask=): see `headwise.ops.index_topk`.
    choose(call): see `headwise.ops.choose_keys`.
    top_keys(query, key, top, mask=): see `headwise.ops.top_keys`.
    linear_attention(call): out and state, see `headwise.linear_attention`.
    causal_conv1d(call): out and state, see `headwise.causal_conv1d`.
    pack(rows, order), unpack(packed, dtype, rows): packed matrices, see `headwise.ops.packed`.
    """

    name: str
    available: Callable[[], tuple[bool, str]]
    accepts: Callable[[Problem], Verdict]
    attend: Callable[[AttentionCall], tuple[Tensor, Tensor | None]]
    linear: Offer | None = None
    experts: Offer | None = None
    norm: Offer | None = None
    mlp: Offer | None = None
    layer: LayerOffer | None = None
    project: Offer | None = None
    reorder: Offer | None = None
    quantize: Offer | None = None
    pack: Offer | None = None
    unpack: Offer | None = None
    index: Offer | None = None
    choose: Offer | None = None
    top_keys: Offer | None = None
    linear_attention: Offer | None = None
    causal_conv1d: Offer | None = None


@dataclass(frozen=True)
class Explanation:
    """What every backend answers to one problem, in order of speed."""

    verdicts: tuple[Verdict, ...]

    @property
    def runs(self) -> Verdict:
        """The verdict of the backend that runs: the first that accepted."""
        return next(verdict for verdict in self.verdicts if verdict.accepted)

    @property
    def chosen(self) -> str:
        """The name of the backend that runs."""
        return self.runs.backend

    def __str__(self) -> str:
        width = max(len(verdict.backend) for verdict in self.verdicts)
        lines, runs = [], True
        for verdict in self.verdicts:
            state = "rejected"
            if verdict.accepted:
                state, runs = ("runs" if runs else "slower"), False
            lines.append(f"{verdict.backend:<{width}}  {state:<8}  {verdict.reason}")
        return "\n".join(lines)


def always() -> tuple[bool, str]:
    """For a backend that runs wherever PyTorch does."""
    return True, "needs PyTorch only"


_DENSE = {"dense": "", "paged": ", pages gathered first"}


def densely(problem: Problem) -> str:
    """What a backend adds to its reason that attends to `AttentionCall.dense`."""
    return _DENSE.get(problem.layout, f", {problem.layout} dequantised first")
