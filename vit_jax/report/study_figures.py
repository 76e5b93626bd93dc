"""Pictures of the paper's studies (figures 4, 5, 8, 9 and 13) and of VTAB's groups (figure 2), with our numbers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vit_jax.paper import tables
from vit_jax.paper.tables import Score
from vit_jax.report.drawing import draw_ours, legend_below, new_figure, styles_of
from vit_jax.report.figure_tables import FIGURE_2_PAPER, FIGURE_2_ROWS
from vit_jax.report.markdown import Table
from vit_jax.report.paper_tables import TABLE_8_MODEL
from vit_jax.report.seeds import SeedMean
from vit_jax.report.studies import NOT_PAPERS, OTHER, Comparison, shape_base, shape_differences
from vit_jax.report.subjects import FIVE_SHOT, Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_ROWS, _MOST_PANELS = 4, 3  # of a picture; the table has everything
_AXES_OF_SHAPE = {"num_layers": "depth", "hidden_dim": "width", "mlp_dim": "MLP width", "patch_size": "patch size"}
_ALL = "several dimensions"
Point = tuple[float, SeedMean]


def draw_studies(found: Sequence[Comparison]) -> "dict[str, tuple[str, Figure]]":
    """Draws the studies that have a picture; title and figure by name."""
    drawn = {}
    for name, draw in _PICTURES.items():
        for is_papers in (True, False):
            its = [each for each in found if each.study.name == name and each.is_papers == is_papers]
            its = [each for each in its if any(series for panel in draw(each) for series in panel[2])]
            if its:
                title = its[0].study.title + ("" if is_papers else f" ({NOT_PAPERS})")
                drawn[name + ("" if is_papers else OTHER)] = (title, _draw(its[:_MOST_ROWS], draw))
    return drawn


# A panel: the labels of its axes, x then y, and series of points by name; True if a line joins them.
Panel = tuple[str, str, dict[str, tuple[list[Point], bool]]]


def _draw(found: Sequence[Comparison], draw: Callable[[Comparison], list[Panel]]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = [draw(each) for each in found]
    across = max(map(len, rows))
    figure = Figure(figsize=(max(8.5, 4.8 * across), 4.2 * len(rows)), layout="constrained")
    all_axes = figure.subplots(len(rows), across, squeeze=False)
    names = list(dict.fromkeys(name for panels in rows for panel in panels for name in panel[2]))
    styles = styles_of(names)
    for each, panels, row in zip(found, rows, all_axes, strict=True):
        for axes in row[len(panels) :]:
            axes.axis("off")
        for (x_label, y_label, series), axes in zip(panels, row, strict=False):
            axes.grid(alpha=0.3)
            for name, (points, is_line) in series.items():
                draw_ours(axes, points, *styles[name], label=name, line="-" if is_line else "")
            axes.set(xlabel=x_label, ylabel=f"{y_label}, %")
            if not x_label.startswith("epochs"):
                axes.set_xscale("log")
                axes.margins(x=0.12)
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.tick_params(axis="x", labelsize=8)
        if each.is_papers and each.study.name == "figure_4":
            _draw_table_8_line(row[0])
        if not each.is_papers or len(found) > 1:
            row[0].set_title(_title(each), fontsize=9, loc="left", parse_math=False)
    legend_below(figure, *all_axes.ravel())
    return figure


def _short(number: float) -> str:
    """A number at an axis: "90M", "5k", "0.5"."""
    for factor, letter in ((1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:g}{letter}"
    return f"{number:g}"


def _title(found: Comparison) -> str:
    """The data, if all have the same, and the folder of the runs."""
    data = {(member.data, member.num_images) for member in found.members}
    name, images = next(iter(data))
    what = f"{name}, {images:,} images" if len(data) == 1 and images else name
    return f"{what}: {found.folder}"


def _by_series(
    members: Sequence[Subject], names: Sequence[str], measure: str, x: Callable[[Subject], float | None]
) -> dict[str, tuple[list[Point], bool]]:
    """Points of the networks that have a number, by the name of their series, in the order of x."""
    series: dict[str, list[Point]] = {}
    for member, name in zip(members, names, strict=True):
        score, place = member.measures.get(measure), x(member)
        if score is not None and place:
            series.setdefault(name, []).append((place, score))
    return {key: (sorted(series[key], key=lambda point: point[0]), True) for key in sorted(series)}


def _panels(
    found: Comparison, x_label: str, series: Callable[[str], dict[str, tuple[list[Point], bool]]]
) -> list[Panel]:
    """A panel for each of the first measures that have points."""
    panels = [(x_label, measure, series(measure)) for measure in found.measures]
    return [panel for panel in panels if panel[2]][:_MOST_PANELS]


def _figure_4(found: Comparison) -> list[Panel]:
    return _panels(
        found,
        "images to pre-train on",
        lambda measure: _by_series(found.members, found.labels, measure, lambda each: each.num_images),
    )


def _figure_5(found: Comparison) -> list[Panel]:
    return _panels(
        found,
        "exaFLOPs of pre-training",
        lambda measure: _by_series(found.members, found.labels, measure, lambda each: each.exaflops),
    )


def _figure_8(found: Comparison) -> list[Panel]:
    """A line for each dimension, through the base; what differs in several is a series of its own."""
    base = shape_base(found.members)

    def series(measure: str) -> dict[str, tuple[list[Point], bool]]:
        by_axis: dict[str, list[Subject]] = {}
        for member in found.members:
            if differs := shape_differences(base, member):
                axis = _AXES_OF_SHAPE[differs[0]] if len(differs) == 1 else _ALL
                by_axis.setdefault(axis, [base]).append(member)
        compute = base.exaflops or 0.0
        drawn: dict[str, tuple[list[Point], bool]] = {}
        for axis, members in by_axis.items():
            if compute:
                names = [axis] * len(members)
                drawn |= _by_series(members, names, measure, lambda each: (each.exaflops or 0.0) / compute)
        return drawn

    return _panels(found, "compute relative to the base", series)


def _figure_9(found: Comparison) -> list[Panel]:
    """Curves over the epochs, as in the paper; where a run was evaluated only once, a point."""

    def series(measure: str) -> dict[str, tuple[list[Point], bool]]:
        drawn = {}
        for member in found.members:
            name = f"{member.fields.get('pool')}, lr {member.training.get('optimizer.learning_rate'):g}"
            score, curve = member.measures.get(measure), member.curves.get(measure, ())
            epochs = member.model.lineage.epochs
            if score is None or not epochs:
                continue
            points = [(epoch, SeedMean(mean)) for epoch, mean in curve if epoch < epochs * (1 - 1e-9)]
            drawn[name] = ([*points, (epochs, score)], True)
        return drawn

    return _panels(found, "epochs of training", series)


def _figure_13(found: Comparison) -> list[Panel]:
    measure = found.measures[0]
    costs = (
        ("exaFLOPs of pre-training", lambda each: each.exaflops),
        ("images a second and core, in training", lambda each: each.model.speed),
    )
    panels = [(label, measure, _by_series(found.members, found.labels, measure, x)) for label, x in costs]
    return [panel for panel in panels if panel[2]]


_PICTURES: dict[str, Callable[[Comparison], list[Panel]]] = {
    "figure_3": _figure_4,
    "figure_4": _figure_4,
    "figure_5": _figure_5,
    "figure_8": _figure_8,
    "figure_9": _figure_9,
    "figure_13": _figure_13,
}


def draw_figure_2(table: Table) -> "Figure":
    """Draws bars for each group of VTAB's tasks: published means in grey, ours in colour with their deviations."""
    figure, all_axes = new_figure(len(FIGURE_2_ROWS), (13, 4.6))
    theirs: dict[tuple[str, str], Score] = {}
    ours: dict[tuple[str, str], SeedMean] = {}
    for ((tasks,), column), cell in table.cells.items():
        if cell.paper:
            theirs[tasks, column] = cell.paper
        if cell.ours:
            ours[tasks, column] = cell.ours
    paper = [name for name in table.columns if any((row, name) in theirs for row in FIGURE_2_ROWS)]
    paper = [name for name in paper if name in FIGURE_2_PAPER or any((row, name) in ours for row in FIGURE_2_ROWS)]
    own = [name for name in table.columns if any((row, name) in ours for row in FIGURE_2_ROWS)]
    bars = [*((name, False) for name in paper), *((name, True) for name in own)]
    greys = [str(0.35 + 0.45 * number / max(1, len(paper) - 1)) for number in range(len(paper))]
    for axes, row in zip(all_axes, FIGURE_2_ROWS, strict=True):
        heights = []
        for place, (name, is_own) in enumerate(bars):
            score = (ours if is_own else theirs).get((row, name))
            if score is None:
                continue
            color = f"C{place - len(paper)}" if is_own else greys[place]
            label = f"{name}, {'ours' if is_own else 'published'}"
            axes.bar(place, score.mean, yerr=score.std, color=color, capsize=3, label=label)
            heights.append(score.mean)
        axes.set_title(row, fontsize=10)
        axes.set_xticks([])
        if heights:
            axes.set_ylim(max(0, min(heights) - 12), min(100, max(heights) + 4))
    all_axes[0].set_ylabel("VTAB-1k top-1, %")
    legend_below(figure, *all_axes)
    return figure


def _draw_table_8_line(axes: "Axes") -> None:
    """Marks the only number that the paper gives for figure 4's axis: table 8's, without its number of images."""
    published = 100 * tables.TABLE_8["learned_1d", "stem"]
    axes.axhline(published, color="0.5", linestyle=":", label=f"{TABLE_8_MODEL}, table 8: {FIVE_SHOT}")
