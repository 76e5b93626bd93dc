"""What a model expects its images to be; it travels with the weights."""

import dataclasses
from typing import Any

import cv2
import numpy as np
import PIL.Image

from vit_jax.data import images
from vit_jax.errors import UserError

RESIZES = ("square", "crop")
# Pillow's, which averages over all pixels that it shrinks into one.
_ANTIALIASED = {
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "nearest": PIL.Image.Resampling.NEAREST,
    "area": PIL.Image.Resampling.BOX,
}
INTERPOLATIONS = tuple(_ANTIALIASED)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to the model's input.

    Attributes:
      image_size: height and width of the input, in pixels.
      mean: of the values that are normalised to 0, for each channel, where black is 0 and white 1.
      std: what values are divided by, likewise. Mean and std 0.5 give the [-1, 1] of the released ViT and BiT weights.
      resize: "square" resizes the whole image to the input's shape, whatever its own, as the released fine-tuning does;
        "crop" keeps the aspect ratio: the shorter side becomes `1 / crop_fraction` as long, then the centre is cut out.
      crop_fraction: see `resize`.
      interpolation: "bilinear", "bicubic", "nearest" or "area".
      antialias: whether shrinking averages, as in PyTorch's pipelines; the released JAX models did without.
      exif_orientation: whether files are turned as their EXIF says; None: as their source says (`data.exif_orientation`
        of a config), files of their own are.
    """

    image_size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resize: str = "square"
    crop_fraction: float = 1.0
    interpolation: str = "bilinear"
    antialias: bool = False
    exif_orientation: bool | None = None

    def __post_init__(self):
        if self.resize not in RESIZES or self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"preprocessing: resize must be one of {', '.join(RESIZES)} and interpolation one of "
                f"{', '.join(INTERPOLATIONS)}, got {self.resize!r} and {self.interpolation!r}."
            )
        if not 0 < self.crop_fraction <= 1 or min(self.std) <= 0 or min(self.image_size) < 1:
            raise UserError(
                "preprocessing: crop_fraction must be more than 0 and at most 1, std more than 0 and image_size at "
                f"least 1, got {self.crop_fraction}, {self.std} and {self.image_size}."
            )
        if self.exif_orientation not in (None, True, False):
            raise UserError(
                f"preprocessing: exif_orientation must be true, false or null, got {self.exif_orientation!r}."
            )

    def decode(self, encoded: bytes, *, exif_orientation: bool = True) -> np.ndarray:
        """Decodes a file to uint8 RGB `[height, width, 3]`, turned as its EXIF says if `exif_orientation` is true.

        Args:
          encoded: the file.
          exif_orientation: what its source says (`Example`), if the field of this name is None.
        """
        turn = exif_orientation if self.exif_orientation is None else self.exif_orientation
        return images.decode(encoded, exif_orientation=turn)

    @classmethod
    def of_evaluation(
        cls, image_size: int, resize_small: int | None, interpolation: str, exif_orientation: bool | None
    ) -> "Preprocessing":
        """What a run evaluates with (`data.images.EvalTransform`).

        Args:
          image_size: side of the square input, in pixels.
          resize_small: length of the shorter side before the centre is cut out; None: resized to a square.
          interpolation: see above.
          exif_orientation: see above.
        """
        return cls(
            image_size=(image_size, image_size),
            resize="crop" if resize_small else "square",
            interpolation=interpolation,
            crop_fraction=image_size / resize_small if resize_small else 1.0,
            exif_orientation=exif_orientation,
        )

    def at(self, image_size: tuple[int, int] | int) -> "Preprocessing":
        """The same for another size of input."""
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        return dataclasses.replace(self, image_size=(int(size[0]), int(size[1])))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Maps uint8 `[height, width, 3]` to uint8 `[*image_size, 3]`."""
        height, width = self.image_size
        if self.resize == "square":
            return self._resize(image, height, width)
        scale = max(height / image.shape[0], width / image.shape[1]) / self.crop_fraction
        resized_height = max(round(image.shape[0] * scale), height)
        resized_width = max(round(image.shape[1] * scale), width)
        image = self._resize(image, resized_height, resized_width)
        top, left = (resized_height - height) // 2, (resized_width - width) // 2
        return image[top : top + height, left : left + width]

    def _resize(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        if self.antialias:
            resample = _ANTIALIASED[self.interpolation]
            return np.asarray(PIL.Image.fromarray(image).resize((width, height), resample))
        if self.interpolation == "nearest":
            return cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST)
        return images.resize(image, height, width, self.interpolation)

    def normalize(self, images: Any) -> Any:
        """Maps uint8 `[..., 3]` to float32 of the same shape; takes NumPy's arrays and JAX's."""
        scale = 1 / (255 * np.asarray(self.std, np.float32))
        return images.astype(np.float32) * scale - np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)

    def to_json(self) -> dict[str, Any]:
        """A JSON-compatible dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocessing":
        """Inverse of `to_json`."""
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            for name in ("mean", "std", "image_size"):
                if len([float(value) for value in values.get(name, getattr(cls, name))]) != len(getattr(cls, name)):
                    raise TypeError(f"{name} has another number of values")
            return cls(**values)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"preprocessing is not what vit_jax writes: {error}.") from error
