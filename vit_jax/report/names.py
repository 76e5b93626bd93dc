"""The paper's names of data sets and models."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.data.transfer_tasks import TASKS
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.paper import tables

UNKNOWN = "unknown"
_VTAB = "vtab:"

# By TFDS's names; the last three are the names in this project's configs and in `data.prepare`.
_DATA_SETS = {
    "imagenet2012": "ImageNet",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "oxford_iiit_pet": "Pets",
    "oxford_flowers102": "Flowers-102",
    "imagenet21k": "ImageNet-21k",
    "jft": "JFT-300M",
    "jft300m": "JFT-300M",
}

# Images to pre-train on, as in section 4.1, where the paper rounds: 1.3M, 14M, 303M.
PRE_TRAINING_IMAGES = {"ImageNet": 1_281_167, "ImageNet-21k": 14_000_000, "JFT-300M": tables.JFT_IMAGES}
# Copies of ImageNet-21k differ by more than a tenth: the authors' has 12.4 million.
_WITHIN = 0.15

# Attributes that do not change a model's label: computation, regularisation and head.
_NOT_ARCHITECTURE = (
    *("name", "num_classes", "dtype", "param_dtype", "scan_layers", "remat", "attention", "return_attention"),
    *("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate", "head_bias", "pre_logits"),
)


def data_set_name(dataset: str) -> str:
    """The paper's name of a data set, or else a short one of our own.

    Args:
      dataset: a `config.data.dataset`: "tfds:cifar10", "vtab:pets", the folder of a data set that TFDS has prepared
        (<name>/<version>), or any path.
    """
    if dataset.startswith(_VTAB):
        task = VTAB_TASKS.get(dataset.removeprefix(_VTAB))
        return f"VTAB {task.name}" if task else dataset
    if dataset.startswith("tfds:"):
        name = dataset.removeprefix("tfds:")
        return _DATA_SETS.get(re.split("[:/]", name)[0], name)
    parts = [part for part in pathlib.PurePath(dataset).parts if part != "/"]
    if len(parts) > 1 and re.fullmatch(r"\d+\.\d+\.\d+", parts[-1]):
        known = [_DATA_SETS[part] for part in parts[-3:-1] if part in _DATA_SETS]
        if known:
            return known[0]
    if len(parts) > 1 and re.search(r"[*?\[]", parts[-1]):  # the folder says more than a pattern of files
        return "/".join(parts[-2:])
    return parts[-1] if parts else dataset


def has_records(dataset: str) -> bool:
    """Whether a data set, as named in `config.data.dataset`, surely has records rather than image files."""
    prepared = re.search(r"/\d+\.\d+\.\d+/*$", dataset)  # by TFDS, as <name>/<version>
    return dataset.startswith(("tfds:", _VTAB)) or dataset == "digits" or ".array_record" in dataset or bool(prepared)


def pre_training_name(dataset: str, split: str, num_images: int | None) -> str:
    """The name of a split of pre-training data: the paper's name only if its size is about the paper's."""
    name = data_set_name(dataset)
    expected = PRE_TRAINING_IMAGES.get(name)
    if expected is None:
        return name
    if num_images is None:
        return f"{name} {split}" if "[" in split else name
    return name if abs(num_images / expected - 1) <= _WITHIN else f"{name} ({num_images:,} images)"


def kind_of(model: str) -> str:
    """The family of a model: "ViT", "BiT", "hybrid" or "axial"."""
    if model.startswith("Axial"):
        return "axial"
    return "hybrid" if "+" in model else "BiT" if model.startswith("R") else "ViT"


def vtab_task(dataset: str) -> str | None:
    """The id of a data set's VTAB task; None for other data sets."""
    task = dataset.removeprefix(_VTAB)
    return task if dataset.startswith(_VTAB) and task in VTAB_TASKS else None


def model_label(fields: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> str:
    """A model's name and its differences from the model of that name: "ViT-Ti/4 (num_layers=4)".

    `fields` are the arguments of `create_model`, including the name; attributes in `without` are left out.
    """
    changes = [f"{name}={value}" for name, value in model_changes(fields, without=without).items()]
    return f"{fields['name']} ({', '.join(changes)})" if changes else str(fields["name"])


def model_changes(fields: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The attributes in which a model differs from the model of its name, as in `model_label`."""
    try:
        usual = create_model(fields["name"], num_classes=0)
    except UserError:
        usual = None
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in sorted(fields.items())}
    return {
        name: value
        for name, value in given.items()
        if value is not None and name not in (*_NOT_ARCHITECTURE, *without)
        if not hasattr(usual, name) or getattr(usual, name) != value
    }


def distinct_labels(models: Sequence[Mapping[str, Any]], *, without: tuple[str, ...] = ()) -> list[str]:
    """A label for each model: its name, with only those changes in which models of that name differ here."""
    changes = [model_changes(fields, without=without) for fields in models]
    labels = []
    for fields, own in zip(models, changes, strict=True):
        alike = [other for each, other in zip(models, changes, strict=True) if each["name"] == fields["name"]]
        shown = [f"{name}={own[name]}" for name in own if any(other.get(name) != own[name] for other in alike)]
        shown += (
            [f"usual {name}" for name in {key for other in alike for key in other} - own.keys()] if not shown else []
        )
        labels.append(f"{fields['name']} ({', '.join(sorted(shown))})" if shown else str(fields["name"]))
    return labels


# The test splits of the paper's tasks, by the names of their data sets.
TEST_SPLITS = {data_set_name(task.dataset): task.splits["final"][1] for task in TASKS.values()}
