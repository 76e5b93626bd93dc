"""Figure 12 from the files of benchmarks/figure_12.py and figure_12_speed.py: speed, and the largest batch."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vit_jax.errors import UserError
from vit_jax.files import AnyPath
from vit_jax.json_files import read_json
from vit_jax.report.drawing import legend_below, new_figure
from vit_jax.report.markdown import Table
from vit_jax.report.names import kind_of
from vit_jax.report.paper_tables import digits_of
from vit_jax.report.seeds import SeedMean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEFT, RIGHT = "figure_12_left", "figure_12_right"
_SPEED, _BATCH = "images_per_second", "batch"
_KIND = {LEFT: _SPEED, RIGHT: _BATCH}
_NO_NUMBERS = (
    "The paper gives curves without numbers: ViTs are about as fast as ResNets of similar cost, and large ViTs are "
    "clearly more memory-efficient."
)

# A number of a file: the task or device that it is of, its model, the size in the figure and that of the images, in
# pixels, the number, and the file.
HardwareNumber = tuple[str, str, int, int, float, str]


def read_hardware(path: AnyPath) -> dict[str, list[HardwareNumber]]:
    """Reads the numbers of a file, by the half of the figure; cells that failed or are not finished are left out.

    Raises:
      UserError: the file cannot be read, or is none of these.
    """
    cells = read_json(path, allow_nan=True)
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise UserError(f"{path} is damaged: it is not a list of measurements as benchmarks/figure_12.py writes it.")
    halves: dict[str, list[HardwareNumber]] = {LEFT: [], RIGHT: []}
    for cell in cells:
        half = LEFT if _SPEED in cell else RIGHT
        number, size, pixels = cell.get(_KIND[half]), cell.get("size"), cell.get("image_size")
        device, dtype = cell.get("device", "TPU v3 core"), cell.get("dtype")
        what = (f"{device}, {dtype}" if dtype else device) if half == LEFT else cell.get("task")
        if not isinstance(what, str) or not isinstance(cell.get("model"), str) or {type(size), type(pixels)} != {int}:
            raise UserError(f"{path} is damaged: a cell is {cell}, without model, size, and task or device.")
        is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if is_number and number > 0:
            halves[half].append((what, cell["model"], size, pixels, float(number), str(path)))
    return halves


def hardware_tables(numbers: Mapping[str, Sequence[HardwareNumber]]) -> list[Table]:
    """Figure 12 as two tables, those that have numbers."""
    made = []
    for half, title, heading in (
        (LEFT, "Figure 12, left: images a second of the forward pass, the best over batch sizes", "device"),
        (RIGHT, "Figure 12, right: the largest batch that fits on a TPU v3 core", "task"),
    ):
        table = Table(half, title, (heading, "model"), "pixels")
        for what, model, size, pixels, number, file in numbers.get(half, ()):
            notes = () if pixels == size else (f"images of {pixels} pixels, the nearest that the patches tile",)
            digits = 0 if number.is_integer() else digits_of(number)
            table.add_ours((what, model), f"{size} px", SeedMean(number, notes=notes, sources=(file,)), digits=digits)
        table.columns.sort(key=lambda name: int(name.split()[0]))
        if any(what.endswith("roofline") for what, *_ in numbers.get(half, ())):
            table.remarks.append("A roofline is an upper bound by the planner, and not measured.")
        table.remarks.append(_NO_NUMBERS)
        made += [table] if table.cells else []
    return made


def draw_hardware(numbers: Mapping[str, Sequence[HardwareNumber]]) -> "Figure | None":
    """Draws both halves beside each other, with a panel for each device and task; ResNets are dashed."""
    panels = [(half, what) for half in (LEFT, RIGHT) for what in dict.fromkeys(n[0] for n in numbers.get(half, ()))]
    if not panels:
        return None
    figure, all_axes = new_figure(len(panels), (4.6 * max(2, len(panels)), 4.4))
    models = list(dict.fromkeys(number[1] for half, _ in panels for number in numbers[half]))
    colors = {model: f"C{place % 10}" for place, model in enumerate(models)}
    for axes, (half, what) in zip(all_axes, panels, strict=True):
        for model in models:
            points = sorted((n[3], n[4]) for n in numbers[half] if n[:2] == (what, model))
            if points:
                style = "--" if kind_of(model) == "BiT" else "-"
                axes.plot(*zip(*points, strict=True), f"{style}o", ms=4, color=colors[model], label=model)
        sizes = sorted({n[2] for n in numbers[half] if n[0] == what})
        axes.set(xscale="log", yscale="log", xlabel="image size, pixels", title=what)
        axes.set_xticks(sizes, map(str, sizes))
        axes.minorticks_off()
        axes.set_ylabel("images a second" if half == LEFT else "largest batch")
    legend_below(figure, *all_axes)
    return figure
