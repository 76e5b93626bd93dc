"""Mixup and CutMix on the device: each image of a batch is mixed with its neighbour.

The batch is the global one whatever its sharding, so that the result is the same on one device and on many.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed; the same share for all of them, drawn anew at each step.

    AugReg uses mixup alone (Steiner et al., 2021, section 3.3), BiT with alpha 0.1, DeiT mixup 0.8 and CutMix 1.0, each
    at every other step.

    Attributes:
      mixup_alpha: of the symmetric beta distribution that mixup's share is drawn from (Zhang et al., 2018); 0 for none.
      cutmix_alpha: the same for the area that CutMix leaves of the image (Yun et al., 2019); 0 for none.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}.")

    def __bool__(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def weights(self, rng: jax.Array, height: int, width: int) -> jax.Array:
        """Draws the share of each pixel that stays, float32 `[height, width, 1]` in [0, 1]; the neighbour has the rest.

        Its mean is the label's share.
        """
        choose, mixup_rng, cutmix_rng = jax.random.split(rng, 3)
        # At least half is the image's own, so that accuracy in training counts its label. As the neighbour's label is
        # mixed in symmetrically, this is the same distribution of pairs.
        share = _beta(mixup_rng, self.mixup_alpha) if self.mixup_alpha else jnp.float32(1)
        mixup = jnp.full((height, width, 1), jnp.maximum(share, 1 - share))
        if not self.cutmix_alpha:
            return mixup
        cutmix = 1 - _box(cutmix_rng, _beta(cutmix_rng, self.cutmix_alpha), height, width)
        return jnp.where(jax.random.bernoulli(choose), cutmix, mixup) if self.mixup_alpha else cutmix


def _beta(rng: jax.Array, alpha: float) -> jax.Array:
    return jax.random.beta(rng, alpha, alpha, dtype=jnp.float32)


def _box(rng: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """`[height, width, 1]`: 1 in a box of area `1 - share` about a uniformly drawn centre, cut off at the border."""
    side = jnp.sqrt(1 - share)
    centre = jax.random.uniform(jax.random.fold_in(rng, 1), (2,))

    def inside(size: int, centre: jax.Array) -> jax.Array:
        middle, half = jnp.floor(centre * size), jnp.floor(side * size) / 2
        pixels = jnp.arange(size)
        return (pixels >= jnp.floor(middle - half)) & (pixels < jnp.floor(middle + half))

    return (inside(height, centre[0])[:, None, None] & inside(width, centre[1])[None, :, None]).astype(jnp.float32)


def neighbours(array: jax.Array) -> jax.Array:
    """The array `[batch, ...]` moved on by one example: the partner of each."""
    return jnp.roll(array, 1, axis=0)
