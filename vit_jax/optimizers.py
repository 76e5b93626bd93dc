"""Optimizers and learning-rate schedules as optax transformations (tables 3 and 4).

A new optimizer is a function of the schedule and `Settings`, and a line in `OPTIMIZERS`.
"""

import dataclasses
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
    """Makes the learning rate as a function of the step, counted from 0.

    It rises linearly from 0 over `warmup_steps`, so that the first step changes nothing, and then follows the schedule
    of that name, which for "linear" and "cosine" ends with `end_learning_rate` at `num_steps`.

    Args:
      name: "linear", "cosine", "constant" or "drops".
      learning_rate: the base learning rate, reached after the warm-up.
      num_steps: length of the run.
      warmup_steps: length of the warm-up (10,000 at pre-training, 500 at fine-tuning).
      end_learning_rate: the last learning rate of "linear" and "cosine" (1e-5 for ImageNet-21k).
      drop_at: shares of the run, warm-up included, at which "drops" divides the learning rate by 10, as BiT does. The
        first step with the divided rate is share x num_steps, rounded.

    Raises:
      UserError: unknown schedule, a warm-up that is not shorter than the run, or shares that do not fit the schedule.
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
            "optimizer.drop_at takes growing shares of the run, after the warm-up and below 1, such as (0.3, 0.6, 0.9) "
            f"for the schedule 'drops'; got {tuple(drop_at)} with the schedule {name!r} in a run of {num_steps} steps."
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
    """Selects the parameters that decay: kernels only, as by default in big_vision. The paper does not say.

    Returns:
      A tree like `params` of bools. Biases, layer norms, the class token and position embeddings are False.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def is_trained(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Makes a predicate of parameter names: whether a pattern matches a name, or there are no patterns.

    Raises:
      UserError: they are not regular expressions.
    """
    if isinstance(patterns, str):
        raise UserError(f"train_only takes several patterns, such as ({patterns!r},); got {patterns!r}.")
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except (re.error, TypeError) as error:
        raise UserError(f"train_only takes patterns of parameter names, got {patterns!r}: {error}.") from error
    return lambda name: not compiled or any(pattern.search(name) for pattern in compiled)


def select_parameters(params: Any, patterns: Sequence[str]) -> Any:
    """Selects the parameters to train by patterns of their names.

    Args:
      params: a tree of arrays or shapes.
      patterns: regular expressions, such as "^head/" for only the head; empty: all parameters are trained.

    Returns:
      The tree with None in place of parameters that are not trained.

    Raises:
      UserError: a pattern is not a regular expression, or is found in no name.
    """
    is_selected = is_trained(patterns)
    names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(
                f"train_only {pattern!r} is found in no parameter's name. Examples of names: "
                f"{', '.join(repr(name) for name in [*names[:: max(1, len(names) // 4)][:4], names[-1]])}."
            )
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf if is_selected(name_of(path)) else None, params)


def merge_parameters(params: Any, trained: Any) -> Any:
    """Replaces parameters by those in `trained` (from `select_parameters`) that are not None."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, trained, params, is_leaf=lambda leaf: leaf is None
    )


def update_average(average: Any, params: Any, decay: float) -> Any:
    """Updates the Polyak average of the parameters: decay x average + (1 - decay) x parameters."""
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, params)


_LAYER = re.compile(r"\bencoderblock_(\d+)/")
_UNIT = re.compile(r"^block(\d+)/unit(\d+)/")
_STACKED = "Transformer/encoderblock/"
_ABOVE = re.compile(r"^(head|pre_logits|MAPHead_0|norm_pre_head|(Transformer/)?encoder_norm)/")


def layer_scales(params: Any, layer_decay: float) -> Any:
    """Computes the factor on each parameter's learning rate: `layer_decay` to the power of its distance to the head.

    Everything before the first layer (patch and position embeddings, class token, the ResNet of a hybrid) counts as one
    layer, and so do the head and the norm before it, with factor 1. The layers of a ResNet are its units.

    Args:
      params: the parameters, or some of them, with None in place of the others. Only their layers count.
      layer_decay: between 0 and 1.

    Returns:
      A tree like `params` of numbers, and of arrays `[num_layers, 1, ...]` for stacks of scanned layers.
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


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of optimizers; each uses those that apply to it."""

    # Of kernels (`decay_mask`). A step subtracts learning rate x weight_decay x kernel, which is the paper's meaning of
    # 0.1; only SGD adds it to the gradient, before the momentum.
    weight_decay: float = 0.0
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.999  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    momentum: float = 0.9  # of SGD and Muon
    momentum_dtype: DTypeLike = "float32"  # of the first moment or the momentum; the released fine-tuning uses bfloat16


def _adamw(schedule: optax.ScalarOrSchedule, s: Settings) -> optax.GradientTransformation:
    """Adam with decoupled weight decay: the paper's pre-training (Loshchilov & Hutter, 2019)."""
    return optax.adamw(
        schedule, s.b1, s.b2, s.eps, mu_dtype=s.momentum_dtype, weight_decay=s.weight_decay, mask=decay_mask
    )


def _sgd(schedule: optax.ScalarOrSchedule, s: Settings) -> optax.GradientTransformation:
    """SGD with momentum: the paper's fine-tuning, and BiT."""
    decay = optax.add_decayed_weights(s.weight_decay, decay_mask) if s.weight_decay else optax.identity()
    return optax.chain(decay, optax.sgd(schedule, s.momentum, accumulator_dtype=s.momentum_dtype))


def _lion(schedule: optax.ScalarOrSchedule, s: Settings) -> optax.GradientTransformation:
    """Lion (Chen et al., 2023). Its authors use b2 0.99, a tenth of AdamW's learning rate and ten times its decay."""
    return optax.lion(schedule, s.b1, s.b2, s.momentum_dtype, s.weight_decay, decay_mask)


def _lamb(schedule: optax.ScalarOrSchedule, s: Settings) -> optax.GradientTransformation:
    """LAMB, Adam for large batches (You et al., 2020); optax keeps its moments in the parameters' dtype."""
    return optax.lamb(schedule, s.b1, s.b2, s.eps, weight_decay=s.weight_decay, mask=decay_mask)


def _adafactor(schedule: optax.ScalarOrSchedule, s: Settings) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern, 2018) as changed for large ViTs (Zhai et al., 2022).

    It has a first moment, ignores the scale of the parameters, and the decay of the second moment, `1 - t^-0.8`, is at
    most b2. The second moment of a kernel is a row and a column (of 32 and more, as in big_vision), so that with
    `momentum_dtype="bfloat16"` the state is half as large as the parameters.
    """

    def decay(step: Any, power: Any) -> jax.Array:
        return jnp.minimum(1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -power, s.b2)

    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32, decay_rate_fn=decay),
        optax.clip_by_block_rms(1.0),
        optax.ema(s.b1, debias=False, accumulator_dtype=s.momentum_dtype),
        optax.add_decayed_weights(s.weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(schedule: optax.ScalarOrSchedule, s: Settings) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) for the kernels of layers, AdamW for all other parameters.

    Scaled as by Liu et al. (2025), so that AdamW's learning rate and weight decay fit; their momentum is 0.95. The
    embedding and the head are AdamW's, as is usual.
    """
    from optax import contrib  # not above: it takes a tenth of a second, and only Muon needs it

    def matrices(params: Any) -> Any:
        def find(path: tuple[Any, ...], _: Any) -> contrib.MuonDimensionNumbers | None:
            axes = _matrix_axes(name_of(path))
            return contrib.MuonDimensionNumbers(*axes) if axes else None

        return jax.tree_util.tree_map_with_path(find, params)

    muon = contrib.muon(
        1.0,
        beta=s.momentum,
        eps=s.eps,
        mu_dtype=s.momentum_dtype,
        adam_b1=s.b1,
        adam_b2=s.b2,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )
    # optax's own weight decay for Muon has no mask for the parameters that AdamW updates.
    decay = optax.add_decayed_weights(s.weight_decay, decay_mask)
    return optax.chain(muon, optax.scale(-1.0), decay, optax.scale_by_learning_rate(schedule))


def _matrix_axes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The axes of a layer's kernel that are inputs and outputs, counted from the last; None for other parameters."""
    if not name.endswith("/kernel") or not (_LAYER.search(name) or _UNIT.search(name) or name.startswith(_STACKED)):
        return None
    if _UNIT.search(name):
        return (-4, -3, -2), (-1,)  # a convolution
    if name.endswith(("/query/kernel", "/key/kernel", "/value/kernel")):
        return (-3,), (-2, -1)  # to heads
    return ((-3, -2), (-1,)) if name.endswith("/out/kernel") else ((-2,), (-1,))


OPTIMIZERS: dict[str, Callable[[optax.ScalarOrSchedule, Settings], optax.GradientTransformation]] = {
    "adafactor": _adafactor,
    "adamw": _adamw,
    "lamb": _lamb,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}


def make_optimizer(
    name: str,
    schedule: optax.ScalarOrSchedule,
    *,
    clip_norm: float | None = None,
    layer_decay: float | None = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """Makes an optimizer.

    Args:
      name: one of `OPTIMIZERS`.
      schedule: the learning rate by step, or a constant.
      clip_norm: gradients are scaled down to this global norm; None leaves them as they are.
      layer_decay: multiplies each parameter's learning rate by its `layer_scales`; None: one rate for all.
      **settings: see `Settings`.

    Raises:
      UserError: unknown optimizer.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    optimizer = OPTIMIZERS[name](schedule, Settings(**settings))
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    if layer_decay is None:
        return optax.chain(clip, optimizer)
    by_layer = optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda update, scale: (update * scale).astype(update.dtype), updates, layer_scales(updates, layer_decay)
        )
    )
    return optax.chain(clip, optimizer, by_layer)
