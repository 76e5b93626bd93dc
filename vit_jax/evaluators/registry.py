"""The types of evaluators that `config.evals` may list, with their fields. Imports no JAX.

A type is a name, a class (`evaluator_type.EvaluatorType`), and the fields of an entry in the config. Every entry also
has `type` and `every_steps`.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vit_jax.data.imagenet_test_sets import IMAGENET_TEST_SETS
from vit_jax.errors import UserError, unknown_name
from vit_jax.field_checks import FLAG, NOT_NEGATIVE, PIXELS, STEPS, TEXT, Check, Number, Several, one_of


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of an entry."""

    default: Any  # its value if the entry does not set it
    check: Check  # the values that it may have
    kind: type | None = None  # the type of its values if the default is None


_COMMON = {"type": Field("", TEXT), "every_steps": Field(None, STEPS, int)}  # None: at the end only


@dataclasses.dataclass(frozen=True)
class Registered:
    """A registered type: see `register`."""

    implementation: Any
    fields: Mapping[str, Field]

    def load(self) -> Any:
        """The class."""
        if not isinstance(self.implementation, str):
            return self.implementation
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)


TYPES: dict[str, Registered] = {}


def register(name: str, implementation: Any, **fields: Field) -> None:
    """Registers a type of evaluators: an `EvaluatorType`, or "module:class" to import it on use, and its fields."""
    TYPES[name] = Registered(implementation, _COMMON | fields)


# Accuracy and loss of a split.
register(
    "classification",
    "vit_jax.evaluators.accuracy:Accuracy",
    dataset=Field(None, TEXT, str),  # None: data.dataset
    split=Field(None, TEXT, str),  # None: data.eval_split, whose name then replaces the entry's in metrics
)
# Loss and metrics of the run's objective on a split, for runs that learn without labels.
register(
    "objective",
    "vit_jax.evaluators.objective_metrics:ObjectiveMetrics",
    dataset=Field(None, TEXT, str),  # None: data.dataset
    split=Field(None, TEXT, str),  # None: data.eval_split, whose name then replaces the entry's in metrics
)
# Accuracy and loss on one of ImageNet's other test sets, for models with ImageNet's 1,000 classes
# (docs/imagenet_variants.md).
register(
    "imagenet_variant",
    "vit_jax.evaluators.accuracy:ImageNetVariant",
    variant=Field(None, one_of(*IMAGENET_TEST_SETS), str),  # None: the entry's name
    dataset=Field(None, TEXT, str),  # path or "tfds:<name>"; None: left out
)
# Linear classifiers in closed form on frozen representations of a few images per class (docs/fewshot.md).
register(
    "fewshot",
    "vit_jax.evaluators.fewshot:FewShot",
    datasets=Field((), Several(TEXT)),  # as data.dataset; (): left out
    train_split=Field("train", TEXT),  # images are drawn from it; the paper's ImageNet pool: "train[:65000]"
    test_split=Field("test", TEXT),
    validation_split=Field(None, TEXT, str),  # l2 is chosen on it, if there are several
    shots=Field((1, 5, 10, 25), Several(Number(1, 10**6, whole=True), at_least=1, distinct=True)),  # images per class
    l2=Field((2.0**10,), Several(Number(0, open_low=True), at_least=1, distinct=True)),  # regularisation
    seeds=Field(3, Number(1, 10_000, whole=True)),  # draws of images
    representations=Field(("pre_logits",), Several(TEXT, at_least=1, distinct=True)),  # intermediates of the model
    image_size=Field(None, PIXELS, int),  # None: data.image_size
    crop_from=Field(None, PIXELS, int),  # side of the square whose centre is taken; None: 256 to 224 pixels
    whiten=Field(True, FLAG),  # by mean and standard deviation of the images drawn
    bias=Field(100.0, NOT_NEGATIVE),  # a feature so large that its weight is hardly regularised; 0: no bias
)


def short_name(dataset: str) -> str:
    """The name of a data set in metrics: without the folder, or without "tfds:"."""
    prefix, colon, name = dataset.partition(":")
    return name if colon and prefix in ("tfds", "vtab") else dataset.rstrip("/").rpartition("/")[2]


def entry(type_name: str, **values: Any) -> ConfigDict:
    """Makes an entry for `config.evals`, with all fields of its type; `values` differ from their defaults.

    Raises:
      UserError: there is no such type or field.
    """
    fields = fields_of({"type": type_name, **values}, "evals")
    made = ConfigDict({"type": type_name})
    for name, field in fields.items():
        if name != "type":
            made[name] = placeholder(field.kind) if field.default is None else field.default
    made.update(values)
    return made.lock()


def default_entries() -> dict[str, ConfigDict]:
    """The entries of every config. Those without data are left out of an evaluation."""
    return {
        "eval_split": entry("classification"),
        **{name: entry("imagenet_variant") for name in IMAGENET_TEST_SETS},
        "fewshot": entry("fewshot"),
    }


def fields_of(given: Any, name: str) -> Mapping[str, Field]:
    """The fields of an entry's type; messages call the entry `name`, such as "evals.real".

    Raises:
      UserError: it has no type, an unknown one, or unknown fields.
    """
    if not isinstance(given, Mapping | ConfigDict) or "type" not in given:
        raise UserError(f"{name} must be an entry with a type, such as entry('fewshot', datasets=('digits',)).")
    if given["type"] not in TYPES:
        raise unknown_name(f"type of evaluator in {name}:", given["type"], TYPES)
    fields = TYPES[given["type"]].fields
    for field in given:
        if field not in fields:
            raise unknown_name(f"field of {name}, of type {given['type']!r}:", field, fields)
    return fields


def complete(given: Any, name: str) -> ConfigDict:
    """Adds the defaults of the fields that an entry does not set; see `fields_of`."""
    fields = fields_of(given, name)
    return ConfigDict({field: given.get(field, each.default) for field, each in fields.items()})
