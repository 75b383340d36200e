"""The peers of a benchmark, chosen by their names."""

from collections.abc import Iterable

from headwise.bench.candidate import Candidate
from headwise.bench.headwise_candidates import BACKENDS, CACHES
from headwise.bench.onnxruntime_candidate import ONNXRUNTIME
from headwise.bench.pytorch_candidates import FLEX, MATMUL, SDPA, SDPA_PACKED
from headwise.bench.results import LeftOut
from headwise.errors import OptionError
from headwise.measure.shape import Shape

PEERS = (SDPA, SDPA_PACKED, *BACKENDS, MATMUL, FLEX, ONNXRUNTIME, *CACHES)


def all_peers() -> dict[str, Candidate]:
    """Every peer of the operators by its name."""
    return {peer.name: peer for peer in PEERS}


def check_names(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names, all of `known` where there are none, and no name for "none".

        >>> check_names([], ["sdpa", "flex"]), check_names(["none"], ["sdpa"])
        (['sdpa', 'flex'], [])

    Raises:
        OptionError: an unknown name.
    """
    asked, listed = list(names), list(known)
    if asked == ["none"]:
        return []
    for name in asked:
        if name not in listed:
            raise OptionError(f"peer {name!r} is unknown; use {', '.join(listed)}, or none")
    return asked or listed


def select_peers(names: Iterable[str], shapes: Iterable[Shape]) -> tuple[list[str], list[LeftOut]]:
    """The peers to time on these shapes, and those that this machine lacks.

    Without names it is every peer that can run; "none" is no peer.

        >>> select_peers(["none"], [])
        ([], [])

    Raises:
        OptionError: an unknown name, or one that was asked for and cannot run here, or on no shape.
    """
    asked, known = list(names), all_peers()
    operators = {shape.operator for shape in shapes}
    chosen, absent = [], []
    for name in check_names(asked, known):
        peer = known[name]
        if operators.isdisjoint(peer.operators):
            if asked:
                raise OptionError(
                    f"peer {name} computes none of these shapes ({peer.about}); leave it out of "
                    "--peers"
                )
            continue
        reason = peer.missing()
        if reason is None:
            chosen.append(name)
        elif asked:
            raise OptionError(f"peer {name} cannot run here: {reason}; leave it out of --peers")
        else:
            absent.append(LeftOut(name, "absent", reason))
    return chosen, absent
