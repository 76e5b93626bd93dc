"""Workdirs in a bucket, against an emulator on this machine."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import multiprocess
from tests.configs import tiny
from tests.conftest import ROOT
from tests.test_train import quick_runs
from vit_jax.checkpoints import Checkpoints, read_parameters
from vit_jax.config import base_config
from vit_jax.costs.hardware import describe_machine
from vit_jax.errors import UserError
from vit_jax.files import parse_path
from vit_jax.run import curves, lease, workdir
from vit_jax.run.accounting import Accounts, Ledger, read_costs
from vit_jax.run.metrics import MetricWriter, read_jsonl
from vit_jax.run.profiling import Profiler
from vit_jax.train import train
from vit_jax.weights import load

missing = [name for name in ("gcsfs", "gcp_storage_emulator") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def emulator():
    """An emulator of Google Cloud Storage with a bucket called `bucket`, found through environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gcs_emulator", str(port), "bucket"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",  # gcsfs, google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # TensorStore
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of bucket by gRPC, which is not emulated
        "NO_GCE_CHECK": "true",  # google.auth looks for the credentials of a VM
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        deadline = time.time() + 30
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None
            assert time.time() < deadline
            time.sleep(0.05)
        yield environment
    process.kill()
    process.wait()


@pytest.fixture
def run(emulator, request):
    """A place in the bucket for one test."""
    return parse_path(f"gs://bucket/runs/{request.node.name}")


def store():
    import fsspec

    return fsspec.filesystem("gcs")


def tree(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {"kernel": rng.normal(size=(64, 33)).astype(np.float32), "momentum": jnp.ones((9, 7), jnp.bfloat16) * seed}
    return jax.device_put(arrays, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture
def directory(run):
    """Checkpoints of steps 1, 2 and 3."""
    with Checkpoints(run / "checkpoints", keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step), {"data": step})
    return run / "checkpoints"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_checkpoints_are_kept_and_round_trip_bit_exactly(run):
    with Checkpoints(run, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step), {"data": step})
    with Checkpoints(run, keep=2) as checkpoints:
        step, restored, extra = checkpoints.restore_latest(tree())
    assert (step, extra) == (3, {"data": 3})
    assert_equal(restored, tree(3))
    assert names(run) == ["2", "3"]
    assert store().find(str(run / "1")) == []


def test_parameters_can_be_read_without_a_run(directory):
    step, parameters, extra = read_parameters(directory)
    assert (step, extra) == (3, {"data": 3})
    assert_equal(parameters, tree(3))


def test_damaged_checkpoint_is_set_aside_whole_and_the_one_before_is_used(directory):
    files = store().find(str(directory / "3"), detail=True)
    largest = max(files, key=lambda name: files[name]["size"])
    store().pipe_file(largest, store().cat_file(largest)[: files[largest]["size"] // 2])
    with Checkpoints(directory, keep=3) as checkpoints:
        step, restored, _ = checkpoints.restore_latest(tree())
        assert_equal(restored, tree(2))
        assert step == 2
        assert names(directory) == ["1", "2", "damaged-3"]
        checkpoints.save(3, tree(30))
    with Checkpoints(directory, keep=3) as checkpoints:
        assert_equal(checkpoints.restore_latest(tree())[1], tree(30))
    assert len(store().find(str(directory / "damaged-3"))) == len(files)


def test_half_written_checkpoint_is_ignored_and_deleted(directory):
    store().rm(str(directory / "3" / "commit_success.txt"))  # what is written last
    with Checkpoints(directory, keep=3) as checkpoints:
        assert checkpoints.latest_step() == 2
        assert checkpoints.restore_latest(tree())[0] == 2
    assert store().find(str(directory / "3")) == []


def test_foreign_files_are_left_alone(directory):
    (directory / "notes" / "to_myself.txt").write_text("keep")
    with Checkpoints(directory, keep=3) as checkpoints:
        assert checkpoints.latest_step() == 3
    assert (directory / "notes" / "to_myself.txt").read_text() == "keep"


def test_checkpoints_of_later_steps_can_be_dropped(directory):
    with Checkpoints(directory, keep=3) as checkpoints:
        checkpoints.drop_after(1)
    assert names(directory) == ["1"]


def test_rows_of_metrics_before_the_flush_survive_a_kill_and_later_ones_are_written_again(run):
    killed = MetricWriter(run, step=0)
    killed.write(50, {"train/loss": 1.0})
    killed.write(100, {"train/loss": 0.5})
    killed.flush()  # before a checkpoint
    killed.write(100, {"test/accuracy": 0.5})
    killed.write(150, {"train/loss": 0.4})
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [50, 100]
    with MetricWriter(run, step=100) as writer:
        writer.write(150, {"train/loss": 0.3})
    assert read_jsonl(run / "metrics.jsonl") == [
        {"step": 50, "train/loss": 1.0},
        {"step": 100, "train/loss": 0.5},
        {"step": 150, "train/loss": 0.3},
    ]


def test_tensorboard_gets_every_value(run):
    with MetricWriter(run, step=0) as writer:
        writer.write(3, {"train/loss": 0.25})
    (events,) = (run / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_starts_are_appended_and_another_config_is_refused(run):
    workdir.record_start(run, base_config(), step=0, devices={})
    workdir.record_start(run, base_config(), step=7, devices={})
    assert [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()] == [0, 7]
    config = base_config()
    config.batch_size = 1
    with pytest.raises(UserError, match="batch_size: 4096 -> 1"):
        workdir.check_config(run, config)


def test_curves_are_read_from_and_written_to_the_bucket(run, capsys):
    with MetricWriter(run, step=0) as writer:
        writer.write(3, {"train/loss": 0.25})
    assert curves.main([str(run)]) == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_second_process_is_kept_out_until_the_first_is_done(run, monkeypatch):
    monkeypatch.setattr(lease, "_HEARTBEAT_SECONDS", 0.1)
    with workdir.locked(run), pytest.raises(UserError, match=f"another process is training.*process {os.getpid()} on"):
        workdir.locked(run).__enter__()
    with workdir.locked(run):
        pass
    assert store().find(str(run)) == []


def test_weights_from_a_folder_that_is_not_a_run_are_refused(run):
    with pytest.raises(UserError, match=r"gs://.* is not the workdir of a run"):
        load(str(run))


def test_bucket_that_does_not_exist_is_one_error(emulator):
    with pytest.raises(UserError, match="cannot write to the workdir gs://nowhere/run/"):
        workdir.locked(parse_path("gs://nowhere/run")).__enter__()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # other arrays' writes fail later
def test_checkpoints_in_a_bucket_that_does_not_exist_are_one_error(emulator):
    # Where the missing bucket is noticed depends on what gcsfs has listed before.
    message = r"(cannot open the checkpoints in|could not write a checkpoint to) gs://nowhere/run: "
    with pytest.raises(UserError, match=message):
        checkpoints = Checkpoints(parse_path("gs://nowhere/run"), keep=1)
        checkpoints.save(1, tree())
        checkpoints.wait()


def test_missing_permission_is_an_error_that_names_the_page_about_permissions(run, monkeypatch):
    import google.api_core.exceptions

    def forbidden(*_, **__):  # the emulator permits everything
        raise google.api_core.exceptions.Forbidden("storage.buckets.get denied")

    monkeypatch.setattr(ocp, "CheckpointManager", forbidden)
    with pytest.raises(UserError, match=r"Forbidden: 403 storage.buckets.get denied. See docs/storage.md"):
        Checkpoints(run, keep=1)


def test_accounts_of_all_starts_are_in_the_bucket(run):
    machine = describe_machine(jax.devices())
    Accounts(run, Ledger(), machine, step=0).record(100)
    Accounts(run, Ledger(), machine, step=80).record(120)
    assert [(start.from_step, start.step) for start in read_costs(run)] == [(0, 100), (80, 120)]


def test_profile_goes_to_the_bucket_and_is_found_there(run, caplog):
    for _ in range(2):
        with Profiler(run / "profile", first_step=2, num_steps=1) as profiler, caplog.at_level("INFO"):
            for step in (1, 2, 3):
                with profiler.step(step):
                    result = jnp.ones(3) * step
                profiler.end_of_step(step, result)
    files = {path.name.split(".", 1)[1] for path in (run / "profile/plugins/profile/steps_2-2").iterdir()}
    assert files == {"xplane.pb", "trace.json.gz"}
    assert caplog.text.count("are profiled in") == 1


def test_killed_processes_resume_in_a_bucket_and_match_an_uninterrupted_run_on_a_disk(
    run, compilation_cache, tmp_path, emulator
):
    # Large enough to be split, so that each process writes its part of a checkpoint.
    fields = {"sharding": "fsdp", "eval_batch_size": 96, "model.hidden_dim": 128, "model.mlp_dim": 256}
    fields["optimizer.eps"] = 1e-4  # a smaller one lets Adam turn rounding differences into steps
    config = tiny.get_config("steps=12,checkpoint=4")
    config.update_from_flattened_dict(fields)
    with quick_runs(compilation_cache):
        train(config, tmp_path / "reference")

    arguments = ["--config=tests/configs/tiny.py:steps=12,checkpoint=4", f"--workdir={run}"]
    arguments += [f"--config.{name}={value}" for name, value in fields.items()]
    with multiprocess.start_main(arguments, tmp_path, 2, 1, compilation_cache) as processes:
        deadline = time.time() + 300
        while not (run / "checkpoints" / "4" / "commit_success.txt").exists():
            assert processes[0].poll() is None, processes.output(0)
            assert time.time() < deadline
            time.sleep(0.02)
    assert (run / ".lock").exists()
    assert not (run / "summary.md").exists()
    with multiprocess.start_main(arguments, tmp_path, 1, 1, compilation_cache, VIT_JAX_TEST_CURVES="1") as processes:
        (ended,) = processes.all_ended()
    assert ended.returncode == 0, ended.output

    starts = [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()]
    assert starts[0] == 0
    assert 4 <= starts[1] < 12
    assert f"resumed from the checkpoint of step {starts[1]}" in ended.output
    assert {"config.json", "curves.png", "summary.json", "summary.md", "best"} <= set(names(run))
    assert not (run / ".lock").exists()
    assert names(run / "checkpoints") == ["12", "8"]
    rows, expected = [
        [{name: value for name, value in row.items() if not name.startswith("time/")} for row in read_jsonl(path)]
        for path in (run / "metrics.jsonl", tmp_path / "reference" / "metrics.jsonl")
    ]
    assert rows == [pytest.approx(row, rel=1e-4) for row in expected]
    weights, local = load(str(run)), load(tmp_path / "reference")
    assert weights.class_names == local.class_names
    for name, array in local.arrays.items():
        np.testing.assert_allclose(weights.arrays[name], array, rtol=1e-3, atol=1e-5)
