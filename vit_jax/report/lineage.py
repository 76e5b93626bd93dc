"""What parameters were trained on: a released checkpoint, a run, a run that began with another one."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.costs.flops import train_exaflops
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.optimizers import is_trained
from vit_jax.report import settings
from vit_jax.report.names import PRE_TRAINING_IMAGES, UNKNOWN, data_set_name, pre_training_name
from vit_jax.report.run_files import Run
from vit_jax.weights import get_checkpoint, list_checkpoints
from vit_jax.weights.released import ReleasedCheckpoint

_HTTPS = "https://storage.googleapis.com/"  # where public buckets are as well


@dataclasses.dataclass(frozen=True)
class Origin:
    """What parameters are from.

    Attributes:
      name: of the checkpoint, or the folder of the run.
      data: what they were trained on, by the paper's name where there is one; of several, one after the other.
      key: the same for runs that differ in nothing but the seed.
      seeds: tells those apart.
      model: its label, where that is known.
      num_images: in the data set; None where that is not known, or if there were several.
      epochs: how often each was seen; None as above.
      exaflops: of all the training, without heads, as the paper counts; None where it was not recorded.
      tpuv3_core_days: that it cost; None where it was not recorded.
      is_released: whether it is one of the released checkpoints.
      optimizer: of the training; None where it is not known.
      dropout: with which it was trained; None where it is not known.
    """

    name: str
    data: str
    key: str
    seeds: str = ""
    model: str | None = None
    num_images: int | None = None
    epochs: float | None = None
    exaflops: float | None = None
    tpuv3_core_days: float | None = None
    is_released: bool = False
    optimizer: str | None = None
    dropout: float | None = None


def of_released(checkpoint: ReleasedCheckpoint) -> Origin:
    """The origin of a released checkpoint."""
    origin = of_pre_training(checkpoint)
    if checkpoint.finetuning_data is None:
        return origin
    data = f"{origin.data}, {data_set_name('tfds:' + checkpoint.finetuning_data)}"
    return dataclasses.replace(origin, name=checkpoint.name, data=data, key=checkpoint.name, num_images=None)


def of_pre_training(checkpoint: ReleasedCheckpoint) -> Origin:
    """The origin of what a released checkpoint was before it was fine-tuned, if it was."""
    name, data = checkpoint.name, data_set_name("tfds:" + checkpoint.pretraining_data)
    if checkpoint.finetuning_data is not None:
        name = name.removesuffix(f"_{checkpoint.image_size}").removesuffix("_in1k")
    return Origin(name, data, name, model=checkpoint.model, num_images=PRE_TRAINING_IMAGES[data], is_released=True)


def find_released(place: str) -> ReleasedCheckpoint | None:
    """The released checkpoint of that name or address, gs:// or https://."""
    if place in list_checkpoints():
        return get_checkpoint(place)
    address = place.replace(_HTTPS, "gs://", 1) if place.startswith(_HTTPS) else place
    return next((each for name in list_checkpoints() if (each := get_checkpoint(name)).url == address), None)


def of_file(place: str) -> Origin:
    """The origin of weights of which nothing is known."""
    return Origin(place, UNKNOWN, place)


def after_run(before: Origin | None, run: Run, model: Mapping[str, Any], label: str, changes: Sequence[str]) -> Origin:
    """The origin of the parameters that a run left.

    Args:
      before: of the weights that it began with; None: it began anew.
      run: the run; what did not finish has no length.
      model: what its model was made with.
      label: of the model.
      changes: of its config on the way, if there were any.
    """
    fields, summary = run.fields, run.summary
    seen, num_images = None, num_train_images(run)
    if num_images is not None and summary.get("epochs"):
        seen = round(summary["epochs"] * num_images)  # the batch size may have been another for a part of it
    data = pre_training_name(fields["data.dataset"], fields["data.train_split"], num_images)
    if fields["data.mixture"]:
        data = "mixture of " + " and ".join(data_set_name(str(dataset)) for dataset, _ in fields["data.mixture"])
    exaflops = _exaflops(model, fields["data.image_size"], seen, fields.get("train_only") or ())
    core_days = summary.get("tpuv3_core_days")
    if before is not None:
        exaflops = _sum(exaflops, before.exaflops)
        core_days = _sum(core_days, before.tpuv3_core_days)
        data = f"{before.data}, {data}"
    seed = str(fields["seed"])
    trained = settings.training_settings(fields, model, run.steps) | ({"changes": list(changes)} if changes else {})
    key = settings.key_of(trained)
    return Origin(
        name=str(run.path),
        data=data,
        key=f"{before.key} > {key}" if before else key,
        seeds=f"{before.seeds} > {seed}" if before else seed,
        model=label,
        num_images=None if before else num_images,
        epochs=None if before else summary.get("epochs"),
        exaflops=exaflops,
        tpuv3_core_days=core_days,
        optimizer=str(fields["optimizer.name"]),
        dropout=settings.attributes(model).get("model.dropout_rate"),
    )


def num_train_images(run: Run) -> int | None:
    """How many images a run trained on; None where that is not known."""
    if (recorded := run.num_images("train")) is not None:
        return recorded
    if not run.summary.get("steps") or not run.summary.get("epochs"):
        return None
    return round(run.summary["steps"] * run.fields["batch_size"] / run.summary["epochs"])


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def _exaflops(model: Mapping[str, Any], image_size: int, seen: int | None, train_only: Sequence[str]) -> float | None:
    if seen is None:
        return None
    try:
        headless = create_model(**{**model, "num_classes": 0})
        return train_exaflops(headless, image_size, seen, is_trained(train_only) if train_only else None)
    except (UserError, TypeError, ValueError, re.error):  # a model or pattern that this version does not take
        return None
