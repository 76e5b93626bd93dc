"""Errors of `build`, in one process; tests/test_main.py shows how the command reports them."""

import contextlib
import json
import re

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.data.test_sources import write_image
from vit_jax.config import base_config, flatten
from vit_jax.errors import UserError
from vit_jax.experiment import build, dry_run
from vit_jax.experiment.evaluations import describe_data, make_evaluations, make_setup, open_evaluations
from vit_jax.objectives.classification import Classification
from vit_jax.objectives.losses import Loss
from vit_jax.objectives.mixup import Mixing


def digits_config(**changes):
    config = base_config()
    config.data.image_size = 8
    config.model.name = "ViT-Ti/4"
    config.model.num_layers, config.model.hidden_dim, config.model.mlp_dim, config.model.num_heads = 1, 16, 16, 2
    config.batch_size = 16
    config.steps = 2
    config.update_from_flattened_dict(changes)
    return config


def test_epochs_become_steps():
    built = build.build(digits_config(steps=None, epochs=3.0))
    assert built.num_steps == round(3 * 1437 / 16)


def test_images_become_steps():
    assert build.build(digits_config(steps=None, images=1600)).num_steps == 100


def test_mixture_is_trained_on_and_the_data_set_evaluated(tmp_path):
    for name in range(10):
        for split in ("train", "test"):
            write_image(tmp_path / split / str(name) / "0.jpg", 20 * name)
    config = digits_config(**{"data.eval_split": "test", "data.inception_crop": False, "data.flip": False})
    config.data.mixture = (("digits", 1), (str(tmp_path), 3))
    built = build.build(config)
    assert (len(built.train_source), len(built.eval_source), built.num_classes) == (1447, 360, 10)
    assert str(tmp_path) in dry_run.describe_run(built)
    with contextlib.closing(built.make_train_batches()) as batches:
        images = np.asarray(next(batches)["image"], int).reshape(16, -1)
    assert (np.ptp(images, axis=1) < 8).sum() == 12  # those of the folder are of one colour


def test_real_labels_replace_those_of_the_validation_split(tmp_path):
    write_image(tmp_path / "image.jpg", 50)
    for label in range(1000):
        for path in (f"train/n{label:03}/1.JPEG", f"val/n{label:03}/ILSVRC2012_val_{label + 1:08}.JPEG"):
            (tmp_path / path).parent.mkdir(parents=True)
            (tmp_path / path).hardlink_to(tmp_path / "image.jpg")
    (tmp_path / "real.json").write_text(json.dumps([[0], [7, 0], [], [1], *[[]] * 49_996]))
    (tmp_path / "image.jpg").unlink()
    config = digits_config(**{"data.dataset": str(tmp_path), "data.eval_split": "val", "eval_batch_size": 1000})
    config.data.eval_labels = str(tmp_path / "real.json")
    built = build.build(config)
    state = built.init_state()
    (evaluation,) = make_evaluations(
        config, make_setup(config, built.model, built.step.objective, built.mesh), built.eval_source
    )
    found = evaluation.run(state)
    assert found["examples"] == 3  # of all other images no label is right
    assert found["accuracy"] == pytest.approx(2 / 3)  # the head starts at zero, so that class 0 is said


def test_all_data_sets_are_compared_between_processes():
    config = digits_config(**{"data.eval_split": "test", "evals.fewshot.datasets": ("digits",)})
    config.evals.fewshot.train_split = "train[:500]"
    built = build.build(config)
    evaluations = make_evaluations(
        config, make_setup(config, built.model, built.step.objective, built.mesh), built.eval_source
    )
    lines = describe_data(built.train_source, evaluations).splitlines()
    counts = ["training: 1,437", "test: 360", "fewshot/digits: 500", "fewshot/digits: 360"]
    assert [line.partition(" images")[0] for line in lines] == counts
    assert len({line.rpartition(" ")[2] for line in lines}) == 3  # the test images are the same


def test_few_shot_splits_are_compared_before_anything_is_made():
    config = digits_config(**{"evals.fewshot.datasets": ("digits",), "evals.fewshot.test_split": "train[:7]"})
    with pytest.raises(UserError, match=r"'train\[:7\]' of digits, to test on, shares 7 of its 7 examples"):
        open_evaluations(config, None)
    with config.ignore_type():
        config.evals.fewshot.test_split, config.evals.fewshot.validation_split = "test", "train[:7]"
    assert [each.name for each in open_evaluations(config, None)] == ["fewshot/digits"]  # no l2 is chosen
    config.evals.fewshot.l2 = (1.0, 2.0)
    with pytest.raises(UserError, match="to choose l2 on, shares 7 of its 7 examples"):
        open_evaluations(config, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "ViT-Tii/4"}, "Did you mean 'ViT-"),
        ({"optimizer.name": "adam"}, "Did you mean 'adamw'"),
        ({"optimizer.schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"loss": "softmx"}, "Did you mean 'softmax'"),
        ({"batch_size": 12}, "batch_size 12 is not divisible by 8"),
        ({"eval_batch_size": 12}, "eval_batch_size 12 is not divisible by 8"),
        ({"accumulation_steps": 3}, r"not divisible by 24 \(8 devices x 3"),
        ({"data.image_size": 10}, "10x10 is not divisible by the patch size 4"),
        ({"data.train_split": "trian"}, "Did you mean 'train'"),
        ({"data.dataset": "/nowhere"}, "data set '/nowhere' not found"),
        ({"data.expected_train_images": 1500}, "has 1437 images, but data.expected_train_images is 1500"),
        ({"model.num_classes": 5}, "num_classes 5 is less than the data set's 10"),
        ({"epochs": 1.0}, "set one of epochs, steps and images"),
        ({"images": 100}, "set one of epochs, steps and images as the length of the run; got steps=2, images=100"),
        ({"mixup_alpha": -1.0}, "mixup_alpha must be at least 0"),
        ({"data.resize": "bilinar"}, "Did you mean 'bilinear'"),
        ({"data.eval_resize": "lanczos"}, "unknown resize method 'lanczos'"),
        ({"data.randaugment_layers": 2, "data.randaugment_magnitude": 31.0}, "magnitude from 0 to 30"),
        ({"data.randaugment_layers": -1}, "randaugment_layers must be at least 0"),
        ({"data.randaugment_layers": 2, "data.randaugment_operations": "pytorch"}, "unknown RandAugment operations"),
        ({"data.random_crop_from": 16}, "exclude each other"),
        ({"data.num_workers": -1}, "num_workers must be at least 0"),
        ({"data.max_bad_records": -1}, "max_bad_records must be at least 0"),
        ({"data.mixture": ("digits",)}, "data.mixture takes pairs of data set and weight"),
        ({"data.mixture": (("digits", 0.0),)}, "weights of a mixture must be more than 0"),
        ({"data.train_split": "train[:0%]"}, r"split 'train\[:0%\]' of digits is empty"),
        ({"steps": None}, "set one of epochs, steps and images"),
        ({"steps": None, "epochs": 1e-9}, "the run would be 0 steps long"),
        ({"steps": None, "images": 10**15}, "62,500,000,000,000 steps long"),
        ({"optimizer.layer_decay": 0.0}, "optimizer.layer_decay must be more than 0 and at most 1"),
        ({"optimizer.warmup_steps": 2}, "warmup_steps 2 must be less than the run's 2 steps. .*warmup_steps=0"),
        ({"profile.first_step": 3}, "profile.first_step 3 is after the run's 2 steps"),
        ({"log_every_steps": 0}, "log_every_steps must be at least 1"),
        ({"checkpoint.keep": 0}, "checkpoint.keep must be at least 1"),
        ({"evals.eval_split.every_steps": -1}, "evals.eval_split.every_steps must be at least 1"),
        ({"data.prefetch": 0}, "data.prefetch must be at least 1"),
        ({"data.num_threads": -1}, "data.num_threads must be at least 1"),
        ({"model.num_heads": 0}, "model.num_heads must be at least 1"),
        ({"model.dtype": "float23"}, "model.dtype must be 'float32', 'bfloat16' or 'float16', got 'float23'"),
        ({"model.dropout_rate": 1.0}, "model.dropout_rate must be at least 0 and less than 1"),
        ({"data.crop_min_area": 2.0}, "data.crop_min_area must be more than 0 and at most 1"),
        ({"optimizer.clip_norm": 0.0}, "optimizer.clip_norm must be more than 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"batch_size": None}, "batch_size cannot be None; its default is 4096"),
        ({"data.image_size": None}, r"data\.image_size cannot be None"),
        ({"data.eval_labels": "real.json"}, r"data\.eval_labels are the labels of data\.eval_split"),
        ({"data.dataset": ""}, "data set '' not found"),
        ({"data.eval_split": "train"}, "data.eval_split must be a split of another name"),
    ],
)
@pytest.mark.usefixtures("eight_devices")
def test_mistake_in_a_config_is_one_clear_error(changes, message):
    with pytest.raises(UserError, match=message):
        build.build(digits_config(**changes))


def test_learning_rates_of_layers_decay_as_the_config_says():
    config = digits_config(**{"optimizer.layer_decay": 0.5, "optimizer.name": "sgd", "optimizer.learning_rate": 0.1})
    optimizer = build.build(config).step.optimizer
    params = {name: {"kernel": np.ones(2, np.float32)} for name in ("embedding", "head")}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["embedding"]["kernel"], 0.5 * updates["head"]["kernel"])


def test_step_is_made_as_the_config_says():
    config = digits_config(accumulation_steps=2, polyak_decay=0.9, rng="rbg", mixup_alpha=0.1, train_only=("^head/",))
    config.label_smoothing, config.sharding, config.compiler_options = (
        0.1,
        "fsdp",
        (("xla_cpu_enable_fast_math", True),),
    )
    step = build.build(config).step
    assert (step.accumulation_steps, step.polyak_decay, step.rng, step.sharding) == (2, 0.9, "rbg", "fsdp")
    assert step.objective == Classification(Loss("softmax", 0.1), Mixing(0.1, 0.0))
    assert step.trained({"head": {"bias": 1}, "cls": 2}) == {"head": {"bias": 1}, "cls": None}
    assert step.compiler_options == {"xla_cpu_enable_fast_math": True}


def test_every_field_of_a_config_is_read():
    package = ROOT / "vit_jax"
    files = [*(package / "experiment").glob("*.py"), package / "train.py", package / "evaluate.py"]
    code = "".join(path.read_text() for path in files)

    def is_read(name):
        section, _, field = name.rpartition(".")
        return re.search(rf'[."]{field}\b', code) or re.search(rf"\*\*[\w.]*config\.{section}\b", code)

    names = [name for name in flatten(base_config().to_dict()) if not name.startswith(("model.", "evals."))]
    assert [name for name in names if not is_read(name)] == []


def test_splits_with_different_classes_are_refused(tmp_path):
    for path in ("train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/emu/1.jpg"):
        write_image(tmp_path / path, 0)
    with pytest.raises(UserError, match=r"different classes.*it has 'emu'"):
        build.build(digits_config(**{"data.dataset": str(tmp_path), "data.eval_split": "test"}))


def test_evaluation_data_of_other_classes_are_refused(tmp_path):
    for name in ("cat", "dog"):
        write_image(tmp_path / "train" / name / "1.jpg", 0)
    with pytest.raises(UserError, match="to evaluate on, have different classes"):
        build.build(digits_config(**{"data.mixture": ((str(tmp_path), 1.0),), "data.eval_split": "test"}))


def test_missing_data_are_allowed_only_if_the_config_gives_their_number():
    config = digits_config(**{"data.dataset": "/nowhere", "data.expected_train_images": 1600, "model.num_classes": 7})
    built = build.build(config, allow_missing_data=True)
    assert built.train_source is None
    assert built.num_train_images == 1600
    with pytest.raises(UserError, match="not found"):
        build.build(config)
    config.data.expected_train_images = None
    with pytest.raises(UserError, match="not found"):
        build.build(config, allow_missing_data=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [((("xla_nosuch", True),), "No such compile option: 'xla_nosuch'"), (("xla_option",), "takes pairs")],
)
def test_compiler_options_that_do_not_exist_are_refused(options, message):
    config = digits_config(compiler_options=options)
    with pytest.raises(UserError, match=message):
        build.build(config)
