"""Training gives the same result on any number of processes and devices, and resumes with another number.

`test_slices.py` has two processes on two hosts.
"""

import json
import shutil

import numpy as np
import pytest

from tests import multiprocess

STEPS, EVERY = 12, 4
AT_THE_END = [f"--config.checkpoint.every_steps={STEPS}"]  # no test resumes these runs
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


@pytest.mark.parametrize(
    ("processes", "devices", "flags"),
    [
        (1, 8, ["--config.sharding=fsdp"]),
        # Two and two processes share the heads of a layer, and so the rows of a batch.
        (4, 1, ["--config.sharding=fsdp+tensor", "--config.mesh.model=2", *AT_THE_END]),
    ],
)
def test_processes_and_devices_change_nothing(train, on_one_device, processes, devices, flags):
    found = train(f"{processes}x{devices}", processes, devices, *flags)
    np.testing.assert_allclose(found, on_one_device, rtol=1e-5)


def position(workdir, step):
    extra = json.loads((workdir / "checkpoints" / str(step) / "extra" / "metadata").read_text())
    return extra["data"]


def test_run_saved_on_eight_devices_resumes_with_two_and_with_four(train, on_one_device, folder):
    if not (folder / "1x8").exists():
        train("1x8", 1, 8, "--config.sharding=fsdp")
    workdir = folder / "elastic"
    shutil.copytree(folder / "1x8", workdir)
    for processes, devices, last in ((1, 2, EVERY), (2, 2, 2 * EVERY)):
        for step in range(last + EVERY, STEPS + 1, EVERY):
            shutil.rmtree(workdir / "checkpoints" / str(step))
        found = train("elastic", processes, devices, "--config.sharding=fsdp")
        np.testing.assert_allclose(found, on_one_device, rtol=1e-5)
        starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
        assert (starts[-1]["step"], starts[-1]["devices"]["num_devices"]) == (last, processes * devices)
        assert position(workdir, STEPS) == position(folder / "1x1", STEPS)  # the same data
