"""Draws docs/images/architecture.png.

python docs/architecture.py
"""

import pathlib

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

COLORS = {"data": "#d8e8f6", "model": "#fce4cf", "step": "#fbd3d3", "loop": "#e2dcf3", "disk": "#dcefdc"}

# name: (center x, center y, width, height, color, title, text)
BOXES = {
    "config": (1.45, 6.3, 2.3, 0.9, "loop", "config", "configs/*.py"),
    "experiment": (4.35, 6.3, 2.5, 0.9, "loop", "experiment", "makes and checks the parts"),
    "model": (7.0, 6.3, 1.7, 0.9, "model", "model", "images → logits"),
    "objective": (8.9, 6.3, 1.8, 0.9, "model", "objective", "losses, metrics"),
    "optimizer": (10.75, 6.3, 1.6, 0.9, "model", "optimizer", "schedule, decay"),
    "weights": (12.38, 6.3, 1.45, 0.9, "model", "weights", "released, own"),
    "source": (1.45, 4.7, 2.3, 1.1, "data", "source", "TFDS, records, folder, zip:\nsource[i] → bytes, labels"),
    "stream": (1.45, 3.1, 2.3, 1.1, "data", "index stream", "position → example, by seed;\nthis process's rows"),
    "load": (4.55, 3.9, 2.7, 1.5, "data", "pipeline",
             "workers, threads: decode\nthe crop, resize, flip →\nuint8, random by position"),
    "step": (8.7, 3.9, 3.2, 1.5, "step", "TrainStep",
             "jit over the mesh, donated:\nobjective, gradients,\nupdate, metrics"),
    "plan": (12.1, 3.9, 2.0, 1.5, "loop", "plan",
             "compiles the same\nstep for hardware\nthat is elsewhere"),
    "sweep": (12.1, 1.95, 2.0, 0.9, "loop", "sweep", "tries, chooses, repeats"),
    "report": (12.1, 0.55, 2.0, 0.9, "loop", "report", "beside the paper's"),
    "loop": (8.7, 1.95, 3.2, 0.9, "loop", "train: the loop", "dispatches, never waits"),
    "metrics": (8.7, 0.55, 3.2, 0.9, "disk", "journal", "terminal, JSON lines, TensorBoard"),
    "checkpoints": (4.55, 0.55, 2.7, 0.9, "disk", "checkpoints", "state + data position"),
    "evaluators": (4.55, 1.95, 2.7, 0.9, "disk", "evaluators", "run(state) → name, value"),
}  # fmt: skip

# start (x, y), end (x, y), label, position of the label, bend
ARROWS = [
    ((2.6, 6.3), (3.1, 6.3), "", None, 0),
    ((5.6, 6.3), (6.15, 6.3), "", None, 0),
    ((4.9, 6.75), (8.7, 6.75), "", None, -0.12),
    ((4.5, 6.75), (10.6, 6.75), "", None, -0.12),
    ((3.6, 5.85), (2.3, 5.25), "", None, 0),
    ((2.6, 4.7), (3.2, 4.3), "", None, 0),
    ((2.6, 3.1), (3.2, 3.5), "indices", (3.05, 3.02), 0),
    ((5.9, 3.9), (7.1, 3.9), "uint8 batches,\nread ahead", (6.5, 4.25), 0),
    ((7.1, 5.85), (8.0, 4.65), "", None, 0),
    ((8.85, 5.85), (8.7, 4.65), "", None, 0),
    ((10.6, 5.85), (9.4, 4.65), "", None, 0),
    ((8.2, 2.4), (8.2, 3.15), "state", (7.9, 2.8), 0),
    ((9.2, 3.15), (9.2, 2.4), "state, metrics", (9.85, 2.8), 0),
    ((7.1, 2.1), (5.9, 2.1), "state", (6.5, 2.24), 0),
    ((5.9, 1.8), (7.1, 1.8), "values", (6.5, 1.66), 0),
    ((7.3, 1.5), (5.9, 0.7), "state", (6.85, 0.98), 0),
    ((8.7, 1.5), (8.7, 1.0), "", None, 0),
    ((12.3, 5.85), (10.1, 4.65), "first parameters", (12.0, 5.2), 0),
    ((11.1, 1.95), (10.3, 1.95), "configs", (10.7, 2.1), 0),
    ((10.3, 0.55), (11.1, 0.55), "rows", (10.7, 0.7), 0),
    ((10.3, 3.9), (11.1, 3.9), "shapes", (10.7, 4.05), 0),
]


def main() -> None:
    """Writes the picture."""
    figure = Figure(figsize=(13.3, 7.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0.1, 13.2), ylim=(0, 7.4))
    axes.axis("off")
    for x, y, width, height, color, title, text in BOXES.values():
        axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=COLORS[color],
                edgecolor="#555555",
            )
        )
        axes.text(x, y + height / 2 - 0.24, title, ha="center", va="center", fontsize=11, weight="bold")
        axes.text(x, y - 0.13, text, ha="center", va="center", fontsize=9)
    for start, end, label, place, bend in ARROWS:
        style = f"arc3,rad={bend}"
        axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", connectionstyle=style, mutation_scale=14, color="#555555")
        )
        if place:
            axes.text(*place, label, ha="center", va="center", fontsize=8.5, color="#444444")
    output = pathlib.Path(__file__).parent / "images" / "architecture.png"
    figure.savefig(output, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
