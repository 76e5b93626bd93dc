"""From encoded bytes to the pixels a model sees: decode, crop, resize, flip. All on uint8 `[height, width, 3]` arrays.

The accelerator normalises (`train_step.normalize_images`), so nothing here is floating point.
"""

import dataclasses
import math

import cv2
import numpy as np
import simplejpeg

from vit_jax.errors import UserError

# OpenCV's own threads would fight with the pipeline's, and its warnings repeat what our errors say better.
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# Not turned by what EXIF says, as TensorFlow and the JPEG decoder below do not either.
_IMREAD_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"


class ImageError(UserError):
    """Bytes that are not a whole, readable image."""


def decode(encoded: bytes) -> np.ndarray:
    """Decodes JPEG, PNG, WebP or BMP to uint8 RGB `[height, width, 3]`.

    Raises:
      ImageError: not an image, or a truncated or damaged one. Libraries often fill the missing part of a truncated JPEG
        with grey and say nothing; a model should not learn that.
    """
    if encoded.startswith(_JPEG_START):
        try:
            return simplejpeg.decode_jpeg(encoded, "RGB", fastdct=True)
        except ValueError as error:
            # Stray bytes between segments harm no pixel, and ImageNet has such files; anything else is damage.
            if "extraneous bytes before marker" not in str(error) or _JPEG_END not in encoded[-1024:]:
                raise ImageError(f"not a whole JPEG ({error})") from error
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), _IMREAD_FLAGS) if encoded else None
    if image is None:
        raise ImageError("not an image (neither JPEG, PNG, WebP nor BMP), or a truncated one")
    return image


def inception_crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    min_area: float = 0.05,
    max_area: float = 1.0,
    aspect_ratios: tuple[float, float] = (3 / 4, 4 / 3),
    max_attempts: int = 100,
) -> tuple[int, int, int, int]:
    """Draws the crop of Inception training (Szegedy et al., 2015), with TensorFlow's distribution.

    As TensorFlow's `sample_distorted_bounding_box`, it draws the crop's aspect ratio and then its *height* uniformly
    within what the area bounds allow. Drawing the area uniformly instead gives larger crops than the paper's.

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
      rng: source of randomness.
      min_area: smallest share of the image.
      max_area: largest share of the image.
      aspect_ratios: least and greatest width / height of the crop.
      max_attempts: after that many misses the whole image is the crop.

    Returns:
      top, left, height and width of the crop, in pixels.
    """
    smallest, largest = min_area * height * width, max_area * height * width
    for _ in range(max_attempts):
        draw_aspect, draw_height, draw_top, draw_left = rng.random(4).tolist()
        aspect = aspect_ratios[0] + draw_aspect * (aspect_ratios[1] - aspect_ratios[0])
        tallest = min(round(math.sqrt(largest / aspect)), height, int((width + 0.5) / aspect))
        crop_height = min(round(math.sqrt(smallest / aspect)), tallest)
        crop_height += int(draw_height * (tallest - crop_height + 1))
        # Rounding may have left the area just outside its bounds.
        if crop_height * round(crop_height * aspect) < smallest:
            crop_height += 1
        elif crop_height * round(crop_height * aspect) > largest:
            crop_height -= 1
        crop_width = round(crop_height * aspect)
        if 0 < crop_height <= height and 0 < crop_width <= width and smallest <= crop_height * crop_width <= largest:
            return (
                int(draw_top * (height - crop_height)),
                int(draw_left * (width - crop_width)),
                crop_height,
                crop_width,
            )
    return 0, 0, height, width


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes bilinearly without antialiasing, as the paper's input pipeline did."""
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def resize_small(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes so that the shorter side is `size` and the aspect ratio stays."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    return resize(image, round(height * scale), round(width * scale))


def central_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the central `size` x `size` square."""
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Crop, resize and flip of training images.

    Attributes:
      image_size: side of the result, in pixels.
      inception_crop: whether to crop at random; otherwise the whole image is resized.
      min_area: smallest share of the image that a crop may show.
      flip: whether half of the images are mirrored.
    """

    image_size: int
    inception_crop: bool = True
    min_area: float = 0.05
    flip: bool = True

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Maps uint8 `[height, width, 3]` to uint8 `[image_size, image_size, 3]`."""
        if self.inception_crop:
            top, left, height, width = inception_crop_box(image.shape[0], image.shape[1], rng, min_area=self.min_area)
            image = image[top : top + height, left : left + width]
        image = resize(image, self.image_size, self.image_size)
        if self.flip and rng.random() < 0.5:
            image = cv2.flip(image, 1)
        return image


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """What evaluation sees: no randomness.

    Attributes:
      image_size: side of the result, in pixels.
      resize_small: the shorter side is resized to this before the central crop; None resizes the whole image to the
        square, whatever its shape, as the released fine-tuning does.
    """

    image_size: int
    resize_small: int | None = None

    def __post_init__(self):
        if self.resize_small is not None and self.resize_small < self.image_size:
            raise UserError(
                f"data.eval_resize_small {self.resize_small} is less than data.image_size {self.image_size}: "
                "there is nothing to crop. Use a larger one, or None to resize the whole image."
            )

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Maps uint8 `[height, width, 3]` to uint8 `[image_size, image_size, 3]`."""
        if self.resize_small is None:
            return resize(image, self.image_size, self.image_size)
        return central_crop(resize_small(image, self.resize_small), self.image_size)
