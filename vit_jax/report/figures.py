"""The paper's figures 2, 3 and 5 with our numbers, and those of its studies.

The paper gives its figures only as curves. These figures show the numbers of its tables; nothing is read off a picture.
"""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vit_jax.paper import tables
from vit_jax.report.drawing import COLORS, draw_ours, legend_below, new_figure, styles_of, write_beside
from vit_jax.report.figure_tables import LARGEST_BIT, SMALLEST_BIT, bit_area, figure_2
from vit_jax.report.markdown import Cell
from vit_jax.report.names import PRE_TRAINING_IMAGES, kind_of
from vit_jax.report.paper_tables import table_5
from vit_jax.report.pretrained import AVERAGE_OF, PreTrained, average_of_five, result_on
from vit_jax.report.recipes import IMAGENET
from vit_jax.report.studies import Comparison
from vit_jax.report.study_figures import draw_figure_2, draw_studies

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DATA = ("ImageNet", "ImageNet-21k", "JFT-300M")
_KINDS = {"ViT": ("o", "C0"), "BiT": ("s", "0.45"), "hybrid": ("D", "C1")}
_AXIAL = {"axial": ("^", "C2")}  # not in table 6
_ROOM_FOR_DATA = 60  # characters of names across 9 inches


def draw_all(
    models: Sequence[PreTrained], found: Sequence[Comparison], *, show_all: bool = False
) -> "dict[str, tuple[str, Figure]]":
    """Draws the figures with numbers of ours, or all that have any number; title and figure by name."""
    bars = figure_2(models)
    drawn = {
        "figure_2": ("Figure 2: VTAB by group", draw_figure_2(bars) if bars.has_ours or show_all else None),
        "figure_3": ("Figure 3: transfer to ImageNet against the pre-training data", figure_3(models, show_all)),
        "figure_5": ("Figure 5: transfer against pre-training compute", figure_5(models, show_all)),
    }
    known = {name: (title, figure) for name, (title, figure) in drawn.items() if figure is not None}
    return dict(sorted((known | draw_studies(found)).items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[int, str]:
    return int(name.split("_")[1]), name


def figure_3(models: Sequence[PreTrained], show_all: bool = False) -> "Figure | None":
    """ImageNet after fine-tuning, by pre-training data: table 5's row. BiT is an area, as in the paper."""
    table = table_5(models)
    cells = {(data, name): cell for ((data, task), name), cell in table.cells.items() if task == IMAGENET}
    if not any(cell.ours for cell in cells.values()) and not show_all:
        return None
    figure, (axes,) = new_figure(1, (9, 5.2))
    data = list(dict.fromkeys([*_DATA, *(each for each, _ in cells)]))
    bit = bit_area()
    axes.fill_between(
        [data.index(each) for each in bit],
        [low for low, _ in bit.values()],
        [high for _, high in bit.values()],
        color="0.9",
        label=f"BiT, {SMALLEST_BIT} to {LARGEST_BIT}",
    )
    for name in tables.TABLE_5_MODELS:
        points = [
            (data.index(each), cell.paper.mean) for (each, of), cell in cells.items() if of == name and cell.paper
        ]
        axes.plot(*zip(*points, strict=True), "o-", color=COLORS[name], ms=5, alpha=0.6, label=f"{name}, table 5")
    names = [name for name in table.columns if any(cells.get((each, name), Cell()).ours for each in data)]
    styles = styles_of(names)
    step = min(0.08, 0.6 / max(1, len(names)))
    for number, name in enumerate(names, 1):  # shifts ours from the paper's points, and from each other
        found = [(x + step * number, cells.get((each, name), Cell()).ours) for x, each in enumerate(data)]
        draw_ours(axes, [(x, ours) for x, ours in found if ours], *styles[name], label=f"{name}, ours")
    is_long = sum(map(len, data)) > _ROOM_FOR_DATA
    axes.set_xticks(range(len(data)), data, rotation=12 if is_long else 0, ha="right" if is_long else "center")
    axes.set_xlim(-0.2, len(data) - 0.8 + step * len(names))
    axes.set(xlabel="pre-trained on", ylabel="ImageNet top-1 after fine-tuning, %")
    legend_below(figure, axes)
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
    figure, all_axes = new_figure(2, (14, 6.4))
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
            exaflops, color = model.lineage.exaflops or 0.0, (_KINDS | _AXIAL)[kind_of(model.model)][1]
            draw_ours(axes, [(exaflops, score)], color if model.data in PRE_TRAINING_IMAGES else "none")
            row = next((row for row in theirs if _is_row_of(model, row)), None)
            if row is None:
                labels.append((exaflops, score.mean, f"{model.model}, {model.data}", "black"))
            else:  # its name is written already
                axes.plot([row.exaflops, exaflops], [theirs[row], score.mean], color=color, linewidth=0.8)
        if stars:
            draw_ours(axes, [], "0.5", label="ours")
        if any(model.data not in PRE_TRAINING_IMAGES for model, _ in stars):
            draw_ours(axes, [], "none", label="ours, pre-trained on other data")
        axes.set(xlabel="exaFLOPs of pre-training", ylabel="top-1 after fine-tuning, %", title=title)
        axes.legend(fontsize=8, loc="lower right")
        write_beside(figure, axes, labels)
    return figure


def _is_row_of(model: PreTrained, row: tables.JftScaling) -> bool:
    """Whether a model of ours is one of table 6."""
    exaflops = model.lineage.exaflops or 0.0
    return (model.model, model.data) == (row.model, "JFT-300M") and abs(exaflops / row.exaflops - 1) <= 0.15
