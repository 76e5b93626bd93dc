"""From a config to the parts of a run: mesh, data, model, optimizer. No part sees the config itself."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import optimizers, partitioning
from vit_jax.data.images import EvalTransform, TrainTransform
from vit_jax.data.pipeline import EvalBatches, TrainBatches
from vit_jax.data.sources import Source, find_path, open_source
from vit_jax.errors import UserError
from vit_jax.evaluators.classification import ClassificationEvaluator
from vit_jax.losses import Loss, make_loss
from vit_jax.metrics import Progress
from vit_jax.models import create_model
from vit_jax.train_step import TrainState, create_train_state
from vit_jax.workdir import flatten

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run's parts, made and checked, before anything is computed.

    Attributes:
      mesh: the devices.
      train_source: training examples; None only if `build` was told that they may be missing, and they are.
      eval_source: evaluation examples, if any.
      num_train_images: length of an epoch.
      num_classes: width of the logits.
      model: images -> (logits, intermediates).
      abstract_state: shapes, dtypes and shardings of the training state.
      loss_fn: training loss.
      schedule: learning rate by step.
      optimizer: the update.
      num_steps: length of the run.
    """

    mesh: Mesh
    train_source: Source | None
    eval_source: Source | None
    num_train_images: int
    num_classes: int
    model: nn.Module
    abstract_state: TrainState
    loss_fn: Loss
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    num_steps: int


def build(config: ConfigDict, *, allow_missing_data: bool = False) -> Experiment:
    """Makes the parts of a run. Decodes no image and computes nothing on the devices.

    Args:
      config: see `vit_jax.config.base_config`.
      allow_missing_data: do without the data set if the config says how large it is; to plan a run.

    Raises:
      UserError: something in the config or the data is not as it should be.
    """
    mesh = partitioning.make_mesh()
    partitioning.check_batch_size(config.batch_size, mesh, config.accumulation_steps)
    partitioning.check_batch_size(config.eval_batch_size or config.batch_size, mesh, field="eval_batch_size")
    _check_ranges(config)
    loss_fn = make_loss(config.loss, config.label_smoothing)
    _make_optimizer(config.optimizer, optax.constant_schedule(0.0))  # only to check it before the data are read

    train_source, eval_source = _open_sources(config.data, allow_missing_data)
    num_train_images = len(train_source) if train_source else config.data.expected_train_images
    num_classes = _num_classes(config.model, train_source)
    model = _make_model(config.model, num_classes)
    num_steps = _num_steps(config, num_train_images)
    schedule = _make_schedule(config.optimizer, num_steps)
    optimizer = _make_optimizer(config.optimizer, schedule)
    abstract_state = partitioning.with_sharding(
        jax.eval_shape(
            lambda: create_train_state(model, optimizer, image_size=config.data.image_size, seed=config.seed)
        ),
        partitioning.replicated(mesh),
    )
    return Experiment(
        mesh=mesh,
        train_source=train_source,
        eval_source=eval_source,
        num_train_images=num_train_images,
        num_classes=num_classes,
        model=model,
        abstract_state=abstract_state,
        loss_fn=loss_fn,
        schedule=schedule,
        optimizer=optimizer,
        num_steps=num_steps,
    )


def make_train_batches(config: ConfigDict, experiment: Experiment) -> TrainBatches:
    """The training data of a run."""
    if experiment.train_source is None:
        raise UserError(f"data set {config.data.dataset!r} is missing.\n{config.data.how_to_prepare}")
    return TrainBatches(
        experiment.train_source,
        TrainTransform(
            image_size=config.data.image_size,
            inception_crop=config.data.inception_crop,
            min_area=config.data.crop_min_area,
            flip=config.data.flip,
        ),
        partitioning.batch_sharding(experiment.mesh),
        batch_size=config.batch_size,
        seed=config.seed,
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
    )


def make_evaluator(
    config: ConfigDict, experiment: Experiment, before_each_batch: Callable[[], None] = lambda: None
) -> ClassificationEvaluator | None:
    """Classification of the evaluation split, if any; its loss is without label smoothing.

    Args:
      config: see `vit_jax.config.base_config`.
      experiment: from `build`.
      before_each_batch: called between batches; may raise to end an evaluation.
    """
    if experiment.eval_source is None:
        return None
    batches = EvalBatches(
        experiment.eval_source,
        EvalTransform(image_size=config.data.image_size, resize_small=config.data.eval_resize_small),
        partitioning.batch_sharding(experiment.mesh),
        batch_size=config.eval_batch_size or config.batch_size,
        num_threads=config.data.num_threads,
    )
    progress = Progress(batches, f"evaluation on {config.data.eval_split}", before_each=before_each_batch)
    return ClassificationEvaluator(experiment.model, progress, make_loss(config.loss), experiment.mesh)


_AT_LEAST_ONE = (
    *("log_every_steps", "eval_every_steps", "checkpoint.every_steps", "checkpoint.keep"),
    *("data.image_size", "data.num_threads", "data.prefetch", "data.eval_resize_small"),
    *("model.num_layers", "model.hidden_dim", "model.mlp_dim", "model.num_heads"),
)
_SHARES = (  # [0, 1)
    *("model.dropout_rate", "model.attention_dropout_rate", "model.stochastic_depth_rate"),
    "label_smoothing",
)
_NOT_NEGATIVE = ("seed", "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.end_learning_rate")
_DTYPES = ("model.dtype", "model.param_dtype", "optimizer.momentum_dtype")


def _check_ranges(config: ConfigDict) -> None:
    fields = flatten(config.to_dict())

    def check(names: Sequence[str], is_right: Callable[[Any], bool], expected: str) -> None:
        for name in names:
            if fields[name] is not None and not is_right(fields[name]):
                raise UserError(f"{name} must be {expected}, got {fields[name]!r}.")

    check(_AT_LEAST_ONE, lambda value: value >= 1, "at least 1")
    check(_SHARES, lambda value: 0 <= value < 1, "at least 0 and less than 1")
    check(_NOT_NEGATIVE, lambda value: value >= 0, "at least 0")
    check(["data.crop_min_area"], lambda value: 0 < value <= 1, "more than 0 and at most 1")
    check(["optimizer.clip_norm"], lambda value: value > 0, "more than 0, or None for no clipping")
    check(_DTYPES, ("float32", "bfloat16", "float16").__contains__, "'float32', 'bfloat16' or 'float16'")
    # Metrics of training and of time bear these prefixes.
    check(["data.eval_split"], lambda value: value not in ("train", "time"), "a split of another name")


def _open_sources(data: ConfigDict, allow_missing_data: bool) -> tuple[Source | None, Source | None]:
    if allow_missing_data and data.expected_train_images and data.dataset != "digits" and not find_path(data.dataset):
        logger.warning("data set %r is not here.\n%s", data.dataset, data.how_to_prepare.strip())
        return None, None
    train_source = open_source(data.dataset, data.train_split, data.how_to_prepare)
    expected = data.expected_train_images
    if expected and len(train_source) != expected:
        raise UserError(
            f"{data.dataset}/{data.train_split} has {len(train_source)} images, but data.expected_train_images is "
            f"{expected}. Complete the data set, or pass --config.data.expected_train_images={len(train_source)} if "
            "that is how it should be."
        )
    if data.eval_split is None:
        return train_source, None
    eval_source = open_source(data.dataset, data.eval_split, data.how_to_prepare)
    if list(eval_source.class_names) != list(train_source.class_names):
        differing = sorted(set(train_source.class_names) ^ set(eval_source.class_names))
        raise UserError(
            f"the splits {data.train_split!r} and {data.eval_split!r} of {data.dataset} have different classes, so "
            f"labels would not mean the same: {len(differing)} are in one of them only, such as {differing[:5]}."
        )
    return train_source, eval_source


def _num_classes(fields: ConfigDict, train_source: Source | None) -> int:
    known = len(train_source.class_names) if train_source else None
    num_classes = fields.num_classes or known
    if num_classes is None:
        raise UserError("the data set is missing: set model.num_classes to plan without it.")
    if known and num_classes < known:
        raise UserError(
            f"model.num_classes {num_classes} is less than the data set's {known} classes. Leave it out, or use at "
            f"least {known}."
        )
    return num_classes


def _make_model(fields: ConfigDict, num_classes: int) -> nn.Module:
    overrides = {name: value for name, value in fields.items() if value is not None}
    return create_model(**(overrides | {"num_classes": num_classes}))


def _num_steps(config: ConfigDict, num_train_images: int) -> int:
    if (config.epochs is None) == (config.steps is None):
        raise UserError(f"set either epochs or steps; epochs is {config.epochs} and steps is {config.steps}.")
    num_steps = config.steps if config.epochs is None else round(config.epochs * num_train_images / config.batch_size)
    if num_steps < 1:
        raise UserError(f"the run would be {num_steps} steps long; set more epochs or steps.")
    return num_steps


def _make_schedule(fields: ConfigDict, num_steps: int) -> optax.Schedule:
    return optimizers.make_schedule(
        fields.schedule,
        learning_rate=fields.learning_rate,
        num_steps=num_steps,
        warmup_steps=fields.warmup_steps,
        end_learning_rate=fields.end_learning_rate,
    )


def _make_optimizer(fields: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optimizers.make_optimizer(
        fields.name,
        schedule,
        weight_decay=fields.weight_decay,
        clip_norm=fields.clip_norm,
        b1=fields.b1,
        b2=fields.b2,
        eps=fields.eps,
        momentum=fields.momentum,
        momentum_dtype=fields.momentum_dtype,
    )
