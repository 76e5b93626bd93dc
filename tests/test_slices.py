"""Two hosts are two slices: training on them equals training on one, and resumes after one is lost."""

import json
import signal

import numpy as np
import pytest

from tests import another_host, multiprocess
from vit_jax.config import base_config
from vit_jax.train import train

STEPS = 6
DIES_AT = 5  # the checkpoint of step 2 is whole then, that of step 4 may be
FIELDS = {
    "data.dataset": "digits",
    "data.eval_split": "test[:40]",
    "data.image_size": 8,
    "model.name": "ViT-Ti/4",
    "model.num_layers": 1,
    "model.num_heads": 4,
    "model.hidden_dim": 64,
    "model.mlp_dim": 256,
    "batch_size": 32,
    "eval_batch_size": 40,
    "steps": STEPS,
    "optimizer.learning_rate": 1e-3,
    "optimizer.warmup_steps": 2,
    "log_every_steps": 1,
    "checkpoint.every_steps": 2,
}
PRESETS = {
    "fsdp": {"sharding": "fsdp", "checkpoint.every_steps": STEPS},
    "fsdp+tensor": {"sharding": "fsdp+tensor", "mesh.model": 2},
}

# Trains presets one after the other. Of `fsdp+tensor` process 0 is killed, unless it goes on from a checkpoint.
SCRIPT = f"""
    import os, pathlib, signal
    import jax
    from tests import another_host
    from vit_jax.multihost import processes
    from vit_jax.run import journal
    from vit_jax.run.compilation_cache import use_compilation_cache
    from vit_jax.config import base_config
    from vit_jax.train import train

    if os.environ["BOOT_ID"]:
        another_host.move_to(os.environ["BOOT_ID"])
    use_compilation_cache()
    processes.initialize(timeout_seconds=100, lost_after_seconds=10)
    print("slices", sorted(device.slice_index for device in jax.devices()), flush=True)
    push = journal.StepMetrics.push

    def dying(self, step, values):
        if step == {DIES_AT}:
            os.kill(os.getpid(), signal.SIGKILL)
        push(self, step, values)

    try:
        for name in os.environ["PRESETS"].split(","):
            config = base_config()
            config.update_from_flattened_dict({FIELDS!r} | {PRESETS!r}[name])
            workdir = pathlib.Path(os.environ["RUNS"], name)
            if name == "fsdp+tensor" and not workdir.exists() and processes.is_main_process():
                journal.StepMetrics.push = dying
            train(config, workdir)
    except Exception as error:
        if not (lost := processes.lost_peer(error)):
            raise
        print(f"error: {{lost}}", flush=True)
        os._exit(lost.exit_status)
    processes.shutdown()
"""


def results(workdir):
    """Losses and gradient norms by step, and the evaluation, each present once."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    (evaluation,) = (row for row in rows if "test[:40]/loss" in row)
    assert evaluation["test[:40]/examples"] == 40
    return [(row["train/loss"], row["train/grad_norm"]) for row in steps], evaluation["test[:40]/loss"]


def starts(workdir):
    return [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory):
    config = base_config()
    config.update_from_flattened_dict(FIELDS)
    workdir = tmp_path_factory.mktemp("one")
    train(config, workdir)
    return results(workdir)


@pytest.fixture(scope="module")
def on_two_hosts(tmp_path_factory, compilation_cache):
    """Workdirs of all presets, the last of them interrupted, and both processes' output at the second start."""
    folder = tmp_path_factory.mktemp("two")
    if not (boot_id := another_host.new_boot_id(folder)):
        pytest.skip("this system permits no mount namespace with another boot id, for a second host")
    environment = {"RUNS": str(folder), "XDG_CACHE_HOME": str(compilation_cache), "BOOT_ID": ["", str(boot_id)]}
    with multiprocess.start(SCRIPT, folder, 2, 2, PRESETS=",".join(PRESETS), **environment) as processes:
        killed, survivor = processes.all_ended()
    assert killed.returncode == -signal.SIGKILL, killed.output
    assert survivor.returncode == 75, survivor.output
    with multiprocess.start(SCRIPT, folder, 2, 2, PRESETS="fsdp+tensor", **environment) as processes:
        ended = processes.all_ended()
    assert [each.returncode for each in ended] == [0, 0], ended
    return folder, [each.output for each in ended]


def test_each_host_is_a_slice(on_two_hosts):
    folder, outputs = on_two_hosts
    assert all("slices [0, 0, 1, 1]" in output for output in outputs)
    devices = starts(folder / "fsdp+tensor")[0]["devices"]
    assert devices["num_slices"] == 2
    assert devices["mesh"] == {"data": 2, "model": 2}


@pytest.mark.parametrize("preset", PRESETS)
def test_two_slices_compute_what_one_does(on_one_host, on_two_hosts, preset):
    steps, evaluation = results(on_two_hosts[0] / preset)
    np.testing.assert_allclose(steps, on_one_host[0], rtol=1e-5)
    np.testing.assert_allclose(evaluation, on_one_host[1], rtol=1e-5)


def test_run_that_lost_a_slice_resumes_from_its_checkpoint(on_two_hosts):
    first, second = starts(on_two_hosts[0] / "fsdp+tensor")
    assert first["step"] == 0
    assert second["step"] in (2, 4)
