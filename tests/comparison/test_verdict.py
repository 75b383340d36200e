"""The verdict: a difference counts where it exceeds the spread between seeds, and only there."""

import pytest

from headwise.comparison.verdict import SeedScores, pairs, state


def test_means_further_apart_than_the_seeds_differ() -> None:
    found = pairs([SeedScores("a", (0.5, 0.6)), SeedScores("b", (0.9, 0.7))], "accuracy")[0]
    assert (found.better, found.worse, found.differ) == ("b", "a", True)
    assert found.difference == pytest.approx(0.25)
    assert found.spread == pytest.approx(0.2)


def test_means_as_far_apart_as_the_seeds_do_not_differ() -> None:
    found = pairs([SeedScores("a", (0.5, 0.75)), SeedScores("b", (0.75, 1.0))], "accuracy")[0]
    assert found.differ is False


def test_the_lower_loss_is_better() -> None:
    assert (
        pairs([SeedScores("a", (2.0, 2.1)), SeedScores("b", (1.0, 1.1))], "loss")[0].better == "b"
    )


def test_one_seed_says_nothing_about_a_difference() -> None:
    qualities = [SeedScores("a", (0.9,)), SeedScores("b", (0.1,))]
    assert pairs(qualities, "accuracy")[0].differ is None
    lines = state(qualities, "accuracy", baseline=0.01)
    assert lines[0] == "one seed cannot tell a difference from chance: run 3 or more"
    assert "better" not in "".join(lines)


def test_every_two_mechanisms_are_judged_the_furthest_apart_first() -> None:
    starts = (("a", 0.125), ("b", 0.625), ("c", 0.75))
    qualities = [SeedScores(name, (at, at + 0.125)) for name, at in starts]
    lines = state(qualities, "accuracy", baseline=0.01)
    assert lines[:3] == [
        "c is better than a: accuracy 0.625 apart, seeds up to 0.125",
        "b is better than a: accuracy 0.500 apart, seeds up to 0.125",
        "c and b: no difference shown: accuracy 0.125 apart, seeds up to 0.125",
    ]


def test_two_that_have_not_learnt_are_not_ranked() -> None:
    qualities = [
        SeedScores("a", (0.05, 0.05)),
        SeedScores("b", (0.01, 0.01)),
        SeedScores("c", (0.9, 0.95)),
    ]
    lines = state(qualities, "accuracy", baseline=0.1)
    assert "a and b: neither has learnt the task" in lines
    assert "a: learnt with 0 of 2 seeds in these steps (accuracy past 0.200)" in lines


def test_two_that_have_learnt_all_of_it_are_not_ranked() -> None:
    qualities = [
        SeedScores("a", (1.0, 1.0)),
        SeedScores("b", (0.995, 0.995)),
        SeedScores("c", (0.5, 0.6)),
    ]
    assert state(qualities, "accuracy", 0.1) == [
        "a is better than c: accuracy 0.450 apart, seeds up to 0.100",
        "b is better than c: accuracy 0.445 apart, seeds up to 0.100",
        "a and b: both have learnt all of it",
        "what has learnt all of it could only be set apart by a harder task",
    ]


def test_no_finished_run_has_no_verdict() -> None:
    assert state([], "accuracy", 0.1) == []
