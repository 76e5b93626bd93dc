"""Models by name. This package needs only jax and flax.

A model maps images `[batch, height, width, channels]` to `(logits, {name: intermediate})`. To add a family, write its
module beside `vit.py` and name it in `_FAMILIES`.
"""

import dataclasses
import fnmatch
from typing import Any

import flax.linen as nn

from vit_jax.errors import unknown_name
from vit_jax.models.axial import axial_vit_names, create_axial_vit
from vit_jax.models.axial_resnet import axial_resnet_names, create_axial_resnet
from vit_jax.models.resnet import create_resnet, resnet_names
from vit_jax.models.variants import create_vit, vit_names

# For each family, the function that lists its names and the one that makes a model, or None for others' names.
_FAMILIES = (
    (vit_names, create_vit),
    (resnet_names, create_resnet),
    (axial_vit_names, create_axial_vit),
    (axial_resnet_names, create_axial_resnet),
)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell-style pattern, such as `"ViT-B/*"`, `"R50*"` or `"*+*"` for hybrids.

    ViTs take any other patch size too, ResNets any other width.
    """
    return [name for names, _ in _FAMILIES for name in names() if fnmatch.fnmatchcase(name, pattern)]


def create_model(name: str, *, num_classes: int, **overrides: Any) -> nn.Module:
    """Makes a model.

    Args:
      name: such as "ViT-B/16" (the size, and the side of the patches in pixels), "R50+ViT-B/16" (hybrid; the total
        down-sampling), "R152x4" (BiT ResNet; depth and width factor), "Axial-ViT-B/16" or "AxialResNet-50".
      num_classes: width of the logits; 0 leaves the head out.
      **overrides: attributes of the module, such as `pool="gap"` or `num_layers=6`.

    Raises:
      UserError: no model or attribute of that name, or a value that it does not take.
    """
    for _, create in _FAMILIES:
        prototype = create(name, num_classes=num_classes)
        if prototype is None:
            continue
        known = {field.name for field in dataclasses.fields(prototype) if field.name not in ("parent", "name")}
        for attribute in overrides:
            if attribute not in known:
                raise unknown_name(f"attribute of model {name!r}:", attribute, known)
        # JSON has lists, but only modules with tuples can be hashed.
        overrides = {field: tuple(value) if isinstance(value, list) else value for field, value in overrides.items()}
        return prototype.clone(**overrides)
    raise unknown_name("model", name, list_models())
