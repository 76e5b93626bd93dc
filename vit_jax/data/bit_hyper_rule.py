"""BiT-HyperRule (Kolesnikov et al., 2020): length, resolution and learning rate of BiT's fine-tuning."""


def hyper_rule_steps(num_images: int) -> int:
    """BiT-HyperRule's number of steps by the number of training images (Kolesnikov et al., 2020, section 3.3)."""
    return 500 if num_images < 20_000 else 10_000 if num_images < 500_000 else 20_000


def hyper_rule_sizes(*, small_images: bool, is_large: bool) -> tuple[int, int]:
    """BiT-HyperRule's image sizes in pixels: the size to resize to, then that of the random crop.

    Args:
      small_images: whether images have fewer than 96x96 pixels.
      is_large: whether larger images get the sizes that the BiT paper uses only for R152x4, and the released code for
        all models.
    """
    if small_images:
        return 160, 128
    return (512, 480) if is_large else (448, 384)


def hyper_rule_schedule(steps: int) -> tuple[int, tuple[float, ...]]:
    """BiT-HyperRule's warm-up in steps, and the fractions of the run at which the learning rate drops."""
    return (steps // 5, (0.4, 0.6, 0.8)) if steps <= 500 else (min(500, steps // 20), (0.3, 0.6, 0.9))
