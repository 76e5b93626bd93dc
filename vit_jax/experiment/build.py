"""Builds the parts of a run from a config. Code that takes an `Experiment` needs no config as well."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import sharding
from vit_jax.config import check_fields
from vit_jax.costs.flops import train_step_flops
from vit_jax.data.pipeline import TrainBatches
from vit_jax.data.sources import MissingDataError, Source
from vit_jax.data.transforms import EvalTransform, TrainTransform
from vit_jax.errors import UserError
from vit_jax.experiment.data import batch_shapes, eval_transform, open_sources, train_transform
from vit_jax.experiment.model import check_class_names, choose_num_classes, find_weights, get_model_fields
from vit_jax.experiment.objective import make_objective
from vit_jax.experiment.optimizer import count_steps, make_optimizer, make_schedule
from vit_jax.experiment.step import make_mesh, make_step
from vit_jax.models import create_model
from vit_jax.optimizers import is_trained
from vit_jax.train_step import TrainState, TrainStep
from vit_jax.weights import TransferReport, transfer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run, made and checked before anything is computed."""

    config: ConfigDict  # its config. Only `experiment/` reads the fields; other packages record it as a whole.
    step: TrainStep  # the training step, with model, optimizer, objective and mesh
    schedule: optax.Schedule  # the learning rate by step
    num_steps: int  # length of the run
    train_source: Source | None  # training examples; None if they are missing and `allow_missing_data` was set
    eval_source: Source | None  # evaluation examples, if any
    num_train_images: int  # length of an epoch
    train_transform: TrainTransform  # augmentation of each training image
    eval_transform: EvalTransform  # preprocessing of each evaluation image
    # Names of the logits, or of the first ones; None if neither the data nor a kept head has names, or if the objective
    # does not classify.
    class_names: tuple[str, ...] | None
    model_fields: dict[str, Any]  # arguments of `create_model`
    batch_shapes: dict[str, jax.ShapeDtypeStruct]  # shapes, dtypes and shardings of a training batch
    initial_params: Any = None  # parameters to begin with, on the host; None: the model's own initialisation
    transfer_report: TransferReport | None = None  # how each array of their weights was used

    @property
    def model(self) -> nn.Module:
        """Images -> (logits, intermediates)."""
        return self.step.model

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.step.mesh

    @property
    def model_name(self) -> str:
        """Such as "ViT-B/16"."""
        return self.model_fields["name"]

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return self.model_fields["num_classes"]

    @property
    def batch_size(self) -> int:
        """Images in a step, over all devices."""
        return self.batch_shapes["image"].shape[0]

    @property
    def train_flops(self) -> int:
        """FLOPs of training on one image, without those that frozen parameters save."""
        step = self.step
        return train_step_flops(self.model, step.image_size, is_trained(step.train_only) if step.train_only else None)

    def init_state(self) -> TrainState:
        """The state that a run begins with, on the devices."""
        return self.step.init(self.config.seed, self.initial_params)

    def make_train_batches(self) -> TrainBatches:
        """The training data as batches on the devices.

        Raises:
          UserError: they are missing.
        """
        data = self.config.data
        if self.train_source is None:
            raise UserError(f"data set {data.dataset!r} is missing.\n{data.how_to_prepare}")
        return TrainBatches(
            self.train_source,
            self.train_transform,
            sharding.batch_sharding(self.mesh),
            batch_size=self.batch_size,
            seed=self.config.seed,
            num_classes=self.num_classes if self.step.objective.needs_labels else None,
            num_threads=data.num_threads,
            num_workers=data.num_workers,
            prefetch=data.prefetch,
            max_bad_records=data.max_bad_records,
        )


def build(
    config: ConfigDict, *, allow_missing_data: bool = False, devices: Sequence[jax.Device] | None = None
) -> Experiment:
    """Makes the parts of a run. Decodes no image and computes nothing on the devices.

    Args:
      config: see `vit_jax.config.base_config`.
      allow_missing_data: for a plan: accept a missing data set if the config gives its size, and released weights that
        are not downloaded yet.
      devices: to run on, or to plan for, such as those of a described topology; None: all devices.

    Raises:
      UserError: the config or the data are wrong.
    """
    # Parts without data come first: opening data can take minutes.
    check_fields(config)
    mesh = make_mesh(config, devices)
    objective, needed_of_model = make_objective(config)
    transforms = train_transform(config.data), eval_transform(config.data)
    make_this_optimizer = make_optimizer(config.optimizer)
    if config.weights is None and config.keep_head:
        raise UserError("keep_head needs weights, whose head it keeps. Set --config.weights.")
    spec, weights = None, None
    if config.weights is not None:
        spec, weights = find_weights(
            config.weights,
            config.model.name,
            allow_missing=allow_missing_data,
            predicts_patches=needed_of_model.get("predict_patches", False),
        )
        objective, needed_of_model = make_objective(config, spec.overrides)

    train_source: Source | None
    eval_source: Source | None
    try:
        train_source, eval_source = open_sources(config.data, labelled=objective.needs_labels)
    except MissingDataError as error:
        if not allow_missing_data or not config.data.expected_train_images:
            raise
        logger.warning("%s", error)
        train_source, eval_source = None, None
    num_train_images = len(train_source) if train_source else config.data.expected_train_images
    num_steps = count_steps(config, num_train_images)

    kept = weights if config.keep_head else None
    num_classes, class_names = needed_of_model.get("num_classes"), None
    if num_classes is None:
        num_classes = choose_num_classes(config, spec, train_source)
        class_names = (train_source and train_source.class_names) or (kept and kept.class_names)
    model_fields = get_model_fields(config, num_classes, spec) | needed_of_model
    model = create_model(**model_fields)
    initial_params, report = None, None
    if kept:
        check_class_names(kept, train_source, "Set keep_head=False, for a new head")
    if weights:
        initial_params, report = transfer(
            weights,
            model,
            config.data.image_size,
            keep_head=config.keep_head,
            keep_pre_logits=True,  # if the model has such a layer
            seed=config.seed,
        )

    schedule = make_schedule(config.optimizer, num_steps)
    step = make_step(config, model, objective, make_this_optimizer(schedule), schedule, mesh)
    max_labels = config.data.max_labels or (train_source.max_labels if train_source else 1)
    return Experiment(
        config=config,
        step=step,
        schedule=schedule,
        num_steps=num_steps,
        train_source=train_source,
        eval_source=eval_source,
        num_train_images=num_train_images,
        train_transform=transforms[0],
        eval_transform=transforms[1],
        class_names=tuple(class_names) if class_names else None,
        model_fields=model_fields,
        batch_shapes=batch_shapes(config.batch_size, config.data.image_size, max_labels, mesh),
        initial_params=initial_params,
        transfer_report=report,
    )
