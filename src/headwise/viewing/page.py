"""The page: one HTML file with its style, its program and its data; and the data as plain JSON.

Everything that a text or a tokenizer says is data inside one JSON element, in which nothing can end
that element; the program sets it as text and never as markup. The page's policy forbids every load.
"""

import base64
import json
import math
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.viewing.layer import STATISTICS, LayerView
from headwise.viewing.program import program
from headwise.viewing.tokens import Token

if TYPE_CHECKING:
    from headwise.viewing.view import View

# What could end a script element, start a comment in it, or a line of a program.
_ESCAPES = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}


def html(view: "View") -> str:
    """The page of a view."""
    folder = files("headwise.viewing") / "assets"
    parts = {
        "STYLE": (folder / "page.css").read_text(encoding="utf-8"),
        "PROGRAM": program(folder / "page"),
        "DATA": as_data(json.dumps(_fields(view), separators=(",", ":"), allow_nan=False)),
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
            "weights": _listed(layer.weights.masked_fill(layer.raw.isnan(), math.nan), 7),
            "raw_scores": _listed(layer.raw, 5),
            "scores": _listed(layer.scores, 5),
            "content_scores": None if layer.content is None else _listed(layer.content, 5),
            "lse": _listed(layer.lse, 5),
            "statistics": {
                name: _listed(layer.statistics[:, at], 5) for at, name in enumerate(STATISTICS)
            },
        }
        for layer in view.layers
    ]
    return json.dumps(fields, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def _listed(values: Tensor, digits: int) -> Any:
    """Nested lists of rounded numbers, None for what is not finite."""
    if values.ndim > 1:
        return [_listed(value, digits) for value in values]
    return [round(value, digits) if math.isfinite(value) else None for value in values.tolist()]


def _number(value: float) -> float | None:
    """The number, None where it is not finite: JSON has no NaN."""
    return value if math.isfinite(value) else None


def _head(view: "View") -> dict[str, Any]:
    return {
        "model": view.model,
        "class": view.kind,
        "dtype": view.dtype,
        "tokens": [_token(token) for token in view.tokens],
        "prompt": view.prompt,
        "following": None if view.following is None else _token(view.following),
        "overview": view.overview,
        "ablation": None if view.ablation is None else _ablation(view),
        "not_numbers": [list(head) for head in view.not_numbers],
    }


def _token(token: Token) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "special": token.special}


def _ablation(view: "View") -> dict[str, Any]:
    found = view.ablation
    assert found is not None
    fields: dict[str, Any] = {
        "heads": [list(head) for head in found.heads],
        "divergence": _number(found.divergence),
    }
    for name, guesses in (("before", found.before), ("after", found.after)):
        fields[name] = [
            {
                **_token(guess.token),
                "before": _number(guess.before),
                "after": _number(guess.after),
                "rank_before": guess.rank_before,
                "rank_after": guess.rank_after,
            }
            for guess in guesses
        ]
    return fields


def _layer_facts(layer: LayerView) -> dict[str, Any]:
    return {
        "index": layer.index,
        "mechanism": layer.mechanism,
        "all_heads": layer.all_heads,
        "kv_heads": layer.kv_heads,
        "kv_head_of": layer.kv_head_of,
        "head_dim": layer.head_dim,
        "latent": None if layer.latent is None else list(layer.latent),
        "scale": layer.scale,
        "softcap": layer.softcap,
        "window": layer.window,
        "heads": layer.heads,
        "rows": layer.rows,
    }


def _fields(view: "View") -> dict[str, Any]:
    """The page's data: numbers in float32, little-endian, as base64."""
    fields = _head(view)
    fields["statistics"] = list(STATISTICS)
    fields["layers"] = [_layer(layer, len(view.tokens)) for layer in view.layers]
    return fields


def _layer(layer: LayerView, tokens: int) -> dict[str, Any]:
    spans = _spans(layer.raw)
    fields = _layer_facts(layer) | {
        "spans": spans,
        "raw": _ragged(layer.raw, spans),
        "added": None if layer.added is None else _ragged(layer.added, spans),
        "content": None if layer.content is None else _ragged(layer.content, spans),
        "lse": _floats(layer.lse),
        "stats": _listed(layer.statistics, 6),
        "tile": layer.tile,
        "tiles": None,
    }
    # where every pair is there, the page pools for itself
    if layer.tiles_max is not None and (layer.tile > 1 or len(layer.rows) < tokens):
        assert layer.tiles_mean is not None
        lower = not bool(layer.tiles_max.triu(1).any())
        fields["tiles"] = {
            "side": layer.tiles_max.shape[1],
            "lower": lower,
            "max": _fractions(layer.tiles_max, lower),
            "mean": _fractions(layer.tiles_mean, lower),
        }
    return fields


def _spans(raw: Tensor) -> list[list[int]]:
    """For each row the columns from the first to behind the last that any head sees."""
    visible = (~raw.isnan()).any(dim=0)
    spans = []
    for row in visible:
        columns = row.nonzero()
        spans.append([int(columns[0]), int(columns[-1]) + 1] if len(columns) else [0, 0])
    return spans


def _ragged(values: Tensor, spans: list[list[int]]) -> str:
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
        at = torch.tril_indices(tiles.shape[1], tiles.shape[1])
        parts = parts[:, at[0], at[1]]
    # uint16 by way of int16, whose bits are the same
    return {"peak": peak.tolist(), "data": _bytes(parts.to(torch.int16).contiguous())}


def _bytes(values: Tensor) -> str:
    array = values.numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
