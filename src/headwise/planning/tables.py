"""A plan for people: its layers, its answers, the other mechanisms, as tables and lines."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.table import Table
from rich.text import Text

from headwise.base.console import facts_table, one_line
from headwise.base.memory import gib
from headwise.planning.devices import DEVICES
from headwise.planning.estimates import Step
from headwise.planning.layer_groups import mechanism_of
from headwise.planning.model import find_model
from headwise.planning.named_models import named_models
from headwise.planning.planner import Plan
from headwise.planning.verification import Verified
from headwise.spec import ModelSpec, StateSpec

_Row = TypeVar("_Row")
_LEFT = ("", "layers", "attention", "name", "model", "device", "layer")


def names_parts() -> list[Any]:
    """The named models with their attention, and the named devices."""
    models = _table(
        "named models",
        ((name, find_model(name)) for name in named_models()),
        ("name", lambda item: item[0]),
        ("model", lambda item: item[1].name),
        ("attention", lambda item: _mechanisms(item[1].spec)),
    )
    devices = _table(
        "named devices",
        DEVICES.items(),
        ("name", lambda item: item[0]),
        ("device", lambda item: item[1].name),
        ("reads", lambda item: _rate(item[1].bytes_per_second, "B/s")),
        ("computes (16 bits)", lambda item: _rate(item[1].peak("bfloat16"), "FLOP/s")),
        ("memory", lambda item: f"{item[1].memory / 1e9:,.0f} GB"),
    )
    return [models, devices]


def plan_parts(plan: Plan) -> list[Any]:
    """A plan, for `headwise.base.console`: tables, then lines."""
    tables = [_layers(plan), facts_table(_answers(plan))]
    if plan.alternatives:
        tables.append(_alternatives(plan))
    device = plan.device
    rates = _rate(device.bytes_per_second, "B/s"), _rate(device.peak(plan.dtype), "FLOP/s")
    lines = [*plan.notes, f"{device.name}: {rates[0]}, {rates[1]} ({device.source})"]
    if plan.model.sources:
        lines.append(f"the model's facts: {len(plan.model.sources)} sources, named by --json")
    return [*tables, *map(_safe, lines)]


def verified_parts(verified: Verified) -> list[Any]:
    """What was predicted beside what was measured."""
    caches = _table(
        f"cache bytes of {verified.layers} layers at {verified.context:,} tokens",
        verified.caches,
        ("", lambda check: check.name),
        ("predicted", lambda check: f"{check.predicted:,}"),
        ("measured", lambda check: f"{check.measured:,}"),
        ("", lambda check: "equal" if check.measured == check.predicted else "DIFFERENT"),
    )
    times = _table(
        "attention of one decode step on headwise, per layer",
        verified.times,
        ("layer", lambda time: time.attention),
        ("context", lambda time: f"{time.context:,}"),
        ("predicted", lambda time: _seconds(time.predicted)),
        ("measured", lambda time: _seconds(time.measured)),
        ("quartiles", lambda time: f"{1e3 * time.low:.3g}-{1e3 * time.high:.3g}"),
        ("predicted / measured", lambda time: f"{time.predicted / time.measured:.2f}"),
    )
    return [caches, *([times] if verified.times else []), *map(_safe, verified.notes)]


def _layers(plan: Plan) -> Table:
    lengths = f"{plan.context:,} tokens"
    if plan.encoder_context:
        lengths += f", {plan.encoder_context:,} in the encoder"
    encoder = plan.model.spec.encoder_layers
    return _table(
        f"{plan.model.name}, {plan.dtype}, {lengths}",
        plan.groups,
        ("layers", lambda group: f"{len(group.layers)}" + (f" {group.stack}" if encoder else "")),
        ("attention", lambda group: group.attention),
        ("per token", lambda group: _amount(group.bytes_per_token)),
        ("tokens held", lambda group: _amount(group.cached_tokens)),
        ("per sequence", lambda group: gib(group.bytes) if group.bytes else "-"),
    )


def _alternatives(plan: Plan) -> Table:
    return _table(
        f"the same heads with another cache, {plan.context:,} tokens x {plan.batch}",
        plan.alternatives,
        ("", lambda other: other.name),
        ("per token", lambda other: f"{other.bytes_per_token:,}"),
        ("cache", lambda other: gib(other.bytes)),
        ("a step reads", lambda other: gib(int(other.decode.cost.bytes))),
        ("tokens/s at most", lambda other: f"{other.decode.tokens_per_second:,.1f}"),
        ("largest context", lambda other: _amount(other.largest_context, "none fits")),
    )


def _answers(plan: Plan) -> Iterable[tuple[str, str]]:
    cache = f"cache ({plan.cache.integers})" if plan.cache.integers else "cache"
    if plan.bytes_per_token:
        yield f"{cache} per token", f"{plan.bytes_per_token:,} bytes"
    if plan.cached.needed:
        yield f"{cache} at {plan.context:,} x {plan.batch}", _allocated(plan)
    elif not plan.decode:
        yield "cache", "none (an encoder)"
    yield from _indexers(plan)
    yield from _sparse(plan)
    yield from _states(plan)
    yield from _ranks(plan)
    weights = plan.weights
    chosen = f", {_count(weights.active)} for one token" if weights.experts else ""
    yield "weights", f"{gib(plan.weight_bytes)}: {_count(weights.total)} parameters{chosen}"
    yield f"fits in {gib(plan.memory)}", _fits(plan)
    if plan.decode is not None:
        bound = f"{plan.decode.tokens_per_second:,.1f} tokens/s, by {plan.decode.bound}"
        if plan.batch > 1:
            bound += f" ({plan.decode.tokens_per_second / plan.batch:,.1f} per sequence)"
        yield "a decode step", _step(plan.decode)
        yield "at most", bound
    yield "reading the prompt", _step(plan.prefill)
    yield "at least", f"{_seconds(plan.prefill.seconds)}, by {plan.prefill.bound}"


def _indexers(plan: Plan) -> Iterator[tuple[str, str]]:
    """What the keys of indexers take, and what a step reads of a layer that chooses."""
    sparse = [layer.cached for layer in plan.model.spec.layers if layer.cached is not None]
    sparse = [attention for attention in sparse if attention.indexer is not None]
    if not sparse:
        return
    dims = [attention.cache_rows.index_dim for attention in sparse]
    own = sparse[dims.index(max(dims))]
    key, held = plan.cache.index_bytes(own), plan.batch * plan.context
    rows = plan.batch * own.pairs(1, plan.context) * plan.cache.row_bytes(own)
    yield (
        "indexers",
        f"{sum(dim > 0 for dim in dims)} layers, {key:,} bytes of keys per token and layer; a step "
        f"reads {gib(key * held)} of them and {gib(rows)} of chosen rows in each, of "
        f"{gib(plan.cache.row_bytes(own) * held)}",
    )


def _sparse(plan: Plan) -> Iterator[tuple[str, str]]:
    """What the sketches take, and what a step reads of a layer that chooses by one."""
    if plan.sparse is None:
        return
    workload = plan.workload
    choosing = [layer for layer in plan.model.spec.layers if workload.sketch_bytes(layer)]
    if not choosing:
        yield "sparse", f"{plan.sparse}: a step sees all of {plan.context:,} tokens"
        return
    own = max(choosing, key=workload.sketch_bytes)
    assert own.attention is not None
    sketch, row = workload.sketch_bytes(own), plan.cache.row_bytes(own.attention)
    held, keys = plan.batch * plan.context, plan.batch * own.attention.pairs(1, plan.context)
    where = f"{sketch:,} bytes per token and layer beside the cache"
    if plan.cache.bits == 4:
        where = "the cache's own keys"
    yield (
        "sparse",
        f"{plan.sparse}: {len(choosing)} layers, by {where}; a step reads {gib(sketch * held)} of "
        f"the sketch and {gib(row * keys)} of chosen rows in each, of {gib(row * held)}",
    )


def _states(plan: Plan) -> Iterator[tuple[str, str]]:
    """What layers keep in place of tokens, and from where on a layer of attention caches more."""
    layers = plan.model.spec.layers
    mixers = [layer.mixer for layer in layers if isinstance(layer.mixer, StateSpec)]
    kept = [state.nbytes(1, plan.cache.dtype) for state in mixers]
    if not kept:
        return
    said = f"{len(kept)} layers, {max(kept):,} bytes per sequence and layer at any context"
    rows = [plan.cache.token_bytes(layer) for layer in layers if layer.cached is not None]
    if rows:
        more = max(kept) // max(rows) + 1
        said += f"; a layer of attention caches more from {more:,} tokens on"
    yield "states", said


def _ranks(plan: Plan) -> Iterator[tuple[str, str]]:
    """What one of several processes holds and sends."""
    ranks = plan.ranks
    if ranks is None:
        return
    pays = "at no context"
    if ranks.pays_from is not None:
        pays = f"from about {ranks.pays_from:,} tokens on"
    yield (
        f"over {ranks.count} ranks (estimate)",
        f"{gib(ranks.cache_bytes)} of cache in each, beside all weights; {ranks.sent_bytes:,} "
        f"bytes sent for a token, {_seconds(ranks.seconds)}; faster {pays}",
    )


def _allocated(plan: Plan) -> str:
    cached = plan.cached
    needed = f"{gib(cached.needed)} needed"
    if cached.stock is None or cached.headwise is None:
        return f"{needed} (Transformers has no such model)"
    return f"{needed}; Transformers holds {gib(cached.stock)}, headwise {gib(cached.headwise)} " + (
        "with the room it grows by" if cached.headwise > cached.needed else ""
    )


def _fits(plan: Plan) -> str:
    if plan.weight_bytes > plan.memory:
        return f"no: the weights alone take {gib(plan.weight_bytes)}"
    if plan.largest_context is None:
        return "yes; nothing is cached"
    limit = " (the model's limit)" if plan.at_limit else ""
    context = f"{plan.largest_context:,} tokens{limit}" if plan.largest_context else "no context"
    batch = f"batch {plan.largest_batch:,}" if plan.largest_batch else "no batch"
    return (
        f"{context} at batch {plan.batch}; {batch} at {plan.context:,} tokens; "
        "activations not counted"
    )


def _step(step: Step) -> str:
    cost = step.cost
    return (
        f"{gib(int(cost.weight_bytes))} of weights, {gib(int(cost.cache_bytes))} of cache, "
        f"{_rate(cost.flops, 'FLOP')}"
    )


def _mechanisms(spec: ModelSpec) -> str:
    kinds: dict[str, None] = {}
    for layer in (*spec.encoder_layers, *spec.layers):
        kinds[mechanism_of(layer)] = None
        if layer.attention is not None and layer.attention.window is not None:
            kinds["window"] = None
        if layer.cross_attention is not None:
            kinds["cross"] = None
    return ", ".join(kinds)


def _table(title: str, rows: Iterable[_Row], *columns: tuple[str, Callable[[_Row], str]]) -> Table:
    """A table whose columns have a name, and say what stands there for a row."""
    table = Table(title=_safe(title), title_justify="left")
    for name, _ in columns:
        table.add_column(name, justify="left" if name in _LEFT else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_safe(cell(row)) for _, cell in columns))
    return table


def _amount(number: int | None, nothing: str = "-") -> str:
    return f"{number:,}" if number else nothing


def _count(number: float) -> str:
    """A number of parameters for people.

    >>> _count(8.03e9), _count(134_515_008)
    ('8.03 billion', '135 million')
    """
    if number >= 0.9995e9:
        return f"{number / 1e9:,.2f} billion" if number < 1e11 else f"{number / 1e9:,.0f} billion"
    return f"{number / 1e6:,.0f} million" if number >= 1e6 else f"{number:,.0f}"


def _rate(number: float, unit: str) -> str:
    """A number with a decimal prefix.

    >>> _rate(3.35e12, "B/s"), _rate(999.7e9, "FLOP/s"), _rate(5.06e18, "FLOP")
    ('3.35 TB/s', '1 TFLOP/s', '5.06 EFLOP')
    """
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 0.9995 * 10**power:
            return f"{_digits(number / 10**power)} {prefix}{unit}"
    return f"{number:,.0f} {unit}"


def _digits(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"


def _seconds(seconds: float) -> str:
    """A time for people.

    >>> _seconds(0.0123), _seconds(75.0), _seconds(259_200.0)
    ('12.3 ms', '75 s', '72 hours')
    """
    if seconds >= 7200:
        return f"{seconds / 3600:,.0f} hours"
    return f"{_digits(seconds)} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def _safe(text: str) -> Text:
    return Text(one_line(text))
