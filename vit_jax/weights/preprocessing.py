"""Preprocessing from images to a model's input; it is saved with the weights."""

import dataclasses
import math
from typing import Any

import cv2
import numpy as np
import PIL.Image

from vit_jax.data import image_headers
from vit_jax.data import transforms as images
from vit_jax.errors import UserError
from vit_jax.json_files import Fields

RESIZES = ("square", "crop", "none")
MAX_SIDE = 2**14  # of a model's input, in pixels
LARGEST = 1e6  # of mean and std
# Pillow's, which averages over all pixels that it shrinks into one.
RESAMPLING = {
    name: PIL.Image.Resampling["BOX" if name == "area" else name.upper()]
    for name in ("bilinear", "bicubic", "nearest", "area", "lanczos", "hamming")
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Maps a decoded image to a model's input.

    Attributes:
      image_size: height and width of the input, in pixels.
      mean: value of each channel that becomes 0, where black is 0 and white 1.
      std: divides the values of each channel. Mean and std 0.5 give the [-1, 1] of the released ViT and BiT weights.
      resize: "square" resizes the whole image, whatever its shape, to `1 / crop_fraction` times the input's height and
        width, then cuts out the centre; the released fine-tuning does so, with a `crop_fraction` of 1. "crop" keeps the
        aspect ratio: the shorter side becomes `1 / crop_fraction` times the input's, then the centre is cut out. "none"
        takes only images of the input's size, as they are.
      crop_fraction: see `resize`.
      interpolation: "bilinear", "bicubic", "nearest" or "area" (the mean over the pixels that become one); with
        `antialias` also "lanczos" or "hamming".
      antialias: whether to average when shrinking, and to round sizes, as PyTorch's pipelines do. The released JAX
        models did not.
      centre_to_even: whether a central crop between two pixels begins at the even one, as in torchvision and timm;
        otherwise at the first.
      exif_orientation: whether to turn images as EXIF says; None: turn files, and images of a data set as its source
        says (`data.exif_orientation` of a config).
    """

    image_size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resize: str = "square"
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"
    antialias: bool = False
    centre_to_even: bool = False
    exif_orientation: bool | None = None

    def __post_init__(self):
        if self.resize not in RESIZES or self.interpolation not in RESAMPLING:
            raise UserError(
                f"preprocessing: resize must be one of {', '.join(RESIZES)} and interpolation one of "
                f"{', '.join(RESAMPLING)}, got {self.resize!r} and {self.interpolation!r}."
            )
        if self.interpolation in ("lanczos", "hamming") and not self.antialias:
            raise UserError(f"preprocessing: {self.interpolation} needs antialias=True.")
        if not 0 < self.crop_fraction <= 1 or min(self.std) <= 0 or min(self.image_size) < 1:
            raise UserError(
                "preprocessing: crop_fraction must be more than 0 and at most 1, std more than 0 and image_size at "
                f"least 1, got {self.crop_fraction}, {self.std} and {self.image_size}."
            )

    def decode(self, encoded: bytes, *, exif_orientation: bool = True) -> np.ndarray:
        """Decodes a file to uint8 RGB `[height, width, 3]`.

        Args:
          encoded: content of the file.
          exif_orientation: whether to turn it as EXIF says, if the field of this name is None.
        """
        turn = exif_orientation if self.exif_orientation is None else self.exif_orientation
        return images.decode(encoded, exif_orientation=turn)

    @classmethod
    def of_evaluation(
        cls, image_size: int, resize_small: int | None, interpolation: str, exif_orientation: bool | None
    ) -> "Preprocessing":
        """Makes the preprocessing of a run's evaluation (`data.transforms.EvalTransform`).

        Args:
          image_size: side of the square input, in pixels.
          resize_small: length of the shorter side before the centre is cut out; None: resized to a square.
          interpolation: see the class.
          exif_orientation: see the class.
        """
        return cls(
            image_size=(image_size, image_size),
            resize="crop" if resize_small else "square",
            interpolation=interpolation,
            crop_fraction=image_size / resize_small if resize_small else 1.0,
            exif_orientation=exif_orientation,
        )

    def at(self, image_size: tuple[int, int] | int) -> "Preprocessing":
        """Returns the same preprocessing for another input size."""
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        return dataclasses.replace(self, image_size=(int(height), int(width)))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Maps uint8 `[height, width, 3]` to uint8 `[*image_size, 3]`."""
        height, width = self.image_size
        if self.resize == "none":
            if image.shape[:2] != (height, width):
                raise images.ImageError(
                    f"an image of {image.shape[0]} x {image.shape[1]} pixels (height x width); the preprocessing of "
                    f"these weights does not resize, so images must have {height} x {width}"
                )
            return image
        resized_height, resized_width = self._resized(*image.shape[:2])
        if resized_height * resized_width > image_headers.MAX_PIXELS:
            raise images.ImageError(f"an image of {resized_height:,} x {resized_width:,} pixels after resizing")
        image = self._resize(image, resized_height, resized_width)
        top, left = (resized_height - height) / 2, (resized_width - width) / 2
        top, left = (round(top), round(left)) if self.centre_to_even else (int(top), int(left))
        return image[top : top + height, left : left + width]

    @property
    def size_before_crop(self) -> tuple[int, int]:
        """Height and width that images are resized to ("square"), or at least have ("crop")."""
        # PyTorch's pipelines round down, big_vision to the nearest number.
        height, width = ((math.floor if self.antialias else round)(s / self.crop_fraction) for s in self.image_size)
        return height, width

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width between resize and crop of an image of this size."""
        whole = self.size_before_crop
        if self.resize == "square":
            return whole
        if self.antialias and whole[0] == whole[1]:  # torchvision's Resize
            sides = [int(whole[0] * side / min(height, width)) for side in (height, width)]
        elif self.antialias:  # timm's ResizeKeepRatio
            ratio = min(height / whole[0], width / whole[1])
            sides = [round(side / ratio) for side in (height, width)]
        elif whole[0] == whole[1]:
            return images.small_size(height, width, whole[0])
        else:
            scale = max(self.image_size[0] / height, self.image_size[1] / width) / self.crop_fraction
            sides = [round(side * scale) for side in (height, width)]
        return max(sides[0], self.image_size[0]), max(sides[1], self.image_size[1])

    def _resize(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        if self.antialias:
            return np.asarray(PIL.Image.fromarray(image).resize((width, height), RESAMPLING[self.interpolation]))
        if self.interpolation == "nearest":
            return cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST)
        return images.resize(image, height, width, self.interpolation)

    def normalize(self, images: Any) -> Any:
        """Maps uint8 `[..., 3]`, of NumPy or JAX, to float32 of the same shape."""
        scale = 1 / (255 * np.asarray(self.std, np.float32))
        return images.astype(np.float32) * scale - np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-compatible dictionary."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocessing":
        """Inverse of `to_json`.

        Raises:
          UserError: a field is unknown, or has a wrong type or value.
        """
        given = Fields(fields, "preprocessing")
        if unknown := sorted(given.values.keys() - {field.name for field in dataclasses.fields(cls)}):
            raise UserError(f"preprocessing has fields that vit_jax does not know: {', '.join(unknown)[:200]}.")
        for name, value in given.values.items():
            if value is None and name != "exif_orientation":
                raise given.error(name, "a value")
        height, width = given.integers("image_size", cls.image_size, length=2, at_least=1, at_most=MAX_SIDE)
        return cls(
            image_size=(height, width),
            mean=given.numbers("mean", cls.mean, length=3, at_least=-LARGEST, at_most=LARGEST),
            std=given.numbers("std", cls.std, length=3, above=0, at_most=LARGEST),
            resize=given.text("resize", cls.resize, choices=RESIZES),
            crop_fraction=given.number("crop_fraction", cls.crop_fraction, above=0, at_most=1),
            interpolation=given.text("interpolation", cls.interpolation, choices=tuple(RESAMPLING)),
            antialias=given.flag("antialias", cls.antialias),
            centre_to_even=given.flag("centre_to_even", cls.centre_to_even),
            exif_orientation=given.flag("exif_orientation", cls.exif_orientation),
        )
