"""Finds near-duplicate images by perceptual hashes.

Near-duplicates differ in few bits of two hashes: one of 64 bits, which finds candidates quickly, and one of 256 bits,
which rejects images that only look similar.
"""

import base64
import io
import itertools

import imagehash
import numpy as np
from PIL import Image, ImageOps

from vit_jax.data.image_headers import JPEG_START, orientation_of, plain
from vit_jax.data.transforms import size_of

NEAR, SURE = 11, 72
"""Most bits of 64 and of 256 that differ. docs/prepare.md describes what these limits find and miss."""

WORDS = 5  # uint64: the short hash, and four of the long one
_BANDS, _BAND_BITS = 4, 16
_QUERIES_AT_ONCE = 1024
_HASHED_SIDE = 128  # pixels; JPEGs are decoded at the smallest scale with larger sides
_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # Pillow's for damaged files
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")


def hash_image(image: bytes | np.ndarray, *, mirrored: bool = False) -> np.ndarray:
    """Computes the hashes of an image, uint64 `[5]`.

    Args:
      image: an encoded file, or uint8 `[height, width, 3]`.
      mirrored: whether to hash the mirror image.

    Raises:
      OSError: not an image.
    """
    grey = _open(image, _HASHED_SIDE, "L")
    if mirrored:
        grey = ImageOps.mirror(grey)
    bits = [imagehash.phash(grey, hash_size=side).hash.ravel() for side in (8, 16)]
    return np.packbits(np.concatenate(bits)).view(np.uint64)


def find_pairs(
    queries: np.ndarray, targets: np.ndarray, *, near: int = NEAR, sure: int = SURE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds all pairs of near-duplicates without comparing every pair.

    If two hashes of four bands differ in at most `near` bits, at least one band differs in at most a quarter of them
    (Norouzi et al., 2012). Only pairs with such a band are compared.

    Args:
      queries: hashes uint64 `[queries, 5]`.
      targets: hashes uint64 `[targets, 5]`.
      near: most differing bits of the short hash.
      sure: most differing bits of the long hash.

    Returns:
      three sorted arrays `[pairs]`: positions among the queries and the targets, and differing bits of the long hash.
    """
    masks = _masks(near // _BANDS)
    bands = [_band(targets, band) for band in range(_BANDS)]
    orders = [np.argsort(band, kind="stable") for band in bands]
    starts = [
        np.searchsorted(band[order], np.arange(2**_BAND_BITS + 1)) for band, order in zip(bands, orders, strict=True)
    ]
    found: list[np.ndarray] = [np.zeros((0,), np.int64)]
    for first in range(0, len(queries), _QUERIES_AT_ONCE):
        chunk = queries[first : first + _QUERIES_AT_ONCE]
        keys: list[np.ndarray] = []
        for band in range(_BANDS):
            buckets = _band(chunk, band)[:, None] ^ masks[None]
            begin = starts[band][buckets].ravel()
            counts = starts[band][buckets.astype(np.int64) + 1].ravel() - begin
            query = np.repeat(np.repeat(np.arange(len(chunk)), len(masks)), counts)
            inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            target = orders[band][np.repeat(begin, counts) + inside]
            close = np.bitwise_count(chunk[query, 0] ^ targets[target, 0]) <= near
            keys.append((query[close] + first) * len(targets) + target[close])
        found.append(np.unique(np.concatenate(keys)))
    query, target = np.divmod(np.concatenate(found), max(len(targets), 1))
    distance = np.bitwise_count(queries[query, 1:] ^ targets[target, 1:]).sum(-1, dtype=np.int64)
    sure_ones = distance <= sure
    return query[sure_ones], target[sure_ones], distance[sure_ones]


def _masks(radius: int) -> np.ndarray:
    """All uint16 with at most `radius` bits set."""
    sets = itertools.chain.from_iterable(itertools.combinations(range(_BAND_BITS), size) for size in range(radius + 1))
    return np.array([sum(1 << bit for bit in bits) for bits in sets], np.uint16)


def _band(hashes: np.ndarray, band: int) -> np.ndarray:
    return (hashes[:, 0] >> np.uint64(_BAND_BITS * band)).astype(np.uint16)


def hash_or_zero(image: bytes | np.ndarray, *, mirrored: bool = False) -> np.ndarray:
    """Like `hash_image`, but zeros for an image that cannot be decoded."""
    try:
        return hash_image(image, mirrored=mirrored)
    except _ERRORS:
        return np.zeros((WORDS,), np.uint64)


def thumbnail(image: bytes | np.ndarray) -> str:
    """Returns an HTML image with embedded data, of at most 160 x 160 pixels."""
    try:
        opened = _open(image, 160, "RGB")
    except _ERRORS:
        return "(cannot be shown)"
    opened.thumbnail((160, 160))
    encoded = io.BytesIO()
    opened.save(encoded, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}">'


def _open(image: bytes | np.ndarray, side: int, mode: str) -> Image.Image:
    """Opens an image upright, so that a photo matches its upright copy, JPEGs in at least this size."""
    if not isinstance(image, bytes):
        return Image.fromarray(image).convert(mode)
    size_of(image)  # refuses what `decode` refuses; Pillow reads more formats, some by external programs
    opened = Image.open(io.BytesIO(image if image.startswith(JPEG_START) else plain(image)), formats=_FORMATS)
    opened.draft("RGB", (side, side))
    converted, orientation = opened.convert(mode), orientation_of(image)
    return Image.fromarray(orientation.upright(np.asarray(converted))) if orientation else converted
