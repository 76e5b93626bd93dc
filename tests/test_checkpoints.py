import contextlib
import gc
import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as orbax_v1
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.conftest import DEVICES
from vit_jax import checkpoints as checkpoints_module
from vit_jax import sharding as partitioning
from vit_jax.checkpoints import Checkpoints, fingerprints
from vit_jax.errors import UserError


def tree(seed=0, devices=1):
    sharding = partitioning.replicated(partitioning.make_mesh(DEVICES[:devices]))
    rng = np.random.default_rng(seed)
    arrays = {
        "params": {"kernel": rng.normal(size=(64, 33)).astype(np.float32), "bias": np.zeros(3, np.float32)},
        "momentum": jnp.asarray(rng.normal(size=(64, 33)), jnp.bfloat16),
        "step": np.int32(seed),
    }
    return jax.device_put(arrays, sharding)


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture
def directory(tmp_path):
    """Checkpoints of steps 1, 2 and 3."""
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step), {"data": {"next_index": step}})
    return tmp_path / "checkpoints"


def files_of(directory, step):
    return sorted(path for path in (directory / str(step)).rglob("*") if path.is_file() and path.stat().st_size)


def test_arrays_and_extra_data_round_trip_bit_exactly(directory):
    with Checkpoints(directory, keep=3) as checkpoints:
        step, restored, extra = checkpoints.restore_latest(tree())
    assert step == 3
    assert extra == {"data": {"next_index": 3}}
    assert_equal(restored, tree(3))
    assert restored["momentum"].dtype == jnp.bfloat16


def test_orbax_v1_loads_a_checkpoint(directory):
    found = orbax_v1.load_checkpointables(directory / "3")
    assert_equal(found["tree"], tree(3))
    assert found["extra"]["data"] == {"next_index": 3}


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, tree(step))
        checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["20", "30"]


def test_state_may_be_donated_while_it_is_being_written(tmp_path):
    state = jax.device_put({"x": jnp.zeros(1_000_000)}, partitioning.replicated(partitioning.make_mesh()))
    step_fn = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        for step in range(5):
            checkpoints.save(step, state)
            state = step_fn(step_fn(state))
        checkpoints.wait()
        _, restored, _ = checkpoints.restore_latest(state)
    np.testing.assert_array_equal(restored["x"], 8.0)


def test_restoring_without_checkpoints_returns_none(tmp_path):
    with Checkpoints(tmp_path / "none", keep=1) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore_latest(tree()) is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves other arrays' reads alone
def test_every_truncated_file_is_noticed_and_the_checkpoint_before_is_used(directory, caplog):
    names = [path.relative_to(directory / "3") for path in files_of(directory, 3)]
    backup = {name: (directory / "3" / name).read_bytes() for name in names}
    noticed = []
    for name in names:
        os.truncate(directory / "3" / name, len(backup[name]) // 2)
        caplog.clear()
        with Checkpoints(directory, keep=3) as checkpoints, caplog.at_level(logging.WARNING):
            step, restored, _ = checkpoints.restore_latest(tree())
        assert_equal(restored, tree(step))  # never anything but a whole one
        assert step in (2, 3)  # some files only speed up reading or describe
        aside = directory / "damaged-3"
        if step == 2:
            noticed.append(name)
            assert "set aside the checkpoint" in caplog.text
            assert "checkpoint of step 3 is damaged" in caplog.text
            aside.rename(directory / "3")
        (directory / "3" / name).write_bytes(backup[name])
    largest = max(names, key=lambda name: len(backup[name]))
    assert largest in noticed
    with Checkpoints(directory, keep=3) as checkpoints:
        assert checkpoints.restore_latest(tree())[0] == 3
    gc.collect()  # the reads left alone, which would warn in another test


def test_a_single_flipped_bit_is_noticed(directory):
    largest = max(files_of(directory, 3), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with Checkpoints(directory, keep=3) as checkpoints:
        step, restored, _ = checkpoints.restore_latest(tree())
    assert step == 2
    assert_equal(restored, tree(2))


def test_extra_data_of_a_damaged_checkpoint_are_skipped(directory):
    for path in files_of(directory, 3):
        os.truncate(path, 1)
    with Checkpoints(directory, keep=3) as checkpoints:
        assert checkpoints.latest_extra() == (2, {"data": {"next_index": 2}})


def test_half_written_checkpoint_is_ignored_and_deleted(directory):
    # What a kill in the middle of a write leaves: the folder under its temporary name.
    (directory / "3").rename(directory / "4.orbax-checkpoint-tmp-0")
    with Checkpoints(directory, keep=3) as checkpoints:
        assert not list(directory.glob("*tmp*"))  # at once, not when a thread gets round to it
        assert checkpoints.restore_latest(tree())[0] == 2


def test_step_can_be_saved_again_after_its_damaged_checkpoint_was_set_aside(directory):
    for path in files_of(directory, 3):
        os.truncate(path, 1)
    with Checkpoints(directory, keep=3) as checkpoints:
        assert checkpoints.restore_latest(tree())[0] == 2
        checkpoints.save(3, tree(30))
        checkpoints.wait()
        step, restored, _ = checkpoints.restore_latest(tree())
    assert step == 3
    assert_equal(restored, tree(30))
    assert (directory / "damaged-3").is_dir()


def test_only_damaged_checkpoints_are_an_error_and_stay_in_place(directory):
    for step in (1, 2, 3):
        for path in files_of(directory, step):
            os.truncate(path, 1)
    for _ in range(2):  # a second start must not begin anew, either
        with Checkpoints(directory, keep=3) as checkpoints, pytest.raises(UserError, match="all checkpoints in"):
            checkpoints.restore_latest(tree())
    assert {"1", "2", "3"} <= {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    "error", [PermissionError("denied"), MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory on device")]
)
def test_trouble_of_this_machine_is_not_mistaken_for_damage(directory, error, monkeypatch):
    def fail(*_):
        raise error

    with Checkpoints(directory, keep=3) as checkpoints:
        monkeypatch.setattr(checkpoints, "_read", fail)
        with pytest.raises(UserError, match=r"cannot read the checkpoint of step 3.*left as it is"):
            checkpoints.restore_latest(tree())
    assert {"1", "2", "3"} <= {path.name for path in directory.iterdir()}


def test_checkpoints_of_later_steps_can_be_dropped(directory):
    with Checkpoints(directory, keep=3) as checkpoints:
        checkpoints.drop_after(1)
        assert checkpoints.restore_latest(tree())[0] == 1
        checkpoints.save(2, tree(20))
        checkpoints.wait()
        assert_equal(checkpoints.restore_latest(tree())[1], tree(20))


def test_step_that_orbax_would_silently_skip_is_an_error(directory):
    with Checkpoints(directory, keep=3) as checkpoints, pytest.raises(UserError, match="not beyond the newest"):
        checkpoints.save(2, tree(2))


def test_too_little_space_is_noticed_before_anything_is_written(directory, monkeypatch):
    usage = shutil.disk_usage(directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = r"No space left on device.*1,000 free(.|\n)*Complete checkpoints: 1, 2, 3"
    with Checkpoints(directory, keep=3) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.save(4, tree(4))
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == ["1", "2", "3"]


@pytest.mark.parametrize(
    "change",
    [
        lambda like: like | {"new": like["step"]},
        lambda like: {name: value for name, value in like.items() if name != "momentum"},
        lambda like: like | {"momentum": jax.ShapeDtypeStruct((5, 5), jnp.bfloat16)},
    ],
)
def test_checkpoint_of_another_model_is_refused_and_kept(directory, change):
    with Checkpoints(directory, keep=3) as checkpoints, pytest.raises(UserError, match="of another model"):
        checkpoints.restore_latest(change(tree()))
    assert (directory / "3").is_dir()


def test_fingerprints_do_not_depend_on_sharding_and_notice_swaps():
    mesh = partitioning.make_mesh()
    array = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
    whole = jax.device_put({"x": array}, partitioning.replicated(mesh))
    split = jax.device_put({"x": array}, NamedSharding(mesh, PartitionSpec("data")))
    assert fingerprints(whole) == fingerprints(split)
    swapped = array[[1, 0, *range(2, 16)]]
    assert fingerprints({"x": jnp.asarray(swapped)}) != fingerprints(whole)


def test_write_that_fails_is_one_error_that_says_where(directory):
    with Checkpoints(directory, keep=3) as checkpoints:
        checkpoints.wait()
        directory.rename(directory.with_name("moved"))
        directory.write_text("a file where the folder was")
        with pytest.raises(UserError, match="could not write a checkpoint"):
            checkpoints.save(4, tree(4))
            checkpoints.wait()


def test_checkpoint_from_before_an_unused_field_can_be_read(tmp_path):
    state = {"params": {"x": jnp.arange(4.0)}}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        step, restored, _ = checkpoints.restore_latest({**state, "average": None})
    assert step == 1
    assert restored["average"] is None
    np.testing.assert_array_equal(restored["params"]["x"], np.arange(4.0))


def test_reading_parameters_warns_of_nothing(tmp_path, caplog):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.arange(4.0)})
        checkpoints.wait()
    caplog.clear()
    step, parameters, _ = checkpoints_module.read_parameters(tmp_path)
    np.testing.assert_array_equal(parameters["x"], np.arange(4.0))
    assert (step, caplog.messages) == (1, [])


def test_thread_that_failed_does_not_wait_at_the_barrier_that_the_others_never_reach(monkeypatch):
    reached = []
    monkeypatch.setattr(ocp.multihost, "get_barrier_sync_fn", lambda: lambda **where: reached.append(where["key"]))
    checkpoints_module._barrier_between_threads(key="in peace", timeout_ms=1)
    with contextlib.suppress(OSError):
        try:
            raise OSError
        finally:
            checkpoints_module._barrier_between_threads(key="after an error", timeout_ms=1)
    assert reached == ["in peace"]


def test_any_change_in_a_checkpoint_sets_it_aside(directory):
    extra, tree_metadata = directory / "3/extra/metadata", directory / "3/tree/_METADATA"
    changes = [
        (extra, b'"next_index": 3', b'"next_index": 4'),
        (extra, b'"data"', b'"dbta"'),
        (extra, b'"arrays"', b'"brrays"'),
        (extra, b'"checksum"', b'"checksun"'),
        (extra, b"kernel", b"kernal"),
        (extra, b"33", b"34"),
        (extra, b"bfloat16", b"bfloat61"),
        (tree_metadata, b"kernel", b"kernal"),
    ]
    for file, old, new in changes:
        content = file.read_bytes()
        assert old in content
        file.write_bytes(content.replace(old, new))
        with Checkpoints(directory, keep=3) as checkpoints:
            step, restored, found = checkpoints.restore_latest(tree())
        assert (step, found) == (2, {"data": {"next_index": 2}}), new
        assert_equal(restored, tree(2))
        (directory / "damaged-3").rename(directory / "3")
        file.write_bytes(content)


def test_checkpoints_that_were_renamed_to_each_other_are_set_aside(directory):
    (directory / "3").rename(directory / "other")
    (directory / "2").rename(directory / "3")
    (directory / "other").rename(directory / "2")
    with Checkpoints(directory, keep=3) as checkpoints:
        assert checkpoints.restore_latest(tree())[0] == 1
    assert {"damaged-2", "damaged-3"} <= {path.name for path in directory.iterdir()}


def test_checkpoint_of_a_version_without_checksum_is_read(directory):
    file = directory / "3/extra/metadata"
    contents = json.loads(file.read_text())
    del contents["checksum"]
    file.write_text(json.dumps(contents))
    with Checkpoints(directory, keep=3) as checkpoints:
        assert checkpoints.restore_latest(tree())[0] == 3


def test_parameters_are_read_from_the_newest_intact_checkpoint(directory, caplog):
    file = directory / "3/extra/metadata"
    file.write_bytes(file.read_bytes().replace(b'"next_index": 3', b'"next_index": 4'))
    step, parameters, extra = checkpoints_module.read_parameters(directory)
    assert (step, extra) == (2, {"data": {"next_index": 2}})
    assert_equal(parameters, tree(2))
    assert "checkpoint of step 3" in caplog.text
    assert (directory / "3").is_dir()  # reading changes nothing
