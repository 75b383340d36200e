"""A picture of one token's attention, or of one head's matrix, as PNG or SVG."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headwise.base.figure import write_figure
from headwise.base.plot import plain
from headwise.errors import OptionError
from headwise.viewing.layer import LayerView

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from headwise.viewing.view import View

_INK, _FAINT, _COLOURS = (
    "#1d1b24",
    "#8b8794",
    ("#fbfaf8", "#c9c2f0", "#7f6fd8", "#3f2d9b", "#1b1147"),
)
# Tokens and rows that a picture has room for.
_MOST = 80


def write(
    view: "View", path: Path, *, token: int | None, layer: int | None, head: int | None
) -> None:
    """Write the picture as .png or .svg, as `path` ends.

    Raises:
        OptionError: a token, layer or head that the view does not have, too many tokens, or a file
            that cannot be written.
    """
    from matplotlib import rc_context

    figure = draw(view, token=token, layer=layer, head=head)
    with rc_context({"svg.fonttype": "none"}):
        write_figure(figure, path, dpi=200)


def draw(view: "View", *, token: int | None, layer: int | None, head: int | None) -> "Figure":
    """The picture as a Matplotlib figure.

    Raises:
        OptionError: a token, layer or head that the view does not have, or too many tokens.
    """
    layers = [each for each in view.layers if layer is None or each.index == layer]
    if not layers or (head is not None and not any(head in each.heads for each in layers)):
        asked = f"layer {layer}" if head is None else f"head {head}"
        raise OptionError(f"{asked} is not in the view; it has {_available(view)}")
    first = layers[0]
    single = len(layers) == 1 and (head is not None or len(first.heads) == 1)
    if token is None and not (single and len(first.rows) > 1):
        token = first.rows[-1]
    if token is not None and token not in first.rows:
        raise OptionError(f"the weights of token {token} are not in the view; see its tokens")
    if len(view.tokens) > _MOST:
        raise OptionError(
            f"a picture has room for {_MOST} tokens, and there are {len(view.tokens)}: save .html"
        )
    if token is not None:
        rows, names = _of_token(layers, token, head)
        title = f"What “{_shown(view, token)}” attends to"
        across = "layer" if len(layers) > 1 and head is None else "head"
    else:
        place = first.heads.index(head) if head is not None else 0
        rows, names = first.weights[place], [_shown(view, row) for row in first.rows]
        title, across = f"Layer {first.index}, head {first.heads[place]}", "token that attends"
    return _heat(view, rows, names, title, across)


def _of_token(layers: list[LayerView], token: int, head: int | None) -> tuple[Tensor, list[str]]:
    """Weights [rows, tokens] of one token: one row per layer (the mean of its heads), or head."""
    weights = {layer.index: layer.weights[:, layer.rows.index(token)] for layer in layers}
    if head is None and len(layers) > 1:
        return torch.stack([each.mean(dim=0) for each in weights.values()]), list(map(str, weights))
    rows = {
        f"{layer.index}.{each}": weights[layer.index][place]
        for layer in layers
        for place, each in enumerate(layer.heads)
        if head in (None, each)
    }
    return torch.stack(list(rows.values())), list(rows)


def _heat(view: "View", rows: Tensor, names: list[str], title: str, across: str) -> "Figure":
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure

    cell = 0.32
    left, right, top, bottom = 0.95, 0.9, 1.3, 0.3
    wide, high = cell * len(view.tokens), cell * len(names)
    width, height = max(4.2, left + wide + right), top + high + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((left / width, bottom / height, wide / width, high / height))
    made = LinearSegmentedColormap.from_list("headwise", _COLOURS)
    colours = made.with_extremes(bad=_FAINT)  # weights that are NaN must not look like none
    image = axes.imshow(rows.numpy(), cmap=colours, norm=PowerNorm(0.5, 0, 1), aspect="auto")
    texts = [_shown(view, token) for token in range(len(view.tokens))]
    slanted: Any = {"rotation": 55, "ha": "left", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(texts)), texts, parse_math=False, **slanted)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8, labelcolor=_INK, pad=3)
    axes.set_ylabel(across, fontsize=8, color=_FAINT)
    axes.spines[:].set_visible(False)
    axes.set_xticks([edge + 0.5 for edge in range(len(texts) - 1)], minor=True)
    axes.set_yticks([edge + 0.5 for edge in range(len(names) - 1)], minor=True)
    axes.grid(which="minor", color="white", lw=1.2)
    axes.tick_params(which="minor", length=0)
    heading: Any = {"fontsize": 10, "color": _INK, "fontweight": "bold"}
    small: Any = {"fontsize": 8, "color": _FAINT}
    for text, below, style in ((title, 0.14, heading), (plain(view.model), 0.36, small)):
        left_edge, top_edge = 0.14 / width, 1 - below / height
        figure.text(left_edge, top_edge, text, va="top", parse_math=False, **style)
    bar = figure.add_axes((1 - 0.62 / width, bottom / height, 0.1 / width, high / height))
    figure.colorbar(image, cax=bar, ticks=[0, 0.05, 0.25, 0.5, 1])
    bar.tick_params(length=0, labelsize=7, labelcolor=_FAINT)
    bar.spines[:].set_visible(False)
    return figure


def _shown(view: "View", token: int) -> str:
    text = view.tokens[token].text
    short = text if len(text) <= 14 else f"{text[:13]}…"
    return plain(short.replace("\n", "⏎")).strip() or "␣"


def _available(view: "View") -> str:
    indices = [layer.index for layer in view.layers]
    heads = sorted({head for layer in view.layers for head in layer.heads})
    return f"layers {indices[0]} to {indices[-1]} and heads {heads[0]} to {heads[-1]}"
