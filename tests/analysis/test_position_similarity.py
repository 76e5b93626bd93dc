"""Cosine similarity of position embeddings."""

import math

import numpy as np
import pytest

from tests.analysis.tiny_weights import make_weights
from vit_jax.analysis.position_similarity import cosine_similarity, draw_similarities, position_similarities
from vit_jax.errors import UserError

ROWS, COLUMNS = 2, 3


def cosine(a, b):
    a, b = np.ravel(a).tolist(), np.ravel(b).tolist()
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(x * x for x in b))


def by_loops(embedding_at):
    """`[rows, columns, rows, columns]` from a function of row and column."""
    result = np.empty((ROWS, COLUMNS, ROWS, COLUMNS))
    for index in np.ndindex(result.shape):
        result[index] = cosine(embedding_at(*index[:2]), embedding_at(*index[2:]))
    return result


def check(weights, embedding_at_by_title):
    found = position_similarities(weights)
    assert list(found) == list(embedding_at_by_title)
    for title, embedding_at in embedding_at_by_title.items():
        np.testing.assert_allclose(found[title], by_loops(embedding_at), atol=1e-6)


@pytest.mark.parametrize("pool", ["cls", "gap"])
@pytest.mark.parametrize("place", ["stem", "shared"])
def test_1d_embeddings_of_the_patches_without_the_class_tokens(pool, place):
    weights = make_weights(pool=pool, position_embedding_at=place)
    embedding = weights.params["Transformer"]["posembed_input"]["pos_embedding"][0]
    assert len(embedding) == 6 + (pool == "cls")
    check(weights, {"": lambda row, column: embedding[(pool == "cls") + COLUMNS * row + column]})


def test_2d_embeddings_are_x_and_y_together():
    weights = make_weights(position_embedding="learned_2d")
    of = weights.params["Transformer"]["posembed_input"]
    parts = of["pos_embedding_x"], of["pos_embedding_y"]
    check(weights, {"": lambda row, column: np.concatenate([parts[0][column], parts[1][row]])})


def test_each_layers_own_embeddings_in_the_order_of_the_layers():
    weights = make_weights(position_embedding_at="every_layer", num_layers=11)

    def of_layer(layer):
        embedding = weights.params["Transformer"][f"encoderblock_{layer}"]["posembed"]["pos_embedding"][0]
        return lambda row, column: embedding[1 + COLUMNS * row + column]

    check(weights, {f"layer {layer}": of_layer(layer) for layer in range(11)})


def test_sines_and_cosines_are_computed():
    def embedding_at(row, column):
        frequencies = [10_000 ** -(i / 3) for i in range(4)]
        return [f(at * w) for at in (column, row) for f in (math.sin, math.cos) for w in frequencies]

    check(make_weights(position_embedding="sincos_2d"), {"": embedding_at})


def test_axial_vit():
    weights = make_weights("Axial-ViT-Ti/4")
    embedding = weights.params["posembed_input"]["pos_embedding"][0]
    check(weights, {"": lambda row, column: embedding[COLUMNS * row + column]})


@pytest.mark.parametrize("place", ["stem", "shared"])
def test_relative_embeddings_are_compared_with_that_of_offset_0(place):
    weights = make_weights(position_embedding="relative", position_embedding_at=place)
    transformer = weights.params["Transformer"]
    blocks = [transformer[f"encoderblock_{layer}"]["MultiHeadDotProductAttention_1"] for layer in range(2)]
    tables = {"": transformer} if place == "shared" else {f"layer {i}": block for i, block in enumerate(blocks)}
    found = position_similarities(weights)
    assert list(found) == list(tables)
    for title, module in tables.items():
        table = module["relative_embedding"]
        of_offset = dict(zip(range(6, -7, -1), table, strict=True))  # p_q - p_k, of 7 tokens
        for row, column, key_row, key_column in np.ndindex(ROWS, COLUMNS, ROWS, COLUMNS):
            offset = (COLUMNS * row + column) - (COLUMNS * key_row + key_column)
            expected = cosine(of_offset[offset], of_offset[0])
            assert found[title][row, column, key_row, key_column] == pytest.approx(expected, abs=1e-6)


def test_embeddings_of_zeros_are_similar_to_none():
    embeddings = np.zeros((1, 2, 3), np.float32)
    embeddings[0, 1] = 1
    np.testing.assert_allclose(cosine_similarity(embeddings)[0, :, 0], [[0, 0], [0, 1]], atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"position_embedding": "none"}, "has no position embeddings. Use weights of a model with them"),
        ({"name": "R50x1", "num_classes": 0}, "is a ResNet, which has no position embeddings"),
    ],
)
def test_models_without_position_embeddings_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        position_similarities(make_weights(**weights))


def test_the_tile_of_a_patch_is_at_its_row_and_column():
    similarity = np.random.default_rng(0).uniform(-1, 1, (ROWS, COLUMNS, ROWS, COLUMNS))
    figure = draw_similarities({"first": similarity, "second": -similarity})
    assert [axis.get_title() for axis in figure.axes[:2]] == ["first", "second"]
    for axis, expected in zip(figure.axes, (similarity, -similarity), strict=False):
        shown = axis.images[0].get_array()
        assert shown.shape == (5, 11)
        for row, column in np.ndindex(ROWS, COLUMNS):
            tile = shown[3 * row : 3 * row + 2, 4 * column : 4 * column + 3]
            np.testing.assert_allclose(tile, expected[row, column], atol=1e-6)


def test_many_layers_stay_one_picture_of_bounded_size():
    similarity = np.zeros((37, 1, 37, 1), np.float32)
    figure = draw_similarities({f"layer {layer}": similarity for layer in range(12)})
    assert max(figure.get_size_inches()) < 40
    assert sum(bool(axis.images) for axis in figure.axes) == 12
