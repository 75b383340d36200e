"""Backends as candidates: which one serves a call, and why the others do not."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from headwise.errors import UnsupportedError
from headwise.ops import _cpu, _reference, _torch
from headwise.ops._call import AttentionCall, Problem


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
class Backend:
    """One implementation of the operator.

    `available` says whether it can run on this machine at all, and why not; `accepts` answers for
    one problem, from the problem alone; `attend` runs a call that was accepted and returns
    out [B,H,S,V] and lse [B,H,S] or None.
    """

    name: str
    available: Callable[[], tuple[bool, str]]
    accepts: Callable[[Problem], Verdict]
    attend: Callable[[AttentionCall], tuple[Tensor, Tensor | None]]


def _always() -> tuple[bool, str]:
    return True, "needs PyTorch only"


_CPU = Accepted("cpu", "C++, each key and value read once for all heads of a group")
_CPU_LATENT = Accepted("cpu", "C++, each latent read once for all heads")
_DENSE = {"dense": "", "paged": ", pages gathered first"}


def _cpu_accepts(problem: Problem) -> Verdict:
    obstacle = _cpu.obstacle(problem)
    if obstacle is not None:
        return Rejected("cpu", obstacle)
    verdict = _CPU_LATENT if problem.split_key else _CPU
    if problem.layout == "dense":
        return verdict
    return Accepted("cpu", f"{verdict.reason}, {problem.layout} in place")


def _torch_accepts(problem: Problem) -> Verdict:
    return Accepted("torch", _torch.how(problem) + _densely(problem))


def _reference_accepts(problem: Problem) -> Verdict:
    definition = "the definition: every score in full, in float32 or float64"
    return Accepted("reference", definition + _densely(problem))


def _densely(problem: Problem) -> str:
    return _DENSE.get(problem.layout, f", {problem.layout} dequantised first")


# In order of speed: the first that accepts a call runs it.
BACKENDS = (
    Backend("cpu", _cpu.available, _cpu_accepts, _cpu.attend),
    Backend("torch", _always, _torch_accepts, lambda call: _torch.attend(call.dense())),
    Backend("reference", _always, _reference_accepts, lambda call: _reference.attend(call.dense())),
)


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
    names = ", ".join(known.name for known in BACKENDS)
    raise UnsupportedError(f"no backend is called {backend!r}: choose one of {names}")
