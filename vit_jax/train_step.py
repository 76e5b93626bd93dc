"""The training step: state, losses, gradients, update. Pure functions and one jitted, donated step over a mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vit_jax.errors import unknown_name
from vit_jax.partitioning import batch_sharding, replicated

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
LossFunction = Callable[[jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that a step changes, and all that a checkpoint needs to go on exactly.

    Attributes:
      step: int32 scalar, number of updates made.
      params: the model's parameters.
      opt_state: the optimizer's state.
      rng: key data from which each step derives its own key; never changes.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array


def normalize_images(images: jax.Array) -> jax.Array:
    """Maps uint8 images of any shape to float32 in [-1, 1]. Done on the device: bytes are a quarter of the transfer."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`[batch]` losses of logits `[batch, num_classes]` against target probabilities of the same shape."""
    return optax.losses.softmax_cross_entropy(logits, targets)


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """`[batch]` losses of logits `[batch, num_classes]` against targets in [0, 1], summed over classes.

    The loss of pre-training on ImageNet-21k and JFT, whose images may bear several labels.
    """
    return optax.losses.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


LOSSES: dict[str, LossFunction] = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}


def make_loss(name: str, label_smoothing: float = 0.0) -> LossFunction:
    """A function of logits `[batch, num_classes]` and int labels `[batch]` that gives float32 losses `[batch]`.

    Args:
      name: "softmax" or "sigmoid".
      label_smoothing: share of the target that is spread evenly over all classes.

    Raises:
      UserError: unknown loss.
    """
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES)

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        if label_smoothing:
            targets = optax.losses.smooth_labels(targets, label_smoothing)
        return LOSSES[name](logits, targets)

    return loss


def create_train_state(
    model: nn.Module, optimizer: optax.GradientTransformation, *, image_size: int, seed: int | jax.Array
) -> TrainState:
    """Initialises parameters and optimizer. Trace it under `jax.jit` or `jax.eval_shape`; see `init_train_state`."""
    init_rng, step_rng = jax.random.split(jax.random.key(seed))
    params = model.init(init_rng, jnp.zeros((1, image_size, image_size, 3)), train=False)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key_data(step_rng),
    )


def init_train_state(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh, *, image_size: int, seed: int
) -> TrainState:
    """Initialises the state on the mesh, already placed, without a copy on the host."""
    # The seed is an argument of the compiled program, so that another seed does not compile again.
    create = jax.jit(
        lambda seed: create_train_state(model, optimizer, image_size=image_size, seed=seed),
        out_shardings=replicated(mesh),
    )
    return create(seed)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_fn: LossFunction,
    mesh: Mesh,
    *,
    accumulation_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the jitted step `(state, batch) -> (state, metrics)`.

    The state is donated: do not use it after the call. The batch is `{"image": uint8 [batch, height, width, 3],
    "label": int32 [batch]}`, sharded by `batch_sharding(mesh)`. Metrics are float32 scalars on the device: `loss`,
    `accuracy`, `grad_norm` (before clipping) and `learning_rate`; reading them is the caller's affair, so that the step
    never waits.

    Args:
      model: images -> (logits, intermediates).
      optimizer: from `make_optimizer`.
      schedule: the one that the optimizer uses; only reported.
      loss_fn: from `make_loss`.
      mesh: the devices.
      accumulation_steps: the batch goes through the model in this many equal parts, one after the other; the update is
        that of the whole batch. Without dropout it is equal up to rounding; with it each part draws its own masks.
    """

    def loss_and_accuracy(params, images, labels, dropout_rng):
        logits, _ = model.apply({"params": params}, normalize_images(images), train=True, rngs={"dropout": dropout_rng})
        accuracy = (logits.argmax(axis=-1) == labels).astype(jnp.float32).mean()
        return loss_fn(logits, labels).mean(), accuracy

    grad_fn = jax.value_and_grad(loss_and_accuracy, has_aux=True)

    def accumulated_grads(params, images, labels, rng):
        # Part i takes every accumulation_steps-th example: each device then keeps to the examples it already holds.
        def split(array):
            return array.reshape(-1, accumulation_steps, *array.shape[1:]).swapaxes(0, 1)

        def add(total, part):
            index, images, labels = part
            return jax.tree.map(jnp.add, total, grad_fn(params, images, labels, jax.random.fold_in(rng, index))), None

        parts = (jnp.arange(accumulation_steps), split(images), split(labels))
        zeros = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), params))
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda leaf: leaf / accumulation_steps, total)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        grads_of = grad_fn if accumulation_steps == 1 else accumulated_grads
        (loss, accuracy), grads = grads_of(state.params, batch["image"], batch["label"], rng)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, rng=state.rng), metrics

    everywhere = replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(everywhere, batch_sharding(mesh)),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )
