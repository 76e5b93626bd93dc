"""From encoded bytes to the pixels a model sees: decode, crop, resize, flip. All on uint8 `[height, width, 3]` arrays.

The accelerator normalises (`models.layers.normalize_images`), so nothing that leaves here is floating point.
docs/images.md has the treatment of each kind of file, and how far the pixels are from TensorFlow's.
"""

import contextlib
import dataclasses
import functools
import math
import re

import cv2
import numpy as np
import simplejpeg

from vit_jax.data.image_headers import (
    JPEG_END,
    JPEG_START,
    MAX_PIXELS,
    UPRIGHT,
    ImageError,
    JpegHeader,
    check_jpeg,
    checked_size,
    jpeg_header,
    looks_like_image,
    orientation_of,
    plain,
    stored_size,
)
from vit_jax.data.randaugment import RandAugment
from vit_jax.errors import UserError, unknown_name

__all__ = [
    "MAX_PIXELS",
    "RESIZE_METHODS",
    "EvalTransform",
    "ImageError",
    "TrainTransform",
    "central_crop",
    "decode",
    "decode_crop",
    "inception_crop_box",
    "looks_like_image",
    "random_crop",
    "resize",
    "resize_small",
    "size_of",
]

# OpenCV's own threads would fight with the pipeline's, and its warnings repeat what our errors say better.
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# OpenCV turns nothing: `decode` does, if it is told to.
_IMREAD_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def size_of(encoded: bytes, *, exif_orientation: bool = False) -> tuple[int, int]:
    """Height and width in pixels, from the header alone; a microsecond or two.

    Args:
      encoded: JPEG, PNG, GIF, WebP or BMP.
      exif_orientation: whether of the image that is turned as its EXIF says.

    Raises:
      ImageError: none of these, or more than `MAX_PIXELS`.
    """
    header = jpeg_header(encoded) if encoded.startswith(JPEG_START) else None
    height, width = (header.height, header.width) if header else stored_size(encoded)
    return orientation_of(encoded, header).size(height, width) if exif_orientation else (height, width)


def decode(encoded: bytes, *, exif_orientation: bool = False) -> np.ndarray:
    """Decodes JPEG, PNG, GIF, WebP or BMP to uint8 RGB `[height, width, 3]`.

    The pixels are those of `tf.io.decode_image` (docs/images.md has the exceptions). Of an animation it is the first
    frame; transparency is dropped.

    Args:
      encoded: the file.
      exif_orientation: whether to turn the image as its EXIF says, which TensorFlow does not.

    Raises:
      ImageError: not an image, or a truncated or damaged one, or more than `MAX_PIXELS`. Libraries often fill the
        missing part of a truncated JPEG with grey and say nothing; a model should not learn that.
    """
    header = jpeg_header(encoded) if encoded.startswith(JPEG_START) else None
    image = _decode_jpeg(encoded, header) if header else _decode_with_opencv(plain(encoded))
    orientation = orientation_of(encoded, header) if exif_orientation else UPRIGHT
    return orientation.upright(image) if orientation else image


def decode_crop(
    encoded: bytes, top: int, left: int, height: int, width: int, *, exif_orientation: bool = False
) -> np.ndarray:
    """Decodes a rectangle: the same pixels as `decode(encoded)[top : top + height, left : left + width]`, but faster.

    A sequential JPEG is decoded down to the crop's last row. Entropy decoding, most of the work, knows no shortcut to
    the first row or column. What lies behind the crop is not decoded, so that damage there may go unnoticed, as in
    TensorFlow's `decode_and_crop_jpeg`; a missing end does not.

    Args:
      encoded: JPEG, PNG, GIF, WebP or BMP.
      top: first row of the crop.
      left: first column of the crop.
      height: of the crop, in pixels.
      width: of the crop, in pixels.
      exif_orientation: whether the crop is of the image that is turned as its EXIF says.

    Returns:
      uint8 RGB `[height, width, 3]`, perhaps a view of the rows that were decoded.

    Raises:
      ImageError: as for `decode`.
      UserError: the crop does not lie within the image.
    """
    header = jpeg_header(encoded) if encoded.startswith(JPEG_START) else None
    stored = (header.height, header.width) if header else stored_size(encoded)
    orientation = orientation_of(encoded, header) if exif_orientation else UPRIGHT
    full_height, full_width = orientation.size(*stored)
    if min(top, left) < 0 or min(height, width) < 1 or top + height > full_height or left + width > full_width:
        raise UserError(
            f"the crop of {height} x {width} pixels (height x width) from row {top} and column {left} does not lie "
            f"within the image of {full_height} x {full_width}."
        )
    top, left, height, width = orientation.stored_crop(top, left, height, width, stored)
    # Chroma that is stored at half the height is interpolated from the row below, so one more is decoded. (Compared
    # for every height with 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1 and grey.)
    rows = top + height + 1
    image = None
    if header and header.sequential and not header.stray and rows < header.height:
        # What is anything but whole is left to `decode`, which tells why.
        with contextlib.suppress(ValueError, KeyError):
            image = _decode_rows(encoded, header, rows)
    crop = (decode(encoded) if image is None else image)[top : top + height, left : left + width]
    return orientation.upright(crop) if orientation else crop


def _decode_jpeg(encoded: bytes, header: JpegHeader) -> np.ndarray:
    check_jpeg(encoded, header)
    # Stray bytes between segments harm no pixel, and ImageNet has such files. simplejpeg will not have them.
    for start, end in reversed(header.stray):
        encoded = encoded[:start] + encoded[end:]
    try:
        return _decode_rows(encoded, header, header.height)
    except (ValueError, KeyError) as error:
        # libjpeg decodes any subsampling of the chroma, simplejpeg those that have a name. OpenCV would not tell that
        # the end is missing.
        if (isinstance(error, KeyError) or "subsampling" in str(error)) and JPEG_END in encoded[-1024:]:
            return _decode_with_opencv(encoded)
        raise ImageError(f"not a whole JPEG ({error})") from error


def _decode_rows(encoded: bytes, header: JpegHeader, rows: int) -> np.ndarray:
    """Decodes all rows, or the uppermost ones if the JPEG is sequential.

    Raises:
      ValueError: libjpeg complains of the rows, or there is no end.
      KeyError: simplejpeg has no name for the chroma's subsampling.
    """
    data: bytes | bytearray = encoded
    if rows < header.height:
        data = bytearray(encoded)
        data[header.position : header.position + 2] = rows.to_bytes(2, "big")
    colorspace = "CMYK" if header.channels == 4 else "RGB"
    # A buffer of ours keeps the pixels when the decoder, all rows done, complains of the bytes that it finds behind
    # them. strict=False would hide damage among the rows as well. libjpeg tells of the first problem only, so if this
    # is the first, there was none before. Measured on 300 photographs of ImageNet, neither strict=False nor one buffer
    # for many images is faster (1-2 %, less than the noise).
    pixels = np.empty((rows, header.width, len(colorspace)), np.uint8)
    simplejpeg.decode_jpeg_header(data)  # complains of the header here, as later the buffer would be left unfilled
    try:
        simplejpeg.decode_jpeg(data, colorspace, fastdct=True, buffer=pixels)
    except ValueError as error:
        # Bytes before a restart marker (d0 to d7) lie amid the pixels.
        behind = re.search("extraneous bytes before marker 0x(?!d[0-7])", str(error))
        if not behind or JPEG_END not in encoded[-1024:]:
            raise
    return _to_rgb(pixels, encoded)


def _to_rgb(pixels: np.ndarray, encoded: bytes) -> np.ndarray:
    """Maps CMYK as TensorFlow does, without colour profiles; leaves RGB alone."""
    if pixels.shape[-1] == 3:
        return pixels
    if b"\xff\xee\x00\x0eAdobe" not in encoded:
        pixels = 255 - pixels  # Adobe's programs store how much light is left, others how much ink there is
    return (pixels[..., :3].astype(np.uint16) * pixels[..., 3:] // 255).astype(np.uint8)


def _decode_with_opencv(encoded: bytes) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), _IMREAD_FLAGS)
    except cv2.error as error:
        raise ImageError(f"not a readable image ({error.err})") from error
    if image is None:
        raise ImageError("not a whole image: truncated or damaged")
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
    TensorFlow's own default for the greatest aspect ratio is 1.33.

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


# OpenCV resizes uint8 in fixed point: bilinearly, 12 % of the values of photographs are not the nearest integer, and
# they are 0.12 too dark in the mean. In float32 none is wrong, for 15 us more a crop and 25 us less a whole image (of
# about 1,000 us in all). `cv2.convertScaleAbs` rounds, faster than NumPy; where it is used there is no sign to lose.
def _resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    resized = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.convertScaleAbs(resized)


def _resize_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrunk = min(height, image.shape[0]), min(width, image.shape[1])
    resized = cv2.resize(image.astype(np.float32), shrunk[::-1], interpolation=cv2.INTER_AREA)
    # Where a side grows, OpenCV is a pixel off if a border of the old pixels falls on one of the new.
    if shrunk != (height, width):
        resized = _mix(resized, _area_taps(shrunk[0], height), _area_taps(shrunk[1], width))
    return cv2.convertScaleAbs(resized)


def _resize_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    # OpenCV's kernel has a = -0.75, and Pillow's averages where it shrinks.
    resized = _mix(image, _cubic_taps(image.shape[0], height), _cubic_taps(image.shape[1], width))
    return np.rint(resized).clip(0, 255).astype(np.uint8)


# Which pixels are mixed into each pixel of a side, int `[taps, size]`, and their weights, float32 `[taps, size]`.
_Taps = tuple[np.ndarray, np.ndarray]


def _mix(image: np.ndarray, rows: _Taps, columns: _Taps) -> np.ndarray:
    image = np.einsum("th,thwc->hwc", rows[1], image[rows[0]].astype(np.float32))
    return np.einsum("tw,htwc->hwc", columns[1], image[:, columns[0]])


@functools.lru_cache(maxsize=256)
def _area_taps(length: int, size: int) -> _Taps:
    """For a side that grows, so that a new pixel lies in one old pixel or in two."""
    new = np.arange(size)
    first = new * length // size
    second = ((new + 1) * length - (first + 1) * size).clip(0) / length
    taps = np.stack([first, (first + 1).clip(max=length - 1)])
    return taps, np.stack([1 - second, second]).astype(np.float32)


@functools.lru_cache(maxsize=256)
def _cubic_taps(length: int, size: int) -> _Taps:
    """Of the kernel of Keys (1981) with a = -0.5. Pixels beyond the border have no weight."""
    centers = (np.arange(size) + 0.5) * (length / size) - 0.5
    taps = np.floor(centers).astype(int) + np.arange(-1, 3)[:, None]
    x = np.abs(taps - centers)
    weights = np.where(x <= 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weights *= (taps >= 0) & (taps < length)
    return taps.clip(0, length - 1), (weights / weights.sum(axis=0)).astype(np.float32)


_RESIZES = {"bilinear": _resize_bilinear, "area": _resize_area, "bicubic": _resize_bicubic}
RESIZE_METHODS = tuple(_RESIZES)


def _check_method(method: str) -> None:
    if method not in _RESIZES:
        raise unknown_name("resize method", method, _RESIZES)


def resize(image: np.ndarray, height: int, width: int, method: str = "bilinear") -> np.ndarray:
    """Resizes as `tf.image.resize(image, [height, width], method)` does, and rounds to the nearest integer.

    Args:
      image: uint8 `[any height, any width, 3]`.
      height: of the result.
      width: of the result.
      method: "bilinear", between the four nearest pixels even where the image shrinks, as the paper's input pipeline;
        "area", the mean over the rectangle that becomes a pixel; "bicubic", by Keys's kernel with a = -0.5 over the 16
        nearest pixels, without antialiasing too.

    Returns:
      uint8 `[height, width, 3]`.
    """
    _check_method(method)
    return _RESIZES[method](image, height, width)


def resize_small(image: np.ndarray, size: int, method: str = "bilinear") -> np.ndarray:
    """Resizes so that the shorter side is `size` and the aspect ratio stays. See `resize`; big_vision takes "area".

    Raises:
      ImageError: the longer side would become so long that there are more than `MAX_PIXELS`.
    """
    height, width = small_size(image.shape[0], image.shape[1], size)
    checked_size(height, width)  # 1 x 20,000 pixels would take 16 GB
    return resize(image, height, width, method)


def small_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image whose shorter side is resized to `size`, its aspect ratio kept."""
    # In float32 and half to even, as big_vision computes it: sides that fall on a half come out the same.
    scale = np.float32(size) / np.float32(min(height, width))
    return int(np.rint(np.float32(height) * scale)), int(np.rint(np.float32(width) * scale))


def central_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the central `size` x `size` square; of two central ones the upper left one.

    Raises:
      UserError: the image is smaller.
    """
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    if min(top, left) < 0:
        raise UserError(f"cannot cut {size} x {size} pixels out of {image.shape[0]} x {image.shape[1]}: resize first.")
    return image[top : top + size, left : left + size]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts a `size` x `size` square out at random, every place as likely as any other."""
    top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """What training sees: crop, resize, flip and RandAugment, in this order.

    Attributes:
      image_size: side of the result, in pixels.
      inception_crop: whether to crop at random; otherwise the whole image is resized.
      min_area: smallest share of the image that an Inception crop may show.
      flip: whether half of the images are mirrored.
      resize: method of `resize`.
      randaugment: what is done to the cropped and flipped image; None for nothing.
      random_crop_from: resize the whole image to the square of this side and cut `image_size` out at random, as
        BiT-HyperRule does (160 and 128, or 512 and 480); not together with `inception_crop`.
      exif_orientation: whether encoded images are turned as their EXIF says, before all else; None: as their source
        says.
    """

    image_size: int
    inception_crop: bool = True
    min_area: float = 0.05
    flip: bool = True
    resize: str = "bilinear"
    randaugment: RandAugment | None = None
    random_crop_from: int | None = None
    exif_orientation: bool | None = None

    def __post_init__(self):
        _check_method(self.resize)
        if self.random_crop_from is None:
            return
        if self.inception_crop:
            raise UserError("data.inception_crop and data.random_crop_from are two ways to crop: set one of them only.")
        if self.random_crop_from < self.image_size:
            raise UserError(
                f"data.random_crop_from {self.random_crop_from} is less than data.image_size {self.image_size}: there "
                "is nothing to crop. Use a larger one, or None to resize the whole image."
            )

    def __call__(
        self, image: bytes | np.ndarray, rng: np.random.Generator, *, exif_orientation: bool = False
    ) -> np.ndarray:
        """Maps an encoded file, or decoded uint8 `[height, width, 3]`, to uint8 `[image_size, image_size, 3]`.

        The result is the same for both; a file is decoded no further than it is shown.

        Args:
          image: the image.
          rng: source of randomness.
          exif_orientation: what the source of the image says (`Example`), if the field of this name is None.
        """
        turn = exif_orientation if self.exif_orientation is None else self.exif_orientation
        if self.inception_crop:
            height, width = size_of(image, exif_orientation=turn) if isinstance(image, bytes) else image.shape[:2]
            top, left, height, width = inception_crop_box(height, width, rng, min_area=self.min_area)
            if isinstance(image, bytes):
                pixels = decode_crop(image, top, left, height, width, exif_orientation=turn)
            else:
                pixels = image[top : top + height, left : left + width]
        else:
            pixels = decode(image, exif_orientation=turn) if isinstance(image, bytes) else image
        size = self.random_crop_from or self.image_size
        pixels = resize(pixels, size, size, self.resize)
        if self.random_crop_from:
            pixels = random_crop(pixels, self.image_size, rng)
        if self.flip and rng.random() < 0.5:
            pixels = cv2.flip(pixels, 1)
        return self.randaugment(pixels, rng) if self.randaugment else pixels


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """What evaluation sees: no randomness.

    Attributes:
      image_size: side of the result, in pixels.
      resize_small: the shorter side is resized to this before the central crop; None resizes the whole image to the
        square, whatever its shape, as the released fine-tuning does.
      resize: method of `resize`.
      crop_from: resizes the whole image to a square of this side before the central crop, as the released few-shot
        evaluation does; instead of `resize_small`.
      exif_orientation: see `TrainTransform`.
    """

    image_size: int
    resize_small: int | None = None
    resize: str = "bilinear"
    crop_from: int | None = None
    exif_orientation: bool | None = None

    def __post_init__(self):
        _check_method(self.resize)
        if self.resize_small is not None and self.resize_small < self.image_size:
            raise UserError(
                f"data.eval_resize_small {self.resize_small} is less than data.image_size {self.image_size}: "
                "there is nothing to crop. Use a larger one, or None to resize the whole image."
            )
        if self.crop_from is not None and self.crop_from < self.image_size:
            raise UserError(f"crop_from {self.crop_from} must be at least the image size, {self.image_size}.")
        if self.crop_from is not None and self.resize_small is not None:
            raise UserError(f"crop_from {self.crop_from} and resize_small {self.resize_small}: set one of them.")

    def __call__(self, image: bytes | np.ndarray, *, exif_orientation: bool = False) -> np.ndarray:
        """Maps an encoded file, or decoded uint8 `[height, width, 3]`, to uint8 `[image_size, image_size, 3]`.

        Args:
          image: the image.
          exif_orientation: what the source of the image says (`Example`), if the field of this name is None.
        """
        if isinstance(image, bytes):
            turn = exif_orientation if self.exif_orientation is None else self.exif_orientation
            image = decode(image, exif_orientation=turn)
        if self.crop_from is not None:
            return central_crop(resize(image, self.crop_from, self.crop_from, self.resize), self.image_size)
        if self.resize_small is None:
            return resize(image, self.image_size, self.image_size, self.resize)
        return central_crop(resize_small(image, self.resize_small, self.resize), self.image_size)
