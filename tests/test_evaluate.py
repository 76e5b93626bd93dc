"""Evaluation alone (`--mode=eval`)."""

import json

import jax
import numpy as np
import pytest

from tests import multiprocess
from vit_jax.config import base_config
from vit_jax.data.images import EvalTransform
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate, format_metrics
from vit_jax.models import create_model
from vit_jax.train import train
from vit_jax.train_step import normalize_images
from vit_jax.weights import from_params, load, save


@pytest.fixture
def config():
    config = base_config()
    with config.ignore_type():
        config.model.name = None
    config.data.eval_split = "test"
    config.data.image_size = 8
    config.batch_size = 16
    config.eval_batch_size = 64
    return config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ViT with random parameters, of digits, in a file."""
    fields = {"num_layers": 1, "hidden_dim": 16, "mlp_dim": 16, "num_heads": 2}
    model = create_model("ViT-Ti/4", num_classes=10, **fields)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp("weights") / "digits.npz"
    save(from_params("ViT-Ti/4", params, image_size=8, **fields), path)
    return model, params, str(path)


def test_any_checkpoint_is_evaluated_with_its_own_head(config, weights, tmp_path):
    model, params, config.weights = weights
    result = evaluate(config, tmp_path)
    source = open_source("digits", "test")
    images = np.stack([EvalTransform(8)(source[i]["image"]) for i in range(len(source))])
    labels = np.array([source[i]["label"] for i in range(len(source))])
    logits, _ = model.apply({"params": params}, normalize_images(images))
    order = np.argsort(-np.asarray(logits), axis=1)
    metrics = result["metrics"]
    assert metrics["test/examples"] == 360
    assert metrics["test/accuracy"] == pytest.approx(np.mean(order[:, 0] == labels))
    assert metrics["test/top5_accuracy"] == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(1)))
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["metrics"] == metrics
    assert (written["weights"], written["model"]) == (weights[2], "ViT-Ti/4")
    assert f"{100 * metrics['test/accuracy']:.2f} %" in format_metrics(metrics)


def test_a_run_is_evaluated_in_its_workdir_as_at_its_end(config, weights, tmp_path):
    config.weights = weights[2]
    config.steps = 3
    config.checkpoint.keep_best = False
    config.polyak_decay = 0.9
    summary = train(config, tmp_path / "run")
    config.weights = None
    metrics = evaluate(config, tmp_path / "run")["metrics"]
    for name in ("test/accuracy", "test/loss", "test/examples"):
        assert metrics[name] == pytest.approx(summary[name], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.eval_split": None}, "evaluates nothing: set data.eval_split"),
        ({"weights": None}, "nothing to evaluate"),
        ({"model.name": "ViT-S/16"}, "not ViT-S/16"),
        ({"data.eval_split": "tets"}, "Did you mean 'test'"),
        ({"variants.imagenet_r": "/nowhere"}, "models with ImageNet's 1,000 classes; this one has 10"),
    ],
)
def test_what_cannot_be_evaluated_is_told(config, weights, changes, message):
    config.weights = weights[2]
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        evaluate(config)


def test_weights_without_a_head_are_told(config, weights, tmp_path):
    save(load(weights[2]).without("head"), tmp_path / "headless.npz")
    config.weights = str(tmp_path / "headless.npz")
    with pytest.raises(UserError, match="has no head to classify with"):
        evaluate(config)


def test_few_shot_accuracies_are_an_evaluation_like_others(config, weights, tmp_path):
    config.weights = weights[2]
    config.data.eval_split = None
    config.fewshot.datasets = ("digits",)
    config.fewshot.shots = (1, 10)
    config.fewshot.crop_from = 8
    metrics = evaluate(config)["metrics"]
    assert set(metrics) == {
        f"fewshot/digits/pre_logits/{shots}shot{what}" for shots in (1, 10) for what in ("", "_std")
    }
    assert 0.2 < metrics["fewshot/digits/pre_logits/1shot"] < metrics["fewshot/digits/pre_logits/10shot"] < 1


def test_few_shot_accuracies_are_measured_along_a_run(config, weights, tmp_path):
    config.weights = weights[2]
    config.data.eval_split = None
    config.fewshot.datasets = ("digits",)
    config.fewshot.shots = (1,)
    config.fewshot.seeds = 1
    config.fewshot.every_steps = 2
    config.steps = 3
    train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "fewshot/digits/pre_logits/1shot" in row] == [2, 3]


@pytest.mark.parametrize("batch_size", [16, 104, 2000])
def test_every_example_counts_once_whatever_the_batch_size(config, weights, batch_size):
    config.weights = weights[2]
    config.data.eval_split = "all"
    config.eval_batch_size = batch_size
    metrics = evaluate(config)["metrics"]
    assert metrics["all/examples"] == 1797
    config.eval_batch_size = 1800  # all at once
    expected = evaluate(config)["metrics"]
    assert metrics["all/accuracy"] == expected["all/accuracy"]
    assert metrics["all/top5_accuracy"] == expected["all/top5_accuracy"]


def test_several_processes_count_the_same(config, weights, tmp_path, compilation_cache):
    arguments = [
        *("--config=configs/quickstart.py", "--mode=eval", f"--config.weights={weights[2]}"),
        *("--config.model.name=None", "--config.model.num_layers=None", "--config.model.hidden_dim=None"),
        *("--config.model.mlp_dim=None", "--config.model.num_heads=None", "--config.model.pool=None"),
        *("--config.data.image_size=8", "--config.data.eval_split=all", "--config.eval_batch_size=66"),
        *("--config.fewshot.datasets=('digits',)", "--config.fewshot.shots=(5,)", "--config.fewshot.crop_from=8"),
        f"--workdir={tmp_path / 'run'}",
    ]
    with multiprocess.start_main(arguments, tmp_path, 3, 2, compilation_cache) as processes:
        ended = processes.all_ended()
    assert [each.returncode for each in ended] == [0, 0, 0], ended
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]
    config.weights = weights[2]
    config.data.eval_split = "all"
    config.fewshot.datasets = ("digits",)
    config.fewshot.shots = (5,)
    config.fewshot.crop_from = 8
    expected = evaluate(config)["metrics"]
    assert found["all/examples"] == 1797
    for name in ("all/accuracy", "all/top5_accuracy", "fewshot/digits/pre_logits/5shot"):
        assert found[name] == expected[name]
