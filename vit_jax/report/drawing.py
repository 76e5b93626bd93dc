"""Helpers for the report's pictures."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from vit_jax.report.seeds import SeedMean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"ViT-B/32": "C0", "ViT-B/16": "C1", "ViT-L/32": "C2", "ViT-L/16": "C3", "ViT-H/14": "C4"}
_OTHER_COLORS = ("C5", "C6", "C8", "C9", "C7")
_OTHER_MARKERS = ("*", "P", "X", "^", "v")
_ALIGNMENT: "dict[int, Literal['left', 'center', 'right']]" = {1: "left", 0: "center", -1: "right"}
_DIRECTIONS = ((1, 0), (-1, 0), (1, 0.7), (-1, 0.7), (1, -0.7), (-1, -0.7), (0, 1), (0, -1))  # of labels
_DISTANCES, _FAR = (6, 13, 22, 32, 44), 15  # in points; from the second on, a line leads to the label
_ROOM_FOR_LEGEND = 140  # characters across 9 inches


def write_beside(figure: "Figure", axes: "Axes", labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes labels (x, y, text, color) beside points, each in the nearest place that covers the least."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # settles the limits
    taken = [legend.get_window_extent()] if (legend := axes.get_legend()) else []
    for line in axes.lines:
        size = (line.get_markersize() + 2) * figure.dpi / 72
        for x, y in axes.transData.transform(line.get_xydata()):
            taken.append(Bbox.from_bounds(x - size / 2, y - size / 2, size, size))
    frame = axes.get_window_extent()
    for x, y, text, color in labels:
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": color, "va": "center"}
        note = axes.annotate(text, (x, y), xytext=(0, 0), **style)
        note.set_in_layout(False)  # otherwise the axes would move
        places, outside = [], frame.width * frame.height  # outside the axes is the worst
        for distance, (across, up) in itertools.product(_DISTANCES, _DIRECTIONS):
            note.set_position((across * distance, up * distance))
            note.set_horizontalalignment(_ALIGNMENT[across])
            box = note.get_window_extent(canvas.get_renderer())
            covered = sum(both.width * both.height for each in taken if (both := Bbox.intersection(box, each)))
            covered += 0 if frame.contains(*box.min) and frame.contains(*box.max) else outside
            places.append((covered, distance, across, up, box))
            if not covered:
                break
        _, distance, across, up, box = min(places, key=lambda place: place[0])
        note.set_position((across * distance, up * distance))
        note.set_horizontalalignment(_ALIGNMENT[across])
        taken.append(box)
        if distance > _FAR:
            arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.4}
            axes.annotate("", (x, y), xytext=note.get_position(), textcoords="offset points", arrowprops=arrow)


def new_figure(panels: int, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    """Makes a figure with panels beside each other; the size is in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    all_axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in all_axes:
        axes.grid(alpha=0.3)
    return figure, all_axes


def legend_below(figure: "Figure", *all_axes: "Axes") -> None:
    """Adds one legend for all axes below the picture, in as many columns as fit; the picture grows by its height."""
    handles: dict[str, Any] = {}
    for axes in all_axes:
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)) | handles
    room = int(_ROOM_FOR_LEGEND * figure.get_figwidth() / 9)
    columns = max(1, min(4, room // (max(map(len, handles)) + 10)))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(handles) // columns))
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=columns)


def styles_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker of each model: those of table 5 have the color of theirs."""
    others = itertools.cycle((color, marker) for marker in _OTHER_MARKERS for color in _OTHER_COLORS)
    return {name: (COLORS[name], "*") if name in COLORS else next(others) for name in names}


def draw_ours(
    axes: "Axes",
    points: Sequence[tuple[float, SeedMean]],
    color: str,
    marker: str = "*",
    *,
    label: str | None = None,
    line: str = "",
) -> None:
    """Draws our numbers with their standard deviations."""
    axes.errorbar(
        [x for x, _ in points],
        [ours.mean for _, ours in points],
        [ours.std or 0.0 for _, ours in points],
        fmt=f"{marker}{line}",
        ms=12 if marker == "*" else 8,
        capsize=3,
        color=color,
        ecolor="0.3",
        markeredgecolor="black",
        markeredgewidth=0.7,
        label=label,
        zorder=5,
    )
