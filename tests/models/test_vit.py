import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from vit_jax.models.layers import MlpBlock, stack_layers, unstack_layers
from vit_jax.models.vit import EncoderBlock


def count(name, **overrides):
    shapes = param_shapes(create_model(name, num_classes=0, scan_layers=True, **overrides), 224, 224)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.fixture
def images():
    return make_images(3, 8, 8, 3)


@pytest.mark.parametrize(
    ("name", "without_head", "with_pre_logits"),
    [
        ("ViT-B/16", 85_798_656, 86_389_248),
        ("ViT-L/16", 303_301_632, 304_351_232),
        ("ViT-H/14", 630_764_800, 632_404_480),
    ],
)
def test_parameter_counts_are_the_papers(name, without_head, with_pre_logits):
    assert count(name) == without_head
    assert count(name, pre_logits=True) == with_pre_logits


def test_parameter_names_and_shapes_match_released_checkpoints():
    block = {
        "LayerNorm_0/scale": (16,),
        "LayerNorm_0/bias": (16,),
        "LayerNorm_2/scale": (16,),
        "LayerNorm_2/bias": (16,),
        "MlpBlock_3/Dense_0/kernel": (16, 32),
        "MlpBlock_3/Dense_0/bias": (32,),
        "MlpBlock_3/Dense_1/kernel": (32, 16),
        "MlpBlock_3/Dense_1/bias": (16,),
        "MultiHeadDotProductAttention_1/out/kernel": (2, 8, 16),
        "MultiHeadDotProductAttention_1/out/bias": (16,),
    }
    for name in ("query", "key", "value"):
        block[f"MultiHeadDotProductAttention_1/{name}/kernel"] = (16, 2, 8)
        block[f"MultiHeadDotProductAttention_1/{name}/bias"] = (2, 8)
    expected = {
        "cls": (1, 1, 16),
        "embedding/kernel": (4, 4, 3, 16),
        "embedding/bias": (16,),
        "Transformer/posembed_input/pos_embedding": (1, 5, 16),
        "Transformer/encoder_norm/scale": (16,),
        "Transformer/encoder_norm/bias": (16,),
        "pre_logits/kernel": (16, 16),
        "pre_logits/bias": (16,),
        "head/kernel": (16, 5),
        "head/bias": (5,),
        **{f"Transformer/encoderblock_{i}/{name}": shape for i in range(2) for name, shape in block.items()},
    }
    assert shapes_by_path(param_shapes(tiny(pre_logits=True))) == expected


def test_initialisation_matches_the_released_code():
    model = create_model("ViT-S/16", num_classes=10, head_bias=-10.0, num_layers=1)
    params = fast_jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    block = params["Transformer"]["encoderblock_0"]
    xavier_bound = np.sqrt(6 / (384 + 1536))
    dense = block["MlpBlock_3"]["Dense_0"]["kernel"]
    assert np.abs(dense).max() <= xavier_bound
    np.testing.assert_allclose(np.std(dense), xavier_bound / np.sqrt(3), rtol=0.02)
    query = block["MultiHeadDotProductAttention_1"]["query"]["kernel"]
    np.testing.assert_allclose(np.std(query), np.sqrt(2 / (384 + 384)), rtol=0.02)
    np.testing.assert_allclose(np.std(params["embedding"]["kernel"]), np.sqrt(1 / (16 * 16 * 3)), rtol=0.02)
    np.testing.assert_allclose(np.std(params["Transformer"]["posembed_input"]["pos_embedding"]), 0.02, rtol=0.05)
    assert 0 < np.abs(block["MlpBlock_3"]["Dense_0"]["bias"]).max() < 1e-5
    assert not np.any(params["cls"])
    assert not np.any(params["head"]["kernel"])
    np.testing.assert_array_equal(params["head"]["bias"], -10.0)


# Where the positions come from decides what a scan and a recomputation have to carry. All ways once, then each of the
# two with each of the others.
SCANS_AND_REMATS = {
    ("learned_1d", "stem"): [(False, "dots"), (False, "full"), (True, "none"), (True, "dots"), (True, "full")],
    ("learned_2d", "every_layer"): [(False, "full"), (True, "dots")],
    ("learned_1d", "shared"): [(False, "dots"), (True, "full")],
    ("relative", "every_layer"): [(False, "dots"), (True, "full")],
    ("relative", "shared"): [(False, "full"), (True, "dots")],
}


@pytest.mark.parametrize(("kind", "place"), SCANS_AND_REMATS)
def test_scan_and_remat_change_neither_logits_nor_gradients(images, kind, place):
    plain = tiny(position_embedding=kind, position_embedding_at=place)
    params = random_params(plain)
    expected, expected_grads = loss_and_grads(plain, params, images)
    for scan_layers, remat in SCANS_AND_REMATS[kind, place]:
        model = plain.clone(scan_layers=scan_layers, remat=remat)
        found, grads = loss_and_grads(model, stack_layers(params) if scan_layers else params, images)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        # Gradients are about 10; a wrong one is off by its own size.
        assert_trees_close(unstack_layers(grads) if scan_layers else grads, expected_grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_more_remat_keeps_less(images, scan_layers):
    params = random_params(tiny())
    params = stack_layers(params) if scan_layers else params
    full, dots, none = (
        residual_size(tiny(scan_layers=scan_layers, remat=remat), params, images) for remat in ("full", "dots", "none")
    )
    assert full < 0.9 * dots
    assert dots < 0.9 * none


def test_remat_draws_the_same_dropout_again_in_the_backward_pass(images):
    model = tiny(num_layers=1, dropout_rate=0.3, attention_dropout_rate=0.3)
    params = random_params(model)

    def loss(model, params):
        logits, _ = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
        return jnp.square(logits).sum()

    expected, found = (
        fast_jit(jax.value_and_grad(lambda params, remat=remat: loss(model.clone(remat=remat), params)))(params)
        for remat in ("none", "full")
    )
    assert_trees_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_layers", [1, 3, 11])
def test_stacking_layers_and_back_changes_nothing(num_layers):
    params = random_params(tiny(num_layers=num_layers, position_embedding_at="every_layer"))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stack_layers(params)), params)


def test_stacked_layers_are_the_parameters_of_the_scanned_model():
    for attributes in ({}, {"position_embedding_at": "every_layer"}, {"position_embedding": "relative"}):
        stacked = jax.eval_shape(stack_layers, param_shapes(tiny(num_layers=3, **attributes)))
        expected = param_shapes(tiny(num_layers=3, scan_layers=True, **attributes))
        assert shapes_by_path(stacked) == shapes_by_path(expected)


def test_stacking_leaves_its_input_as_it_is():
    params = random_params(tiny())
    before = shapes_by_path(params)
    stacked = stack_layers(params)
    unstack_layers(stacked)
    assert shapes_by_path(params) == before
    assert "encoderblock" in stacked["Transformer"]


def test_scanned_layers_are_initialised_unlike_each_other():
    params = fast_jit(tiny(scan_layers=True).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    first, second = params["Transformer"]["encoderblock"]["MlpBlock_3"]["Dense_0"]["kernel"]
    assert np.abs(first - second).max() > 0.1


def test_scanned_model_names_its_intermediates_like_the_unrolled_one(images):
    params = random_params(tiny())
    _, unrolled = apply(tiny(), params, images)
    _, scanned = apply(tiny(scan_layers=True), stack_layers(params), images)
    assert unrolled.keys() == scanned.keys()
    for name in unrolled:
        np.testing.assert_allclose(scanned[name], unrolled[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pool", "tokens"), [("cls", 5), ("gap", 4), ("map", 4)])
def test_intermediates_have_the_documented_shapes(images, pool, tokens):
    model = tiny(pool=pool)
    params = random_params(model)
    logits, out = apply(model, params, images)
    assert logits.shape == (3, 5)
    assert out["patch_embeddings"].shape == (3, 2, 2, 16)
    assert out["encoded"].shape == out["encoder_input"].shape == out["block_1"].shape == (3, tokens, 16)
    assert out["pre_logits"].shape == (3, 16)
    np.testing.assert_allclose(logits, out["pre_logits"] @ params["head"]["kernel"] + params["head"]["bias"], atol=1e-5)


def test_cls_head_takes_the_first_token(images):
    _, out = apply(tiny(), random_params(tiny()), images)
    np.testing.assert_array_equal(out["pre_logits"], out["encoded"][:, 0])


def test_gap_has_no_class_token_and_averages_all_tokens(images):
    model = tiny(pool="gap")
    params = random_params(model)
    assert "cls" not in params
    _, out = apply(model, params, images)
    np.testing.assert_allclose(out["pre_logits"], out["encoded"].mean(axis=1), atol=1e-6)


def test_map_has_no_class_token_and_attends_from_a_learned_query_to_all_tokens(images):
    model = tiny(pool="map")
    params = random_params(model)
    assert "cls" not in params
    _, out = apply(model, params, images)
    head = params["MAPHead_0"]
    probe = np.repeat(head["probe"], 3, axis=0)
    x = reference.attention(probe, np.float64(out["encoded"]), head["MultiHeadDotProductAttention_0"])
    x = x + reference.mlp(reference.layer_norm(x, head["LayerNorm_0"]), head["MlpBlock_0"])
    np.testing.assert_allclose(out["pre_logits"], x[:, 0], atol=1e-5)


@pytest.mark.parametrize("pool", ["cls", "gap", "map"])
def test_pre_logits_layer_is_a_tanh_of_the_representation(images, pool):
    params = random_params(tiny(pool=pool, pre_logits=True))
    _, out = apply(tiny(pool=pool, pre_logits=True), params, images)
    _, without = apply(tiny(pool=pool), {name: params[name] for name in params if name != "pre_logits"}, images)
    layer = params["pre_logits"]
    expected = np.tanh(without["pre_logits"] @ layer["kernel"] + layer["bias"])
    np.testing.assert_allclose(out["pre_logits"], expected, atol=1e-5)


def test_model_without_classes_returns_the_representation(images):
    model = tiny(num_classes=0)
    params = random_params(model)
    assert "head" not in params
    representation, out = apply(model, params, images)
    np.testing.assert_array_equal(representation, out["pre_logits"])


@pytest.mark.parametrize("kind", ["tanh", "exact"])
def test_gelu_is_the_approximation_or_exact(kind):
    module = MlpBlock(32, kind)
    x = 3 * make_images(7, 16)
    params = fill(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    y = fast_jit(module.apply)({"params": params}, x)
    # The two differ by up to 5e-4 a hidden unit.
    np.testing.assert_allclose(y, reference.mlp(np.float64(x), params, kind), atol=1e-5)


def test_gelu_of_the_model_applies_to_its_blocks_and_its_head(images):
    params = random_params(tiny(pool="map"))
    _, tanh = apply(tiny(pool="map"), params, images)
    _, exact = apply(tiny(pool="map", gelu="exact"), params, images)
    assert np.abs(tanh["encoded"] - exact["encoded"]).max() > 1e-5
    head = params["MAPHead_0"]
    probe = np.repeat(head["probe"], 3, axis=0)
    x = reference.attention(probe, np.float64(exact["encoded"]), head["MultiHeadDotProductAttention_0"])
    x = x + reference.mlp(reference.layer_norm(x, head["LayerNorm_0"]), head["MlpBlock_0"], "exact")
    np.testing.assert_allclose(exact["pre_logits"], x[:, 0], atol=1e-5)


def test_dropout_acts_in_training_only(images):
    model = tiny(dropout_rate=0.5)
    params = random_params(model)
    run = fast_jit(
        lambda seed, train: model.apply(
            {"params": params}, images, train=train, rngs={"dropout": jax.random.key(seed)}
        )[0],
        static_argnums=1,
    )
    np.testing.assert_array_equal(run(0, False), run(1, False))
    np.testing.assert_array_equal(run(0, True), run(0, True))
    assert np.abs(run(0, True) - run(1, True)).max() > 1e-3


def test_dropout_comes_after_the_position_embeddings(images):
    model = tiny(dropout_rate=0.5)
    _, out = apply(model, random_params(model), images, train=True)
    dropped = np.asarray(out["encoder_input"]) == 0
    assert 0.4 < dropped.mean() < 0.6


def silence(block, *branches):
    """The same parameters of a block, but that these branches add nothing."""
    outputs = {"attention": ("MultiHeadDotProductAttention_1", "out"), "mlp": ("MlpBlock_3", "Dense_1")}
    block = dict(block)
    for branch in branches:
        module, layer = outputs[branch]
        block[module] = {**block[module], layer: jax.tree.map(np.zeros_like, block[module][layer])}
    return block


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_dropout_comes_after_the_last_dense_layer_of_each_branch(branch):
    block = EncoderBlock(mlp_dim=32, num_heads=2, dropout_rate=0.4, deterministic=False)
    x = make_images(20, 5, 16)
    params = fill(jax.eval_shape(block.init, jax.random.key(0), x)["params"])
    params = silence(params, *({"attention", "mlp"} - {branch}))
    y, _ = fast_jit(block.apply)({"params": params}, x, rngs={"dropout": jax.random.key(0)})
    assert (np.asarray(y) == x).mean() == pytest.approx(0.4, abs=0.06)


def test_dropout_comes_after_the_first_dense_layer_of_the_mlp():
    module = MlpBlock(16, dropout_rate=0.5, deterministic=False)
    x = make_images(200, 16)
    params = fill(jax.eval_shape(module.init, jax.random.key(0), x)["params"])
    params["Dense_1"] = {"kernel": np.eye(16), "bias": np.zeros(16)}
    y = np.asarray(fast_jit(module.apply)({"params": params}, x, rngs={"dropout": jax.random.key(0)}))
    # What is left was kept both there and at the end, and is 4 times as large.
    assert (y != 0).mean() == pytest.approx(0.25, abs=0.04)
    hidden = reference.gelu(reference.dense(np.float64(x), params["Dense_0"]))
    np.testing.assert_allclose(y[y != 0], 4 * hidden[y != 0], rtol=1e-3, atol=1e-5)


def skip_rates(branch, scan_layers, copies=1500):
    """A model of three layers with one silent branch, its outputs by layer, and who skipped the other branch."""
    model = tiny(num_layers=3, stochastic_depth_rate=0.6)
    params = random_params(model)
    silent = {"attention": "mlp", "mlp": "attention"}.get(branch)
    if silent:
        for layer in range(3):
            name = f"encoderblock_{layer}"
            params["Transformer"][name] = silence(params["Transformer"][name], silent)
    images = np.repeat(make_images(1, 8, 8, 3), copies, axis=0)
    if scan_layers:
        _, out = apply(model.clone(scan_layers=True), stack_layers(params), images, train=True)
    else:
        _, out = apply(model, params, images, train=True)
    outputs = [np.asarray(out[name]) for name in ("encoder_input", "block_0", "block_1", "block_2")]
    return (
        params,
        outputs,
        [(after == before).all(axis=(1, 2)) for before, after in itertools.pairwise(outputs)],
    )


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_stochastic_depth_skips_branches_at_rates_that_grow_linearly_from_zero(branch, scan_layers):
    _, _, skipped = skip_rates(branch, scan_layers)
    assert not skipped[0].any()
    # Of 1500 draws the share is off by more than 0.05 once in ten thousand times.
    assert skipped[1].mean() == pytest.approx(0.3, abs=0.05)
    assert skipped[2].mean() == pytest.approx(0.6, abs=0.05)
    # Layers draw on their own; with the same numbers, every example that skips the second would skip the third.
    assert (skipped[1] & skipped[2]).mean() == pytest.approx(0.18, abs=0.04)


def test_stochastic_depth_skips_whole_examples_and_scales_up_the_others():
    params, outputs, skipped = skip_rates("mlp", scan_layers=False)
    for layer, rate in enumerate((0.0, 0.3, 0.6)):
        block = params["Transformer"][f"encoderblock_{layer}"]
        before = np.float64(outputs[layer])
        branch = reference.mlp(reference.layer_norm(before, block["LayerNorm_2"]), block["MlpBlock_3"])
        expected = before + np.where(skipped[layer][:, None, None], 0, branch / (1 - rate))
        np.testing.assert_allclose(outputs[layer + 1], expected, atol=2e-5)


def test_stochastic_depth_draws_separately_for_the_two_branches_of_a_layer():
    _, _, skipped = skip_rates("both", scan_layers=False)
    assert skipped[2].mean() == pytest.approx(0.36, abs=0.05)


def test_stochastic_depth_is_off_in_evaluation(images):
    params = random_params(tiny())
    found, _ = apply(tiny(stochastic_depth_rate=0.9), params, images)
    np.testing.assert_array_equal(found, apply(tiny(), params, images)[0])


def test_stochastic_depth_follows_from_the_key():
    model = tiny(stochastic_depth_rate=0.5)
    params = random_params(model)
    images = make_images(32, 8, 8, 3)
    run = fast_jit(
        lambda seed: model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(seed)})[0]
    )
    np.testing.assert_array_equal(run(0), run(0))
    assert np.abs(run(0) - run(1)).max() > 1e-2


@pytest.mark.parametrize("pool", ["cls", "map"])
def test_bfloat16_logits_are_close_to_those_of_float32(images, pool):
    params = random_params(tiny(pool=pool))
    expected, _ = apply(tiny(pool=pool), params, images)
    logits, _ = apply(tiny(pool=pool, dtype="bfloat16"), params, images)
    assert np.abs(expected).max() > 0.5
    # bfloat16 has 8 bits: half a unit in the last place of 3 is 0.008, and some dozen roundings add up.
    np.testing.assert_allclose(logits, expected, atol=0.1)


@pytest.mark.parametrize(
    "attributes",
    [
        {"pool": "gap", "position_embedding": "sincos_2d"},
        {"pool": "map", "position_embedding": "learned_2d", "position_embedding_at": "every_layer", "pre_logits": True},
        {"position_embedding": "relative", "return_attention": True},
        {"position_embedding": "relative", "position_embedding_at": "shared", "scan_layers": True, "remat": "full"},
        {"position_embedding_at": "shared", "dropout_rate": 0.1, "attention_dropout_rate": 0.1},
        {"stochastic_depth_rate": 0.1, "scan_layers": True},
        {"attention": "xla", "gelu": "exact"},
        {"resnet": (1,), "patch_size": 1},
    ],
    ids=str,
)
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_logits(attributes):
    model = tiny(dtype="bfloat16", **attributes)
    shapes = param_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}

    def run(params):
        images = jnp.zeros((2, 8, 8, 3))
        return model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})

    logits, out = jax.eval_shape(run, shapes)
    assert logits.dtype == jnp.float32
    assert {name for name, array in out.items() if array.dtype != jnp.bfloat16} == set()


def test_gradients_of_a_bfloat16_model_are_float32(images):
    model = tiny(dtype="bfloat16")
    grads = jax.eval_shape(
        jax.grad(lambda params: model.apply({"params": params}, images)[0].sum()), param_shapes(model)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_image_that_patches_do_not_tile_is_refused_with_a_size_that_works():
    with pytest.raises(UserError, match=r"10x10 is not divisible by the patch size 4.*such as 8 or 12"):
        param_shapes(tiny(), 10, 10)


def test_image_smaller_than_a_patch_is_refused_with_a_size_that_works():
    with pytest.raises(UserError, match=r"3x8 is not divisible by the patch size 4.*such as 4"):
        param_shapes(tiny(), 3, 8)


def test_non_square_images_are_cut_in_rows_and_columns():
    model = tiny()
    images = make_images(2, 8, 16, 3)
    params = random_params(model, 8, 16)
    _, out = apply(model, params, images)
    assert model.grid(8, 16) == (2, 4)
    assert out["patch_embeddings"].shape == (2, 2, 4, 16)
    pixels = images[:, 4:8, 12:16].reshape(2, -1)
    embedding = params["embedding"]
    expected = pixels @ embedding["kernel"].reshape(-1, 16) + embedding["bias"]
    np.testing.assert_allclose(out["patch_embeddings"][:, 1, 3], expected, atol=1e-5)


def test_hybrid_cuts_patches_from_the_feature_map():
    model = tiny(resnet=(1, 1), patch_size=2)
    params = random_params(model, 32, 48)
    _, out = apply(model, params, make_images(1, 32, 48, 3))
    assert model.pixels_per_token == 16
    assert out["feature_map"].shape == (1, 4, 6, 512)
    assert out["patch_embeddings"].shape == (1, 2, 3, 16)
    patch = np.asarray(out["feature_map"])[0, 2:4, 4:6].reshape(-1)
    expected = patch @ params["embedding"]["kernel"].reshape(-1, 16) + params["embedding"]["bias"]
    np.testing.assert_allclose(out["patch_embeddings"][0, 1, 2], expected, atol=1e-4)


def test_hybrid_refuses_images_whose_feature_map_patches_do_not_tile():
    with pytest.raises(UserError, match=r"36x32 is not divisible by the patch size 16.*such as 32 or 48"):
        tiny(resnet=(1, 1), patch_size=2).grid(36, 32)


def test_hybrid_with_single_position_patches_accepts_any_image():
    model = tiny(resnet=(1,), patch_size=1)
    assert model.grid(33, 5) == (9, 2)
    assert param_shapes(model, 33, 5)["Transformer"]["posembed_input"]["pos_embedding"].shape == (1, 19, 16)
