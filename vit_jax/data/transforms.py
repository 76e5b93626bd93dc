"""Turns encoded bytes into a model's pixels: decode, crop, resize, flip, on uint8 `[height, width, 3]` arrays.

The accelerator normalises (`models.layers.normalize_images`), so every result is uint8. docs/images.md describes the
decoding of each kind of file, and how far its pixels are from TensorFlow's.
"""

import contextlib
import dataclasses
import functools
import math
import re

import cv2
import numpy as np
import simplejpeg

from vit_jax.data import image_headers as headers
from vit_jax.data.image_headers import JPEG_END, JPEG_START, UPRIGHT, ImageError, JpegHeader
from vit_jax.data.randaugment import RandAugment
from vit_jax.errors import UserError, unknown_name

# OpenCV's threads would compete with the pipeline's, and its warnings repeat our errors.
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

_CROP_DRAWS = 100  # after so many failed draws, the crop is the whole image
# `decode` applies the EXIF orientation, not OpenCV.
_IMREAD_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def size_of(encoded: bytes, *, exif_orientation: bool = False) -> tuple[int, int]:
    """Reads height and width in pixels from the header, in a microsecond or two.

    Args:
      encoded: JPEG, PNG, GIF, WebP or BMP.
      exif_orientation: whether to apply the EXIF orientation.

    Raises:
      ImageError: another format, or more than `MAX_PIXELS`.
    """
    header = headers.jpeg_header(encoded) if encoded.startswith(JPEG_START) else None
    height, width = (header.height, header.width) if header else headers.stored_size(encoded)
    return headers.orientation_of(encoded, header).size(height, width) if exif_orientation else (height, width)


def decode(encoded: bytes, *, exif_orientation: bool = False) -> np.ndarray:
    """Decodes JPEG, PNG, GIF, WebP or BMP to uint8 RGB `[height, width, 3]`.

    The pixels are those of `tf.io.decode_image` (docs/images.md lists exceptions). Animations give their first frame;
    transparency is dropped.

    Args:
      encoded: the file.
      exif_orientation: whether to apply the EXIF orientation, which TensorFlow ignores.

    Raises:
      ImageError: the file is not an image, is truncated or damaged, or has more than `MAX_PIXELS`. Libraries often fill
        the missing part of a truncated JPEG with grey without an error; a model should not learn that.
    """
    header = headers.jpeg_header(encoded) if encoded.startswith(JPEG_START) else None
    image = _decode_jpeg(encoded, header) if header else _decode_with_opencv(headers.plain(encoded))
    orientation = headers.orientation_of(encoded, header) if exif_orientation else UPRIGHT
    return orientation.upright(image) if orientation else image


def decode_crop(
    encoded: bytes, top: int, left: int, height: int, width: int, *, exif_orientation: bool = False
) -> np.ndarray:
    """Decodes the pixels of `decode(encoded)[top : top + height, left : left + width]`, but faster.

    A sequential JPEG is decoded down to the crop's last row. Entropy decoding is most of the work and has no shortcut
    to the first row or column. Damage below the crop may go unnoticed, as in TensorFlow's `decode_and_crop_jpeg`; a
    missing end does not.

    Args:
      encoded: JPEG, PNG, GIF, WebP or BMP.
      top: first row of the crop.
      left: first column of the crop.
      height: of the crop, in pixels.
      width: of the crop, in pixels.
      exif_orientation: whether to apply the EXIF orientation before the crop.

    Returns:
      uint8 RGB `[height, width, 3]`, perhaps a view of the decoded rows.

    Raises:
      ImageError: as for `decode`.
      UserError: the crop exceeds the image.
    """
    header = headers.jpeg_header(encoded) if encoded.startswith(JPEG_START) else None
    stored = (header.height, header.width) if header else headers.stored_size(encoded)
    orientation = headers.orientation_of(encoded, header) if exif_orientation else UPRIGHT
    full_height, full_width = orientation.size(*stored)
    if min(top, left) < 0 or min(height, width) < 1 or top + height > full_height or left + width > full_width:
        raise UserError(
            f"the crop of {height} x {width} pixels (height x width) at row {top} and column {left} exceeds the image "
            f"of {full_height} x {full_width}."
        )
    top, left, height, width = orientation.stored_crop(top, left, height, width, stored)
    # Chroma at half the height is interpolated from the row below, so decode one row more. (Compared for every height
    # with 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1 and grey.)
    rows = top + height + 1
    image = None
    if header and header.sequential and not header.stray and rows < header.height:
        # `decode` below raises the error for a damaged file.
        with contextlib.suppress(ValueError, KeyError):
            image = _decode_rows(encoded, header, rows)
    crop = (decode(encoded) if image is None else image)[top : top + height, left : left + width]
    return orientation.upright(crop) if orientation else crop


def _decode_jpeg(encoded: bytes, header: JpegHeader) -> np.ndarray:
    # A decoder would fill the missing pixels with grey.
    if header.huffman and header.height * header.width > headers.JPEG_RATIO * len(encoded):
        raise ImageError(f"not a whole JPEG ({len(encoded):,} bytes for {header.height:,} x {header.width:,} pixels)")
    # Stray bytes between segments harm no pixel and occur in ImageNet, but simplejpeg refuses them.
    for start, end in reversed(header.stray):
        encoded = encoded[:start] + encoded[end:]
    try:
        return _decode_rows(encoded, header, header.height)
    except (ValueError, KeyError) as error:
        # libjpeg decodes any chroma subsampling, simplejpeg only those with a name. OpenCV does not report a missing
        # end.
        if (isinstance(error, KeyError) or "subsampling" in str(error)) and JPEG_END in encoded[-1024:]:
            return _decode_with_opencv(encoded)
        raise ImageError(f"not a whole JPEG ({error})") from error


def _decode_rows(encoded: bytes, header: JpegHeader, rows: int) -> np.ndarray:
    """Decodes the first `rows` rows. ValueError: damage, or no end; KeyError: unknown chroma subsampling."""
    data: bytes | bytearray = encoded
    if rows < header.height:
        data = bytearray(encoded)
        data[header.position : header.position + 2] = rows.to_bytes(2, "big")
    colorspace = "CMYK" if header.channels == 4 else "RGB"
    # Our own buffer keeps the pixels when the decoder reports extra bytes after the last row. strict=False would hide
    # damage in the rows too. libjpeg reports only the first problem, so extra bytes mean that the rows are whole.
    # Measured on 300 photographs of ImageNet, neither strict=False nor a shared buffer is faster (1-2 %, within noise).
    pixels = np.empty((rows, header.width, len(colorspace)), np.uint8)
    simplejpeg.decode_jpeg_header(data)  # reports a damaged header, which would leave the buffer unfilled
    try:
        simplejpeg.decode_jpeg(data, colorspace, fastdct=True, buffer=pixels)
    except ValueError as error:
        # Extra bytes before a restart marker (d0 to d7) are among the pixels, not after them.
        behind = re.search("extraneous bytes before marker 0x(?!d[0-7])", str(error))
        if not behind or JPEG_END not in encoded[-1024:]:
            raise
    return _to_rgb(pixels, encoded)


def _to_rgb(pixels: np.ndarray, encoded: bytes) -> np.ndarray:
    """Maps CMYK to RGB as TensorFlow does, without colour profiles; returns RGB unchanged."""
    if pixels.shape[-1] == 3:
        return pixels
    if b"\xff\xee\x00\x0eAdobe" not in encoded:
        pixels = 255 - pixels  # Adobe's programs store light, others ink
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
    aspect_ratios: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draws the crop of Inception training (Szegedy et al., 2015), with TensorFlow's distribution.

    Like TensorFlow's `sample_distorted_bounding_box`, it draws the aspect ratio and then the crop's *height* uniformly
    within the area bounds. Drawing the area uniformly would give larger crops than the paper's. TensorFlow's default
    for the largest aspect ratio is 1.33.

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
      rng: source of randomness.
      min_area: smallest share of the image.
      aspect_ratios: smallest and largest width / height of the crop.

    Returns:
      top, left, height and width of the crop, in pixels.
    """
    smallest, largest = min_area * height * width, height * width
    for _ in range(_CROP_DRAWS):
        draw_aspect, draw_height, draw_top, draw_left = rng.random(4).tolist()
        aspect = aspect_ratios[0] + draw_aspect * (aspect_ratios[1] - aspect_ratios[0])
        tallest = min(round(math.sqrt(largest / aspect)), height, int((width + 0.5) / aspect))
        crop_height = min(round(math.sqrt(smallest / aspect)), tallest)
        crop_height += int(draw_height * (tallest - crop_height + 1))
        # Rounding may put the area just outside its bounds.
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


# OpenCV resizes uint8 in fixed point: with bilinear interpolation, 12 % of a photograph's values are not the nearest
# integer, and the mean is 0.12 too dark. float32 is exact, and costs 15 us more per crop and 25 us less per whole image
# (of about 1,000 us). `cv2.convertScaleAbs` rounds faster than NumPy, and no value here is negative.
def _resize_bilinear(image: np.ndarray, height: int, width: int) -> np.ndarray:
    resized = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.convertScaleAbs(resized)


def _resize_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
    shrunk = min(height, image.shape[0]), min(width, image.shape[1])
    resized = cv2.resize(image.astype(np.float32), shrunk[::-1], interpolation=cv2.INTER_AREA)
    # When enlarging, OpenCV is a pixel off where borders of old and new pixels coincide.
    if shrunk != (height, width):
        resized = _mix(resized, _area_taps(shrunk[0], height), _area_taps(shrunk[1], width))
    return cv2.convertScaleAbs(resized)


def _resize_bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    # OpenCV's kernel has a = -0.75, and Pillow's averages when it shrinks.
    resized = _mix(image, _cubic_taps(image.shape[0], height), _cubic_taps(image.shape[1], width))
    return np.rint(resized).clip(0, 255).astype(np.uint8)


# For each pixel of a side the source pixels, int `[taps, size]`, and their weights, float32 `[taps, size]`.
_Taps = tuple[np.ndarray, np.ndarray]


def _mix(image: np.ndarray, rows: _Taps, columns: _Taps) -> np.ndarray:
    image = np.einsum("th,thwc->hwc", rows[1], image[rows[0]].astype(np.float32))
    return np.einsum("tw,htwc->hwc", columns[1], image[:, columns[0]])


@functools.lru_cache(maxsize=256)
def _area_taps(length: int, size: int) -> _Taps:
    """Taps for enlarging, where a new pixel overlaps one or two old ones."""
    new = np.arange(size)
    first = new * length // size
    second = ((new + 1) * length - (first + 1) * size).clip(0) / length
    taps = np.stack([first, (first + 1).clip(max=length - 1)])
    return taps, np.stack([1 - second, second]).astype(np.float32)


@functools.lru_cache(maxsize=256)
def _cubic_taps(length: int, size: int) -> _Taps:
    """Taps of Keys's kernel (1981) with a = -0.5. Pixels beyond the border have weight 0."""
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
      method: "bilinear" interpolates the four nearest pixels without antialiasing, as the paper's input pipeline does;
        "area" averages the rectangle that becomes a pixel; "bicubic" applies Keys's kernel with a = -0.5 to the 16
        nearest pixels, also without antialiasing.

    Returns:
      uint8 `[height, width, 3]`.
    """
    _check_method(method)
    return _RESIZES[method](image, height, width)


def resize_small(image: np.ndarray, size: int, method: str = "bilinear") -> np.ndarray:
    """Resizes the shorter side to `size`, keeping the aspect ratio.

    Args:
      image: uint8 `[any height, any width, 3]`.
      size: of the shorter side, in pixels.
      method: of `resize`; big_vision uses "area".

    Raises:
      ImageError: the result would have more than `MAX_PIXELS`.
    """
    height, width = small_size(image.shape[0], image.shape[1], size)
    headers.checked_size(height, width)  # 1 x 20,000 pixels would take 16 GB
    return resize(image, height, width, method)


def small_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Computes height and width after resizing the shorter side to `size` with the same aspect ratio."""
    # big_vision computes in float32 and rounds half to even; so do we, so that halves give the same sides.
    scale = np.float32(size) / np.float32(min(height, width))
    return int(np.rint(np.float32(height) * scale)), int(np.rint(np.float32(width) * scale))


def central_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the central `size` x `size` square, the upper left one of two.

    Raises:
      UserError: the image is smaller.
    """
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    if min(top, left) < 0:
        raise UserError(f"cannot cut {size} x {size} pixels out of {image.shape[0]} x {image.shape[1]}. Resize first.")
    return image[top : top + size, left : left + size]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts a `size` x `size` square at a uniformly random position."""
    top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Transforms training images: crop, resize, flip and RandAugment, in this order.

    Attributes:
      image_size: side of the result, in pixels.
      inception_crop: whether to draw an Inception crop; otherwise the whole image is resized.
      min_area: smallest share of the image in an Inception crop.
      flip: whether to mirror half of the images.
      resize: method of `resize`.
      randaugment: applied after crop and flip; None for nothing.
      random_crop_from: resizes the whole image to a square of this side and cuts `image_size` at random, as
        BiT-HyperRule does (160 and 128, or 512 and 480). Excludes `inception_crop`.
      exif_orientation: whether to apply the EXIF orientation first; None: as the source of the image says.
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
            raise UserError("data.inception_crop and data.random_crop_from exclude each other. Set one.")
        if self.random_crop_from < self.image_size:
            raise UserError(
                f"data.random_crop_from {self.random_crop_from} is less than data.image_size {self.image_size}. Use a "
                "larger value, or None to resize the whole image."
            )

    def __call__(
        self, image: bytes | np.ndarray, rng: np.random.Generator, *, exif_orientation: bool = False
    ) -> np.ndarray:
        """Maps an encoded file, or decoded uint8 `[height, width, 3]`, to uint8 `[image_size, image_size, 3]`.

        Both give the same result; a file is decoded only as far as needed.

        Args:
          image: the image.
          rng: source of randomness.
          exif_orientation: the source's choice (`Example`), used if the attribute is None.
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
    """Transforms evaluation images, without randomness.

    Attributes:
      image_size: side of the result, in pixels.
      resize_small: size of the shorter side before the central crop; None resizes the whole image to a square,
        whatever its shape, as the released fine-tuning does.
      resize: method of `resize`.
      crop_from: resizes the whole image to a square of this side before the central crop, as the released few-shot
        evaluation does. Excludes `resize_small`.
      exif_orientation: as in `TrainTransform`.
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
                f"data.eval_resize_small {self.resize_small} is less than data.image_size {self.image_size}. Use a "
                "larger value, or None to resize the whole image."
            )
        if self.crop_from is not None and self.crop_from < self.image_size:
            raise UserError(f"crop_from {self.crop_from} must be at least the image size, {self.image_size}.")
        if self.crop_from is not None and self.resize_small is not None:
            raise UserError(f"set either crop_from ({self.crop_from}) or resize_small ({self.resize_small}), not both.")

    def __call__(self, image: bytes | np.ndarray, *, exif_orientation: bool = False) -> np.ndarray:
        """Maps an encoded file, or decoded uint8 `[height, width, 3]`, to uint8 `[image_size, image_size, 3]`.

        Args:
          image: the image.
          exif_orientation: the source's choice (`Example`), used if the attribute is None.
        """
        if isinstance(image, bytes):
            turn = exif_orientation if self.exif_orientation is None else self.exif_orientation
            image = decode(image, exif_orientation=turn)
        if self.crop_from is not None:
            return central_crop(resize(image, self.crop_from, self.crop_from, self.resize), self.image_size)
        if self.resize_small is None:
            return resize(image, self.image_size, self.image_size, self.resize)
        return central_crop(resize_small(image, self.resize_small, self.resize), self.image_size)
