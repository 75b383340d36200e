"""The verdict's figures as rows of text, for the terminal and for the model card."""

from collections.abc import Callable

from headwise.conversion.verdict.quality import Quality
from headwise.conversion.verdict.verdict import Verdict

Rows = list[list[str]]
"""The first row is the header."""


def quality_rows(verdict: Verdict) -> Rows:
    """Cache, perplexity and agreement; a column for each model."""
    models = {"original": verdict.original, "converted": verdict.converted}
    if verdict.tuned is not None:
        models["tuned"] = verdict.tuned
    cache = verdict.cache
    bytes_a_token = [cache.original, *[cache.converted] * (len(models) - 1)]
    rows = [["", *models], ["cache bytes a token", *(f"{at:,}" for at in bytes_a_token)]]
    if verdict.original is None:
        return rows
    figures: dict[str, Callable[[Quality], str]] = {
        "perplexity": lambda at: f"{at.perplexity:,.2f}",
        "  times the original's": lambda at: f"{verdict.factor(at):,.2f}",
        "original's likeliest token": lambda at: f"{at.agreement:.1%}",
    }
    for name, figure in figures.items():
        rows.append([name, *("-" if at is None else figure(at) for at in models.values())])
    return rows


def speed_rows(verdict: Verdict) -> Rows:
    """Decoding at each context; only a header where it was not measured."""
    rows = [["decode at", "original", "converted", "times as fast"]]
    for at in verdict.speeds.contexts:
        median, low, high = at.ratio.median, at.ratio.low, at.ratio.high
        rows.append(
            [
                f"{at.context:,} tokens",
                f"{1000 * at.original:,.1f} ms",
                f"{1000 * at.converted:,.1f} ms",
                f"{median:.2f} ({low:.2f}-{high:.2f})",
            ]
        )
    return rows


def notes(verdict: Verdict) -> list[str]:
    """What the figures are of, and what is missing, as sentences without a full stop."""
    found = [f"cache in {verdict.cache.dtype}"]
    if verdict.positions:
        found.append(f"quality on {verdict.positions:,} tokens of text that nothing was fitted to")
    speeds = verdict.speeds
    if speeds.contexts:
        found.append("decode: milliseconds a token on headwise, medians and quartiles")
        found += [f"original: {speeds.original}", f"converted: {speeds.converted}"]
    if speeds.note:
        found.append(speeds.note)
    return found


def made_with(verdict: Verdict) -> str:
    """Versions and machine on one line."""
    at = verdict.environment
    versions = ", ".join(f"{name} {at[name]}" for name in ("headwise", "torch", "transformers"))
    threads = at["cpu"]["torch_threads"]
    return f"{versions}, python {at['python']}; {at['cpu']['model']}, {threads} threads"
