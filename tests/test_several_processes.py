"""Training gives the same result on any number of processes and devices, and resumes with another number.

`test_slices.py` has two processes on two hosts.
"""

import json
import shutil

import numpy as np
import pytest

from tests import multiprocess

STEPS, EVERY = 12, 4
CONFIG = f"""\
from configs.quickstart import get_config as quickstart


def get_config():
    config = quickstart()
    config.data.eval_split = "test[:40]"
    config.eval_batch_size = 40
    config.model.num_layers = 1
    config.model.num_heads = 4
    config.model.hidden_dim = 128
    config.model.mlp_dim = 256
    config.model.dropout_rate = 0.1
    config.mixup_alpha = 0.3
    config.epochs = None
    config.steps = {STEPS}
    config.batch_size = 32
    config.optimizer.warmup_steps = 5
    config.log_every_steps = 1
    config.checkpoint.every_steps = {EVERY}
    config.checkpoint.keep = 10
    config.polyak_decay = 0.9
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "config.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def train(folder, compilation_cache):
    """Trains in a workdir on so many processes and devices; returns the losses and gradient norms by step."""

    def run(name, num_processes, devices_per_process, *flags):
        logs = folder / f"{name}-logs"
        logs.mkdir(exist_ok=True)
        arguments = [f"--config={folder / 'config.py'}", f"--workdir={folder / name}", *flags]
        with multiprocess.start_main(
            arguments, logs, num_processes, devices_per_process, compilation_cache, PYTHONPATH="."
        ) as processes:
            ended = processes.all_ended()
        assert [each.returncode for each in ended] == [0] * num_processes, ended
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "train/loss" in row]
        assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
        evaluation = next(row for row in rows if "test[:40]/loss" in row)
        assert evaluation["test[:40]/examples"] == 40
        return np.array([row["train/loss"] for row in steps] + [evaluation["test[:40]/loss"]])

    return run


@pytest.fixture(scope="module")
def on_one_device(train):
    return train("1x1", 1, 1)


def position(workdir, step):
    extra = json.loads((workdir / "checkpoints" / str(step) / "extra" / "metadata").read_text())
    return extra["data"]


def test_processes_and_devices_change_nothing_and_a_run_resumes_with_others(train, on_one_device, folder):
    workdir = folder / "elastic"
    # Two and two of four processes share the heads of a layer, and so the rows of a batch.
    shared_heads = ["--config.sharding=fsdp+tensor", "--config.mesh.model=2"]
    for processes, devices, step, flags in (
        (1, 8, 0, ["--config.sharding=fsdp"]),
        (1, 2, EVERY, ["--config.sharding=fsdp"]),
        (4, 1, 2 * EVERY, shared_heads),
    ):
        if step:
            for later in range(step + EVERY, STEPS + 1, EVERY):
                shutil.rmtree(workdir / "checkpoints" / str(later))
        found = train("elastic", processes, devices, *flags)
        np.testing.assert_allclose(found, on_one_device, rtol=1e-5)
        starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
        assert (starts[-1]["step"], starts[-1]["devices"]["num_devices"]) == (step, processes * devices)
        assert position(workdir, STEPS) == position(folder / "1x1", STEPS)  # the same data
