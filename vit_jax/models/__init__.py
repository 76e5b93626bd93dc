"""Models by name. This package needs jax and flax alone.

A model maps images `[batch, height, width, channels]` to `(logits, {name: intermediate})`. To add a family, write its
module beside `vit.py` and name it in `list_models` and `create_model`.
"""

import fnmatch
from typing import Any

import flax.linen as nn

from vit_jax.errors import unknown_name
from vit_jax.models import vit

_PATCH_SIZES = (8, 14, 16, 32)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell-style pattern, e.g. `"ViT-B/*"`. ViTs take any other patch size too."""
    names = [f"ViT-{size}/{patch}" for size in vit.VARIANTS for patch in _PATCH_SIZES]
    return fnmatch.filter(names, pattern)


def create_model(name: str, *, num_classes: int, **overrides: Any) -> nn.Module:
    """Makes a model.

    Args:
      name: such as "ViT-B/16": the size, and the side of the patches in pixels.
      num_classes: width of the logits; 0 leaves the head out.
      **overrides: attributes of the module, such as `pool="gap"` or `num_layers=6`.

    Raises:
      UserError: no model or attribute of that name.
    """
    model = vit.create_vit(name, num_classes=num_classes, **overrides)
    if model is None:
        raise unknown_name("model", name, list_models())
    return model
