"""What all pictures share: colours, line styles, a figure of panels, labels at the ends of lines."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnn_jax.extras import import_extra
from bnn_jax.files import replacing
from bnn_jax.paths import require_ending

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every common form of colour blindness; the darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {"font.size": 11, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.edgecolor": "#888888"}
DOTS_PER_INCH = 150
LINE_HEIGHT = 0.2  # of a line of label text, in inches
LABEL_WIDTH = 22  # characters
SHARE_OF_AXES = 0.82  # of a figure's height, the rest being title and axis labels
CLEAR_LINES = 4
"""Bands of more lines than these are drawn fainter, so that the lines stay clear."""


def line_look(index: int) -> dict[str, Any]:
    """Colour and style of a line: those of 28 neighbours differ."""
    style = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": style}


def marker_look(index: int) -> dict[str, Any]:
    """Colour and marker of a point."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def faintness(lines: int) -> float:
    """The factor for the opacity of the bands of so many lines: at most 1, at least 0.4."""
    return min(1.0, max(0.4, CLEAR_LINES / max(lines, 1)))


class _Wrapper(textwrap.TextWrapper):
    """Breaks between words, after hyphens and after underscores, and never inside of a word."""

    wordsep_re = re.compile(r"(\s+|(?<=\w-)(?=\w)|(?<=[^\W_]_)(?=[^\W_]))")


def broken_label(label: str, width: int = LABEL_WIDTH) -> str:
    """A label in lines of about `width` characters.

    >>> print(broken_label("stochastic_ste_sign, cosine schedule"))
    stochastic_ste_sign,
    cosine schedule
    """
    return _Wrapper(width, break_long_words=False).fill(label)


def height_for(labels: Sequence[str], least: float, share: float = 1.0) -> float:
    """The height in inches of a figure whose axes, `share` of it, have room for these labels one below the other."""
    return max(least, sum(map(_label_height, map(broken_label, labels))) / SHARE_OF_AXES / share)


def _label_height(text: str) -> float:
    return LINE_HEIGHT * (text.count("\n") + 1.15)


@contextmanager
def drawing(
    path: Path, size: tuple[float, float], *, count: int = 1, columns: int | None = None, **subplots: Any
) -> "Iterator[tuple[Figure, list[Axes]]]":
    """Yield a figure and its panels, which is a PNG file, whole or not at all, when the block ends.

    Args:
      path: of the file, which ends in .png.
      size: width and height of the figure in inches.
      count: how many panels, row by row.
      columns: of panels; all in a row by default.
      **subplots: further options of `Figure.subplots`.

    Raises:
      UsageError: if the name of the file ends as that of another format; without Matplotlib.
    """
    require_ending("path", path, ".png")
    matplotlib = import_extra("matplotlib", "drawing")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = columns or count
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(-(-count // columns), columns, squeeze=False, **subplots).ravel().tolist()
        for panel in panels:
            panel.grid(color="#DDDDDD", linewidth=0.7)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        for number, panel in enumerate(panels[count:], count):
            panel.set_axis_off()
            if number >= columns:
                # Ticks are shared along a column: the panel above is the last of its own.
                panels[number - columns].tick_params(labelbottom=True)
        yield figure, panels[:count]
        with replacing(path) as draft:
            figure.savefig(draft, format="png", facecolor="white")


def label_line_ends(axes: "Axes", ends: Sequence[tuple[float, str, dict[str, Any]]]) -> None:
    """Write the label of each (y, label, look) right of the axes at height y, apart from the other labels.

    The figure must be as high as :func:`height_for` says; labels of lines that end together keep their order.
    """
    texts = [broken_label(label) for _, label, _ in ends]
    inches = axes.get_position().height * axes.figure.get_figheight()
    to_fraction = axes.transData + axes.transAxes.inverted()
    heights = [min(max(to_fraction.transform((0, y))[1], 0.0), 1.0) for y, _, _ in ends]
    spread = _spread(heights, [_label_height(text) / inches for text in texts])
    for (_, _, look), text, end, height in zip(ends, texts, heights, spread):
        axes.plot((1, 1.035), (end, height), transform=axes.transAxes, clip_on=False, linewidth=1.3, **look)
        axes.text(1.045, height, text, transform=axes.transAxes, va="center", color="#222222", parse_math=False)


def _spread(heights: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Centres near `heights`, in their order and in [0, 1], at which boxes of these sizes do not overlap.

    More boxes than fit are squeezed evenly.  Of equal heights the first is the highest.

    >>> _spread([0.5, 0.5, 1.0], [0.25, 0.25, 0.25])
    [0.75, 0.5, 1.0]
    """
    squeeze = min(1.0, 1.0 / sum(sizes)) if sizes else 1.0
    order = sorted(range(len(heights)), key=lambda i: (heights[i], -i))
    gaps = [squeeze * (sizes[low] + sizes[high]) / 2 for low, high in pairwise(order)]
    centres = [heights[i] for i in order]
    for i, gap in enumerate(gaps):
        centres[i + 1] = max(centres[i + 1], centres[i] + gap)
    if centres:
        centres[-1] = min(centres[-1], 1.0)
    for i, gap in reversed(list(enumerate(gaps))):
        centres[i] = min(centres[i], centres[i + 1] - gap)
    return [centre for _, centre in sorted(zip(order, centres))]
