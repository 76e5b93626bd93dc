"""The paper's figures 3, 4 and 5 with our numbers.

The paper gives its figures only as curves. These figures show the numbers of its tables; nothing is read off a picture.
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from vit_jax.paper import related, tables
from vit_jax.report.markdown import Cell
from vit_jax.report.measured import MeasuredModel
from vit_jax.report.names import kind_of
from vit_jax.report.paper_tables import FIVE_SHOT, TABLE_8_MODEL, table_5
from vit_jax.report.pretrained import AVERAGE_OF, PreTrained, average_of_five, result_on
from vit_jax.report.recipes import IMAGENET
from vit_jax.report.seeds import SeedMean, group
from vit_jax.weights import get_checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DATA = ("ImageNet", "ImageNet-21k", "JFT-300M")
_COLORS = {"ViT-B/32": "C0", "ViT-B/16": "C1", "ViT-L/32": "C2", "ViT-L/16": "C3", "ViT-H/14": "C4"}
_OTHER_COLORS = ("C5", "C6", "C8", "C9", "C7")
_OTHER_MARKERS = ("*", "P", "X", "^", "v")
_ALIGNMENT: "dict[int, Literal['left', 'center', 'right']]" = {1: "left", 0: "center", -1: "right"}
_DIRECTIONS = ((1, 0), (-1, 0), (1, 0.7), (-1, 0.7), (1, -0.7), (-1, -0.7), (0, 1), (0, -1))  # of labels
_DISTANCES, _FAR = (6, 13, 22, 32, 44), 15  # in points; from the second on, a line leads to the label
_KINDS = {"ViT": ("o", "C0"), "BiT": ("s", "0.45"), "hybrid": ("D", "C1")}
# The smallest and the largest BiT with published numbers on ImageNet: pre-trained on ImageNet-21k, from the README of
# google-research/big_transfer and BiT's table 1; on JFT-300M, from the paper's tables 6 and 2; on ImageNet, none.
_SMALLEST_BIT, _LARGEST_BIT = "R50x1", "R152x4"
# Characters that fit across 9 inches: names at the axis, and a legend.
_ROOM_FOR_DATA, _ROOM_FOR_LEGEND = 60, 140


def draw_all(
    measured: Sequence[MeasuredModel], models: Sequence[PreTrained], *, show_all: bool = False
) -> "dict[str, tuple[str, Figure]]":
    """Draws the figures with numbers of ours, or all that have any number; title and figure by name."""
    drawn = {
        "figure_3": ("Figure 3: transfer to ImageNet against the pre-training data", figure_3(models, show_all)),
        "figure_4": ("Figure 4: few-shot ImageNet against the number of pre-training images", figure_4(measured)),
        "figure_5": ("Figure 5: transfer against pre-training compute", figure_5(models, show_all)),
    }
    return {name: (title, figure) for name, (title, figure) in drawn.items() if figure is not None}


def bit_area() -> dict[str, tuple[float, float]]:
    """ImageNet top-1 of the smallest and of the largest BiT, by pre-training data, in percent."""
    of_21k = (get_checkpoint(f"bit_m_{_SMALLEST_BIT.lower()}").published_accuracy or {})["imagenet2012"]
    (smallest,) = (row.imagenet for row in tables.TABLE_6 if row.model == _SMALLEST_BIT)
    return {
        "ImageNet-21k": (of_21k, related.BIT_M_IMAGENET[_LARGEST_BIT]),
        "JFT-300M": (smallest, tables.TABLE_2[_LARGEST_BIT, "JFT-300M"][IMAGENET].mean),
    }


def figure_3(models: Sequence[PreTrained], show_all: bool = False) -> "Figure | None":
    """ImageNet after fine-tuning, by pre-training data: table 5's row. BiT is an area, as in the paper."""
    table = table_5(models)
    cells = {(data, name): cell for ((data, task), name), cell in table.cells.items() if task == IMAGENET}
    if not any(cell.ours for cell in cells.values()) and not show_all:
        return None
    figure, (axes,) = _figure(1, (9, 5.2))
    data = list(dict.fromkeys([*_DATA, *(each for each, _ in cells)]))
    bit = bit_area()
    axes.fill_between(
        [data.index(each) for each in bit],
        [low for low, _ in bit.values()],
        [high for _, high in bit.values()],
        color="0.9",
        label=f"BiT, {_SMALLEST_BIT} to {_LARGEST_BIT}",
    )
    for name in tables.TABLE_5_MODELS:
        points = [
            (data.index(each), cell.paper.mean) for (each, of), cell in cells.items() if of == name and cell.paper
        ]
        axes.plot(*zip(*points, strict=True), "o-", color=_COLORS[name], ms=5, alpha=0.6, label=f"{name}, table 5")
    names = [name for name in table.columns if any(cells.get((each, name), Cell()).ours for each in data)]
    styles = _styles_of(names)
    step = min(0.08, 0.6 / max(1, len(names)))
    for number, name in enumerate(names, 1):  # shifts ours from the paper's points, and from each other
        found = [(x + step * number, cells.get((each, name), Cell()).ours) for x, each in enumerate(data)]
        _stars(axes, [(x, ours) for x, ours in found if ours], *styles[name], label=f"{name}, ours")
    is_long = sum(map(len, data)) > _ROOM_FOR_DATA
    axes.set_xticks(range(len(data)), data, rotation=12 if is_long else 0, ha="right" if is_long else "center")
    axes.set_xlim(-0.2, len(data) - 0.8 + step * len(names))
    axes.set(xlabel="pre-trained on", ylabel="ImageNet top-1 after fine-tuning, %")
    _legend_below(figure, axes)
    return figure


def figure_4(measured: Sequence[MeasuredModel]) -> "Figure | None":
    """Linear 5-shot accuracy on ImageNet by the number of images in the pre-training set.

    The paper has only curves; its table 8 gives one model's number, without its number of images.
    """
    points: dict[str, list[tuple[float, SeedMean]]] = {}
    for each in group(model for model in measured if FIVE_SHOT in model.results):
        lineage, ours = each.first.lineage, each.mean(FIVE_SHOT)
        if lineage.num_images is not None and ours is not None:
            points.setdefault(each.first.model, []).append((lineage.num_images, ours))
    if not points:
        return None
    figure, (axes,) = _figure(1, (9, 4.6))
    published = 100 * tables.TABLE_8["learned_1d", "stem"]
    axes.axhline(published, color="0.5", linestyle=":", label=f"{TABLE_8_MODEL}, table 8")
    styles = _styles_of(sorted(points))
    for model, own in sorted(points.items()):
        own.sort(key=lambda point: point[0])
        _stars(axes, own, *styles[model], label=f"{model}, ours", line="-")
    axes.set_xscale("log")
    images = [images for each in points.values() for images, _ in each]
    axes.set_xlim(min([*images, 1e6]) / 1.5, max([*images, 3e8]) * 1.5)
    axes.set(xlabel="images in the pre-training set", ylabel="linear 5-shot ImageNet top-1, %")
    _legend_below(figure, axes)
    return figure


def figure_5(models: Sequence[PreTrained], show_all: bool = False) -> "Figure | None":
    """The mean over five tasks, and ImageNet, by the exaFLOPs of pre-training."""
    known = [model for model in models if model.lineage.exaflops]
    mean_of_five = f"mean of {', '.join(AVERAGE_OF[:-1])} and {AVERAGE_OF[-1]}"
    ours = [
        [(model, score) for model in known if (score := average_of_five(model))],
        [(model, score) for model in known if (score := result_on(model, IMAGENET))],
    ]
    if not any(ours) and not show_all:
        return None
    figure, all_axes = _figure(2, (14, 6.4))
    panels = zip(all_axes, (mean_of_five, IMAGENET), (AVERAGE_OF, (IMAGENET,)), ours, strict=True)
    for axes, title, tasks, stars in panels:
        theirs = {row: statistics.fmean(row.scores[task] for task in tasks) for row in tables.TABLE_6}
        axes.set_xscale("log")
        axes.margins(x=0.12, y=0.08)
        labels: list[tuple[float, float, str, str]] = []
        for kind, (marker, color) in _KINDS.items():
            points = [(row.exaflops, theirs[row]) for row in theirs if kind_of(row.model) == kind]
            axes.plot(*zip(*points, strict=True), marker, color=color, ms=6, label=f"{kind}, table 6")
            labels += [(row.exaflops, theirs[row], row.model, color) for row in theirs if kind_of(row.model) == kind]
        for model, score in stars:
            exaflops, color = model.lineage.exaflops or 0.0, _KINDS[kind_of(model.model)][1]
            _stars(axes, [(exaflops, score)], color)
            row = next((row for row in theirs if _is_row_of(model, row)), None)
            if row is None:
                labels.append((exaflops, score.mean, f"{model.model}, {model.data}", "black"))
            else:  # its name is written already
                axes.plot([row.exaflops, exaflops], [theirs[row], score.mean], color=color, linewidth=0.8)
        if stars:
            _stars(axes, [], "white", label="ours")
        axes.set(xlabel="exaFLOPs of pre-training", ylabel="top-1 after fine-tuning, %", title=title)
        axes.legend(fontsize=8, loc="lower right")
        _write_beside(figure, axes, labels)
    return figure


def _is_row_of(model: PreTrained, row: tables.JftScaling) -> bool:
    """Whether a model of ours is one of table 6."""
    exaflops = model.lineage.exaflops or 0.0
    return (model.model, model.data) == (row.model, "JFT-300M") and abs(exaflops / row.exaflops - 1) <= 0.15


def _write_beside(figure: "Figure", axes: "Axes", labels: Sequence[tuple[float, float, str, str]]) -> None:
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


def _figure(panels: int, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    all_axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in all_axes:
        axes.grid(alpha=0.3)
    return figure, all_axes


def _legend_below(figure: "Figure", axes: "Axes") -> None:
    """Adds a legend below the picture, in as many columns as fit; the picture grows by its height."""
    texts = axes.get_legend_handles_labels()[1]
    columns = max(1, min(4, _ROOM_FOR_LEGEND // (max(map(len, texts)) + 10)))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(texts) // columns))
    figure.legend(fontsize=8, loc="outside lower center", ncols=columns)


def _styles_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Color and marker of each model: those of table 5 have the color of theirs."""
    others = itertools.cycle((color, marker) for marker in _OTHER_MARKERS for color in _OTHER_COLORS)
    return {name: (_COLORS[name], "*") if name in _COLORS else next(others) for name in names}


def _stars(
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
