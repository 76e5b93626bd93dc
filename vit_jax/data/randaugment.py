"""RandAugment (Cubuk et al., 2020) as AugReg and DeiT trained with it, on uint8 `[height, width, 3]` arrays.

The two differ in more than magnitudes, so each has its own table of operations:

- `"tensorflow"`, AugReg's: 16 operations with TensorFlow's pixels, always applied, with grey filling. `_posterize`,
  `_solarize` and `_contrast` have oddities, which stay because the published models were trained with them.
- `"timm"`, DeiT's (`rand-m9-mstd0.5-inc1`): 15 operations by Pillow whose strength grows with the magnitude, each
  applied with probability 1/2, with bicubic interpolation.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps

from vit_jax.errors import UserError, unknown_name

# The level is a tenth of the magnitude; negative reverses the direction.
Operation = Callable[[np.ndarray, float], np.ndarray]

_GREY = (128, 128, 128)
_VALUES = np.arange(256)


def _truncated(values: np.ndarray) -> np.ndarray:
    return values.clip(0, 255).astype(np.uint8)


def _blended(background: np.ndarray | int, image: np.ndarray, level: float) -> np.ndarray:
    """Moves away from the background for factors above 1, towards it below. In float32, as TensorFlow does."""
    background = np.asarray(background, np.float32)
    result = image.astype(np.float32)
    result -= background  # in place, which halves the time
    result *= np.float32(level * 1.8 + 0.1)
    result += background
    return np.clip(result, 0, 255, out=result).astype(np.uint8)


def _autocontrast(image: np.ndarray, _: float) -> np.ndarray:
    tables = []
    for channel in cv2.split(image):
        low, high = np.float32(channel.min()), np.float32(channel.max())
        scale = np.float32(255) / (high - low) if high > low else np.float32(1)
        offset = low * scale if high > low else np.float32(0)
        tables.append(_truncated(_VALUES.astype(np.float32) * scale - offset))
    return cv2.LUT(image, np.stack(tables, axis=-1)[None])


def _equalize(image: np.ndarray, _: float) -> np.ndarray:
    tables = []
    for channel in range(3):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(int)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        below = counts.cumsum() - counts
        # The first entry is 0, not half a step.
        table = np.where(_VALUES > 0, (below + step // 2) // step, 0) if step else _VALUES
        tables.append(_truncated(table))
    return cv2.LUT(image, np.stack(tables, axis=-1)[None])


def _posterize(image: np.ndarray, level: float) -> np.ndarray:
    # Higher magnitudes keep more bits: all 8 at 20, one at 0, because no shift exceeds 7.
    shift = min((8 - int(level * 4)) % 256, 7)
    return cv2.LUT(image, (_VALUES >> shift << shift).astype(np.uint8))


def _solarize(image: np.ndarray, level: float) -> np.ndarray:
    # The threshold is a uint8 and overflows: magnitudes 10 and 20 invert every value, 15 those from 128 on.
    threshold = int(level * 256) % 256
    return cv2.LUT(image, np.where(threshold > _VALUES, _VALUES, 255 - _VALUES).astype(np.uint8))


def _solarize_add(image: np.ndarray, level: float) -> np.ndarray:
    return cv2.LUT(image, _truncated(np.where(_VALUES < 128, _VALUES + int(level * 110), _VALUES)))


def _color(image: np.ndarray, level: float) -> np.ndarray:
    weights = np.array([[0.2989, 0.587, 0.1140]], np.float32)
    grey = cv2.transform(image.astype(np.float32) * np.float32(1 / 255), weights) * np.float32(255.5)
    return _blended(grey.astype(np.uint8)[..., None], image, level)


def _contrast(image: np.ndarray, level: float) -> np.ndarray:
    # AugReg's code means the mean grey, but takes the mean of the histogram's 256 counts, which is the same for all
    # images of a size: 196 for 224 x 224.
    background = min(image.shape[0] * image.shape[1] // 256, 255)
    return cv2.LUT(image, _blended(background, _VALUES, level))


def _sharpness(image: np.ndarray, level: float) -> np.ndarray:
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / np.float32(13)
    background = image.copy()
    background[1:-1, 1:-1] = _truncated(cv2.filter2D(image.astype(np.float32), -1, kernel)[1:-1, 1:-1])
    return _blended(background, image, level)


def _moved(image: np.ndarray, matrix: tuple[float, float, float, float, float, float]) -> np.ndarray:
    """Fills pixel (x, y) from the rounded (ax + by + c, dx + ey + f), or with grey from outside."""
    a, b, c, d, e, f = (np.float32(value) for value in matrix)
    x = np.arange(image.shape[1], dtype=np.float32)
    y = np.arange(image.shape[0], dtype=np.float32)[:, None]
    places = np.empty((*image.shape[:2], 2), np.int16)  # int16 makes OpenCV take the nearest pixels
    # Skipping zero terms keeps an axis one row or one column.
    for axis, place in enumerate(((a * x if a else 0) + (b * y if b else 0) + c, (d * x if d else 0) + e * y + f)):
        # TensorFlow rounds halves away from zero.
        places[..., axis] = (place + np.copysign(np.float32(0.5), place)).clip(-32768, 32767)
    no_fractions = np.empty((0,), np.uint16)
    return cv2.remap(image, places, no_fractions, cv2.INTER_NEAREST, None, cv2.BORDER_CONSTANT, _GREY)


def _rotate(image: np.ndarray, level: float) -> np.ndarray:
    last_row, last_column = image.shape[0] - 1, image.shape[1] - 1
    angle = math.radians(30 * level)
    cos, sin = math.cos(angle), math.sin(angle)
    x_offset = (last_column - (cos * last_column - sin * last_row)) / 2
    y_offset = (last_row - (sin * last_column + cos * last_row)) / 2
    return _moved(image, (cos, -sin, x_offset, sin, cos, y_offset))


def _reach(side: int) -> float:
    # AugReg moves images of 224 pixels by up to 100 per level. Scaled, because that would empty small images.
    return 100 * side / 224


def cutout(image: np.ndarray, row: int, column: int, half: int) -> np.ndarray:
    """Makes a square of side `2 * half` around a pixel grey, clipped to the image."""
    image = image.copy()
    image[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = _GREY
    return image


_TENSORFLOW: dict[str, Operation | None] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": lambda image, _: cv2.bitwise_not(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "color": _color,
    "contrast": _contrast,
    "brightness": lambda image, level: cv2.LUT(image, _blended(0, _VALUES, level)),
    "sharpness": _sharpness,
    "shear_x": lambda image, level: _moved(image, (1, 0.3 * level, 0, 0, 1, 0)),
    "shear_y": lambda image, level: _moved(image, (1, 0, 0, 0.3 * level, 1, 0)),
    "translate_x": lambda image, level: _moved(image, (1, 0, _reach(image.shape[1]) * level, 0, 1, 0)),
    "translate_y": lambda image, level: _moved(image, (1, 0, 0, 0, 1, _reach(image.shape[0]) * level)),
    "cutout": None,
    "solarize_add": _solarize_add,
}


def _by_pillow(function: Callable[[PIL.Image.Image, float], PIL.Image.Image]) -> Operation:
    return lambda image, level: np.asarray(function(PIL.Image.fromarray(image), level))


def _enhanced(enhance: Callable[[PIL.Image.Image], PIL.ImageEnhance._Enhance]) -> Operation:
    return _by_pillow(lambda image, level: enhance(image).enhance(max(0.1, 1 + 0.9 * level)))


def _transformed(coefficients: Callable[[PIL.Image.Image, float], tuple[float, ...]]) -> Operation:
    affine, bicubic = PIL.Image.Transform.AFFINE, PIL.Image.Resampling.BICUBIC
    return _by_pillow(
        lambda image, level: image.transform(
            image.size, affine, coefficients(image, level), bicubic, fillcolor=_IMAGENET_MEAN
        )
    )


def _posterize_increasing(image: np.ndarray, level: float) -> np.ndarray:
    # At magnitude 10 no bit is left. Pillow gave black when DeiT was trained; since release 13 it raises an error.
    shift = 4 + int(level * 4)
    return cv2.LUT(image, (_VALUES >> shift << shift).astype(np.uint8))


_IMAGENET_MEAN = (124, 116, 104)
_TIMM: dict[str, Operation | None] = {
    "autocontrast": _by_pillow(lambda image, _: PIL.ImageOps.autocontrast(image)),
    "equalize": _by_pillow(lambda image, _: PIL.ImageOps.equalize(image)),
    "invert": _by_pillow(lambda image, _: PIL.ImageOps.invert(image)),
    "rotate": _by_pillow(
        lambda image, level: image.rotate(30 * level, PIL.Image.Resampling.BICUBIC, fillcolor=_IMAGENET_MEAN)
    ),
    "posterize": _posterize_increasing,
    "solarize": _by_pillow(lambda image, level: PIL.ImageOps.solarize(image, 256 - int(level * 256))),
    "solarize_add": _solarize_add,
    "color": _enhanced(PIL.ImageEnhance.Color),
    "contrast": _enhanced(PIL.ImageEnhance.Contrast),
    "brightness": _enhanced(PIL.ImageEnhance.Brightness),
    "sharpness": _enhanced(PIL.ImageEnhance.Sharpness),
    "shear_x": _transformed(lambda image, level: (1, 0.3 * level, 0, 0, 1, 0)),
    "shear_y": _transformed(lambda image, level: (1, 0, 0, 0.3 * level, 1, 0)),
    "translate_x": _transformed(lambda image, level: (1, 0, 0.45 * level * image.width, 0, 1, 0)),
    "translate_y": _transformed(lambda image, level: (1, 0, 0, 0, 1, 0.45 * level * image.height)),
}

# By implementation and name. Cutout is None because it takes a position, not a level.
OPERATIONS = {"tensorflow": _TENSORFLOW, "timm": _TIMM}


class _Rules(NamedTuple):
    directed: frozenset[str]  # operations whose level is negated half of the time
    probability: float  # of applying an operation once it is drawn
    max_magnitude: float  # the largest that its authors use


_MOVES = frozenset({"rotate", "shear_x", "shear_y", "translate_x", "translate_y"})
_RULES = {
    "tensorflow": _Rules(_MOVES, 1.0, 30),
    "timm": _Rules(_MOVES | {"color", "contrast", "brightness", "sharpness"}, 0.5, 10),
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies a sequence of uniformly drawn operations.

    Attributes:
      num_layers: operations per image, drawn with replacement.
      magnitude: strength, from 0 to 30 ("timm": to 10). 0 still changes images; AugReg's light1 uses it.
      magnitude_std: standard deviation of the normal distribution that each magnitude is drawn from, clipped to the
        bounds.
      operations: "tensorflow" or "timm"; the module describes them.
    """

    num_layers: int = 2
    magnitude: float = 15
    magnitude_std: float = 0.0
    operations: str = "tensorflow"

    def __post_init__(self):
        if self.operations not in OPERATIONS:
            raise unknown_name("RandAugment operations", self.operations, OPERATIONS)
        largest = _RULES[self.operations].max_magnitude
        if not 0 <= self.magnitude <= largest or self.magnitude_std < 0 or self.num_layers < 0:
            raise UserError(
                f"RandAugment with {self.operations}'s operations takes a magnitude from 0 to {largest}, and a "
                f"magnitude_std and num_layers of at least 0; got {self.magnitude}, {self.magnitude_std} and "
                f"{self.num_layers}."
            )

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Maps uint8 `[height, width, 3]` to the same shape, without changing its argument."""
        operations, rules = OPERATIONS[self.operations], _RULES[self.operations]
        names = tuple(operations)
        for _ in range(self.num_layers):
            name = names[int(rng.integers(len(names)))]
            if rng.random() >= rules.probability:
                continue
            magnitude = self.magnitude
            if self.magnitude_std:
                magnitude = min(max(rng.normal(magnitude, self.magnitude_std), 0), rules.max_magnitude)
            level = magnitude / 10
            if name in rules.directed and rng.random() < 0.5:
                level = -level
            operation = operations[name]
            if operation is None:
                row, column = (int(rng.integers(side)) for side in image.shape[:2])
                image = cutout(image, row, column, int(level * 40))
            else:
                image = operation(image, level)
        return image


@dataclasses.dataclass(frozen=True)
class AugRegSetting:
    """One of AugReg's augmentation strengths.

    Attributes:
      randaugment: applied after crop and flip; None for nothing.
      mixup_alpha: parameter of mixup's Beta distribution; 0 for no mixup.
    """

    randaugment: RandAugment | None
    mixup_alpha: float


# Steiner et al., 2021, "How to train your ViT?". big_vision's configs/vit_i21k.py has the same table; the names of the
# released checkpoints use the same words ("aug_medium1").
AUGREG = {
    "none": AugRegSetting(None, 0.0),
    "light1": AugRegSetting(RandAugment(2, 0), 0.0),
    "light2": AugRegSetting(RandAugment(2, 10), 0.2),
    "medium1": AugRegSetting(RandAugment(2, 15), 0.2),
    "medium2": AugRegSetting(RandAugment(2, 15), 0.5),
    "strong1": AugRegSetting(RandAugment(2, 20), 0.5),
    "strong2": AugRegSetting(RandAugment(2, 20), 0.8),
}

# Touvron et al., 2021, "Training data-efficient image transformers & distillation through attention". Its code passes
# rand-m9-mstd0.5-inc1 to timm.
DEIT = RandAugment(num_layers=2, magnitude=9, magnitude_std=0.5, operations="timm")
