import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.models import reference
from tests.models.tiny import (
    apply,
    assert_trees_close,
    fast_jit,
    fill,
    loss_and_grads,
    make_images,
    param_shapes,
    random_params,
    residual_size,
    shapes_by_path,
    tiny,
)
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.resnet import BitRoot, BitUnit, HybridUnit, downsampling, hybrid_feature_map, standardize_kernel

BIT = {"variance_epsilon": 1e-10}
HYBRID = {"std_epsilon": 1e-5}
SIZES_AND_STRIDES = pytest.mark.parametrize(("size", "stride"), [((6, 9), 1), ((6, 9), 2), ((7, 8), 2)], ids=str)
# Small inputs make the epsilons of the normalisations show, small kernels those of the standardisation.
SCALES = pytest.mark.parametrize(("input_scale", "kernel_scale"), [(1.0, 0.3), (3e-3, 0.3), (3e-3, 1e-5)])


class HybridRoot(nn.Module):
    """What stands in front of a hybrid's Transformer, as a module."""

    stages: tuple[int, ...] = ()
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        return hybrid_feature_map(x, self.stages, remat=self.remat, dtype="float32", param_dtype="float32")


def make_input(*shape, scale=1.0):
    return (scale * np.random.default_rng(3).normal(size=shape)).astype(np.float32)


def make_params(module, x, kernel_scale=0.3):
    params = fill(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * np.float32(kernel_scale / 0.3) if path[-1].key == "kernel" else leaf, params
    )


def run(module, params, x):
    return np.asarray(fast_jit(module.apply)({"params": params}, x))


def tiny_bit(**attributes):
    """A BiT of two stages of one unit each."""
    return create_model("R50x1", num_classes=5, stages=(1, 1), **attributes)


# Weight standardisation.


@pytest.mark.parametrize("epsilons", [BIT, HYBRID], ids=["bit", "hybrid"])
def test_standardised_kernels_have_mean_0_and_variance_1_for_each_output(epsilons):
    kernel = make_input(3, 3, 8, 6) * np.arange(1, 7, dtype=np.float32) + 5
    standardised = np.float64(standardize_kernel(kernel, **epsilons))
    np.testing.assert_allclose(standardised.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(standardised.var(axis=(0, 1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize(("epsilons", "expected"), [(BIT, 1 / math.sqrt(2)), (HYBRID, 1 / 2)], ids=["bit", "hybrid"])
def test_epsilon_is_added_to_the_variance_for_bit_and_to_the_deviation_for_hybrids(epsilons, expected):
    # With deviation s = 1e-5: s / sqrt(s^2 + 1e-10), and s / (s + 1e-5).
    kernel = 1e-5 * np.where(np.arange(32).reshape(4, 4, 2, 1) % 2, 1.0, -1.0).astype(np.float32)
    np.testing.assert_allclose(np.abs(standardize_kernel(kernel, **epsilons)), expected, rtol=1e-5)


def test_constant_kernels_become_zero_and_not_infinite():
    for epsilons in (BIT, HYBRID):
        np.testing.assert_array_equal(standardize_kernel(jnp.full((3, 3, 2, 4), 0.5), **epsilons), 0)


@pytest.mark.parametrize("epsilons", [BIT, HYBRID], ids=["bit", "hybrid"])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_standardisation_matches_its_definition(epsilons, scale):
    kernel = make_input(3, 3, 4, 5, scale=scale)
    np.testing.assert_allclose(
        standardize_kernel(kernel, **epsilons), reference.standardize(kernel, **epsilons), atol=1e-5
    )


# BiT.


def bit_unit(x, params, stride):
    def conv(x, name, stride=1, padding=0):
        kernel = reference.standardize(params[name]["kernel"], **BIT)
        return reference.conv(x, kernel, stride, reference.symmetric(padding))

    def norm_and_relu(x, name):
        return np.maximum(reference.group_norm(x, params[name], epsilon=1e-5), 0)

    preactivated = norm_and_relu(x, "gn1")
    residual = conv(preactivated, "conv_proj", stride) if "conv_proj" in params else x
    y = conv(preactivated, "conv1")
    y = conv(norm_and_relu(y, "gn2"), "conv2", stride, padding=1)
    return conv(norm_and_relu(y, "gn3"), "conv3") + residual


@SCALES
@SIZES_AND_STRIDES
def test_bit_unit_is_preactivated(size, stride, input_scale, kernel_scale):
    unit = BitUnit(32, stride=stride)
    x = make_input(2, *size, 64, scale=input_scale)
    params = make_params(unit, x, kernel_scale)
    expected = bit_unit(x, params, stride)
    np.testing.assert_allclose(run(unit, params, x), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_bit_unit_of_the_same_width_and_resolution_adds_to_its_input():
    unit = BitUnit(32)
    x = make_input(1, 5, 5, 128)
    params = make_params(unit, x)
    assert "conv_proj" not in params
    np.testing.assert_allclose(run(unit, params, x), bit_unit(x, params, 1), rtol=1e-4, atol=1e-3)


def test_projection_of_bit_takes_the_normalised_input():
    # So that the unit does not see the scale of its input.
    unit = BitUnit(32)
    x = make_input(1, 6, 6, 64)
    params = make_params(unit, x)
    once, more = run(unit, params, x), run(unit, params, 100 * x)
    np.testing.assert_allclose(more, once, atol=1e-3 * np.abs(once).max())


def bit_root(images, params, fill=0.0):
    kernel = reference.standardize(params["conv_root"]["kernel"], **BIT)
    x = reference.conv(images, kernel, 2, reference.symmetric(3))
    return reference.max_pool(x, 3, 2, reference.symmetric(1), fill=fill)


@pytest.mark.parametrize(("padding", "fill"), [("zeros", 0.0), ("lowest", -np.inf)])
@pytest.mark.parametrize("size", [(16, 21), (18, 15)], ids=str)
def test_bit_root_pads_its_convolution_on_both_sides_and_its_pooling_as_configured(size, padding, fill):
    root = BitRoot(8, padding)
    images = make_input(2, *size, 3)
    params = make_params(root, images)
    np.testing.assert_allclose(run(root, params, images), bit_root(images, params, fill), atol=1e-4)


def test_pooling_of_bit_leaves_nothing_negative_at_the_border():
    # A kernel of mean 0 makes one number of a ramp, wherever it does not touch the border.
    root = BitRoot(8)
    images = np.broadcast_to(np.arange(32, dtype=np.float32)[:, None, None] + 100, (1, 32, 32, 3))
    params = make_params(root, images)
    y = run(root, params, images)[0]
    assert y.shape == (8, 8, 8)
    assert y[2:-2, 2:-2].min() < 0
    assert y[0].min() >= 0
    assert y[:, 0].min() >= 0


@pytest.mark.parametrize(
    ("image_size", "sides"),
    [(224, (56, 56, 28, 14, 7)), (65, (17, 17, 9, 5, 3)), (33, (9, 9, 5, 3, 2)), (30, (8, 8, 4, 2, 1))],
)
def test_bit_rounds_sizes_up(image_size, sides):
    model = create_model("R50x1", num_classes=5, stages=(1, 1, 1, 1))
    images = jnp.zeros((2, image_size, image_size, 3))
    logits, out = jax.eval_shape(lambda key: model.init_with_output(key, images), jax.random.key(0))[0]
    names = ("root", "block1", "block2", "block3", "block4")
    widths = (64, 256, 512, 1024, 2048)
    assert {name: out[name].shape for name in names} == {
        name: (2, side, side, width) for name, side, width in zip(names, sides, widths, strict=True)
    }
    assert out["feature_map"].shape == out["block4"].shape
    assert out["pre_logits"].shape == (2, 2048)
    assert logits.shape == (2, 5)


def test_bit_takes_images_that_are_not_square():
    model = create_model("R50x1", num_classes=5, stages=(1, 1))
    images = jnp.zeros((1, 32, 50, 3))
    _, out = jax.eval_shape(lambda key: model.init_with_output(key, images), jax.random.key(0))[0]
    assert out["block2"].shape == (1, 4, 7, 512)


def test_width_factor_multiplies_all_widths():
    once, thrice = (param_shapes(create_model(f"R50x{width}", num_classes=5), 64, 64) for width in (1, 3))
    once, thrice = shapes_by_path(once), shapes_by_path(thrice)
    assert once.keys() == thrice.keys()
    assert thrice["root_block/conv_root/kernel"] == (7, 7, 3, 192)
    assert thrice["block4/unit03/conv2/kernel"] == (3, 3, 1536, 1536)
    assert thrice["head/kernel"] == (3 * 2048, 5)


def test_parameter_names_and_shapes_of_bit_are_the_documented():
    def unit(inputs, width, projects):
        shapes = {
            "gn1/scale": (inputs,),
            "gn1/bias": (inputs,),
            "gn2/scale": (width,),
            "gn2/bias": (width,),
            "gn3/scale": (width,),
            "gn3/bias": (width,),
            "conv1/kernel": (1, 1, inputs, width),
            "conv2/kernel": (3, 3, width, width),
            "conv3/kernel": (1, 1, width, 4 * width),
        }
        return shapes | ({"conv_proj/kernel": (1, 1, inputs, 4 * width)} if projects else {})

    units = {
        "block1/unit01": unit(64, 64, True),
        "block1/unit02": unit(256, 64, False),
        "block2/unit01": unit(256, 128, True),
    }
    expected = {
        "root_block/conv_root/kernel": (7, 7, 3, 64),
        "norm_pre_head/scale": (512,),
        "norm_pre_head/bias": (512,),
        "head/kernel": (512, 5),
        "head/bias": (5,),
        **{f"{name}/{leaf}": shape for name, shapes in units.items() for leaf, shape in shapes.items()},
    }
    model = create_model("R50x1", num_classes=5, stages=(2, 1))
    assert shapes_by_path(param_shapes(model, 32, 32)) == expected


@pytest.mark.parametrize(("padding", "fill"), [("zeros", 0.0), ("lowest", -np.inf)])
def test_bit_is_root_units_normalisation_mean_and_linear_head(padding, fill):
    model = tiny_bit(root_padding=padding)
    params = random_params(model, 20, 20)
    images = make_images(2, 20, 20, 3)
    logits, out = apply(model, params, images)
    x = bit_root(images, params["root_block"], fill)
    x = bit_unit(x, params["block1"]["unit01"], 1)
    x = bit_unit(x, params["block2"]["unit01"], 2)
    x = np.maximum(reference.group_norm(x, params["norm_pre_head"], epsilon=1e-5), 0)
    np.testing.assert_allclose(out["feature_map"], x, atol=1e-4)
    np.testing.assert_allclose(out["pre_logits"], x.mean(axis=(1, 2)), atol=1e-4)
    np.testing.assert_allclose(logits, reference.dense(x.mean(axis=(1, 2)), params["head"]), atol=1e-3)


def test_logits_of_bit_do_not_see_scale_and_shift_of_an_outputs_kernel():
    model = tiny_bit()
    params = random_params(model, 20, 20)
    images = make_images(2, 20, 20, 3)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf * np.linspace(0.5, 3, leaf.shape[-1], dtype=np.float32) + 0.25 if leaf.ndim == 4 else leaf
        ),
        params,
    )
    run_model = fast_jit(lambda params: model.apply({"params": params}, images)[0])
    expected = run_model(params)
    np.testing.assert_allclose(run_model(moved), expected, atol=1e-3 * np.abs(expected).max())


def test_bit_without_classes_returns_the_representation():
    model = create_model("R50x1", num_classes=0, stages=(1,))
    params = random_params(model, 8, 8)
    assert "head" not in params
    representation, out = apply(model, params, make_images(1, 8, 8, 3))
    np.testing.assert_array_equal(representation, out["pre_logits"])


def test_head_of_bit_starts_at_zero_with_the_given_bias():
    model = create_model("R50x1", num_classes=5, stages=(), head_bias=-10.0)
    params = fast_jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    assert not np.any(params["head"]["kernel"])
    np.testing.assert_array_equal(params["head"]["bias"], -10.0)


def test_bfloat16_bit_has_float32_parameters_and_logits():
    model = tiny_bit(dtype="bfloat16")
    images = jnp.zeros((1, 16, 16, 3))
    (logits, out), variables = jax.eval_shape(lambda key: model.init_with_output(key, images), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    assert {array.dtype for array in out.values()} == {jnp.dtype("bfloat16")}


def test_remat_changes_neither_logits_nor_gradients_of_bit():
    params = random_params(tiny_bit(), 16, 16)
    images = make_images(2, 16, 16, 3)
    expected, expected_grads = loss_and_grads(tiny_bit(), params, images)
    found, grads = loss_and_grads(tiny_bit(remat="full"), params, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    largest = max(np.abs(grad).max() for grad in jax.tree.leaves(expected_grads))
    assert_trees_close(grads, expected_grads, rtol=1e-3, atol=1e-5 * largest)


def test_remat_of_bit_keeps_less():
    params = random_params(tiny_bit(), 64, 64)
    images = make_images(4, 64, 64, 3)
    kept = {remat: residual_size(tiny_bit(remat=remat), params, images) for remat in ("none", "full")}
    assert kept["full"] < 0.6 * kept["none"]


@pytest.mark.parametrize("remat", ["ful", "dots"])
def test_unknown_remat_of_a_resnet_is_refused_with_the_known_ones(remat):
    with pytest.raises(UserError, match=f"unknown remat '{remat}'.*Known: full, none"):
        create_model("R50x1", num_classes=5, remat=remat)


def test_unknown_root_padding_of_a_resnet_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"unknown root_padding 'zero'\. Did you mean 'zeros'\?"):
        create_model("R50x1", num_classes=5, root_padding="zero")


# The ResNet of the hybrids.


def hybrid_conv(x, params, name, stride=1):
    kernel = reference.standardize(params[name]["kernel"], **HYBRID)
    return reference.conv(x, kernel, stride, reference.same(x, kernel.shape[0], stride))


def hybrid_unit(x, params, stride):
    norm = functools.partial(reference.group_norm, epsilon=1e-6)
    residual = x
    if "conv_proj" in params:
        residual = norm(hybrid_conv(x, params, "conv_proj", stride), params["gn_proj"])
    y = np.maximum(norm(hybrid_conv(x, params, "conv1"), params["gn1"]), 0)
    y = np.maximum(norm(hybrid_conv(y, params, "conv2", stride), params["gn2"]), 0)
    return np.maximum(norm(hybrid_conv(y, params, "conv3"), params["gn3"]) + residual, 0)


def hybrid_root(images, params):
    x = hybrid_conv(images, params, "conv_root", 2)
    x = np.maximum(reference.group_norm(x, params["gn_root"], epsilon=1e-6), 0)
    return reference.max_pool(x, 3, 2, reference.same(x, 3, 2), fill=-np.inf)


@SCALES
@SIZES_AND_STRIDES
def test_hybrid_unit_is_normalised_after_each_convolution(size, stride, input_scale, kernel_scale):
    unit = HybridUnit(32, stride=stride)
    x = make_input(2, *size, 64, scale=1e-1 * input_scale)
    params = make_params(unit, x, kernel_scale)
    np.testing.assert_allclose(run(unit, params, x), hybrid_unit(x, params, stride), atol=2e-4)


def test_hybrid_unit_of_the_same_width_and_resolution_adds_to_its_input():
    unit = HybridUnit(32)
    x = make_input(1, 5, 5, 128)
    params = make_params(unit, x)
    assert not {"conv_proj", "gn_proj"} & params.keys()
    np.testing.assert_allclose(run(unit, params, x), hybrid_unit(x, params, 1), atol=2e-4)


@pytest.mark.parametrize("size", [(16, 21), (18, 15)], ids=str)
@pytest.mark.parametrize("input_scale", [1.0, 1e-4])
def test_root_of_hybrids_pads_as_tensorflow_does(size, input_scale):
    images = make_input(2, *size, 3, scale=input_scale)
    params = make_params(HybridRoot(), images)
    np.testing.assert_allclose(run(HybridRoot(), params, images), hybrid_root(images, params), atol=2e-4)


def test_units_of_hybrids_start_as_the_identity():
    unit = HybridUnit(32)
    x = np.abs(make_input(2, 6, 6, 128))
    params = fast_jit(unit.init)(jax.random.key(0), x)["params"]
    assert not np.any(params["gn3"]["scale"])
    np.testing.assert_array_equal(run(unit, params, x), x)


def test_parameter_names_of_hybrids_are_the_released():
    shapes = shapes_by_path(param_shapes(create_model("R26+S/32", num_classes=5, num_layers=1), 64, 64))
    unit = {f"{name}/kernel" for name in ("conv1", "conv2", "conv3")}
    unit |= {f"gn{number}/{name}" for number in (1, 2, 3) for name in ("scale", "bias")}
    projection = {"conv_proj/kernel", "gn_proj/scale", "gn_proj/bias"}
    expected = {"conv_root/kernel", "gn_root/scale", "gn_root/bias"}
    for block in range(1, 5):
        expected |= {f"block{block}/unit1/{name}" for name in unit | projection}
        expected |= {f"block{block}/unit2/{name}" for name in unit}
    others = ("embedding", "cls", "Transformer", "head")
    assert {name for name in shapes if not name.startswith(others)} == expected
    assert shapes["conv_root/kernel"] == (7, 7, 3, 64)
    assert shapes["block4/unit1/conv_proj/kernel"] == (1, 1, 1024, 2048)


@pytest.mark.parametrize(("stages", "expected"), [((), 4), ((3,), 4), ((3, 4), 8), ((3, 4, 9), 16), ((3, 4, 6, 3), 32)])
def test_feature_maps_of_hybrids_are_reduced_by_root_and_stages_and_rounded_up(stages, expected):
    assert downsampling(stages) == expected
    model = HybridRoot(tuple(1 for _ in stages))
    for side in (64, 65, 95):
        images = jnp.zeros((1, side, 2 * side, 3))
        feature_map = jax.eval_shape(lambda key, x: model.init_with_output(key, x)[0], jax.random.key(0), images)
        assert feature_map.shape[1:3] == (-(-side // expected), -(-2 * side // expected))


def test_remat_changes_neither_outputs_nor_gradients_of_hybrids():
    images = make_input(2, 8, 8, 3)
    params = make_params(HybridRoot((1,)), images)
    expected, found = (
        fast_jit(
            jax.value_and_grad(lambda params, root=root: jnp.square(root.apply({"params": params}, images)).sum())
        )(params)
        for root in (HybridRoot((1,)), HybridRoot((1,), remat=True))
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    largest = max(np.abs(grad).max() for grad in jax.tree.leaves(expected[1]))
    assert_trees_close(found[1], expected[1], rtol=1e-3, atol=1e-5 * largest)


def test_remat_of_a_hybrid_keeps_less():
    model = tiny(resnet=(1, 1), patch_size=1, num_layers=1)
    shapes = param_shapes(model, 64, 64)
    images = make_images(4, 64, 64, 3)
    kept = {remat: residual_size(model.clone(remat=remat), shapes, images) for remat in ("none", "full")}
    assert kept["full"] < 0.6 * kept["none"]
