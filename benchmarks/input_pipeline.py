r"""Measures how fast images reach the model, for vit_jax's input, tf.data and a PyTorch-style DataLoader.

    # A few minutes, on a folder train/<class>/<image> or a zip file of JPEGs
    python benchmarks/input_pipeline.py --data=imagenet_sample_300.zip

    # The peers may have their own environments; one that is not installed is reported and left out
    python benchmarks/input_pipeline.py --data=imagenet_sample_300.zip --python_tf=~/tf/bin/python \
        --python_torch=~/torch/bin/python --json=input_pipeline.json

    # Do more threads and processes help? What does a restart in the middle of a long run cost, and is it exact?
    python benchmarks/input_pipeline.py --what=scaling --threads 1 2 4 8 --processes 0 1 2
    python benchmarks/input_pipeline.py --what=restore

All make endless training batches of the same files: Inception crop of 5 to 100 % of the area, resize, flip. In each
round each pipeline runs in a fresh process, one after the other, in an order that rotates, so that drifting speed of
the machine affects them alike; reported are medians over the rounds. A few hundred images are read repeatedly, so they
come from the page cache and no disk is measured. `taskset -c 0,1 python ...` measures two cores of a larger machine.

images/s is counted after --warm_up batches, by a consumer that only takes them. CPU seconds are those of all processes
of the pipeline. "PSS" is their memory, where a page shared by n processes counts as 1/n in each: the peak over a few
batches after the timed ones. Libraries that other programs use too count less, so use an idle machine. "Peak RSS" is
the sum of the peak resident size of each process, shared pages counted every time. "First s" is the time from the start
of the process to its first batch, imports included. "Floor" is a limit for every pipeline with the same decoder:
decoding crops drawn as in training, from memory, on all cores, with nothing around it.

The pipelines need vit_jax's own dependencies; tensorflow for tf.data; torch and pillow (not torchvision) for the
DataLoader. Memory and CPU seconds are known only on Linux. JAX runs on the CPU unless $JAX_PLATFORMS says otherwise.
"""

import argparse
import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

# So that it runs from a clone that is not installed, and in the peers' interpreters. Everything imported here needs
# only the standard library: which other packages this process has depends on its pipeline.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.common import machine_facts, number, progress, write_json
from benchmarks.input_floor import FLOOR, floor
from benchmarks.input_peers import BATCHES, list_files
from benchmarks.restore import WALKED_STEPS, restore
from vit_jax.console import format_table
from vit_jax.errors import UserError

MEASURED = ("images_per_second", "images_per_second_per_core", "images_per_cpu_second")
MEASURED += ("pss_bytes", "peak_rss_bytes", "startup_seconds")
MODULES = ("jax", "grain", "numpy", "simplejpeg", "cv2", "tensorflow", "torch", "PIL")


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of a table.

    Attributes:
      name: of the row.
      worker: one of `WORKERS`.
      python: interpreter of its process.
      includes: the work for a batch, in words.
      options: more fields of the worker's task.
    """

    name: str
    worker: str
    python: str
    includes: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


# ---- The process of a contender.


def measure(make_batches: Callable[[dict[str, Any]], Iterator[Any]], task: dict[str, Any]) -> dict[str, Any]:
    """Takes batches from a pipeline in this process; returns one round of a row."""
    batches = make_batches(task)
    first = next(batches)
    startup_seconds = time.monotonic() - task["started"]
    for _ in range(task["warm_up"]):
        next(batches)
    start, cpu_start = time.perf_counter(), cpu_seconds()
    for _ in range(task["batches"]):
        next(batches)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    images = task["batches"] * task["batch_size"]
    memory = [memory_bytes() for _ in itertools.islice(batches, 5)]
    return {
        "images_per_second": images / seconds,
        "images_per_second_per_core": images / seconds / task["cores"],
        "images_per_cpu_second": images / cpu if cpu else None,
        "pss_bytes": max(pss for pss, _ in memory) or None,
        "peak_rss_bytes": max(peak for _, peak in memory) or None,
        "startup_seconds": startup_seconds,
        "batch": f"{str(first.dtype).removeprefix('torch.')} {list(first.shape)}",
    }


def read_if_there(file: pathlib.Path) -> str:
    """Text of a file of /proc; empty if its thread or process has ended meanwhile."""
    try:
        return file.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def process_tree() -> list[pathlib.Path]:
    """This process and its descendants, as folders of /proc; nothing on systems without /proc."""
    found, new = [], [pathlib.Path(f"/proc/{os.getpid()}")]
    while new:
        process = new.pop()
        found.append(process)
        for children in glob.glob(f"{process}/task/*/children"):
            new += [pathlib.Path(f"/proc/{child}") for child in read_if_there(pathlib.Path(children)).split()]
    return [process for process in found if process.exists()]


def cpu_seconds() -> float:
    """CPU time of this process and its descendants, in user and kernel mode; 0 if unknown."""
    # The name of the program, in parentheses, may hold spaces; the two numbers are the 12th and 13th after it.
    stats = [read_if_there(process / "stat").rpartition(")")[2].split() for process in process_tree()]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats if stat) / os.sysconf("SC_CLK_TCK") if stats else 0.0


def memory_bytes() -> tuple[int, int]:
    """PSS and peak RSS of this process and its descendants, each summed; 0 if unknown."""

    def kilobytes(file: str, field: str) -> int:
        lines = [line.split() for process in process_tree() for line in read_if_there(process / file).splitlines()]
        return sum(int(words[1]) for words in lines if words[0] == f"{field}:")

    return 1024 * kilobytes("smaps_rollup", "Pss"), 1024 * kilobytes("status", "VmHWM")


WORKERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **{name: functools.partial(measure, batches) for name, batches in BATCHES.items()},
    "floor": floor,
    "restore": restore,
}


def work(name: str, task: dict[str, Any]) -> int:
    """Runs one of `WORKERS` and prints the result as a line of JSON."""
    try:
        result = WORKERS[name](task)
    except ImportError as error:
        result = {"problem": f"not installed: {error}"}
    except Exception as error:
        traceback.print_exc()
        result = {"problem": f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    loaded = {module: sys.modules[module] for module in MODULES if module in sys.modules}
    versions = {module: getattr(loaded[module], "__version__", "?") for module in loaded}
    print(json.dumps(result | {"versions": {"python": platform.python_version(), **versions}}), flush=True)
    return 0


# ---- The process of the command.


def unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the JPEG files of a zip file as train/<class>/<file>.

    The class is the name of the folder, or without a folder the part of the file name before the first underscore.

    Raises:
      UserError: it is no zip file of JPEG files.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [name for name in opened.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
            for member in members:
                path = pathlib.PurePosixPath(member)
                target = folder / "train" / (path.parent.name or path.name.partition("_")[0]) / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(opened.read(member))
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--data: cannot read {archive} as a zip file of JPEG files: {error}.") from error
    if not members:
        raise UserError(f"--data: {archive} has no .jpg or .jpeg files.")


def run_worker(worker: str, python: str, task: dict[str, Any]) -> dict[str, Any]:
    """Runs one of `WORKERS` in its own process; returns its result, or a "problem"."""
    task = {**task, "started": time.monotonic()}  # a clock that all processes share
    command = [python, str(pathlib.Path(__file__).resolve()), "--worker", worker, json.dumps(task)]
    environment = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
            )
        except OSError as error:
            raise UserError(f"cannot start {python} ({error.strerror}); --python_... take an interpreter.") from error
        assert process.stdout
        try:
            result = next((json.loads(line) for line in process.stdout if line.startswith('{"')), None)
        finally:
            # A process that ends by itself frees its shared memory. Others must not disturb the next turn.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        if result is None:
            result = {"problem": f"failed: its process ended with status {process.returncode}", "versions": {}}
        if result.get("problem", "").startswith("failed"):
            errors.seek(0)
            print(errors.read()[-2000:], file=sys.stderr)
    return result


def contenders(arguments: argparse.Namespace) -> list[Contender]:
    """The rows to measure."""
    ours = functools.partial(Contender, worker="vit_jax", python=sys.executable)
    if arguments.what == "scaling":
        note = "uint8 batches as global arrays on the device; the threads are those of each process"
        return [
            ours(
                f"threads {threads}, processes {processes}",
                includes=note,
                options={"device": True, "num_threads": threads, "num_workers": processes},
            )
            for processes, threads in itertools.product(arguments.processes, arguments.threads)
        ]
    host = "uint8 batches as NumPy arrays, nothing sent"
    device = "uint8 batches as global arrays on the device"
    float32 = "as tf.data, but float32 in [-1, 1], as big_vision makes them"
    pil = "uint8 batches as tensors in the main process, from a worker process for each core"
    tf_data = functools.partial(Contender, worker="tf_data", python=arguments.python_tf)
    own_pool, no_pool = f"{host}; big_vision's options (48 threads)", f"{host}; tf.data's own options"
    return [
        ours("vit_jax", includes=device, options={"device": True}),
        ours("vit_jax host", includes=host, options={"device": False}),
        tf_data("tf.data", includes=own_pool, options={"float32": False, "pool": 48}),
        tf_data("tf.data defaults", includes=no_pool, options={"float32": False, "pool": None}),
        tf_data("tf.data float32", includes=float32, options={"float32": True, "pool": 48}),
        Contender("PIL", "data_loader", arguments.python_torch, pil),
    ]


def throughput(arguments: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """Measures all contenders and the floor in turns."""
    every = contenders(arguments)
    # The floor first, and ours before TensorFlow's, which reads the crops that ours drew.
    floors = []
    if arguments.what == "throughput":
        for name, library, python, note in (
            ("floor", "opencv", sys.executable, "the first four rows of the floor"),
            ("floor of TensorFlow", "tensorflow", arguments.python_tf, "the last row of the floor"),
        ):
            floors.append(Contender(name, "floor", python, note, {"library": library}))
    rounds: dict[str, list[dict[str, Any]]] = {each.name: [] for each in [*floors, *every]}
    problems: dict[str, str] = {}
    versions: dict[str, dict[str, str]] = {}
    for round_number in range(arguments.rounds):
        turn = round_number % len(every)
        for each in floors + every[turn:] + every[:turn]:
            if each.name not in problems:
                progress(f"round {round_number + 1} of {arguments.rounds}: {each.name}")
                result = run_worker(each.worker, each.python, task | each.options)
                versions[each.name] = result.pop("versions")
                if "problem" in result:
                    problems[each.name] = result["problem"]
                else:
                    rounds[each.name].append(result)

    floor_rates = {
        what: {threads: statistics.median(result[what][threads] for result in rounds[each.name]) for threads in rates}
        for each in floors
        for what, rates in (rounds[each.name] or [{}])[0].items()
    }
    rows = [summarise(each, rounds[each.name], problems.get(each.name)) for each in every]
    speeds = {row["name"]: row["images_per_second"] for row in rows}
    references = {
        "to_tf_data": max(speeds.get("tf.data") or 0, speeds.get("tf.data defaults") or 0),  # the faster of two
        "to_pil": speeds.get("PIL"),
        "of_floor": floor_rates.get(FLOOR, {}).get("all_cores"),
    }
    for row in rows:
        for name, reference in references.items():
            row[name] = row["images_per_second"] / reference if reference and row["images_per_second"] else None
    notes = {each.name: problems.get(each.name, each.includes) for each in every + floors}
    return {"rows": rows, "floor": floor_rates, "notes": notes, "versions": versions}


def summarise(contender: Contender, rounds: list[dict[str, Any]], problem: str | None) -> dict[str, Any]:
    """A row: medians over the results of `measure`; None is unknown."""
    row: dict[str, Any] = {"name": contender.name, "problem": problem}
    for name in MEASURED:
        values = [each[name] for each in rounds if each[name] is not None]
        row[name] = statistics.median(values) if values else None
    speeds = [each["images_per_second"] for each in rounds]
    return row | {"least_and_most": [min(speeds), max(speeds)] if speeds else None, "rounds": rounds}


def describe(result: dict[str, Any]) -> str:
    """The result as text."""
    parts = []
    if rows := result.get("rows"):
        header = "pipeline|images/s|min to max|a core|a CPU s|to tf.data|to PIL|of floor|PSS MB|peak RSS MB|first s"
        table = [
            [
                row["name"],
                number(row["images_per_second"], ".0f"),
                " to ".join(f"{speed:.0f}" for speed in row["least_and_most"] or []) or "-",
                number(row["images_per_second_per_core"], ".0f"),
                number(row["images_per_cpu_second"], ".0f"),
                *(number(row[name], ".3f") for name in ("to_tf_data", "to_pil", "of_floor")),
                number(row["pss_bytes"], ".0f", 1e-6),
                number(row["peak_rss_bytes"], ".0f", 1e-6),
                number(row["startup_seconds"], ".1f"),
            ]
            for row in rows
        ]
        parts.append(format_table(header.split("|"), table, num_left=1) + "\n")
    if floors := result.get("floor"):
        table = [[what, f"{rate['one_thread']:.0f}", f"{rate['all_cores']:.0f}"] for what, rate in floors.items()]
        parts.append(format_table(["floor, images/s", "one thread", "all cores"], table, num_left=1) + "\n")
    if "restore_seconds" in result:
        milliseconds = {name: 1e3 * result[f"{name}_seconds"] for name in ("set_state", "restore")}
        parts.append(
            f"step {result['step']:,} of {result['examples']:,} examples: new iterator and set_state "
            f"{milliseconds['set_state']:.1f} ms, with the first batch {milliseconds['restore']:.1f} ms; "
            f"state {result['state_bytes']} bytes\nequal to the batch made image by image from its positions: "
            f"{result['equals_defined']}; to the one after {WALKED_STEPS:,} steps walked: {result['equals_walked']}\n"
        )
    for name, versions in result["versions"].items():
        note = f"{result['notes'][name]} " if "notes" in result else ""
        parts.append(f"- {name}: {note}({', '.join(' '.join(item) for item in versions.items())})")
    return "\n".join(parts)


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = pathlib.Path(os.environ.get("VIT_JAX_DATA", "."), "imagenet_sample_300.zip")  # as the tests look for it
    parser.add_argument("--what", default="throughput", choices=["throughput", "scaling", "restore"])
    home = os.path.expanduser  # shells leave the ~ in --flag=~/file alone
    parser.add_argument(
        "--data",
        type=lambda text: pathlib.Path(home(text)),
        default=data,
        help="zip file of JPEGs or folder with train/",
    )
    parser.add_argument("--python_tf", type=home, default=sys.executable, help="interpreter that has tensorflow")
    parser.add_argument("--python_torch", type=home, default=sys.executable, help="interpreter that has torch and PIL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=150, help="timed batches of a round")
    parser.add_argument("--warm_up", type=int, default=30, help="batches before them")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of --what=scaling")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2], help="of --what=scaling; 0: no workers")
    parser.add_argument("--json", type=pathlib.Path, help="file for all results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)  # a contender's process: name and task
    return parser


def benchmark(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes everything; returns the exit status."""
    for name in ("rounds", "batches", "batch_size", "image_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(arguments, name)}.")
    if arguments.what != "restore" and not arguments.data.exists():
        raise UserError(f"--data: {arguments.data} does not exist. Give a zip file of JPEGs or a folder with train/.")
    facts = machine_facts()
    settings = {
        name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(arguments).items()
    }
    task = {**settings, "cores": facts["cores"]}
    processor, load = facts["processor"], facts["load_average"]
    print(f"{processor}, {facts['cores']} cores, load average {load:.2f} before; {facts['system']}")
    with tempfile.TemporaryDirectory(prefix="input-pipeline-") as temporary:
        if arguments.what == "restore":
            result = run_worker("restore", sys.executable, task)
            result["versions"] = {"restore": result["versions"]}
        else:
            task |= {"folder": str(arguments.data), "crops": f"{temporary}/crops.json"}
            if not arguments.data.is_dir():
                task["folder"] = f"{temporary}/images"
                unpack(arguments.data, pathlib.Path(task["folder"]))
            sizes = [path.stat().st_size for path, _ in list_files(task)]
            facts |= {"images": len(sizes), "bytes": sum(sizes)}
            print(f"{len(sizes)} images of {sum(sizes) / len(sizes) / 1e3:.0f} kB on average, from the page cache")
            result = throughput(arguments, task)
    if "problem" in result:
        raise UserError(result["problem"])
    print(f"\n{describe(result)}")
    if arguments.json:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"command": sys.argv[1:], "time": now, "machine": facts, "settings": settings, **result}
        write_json(arguments.json, record)
    failed = any(note.startswith("failed") for note in result.get("notes", {}).values())
    return int(failed or not result.get("is_exact", True))


def main() -> int:
    """The command; returns its exit status."""
    arguments = make_parser().parse_args()
    try:
        if arguments.worker:
            return work(arguments.worker[0], json.loads(arguments.worker[1]))
        return benchmark(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
