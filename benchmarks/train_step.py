r"""Measures models in inference and training: images/s, compile time, memory, and share of the matrix rate.

    # Two cores of a laptop, a minute
    python benchmarks/train_step.py --models ViT-Ti/16 --batch=8

    # One GPU, each at the batch that suits it best, beside timm if torch and timm are installed
    python benchmarks/train_step.py --models ViT-S/16 ViT-B/16 ViT-L/16 R50x1 --dtype=bfloat16 --batch=auto \
        --torch_compile --json=a100.json

    # What do options of the model cost? Each --variant is measured beside the unchanged model
    python benchmarks/train_step.py --models ViT-L/16@64 --dtype=bfloat16 --what=train --timm=never \
        --variant=scan:scan_layers=true --variant=scan-remat:scan_layers=true,remat=dots

Needs only jax, flax, optax and rich. "forward" classifies a batch; "train" is `vit_jax.train_step.TrainStep` with
AdamW: forward, backward, clipping, update, on a donated state. Images are uint8 on the device and are normalised
there. All candidates of a model take turns in one process, so that drifting speed of the machine affects them alike;
reported are medians over the rounds. float32 products are computed at the highest precision.

Utilisation is the share of the fastest matrix product of the same run in the same dtype. It counts what the model
needs: a train step is three forward passes, whatever rematerialisation adds. Memory is that of the step with its
arguments: for vit_jax as the compiler planned it, for timm on a GPU the peak of PyTorch's allocator; "-" if unknown.
Compile times are without any cache of compiled programs.

timm runs with its fastest options: fused optimizer, scaled-dot-product attention, automatic mixed precision for
bfloat16 (parameters are float32 in both), channels-last convolutions on a GPU; with --torch_compile also compiled.
If the CUDA libraries of jax and torch conflict, measure them apart, with --timm=never and --timm=only.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# So that it runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax

from benchmarks.candidates import (
    NUM_CLASSES,
    PAUSE_SECONDS,
    Candidate,
    OurCandidate,
    Settings,
    TimmCandidate,
    import_torch_and_timm,
    is_out_of_memory,
    set_precision,
    torch_device,
)
from benchmarks.common import machine_facts, progress, write_json
from benchmarks.matmul import measure_matmul
from benchmarks.train_step_flags import Model, check_arguments, make_parser
from benchmarks.train_step_rows import Row, compare_with_timm, finish_row, format_remarks, rows_table
from vit_jax.costs.flops import forward_flops
from vit_jax.errors import UserError
from vit_jax.models import create_model

TURN_SECONDS = 1.0  # what --steps=auto fills
MIN_STEPS = 3
FIRST_BATCH = 8  # of --batch=auto
GAIN = 1.03  # --batch=auto continues while the speed grows by as much


# ---- Errors.


def reason(error: BaseException) -> str:
    """An exception in one line."""
    # Of an unknown name the nearest one is enough here.
    first = next(iter(str(error).strip().splitlines()), "").partition(" Known: ")[0]
    if len(first) > 300:
        first = first[:297] + "..."
    if isinstance(error, UserError):
        return first
    return f"{'out of memory: ' if is_out_of_memory(error) else ''}{type(error).__name__}: {first}"


def report(error: BaseException) -> str:
    """The reason; unexpected errors also print a traceback to stderr."""
    if not isinstance(error, UserError) and not is_out_of_memory(error):
        traceback.print_exception(error, file=sys.stderr)
    return reason(error)


# ---- Batches.


def steps_of_turn(candidate: Candidate, settings: Settings, seconds: float = TURN_SECONDS) -> int:
    """Steps that fill a turn."""
    if settings.steps:
        return settings.steps
    steps = MIN_STEPS
    while True:
        # First a guess from few steps; once they fill a good part of the turn, their time is reliable.
        wanted = max(MIN_STEPS, math.ceil(seconds / candidate.seconds(steps)))
        if wanted <= 4 * steps:
            return wanted
        steps = min(wanted, 10 * steps)


def try_batches(candidate: Candidate, what: str, first: int, settings: Settings) -> Iterator[tuple[int, float]]:
    """Doubles the batch while it pays. Yields `(batch, images/s)`; raises the error of a batch that fails."""
    best, batch = 0.0, first
    while True:
        candidate.prepare(what, batch)
        steps = steps_of_turn(candidate, settings, TURN_SECONDS / 3)
        speed = batch / statistics.median(candidate.seconds(steps) for _ in range(3))
        yield batch, speed
        if speed < GAIN * best:
            return
        best, batch = max(best, speed), 2 * batch


def tune_here(arguments: argparse.Namespace) -> int:
    """The process of --batch=auto: writes a line of JSON for each batch."""
    model, variant = json.loads(arguments.tune)
    what = "train" if "train" in arguments.what else arguments.what[0]
    try:
        prepare_frameworks(arguments.settings, with_torch=variant.startswith("timm"))
        candidate = candidates_of(model, arguments)[variant]()
        for batch, speed in try_batches(candidate, what, FIRST_BATCH, arguments.settings):
            print(json.dumps({"batch": batch, "images_per_second": speed}), flush=True)
    except Exception as error:
        print(json.dumps({"error": report(error)}), flush=True)
    return 0


def tune(model: str, variant: str) -> int:
    """Finds a candidate's best batch.

    In its own process: neither framework returns memory that the other could use, so the candidate tuned last would
    find less than the first. And if the system kills the process for its memory, that is only a limit found.

    Raises:
      UserError: not even the first batch works.
    """
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), *sys.argv[1:]]
    command.append(f"--tune={json.dumps([model, variant])}")
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    tried = [line for line in lines if "batch" in line]
    end = next((line["error"] for line in lines if "error" in line), None)
    if end is None and process.returncode:
        end = f"the process ended with status {process.returncode} (-9: killed, usually for its memory)"
    speeds = ", ".join(f"{line['batch']}: {line['images_per_second']:.4g}" for line in tried)
    progress(f"  {model} {variant}, images/s by batch: {speeds or 'none'}{f'; then {end}' if end else ''}")
    if not tried:
        raise UserError(end or "no batch works")
    return max(tried, key=lambda line: line["images_per_second"])["batch"]


def find_batches(arguments: argparse.Namespace) -> list[dict[str, int | str]]:
    """For each model the batch of each variant, or why there is none."""
    every: list[dict[str, int | str]] = []
    for model in arguments.models:
        batches: dict[str, int | str] = {}
        for variant in candidates_of(model.name, arguments):
            try:
                # The batch of timm also suits timm compiled, which would compile each batch for a minute.
                known = batches.get("timm") if variant == "timm compiled" else None
                batches[variant] = model.batch or known or tune(model.name, variant)
            except UserError as error:
                batches[variant] = str(error)
        every.append(batches)
    return every


# ---- Measurements.


def prepare_frameworks(settings: Settings, *, with_torch: bool) -> None:
    """Sets what must be set before a device is used.

    Raises:
      UserError: torch cannot take part.
    """
    # Both frameworks share one GPU's memory: JAX must not take it all at once, nor stop at three quarters of it.
    if with_torch:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")
    jax.config.update("jax_enable_compilation_cache", False)
    set_precision(settings.dtype, with_torch=with_torch)
    if with_torch:
        torch_device(import_torch_and_timm()[0], settings)


def candidates_of(model: str, arguments: argparse.Namespace) -> dict[str, Callable[[], Candidate]]:
    """Makers of all candidates of a model, by the name of the variant."""
    settings, overrides = arguments.settings, arguments.overrides
    makers: dict[str, Callable[[], Candidate]] = {}
    if arguments.timm != "only":
        variants = {"vit_jax": {}, **{f"vit_jax {name}": value for name, value in arguments.variants.items()}}
        for variant, more in variants.items():
            makers[variant] = functools.partial(OurCandidate, model, variant, {**overrides, **more}, settings)
    if arguments.timm != "never":
        makers["timm"] = functools.partial(TimmCandidate, model, "timm", overrides, settings, None)
        if mode := arguments.torch_compile:
            variant = "timm compiled"
            makers[variant] = functools.partial(TimmCandidate, model, variant, overrides, settings, mode)
    return makers


def flops_of_forward(name: str, arguments: argparse.Namespace) -> float | None:
    """FLOPs of a forward pass of one image by formula; None for a model that cannot be made."""
    try:
        model = create_model(name, num_classes=NUM_CLASSES, dtype="float32", **arguments.overrides)
        return float(forward_flops(model, arguments.image_size))
    except Exception as error:  # the model's own row says what is wrong with it
        progress(f"  FLOPs of {name}: {reason(error)}")
        return None


def measure_model(
    model: Model, batches: dict[str, int | str], reference: float | None, arguments: argparse.Namespace
) -> list[Row]:
    """Measures all candidates of a model in turn.

    Args:
      model: its name and batch.
      batches: of each variant, or why there is none.
      reference: rate of matrix products, in FLOP/s.
      arguments: the command's.
    """
    flops = flops_of_forward(model.name, arguments)
    rows: list[Row] = []
    candidates: dict[str, Candidate] = {}
    errors: dict[str, str] = {}
    makers = candidates_of(model.name, arguments)
    for variant, make in makers.items():
        batch = batches[variant]
        try:
            if isinstance(batch, str):
                raise UserError(batch)
            candidates[variant] = make()
        except Exception as error:
            errors[variant] = report(error)

    for what in arguments.what:
        of_task = [Row(model.name, name, what, arguments.dtype, error=errors.get(name)) for name in makers]
        rows += of_task
        turns: list[tuple[Row, Candidate]] = []
        for row in of_task:
            if candidate := candidates.get(row.variant):
                try:
                    prepare_row(row, candidate, int(batches[row.variant]), model.batch is None, arguments.settings)
                    turns.append((row, candidate))
                except Exception as error:
                    row.error = report(error)
        take_turns(turns, arguments.rounds if turns else 0)
        for row, candidate in turns:
            if not row.error:
                row.flops_per_image = flops and flops * (3 if what == "train" else 1)
                finish_row(row, candidate.loss(), reference)
        compare_with_timm(of_task)
    return rows


def prepare_row(row: Row, candidate: Candidate, batch: int, tuned: bool, settings: Settings) -> None:
    """Prepares a candidate for its turns, and fills in what is then known."""
    row.overrides, row.timm_name = candidate.overrides, candidate.timm_name
    progress(f"  {row.model} {row.variant} {row.what}, batch {batch}: compiling")
    while True:
        row.batch = batch
        try:
            prepared = candidate.prepare(row.what, batch)
            break
        except Exception as error:
            # The batch was found without the other candidates in memory; beside them it may be too much.
            if not (tuned and is_out_of_memory(error) and batch >= 2 * FIRST_BATCH):
                raise
            batch //= 2
            row.note = "a smaller batch than the best alone: the other candidates are in memory as well"
    for name, value in vars(prepared).items():
        setattr(row, name, value)
    row.steps = steps_of_turn(candidate, settings)


def take_turns(turns: Sequence[tuple[Row, Candidate]], rounds: int) -> None:
    """Measures candidates round by round; one that fails is left out from then on."""
    for round_number in range(rounds):
        progress(f"  round {round_number + 1} of {rounds}")
        # Every other round in reverse, so that no candidate always follows the same neighbour.
        for row, candidate in turns if round_number % 2 == 0 else reversed(turns):
            if row.error:
                continue
            try:
                if jax.default_backend() == "cpu" and len(turns) > 1:
                    time.sleep(PAUSE_SECONDS)
                row.round_seconds.append(candidate.seconds(row.steps or MIN_STEPS))
            except Exception as error:
                row.error = report(error)


# ---- Results.


def all_facts(settings: Settings, *, with_torch: bool) -> dict[str, Any]:
    """The machine, the devices, versions and environment variables."""
    device = jax.devices()[0]
    packages = ["jax", "jaxlib", "flax", "optax", "numpy", *(["torch", "timm"] if with_torch else [])]
    facts = {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "platform_version": device.client.platform_version,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("XLA_", "JAX_", "OMP_"))},
    }
    if with_torch:
        torch, _ = import_torch_and_timm()
        on_gpu = torch_device(torch, settings) == "cuda"
        facts["torch_device"] = torch.cuda.get_device_name() if on_gpu else "cpu"
        facts |= {"torch_cuda": torch.version.cuda, "torch_threads": torch.get_num_threads()}
    return facts


def describe_run(facts: dict[str, Any], matmul: dict[str, Any], settings: Settings) -> str:
    """The lines above the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{facts['device_kind']} ({facts['platform']}); {facts['processor']}, {facts['cores']} cores, "
        f"{facts['memory_bytes'] / 2**30:.0f} GiB",
        f"Python {facts['python']}, {versions}",
        f"{settings.dtype}, images of {settings.image_size}",
    ]
    if "torch_device" in facts:
        lines.append(f"timm on {facts['torch_device']}, {facts['torch_threads']} threads")
    for framework in ("jax", "torch"):
        if matmul.get(framework):
            rates = [f"{entry['size']}: {entry['flops_per_second'] * 1e-12:.4g}" for entry in matmul[framework]]
            lines.append(f"Matrix products in {framework}, TFLOP/s by size: {', '.join(rates)}")
    if matmul["reference"]:
        lines.append(f"Utilisation 100 % is {matmul['reference'] * 1e-12:.4g} TFLOP/s")
    if facts["platform"] == "cpu" and facts["load_average"] > 0.5:
        lines.append(
            f"Load average {facts['load_average']:.1f} at the start: wait for other programs. They slow torch's "
            "threads, which wait for each other, far more than those of JAX"
        )
    return "\n".join(lines)


def benchmark(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes everything; returns the exit status."""
    facts = machine_facts()
    # First: where only one process may hold the device (TPU), this one must not hold it yet.
    batches = find_batches(arguments)
    settings: Settings = arguments.settings
    with_torch = arguments.timm != "never"
    try:
        prepare_frameworks(settings, with_torch=with_torch)
    except UserError as error:
        if arguments.timm == "only":
            raise
        arguments.timm, with_torch = "never", False
        progress(f"without timm: {error}")

    facts |= all_facts(settings, with_torch=with_torch)
    progress("matrix products")
    matmul = measure_matmul(settings, arguments.matmul_sizes, with_jax=arguments.timm != "only", with_torch=with_torch)
    print(describe_run(facts, matmul, settings), flush=True)
    rows: list[Row] = []
    for model, of_model in zip(arguments.models, batches, strict=True):
        progress(model.name)
        measured = measure_model(model, of_model, matmul["reference"], arguments)
        rows += measured
        if arguments.json:  # after each model, so that a later failure loses nothing
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            result = {"command": sys.argv[1:], "time": now, "machine": facts, "settings": dataclasses.asdict(settings)}
            result |= {"matmul": matmul, "rows": [dataclasses.asdict(row) for row in rows]}
            write_json(arguments.json, result)
        parameters = next((f", {row.parameters:,} parameters" for row in measured if row.parameters), "")
        print(
            f"\n## {model.name}{parameters}\n\n{rows_table(measured)}\n\n{format_remarks(measured)}", end="", flush=True
        )
        gc.collect()
        if with_torch:
            import_torch_and_timm()[0].cuda.empty_cache()  # does nothing without a GPU
    if len(arguments.models) > 1:
        print(f"\n## Summary\n\n{rows_table(rows)}")
    return 0 if any(row.images_per_second for row in rows) else 1


def main() -> int:
    """The command; returns its exit status."""
    arguments = make_parser(__doc__).parse_args()
    try:
        check_arguments(arguments)
        return tune_here(arguments) if arguments.tune else benchmark(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
