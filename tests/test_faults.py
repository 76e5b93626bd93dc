"""Faults of a pair of processes: each ends as docs/faults.md says, and the resumed run has the same result."""

import signal
import types

import numpy as np
import pytest

from benchmarks.interruptions import differences, load_arrays, steps_of
from tests import multiprocess
from tests.conftest import ROOT
from vit_jax.run.metrics import read_jsonl

# The command, with less patience for a process that shows no sign of life, and slow enough to be hit at a known step.
# A process whose number is in FAIL cannot read its data after three steps.
MAIN = """
    import os, sys, time
    from vit_jax import main
    from vit_jax.data import pipeline
    from vit_jax.errors import UserError

    next_local = pipeline.TrainBatches.next_local
    batches = 0

    def slow(self):
        global batches
        batches += 1
        time.sleep(float(os.environ["PAUSE"]))
        if batches > 3 and os.environ["FAIL"] == os.environ["JAX_PROCESS_ID"]:
            raise UserError("cannot read 7.jpg")
        return next_local(self)

    pipeline.TrainBatches.next_local = slow
    sys.argv = ["vit_jax.main", *os.environ["ARGUMENTS"].split()]
    main.run()
"""
LOST_AFTER = 6  # seconds; a busy machine can keep a healthy process from showing that it lives for some of them
STEPS = 12
TINY = f"--config=tests/configs/tiny.py:steps={STEPS},checkpoint=6"


@pytest.fixture(scope="module")
def harmed(tmp_path_factory, compilation_cache):
    """Pairs that train: in peace, to a loss that is not finite, with bad data, and with faults from outside."""
    folder = tmp_path_factory.mktemp("faults")

    def start(name, *flags, workdir=None, pause=0.0, fail="", lost_after=60):
        (folder / f"{name}-logs").mkdir()
        arguments = [TINY, f"--workdir={folder / (workdir or name)}", f"--lost_after_seconds={lost_after}", *flags]
        return multiprocess.start(
            MAIN,
            folder / f"{name}-logs",
            ARGUMENTS=" ".join(arguments),
            PAUSE=str(pause),
            FAIL=fail,
            XDG_CACHE_HOME=str(compilation_cache),
            PYTHONPATH=str(ROOT),
        )

    ended = {}
    with start("in_peace") as in_peace:
        in_peace.all_ended(timeout=300)
    with start("terminated", workdir="run", pause=0.5) as terminated:
        terminated.wait_for("first step done", processes=[0], timeout=300)
        terminated.wait_for_handlers(signal.SIGTERM)
        terminated[1].send_signal(signal.SIGTERM)
        ended["terminated"] = terminated.all_ended()
    terminated_at = steps_of(folder / "run")
    with start("killed", workdir="run", pause=0.25, lost_after=LOST_AFTER) as killed:
        killed.wait_for("step  6/", processes=[0], timeout=300)
        killed[1].kill()
        with (
            # The update of step 2 does the harm, and step 3 has no finite loss any more.
            start(
                "not_finite",
                "--config.optimizer.learning_rate=1e38",
                "--config.optimizer.warmup_steps=10",
                "--config.checkpoint.every_steps=1",
            ) as not_finite,
            start("bad_data", fail="1") as bad_data,
        ):
            ended |= {"not_finite": not_finite.all_ended(), "bad_data": bad_data.all_ended()}
        ended["killed"] = killed.all_ended()
    with start("restarted", workdir="run") as restarted:
        ended["restarted"] = restarted.all_ended()
    return types.SimpleNamespace(folder=folder, ended=ended, terminated_at=terminated_at)


RESTART = "Restart the same command on all hosts to resume from the newest checkpoint."


def errors(ended):
    return [line for line in ended.output.splitlines() if line.startswith("error: ")]


def test_signal_to_one_process_ends_all_with_the_state_of_one_step_saved(harmed):
    main, hit = harmed.ended["terminated"]
    assert (main.returncode, hit.returncode) == (128 + signal.SIGTERM,) * 2, main.output + hit.output
    assert 0 < harmed.terminated_at[-1] < STEPS
    assert f"SIGTERM: the state of step {harmed.terminated_at[-1]} is saved" in main.output
    assert errors(main) == errors(hit) == []


def test_survivor_of_a_killed_process_ends_with_one_message_and_the_status_to_restart(harmed):
    survivor, killed = harmed.ended["killed"]
    assert (survivor.returncode, killed.returncode) == (75, -signal.SIGKILL), survivor.output
    (message,) = errors(survivor)
    assert message.startswith("error: process 1 (")
    assert message.endswith(f" is gone: no sign of life for {LOST_AFTER} s. {RESTART}")
    assert f"resumed from the checkpoint of step {harmed.terminated_at[-1]}" in survivor.output


def test_restarted_pair_ends_bit_identical_to_an_undisturbed_one(harmed):
    assert [each.returncode for each in harmed.ended["restarted"]] == [0, 0], harmed.ended["restarted"]
    steps = [record["step"] for record in read_jsonl(harmed.folder / "run" / "starts.jsonl")]
    assert steps == [0, harmed.terminated_at[-1], steps[-1]]
    assert harmed.terminated_at[-1] <= steps[-1] < STEPS
    assert differences(harmed.folder / "run", harmed.folder / "in_peace") == []


def test_loss_that_is_not_finite_ends_all_and_leaves_the_state_beside_the_good_ones(harmed):
    workdir = harmed.folder / "not_finite"
    for each in harmed.ended["not_finite"]:
        assert each.returncode == 1, each.output
        (message,) = errors(each)
        assert " at step 3. The last good checkpoint is that of step 1." in message
        assert "Traceback" not in each.output
    assert steps_of(workdir) == [1]
    (step,) = [int(path.name) for path in (workdir / "emergency").iterdir() if path.name.isdigit()]
    assert step >= 3
    good, bad = load_arrays(workdir / "checkpoints" / "1"), load_arrays(workdir / "emergency" / str(step))
    assert good.keys() == bad.keys()
    assert all(np.isfinite(array).all() for array in good.values())
    assert not all(np.isfinite(array).all() for array in bad.values())


def test_process_that_fails_ends_the_others_with_its_reason(harmed):
    other, failed = harmed.ended["bad_data"]
    assert (other.returncode, failed.returncode) == (1, 1), other.output + failed.output
    assert errors(failed) == ["error: cannot read 7.jpg"]
    (message,) = errors(other)
    assert message.startswith("error: process 1 (")
    assert message.endswith(" ended with: cannot read 7.jpg")
    assert steps_of(harmed.folder / "bad_data") == []
