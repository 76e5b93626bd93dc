"""Runs of masked patch prediction: images without labels, evaluation, and what becomes of the model."""

import json

import cv2
import numpy as np
import pytest

from tests.data.test_sources import write_image
from tests.test_train import quick_runs
from vit_jax import predict
from vit_jax.analysis import __main__ as analysis
from vit_jax.analysis import show_data
from vit_jax.config import base_config
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.evaluators.registry import entry
from vit_jax.experiment import build, leakage
from vit_jax.experiment.objective import make_objective
from vit_jax.plan import worker
from vit_jax.sweep import split_checks
from vit_jax.train import train
from vit_jax.weights import ModelSpec, load, save

DIGITS = {"data.train_split": "train", "data.eval_split": "test"}


def masked_config(dataset, **changes):
    config = base_config()
    config.data.dataset = str(dataset)
    config.data.train_split, config.data.eval_split = "all[:80%]", "all[80%:]"
    config.data.image_size = 8
    config.model.name = "ViT-Ti/4"
    config.model.num_layers, config.model.hidden_dim, config.model.mlp_dim, config.model.num_heads = 1, 16, 16, 2
    config.objective = "masked_patches"
    config.evals.eval_split = entry("objective")
    config.evals.fewshot.datasets, config.evals.fewshot.shots, config.evals.fewshot.seeds = ("digits",), (2,), 1
    config.evals.fewshot.crop_from = 8
    config.batch_size, config.eval_batch_size, config.steps, config.log_every_steps = 8, 8, 4, 2
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twenty images and no classes."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(20):
        write_image(folder / f"{number}.jpg", 12 * number + 5)
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory, compilation_cache):
    """A finished run."""
    path = tmp_path_factory.mktemp("masked") / "run"
    with quick_runs(compilation_cache):
        summary = train(masked_config(images), path)
        yield path, summary


def test_a_folder_without_classes_trains_and_is_evaluated(run):
    path, summary = run
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [0 <= row["train/accuracy"] <= 1 for row in rows if "train/loss" in row] == [True, True]
    assert summary["all[80%:]/examples"] == 4
    assert 0 < summary["all[80%:]/loss"] < 2 * np.log(512)
    assert 0 <= summary["all[80%:]/accuracy"] <= 1
    few_shot = [row["fewshot/digits/pre_logits/2shot"] for row in rows if "fewshot/digits/pre_logits/2shot" in row]
    assert few_shot
    assert all(0 < accuracy < 1 for accuracy in few_shot)


def test_evaluation_alone_finds_what_the_run_found(run, images):
    path, summary = run
    config = masked_config(images)
    config.evals.fewshot.datasets = ()
    config.weights = str(path)
    found = evaluate(config)["metrics"]
    for name in ("loss", "accuracy", "examples"):
        assert found[f"all[80%:]/{name}"] == pytest.approx(summary[f"all[80%:]/{name}"], rel=1e-6)


def test_weights_of_the_run_have_no_head_and_fine_tune_like_any(run):
    path, _ = run
    weights = load(path)
    assert weights.spec.num_classes == 0
    assert not {"mask_embedding", "head/kernel"} & weights.arrays.keys()
    config = masked_config("digits", **DIGITS)
    config.objective, config.weights, config.model.name = "classification", str(path), None
    config.evals.eval_split = entry("classification")
    built = build.build(config)
    assert (built.num_classes, built.model.predict_patches) == (10, False)
    np.testing.assert_array_equal(built.initial_params["embedding"]["kernel"], weights.arrays["embedding/kernel"])
    kept = load(path, predicts_patches=True)
    assert kept.arrays["mask_embedding"].shape == (1, 1, 16)
    assert (kept.spec.num_classes, kept.spec.overrides["predict_patches"]) == (512, True)


def test_pre_training_goes_on_from_its_weights_with_other_images(run):
    path, _ = run
    built = build.build(masked_config("digits", weights=str(path), **DIGITS))
    kept = load(path, predicts_patches=True)
    np.testing.assert_array_equal(built.initial_params["mask_embedding"], kept.arrays["mask_embedding"])


def test_it_is_planned_by_formula(images):
    config = masked_config(images)
    request = {"config": json.loads(config.to_json()), "num_devices": 2}
    assert worker.estimate_by_formula(request)["status"] == "formula"


def test_predictions_of_the_run_are_refused(run, images, capsys):
    assert predict.main([f"--weights={run[0]}", str(images / "1.jpg")]) == 1
    assert "no head" in capsys.readouterr().err


def test_predicted_patches_are_drawn(run, images, tmp_path, capsys):
    picture = tmp_path / "masked.png"
    arguments = [f"--output={picture}", "--max_images=2", str(images)]
    assert analysis.main(["masked", f"--weights={run[0]}", *arguments]) == 0
    assert cv2.imread(str(picture)).std() > 10
    assert analysis.main(["masked", f"--weights={run[0]}", "--corruption_rate=1.5", *arguments]) == 1
    assert "above 0 and at most 1" in capsys.readouterr().err


def test_training_images_without_labels_count_as_seen(run, images, caplog):
    path, _ = run
    tested = {"named": open_source(str(images), "all[60%:]", labelled=False)}
    assert leakage.find_overlap(tested, str(path)) == {"named": 4}
    assert "missing" not in caplog.text
    assert "have changed" not in caplog.text


def test_the_training_images_are_drawn(images):
    figure = show_data.draw_batches(masked_config(images), count=2)
    headings = [part.get_suptitle() for part in figure.subfigs]
    assert "all[:80%] (16 images), 8 x 8" in headings[0]
    assert "all[80%:] (4 images), 8 x 8" in headings[1]


def test_a_sweep_compares_splits_of_images_without_labels(images):
    config = masked_config(images, **{"data.eval_split": "all[70%:]"})
    with pytest.raises(UserError, match="the values are chosen by"):
        split_checks.compare_examples([(config, "all[70%:]/loss")], [], lambda _: [])


HYBRID = {
    "model.name": "R50+ViT-B/16",
    **dict.fromkeys(("model.num_layers", "model.num_heads"), 1),
    **dict.fromkeys(("model.hidden_dim", "model.mlp_dim"), 16),
}


@pytest.mark.parametrize(("resnet", "pixels"), [((1, 1), 8), ((), 4), (None, 16)])
def test_a_hybrid_of_any_stages_predicts_the_pixels_of_its_tokens(images, resnet, pixels):
    config = masked_config(images, **HYBRID, **{"data.image_size": 32, "model.resnet": resnet})
    built = build.build(config)
    assert built.step.objective.patch_size == built.model.pixels_per_token == pixels
    other = ModelSpec("R50+ViT-B/16", 512, {"resnet": (1, 1)})
    given, _ = make_objective(config, other.overrides)
    assert given.patch_size == (8 if resnet is None else pixels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (HYBRID | {"data.image_size": 40}, r"40x40 is not divisible by the patch size 16\. .* such as 32 or 48"),
        ({"mixup_alpha": 0.2, "label_smoothing": 0.1}, "mixup_alpha and label_smoothing would change them"),
        ({"model.name": "R26x1"}, "needs patches, and R26x1 has none"),
        ({"model.name": None}, "needs a model"),
        ({"masked_patches.corruption_rate": 1.5}, "masked_patches.corruption_rate must be"),
        ({"masked_patches.corruption_rate": -0.5}, "masked_patches.corruption_rate must be"),
        ({"masked_patches.target": "colour"}, "masked_patches.target must be"),
        ({"data.train_split": "train"}, "no split 'train': it has no folders. Take 'all'"),
        ({"objective": "classification"}, "has images but no folders"),
    ],
)
def test_mistakes_are_one_clear_error(images, changes, message):
    with pytest.raises(UserError, match=message):
        build.build(masked_config(images, **changes))


def test_accuracy_of_classes_is_not_measured(images, tmp_path):
    config = masked_config(images)
    config.evals.eval_split = entry("classification")
    with pytest.raises(UserError, match=r"learns no classes\. Set --config.evals.eval_split.type=objective"):
        train(config, tmp_path)


def test_weights_of_another_objective_have_no_patches_to_evaluate(run, images, tmp_path):
    path, _ = run
    plain = tmp_path / "plain.npz"
    save(load(path), plain)
    with pytest.raises(UserError, match="has no head that predicts patches"):
        evaluate(masked_config(images, weights=str(plain)))
