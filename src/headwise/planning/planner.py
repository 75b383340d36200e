"""`plan`: what a model's cache costs, what fits, and how fast a token can come at best."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from headwise.base import units
from headwise.base.console import as_html, as_text
from headwise.base.progress import Progress, silent
from headwise.errors import OptionError
from headwise.planning.allocation import Allocated, cache_allocation, stock_heads
from headwise.planning.alternatives import Alternative, alternatives
from headwise.planning.cached import CacheFormat, served_dtype
from headwise.planning.devices import Device, find_device
from headwise.planning.estimates import Estimator, Step
from headwise.planning.layer_groups import LayerGroup, layer_groups
from headwise.planning.model import PlannedModel, find_model
from headwise.planning.ranks import LINK, Ranks, plan_ranks
from headwise.planning.weights import Weights, count_weights
from headwise.planning.workload import Workload
from headwise.spec import ModelSpec, SparseChoice
from headwise.spec.checks import shown

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, repr=False)
class Plan:
    """What a model costs at a context and a batch; prints as tables, `to_dict` is plain data.

    Sizes in bytes, times in seconds. `largest_context` is at `batch`, `largest_batch` at `context`;
    0 where not even one fits, None where nothing grows. `at_limit` says that the context is the
    model's own limit and not the memory's.
    """

    model: PlannedModel
    context: int
    encoder_context: int
    batch: int
    dtype: str
    cache: CacheFormat
    sparse: str | None
    ranks: Ranks | None
    device: Device
    memory: int
    groups: tuple[LayerGroup, ...]
    weights: Weights
    weight_bytes: int
    bytes_per_token: int
    cached: Allocated
    largest_context: int | None
    at_limit: bool
    largest_batch: int | None
    decode: Step | None
    prefill: Step
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]

    @property
    def workload(self) -> Workload:
        """The sequences that are planned for."""
        return Workload(self.cache, self.context, self.batch, self.encoder_context)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        fields = asdict(self)
        fields["model"] = {
            "name": self.model.name,
            "spec": str(self.model.spec),
            "sources": list(self.model.sources),
            "config": self.model.config,
        }
        return fields

    def __repr__(self) -> str:
        return (
            f"<Plan {self.model.name}, {self.dtype}: {self.bytes_per_token:,} bytes per token, "
            f"{self.cached.needed:,} at {self.context:,} tokens x {self.batch}; print it for all>"
        )

    def __str__(self) -> str:
        return as_text(*self._parts())

    def _repr_html_(self) -> str:
        return as_html(*self._parts())

    def _parts(self) -> list[Any]:
        from headwise.planning.tables import plan_parts

        return plan_parts(self)


def plan(
    model: str | Path,
    *,
    context: int | str | None = None,
    batch: int = 1,
    encoder_context: int | str | None = None,
    dtype: str | None = None,
    cache_dtype: str | None = None,
    sparse: str | None = None,
    ranks: int | None = None,
    link: float | str | None = None,
    memory: int | str | None = None,
    device: str | None = None,
    bandwidth: float | str | None = None,
    peak: float | str | None = None,
    progress: Progress = silent,
) -> Plan:
    """What a model's cache costs, what fits and how fast a token can come, from its config alone.

    Example:
        >>> import headwise
        >>> plan = headwise.plan("llama-3-8b", context=8192, device="h100")
        >>> plan.bytes_per_token, plan.cached.needed == 8192 * plan.bytes_per_token
        (131072, True)
        >>> print(f"{plan.decode.tokens_per_second:.0f} tokens/s at most")
        208 tokens/s at most

    Args:
        model: a named model (`headwise plan --list`), a folder, a config.json, a .gguf file or a
            hub id.
        context: tokens of each sequence, as 8192 or "8k"; the model's limit by default.
        batch: sequences.
        encoder_context: the encoder's tokens, of a model with cross-attention; `context` by
            default.
        dtype: of weights and cache; the config's by default, bfloat16 where it has none.
        cache_dtype: another dtype for the cache, or int8 or int4 for headwise's own.
        sparse: how many keys a query of a step gets, as `headwise.attach` takes it.
        ranks: estimate a context that is spread over so many processes, each such a device.
        link: bytes per second between them, or "10GB/s"; 0.6 GB/s by default, one machine's.
        memory: bytes to fit into, as a number or "24GiB"; the device's by default.
        device: one of `headwise.planning.DEVICES`; None is this machine, measured once.
        bandwidth: bytes per second, or "50GB/s", instead of the device's.
        peak: FLOP per second, or "150GFLOP/s", instead of the device's.
        progress: called with a stage's name and how far it is.

    Raises:
        LoadError: no such model, or not a readable one.
        SpecError: a config that is not covered or contradicts itself.
        OptionError: a value that is out of range.
    """
    choice = None if sparse is None else SparseChoice.parse(sparse)
    if link is not None and ranks is None:
        raise OptionError("link is that between ranks: give their number")
    planned = find_model(model, progress)
    if choice is not None:
        planned = replace(planned, spec=_choosing(planned, choice))
    spec = planned.spec
    dtype = _dtype(planned, dtype)
    workload = Workload.of(
        spec,
        CacheFormat.parse(cache_dtype, dtype),
        context=_number("context", context, units.tokens),
        batch=batch,
        encoder_context=_number("encoder_context", encoder_context, units.tokens),
    )
    machine = find_device(
        device,
        dtype,
        bandwidth=_number("bandwidth", bandwidth, units.bandwidth),
        peak=_number("peak", peak, units.flops),
        memory=_number("memory", memory, units.size),
        progress=progress,
    )
    rate = _number("link", link, units.bandwidth)
    progress("counting weights", 0, 0)
    estimator = Estimator(machine, count_weights(planned), workload)
    largest = estimator.largest_context(spec)
    return Plan(
        model=planned,
        context=workload.context,
        encoder_context=workload.encoder_context,
        batch=workload.batch,
        dtype=dtype,
        cache=workload.cache,
        sparse=None if choice is None else str(choice),
        ranks=None
        if ranks is None
        else plan_ranks(ranks, planned, workload, machine, rate or LINK),
        device=machine,
        memory=machine.memory,
        groups=layer_groups(spec, replace(workload, batch=1)),
        weights=estimator.weights,
        weight_bytes=estimator.weight_bytes,
        bytes_per_token=workload.cache.token_bytes(spec),
        cached=cache_allocation(planned, workload),
        largest_context=largest,
        at_limit=largest is not None and largest == estimator.longest(spec) == spec.max_context,
        largest_batch=estimator.largest_batch(spec),
        decode=estimator.decode(spec) if spec.layers else None,
        prefill=estimator.prefill(spec),
        alternatives=alternatives(spec, estimator),
        notes=_notes(planned, workload.context, asked=context is not None),
    )


def _choosing(model: PlannedModel, choice: SparseChoice) -> ModelSpec:
    """The model with layers that choose their keys, those that can.

    Raises:
        OptionError: none can.
    """
    dense, layers = choice.obstacles(model.spec.layers), []
    for layer in model.spec.layers:
        if layer.attention is not None and layer.index not in dense:
            layer = replace(layer, mixer=replace(layer.attention, sparse=choice))
        layers.append(layer)
    if tuple(layers) == model.spec.layers:
        reason = list(dense.values())[-1] if dense else "it has no decoder"
        raise OptionError(
            f"sparse is {str(choice)!r}, and no layer of {model.name} can choose its keys: {reason}"
        )
    return replace(model.spec, layers=tuple(layers))


def _number(
    option: str, value: _Number | str | None, read: Callable[[str, str], _Number]
) -> _Number | None:
    return read(option, value) if isinstance(value, str) else value


def _dtype(model: PlannedModel, asked: str | None) -> str:
    dtype = served_dtype(str(model.dtype if asked is None else asked))
    if dtype is None and asked is not None:
        raise OptionError(f"dtype is {shown(asked)}, expected bfloat16, float16 or float32")
    return dtype or "bfloat16"  # where it is stored in another one, it is computed in this


def _notes(model: PlannedModel, context: int, asked: bool) -> tuple[str, ...]:
    notes = list(model.notes)
    most = model.spec.max_context
    if most is None and not asked:
        notes.append(f"the model sets no limit: planned for {context:,} tokens")
    if most is not None and context > most:
        notes.append(f"{context:,} tokens are more than the {most:,} that the model takes")
    repeated = stock_heads(model)
    if repeated is not None:
        notes.append(
            f"Transformers caches {repeated} kv heads, the few that there are repeated for every "
            "query head; headwise caches those that there are"
        )
    return tuple(notes)
