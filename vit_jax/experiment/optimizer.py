"""Optimizer, learning rate and length of a run."""

import functools
from collections.abc import Callable

import optax
from ml_collections import ConfigDict

from vit_jax import optimizers
from vit_jax.config import CHECKS, LENGTHS
from vit_jax.errors import UserError, unknown_name


def make_optimizer(fields: ConfigDict) -> Callable[[optax.Schedule], optax.GradientTransformation]:
    """Returns a function that makes the optimizer of `config.optimizer` from its schedule.

    Raises:
      UserError: unknown optimizer.
    """
    if fields.name not in optimizers.OPTIMIZERS:
        raise unknown_name("optimizer", fields.name, optimizers.OPTIMIZERS)
    names = ("weight_decay", "clip_norm", "b1", "b2", "eps", "momentum", "momentum_dtype", "layer_decay")
    return functools.partial(optimizers.make_optimizer, fields.name, **{name: fields[name] for name in names})


def make_schedule(fields: ConfigDict, num_steps: int) -> optax.Schedule:
    """Makes the learning rate schedule; `fields` are the config's section `optimizer`."""
    names = ("learning_rate", "warmup_steps", "end_learning_rate", "drop_at")
    return optimizers.make_schedule(fields.schedule, num_steps=num_steps, **{name: fields[name] for name in names})


def count_steps(config: ConfigDict, num_train_images: int) -> int:
    """Computes the length of a run in steps.

    Raises:
      UserError: the config gives no length, several, or one out of range, or the profile begins after the end.
    """
    lengths = {name: config[name] for name in LENGTHS if config[name] is not None}
    if len(lengths) != 1:
        given = ", ".join(f"{name}={value}" for name, value in lengths.items()) or "none of them"
        raise UserError(f"set one of epochs, steps and images as the length of the run; got {given}.")
    if config.steps is not None:
        num_steps = config.steps
    else:
        images = config.images if config.epochs is None else config.epochs * num_train_images
        num_steps = round(images / config.batch_size)
    if not CHECKS["steps"].accepts(num_steps):
        raise UserError(
            f"the run would be {num_steps:,} steps long, which must be {CHECKS['steps'].expected}. Set other epochs, "
            "steps or images."
        )
    first_profiled = config.profile.first_step
    if first_profiled is not None and first_profiled > num_steps:
        raise UserError(
            f"profile.first_step {first_profiled} is after the run's {num_steps} steps. Set "
            f"--config.profile.first_step to at most {num_steps}."
        )
    return num_steps
