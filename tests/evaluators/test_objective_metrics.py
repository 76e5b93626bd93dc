"""Evaluation of a run's objective on images that it is not trained on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import DEVICES
from tests.evaluators.test_accuracy import Pixels, RandomSource
from vit_jax import sharding
from vit_jax.data.transforms import EvalTransform
from vit_jax.errors import UserError
from vit_jax.evaluators.evaluator_type import EvalData, Setup
from vit_jax.evaluators.objective_metrics import ObjectiveMetrics
from vit_jax.objectives import Examples
from vit_jax.objectives.losses import Loss
from vit_jax.train_step import TrainState

STATE = TrainState(step=jnp.int32(0), params={}, opt_state=(), rng=jnp.zeros(2, jnp.uint32))


@dataclasses.dataclass(frozen=True)
class Brightness:
    """The first pixel as loss, a random share of it as metric; images whose first pixel is small weigh half."""

    weight: float = 1.0
    needs_labels = False

    def prepare(self, batch, rng):
        first = batch["image"][:, 0, 0, 0] / 255
        arrays = {"image": batch["image"], "share": jax.random.uniform(rng, first.shape)}
        return Examples(arrays, self.weight * jnp.where(first < 0.5, 0.5, 1.0))

    def losses(self, apply, examples):
        outputs, _ = apply(examples.arrays["image"])
        return outputs[:, 0] + 3, {"shared": examples.arrays["share"]}


def measure(objective, devices=1, batch_size=8):
    setup = Setup(
        Pixels(4), sharding.make_mesh(DEVICES[:devices]), Loss("softmax"), EvalTransform(8), objective=objective,
        batch_size=batch_size,
    )  # fmt: skip
    return dict(ObjectiveMetrics(None, EvalData(RandomSource()), setup).run(STATE))


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 16), (8, 8)])
def test_weighted_means_count_every_example_once(devices, batch_size):
    found = measure(Brightness(), devices, batch_size)
    first = np.array([RandomSource()[index]["image"][0, 0, 0] / 255 for index in range(21)])
    weight = np.where(first < 0.5, 0.5, 1.0)
    assert found["loss"] == pytest.approx((weight * (2 * first + 2)).sum() / weight.sum(), rel=1e-5)
    assert found["examples"] == int(weight.sum())


def test_random_choices_are_those_of_the_evaluation_before_and_differ_between_batches():
    found = measure(Brightness())
    assert measure(Brightness()) == found
    assert measure(Brightness(), devices=8) == {name: pytest.approx(value, rel=1e-5) for name, value in found.items()}
    halves = {measure(Brightness(), batch_size=size)["shared"] for size in (8, 16)}
    assert len(halves) == 2
    assert all(0.2 < each < 0.8 for each in halves)


def test_nothing_to_count_is_an_error():
    with pytest.raises(UserError, match="none of the images to evaluate counts"):
        measure(Brightness(weight=0.0))
