r"""Figure 12 (left) of the paper: images a second of the forward pass by image size, the best over batch sizes.

    python benchmarks/figure_12_speed.py roofline --docs=docs   # of a TPU v3 core: half a minute on two CPU cores
    python benchmarks/figure_12_speed.py measure --docs=docs    # on the device that is here; the same command resumes
    python benchmarks/figure_12_speed.py report --docs=docs     # tables and the picture, beside figure 12 (right)

    # Two CPU cores, about a quarter of an hour
    python benchmarks/figure_12_speed.py measure --docs=docs --limit=4 \
        --models ViT-B/32 ViT-B/16 R50x1 ViT-L/32 ViT-L/16 R50x2

"roofline" takes the largest batch that a core holds (`figure_12.py`): by the planner, a step is never faster than its
FLOPs at the peak rate, nor than its bytes at the full bandwidth. It is an upper bound on the speed, and no estimate.

"measure" uses one device, noise as images, and bfloat16 activations on accelerators, float32 on a CPU. It doubles the
batch while the speed grows by 3 % and memory suffices. --limit is the number of seconds that one forward pass may take.
Larger batches are not tried, and an image that alone would take longer is recorded as too slow, by its FLOPs.

Models with 1,000 classes and unrolled layers. H/14 gets the nearest multiple of 14 pixels. Each cell is written when it
is finished, to figure_12_speed.json of --docs; the command skips cells that are there.
"""

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# So that it runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from benchmarks.candidates import is_out_of_memory, random_examples
from benchmarks.common import machine_facts, write_json
from benchmarks.figure_12_page import (
    BATCHES_JSON,
    MODELS,
    NUM_CLASSES,
    ROOFLINE,
    SIZES,
    SPEEDS_JSON,
    Cell,
    image_size,
    read_cells,
    write_page,
)
from vit_jax.costs.flops import forward_flops, parameter_count
from vit_jax.errors import UserError, unknown_name
from vit_jax.models import create_model
from vit_jax.models.layers import normalize_images
from vit_jax.plan import find_topology
from vit_jax.plan.roofline import roofline

GAIN = 1.03  # the batch is doubled while the speed grows by as much
TURN_SECONDS = 0.3
NUM_TURNS = 3
FIRST_BATCH = 4


def roofline_cell(model: str, size: int, batch: int, total_bytes: int) -> Cell:
    """The most images a second of a TPU v3 core.

    Args:
      model: name of the model.
      size: of the figure, in pixels.
      batch: images of a forward pass.
      total_bytes: memory of its program: arguments, results and temporaries.
    """
    pixels = image_size(model, size)
    network = create_model(model, num_classes=NUM_CLASSES)
    arguments = 4 * parameter_count(network, pixels) + batch * pixels * pixels * 3
    outputs = 4 * batch * NUM_CLASSES
    # As in the planner: a step reads its arguments, writes its results, and writes and reads its temporaries.
    memory_bytes = arguments + outputs + 2 * (total_bytes - arguments - outputs)
    bound = roofline(
        flops=batch * forward_flops(network, pixels),
        memory_bytes=memory_bytes,
        interconnect=0.0,
        num_devices=1,
        topology=find_topology("v3-8"),
    )
    speed, limit = batch / bound.seconds, bound.limit
    return _cell(ROOFLINE, None, model, size) | {"batch": batch, "images_per_second": speed, "limit": limit}


def time_forward(model: str, pixels: int, batch: int, dtype: str, limit: float) -> float:
    """Measures the seconds of a forward pass: the median of three turns, after one pass that is not counted.

    Args:
      model: name of the model.
      pixels: image size.
      batch: number of images.
      dtype: of the activations; parameters are float32.
      limit: seconds; a pass that takes more than a third of it is measured once.
    """
    network = create_model(model, num_classes=NUM_CLASSES, dtype=dtype)
    images = jax.device_put(random_examples(batch, pixels)["image"])
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, pixels, pixels, 3)))["params"]
    # The speed does not depend on the values.
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)

    @jax.jit
    def forward(params: Any, images: jax.Array) -> jax.Array:
        return network.apply({"params": params}, normalize_images(images), train=False)[0]

    compiled = forward.lower(params, images).compile()

    def turn(passes: int) -> float:
        start = time.perf_counter()
        for _ in range(passes):
            logits = compiled(params, images)
        jax.block_until_ready(logits)
        return (time.perf_counter() - start) / passes

    turn(1)
    first = turn(1)
    if NUM_TURNS * first > limit:
        return first
    passes = max(1, round(TURN_SECONDS / first))
    return statistics.median(turn(passes) for _ in range(NUM_TURNS))


def best_batch(seconds_of: Callable[[int], float], first: int, limit: float) -> tuple[dict[int, float], str | None]:
    """Doubles the batch while it pays.

    Args:
      seconds_of: the seconds of a forward pass of a batch.
      first: the first batch; halved if it runs out of memory.
      limit: seconds that a pass may take; a batch that is expected to take longer is not tried.

    Returns:
      images a second by batch, and why a batch was not measured, if memory ended it.
    """
    speeds: dict[int, float] = {}
    batch, message = first, None
    while True:
        try:
            seconds = seconds_of(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = f"batch {batch:,} runs out of memory"
            if speeds or batch == 1:
                return speeds, message
            batch //= 2
            continue
        gain = batch / seconds / max(speeds.values(), default=1e-30)
        speeds[batch] = batch / seconds
        if message or gain < GAIN or 2 * seconds > limit:
            return speeds, message
        batch *= 2


def measure_cell(model: str, size: int, device: str, dtype: str, known: Sequence[Cell], limit: float) -> Cell:
    """Measures a model at an image size.

    Args:
      model: name of the model.
      size: of the figure, in pixels.
      device: name of the device.
      dtype: of the activations.
      known: measured cells of the same device, which tell how long an image takes.
      limit: see `best_batch`.
    """
    pixels = image_size(model, size)
    flops = forward_flops(create_model(model, num_classes=NUM_CLASSES), pixels)
    cell = _cell(device, dtype, model, size) | {"flops": flops, "limit_seconds": limit, "jax": jax.__version__}
    first = FIRST_BATCH
    measured = [each for each in known if each["images_per_second"]]
    if measured:
        # Of the same model if possible, at the nearest size.
        nearest = min(measured, key=lambda each: (each["model"] != model, abs(each["flops"] - flops)))
        expected = flops / nearest["flops"] / nearest["images_per_second"]
        if expected > limit:
            message = f"an image takes about {expected:.0f} s"
            return cell | {"batch": None, "images_per_second": None, "tried": {}, "message": message}
        first = max(1, min(first, int(limit / expected)))
    tried, message = best_batch(lambda batch: time_forward(model, pixels, batch, dtype, limit), first, limit)
    batch = max(tried, key=lambda each: tried[each], default=None)
    speed = None if batch is None else tried[batch]
    return cell | {"batch": batch, "images_per_second": speed, "tried": tried, "message": message}


def device_here() -> tuple[str, str]:
    """The name of the device that is measured, and the type of its activations."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        facts = machine_facts()
        return f"{facts['processor']}, {facts['cores']} cores", "float32"
    return device.device_kind, "bfloat16"


def _cell(device: str, dtype: str | None, model: str, size: int) -> Cell:
    return {"device": device, "dtype": dtype, "model": model, "size": size, "image_size": image_size(model, size)}


def _key(cell: Cell) -> tuple[Any, ...]:
    return cell["device"], cell["dtype"], cell["model"], cell["size"]


def compute_roofline(docs: pathlib.Path, models: Sequence[str]) -> None:
    """Writes the roofline of each model and size whose largest batch is known."""
    batches = [cell for cell in read_cells(docs / BATCHES_JSON) if cell["task"] == "inference" and cell["batch"]]
    if not batches:
        raise UserError(f"{docs / BATCHES_JSON} has no largest batches: run benchmarks/figure_12.py first.")
    chosen = [cell for cell in batches if cell["model"] in models]
    rows = [roofline_cell(cell["model"], cell["size"], cell["batch"], cell["total_bytes"]) for cell in chosen]
    _write(docs, rows)


def measure(docs: pathlib.Path, models: Sequence[str], limit: float) -> None:
    """Measures what is missing, model by model, the smallest images first."""
    device, dtype = device_here()
    for model in models:
        for size in SIZES:
            known = [cell for cell in read_cells(docs / SPEEDS_JSON) if _key(cell)[:2] == (device, dtype)]
            if _key(_cell(device, dtype, model, size)) in map(_key, known):
                continue
            cell = measure_cell(model, size, device, dtype, known, limit)
            _write(docs, [cell])
            speed = cell["images_per_second"]
            found = cell["message"] if speed is None else f"{speed:,.2f} images/s, batch {cell['batch']}"
            print(f"{model} at {cell['image_size']}: {found}", flush=True)


def _write(docs: pathlib.Path, rows: Sequence[Cell]) -> None:
    """Adds cells to those of the file, in the order of the models."""
    cells = {_key(cell): cell for cell in [*read_cells(docs / SPEEDS_JSON), *rows]}
    devices = list(dict.fromkeys((cell["device"], cell["dtype"]) for cell in cells.values()))
    order = lambda cell: (devices.index(_key(cell)[:2]), MODELS.index(cell["model"]), cell["size"])  # noqa: E731
    write_json(docs / SPEEDS_JSON, sorted(cells.values(), key=order))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("roofline", "measure", "report"))
    parser.add_argument(
        "--docs", type=pathlib.Path, default=pathlib.Path("docs"), help="folder of the page and results"
    )
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="only these models of the figure")
    parser.add_argument(
        "--limit", type=float, default=10.0, help="seconds that one forward pass may take (default: 10)"
    )
    arguments = parser.parse_args(argv)
    try:
        if not arguments.docs.is_dir():
            raise UserError(f"--docs={arguments.docs}: there is no such folder.")
        if not 0 < arguments.limit < float("inf"):
            raise UserError(f"--limit={arguments.limit:g} must be a number of seconds above 0.")
        for model in arguments.models:
            if model not in MODELS:
                raise unknown_name("model of the figure", model, MODELS)
        if arguments.what == "roofline":
            compute_roofline(arguments.docs, arguments.models)
        elif arguments.what == "measure":
            measure(arguments.docs, arguments.models, arguments.limit)
        else:
            write_page(arguments.docs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
