"""Determines which settings can change which numbers.

Two results belong together only if all settings that can change them agree. The lists name the fields of a config that
cannot, each with the reason; a name that ends in a dot is a group. A field on no list counts, and so does a new one.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vit_jax.errors import UserError
from vit_jax.evaluators.registry import TYPES, default_entries
from vit_jax.models import create_model
from vit_jax.report.names import has_records
from vit_jax.run import workdir
from vit_jax.run.workdir import Start, describe_changes, is_among


def _by_field(fields_by_reason: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {field: reason for reason, fields in fields_by_reason.items() for field in fields}


# Fields that change no number by more than rounding.
WITHOUT_EFFECT = workdir.WITHOUT_EFFECT | _by_field(
    {
        "the metrics of the last step count": tuple(f"evals.{name}.every_steps" for name in default_entries()),
        "logging": ("log_every_steps",),
        "a resumed run is the same run": ("checkpoint.every_steps", "checkpoint.keep"),
        "the last parameters count, or are set apart": ("checkpoint.keep_best", "checkpoint.best_metric"),
    }
)
# Fields that count in another form.
COUNTED_ELSEWHERE = _by_field(
    {
        "distinguishes the runs of one setting": ("seed",),
        "initial weights have their own key (`lineage.Lineage`)": ("weights",),
        "the length counts in steps, however it was given": ("epochs", "steps", "images"),
        "the model's attributes count, with what its weights and the defaults say": ("model.",),
    }
)
# Fields that cannot change a run's final parameters.
ONLY_EVALUATION = _by_field(
    {
        "evaluation data": ("data.eval_split", "data.eval_labels", "data.eval_resize", "data.eval_resize_small"),
        "evaluations": ("evals.",),
    }
)
# Fields that cannot change the results of given parameters.
ONLY_TRAINING = _by_field(
    {
        "initialisation": ("keep_head", "model.head_bias"),
        "training data": ("data.mixture", "data.train_split"),
        "training images; evaluation images have data.eval_resize": ("data.resize",),
        "augmentation": (
            *("data.inception_crop", "data.crop_min_area", "data.random_crop_from", "data.flip"),
            *(f"data.randaugment_{name}" for name in ("layers", "magnitude", "magnitude_std", "operations")),
        ),
        "the same sums in another order, except in training": ("batch_size", "accumulation_steps"),
        "accuracy depends on the largest logit, whatever the loss": ("loss",),
        "targets": ("label_smoothing", "mixup_alpha", "cutmix_alpha"),
        "optimisation": ("train_only", "optimizer."),
        "averaged parameters are evaluated already": ("polyak_decay",),
        "noise in training": (
            "rng",
            "model.dropout_rate",
            "model.attention_dropout_rate",
            "model.stochastic_depth_rate",
        ),
        "the same layers in a loop": ("model.scan_layers",),
    }
)
# Fields that an accuracy on another test set, and a few-shot accuracy, do not depend on.
_OTHER_TEST_SET = ("data.dataset", "data.eval_labels", "data.image_key", "data.label_key")
_OTHER_IMAGES = (*_OTHER_TEST_SET, "data.eval_split", "data.max_labels", "data.image_size", "data.eval_resize_small")


def plain(value: Any) -> Any:
    """Converts a value to JSON; a type or a function to its name."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if value is None or isinstance(value, str | int | float):
        return value
    return getattr(value, "__name__", str(value))


def attributes(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all attributes of a model with their defaults, as fields "model.<attribute>".

    `model` are the arguments of `create_model`, which are returned if this version cannot make the model.
    """
    return dict(_attributes(json.dumps(dict(model), sort_keys=True, default=str)))


@functools.lru_cache(maxsize=256)
def _attributes(text: str) -> tuple[tuple[str, Any], ...]:
    given = json.loads(text)
    try:
        made = create_model(**{"num_classes": 0, **given})
        names = [field.name for field in dataclasses.fields(made) if field.name not in ("parent", "name")]
        values = {"name": given["name"], **{name: getattr(made, name) for name in names}}
    except (UserError, TypeError, ValueError):
        values = {name: value for name, value in given.items() if value is not None}
    return tuple((f"model.{name}", plain(value)) for name, value in values.items())


def training_settings(fields: Mapping[str, Any], model: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """The settings that can change a run's parameters after `steps`, except its seed and its initial weights.

    `fields` are those of the config, flat, and `model` the arguments of `create_model`.
    """
    of_model = {name: value for name, value in attributes(model).items() if not is_among(name, WITHOUT_EFFECT)}
    return {**_of_training(fields, COUNTED_ELSEWHERE), **of_model, "steps": steps}


def _of_training(fields: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    left_out = (*WITHOUT_EFFECT, *ONLY_EVALUATION, *without)
    datasets = [str(dataset) for dataset, _ in fields["data.mixture"]] or [fields["data.dataset"]]
    settings = {name: plain(value) for name, value in fields.items() if not is_among(name, left_out)}
    return settings | _turning(fields, datasets)


def _evaluation_settings(
    fields: Mapping[str, Any], model: Mapping[str, Any], own: Mapping[str, Any], without: Collection[str], dataset: Any
) -> dict[str, Any]:
    """The settings that can change a number on a data set: its own fields, and most of the config's."""
    left_out = (*WITHOUT_EFFECT, *ONLY_TRAINING, "evals.", *without)
    settings = {name: value for name, value in fields.items() if not is_among(name, COUNTED_ELSEWHERE)}
    settings = {name: value for name, value in (settings | attributes(model)).items() if not is_among(name, left_out)}
    return {name: plain(value) for name, value in sorted({**settings, **own, **_turning(fields, [dataset])}.items())}


def accuracy_settings(fields: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that can change the accuracy of given parameters on the evaluation split."""
    return _evaluation_settings(fields, model, {}, (), fields["data.dataset"])


def entries_of(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of each evaluation in `config.evals`, by its name."""
    entries: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        if name.startswith("evals.") and name.count(".") > 1:
            _, entry, field = name.split(".", 2)
            entries.setdefault(entry, {})[field] = value
    return {
        entry: {name: field.default for name, field in TYPES[given["type"]].fields.items()} | given
        for entry, given in entries.items()
        if str(given.get("type")) in TYPES
    }


def entry_settings(entry: str, fields: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The same for an evaluation, by its name in `config.evals`. Its own fields count, whatever its type."""
    given = entries_of(fields)[entry]
    own = _named(entry, given, without=("type", "every_steps"))
    dataset = given.get("dataset") or fields["data.dataset"]
    if given["type"] != "imagenet_variant":
        return _evaluation_settings(fields, model, own, (), dataset)
    images = {"data.eval_split": None}
    if (given["variant"] or entry) == "real":  # labels alone, for the images of the evaluation split
        dataset = fields["data.dataset"]
        images = {"data.dataset": dataset, "data.eval_split": fields["data.eval_split"]}
    return _evaluation_settings(fields, model, own | images, _OTHER_TEST_SET, dataset)


def few_shot_settings(entry: str, dataset: str, fields: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a few-shot accuracy on a data set."""
    given = entries_of(fields)[entry]
    size = given["image_size"] or fields["data.image_size"]
    crop_from = given["crop_from"] or round(size * 256 / 224)  # the evaluator's default
    given |= {"datasets": dataset, "image_size": size, "crop_from": crop_from}
    own = _named(entry, given, without=("type", "every_steps", "shots", "representations"))
    return _evaluation_settings(fields, model, own, _OTHER_IMAGES, dataset)


def _named(entry: str, given: Mapping[str, Any], without: Collection[str]) -> dict[str, Any]:
    return {f"evals.{entry}.{name}": value for name, value in given.items() if name not in without}


def _turning(fields: Mapping[str, Any], datasets: Sequence[Any]) -> dict[str, Any]:
    """Whether to turn images as their EXIF says: by default, image files but not records."""
    turns = fields["data.exif_orientation"]
    is_default = turns is None and all(has_records(str(dataset)) for dataset in datasets)
    return {"data.exif_orientation": False if is_default else turns}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of the fields in which two settings differ."""
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def key_of(settings: Mapping[str, Any]) -> str:
    """A digest of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def config_changes(starts: Sequence[Start]) -> list[str]:
    """Lists the training settings that changed between starts, and from which step on."""
    return describe_changes(starts, (), _of_training)
