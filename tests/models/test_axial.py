import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.models.test_resnet import run
from tests.models.tiny import (
    apply,
    assert_trees_close,
    fill,
    loss_and_grads,
    make_images,
    param_shapes,
    random_params,
    residual_size,
)
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.axial import AxialBlock, along_columns, along_rows

BLOCK = {"mlp_dim": 32, "num_heads": 2}


def tiny_axial(**attributes):
    small = {"num_classes": 5, "num_layers": 2, "hidden_dim": 16, "mlp_dim": 32, "num_heads": 2}
    return create_model("Axial-ViT-B/4", **{**small, **attributes})


def axial_block(rows, columns):
    """An `AxialBlock`, random parameters of it, and an input."""
    block = AxialBlock(BLOCK)
    x = make_images(2, rows, columns, 16)
    return block, fill(jax.eval_shape(block.init, jax.random.key(0), x)["params"]), x


def within(axis, rows, columns):
    """A mask of flattened positions that attend to each other: in the same row (axis 0) or column (axis 1)."""
    positions = np.indices((rows, columns)).reshape(2, -1)
    return positions[axis][:, None] == positions[axis][None, :]


def test_axial_block_is_attention_masked_to_the_same_row_then_to_the_same_column():
    rows, columns = 3, 4
    block, params, x = axial_block(rows, columns)
    expected = np.float64(x).reshape(2, rows * columns, 16)
    expected = reference.encoder_block(expected, params["row"], mask=within(0, rows, columns))
    expected = reference.encoder_block(expected, params["column"], mask=within(1, rows, columns))
    np.testing.assert_allclose(run(block, params, x), expected.reshape(x.shape), atol=2e-5)


@pytest.mark.parametrize(("silent", "seen"), [("column", np.s_[1, :]), ("row", np.s_[:, 2])])
def test_one_patch_influences_its_row_in_the_first_layer_and_its_column_in_the_second(silent, seen):
    block, params, x = axial_block(3, 4)
    for module, layer in (("MultiHeadDotProductAttention_1", "out"), ("MlpBlock_3", "Dense_1")):
        params[silent][module][layer] = jax.tree.map(np.zeros_like, params[silent][module][layer])
    x[1] = x[0]
    x[1, 1, 2, 0] += 1
    y = run(block, params, x)
    influenced = np.abs(y[1] - y[0]).max(axis=-1) > 1e-6
    expected = np.zeros((3, 4), bool)
    expected[seen] = True
    np.testing.assert_array_equal(influenced, expected)


def test_one_patch_influences_all_others_after_both_layers():
    block, params, x = axial_block(3, 4)
    x[1] = x[0]
    x[1, 1, 2, 0] += 1
    y = run(block, params, x)
    assert (np.abs(y[1] - y[0]).max(axis=-1) > 1e-6).all()


def test_layers_get_rows_and_columns_as_sequences():
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    rows, columns = [], []
    np.testing.assert_array_equal(along_rows(lambda tokens: rows.append(tokens) or tokens, x), x)
    np.testing.assert_array_equal(along_columns(lambda tokens: columns.append(tokens) or tokens, x), x)
    np.testing.assert_array_equal(rows[0], [x[i, j] for i in range(2) for j in range(3)])
    np.testing.assert_array_equal(columns[0], [x[i, :, j] for i in range(2) for j in range(4)])


def test_axial_vit_is_embedding_positions_blocks_norm_mean_and_head():
    model = tiny_axial()
    params = random_params(model, 8, 12)
    images = make_images(2, 8, 12, 3)
    logits, out = apply(model, params, images)
    x = np.float64(out["patch_embeddings"]).reshape(2, 6, 16) + params["posembed_input"]["pos_embedding"]
    for layer in range(2):
        block = params[f"encoderblock_{layer}"]
        x = reference.encoder_block(x, block["row"], mask=within(0, 2, 3))
        x = reference.encoder_block(x, block["column"], mask=within(1, 2, 3))
        np.testing.assert_allclose(out[f"block_{layer}"], x.reshape(2, 2, 3, 16), atol=5e-5)
    x = reference.layer_norm(x, params["encoder_norm"])
    np.testing.assert_allclose(out["encoded"], x, atol=5e-5)
    np.testing.assert_allclose(out["pre_logits"], x.mean(axis=1), atol=5e-5)
    np.testing.assert_allclose(logits, reference.dense(x.mean(axis=1), params["head"]), atol=1e-4)


def test_axial_vit_has_two_layers_for_each_of_vit():
    def block_sizes(name):
        params = param_shapes(create_model(name, num_classes=0, num_layers=2), 64, 64)
        blocks = params.get("Transformer", params)
        return [sum(leaf.size for leaf in jax.tree.leaves(blocks[f"encoderblock_{layer}"])) for layer in range(2)]

    assert block_sizes("Axial-ViT-B/32") == [2 * size for size in block_sizes("ViT-B/32")]
    assert create_model("Axial-ViT-B/32", num_classes=0).num_layers == 12


def test_axial_vit_without_classes_returns_the_representation():
    model = tiny_axial(num_classes=0)
    params = random_params(model)
    assert "head" not in params
    representation, out = apply(model, params, make_images(1, 8, 8, 3))
    np.testing.assert_array_equal(representation, out["pre_logits"])


def test_axial_vit_drops_out_in_training_only():
    model = tiny_axial(num_layers=1, dropout_rate=0.5)
    params = random_params(model)
    images = make_images(2, 8, 8, 3)
    undropped, _ = apply(tiny_axial(num_layers=1), params, images)
    np.testing.assert_allclose(apply(model, params, images)[0], undropped, atol=1e-6)
    assert np.abs(apply(model, params, images, train=True)[0] - undropped).max() > 1e-2


def test_dropout_of_axial_vit_applies_to_its_blocks_too():
    model = tiny_axial(num_layers=2, dropout_rate=0.5)
    params = random_params(model)
    _, out = apply(model, params, make_images(2, 8, 8, 3), train=True)
    x = np.float64(out["block_0"]).reshape(2, 4, 16)
    x = reference.encoder_block(x, params["encoderblock_1"]["row"], mask=within(0, 2, 2))
    x = reference.encoder_block(x, params["encoderblock_1"]["column"], mask=within(1, 2, 2))
    assert np.abs(out["block_1"] - x.reshape(2, 2, 2, 16)).max() > 1e-1


def test_remat_changes_neither_logits_nor_gradients_of_axial_vit():
    model = tiny_axial(num_layers=1)
    params = random_params(model)
    images = make_images(2, 8, 8, 3)
    expected, expected_grads = loss_and_grads(model, params, images)
    found, grads = loss_and_grads(model.clone(remat="full"), params, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert_trees_close(grads, expected_grads, rtol=1e-4, atol=1e-4)


def test_remat_of_axial_vit_keeps_less():
    shapes = param_shapes(tiny_axial())
    images = make_images(2, 8, 8, 3)
    full, dots, none = (residual_size(tiny_axial(remat=remat), shapes, images) for remat in ("full", "dots", "none"))
    assert full < 0.9 * dots
    assert dots < 0.9 * none


def test_a_bfloat16_axial_vit_has_float32_parameters_and_logits():
    model = tiny_axial(dtype="bfloat16")
    images = jnp.zeros((1, 16, 16, 3))
    (logits, out), variables = jax.eval_shape(lambda key: model.init_with_output(key, images), jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    assert {array.dtype for array in out.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"remat": "ful"}, "unknown remat 'ful'. Did you mean 'full'"),
        ({"attention": "einsums"}, "unknown attention 'einsums'. Did you mean 'einsum'"),
        ({"num_heads": 3}, "hidden_dim 16 is not divisible by num_heads 3"),
    ],
)
def test_invalid_values_of_axial_vit_are_refused(attributes, message):
    with pytest.raises(UserError, match=message):
        tiny_axial(**attributes)


def test_axial_vit_refuses_images_that_patches_do_not_tile():
    with pytest.raises(UserError, match=r"10x8 is not divisible by the patch size 4.*such as 8 or 12"):
        param_shapes(tiny_axial(), 10, 8)
