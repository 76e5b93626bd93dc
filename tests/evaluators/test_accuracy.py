import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import DEVICES
from tests.models.tiny import random_params
from vit_jax import sharding
from vit_jax.data.transforms import EvalTransform
from vit_jax.errors import UserError
from vit_jax.evaluators.accuracy import Accuracy
from vit_jax.evaluators.evaluator_type import EvalData, Setup
from vit_jax.models import create_model
from vit_jax.objectives.losses import Loss
from vit_jax.train_step import TrainState


class Pixels(nn.Module):
    """A model whose logits are the first pixels of the image."""

    num_classes: int

    def __call__(self, images, train=False):
        return images.reshape(len(images), -1)[:, : self.num_classes], {}


class RandomSource:
    name, split = "random", "test"
    splits, class_names, num_classes, max_labels = ("test",), None, 4, 1

    def __len__(self):
        return 21

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        return {"image": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), "label": int(rng.integers(4))}


@dataclasses.dataclass(frozen=True)
class GivenBatches(Setup):
    """Evaluates batches that the test made."""

    given: tuple = ()

    def batches(self, source, **_):
        return self.given


def measure(model, source, mesh, state, *, size=8, batch_size=8, classes=None):
    setup = Setup(model, mesh, Loss("softmax"), EvalTransform(size), batch_size=batch_size)
    return dict(Accuracy(None, EvalData(source, classes), setup).run(state))


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 16), (8, 8), (8, 32)])
def test_accuracy_and_loss_count_every_example_once(devices, batch_size):
    mesh = sharding.make_mesh(DEVICES[:devices])
    small = {"num_layers": 1, "hidden_dim": 16, "mlp_dim": 16, "num_heads": 2}
    model = create_model("ViT-Ti/4", num_classes=4, dropout_rate=0.5, **small)  # of which evaluation drops nothing
    params = random_params(model)
    params["head"]["kernel"] = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)
    params["head"]["bias"] = np.array([5, 0, 0, 0], np.float32)  # padding, whose label is 0, would count as right
    state = TrainState(step=jnp.int32(0), params=params, opt_state=(), rng=jnp.zeros(2, jnp.uint32))
    found = measure(model, RandomSource(), mesh, state, batch_size=batch_size)

    examples = [RandomSource()[i] for i in range(21)]
    images = np.stack([each["image"] for each in examples]) / 127.5 - 1
    logits = np.asarray(jax.jit(model.apply)({"params": params}, images)[0])
    labels = np.array([each["label"] for each in examples])
    assert found["examples"] == 21
    assert found["accuracy"] == pytest.approx(np.mean(np.argmax(logits, -1) == labels))
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert found["loss"] == pytest.approx(float(-log_probabilities[np.arange(21), labels].mean()), rel=1e-5)


def test_several_labels_count_once_and_images_without_labels_not_at_all():
    class SeveralLabels(RandomSource):
        max_labels = 3

        def __getitem__(self, index):
            return super().__getitem__(index) | {"label": [[], [0], [1, 2], [3, 0, 1]][index % 4]}

    mesh = sharding.make_mesh(jax.devices()[:1])
    model = create_model("ViT-Ti/4", num_classes=4, num_layers=1, hidden_dim=16, mlp_dim=16, num_heads=2)
    params = random_params(model)
    params["head"]["bias"] = np.array([5, 0, 0, 0], np.float32)  # always says 0
    state = TrainState(step=jnp.int32(0), params=params, opt_state=(), rng=jnp.zeros(2, jnp.uint32))
    found = measure(model, SeveralLabels(), mesh, state)
    assert found["examples"] == 15  # 21 images, and every fourth without a label
    assert found["accuracy"] == pytest.approx(10 / 15)


def test_masked_examples_do_not_count_for_any_label():
    mesh = sharding.make_mesh(jax.devices()[:1])
    batch = {
        "image": np.zeros((4, 2, 2, 3), np.uint8),  # all logits are equal, so that class 0 is said
        "label": np.array([0, 1, 0, 0], np.int32),
        "mask": np.array([1, 1, 0, 0], np.float32),
    }
    state = TrainState(step=jnp.int32(0), params={}, opt_state=(), rng=jnp.zeros(2, jnp.uint32))
    setup = GivenBatches(Pixels(5), mesh, Loss("softmax"), None, given=(batch, batch))
    found = dict(Accuracy(None, EvalData(), setup).run(state))
    assert found == {"accuracy": 0.5, "loss": pytest.approx(np.log(5)), "examples": 4}  # of five classes no top 5


class Breaks(nn.Module):
    """Logits of images whose first pixel is black are not finite."""

    num_classes: int = 8
    bad: float = np.nan

    def __call__(self, images, train=False):
        logits = images.reshape(len(images), -1)[:, : self.num_classes]
        return jnp.where(logits[:, :1] > -1, logits, self.bad), {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("counts", [True, False])
def test_logits_that_are_not_finite_make_accuracy_nan_unless_their_image_does_not_count(bad, counts, caplog):
    mesh = sharding.make_mesh(jax.devices()[:1])
    batch = {
        "image": np.full((4, 2, 2, 3), 255, np.uint8),
        "label": np.array([0, 1, 0, 0], np.int32),
        "mask": np.array([1, 1, 1, counts], np.float32),
    }
    batch["image"][3] = 0
    state = TrainState(step=jnp.int32(0), params={}, opt_state=(), rng=jnp.zeros(2, jnp.uint32))
    setup = GivenBatches(Breaks(bad=bad), mesh, Loss("softmax"), None, given=(batch, batch))
    found = dict(Accuracy(None, EvalData(), setup).run(state))
    if counts:
        assert np.isnan([found["accuracy"], found["top5_accuracy"], found["loss"]]).all()
        assert "2 of 8 images have logits that are not finite" in caplog.text
    else:
        assert found["accuracy"] == pytest.approx(2 / 3)
        assert np.isfinite(found["loss"])
        assert not caplog.text


def test_split_without_any_label_is_an_error():
    class NoLabels(RandomSource):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"label": -1}

    mesh = sharding.make_mesh(jax.devices()[:1])
    model = create_model("ViT-Ti/4", num_classes=4, num_layers=1, hidden_dim=16, mlp_dim=16, num_heads=2)
    params = random_params(model)
    state = TrainState(step=jnp.int32(0), params=params, opt_state=(), rng=jnp.zeros(2, jnp.uint32))
    with pytest.raises(UserError, match="none of the images to evaluate has a label"):
        measure(model, NoLabels(), mesh, state)


@pytest.mark.parametrize("classes", [None, (2, 3, 5, 7, 11, 13, 17, 19)])
def test_top_5_and_classes_to_choose_among(classes):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, 4, 4, 3), dtype=np.uint8)
    labels = rng.choice(range(20) if classes is None else classes, 100)

    class ManyClasses(RandomSource):
        num_classes = 20

        def __len__(self):
            return 100

        def __getitem__(self, index):
            return {"image": images[index], "label": int(labels[index])}

    mesh = sharding.make_mesh(DEVICES[:8])
    state = TrainState(step=jnp.int32(0), params={}, opt_state=(), rng=jnp.zeros(2, jnp.uint32))
    found = measure(Pixels(20), ManyClasses(), mesh, state, size=4, batch_size=16, classes=classes)

    logits = images.reshape(100, -1)[:, :20].astype(float)
    kept = list(range(20)) if classes is None else list(classes)
    order = np.array(kept)[np.argsort(-logits[:, kept], axis=1, kind="stable")]
    assert found["accuracy"] == pytest.approx(np.mean(order[:, 0] == labels))
    assert found["top5_accuracy"] == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(1)))
    scaled = logits[:, kept] / 127.5 - 1
    own = scaled[np.arange(100), [kept.index(label) for label in labels]]
    assert found["loss"] == pytest.approx(np.mean(np.log(np.exp(scaled).sum(1)) - own), rel=1e-5)
