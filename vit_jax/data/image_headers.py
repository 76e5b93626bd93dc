"""Headers of image files: format, size, EXIF orientation, and checks that the file can hold its pixels.

Nothing is decoded, and no allocation depends on what a file claims. All functions accept untrusted bytes.
"""

import dataclasses
import struct
from collections.abc import Iterator

import numpy as np

from vit_jax.errors import UserError

# A quarter of a GiB of RGB, Pillow's default; 16 threads that decode such images at once need 4 GiB. A file of a few
# hundred bytes can claim 65,535 x 65,535 pixels, for which a decoder would allocate 12 GiB.
MAX_PIXELS = 2**28 // 3

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of the segments with the size
_JPEG_HUFFMAN = frozenset(range(0xC0, 0xC8)) - {0xC4}
_BMP_HEADERS = tuple(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 64, 108, 124))
_MOST_PARTS = 2**18  # segments or chunks of a file; IDAT chunks of 8 kB, as libpng writes them, are 2 GiB
_EXIF = b"Exif\0\0"

_DEFLATE_RATIO = 1032  # most bytes that one compressed byte expands to
JPEG_RATIO = 512  # most pixels per byte: a Huffman code takes at least a bit per block of 8 x 8


class ImageError(UserError):
    """Bytes that are not a whole, readable image that fits into memory."""


@dataclasses.dataclass(frozen=True)
class JpegHeader:
    """The header of a JPEG.

    Attributes:
      position: offset of the two bytes with the height.
      height: in pixels, as stored.
      width: in pixels, as stored.
      channels: 1 (grey), 3 or 4 (CMYK).
      sequential: whether rows are coded once, in order, without restart markers. A decoder then stops early if the
        height in the header is reduced.
      huffman: whether pixels are Huffman-coded, not arithmetically.
      stray: start and end of each run of bytes that belongs to no segment.
      exif: start and end of the EXIF data; None if there are none.
    """

    position: int
    height: int
    width: int
    channels: int
    sequential: bool
    huffman: bool
    stray: tuple[tuple[int, int], ...]
    exif: tuple[int, int] | None


def jpeg_header(encoded: bytes) -> JpegHeader:
    """Walks the segments up to the pixels. Libraries give the size, but not its offset.

    Raises:
      ImageError: the file ends before the pixels, or has more than `MAX_PIXELS`.
    """
    at, position, frame, restarts = 2, 0, 0, False
    stray: list[tuple[int, int]] = []
    exif: tuple[int, int] | None = None
    try:
        for _ in range(_MOST_PARTS):
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
            elif marker != 0x01 and not 0xD0 <= marker <= 0xD9:  # those have no content
                end = at + int.from_bytes(encoded[at : at + 2], "big")
                if marker in _JPEG_FRAMES and not position:
                    position, frame = start + 5, marker
                elif marker == 0xE1 and exif is None and encoded.startswith(_EXIF, at + 2):
                    exif = at + 2 + len(_EXIF), end
                restarts |= marker == 0xDD  # restart interval
                at = end
        else:
            raise IndexError
        height, width, channels = struct.unpack_from(">HHB", encoded, position)
        sequential = frame in (0xC0, 0xC1) and not restarts and encoded[at + 2] == channels
    except (ValueError, IndexError, struct.error) as error:
        raise ImageError("not a whole JPEG (it ends before the pixels)") from error
    if not position:
        raise ImageError("not a JPEG (it has no size)")
    huffman = frame in _JPEG_HUFFMAN
    return JpegHeader(position, *checked_size(height, width), channels, sequential, huffman, tuple(stray), exif)


def checked_size(height: int, width: int) -> tuple[int, int]:
    """Returns height and width if such an image may be decoded.

    Raises:
      ImageError: the image has no pixels or more than `MAX_PIXELS`.
    """
    if height <= 0 or width <= 0:
        raise ImageError(f"an image of {height} x {width} pixels (height x width)")
    if height * width > MAX_PIXELS:
        raise ImageError(
            f"an image of {height:,} x {width:,} pixels (height x width); at most {MAX_PIXELS:,} are decoded, a "
            "quarter of a GiB. Shrink it."
        )
    return height, width


def stored_size(encoded: bytes) -> tuple[int, int]:
    """Reads the stored height and width in pixels of PNG, GIF, WebP or BMP.

    Raises:
      ImageError: another format, or more than `MAX_PIXELS`.
    """
    try:
        if encoded.startswith(PNG_START) and encoded[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", encoded, 16)
        elif encoded[:6] in (b"GIF87a", b"GIF89a"):
            width, height = struct.unpack_from("<HH", encoded, 6)
        elif encoded.startswith(b"RIFF") and encoded[8:15] == b"WEBPVP8":
            width, height = _webp_size(encoded)
        elif encoded.startswith(b"BM"):
            old = encoded[14:18] == b"\x0c\0\0\0"  # the header of OS/2 1.x
            width, height = struct.unpack_from("<HH" if old else "<ii", encoded, 18)
            height = abs(height)  # negative if the first row is the top one
        else:
            raise ImageError("not an image (neither JPEG, PNG, GIF, WebP nor BMP)" if encoded else "an empty file")
    except struct.error as error:
        raise ImageError("not a whole image (it ends within its header)") from error
    return checked_size(height, width)


def looks_like_image(start: bytes) -> bool:
    """Whether the first 32 bytes of a file are those of a known image format."""
    return (
        start.startswith((b"\xff\xd8\xff", PNG_START, b"GIF87a", b"GIF89a"))
        or (start.startswith(b"RIFF") and start[8:15] == b"WEBPVP8")
        # Texts may begin with BM too. A BMP has a reserved field of zeros, and a header of a known size.
        or (start.startswith(b"BM") and start[6:10] == bytes(4) and start[14:18] in _BMP_HEADERS)
    )


def _webp_size(encoded: bytes, at: int = 12) -> tuple[int, int]:
    """Width and height, in one of WebP's three encodings (RFC 9649, sections 2.5-2.7)."""
    kind = encoded[at + 3 : at + 4]
    if kind == b"X":  # the canvas of an animation or an image with extras
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", encoded, at + 12)
        return low_width + (high_width << 16) + 1, low_height + (high_height << 16) + 1
    if kind == b"L":
        (bits,) = struct.unpack_from("<I", encoded, at + 9)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", encoded, at + 14)
    return width & 0x3FFF, height & 0x3FFF  # the upper two bits are a scale that decoders ignore


# ---- Whether the file can hold its pixels.


def plain(encoded: bytes) -> bytes:
    """Checks a PNG, GIF, WebP or BMP, and drops the chunks of a PNG that do not change a pixel.

    OpenCV allocates what a chunk of a PNG claims, up to 4 GB. Chunks other than pixels (texts, profiles, frames of
    animations) are dropped, so that no decoder inflates them.

    Raises:
      ImageError: the file is truncated, or too small for its pixels.
    """
    height, width = stored_size(encoded)
    if encoded.startswith(PNG_START):
        return _plain_png(encoded, height, width)
    if encoded.startswith(b"RIFF"):
        _check_webp(encoded, height, width)
    elif encoded.startswith(b"BM"):
        _check_bmp(encoded, height, width)
    return encoded


def _chunks(encoded: bytes, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields the chunks of a PNG or WebP between two offsets: kind, and start and end of the content."""
    is_png = encoded.startswith(PNG_START)
    for _ in range(_MOST_PARTS):
        if begin + 8 > end and not is_png:  # a PNG has a last chunk
            return
        first, second = encoded[begin : begin + 4], encoded[begin + 4 : begin + 8]
        kind, size = (second, int.from_bytes(first, "big")) if is_png else (first, int.from_bytes(second, "little"))
        stop = begin + 8 + size
        if stop + 4 * is_png > end:
            raise ImageError("not a whole image: truncated or damaged (a part of it ends beyond the file)")
        yield kind, begin + 8, stop
        if kind == b"IEND":
            return
        begin = stop + (4 if is_png else size % 2)  # a checksum, or padding
    raise ImageError(f"an image of more than {_MOST_PARTS:,} parts")


def _plain_png(encoded: bytes, height: int, width: int) -> bytes:
    kept, dropped, compressed = [encoded[: len(PNG_START)]], False, 0
    for kind, begin, end in _chunks(encoded, len(PNG_START), len(encoded)):
        if kind[0] & 0x20 and kind != b"tRNS":  # ancillary
            dropped = True
            continue
        compressed += end - begin if kind == b"IDAT" else 0
        kept.append(encoded[begin - 8 : end + 4])
    depth, colour = encoded[24], encoded[25]
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)
    if height * (-(-width * bits // 8) + 1) > _DEFLATE_RATIO * (compressed + 16):
        raise ImageError(f"not a whole image: {compressed:,} bytes for {height:,} x {width:,} pixels")
    return b"".join(kept) if dropped else encoded


def _check_webp(encoded: bytes, height: int, width: int) -> None:
    whole = 8 + int.from_bytes(encoded[4:8], "little")
    if whole > len(encoded) + 1:  # the last chunk may lack its padding
        raise ImageError("not a whole image: truncated or damaged (a part of it ends beyond the file)")
    try:
        for kind, begin, _ in _chunks(encoded, 12, min(whole, len(encoded))):
            if kind in (b"VP8 ", b"VP8L") and _webp_size(encoded, begin - 8) != (width, height):
                raise ImageError("a damaged image (its frame and its canvas have different sizes)")
    except struct.error as error:
        raise ImageError("not a whole image (it ends within a header)") from error


def _check_bmp(encoded: bytes, height: int, width: int) -> None:
    try:
        (start,) = struct.unpack_from("<I", encoded, 10)
        (header,) = struct.unpack_from("<I", encoded, 14)
        (bits,) = struct.unpack_from("<H", encoded, 24 if header == 12 else 28)
        compression = 0 if header == 12 else struct.unpack_from("<I", encoded, 30)[0]
        colours = 0 if header == 12 else struct.unpack_from("<I", encoded, 46)[0]
    except struct.error as error:
        raise ImageError("not a whole image (it ends within its header)") from error
    if header.to_bytes(4, "little") not in _BMP_HEADERS or colours > 256 or start > len(encoded):
        raise ImageError("a damaged image (its header is invalid)")
    if compression in (0, 3) and start + height * (-(-width * bits // 32) * 4) > len(encoded) + 3:
        raise ImageError("not a whole image: it has fewer bytes than its pixels need")


# ---- Orientation.

_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True)
class Orientation:
    """One of EXIF's eight orientations: how to turn the stored image upright. The transposition comes last."""

    transposed: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False

    def __bool__(self) -> bool:
        return self != UPRIGHT

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Converts height and width between the stored and the upright image."""
        return (width, height) if self.transposed else (height, width)

    def stored_crop(
        self, top: int, left: int, height: int, width: int, stored: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        """Converts a crop of the upright image to the stored one, whose height and width are `stored`."""
        if self.transposed:
            top, left, height, width = left, top, width, height
        if self.rows_reversed:
            top = stored[0] - top - height
        if self.columns_reversed:
            left = stored[1] - left - width
        return top, left, height, width

    def upright(self, image: np.ndarray) -> np.ndarray:
        """Turns the stored image `[height, width, channels]`, or a crop of it, upright."""
        image = image[:: -1 if self.rows_reversed else 1, :: -1 if self.columns_reversed else 1]
        return np.ascontiguousarray(image.swapaxes(0, 1) if self.transposed else image)


UPRIGHT = Orientation()


def orientation_of(encoded: bytes, header: JpegHeader | None = None) -> Orientation:
    """Reads the EXIF orientation of JPEG, PNG or WebP; upright if it is missing or invalid.

    Args:
      encoded: a file.
      header: of a JPEG, if it has been read already.
    """
    try:
        begin, end = _find_exif(encoded, header)
        number = _read_orientation(encoded[begin:end])
    except (ImageError, struct.error):
        return UPRIGHT
    return Orientation(5 <= number <= 8, number in (3, 4, 6, 7), number in (2, 3, 7, 8))


def _find_exif(encoded: bytes, header: JpegHeader | None) -> tuple[int, int]:
    """Finds start and end of the EXIF data; an empty range if there are none."""
    if encoded.startswith(JPEG_START):
        return (header or jpeg_header(encoded)).exif or (0, 0)
    if encoded.startswith(PNG_START):
        first, wanted = len(PNG_START), b"eXIf"
    elif encoded.startswith(b"RIFF") and encoded[8:16] == b"WEBPVP8X":
        first, wanted = 12, b"EXIF"
    else:
        return 0, 0
    for kind, begin, end in _chunks(encoded, first, len(encoded)):
        if kind == wanted:
            return begin + (len(_EXIF) if encoded.startswith(_EXIF, begin) else 0), end
    return 0, 0


def _read_orientation(exif: bytes) -> int:
    """Reads the orientation, 1 to 8, from EXIF data, which are a TIFF file; 1 if there is none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", exif, entry)
        if tag == _ORIENTATION and values == 1 and kind in (3, 4):  # a short or a long
            return struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", exif, entry + 8)[0]
    return 1
