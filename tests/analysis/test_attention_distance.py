"""Mean attention distance in pixels."""

import math

import numpy as np
import pytest

from tests.analysis.tiny_weights import attention_of, make_pixels, make_weights
from vit_jax.analysis.attention_distance import attention_distance, distance_model, draw_distances
from vit_jax.errors import UserError


def by_brute_force(attention, rows, columns, pixels, num_prefix):
    """The distance of one head and image from its weights `[tokens, tokens]`, token by token."""
    total = 0.0
    for query in range(rows * columns):
        for key in range(rows * columns):
            dy, dx = query // columns - key // columns, query % columns - key % columns
            total += attention[num_prefix + query, num_prefix + key] * pixels * math.sqrt(dy * dy + dx * dx)
    return total / (rows * columns)


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_agrees_with_brute_force(num_prefix):
    rows, columns = 3, 4
    tokens = num_prefix + rows * columns
    attention = np.random.default_rng(0).dirichlet(np.ones(tokens), (2, 3, tokens))
    found = attention_distance(attention, (rows, columns), 16, num_prefix)
    assert found.shape == (2, 3)
    for image, head in np.ndindex(2, 3):
        expected = by_brute_force(attention[image, head], rows, columns, 16, num_prefix)
        assert found[image, head] == pytest.approx(expected, rel=1e-5)


def test_closed_forms():
    itself = np.eye(4)
    other_column = np.eye(4)[[1, 0, 3, 2]]
    across = np.eye(4)[[3, 2, 1, 0]]
    found = attention_distance(np.stack([itself, other_column, across]), (2, 2), 32, 0)
    np.testing.assert_allclose(found, [0, 32, 32 * math.sqrt(2)], rtol=1e-6)


def test_attention_to_the_class_token_counts_as_distance_0_and_its_own_does_not_count():
    attention = np.zeros((3, 3))
    attention[0] = [0, 1, 0]
    attention[1:] = [[0.5, 0, 0.5], [0.5, 0.5, 0]]
    assert float(attention_distance(attention, (1, 2), 10, 1)) == pytest.approx(5)


def test_a_hybrids_tokens_are_as_wide_as_the_resnet_makes_them():
    weights = make_weights("R+Ti/16", size=(64, 96), num_classes=0)  # tokens of 32 x 32 pixels
    pixels = make_pixels(2, 64, 96)
    found = distance_model(weights, batch_size=2)(pixels)
    assert found.shape == (2, 2, 2)
    attention, _ = attention_of(weights, pixels)
    for image, layer, head in np.ndindex(found.shape):
        expected = by_brute_force(attention[layer][image, head], 2, 3, 32, 1)
        assert found[image, layer, head] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("R50x1", "is a ResNet, which has no attention weights. Use weights of a ViT or a hybrid"),
        ("Axial-ViT-Ti/4", "attends within rows and columns, not from each patch to all others"),
    ],
)
def test_models_without_attention_between_all_patches_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        distance_model(make_weights(name, num_classes=0))


def test_drawing_has_a_dot_for_each_head_and_layer():
    distances = {"a": np.arange(15.0).reshape(3, 5), "b": np.ones((2, 4))}
    figure = draw_distances(distances)
    for axis, (title, expected) in zip(figure.axes, distances.items(), strict=True):
        assert axis.get_title() == title
        assert len(axis.lines) == expected.shape[1]
        for head, line in enumerate(axis.lines):
            np.testing.assert_array_equal(line.get_xdata(), np.arange(len(expected)))
            np.testing.assert_array_equal(line.get_ydata(), expected[:, head])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "head 1",
        "head 2",
        "head 3",
        "...",
    ]
