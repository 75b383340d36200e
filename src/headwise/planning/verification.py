"""Whether a plan comes true here: the model's attention run, its cache weighed, its steps timed."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from headwise.base.memory import available_bytes
from headwise.base.progress import Progress, silent
from headwise.errors import OptionError, UnsupportedError
from headwise.hf.attach import attach
from headwise.hf.cache import cache_nbytes
from headwise.hf.stock_names import CACHE, BaseModelOutput, EncoderDecoderCache
from headwise.planning.allocation import allocated, headwise_bytes, stock_bytes
from headwise.planning.decode_times import TimeCheck, check_times
from headwise.planning.devices import DEVICES
from headwise.planning.model import PlannedModel
from headwise.planning.planner import Plan
from headwise.planning.reduced import reduced
from headwise.planning.stock_model import build_on_meta
from headwise.planning.weights import count_weights
from headwise.planning.workload import Workload
from headwise.spec import ModelSpec
from headwise.spec.dtypes import bytes_per_element

_SHORTEST = 24
_ENCODER = 17
_BATCH = 2
# Parameters of a model that is made whole to be checked.
_WHOLE = 500_000_000


@dataclass(frozen=True)
class CacheCheck:
    """Bytes of a cache: predicted, and measured of a model that ran."""

    name: str
    predicted: int
    measured: int


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
    # With states alone, Transformers' models do not run on a cache.
    if not any(layer.cached for layer in model.spec.layers):
        raise UnsupportedError(
            f"{model.name} caches nothing that grows, so there is nothing to verify"
        )
    if plan.device.name in {device.name for device in DEVICES.values()}:
        raise OptionError(
            f"verify runs on this machine, and the plan is for {plan.device.name}: leave the "
            "device out"
        )
    progress("making a model to check with", 0, 0)
    small = model if _fits_whole(model, plan.dtype) else reduced(model)
    context, encoder_context = _lengths(small.spec)
    progress("running it", 0, 0)
    caches = check_caches(small, Workload(plan.cache, context, _BATCH, encoder_context))
    times, notes = check_times(plan, progress)
    return Verified(len(small.spec.layers), context, caches, times, notes)


def check_caches(model: PlannedModel, workload: Workload) -> tuple[CacheCheck, ...]:
    """Bytes that the caches of this model take, predicted and measured."""
    made = _make(model, workload.cache.dtype)
    stock = _run(made, model.spec, workload)
    needed = workload.cache_bytes(model.spec)
    by_stock = CacheCheck("allocated by Transformers", stock_bytes(model, workload), _weigh(stock))
    try:
        attach(made, cache=str(workload.cache.choice))
    except UnsupportedError:  # all of it stays with Transformers
        return CacheCheck("needed", needed, cache_nbytes(stock)), by_stock
    own = _run(made, model.spec, workload)
    return (
        CacheCheck("needed", needed, cache_nbytes(own)),
        CacheCheck("allocated by headwise", headwise_bytes(model, workload), _weigh(own)),
        by_stock,
    )


@torch.no_grad()
def _make(model: PlannedModel, dtype: str) -> Any:
    """The model with weights of zero: its cache takes what any weights make it take."""
    made = build_on_meta(model, dtype)
    made.to_empty(device="cpu")
    made.tie_weights()
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.zero_()
    return made.eval()


@torch.no_grad()
def _run(model: Any, spec: ModelSpec, workload: Workload) -> Any:
    """The cache that holds the workload's tokens: a prompt, and one decode step."""
    tokens = torch.zeros(workload.batch, workload.context, dtype=torch.int64)
    options: dict[str, Any] = {"use_cache": True}
    if spec.has_cross_attention:
        size = (workload.batch, workload.encoder_context, model.config.hidden_size)
        seen = torch.zeros(size, dtype=model.dtype)
        if spec.encoder_layers:
            options["encoder_outputs"] = BaseModelOutput(last_hidden_state=seen)
        else:
            options["encoder_hidden_states"] = seen
    name = "decoder_input_ids" if spec.encoder_layers else "input_ids"
    cache = None
    for part in tokens.split([workload.context - 1, 1], dim=1):
        if part.shape[1]:
            cache = model(**{name: part, CACHE: cache}, **options)[CACHE]
    return cache


def _weigh(cache: Any) -> int:
    """`allocated` of a cache that a model returned, which may be of two."""
    if isinstance(cache, EncoderDecoderCache):
        return allocated(cache.self_attention_cache, cache.cross_attention_cache)
    return allocated(cache)


def _fits_whole(model: PlannedModel, dtype: str) -> bool:
    total = count_weights(model).total
    free = available_bytes(torch.device("cpu"))
    return total <= _WHOLE and 4 * total * bytes_per_element(dtype) < free


def _lengths(spec: ModelSpec) -> tuple[int, int]:
    """Tokens that pass every window, within the model's limit."""
    windows = [layer.cached.window or 0 for layer in spec.layers if layer.cached]
    context = max(_SHORTEST, *(window + window // 8 for window in windows), 0)
    if spec.max_context is not None:
        context = min(context, spec.max_context)
    return context, _ENCODER if spec.has_cross_attention else 0
