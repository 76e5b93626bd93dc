"""Attention rollout, and its pictures."""

import dataclasses

import cv2
import ml_dtypes
import numpy as np
import pytest

from tests.analysis.tiny_weights import attention_of, make_pixels, make_weights
from vit_jax.analysis.attention_model import AttentionModel
from vit_jax.analysis.rollout import attention_rollout, draw_rollouts, overlay, rollout_model, seen_part
from vit_jax.errors import UserError
from vit_jax.weights import Preprocessing


def by_loops(attention):
    """The rollout of one image, from each layer's weights `[heads, tokens, tokens]`."""
    tokens = attention[0].shape[-1]
    product = np.eye(tokens)
    for of_layer in attention:
        mixing = np.zeros((tokens, tokens))
        for query in range(tokens):
            for key in range(tokens):
                mixing[query, key] = sum(head[query, key] for head in of_layer) / len(of_layer)
            mixing[query, query] += 1
            mixing[query] /= mixing[query].sum()
        product = np.array([[sum(mixing[q] * product[:, k]) for k in range(tokens)] for q in range(tokens)])
    return product


def random_attention(layers, *shape):
    return np.random.default_rng(0).dirichlet(np.full(shape[-1], 0.3), (layers, *shape[:-1]))


def test_agrees_with_a_loop_in_numpy():
    attention = random_attention(3, 2, 4, 5, 5)  # 3 layers, 2 images, 4 heads, 5 tokens
    found = attention_rollout(list(attention))
    for image in range(2):
        np.testing.assert_allclose(found[image], by_loops(attention[:, image]), atol=1e-6)
    np.testing.assert_allclose(np.sum(found, axis=-1), 1, rtol=1e-6)


def test_rows_are_normalised_also_if_rounding_left_them_at_another_sum():
    attention = [layer.astype(ml_dtypes.bfloat16) for layer in random_attention(2, 1, 2, 9, 9)]
    np.testing.assert_allclose(np.sum(attention_rollout(attention), axis=-1), 1, rtol=1e-6)


def test_no_layer_is_an_error():
    with pytest.raises(UserError, match="at least one layer"):
        attention_rollout([])


def pooled(pool, rollout, weights, encoded):
    """The mask of one image, `[rows, columns]`, without our code."""
    if pool == "cls":
        return rollout[0, 1:].reshape(2, 3)
    if pool == "gap":
        return rollout.mean(axis=0).reshape(2, 3)
    head = weights.params["MAPHead_0"]
    of, total = head["MultiHeadDotProductAttention_0"], 0.0
    for index in range(2):
        query = head["probe"][0, 0] @ of["query"]["kernel"][:, index] + of["query"]["bias"][index]
        keys = encoded @ of["key"]["kernel"][:, index] + of["key"]["bias"][index]
        exponentials = np.exp(keys @ query / np.sqrt(8))
        total = total + exponentials / exponentials.sum() @ rollout / 2
    return total.reshape(2, 3)


@pytest.mark.parametrize("pool", ["cls", "gap", "map"])
def test_mask_of_each_kind_of_representation(pool):
    weights = make_weights(pool=pool, num_layers=2 if pool == "cls" else 1)
    pixels = make_pixels(3, 8, 12)
    found = rollout_model(weights, batch_size=2)(pixels)  # the second batch is padded
    attention, out = attention_of(weights, pixels)
    assert found.shape == (3, 2, 3)
    for image in range(3):
        rollout = by_loops([layer[image] for layer in attention])
        expected = pooled(pool, rollout, weights, np.float64(out["encoded"][image]))
        np.testing.assert_allclose(found[image], expected, atol=1e-5)


def test_another_size_and_half_precision():
    weights = make_weights(dtype=ml_dtypes.bfloat16)
    model = rollout_model(weights, batch_size=1, image_size=(16, 8), dtype="bfloat16")
    found = model(make_pixels(1, 16, 8))
    assert found.shape == (1, 4, 2)
    assert 0 < found.sum() < 1
    assert found.min() > 0


def test_batches_are_smaller_if_a_layers_weights_are_large():
    def measure(attention, _):
        return attention[0]

    weights = make_weights(size=(8, 8), num_layers=1, pool="gap", position_embedding="sincos_2d")
    model = AttentionModel(weights, measure, batch_size=1000, image_size=(256, 256))
    assert 4 * 2 * (64 * 64) ** 2 * model.batch_size / 2 <= 2**29  # on each of two devices
    assert AttentionModel(weights, measure, batch_size=64).batch_size == 64


def test_overlay_darkens_where_the_mask_is_small():
    image = np.full((40, 60, 3), 200, np.uint8)
    mask = np.zeros((4, 6), np.float32)
    mask[3, 0] = 0.3
    shown = overlay(image, mask)
    assert shown.shape == image.shape
    assert shown[39, 0].tolist() == [200, 200, 200]
    assert shown[0, 59].tolist() == [0, 0, 0]
    assert np.unravel_index(shown[..., 0].argmax(), (40, 60)) == (39, 0)
    np.testing.assert_array_equal(overlay(image, np.full((4, 6), 0.1, np.float32)), image)


def test_drawing_shows_each_image_beside_its_mask():
    images = [make_pixels(20, 30), make_pixels(30, 20), *[make_pixels(9, 9)] * 3]
    masks = [np.random.default_rng(i).uniform(size=(2, 3)) for i in range(5)]
    figure = draw_rollouts(images, masks, [f"name {i}" for i in range(5)])
    axes = [axis for axis in figure.axes if axis.images]
    assert len(axes) == 10
    for number, (left, right) in enumerate(zip(axes[::2], axes[1::2], strict=True)):
        assert left.get_title() == ("input\n" if number < 4 else "") + f"name {number}"
        assert right.get_title() == ("attention\n" if number < 4 else "")
        np.testing.assert_array_equal(left.images[0].get_array(), images[number])
        np.testing.assert_array_equal(right.images[0].get_array(), overlay(images[number], masks[number]))


def test_drawn_images_have_their_own_proportions_and_show_what_the_model_sees():
    image = make_pixels(600, 1200)
    square = Preprocessing(image_size=(32, 32))
    assert seen_part(image, square).shape == (224, 448, 3)
    assert seen_part(make_pixels(20, 10), square).shape == (224, 112, 3)
    crop = dataclasses.replace(square, resize="crop", crop_fraction=0.5)
    seen = seen_part(cv2.resize(np.uint8([[[0] * 3, [255] * 3]]), (1200, 600), interpolation=cv2.INTER_NEAREST), crop)
    assert seen.shape == (224, 224, 3)
    assert (seen[:, 0] == 0).all()
    assert (seen[:, -1] == 255).all()
    assert seen_part(image, dataclasses.replace(square, resize="none")) is image
    assert seen_part(make_pixels(1, 5000), dataclasses.replace(crop, image_size=(1, 1))).shape == (1, 1, 3)
