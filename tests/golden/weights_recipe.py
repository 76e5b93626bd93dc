"""Random weights by name, the same everywhere, so that golden files need not contain them.

Only NumPy's `RandomState.random_sample` is used, whose numbers are promised never to change, and arithmetic that IEEE
754 rounds in one way: every machine makes the same bits.
"""

import math
import re
import zlib

import numpy as np

# Kernels that the model standardises before use, whatever their mean and scale.
_STANDARDIZED = re.compile(r"(standardized_conv2d|conv_root|unit\d+/conv\w+)/kernel")


def uniform(name: str, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    """Uniform float32 numbers of this mean and standard deviation; the name is the seed."""
    numbers = np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape)
    return (mean + std * math.sqrt(12.0) * (numbers - 0.5)).astype(np.float32)


def make_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of the size that it has in a model whose logits are of order 1, and nowhere zero or one.

    Args:
      name: in a released .npz of ViT, hybrids or BiT; what stands before the last part seeds the numbers too.
      shape: as there.
    """
    leaf = name.rsplit("/", maxsplit=1)[-1]
    if _STANDARDIZED.search(name):
        # timm guards against a division by zero with 1e-8 beside the variance; the released hybrids with 1e-5 beside
        # the standard deviation and BiT with 1e-10 beside the variance. With a deviation of 1 that is one part in 1e5
        # at most, which the normalisation that follows takes away again; kernels of deviation 0.01 would show it.
        return uniform(name, shape, mean=0.3)
    if leaf in ("scale", "gamma"):
        return uniform(name, shape, mean=1.0, std=0.2)
    if leaf in ("bias", "beta"):
        return uniform(name, shape, std=0.2)
    if leaf in ("cls", "probe", "pos_embedding", "relative_embedding"):
        return uniform(name, shape, std=0.5)
    assert leaf == "kernel", name
    # Those of query, key and value are [width, heads, head_dim].
    fan_in = shape[0] if re.search(r"(query|key|value)/kernel", name) else math.prod(shape[:-1])
    return uniform(name, shape, std=fan_in**-0.5)


def make_torch_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same for a name and a shape as PyTorch's libraries have them, of a ViT without ResNet."""
    if len(shape) == 1:
        is_scale = re.search(r"norm\w*\.weight$", name) is not None
        return uniform(name, shape, mean=float(is_scale), std=0.2)
    if len(shape) == 3:  # class token and position embeddings
        return uniform(name, shape, std=0.5)
    return uniform(name, shape, std=math.prod(shape[1:]) ** -0.5)


def make_images(batch: int, height: int, width: int) -> np.ndarray:
    """Images in [-1, 1] of coloured squares of 16 pixels, half as much noise, `[batch, height, width, 3]`."""
    squares = uniform("squares", (batch, height // 16, width // 16, 3), std=12**-0.5)
    noise = uniform("noise", (batch, height, width, 3), std=12**-0.5)
    return (4 * squares.repeat(16, axis=1).repeat(16, axis=2) + 2 * noise) / 3


def checksum(arrays: dict[str, np.ndarray]) -> int:
    """One number for the bits of all arrays and their names."""
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), zlib.crc32(name.encode(), total))
    return total


def probe_gradient(name: str, gradient: np.ndarray) -> np.ndarray:
    """Two numbers that stand for a gradient.

    Returns:
      Its norm; and its product with a random direction by name of elements of variance 1, which sees what stands where.
    """
    gradient = np.asarray(gradient, np.float64)
    direction = uniform("direction of " + name, gradient.shape).astype(np.float64)
    return np.array([np.linalg.norm(gradient), np.sum(gradient * direction)])
