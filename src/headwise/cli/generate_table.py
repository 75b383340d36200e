"""The one table that `headwise generate` ends with: what ran, how fast, with how much cache."""

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headwise.base.console import one_line
from headwise.base.memory import gib


def show(session: Any, runs: list[Any]) -> None:
    """Print the table of a session's runs to stdout, one column a run."""
    Console(file=sys.stdout, highlight=False).print(table(session, runs))


def table(session: Any, runs: list[Any]) -> Table:
    """A session's runs side by side, one row a figure."""
    model = session.model
    dtype = str(model.dtype).removeprefix("torch.")
    made = Table(
        title=_safe(
            f"{session.name}, {dtype} on {model.device}, prompt {len(session.prompt):,} tokens"
        ),
        title_justify="left",
        caption=_safe(_verdict(session, runs)),
        caption_justify="left",
    )
    made.add_column("")
    for run in runs:
        made.add_column(_safe(run.attention) + (" (interrupted)" if run.interrupted else ""))
    rows = {
        "attention": _layers,
        "decode backend": _backends,
        "not used": _others,
        "prefill": lambda run: _figure(run.prefill_rate, "{:,.0f} tokens/s"),
        "decode": lambda run: _figure(run.decode_rate, "{:,.1f} tokens/s"),
        "a token (median)": lambda run: _figure(run.decode_median, "{:,.1f} ms", 1000),
        "cache": _caches,
        "cache a token": lambda run: _figure(run.cache_bytes_per_token, "{:,.0f} bytes"),
        "cache in total": _total,
        "new tokens": lambda run: f"{len(run.tokens)}",
    }
    for name, cell in rows.items():
        cells = [cell(run) for run in runs]
        if any(cells):
            made.add_row(name, *(_safe(text) for text in cells))
    return made


def _layers(run: Any) -> str:
    return "\n".join(f"{each.layers} x {each.mechanism}" for each in run.mechanisms)


def _backends(run: Any) -> str:
    return "\n".join(dict.fromkeys(each.backend for each in run.mechanisms))


def _others(run: Any) -> str:
    pairs = dict.fromkeys(pair for each in run.mechanisms for pair in each.others)
    return "\n".join(f"{name}: {reason}" for name, reason in pairs)


def _caches(run: Any) -> str:
    counts: dict[str, int] = {}
    for each in run.mechanisms:
        counts[each.cache] = counts.get(each.cache, 0) + each.layers
    if len(counts) == 1:
        return next(iter(counts))
    return "\n".join(f"{layers} x {cache}" for cache, layers in counts.items())


def _total(run: Any) -> str:
    if not run.cache_tokens:
        return "-"
    return f"{gib(run.cache_bytes)} for {run.cache_tokens:,} tokens"


def _figure(value: float | None, shape: str, factor: float = 1) -> str:
    return "-" if value is None else shape.format(value * factor)


def _verdict(session: Any, runs: list[Any]) -> str:
    from headwise.generation.session import first_difference, identical

    same = identical(runs)
    if same is None:
        return ""
    how = "" if session.sampling.greedy else f" (sampled with seed {session.sampling.seed})"
    stock = next(run.attention for run in reversed(runs) if run.attention != "headwise")
    how += f"; {stock} is Transformers' own model.generate"
    if same:
        return f"Tokens identical: yes, all {len(runs[0].tokens)}{how}"
    at = first_difference(runs[0].tokens, runs[1].tokens)
    differs = f"Tokens identical: no, token {at} (from 0) is the first that differs{how}"
    if session.sampling.greedy and at is not None and session.near_tie(runs, at):
        dtype = str(session.model.dtype).removeprefix("torch.")
        lead = max(run.margins[at].lead for run in runs)
        differs += (
            f"; a near-tie there: two logits {lead:.2g} apart, which {dtype} does not resolve"
        )
    return differs


def _safe(text: str) -> str:
    return "\n".join(escape(one_line(line)) for line in text.split("\n"))
