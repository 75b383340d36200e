"""The page: one HTML file with its style, its program and its data; and the data as plain JSON.

Everything that a text or a tokenizer says is data inside one JSON element, in which nothing can end
that element; the program sets it as text and never as markup. The page's policy forbids every load.
"""

import base64
import math
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.base.written import as_json
from headwise.viewing.ablation import Ablation
from headwise.viewing.layer import STATISTICS, LayerView
from headwise.viewing.program import program

if TYPE_CHECKING:
    from headwise.viewing.view import View

# What could end a script element, start a comment in it, or a line of a program.
_ESCAPES = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}
_FACTS = (
    *("index", "mechanism", "all_heads", "kv_heads", "kv_head_of", "head_dim", "latent"),
    *("scale", "softcap", "window", "heads", "rows"),
)


def html(view: "View") -> str:
    """The page of a view; numbers are in float32, little-endian, as base64."""
    folder = files("headwise.viewing") / "assets"
    layers = [_layer(layer, len(view.tokens)) for layer in view.layers]
    fields = _head(view) | {"statistics": STATISTICS, "layers": layers}
    parts = {
        "STYLE": (folder / "page.css").read_text(encoding="utf-8"),
        "PROGRAM": program(folder / "page"),
        "DATA": as_data(as_json(fields)),
    }
    # split once, so that no part is searched for the marks of another
    pieces = (folder / "page.html").read_text(encoding="utf-8").split("%%")
    return "".join(parts.get(piece, piece) for piece in pieces)


def as_data(text: str) -> str:
    r"""JSON that stays inside a script element, whatever strings are in it.

    >>> as_data('["</script><!--"]')
    '["\\u003c/script\\u003e\\u003c!--"]'
    """
    return text.translate(_ESCAPES)


def numbers(view: "View") -> str:
    """The view's numbers as JSON: weights and scores [heads][rows][tokens], null where hidden."""
    fields = _head(view)
    fields["layers"] = [
        {
            **_layer_facts(layer),
            "weights": _rounded(layer.weights.masked_fill(layer.raw.isnan(), math.nan), 7),
            "raw_scores": _rounded(layer.raw, 5),
            "scores": _rounded(layer.scores, 5),
            "content_scores": None if layer.content is None else _rounded(layer.content, 5),
            "lse": _rounded(layer.lse, 5),
            "statistics": dict(zip(STATISTICS, _rounded(layer.statistics.T, 5))),
        }
        for layer in view.layers
    ]
    return as_json(fields, indent=1) + "\n"


def _rounded(values: Tensor, digits: int) -> list[Any]:
    """Nested lists of rounded numbers."""
    if values.ndim > 1:
        return [_rounded(value, digits) for value in values]
    return [round(value, digits) for value in values.tolist()]


def _head(view: "View") -> dict[str, Any]:
    return {
        "model": view.model,
        "class": view.kind,
        "dtype": view.dtype,
        "tokens": [asdict(token) for token in view.tokens],
        "prompt": view.prompt,
        "following": None if view.following is None else asdict(view.following),
        "overview": view.overview,
        "ablation": None if view.ablation is None else _ablation(view.ablation),
        "not_numbers": view.not_numbers,
        "states": view.states,
    }


def _ablation(ablation: Ablation) -> dict[str, Any]:
    """Its fields, with those of each guess's token beside the guess's own."""
    fields = asdict(ablation)
    for side in ("before", "after"):
        fields[side] = [guess.pop("token") | guess for guess in fields[side]]
    return fields


def _layer_facts(layer: LayerView) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in _FACTS}


def _layer(layer: LayerView, tokens: int) -> dict[str, Any]:
    spans = _spans(layer.raw)
    # where every pair is there, the page pools for itself
    pooled = layer.tile > 1 or len(layer.rows) < tokens
    return _layer_facts(layer) | {
        "spans": spans,
        "raw": _ragged(layer.raw, spans),
        "added": None if layer.added is None else _ragged(layer.added, spans),
        "content": None if layer.content is None else _ragged(layer.content, spans),
        "lse": _floats(layer.lse),
        "stats": _rounded(layer.statistics, 6),
        "tile": layer.tile,
        "tiles": _tiles(layer.tiles_max, layer.tiles_mean) if pooled else None,
    }


def _tiles(largest: Tensor | None, mean: Tensor | None) -> dict[str, Any] | None:
    if largest is None or mean is None:
        return None
    lower = not bool(largest.triu(1).any())
    squares = {"max": _fractions(largest, lower), "mean": _fractions(mean, lower)}
    return {"side": largest.shape[1], "lower": lower, **squares}


def _spans(raw: Tensor) -> list[tuple[int, int]]:
    """For each row the columns from the first to behind the last that any head sees."""
    columns = [row.nonzero().flatten().tolist() for row in (~raw.isnan()).any(dim=0)]
    return [(visible[0], visible[-1] + 1) if visible else (0, 0) for visible in columns]


def _ragged(values: Tensor, spans: list[tuple[int, int]]) -> str:
    """Of [h,r,n] each head's rows one after the other, each row's span alone."""
    parts = [head[row, start:stop] for head in values for row, (start, stop) in enumerate(spans)]
    return _floats(torch.cat(parts) if parts else torch.empty(0))


def _floats(values: Tensor) -> str:
    return _bytes(values.contiguous().float())


def _fractions(tiles: Tensor, lower: bool) -> dict[str, Any]:
    """Tiles [h,T,T] as 16-bit fractions of each head's largest; `lower` the triangle alone.

    A tile that is NaN is 0 here: the page says of which heads the weights are NaN.
    """
    tiles = tiles.nan_to_num(0.0)
    peak = tiles.amax(dim=(1, 2)).clamp_min(1e-30)
    parts = (tiles / peak[:, None, None] * 65535).round().int()
    if lower:
        rows, columns = torch.tril_indices(tiles.shape[1], tiles.shape[1])
        parts = parts[:, rows, columns]
    # uint16 by way of int16, whose bits are the same
    return {"peak": peak.tolist(), "data": _bytes(parts.to(torch.int16).contiguous())}


def _bytes(values: Tensor) -> str:
    array = values.numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
