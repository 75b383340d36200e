"""What stored rows are of: the model that made them, down to every value of its weights."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import xxhash

from headwise.errors import LoadError


@dataclass(frozen=True)
class Origin:
    """A model, as far as what it puts into a cache depends on it.

    Args:
        model: the class.
        dtype: of what it computes in.
        cache: the kind of the cache, as "contiguous" or "int8".
        rope: the rotation of its config, as JSON.
        config: hash of its config and of what its modules are set to.
        weights: hash of every tensor that runs, 128 bits.
    """

    model: str
    dtype: str
    cache: str
    rope: str
    config: str
    weights: str

    @property
    def key(self) -> str:
        """A hash of all."""
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self), sort_keys=True).encode())

    def difference(self, other: "Origin") -> str | None:
        """The first that differs, in words, with this one's first; None where all agree."""
        for field in fields(self):
            own, others = getattr(self, field.name), getattr(other, field.name)
            if own != others:
                return f"its {field.name} is {own[:100]}, not {others[:100]}"
        return None

    def as_json(self) -> dict[str, str]:
        """Plain data, that `read` reads."""
        return asdict(self)

    @classmethod
    def read(cls, data: Any) -> "Origin":
        """From what a file says.

        Raises:
            LoadError: something is missing, or is not text.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(data, dict) or not all(isinstance(data.get(name), str) for name in names):
            raise LoadError(f"it does not say its {', '.join(names)}")
        return cls(**{name: data[name] for name in names})
