"""Data sets and models by the names that the paper gives them."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.paper import tables

UNKNOWN = "unknown"
_VTAB = "vtab:"

# By the names in TFDS; the last three are what the configs of this project and `data.prepare` call them.
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

# Attributes of a model that do not make it another one: how it is computed, regularised, and what its head is.
_NOT_ARCHITECTURE = (
    *("name", "num_classes", "dtype", "param_dtype", "scan_layers", "remat", "attention", "return_attention"),
    *("dropout_rate", "attention_dropout_rate", "stochastic_depth_rate", "head_bias", "pre_logits"),
)


def data_set_name(dataset: str) -> str:
    """The paper's name of a data set, or else a short one of our own.

    Args:
      dataset: as `config.data.dataset`: "tfds:cifar10", "vtab:pets", the folder of a data set that TFDS has prepared
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
    if len(parts) > 1 and re.search(r"[*?\[]", parts[-1]):  # a pattern of files says less than their folder
        return "/".join(parts[-2:])
    return parts[-1] if parts else dataset


def has_records(dataset: str) -> bool:
    """Whether a data set, as `config.data.dataset` names it, is sure to be of records rather than of image files."""
    prepared = re.search(r"/\d+\.\d+\.\d+/*$", dataset)  # by TFDS, as <name>/<version>
    return dataset.startswith(("tfds:", _VTAB)) or dataset == "digits" or ".array_record" in dataset or bool(prepared)


def pre_training_name(dataset: str, split: str, num_images: int | None) -> str:
    """The name of pre-training data: the paper's only if they are about as large as the paper's.

    Args:
      dataset: as `config.data.dataset`.
      split: as `config.data.train_split`.
      num_images: in the split; None if unknown.
    """
    name = data_set_name(dataset)
    expected = PRE_TRAINING_IMAGES.get(name)
    if expected is None:
        return name
    if num_images is None:
        return f"{name} {split}" if "[" in split else name
    return name if abs(num_images / expected - 1) <= _WITHIN else f"{name} ({num_images:,} images)"


def kind_of(model: str) -> str:
    """The family of a model: "ViT", "BiT" or "hybrid"."""
    return "hybrid" if "+" in model else "BiT" if model.startswith("R") else "ViT"


def vtab_task(dataset: str) -> str | None:
    """The id of the VTAB task that a data set is; None for others."""
    task = dataset.removeprefix(_VTAB)
    return task if dataset.startswith(_VTAB) and task in VTAB_TASKS else None


def model_label(fields: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> str:
    """A model's name, with what it differs in from the model of that name: "ViT-Ti/4 (num_layers=4)".

    Args:
      fields: the arguments of `create_model`, the name among them.
      without: attributes to leave out.
    """
    try:
        usual = create_model(fields["name"], num_classes=0)
    except UserError:
        usual = None
    changes = []
    for name, given in sorted(fields.items()):
        value = tuple(given) if isinstance(given, list) else given
        if value is None or name in _NOT_ARCHITECTURE or name in without:
            continue
        if not hasattr(usual, name) or getattr(usual, name) != value:
            changes.append(f"{name}={value}")
    return f"{fields['name']} ({', '.join(changes)})" if changes else str(fields["name"])
