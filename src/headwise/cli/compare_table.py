"""What `headwise compare` ends with: a column per mechanism, a row per figure, and the verdict."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from headwise.base.console import counted
from headwise.cli.tables import columns, show_table
from headwise.comparison import Comparison, Speed
from headwise.comparison.experiment import FIGURE
from headwise.comparison.task import Metric
from headwise.comparison.verdict import SeedScores

_METRICS: tuple[Metric, ...] = ("accuracy", "loss")


def show(comparison: Comparison, out: Path) -> None:
    """Print what is finished to stdout."""
    asked = comparison.configuration
    what = "text" if asked.task == "text" else f"recall of {asked.pairs} pairs"
    what += f" over {asked.length} tokens" if asked.task == "beyond" else ""
    done = f"{len(comparison.runs)} of {len(asked.mechanisms) * asked.seeds} runs"
    title = f"{what}, {asked.layers} layers of {asked.heads} x {asked.head_dim} dims, {done}"
    table = columns(["", *asked.mechanisms], _rows(comparison), no_wrap=("",))
    show_table(title, table, _lines(comparison, out))


def _rows(comparison: Comparison) -> Iterable[list[str]]:
    rows = comparison.rows()
    for metric in _METRICS:
        yield [metric, *_quality(comparison, metric, lambda each: each.mean)]
        if comparison.configuration.seeds > 1 and metric == comparison.metric:
            spread: dict[str, Callable[[SeedScores], float | None]] = {
                "  deviation of seeds": lambda each: each.deviation,
                "  lowest seed": lambda each: min(each.values),
                "  highest seed": lambda each: max(each.values),
            }
            for title, figure in spread.items():
                yield [title, *_quality(comparison, metric, figure)]
    known = {speed.mechanism: speed for speed in comparison.speeds}
    measured = [known.get(name) for name in comparison.configuration.mechanisms]

    def speeds(figure: Callable[[Speed], str]) -> Iterable[str]:
        return ("-" if speed is None else figure(speed) for speed in measured)

    yield ["cache bytes per token", *speeds(lambda speed: f"{speed.cache_bytes_per_token:,}")]
    sizes = (f"{row['cache_bytes_per_sequence']:,}" for row in rows)
    yield [f"at {comparison.configuration.tokens:,} tokens, in all", *sizes]
    contexts = [each.context for each in comparison.speeds[0].decode] if comparison.speeds else []
    for index, context in enumerate(contexts):
        yield [f"decode at {context:,}", *speeds(partial(_decode, index))]
    yield ["training tokens/s", *speeds(lambda each: f"{each.training.tokens_per_second:,.0f}")]
    yield ["peak memory, MiB", *speeds(_peak)]
    yield ["parameters", *(f"{row['parameters']:,}" for row in rows)]
    yield ["MLP width", *(f"{row['feed_forward']:,}" for row in rows)]


def _lines(comparison: Comparison, out: Path) -> Iterable[str]:
    asked = comparison.configuration
    plain = "any value of the sequence" if asked.task != "text" else "the frequency of each byte"
    yield f"{comparison.metric} by {plain}: {comparison.baseline:.3f}"
    if comparison.speeds:
        threads = counted(asked.threads, "thread")
        yield f"decode: tokens/s of one sequence after that many, float32, {threads}"
        yield f"peak memory is that of a training step of {asked.batch:,} tokens, above the weights"
    yield from comparison.verdict()
    drawn = ", figure.svg" if (out.expanduser() / FIGURE).exists() else ""
    yield f"in {out}: results.json, results.csv{drawn}"
    if comparison.complete and not drawn:
        yield "no figure: it needs Matplotlib; pip install 'headwise[bench]', then run this again"


def _quality(
    comparison: Comparison, metric: Metric, figure: Callable[[SeedScores], float | None]
) -> Iterable[str]:
    known = {each.mechanism: each for each in comparison.qualities(metric)}
    for name in comparison.configuration.mechanisms:
        number = figure(known[name]) if name in known else None
        yield "-" if number is None else f"{number:.3f}"


def _decode(index: int, speed: Speed) -> str:
    return f"{speed.decode[index].rate.tokens_per_second:,.0f}"


def _peak(speed: Speed) -> str:
    return "-" if speed.peak_memory is None else f"{speed.peak_memory / 2**20:.1f}"
