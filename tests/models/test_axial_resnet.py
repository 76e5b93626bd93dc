import math
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.golden import weights_recipe
from tests.models import reference
from tests.models.test_resnet import BIT, make_params, run
from tests.models.tiny import (
    apply,
    fast_jit,
    make_images,
    param_shapes,
    random_params,
    residual_size,
    shapes_by_path,
)
from vit_jax.models import create_model
from vit_jax.models.axial_resnet import AxialUnit, PositionSensitiveAttention

EPSILON = 1e-4  # of the normalisations
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "axial.npz"


def tiny_axial_resnet(**attributes):
    """Two stages of one unit each."""
    return create_model("AxialResNet-50", num_classes=5, stages=(1, 1), **attributes)


def norm(x, params):
    """Group normalisation of `[batch, length, channels]` or `[batch, rows, columns, channels]`."""
    x = x[:, None] if x.ndim == 3 else x
    return reference.group_norm(x, params, EPSILON)


def attention(x, params, num_heads=8):
    """Equation 3 of Wang et al., number by number. The embedding of the offset p - o is at p - o + length - 1."""
    batch, length, width = x.shape
    value_dim, query_dim = width // num_heads, width // num_heads // 2
    qkv = norm(np.float64(x) @ np.float64(params["qkv"]["kernel"]), params["gn_qkv"])[:, 0]
    table = np.float64(params["relative_embedding"])
    y = np.zeros((batch, length, width))
    for b in range(batch):
        for head in range(num_heads):
            first = head * 2 * value_dim

            def query(o, b=b, first=first):
                return qkv[b, o, first : first + query_dim]

            def key(p, b=b, first=first):
                return qkv[b, p, first + query_dim : first + 2 * query_dim]

            def value(p, b=b, first=first):
                return qkv[b, p, first + 2 * query_dim : first + 2 * value_dim]

            for o in range(length):
                scores = []
                for p in range(length):
                    of_query, of_key = np.split(table[p - o + length - 1, : 2 * query_dim], 2)
                    score = 0.0
                    for i in range(query_dim):
                        score += query(o)[i] * key(p)[i] + query(o)[i] * of_query[i] + key(p)[i] * of_key[i]
                    scores.append(math.exp(score))
                for p in range(length):
                    of_value = table[p - o + length - 1, 2 * query_dim :]
                    for i in range(value_dim):
                        y[b, o, head * value_dim + i] += scores[p] / sum(scores) * (value(p)[i] + of_value[i])
    return norm(y, params["gn_out"])[:, 0]


def average(x):
    """Means of 2x2 positions; of fewer at the end of an odd side."""
    batch, rows, columns, channels = x.shape
    y = np.zeros((batch, -(-rows // 2), -(-columns // 2), channels))
    for row in range(y.shape[1]):
        for column in range(y.shape[2]):
            y[:, row, column] = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(axis=(1, 2))
    return y


def conv(x, params, stride=1):
    return reference.conv(x, reference.standardize(params["kernel"], **BIT), stride, reference.symmetric(0))


def axial_unit(x, params, stride=1):
    residual = norm(conv(x, params["conv_proj"], stride), params["gn_proj"]) if "conv_proj" in params else x
    y = np.maximum(norm(conv(x, params["conv1"]), params["gn1"]), 0)
    # The height axis joins the positions of a column, the width axis those of a row.
    y = np.stack([attention(y[:, :, column], params["height_axis"]) for column in range(y.shape[2])], axis=2)
    y = np.stack([attention(y[:, row], params["width_axis"]) for row in range(y.shape[1])], axis=1)
    y = average(y) if stride == 2 else y
    y = norm(conv(np.maximum(y, 0), params["conv3"]), params["gn3"])
    return np.maximum(y + residual, 0)


@pytest.mark.parametrize(("length", "width"), [(5, 32), (1, 64)])
def test_attention_is_equation_3_of_axial_deeplab(length, width):
    module = PositionSensitiveAttention()
    x = make_images(2, length, width)
    params = make_params(module, x, kernel_scale=1.0)
    np.testing.assert_allclose(run(module, params, x), attention(x, params), atol=2e-5)


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 4), slice(4, 8)], ids=["query", "key", "value"])
def test_each_relative_embedding_matters_and_is_of_the_offset_from_query_to_key(part):
    """An embedding of offset 2 alone: the outputs of the first positions, which have another two further, change."""
    module = PositionSensitiveAttention()
    x = make_images(1, 4, 32)
    params = make_params(module, x, kernel_scale=1.0)
    params["gn_out"]["scale"] = np.ones(32, np.float32)
    params["relative_embedding"] = np.zeros((7, 8), np.float32)
    before = attention(x, params)
    params["relative_embedding"][2 + 3, part] = 4.0
    expected = attention(x, params)
    assert np.abs(expected - before).max() > 1e-2
    np.testing.assert_allclose(run(module, params, x), expected, atol=2e-5)


@pytest.mark.parametrize(("size", "stride", "channels"), [((3, 4), 1, 128), ((3, 4), 1, 64), ((5, 3), 2, 64)], ids=str)
def test_axial_unit_normalises_after_each_product_and_attends_along_the_height_first(size, stride, channels):
    unit = AxialUnit(32, stride=stride)
    x = make_images(2, *size, channels)
    params = make_params(unit, x)
    assert ("conv_proj" in params) == (channels != 128)
    np.testing.assert_allclose(run(unit, params, x), axial_unit(x, params, stride), atol=2e-4)


def test_axial_resnet_is_root_units_mean_and_head_of_each_image():
    model = tiny_axial_resnet()
    params = random_params(model, 24, 20)
    # Another image in the batch changes nothing.
    images = make_images(2, 24, 20, 3)
    logits, out = (jax.tree.map(lambda array: array[1:], each) for each in apply(model, params, images))
    images = images[1:]
    kernel = reference.standardize(params["conv_root"]["kernel"], **BIT)
    x = reference.conv(images, kernel, 2, reference.same(images, 7, 2))
    x = np.maximum(norm(x, params["gn_root"]), 0)
    x = reference.max_pool(x, 3, 2, reference.same(x, 3, 2), fill=-np.inf)
    np.testing.assert_allclose(out["root"], x, atol=1e-4)
    x = axial_unit(x, params["block1"]["unit01"])
    np.testing.assert_allclose(out["block1"], x, atol=1e-3)
    x = axial_unit(x, params["block2"]["unit01"], stride=2)
    np.testing.assert_allclose(out["feature_map"], x, atol=3e-3)
    np.testing.assert_allclose(out["pre_logits"], x.mean(axis=(1, 2)), atol=3e-3)
    np.testing.assert_allclose(logits, reference.dense(x.mean(axis=(1, 2)), params["head"]), atol=2e-2)


def test_outputs_and_gradients_are_those_of_an_oracle_in_torch():
    """golden/make_axial_golden.py has the oracle."""
    with np.load(GOLDEN, allow_pickle=False) as file:
        golden = dict(file)
    model = tiny_axial_resnet()
    shapes = shapes_by_path(param_shapes(model, 32, 48))
    arrays = {name: weights_recipe.make_array(name, shape) for name, shape in shapes.items()}
    images = weights_recipe.make_images(2, 32, 48)

    def loss(params):
        logits, out = model.apply({"params": params}, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.array([1, 3])).mean(), (logits, out)

    params = flax.traverse_util.unflatten_dict(arrays, sep="/")
    with jax.default_matmul_precision("highest"):
        grads, (logits, out) = fast_jit(jax.grad(loss, has_aux=True))(params)
    for name in ("root", "block1", "block2"):
        np.testing.assert_allclose(out[name][..., ::8], golden[name], atol=2e-4, err_msg=name)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
    grads = flax.traverse_util.flatten_dict(grads, sep="/")
    assert {f"gradients/{name}" for name in grads} == {name for name in golden if name.startswith("gradients/")}
    for name, gradient in grads.items():
        found, expected = weights_recipe.probe_gradient(name, gradient), golden[f"gradients/{name}"]
        np.testing.assert_allclose(found, expected, atol=1e-3 * expected[0], err_msg=name)


def test_units_start_as_the_identity():
    unit = AxialUnit(32)
    x = np.abs(make_images(1, 2, 3, 128))
    params = fast_jit(unit.init)(jax.random.key(0), x)["params"]
    np.testing.assert_array_equal(run(unit, params, x), x)


def test_unit_has_neither_biases_nor_an_output_projection_and_half_as_wide_queries():
    shapes = shapes_by_path(jax.eval_shape(AxialUnit(32).init, jax.random.key(0), jnp.zeros((1, 5, 7, 128)))["params"])
    # Each head has a query and a key of 2 values and a value of 4.
    attention = {"qkv/kernel": (32, 64), **{f"gn_qkv/{leaf}": (64,) for leaf in ("scale", "bias")}}
    attention |= {f"gn_out/{leaf}": (32,) for leaf in ("scale", "bias")}
    assert shapes == {
        **{f"height_axis/{name}": shape for name, shape in (attention | {"relative_embedding": (9, 8)}).items()},
        **{f"width_axis/{name}": shape for name, shape in (attention | {"relative_embedding": (13, 8)}).items()},
        "conv1/kernel": (1, 1, 128, 32),
        "conv3/kernel": (1, 1, 32, 128),
        **{f"gn1/{leaf}": (32,) for leaf in ("scale", "bias")},
        **{f"gn3/{leaf}": (128,) for leaf in ("scale", "bias")},
    }


@pytest.mark.parametrize(
    ("image_size", "sides"), [((224, 224), (56, 28, 14, 7)), ((64, 64), (16, 8, 4, 2)), ((65, 33), (17, 9, 5, 3))]
)
def test_axial_resnet_reduces_as_resnet_does(image_size, sides):
    model = create_model("AxialResNet-50", num_classes=5, stages=(1, 1, 1, 1))
    images = jnp.zeros((2, *image_size, 3))
    logits, out = jax.eval_shape(lambda key: model.init_with_output(key, images), jax.random.key(0))[0]
    assert [out[f"block{stage}"].shape[1] for stage in (1, 2, 3, 4)] == list(sides)
    resnet = create_model("R50x1", num_classes=5, stages=(1, 1, 1, 1))
    _, expected = jax.eval_shape(lambda key: resnet.init_with_output(key, images), jax.random.key(0))[0]
    assert {name: array.shape for name, array in out.items()} == {name: array.shape for name, array in expected.items()}
    assert logits.shape == (2, 5)


def test_a_width_factor_multiplies_all_widths():
    shapes = shapes_by_path(param_shapes(tiny_axial_resnet(width_factor=3), 16, 16))
    assert shapes["conv_root/kernel"] == (7, 7, 3, 192)
    assert shapes["block2/unit01/height_axis/qkv/kernel"] == (384, 768)
    assert shapes["head/kernel"] == (1536, 5)


def test_remat_of_axial_resnet_keeps_less():
    shapes, images = param_shapes(tiny_axial_resnet(), 8, 8), make_images(2, 8, 8, 3)
    full, none = (residual_size(tiny_axial_resnet(remat=remat), shapes, images) for remat in ("full", "none"))
    assert full < 0.8 * none


def test_a_bfloat16_axial_resnet_has_float32_parameters_and_logits():
    model, images = tiny_axial_resnet(dtype="bfloat16"), jnp.zeros((1, 16, 16, 3))
    (logits, out), variables = jax.eval_shape(lambda key: model.init_with_output(key, images), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    assert {array.dtype for array in out.values()} == {jnp.dtype("bfloat16")}
