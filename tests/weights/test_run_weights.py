"""Parameters of a run, from a workdir that an earlier version wrote."""

import json
import shutil

import flax.traverse_util
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.weights.helpers import edit, refuses
from tests.weights.test_formats import assert_same, make_weights
from vit_jax.checkpoints import read_parameters
from vit_jax.data.sources import open_source
from vit_jax.weights import load, save

GOLDEN = ROOT / "tests" / "golden" / "workdirs" / "run"


@pytest.fixture
def run(tmp_path):
    """A copy of the workdir, which a test may change."""
    return shutil.copytree(GOLDEN, tmp_path / "run")


@pytest.fixture(scope="module")
def golden():
    return load(GOLDEN)


def change_config(run, **data):
    config = json.loads((run / "config.json").read_text())
    config["data"] |= data
    (run / "config.json").write_text(json.dumps(config))


def test_a_run_gives_its_best_parameters_model_and_class_names(golden):
    step, params, extra = read_parameters(GOLDEN / "best")
    assert (step, golden.format) == (30, "run")
    assert_same(golden.arrays, flax.traverse_util.flatten_dict(params, sep="/"))
    expected = make_weights(num_layers=1, mlp_dim=16, num_classes=10, image_size=(8, 8)).spec
    assert golden.spec.create() == expected.create()
    assert golden.spec.image_size == golden.preprocessing.image_size == (8, 8)
    assert golden.class_names == tuple("0123456789")
    test = open_source("digits", "test")
    examples = [test[index] for index in range(len(test))]
    images = golden.preprocessing.normalize(np.stack([golden.preprocessing(each["image"]) for each in examples]))
    predicted = np.argmax(np.asarray(golden.spec.create().apply({"params": golden.params}, images)[0]), axis=-1)
    accuracy = np.mean(predicted == [each["label"] for each in examples])
    np.testing.assert_allclose(accuracy, extra["accuracy"], atol=1e-6)


def test_a_run_without_best_parameters_gives_its_last_ones(run):
    shutil.rmtree(run / "best")
    step, params, _ = read_parameters(run / "checkpoints")
    assert step == 37
    assert_same(load(run).arrays, flax.traverse_util.flatten_dict(params, sep="/"))


def test_a_run_is_saved_like_any_weights(golden, tmp_path):
    found = load(save(golden, tmp_path / "run.npz"))
    assert (found.spec, found.class_names) == (golden.spec, golden.class_names)
    assert_same(found.arrays, golden.arrays)


def test_an_older_run_that_crops_its_images_says_so(run):
    (run / "facts.json").unlink()
    change_config(run, eval_resize_small=10)
    found = load(run).preprocessing
    assert (found.resize, found.crop_fraction) == ("crop", 0.8)


def test_an_older_run_whose_data_are_gone_has_no_class_names(run):
    (run / "facts.json").unlink()
    change_config(run, dataset="/nowhere")
    assert load(run).class_names is None


def test_a_run_with_a_changed_record_of_its_model_is_refused(run):
    before = (run / "model.json").read_text()
    for field, value in (("num_layers", 10**9), ("hidden_dim", "x"), ("num_heads", []), ("pool", {}), ("name", 5)):
        edit(run / "model.json", **{field: value})
        refuses(rf"model\.json: {field} is .*; expected", run)
        (run / "model.json").write_text(before)


def test_a_run_of_another_model_than_requested_is_refused():
    refuses("this is ViT-Ti/4.*not ViT-B/16", GOLDEN, model="ViT-B/16")


def test_a_run_without_checkpoints_is_refused(run):
    shutil.rmtree(run / "best")
    shutil.rmtree(run / "checkpoints")
    refuses("has no parameters yet: no checkpoint was saved", run)


def test_damaged_parameters_of_a_run_are_noticed(run):
    shutil.rmtree(run / "best")
    files = [path for path in (run / "checkpoints" / "37").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    for place in range(1000, len(content), len(content) // 20):  # the optimizer's part is not read
        content[place] ^= 1
    largest.write_bytes(content)
    refuses("all checkpoints in .* are damaged: 37", run)


def test_loading_changes_nothing_in_the_folder_of_a_live_run(run):
    # A run leaves this while it writes a checkpoint; a program that cleans up would delete it.
    (run / "best" / "38.orbax-checkpoint-tmp").mkdir()
    (run / "best" / "38.orbax-checkpoint-tmp" / "part").write_bytes(b"x")

    def snapshot():
        return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in run.rglob("*")}

    before = snapshot()
    load(run)
    assert snapshot() == before
