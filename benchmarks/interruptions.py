r"""Kills a run repeatedly and shows that its result is bit-identical to that of an uninterrupted run.

    python benchmarks/interruptions.py --config=configs/quickstart.py --kills=10 --config.checkpoint.every_steps=25

Runs the config once without interruption; then again with `kill -9` at random moments, every other one while a
checkpoint is written, and a restart after each. Then compares the parameters, the optimizer's state, the data position,
the best parameters and all metrics but times. Prints a table, writes JSON to --output, and exits with status 1 if
anything differs. Other flags are passed to vit_jax.main.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np


def start(flags: list[str], workdir: pathlib.Path) -> subprocess.Popen:
    """Starts training in the background; its output goes to a file beside the workdir."""
    log = workdir.with_suffix(".log").open("a")
    command = [sys.executable, "-m", "vit_jax.main", *flags, f"--workdir={workdir}"]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def finish(flags: list[str], workdir: pathlib.Path) -> float:
    """Trains to the end; returns the seconds it took."""
    begin = time.time()
    if start(flags, workdir).wait() != 0:
        sys.exit(f"training failed:\n{workdir.with_suffix('.log').read_text()[-3000:]}")
    return time.time() - begin


def steps_of(workdir: pathlib.Path) -> list[int]:
    """Steps of the whole checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def unfinished(workdir: pathlib.Path) -> set[str]:
    """Temporary folders of checkpoints: being written, or left by a kill."""
    return {path.name for path in (workdir / "checkpoints").glob("*tmp*")}


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen) -> bool:
    """Waits for a condition; False if a process ends first."""
    while not condition():
        if any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.002)
    return True


def kill(
    process: subprocess.Popen, workdir: pathlib.Path, *, step: int, delay: float, while_writing: bool
) -> str | None:
    """Kills the process some seconds after the checkpoint of a step, or then while the next checkpoint is written.

    Returns:
      the moment of the kill in words, judged by the files it left; None if the process ended first.
    """
    left_before = unfinished(workdir)  # by an earlier kill; a start deletes them
    if not wait_for(lambda: max(steps_of(workdir), default=0) >= step, process):
        return None
    killing_time = time.time() + delay
    if not wait_for(lambda: time.time() >= killing_time, process):
        return None
    if while_writing and not wait_for(lambda: bool(unfinished(workdir) - left_before), process):
        return None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if unfinished(workdir) - left_before:
        return "writing a checkpoint"
    return "training" if steps_of(workdir) else "before the first checkpoint"


def load_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint folder by path."""
    import jax
    import orbax.checkpoint as ocp
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # it warns of a missing file that is optional
    jax.config.update("jax_platforms", "cpu")  # accelerators belong to the training processes
    checkpointer, path = ocp.StandardCheckpointer(), folder.absolute() / "tree"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever they were written
    like = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here),
        checkpointer.metadata(path).item_metadata.tree,
    )
    tree = checkpointer.restore(path, like)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def newest(folder: pathlib.Path) -> pathlib.Path:
    """The newest checkpoint."""
    return max((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def differences(workdir: pathlib.Path, reference: pathlib.Path) -> list[str]:
    """Differences between the results of two runs."""
    found = []
    for kind in ("checkpoints", "best"):
        ours, theirs = newest(workdir / kind), newest(reference / kind)
        if ours.name != theirs.name:
            found.append(f"{kind}: step {ours.name} instead of {theirs.name}")
            continue
        arrays, expected = load_arrays(ours), load_arrays(theirs)
        if arrays.keys() != expected.keys():
            found.append(f"{kind}: other arrays")
            continue
        found += [f"{kind}{name}" for name in arrays if arrays[name].tobytes() != expected[name].tobytes()]
        if (ours / "extra" / "metadata").read_bytes() != (theirs / "extra" / "metadata").read_bytes():
            found.append(f"{kind}: data position, window of metrics or fingerprints")

    def rows(path: pathlib.Path) -> list[dict[str, float]]:
        lines = (path / "metrics.jsonl").read_text().splitlines()
        return [{n: v for n, v in json.loads(line).items() if not n.startswith("time/")} for line in lines]

    if rows(workdir) != rows(reference):
        found.append("metrics.jsonl")
    return found


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    arguments, others = parser.parse_known_args()
    flags = [f"--config={arguments.config}", *others]
    random.seed(arguments.seed)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="interruptions-"))

    reference, workdir = folder / "reference", folder / "interrupted"
    seconds = finish(flags, reference)
    config = json.loads((reference / "config.json").read_text())
    num_steps = json.loads((reference / "summary.json").read_text())["steps"]
    every = config["checkpoint"]["every_steps"]
    # At each start, so that the later starts have checkpoints left to write.
    most = num_steps // every // (arguments.kills + 2)
    print(f"uninterrupted: {seconds:.1f} s, {num_steps} steps, a checkpoint every {every}\n")
    print(f"{'kill':>4}  {'while':28}  {'checkpoints':>12}")

    kills: list[dict] = []
    while len(kills) < arguments.kills:
        newest_step = max(steps_of(workdir), default=0)
        moment = kill(
            start(flags, workdir),
            workdir,
            step=newest_step + every * random.randint(0, most),
            # After a restart the checkpoint already exists, so that short delays fall into the start-up.
            delay=random.uniform(0.1, 1.0) * seconds * every / num_steps,
            while_writing=len(kills) % 2 == 0,
        )
        if moment is None:
            print("the run ended before all kills were made; use a longer config for more")
            break
        kills.append({"while": moment, "checkpoints": steps_of(workdir)})
        print(f"{len(kills):4}  {moment:28}  {kills[-1]['checkpoints']!s:>12}", flush=True)
    finish(flags, workdir)

    found = differences(workdir, reference)
    print("\n" + ("DIFFERENT: " + ", ".join(found) if found else "identical to the bit"))
    result = {"flags": flags, "kills": kills, "uninterrupted_seconds": seconds, "differences": found}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(folder)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
