"""What `attach` says it did: per layer its spec, the backend that runs, and why not the others."""

from dataclasses import dataclass
from itertools import groupby

import torch

from headwise.ops import Explanation, Problem, Verdict, explain_problem
from headwise.spec import AttentionSpec

# Lengths that stand for a long context in the report; backends decide by shape.
_CONTEXT = 4096


@dataclass(frozen=True)
class LayerReport:
    """One attention layer: its spec and what every backend says to decoding and to prefill."""

    name: str
    spec: AttentionSpec | None
    decode: tuple[Verdict, ...]
    prefill: tuple[Verdict, ...]
    note: str = ""


@dataclass(frozen=True)
class AttachReport:
    """What runs where in an attached model; prints as a table."""

    model: str
    layers: tuple[LayerReport, ...]
    cache: str

    def __str__(self) -> str:
        rows = [("layers", "attention", "decode", "prefill")]
        notes = []
        for _, group in groupby(self.layers, lambda at: (_stem(at.name), at.spec, at.note)):
            same = list(group)
            name = same[0].name if len(same) == 1 else f"{same[0].name} .. {same[-1].name}"
            spec = "read at run time" if same[0].spec is None else str(same[0].spec)
            rows.append((name, spec, _chosen(same[0].decode), _chosen(same[0].prefill)))
            if same[0].note:
                notes.append(f"{name}: {same[0].note}")
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(0, f"{self.model}, attached to headwise; cache: {self.cache}")
        return "\n".join([*lines, *notes, *self._why()])

    def _why(self) -> list[str]:
        """One line per distinct verdict."""
        seen: dict[str, None] = {}
        for layer in self.layers:
            for phase, verdicts in (("decode", layer.decode), ("prefill", layer.prefill)):
                if verdicts:
                    for line in str(Explanation(verdicts)).splitlines():
                        seen[f"{phase:<7}  {line}"] = None
        return list(seen)


def layer_report(
    name: str, spec: AttentionSpec | None, dtype: torch.dtype, device: str, note: str, absorbs: bool
) -> LayerReport:
    """Ask the backends about decoding and prefill of one layer. `absorbs`: MLA that is absorbed."""
    if spec is None:
        return LayerReport(name, None, (), (), note)
    decode = spec.absorbed() if absorbs else spec
    return LayerReport(
        name,
        spec,
        explain_problem(_problem(decode, 1, dtype, device, split_key=absorbs)).verdicts,
        explain_problem(_problem(spec, _CONTEXT, dtype, device, split_key=False)).verdicts,
        note,
    )


def _problem(
    spec: AttentionSpec, query_length: int, dtype: torch.dtype, device: str, *, split_key: bool
) -> Problem:
    return Problem(
        batch=1,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        query_length=query_length,
        context=_CONTEXT,
        head_dim=spec.head_dim,
        value_dim=spec.value_dim,
        dtype=dtype,
        device=device,
        causal=spec.causal and not spec.cross,
        window=spec.window if spec.causal else None,
        sinks=spec.sinks,
        softcap=spec.softcap is not None,
        alibi=spec.alibi,
        bias=dtype if spec.relative_bias else None,
        split_key=split_key,
    )


def _stem(name: str) -> str:
    """The name without its number: "decoder.3.cross" -> "decoder..cross"."""
    return "".join(character for character in name if not character.isdigit())


def _chosen(verdicts: tuple[Verdict, ...]) -> str:
    return Explanation(verdicts).chosen if verdicts else "by shape"
