"""From a config to the parts of a run: mesh, data, model, optimizer. No part sees the config itself."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import optimizers, partitioning
from vit_jax.config import base_config
from vit_jax.data.augment import RandAugment
from vit_jax.data.images import EvalTransform, TrainTransform
from vit_jax.data.pipeline import EvalBatches, TrainBatches
from vit_jax.data.sources import MissingDataError, RealLabels, Source, load_real_labels, open_source
from vit_jax.data.sources.mixture import Mixture
from vit_jax.errors import UserError, unknown_name
from vit_jax.evaluators.classification import ClassificationEvaluator
from vit_jax.losses import Loss, make_loss
from vit_jax.metrics import Progress
from vit_jax.mixing import Mixing
from vit_jax.models import create_model
from vit_jax.train_step import RNGS, TrainState, create_train_state, init_train_state, make_train_step
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
      abstract_batch: the same of a batch.
      loss_fn: training loss.
      mixing: mixup and CutMix.
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
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    loss_fn: Loss
    mixing: Mixing
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    num_steps: int


def build(
    config: ConfigDict, *, allow_missing_data: bool = False, devices: Sequence[jax.Device] | None = None
) -> Experiment:
    """Makes the parts of a run. Decodes no image and computes nothing on the devices.

    Args:
      config: see `vit_jax.config.base_config`.
      allow_missing_data: do without the data set if the config says how large it is; to plan a run.
      devices: to run on, or to plan for: those of a topology that is described, not here; None: all that are here.

    Raises:
      UserError: something in the config or the data is not as it should be.
    """
    check_fields(config)
    mesh = partitioning.make_mesh(devices, data=config.mesh.data, model=config.mesh.model)
    partitioning.check_batch_size(config.batch_size, mesh, config.accumulation_steps)
    partitioning.check_batch_size(config.eval_batch_size or config.batch_size, mesh, field="eval_batch_size")
    loss_fn = make_loss(config.loss, config.label_smoothing)
    mixing = Mixing(config.mixup_alpha, config.cutmix_alpha)
    train_transform(config.data), eval_transform(config.data)  # only to check them before the data are read
    _make_optimizer(config.optimizer, optax.constant_schedule(0.0))  # only to check it before the data are read

    train_source: Source | None
    eval_source: Source | None
    try:
        train_source, eval_source = open_sources(config.data)
    except MissingDataError as error:
        if not allow_missing_data or not config.data.expected_train_images:
            raise
        logger.warning("%s", error)
        train_source, eval_source = None, None
    num_train_images = len(train_source) if train_source else config.data.expected_train_images
    num_classes = _num_classes(config.model, train_source)
    model = _make_model(config.model, num_classes)
    num_steps = _num_steps(config, num_train_images)
    schedule = _make_schedule(config.optimizer, num_steps)
    optimizer = _make_optimizer(config.optimizer, schedule)
    abstract_state = jax.eval_shape(
        lambda: create_train_state(
            model,
            optimizer,
            image_size=config.data.image_size,
            seed=config.seed,
            rng=config.rng,
            polyak_decay=config.polyak_decay,
        )
    )
    specs = partitioning.parameter_specs(abstract_state.params, mesh, config.sharding, config.sharding_rules)
    shardings = partitioning.state_shardings(abstract_state, mesh, specs)
    max_labels = config.data.max_labels or (train_source.max_labels if train_source else 1)
    return Experiment(
        mesh=mesh,
        train_source=train_source,
        eval_source=eval_source,
        num_train_images=num_train_images,
        num_classes=num_classes,
        model=model,
        abstract_state=partitioning.with_sharding(abstract_state, shardings),
        abstract_batch=partitioning.with_sharding(
            {
                "image": jax.ShapeDtypeStruct((config.batch_size, *2 * (config.data.image_size,), 3), jnp.uint8),
                "label": jax.ShapeDtypeStruct(
                    (config.batch_size, *([max_labels] if max_labels > 1 else [])), jnp.int32
                ),
            },
            partitioning.batch_sharding(mesh),
        ),
        loss_fn=loss_fn,
        mixing=mixing,
        schedule=schedule,
        optimizer=optimizer,
        num_steps=num_steps,
    )


def describe_data(experiment: Experiment) -> str:
    """A line for each of the data sets, in which those of all processes must agree."""
    sources = {"training": experiment.train_source, "evaluation": experiment.eval_source}
    return "\n".join(
        f"{use}: {len(source):,} images, {source.fingerprint()}"
        for use, source in sources.items()
        if source is not None
    )


def make_step(config: ConfigDict, experiment: Experiment) -> jax.stages.Wrapped:
    """The step `(state, batch) -> (state, metrics)` of a run; also what is compiled to plan one.

    Raises:
      UserError: there are no such compiler options.
    """
    return make_train_step(
        experiment.model,
        experiment.optimizer,
        experiment.schedule,
        experiment.loss_fn,
        experiment.mesh,
        shardings=partitioning.shardings_of(experiment.abstract_state),
        accumulation_steps=config.accumulation_steps,
        mixing=experiment.mixing,
        rng=config.rng,
        polyak_decay=config.polyak_decay,
        compiler_options=_compiler_options(config.compiler_options, experiment.mesh),
    )


def _compiler_options(pairs: Sequence[Any], mesh: Mesh) -> dict[str, Any]:
    try:
        options = {str(name): value for name, value in pairs}
    except (TypeError, ValueError) as error:
        raise UserError(f"compiler_options takes pairs of a name and a value, got {pairs!r}.") from error
    if options and mesh.devices.flat[0].client == jax.devices()[0].client:  # those of a plan are asked when it compiles
        try:
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"compiler_options {options}: {error}") from error
    return options


def init_state(config: ConfigDict, experiment: Experiment) -> TrainState:
    """The state that a run begins with, on the devices."""
    return init_train_state(
        experiment.model,
        experiment.optimizer,
        experiment.mesh,
        image_size=config.data.image_size,
        seed=config.seed,
        shardings=partitioning.shardings_of(experiment.abstract_state),
        rng=config.rng,
        polyak_decay=config.polyak_decay,
    )


def make_train_batches(config: ConfigDict, experiment: Experiment) -> TrainBatches:
    """The training data of a run."""
    if experiment.train_source is None:
        raise UserError(f"data set {config.data.dataset!r} is missing.\n{config.data.how_to_prepare}")
    return TrainBatches(
        experiment.train_source,
        train_transform(config.data),
        partitioning.batch_sharding(experiment.mesh),
        batch_size=config.batch_size,
        seed=config.seed,
        num_classes=experiment.num_classes,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        prefetch=config.data.prefetch,
        max_bad_records=config.data.max_bad_records,
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
        eval_transform(config.data),
        partitioning.batch_sharding(experiment.mesh),
        batch_size=config.eval_batch_size or config.batch_size,
        num_classes=experiment.num_classes,
        num_threads=config.data.num_threads,
        max_bad_records=config.data.max_bad_records,
    )
    progress = Progress(batches, f"evaluation on {config.data.eval_split}", before_each=before_each_batch)
    shardings = partitioning.shardings_of(experiment.abstract_state.evaluated)
    return ClassificationEvaluator(experiment.model, progress, make_loss(config.loss), experiment.mesh, shardings)


_AT_LEAST_ONE = (
    *("log_every_steps", "eval_every_steps", "eval_batch_size", "checkpoint.every_steps", "checkpoint.keep"),
    *("profile.first_step", "profile.num_steps"),
    *("data.image_size", "data.num_threads", "data.prefetch", "data.eval_resize_small", "data.max_labels"),
    *("model.num_layers", "model.hidden_dim", "model.mlp_dim", "model.num_heads"),
)
_SHARES = (  # [0, 1)
    *("model.dropout_rate", "model.attention_dropout_rate", "model.stochastic_depth_rate"),
    *("label_smoothing", "polyak_decay"),
)
_NOT_NEGATIVE = (
    "seed",
    "watchdog_seconds",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.end_learning_rate",
)
_DTYPES = ("model.dtype", "model.param_dtype", "optimizer.momentum_dtype")


def check_fields(config: ConfigDict) -> None:
    """Checks each field by itself.

    Raises:
      UserError: one is out of its range, or None where there must be a value.
    """
    fields = flatten(config.to_dict())
    for name, default in flatten(base_config().to_dict()).items():
        if default is not None and fields[name] is None:
            raise UserError(f"{name} cannot be None; its default is {default!r}.")

    def check(names: Sequence[str], is_right: Callable[[Any], bool], expected: str) -> None:
        for name in names:
            if fields[name] is not None and not is_right(fields[name]):
                raise UserError(f"{name} must be {expected}, got {fields[name]!r}.")

    check(_AT_LEAST_ONE, lambda value: value >= 1, "at least 1")
    check(_SHARES, lambda value: 0 <= value < 1, "at least 0 and less than 1")
    check(_NOT_NEGATIVE, lambda value: value >= 0, "at least 0")
    check(
        ["data.num_workers", "data.max_bad_records", "data.randaugment_layers"], lambda value: value >= 0, "at least 0"
    )
    check(["data.crop_min_area"], lambda value: 0 < value <= 1, "more than 0 and at most 1")
    check(["optimizer.clip_norm"], lambda value: value > 0, "more than 0, or None for no clipping")
    check(_DTYPES, ("float32", "bfloat16", "float16").__contains__, "'float32', 'bfloat16' or 'float16'")
    if config.rng not in RNGS:
        raise unknown_name("rng", config.rng, RNGS)
    # Metrics of training and of time bear these prefixes.
    check(["data.eval_split"], lambda value: value not in ("train", "time"), "a split of another name")


def train_transform(data: ConfigDict) -> TrainTransform:
    """What is done to each training image; `data` is the part of the config about data."""
    randaugment = None
    if data.randaugment_layers:
        randaugment = RandAugment(
            data.randaugment_layers,
            data.randaugment_magnitude,
            data.randaugment_magnitude_std,
            data.randaugment_operations,
        )
    return TrainTransform(
        image_size=data.image_size,
        inception_crop=data.inception_crop,
        min_area=data.crop_min_area,
        random_crop_from=data.random_crop_from,
        flip=data.flip,
        resize=data.resize,
        randaugment=randaugment,
    )


def eval_transform(data: ConfigDict) -> EvalTransform:
    """What is done to each image of an evaluation; `data` is the part of the config about data."""
    return EvalTransform(image_size=data.image_size, resize_small=data.eval_resize_small, resize=data.eval_resize)


def open_sources(data: ConfigDict) -> tuple[Source, Source | None]:
    """Opens the data for training and, if there are, for evaluation; `data` is the part of the config about data.

    Raises:
      MissingDataError: they are not there.
      UserError: they are not as they should be.
    """
    train_source = open_train_source(data)
    expected = data.expected_train_images
    if expected and abs(len(train_source) - expected) > data.expected_within * expected:
        raise UserError(
            f"{train_source.name}/{data.train_split} has {len(train_source)} images, but data.expected_train_images is "
            f"{expected}. Complete the data set, or pass --config.data.expected_train_images={len(train_source)} if "
            "that is how it should be."
        )
    if data.eval_split is None:
        if data.eval_labels:
            raise UserError("data.eval_labels is set, but data.eval_split, whose labels they are, is not.")
        return train_source, None
    eval_source = _open_source(data, data.dataset, data.eval_split)
    if eval_source.class_names and train_source.class_names:
        differing = sorted(set(train_source.class_names) ^ set(eval_source.class_names))
        if list(eval_source.class_names) != list(train_source.class_names):
            raise UserError(
                f"{train_source.name}/{train_source.split}, to train on, and {eval_source.name}/{eval_source.split}, "
                f"to evaluate on, have different classes, so labels would not mean the same: {len(differing)} are in "
                f"one of them only, such as {differing[:5]}."
            )
    if data.eval_labels:
        eval_source = RealLabels(eval_source, load_real_labels(data.eval_labels))
    return train_source, eval_source


def _open_source(data: ConfigDict, dataset: str, split: str) -> Source:
    return open_source(
        dataset,
        split,
        how_to_prepare=data.how_to_prepare,
        image_key=data.image_key,
        label_key=data.label_key,
        max_labels=data.max_labels,
    )


def open_train_source(data: ConfigDict) -> Source:
    """Opens the data for training; `data` is the part of the config about data.

    Raises:
      MissingDataError: they are not there.
      UserError: they are not as they should be.
    """
    if not data.mixture:
        return _open_source(data, data.dataset, data.train_split)
    try:
        datasets, weights = zip(*((str(dataset), float(weight)) for dataset, weight in data.mixture), strict=True)
    except (TypeError, ValueError) as error:
        raise UserError(f"data.mixture takes pairs of data set and weight, got {data.mixture!r}.") from error
    return Mixture([_open_source(data, dataset, data.train_split) for dataset in datasets], weights)


def _num_classes(fields: ConfigDict, train_source: Source | None) -> int:
    known = train_source.num_classes if train_source else None
    num_classes = fields.num_classes or known
    if num_classes is None:
        why = f"{train_source.name} does not say how many classes it has" if train_source else "the data set is missing"
        raise UserError(f"{why}: set model.num_classes.")
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
    lengths = {name: config[name] for name in ("epochs", "steps", "images") if config[name] is not None}
    if len(lengths) != 1:
        given = ", ".join(f"{name}={value}" for name, value in lengths.items()) or "none of them"
        raise UserError(f"set one of epochs, steps and images as the length of the run; got {given}.")
    if config.steps is not None:
        num_steps = config.steps
    else:
        images = config.images if config.epochs is None else config.epochs * num_train_images
        num_steps = round(images / config.batch_size)
    if num_steps < 1:
        raise UserError(f"the run would be {num_steps} steps long; set more epochs, steps or images.")
    return num_steps


def _make_schedule(fields: ConfigDict, num_steps: int) -> optax.Schedule:
    return optimizers.make_schedule(
        fields.schedule,
        learning_rate=fields.learning_rate,
        num_steps=num_steps,
        warmup_steps=fields.warmup_steps,
        end_learning_rate=fields.end_learning_rate,
        drop_at=fields.drop_at,
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
