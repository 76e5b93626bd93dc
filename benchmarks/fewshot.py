r"""Times the closed-form few-shot classifier on a grid of l2 values, against solving each l2 separately.

    python benchmarks/fewshot.py
    python benchmarks/fewshot.py --features=decaying --output=fewshot.json

All run in one process in alternating rounds on the same features:

    ours              vit_jax.evaluators.ridge: one eigendecomposition, and one product for each l2
    primal, shared    numpy.linalg.solve for each l2 (dim + 1 unknowns); the rest of the work once for all, scores in
                      blocks, everything in float64
    primal            a function of one l2 that does all of it, called for each
    dual              numpy.linalg.solve for one l2 (as many unknowns as training examples), and its time for all

Prints a table of the medians, and of the memory that each needs besides the features, measured in a process of its own.
Ends with an error if accuracies differ. --output writes the same as JSON.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np

# So that it runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.common import machine_facts, write_json
from vit_jax.console import format_table
from vit_jax.evaluators.ridge import BIAS, EPSILON, solve_ridge

# How far class centres lie apart, by kind, for accuracies of some 67 % at the default sizes.
SEPARATION = {"isotropic": 0.22, "decaying": 0.22}
DECAY = 1.0  # of the variances 1, 1/2, 1/3, ... of the directions; near what trained representations have
_BLOCK = 4096


def make_features(
    kind: str, *, classes: int, shots: int, dim: int, test: int, separation: float, seed: int = 0
) -> dict[str, np.ndarray]:
    """Gaussian clusters, float32, and labels: of train `shots` a class, of test any number.

    Args:
      kind: "isotropic": all directions have the same variance; "decaying": they have those of `DECAY`, turned at random
        so that no feature is one of them.
      classes: number of classes.
      shots: training examples of each.
      dim: number of features.
      test: number of test examples.
      separation: standard deviation of the classes' centres, in standard deviations of a class.
      seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    spread = np.ones(dim) if kind == "isotropic" else np.arange(1, dim + 1) ** (-DECAY / 2)
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0] * spread[:, None]
    centres = separation * rng.standard_normal((classes, dim))
    made = {}
    for name, labels in (("train", np.repeat(np.arange(classes), shots)), ("test", rng.integers(classes, size=test))):
        made[name] = ((centres[labels] + rng.standard_normal((len(labels), dim))) @ turn).astype(np.float32)
        made[f"{name}_labels"] = labels
    return made


def ours(data: dict[str, np.ndarray], l2: Sequence[float]) -> list[float]:
    """Accuracies by `vit_jax.evaluators.ridge`."""
    solution = solve_ridge(data["train"], data["train_labels"])
    return solution.accuracies(data["test"], data["test_labels"], l2).tolist()


def _design(data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    train = data["train"].astype(np.float64)
    mean, std = train.mean(axis=0), train.std(axis=0) + EPSILON
    train, test = (
        np.concatenate([(array - mean) / std, np.full((len(array), 1), BIAS)], axis=1)
        for array in (train, data["test"].astype(np.float64))
    )
    return train, test, 2.0 * np.eye(int(data["train_labels"].max()) + 1)[data["train_labels"]] - 1


def primal(data: dict[str, np.ndarray], l2: Sequence[float]) -> list[float]:
    """Accuracies, each by itself."""

    def accuracy(value: float) -> float:
        train, test, targets = _design(data)
        weights = np.linalg.solve(train.T @ train + value * np.eye(train.shape[1]), train.T @ targets)
        return float(np.mean((test @ weights).argmax(axis=1) == data["test_labels"]))

    return [accuracy(value) for value in l2]


def primal_shared(data: dict[str, np.ndarray], l2: Sequence[float]) -> list[float]:
    """Accuracies, with what they have in common computed once."""
    train, test, targets = _design(data)
    gram, products = train.T @ train, train.T @ targets
    found = []
    for value in l2:
        weights = np.linalg.solve(gram + value * np.eye(len(gram)), products)
        right = 0
        for start in range(0, len(test), _BLOCK):
            block = slice(start, start + _BLOCK)
            right += np.sum((test[block] @ weights).argmax(axis=1) == data["test_labels"][block])
        found.append(float(right) / len(test))
    return found


def dual(data: dict[str, np.ndarray], l2: Sequence[float]) -> list[float]:
    """The accuracy of the first l2."""
    train, test, targets = _design(data)
    weights = train.T @ np.linalg.solve(train @ train.T + l2[0] * np.eye(len(train)), targets)
    return [float(np.mean((test @ weights).argmax(axis=1) == data["test_labels"]))]


METHODS: dict[str, Callable[[dict[str, np.ndarray], Sequence[float]], list[float]]] = {
    "ours": ours,
    "primal, shared": primal_shared,
    "primal": primal,
    "dual": dual,
}


def extra_memory(path: pathlib.Path, method: str, l2: Sequence[float]) -> int:
    """Bytes that a method needs besides the features, at most, in a process of its own."""
    command = [sys.executable, __file__, "--measure-memory", str(path), method, json.dumps(list(l2))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def _measure_memory(path: str, method: str, l2: str) -> None:
    with np.load(path) as file:
        data = dict(file)
    # getrusage's maximum would be that of the process that started this one, which had more.
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest so far is the present one
    before = _status("VmRSS")
    METHODS[method](data, json.loads(l2))
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", choices=list(SEPARATION), default="isotropic")
    parser.add_argument("--separation", type=float, help="of the classes' centres, in standard deviations of a class")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--test", type=int, default=50_000, help="test examples")
    parser.add_argument("--l2", type=float, nargs="+", default=[2.0**power for power in range(1, 11)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--output", type=pathlib.Path, help="JSON file")
    parser.add_argument("--measure-memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure_memory:
        _measure_memory(*options.measure_memory)
        return

    sizes = {name: getattr(options, name) for name in ("classes", "shots", "dim", "test")}
    separation = SEPARATION[options.features] if options.separation is None else options.separation
    data = make_features(options.features, separation=separation, **sizes)
    seconds: dict[str, list[float]] = {method: [] for method in options.methods}
    accuracies: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for method in options.methods:
            start = time.perf_counter()
            accuracies[method] = METHODS[method](data, options.l2)
            took = time.perf_counter() - start
            seconds[method].append(took * len(options.l2) / len(accuracies[method]))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "features.npz"
        np.savez(path, allow_pickle=False, **data)
        memory = {method: extra_memory(path, method, options.l2) for method in options.methods}

    medians = {method: statistics.median(took) for method, took in seconds.items()}
    fastest = medians.get("ours")
    print(
        f"{options.shots} shots x {options.classes} classes, {options.dim} {options.features} features, "
        f"{options.test} test examples, {len(options.l2)} l2 values; {machine_facts()['cores']} CPUs"
    )
    rows = [
        (method, f"{median:.2f}", f"{median / fastest:.1f} x" if fastest else "", f"{memory[method] / 2**20:.0f} MiB")
        for method, median in medians.items()
    ]
    print(format_table(("method", "seconds", "against ours", "memory"), rows, num_left=1, markdown=False))
    print("accuracies " + " ".join(f"{each:.4f}" for each in max(accuracies.values(), key=len)))
    if options.output:
        result = {"features": options.features, "separation": separation, **sizes, "l2": options.l2}
        result |= {"seconds": seconds, "median_seconds": medians, "memory_bytes": memory, "accuracies": accuracies}
        write_json(options.output, result | {"machine": machine_facts(), "numpy": np.__version__})
    expected = max(accuracies.values(), key=len)
    for method, found in accuracies.items():
        if found != expected[: len(found)]:
            sys.exit(f"accuracies of {method} are {found}, not {expected}")


if __name__ == "__main__":
    main()
