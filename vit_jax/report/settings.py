"""Which settings can change which numbers.

Two results belong together only if all settings that can change them agree. The lists name the fields of a config that
cannot, each with the reason. A field that is on no list counts, and so does one that is added to the config later.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.report.names import has_records
from vit_jax.run import workdir

# What is measured of something: fields and their values, in the order of the fields.
Settings = tuple[tuple[str, Any], ...]

# Fields that change no number by more than rounding. A name that ends in a dot is a group of fields.
WITHOUT_EFFECT = {
    **workdir.WITHOUT_EFFECT,
    "eval_every_steps": "the metrics of the last step count",
    "fewshot.every_steps": "the metrics of the last step count",
    "variants.every_steps": "the metrics of the last step count",
    "log_every_steps": "it decides what is logged",
    "checkpoint.every_steps": "a resumed run is the same run",
    "checkpoint.keep": "a resumed run is the same run",
    "checkpoint.keep_best": "the last parameters count; what begins with the best ones, or measures them, is set apart",
}
# Fields that count in another form.
COUNTED_ELSEWHERE = {
    "seed": "it tells the runs of one setting apart",
    "weights": "what a run began with has a key of its own (`origins.Origin`)",
    "epochs": "the length counts in steps, however it was given",
    "steps": "the length counts in steps, however it was given",
    "images": "the length counts in steps, however it was given",
    "model.": "the attributes of the model count, with what the weights and the defaults say",
}
# Fields that cannot change the parameters that a run ends with.
ONLY_EVALUATION = {
    "data.eval_split": "images to evaluate on",
    "data.eval_labels": "their labels",
    "data.eval_resize": "how they are resized",
    "data.eval_resize_small": "how they are resized",
    "fewshot.": "an evaluation",
    "variants.": "evaluations",
}
# Fields that cannot change what given parameters measure.
ONLY_TRAINING = {
    "keep_head": "initialisation",
    "train_only": "optimisation",
    "data.mixture": "training data",
    "data.train_split": "training data",
    "data.inception_crop": "augmentation",
    "data.crop_min_area": "augmentation",
    "data.random_crop_from": "augmentation",
    "data.flip": "augmentation",
    "data.resize": "training images; those to evaluate on have data.eval_resize",
    "data.randaugment_layers": "augmentation",
    "data.randaugment_magnitude": "augmentation",
    "data.randaugment_magnitude_std": "augmentation",
    "data.randaugment_operations": "augmentation",
    "batch_size": "of training; elsewhere the same sums in another order",
    "accumulation_steps": "of training",
    "loss": "accuracies are of the largest logit, whatever the loss",
    "label_smoothing": "targets",
    "mixup_alpha": "targets",
    "cutmix_alpha": "targets",
    "optimizer.": "optimisation",
    "polyak_decay": "optimisation; what is evaluated are the averaged parameters already",
    "rng": "noise in training",
    "model.dropout_rate": "noise in training",
    "model.attention_dropout_rate": "noise in training",
    "model.stochastic_depth_rate": "noise in training",
    "model.head_bias": "initialisation",
    "model.scan_layers": "the same layers in a loop",
}
# What the accuracy on the evaluation split, a variant of ImageNet, and a few-shot accuracy do not depend on.
_NOT_OF_ACCURACY = ("fewshot.", "variants.")
_NOT_OF_VARIANT = ("fewshot.", "variants.", "data.dataset", "data.eval_labels", "data.image_key", "data.label_key")
_NOT_OF_FEW_SHOT = (
    *("variants.", "data.dataset", "data.eval_split", "data.eval_labels", "data.image_key", "data.label_key"),
    *("data.max_labels", "data.image_size", "data.eval_resize_small"),
    *("fewshot.datasets", "fewshot.shots", "fewshot.representations", "fewshot.image_size", "fewshot.crop_from"),
)


def is_among(name: str, names: Mapping[str, Any] | tuple[str, ...]) -> bool:
    """Whether a list has a field, by its name or as one of a group."""
    return any(name == each or (each.endswith(".") and name.startswith(each)) for each in names)


def attributes(model: Mapping[str, Any]) -> dict[str, Any]:
    """All attributes of a model, as fields "model.<attribute>".

    Args:
      model: what `create_model` was given, the name among them.

    Returns:
      Its attributes with their defaults; what was given, where this version does not make the model.
    """
    return dict(_attributes(json.dumps(dict(model), sort_keys=True, default=str)))


@functools.lru_cache(maxsize=256)
def _attributes(text: str) -> Settings:
    given = json.loads(text)
    try:
        made = create_model(**{"num_classes": 0, **given})
        names = [field.name for field in dataclasses.fields(made) if field.name not in ("parent", "name")]
        values = {"name": given["name"], **{name: getattr(made, name) for name in names}}
    except (UserError, TypeError, ValueError):
        values = {name: value for name, value in given.items() if value is not None}
    return tuple((f"model.{name}", plain(value)) for name, value in values.items())


def plain(value: Any) -> Any:
    """A value as JSON has it; a type or a function by its name."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if value is None or isinstance(value, str | int | float):
        return value
    return getattr(value, "__name__", str(value))


def training_settings(fields: Mapping[str, Any], model: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """All that can change the parameters a run ends with, except its seed and what it began with.

    Args:
      fields: of the config, flat.
      model: what its model was made with.
      steps: length of the run.
    """
    without = {**WITHOUT_EFFECT, **COUNTED_ELSEWHERE, **ONLY_EVALUATION}
    settings = {name: plain(value) for name, value in fields.items() if not is_among(name, without)}
    settings |= {name: value for name, value in attributes(model).items() if not is_among(name, WITHOUT_EFFECT)}
    return settings | {"steps": steps} | _turning(fields, _trained_on(fields))


def accuracy_settings(fields: Mapping[str, Any], model: Mapping[str, Any]) -> Settings:
    """All that can change the accuracy of given parameters on the evaluation split."""
    return _measuring(fields, model, _NOT_OF_ACCURACY, _turning(fields, [fields["data.dataset"]]))


def variant_settings(variant: str, fields: Mapping[str, Any], model: Mapping[str, Any]) -> Settings:
    """The same for one of ImageNet's other test sets; `variant` is its name in the config."""
    place = {f"variants.{variant}": fields.get(f"variants.{variant}")}
    # ReaL has labels alone; its images are those of the evaluation split.
    images = {name: fields.get(name) for name in ("data.dataset", "data.eval_split")} if variant == "real" else {}
    turning = _turning(fields, [fields["data.dataset"] if images else place[f"variants.{variant}"]])
    return _measuring({**fields, "data.eval_split": None}, model, _NOT_OF_VARIANT, place | images | turning)


def few_shot_settings(dataset: str, fields: Mapping[str, Any], model: Mapping[str, Any]) -> Settings:
    """The same for a few-shot accuracy on a data set."""
    size = fields["fewshot.image_size"] or fields["data.image_size"]
    # What `vit_jax.experiment.evaluations` takes where the config says nothing.
    crop_from = fields["fewshot.crop_from"] or (round(size * 256 / 224) if isinstance(size, int) else None)
    resolved = {"fewshot.datasets": dataset, "fewshot.image_size": size, "fewshot.crop_from": crop_from}
    return _measuring(fields, model, _NOT_OF_FEW_SHOT, resolved | _turning(fields, [dataset]))


def _trained_on(fields: Mapping[str, Any]) -> list[str]:
    """The data sets of a training."""
    mixture = fields.get("data.mixture") or ()
    return [str(each[0]) for each in mixture if isinstance(each, list | tuple) and each] or [fields["data.dataset"]]


def _turning(fields: Mapping[str, Any], datasets: Sequence[str | None]) -> dict[str, Any]:
    """Whether images are turned as their EXIF says: by default image files are, records are not."""
    turns = fields.get("data.exif_orientation")
    is_default = turns is None and all(has_records(str(dataset)) for dataset in datasets)
    return {"data.exif_orientation": False if is_default else turns}


def _measuring(
    fields: Mapping[str, Any],
    model: Mapping[str, Any],
    without: tuple[str, ...],
    besides: Mapping[str, Any] | None = None,
) -> Settings:
    def counts(name: str) -> bool:
        return not (is_among(name, WITHOUT_EFFECT) or is_among(name, ONLY_TRAINING) or is_among(name, without))

    settings = {
        name: plain(value)
        for name, value in fields.items()
        if counts(name) and not is_among(name, COUNTED_ELSEWHERE) and not is_among(name, without)
    }
    settings |= {name: value for name, value in attributes(model).items() if counts(name)}
    settings |= {name: plain(value) for name, value in (besides or {}).items()}
    return tuple(sorted(settings.items()))


def differing(one: Settings, other: Settings) -> list[str]:
    """Names of the fields in which two differ."""
    first, second = dict(one), dict(other)
    return sorted(name for name in {**first, **second} if first.get(name) != second.get(name))


def key_of(settings: Mapping[str, Any]) -> str:
    """A digest of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def changes_on_the_way(starts: list[tuple[int, dict[str, Any]]]) -> list[str]:
    """Which settings of a training were changed while it was on its way.

    Args:
      starts: the step that each start went on from, and its config, flat; in the order of time.

    Returns:
      A text for each change: the step, and the fields before and after.
    """
    parts: list[tuple[int, dict[str, Any]]] = []
    for step, fields in starts:
        while parts and parts[-1][0] >= step:  # what it trained was given up
            parts.pop()
        without = {**WITHOUT_EFFECT, **ONLY_EVALUATION}
        kept = {name: value for name, value in fields.items() if not is_among(name, without)}
        parts.append((step, kept | _turning(fields, _trained_on(fields))))
    told = []
    for (_, before), (step, after) in itertools.pairwise(parts):
        changed = [
            f"{name} {before.get(name)} -> {after.get(name)}"
            for name in sorted({**before, **after})
            if before.get(name) != after.get(name)
        ]
        if changed:
            told.append(f"at step {step:,}: {', '.join(changed)}")
    return told
