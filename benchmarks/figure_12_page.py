"""The page and the picture of figure 12, from the results of `figure_12.py` and `figure_12_speed.py`."""

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.common import insert_tables
from vit_jax.console import format_table

# The cheap ones first.
MODELS = ("ViT-B/32", "ViT-B/16", "R50x1", "ViT-L/32", "ViT-L/16", "R50x2", "ViT-H/14", "R152x2", "R152x4")
SIZES = (64, 128, 224, 384, 512)
TASKS = ("train", "inference")
NUM_CLASSES = 1000
ROOFLINE = "TPU v3 core, roofline"
BATCHES_JSON, SPEEDS_JSON = "figure_12.json", "figure_12_speed.json"
Cell = dict[str, Any]


def image_size(model: str, size: int) -> int:
    """The nearest image size that the model's patches tile."""
    return round(size / 14) * 14 if model == "ViT-H/14" else size


def read_cells(path: pathlib.Path) -> list[Cell]:
    """Results so far; none if there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else []


def device_name(cell: Cell) -> str:
    """The device of a speed, with the type of its activations where it was measured."""
    return cell["device"] if cell["dtype"] is None else f"{cell['device']}, {cell['dtype']}"


def devices_of(speeds: Iterable[Cell]) -> list[str]:
    """The devices of speeds, in their order; the roofline comes first."""
    names = dict.fromkeys(map(device_name, speeds))
    return sorted(names, key=lambda name: name != ROOFLINE)


def format_cells(cells: Iterable[Cell], text_of: Callable[[Cell], str]) -> str:
    """A Markdown table: a row for each model and a column for each size. Models without a cell have no row."""
    by_key = {(cell["model"], cell["size"]): cell for cell in cells}
    rows = []
    for model in MODELS:
        if not any((model, size) in by_key for size in SIZES):
            continue
        texts = []
        for size in SIZES:
            cell = by_key.get((model, size))
            text = "not yet" if cell is None else text_of(cell)
            texts.append(
                text if image_size(model, size) == size or cell is None else f"{text} ({cell['image_size']} px)"
            )
        rows.append([model, *texts])
    return format_table(["model", *(f"{size} px" for size in SIZES)], rows, num_left=1)


def batch_text(cell: Cell) -> str:
    """The largest batch of a cell."""
    return f"{cell['batch']:,}"


def speed_text(cell: Cell) -> str:
    """Images a second with three digits; "-" if they were not measured."""
    speed = cell["images_per_second"]
    if speed is None:
        return "-"
    return f"{speed:,.{max(0, 2 - math.floor(math.log10(speed)))}f}"


def tables_of(batches: Sequence[Cell], speeds: Sequence[Cell]) -> dict[str, str]:
    """The tables of the page by name."""
    tables = {task: format_cells((cell for cell in batches if cell["task"] == task), batch_text) for task in TASKS}
    measured = []
    for name in devices_of(speeds):
        table = format_cells((cell for cell in speeds if device_name(cell) == name), speed_text)
        if name == ROOFLINE:
            tables["roofline"] = table
        else:
            measured.append(f"{name}:\n\n{table}")
    return tables | {"measured": "\n\n".join(measured) or "Not measured yet."}


def draw(batches: Sequence[Cell], speeds: Sequence[Cell]) -> Any:
    """Draws speeds on the left, one panel for each device, and the largest batches on the right.

    Returns:
      a matplotlib figure.
    """
    from matplotlib.figure import Figure

    left = [
        (f"images a second: {name}", [cell for cell in speeds if device_name(cell) == name], "images_per_second")
        for name in devices_of(speeds)
    ]
    right = [
        (f"largest batch on a TPU v3 core: {title}", [cell for cell in batches if cell["task"] == task], "batch")
        for task, title in (("inference", "forward pass"), ("train", "training step"))
    ]
    num_rows = max(len(left), len(right))
    figure = Figure(figsize=(12, 4.2 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, 2, squeeze=False)
    for column, panels in zip(axes.T, (left, right), strict=True):
        for axis, panel in zip(column, panels, strict=False):
            _draw_panel(axis, *panel)
        for axis in column[len(panels) :]:
            axis.set_axis_off()
    axes[0, 1].legend(fontsize=8)
    return figure


def _draw_panel(axis: Any, title: str, cells: Sequence[Cell], value: str) -> None:
    """Draws a curve for each model, of ViTs solid and of ResNets dashed; each keeps its colour in all panels."""
    for number, model in enumerate(MODELS):
        points = sorted((cell["image_size"], cell[value]) for cell in cells if cell["model"] == model and cell[value])
        if points:
            style = "--" if model.startswith("R") else "-"
            axis.plot(*zip(*points, strict=True), style, color=f"C{number}", marker="o", markersize=4, label=model)
    axis.set(title=title, xlabel="image size (pixels)", xscale="log", yscale="log")
    axis.set_xticks(SIZES, map(str, SIZES))
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def write_page(docs: pathlib.Path) -> None:
    """Updates figure_12.md and images/figure_12.png of a folder from its JSON files."""
    batches, speeds = read_cells(docs / BATCHES_JSON), read_cells(docs / SPEEDS_JSON)
    insert_tables(docs / "figure_12.md", tables_of(batches, speeds))
    draw(batches, speeds).savefig(docs / "images" / "figure_12.png", dpi=100)
