"""`Weights`: a model's parameters and all that is needed to use them."""

import dataclasses
from typing import Any

import flax.traverse_util
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.layers import stack_layers
from vit_jax.weights.description import COMPUTE_ATTRIBUTES
from vit_jax.weights.identify import ModelSpec, check_shapes, expected_shapes, shapes_of
from vit_jax.weights.mapping import Arrays, unstack_arrays
from vit_jax.weights.preprocessing import Preprocessing

_OPTIONAL_PARTS = ("head", "pre_logits")


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
      UserError: the parameters do not fit the model.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    arrays = unstack_arrays({path: np.asarray(array) for path, array in flat.items()})
    num_classes = arrays["head/kernel"].shape[-1] if "head/kernel" in arrays else 0
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    kept = {key: value for key, value in overrides.items() if key not in COMPUTE_ATTRIBUTES}
    spec = ModelSpec(name, num_classes, kept, size)
    check_shapes(shapes_of(arrays), expected_shapes(spec, size))
    return Weights(spec, arrays, (preprocessing or Preprocessing()).at(size), class_names, probabilities)
