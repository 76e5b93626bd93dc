import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.models import create_model, list_models
from vit_jax.models.vit import stack_layers, unstack_layers

TINY = {"num_layers": 2, "hidden_dim": 16, "mlp_dim": 32, "num_heads": 2}


def tiny(**overrides):
    return create_model("ViT-Ti/4", **{"num_classes": 5, **TINY, **overrides})


def random_params(model, image_size=8, seed=0):
    """Parameters without the zeros of the initialisation, which hide mistakes."""
    params = model.init(jax.random.key(seed), jnp.zeros((1, image_size, image_size, 3)))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


def count(name, **overrides):
    model = create_model(name, num_classes=0, **overrides)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3))))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(7), (3, 8, 8, 3), minval=-1)


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


def test_parameter_names_and_shapes_are_those_of_released_checkpoints():
    model = tiny(pre_logits=True)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))["params"]
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
    found = {
        "/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert found == expected


def test_initialisation_is_that_of_the_released_code():
    params = create_model("ViT-S/16", num_classes=10, head_bias=-10.0, num_layers=1).init(
        jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    )["params"]
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


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_scan_and_remat_change_neither_logits_nor_gradients(images, remat, scan_layers):
    params = random_params(tiny())

    def loss(model, params):
        return jnp.square(model.apply({"params": params}, images, train=True)[0]).sum()

    expected, expected_grads = jax.value_and_grad(lambda params: loss(tiny(), params))(params)
    model = tiny(scan_layers=scan_layers, remat=remat)
    given = stack_layers(params) if scan_layers else params
    found, grads = jax.value_and_grad(lambda params: loss(model, params))(given)
    if scan_layers:
        grads = unstack_layers(grads)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, expected_grads)


def test_stacking_layers_and_back_changes_nothing():
    params = random_params(tiny(num_layers=3))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stack_layers(params)), params)


def test_scanned_model_names_its_intermediates_like_the_unrolled_one(images):
    params = random_params(tiny())
    _, unrolled = tiny().apply({"params": params}, images)
    _, scanned = tiny(scan_layers=True).apply({"params": stack_layers(params)}, images)
    assert unrolled.keys() == scanned.keys()
    for name in unrolled:
        np.testing.assert_allclose(scanned[name], unrolled[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pool", "tokens"), [("cls", 5), ("gap", 4)])
def test_intermediates_have_the_documented_shapes(images, pool, tokens):
    model = tiny(pool=pool)
    params = random_params(model)
    logits, out = model.apply({"params": params}, images)
    assert logits.shape == (3, 5)
    assert out["patch_embeddings"].shape == (3, 2, 2, 16)
    assert out["encoded"].shape == out["encoder_input"].shape == out["block_1"].shape == (3, tokens, 16)
    assert out["pre_logits"].shape == (3, 16)
    np.testing.assert_allclose(logits, out["pre_logits"] @ params["head"]["kernel"] + params["head"]["bias"], atol=1e-5)


def test_gap_has_no_class_token_and_averages_all_tokens(images):
    model = tiny(pool="gap")
    params = random_params(model)
    assert "cls" not in params
    _, out = model.apply({"params": params}, images)
    np.testing.assert_allclose(out["pre_logits"], out["encoded"].mean(axis=1), atol=1e-6)


def test_pre_logits_layer_is_a_tanh_of_the_representation(images):
    model = tiny(pre_logits=True)
    params = random_params(model)
    _, out = model.apply({"params": params}, images)
    layer = params["pre_logits"]
    np.testing.assert_allclose(
        out["pre_logits"], np.tanh(out["encoded"][:, 0] @ layer["kernel"] + layer["bias"]), atol=1e-5
    )


def test_model_without_classes_returns_the_representation(images):
    model = tiny(num_classes=0)
    params = random_params(model)
    assert "head" not in params
    representation, out = model.apply({"params": params}, images)
    np.testing.assert_array_equal(representation, out["pre_logits"])


def test_dropout_acts_in_training_only(images):
    model = tiny(dropout_rate=0.5)
    params = random_params(model)

    def apply(seed, train):
        return model.apply({"params": params}, images, train=train, rngs={"dropout": jax.random.key(seed)})[0]

    np.testing.assert_array_equal(apply(0, False), apply(1, False))
    np.testing.assert_array_equal(apply(0, True), apply(0, True))
    assert np.abs(apply(0, True) - apply(1, True)).max() > 1e-3


def test_dropout_comes_after_the_position_embeddings(images):
    model = tiny(dropout_rate=0.5)
    params = random_params(model)
    _, out = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(0)})
    dropped = np.asarray(out["encoder_input"]) == 0
    assert 0.4 < dropped.mean() < 0.6


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_logits(images):
    model = tiny(dtype="bfloat16")
    params = random_params(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, out = model.apply({"params": params}, images)
    assert logits.dtype == jnp.float32
    assert out["encoded"].dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, tiny().apply({"params": params}, images)[0], atol=0.15)


def test_image_that_patches_do_not_tile_is_refused_with_a_size_that_works():
    with pytest.raises(UserError, match=r"10x10 is not divisible by the patch size 4.*such as 8 or 12"):
        tiny().init(jax.random.key(0), jnp.zeros((1, 10, 10, 3)))


def test_non_square_images_work():
    model = tiny()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 16, 3)))
    _, out = model.apply(variables, jnp.zeros((2, 8, 16, 3)))
    assert out["patch_embeddings"].shape == (2, 2, 4, 16)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("ViT-B16", {}, "Did you mean 'ViT-B/16'"),
        ("vit-l/16", {}, "Did you mean 'ViT-L/16'"),
        ("ViT-X/16", {}, "unknown model 'ViT-X/16'"),
        ("ViT-B/0", {}, "unknown model"),
        ("ViT-B/16", {"droput_rate": 0.1}, "Did you mean 'dropout_rate'"),
        ("ViT-B/16", {"pool": "cls_token"}, "Did you mean 'cls'"),
        ("ViT-B/16", {"remat": "ful"}, "Did you mean 'full'"),
        ("ViT-B/16", {"num_heads": 7}, "not divisible by num_heads 7"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest_one(name, overrides, message):
    with pytest.raises(UserError, match=message):
        create_model(name, num_classes=10, **overrides)


def test_list_models_matches_patterns_and_every_name_creates():
    assert "ViT-H/14" in list_models()
    assert list_models("ViT-L/*") == ["ViT-L/8", "ViT-L/14", "ViT-L/16", "ViT-L/32"]
    for name in list_models():
        assert create_model(name, num_classes=1).patch_size == int(name.split("/")[1])
