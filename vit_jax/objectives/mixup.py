"""Mixup and CutMix on the device: each image is mixed with its neighbour in the global batch.

The result does not depend on the number of devices.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How the images of a batch are mixed. Each step draws one share for all of them.

    AugReg uses mixup (Steiner et al., 2021, section 3.3), BiT mixup with alpha 0.1, DeiT mixup 0.8 or CutMix 1.0 with
    equal probability.
    """

    # Parameter of the symmetric beta distribution of mixup's share (Zhang et al., 2018); 0 for no mixup.
    mixup_alpha: float = 0.0
    # The same for the area of the image that CutMix keeps (Yun et al., 2019); 0 for no CutMix.
    cutmix_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}.")

    def __bool__(self) -> bool:
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def weights(self, rng: jax.Array, height: int, width: int) -> jax.Array:
        """Draws the share of each pixel that stays, float32 `[height, width, 1]`. Its mean is the label's share."""
        choose, mixup_rng, cutmix_rng = jax.random.split(rng, 3)
        # The image keeps at least half, so that training accuracy counts its label. Pairs are symmetric: their
        # distribution is the same.
        share = _beta(mixup_rng, self.mixup_alpha) if self.mixup_alpha else jnp.float32(1)
        mixup = jnp.full((height, width, 1), jnp.maximum(share, 1 - share))
        if not self.cutmix_alpha:
            return mixup
        cutmix = 1 - _box(cutmix_rng, _beta(cutmix_rng, self.cutmix_alpha), height, width)
        return jnp.where(jax.random.bernoulli(choose), cutmix, mixup) if self.mixup_alpha else cutmix


def _beta(rng: jax.Array, alpha: float) -> jax.Array:
    return jax.random.beta(rng, alpha, alpha, dtype=jnp.float32)


def _box(rng: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """`[height, width, 1]`: 1 in a box of area `1 - share` around a uniformly drawn centre, clipped at the border."""
    side = jnp.sqrt(1 - share)
    centre = jax.random.uniform(jax.random.fold_in(rng, 1), (2,))

    def inside(size: int, centre: jax.Array) -> jax.Array:
        middle, half = jnp.floor(centre * size), jnp.floor(side * size) / 2
        pixels = jnp.arange(size)
        return (pixels >= jnp.floor(middle - half)) & (pixels < jnp.floor(middle + half))

    return (inside(height, centre[0])[:, None, None] & inside(width, centre[1])[None, :, None]).astype(jnp.float32)


def neighbours(array: jax.Array) -> jax.Array:
    """Returns the partner of each example of an array `[batch, ...]`: the one before it."""
    return jnp.roll(array, 1, axis=0)
