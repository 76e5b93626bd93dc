"""Position embeddings (section 3.1, appendix D.4), and their interpolation to another grid.

Table 8 compares their `KINDS` and the `PLACES` where they are added.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vit_jax.errors import UserError

# "learned_1d": one vector for each token in raster order, the class token first (E_pos in equation 1). "learned_2d": X-
# and Y-embeddings of half the width, concatenated; the class token has none. "sincos_2d": fixed sines and cosines of X
# and Y; the class token has none. "relative": an embedding of every offset between a query and a key, within the
# attention (`models.attention`).
KINDS = ("none", "learned_1d", "learned_2d", "relative", "sincos_2d")

# "stem": added once, before the first layer. "every_layer": each layer has its own and adds it to its input. "shared":
# one set, added to the input of each layer.
PLACES = ("stem", "every_layer", "shared")


class PositionEmbedding(nn.Module):
    """The position embeddings of the tokens of a grid.

    Attributes:
      kind: "learned_1d", "learned_2d" or "sincos_2d".
      grid: rows and columns of patches.
      num_prefix_tokens: tokens before the patches (1 with a class token).
      width: width of a token.
      dtype: dtype of the result.
      param_dtype: dtype of the embedding.
    """

    kind: str
    grid: tuple[int, int]
    num_prefix_tokens: int
    width: int
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"

    @nn.compact
    def __call__(self) -> jax.Array:
        """Returns `[1, num_prefix_tokens + rows * columns, width]`."""
        rows, columns = self.grid
        normal = nn.initializers.normal(stddev=0.02)
        if self.kind == "learned_1d":
            shape = (1, self.num_prefix_tokens + rows * columns, self.width)
            return self.param("pos_embedding", normal, shape, self.param_dtype).astype(self.dtype)
        if self.kind == "learned_2d":
            x = self.param("pos_embedding_x", normal, (columns, self.width // 2), self.param_dtype)
            y = self.param("pos_embedding_y", normal, (rows, self.width - self.width // 2), self.param_dtype)
            x = jnp.broadcast_to(x[None], (rows, columns, x.shape[-1]))
            y = jnp.broadcast_to(y[:, None], (rows, columns, y.shape[-1]))
            embedding = jnp.concatenate([x, y], axis=-1).reshape(1, rows * columns, self.width)
        else:
            embedding = jnp.asarray(sincos_2d(rows, columns, self.width))
        prefix = jnp.zeros((1, self.num_prefix_tokens, self.width), embedding.dtype)
        return jnp.concatenate([prefix, embedding], axis=1).astype(self.dtype)


def sincos_2d(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> np.ndarray:
    """Sines and cosines of the column and the row at geometrically spaced frequencies, `[1, rows * columns, width]`.

    The 2-D form of Vaswani et al., 2017, as in big_vision: a quarter of the width each for sin x, cos x, sin y and cos
    y, frequencies from 1 to 1 / temperature.

    Raises:
      UserError: the width is not a multiple of 4, or less than 8.
    """
    if width % 4 or width < 8:
        raise UserError(f"sincos_2d position embeddings need a hidden_dim divisible by 4 and at least 8, got {width}.")
    frequencies = temperature ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = np.indices((rows, columns)).reshape(2, -1, 1) * frequencies
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=-1)[None].astype(np.float32)


def grid_of(num_tokens: int, num_prefix_tokens: int) -> tuple[int, int]:
    """The square grid of a number of position embeddings.

    Args:
      num_tokens: number of position embeddings, including prefix tokens.
      num_prefix_tokens: number of prefix tokens, which the model knows and the number does not show.

    Raises:
      UserError: the rest is not a square.
    """
    num_patches = num_tokens - num_prefix_tokens
    side = math.isqrt(max(num_patches, 0))
    if side == 0 or side * side != num_patches:
        without = "without a class token" if num_prefix_tokens == 0 else "with a class token"
        hint = ""
        for other in {0, 1} - {num_prefix_tokens}:
            if num_tokens > other and math.isqrt(num_tokens - other) ** 2 == num_tokens - other:
                hint = f" As a model {'with' if other else 'without'} a class token it would be a square grid."
        raise UserError(
            f"{num_tokens} position embeddings of a model {without} leave {num_patches} for the patches, which is not "
            f"a square.{hint} Give the grid, by the image_size they were trained on, if it was not square."
        )
    return side, side


def interpolation_matrix(old: int, new: int) -> np.ndarray:
    """Weights `[new, old]` that resample `old` points to `new` linearly; the first and last points keep their places.

    This is `scipy.ndimage.zoom` with order 1, as the released code does; `jax.image.resize` aligns pixels instead of
    corners and gives other values.
    """
    positions = np.linspace(0, old - 1, new)
    return np.stack([np.interp(positions, np.arange(old), point) for point in np.eye(old)], axis=1)


def interpolate_position_embedding(
    embedding: np.ndarray, new_grid: tuple[int, int], *, num_prefix_tokens: int, old_grid: tuple[int, int]
) -> np.ndarray:
    """Resamples 1-D position embeddings to another grid, bilinearly in 2-D (section 3.2).

    Args:
      embedding: `[1, num_prefix_tokens + old rows * old columns, width]`.
      new_grid: rows and columns of patches.
      num_prefix_tokens: number of leading embeddings to keep unchanged (1 with a class token).
      old_grid: rows and columns of patches of the given embeddings.

    Returns:
      `[1, num_prefix_tokens + new rows * new columns, width]`, of the same dtype.

    Raises:
      UserError: the number of embeddings does not fit `old_grid`.
    """
    embedding = np.asarray(embedding)
    num_tokens, width = embedding.shape[1:]
    if num_tokens != num_prefix_tokens + math.prod(old_grid):
        raise UserError(
            f"{num_tokens} position embeddings are not {num_prefix_tokens} + {old_grid[0]} x {old_grid[1]}, as the "
            "given grid says."
        )
    if tuple(old_grid) == tuple(new_grid):
        return embedding
    prefix, patches = embedding[:, :num_prefix_tokens], embedding[:, num_prefix_tokens:]
    patches = np.einsum(
        "yr,xc,brcd->byxd",
        interpolation_matrix(old_grid[0], new_grid[0]),
        interpolation_matrix(old_grid[1], new_grid[1]),
        patches.reshape(1, *old_grid, width).astype(np.float64),
        optimize=True,
    )
    patches = patches.reshape(1, math.prod(new_grid), width).astype(embedding.dtype)
    return np.concatenate([prefix, patches], axis=1)
