"""Evaluation without training (`--mode=eval`)."""

import json
import re
import types

import jax
import numpy as np
import pytest

from tests import multiprocess
from tests.data.test_sources import write_image
from vit_jax.config import base_config
from vit_jax.data.class_names import class_names, wordnet_ids
from vit_jax.data.sources import MissingDataError, open_source
from vit_jax.data.transforms import EvalTransform
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate, format_metrics
from vit_jax.evaluators import registry
from vit_jax.evaluators.accuracy import ImageNetVariant
from vit_jax.experiment import dry_run as overview
from vit_jax.experiment.evaluation_only import build_evaluation
from vit_jax.models import create_model
from vit_jax.models.layers import normalize_images
from vit_jax.train import train
from vit_jax.weights import from_params, load, save


def of_digits():
    config = base_config()
    with config.ignore_type():
        config.model.name = None
    config.data.eval_split = "test"
    config.data.image_size = 8
    config.batch_size = 16
    config.eval_batch_size = 64
    return config


@pytest.fixture
def config():
    return of_digits()


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
    assert (written["metrics"], written["overlap"]) == (metrics, {})
    assert (written["weights"], written["model"]) == (weights[2], "ViT-Ti/4")
    assert written["model_fields"]["hidden_dim"] == 16
    assert f"{100 * metrics['test/accuracy']:.2f} %" in format_metrics(metrics)


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    config = of_digits()
    config.weights = weights[2]
    config.data.train_split = "train+test[:50]"
    config.steps = 3
    config.checkpoint.keep_best = False
    config.polyak_decay = 0.9
    config.optimizer.learning_rate = 0.01
    config.evals.fewshot.datasets = ("digits",)
    config.evals.fewshot.shots = (1,)
    config.evals.fewshot.seeds = 1
    config.evals.fewshot.crop_from = 8
    config.evals.fewshot.every_steps = 2
    path = tmp_path_factory.mktemp("runs") / "run"
    train(config, path)
    return config, path, [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_evaluated_in_its_workdir_as_at_its_end_by_the_command_that_trained_it(run, caplog):
    config, path, rows = run
    result = evaluate(config, path)
    assert result["overlap"] == {"test": 50, "fewshot/digits": 50}
    assert "'test' of digits, which fewshot/digits is measured on, shares 50 of its 360 examples" in caplog.text
    assert result["weights"] == str(path)
    last = {name: value for row in rows if row["step"] == 3 for name, value in row.items()}
    assert set(result["metrics"]) < set(last)
    for name, value in result["metrics"].items():
        assert value == pytest.approx(last[name], rel=1e-6)
    assert result["model_fields"] == json.loads((path / "model.json").read_text())


def test_examples_that_were_trained_on_are_counted_at_the_end_of_a_run(run):
    assert json.loads((run[1] / "summary.json").read_text())["overlap"] == {"test": 50, "fewshot/digits": 50}
    assert re.search(r"test/examples trained on +\| +50 ", (run[1] / "summary.md").read_text())


def test_other_weights_are_not_mistaken_for_a_workdirs_run(run, config):
    config.weights = "augreg_ti16_i21k"
    with pytest.raises(UserError, match=r"is the workdir of a run, but weights are augreg_ti16_i21k"):
        evaluate(config, run[1])


def test_few_shot_accuracies_are_measured_along_a_run(run):
    assert [row["step"] for row in run[2] if "fewshot/digits/pre_logits/1shot" in row] == [2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.eval_split": None}, "evaluates nothing: set data.eval_split"),
        ({"weights": None}, "nothing to evaluate"),
        ({"model.name": "ViT-S/16"}, "not ViT-S/16"),
        ({"data.eval_split": "tets"}, "Did you mean 'test'"),
        ({"evals.imagenet_r.dataset": "/nowhere"}, "models with ImageNet's 1,000 classes; this one has 10"),
    ],
)
def test_what_cannot_be_evaluated_is_reported(config, weights, changes, message):
    config.weights = weights[2]
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        evaluate(config)


@pytest.mark.parametrize("change", ["names", "order", "number"])
def test_variants_are_not_measured_with_a_head_of_other_classes(change):
    ids, entry = list(wordnet_ids("imagenet2012")), registry.entry("imagenet_variant", dataset="/data/real.json")

    def check(names, num_classes=1000):
        ImageNetVariant.check(
            "real",
            entry,
            types.SimpleNamespace(model=types.SimpleNamespace(num_classes=num_classes), class_names=names),
        )

    for names in (ids, class_names("imagenet2012"), None):
        check(names)
    other = {"names": [f"thing {label}" for label in range(1000)], "order": ids[1:] + ids[:1], "number": ids[:10]}
    with pytest.raises(UserError, match=r"evals.real is for models with ImageNet's .*evals.real.dataset=None"):
        check(other[change], len(other[change]))


def test_head_for_other_classes_is_reported(config, weights, tmp_path):
    for name in "abc":
        write_image(tmp_path / "test" / name / "1.jpg", 1)
    config.data.dataset, config.weights = str(tmp_path), weights[2]
    with pytest.raises(
        UserError, match=r"has 10 classes, more than the data set's 3.*Fine-tune it first.*model.num_classes=10"
    ):
        evaluate(config)
    config.model.num_classes = 10  # of which these are the first three
    assert evaluate(config)["metrics"]["test/examples"] == 3


def test_weights_without_a_head_are_reported(config, weights, tmp_path):
    save(load(weights[2]).without("head"), tmp_path / "headless.npz")
    config.weights = str(tmp_path / "headless.npz")
    with pytest.raises(UserError, match="has no head to classify with"):
        evaluate(config)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("test/accuracy", 0.5, "50.00 %"),
        ("test/accuracy", float("nan"), "nan"),
        ("test/examples", 1000, "1,000"),
        ("fewshot/digits/pre_logits/5shot_l2", 1024.0, "1024"),
        ("fewshot/digits/pre_logits/5shot/l2=2", 0.25, "25.00 %"),
    ],
)
def test_metrics_are_shown_as_what_they_are(name, value, shown):
    assert format_metrics({name: value}).endswith(f"| {name} | {shown} |")


def test_few_shot_accuracies_are_an_evaluation_like_others(config, weights, tmp_path):
    config.weights = weights[2]
    config.data.eval_split = None
    config.evals.fewshot.datasets = ("digits",)
    config.evals.fewshot.shots = (1, 10)
    config.evals.fewshot.crop_from = 8
    metrics = evaluate(config)["metrics"]
    names = {f"pre_logits/{shots}shot{what}" for shots in (1, 10) for what in ("", "_std")} | {"examples"}
    assert set(metrics) == {f"fewshot/digits/{name}" for name in names}
    assert 0.2 < metrics["fewshot/digits/pre_logits/1shot"] < metrics["fewshot/digits/pre_logits/10shot"] < 1


def dry_run(config, place):
    """The whole text, with its lines joined again, and the part before the fields."""
    text = overview.evaluation_dry_run(config, place, build_evaluation(config, place, allow_missing=True))
    assert max(map(len, text.splitlines())) <= 100 or len(place) > 60
    text = re.sub(r"\n {10}(?! )", " ", text)
    return text, text.partition("# Fields that count")[0]


def test_dry_run_shows_weights_model_and_all_evaluations(config, weights, tmp_path):
    loaded = load(weights[2])
    hidden = {"kernel": np.zeros((16, 16), np.float32), "bias": np.zeros(16, np.float32)}
    fields = {**loaded.spec.overrides, "pre_logits": True}
    place = tmp_path / "hidden.npz"
    save(from_params("ViT-Ti/4", {**loaded.params, "pre_logits": hidden}, image_size=8, **fields), place)
    config.evals.fewshot.datasets = ("digits",)
    config.evals.fewshot.shots = (1, 5)
    config.data.image_size = 12
    text, measured = dry_run(config, str(place))
    for part in (
        f"weights   {place}: ViT-Ti/4, 10 classes",
        "images 12x12\n",
        "pre_logits=True",
        "measured  test: classification; 360 images of digits (test)\n",
        "measured  fewshot/digits: linear classifiers on pre_logits, shots 1, 5, l2 1024, 3 draw(s); "
        "1,437 images of digits (train), 360 images of digits (test)\n",
        "batches   64 images",
    ):
        assert part in measured
    assert "\npre_logits/kernel" in text and "1x10x16" in text  # of 3 x 3 patches
    assert "evals.fewshot.l2: (1024.0,)" in text
    assert "optimizer" not in text and "epochs" not in text


def test_dry_run_of_an_evaluation_needs_neither_data_nor_released_weights(config, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    config.data.dataset, config.data.image_size = str(tmp_path / "nowhere"), 32
    config.evals.fewshot.datasets = (str(tmp_path / "nor_there"),)
    config.evals.real.dataset = "/nor/there/real.json"
    _, measured = dry_run(config, "vit_b32_i21k_in1k_384")
    assert "weights   vit_b32_i21k_in1k_384: ViT-B/32, 1,000 classes, images 384x384, not downloaded yet" in measured
    for name in ("test", "real", "fewshot/nor_there"):
        assert f"measured  {name}: data not prepared yet. " in measured


@pytest.mark.parametrize("place", ["augreg_ti16_i21k_in1k_224", "a file"])
def test_hidden_layer_is_not_required_of_weights_without_one(config, weights, place, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    config.model.pre_logits = True  # as a config of pre-training has it
    config.data.dataset = str(tmp_path / "nowhere")
    if place != "a file":
        config.data.image_size, config.model.scan_layers = 32, True
    built = build_evaluation(config, weights[2] if place == "a file" else place, allow_missing=True)
    assert "pre_logits" not in built.model_fields and "pre_logits" not in built.abstract_params


def test_dry_run_of_an_evaluation_compares_the_model_with_released_weights(config, tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    config.model.num_layers, config.data.image_size, config.data.dataset = 2, 32, str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="the arrays do not fit the model: 0 missing, 160 too many"):
        build_evaluation(config, "augreg_ti16_i21k_in1k_224", allow_missing=True)


def test_missing_data_end_an_evaluation(config, weights, tmp_path):
    config.data.dataset = str(tmp_path / "nowhere")
    with pytest.raises(MissingDataError):
        build_evaluation(config, weights[2])


@pytest.fixture(scope="module")
def all_at_once(weights):
    """What is measured of all digits in one batch."""
    config = of_digits()
    config.weights = weights[2]
    config.data.eval_split = "all"
    config.eval_batch_size = 1800
    config.evals.fewshot.datasets = ("digits",)
    config.evals.fewshot.shots = (5,)
    config.evals.fewshot.crop_from = 8
    metrics = evaluate(config)["metrics"]
    assert metrics["all/examples"] == 1797
    return metrics


@pytest.mark.parametrize("batch_size", [16, 104])
def test_every_example_counts_once_whatever_the_batch_size(config, weights, all_at_once, batch_size):
    config.weights = weights[2]
    config.data.eval_split = "all"
    config.eval_batch_size = batch_size
    metrics = evaluate(config)["metrics"]
    for name in ("all/examples", "all/accuracy", "all/top5_accuracy"):
        assert metrics[name] == all_at_once[name]


def test_several_processes_count_the_same(weights, all_at_once, tmp_path, compilation_cache):
    arguments = [
        *("--config=configs/quickstart.py", "--mode=eval", f"--config.weights={weights[2]}"),
        *("--config.model.name=None", "--config.model.num_layers=None", "--config.model.hidden_dim=None"),
        *("--config.model.mlp_dim=None", "--config.model.num_heads=None", "--config.model.pool=None"),
        *("--config.data.image_size=8", "--config.data.eval_split=all", "--config.eval_batch_size=68"),
        *("--config.evals.fewshot.datasets=digits", "--config.evals.fewshot.shots=(5,)"),
        "--config.evals.fewshot.crop_from=8",
        f"--workdir={tmp_path / 'run'}",
    ]
    with multiprocess.start_main(arguments, tmp_path, 2, 2, compilation_cache) as processes:
        ended = processes.all_ended()
    assert [each.returncode for each in ended] == [0, 0], ended
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]
    for name in ("all/examples", "all/accuracy", "all/top5_accuracy", "fewshot/digits/pre_logits/5shot"):
        assert found[name] == all_at_once[name]
