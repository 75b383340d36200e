"""How long a layer's attention takes in a decode step here: predicted, and timed beside it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from headwise.base.progress import Progress
from headwise.measure import Shape
from headwise.planning.kernel_rates import measure_rates
from headwise.spec import AttentionSpec

if TYPE_CHECKING:
    from headwise.planning.planner import Plan

_CONTEXTS = (1024, 4096, 16_384, 32_768)


@dataclass(frozen=True)
class TimeCheck:
    """Seconds of one layer's attention in a decode step; measured as median and quartiles."""

    attention: str
    context: int
    predicted: float
    measured: float
    low: float
    high: float


def check_times(plan: "Plan", progress: Progress) -> tuple[tuple[TimeCheck, ...], tuple[str, ...]]:
    """A check for each kind of layer and context, and what there is to say about them."""
    if plan.cache.integers:
        return (), ("the time of a step is predicted for caches of floating-point numbers only",)
    most = plan.model.spec.max_context
    contexts = [context for context in _CONTEXTS if most is None or context <= most]
    shapes: dict[Shape, tuple[AttentionSpec, int]] = {}
    notes = []
    for layer, _ in plan.model.spec.layer_groups():
        attention = layer.attention
        if attention is None or attention.indexer is not None:
            notes.append(f"not timed, as it stays with Transformers: {layer}")
            continue
        for context in contexts:
            # a window's layer is one that holds no more than the window
            whole = replace(attention, window=None, chunked=False)
            shape = Shape(spec=whole, context=attention.pairs(1, context))
            shapes.setdefault(shape, (attention, context))
    if not shapes:
        notes = notes or ["no layer is timed: the model takes fewer than 1,024 tokens"]
        return (), tuple(notes)
    rates, timings = measure_rates(plan.dtype, list(shapes), progress)
    times = []
    for shape, (spec, context) in shapes.items():
        predicted, timing = rates.seconds(spec, context), timings[shape]
        times.append(TimeCheck(str(spec), context, predicted, timing.median, *timing.quartiles))
    if any(time.high > 1.5 * time.low for time in times):
        notes.append("the machine was busy: quartiles differ by more than half; run it again")
    return tuple(times), tuple(notes)
