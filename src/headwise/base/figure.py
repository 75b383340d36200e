"""A Matplotlib figure as a file: atomically, and the same bytes for the same figure."""

import io
from pathlib import Path
from typing import Any

from headwise.base.written import write_whole


def write_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a figure as .svg or .png, as `path` ends.

    Raises:
        OptionError: the file cannot be written.
    """
    from matplotlib import rc_context

    content, kind = io.BytesIO(), path.suffix[1:].lower()
    # No date in it, and names that are not random.
    metadata = {"Date": None} if kind == "svg" else None
    with rc_context({"svg.hashsalt": "headwise"}):
        figure.savefig(content, format=kind, dpi=dpi, metadata=metadata)
    write_whole(path, content.getvalue())


def style_axes(axes: Any, font: float, *, title: str, across: str, up: str) -> None:
    """Titles, a grid behind what is drawn, no frame on the right and above.

    What stands at the axes is in `font`'s size, the numbers in a smaller one.
    """
    axes.set_title(title, fontsize=font, loc="left", parse_math=False)
    axes.set_xlabel(across, fontsize=font)
    axes.set_ylabel(up, fontsize=font)
    axes.tick_params(labelsize=font - 1)
    axes.grid(color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
