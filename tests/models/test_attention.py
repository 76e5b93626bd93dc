import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import reference
from tests.models.tiny import apply, assert_trees_close, fast_jit, fill, make_images, random_params, tiny
from vit_jax.errors import UserError
from vit_jax.models.attention import MultiHeadDotProductAttention, attend, attend_by_einsum, relative_logits
from vit_jax.models.layers import stack_layers

BATCH, TOKENS, HEADS, HEAD_DIM = 2, 7, 3, 8
WIDTH = HEADS * HEAD_DIM


def make_operands(dtype="float32", biased=True):
    """Query, key and value `[batch, tokens, heads, head_dim]`, and a bias `[batch, heads, tokens, tokens]` or None."""
    generator = np.random.default_rng(0)
    query, key, value = generator.normal(size=(3, BATCH, TOKENS, HEADS, HEAD_DIM))
    bias = generator.normal(size=(BATCH, HEADS, TOKENS, TOKENS)) if biased else None
    return [None if array is None else jnp.asarray(array, dtype) for array in (query, key, value, bias)]


def expected_attention(query, key, value, bias):
    query, key, value = (np.float64(array).swapaxes(1, 2) for array in (query, key, value))
    y, weights = reference.attend(query, key, value, 0.0 if bias is None else np.float64(bias))
    return y.swapaxes(1, 2), weights


def make_attention(**attributes):
    """The module and random parameters of it."""
    module = MultiHeadDotProductAttention(HEADS, **attributes)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, TOKENS, WIDTH)))
    return module, fill(shapes["params"])


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("implementation", ["auto", "einsum", "xla", "half_logits"])
def test_attention_is_softmax_of_scaled_products(implementation, biased):
    operands = make_operands(biased=biased)
    y = fast_jit(functools.partial(attend, implementation=implementation))(*operands)
    np.testing.assert_allclose(y, expected_attention(*operands)[0], atol=2e-6)


# Half a unit in the last place is 2e-3 for a bfloat16 of about 1; the operands and the weights are rounded to it.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-6), ("bfloat16", 6e-2)])
@pytest.mark.parametrize("implementation", ["auto", "xla", "half_logits"])
def test_implementations_agree_in_outputs_and_gradients(implementation, dtype, tolerance):
    operands = make_operands(dtype)
    direction = make_operands()[0]

    def along_direction(implementation, *operands):
        y = attend(*operands, implementation=implementation)
        return (y.astype(jnp.float32) * direction).sum(), y

    def outputs(implementation):
        function = functools.partial(along_direction, implementation)
        grads, y = fast_jit(jax.grad(function, argnums=(0, 1, 2, 3), has_aux=True))(*operands)
        assert y.dtype == dtype
        assert {grad.dtype for grad in grads} == {jnp.dtype(dtype)}
        return [array.astype(jnp.float32) for array in (y, *grads)]

    assert_trees_close(outputs(implementation), outputs("einsum"), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_implementations_agree_within_a_model_of_relative_positions(dtype):
    images = make_images(2, 8, 8, 3)

    def encoded(attention):
        model = tiny(position_embedding="relative", attention=attention, dtype=dtype)
        return apply(model, random_params(model), images)[1]["encoded"].astype(jnp.float32)

    tolerance = {"float32": 5e-6, "bfloat16": 6e-2}[dtype]
    np.testing.assert_allclose(encoded("xla"), encoded("einsum"), atol=tolerance)


@pytest.mark.parametrize("implementation", ["einsum", "xla"])
def test_logits_of_bfloat16_operands_are_float32(implementation):
    # The logits are 256 and 256.5, which are the same in bfloat16.
    query = jnp.array([[[[32, 1, 0, 0]]]], "bfloat16")
    key = jnp.array([[[[16, 0, 0, 0]], [[16, 1, 0, 0]]]], "bfloat16")
    value = jnp.array([[[[0, 0, 0, 0]], [[1, 1, 1, 1]]]], "bfloat16")
    y = fast_jit(functools.partial(attend, implementation=implementation))(query, key, value)
    np.testing.assert_allclose(y.astype(jnp.float32), 1 / (1 + math.exp(-0.5)), atol=4e-3)


def test_half_logits_stay_in_the_dtype_of_the_operands():
    query, key, value, _ = make_operands("bfloat16", biased=False)
    program = str(jax.make_jaxpr(functools.partial(attend, implementation="half_logits"))(query, key, value))
    assert "preferred_element_type=bfloat16" in program
    assert "preferred_element_type=float32" not in program


def test_large_logits_do_not_overflow():
    query, key, value, _ = make_operands(biased=False)
    for implementation in ("einsum", "xla", "half_logits"):
        y = attend(1e4 * query, key, value, implementation=implementation)
        best = expected_attention(1e4 * query, key, value, None)[0]
        np.testing.assert_allclose(y, best, atol=1e-5)


def test_cudnn_on_a_cpu_is_refused_with_what_to_use():
    with pytest.raises(UserError, match=r"'cudnn' needs an NVIDIA GPU, not cpu\. Use 'auto'"):
        attend(*make_operands(), implementation="cudnn")


def test_cudnn_in_a_model_on_a_cpu_is_refused_when_it_is_called():
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        random_params(tiny(attention="cudnn"))


def dot_products(implementation, platform):
    """Which axes the matrix products of the compiler's input for that platform loop over."""
    function = jax.jit(functools.partial(attend, implementation=implementation))
    lowered = function.trace(*make_operands()).lower(lowering_platforms=(platform,))
    return re.findall(r"stablehlo.dot_general.*batching_dims = (\[.*?\] x \[.*?\])", lowered.as_text())


def test_auto_lowers_for_tpu_on_a_cpu_without_the_branch_for_cpu():
    assert len(dot_products("auto", "tpu")) == 2
    assert dot_products("auto", "tpu") == dot_products("xla", "tpu") != dot_products("einsum", "tpu")


def test_auto_lowers_for_cpu_only_as_einsum():
    assert dot_products("auto", "cpu") == dot_products("einsum", "cpu")


def test_model_lowers_for_tpu_on_a_cpu():
    model = tiny(num_layers=1, dtype="bfloat16")
    params = random_params(model)
    function = jax.jit(jax.grad(lambda params: model.apply({"params": params}, jnp.zeros((2, 8, 8, 3)))[0].sum()))
    text = function.trace(params).lower(lowering_platforms=("tpu",)).as_text()
    forward = [line for line in text.splitlines() if "dot_general" in line and "2x5x2x1x8xbf16" in line]
    assert forward, "the attention is not that of jax.nn.dot_product_attention"


@pytest.mark.parametrize("tokens", [1, 2, 3, 6])
def test_relative_logits_are_products_with_the_embedding_of_the_offset(tokens):
    generator = np.random.default_rng(0)
    query = generator.normal(size=(2, tokens, 3, 4)).astype(np.float32)
    embedding = generator.normal(size=(2 * tokens - 1, 3, 4)).astype(np.float32)
    expected = reference.relative_logits(query.swapaxes(1, 2), embedding)
    np.testing.assert_allclose(relative_logits(query, embedding), expected, atol=1e-5)


def test_first_relative_embedding_is_of_the_last_query_and_the_first_key():
    embedding = np.zeros((2 * TOKENS - 1, HEADS, HEAD_DIM))
    embedding[0] = 1
    logits = np.asarray(relative_logits(jnp.ones((1, TOKENS, HEADS, HEAD_DIM)), embedding))
    assert (logits[0, :, TOKENS - 1, 0] == HEAD_DIM).all()
    assert np.count_nonzero(logits) == HEADS


def test_relative_attention_adds_its_logits_before_the_softmax():
    module, params = make_attention(relative=True)
    assert params["relative_embedding"].shape == (2 * TOKENS - 1, HEADS, HEAD_DIM)
    x = np.random.default_rng(1).normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
    y, _ = fast_jit(module.apply)({"params": params}, x)
    expected = reference.attention(x, x, params, relative_embedding=params["relative_embedding"])
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_queries_attend_to_other_tokens_where_given():
    module, params = make_attention()
    generator = np.random.default_rng(1)
    queries = generator.normal(size=(BATCH, 2, WIDTH)).astype(np.float32)
    tokens = generator.normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
    y, _ = fast_jit(module.apply)({"params": params}, queries, tokens)
    np.testing.assert_allclose(y, reference.attention(queries, tokens, params), atol=2e-5)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("position_embedding", ["learned_1d", "relative"])
def test_returned_attention_is_of_all_pairs_and_sums_to_one(position_embedding, scan_layers):
    model = tiny(return_attention=True, position_embedding=position_embedding)
    params = random_params(model)
    images = make_images(3, 8, 8, 3)
    if scan_layers:
        model, params = model.clone(scan_layers=True), stack_layers(params)
    _, out = apply(model, params, images)
    assert {name for name in out if name.startswith("attention")} == {"attention_0", "attention_1"}
    for layer in range(2):
        weights = np.asarray(out[f"attention_{layer}"])
        assert weights.shape == (3, 2, 5, 5)
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_returned_attention_reproduces_the_layers_output(scan_layers):
    model = tiny(return_attention=True)
    params = random_params(model)
    images = make_images(3, 8, 8, 3)
    if scan_layers:
        _, out = apply(model.clone(scan_layers=True), stack_layers(params), images)
    else:
        _, out = apply(model, params, images)
    x = np.float64(out["encoder_input"])
    for layer in range(2):
        block = params["Transformer"][f"encoderblock_{layer}"]
        attention = block["MultiHeadDotProductAttention_1"]
        y = reference.layer_norm(x, block["LayerNorm_0"])
        value = np.einsum("btc,chd->bthd", y, attention["value"]["kernel"]) + attention["value"]["bias"]
        y = np.einsum("bhqk,bkhd->bqhd", out[f"attention_{layer}"], value)
        x = x + np.einsum("bqhd,hdc->bqc", y, attention["out"]["kernel"]) + attention["out"]["bias"]
        x = x + reference.mlp(reference.layer_norm(x, block["LayerNorm_2"]), block["MlpBlock_3"])
        np.testing.assert_allclose(out[f"block_{layer}"], x, atol=1e-5)
        x = np.float64(out[f"block_{layer}"])


def test_returning_attention_changes_no_logits():
    params = random_params(tiny())
    images = make_images(3, 8, 8, 3)
    logits, _ = apply(tiny(return_attention=True), params, images)
    np.testing.assert_allclose(logits, apply(tiny(), params, images)[0], atol=1e-6)


@pytest.mark.parametrize("attributes", [{}, {"attention_dropout_rate": 0.1}], ids=str)
def test_attention_is_returned_only_on_request(attributes):
    model = tiny(**attributes)
    _, out = apply(model, random_params(model), make_images(1, 8, 8, 3), train=True)
    assert not any(name.startswith("attention") for name in out)


def test_dropped_attention_weights_count_nothing_and_the_others_more():
    query, key, value, bias = make_operands()
    keep = np.random.default_rng(2).random((BATCH, HEADS, TOKENS, TOKENS)) < 0.75
    y, weights = attend_by_einsum(query, key, value, bias, keep=keep, keep_rate=0.75)
    _, expected_weights = expected_attention(query, key, value, bias)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-6)
    expected = np.einsum("bhqk,bkhd->bqhd", expected_weights * keep / 0.75, np.float64(value))
    np.testing.assert_allclose(y, expected, atol=2e-6)


def test_attention_dropout_changes_outputs_in_training_only():
    model = tiny(attention_dropout_rate=0.5)
    params = random_params(model)
    images = make_images(3, 8, 8, 3)
    undropped, _ = apply(tiny(), params, images)
    np.testing.assert_allclose(apply(model, params, images)[0], undropped, atol=1e-6)
    assert np.abs(apply(model, params, images, train=True)[0] - undropped).max() > 1e-2


@pytest.mark.parametrize("attention", ["xla", "cudnn", "half_logits"])
def test_attention_dropout_refuses_implementations_that_have_none(attention):
    model = tiny(attention=attention, attention_dropout_rate=0.1)
    params = random_params(tiny())
    with pytest.raises(UserError, match=rf"'{attention}' cannot drop .* is 0\.1\. Use 'auto' or 'einsum'"):
        apply(model, params, make_images(1, 8, 8, 3), train=True)


def test_attention_dropout_does_not_affect_implementations_outside_training():
    params = random_params(tiny())
    images = make_images(3, 8, 8, 3)
    model = tiny(attention="half_logits", attention_dropout_rate=0.1)
    expected, _ = apply(tiny(attention="half_logits"), params, images)
    np.testing.assert_array_equal(apply(model, params, images)[0], expected)


def test_weights_are_returned_whatever_the_implementation():
    module, params = make_attention(implementation="half_logits", return_weights=True)
    x = np.random.default_rng(1).normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
    _, weights = fast_jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)


def test_attention_dropout_follows_from_the_key():
    module, params = make_attention(dropout_rate=0.5, deterministic=False)
    x = np.random.default_rng(1).normal(size=(BATCH, TOKENS, WIDTH)).astype(np.float32)
    apply_with = fast_jit(lambda seed: module.apply({"params": params}, x, rngs={"dropout": jax.random.key(seed)})[0])
    np.testing.assert_array_equal(apply_with(0), apply_with(0))
    assert np.abs(apply_with(0) - apply_with(1)).max() > 1e-2


def test_attention_dropout_keeps_the_expectation():
    module, params = make_attention(dropout_rate=0.3, deterministic=False)
    x = np.random.default_rng(1).normal(size=(1, TOKENS, WIDTH)).astype(np.float32)
    number = 4000
    copies = np.broadcast_to(x, (number, TOKENS, WIDTH))
    y, _ = fast_jit(module.apply)({"params": params}, copies, rngs={"dropout": jax.random.key(0)})
    error = np.abs(y.mean(axis=0) - reference.attention(x, x, params)[0])
    # A mean of n is off by more than 5 standard deviations / sqrt(n) once in a million.
    assert (error < 5 * y.std(axis=0) / math.sqrt(number)).all()


def test_attention_dropout_is_drawn_for_each_example_head_query_and_key():
    # With equal logits and one-hot values, the output of the heads is the kept weights themselves.
    module, params = make_attention(dropout_rate=0.4, deterministic=False)
    number = 400
    one_hot = np.eye(HEAD_DIM)[:TOKENS]
    params = jax.tree.map(np.zeros_like, params)
    params["value"]["kernel"] = np.broadcast_to(np.eye(WIDTH)[:, None, :HEAD_DIM], (WIDTH, HEADS, HEAD_DIM)).copy()
    params["out"]["kernel"] = np.eye(WIDTH).reshape(HEADS, HEAD_DIM, WIDTH)
    x = np.zeros((number, TOKENS, WIDTH), np.float32)
    x[:, :, :HEAD_DIM] = one_hot
    y, _ = fast_jit(module.apply)({"params": params}, x, rngs={"dropout": jax.random.key(0)})
    kept = np.asarray(y).reshape(number, TOKENS, HEADS, HEAD_DIM)[..., :TOKENS] > 0
    for axis in range(4):
        others = tuple(other for other in range(4) if other != axis)
        np.testing.assert_allclose(kept.mean(axis=others), 0.6, atol=0.2)
        # Two neighbours along any axis agree as often as independent draws do: 0.6^2 + 0.4^2.
        agreement = (np.diff(kept.astype(int), axis=axis) == 0).mean()
        assert agreement == pytest.approx(0.52, abs=0.03)
