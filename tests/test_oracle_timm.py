"""Our model, losses and optimizers against timm's model and torch's; golden/make_vit_golden.py made the numbers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.layers import normalize_images, stack_layers, unstack_layers
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.classification import Classification
from vit_jax.objectives.losses import Loss
from vit_jax.optimizers import make_optimizer, make_schedule
from vit_jax.sharding import batch_sharding, make_mesh, replicated
from vit_jax.train_step import TrainState, TrainStep

GOLDEN = pathlib.Path(__file__).parent / "golden" / "vit.npz"
VARIANTS = {"cls": {}, "cls_pre_logits": {"pre_logits": True}, "gap": {"pool": "gap"}}

# The oracle computes in float64, so that the differences are our rounding; measured on a CPU, they are a third of these
# or less. A wrong model or optimizer shows: an epsilon of 1e-5 in the layer norms changes `encoded` by 7e-4.
FORWARD_TOLERANCES = {"encoded": 3e-6, "pre_logits": 3e-6, "logits": 2e-7}
LOSS_TOLERANCE = 2e-6
METRIC_TOLERANCES = {"loss": 1e-6, "accuracy": 0.0, "grad_norm": 3e-6, "learning_rate": 2e-8}
WEIGHT_TOLERANCE = 6e-7

SCHEDULES = {
    "adamw": {"name": "linear", "learning_rate": 3e-3, "warmup_steps": 2, "end_learning_rate": 1e-5},
    "sgd": {"name": "cosine", "learning_rate": 0.1, "warmup_steps": 1},
    "sgd_decay": {"name": "cosine", "learning_rate": 0.1, "warmup_steps": 1},
}
OPTIMIZERS = {
    "adamw": {"name": "adamw", "weight_decay": 0.1},
    "sgd": {"name": "sgd"},
    "sgd_decay": {"name": "sgd", "weight_decay": 0.1},
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(autouse=True, scope="module")
def full_precision():
    # Accelerators multiply float32 in fewer bits unless told otherwise.
    with jax.default_matmul_precision("highest"):
        yield


def make_model(variant, **overrides):
    return VisionTransformer(
        num_classes=7,
        patch_size=4,
        num_layers=2,
        hidden_dim=32,
        mlp_dim=64,
        num_heads=4,
        **VARIANTS[variant],
        **overrides,
    )


def section(golden, prefix):
    """The arrays whose names begin so, without the prefix."""
    return {name.removeprefix(prefix): array for name, array in golden.items() if name.startswith(prefix)}


def make_params(golden, variant):
    """The oracle's initial weights as a tree."""
    weights = section(golden, "weights/")
    if variant != "cls_pre_logits":
        del weights["pre_logits/kernel"], weights["pre_logits/bias"]
    if variant == "gap":
        del weights["cls"]
        weights["Transformer/posembed_input/pos_embedding"] = weights["Transformer/posembed_input/pos_embedding"][:, 1:]
    tree = {}
    for name, array in weights.items():
        *modules, leaf = name.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jnp.array(array)
    return tree


def by_name(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def assert_close(actual, expected, tolerance, name):
    assert actual.shape == expected.shape, name
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert error <= tolerance, f"{name} is off by {error:.2g}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_have_the_names_and_shapes_of_released_checkpoints(golden, variant):
    initial = jax.eval_shape(make_model(variant).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    released = make_params(golden, variant)
    assert jax.tree.map(jnp.shape, released) == jax.tree.map(jnp.shape, initial)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_pass_matches_timm(golden, variant, scan_layers):
    params = make_params(golden, variant)
    if scan_layers:
        params = stack_layers(params)
    model = make_model(variant, scan_layers=scan_layers)
    logits, out = jax.jit(model.apply)({"params": params}, normalize_images(golden["images"][0]))

    # The head's hidden layer comes after the encoder.
    encoded = golden[f"forward/{variant.removesuffix('_pre_logits')}/encoded"]
    expected = {**section(golden, f"forward/{variant}/"), "encoded": encoded}
    actual = {**out, "logits": logits}
    for name, tolerance in FORWARD_TOLERANCES.items():
        assert actual[name].dtype == jnp.float32
        assert_close(actual[name], expected[name], tolerance, name)


def test_sigmoid_loss_is_the_sum_over_classes(golden):
    model = make_model("cls")
    logits, _ = jax.jit(model.apply)({"params": make_params(golden, "cls")}, normalize_images(golden["images"][0]))
    losses = Loss("sigmoid")(logits, golden["labels"][0])
    assert_close(losses, golden["sigmoid_losses"], LOSS_TOLERANCE, "losses")


def train(golden, run, *, accumulation_steps=1, scan_layers=False):
    """Trains `cls` on the oracle's batches.

    Returns:
      Metrics by name, each an array over the steps, and the weights afterwards by name.
    """
    images, labels = golden["images"], golden["labels"]
    mesh = make_mesh(jax.devices()[:1])
    schedule = make_schedule(num_steps=len(images), **SCHEDULES[run])
    optimizer = make_optimizer(schedule=schedule, clip_norm=1.0, **OPTIMIZERS[run])
    step = TrainStep(
        make_model("cls", scan_layers=scan_layers),
        optimizer,
        Classification(Loss("softmax", label_smoothing=0.1)),
        image_size=images.shape[2],
        schedule=schedule,
        mesh=mesh,
        accumulation_steps=accumulation_steps,
    )
    params = make_params(golden, "cls")
    if scan_layers:
        params = stack_layers(params)
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(jax.random.key(0)),
    )
    state = jax.device_put(state, replicated(mesh))
    history = []
    for image, label in zip(images, labels, strict=True):
        batch = jax.device_put({"image": image, "label": label}, batch_sharding(mesh))
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    metrics = {name: np.array([metrics[name] for metrics in history]) for name in history[0]}
    params = unstack_layers(state.params) if scan_layers else state.params
    return metrics, by_name(jax.device_get(params))


TRAININGS = {
    "adamw": {"run": "adamw"},
    "adamw-accumulated": {"run": "adamw", "accumulation_steps": 2},
    "adamw-scanned": {"run": "adamw", "scan_layers": True},
    "sgd": {"run": "sgd"},
    "sgd-accumulated": {"run": "sgd", "accumulation_steps": 2},
    "sgd_decay": {"run": "sgd_decay"},
}


@pytest.fixture(scope="module", params=TRAININGS.values(), ids=TRAININGS)
def training(request, golden):
    """Name of the run, our metrics and weights, and the oracle's of both."""
    return request.param["run"], *train(golden, **request.param), section(golden, f"train/{request.param['run']}/")


def test_every_step_has_the_metrics_of_torch(training):
    _, metrics, _, expected = training
    assert expected["grad_norm"].min() < 1 < expected["grad_norm"].max(), "clipping at 1 is not put to the test"
    assert metrics.keys() == METRIC_TOLERANCES.keys()
    for name, tolerance in METRIC_TOLERANCES.items():
        assert_close(metrics[name], expected[name], tolerance, name)


def test_steps_lead_to_the_weights_of_torch(training):
    run, _, weights, expected = training
    expected_weights = section(expected, "weights/")
    # To keep the file small, it has no blocks of this run.
    kept = {name for name in weights if run != "sgd_decay" or "encoderblock" not in name}
    assert kept == expected_weights.keys()
    for name, array in expected_weights.items():
        tolerance = WEIGHT_TOLERANCE
        if run == "adamw" and name.endswith("key/bias"):
            # A softmax does not see a shift of its inputs, so that the gradient of these is zero but for rounding, of
            # which Adam makes steps of any size up to the learning rate.
            tolerance = expected["learning_rate"].sum()
        assert_close(weights[name], array, tolerance, name)
