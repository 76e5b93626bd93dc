"""Headers of image files: orientation, and impossible claims."""

import dataclasses
import io
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.conftest import ROOT
from tests.data.test_transforms import jpeg, picture, replaced, save
from vit_jax.data import image_headers, transforms
from vit_jax.data.image_headers import PNG_START

# ---- Orientation.


def exif_of(orientation, order="II", kind=3, tag=0x0112):
    mark = {"II": "<", "MM": ">"}[order]
    value = struct.pack(f"{mark}{'HH' if kind == 3 else 'I'}", *([orientation, 0] if kind == 3 else [orientation]))
    entries = struct.pack(f"{mark}HHI4s", 0x010F, 2, 4, b"abc\0") + struct.pack(f"{mark}HHI", tag, kind, 1) + value
    head = order.encode() + struct.pack(f"{mark}HI", 42, 8)
    return head + struct.pack(f"{mark}H", 2) + entries + bytes(4)


def with_exif(encoded, exif):
    """A JPEG with EXIF data."""
    content = b"Exif\0\0" + exif
    return encoded[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + encoded[2:]


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_pillows(orientation, order, kind):
    exif = exif_of(orientation, order, kind)
    stored = picture(33, 50)
    stored[0] = 0, 0, 255  # no symmetry
    for file_format in ("PNG", "WEBP", "JPEG"):
        lossless = {"WEBP": {"lossless": True}}.get(file_format, {})
        encoded = save(stored, file_format, exif=b"Exif\0\0" + exif, **lossless)
        with Image.open(io.BytesIO(encoded)) as opened:
            assert opened.getexif().get(0x0112) == orientation  # Pillow finds it there, too
        as_stored = transforms.decode(encoded)
        tagged = Image.fromarray(as_stored)
        tagged.getexif()[0x0112] = orientation
        expected = np.asarray(ImageOps.exif_transpose(tagged))
        if file_format == "PNG":
            np.testing.assert_array_equal(expected, ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
        upright = transforms.decode(encoded, exif_orientation=True)
        np.testing.assert_array_equal(upright, expected)
        assert upright.flags.c_contiguous
        assert transforms.size_of(encoded, exif_orientation=True) == expected.shape[:2]
        assert transforms.size_of(encoded) == (33, 50)
        top, left, height, width = 3, 5, 11, 17
        crop = transforms.decode_crop(encoded, top, left, height, width, exif_orientation=True)
        np.testing.assert_array_equal(crop, expected[top : top + height, left : left + width])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_transforms_see_the_upright_image(orientation):
    encoded = with_exif(jpeg(picture(40, 60)), exif_of(orientation))
    upright = transforms.decode(encoded, exif_orientation=True)
    for transform in (
        transforms.TrainTransform(16),
        transforms.TrainTransform(16, inception_crop=False, random_crop_from=20),
    ):
        expected = transform(upright, np.random.default_rng(3))
        given = transform(encoded, np.random.default_rng(3), exif_orientation=True)
        np.testing.assert_array_equal(given, expected)
        forced = dataclasses.replace(transform, exif_orientation=True)
        np.testing.assert_array_equal(forced(encoded, np.random.default_rng(3)), expected)
    never = transforms.EvalTransform(16, resize_small=20, exif_orientation=False)
    always = dataclasses.replace(never, exif_orientation=True)
    stored = transforms.decode(encoded)
    np.testing.assert_array_equal(never(encoded, exif_orientation=True), never(stored))
    np.testing.assert_array_equal(always(encoded), never(upright))


def test_damaged_exif_is_ignored():
    rng, whole = np.random.default_rng(0), exif_of(6)
    plain, turned = jpeg(picture(20, 30)), 0
    for _ in range(300):
        exif = bytearray(whole[: rng.integers(0, len(whole) + 1)])
        for at in rng.integers(0, max(len(exif), 1), 2):
            exif[at : at + 1] = [rng.choice([0, 1, 6, 0x7F, 0xFF])]
        encoded = with_exif(plain, bytes(exif))
        turned += transforms.decode(encoded, exif_orientation=True).shape != (20, 30, 3)
    assert 0 < turned < 100
    for exif in (exif_of(0), exif_of(9), exif_of(6, kind=4)[:-8], exif_of(6, tag=0x0113), b"II*\0\xff\xff\xff\xff"):
        assert transforms.decode(with_exif(plain, exif), exif_orientation=True).shape == (20, 30, 3)


# ---- What a file claims.


def chunk(kind, data=b"", length=None):
    length = len(data) if length is None else length
    return struct.pack(">I", length) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(*parts):
    return PNG_START + b"".join(parts)


IHDR = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
IDAT = chunk(b"IDAT", zlib.compress(bytes(4 * 13)))
IEND = chunk(b"IEND")


@pytest.mark.parametrize(
    "encoded",
    [
        png_of(IHDR, struct.pack(">I", 0xFFFF_FFFF) + b"IDAT"),  # 41 bytes; OpenCV allocates 4 GB for it
        png_of(IHDR, chunk(b"tEXt", b"", 0xF000_0000), IDAT, IEND),
        png_of(IHDR, IDAT, chunk(b"IEND", b"", 0x7FFF_FFFF)),
        png_of(IHDR, IDAT),
        png_of(chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)), IDAT, IEND),
        png_of(chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 16, 6, 0, 0, 0)), IDAT, IEND),
        replaced(save(picture(), "BMP"), 18, struct.pack("<ii", 9000, 9000)),
        replaced(save(picture(), "BMP"), 46, struct.pack("<I", 0xFFFF_FFFF)),
        replaced(save(picture(), "BMP"), 14, struct.pack("<I", 0xFFFF_FFFF)),
        replaced(save(picture(), "BMP"), 10, struct.pack("<I", 0xFFFF_FFFF)),
        replaced(save(picture(), "WEBP"), 4, struct.pack("<I", 0xFFFF_FFF0)),
        replaced(save(picture(), "WEBP"), 16, struct.pack("<I", 0xFFFF_FFF0)),
    ],
)
def test_files_that_claim_more_than_they_hold_are_refused_before_they_are_decoded(encoded, monkeypatch):
    monkeypatch.setattr(transforms.cv2, "imdecode", lambda *_: pytest.fail("was decoded"))
    for take in (transforms.decode, lambda encoded: transforms.decode_crop(encoded, 0, 0, 1, 1)):
        with pytest.raises(transforms.ImageError):
            take(encoded)


def test_a_jpeg_with_too_few_bytes_for_its_pixels_is_refused(monkeypatch):
    encoded = jpeg(picture())
    at = image_headers.jpeg_header(encoded).position
    huge = replaced(encoded, at, struct.pack(">HH", 9000, 9000))
    monkeypatch.setattr(transforms.simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("was decoded"))
    with pytest.raises(transforms.ImageError, match="bytes for 9,000 x 9,000 pixels"):
        transforms.decode(huge)


@pytest.mark.parametrize("shape", [(900, 1200), (16, 20000), (1, 5000)])
def test_images_of_one_colour_are_not_too_small_for_their_pixels(shape):
    image = np.full((*shape, 3), 200, np.uint8)
    encoded = [save(image, "JPEG", quality=1, optimize=True, progressive=p) for p in (False, True)]
    encoded += [save(image, "PNG", compress_level=9), save(image[..., 0] > 0, "PNG", compress_level=9)]
    for each in encoded:
        assert transforms.decode(each).shape == image.shape


def test_parts_of_a_png_other_than_pixels_do_not_reach_the_decoder(monkeypatch):
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20)))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**20)))
    encoded = png_of(IHDR, chunk(b"gAMA", struct.pack(">I", 45455)), profile, bomb, IDAT, bomb, IEND)
    given, real = [], transforms.cv2.imdecode
    monkeypatch.setattr(
        transforms.cv2, "imdecode", lambda array, flags: (given.append(array.tobytes()), real(array, flags))[1]
    )
    np.testing.assert_array_equal(transforms.decode(encoded), np.zeros((4, 4, 3)))
    assert given == [png_of(IHDR, IDAT, IEND)]


def test_files_of_endless_parts_are_refused(monkeypatch):
    monkeypatch.setattr(image_headers, "_MOST_PARTS", 100)
    for encoded in (
        b"\xff\xd8" + b"\xff\xe0\0\2" * 200 + jpeg(picture())[2:],
        b"\xff\xd8" + b"\xff" * 500 + jpeg(picture())[2:],
        png_of(IHDR, *200 * [chunk(b"tEXt")], IDAT, IEND),
    ):
        with pytest.raises(transforms.ImageError):
            transforms.decode(encoded)


def test_no_damage_of_small_headers_takes_memory():
    """Every kind of file with bytes of its header set to extremes, in a process whose memory is watched."""
    script = """
import resource, sys
import numpy as np
from vit_jax.data import image_headers, transforms
image_headers.MAX_PIXELS = 2**18  # so that an honest image takes a megabyte
with np.load(sys.argv[1]) as file:
    files = [file[name].tobytes() for name in file if name.startswith("files/")]
files += [bytes.fromhex(text) for text in sys.argv[2:]]
rng, refused, before = np.random.default_rng(0), 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for whole in files:
    for _ in range(120):
        damaged = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 80), rng.integers(1, 4)):
            size = int(rng.choice([1, 2, 4]))
            damaged[at : at + size] = bytes([int(rng.choice([0, 1, 0x7F, 0x80, 0xF0, 0xFF]))] * size)
        damaged = bytes(damaged[: None if rng.random() < 0.7 else int(rng.integers(len(damaged)))])
        try:
            transforms.decode(damaged, exif_orientation=True)
        except transforms.ImageError:
            refused += 1
print(len(files), refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    animated = io.BytesIO()
    frames = [Image.fromarray(picture()[::step]) for step in (1, -1)]
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    more = [animated.getvalue(), png_of(IHDR, chunk(b"tEXt"), IDAT, IEND), with_exif(jpeg(picture()), exif_of(6))]
    golden_file = str(pathlib.Path(__file__).parents[1] / "golden" / "images.npz")
    process = subprocess.run(
        [sys.executable, "-c", script, golden_file, *(each.hex() for each in more)],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    files, refused, megabytes = map(int, process.stdout.split())
    assert files > 20
    assert 20 * files < refused < 118 * files
    assert megabytes < 64
