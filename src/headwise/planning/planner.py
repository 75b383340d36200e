"""`plan`: what a model's cache costs, what fits, and how fast a token can come at best."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwise.base import units
from headwise.base.console import as_html, as_text
from headwise.base.progress import Progress, silent
from headwise.errors import OptionError, UnsupportedError
from headwise.planning.allocation import headwise_bytes, stock_bytes, stock_heads
from headwise.planning.cached import NUMBERS, CacheFormat
from headwise.planning.costs import Cost, decode_cost, prefill_cost
from headwise.planning.devices import Device, find_device
from headwise.planning.model import Model, find_model
from headwise.planning.replanned import MECHANISMS, replanned
from headwise.planning.tables import plan_parts
from headwise.planning.weights import Weights, count_weights
from headwise.spec import LayerSpec, ModelSpec
from headwise.spec.checks import shown
from headwise.spec.dtypes import bytes_per_element

# Where positions set no limit, the length that T5 was trained with.
_NO_LIMIT = 512
# Above any context that is asked for.
_MOST_TOKENS = 2**40
_MOST_BYTES = 2**56


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are equal but for their index.

    `cached_tokens` and `bytes` are those of all these layers for one sequence at the context.
    """

    stack: str
    layers: tuple[int, ...]
    attention: str
    mechanism: str
    heads: int | None
    kv_heads: int | None
    bytes_per_token: int
    cached_tokens: int
    bytes: int


@dataclass(frozen=True)
class Allocated:
    """Bytes of the cache: what the architecture needs, what each of the two allocates for it.

    None where Transformers has no such model.
    """

    needed: int
    stock: int | None
    headwise: int | None


@dataclass(frozen=True)
class Step:
    """A decode step or a prefill: what it moves and computes, and the least time for that.

    `tokens_per_second` counts all sequences; `bound` is "bandwidth" or "compute".
    """

    cost: Cost
    seconds: float
    tokens_per_second: float
    bound: str


@dataclass(frozen=True)
class Alternative:
    """The model as planned, or re-planned with another mechanism."""

    name: str
    spec: ModelSpec
    bytes_per_token: int
    bytes: int
    decode: Step
    largest_context: int | None


@dataclass(frozen=True, repr=False)
class Plan:
    """What a model costs at a context and a batch; prints as tables, `to_dict` is plain data.

    Sizes in bytes, times in seconds. `largest_context` is at `batch`, `largest_batch` at `context`;
    0 where not even one fits, None where nothing grows. `at_limit` says that the context is the
    model's own limit and not the memory's.
    """

    model: Model
    context: int
    encoder_context: int
    batch: int
    dtype: str
    cache: CacheFormat
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
        return as_text(*plan_parts(self))

    def _repr_html_(self) -> str:
        return as_html(*plan_parts(self))


def plan(
    model: str | Path,
    *,
    context: int | str | None = None,
    batch: int = 1,
    encoder_context: int | str | None = None,
    dtype: str | None = None,
    cache_dtype: str | None = None,
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
    found = find_model(model, progress)
    spec, asked = found.spec, context is not None
    tokens, in_encoder = (
        units.tokens(name, value) if isinstance(value, str) else value
        for name, value in (("context", context), ("encoder_context", encoder_context))
    )
    context, encoder_context = _lengths(spec, tokens, in_encoder)
    if isinstance(memory, str):
        memory = units.size("memory", memory)
    if isinstance(bandwidth, str):
        bandwidth = units.bandwidth("bandwidth", bandwidth)
    if isinstance(peak, str):
        peak = units.flops("peak", peak)
    _at_least_one("batch", batch)
    name = _dtype(found, dtype)
    cache = CacheFormat.parse(cache_dtype, name)
    device_found = find_device(
        device, name, bandwidth=bandwidth, peak=peak, memory=memory, progress=progress
    )
    progress("counting weights", 0, 0)
    weights = count_weights(found)
    weight_bytes = weights.total * bytes_per_element(name)
    free = device_found.memory - weight_bytes
    # Who asks for more than the model was made for gets an answer, and a note.
    limit = max(context, spec.max_context or _MOST_TOKENS)

    def needs(spec: ModelSpec, context: int, batch: int) -> int:
        return cache.model_bytes(spec, context, batch, encoder_context)

    def largest(spec: ModelSpec) -> int | None:
        if cache.token_bytes(spec) == 0:
            return None
        return _largest(lambda tokens: needs(spec, tokens, batch) <= free, limit)

    def step(spec: ModelSpec, tokens: int, count: Callable[..., Cost]) -> Step:
        cost = count(
            spec,
            weights,
            cache,
            context=context,
            batch=batch,
            dtype=name,
            encoder_context=encoder_context,
        )
        return _step(cost, device_found, name, tokens)

    most = largest(spec)
    per_sequence = needs(spec, context, 1)
    if batch * max(context, encoder_context) * max(1, per_sequence // context) > _MOST_BYTES:
        raise OptionError(
            f"a cache of {batch:,} x {context:,} tokens takes more bytes than can be counted; "
            "give less"
        )
    prompt = batch * (encoder_context if spec.encoder_layers and spec.layers else context)
    return Plan(
        model=found,
        context=context,
        encoder_context=encoder_context,
        batch=batch,
        dtype=name,
        cache=cache,
        device=device_found,
        memory=device_found.memory,
        groups=_groups(spec, cache, context, encoder_context),
        weights=weights,
        weight_bytes=weight_bytes,
        bytes_per_token=cache.token_bytes(spec),
        cached=_allocated(found, cache, name, context, batch, encoder_context),
        largest_context=most,
        at_limit=most is not None and most == limit == spec.max_context,
        largest_batch=max(0, free // per_sequence) if per_sequence else None,
        decode=step(spec, batch, decode_cost) if spec.layers else None,
        prefill=step(spec, prompt, prefill_cost),
        alternatives=tuple(
            Alternative(
                label,
                other,
                cache.token_bytes(other),
                needs(other, context, batch),
                step(other, batch, decode_cost),
                largest(other),
            )
            for label, other in _alternatives(spec)
        ),
        notes=_notes(found, context, given=asked),
    )


def _lengths(spec: ModelSpec, context: int | None, encoder_context: int | None) -> tuple[int, int]:
    if context is None:
        context = spec.max_context or _NO_LIMIT
        if context > _MOST_TOKENS:
            raise OptionError(
                f"{spec.family} takes {context:,} tokens by its config, more than can be planned "
                "for: give a context"
            )
    _at_least_one("context", context)
    if not spec.has_cross_attention:
        if encoder_context is not None:
            raise OptionError(
                f"encoder_context is {encoder_context}, and {spec.family} has no cross-attention: "
                "leave it out"
            )
        return context, 0
    encoder_context = context if encoder_context is None else encoder_context
    _at_least_one("encoder_context", encoder_context)
    return context, encoder_context


def _at_least_one(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_TOKENS:
        raise OptionError(f"{name} is {shown(value)}, expected an int from 1 to {_MOST_TOKENS:,}")


def _dtype(model: Model, given: str | None) -> str:
    found = model.dtype if given is None else given
    name = NUMBERS.get(str(found).removeprefix("torch."))
    if name is not None:
        return name
    if given is None:  # stored in another one, and computed in this
        return "bfloat16"
    raise OptionError(f"dtype is {shown(given)}, expected bfloat16, float16 or float32")


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 0 to `most` that fits, where fewer always fit too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _step(cost: Cost, device: Device, dtype: str, tokens: int) -> Step:
    seconds = device.seconds(cost.bytes, cost.flops, dtype)
    by_memory = cost.bytes / device.bytes_per_second >= cost.flops / device.peak(dtype)
    return Step(cost, seconds, tokens / seconds, "bandwidth" if by_memory else "compute")


def _groups(
    spec: ModelSpec, cache: CacheFormat, context: int, encoder_context: int
) -> tuple[LayerGroup, ...]:
    groups = []
    for stack, layers in (("encoder", spec.encoder_groups()), ("decoder", spec.layer_groups())):
        for layer, indices in layers:
            groups.append(_group(stack, layer, indices, cache, context, encoder_context))
    return tuple(groups)


def _group(
    stack: str,
    layer: LayerSpec,
    indices: tuple[int, ...],
    cache: CacheFormat,
    context: int,
    encoder_context: int,
) -> LayerGroup:
    at, cached = layer.attention, layer.cached
    token = 0 if cached is None else cache.row_bytes(cached) + cache.index_bytes(cached)
    held = 0 if stack == "encoder" else cache.layer_bytes(layer, context, 1, encoder_context)
    return LayerGroup(
        stack=stack,
        layers=indices,
        attention=str(layer),
        mechanism="linear" if at is None else at.mechanism,
        heads=None if at is None else at.heads,
        kv_heads=None if at is None else at.kv_heads,
        bytes_per_token=token * len(indices),
        cached_tokens=0 if cached is None else cached.cached_tokens(context),
        bytes=held * len(indices),
    )


def _allocated(
    model: Model, cache: CacheFormat, dtype: str, context: int, batch: int, encoder_context: int
) -> Allocated:
    needed = cache.model_bytes(model.spec, context, batch, encoder_context)
    if not model.spec.layers:
        return Allocated(0, 0, 0)
    try:
        return Allocated(
            needed,
            stock_bytes(model, dtype, context, batch, encoder_context),
            headwise_bytes(model, cache, context, batch, encoder_context),
        )
    except UnsupportedError:
        return Allocated(needed, None, None)


def _alternatives(spec: ModelSpec) -> list[tuple[str, ModelSpec]]:
    """The model as it is and as each mechanism."""
    if not any(layer.cached is not None for layer in spec.layers):
        return []
    others: dict[str, ModelSpec] = {}
    for mechanism in MECHANISMS:
        other = replanned(spec, mechanism)
        if other in others.values():
            continue
        name = mechanism
        if mechanism.startswith("GQA"):
            name = f"GQA-{max(at.cached.kv_heads for at in other.layers if at.cached)}"
        others[f"{name} (as it is)" if other == spec else name] = other
    if spec not in others.values():
        others = {"as it is": spec, **others}
    return list(others.items())


def _notes(model: Model, context: int, given: bool) -> tuple[str, ...]:
    notes = list(model.notes)
    most = model.spec.max_context
    if most is None and not given:
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
