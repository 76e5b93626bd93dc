"""Draws docs/images/profile.png from profiles of docs/profiling.md.

python docs/profiling.py "the devices are busy=runs/quickstart/profile" "the input is late=runs/input_bound/profile"
"""

import gzip
import json
import pathlib
import sys

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLORS = {"train": "#9aa5b1", "waiting_for_input": "#d62728", "np.asarray(jax.Array)": "#f2b705"}
INPUT_COLOR = "#2ca02c"
STEP_COLORS = ("#1f77b4", "#6baed6")
LEGEND = {
    COLORS["train"]: "train: a step's batch is fetched, the step dispatched",
    COLORS["waiting_for_input"]: "waiting_for_input",
    COLORS["np.asarray(jax.Array)"]: "metrics of an earlier step are read",
    INPUT_COLOR: "a batch is made",
    STEP_COLORS[0]: "operations of a step,",
    STEP_COLORS[1]: "and of the next",
}


def read(folder: pathlib.Path) -> tuple[list[dict], dict[int, str]]:
    """The events of a profile that last, and the names of their threads."""
    (path,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event.get("name") == "thread_name"}
    return [event for event in events if event.get("ph") == "X"], threads


def draw(axes: Axes, folder: pathlib.Path, title: str) -> None:
    """One profile: a row for the loop, one for the input, one for the device's threads each."""
    events, threads = read(folder)
    loop = next(event["tid"] for event in events if event["name"] == "train")
    operations = [event for event in events if event.get("args", {}).get("hlo_module") == "jit_train_step"]
    workers = sorted({event["tid"] for event in operations if "XLAEigen" in threads[event["tid"]]})
    runs = sorted(
        {event["args"]["run_id"] for event in operations},
        key=lambda run: min(event["ts"] for event in operations if event["args"]["run_id"] == run),
    )
    rows = ["loop", "input", *(f"device, thread {number}" for number in range(1, len(workers) + 1))]

    def bar(row: int, event: dict, color: str, height: float = 0.8) -> None:
        axes.barh(row, event["dur"] / 1000, left=event["ts"] / 1000, height=height, color=color, linewidth=0)

    for event in events:
        if event["tid"] == loop and event["name"] in COLORS:
            bar(0, event, COLORS[event["name"]], 0.8 if event["name"] == "train" else 0.5)
            if event["name"] == "train":
                axes.text(event["ts"] / 1000, -0.62, event["args"]["step_num"], fontsize=7, ha="left", va="center")
        elif event["name"] == "Prefetch._getitem":
            bar(1, event, INPUT_COLOR)
    for event in operations:
        if event["tid"] in workers and not event["name"].startswith("end: "):
            bar(2 + workers.index(event["tid"]), event, STEP_COLORS[runs.index(event["args"]["run_id"]) % 2])
    axes.set(title=title, yticks=range(len(rows)), yticklabels=rows, xlabel="ms", ylim=(len(rows) - 0.4, -0.9), xlim=0)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Writes the picture."""
    profiles = [argument.split("=", 1) for argument in sys.argv[1:]]
    figure = Figure(figsize=(11, 2.6 * len(profiles) + 0.5), layout="constrained")
    for axes, (title, folder) in zip(figure.subplots(len(profiles), squeeze=False).flat, profiles, strict=True):
        draw(axes, pathlib.Path(folder), title)
    figure.legend(
        [Patch(color=color) for color in LEGEND], LEGEND.values(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(pathlib.Path(__file__).parent / "images" / "profile.png", dpi=110)


if __name__ == "__main__":
    main()
