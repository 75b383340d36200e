"""The verdict's figures as rows of text, for the terminal and for the model card."""

from collections.abc import Callable

from headwise.conversion.verdict.quality import Quality
from headwise.conversion.verdict.verdict import Verdict

Rows = list[list[str]]
"""The first row is the header."""


def quality_rows(verdict: Verdict) -> Rows:
    """Cache, perplexity and agreement; a column for each model."""
    models = {"original": verdict.original, "converted": verdict.converted, **verdict.qualities}
    cache = verdict.cache
    bytes_per_token = [cache.original, *[cache.converted] * (len(models) - 1)]
    rows = [["", *models], ["cache bytes per token", *(f"{count:,}" for count in bytes_per_token)]]
    if verdict.original is None:
        return rows
    figures: dict[str, Callable[[Quality], str]] = {
        "perplexity": lambda quality: f"{quality.perplexity:,.2f}",
        "  times the original's": lambda quality: f"{verdict.factor(quality):,.2f}",
        "original's likeliest token": lambda quality: f"{quality.agreement:.1%}",
    }
    for name, figure in figures.items():
        rows.append([name, *("-" if each is None else figure(each) for each in models.values())])
    return rows


def speed_rows(verdict: Verdict) -> Rows:
    """Decoding at each context; only a header where it was not measured."""
    rows = [["decode at", "original", "converted", "times as fast"]]
    for speed in verdict.speeds.contexts:
        ratio = speed.ratio
        rows.append(
            [
                f"{speed.context:,} tokens",
                f"{1000 * speed.original:,.1f} ms",
                f"{1000 * speed.converted:,.1f} ms",
                f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})",
            ]
        )
    return rows


def notes(verdict: Verdict) -> list[str]:
    """What the figures are of, and what is missing, as sentences without a full stop."""
    lines = [f"cache in {verdict.cache.dtype}"]
    if verdict.positions:
        lines.append(f"quality on {verdict.positions:,} tokens of text that nothing was fitted to")
    speeds = verdict.speeds
    if speeds.contexts:
        lines.append("decode: milliseconds per token on headwise, medians and quartiles")
        lines += [f"original: {speeds.original}", f"converted: {speeds.converted}"]
    if speeds.note:
        lines.append(speeds.note)
    return lines


def made_with(verdict: Verdict) -> str:
    """Versions and machine on one line."""
    facts = verdict.environment
    versions = ", ".join(f"{name} {facts[name]}" for name in ("headwise", "torch", "transformers"))
    threads = facts["cpu"]["torch_threads"]
    return f"{versions}, python {facts['python']}; {facts['cpu']['model']}, {threads} threads"
