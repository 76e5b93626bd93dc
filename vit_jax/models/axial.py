"""Axial-ViT (appendix D.6): attention along rows, then along columns, instead of over all tokens.

`AxialVisionTransformer` has two Transformer layers where ViT has one: the first attends within each row of patches, the
second within each column. The paper's other axial model is in `axial_resnet.py`.
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.models import attention
from vit_jax.models.layers import (
    LAYER_NORM_EPSILON,
    REMAT_POLICIES,
    check_names,
    check_sizes,
    linear_head,
)
from vit_jax.models.patches import embed_patches, patch_grid
from vit_jax.models.position_embeddings import PositionEmbedding
from vit_jax.models.variants import VARIANTS
from vit_jax.models.vit import EncoderBlock


def along_rows(layer: Any, x: jax.Array) -> jax.Array:
    """Applies `layer`, which maps `[batch, num_tokens, width]`, to each row of `[batch, rows, columns, width]`."""
    batch, rows, columns, width = x.shape
    return layer(x.reshape(batch * rows, columns, width)).reshape(batch, rows, columns, -1)


def along_columns(layer: Any, x: jax.Array) -> jax.Array:
    """Applies `layer` to each column of `[batch, rows, columns, width]`."""
    return along_rows(layer, x.swapaxes(1, 2)).swapaxes(1, 2)


class AxialBlock(nn.Module):
    """A Transformer layer within rows, and another within columns.

    Attributes:
      block: attributes of `EncoderBlock`.
    """

    block: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, rows, columns, hidden_dim]` to the same shape."""
        row, column = EncoderBlock(**self.block, name="row"), EncoderBlock(**self.block, name="column")
        x = along_rows(lambda tokens: row(tokens)[0], x)
        return along_columns(lambda tokens: column(tokens)[0], x)


class AxialVisionTransformer(nn.Module):
    """Axial-ViT: a ViT without class token whose attention is axial.

    Attributes:
      num_classes: width of the logits; 0 omits the head and returns the representation instead.
      patch_size: side of the square patches, in pixels.
      num_layers: number of `AxialBlock`s.
      hidden_dim: width of the tokens.
      mlp_dim: width of the MLPs' hidden layers.
      num_heads: number of attention heads.
      head_bias: initial value of the head's bias.
      dropout_rate: see `vit.VisionTransformer`.
      attention: how attention is computed; one of `attention.IMPLEMENTATIONS`.
      remat: see `vit.VisionTransformer`.
      dtype, param_dtype: dtypes of the computation and of the parameters; the logits are float32.
    """

    num_classes: int
    patch_size: int
    num_layers: int
    hidden_dim: int
    mlp_dim: int
    num_heads: int
    head_bias: float = 0.0
    dropout_rate: float = 0.0
    attention: str = "auto"
    remat: str = "none"
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    def __post_init__(self):
        super().__post_init__()
        check_names(self, remat=REMAT_POLICIES, attention=attention.IMPLEMENTATIONS)
        check_sizes(self)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before those of the patches: none."""
        return 0

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of pixels that a token covers."""
        return self.patch_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return patch_grid(height, width, self.patch_size)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Classifies images.

        Args:
          images: `[batch, height, width, channels]`, floating point, values in [-1, 1].
          train: whether dropout is on; it draws from the "dropout" RNG.

        Returns:
          logits `[batch, num_classes]`, float32, and intermediates by name: `block_<l>` `[batch, rows, columns,
          hidden_dim]`, `encoded` `[batch, rows * columns, hidden_dim]` and `pre_logits` `[batch, hidden_dim]`, the mean
          over all tokens.

        Raises:
          UserError: the patches do not tile the images.
        """
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rows, columns = self.grid(*images.shape[1:3])
        x = embed_patches(images.astype(self.dtype), self.patch_size, self.hidden_dim, **dtypes)
        out = {"patch_embeddings": x}
        embedding = PositionEmbedding(
            "learned_1d", (rows, columns), 0, self.hidden_dim, name="posembed_input", **dtypes
        )()
        x = x + embedding.reshape(1, rows, columns, self.hidden_dim)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)

        block = AxialBlock
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat])
        for layer in range(self.num_layers):
            x = out[f"block_{layer}"] = block(
                {
                    "mlp_dim": self.mlp_dim,
                    "num_heads": self.num_heads,
                    "dropout_rate": self.dropout_rate,
                    "deterministic": not train,
                    "attention": self.attention,
                    **dtypes,
                },
                name=f"encoderblock_{layer}",
            )(x)
        x = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, name="encoder_norm", **dtypes)(x)
        out["encoded"] = x.reshape(x.shape[0], rows * columns, self.hidden_dim)
        x = out["pre_logits"] = x.mean(axis=(1, 2))
        if self.num_classes:
            x = linear_head(self.num_classes, self.head_bias, **dtypes)(x)
        return x.astype(jnp.float32), out


def axial_vit_names() -> list[str]:
    """Names of this family's models; other sizes and patch sizes work too."""
    return ["Axial-ViT-B/16", "Axial-ViT-B/32"]


def create_axial_vit(name: str, **attributes: Any) -> AxialVisionTransformer | None:
    """Makes the Axial-ViT with this name; None if the name is of another family."""
    match = re.fullmatch(r"Axial-ViT-(\w+)/([1-9]\d*)", name)
    if not match or match[1] not in VARIANTS:
        return None
    by_name = {"patch_size": int(match[2]), **dataclasses.asdict(VARIANTS[match[1]])}
    return AxialVisionTransformer(**(by_name | attributes))
