"""Adapting weights for fine-tuning; scipy's zoom, which the released code calls, is the oracle for interpolation."""

import functools

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage

from tests.weights.test_formats import BIT, assert_same, make_weights
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.layers import unstack_layers
from vit_jax.weights import TransferReport, transfer

POSITIONS = "Transformer/posembed_input/pos_embedding"
HEAD = {"head/kernel", "head/bias"}
PRE_LOGITS = {"pre_logits/kernel", "pre_logits/bias"}


@functools.cache
def weights_of(size=(16, 16), **attributes):
    return make_weights(image_size=size, **({} if "stages" in attributes else {"num_layers": 1}) | attributes)


def model_of(**attributes):
    return weights_of().spec.create(**attributes)


def flat(params):
    return flax.traverse_util.flatten_dict(params, sep="/")


def zoomed(grid, shape):
    """`[rows, columns, width]` at another number of rows and columns."""
    factors = (shape[0] / grid.shape[0], shape[1] / grid.shape[1], 1)
    return scipy.ndimage.zoom(grid, factors, order=1)


def check_report(report, weights, params):
    """Every array of the weights, and every one of the model, appears exactly once."""
    resized = [name for name, *_ in report.resized]
    assert sorted([*report.loaded, *resized, *report.dropped]) == sorted(weights.arrays)
    assert sorted([*report.loaded, *resized, *report.initialised]) == sorted(flat(params))
    for name in report.loaded:
        np.testing.assert_array_equal(flat(params)[name], weights.arrays[name])
    for name, old, new in report.resized:
        assert (old, new) == (weights.arrays[name].shape, flat(params)[name].shape)


def logits(model, params, size=(16, 16)):
    images = np.random.default_rng(3).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    return np.asarray(jax.jit(model.apply)({"params": params}, images)[0])


# --- The head ---


def test_the_head_starts_at_zero_and_all_else_is_transferred():
    weights = weights_of()
    params, report = transfer(weights, model_of(num_classes=3), 16)
    found = flat(params)
    assert found["head/kernel"].shape == (16, 3)
    assert not found["head/kernel"].any()
    assert not found["head/bias"].any()
    assert_same({name: array for name, array in found.items() if name not in HEAD},
                {name: array for name, array in weights.arrays.items() if name not in HEAD})  # fmt: skip
    assert set(report.dropped) == set(report.initialised) == HEAD
    assert report.resized == ()
    check_report(report, weights, params)


def test_a_kept_head_changes_no_logits_at_the_same_resolution():
    weights = weights_of(pre_logits=True)
    model = weights.spec.create()
    params, report = transfer(weights, model, 16, keep_head=True, keep_pre_logits=True)
    assert_same(flat(params), weights.arrays)
    assert report == TransferReport(tuple(sorted(weights.arrays)), (), (), ())
    np.testing.assert_array_equal(logits(model, params), logits(model, weights.params))


def test_a_kept_head_must_be_as_wide():
    with pytest.raises(UserError, match=r"head/kernel: \(16, 5\).*\(16, 3\)"):
        transfer(weights_of(), model_of(num_classes=3), 16, keep_head=True)


def test_a_head_to_be_kept_must_be_there():
    with pytest.raises(UserError, match="missing: head/bias"):
        transfer(weights_of(num_classes=0), model_of(), 16, keep_head=True)


def test_a_model_without_head_drops_it():
    weights = weights_of()
    params, report = transfer(weights, model_of(num_classes=0), 16)
    assert (set(report.dropped), report.initialised) == (HEAD, ())
    check_report(report, weights, params)


def test_weights_without_head_are_transferred():
    weights = weights_of(num_classes=0)
    params, report = transfer(weights, model_of(), 16)
    assert (report.dropped, set(report.initialised)) == ((), HEAD)
    check_report(report, weights, params)


def test_pre_logits_are_dropped_where_the_model_has_none():
    weights = weights_of(pre_logits=True)
    params, report = transfer(weights, model_of(), 16)
    assert set(report.dropped) == HEAD | PRE_LOGITS
    check_report(report, weights, params)


def test_pre_logits_start_from_scratch_unless_they_are_to_be_kept():
    weights = weights_of(pre_logits=True)
    params, report = transfer(weights, weights.spec.create(), 16)
    assert set(report.dropped) == set(report.initialised) == HEAD | PRE_LOGITS
    assert not np.array_equal(flat(params)["pre_logits/kernel"], weights.arrays["pre_logits/kernel"])
    check_report(report, weights, params)


def test_pre_logits_are_kept_without_the_head():
    weights = weights_of(pre_logits=True)
    params, report = transfer(weights, weights.spec.create(), 16, keep_pre_logits=True)
    assert set(report.initialised) == HEAD
    check_report(report, weights, params)


def test_what_starts_from_scratch_depends_on_the_seed():
    weights, model = weights_of(), model_of(pre_logits=True)
    kernels = [flat(transfer(weights, model, 16, seed=seed)[0])["pre_logits/kernel"] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 0.01


# --- Resolution ---


@pytest.mark.parametrize("new", [(24, 24), (8, 8), (28, 28), (4, 4), (12, 40)])
def test_position_embeddings_are_interpolated_like_scipys_zoom(new):
    weights = weights_of()
    params, report = transfer(weights, model_of(), new)
    rows, columns = new[0] // 4, new[1] // 4
    found, given = flat(params)[POSITIONS], weights.arrays[POSITIONS]
    expected = zoomed(given[0, 1:].reshape(4, 4, 16), (rows, columns)).reshape(rows * columns, 16)
    np.testing.assert_allclose(found[0, 1:], expected, atol=1e-6)
    np.testing.assert_array_equal(found[0, 0], given[0, 0])
    assert report.resized == ((POSITIONS, (1, 17, 16), (1, 1 + rows * columns, 16)),)
    check_report(report, weights, params)


@pytest.mark.parametrize("new", [(16, 16), (12, 24)])
def test_a_grid_that_was_not_square_is_interpolated_along_each_axis(new):
    weights = weights_of(size=(8, 24))
    params, _ = transfer(weights, model_of(), new)
    rows, columns = new[0] // 4, new[1] // 4
    expected = zoomed(weights.arrays[POSITIONS][0, 1:].reshape(2, 6, 16), (rows, columns))
    np.testing.assert_allclose(flat(params)[POSITIONS][0, 1:], expected.reshape(-1, 16), atol=1e-6)


def test_another_grid_of_as_many_patches_is_interpolated_too():
    weights = weights_of(size=(8, 32))
    params, report = transfer(weights, model_of(), (16, 16))
    expected = zoomed(weights.arrays[POSITIONS][0, 1:].reshape(2, 8, 16), (4, 4)).reshape(-1, 16)
    np.testing.assert_allclose(flat(params)[POSITIONS][0, 1:], expected, atol=1e-6)
    assert report.resized == ((POSITIONS, (1, 17, 16), (1, 17, 16)),)


def test_embeddings_of_each_layer_are_all_interpolated():
    weights = weights_of(position_embedding_at="every_layer", num_layers=2)
    params, report = transfer(weights, weights.spec.create(), 24)
    for layer in range(2):
        name = f"Transformer/encoderblock_{layer}/posembed/pos_embedding"
        expected = zoomed(weights.arrays[name][0, 1:].reshape(4, 4, 16), (6, 6)).reshape(36, 16)
        np.testing.assert_allclose(flat(params)[name][0, 1:], expected, atol=1e-6)
    assert len(report.resized) == 2
    check_report(report, weights, params)


def test_learned_2d_embeddings_are_interpolated_along_their_axes():
    weights = weights_of(position_embedding="learned_2d")
    params, report = transfer(weights, weights.spec.create(), (8, 24))
    found = flat(params)
    for axis, new in (("x", 6), ("y", 2)):
        given = weights.arrays[f"{POSITIONS}_{axis}"]
        expected = scipy.ndimage.zoom(given, (new / 4, 1), order=1)
        np.testing.assert_allclose(found[f"{POSITIONS}_{axis}"], expected, atol=1e-6)
    assert len(report.resized) == 2
    check_report(report, weights, params)


def test_fixed_embeddings_fit_any_resolution():
    weights = weights_of(position_embedding="sincos_2d")
    params, report = transfer(weights, weights.spec.create(), 24)
    assert report.resized == ()
    check_report(report, weights, params)


def test_relative_embeddings_in_raster_order_are_kept_at_the_same_resolution():
    weights = weights_of(position_embedding="relative")
    params, report = transfer(weights, weights.spec.create(), 16)
    check_report(report, weights, params)


@pytest.mark.parametrize("size", [(24, 24), (8, 32)])
def test_relative_embeddings_in_raster_order_are_refused_on_another_grid(size):
    weights = weights_of(position_embedding="relative")
    with pytest.raises(UserError, match=r"relative_embedding.*another grid.*Keep the resolution at 16x16"):
        transfer(weights, weights.spec.create(), size)


def test_relative_embeddings_along_one_axis_are_interpolated():
    weights = weights_of(size=(32, 32), name="AxialResNet-26", stages=(1,))
    model = weights.spec.create()
    params, report = transfer(weights, model, (32, 48))
    name = "block1/unit01/width_axis/relative_embedding"  # of offsets within a row: as many as there are columns
    expected = scipy.ndimage.zoom(weights.arrays[name], (23 / 15, 1), order=1)
    np.testing.assert_allclose(flat(params)[name], expected, atol=1e-6)
    assert [each[0] for each in report.resized] == [name]
    check_report(report, weights, params)


def test_an_axial_vit_is_interpolated():
    weights = weights_of(name="Axial-ViT-Ti/4")
    params, report = transfer(weights, weights.spec.create(), 24)
    name = "posembed_input/pos_embedding"
    expected = zoomed(weights.arrays[name].reshape(4, 4, 16), (6, 6)).reshape(1, 36, 16)
    np.testing.assert_allclose(flat(params)[name], expected, atol=1e-6)
    check_report(report, weights, params)


def test_a_resnet_fits_any_resolution():
    weights = weights_of(**BIT | {"stages": (1,)})
    params, report = transfer(weights, weights.spec.create(num_classes=2), 32)
    assert (report.resized, set(report.dropped)) == ((), HEAD)
    check_report(report, weights, params)


def test_images_that_the_patches_do_not_tile_are_refused():
    with pytest.raises(UserError, match=r"18x18 is not divisible by the patch size 4"):
        transfer(weights_of(), model_of(), 18)


# --- With and without a class token ---


def test_a_class_token_is_dropped_with_its_position():
    weights = weights_of()
    params, report = transfer(weights, model_of(pool="gap"), 16)
    np.testing.assert_array_equal(flat(params)[POSITIONS], weights.arrays[POSITIONS][:, 1:])
    assert set(report.dropped) == HEAD | {"cls"}
    assert report.resized == ((POSITIONS, (1, 17, 16), (1, 16, 16)),)
    check_report(report, weights, params)


def test_a_class_token_starts_from_scratch_with_its_position():
    weights = weights_of(pool="gap")
    params, report = transfer(weights, model_of(), 16)
    found = flat(params)
    assert not found["cls"].any()
    assert not found[POSITIONS][:, 0].any()
    np.testing.assert_array_equal(found[POSITIONS][:, 1:], weights.arrays[POSITIONS])
    assert set(report.initialised) == HEAD | {"cls"}
    assert report.resized == ((POSITIONS, (1, 16, 16), (1, 17, 16)),)
    check_report(report, weights, params)


@pytest.mark.parametrize(("old", "new"), [("cls", "gap"), ("gap", "cls")])
def test_the_class_token_changes_with_the_resolution_at_once(old, new):
    weights = weights_of(pool=old)
    params, report = transfer(weights, model_of(pool=new), 24)
    patches = weights.arrays[POSITIONS][0, -16:].reshape(4, 4, 16)
    np.testing.assert_allclose(flat(params)[POSITIONS][0, -36:], zoomed(patches, (6, 6)).reshape(36, 16), atol=1e-6)
    assert report.resized == ((POSITIONS, (1, 17 - (old == "gap"), 16), (1, 37 - (new == "gap"), 16)),)


def test_attention_pooling_starts_from_scratch_if_the_weights_have_none():
    weights = weights_of(pool="gap")
    params, report = transfer(weights, model_of(pool="map"), 16)
    pooling = {name for name in flat(params) if name.startswith("MAPHead_0/")}
    assert set(report.initialised) == HEAD | pooling
    check_report(report, weights, params)


def test_attention_pooling_is_dropped_where_the_model_has_none():
    weights = weights_of(pool="map")
    params, report = transfer(weights, model_of(pool="gap"), 16)
    assert set(report.dropped) == HEAD | {name for name in weights.arrays if name.startswith("MAPHead_0/")}
    check_report(report, weights, params)


@pytest.mark.parametrize(("pool", "number"), [("gap", 197), ("cls", 196)])
def test_embeddings_of_another_kind_than_the_models_are_refused(pool, number):
    weights = weights_of(size=(56, 56), pool=pool)
    wrong = dict(weights.arrays) | {POSITIONS: np.zeros((1, number, 16), np.float32)}
    weights = type(weights)(weights.spec, wrong, weights.preprocessing)
    with pytest.raises(UserError, match=f"{number} position embeddings"):
        transfer(weights, weights.spec.create(), 24)


# --- Layouts and dtypes ---


def test_a_scanned_model_gets_stacked_layers_and_gives_the_same_logits():
    weights = weights_of(num_layers=2)
    model = weights.spec.create(scan_layers=True)
    params, report = transfer(weights, model, 16, keep_head=True)
    assert flat(params)["Transformer/encoderblock/LayerNorm_0/scale"].shape == (2, 16)
    assert_same(jax.tree.map(np.asarray, flat(unstack_layers(params))), weights.arrays)
    assert sorted(report.loaded) == sorted(weights.arrays)
    expected = logits(weights.spec.create(), weights.params)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits(model, params), expected, atol=1e-5)


def test_a_scanned_model_with_embeddings_of_each_layer_is_interpolated():
    weights = weights_of(num_layers=2, position_embedding_at="every_layer")
    params, _ = transfer(weights, weights.spec.create(scan_layers=True), 24)
    unrolled, _ = transfer(weights, weights.spec.create(), 24)
    assert_same(jax.tree.map(np.asarray, flat(unstack_layers(params))), flat(unrolled))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_parameters_have_the_models_dtype(dtype):
    weights = weights_of()
    params, _ = transfer(weights, model_of(param_dtype=dtype), 24)
    assert {array.dtype for array in flat(params).values()} == {np.dtype(dtype)}


def test_weights_of_half_precision_become_whole():
    weights = weights_of(dtype=ml_dtypes.bfloat16)
    params, report = transfer(weights, weights.spec.create(), 16)
    for name in report.loaded:
        assert flat(params)[name].dtype == np.float32
        np.testing.assert_array_equal(flat(params)[name], weights.arrays[name].astype(np.float32))


def test_the_weights_are_left_as_they_are():
    weights = make_weights(num_layers=1)
    transfer(weights, model_of(pool="gap"), 24)
    assert_same(weights.arrays, make_weights(num_layers=1).arrays)


# --- What does not fit ---


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_layers": 2}, "missing: Transformer/encoderblock_1/LayerNorm_0/bias"),
        ({"mlp_dim": 64}, r"MlpBlock_3/Dense_0/kernel: \(16, 32\).*\(16, 64\)"),
        ({"num_heads": 4}, r"query/kernel: \(16, 2, 8\).*\(16, 4, 4\)"),
        ({"patch_size": 8}, r"embedding/kernel: \(4, 4, 3, 16\).*\(8, 8, 3, 16\)"),
        ({"position_embedding": "learned_2d"}, "missing: .*pos_embedding_x(.|\n)*not of this model: .*pos_embedding"),
        ({"position_embedding": "none"}, "not of this model: .*pos_embedding"),
    ],
)
def test_another_architecture_is_refused_with_the_first_differences(attributes, message):
    with pytest.raises(UserError, match=message):
        transfer(weights_of(), model_of(**attributes), 16)


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"gelu": "exact"}, "gelu"),
        ({"position_embedding_at": "shared"}, "position_embedding_at"),
    ],
)
def test_a_difference_that_no_array_shows_is_refused(attributes, word):
    with pytest.raises(UserError, match=word):
        transfer(weights_of(), model_of(**attributes), 16)


def test_another_padding_of_bits_root_is_refused():
    with pytest.raises(UserError, match="root_padding='lowest', this one has 'zeros'"):
        transfer(make_weights(**BIT, root_padding="lowest"), create_model("R26x1", num_classes=3, stages=(1, 1)), 32)


def test_a_report_counts_and_names_what_changed():
    _, report = transfer(weights_of(), model_of(num_classes=3), 24)
    lines = str(report).splitlines()
    assert lines[0].split() == ["loaded", str(len(report.loaded))]
    assert lines[1].split(maxsplit=2) == ["resized", "1", f"{POSITIONS} (1, 17, 16) -> (1, 37, 16)"]
    assert lines[2].split(maxsplit=2) == ["dropped", "2", "head/bias, head/kernel"]
    assert lines[3].split(maxsplit=2) == ["initialised", "2", "head/bias, head/kernel"]
