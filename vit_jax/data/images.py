"""From encoded bytes to the pixels a model sees: decode, crop, resize, flip. All on uint8 `[height, width, 3]` arrays.

The accelerator normalises (`train_step.normalize_images`), so nothing that leaves here is floating point. What becomes
of which kind of file, and how far the pixels are from TensorFlow's, is in docs/images.md.
"""

import contextlib
import dataclasses
import functools
import math
import re
import struct

import cv2
import numpy as np
import simplejpeg

from vit_jax.data.augment import RandAugment
from vit_jax.errors import UserError, unknown_name

# OpenCV's own threads would fight with the pipeline's, and its warnings repeat what our errors say better.
cv2.setNumThreads(0)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# A quarter of a GiB of RGB, as Pillow's default; 16 threads that load such images at once need 4 GiB. A file of a few
# hundred bytes can claim 65,535 x 65,535 pixels, for which a decoder would ask for 12 GiB.
MAX_PIXELS = 2**28 // 3

# Not turned by what EXIF says, as TensorFlow and the JPEG decoder below do not either.
_IMREAD_FLAGS = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers that say the size


class ImageError(UserError):
    """Bytes that are not a whole, readable image of a size that fits into memory."""


@dataclasses.dataclass(frozen=True)
class _JpegHeader:
    """What a JPEG says before its pixels.

    Attributes:
      position: of the two bytes that hold the height.
      height: in pixels.
      width: in pixels.
      channels: 1 (grey), 3 or 4 (CMYK).
      sequential: whether rows are coded one after the other, once, and without restart markers. Then a decoder that is
        told of fewer rows stops after them.
      stray: from where to where bytes lie between segments that belong to none.
    """

    position: int
    height: int
    width: int
    channels: int
    sequential: bool
    stray: tuple[tuple[int, int], ...]


def _jpeg_header(encoded: bytes) -> _JpegHeader:
    """Walks from segment to segment up to the pixels; libraries tell the size, but not where it stands."""
    at, position, sequential, restarts = 2, 0, False, False
    stray: list[tuple[int, int]] = []
    try:
        while True:
            start = encoded.index(b"\xff", at)
            if start > at:
                stray.append((at, start))
            marker, at = encoded[start + 1], start + 2
            if marker == 0xFF:  # padding
                at = start + 1
            elif marker == 0x00:
                stray.append((start, at))
            elif marker == 0xDA:  # start of scan
                break
            elif marker != 0x01 and not 0xD0 <= marker <= 0xD9:  # these have no content
                if marker in _JPEG_FRAMES and not position:
                    position, sequential = start + 5, marker in (0xC0, 0xC1)
                elif marker == 0xDD:  # restart interval
                    restarts = True
                at += int.from_bytes(encoded[at : at + 2], "big")
        height, width, channels = struct.unpack_from(">HHB", encoded, position)
        sequential = sequential and not restarts and encoded[at + 2] == channels
    except (ValueError, IndexError, struct.error) as error:
        raise ImageError("not a whole JPEG (it ends before the pixels)") from error
    if not position:
        raise ImageError("not a JPEG (it does not say its size)")
    return _JpegHeader(position, *_checked_size(height, width), channels, sequential, tuple(stray))


def _checked_size(height: int, width: int) -> tuple[int, int]:
    if height <= 0 or width <= 0:
        raise ImageError(f"an image of {height} x {width} pixels (height x width)")
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"an image of {height:,} x {width:,} pixels (height x width); at most {MAX_PIXELS:,} are decoded, a "
            "quarter of a GiB. Make it smaller."
        )
    return height, width


def size_of(encoded: bytes) -> tuple[int, int]:
    """Height and width in pixels, from the header alone; a microsecond or two.

    Raises:
      ImageError: not JPEG, PNG, GIF, WebP or BMP, or more than `MAX_PIXELS`.
    """
    if encoded.startswith(_JPEG_START):
        header = _jpeg_header(encoded)
        return header.height, header.width
    try:
        if encoded.startswith(b"\x89PNG\r\n\x1a\n") and encoded[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", encoded, 16)
        elif encoded[:6] in (b"GIF87a", b"GIF89a"):
            width, height = struct.unpack_from("<HH", encoded, 6)
        elif encoded.startswith(b"RIFF") and encoded[8:15] == b"WEBPVP8":
            width, height = _webp_size(encoded)
        elif encoded.startswith(b"BM"):
            old = encoded[14:18] == b"\x0c\0\0\0"  # the header of OS/2 1.x
            width, height = struct.unpack_from("<HH" if old else "<ii", encoded, 18)
            height = abs(height)  # negative where the first row is the uppermost
        else:
            raise ImageError("not an image (neither JPEG, PNG, GIF, WebP nor BMP)" if encoded else "an empty file")
    except struct.error as error:
        raise ImageError("not a whole image (it ends within its header)") from error
    return _checked_size(height, width)


def looks_like_image(start: bytes) -> bool:
    """Whether a file begins as an image of a known kind does; of `start` 32 bytes are enough."""
    return (
        start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"))
        or (start.startswith(b"RIFF") and start[8:15] == b"WEBPVP8")
        # Texts may begin with BM; these have a reserved field of zeros, and a header of a known size.
        or (start.startswith(b"BM") and start[6:10] == bytes(4) and start[14:18] in _BMP_HEADERS)
    )


def _webp_size(encoded: bytes) -> tuple[int, int]:
    """Width and height; WebP has three ways to write them (RFC 9649, sections 2.5-2.7)."""
    kind = encoded[15:16]
    if kind == b"X":  # the canvas of an animation or an image with extras
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", encoded, 24)
        return low_width + (high_width << 16) + 1, low_height + (high_height << 16) + 1
    if kind == b"L":
        (bits,) = struct.unpack_from("<I", encoded, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", encoded, 26)
    return width & 0x3FFF, height & 0x3FFF  # the upper bits are a scale that no decoder applies


def decode(encoded: bytes) -> np.ndarray:
    """Decodes JPEG, PNG, GIF, WebP or BMP to uint8 RGB `[height, width, 3]`.

    The pixels are those of `tf.io.decode_image` (docs/images.md has the exceptions). Of an animation it is the first
    frame; transparency is dropped; orientation in EXIF is ignored.

    Raises:
      ImageError: not an image, or a truncated or damaged one, or more than `MAX_PIXELS`. Libraries often fill the
        missing part of a truncated JPEG with grey and say nothing; a model should not learn that.
    """
    if encoded.startswith(_JPEG_START):
        return _decode_jpeg(encoded, _jpeg_header(encoded))
    size_of(encoded)
    return _decode_with_opencv(encoded)


def decode_crop(encoded: bytes, top: int, left: int, height: int, width: int) -> np.ndarray:
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

    Returns:
      uint8 RGB `[height, width, 3]`, a view of the rows that were decoded.

    Raises:
      ImageError: as for `decode`.
      UserError: the crop does not lie within the image.
    """
    header = _jpeg_header(encoded) if encoded.startswith(_JPEG_START) else None
    full_height, full_width = (header.height, header.width) if header else size_of(encoded)
    if min(top, left) < 0 or min(height, width) < 1 or top + height > full_height or left + width > full_width:
        raise UserError(
            f"the crop of {height} x {width} pixels (height x width) from row {top} and column {left} does not lie "
            f"within the image of {full_height} x {full_width}."
        )
    # Chroma that is stored at half the height is interpolated from the row below, so one more is decoded. (Compared
    # for every height with 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1 and grey.)
    rows = top + height + 1
    image = None
    if header and header.sequential and not header.stray and rows < full_height:
        # What is anything but whole is left to `decode`, which tells why.
        with contextlib.suppress(ValueError, KeyError):
            image = _decode_rows(encoded, header, rows)
    return (decode(encoded) if image is None else image)[top : top + height, left : left + width]


def _decode_jpeg(encoded: bytes, header: _JpegHeader) -> np.ndarray:
    # Stray bytes between segments harm no pixel, and ImageNet has such files. simplejpeg will not have them.
    for start, end in reversed(header.stray):
        encoded = encoded[:start] + encoded[end:]
    try:
        return _decode_rows(encoded, header, header.height)
    except (ValueError, KeyError) as error:
        # libjpeg decodes any subsampling of the chroma, simplejpeg those that have a name. OpenCV would not tell that
        # the end is missing.
        if (isinstance(error, KeyError) or "subsampling" in str(error)) and _JPEG_END in encoded[-1024:]:
            return _decode_with_opencv(encoded)
        raise ImageError(f"not a whole JPEG ({error})") from error


def _decode_rows(encoded: bytes, header: _JpegHeader, rows: int) -> np.ndarray:
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
        if not behind or _JPEG_END not in encoded[-1024:]:
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
    # In float32 and half to even, as big_vision computes it: sides that fall on a half come out the same.
    scale = np.float32(size) / np.float32(min(image.shape[:2]))
    height, width = (int(np.rint(np.float32(side) * scale)) for side in image.shape[:2])
    _checked_size(height, width)  # 1 x 20,000 pixels would take 16 GB
    return resize(image, height, width, method)


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
    """

    image_size: int
    inception_crop: bool = True
    min_area: float = 0.05
    flip: bool = True
    resize: str = "bilinear"
    randaugment: RandAugment | None = None
    random_crop_from: int | None = None

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

    def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Maps an encoded file, or decoded uint8 `[height, width, 3]`, to uint8 `[image_size, image_size, 3]`.

        The result is the same for both; a file is decoded no further than it is shown.
        """
        if self.inception_crop:
            height, width = size_of(image) if isinstance(image, bytes) else image.shape[:2]
            top, left, height, width = inception_crop_box(height, width, rng, min_area=self.min_area)
            if isinstance(image, bytes):
                pixels = decode_crop(image, top, left, height, width)
            else:
                pixels = image[top : top + height, left : left + width]
        else:
            pixels = decode(image) if isinstance(image, bytes) else image
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
    """

    image_size: int
    resize_small: int | None = None
    resize: str = "bilinear"
    crop_from: int | None = None

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

    def __call__(self, image: bytes | np.ndarray) -> np.ndarray:
        """Maps an encoded file, or decoded uint8 `[height, width, 3]`, to uint8 `[image_size, image_size, 3]`."""
        if isinstance(image, bytes):
            image = decode(image)
        if self.crop_from is not None:
            return central_crop(resize(image, self.crop_from, self.crop_from, self.resize), self.image_size)
        if self.resize_small is None:
            return resize(image, self.image_size, self.image_size, self.resize)
        return central_crop(resize_small(image, self.resize_small, self.resize), self.image_size)
