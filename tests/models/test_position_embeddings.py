import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage

from tests.models import reference
from tests.models.tiny import apply, make_images, param_shapes, random_params, shapes_by_path, tiny
from vit_jax.errors import UserError
from vit_jax.models.layers import stack_layers
from vit_jax.models.position_embeddings import (
    KINDS,
    PLACES,
    grid_of,
    interpolate_position_embedding,
    interpolation_matrix,
    sincos_2d,
)

IMAGE_SIZE = (8, 12)
GRID = (2, 3)  # of patches of 4x4 pixels
TABLES = [(kind, place) for kind in KINDS for place in PLACES if kind != "none"] + [("none", "stem")]


def position_shapes(**attributes):
    """Names and shapes of all parameters that the model has more than one without positions."""
    without = shapes_by_path(param_shapes(tiny(position_embedding="none", **attributes), *IMAGE_SIZE))

    def of(kind, place):
        model = tiny(position_embedding=kind, position_embedding_at=place, **attributes)
        shapes = shapes_by_path(param_shapes(model, *IMAGE_SIZE))
        assert without.items() <= shapes.items()
        return {name.removeprefix("Transformer/"): shapes[name] for name in shapes.keys() - without.keys()}

    return of


TWO_D = {"pos_embedding_x": (3, 8), "pos_embedding_y": (2, 8)}
OF_TWO_BLOCKS = {
    ("learned_1d", "stem"): {"posembed_input/pos_embedding": (1, 7, 16)},
    ("learned_1d", "shared"): {"posembed_input/pos_embedding": (1, 7, 16)},
    ("learned_1d", "every_layer"): {f"encoderblock_{layer}/posembed/pos_embedding": (1, 7, 16) for layer in range(2)},
    ("learned_2d", "stem"): {f"posembed_input/{name}": shape for name, shape in TWO_D.items()},
    ("learned_2d", "shared"): {f"posembed_input/{name}": shape for name, shape in TWO_D.items()},
    ("learned_2d", "every_layer"): {
        f"encoderblock_{layer}/posembed/{name}": shape for layer in range(2) for name, shape in TWO_D.items()
    },
    ("relative", "shared"): {"relative_embedding": (13, 2, 8)},
    **{
        ("relative", place): {
            f"encoderblock_{layer}/MultiHeadDotProductAttention_1/relative_embedding": (13, 2, 8) for layer in range(2)
        }
        for place in ("stem", "every_layer")
    },
    **{("sincos_2d", place): {} for place in PLACES},
    **{("none", place): {} for place in PLACES},
}


def test_each_kind_and_place_has_the_parameters_of_its_definition():
    found = position_shapes()
    for (kind, place), expected in OF_TWO_BLOCKS.items():
        assert found(kind, place) == expected, (kind, place)


def test_without_class_token_there_is_no_embedding_for_it():
    found = position_shapes(pool="gap")
    assert found("learned_1d", "stem") == {"posembed_input/pos_embedding": (1, 6, 16)}
    assert found("relative", "shared") == {"relative_embedding": (11, 2, 8)}
    assert found("learned_2d", "stem") == OF_TWO_BLOCKS["learned_2d", "stem"]


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(("kind", "place"), TABLES)
def test_encoder_matches_the_definition(kind, place, scan_layers):
    model = tiny(position_embedding=kind, position_embedding_at=place)
    params = random_params(model, *IMAGE_SIZE)
    images = make_images(2, *IMAGE_SIZE, 3)
    if scan_layers:
        _, out = apply(model.clone(scan_layers=True), stack_layers(params), images)
    else:
        _, out = apply(model, params, images)
    patches = np.float64(out["patch_embeddings"]).reshape(2, 6, 16)
    tokens = np.concatenate([np.repeat(params["cls"], 2, axis=0), patches], axis=1)
    expected = reference.encoder(tokens, params["Transformer"], kind=kind, place=place, grid=GRID, num_prefix_tokens=1)
    np.testing.assert_allclose(out["encoded"], expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["learned_2d", "sincos_2d"])
def test_two_dimensional_kinds_do_not_change_the_class_token(kind):
    model = tiny(position_embedding=kind)
    params = random_params(model)
    _, out = apply(model, params, make_images(2, 8, 8, 3))
    np.testing.assert_allclose(out["encoder_input"][:, 0], np.repeat(params["cls"][0], 2, axis=0), atol=1e-7)


def test_learned_2d_starts_with_the_embedding_of_the_column():
    model = tiny(position_embedding="learned_2d", pool="gap")
    params = random_params(model, *IMAGE_SIZE)
    _, out = apply(model, params, make_images(1, *IMAGE_SIZE, 3))
    added = np.asarray(out["encoder_input"]).reshape(*GRID, 16) - np.asarray(out["patch_embeddings"])[0]
    embedding = params["Transformer"]["posembed_input"]
    np.testing.assert_allclose(added[1, 2, :8], embedding["pos_embedding_x"][2], atol=1e-6)
    np.testing.assert_allclose(added[1, 2, 8:], embedding["pos_embedding_y"][1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_only_without_positions_do_permuted_patches_give_permuted_tokens(kind):
    model = tiny(position_embedding=kind)
    params = random_params(model)
    patches = make_images(1, 4, 4, 4, 3).reshape(4, 4, 4, 3)
    order = [2, 0, 3, 1]

    def assemble(patches):
        return patches.reshape(2, 2, 4, 4, 3).transpose(0, 2, 1, 3, 4).reshape(8, 8, 3)

    _, out = apply(model, params, np.stack([assemble(patches), assemble(patches[order])]))
    encoded, permuted = np.asarray(out["encoded"])
    # The class token is the first.
    difference = np.abs(permuted - encoded[[0, *(1 + number for number in order)]]).max()
    assert (difference < 1e-5) if kind == "none" else (difference > 1e-2)


def test_sincos_2d_is_its_formula():
    np.testing.assert_allclose(sincos_2d(3, 5, 24)[0], reference.sincos_2d(3, 5, 24).reshape(15, 24), atol=1e-6)


def test_sincos_2d_has_wave_lengths_from_one_to_ten_thousand():
    table = sincos_2d(1, 2, 16)[0, 1]  # row 0, column 1
    np.testing.assert_allclose(table[:4], np.sin(10_000.0 ** -np.array([0, 1 / 3, 2 / 3, 1])), rtol=1e-6)
    np.testing.assert_array_equal(table[8:], [0] * 4 + [1] * 4)


@pytest.mark.parametrize("width", [4, 18])
def test_width_that_sincos_cannot_have_is_refused(width):
    with pytest.raises(UserError, match=f"hidden_dim divisible by 4 and at least 8, got {width}"):
        sincos_2d(2, 2, width)


def test_learned_2d_takes_an_odd_width():
    model = tiny(hidden_dim=15, num_heads=3, position_embedding="learned_2d")
    shapes = shapes_by_path(param_shapes(model)["Transformer"]["posembed_input"])
    assert shapes == {"pos_embedding_x": (2, 7), "pos_embedding_y": (2, 8)}


def test_unknown_kind_and_place_are_refused_with_the_nearest_ones():
    with pytest.raises(UserError, match=r"unknown position_embedding 'learned1d'\. Did you mean 'learned_1d'"):
        tiny(position_embedding="learned1d")
    with pytest.raises(UserError, match=r"unknown position_embedding_at 'each_layer'\. Did you mean 'every_layer'"):
        tiny(position_embedding_at="each_layer")


def make_embedding(grid, prefix=0, width=3, dtype="float32"):
    tokens = prefix + grid[0] * grid[1]
    return np.random.default_rng(0).normal(size=(1, tokens, width)).astype(dtype)


def zoom(patches, grid, new_grid):
    """The released code's way; scipy counts a factor for each axis."""
    patches = patches.reshape(*grid, -1)
    factors = (new_grid[0] / grid[0], new_grid[1] / grid[1], 1)
    return scipy.ndimage.zoom(patches, factors, order=1).reshape(1, new_grid[0] * new_grid[1], -1)


@pytest.mark.parametrize("old", [1, 2, 7, 14, 24])
def test_interpolation_between_squares_is_scipys(old):
    embedding = make_embedding((old, old), prefix=1)
    for new in (1, 2, 3, 7, 12, 14, 16, 24, 32, 37):
        found = interpolate_position_embedding(embedding, (new, new), num_prefix_tokens=1, old_grid=(old, old))
        assert found.shape == (1, 1 + new * new, 3)
        expected = zoom(embedding[:, 1:], (old, old), (new, new))
        np.testing.assert_allclose(found[:, 1:], expected, atol=1e-6, err_msg=str(new))


@pytest.mark.parametrize("new_grid", [(2, 9), (9, 2), (1, 6), (3, 5), (7, 4), (12, 1)])
def test_interpolation_of_other_rectangles_is_scipys_on_each_axis(new_grid):
    embedding = make_embedding((3, 5))
    found = interpolate_position_embedding(embedding, new_grid, num_prefix_tokens=0, old_grid=(3, 5))
    np.testing.assert_allclose(found, zoom(embedding, (3, 5), new_grid), atol=1e-6)


def test_square_is_interpolated_to_a_rectangle():
    embedding = make_embedding((4, 4), prefix=1)
    found = interpolate_position_embedding(embedding, (3, 6), num_prefix_tokens=1, old_grid=(4, 4))
    np.testing.assert_allclose(found[:, 1:], zoom(embedding[:, 1:], (4, 4), (3, 6)), atol=1e-6)


def test_interpolation_keeps_corners():
    matrix = interpolation_matrix(5, 9)
    np.testing.assert_array_equal(matrix[0], np.eye(5)[0])
    np.testing.assert_allclose(matrix[-1], np.eye(5)[-1], atol=1e-12)
    np.testing.assert_allclose(matrix.sum(axis=1), 1)


@pytest.mark.parametrize("new_grid", [(2, 2), (7, 7), (3, 8)])
def test_interpolation_keeps_the_class_token_bit_exactly(new_grid):
    embedding = make_embedding((4, 4), prefix=1)
    found = interpolate_position_embedding(embedding, new_grid, num_prefix_tokens=1, old_grid=(4, 4))
    np.testing.assert_array_equal(found[:, 0], embedding[:, 0])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ml_dtypes.bfloat16])
@pytest.mark.parametrize("side", [4, 6])
def test_interpolation_keeps_the_dtype(dtype, side):
    embedding = make_embedding((4, 4), 1, dtype=dtype)
    found = interpolate_position_embedding(embedding, (side, side), num_prefix_tokens=1, old_grid=(4, 4))
    assert found.dtype == np.dtype(dtype)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_interpolation_to_the_same_grid_changes_no_bit(grid):
    embedding = make_embedding(grid, prefix=1)
    found = interpolate_position_embedding(embedding, grid, num_prefix_tokens=1, old_grid=grid)
    np.testing.assert_array_equal(found, embedding)


@pytest.mark.parametrize(
    ("tokens", "prefix", "grid"),
    [(196, 0, (14, 14)), (197, 1, (14, 14)), (50, 1, (7, 7)), (2, 1, (1, 1)), (1, 0, (1, 1))],
)
def test_grid_is_the_square_that_the_models_class_token_leaves(tokens, prefix, grid):
    assert grid_of(tokens, prefix) == grid


@pytest.mark.parametrize(
    ("tokens", "prefix", "message"),
    [
        (196, 1, "196 position embeddings of a model with a class token leave 195 .* As a model without a class token"),
        (197, 0, "197 position embeddings of a model without a class token leave 197 .* As a model with a class token"),
        (200, 1, "leave 199 for the patches, which is not a square. Give the grid"),
        (1, 1, "leave 0 for the patches"),
    ],
)
def test_number_that_is_not_a_square_is_refused_with_what_may_be_meant(tokens, prefix, message):
    with pytest.raises(UserError, match=message):
        grid_of(tokens, prefix)


def test_interpolation_refuses_a_grid_that_the_embeddings_are_not_of():
    with pytest.raises(UserError, match="16 position embeddings are not 0 \\+ 3 x 5, as the given grid says"):
        interpolate_position_embedding(make_embedding((4, 4)), (2, 2), num_prefix_tokens=0, old_grid=(3, 5))
