"""Dataclasses of what JSON has for them, as `dataclasses.asdict` wrote it."""

from dataclasses import is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


def record(kind: Any, data: Any) -> Any:
    """A value of `kind`, a dataclass or the type of a field of one, of what JSON has for it.

    >>> record(tuple[float, ...], [1, 2.5]), record(dict[str, int | None], {"layers": None})
    ((1, 2.5), {'layers': None})

    Raises:
        KeyError, TypeError, AttributeError: a field is missing, or has another type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:  # with None
        return None if data is None else record(inner[0], data)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: record(hint, data[name]) for name, hint in hints.items()})  # type: ignore[operator]
    if origin is tuple:
        return tuple(record(inner[0], each) for each in data)
    if origin is dict:
        return {str(name): record(inner[1], each) for name, each in data.items()}
    if isinstance(data, bool) or not isinstance(data, int | float if kind is float else kind):
        raise TypeError(f"{data!r} is no {getattr(kind, '__name__', kind)}")
    return data
