"""Optimizers and learning-rate schedules as optax transformations (tables 3 and 4)."""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.typing import DTypeLike

from vit_jax.errors import UserError, unknown_name


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int = 0,
    end_learning_rate: float = 0.0,
    drop_at: Sequence[float] = (),
) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0.

    It rises linearly from 0 over `warmup_steps`, so that the first step changes nothing, then falls to
    `end_learning_rate` at `num_steps`.

    Args:
      name: "linear", "cosine", "constant" or "drops": what follows the warm-up.
      learning_rate: the base learning rate, reached after warm-up.
      num_steps: length of the run.
      warmup_steps: length of the warm-up (10,000 at pre-training, 500 at fine-tuning).
      end_learning_rate: the last learning rate (1e-5 for ImageNet-21k). Used by "linear" and "cosine".
      drop_at: shares of the run, warm-up included, after which "drops" divides the learning rate by 10: BiT's way.

    Raises:
      UserError: unknown decay, a warm-up that is not shorter than the run, or shares that do not go with the decay.
    """
    if not 0 <= warmup_steps < num_steps:
        raise UserError(f"optimizer.warmup_steps {warmup_steps} must be less than the run's {num_steps} steps.")
    drops = [round(share * num_steps) for share in drop_at]
    if (name == "drops") != bool(drops) or not all(warmup_steps <= step < num_steps for step in drops):
        raise UserError(
            "optimizer.drop_at takes shares of the run, after the warm-up and below 1, such as (0.3, 0.6, 0.9), and "
            f"belongs to the schedule 'drops'; got {tuple(drop_at)} with the schedule {name!r}."
        )
    decay_steps = num_steps - warmup_steps
    decays = {
        "linear": lambda: optax.linear_schedule(learning_rate, end_learning_rate, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(
            learning_rate, decay_steps, alpha=end_learning_rate / learning_rate if learning_rate else 0.0
        ),
        "constant": lambda: optax.constant_schedule(learning_rate),
        "drops": lambda: optax.piecewise_constant_schedule(learning_rate, {step - warmup_steps: 0.1 for step in drops}),
    }
    if name not in decays:
        raise unknown_name("schedule", name, decays)
    if warmup_steps == 0:
        return decays[name]()
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decays[name]()], [warmup_steps])


def decay_mask(params: Any) -> Any:
    """The parameters that weight decay touches: kernels only, as in the released code.

    Returns:
      A tree like `params` of bools. Biases, layer norms, the class token and position embeddings are False.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum: float = 0.9,
    momentum_dtype: DTypeLike = "float32",
) -> optax.GradientTransformation:
    """Adam at pre-training, SGD with momentum at fine-tuning.

    Args:
      name: "adamw" or "sgd".
      schedule: the learning rate at each step.
      weight_decay: applied to `decay_mask`. Decoupled for "adamw": a step subtracts learning rate x weight_decay x
        kernel, which is the paper's meaning of 0.1. For "sgd" it is added to the gradient, before the momentum.
      clip_norm: gradients are scaled down to this global norm; None leaves them as they are.
      b1: Adam's decay of the first moment.
      b2: Adam's decay of the second moment.
      eps: Adam's epsilon.
      momentum: of SGD.
      momentum_dtype: dtype of SGD's momentum and of Adam's first moment; the released fine-tuning uses bfloat16.

    Raises:
      UserError: unknown optimizer.
    """

    def adamw():
        return optax.adamw(
            schedule, b1=b1, b2=b2, eps=eps, mu_dtype=momentum_dtype, weight_decay=weight_decay, mask=decay_mask
        )

    def sgd():
        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decay_mask) if weight_decay else optax.identity(),
            optax.sgd(schedule, momentum=momentum, accumulator_dtype=momentum_dtype),
        )

    optimizers = {"adamw": adamw, "sgd": sgd}
    if name not in optimizers:
        raise unknown_name("optimizer", name, optimizers)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(clip, optimizers[name]())
