"""What `attach` says it did: per layer its spec, the backend that runs, and why not the others."""

import re
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from headwise.base.console import as_html
from headwise.ops import Explanation, Verdict
from headwise.spec import AttentionSpec


@dataclass(frozen=True, repr=False)
class LayerReport:
    """One attention layer: its spec and what every backend says to decoding and to prefill.

    `cache`: what holds its keys, by the names that `attach` takes. `stock`: it stays with
    Transformers, for the reason in `note`. `what`: what it is, where a spec does not say it.
    """

    name: str
    spec: AttentionSpec | None
    decode: tuple[Verdict, ...]
    prefill: tuple[Verdict, ...]
    note: str = ""
    stock: bool = False
    cache: str = "none"
    what: str = ""

    def __repr__(self) -> str:
        what, cache, decode, _ = _columns(self)
        return f"<LayerReport {self.name}: {what}, cache {cache}, decode {decode or 'stock'}>"


@dataclass(frozen=True, repr=False)
class AttachReport:
    """What runs where in an attached model; prints as a table.

    `step`: what of a decoding step runs on headwise beside attention, in lines. `remembered`: where
    the model remembers what it has read, and what came of it the last time.
    """

    model: str
    layers: tuple[LayerReport, ...]
    cache: str
    step: tuple[str, ...] = ()
    remembered: Any = None

    def __repr__(self) -> str:
        backends = dict.fromkeys(_columns(layer)[2] or "stock" for layer in self.layers)
        return (
            f"<AttachReport {self.model}: {len(self.layers)} layers, cache {self.cache}, decode "
            f"{', '.join(backends)}; print it for all>"
        )

    def _repr_html_(self) -> str:
        return as_html(Text(str(self)))

    def __str__(self) -> str:
        rows = [("layers", "attention", "cache", "decode", "prefill")]
        notes = []
        groups: dict[Any, list[LayerReport]] = {}
        for layer in self.layers:
            key = (
                _parts(layer.name)[::2],
                layer.spec,
                layer.cache,
                layer.note,
                layer.stock,
                layer.what,
            )
            groups.setdefault(key, []).append(layer)
        for same in groups.values():
            name = _joined([layer.name for layer in same])
            rows.append((name, *_columns(same[0])))
            if same[0].note:
                notes.append(f"{name}: {same[0].note}")
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(0, f"{self.model}, attached to headwise; cache: {self.cache}")
        remembered = [] if self.remembered is None else [str(self.remembered)]
        return "\n".join([*lines, *notes, *self.step, *remembered, *self._why()])

    def _why(self) -> list[str]:
        """One line per distinct verdict."""
        seen: dict[str, None] = {}
        for layer in self.layers:
            for phase, verdicts in (("decode", layer.decode), ("prefill", layer.prefill)):
                if verdicts:
                    for line in str(Explanation(verdicts)).splitlines():
                        seen[f"{phase:<7}  {line}"] = None
        return list(seen)


def _parts(name: str) -> tuple[str, str, str]:
    """A layer's name before its (last) number, the number, and the rest.

    >>> _parts("decoder.3.cross"), _parts("all")
    (('decoder.', '3', '.cross'), ('all', '', ''))
    """
    match = re.fullmatch(r"(.*?)(\d+)(\D*)", name)
    return (match[1], match[2], match[3]) if match else (name, "", "")


def _joined(names: list[str]) -> str:
    """Names that differ in their number only, as one.

    >>> _joined(["decoder.0", "decoder.1", "decoder.2", "decoder.4"]), _joined(["all"])
    ('decoder.0-2,4', 'all')
    """
    before, first, after = _parts(names[0])
    if not first:
        return names[0]
    runs: list[list[int]] = []
    for number in (int(_parts(name)[1]) for name in names):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    ranges = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return before + ",".join(ranges) + after


def _columns(layer: LayerReport) -> tuple[str, str, str, str]:
    if layer.stock:
        return "stays with Transformers", layer.cache, "", ""
    spec = layer.what or ("read at run time" if layer.spec is None else str(layer.spec))
    return spec, layer.cache, _chosen(layer.decode), _chosen(layer.prefill)


def _chosen(verdicts: tuple[Verdict, ...]) -> str:
    return Explanation(verdicts).chosen if verdicts else "by shape"
