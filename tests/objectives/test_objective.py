"""Objectives other than classification, in the step, the loop and the planner."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import DEVICES
from vit_jax import sharding
from vit_jax.config import base_config
from vit_jax.errors import UserError
from vit_jax.experiment import build, objective
from vit_jax.objectives import Examples
from vit_jax.optimizers import make_optimizer
from vit_jax.plan import worker
from vit_jax.train import train
from vit_jax.train_step import TrainStep

PATCH = 4


@dataclasses.dataclass(frozen=True)
class MaskedColour:
    """Predicts the mean colour of one patch of each image, which the model does not see."""

    needs_labels = False

    def prepare(self, batch, rng):
        count, size = batch["image"].shape[:2]
        number = jax.random.randint(rng, (count, 2, 1), 0, size // PATCH)
        rows, columns = jnp.moveaxis(jnp.arange(size) // PATCH == number, 1, 0)
        masked = rows[:, :, None, None] & columns[:, None, :, None]
        return Examples({"image": batch["image"], "masked": masked}, jnp.ones(count))

    def losses(self, apply, examples):
        images, masked = examples.arrays["image"], examples.arrays["masked"]
        outputs, _ = apply(jnp.where(masked, 127.5, images))
        colours = (images * masked).sum(axis=(1, 2)) / PATCH**2 / 255
        errors = jnp.abs(outputs[:, :3] - colours)
        return (errors**2).sum(axis=-1), {"colour_error": errors.mean(axis=-1)}


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Learns the teacher's probabilities, whose logits the batch has."""

    needs_labels = False

    def prepare(self, batch, rng):
        return Examples(dict(batch), jnp.ones(len(batch["image"])))

    def losses(self, apply, examples):
        logits, _ = apply(examples.arrays["image"])
        teacher = examples.arrays["teacher_logits"]
        losses = -(jax.nn.softmax(teacher) * jax.nn.log_softmax(logits)).sum(axis=-1)
        return losses, {"agreement": jnp.float32(logits.argmax(-1) == teacher.argmax(-1))}


class Linear(nn.Module):
    """A small model, which compiles fast."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dropout(0.0, deterministic=not train)(images.reshape(len(images), -1))
        return nn.Dense(3, name="head")(x), {}


def make_step(objective, devices=1, **options):
    mesh = sharding.make_mesh(DEVICES[:devices])
    return TrainStep(Linear(), make_optimizer("sgd", 0.01), objective, image_size=8, mesh=mesh, **options)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    shades = rng.integers(0, 256, (16, 1, 1, 3))
    images = np.clip(shades + rng.integers(-20, 20, (16, 8, 8, 3)), 0, 255).astype(np.uint8)
    teacher_logits = np.float32(shades[:, 0, 0]) / 50
    return {"image": images, "label": np.zeros(16, np.int32), "teacher_logits": teacher_logits}


@pytest.mark.parametrize(("objective", "metric"), [(MaskedColour(), "colour_error"), (Distillation(), "agreement")])
def test_step_learns_any_objective_on_any_devices_and_in_parts(objective, metric):
    histories = []
    for devices, parts in ((1, 1), (4, 1), (1, 4)):
        step, history = make_step(objective, devices, accumulation_steps=parts), []
        state = step.init(seed=0)
        for number in range(20):
            state, metrics = step(state, make_batch(number % 4))
            history.append([float(metrics[name]) for name in ("loss", metric, "grad_norm")])
        histories.append(history)
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-4)
    np.testing.assert_allclose(histories[2], histories[0], rtol=1e-4)
    first, last = np.mean(histories[0][:4], axis=0), np.mean(histories[0][-4:], axis=0)
    assert last[0] < 0.8 * first[0]
    assert (last[1] < first[1]) == (metric == "colour_error")
    assert set(metrics) == {"loss", "grad_norm", metric}  # no schedule, no learning rate


def test_weights_of_examples_decide_the_means():
    class Weighted(Distillation):
        def prepare(self, batch, rng):
            return Examples(dict(batch), jnp.arange(16.0) // 8)

    halves = {name: array[8:] for name, array in make_batch().items()}
    whole, half = make_step(Weighted()), make_step(Distillation())
    _, found = whole(whole.init(seed=0), make_batch())
    _, expected = half(half.init(seed=0), halves)
    assert {name: pytest.approx(float(value), rel=1e-6) for name, value in expected.items()} == found


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(
        objective.OBJECTIVES, "masked_colour", (MaskedColour, lambda *_: (MaskedColour(), {"num_classes": 3}))
    )
    config = base_config()
    config.objective = "masked_colour"
    config.data.image_size = 8
    config.model.name = "ViT-Ti/4"
    config.model.num_layers, config.model.hidden_dim, config.model.mlp_dim, config.model.num_heads = 1, 16, 16, 2
    config.batch_size, config.steps, config.log_every_steps = 16, 4, 2
    return config


def test_loop_trains_an_objective_that_the_config_names(config, tmp_path):
    summary = train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [0 < row["train/colour_error"] < 1 for row in rows if "train/loss" in row] == [True, True]
    assert "train/accuracy" not in summary


def test_planner_lowers_an_objective_with_the_model_that_it_needs(config):
    experiment = build.build(config, devices=jax.devices()[:2])
    assert experiment.step.abstract_state.params["head"]["bias"].shape == (3,)
    lowered = worker.lower(experiment, "train")
    assert set(lowered.out_info[1]) == {"loss", "grad_norm", "learning_rate", "colour_error"}
    request = {"config": json.loads(config.to_json()), "num_devices": 2}
    assert worker.estimate_by_formula(request)["status"] == "formula"


def test_unknown_objective_is_refused_with_the_nearest(config):
    config.objective = "clasification"
    with pytest.raises(UserError, match="Did you mean 'classification'"):
        build.build(config)
