r"""Measures the overhead of the training loop over the bare step: input, transfer, metrics, logging.

    python benchmarks/loop_overhead.py --config=configs/cifar10.py:data=/data/cifar10.zip

Both run in one process in alternating rounds on the same devices. The bare step repeats one batch that is already on
the devices, and waits once a round. The loop is `vit_jax.train.train` with its data, timed by itself
(`time/step_seconds` in metrics.jsonl), between checkpoints and evaluations. Prints a table and the median of the
rounds' ratios, and writes JSON to --output.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
from ml_collections import ConfigDict

# So that it runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.common import write_json
from vit_jax.errors import UserError
from vit_jax.experiment import build as experiments
from vit_jax.sharding import describe_devices
from vit_jax.sweep.trials import load_config
from vit_jax.train import train


class BareStep:
    """The jitted step on one batch."""

    def __init__(self, config: ConfigDict):
        experiment = experiments.build(config)
        self._batch = next(experiment.make_train_batches())
        self._step, self._state = experiment.step, experiment.init_state()
        self.devices = describe_devices(experiment.mesh)
        self.seconds(2)

    def seconds(self, steps: int) -> float:
        """Seconds a step, over some steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - start) / steps


def loop_seconds(config: ConfigDict) -> float:
    """Seconds a step of the training loop: the median of its logging windows, the first left out."""
    with tempfile.TemporaryDirectory() as workdir:
        train(config, pathlib.Path(workdir))
        rows = [json.loads(line) for line in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row["time/step_seconds"] for row in rows if "time/step_seconds" in row][1:])


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="a round; at least 30")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    arguments = parser.parse_args()

    try:
        config = load_config(arguments.config, [])
    except UserError as error:
        sys.exit(f"error: {error}")
    with config.unlocked():
        config.steps, config.epochs = arguments.steps, None
        config.optimizer.warmup_steps = 1
        config.data.eval_split = None
        config.checkpoint.every_steps = 10 * arguments.steps
        config.log_every_steps = arguments.steps // 5
    bare = BareStep(config)
    rows = []
    print(f"{'round':>5}  {'bare step':>11}  {'loop':>11}  {'loop / bare':>11}")
    for number in range(arguments.rounds):
        bare_seconds, with_loop = bare.seconds(arguments.steps), loop_seconds(config)
        rows.append({"bare_seconds": bare_seconds, "loop_seconds": with_loop, "ratio": with_loop / bare_seconds})
        print(
            f"{number + 1:5}  {1e3 * bare_seconds:8.2f} ms  {1e3 * with_loop:8.2f} ms  {rows[-1]['ratio']:11.4f}",
            flush=True,
        )
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    ratio = medians["loop_seconds"] / medians["bare_seconds"]
    print(
        f"medians: {1e3 * medians['bare_seconds']:.2f} ms, {1e3 * medians['loop_seconds']:.2f} ms; "
        f"ratio of medians {ratio:.4f}, median of ratios {medians['ratio']:.4f}"
    )
    result = {
        "config": arguments.config,
        "devices": bare.devices,
        "batch_size": config.batch_size,
        "rounds": rows,
        "ratio_of_medians": ratio,
    }
    if arguments.output:
        write_json(arguments.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
