"""Which keys a query of a decoding step gets, by a short text: "topk:1024,sinks=4,recent=64"."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headwise.errors import OptionError

if TYPE_CHECKING:
    from headwise.spec.attention import AttentionSpec
    from headwise.spec.layer import LayerSpec

_OWN = {"topk": ("topk:K", ()), "topp": ("topp:P", ("min", "max"))}
_SHARED = ("sinks", "recent", "dense")
_EXPECTED = (
    '"topk:1024" or "topp:0.95,min=256,max=4096", and behind either "sinks=4", "recent=64", '
    '"dense=2"'
)


@dataclass(frozen=True)
class SparseChoice:
    """How many keys a query gets; `str` gives the text that `parse` reads.

    >>> SparseChoice.parse("topk:1024")
    SparseChoice(most=1024, least=1024, mass=None, sinks=4, recent=64, dense=2)
    >>> str(SparseChoice.parse("topp:0.9;max=2048"))
    'topp:0.9,min=256,max=2048,sinks=4,recent=64,dense=2'

    Args:
        most: keys of a query at most, the first and last ones included.
        least: keys from which on a context is chosen from.
        mass: the part of the attention that the chosen keys are to have; None for `most` keys.
        sinks, recent: the first and the last tokens, which every query gets.
        dense: layers, counted from the first, that see all keys.
    """

    most: int
    least: int
    mass: float | None = None
    sinks: int = 4
    recent: int = 64
    dense: int = 2

    @classmethod
    def parse(cls, text: str) -> "SparseChoice":
        """Read a text; ";" may stand for ",".

        Raises:
            OptionError: says what is expected.
        """
        if not isinstance(text, str):
            raise OptionError(f"sparse is a {type(text).__name__}, expected a text: {_EXPECTED}")
        head, *rest = re.split("[,;]", text)
        name, _, size = head.partition(":")
        names = _OWN[name][1] if name in _OWN else ()
        given: dict[str, int] = {}
        for part in rest:
            match = re.fullmatch(r"(\w+)=(\d{1,9})", part, re.ASCII)
            if match is None or match[1] not in (*names, *_SHARED) or match[1] in given:
                raise OptionError(f"sparse is {text!r}, and {part!r} is none of {_EXPECTED}")
            given[match[1]] = int(match[2])
        shared: Any = {key: given[key] for key in _SHARED if key in given}
        if name == "topk" and re.fullmatch(r"\d{1,9}", size, re.ASCII):
            return cls(int(size), int(size), None, **shared)._checked(text)
        if name == "topp" and re.fullmatch(r"0?\.\d{1,9}|1(\.0)?", size, re.ASCII):
            least, most = given.get("min", 256), given.get("max", 4096)
            return cls(most, least, float(size), **shared)._checked(text)
        raise OptionError(f"sparse is {text!r}, expected {_EXPECTED}")

    def _checked(self, text: str) -> "SparseChoice":
        certain = self.sinks + self.recent
        if self.least > self.most:
            raise OptionError(
                f"sparse is {text!r}: min is {self.least} and max {self.most}, expected min to be "
                "at most max"
            )
        if self.least < certain + 1:
            raise OptionError(
                f"sparse is {text!r}: {self.least} keys leave none to choose beside {self.sinks} "
                f"sinks and {self.recent} recent ones, expected more than {certain}"
            )
        if self.mass == 0:
            raise OptionError(f"sparse is {text!r}, expected a part above 0")
        return self

    def obstacle(self, attention: "AttentionSpec | None", index: int) -> str | None:
        """Why the queries of layer `index` see all keys that they can; None where they choose."""
        if attention is None:
            return "no attention"
        if attention.mechanism == "MLA":
            return "latent attention (MLA), where one choice for all heads saves little"
        if attention.window is not None:
            kind = "chunks" if attention.chunked else "a window"
            return f"{kind} of {attention.window} tokens"
        if attention.indexer is not None:
            return "it has an indexer, which chooses"
        if attention.alibi or attention.relative_bias:
            return "ALiBi" if attention.alibi else "a bias by position"
        if attention.prefix or not attention.causal:
            return "it is not causal"
        if attention.head_dim % 2:
            return f"an odd head dim, {attention.head_dim}"
        if index < self.dense:
            return f"one of the first {self.dense} layers"
        return None

    def obstacles(self, layers: "Iterable[LayerSpec]") -> dict[int, str]:
        """Why layers see all keys, by their index; those that choose are not in it.

        What reads the keys of an earlier layer does as that one does.
        """
        dense = dict[int, str]()
        for layer in layers:
            index = layer.index if layer.shares is None else layer.shares
            reason = dense.get(index) or self.obstacle(layer.attention, index)
            if reason is not None:
                dense[layer.index] = reason
        return dense

    def read_at(self, context: int) -> int:
        """The keys that a query of a context gets, at most."""
        return context if context <= self.least else min(context, self.most)

    @property
    def words(self) -> str:
        """What it is, for a report.

        >>> SparseChoice.parse("topk:1024").words
        'the 1,024 keys that weigh most by a sketch of 4 bits'
        """
        which = f"the {self.most:,} keys that weigh most"
        if self.mass is not None:
            which = f"the keys with {self.mass:g} of the weight, {self.least:,} to {self.most:,},"
        return f"{which} by a sketch of 4 bits"

    @property
    def short(self) -> str:
        """The rule without what is always chosen, as "topk:1024"."""
        if self.mass is None:
            return f"topk:{self.most}"
        return f"topp:{self.mass:g},min={self.least},max={self.most}"

    def __str__(self) -> str:
        return f"{self.short},sinks={self.sinks},recent={self.recent},dense={self.dense}"
