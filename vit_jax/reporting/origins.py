"""What parameters were trained on: a released checkpoint, a run, a run that began with another one."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from vit_jax.analysis.flops import train_exaflops
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.reporting.names import PRE_TRAINING_IMAGES, UNKNOWN, data_set_name, pre_training_name
from vit_jax.weights import get_checkpoint, list_checkpoints
from vit_jax.weights.released import ReleasedCheckpoint

# Fields that do not set runs of one setting apart: the seed, where the weights lie (their origin counts), what is
# evaluated besides and how often, how the run is spread over hardware.
_NOT_OF_THE_SETTING = (
    *("seed", "weights", "fewshot.", "variants.", "data.eval_", "eval_", "log_every_steps", "checkpoint.", "mesh."),
    *("sharding", "compiler_options", "watchdog_seconds", "profile.", "accumulation_steps", "model.remat"),
    *("model.scan_layers", "data.num_", "data.prefetch", "data.max_bad_records", "data.expected_"),
    *("data.how_to_prepare", "rng"),
)


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
    """The released checkpoint of that name or address."""
    if place in list_checkpoints():
        return get_checkpoint(place)
    return next((each for name in list_checkpoints() if (each := get_checkpoint(name)).url == place), None)


def of_file(place: str) -> Origin:
    """The origin of weights of which nothing is known."""
    return Origin(place, UNKNOWN, place)


def setting_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config, flat, that set it apart from others; the seed is none of them."""
    return {name: value for name, value in fields.items() if not name.startswith(_NOT_OF_THE_SETTING)}


def setting_key(fields: Mapping[str, Any]) -> str:
    """A digest of `setting_fields`."""
    kept = setting_fields(fields)
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]


def after_run(
    before: Origin | None,
    name: str,
    fields: Mapping[str, Any],
    model: Mapping[str, Any],
    label: str,
    summary: Mapping[str, Any],
) -> Origin:
    """The origin of the parameters that a run left.

    Args:
      before: of the weights that it began with; None: it began anew.
      name: the run's folder.
      fields: of its config, flat.
      model: what its model was made with.
      label: of the model.
      summary: of the run; {} if it did not finish.
    """
    seen, num_images = None, None
    if summary.get("steps") and summary.get("epochs"):
        seen = summary["steps"] * fields["batch_size"]
        num_images = round(seen / summary["epochs"])
    data = pre_training_name(fields["data.dataset"], fields["data.train_split"], num_images)
    if fields["data.mixture"]:
        data = "mixture of " + " and ".join(data_set_name(str(dataset)) for dataset, _ in fields["data.mixture"])
    exaflops = _exaflops(model, fields["data.image_size"], seen)
    core_days = summary.get("tpuv3_core_days")
    if before is not None:
        exaflops = _sum(exaflops, before.exaflops)
        core_days = _sum(core_days, before.tpuv3_core_days)
        data = f"{before.data}, {data}"
    seed = str(fields["seed"])
    key = setting_key({**fields, "model": label})
    return Origin(
        name=name,
        data=data,
        key=f"{before.key} > {key}" if before else key,
        seeds=f"{before.seeds} > {seed}" if before else seed,
        model=label,
        num_images=None if before else num_images,
        epochs=None if before else summary.get("epochs"),
        exaflops=exaflops,
        tpuv3_core_days=core_days,
    )


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def _exaflops(model: Mapping[str, Any], image_size: int, seen: int | None) -> float | None:
    if seen is None:
        return None
    try:
        headless = create_model(**{**model, "num_classes": 0})
        return train_exaflops(headless, image_size, seen)
    except (UserError, TypeError):  # a model that this version does not make
        return None
