"""What `build` refuses, in one process; tests/test_main.py shows how the command reports it."""

import pytest

from tests.data.test_sources import write_image
from vit_jax import experiment
from vit_jax.config import base_config
from vit_jax.errors import UserError


def digits_config(**changes):
    config = base_config()
    config.data.image_size = 8
    config.model.name = "ViT-Ti/4"
    config.model.num_layers = 1
    config.batch_size = 16
    config.steps = 2
    config.update_from_flattened_dict(changes)
    return config


def test_epochs_become_steps():
    built = experiment.build(digits_config(steps=None, epochs=3.0))
    assert built.num_steps == round(3 * 1437 / 16)


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
        ({"steps": None}, "set one of epochs, steps and images"),
        ({"steps": 0}, "0 steps long"),
        ({"optimizer.warmup_steps": 2}, "warmup_steps 2 must be less than"),
        ({"log_every_steps": 0}, "log_every_steps must be at least 1"),
        ({"checkpoint.keep": 0}, "checkpoint.keep must be at least 1"),
        ({"eval_every_steps": -1}, "eval_every_steps must be at least 1"),
        ({"data.prefetch": 0}, "data.prefetch must be at least 1"),
        ({"data.num_threads": -1}, "data.num_threads must be at least 1"),
        ({"model.num_heads": 0}, "model.num_heads must be at least 1"),
        ({"model.dtype": "float23"}, "model.dtype must be 'float32', 'bfloat16' or 'float16', got 'float23'"),
        ({"model.dropout_rate": 1.0}, "model.dropout_rate must be at least 0 and less than 1"),
        ({"data.crop_min_area": 2.0}, "data.crop_min_area must be more than 0 and at most 1"),
        ({"optimizer.clip_norm": 0.0}, "optimizer.clip_norm must be more than 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"data.eval_split": "train"}, "data.eval_split must be a split of another name"),
    ],
)
def test_mistake_in_a_config_is_one_clear_error(changes, message):
    with pytest.raises(UserError, match=message):
        experiment.build(digits_config(**changes))


def test_splits_with_different_classes_are_refused(tmp_path):
    for path in ("train/cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/emu/1.jpg"):
        write_image(tmp_path / path, 0)
    with pytest.raises(UserError, match=r"different classes.*\['dog', 'emu'\]"):
        experiment.build(digits_config(**{"data.dataset": str(tmp_path), "data.eval_split": "test"}))


def test_missing_data_are_allowed_only_where_the_config_says_how_many_there_are():
    config = digits_config(**{"data.dataset": "/nowhere", "data.expected_train_images": 1600, "model.num_classes": 7})
    built = experiment.build(config, allow_missing_data=True)
    assert built.train_source is None
    assert built.num_train_images == 1600
    with pytest.raises(UserError, match="not found"):
        experiment.build(config)
    config.data.expected_train_images = None
    with pytest.raises(UserError, match="not found"):
        experiment.build(config, allow_missing_data=True)
