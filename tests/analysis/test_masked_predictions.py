"""Pictures of masked patch prediction against loops in NumPy."""

import jax
import numpy as np
import pytest

from vit_jax.analysis.masked_predictions import MaskedPredictions, draw, draw_predictions
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.objectives.masked_patches import TARGETS, MaskedPatches
from vit_jax.weights import from_params

SIZE, PATCH = 16, 8
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)
SMALL = {"num_layers": 1, "hidden_dim": 8, "mlp_dim": 8, "num_heads": 2}


@pytest.mark.parametrize("target", TARGETS)
def test_corrupted_patches_are_drawn_as_seen_and_as_predicted(target):
    objective = MaskedPatches(PATCH, target)
    arrays = {
        "corrupted": np.array([[True, True, True, False]] * 3),
        "masked": np.array([[True, False, False, False]] * 3),
        "source": np.array([[0, 3, 2, 3]] * 3),
    }
    outputs = np.random.default_rng(1).normal(size=(3, 4, objective.num_outputs)).astype(np.float32)
    found = np.asarray(draw_predictions(IMAGES, arrays, outputs, objective))
    assert found.shape == (3, 3, SIZE, SIZE, 3)
    np.testing.assert_array_equal(found[:, 0], IMAGES)
    seen = IMAGES.copy()
    seen[:, :PATCH, :PATCH] = 127
    seen[:, :PATCH, PATCH:] = IMAGES[:, PATCH:, PATCH:]
    np.testing.assert_array_equal(found[:, 1], seen)
    cells = {"mean_colour": 1, "downsized": 4, "pixels": PATCH}[target]
    side = PATCH // cells
    expected = IMAGES.copy()
    for image in range(3):
        for patch in range(3):
            values = outputs[image, patch].reshape(cells, cells, -1)
            for row in range(cells):
                for column in range(cells):
                    if target == "pixels":
                        colour = [
                            min(max(round((value + 1) * 127.5), 0), 255) for value in values[row, column].tolist()
                        ]
                    else:
                        number = int(values[row, column].argmax())
                        colour = [32 * (number // 64) + 16, 32 * (number // 8 % 8) + 16, 32 * (number % 8) + 16]
                    top, left = PATCH * (patch // 2) + side * row, PATCH * (patch % 2) + side * column
                    expected[image, top : top + side, left : left + side] = colour
    np.testing.assert_array_equal(found[:, 2], expected)


def make_weights(predict_patches=True, **attributes):
    objective = MaskedPatches(PATCH)
    attributes = SMALL | attributes | ({"predict_patches": True} if predict_patches else {})
    model = create_model("ViT-Ti/8", num_classes=objective.num_outputs, **attributes)
    params = model.init(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))["params"]
    return from_params("ViT-Ti/8", params, image_size=SIZE, **attributes)


def test_predictions_do_not_depend_on_the_batch_and_differ_between_images():
    weights = make_weights()
    found = MaskedPredictions(weights, corruption_rate=0.5, batch_size=4)(np.concatenate([IMAGES[:1]] * 8))
    again = MaskedPredictions(weights, corruption_rate=0.5, batch_size=4)(np.concatenate([IMAGES[:1]] * 8))
    np.testing.assert_array_equal(found, again)
    assert len({each[1].tobytes() for each in found}) > 4
    other = MaskedPredictions(weights, corruption_rate=0.5, batch_size=4, seed=1)(np.concatenate([IMAGES[:1]] * 8))
    assert (other[:, 1] != found[:, 1]).any()
    figure = draw(found[:3], ["a", "b", "$c"])
    assert len(figure.axes) == 12


def test_other_weights_are_refused():
    with pytest.raises(UserError, match=r"has no head that predicts patches\. Use a run of configs/masked_patches\.py"):
        MaskedPredictions(make_weights(predict_patches=False))
    with pytest.raises(UserError, match="above 0 and at most 1"):
        MaskedPredictions(make_weights(), corruption_rate=2.0)
