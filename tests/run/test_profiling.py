import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.run.accounting import Ledger
from vit_jax.run.profiling import Profiler


@jax.jit
def toy_step(state, batch):
    with jax.named_scope("toy_model"):
        loss = jnp.tanh(batch @ state).sum()
    return state - 1e-3 * loss, {"loss": loss}


def run(directory, *, steps=range(1, 9), ledger=None, break_at=None, **fields):
    """A loop over steps as in training; returns the steps after which the profiler had waited."""
    state, waited = jnp.ones((64, 64)), []
    with Profiler(directory, ledger=ledger, **fields) as profiler:
        for step in steps:
            with profiler.step(step):
                batch = np.ones((8, 64), np.float32)
                state, metrics = toy_step(state, batch)
            if step == break_at:
                raise RuntimeError("broken")
            if profiler.end_of_step(step, metrics):
                waited.append(step)
    return waited


def read_trace(folder):
    (path,) = folder.glob("*.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("profiled")
    waited = run(directory, first_step=3, num_steps=4)
    return directory / "plugins" / "profile" / "steps_3-6", waited


def test_a_profile_has_the_chosen_steps_and_no_others(profiled):
    folder, _ = profiled
    steps = [event for event in read_trace(folder) if event.get("name") == "train"]
    assert [int(event["args"]["step_num"]) for event in steps] == [3, 4, 5, 6]


def test_a_profile_shows_the_step_and_the_operations_of_the_device(profiled):
    folder, _ = profiled
    names = [event.get("name", "") for event in read_trace(folder)]
    assert "PjitFunction(toy_step)" in names
    # At least: of steps that were dispatched before, the device may make some meanwhile.
    assert sum("tanh" in name and not name.startswith("end: ") for name in names) >= 4


def test_a_profile_is_where_xprof_looks_for_it(profiled):
    folder, _ = profiled
    (path,) = folder.glob("*_0.xplane.pb")
    assert b"toy_model" in path.read_bytes()  # named scopes come with the program


def test_the_devices_are_waited_for_after_the_last_profiled_step_only(profiled):
    _, waited = profiled
    assert waited == [6]


def test_no_step_is_profiled_by_default(tmp_path):
    assert run(tmp_path, first_step=None) == []
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_is_there_is_not_made_again(tmp_path, caplog):
    run(tmp_path, first_step=3, num_steps=2)
    (path,) = tmp_path.rglob("*.xplane.pb")
    before = path.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        assert run(tmp_path, steps=range(2, 9), first_step=3, num_steps=2) == []
    assert "already" in caplog.text
    assert path.stat().st_mtime_ns == before


def test_a_run_that_resumes_after_the_first_step_is_not_profiled(tmp_path):
    assert run(tmp_path, steps=range(4, 9), first_step=3, num_steps=4) == []
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_breaks_leaves_a_profile_of_what_was_made(tmp_path):
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path, first_step=3, num_steps=4, break_at=4)
    steps = [each for each in read_trace(tmp_path / "plugins/profile/steps_3-6") if each.get("name") == "train"]
    assert [int(event["args"]["step_num"]) for event in steps] == [3, 4]


def test_no_run_ends_because_another_profile_is_being_made(tmp_path, caplog):
    with jax.profiler.trace(tmp_path / "other"):
        assert run(tmp_path / "ours", first_step=3, num_steps=2) == []
    assert "could not begin a profile" in caplog.text


def test_no_run_ends_because_the_profile_cannot_be_written(tmp_path, caplog):
    (tmp_path / "plugins").write_text("a file where there should be a folder")
    assert run(tmp_path, first_step=3, num_steps=2) == [4]
    assert "could not write the profile" in caplog.text


def test_profiling_is_not_training_time_and_marks_kinds_of_time_in_the_profile(tmp_path):
    ledger = Ledger()
    ledger.turn_to("training")
    run(tmp_path, first_step=3, num_steps=2, ledger=ledger)
    assert ledger.seconds()["profiling"] > 0
    with Profiler(tmp_path, first_step=7, num_steps=1) as profiler, profiler.step(7), ledger.spent_on("evaluation"):
        pass
    names = [event.get("name") for event in read_trace(tmp_path / "plugins/profile/steps_7-7")]
    assert "evaluation" in names
