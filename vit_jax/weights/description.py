"""Facts about weights from outside their arrays, and the reader of this project's own descriptions."""

import dataclasses
import math
import re
from typing import Any

from vit_jax.errors import UserError
from vit_jax.json_files import Fields
from vit_jax.weights.identify import ModelSpec
from vit_jax.weights.mapping import MAX_LAYERS
from vit_jax.weights.preprocessing import MAX_SIDE, Preprocessing
from vit_jax.weights.reading import ArrayFile

# Attributes of a model that change neither its parameters nor its function.
COMPUTE_ATTRIBUTES = ("scan_layers", "remat", "attention", "return_attention", "dtype", "param_dtype")


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
        if unknown := sorted(overrides.keys() & set(COMPUTE_ATTRIBUTES)):
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
