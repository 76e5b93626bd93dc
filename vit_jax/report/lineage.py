"""The training behind parameters: a released checkpoint, a run, or a run that began with another one."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.costs.flops import train_exaflops
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.optimizers import is_trained
from vit_jax.report import settings
from vit_jax.report.names import PRE_TRAINING_IMAGES, data_set_name, pre_training_name
from vit_jax.run.run_result import RunResult
from vit_jax.weights import get_checkpoint, list_checkpoints
from vit_jax.weights.released import ReleasedCheckpoint

_HTTPS = "https://storage.googleapis.com/"  # also serves public buckets


@dataclasses.dataclass(frozen=True)
class Lineage:
    """All the training behind parameters.

    Attributes:
      name: name of the checkpoint, or folder of the run.
      data: the training data, by the paper's name if there is one; several are listed in order.
      key: the same for runs that differ only in the seed.
      seeds: distinguishes those runs.
      num_images: size of the data set; None if unknown, or if there are several.
      epochs: number of epochs; None as above.
      exaflops: compute of all the training, without heads, as the paper counts; None if not recorded.
      tpuv3_core_days: cost of all the training; None if not recorded.
      is_released: whether it is a released checkpoint.
      optimizer: the training's optimizer; None if unknown.
      dropout: the training's dropout rate; None if unknown.
      from_scratch: all settings of a training that began from scratch, by field; {} for others.
    """

    name: str
    data: str
    key: str
    seeds: str = ""
    num_images: int | None = None
    epochs: float | None = None
    exaflops: float | None = None
    tpuv3_core_days: float | None = None
    is_released: bool = False
    optimizer: str | None = None
    dropout: float | None = None
    from_scratch: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def of_released(checkpoint: ReleasedCheckpoint) -> Lineage:
    """The lineage of a released checkpoint."""
    before, fine_tuned_on = of_pre_training(checkpoint), checkpoint.finetuning_data
    if fine_tuned_on is None:
        return before
    data = f"{before.data}, {data_set_name('tfds:' + fine_tuned_on)}"
    return dataclasses.replace(before, name=checkpoint.name, data=data, key=checkpoint.name, num_images=None)


def of_pre_training(checkpoint: ReleasedCheckpoint) -> Lineage:
    """The lineage of a released checkpoint before it was fine-tuned, if it was."""
    name, data = checkpoint.name, data_set_name("tfds:" + checkpoint.pretraining_data)
    if checkpoint.finetuning_data is not None:
        name = name.removesuffix(f"_{checkpoint.image_size}").removesuffix("_in1k")
    return Lineage(name, data, name, num_images=PRE_TRAINING_IMAGES[data], is_released=True)


def find_released(place: str) -> ReleasedCheckpoint | None:
    """Finds a released checkpoint by name or address, gs:// or https://."""
    if place in list_checkpoints():
        return get_checkpoint(place)
    address = place.replace(_HTTPS, "gs://", 1) if place.startswith(_HTTPS) else place
    return next((each for name in list_checkpoints() if (each := get_checkpoint(name)).url == address), None)


def after_run(before: Lineage | None, run: RunResult, model: Mapping[str, Any], changes: Sequence[str]) -> Lineage:
    """The lineage of a run's parameters; its length is unknown if it did not finish.

    `before` is the lineage of its initial weights (None: it began from scratch), `model` the arguments of
    `create_model`, and `changes` are those of its config during the run.
    """
    fields, epochs, num_images = run.fields, run.summary.get("epochs"), num_train_images(run)
    data = pre_training_name(fields["data.dataset"], fields["data.train_split"], num_images)
    if fields["data.mixture"]:
        data = "mixture of " + " and ".join(data_set_name(str(dataset)) for dataset, _ in fields["data.mixture"])
    if (objective := str(fields["objective"])) != "classification":  # never in a row of models trained with labels
        data += f" ({objective.replace('_', ' ')})"
    # Not steps times the batch size, which may have changed during the run.
    seen = round(epochs * num_images) if epochs and num_images is not None else None
    of_training = settings.training_settings(fields, model, run.steps)
    trained = of_training | ({"changes": list(changes)} if changes else {})
    own = Lineage(
        name=str(run.path),
        data=data,
        key=settings.key_of(trained),
        seeds=str(fields["seed"]),
        num_images=num_images,
        epochs=epochs,
        exaflops=_exaflops(model, fields["data.image_size"], seen, fields["train_only"]),
        tpuv3_core_days=run.summary.get("tpuv3_core_days"),
        optimizer=str(fields["optimizer.name"]),
        dropout=settings.attributes(model).get("model.dropout_rate"),
        from_scratch=of_training,
    )
    if before is None:
        return own
    return dataclasses.replace(
        own,
        data=f"{before.data}, {own.data}",
        key=f"{before.key} > {own.key}",
        seeds=f"{before.seeds} > {own.seeds}",
        num_images=None,
        epochs=None,
        from_scratch={},
        exaflops=_sum(own.exaflops, before.exaflops),
        tpuv3_core_days=_sum(own.tpuv3_core_days, before.tpuv3_core_days),
    )


def num_train_images(run: RunResult) -> int | None:
    """The number of images a run trained on; None if unknown."""
    if run.facts:
        return run.facts.train.num_images
    epochs = run.summary.get("epochs")
    return round(run.steps * run.fields["batch_size"] / epochs) if run.steps and epochs else None


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def _exaflops(model: Mapping[str, Any], image_size: int, seen: int | None, train_only: Sequence[str]) -> float | None:
    if seen is None:
        return None
    of_image = _exaflops_of_image(json.dumps([dict(model), image_size, list(train_only)], sort_keys=True, default=str))
    return None if of_image is None else of_image * seen


@functools.lru_cache(maxsize=1024)
def _exaflops_of_image(text: str) -> float | None:
    """The compute of training on one image, for a model, an image size and patterns as JSON: the same for all seeds."""
    model, image_size, train_only = json.loads(text)
    try:
        headless = create_model(**{**model, "num_classes": 0})
        return train_exaflops(headless, image_size, 1, is_trained(train_only) if train_only else None)
    except (UserError, TypeError, ValueError, re.error):  # a model or pattern that this version does not accept
        return None
