"""`Weights`: a model's parameters and all that is needed to use them; how files describe them."""

import dataclasses
import math
import re
from typing import Any

import flax.traverse_util
import numpy as np

from vit_jax.errors import UserError
from vit_jax.json_files import Fields
from vit_jax.models.layers import stack_layers
from vit_jax.weights.arrays import ArrayFile
from vit_jax.weights.identify import ModelSpec, check_shapes, check_version, expected_shapes, shapes_of
from vit_jax.weights.mapping import MAX_LAYERS, Arrays, unstack_arrays
from vit_jax.weights.preprocessing import MAX_SIDE, Preprocessing

_OPTIONAL_PARTS = ("head", "pre_logits")
_PATCH_PREDICTION_PARTS = ("head", "mask_embedding")
# Attributes of a model that change neither its parameters nor its function.
_COMPUTE_ATTRIBUTES = ("scan_layers", "remat", "attention", "return_attention", "dtype", "param_dtype")


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters, and what is needed to use them.

    Attributes:
      spec: the model.
      arrays: parameters by our names, flat, layers unrolled, in the dtypes of the file.
      preprocessing: from images to the model's input.
      class_names: names of the logits; None if unknown.
      probabilities: "softmax" or "sigmoid", which turns logits into probabilities; None if unknown.
      format: format of the file, a key of `formats.FORMATS`, or "run".
      source: where the weights come from.
      notes: what a user should know, such as assumptions.
    """

    spec: ModelSpec
    arrays: Arrays
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    probabilities: str | None = None
    format: str = "vit"
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        """The parameters, nested, for `model.apply({"params": ...})`; layers unrolled."""
        return flax.traverse_util.unflatten_dict(self.arrays, sep="/")

    @property
    def scanned_params(self) -> dict[str, Any]:
        """The parameters for a ViT with `scan_layers=True`."""
        return stack_layers(self.params)

    def without(self, *parts: str) -> "Weights":
        """Leaves out "head", "pre_logits" or both.

        Raises:
          UserError: the weights have no such part, or the model needs it.
        """
        for part in parts:
            if not any(name.startswith(part + "/") for name in self.arrays):
                raise UserError(f"there is no {part!r} to leave out; a model may have 'head' and 'pre_logits'.")
            if part not in _OPTIONAL_PARTS:
                raise UserError(f"a model cannot do without {part}; only 'head' and 'pre_logits' can be left out.")
        arrays = {name: array for name, array in self.arrays.items() if name.split("/")[0] not in parts}
        overrides = {name: value for name, value in self.spec.overrides.items() if name not in parts}
        spec = dataclasses.replace(self.spec, overrides=overrides)
        if "head" not in parts:
            return dataclasses.replace(self, spec=spec, arrays=arrays)
        spec = dataclasses.replace(spec, num_classes=0)
        return dataclasses.replace(self, spec=spec, arrays=arrays, class_names=None, probabilities=None)

    def without_patch_head(self) -> "Weights":
        """Leaves out what only masked patch prediction has: its head and the mask embedding."""
        if not self.spec.overrides.get("predict_patches"):
            return self
        overrides = {name: value for name, value in self.spec.overrides.items() if name != "predict_patches"}
        spec = dataclasses.replace(self.spec, num_classes=0, overrides=overrides)
        arrays = {
            name: array for name, array in self.arrays.items() if name.split("/")[0] not in _PATCH_PREDICTION_PARTS
        }
        return dataclasses.replace(self, spec=spec, arrays=arrays, class_names=None, probabilities=None)

    def describe(self) -> dict[str, Any]:
        """Returns everything but the arrays, JSON-compatible, as `save` writes it beside them."""
        return {
            "model": self.spec.name,
            "num_classes": self.spec.num_classes,
            "overrides": self.spec.overrides,
            "image_size": self.spec.image_size,
            "preprocessing": self.preprocessing.to_json(),
            "class_names": self.class_names,
            "probabilities": self.probabilities,
        }


def from_params(
    name: str,
    params: dict[str, Any],
    *,
    image_size: tuple[int, int] | int,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
    probabilities: str | None = None,
    **overrides: Any,
) -> Weights:
    """Makes weights from parameters in memory, for `save`.

    Args:
      name: name of the model, such as "ViT-B/16".
      params: nested; layers scanned or unrolled.
      image_size: height and width, or side, of the images that the position embeddings are for, in pixels.
      preprocessing: from images to the model's input; None: resized to a square, values in [-1, 1].
      class_names: of the logits.
      probabilities: "softmax" or "sigmoid", the loss of the training; None: unknown.
      **overrides: attributes of the model.

    Raises:
      UserError: the parameters do not fit the model, or are of a model that this version no longer has.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    arrays = unstack_arrays({path: np.asarray(array) for path, array in flat.items()})
    check_version(arrays)
    num_classes = arrays["head/kernel"].shape[-1] if "head/kernel" in arrays else 0
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    kept = {key: value for key, value in overrides.items() if key not in _COMPUTE_ATTRIBUTES}
    spec = ModelSpec(name, num_classes, kept, size)
    check_shapes(shapes_of(arrays), expected_shapes(spec, size))
    return Weights(spec, arrays, (preprocessing or Preprocessing()).at(size), class_names, probabilities)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about weights that arrays do not show; None and {} if unknown.

    Attributes:
      spec: the model.
      num_heads: number of attention heads.
      overrides: attributes of the model that arrays do not show.
      image_size: height and width, in pixels.
      preprocessing: from images to the model's input.
      class_names: names of the logits.
      probabilities: "softmax" or "sigmoid", which turns logits into probabilities.
      notes: what a user should know.
    """

    spec: ModelSpec | None = None
    num_heads: int | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    probabilities: str | None = None
    notes: tuple[str, ...] = ()


def read_description(opened: ArrayFile) -> Facts:
    """Reads what `Weights.describe` wrote. The file is not trusted.

    Raises:
      UserError: a field is missing, or has a wrong type or value.
    """
    fields = Fields(opened.description, f"the description of {opened.path}")
    # No attribute of a model is larger than the number of its parameters, and each layer has an array.
    largest, most_layers = sum(map(math.prod, opened.shapes.values())), min(len(opened.shapes), MAX_LAYERS)
    try:
        given = fields.fields("overrides")
        overrides = read_attributes(given, largest, most_layers)
        if unknown := sorted(overrides.keys() & set(_COMPUTE_ATTRIBUTES)):
            raise given.error(unknown[0], "no such attribute")
        size = fields.integers("image_size", None, length=2, at_least=1, at_most=MAX_SIDE)
        name, num_classes = fields.text("model"), fields.integer("num_classes", at_least=0, at_most=largest)
        if max(map(int, re.findall(r"[0-9]{1,18}", name)), default=0) > largest:
            raise fields.error("model", "a model of this file's size")
        spec = ModelSpec(name, num_classes, overrides, None if size is None else (size[0], size[1]))
        num_heads = getattr(spec.create(), "num_heads", None)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{fields.where} is damaged: {error!r:.200}. Delete or repair it.") from error
    return Facts(
        spec=spec,
        num_heads=num_heads,
        image_size=spec.image_size,
        preprocessing=Preprocessing.from_json(fields.fields("preprocessing").values),
        class_names=fields.texts("class_names", None) or None,
        probabilities=fields.text("probabilities", None, choices=("softmax", "sigmoid")),
    )


def read_attributes(given: Fields, largest: int, most_layers: int) -> dict[str, Any]:
    """Reads attributes of a model from JSON; leaves out null ones.

    Args:
      given: the attributes.
      largest: upper bound of dimensions.
      most_layers: upper bound of the numbers of layers, and of units of a stage.

    Raises:
      UserError: one has a wrong type or value.
    """
    for name in ("num_layers", "num_heads", "hidden_dim", "mlp_dim", "patch_size", "width_factor"):
        given.integer(name, None, at_least=1, at_most=most_layers if name == "num_layers" else largest)
    for name in ("stages", "resnet"):
        given.integers(name, None, at_least=1, at_most=most_layers)
    for name in ("name", "pool", "gelu", "position_embedding", "position_embedding_at", "root_padding"):
        given.text(name, None)
    given.flag("pre_logits", None)
    values = {name: value for name, value in given.values.items() if value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
