"""Whether a plan comes true here: the model's attention run, its cache weighed, its steps timed."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import EncoderDecoderCache

from headwise.base.memory import available_bytes
from headwise.base.progress import Progress, silent
from headwise.errors import OptionError, UnsupportedError
from headwise.hf.attach import attach
from headwise.hf.cache import cache_nbytes
from headwise.measure import Shape
from headwise.planning.allocation import allocated, headwise_bytes, stock_bytes
from headwise.planning.cached import CacheFormat
from headwise.planning.devices import DEVICES
from headwise.planning.kernel_rates import measure_rates
from headwise.planning.model import Model
from headwise.planning.planner import Plan
from headwise.planning.reduced import reduced
from headwise.planning.weights import build_on_meta, count_weights
from headwise.spec import AttentionSpec, ModelSpec, StateSpec
from headwise.spec.dtypes import bytes_per_element

_CONTEXTS = (1024, 4096, 16_384, 32_768)
_SHORTEST = 24
_ENCODER = 17
# Parameters of a model that is made whole to be checked.
_WHOLE = 500_000_000


@dataclass(frozen=True)
class CacheCheck:
    """Bytes of a cache: predicted, and measured of a model that ran."""

    name: str
    predicted: int
    measured: int


@dataclass(frozen=True)
class TimeCheck:
    """Seconds of one layer's attention in a decode step; measured as median and quartiles."""

    attention: str
    context: int
    predicted: float
    measured: float
    low: float
    high: float


@dataclass(frozen=True)
class Verified:
    """What was predicted beside what was measured.

    The caches are those of a model of `layers` layers that held `context` tokens of 2 sequences.
    """

    layers: int
    context: int
    caches: tuple[CacheCheck, ...]
    times: tuple[TimeCheck, ...]
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every cache is what was predicted, to the byte."""
        return all(check.predicted == check.measured for check in self.caches)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        return asdict(self)


def verify(plan: Plan, progress: Progress = silent) -> Verified:
    """Run the attention of the planned model and compare: its cache's bytes, its decode time.

    The model is made without its weights: whole where it is small, else with a few of its layers, a
    small MLP and a small vocabulary. The caches of Transformers and of headwise are weighed after a
    prompt and a decode step. The time is that of headwise's operator on random tensors, for each
    kind of layer; it is predicted from rates that were measured in the same rounds on other shapes.

    Raises:
        UnsupportedError: Transformers has no such model, or it caches nothing.
        OptionError: a plan for another device.
    """
    model = plan.model
    if not any(layer.cached or isinstance(layer.mixer, StateSpec) for layer in model.spec.layers):
        raise UnsupportedError(f"{model.name} caches nothing, so there is nothing to verify")
    if plan.device.name in {device.name for device in DEVICES.values()}:
        raise OptionError(
            f"verify runs on this machine, and the plan is for {plan.device.name}: leave the "
            "device out"
        )
    progress("making a model to check with", 0, 0)
    small = model if _fits_whole(model, plan.dtype) else reduced(model)
    context, encoder_context = _lengths(small.spec)
    progress("running it", 0, 0)
    cache = CacheFormat(plan.dtype, plan.cache.bits)
    caches = check_caches(small, cache, context, encoder_context)
    times, notes = _times(plan, progress)
    return Verified(len(small.spec.layers), context, caches, times, notes)


def check_caches(
    model: Model, cache: CacheFormat, context: int, encoder_context: int
) -> tuple[CacheCheck, ...]:
    """Bytes that the caches of this model take, predicted and measured, for 2 sequences."""
    built = make(model, cache.dtype)
    stock = run(built, model.spec, context, encoder_context)
    lengths = (context, 2, encoder_context)
    needed = cache.model_bytes(model.spec, *lengths)
    stock_predicted = stock_bytes(model, cache.dtype, *lengths)
    by_stock = CacheCheck("allocated by Transformers", stock_predicted, held(stock))
    try:
        attach(built, cache=str(cache.choice))
    except UnsupportedError:  # all of it stays with Transformers
        return CacheCheck("needed", needed, cache_nbytes(stock)), by_stock
    own = run(built, model.spec, context, encoder_context)
    predicted = headwise_bytes(model, cache, *lengths)
    return (
        CacheCheck("needed", needed, cache_nbytes(own)),
        CacheCheck("allocated by headwise", predicted, held(own)),
        by_stock,
    )


def make(model: Model, dtype: str) -> Any:
    """The model with weights of zero: its cache takes what any weights make it take."""
    made = build_on_meta(model, dtype)
    made.to_empty(device="cpu")
    made.tie_weights()
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.zero_()
    return made.eval()


@torch.no_grad()
def run(model: Any, spec: ModelSpec, context: int, encoder_context: int) -> Any:
    """The cache that holds `context` tokens of 2 sequences: a prompt, and one decode step."""
    tokens = torch.zeros(2, context, dtype=torch.int64)
    given: dict[str, Any] = {}
    if spec.encoder_layers:
        source = torch.zeros(2, encoder_context, dtype=torch.int64)
        given["encoder_outputs"] = model.get_encoder()(input_ids=source)
    elif spec.has_cross_attention:
        size = (2, encoder_context, model.config.hidden_size)
        given["encoder_hidden_states"] = torch.zeros(size, dtype=model.dtype)
    name = "decoder_input_ids" if spec.encoder_layers else "input_ids"
    cache = None
    for part in tokens.split([context - 1, 1], dim=1):
        if part.shape[1]:
            cache = model(**{name: part}, use_cache=True, cache=cache, **given).cache
    return cache


def held(cache: Any) -> int:
    """`allocated` of a cache that a model returned, which may be of two."""
    if isinstance(cache, EncoderDecoderCache):
        return allocated(cache.self_attention_cache, cache.cross_attention_cache)
    return allocated(cache)


def _fits_whole(model: Model, dtype: str) -> bool:
    total = count_weights(model).total
    free = available_bytes(torch.device("cpu"))
    return total <= _WHOLE and 4 * total * bytes_per_element(dtype) < free


def _lengths(spec: ModelSpec) -> tuple[int, int]:
    """Tokens that pass every window, within the model's limit."""
    windows = [at.cached.window for at in spec.layers if at.cached and at.cached.window]
    context = max(_SHORTEST, *(window + window // 8 for window in windows), 0)
    if spec.max_context is not None:
        context = min(context, spec.max_context)
    return context, _ENCODER if spec.has_cross_attention else 0


def _times(plan: Plan, progress: Progress) -> tuple[tuple[TimeCheck, ...], tuple[str, ...]]:
    notes: list[str] = []
    if plan.cache.bits is not None:
        return (), ("the time of a step is predicted for caches of floating-point numbers only",)
    shapes: dict[Shape, tuple[AttentionSpec, int]] = {}
    left = []
    for layer, _ in plan.model.spec.layer_groups():
        at = layer.attention
        if at is None or at.indexer is not None:
            left.append(f"not timed, as it stays with Transformers: {layer}")
            continue
        for context in _CONTEXTS:
            if plan.model.spec.max_context is None or context <= plan.model.spec.max_context:
                shapes.setdefault(_shape(at, context), (at, context))
    notes += left
    if not shapes:
        if not left:
            notes.append("no layer is timed: the model takes fewer than 1,024 tokens")
        return (), tuple(notes)
    rates, timings = measure_rates(plan.dtype, list(shapes), progress)
    times = []
    for shape, (spec, context) in shapes.items():
        timing = timings[shape]
        low, high = timing.quartiles
        predicted = rates.seconds(spec, context)
        times.append(TimeCheck(str(spec), context, predicted, timing.median, low, high))
    if any(each.high > 1.5 * each.low for each in times):
        notes.append("the machine was busy: quartiles differ by more than half; run it again")
    return tuple(times), tuple(notes)


def _shape(spec: AttentionSpec, context: int) -> Shape:
    """What a decode step computes: a window's layer as one that holds no more than it sees."""
    plain = replace(
        spec,
        causal=spec.cached,
        prefix=False,
        window=None,
        sinks=False,
        softcap=None,
        alibi=False,
        relative_bias=False,
    )
    return Shape(spec=plain, context=spec.pairs(1, context))
