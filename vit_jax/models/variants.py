"""Sizes of the Vision Transformer and the names of its models: "ViT-L/16", "R50+ViT-B/16", "R50+L/32"."""

import dataclasses
import re
from typing import Any

from vit_jax.models.resnet import UNITS_BY_DEPTH
from vit_jax.models.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class Variant:
    """A size of the Vision Transformer."""

    num_layers: int
    hidden_dim: int
    mlp_dim: int
    num_heads: int


# Table 1; Ti and S are from Steiner et al., 2021 (AugReg). "b" is B with all hidden dimensions halved (figure 4). It
# keeps the 12 heads, whose number is not a dimension.
VARIANTS = {
    "Ti": Variant(num_layers=12, hidden_dim=192, mlp_dim=768, num_heads=3),
    "S": Variant(num_layers=12, hidden_dim=384, mlp_dim=1536, num_heads=6),
    "b": Variant(num_layers=12, hidden_dim=384, mlp_dim=1536, num_heads=12),
    "B": Variant(num_layers=12, hidden_dim=768, mlp_dim=3072, num_heads=12),
    "L": Variant(num_layers=24, hidden_dim=1024, mlp_dim=4096, num_heads=16),
    "H": Variant(num_layers=32, hidden_dim=1280, mlp_dim=5120, num_heads=16),
}

# The ResNet stages of a hybrid, and the side of a patch on its feature map, by the depth and the number in the name.
# "R50+ViT-B/32" has a whole ResNet-50. "R50+ViT-B/16" moves the units of the last stage into the third (section 4.1),
# which makes the sequence four times as long. "R+Ti/16" (AugReg) has only the root; in the released weights its tokens
# cover 32 pixels, despite the name.
_HYBRIDS = {
    ("", 16): ((), 8),
    ("26", 32): (UNITS_BY_DEPTH[26], 1),
    ("50", 32): (UNITS_BY_DEPTH[50], 1),
    ("50", 16): ((3, 4, 9), 1),
}
_PATCH_SIZES = (8, 14, 16, 32)
_PAPER_HYBRIDS = ("R50+ViT-B/16", "R50+ViT-B/32", "R50+ViT-L/16", "R50+ViT-L/32")
_AUGREG_HYBRIDS = ("R+Ti/16", "R26+S/32", "R50+L/32")


def vit_names() -> list[str]:
    """Names of ViTs and hybrids. ViTs accept any other patch size too."""
    plain = [f"ViT-{size}/{patch}" for size in VARIANTS for patch in _PATCH_SIZES]
    return [*plain, *_PAPER_HYBRIDS, *_AUGREG_HYBRIDS]


def create_vit(name: str, **attributes: Any) -> VisionTransformer | None:
    """Makes the ViT or hybrid with this name; None if the name is of another family.

    Args:
      name: such as "ViT-L/16", "R50+ViT-B/16" or, in AugReg's spelling, "R50+L/32".
      **attributes: of `VisionTransformer`; they override those that the name implies.
    """
    match = re.fullmatch(r"(?:R(\d*)\+)?(ViT-)?(\w+)/([1-9]\d*)", name)
    if not match or match[3] not in VARIANTS:
        return None
    depth, prefix, size, number = match[1], match[2], match[3], int(match[4])
    if depth is None and prefix:
        implied: dict[str, Any] = {"patch_size": number}
    elif depth is not None and (depth, number) in _HYBRIDS:
        stages, patch_size = _HYBRIDS[depth, number]
        implied = {"resnet": stages, "patch_size": patch_size}
    else:
        return None
    return VisionTransformer(**(implied | dataclasses.asdict(VARIANTS[size]) | attributes))
