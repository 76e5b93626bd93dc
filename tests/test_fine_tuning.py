"""Runs that start from weights (section 3.2 of the paper)."""

import contextlib
import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.test_sources import write_image
from tests.test_train import compiled_once
from vit_jax.checkpoints import Checkpoints
from vit_jax.config import base_config, flatten
from vit_jax.costs.flops import forward_flops
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.experiment import build as experiments
from vit_jax.experiment import dry_run
from vit_jax.models import create_model
from vit_jax.models.position_embeddings import interpolate_position_embedding
from vit_jax.run.facts import RunFacts, SplitFacts, write_facts
from vit_jax.train import train
from vit_jax.weights import Preprocessing, from_params, load, run_weights, save


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ViT of 7 classes for images of 16 pixels, in a file."""
    model = create_model(
        "ViT-Ti/4", num_classes=7, num_layers=2, hidden_dim=32, mlp_dim=32, num_heads=2, pre_logits=True
    )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype(np.float32), shapes)
    kept = {"num_layers": 2, "hidden_dim": 32, "mlp_dim": 32, "num_heads": 2, "pre_logits": True}
    path = tmp_path_factory.mktemp("weights") / "pretrained.npz"
    save(from_params("ViT-Ti/4", params, image_size=16, **kept), path)
    return str(path), params


def fine_tuning(weights):
    config = base_config()
    config.weights = weights[0]
    with config.ignore_type():
        config.model.name = None
    config.data.image_size = 24
    config.data.inception_crop = False
    config.data.eval_split = "test"
    config.batch_size = 32
    config.eval_batch_size = 360
    config.steps = 4
    config.log_every_steps = 1
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.03
    config.optimizer.momentum_dtype = "bfloat16"
    config.optimizer.clip_norm = 1.0
    return config


@pytest.fixture
def config(weights):
    return fine_tuning(weights)


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory, compilation_cache):
    """A run of four steps, with a checkpoint of the second as well, and its config."""
    config = fine_tuning(weights)
    config.polyak_decay = 0.5
    config.checkpoint.every_steps = 2
    config.checkpoint.keep_best = False
    path = tmp_path_factory.mktemp("runs") / "run"
    with compiled_once(compilation_cache):
        train(config, path)
        yield config, path


def begin(config):
    built = experiments.build(config)
    return built, jax.device_get(built.init_state())


def test_fine_tuning_starts_with_a_head_of_zeros_and_interpolated_position_embeddings(config, weights):
    config.polyak_decay = 0.9
    built, state = begin(config)
    before = weights[1]
    assert (built.model_name, built.num_classes, built.model.num_layers) == ("ViT-Ti/4", 10, 2)
    assert "pre_logits" not in state.params
    assert state.params["head"]["kernel"].shape == (32, 10)
    assert not np.any(state.params["head"]["kernel"])
    positions = before["Transformer"]["posembed_input"]["pos_embedding"]
    expected = interpolate_position_embedding(positions, (6, 6), num_prefix_tokens=1, old_grid=(4, 4))
    np.testing.assert_array_equal(state.params["Transformer"]["posembed_input"]["pos_embedding"], expected)
    for part in ("cls", "embedding"):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], before[part])
    jax.tree.map(np.testing.assert_array_equal, state.average, state.params)


@pytest.mark.parametrize("num_classes", [None, 7])
def test_head_is_kept_on_request_with_its_hidden_layer(config, weights, tmp_path, num_classes):
    for split, name in itertools.product(("train", "test"), "abcde" if num_classes else "abcdefg"):
        write_image(tmp_path / split / name / "1.jpg", 1)
    config.data.dataset = str(tmp_path)
    config.keep_head = True
    config.model.num_classes = num_classes  # of which the data have the first
    _, state = begin(config)
    for part in ("head", "pre_logits"):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], weights[1][part])


def test_weights_of_a_fine_tuned_run_determine_its_model(run):
    config, path = run
    loaded = load(path)
    assert (loaded.spec.name, loaded.spec.num_classes, loaded.spec.overrides["num_layers"]) == ("ViT-Ti/4", 10, 2)
    assert loaded.spec.image_size == (24, 24)
    again = base_config()
    again.update_from_flattened_dict(flatten(config.to_dict()))
    again.weights = str(path)
    again.keep_head = True
    _, state = begin(again)
    with Checkpoints(path / "checkpoints", keep=1) as kept:
        _, last, _ = kept.restore_latest(experiments.build(config).step.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, state.params, jax.device_get(last.average))


@pytest.fixture
def resnet_run(tmp_path, monkeypatch):
    """What a run of a ResNet of one stage leaves, its best parameters all ones and its last all zeros."""
    model = create_model("R26x1", num_classes=10, stages=(1,))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
    values = {"best": 1.0, "checkpoints": 0.0}
    monkeypatch.setattr(
        run_weights,
        "read_parameters",
        lambda path: (1, jax.tree.map(lambda leaf: np.full(leaf.shape, values[path.name], leaf.dtype), shapes), {}),
    )
    config = base_config()
    config.data.image_size = 16
    (tmp_path / "starts.jsonl").touch()
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "model.json").write_text(json.dumps({"name": "R26x1", "stages": [1], "num_classes": 10}))
    digits = SplitFacts.of(open_source("digits", "train"), "digits", "train")
    preprocessing = Preprocessing(image_size=(16, 16)).to_json()
    write_facts(tmp_path, RunFacts(10, tuple("0123456789"), 1, "softmax", preprocessing, digits, None))
    return tmp_path, model


def test_attributes_of_a_runs_model_are_tuples_again(resnet_run, config):
    path, model = resnet_run
    assert load(path).spec.overrides == {"stages": (1,)}
    assert load(path).spec.create() == model
    config.weights, config.data.image_size = str(path), 16
    assert experiments.build(config).model == model


def test_the_best_parameters_of_a_run_are_loaded_if_it_has_them(resnet_run):
    assert np.all(load(resnet_run[0]).arrays["head/bias"] == 1)


def test_head_of_a_run_is_not_kept_for_classes_of_other_names(resnet_run, config, tmp_path):
    for split, name in itertools.product(("train", "test"), "abcdefghij"):
        write_image(tmp_path / "data" / split / name / "1.jpg", 1)
    config.weights, config.keep_head, config.data.dataset = str(resnet_run[0]), True, str(tmp_path / "data")
    config.data.image_size = 16
    with pytest.raises(
        UserError, match=r"was trained on other classes than those of .*no longer there: '0', '1', .*; new: 'a', 'b'"
    ):
        experiments.build(config)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{}", "config.json is missing or is not that of a run"),
        ("model.json", "{}", "does not say which model it trained"),
        ("model.json", '{"name": "R2', "model.json is damaged"),
    ],
)
def test_damaged_workdir_is_reported(resnet_run, file, content, message):
    (resnet_run[0] / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load(resnet_run[0])


def test_folder_that_is_neither_weights_nor_a_run_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"has no model\.safetensors.*Nor has it a starts\.jsonl"):
        load(tmp_path)


def test_linear_probe_moves_only_the_head(config, weights):
    config.train_only = ("^head/",)
    config.model.pre_logits = True  # the representation of the paper's linear evaluation
    built, begun = begin(config)
    # The forward pass, and the gradient of the head's kernel.
    forward = forward_flops(built.model, config.data.image_size)
    assert built.train_flops == forward + 2 * math.prod(built.step.abstract_state.params["head"]["kernel"].shape)
    assert "in all at 1 x forward" in dry_run.describe_run(built)
    begun, state = begun.params, built.init_state()
    step = built.step
    with contextlib.closing(built.make_train_batches()) as batches:
        for _ in range(2):
            state, _ = step(state, next(batches))
    ended = jax.device_get(state.params)
    assert np.any(ended["head"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, ended | {"head": 0}, begun | {"head": 0})
    jax.tree.map(np.testing.assert_array_equal, ended["pre_logits"], weights[1]["pre_logits"])


def test_dry_run_shows_how_each_array_of_the_weights_is_used(config):
    config.optimizer.layer_decay = 0.75
    text = dry_run.dry_run(experiments.build(config), [], {})
    assert "resized         1  Transformer/posembed_input/pos_embedding (1, 17, 32) -> (1, 37, 32)" in text
    assert "dropped         4  head/bias, head/kernel, pre_logits/bias, pre_logits/kernel" in text
    assert "new: head/bias, head/kernel" in " ".join(text.split())  # a long path breaks the line
    assert "layer decay 0.75" in text


def test_fine_tuning_resumes_bit_exactly_after_an_interruption(run, tmp_path):
    config, whole = run
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "4")
    train(config, parts)  # from the checkpoint of step 2
    rows = {}
    for path in (whole, parts):
        lines = (path / "metrics.jsonl").read_text().splitlines()
        rows[path] = [
            {key: value for key, value in json.loads(line).items() if not key.startswith("time/")} for line in lines
        ]
    assert [json.loads(line)["step"] for line in (parts / "starts.jsonl").read_text().splitlines()] == [0, 2]
    assert rows[parts] == rows[whole]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "ViT-S/16"}, "this is ViT-Ti/4.*not ViT-S/16"),
        ({"model.num_layers": 3}, "encoderblock_2"),
        ({"data.image_size": 26}, "26"),
        ({"weights": "/nowhere/weights.npz"}, "/nowhere"),
        ({"weights": None, "keep_head": True}, "keep_head needs weights"),
        ({"weights": None}, "set model.name"),
        ({"train_only": ("^neck/",)}, "found in no parameter.s name"),
        ({"keep_head": True, "model.num_classes": 12}, "has 7 classes, but model.num_classes=12"),
        ({"keep_head": True}, r"the head of \S+ has 7 classes, fewer than the data set's 10\. Set keep_head=False"),
    ],
)
def test_inconsistent_options_are_refused(config, changes, message):
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        experiments.build(config)


def test_missing_released_weights_do_not_prevent_planning(config, monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    config.weights = "augreg_ti16_i21k"
    config.data.image_size = 32
    built = experiments.build(config, allow_missing_data=True)
    assert (built.model_name, built.transfer_report) == ("ViT-Ti/16", None)
    assert "not read yet" in dry_run.describe_run(built)


def test_a_config_may_name_the_model_of_weights_with_their_own_attributes(config):
    config.model.name = "ViT-Ti/4"
    assert experiments.build(config).model.num_layers == 2
    config.model.num_layers = 2
    assert experiments.build(config).model.hidden_dim == 32
