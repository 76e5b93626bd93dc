"""The training step: parameters, gradients, update; one jitted function over a mesh.

step = TrainStep(model, optimizer, Classification(), image_size=224)
state = step.init(seed=0)
state, metrics = step(state, batch)
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vit_jax import sharding as shardings
from vit_jax.models.layers import normalize_images
from vit_jax.objectives import Batch, Examples, Objective
from vit_jax.optimizers import merge_parameters, select_parameters, update_average

Metrics = dict[str, jax.Array]

# JAX's random number generators. "threefry2x32" draws the same numbers however arrays are split; the others use the
# hardware's generator, whose numbers depend on the split.
RNGS = ("threefry2x32", "rbg", "unsafe_rbg")

OBJECTIVE_STREAM = 2**31 - 1  # folded into the step's key; parts of an accumulated batch fold in 0, 1, ...


@flax.struct.dataclass
class TrainState:
    """The state that a step updates and from which a checkpoint resumes exactly."""

    step: jax.Array  # int32 scalar, number of updates made
    params: Any  # the model's parameters
    opt_state: Any  # the optimizer's state
    rng: jax.Array  # key data from which each step derives its own key; never changes
    average: Any = None  # the parameters' Polyak average, or None

    @property
    def evaluated(self) -> Any:
        """The parameters to evaluate: their average if there is one."""
        return self.params if self.average is None else self.average


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """A training step with its model, objective, optimizer and options.

    Calling it with a state and a batch returns the next state and metrics. The state is donated: do not use it after
    the call. The batch is `{"image": uint8 [batch, height, width, 3], "label": int32 [batch] or [batch, max_labels]}`,
    split as `sharding.batch_sharding(mesh)` says. Metrics are float32 scalars on the device: `loss`, those of the
    objective, `grad_norm` (before clipping) and `learning_rate`. Nothing waits for them until they are read.

    Attributes:
      model: images -> (logits, intermediates).
      optimizer: from `optimizers.make_optimizer`.
      objective: what the model learns.
      image_size: side of the images, in pixels.
      schedule: the learning rate that the optimizer uses, to report it; None: it is not reported.
      mesh: the devices; by default all of them.
      sharding: how the state is split over them, one of `sharding.PRESETS`.
      sharding_rules: see `sharding.parameter_specs`.
      accumulation_steps: number of equal parts in which the batch goes through the model, one after the other. The
        update is that of the whole batch, up to rounding; with dropout, each part draws its own masks.
      rng: random number generator for dropout and mixup, one of `RNGS`. Initial parameters do not depend on it.
      polyak_decay: weight of the old average in each update of the parameters' average; None: no average.
      train_only: patterns of the names of the trained parameters; empty: all. The others have no gradients and no
        optimizer state, and do not count in `grad_norm`.
      compiler_options: XLA options by name, such as `{"xla_tpu_enable_latency_hiding_scheduler": True}`.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    objective: Objective
    image_size: int
    schedule: optax.Schedule | None = None
    mesh: Mesh = dataclasses.field(default_factory=shardings.make_mesh)
    sharding: str = "replicated"
    sharding_rules: Sequence[shardings.Rule] = ()
    accumulation_steps: int = 1
    rng: str = RNGS[0]
    polyak_decay: float | None = None
    train_only: Sequence[str] = ()
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state.

        Raises:
          UserError: the model does not accept images of this size, or `sharding_rules` or `train_only` do not fit its
            parameters.
        """
        state = jax.eval_shape(lambda: self._new_state(0))
        specs = shardings.parameter_specs(state.params, self.mesh, self.sharding, self.sharding_rules)
        return shardings.with_sharding(state, shardings.state_shardings(state, self.mesh, specs))

    def init(self, seed: int, params: Any = None) -> TrainState:
        """Makes the initial state. Each device computes and holds only its parts of the arrays.

        Args:
          seed: for the parameters, dropout and mixup.
          params: initial parameters, as arrays on the host in every process; None: the model's own initialisation.
        """
        state = self._jitted_init(seed)
        if params is None:
            return state
        # The average starts from the same parameters.
        average = None if state.average is None else shardings.place(params, state.average)
        return dataclasses.replace(state, params=shardings.place(params, state.params), average=average)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Takes a step; see the class."""
        return self._jitted(state, batch)

    def lower(self, batch: Mapping[str, jax.ShapeDtypeStruct | jax.Array]) -> jax.stages.Lowered:
        """Lowers the step for the shapes of a batch, to compile it ahead of time."""
        return self._jitted.lower(self.abstract_state, batch)

    def trained(self, params: Any) -> Any:
        """The parameters that are trained, with None in place of the others."""
        return select_parameters(params, self.train_only)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The step as a pure function, for use inside another jitted function; `__call__` is jitted."""
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng, impl=self.rng), state.step)
        examples = self.objective.prepare(batch, jax.random.fold_in(rng, OBJECTIVE_STREAM))
        trained = self.trained(state.params)
        loss, metrics, grads = self._gradients(trained, state.params, examples, rng)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, trained)
        params = merge_parameters(state.params, optax.apply_updates(trained, updates))
        average = None
        if self.polyak_decay is not None:
            average = update_average(state.average, params, self.polyak_decay)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        if self.schedule is not None:
            metrics["learning_rate"] = jnp.asarray(self.schedule(state.step), jnp.float32)
        return TrainState(state.step + 1, params, opt_state, state.rng, average), metrics

    def _new_state(self, seed: int | jax.Array) -> TrainState:
        init_rng, step_rng = jax.random.split(jax.random.key(seed))
        if self.rng != RNGS[0]:
            step_rng = jax.random.key(jax.random.bits(step_rng), impl=self.rng)
        images = jnp.zeros((1, self.image_size, self.image_size, 3))
        params = self.model.init(init_rng, images, train=False)["params"]
        average = None
        if self.polyak_decay is not None:
            # In float32: bfloat16 would round away the small changes of an average.
            average = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
        opt_state = self.optimizer.init(self.trained(params))
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, jax.random.key_data(step_rng), average)

    def _gradients(
        self, trained: Any, params: Any, examples: Examples, rng: jax.Array
    ) -> tuple[jax.Array, Metrics, Any]:
        """Mean loss and metrics of the batch, and the gradient of the loss."""
        total = jnp.maximum(examples.weight.sum(), 1)

        def mean_loss(trained: Any, part: Examples, rng: jax.Array) -> tuple[jax.Array, Metrics]:
            variables = {"params": merge_parameters(params, trained)}

            def apply(images: jax.Array, **inputs: Any) -> Any:
                rngs = {"dropout": rng}
                return self.model.apply(variables, normalize_images(images), train=True, rngs=rngs, **inputs)

            def mean(values: jax.Array) -> jax.Array:
                return (values * part.weight).sum() / total  # of the whole batch, so that its parts add up

            losses, metrics = self.objective.losses(apply, part)
            return mean(losses), {name: mean(values) for name, values in metrics.items()}

        grad_fn = jax.value_and_grad(mean_loss, has_aux=True)
        if self.accumulation_steps == 1:
            (loss, metrics), grads = grad_fn(trained, examples, rng)
            return loss, metrics, grads

        # Part i takes every accumulation_steps-th example, so each device uses only examples that it already holds.
        def split(array: jax.Array) -> jax.Array:
            return array.reshape(-1, self.accumulation_steps, *array.shape[1:]).swapaxes(0, 1)

        def add(sums: Any, indexed: Any) -> tuple[Any, Metrics]:
            index, arrays, weight = indexed
            part = Examples(arrays, weight, examples.shared)
            (loss, metrics), grads = grad_fn(trained, part, jax.random.fold_in(rng, index))
            return jax.tree.map(jnp.add, sums, (loss, grads)), metrics

        parts = (jnp.arange(self.accumulation_steps), *jax.tree.map(split, (examples.arrays, examples.weight)))
        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
        (loss, grads), metrics = jax.lax.scan(add, zeros, parts)
        return loss, {name: values.sum() for name, values in metrics.items()}, grads

    @functools.cached_property
    def _jitted_init(self) -> jax.stages.Wrapped:
        # The seed is an argument, so that a new seed does not compile again.
        return jax.jit(self._new_state, out_shardings=shardings.shardings_of(self.abstract_state))

    @functools.cached_property
    def _jitted(self) -> jax.stages.Wrapped:
        state, everywhere = shardings.shardings_of(self.abstract_state), shardings.replicated(self.mesh)
        return jax.jit(
            shardings.within(self.mesh, self.train_step),
            in_shardings=(state, shardings.batch_sharding(self.mesh)),
            out_shardings=(state, everywhere),
            donate_argnums=0,
            compiler_options=dict(self.compiler_options) or None,
        )
