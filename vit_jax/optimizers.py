"""Optimizers and learning-rate schedules as optax transformations (tables 3 and 4)."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from vit_jax.errors import UserError, unknown_name
from vit_jax.sharding import name_of


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
      drop_at: shares of the run, warm-up included, after which "drops" divides the learning rate by 10: BiT's way. The
        step that equals a share of the run, counted from 0, is the first with the divided rate.

    Raises:
      UserError: unknown decay, a warm-up that is not shorter than the run, or shares that do not go with the decay.
    """
    if not 0 <= warmup_steps < num_steps:
        raise UserError(
            f"optimizer.warmup_steps {warmup_steps} must be less than the run's {num_steps} steps. A tenth would be "
            f"--config.optimizer.warmup_steps={num_steps // 10}."
        )
    drops = [round(share * num_steps) for share in drop_at]
    in_order = drops == sorted(drops) and all(warmup_steps <= step < num_steps for step in drops)
    if (name == "drops") != bool(drops) or not in_order:
        raise UserError(
            "optimizer.drop_at takes shares of the run, after the warm-up, growing, below 1, such as (0.3, 0.6, 0.9), "
            f"and belongs to the schedule 'drops'; got {tuple(drop_at)} with the schedule {name!r} in a run of "
            f"{num_steps} steps."
        )
    decay_steps = num_steps - warmup_steps
    decays = {
        "linear": lambda: optax.linear_schedule(learning_rate, end_learning_rate, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(
            learning_rate, decay_steps, alpha=end_learning_rate / learning_rate if learning_rate else 0.0
        ),
        "constant": lambda: optax.constant_schedule(learning_rate),
        "drops": lambda: optax.piecewise_constant_schedule(
            learning_rate, {step - warmup_steps: 0.1 ** drops.count(step) for step in drops}
        ),
    }
    if name not in decays:
        raise unknown_name("schedule", name, decays)
    if warmup_steps == 0:
        return decays[name]()
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decays[name]()], [warmup_steps])


def decay_mask(params: Any) -> Any:
    """The parameters that weight decay touches: kernels only, as by big_vision's default. The paper does not say.

    Returns:
      A tree like `params` of bools. Biases, layer norms, the class token and position embeddings are False.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def is_trained(patterns: Sequence[str]) -> Callable[[str], bool] | None:
    """Tells by a parameter's name whether it is trained; None if all are. See `select_parameters`."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return (lambda name: any(pattern.search(name) for pattern in compiled)) if compiled else None


def select_parameters(patterns: Sequence[str]) -> Callable[[Any], Any]:
    """Says which parameters are trained: those in whose name one of the patterns is found.

    Args:
      patterns: regular expressions, such as "^head/" for the head alone; none: all parameters are trained.

    Returns:
      A function from the parameters to a tree of those that are trained, with None in the place of the others. It
      raises `UserError` where a pattern is found in no name.

    Raises:
      UserError: a pattern is no regular expression.
    """
    if isinstance(patterns, str):
        raise UserError(f"train_only takes several patterns, such as ({patterns!r},); got {patterns!r}.")
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except (re.error, TypeError) as error:
        raise UserError(f"train_only takes patterns of names of parameters, got {patterns!r}: {error}.") from error

    def select(params: Any) -> Any:
        names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern in compiled:
            if not any(map(pattern.search, names)):
                raise UserError(
                    f"train_only {pattern.pattern!r} is found in no name of a parameter. Names are such as "
                    f"{', '.join(repr(name) for name in [*names[:: max(1, len(names) // 4)][:4], names[-1]])}."
                )
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if any(pattern.search(name_of(path)) for pattern in compiled) else None, params
        )

    return select if compiled else lambda params: params


def merge_parameters(params: Any, trained: Any) -> Any:
    """Puts trained parameters, as from `select_parameters`, into the place of those in `params`."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, trained, params, is_leaf=lambda leaf: leaf is None
    )


_LAYER = re.compile(r"\bencoderblock_(\d+)/")
_UNIT = re.compile(r"^block(\d+)/unit(\d+)/")
_STACKED = "Transformer/encoderblock/"
_ABOVE = re.compile(r"^(head|pre_logits|MAPHead_0|norm_pre_head|(Transformer/)?encoder_norm)/")


def layer_scales(params: Any, layer_decay: float) -> Any:
    """How much smaller the learning rate of each parameter is: `layer_decay` to the power of its distance to the head.

    What comes before the first layer (patch and position embeddings, class token, the ResNet of a hybrid) counts as a
    layer, and so do the head and the norm before it, whose scale is 1. Layers of a ResNet are its units.

    Args:
      params: the parameters, or some of them (None in the place of the others): distances count the layers there are.
      layer_decay: between 0 and 1.

    Returns:
      A tree like `params` of numbers; of arrays `[num_layers, 1, ...]` for stacks of scanned layers.
    """
    leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    depth = next((leaf.shape[0] for name, leaf in leaves.items() if name.startswith(_STACKED)), 0)
    layers: list[Any] = sorted({int(match[1]) for name in leaves if (match := _LAYER.search(name))})
    units = sorted({(int(match[1]), int(match[2])) for name in leaves if (match := _UNIT.search(name))})
    top = (depth or len(layers) or len(units)) + 1

    def scale(path: tuple[Any, ...], leaf: jax.Array) -> Any:
        name = name_of(path)
        if name.startswith(_STACKED):
            powers = layer_decay ** jnp.arange(depth, 0, -1, dtype=jnp.float32)
            return powers.reshape(-1, *[1] * (leaf.ndim - 1))
        if match := _LAYER.search(name):
            number = layers.index(int(match[1])) + 1
        elif not (layers or depth) and (match := _UNIT.search(name)):
            number = units.index((int(match[1]), int(match[2]))) + 1
        else:
            number = top if _ABOVE.search(name) else 0
        return layer_decay ** (top - number)

    return jax.tree_util.tree_map_with_path(scale, params)


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
    layer_decay: float | None = None,
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
      layer_decay: the learning rate of a parameter is times its `layer_scales`; None: it is the same for all.

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
    if layer_decay is None:
        return optax.chain(clip, optimizers[name]())
    by_layer = optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda update, scale: (update * scale).astype(update.dtype), updates, layer_scales(updates, layer_decay)
        )
    )
    return optax.chain(clip, optimizers[name](), by_layer)
