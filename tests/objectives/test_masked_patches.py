"""Masked patch prediction against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import DEVICES
from vit_jax import sharding
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.objectives.masked_patches import TARGETS, MaskedPatches, patches_of
from vit_jax.optimizers import make_optimizer
from vit_jax.train_step import TrainStep

SMALL = {"num_layers": 2, "hidden_dim": 16, "mlp_dim": 32, "num_heads": 2}
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 16, 24, 3)).astype(np.uint8)


def corruption(objective, count=64, size=32, seed=0):
    batch = {"image": np.zeros((count, size, size, 3), np.uint8), "label": np.full(count, -1)}
    return {name: np.asarray(array) for name, array in objective.prepare(batch, jax.random.key(seed)).arrays.items()}


def test_patches_are_cut_row_by_row():
    found = patches_of(jnp.asarray(IMAGES), 8)
    assert found.shape == (8, 6, 192)
    np.testing.assert_array_equal(found[1, 4].reshape(8, 8, 3), IMAGES[1, 8:16, 8:16])


@pytest.mark.parametrize(("target", "cells"), [("mean_colour", 1), ("downsized", 4)])
def test_colours_have_three_bits_a_channel(target, cells):
    found = MaskedPatches(8, target).targets(jnp.asarray(IMAGES))
    side = 8 // cells
    for patch in range(6):
        row, column = 8 * (patch // 3), 8 * (patch % 3)
        for cell in range(cells**2):
            top, left = row + side * (cell // cells), column + side * (cell % cells)
            mean = IMAGES[3, top : top + side, left : left + side].astype(np.float64).mean(axis=(0, 1))
            red, green, blue = np.floor(mean / 32).astype(int)
            assert found[3, patch, cell] == 64 * red + 8 * green + blue


def test_black_and_white_are_the_first_and_the_last_colour():
    objective = MaskedPatches(4)
    assert set(np.ravel(objective.targets(jnp.zeros((1, 8, 8, 3), jnp.uint8)))) == {0}
    assert set(np.ravel(objective.targets(jnp.full((1, 8, 8, 3), 255, jnp.uint8)))) == {511}


@pytest.mark.parametrize("rate", [0.15, 0.5, 1.0])
def test_the_same_share_of_every_image_is_corrupted_in_the_papers_three_ways(rate):
    drawn = corruption(MaskedPatches(2, corruption_rate=rate))
    number = round(rate * 256)
    np.testing.assert_array_equal(drawn["corrupted"].sum(axis=1), number)
    replaced = drawn["source"] != np.arange(256)
    assert not (drawn["masked"] | replaced)[~drawn["corrupted"]].any()
    assert not (drawn["masked"] & replaced).any()
    total = 64 * number
    for share, found in ((0.8, drawn["masked"]), (0.1, replaced)):
        assert abs(found.sum() / total - share) < 4 * np.sqrt(share * (1 - share) / total)
    assert drawn["source"].min() >= 0
    assert drawn["source"].max() < 256


def test_another_patch_is_not_the_patch_itself():
    drawn = corruption(MaskedPatches(16), count=2000)
    replaced = drawn["source"] != np.arange(4)
    assert abs(replaced.sum() / 4000 - 0.1) < 4 * np.sqrt(0.09 / 4000)


def test_images_that_cannot_be_read_do_not_count():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[1, 7, 7, 2] = 1
    assert MaskedPatches(4).prepare({"image": images}, jax.random.key(0)).weight.tolist() == [0, 1, 0]


def test_every_place_and_every_other_patch_is_drawn_and_each_step_draws_anew():
    drawn = corruption(MaskedPatches(8), count=2000)
    assert np.abs(drawn["corrupted"].mean(axis=0) - 0.5).max() < 0.06
    replaced = drawn["source"][drawn["source"] != np.arange(16)]
    assert np.abs(np.bincount(replaced, minlength=16) / len(replaced) - 1 / 16).max() < 0.03
    assert (corruption(MaskedPatches(8), seed=1)["corrupted"] != drawn["corrupted"][:64]).any()


def test_the_model_sees_the_mask_another_patch_or_the_patch_itself():
    model = create_model(
        "ViT-Ti/8", num_classes=5, pool="cls", predict_patches=True, position_embedding="none", **SMALL
    )
    images = jnp.asarray(IMAGES[:2], jnp.float32) / 127.5 - 1
    params = model.init(jax.random.key(0), images)["params"]
    masked = jnp.array([[True, False, False, False, False, False]] * 2)
    source = jnp.array([[0, 5, 2, 3, 4, 5]] * 2)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), (16, 5))
    logits, clean = model.apply({"params": params}, images)
    np.testing.assert_allclose(logits, clean["encoded"][:, 1:] @ params["head"]["kernel"], rtol=1e-4, atol=1e-5)
    _, found = model.apply({"params": params}, images, corruption=(masked, source))
    expected = np.array(clean["encoder_input"])
    expected[:, 2] = expected[:, 6]
    expected[:, 1] = params["mask_embedding"][0]
    np.testing.assert_array_equal(found["encoder_input"], expected)
    assert found["pre_logits"].shape == (2, 16)  # the class token, for few-shot evaluation


@pytest.mark.parametrize("target", TARGETS)
def test_losses_are_means_over_corrupted_patches(target):
    objective = MaskedPatches(8, target)
    examples = objective.prepare({"image": jnp.asarray(IMAGES)}, jax.random.key(0))
    outputs = np.random.default_rng(1).normal(size=(8, 6, objective.num_outputs)).astype(np.float32)

    def apply(images, corruption):
        assert corruption == (examples.arrays["masked"], examples.arrays["source"])
        return jnp.asarray(outputs), {}

    losses, metrics = objective.losses(apply, examples)
    targets = np.asarray(objective.targets(jnp.asarray(IMAGES)))
    for image in range(8):
        each, right = [], []
        for patch in np.flatnonzero(examples.arrays["corrupted"][image]):
            if target == "pixels":
                each.append(np.mean((outputs[image, patch].astype(np.float64) - targets[image, patch]) ** 2))
                continue
            for logits, colour in zip(outputs[image, patch].reshape(-1, 512), targets[image, patch], strict=True):
                each.append(np.log(np.exp(logits.astype(np.float64)).sum()) - logits[colour])
                right.append(logits.argmax() == colour)
        np.testing.assert_allclose(losses[image], np.mean(each), rtol=1e-5)
        assert not right or metrics["accuracy"][image] == pytest.approx(np.mean(right))
    assert set(metrics) == (set() if target == "pixels" else {"accuracy"})


def test_training_predicts_patches_and_devices_and_parts_change_nothing():
    shades = np.random.default_rng(0).integers(0, 8, (16, 1, 1, 3)) * 32 + 16
    batch = {"image": np.broadcast_to(shades, (16, 16, 16, 3)).astype(np.uint8), "label": np.full(16, -1, np.int32)}
    objective = MaskedPatches(4)
    model = create_model("ViT-Ti/4", num_classes=objective.num_outputs, pool="gap", predict_patches=True, **SMALL)
    histories = []
    for devices, parts in ((1, 1), (4, 4)):
        mesh = sharding.make_mesh(DEVICES[:devices])
        optimizer = make_optimizer("adamw", 0.01)
        step = TrainStep(model, optimizer, objective, image_size=16, mesh=mesh, accumulation_steps=parts)
        state, history = step.init(seed=0), []
        for _ in range(30 if (devices, parts) == (1, 1) else 3):
            state, metrics = step(state, batch)
            history.append([float(metrics["loss"]), float(metrics["accuracy"])])
        histories.append(history)
    assert histories[0][0][0] == pytest.approx(np.log(512), rel=1e-5)  # the head begins at zero
    assert histories[0][-1][0] < 0.5 * histories[0][0][0]
    for history in histories[1:]:
        # Of accuracies only that of the first step: logits so near to each other may change places.
        np.testing.assert_allclose(history[0], histories[0][0], rtol=1e-4)
        np.testing.assert_allclose([loss for loss, _ in history], [loss for loss, _ in histories[0][:3]], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corruption_rate": -0.1}, "above 0 and at most 1"),
        ({"corruption_rate": 1.1}, "above 0 and at most 1"),
        ({"corruption_rate": float("nan")}, "above 0 and at most 1"),
        ({"corruption_rate": 0.0}, "above 0 and at most 1"),
        ({"target": "mean_color"}, "Did you mean 'mean_colour'"),
        ({"target": "downsized", "patch_size": 14}, "multiple of 4"),
    ],
)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        MaskedPatches(**({"patch_size": 16} | arguments))
