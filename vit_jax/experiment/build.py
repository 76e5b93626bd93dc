"""From a config to the parts of a run: mesh, data, model, optimizer. No part sees the config itself."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import optimizers, sharding
from vit_jax.config import CHECKS, LENGTHS, check_fields
from vit_jax.costs.flops import Trained, train_step_flops
from vit_jax.data.class_names import class_names, wordnet_ids
from vit_jax.data.pipeline import TrainBatches
from vit_jax.data.randaugment import RandAugment
from vit_jax.data.sources import MissingDataError, RealLabels, Source, load_real_labels, open_source
from vit_jax.data.sources.mixture import Mixture
from vit_jax.data.transforms import EvalTransform, TrainTransform
from vit_jax.errors import UserError, unknown_name
from vit_jax.evaluators.features import representation_shapes
from vit_jax.models import create_model
from vit_jax.objectives.losses import Loss, make_loss
from vit_jax.objectives.mixup import Mixing
from vit_jax.run.facts import describe_class_changes, moved_names
from vit_jax.train_step import (
    Select,
    TrainState,
    create_train_state,
    init_train_state,
    make_train_step,
    with_parameters,
)
from vit_jax.weights import ModelSpec, TransferReport, Weights, get_checkpoint, list_checkpoints, transfer
from vit_jax.weights import load as load_weights
from vit_jax.weights.addresses import cached_path

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
      class_names: of the logits, or of the first ones; None where neither the data nor a kept head have names.
      model_fields: what `create_model` was given.
      model: images -> (logits, intermediates).
      abstract_state: shapes, dtypes and shardings of the training state.
      abstract_batch: the same of a batch.
      loss_fn: training loss.
      mixing: mixup and CutMix.
      schedule: learning rate by step.
      optimizer: the update.
      num_steps: length of the run.
      select: the parameters that are trained.
      initial_params: parameters to begin with, on the host; None: the model's own initialisation.
      transfer_report: what became of the weights they are from.
      is_trained: tells by a parameter's name whether it is trained; None: all are.
    """

    mesh: Mesh
    train_source: Source | None
    eval_source: Source | None
    num_train_images: int
    num_classes: int
    class_names: tuple[str, ...] | None
    model_fields: dict[str, Any]
    model: nn.Module
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    loss_fn: Loss
    mixing: Mixing
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    num_steps: int
    select: Select
    initial_params: Any = None
    transfer_report: TransferReport | None = None
    is_trained: Trained | None = None

    @property
    def train_flops(self) -> int:
        """FLOPs of training on one image. With frozen parameters only what is computed counts."""
        return train_step_flops(self.model, self.abstract_batch["image"].shape[1], self.is_trained)

    @property
    def model_name(self) -> str:
        """Such as "ViT-B/16"."""
        return self.model_fields["name"]


def build(
    config: ConfigDict, *, allow_missing_data: bool = False, devices: Sequence[jax.Device] | None = None
) -> Experiment:
    """Makes the parts of a run. Decodes no image and computes nothing on the devices.

    Args:
      config: see `vit_jax.config.base_config`.
      allow_missing_data: do without the data set if the config says how large it is, and without released weights
        that were not fetched yet; to plan a run.
      devices: to run on, or to plan for: those of a topology that is described, not here; None: all that are here.

    Raises:
      UserError: something in the config or the data is not as it should be.
    """
    check_fields(config)
    mesh = sharding.make_mesh(devices, data=config.mesh.data, model=config.mesh.model)
    sharding.check_batch_size(config.batch_size, mesh, config.accumulation_steps)
    sharding.check_batch_size(config.eval_batch_size or config.batch_size, mesh, field="eval_batch_size")
    loss_fn = make_loss(config.loss, config.label_smoothing)
    mixing = Mixing(config.mixup_alpha, config.cutmix_alpha)
    train_transform(config.data), eval_transform(config.data)  # only to check them before the data are read
    _make_optimizer(config.optimizer, optax.constant_schedule(0.0))  # only to check it before the data are read
    select = optimizers.select_parameters(config.train_only)
    if config.weights is None and config.keep_head:
        raise UserError("keep_head is set, but weights, whose head it is, are not.")
    spec, weights = None, None
    if config.weights is not None:
        spec, weights = find_weights(config.weights, config.model.name, allow_missing=allow_missing_data)

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
    remedy = "Set keep_head=False, for a new head"
    if spec and config.keep_head:
        num_classes = num_kept_classes(config, config.weights, spec, train_source, remedy)
    else:
        num_classes = _num_classes(config, train_source)
    model_fields = get_model_fields(config, num_classes, spec)
    model = create_model(**model_fields)
    initial_params, report = None, None
    if weights:
        if config.keep_head:
            check_class_names(weights, train_source, remedy)
        initial_params, report = transfer(
            weights,
            model,
            config.data.image_size,
            keep_head=config.keep_head,
            keep_pre_logits=True,  # if the model has such a layer
            seed=config.seed,
        )
    num_steps = _num_steps(config, num_train_images)
    if config.profile.first_step is not None and config.profile.first_step > num_steps:
        raise UserError(
            f"profile.first_step {config.profile.first_step} is after the run's {num_steps} steps. Set "
            f"--config.profile.first_step to at most {num_steps}."
        )
    if config.fewshot.datasets:
        known = representation_shapes(model, config.fewshot.image_size or config.data.image_size)
        for name in config.fewshot.representations:
            if name not in known:
                raise unknown_name("representation in fewshot.representations:", name, known)
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
            select=select,
        )
    )
    specs = sharding.parameter_specs(abstract_state.params, mesh, config.sharding, config.sharding_rules)
    shardings = sharding.state_shardings(abstract_state, mesh, specs)
    max_labels = config.data.max_labels or (train_source.max_labels if train_source else 1)
    return Experiment(
        mesh=mesh,
        train_source=train_source,
        eval_source=eval_source,
        num_train_images=num_train_images,
        num_classes=num_classes,
        class_names=_class_names(train_source, weights if config.keep_head else None),
        model_fields=model_fields,
        model=model,
        abstract_state=sharding.with_sharding(abstract_state, shardings),
        abstract_batch=sharding.with_sharding(
            {
                "image": jax.ShapeDtypeStruct((config.batch_size, *2 * (config.data.image_size,), 3), jnp.uint8),
                "label": jax.ShapeDtypeStruct(
                    (config.batch_size, *([max_labels] if max_labels > 1 else [])), jnp.int32
                ),
            },
            sharding.batch_sharding(mesh),
        ),
        loss_fn=loss_fn,
        mixing=mixing,
        schedule=schedule,
        optimizer=optimizer,
        num_steps=num_steps,
        select=select,
        initial_params=initial_params,
        transfer_report=report,
        is_trained=optimizers.is_trained(config.train_only),
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
        shardings=sharding.shardings_of(experiment.abstract_state),
        accumulation_steps=config.accumulation_steps,
        mixing=experiment.mixing,
        rng=config.rng,
        polyak_decay=config.polyak_decay,
        compiler_options=_compiler_options(config.compiler_options, experiment.mesh),
        select=experiment.select,
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
    state = init_train_state(
        experiment.model,
        experiment.optimizer,
        experiment.mesh,
        image_size=config.data.image_size,
        seed=config.seed,
        shardings=sharding.shardings_of(experiment.abstract_state),
        rng=config.rng,
        polyak_decay=config.polyak_decay,
        select=experiment.select,
    )
    return state if experiment.initial_params is None else with_parameters(state, experiment.initial_params)


def make_train_batches(config: ConfigDict, experiment: Experiment) -> TrainBatches:
    """The training data of a run."""
    if experiment.train_source is None:
        raise UserError(f"data set {config.data.dataset!r} is missing.\n{config.data.how_to_prepare}")
    return TrainBatches(
        experiment.train_source,
        train_transform(config.data),
        sharding.batch_sharding(experiment.mesh),
        batch_size=config.batch_size,
        seed=config.seed,
        num_classes=experiment.num_classes,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        prefetch=config.data.prefetch,
        max_bad_records=config.data.max_bad_records,
    )


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
        exif_orientation=data.exif_orientation,
    )


def eval_transform(data: ConfigDict) -> EvalTransform:
    """What is done to each image of an evaluation; `data` is the part of the config about data."""
    return EvalTransform(
        image_size=data.image_size,
        resize_small=data.eval_resize_small,
        resize=data.eval_resize,
        exif_orientation=data.exif_orientation,
    )


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
    eval_source = open_eval_source(data, train_source.class_names)
    if eval_source.class_names and train_source.class_names:
        differing = sorted(set(train_source.class_names) ^ set(eval_source.class_names))
        if list(eval_source.class_names) != list(train_source.class_names):
            raise UserError(
                f"{train_source.name}/{train_source.split}, to train on, and {eval_source.name}/{eval_source.split}, "
                f"to evaluate on, have different classes, so labels would not mean the same: {len(differing)} are in "
                f"one of them only, such as {differing[:5]}."
            )
    return train_source, eval_source


def open_eval_source(data: ConfigDict, class_names: Sequence[str] | None = None) -> Source:
    """Opens the evaluation split, which must be set.

    Args:
      data: the part of the config about data.
      class_names: of the model or of the training data; see `open_source`.

    Raises:
      MissingDataError: the data are not there.
      UserError: they are not as they should be.
    """
    source = open_data(data, data.dataset, data.eval_split, class_names)
    return RealLabels(source, load_real_labels(data.eval_labels)) if data.eval_labels else source


def open_data(data: ConfigDict, dataset: str, split: str, class_names: Sequence[str] | None = None) -> Source:
    """Opens a split of a data set with the config's options.

    Args:
      data: the part of the config about data.
      dataset: the data set.
      split: its split.
      class_names: see `open_source`.

    Raises:
      MissingDataError: it is not there.
      UserError: it is not as it should be.
    """
    return open_source(
        dataset,
        split,
        how_to_prepare=data.how_to_prepare,
        image_key=data.image_key,
        label_key=data.label_key,
        max_labels=data.max_labels,
        class_names=class_names,
    )


def training_data_sets(data: ConfigDict) -> list[tuple[str, float]]:
    """The data sets to train on, with their weights; several in a mixture. `data` is the config's part about data.

    Raises:
      UserError: a mixture is not as it should be.
    """
    if not data.mixture:
        return [(data.dataset, 1.0)]
    try:
        return [(str(dataset), float(weight)) for dataset, weight in data.mixture]
    except (TypeError, ValueError) as error:
        raise UserError(f"data.mixture takes pairs of data set and weight, got {data.mixture!r}.") from error


def open_train_source(data: ConfigDict) -> Source:
    """Opens the data for training; `data` is the part of the config about data.

    Raises:
      MissingDataError: they are not there.
      UserError: they are not as they should be.
    """
    pairs = training_data_sets(data)
    sources = [open_data(data, dataset, data.train_split) for dataset, _ in pairs]
    return Mixture(sources, [weight for _, weight in pairs]) if data.mixture else sources[0]


def find_weights(place: str, model: str | None, *, allow_missing: bool) -> tuple[ModelSpec, Weights | None]:
    """Loads weights.

    Args:
      place: as `config.weights`.
      model: name of the model that they should be of; None: as they say.
      allow_missing: do without released weights that were not fetched yet.

    Returns:
      the model, and the weights, None if they are missing.
    """
    if allow_missing and place in list_checkpoints():
        released = get_checkpoint(place)
        if not cached_path(released.url).exists():
            logger.warning("weights %s are not here yet; a run will fetch them", place)
            size = (released.image_size, released.image_size)
            return ModelSpec(released.model, released.num_classes, released.model_overrides, size), None
    weights = load_weights(place, model=model)
    for note in weights.notes:
        logger.info("weights %s: %s", place, note)
    return weights.spec, weights


def _num_classes(config: ConfigDict, train_source: Source | None) -> int:
    """Width of a new head."""
    known = train_source.num_classes if train_source else None
    num_classes = config.model.num_classes or known
    if num_classes is None:
        why = f"{train_source.name} does not say how many classes it has" if train_source else "the data set is missing"
        raise UserError(f"{why}: set model.num_classes.")
    if known and num_classes < known:
        raise UserError(
            f"model.num_classes {num_classes} is less than the data set's {known}. Leave it out, or use at least "
            f"{known}."
        )
    return num_classes


def num_kept_classes(config: ConfigDict, place: str, spec: ModelSpec, source: Source | None, remedy: str) -> int:
    """Width of a head that is kept.

    Args:
      config: see `vit_jax.config.base_config`.
      place: of the weights, for messages.
      spec: of the model that they are of.
      source: what is classified, if it is known.
      remedy: what to do instead, for messages.

    Raises:
      UserError: there is no head, or it is of another width than the data or the config want.
    """
    kept, asked = spec.num_classes, config.model.num_classes
    known = source.num_classes if source else None
    if not kept:
        raise UserError(f"{place} has no head to classify with. {remedy}.")
    if asked and asked != kept:
        raise UserError(f"the head of {place} has {kept} classes, but model.num_classes={asked}. {remedy}.")
    if known and kept < known:
        raise UserError(f"{kept} classes, of the head of {place}, are less than the data set's {known}. {remedy}.")
    if known and kept > known and not asked:
        raise UserError(
            f"the head of {place} has {kept} classes, and the data set {known}, so they are hardly the same. {remedy}. "
            f"If the data set's are the first of the head's, say so: --config.model.num_classes={kept}."
        )
    return kept


def _class_names(source: Source | None, kept: Weights | None) -> tuple[str, ...] | None:
    """Names of the classes: the data's, or else those of a head that is kept."""
    if source is not None and source.class_names is not None:
        return tuple(source.class_names)
    return kept.class_names if kept else None


def check_class_names(weights: Weights, source: Source | None, remedy: str) -> None:
    """Compares the classes that a head was trained on with those of the data, where both are known by name.

    Only a run of this project is sure to call its classes as its data do. Of other weights names that mean another
    label are an error, and names that differ a warning.

    Raises:
      UserError: they are others, or in another order; `remedy` says what to do instead.
    """
    if source is None or source.class_names is None or weights.class_names is None:
        return
    names, its_names = tuple(source.class_names), weights.class_names
    changes = describe_class_changes(its_names, names)
    if changes is None or (names, its_names) == (wordnet_ids("imagenet2012"), class_names("imagenet2012")):
        return
    if weights.format == "run" or moved_names(names, its_names):
        raise UserError(
            f"{weights.source} was trained on other classes than those of {source.name} ({changes}), so its head means "
            f"something else. {remedy}."
        )
    logger.warning(
        "the head of %s calls its classes otherwise than %s (%s); labels are taken in order",
        *(weights.source, source.name, changes),
    )


def get_model_fields(config: ConfigDict, num_classes: int, spec: ModelSpec | None) -> dict[str, Any]:
    """What the model is made with: the config's fields, and where these are None, what the weights say.

    Raises:
      UserError: neither names the model.
    """
    overrides: dict[str, Any] = {}
    if spec:
        # At fine-tuning the whole head goes, with its hidden layer (section 3.2), unless the config asks for that.
        left_out = () if config.keep_head else ("pre_logits",)
        overrides = {"name": spec.name} | {key: value for key, value in spec.overrides.items() if key not in left_out}
    overrides |= {name: value for name, value in config.model.items() if value is not None}
    if "name" not in overrides:
        raise UserError("set model.name, such as --config.model.name=ViT-B/16, or weights, which tell the model.")
    return overrides | {"num_classes": num_classes}


def _num_steps(config: ConfigDict, num_train_images: int) -> int:
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
        layer_decay=fields.layer_decay,
    )
