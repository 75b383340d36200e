import itertools

import pytest

from headwise.errors import OptionError
from headwise.measure import Timing, interleaved, ratio, timing


def test_candidates_take_turns_and_every_one_starts_a_round() -> None:
    order: list[str] = []
    names = ("a", "b", "c")
    interleaved({n: lambda n=n: order.append(n) for n in names}, rounds=6, warmup=0)
    rounds = (
        list(itertools.batched(order, 3))
        if hasattr(itertools, "batched")
        else [tuple(order[at : at + 3]) for at in range(0, len(order), 3)]
    )
    assert len(rounds) == 6
    assert all(sorted(at) == ["a", "b", "c"] for at in rounds)
    assert {at[0] for at in rounds} == {"a", "b", "c"}


def test_warm_up_rounds_run_but_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    calls: list[int] = []
    timings = interleaved({"a": lambda: calls.append(1)}, rounds=4, warmup=3)
    assert len(calls) == 7
    assert timings["a"].seconds == (1.0, 1.0, 1.0, 1.0)


def test_too_few_rounds_for_a_spread_are_refused() -> None:
    with pytest.raises(OptionError, match="rounds is 3, expected at least 4"):
        interleaved({"a": lambda: None}, rounds=3)


def test_a_ratio_pairs_the_rounds() -> None:
    # a machine that is twice as slow in half of the rounds leaves the ratio alone
    slow, fast = Timing((3.0, 6.0, 3.0, 6.0)), Timing((1.0, 2.0, 1.0, 2.0))
    assert (ratio(slow, fast).median, ratio(slow, fast).low, ratio(slow, fast).high) == (3, 3, 3)
