"""Masked patch prediction: a model sees images whose patch embeddings are corrupted, and predicts the patches (B.1.2).

Labels are not used.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from vit_jax.errors import UserError, unknown_name
from vit_jax.models.patches import patch_grid
from vit_jax.objectives import Apply, Batch, Examples

TARGETS = ("mean_colour", "downsized", "pixels")
BITS = 3  # of each channel of a predicted colour
NUM_COLOURS = 2 ** (3 * BITS)
_CELLS = 4  # rows and columns of a downsized patch

# Of the corrupted patches (B.1.2): these become the mask embedding, and these another patch's embedding. The rest stay.
MASKED_SHARE, REPLACED_SHARE = 0.8, 0.1


@dataclasses.dataclass(frozen=True)
class MaskedPatches:
    """Predicts each corrupted patch from its encoded token. Other patches have no loss, and black images do not count.

    Metrics: `accuracy`, the share of colours that are predicted right; none with target "pixels".

    Raises:
      UserError: unknown target, a rate outside of [0, 1], or patches that cannot be downsized.
    """

    patch_size: int  # side of a patch, in pixels
    # "mean_colour": the patch's mean colour of 3 bits a channel, 512 classes. "downsized": the same of the 4x4 cells of
    # the patch, 16 x 512 classes. "pixels": all values, in [-1, 1], by squared error.
    target: str = "mean_colour"
    corruption_rate: float = 0.5  # share of the patches of each image
    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise unknown_name("target of masked patches", self.target, TARGETS)
        if not 0 < self.corruption_rate <= 1:
            raise UserError(
                f"the corruption rate must be above 0 and at most 1, got {self.corruption_rate}. The paper has 0.5."
            )
        if self.target == "downsized" and self.patch_size % _CELLS:
            raise UserError(
                f"patches of {self.patch_size}x{self.patch_size} pixels cannot be downsized to {_CELLS}x{_CELLS}. Use "
                'a patch size that is a multiple of 4, or target "mean_colour" or "pixels".'
            )

    @property
    def num_outputs(self) -> int:
        """Number of values that the model's head predicts for a patch."""
        if self.target == "pixels":
            return 3 * self.patch_size**2
        return NUM_COLOURS * (_CELLS**2 if self.target == "downsized" else 1)

    def count_patches(self, height: int, width: int) -> int:
        """Returns the number of patches of an image.

        Raises:
          UserError: the patches do not tile it. A hybrid by itself takes any size, and its last patches stick out.
        """
        rows, columns = patch_grid(height, width, self.patch_size)
        return rows * columns

    def prepare(self, batch: Batch, rng: jax.Array) -> Examples:
        """Draws which patches of each image are corrupted, and how; raises UserError as `count_patches`."""
        images = batch["image"]
        count, height, width, _ = images.shape
        num_patches = self.count_patches(height, width)
        choose_rng, kind_rng, source_rng = jax.random.split(rng, 3)
        shape = (count, num_patches)
        # The same number in each image: those with the smallest of random numbers.
        order = jnp.argsort(jnp.argsort(jax.random.uniform(choose_rng, shape), axis=1), axis=1)
        corrupted = order < max(1, round(self.corruption_rate * num_patches))
        kind = jax.random.uniform(kind_rng, shape)
        masked = corrupted & (kind < MASKED_SHARE)
        replaced = corrupted & (kind >= MASKED_SHARE) & (kind < MASKED_SHARE + REPLACED_SHARE)
        own = jnp.arange(num_patches)
        other = (own + jax.random.randint(source_rng, shape, 1, max(num_patches, 2))) % num_patches
        arrays = {"image": images, "corrupted": corrupted, "masked": masked, "source": jnp.where(replaced, other, own)}
        readable = (images > 0).any(axis=(1, 2, 3))  # an image that cannot be read is all zeros
        return Examples(arrays, readable.astype(jnp.float32))

    def losses(self, apply: Apply, examples: Examples) -> tuple[jax.Array, Mapping[str, jax.Array]]:
        """Computes the mean loss of the corrupted patches of each image, and the accuracy on them."""
        arrays = examples.arrays
        outputs, _ = apply(arrays["image"], corruption=(arrays["masked"], arrays["source"]))
        weight = arrays["corrupted"] / arrays["corrupted"].sum(axis=1, keepdims=True)

        def mean(values: jax.Array) -> jax.Array:
            return (values.mean(axis=-1) * weight).sum(axis=1)

        targets = self.targets(arrays["image"])
        if self.target == "pixels":
            return mean((outputs - targets) ** 2), {}
        logits = outputs.reshape(*targets.shape, NUM_COLOURS)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        return mean(losses), {"accuracy": mean((logits.argmax(axis=-1) == targets).astype(jnp.float32))}

    def targets(self, images: jax.Array) -> jax.Array:
        """Returns what to predict of images uint8 `[batch, height, width, 3]`.

        Returns:
          Colours int32 `[batch, num_patches, 1 or 16]`, 64 red + 8 green + blue; or pixels float32 `[batch,
          num_patches, 3 * patch_size**2]`, row by row.
        """
        if self.target == "pixels":
            return patches_of(images, self.patch_size) / 127.5 - 1
        side = self.patch_size // _CELLS if self.target == "downsized" else self.patch_size
        patches = patches_of(images, self.patch_size).astype(jnp.int32)
        cells = self.patch_size // side
        patches = patches.reshape(*patches.shape[:2], cells, side, cells, side, 3)
        colours = patches.sum(axis=(3, 5)) // (side**2 * 2 ** (8 - BITS))  # whole numbers: exact
        colours = colours.reshape(*patches.shape[:2], cells**2, 3)
        return (colours * jnp.array([2 ** (2 * BITS), 2**BITS, 1])).sum(axis=-1)


def target_of(num_outputs: int) -> str:
    """Returns the target of which a head predicts `num_outputs` values for a patch."""
    return {NUM_COLOURS: "mean_colour", NUM_COLOURS * _CELLS**2: "downsized"}.get(num_outputs, "pixels")


def colour_of(classes: jax.Array) -> jax.Array:
    """Returns the centres of the colours of `MaskedPatches.targets`, int32 `[..., 3]`, from 0 to 255."""
    channels = jnp.stack([classes >> (2 * BITS), classes >> BITS, classes], axis=-1) % 2**BITS
    return channels * 2 ** (8 - BITS) + 2 ** (7 - BITS)


def patches_of(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images `[batch, height, width, 3]` into patches `[batch, num_patches, 3 * patch_size**2]`, row by row."""
    count, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(count, rows, patch_size, columns, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(count, rows * columns, -1)
