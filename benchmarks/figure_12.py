r"""Figure 12 (right) of the paper, recomputed: the largest batch that one TPU v3 core holds, by the compiler.

    python benchmarks/figure_12.py --docs=docs            # compiles; the same command resumes
    python benchmarks/figure_12.py --docs=docs --report   # tables and picture, beside figure 12 (left)

The paper ran inference on hardware; here XLA's TPU compiler reports what fits, without a TPU
(pip install --editable '.[plan]'). For each model and image size the largest batch is searched, to one part in 32, for
a step of training (Adam, bfloat16 activations, layers unrolled, no rematerialisation but the compiler's own) and for
the forward pass alone. Models with 1,000 classes. H/14's patches of 14 pixels tile no image of 64, 128 or 512 pixels,
nor of 384: it gets the nearest multiple of 14.

Each search writes its result to figure_12.json of --docs, which the same command skips later; it can be interrupted at
any time. `--model` and
`--task` restrict it. 90 searches: at 224 pixels down from a large batch, at other sizes around the batch that a known
size suggests. Only the first fifth of each compilation runs, until memory is assigned: hours on two CPU cores.
"""

import argparse
import functools
import math
import pathlib
import sys
import time
from typing import Any

# So that it runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from ml_collections import ConfigDict

from benchmarks.common import write_json
from benchmarks.figure_12_page import (
    BATCHES_JSON,
    MODELS,
    NUM_CLASSES,
    SIZES,
    TASKS,
    image_size,
    read_cells,
    write_page,
)
from vit_jax.config import base_config
from vit_jax.errors import UserError, unknown_name
from vit_jax.plan import find_topology, largest_batch, plan_row
from vit_jax.plan.compiling import end_on_signals

TOPOLOGY = "v3-8"
TIMEOUT_MINUTES = 30.0
# Tried first; the search goes down from it by halves, or up by doubling.
FIRST_PIXELS = 4096 * 224 * 224


def make_config(model: str, size: int) -> ConfigDict:
    """A config for training a model on images of that size."""
    config = base_config()
    config.model.name = model
    config.model.num_classes = NUM_CLASSES
    config.model.dtype = "bfloat16"
    config.data.image_size = image_size(model, size)
    config.data.eval_resize_small = None
    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.1
    config.steps = 1000
    config.batch_size = 1
    return config


def measure(model: str, size: int, task: str, cells: dict[tuple[str, int, str], dict[str, Any]]) -> dict[str, Any]:
    """Searches the largest batch; near that of as many pixels in total, if `cells` has another image size."""
    start = time.perf_counter()
    topology = find_topology(TOPOLOGY)
    plan = functools.partial(plan_row, num_devices=1, task=task, timeout_minutes=TIMEOUT_MINUTES, memory_only=True)
    config = make_config(model, size)
    guess = max(1, FIRST_PIXELS // config.data.image_size**2)
    known = [cells[key] for other in SIZES if (key := (model, other, task)) in cells and cells[key]["batch"]]
    if known:
        nearest = min(known, key=lambda cell: abs(math.log(cell["image_size"] / config.data.image_size)))
        guess = max(1, round(nearest["batch"] * (nearest["image_size"] / config.data.image_size) ** 2))
    row = largest_batch(plan, config, topology, num_devices=1, first_guess=guess, near=bool(known))
    return {
        "model": model,
        "size": size,
        "image_size": config.data.image_size,
        "task": task,
        "status": row.status,
        "batch": row.batch_size if row.fits else 0,
        "total_bytes": row.memory.total if row.memory else None,
        "usable_bytes": row.memory.usable if row.memory else None,
        "message": row.message,
        "search_seconds": time.perf_counter() - start,
    }


def key_of(cell: dict[str, Any]) -> tuple[str, int, str]:
    """The model, size and task of a result."""
    return cell["model"], cell["size"], cell["task"]


def read(path: pathlib.Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Results so far, without failures, which are tried again."""
    return {key_of(cell): cell for cell in read_cells(path) if cell["status"] in ("fits", "does not fit")}


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="only this model; may be given again")
    parser.add_argument("--task", choices=TASKS, help="only this task")
    parser.add_argument("--report", action="store_true", help="compile nothing, write tables and picture")
    parser.add_argument(
        "--docs", type=pathlib.Path, default=pathlib.Path("docs"), help="folder of the page and results"
    )
    arguments = parser.parse_args()
    end_on_signals()
    if arguments.report:
        write_page(arguments.docs)
        return 0
    cells = read(arguments.docs / BATCHES_JSON)
    try:
        for model in arguments.model or ():
            if model not in MODELS:
                raise unknown_name("model of the figure", model, MODELS)
        for size in (224, 384, 128, 512, 64):
            for task in [arguments.task] if arguments.task else TASKS:
                for model in arguments.model or MODELS:
                    if (model, size, task) in cells:
                        continue
                    cell = measure(model, size, task, cells)
                    cells[key_of(cell)] = cell
                    write_json(arguments.docs / BATCHES_JSON, list(cells.values()))
                    print(
                        f"{model} at {cell['image_size']}, {task}: {cell['batch']} ({cell['status']}, "
                        f"{cell['search_seconds']:.0f} s)",
                        flush=True,
                    )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
