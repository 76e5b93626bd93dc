"""Cuts images, or the feature maps of hybrids, into patches and embeds them (section 3.1)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vit_jax.errors import UserError
from vit_jax.models.resnet import downsampling


def embed_patches(
    x: jax.Array, patch_size: int, hidden_dim: int, *, dtype: DTypeLike, param_dtype: DTypeLike
) -> jax.Array:
    """Embeds patches linearly (E in equation 1), as a convolution. Call it inside the module that owns the parameters.

    Args:
      x: `[batch, height, width, channels]`, divisible by the patch size.
      patch_size: side of a patch (P).
      hidden_dim: width of the tokens (D).
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters `embedding/{kernel,bias}`.

    Returns:
      `[batch, rows, columns, hidden_dim]`.
    """
    patch = (patch_size, patch_size)
    dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
    return nn.Conv(hidden_dim, patch, strides=patch, padding="VALID", name="embedding", **dtypes)(x)


def corrupt_patches(x: jax.Array, masked: jax.Array, source: jax.Array, mask_embedding: jax.Array) -> jax.Array:
    """Replaces patch embeddings for masked patch prediction (appendix B.1.2).

    Args:
      x: patch embeddings `[batch, num_patches, hidden_dim]`.
      masked: bool `[batch, num_patches]`, which become the mask embedding.
      source: int32 `[batch, num_patches]`, the patch of the image whose embedding the others take; their own number
        leaves them as they are.
      mask_embedding: `[1, 1, hidden_dim]`.

    Returns:
      An array like x.
    """
    taken = jnp.take_along_axis(x, source[:, :, None], axis=1)
    return jnp.where(masked[:, :, None], mask_embedding.astype(x.dtype), taken)


def pixels_per_token(patch_size: int, stages: Sequence[int] | None = None) -> int:
    """Side of the square of pixels that a token covers; `stages` is a hybrid's ResNet."""
    return patch_size * (1 if stages is None else downsampling(stages))


def patch_grid(height: int, width: int, patch_size: int, stages: Sequence[int] | None = None) -> tuple[int, int]:
    """Rows and columns of patches of an image; `stages` is a hybrid's ResNet, which rounds its feature map up.

    Raises:
      UserError: the patches do not tile the image.
    """
    factor = 1 if stages is None else downsampling(stages)
    rows, columns = -(-height // factor), -(-width // factor)
    if rows % patch_size or columns % patch_size:
        side = factor * patch_size
        below = height - height % side
        raise UserError(
            f"image size {height}x{width} is not divisible by the patch size {side}. Use a multiple of it, such as "
            f"{below or side} or {below + side}."
        )
    return rows // patch_size, columns // patch_size
