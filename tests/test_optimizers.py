import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec

from vit_jax import optimizers, sharding
from vit_jax.checkpoints import Checkpoints
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.layers import stack_layers
from vit_jax.objectives.classification import Classification
from vit_jax.train_step import TrainStep

PARAMS = {
    "cls": jnp.ones((1, 1, 4)),
    "Transformer": {
        "posembed_input": {"pos_embedding": jnp.ones((1, 5, 4))},
        "encoder_norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    },
    "head": {"kernel": jnp.full((4, 2), 2.0), "bias": jnp.ones(2)},
}


def test_linear_schedule_warms_up_and_falls_to_its_end():
    schedule = optimizers.make_schedule(
        "linear", learning_rate=1e-3, num_steps=110, warmup_steps=10, end_learning_rate=1e-5
    )
    steps = [0, 5, 10, 60, 110]
    np.testing.assert_allclose([schedule(s) for s in steps], [0, 5e-4, 1e-3, (1e-3 + 1e-5) / 2, 1e-5], rtol=1e-6)


def test_cosine_schedule_follows_half_a_cosine():
    schedule = optimizers.make_schedule("cosine", learning_rate=3e-3, num_steps=110, warmup_steps=10)
    steps = np.array([10, 35, 60, 110])
    expected = 3e-3 * 0.5 * (1 + np.cos(np.pi * (steps - 10) / 100))
    np.testing.assert_allclose([schedule(s) for s in steps], expected, rtol=1e-5, atol=1e-10)


def test_cosine_ends_at_its_end_learning_rate():
    schedule = optimizers.make_schedule("cosine", learning_rate=3e-3, num_steps=100, end_learning_rate=3e-4)
    np.testing.assert_allclose([schedule(0), schedule(50), schedule(100)], [3e-3, 1.65e-3, 3e-4], rtol=1e-5)


def test_constant_schedule_without_warmup():
    schedule = optimizers.make_schedule("constant", learning_rate=0.1, num_steps=10)
    np.testing.assert_allclose([schedule(0), schedule(9)], 0.1)


def test_schedule_of_drops_divides_the_learning_rate_by_10_at_shares_of_the_run():
    schedule = optimizers.make_schedule(
        "drops", learning_rate=0.48, num_steps=400, warmup_steps=50, drop_at=(0.25, 0.575, 0.75, 0.925)
    )
    steps = [0, 25, 50, 99, 100, 229, 230, 299, 300, 369, 370, 399]
    expected = [0, 0.24, 0.48, 0.48, 0.048, 0.048, 4.8e-3, 4.8e-3, 4.8e-4, 4.8e-4, 4.8e-5, 4.8e-5]
    np.testing.assert_allclose([schedule(s) for s in steps], expected, rtol=1e-5)


def test_drops_of_a_very_short_run_fall_on_one_step():
    schedule = optimizers.make_schedule("drops", learning_rate=1.0, num_steps=4, drop_at=(0.4, 0.6, 0.8))
    np.testing.assert_allclose(jax.vmap(schedule)(np.arange(4)), [1, 1, 0.01, 0.001], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "drop_at"),
    [
        ("drops", ()),
        ("linear", (0.5,)),
        ("drops", (0.2,)),
        ("drops", (1.0,)),
        ("drops", (0.8, 0.5)),
    ],
)
def test_drops_without_their_schedule_are_refused(name, drop_at):
    with pytest.raises(UserError, match=r"optimizer\.drop_at takes growing shares of the run"):
        optimizers.make_schedule(name, learning_rate=0.1, num_steps=10, warmup_steps=3, drop_at=drop_at)


@pytest.mark.parametrize(
    ("name", "warmup_steps", "message"),
    [("linaer", 0, "Did you mean 'linear'"), ("linear", 10, "warmup_steps 10 must be less than the run's 10 steps")],
)
def test_wrong_schedules_are_refused(name, warmup_steps, message):
    with pytest.raises(UserError, match=message):
        optimizers.make_schedule(name, learning_rate=0.1, num_steps=10, warmup_steps=warmup_steps)


def test_only_kernels_decay():
    assert optimizers.decay_mask(PARAMS) == {
        "cls": False,
        "Transformer": {
            "posembed_input": {"pos_embedding": False},
            "encoder_norm": {"scale": False, "bias": False},
        },
        "head": {"kernel": True, "bias": False},
    }


def update(optimizer, grads):
    @jax.jit  # compiles once, where each operation alone would be compiled by itself
    def new_params(grads):
        updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
        return optax.apply_updates(PARAMS, updates)

    return new_params(grads)


def test_adamw_decay_is_decoupled_and_multiplied_by_the_learning_rate():
    grads = optax.tree.zeros_like(PARAMS)
    new = update(optimizers.make_optimizer("adamw", lambda _: 0.01, weight_decay=0.1), grads)
    np.testing.assert_allclose(new["head"]["kernel"], 2.0 * (1 - 0.01 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(new["cls"], PARAMS["cls"])


def test_first_adamw_step_moves_by_the_learning_rate():
    grads = optax.tree.full_like(PARAMS, 0.5)
    new = update(optimizers.make_optimizer("adamw", lambda _: 0.01), grads)
    np.testing.assert_allclose(new["cls"], 1 - 0.01, rtol=1e-5)


def test_sgd_keeps_momentum_in_the_requested_dtype():
    optimizer = optimizers.make_optimizer("sgd", lambda _: 0.1, momentum_dtype="bfloat16")
    state = optimizer.init(PARAMS)
    grads = optax.tree.ones_like(PARAMS)
    total = 0.0
    for expected_momentum in (1.0, 1.9, 2.71):
        updates, state = jax.jit(optimizer.update)(grads, state, PARAMS)
        np.testing.assert_allclose(updates["cls"], -0.1 * expected_momentum, rtol=1e-2)
        total += 1
    dtypes = {leaf.dtype for leaf in optax.tree.get(state, "trace")["head"].values()}
    assert dtypes == {jnp.dtype("bfloat16")}


def test_sgd_decay_adds_to_the_gradient():
    grads = optax.tree.zeros_like(PARAMS)
    new = update(optimizers.make_optimizer("sgd", lambda _: 0.1, weight_decay=0.01), grads)
    np.testing.assert_allclose(new["head"]["kernel"], 2.0 - 0.1 * 0.01 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(new["head"]["bias"], 1.0)


def test_clipping_scales_to_the_global_norm():
    grads = optax.tree.full_like(PARAMS, 3.0)
    new = update(optimizers.make_optimizer("sgd", lambda _: 0.5, momentum=0.0, clip_norm=1.0), grads)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, new, jax.device_get(PARAMS))
    np.testing.assert_allclose(norm(moved), 0.5, rtol=1e-5)


def test_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'adamw'"):
        optimizers.make_optimizer("adam", lambda _: 0.1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_of_a_layer_is_shorter_by_the_decay_for_each_layer_above_it(name):
    params = {
        "embedding": {"kernel": jnp.ones(3)},
        "Transformer": {
            "encoderblock_0": {"MlpBlock_3": {"kernel": jnp.ones(3)}},
            "encoderblock_1": {"MlpBlock_3": {"kernel": jnp.ones(3)}},
            "encoder_norm": {"scale": jnp.ones(3)},
        },
        "head": {"kernel": jnp.ones(3)},
    }
    optimizer = optimizers.make_optimizer(name, lambda _: 0.1, momentum=0.0, layer_decay=0.5)
    grads = optax.tree.ones_like(params)
    updates, _ = jax.jit(lambda params: optimizer.update(grads, optimizer.init(params), params))(params)
    lengths = jax.tree.map(lambda update: float(-update[0] / 0.1), updates)
    assert lengths == {
        "embedding": {"kernel": pytest.approx(0.125, rel=1e-5)},
        "Transformer": {
            "encoderblock_0": {"MlpBlock_3": {"kernel": pytest.approx(0.25, rel=1e-5)}},
            "encoderblock_1": {"MlpBlock_3": {"kernel": pytest.approx(0.5, rel=1e-5)}},
            "encoder_norm": {"scale": pytest.approx(1.0, rel=1e-5)},
        },
        "head": {"kernel": pytest.approx(1.0, rel=1e-5)},
    }


def test_scanned_layers_decay_like_unrolled_ones():
    unrolled = create_model("ViT-Ti/16", num_classes=2, num_layers=3)
    shapes = jax.eval_shape(lambda: unrolled.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"])
    scales = optimizers.layer_scales(shapes, 0.75)
    stacked = optimizers.layer_scales(jax.eval_shape(stack_layers, shapes), 0.75)
    for layer in range(3):
        one = jax.tree.leaves(scales["Transformer"][f"encoderblock_{layer}"])
        all_ = jax.tree.leaves(stacked["Transformer"]["encoderblock"])
        np.testing.assert_allclose(one, [array.ravel()[layer] for array in all_], rtol=1e-6)
        assert set(one) == {0.75 ** (3 - layer)}


@pytest.mark.parametrize(
    ("name", "first", "num_layers"), [("R50x1", "root_block", 16), ("R50+ViT-B/16", "conv_root", 12),
                                      ("Axial-ViT-B/32", "embedding", 12), ("AxialResNet-26", "conv_root", 8)]
)  # fmt: skip
def test_every_model_has_its_layers(name, first, num_layers):
    model = create_model(name, num_classes=2)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"])
    scales = optimizers.layer_scales(shapes, 0.5)
    assert jax.tree.leaves(scales[first])[0] == 0.5 ** (num_layers + 1)
    assert set(jax.tree.leaves(scales["head"])) == {1.0}
    assert {0.5**power for power in range(num_layers + 2)} == set(jax.tree.leaves(scales))


def test_only_selected_parameters_are_kept():
    selected = optimizers.select_parameters(PARAMS, ["^head/", "norm/scale"])
    assert jax.tree.map(lambda leaf: leaf.shape, selected) == {
        "cls": None,
        "Transformer": {"posembed_input": {"pos_embedding": None}, "encoder_norm": {"scale": (4,), "bias": None}},
        "head": {"kernel": (4, 2), "bias": (2,)},
    }
    merged = optimizers.merge_parameters(PARAMS, jax.tree.map(jnp.zeros_like, selected))
    assert [float(leaf.ravel()[0]) for leaf in jax.tree.leaves(merged)] == [1, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["^haed/"], "'\\^haed/' is found in no parameter's name. Examples of names: .*'head/kernel'"),
        ("^head/", "takes several patterns, such as"),
        (["("], "takes patterns of parameter names"),
    ],
)
def test_wrong_selections_are_refused(patterns, message):
    with pytest.raises(UserError, match=message):
        optimizers.select_parameters(PARAMS, patterns)


LAYER = {"encoderblock_0": {"query": {"kernel": jnp.linspace(-1, 1, 24).reshape(4, 2, 3), "bias": jnp.ones((2, 3))}}}
RATE, DECAY = 0.01, 0.1


def by_hand(name):
    """What optax says of an optimizer, with the rate and the decay of these tests."""
    decayed = {"weight_decay": DECAY, "mask": optimizers.decay_mask}
    if name == "sgd":
        return optax.chain(optax.add_decayed_weights(DECAY, optimizers.decay_mask), optax.sgd(RATE, 0.9))
    if name == "adafactor":
        return optax.adafactor(
            RATE,
            min_dim_size_to_factor=32,
            multiply_by_parameter_scale=False,
            momentum=0.9,
            weight_decay_rate=RATE * DECAY,
            weight_decay_mask=optimizers.decay_mask,
        )
    return {"adamw": optax.adamw, "lamb": optax.lamb, "lion": optax.lion}[name](RATE, 0.9, 0.99, **decayed)


def two_steps(optimizer, params):
    state = optimizer.init(params)
    for scale in (1.0, -0.3):
        grads = jax.tree.map(
            lambda leaf, scale=scale: scale * jnp.cos(leaf + jnp.arange(leaf.size).reshape(leaf.shape)), params
        )
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", sorted(optimizers.OPTIMIZERS.keys() - {"muon"}))
def test_optimizer_matches_optax(name):
    params = PARAMS | LAYER | {"wide": {"kernel": jnp.ones((128, 130))}}  # large enough to be factored
    eps = {"eps": 1e-6} if name == "lamb" else {}
    ours = optimizers.make_optimizer(name, RATE, weight_decay=DECAY, b2=0.99, **eps)
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-6),
        *jax.jit(lambda params: (two_steps(ours, params), two_steps(by_hand(name), params)))(params),
    )


def test_muon_takes_the_kernels_of_layers_as_matrices_and_leaves_the_rest_to_adamw():
    ours = optimizers.make_optimizer("muon", RATE, weight_decay=DECAY, momentum=0.95)
    found = jax.jit(lambda params: two_steps(ours, params))(PARAMS | LAYER)
    adamw = optax.nadamw(RATE, 0.9, 0.999, weight_decay=DECAY, mask=optimizers.decay_mask)
    bias = {"encoderblock_0": {"query": {"bias": jnp.ones((2, 3))}}}
    expected = jax.jit(lambda params: two_steps(adamw, params))(PARAMS | bias)
    kernel = found["encoderblock_0"]["query"].pop("kernel")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    # The same gradients, for the same kernel as a matrix.
    matrix = optax.contrib.muon(RATE, beta=0.95, weight_decay=DECAY, consistent_rms=0.2)
    kernels = jnp.linspace(-1, 1, 24).reshape(4, 6)
    expected = jax.jit(lambda kernels: two_steps(matrix, kernels))(kernels)
    np.testing.assert_allclose(kernel.reshape(4, 6), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "attributes", "matrices"),
    [
        ("ViT-Ti/16", {}, 72),
        ("ViT-Ti/16", {"scan_layers": True}, 6),
        ("R50+ViT-B/16", {}, 123),
        ("R50x1", {}, 52),
        ("Axial-ViT-B/32", {}, 144),
        ("AxialResNet-26", {}, 36),
    ],
)
def test_muon_knows_the_matrices_of_every_model(name, attributes, matrices):
    model = create_model(name, num_classes=2, **attributes)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"])
    optimizer = optimizers.make_optimizer("muon", 0.1)
    state = jax.eval_shape(optimizer.init, shapes)
    momenta = jax.tree_util.tree_leaves_with_path(optax.tree.get(state, "inner_states")["muon"].inner_state[0].mu)
    assert len(momenta) == matrices
    jax.eval_shape(optimizer.update, shapes, state, shapes)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_weight_decay_applies_only_to_kernels(name):
    params = PARAMS | LAYER
    new = optimizers.make_optimizer(name, RATE, weight_decay=DECAY)
    updates, _ = jax.jit(lambda params: new.update(optax.tree.zeros_like(params), new.init(params), params))(params)
    moved = jax.tree.map(lambda leaf: bool(np.any(leaf)), updates)
    assert moved == optimizers.decay_mask(params)


class Layers(nn.Module):
    """A model with a kernel for Muon that fsdp splits and Adafactor factors."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dense(256, name="encoderblock_0")(images.reshape(len(images), -1))
        return nn.Dense(10, name="head")(nn.relu(x)), {}


def make_batch():
    rng = np.random.default_rng(0)
    return {"image": rng.integers(0, 256, (16, 8, 8, 3), np.uint8), "label": rng.integers(0, 10, 16, np.int32)}


def norm(tree):
    return np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_eight_devices_with_split_state_equal_one_and_checkpoints_restore_it(name, tmp_path):
    optimizer = optimizers.make_optimizer(name, 1e-3, weight_decay=DECAY)
    parts = {"objective": Classification(), "image_size": 8, "polyak_decay": 0.9}
    one = TrainStep(Layers(), optimizer, mesh=sharding.make_mesh(jax.devices()[:1]), **parts)
    eight = TrainStep(Layers(), optimizer, mesh=sharding.make_mesh(), sharding="fsdp", **parts)
    large = [leaf for leaf in jax.tree.leaves(eight.abstract_state) if leaf.size >= sharding.SMALLEST_SPLIT]
    assert all(leaf.sharding.spec == PartitionSpec(None, "data") for leaf in large)
    assert len(large) == 2 + {"adamw": 2, "lamb": 2}.get(name, 1)  # parameter, average, moments

    state = eight.init(seed=0)
    expected = jax.device_put(jax.device_get(state), sharding.shardings_of(one.abstract_state))
    for _ in range(2):
        (state, _), (expected, _) = eight(state, make_batch()), one(expected, make_batch())
    apart = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, jax.device_get(expected.params))
    assert norm(apart) < 1e-4 * norm(state.params)

    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(2, state, {})
        checkpoints.wait()
        _, restored, _ = checkpoints.restore_latest(eight.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    assert sharding.shardings_of(restored) == sharding.shardings_of(state)


@pytest.mark.parametrize(
    ("name", "dtype", "of_parameters"),
    [("adamw", "float32", 2), ("lion", "bfloat16", 0.5), ("muon", "float32", 1), ("adafactor", "bfloat16", 0.5)],
)
def test_bytes_of_an_optimizers_state_are_known_before_it_is_made(name, dtype, of_parameters):
    optimizer = optimizers.make_optimizer(name, 1e-3, momentum_dtype=dtype)
    step = TrainStep(create_model("ViT-S/16", num_classes=10), optimizer, Classification(), image_size=224)
    state = step.abstract_state
    share = sharding.total_bytes(state.opt_state) / sharding.total_bytes(state.params)
    assert share == pytest.approx(of_parameters, rel=0.06)
