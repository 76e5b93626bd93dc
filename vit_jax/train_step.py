"""The training step: state, losses, gradients, update. Pure functions and one jitted, donated step over a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vit_jax.objectives.losses import Loss, is_correct, is_labelled
from vit_jax.objectives.mixup import Mixing, neighbours
from vit_jax.optimizers import merge_parameters
from vit_jax.sharding import batch_sharding, replicated, within

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Select = Callable[[Any], Any]  # from `optimizers.select_parameters`


def _all(params: Any) -> Any:
    return params


# JAX's random number generators. "threefry2x32" draws the same numbers however arrays are split; the others use the
# hardware's generator, whose numbers depend on it.
RNGS = ("threefry2x32", "rbg", "unsafe_rbg")

MIXING_STREAM = 2**31 - 1  # of the step's key; parts of an accumulated batch use 0, 1, ...


@flax.struct.dataclass
class TrainState:
    """All that a step changes, and all that a checkpoint needs to go on exactly.

    Attributes:
      step: int32 scalar, number of updates made.
      params: the model's parameters.
      opt_state: the optimizer's state.
      rng: key data from which each step derives its own key; never changes.
      average: the parameters' Polyak average, None without.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    average: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate: their average if there is one."""
        return self.params if self.average is None else self.average


def normalize_images(images: jax.Array) -> jax.Array:
    """Maps uint8 images of any shape to float32 in [-1, 1]. Done on the device: bytes are a quarter of the transfer."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def create_train_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    image_size: int,
    seed: int | jax.Array,
    rng: str = RNGS[0],
    polyak_decay: float | None = None,
    select: Select = _all,
) -> TrainState:
    """Initialises parameters and optimizer. Trace it under `jax.jit` or `jax.eval_shape`; see `init_train_state`.

    Args:
      model: images -> (logits, intermediates).
      optimizer: from `make_optimizer`.
      image_size: side of the images, in pixels.
      seed: of parameters, dropout and mixing.
      rng: of dropout and mixing, one of `RNGS`. The parameters do not depend on it.
      polyak_decay: of the average; None: there is none.
      select: the parameters that are trained; the optimizer has a state for these alone.
    """
    init_rng, step_rng = jax.random.split(jax.random.key(seed))
    if rng != RNGS[0]:
        step_rng = jax.random.key(jax.random.bits(step_rng), impl=rng)
    params = model.init(init_rng, jnp.zeros((1, image_size, image_size, 3)), train=False)["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(select(params)),
        rng=jax.random.key_data(step_rng),
        # In float32: bfloat16 would round the small steps of an average away.
        average=None if polyak_decay is None else jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params),
    )


def init_train_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    image_size: int,
    seed: int,
    shardings: Any = None,
    rng: str = RNGS[0],
    polyak_decay: float | None = None,
    select: Select = _all,
) -> TrainState:
    """Initialises the state on the mesh, already placed, without a copy on the host or of a whole array anywhere.

    Args:
      model: see `create_train_state`; so are `optimizer`, `image_size`, `seed`, `rng`, `polyak_decay`, `select`.
      optimizer: see there.
      mesh: the devices.
      image_size: see there.
      seed: see there.
      shardings: of the state, from `sharding.state_shardings`; None: replicated.
      rng: see there.
      polyak_decay: see there.
      select: see there.
    """
    # The seed is an argument of the compiled program, so that another seed does not compile again.
    create = jax.jit(
        lambda seed: create_train_state(
            model, optimizer, image_size=image_size, seed=seed, rng=rng, polyak_decay=polyak_decay, select=select
        ),
        out_shardings=replicated(mesh) if shardings is None else shardings,
    )
    return create(seed)


def place_parameters(params: Any, like: Any) -> Any:
    """Puts parameters on the devices.

    Args:
      params: arrays on the host; every process has all of them.
      like: a tree of arrays, or shapes, that says dtypes and shardings.
    """

    def place(like: Any, array: Any) -> jax.Array:
        array = np.asarray(array, like.dtype)
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])

    return jax.tree.map(place, like, params)


def with_parameters(state: TrainState, params: Any) -> TrainState:
    """A state that begins with other parameters: the average too, as there is nothing to average yet.

    Args:
      state: from `init_train_state`; its parameters and average are given up.
      params: a tree like its parameters, of arrays on the host; every process has all of them.
    """
    average = None if state.average is None else place_parameters(params, state.average)
    return dataclasses.replace(state, params=place_parameters(params, state.params), average=average)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_fn: Loss,
    mesh: Mesh,
    *,
    shardings: Any = None,
    accumulation_steps: int = 1,
    mixing: Mixing | None = None,
    rng: str = RNGS[0],
    polyak_decay: float | None = None,
    compiler_options: Mapping[str, Any] | None = None,
    select: Select = _all,
) -> jax.stages.Wrapped:
    """Makes the jitted step `(state, batch) -> (state, metrics)`.

    The state is donated: do not use it after the call. The batch is `{"image": uint8 [batch, height, width, 3],
    "label": int32 [batch] or [batch, max_labels]}`, sharded by `batch_sharding(mesh)`. Metrics are float32 scalars on
    the device: `loss` and `accuracy` of the images that have a label, `grad_norm` (before clipping) and
    `learning_rate`; reading them is the caller's affair, so that the step never waits.

    Args:
      model: images -> (logits, intermediates).
      optimizer: from `make_optimizer`.
      schedule: the one that the optimizer uses; only reported.
      loss_fn: from `losses.make_loss`.
      mesh: the devices.
      shardings: of the state, from `sharding.state_shardings`; None: replicated.
      accumulation_steps: the batch goes through the model in this many equal parts, one after the other; the update is
        that of the whole batch. Without dropout it is equal up to rounding; with it each part draws its own masks.
      mixing: mixup and CutMix; pairs are those of the whole batch, however it is sharded or split into parts.
      rng: as in `create_train_state`.
      polyak_decay: share of the average that stays at each step; the state must have one.
      compiler_options: of XLA, by name, such as `{"xla_tpu_enable_latency_hiding_scheduler": True}`.
      select: the parameters that are trained. The others get no gradient, so that nothing is computed for it where no
        trained one lies below, and are left as they are; `grad_norm` is of the trained ones.
    """
    rng_name = rng

    def loss_and_accuracy(trained, params, part, weights, num_labelled, dropout_rng):
        params = merge_parameters(params, trained)
        images, labels = normalize_images(part["image"]), part["label"]
        counted = is_labelled(labels)
        if weights is not None:
            partners, partner_labels = normalize_images(part["partner_image"]), part["partner_label"]
            images = weights * images + (1 - weights) * partners
            counted = counted * is_labelled(partner_labels)
        logits, _ = model.apply({"params": params}, images, train=True, rngs={"dropout": dropout_rng})
        targets = loss_fn.targets(labels, logits.shape[-1])
        if weights is not None:
            share = weights.mean()
            targets = share * targets + (1 - share) * loss_fn.targets(partner_labels, logits.shape[-1])
        # Divided by the count of the whole batch, parts of it simply add up.
        loss = (loss_fn.of_targets(logits, targets) * counted).sum() / num_labelled
        return loss, (is_correct(logits, labels) * counted).sum() / num_labelled

    grad_fn = jax.value_and_grad(loss_and_accuracy, has_aux=True)

    def accumulated_grads(trained, params, batch, weights, num_labelled, rng):
        # Part i takes every accumulation_steps-th example: each device then keeps to the examples it already holds.
        def split(array):
            return array.reshape(-1, accumulation_steps, *array.shape[1:]).swapaxes(0, 1)

        def add(total, indexed_part):
            index, part = indexed_part
            grads = grad_fn(trained, params, part, weights, num_labelled, jax.random.fold_in(rng, index))
            return jax.tree.map(jnp.add, total, grads), None

        parts = (jnp.arange(accumulation_steps), jax.tree.map(split, batch))
        zeros = jax.tree.map(jnp.zeros_like, ((jnp.float32(0), jnp.float32(0)), trained))
        return jax.lax.scan(add, zeros, parts)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=rng_name), state.step)
        examples, weights, counted = dict(batch), None, is_labelled(batch["label"])
        if mixing:
            height, width = batch["image"].shape[1:3]
            weights = mixing.weights(jax.random.fold_in(rng, MIXING_STREAM), height, width)
            examples |= {f"partner_{name}": neighbours(array) for name, array in batch.items()}
            counted = counted * neighbours(counted)
        num_labelled = jnp.maximum(counted.sum(), 1)
        grads_of = grad_fn if accumulation_steps == 1 else accumulated_grads
        trained = select(state.params)
        (loss, accuracy), grads = grads_of(trained, state.params, examples, weights, num_labelled, rng)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = merge_parameters(state.params, optax.apply_updates(trained, updates))
        average = None
        if polyak_decay is not None:
            average = jax.tree.map(lambda old, new: old + (1 - polyak_decay) * (new - old), state.average, params)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, rng=state.rng, average=average)
        return state, metrics

    everywhere = replicated(mesh)
    shardings = everywhere if shardings is None else shardings
    return jax.jit(
        within(mesh, train_step),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=dict(compiler_options) if compiler_options else None,
    )
