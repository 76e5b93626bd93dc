import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import DEVICES, ROOT
from vit_jax import optimizers, sharding
from vit_jax.models import create_model
from vit_jax.models.layers import normalize_images
from vit_jax.objectives.classification import Classification
from vit_jax.objectives.losses import NO_LABEL, Loss
from vit_jax.objectives.mixup import Mixing
from vit_jax.train_step import OBJECTIVE_STREAM, RNGS, TrainStep

BATCH = 16


def make_model(**attributes):
    sizes = {"num_layers": 1, "hidden_dim": 32, "mlp_dim": 32, "num_heads": 2}
    return create_model("ViT-Ti/4", num_classes=10, **(sizes | attributes))


@functools.cache  # a compiled step is used again
def sgd_step(*, devices=1, momentum_dtype="float32", mixing=None, dropout_rate=0.0, dtype="float32", **options):
    """A step whose update is linear in the gradient."""
    return TrainStep(
        make_model(dropout_rate=dropout_rate, param_dtype=dtype),
        optimizers.make_optimizer("sgd", 0.1, momentum_dtype=momentum_dtype),
        Classification(Loss("softmax", 0.1), mixing or Mixing()),
        image_size=8,
        mesh=sharding.make_mesh(DEVICES[:devices]),
        **options,
    )


@functools.cache
def parts(devices, dropout_rate, mixing):
    schedule = optimizers.make_schedule("cosine", learning_rate=3e-3, num_steps=40, warmup_steps=5)
    step = TrainStep(
        make_model(dropout_rate=dropout_rate),
        optimizers.make_optimizer("adamw", schedule, weight_decay=0.1, clip_norm=1e-2),
        Classification(Loss("softmax", 0.1), mixing or Mixing()),
        image_size=8,
        schedule=schedule,
        mesh=sharding.make_mesh(DEVICES[:devices]),
    )
    return step, step.init(seed=3)


def copy(state):
    return jax.tree.map(jnp.copy, state)  # a step deletes the state that it is given


def setup(*, devices=1, dropout_rate=0.0, mixing=None):
    step, state = parts(devices, dropout_rate, mixing)
    return step.mesh, copy(state), step


def batches(mesh, count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        batch = {
            "image": rng.integers(0, 256, (BATCH, 8, 8, 3), dtype=np.uint8),
            "label": rng.integers(0, 10, (BATCH,), dtype=np.int32),
        }
        yield sharding.global_batch(batch, sharding.batch_sharding(mesh))


def run(count=20, **options):
    mesh, state, step = setup(**options)
    metrics = []
    for batch in batches(mesh, count):
        state, values = step(state, batch)
        metrics.append(values)
    return state, {name: np.array([float(each[name]) for each in metrics]) for name in metrics[0]}


def relative_distance(tree, other):
    flat, other_flat = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each)]) for each in (tree, other))
    return np.linalg.norm(flat - other_flat) / np.linalg.norm(other_flat)


def test_training_lowers_the_loss_on_one_batch():
    mesh, state, step = setup()
    batch = next(batches(mesh, 1))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]


def test_eight_devices_equal_one_over_twenty_steps():
    options = {"dropout_rate": 0.1, "mixing": Mixing(0.8, 1.0)}
    state_1, metrics_1 = run(devices=1, **options)
    state_8, metrics_8 = run(devices=8, **options)
    np.testing.assert_allclose(metrics_8["loss"], metrics_1["loss"], rtol=1e-5)
    assert relative_distance(state_8.params, state_1.params) < 1e-5


def test_same_seed_gives_identical_metrics_and_parameters():
    options = {"dropout_rate": 0.1, "mixing": Mixing(0.8, 1.0)}
    state, metrics = run(**options)
    again, metrics_again = run(**options)
    for name in metrics:
        np.testing.assert_array_equal(metrics[name], metrics_again[name])
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)


def with_second_label(batch):
    """The batch with room for two labels per image, and one label each."""
    labels = np.asarray(batch["label"])
    return batch | {"label": np.stack([labels, np.full_like(labels, NO_LABEL)], axis=1)}


def test_accumulation_over_four_parts_equals_the_whole_batch():
    # SGD without clipping: the update is linear in the gradient, so that equal parameters mean equal gradients.
    def updated(accumulation_steps):
        step = sgd_step(devices=2, mixing=Mixing(0.8, 1.0), accumulation_steps=accumulation_steps)
        state = copy(first)
        losses = []
        for batch in map(with_second_label, batches(step.mesh, 3)):
            batch["label"][np.arange(BATCH) % 4 > 1] = NO_LABEL  # parts with none, some and all images labelled
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        return state, losses

    first = sgd_step(devices=2, mixing=Mixing(0.8, 1.0), accumulation_steps=1).init(seed=3)
    whole, whole_losses = updated(1)
    parts, parts_losses = updated(4)
    np.testing.assert_allclose(parts_losses, whole_losses, rtol=1e-6)
    assert relative_distance(parts.params, whole.params) < 5e-6
    assert relative_distance(parts.opt_state, whole.opt_state) < 5e-6


def test_images_without_label_change_nothing():
    mesh, state, step = setup()
    batch = next(batches(mesh, 1))
    half = {name: np.asarray(array)[: BATCH // 2] for name, array in batch.items()}
    _, expected = step(state, {name: np.concatenate([array, array]) for name, array in half.items()})
    _, state, step = setup()
    labels = np.where(np.arange(BATCH) < BATCH // 2, batch["label"], NO_LABEL)
    _, found = step(state, batch | {"label": labels})
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_batch_without_any_label_has_no_gradient():
    mesh, state, step = setup()
    batch = next(batches(mesh, 1))
    _, metrics = step(state, batch | {"label": np.full(BATCH, NO_LABEL)})
    assert metrics["loss"] == metrics["grad_norm"] == 0


@pytest.mark.parametrize("unlabelled", [[], [2, 3, 9]])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_loss_counts_pairs_in_which_both_images_have_labels(kind, unlabelled):
    mixing = Mixing(0.8, 1.0)
    step = sgd_step(devices=2, mixing=mixing, accumulation_steps=1)
    state = step.init(seed=3)
    batch = with_second_label(next(batches(step.mesh, 1)))
    batch["label"][np.array(unlabelled, int)] = NO_LABEL

    def pixel_shares(number):
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), number)
        return np.asarray(mixing.weights(jax.random.fold_in(rng, OBJECTIVE_STREAM), 8, 8))

    # The first step that draws this kind, and mixes enough to tell.
    number, shares = next(
        (number, shares)
        for number, shares in ((number, pixel_shares(number)) for number in range(40))
        if 0.1 < shares.mean() < 0.9 and (len(np.unique(shares)) == 1) == (kind == "mixup")
    )
    share = shares.mean()
    images, labels = np.asarray(batch["image"]) / 127.5 - 1, batch["label"][:, 0]
    mixed = shares * images + (1 - shares) * images[np.arange(BATCH) - 1]
    # The head starts at zero; let it say something.
    kernel = np.random.default_rng(1).normal(size=(32, 10)).astype(np.float32)
    params = state.params | {"head": {"kernel": kernel, "bias": np.zeros(10, np.float32)}}
    log_p = np.asarray(jax.nn.log_softmax(jax.jit(step.model.apply)({"params": params}, mixed)[0]))
    one_hot = 0.9 * np.eye(10)[labels] + 0.01
    targets = share * one_hot + (1 - share) * one_hot[np.arange(BATCH) - 1]
    _, metrics = step(state.replace(params=params, step=np.int32(number)), batch)
    counted = (labels != NO_LABEL) & (np.roll(labels, 1) != NO_LABEL)
    np.testing.assert_allclose(metrics["loss"], -(targets * log_p).sum(axis=1)[counted].mean(), rtol=1e-5)


def repeated(mesh, times):
    """A batch of the same four images in each of `times` parts."""
    return {name: np.repeat(array[: BATCH // 4], times, axis=0) for name, array in next(batches(mesh, 1)).items()}


def test_accumulation_draws_other_dropout_masks_for_each_part():
    # Both parts see the same images. With the same masks they would have the same gradient, and the mean of the two
    # would be the gradient of the first part alone, whose key does not depend on the number of parts.
    def grad_norm(accumulation_steps):
        step = sgd_step(dropout_rate=0.5, accumulation_steps=accumulation_steps)
        _, metrics = step(copy(first), repeated(step.mesh, accumulation_steps))
        return float(metrics["grad_norm"])

    first = sgd_step(dropout_rate=0.5, accumulation_steps=2).init(seed=3)
    assert abs(grad_norm(2) / grad_norm(4) - 1) > 1e-3


def test_each_step_draws_other_dropout_masks():
    step = sgd_step(dropout_rate=0.5, accumulation_steps=2)
    state, batch = step.init(seed=3), repeated(step.mesh, 2)
    _, first = step(copy(state), batch)
    _, second = step(state.replace(step=np.int32(1)), batch)
    assert abs(float(second["grad_norm"]) / float(first["grad_norm"]) - 1) > 1e-3


def test_state_is_donated():
    mesh, state, step = setup()
    before = state.params["head"]["kernel"]
    step(state, next(batches(mesh, 1)))
    assert before.is_deleted()


def test_step_reports_the_learning_rate_it_used_and_the_norm_before_clipping():
    _, metrics = run(count=8)
    schedule = parts(1, 0.0, None)[0].schedule
    np.testing.assert_allclose(metrics["learning_rate"], [float(schedule(step)) for step in range(8)], rtol=1e-6)
    assert metrics["learning_rate"][0] == 0
    assert (metrics["grad_norm"] > 0.1).all()


def test_images_are_normalised_to_minus_one_to_one():
    values = normalize_images(jnp.array([0, 127, 128, 255], jnp.uint8))
    np.testing.assert_allclose(values, [-1, -1 / 255, 1 / 255, 1], atol=1e-7)


def test_softmax_loss_of_uniform_logits_is_log_of_classes():
    losses = Loss("softmax")(jnp.zeros((2, 7)), jnp.array([0, 6]))
    np.testing.assert_allclose(losses, np.log(7), rtol=1e-6)


def test_softmax_loss_with_smoothing_matches_the_closed_form():
    logits = np.array([[2.0, -1.0, 0.5]], np.float32)
    log_probabilities = logits - np.log(np.exp(logits).sum())
    targets = np.array([[0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3]])
    loss = Loss("softmax", 0.1)(jnp.asarray(logits), jnp.array([1]))
    np.testing.assert_allclose(loss, -(targets * log_probabilities).sum(-1), rtol=1e-6)


def test_sigmoid_loss_sums_over_classes():
    logits = np.array([[2.0, -1.0, 0.5]], np.float32)
    expected = np.log1p(np.exp(logits)).sum() - logits[0, 1]
    np.testing.assert_allclose(Loss("sigmoid")(jnp.asarray(logits), jnp.array([1])), [expected], rtol=1e-6)


def test_generator_determines_dropout_masks_but_not_parameters():
    # A step of two parts, as in the tests of dropout above, where one with JAX's own generator is compiled.
    steps = [sgd_step(dropout_rate=0.5, accumulation_steps=2)]
    steps += [sgd_step(dropout_rate=0.5, accumulation_steps=2, rng=rng) for rng in RNGS[1:]]
    norms = set()
    params = steps[0].init(seed=3).params
    for step in steps:
        state = step.init(seed=3)
        jax.tree.map(np.testing.assert_array_equal, state.params, params)
        _, metrics = step(state, repeated(step.mesh, 2))
        norms.add(float(metrics["grad_norm"]))
    assert len(norms) > 1


def test_average_is_float32_whatever_the_parameters_are():
    state = sgd_step(dtype="bfloat16", polyak_decay=0.9999).abstract_state
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.average)} == {jnp.dtype("float32")}


def test_only_selected_parameters_move():
    step = sgd_step(train_only=("^head/",), momentum_dtype="bfloat16")
    state = step.init(seed=3)
    before = jax.device_get(state.params)
    moments = [path for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state) if leaf.ndim]
    assert sorted(sharding.name_of(path).split("/")[-2:] for path in moments) == [
        ["head", "bias"],
        ["head", "kernel"],
    ]
    batch = next(batches(step.mesh, 1))

    def loss(head):
        logits, _ = step.model.apply({"params": before | {"head": head}}, normalize_images(batch["image"]))
        return Loss("softmax", 0.1)(logits, batch["label"]).mean()

    gradient = jax.device_get(jax.jit(jax.grad(loss))(before["head"]))
    state, metrics = step(state, batch)
    after = jax.device_get(state.params)
    expected = jax.tree.map(lambda value, slope: value - 0.1 * slope, before["head"], gradient)
    for name in expected:
        np.testing.assert_allclose(after["head"][name], expected[name], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        metrics["grad_norm"], np.sqrt(sum((slope**2).sum() for slope in gradient.values())), rtol=1e-5
    )
    for old, new in zip(jax.tree.leaves(before | {"head": 0}), jax.tree.leaves(after | {"head": 0}), strict=True):
        np.testing.assert_array_equal(old, new)


def test_nothing_is_computed_for_gradients_of_parameters_that_stay():
    flops = {}
    for patterns in ((), ("^head/",)):
        step = sgd_step(train_only=patterns)
        flops[patterns] = step.lower(next(batches(step.mesh, 1))).cost_analysis()["flops"]
    assert flops["^head/",] < 0.4 * flops[()]  # a third: the forward pass alone


def test_state_starts_from_given_parameters_and_their_average():
    step = sgd_step(polyak_decay=0.9)
    other = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5), step.abstract_state.params)
    state = step.init(seed=3, params=other)
    assert all((np.asarray(leaf) == 0.5).all() for leaf in jax.tree.leaves((state.params, state.average)))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}


def test_documented_five_lines_take_a_step():
    page = (ROOT / "docs" / "library.md").read_text().partition("## Take the steps yourself")[2]
    lines, imports = re.findall(r"```python\n(.*?)```", page, re.S)[:2]
    assert len(lines.splitlines()) == 5
    small = lines.replace('"ViT-S/16"', '"ViT-Ti/4", num_layers=1').replace("224", "8")
    found = {"images": np.zeros((8, 8, 8, 3), np.uint8), "labels": np.zeros(8, np.int32)}
    exec(imports + small, found)
    assert found["state"].step == 1
    assert float(found["metrics"]["loss"]) == pytest.approx(np.log(10), rel=1e-5)
