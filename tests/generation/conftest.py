"""Chunks of a few tokens, so that a prompt of several is short."""

import pytest


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many tokens headwise reads at once in this test."""
    monkeypatch.setattr("headwise.generation.chunks.CHUNK", 16)
    return 16
