"""A plan for people: its layers, its answers, the other mechanisms, as tables and lines."""

from typing import Any

from rich.table import Table
from rich.text import Text

from headwise.base.console import one_line
from headwise.base.memory import gib
from headwise.planning.devices import DEVICES
from headwise.planning.model import find_model
from headwise.planning.named_models import named_models


def names_parts() -> list[Any]:
    """The named models with their attention, and the named devices."""
    models = _table("named models", "name", "model", "attention")
    for name in named_models():
        found = find_model(name)
        models.add_row(name, _safe(found.name), _safe(_mechanisms(found.spec)))
    devices = _table("named devices", "name", "device", "reads", "computes (16 bits)", "memory")
    for name, device in DEVICES.items():
        devices.add_row(
            name,
            _safe(device.name),
            _rate(device.bytes_per_second, "B/s"),
            _rate(device.peak("bfloat16"), "FLOP/s"),
            f"{device.memory / 1e9:,.0f} GB",
        )
    return [models, devices]


def plan_parts(plan: Any) -> list[Any]:
    """A plan, for `headwise.base.console`: tables, then lines."""
    tables = [_layers(plan), _answers(plan)]
    if plan.alternatives:
        tables.append(_others(plan))
    device = plan.device
    rates = _rate(device.bytes_per_second, "B/s"), _rate(device.peak(plan.dtype), "FLOP/s")
    lines = [*plan.notes, f"{device.name}: {rates[0]}, {rates[1]} ({device.source})"]
    if plan.model.sources:
        lines.append(f"the model's facts: {len(plan.model.sources)} sources, named by --json")
    return [*tables, *map(_safe, lines)]


def verified_parts(verified: Any) -> list[Any]:
    """What was predicted beside what was measured."""
    cache = _table(
        f"cache bytes of {verified.layers} layers at {verified.context:,} tokens",
        "",
        "predicted",
        "measured",
        "",
    )
    for check in verified.caches:
        verdict = "equal" if check.measured == check.predicted else "DIFFERENT"
        cache.add_row(check.name, f"{check.predicted:,}", f"{check.measured:,}", verdict)
    tables = [cache]
    if verified.times:
        times = _table(
            "attention of one decode step on headwise, per layer",
            "layer",
            "context",
            "predicted",
            "measured",
            "quartiles",
            "predicted / measured",
        )
        for time in verified.times:
            times.add_row(
                _safe(time.attention),
                f"{time.context:,}",
                _seconds(time.predicted),
                _seconds(time.measured),
                f"{1e3 * time.low:.3g}-{1e3 * time.high:.3g}",
                f"{time.predicted / time.measured:.2f}",
            )
        tables.append(times)
    return [*tables, *map(_safe, verified.notes)]


def _layers(plan: Any) -> Table:
    lengths = f"{plan.context:,} tokens"
    if plan.encoder_context:
        lengths += f", {plan.encoder_context:,} in the encoder"
    table = _table(
        f"{plan.model.name}, {plan.dtype}, {lengths}",
        "layers",
        "attention",
        "a token",
        "tokens held",
        "a sequence",
    )
    for group in plan.groups:
        held = f"{group.cached_tokens:,}" if group.cached_tokens else "-"
        table.add_row(
            f"{len(group.layers)} {group.stack if plan.model.spec.encoder_layers else ''}".rstrip(),
            _safe(group.attention),
            f"{group.bytes_per_token:,}" if group.bytes_per_token else "-",
            held,
            gib(group.bytes) if group.bytes else "-",
        )
    return table


def _answers(plan: Any) -> Table:
    table = Table(show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    cache = "" if plan.cache.bits is None else f" (int{plan.cache.bits})"
    at = f"cache{cache} at {plan.context:,} x {plan.batch}"
    rows: list[tuple[str, str]] = []
    if plan.bytes_per_token:
        rows.append((f"cache{cache} a token", f"{plan.bytes_per_token:,} bytes"))
    if plan.cached.needed:
        rows.append((at, _allocated(plan)))
    elif not plan.decode:
        rows.append(("cache", "none (an encoder)"))
    rows.append(("weights", _weights(plan)))
    rows.append((f"fits in {gib(plan.memory)}", _fits(plan)))
    if plan.decode is not None:
        rows.append(("a decode step", _step(plan.decode)))
        rows.append(("at most", _bound(plan.decode, plan)))
    rows.append(("reading the prompt", _step(plan.prefill)))
    rows.append(("at least", f"{_seconds(plan.prefill.seconds)}, by {plan.prefill.bound}"))
    for name, text in rows:
        table.add_row(name, _safe(text))
    return table


def _allocated(plan: Any) -> str:
    cached = plan.cached
    needed = f"{gib(cached.needed)} needed"
    if cached.stock is None:
        return f"{needed} (Transformers has no such model)"
    return f"{needed}; Transformers holds {gib(cached.stock)}, headwise {gib(cached.headwise)} " + (
        "with the room it grows by" if cached.headwise > cached.needed else ""
    )


def _weights(plan: Any) -> str:
    weights = plan.weights
    text = f"{gib(plan.weight_bytes)}: {_count(weights.total)} parameters"
    if weights.experts:
        text += f", {_count(weights.active)} for one token"
    return text


def _fits(plan: Any) -> str:
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


def _step(step: Any) -> str:
    cost = step.cost
    return (
        f"{gib(int(cost.weight_bytes))} of weights, {gib(int(cost.cache_bytes))} of cache, "
        f"{_rate(cost.flops, 'FLOP')}"
    )


def _bound(step: Any, plan: Any) -> str:
    text = f"{step.tokens_per_second:,.1f} tokens/s, by {step.bound}"
    if plan.batch > 1:
        text += f" ({step.tokens_per_second / plan.batch:,.1f} a sequence)"
    return text


def _others(plan: Any) -> Table:
    table = _table(
        f"the same heads with another cache, {plan.context:,} tokens x {plan.batch}",
        "",
        "a token",
        "cache",
        "a step reads",
        "tokens/s at most",
        "largest context",
    )
    for other in plan.alternatives:
        step = other.decode
        table.add_row(
            other.name,
            f"{other.bytes_per_token:,}",
            gib(other.bytes),
            gib(int(step.cost.bytes)),
            f"{step.tokens_per_second:,.1f}",
            f"{other.largest_context:,}" if other.largest_context else "none fits",
        )
    return table


def _mechanisms(spec: Any) -> str:
    kinds: dict[str, None] = {}
    for layer in (*spec.encoder_layers, *spec.layers):
        at = layer.attention
        kinds["linear" if at is None else at.mechanism] = None
        if at is not None and at.window is not None:
            kinds["window"] = None
        if layer.cross_attention is not None:
            kinds["cross"] = None
    return ", ".join(kinds)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=_safe(title), title_justify="left")
    for name in columns:
        left = name in ("", "layers", "attention", "name", "model", "device", "layer")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    return table


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
