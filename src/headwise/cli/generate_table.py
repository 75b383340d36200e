"""The one table that `headwise generate` ends with: what ran, how fast, with how much cache."""

from collections.abc import Callable

from rich.table import Table

from headwise.base.console import show as show_parts
from headwise.base.memory import gib
from headwise.cli.tables import lines_of
from headwise.generation.answer import Answer, first_difference, identical
from headwise.generation.session import Session


def show(session: Session, runs: list[Answer]) -> None:
    """Print the table of a session's runs to stdout, one column per run."""
    show_parts(table(session, runs))


def table(session: Session, runs: list[Answer]) -> Table:
    """A session's runs side by side, one row per figure."""
    model = session.model
    title = f"{session.name}, {_dtype(session)} on {model.device}, {session.weights}, prompt "
    made = Table(
        title=lines_of(f"{title}{len(session.prompt):,} tokens"),
        title_justify="left",
        caption=lines_of(_verdict(session, runs)),
        caption_justify="left",
    )
    made.add_column("")
    for run in runs:
        made.add_column(lines_of(run.attention) + (" (interrupted)" if run.interrupted else ""))
    rows: dict[str, Callable[[Answer], str]] = {
        "attention": _layers,
        "decode backend": _backends,
        "not used": _others,
        "remembered": lambda run: f"{run.known_tokens:,} tokens" if run.known_tokens else "",
        "prefill": lambda run: _figure(run.prefill_rate, "{:,.0f} tokens/s"),
        "decode": lambda run: _figure(run.decode_rate, "{:,.1f} tokens/s"),
        "per token (median)": lambda run: _figure(run.decode_median, "{:,.1f} ms", 1000),
        "sparse": lambda run: run.sparse,
        "cache": _caches,
        "shared by": lambda run: f"{run.ranks} processes; what one has:" if run.ranks > 1 else "",
        "cache per token": lambda run: _figure(run.cache_bytes_per_token, "{:,.0f} bytes"),
        "cache in total": _total,
        "read per token": lambda run: _read(run) if any(each.sparse for each in runs) else "",
        "new tokens": lambda run: f"{len(run.tokens)}",
    }
    for name, cell in rows.items():
        cells = [cell(run) for run in runs]
        if any(cells):
            made.add_row(name, *map(lines_of, cells))
    return made


def _layers(run: Answer) -> str:
    return "\n".join(f"{group.count} x {group.mechanism}" for group in run.layers)


def _backends(run: Answer) -> str:
    return "\n".join(dict.fromkeys(group.backend for group in run.layers))


def _others(run: Answer) -> str:
    others = dict.fromkeys(other for group in run.layers for other in group.others)
    return "\n".join(f"{other.backend}: {other.reason}" for other in others)


def _caches(run: Answer) -> str:
    counts: dict[str, int] = {}
    for group in run.layers:
        counts[group.cache] = counts.get(group.cache, 0) + group.count
    if len(counts) == 1:
        return next(iter(counts))
    return "\n".join(f"{layers} x {cache}" for cache, layers in counts.items())


def _total(run: Answer) -> str:
    if not run.cache_tokens:
        return "-"
    return f"{gib(run.cache_bytes)} for {run.cache_tokens:,} tokens"


def _read(run: Answer) -> str:
    return gib(run.read_bytes) if run.read_bytes else "-"


def _figure(value: float | None, shape: str, factor: float = 1) -> str:
    return "-" if value is None else shape.format(value * factor)


def _dtype(session: Session) -> str:
    return str(session.model.dtype).removeprefix("torch.")


def _verdict(session: Session, runs: list[Answer]) -> str:
    same = identical(runs)
    if same is None:
        return ""
    how = "" if session.sampling.greedy else f" (sampled with seed {session.sampling.seed})"
    ours = ("headwise", "dense")
    stock = next((run.attention for run in reversed(runs) if run.attention not in ours), None)
    how += f"; {stock} is Transformers' own model.generate" if stock else ""
    kl = session.kl(runs)
    if kl is not None:
        how += (
            f"; KL {kl['nats']:.2g} from {runs[1].attention} (mean of the first {kl['tokens']:,} "
            "tokens, before which both have read the same)"
        )
    if same:
        return f"Tokens identical: yes, all {len(runs[0].tokens)}{how}"
    token = first_difference(runs[0].tokens, runs[1].tokens)
    differs = f"Tokens identical: no, token {token} (from 0) of {len(runs[0].tokens)} is the first "
    differs += f"that differs{how}"
    if session.sampling.greedy and token is not None and session.near_tie(runs, token):
        lead = max(run.margins[token].lead for run in runs)
        differs += (
            f"; a near-tie there: two logits {lead:.2g} apart, which {_dtype(session)} does not "
            "resolve"
        )
    return differs
