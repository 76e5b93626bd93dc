"""Makes images.npz, beside this file: results of TensorFlow's image ops (and timm's, for DeiT's augmentation).

Nothing of vit_jax is imported, but for --compare, which makes no file and prints how far vit_jax's pixels are from
TensorFlow's on photographs. Made with tensorflow 2.21.0 (CPU), numpy 2.4.6, pillow 13.0.0, simplejpeg 1.9.0 and timm
1.0.31, of which one file is loaded that needs no torch:

    python -m venv oracle
    oracle/bin/pip install tensorflow-cpu==2.21.0 numpy==2.4.6 pillow==13.0.0 simplejpeg==1.9.0
    oracle/bin/pip install --no-deps timm==1.0.31
    oracle/bin/python tests/golden/make_image_golden.py
    oracle/bin/pip install opencv-python-headless==5.0.0.93  # and then, to compare the images of a zip file:
    PYTHONPATH=. oracle/bin/python tests/golden/make_image_golden.py --compare photographs.zip

Contents:

    picture                         uint8 [24, 34, 3], of which all others are made
    files/<name>                    uint8 [bytes], an encoded image; the name's first word is its format
    pixels/<name>                   uint8 [height, width, 3], what TensorFlow decodes
    crops/<name>                    int32 [n, 4], windows (top, left, height, width) and, under
    crops/<name>/<i>                what `tf.image.decode_and_crop_jpeg` decodes of them
    flipped                         `tf.image.flip_left_right(picture)`
    resized/<method>/<h>x<w>        int16 [h, w, 3], `tf.image.resize` of the picture in hundredths of a grey level
    small_sides                     int32 [n, 5]: height, width, shorter side asked for, resulting height and width
    small/<size>                    uint8, the picture by `area` to that shorter side, cut off to integers
    central/<size>                  uint8 [size, size, 3], centre of the picture
    value_range                     float32 [256], what 0 to 255 are mapped to
    sampler/<h>x<w>/<quantity>      int32 [bins], histogram of 100,000 draws of `sample_distorted_bounding_box`, and
    sampler/<h>x<w>/<quantity>/edges  float64 [bins + 1], each bin from its edge up to the next, which is not part of it
    augmented                       uint8 [20, 27, 3], the picture that is augmented
    augmented/<op>/<level>          RandAugment's operations by TensorFlow; the level is a tenth of the magnitude, and
                                    negative where the direction is reversed. Cutout's centre is row 8, column 24
    timm/<op>/<level>               the same by timm (Pillow), with bicubic interpolation and ImageNet's mean as filling
"""

import argparse
import importlib.util
import io
import math
import os
import pathlib
import random
import zipfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import simplejpeg
import tensorflow as tf
from PIL import Image

FILE = pathlib.Path(__file__).parent / "images.npz"
DRAWS = 100_000


def make_picture(height: int, width: int) -> np.ndarray:
    """A gradient with a disc, a box of noise, and black and white: smooth, sharp and rough parts."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    picture = np.stack([230 * y / height + 10, 240 * x / width + 5, 128 + 60 * np.sin(x / 5)], axis=-1)
    picture[(y - height / 2) ** 2 + (x - width / 3) ** 2 < (height / 4) ** 2] = (220, 40, 60)
    box = picture[height // 2 :, width * 2 // 3 :]
    box += rng.normal(0, 50, box.shape)
    picture[:3, -4:] = 255
    picture[-3:, :4] = 0
    return picture.clip(0, 255).astype(np.uint8)


def save(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def change_adobe_marker(jpeg: bytes, transform: int | None) -> bytes:
    """Says that the four channels are transformed (2 is YCCK), or removes the marker."""
    start = jpeg.index(b"\xff\xee\x00\x0eAdobe")
    if transform is None:
        return jpeg[:start] + jpeg[start + 16 :]
    return jpeg[: start + 15] + bytes([transform]) + jpeg[start + 16 :]


def grey_jpeg_with_sampling(factors: tuple[int, int, int]) -> bytes:
    """An even grey 32 x 32 image of three components with any sampling factors, also those that few encoders write."""
    jpeg = bytearray(simplejpeg.encode_jpeg(np.full((32, 32, 3), 128, np.uint8), colorsubsampling="444"))
    frame, scan = jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xda")
    for i, factor in enumerate(factors):
        jpeg[frame + 11 + 3 * i] = factor
        jpeg[scan + 6 + 2 * i] = 0  # all with the tables of the luma, whose codes for "as before" and "end" are:
    block = "00" + "1010"
    across, down = max(f >> 4 for f in factors), max(f & 15 for f in factors)
    units = math.ceil(32 / (8 * across)) * math.ceil(32 / (8 * down))
    bits = block * sum((f >> 4) * (f & 15) for f in factors) * units
    bits += "1" * (-len(bits) % 8)
    return bytes(jpeg[: scan + 14]) + int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9"


def make_files(picture: np.ndarray) -> dict[str, bytes]:
    """Encoded images that TensorFlow reads."""
    rng = np.random.default_rng(1)
    image = Image.fromarray(picture)
    grey = np.ascontiguousarray(picture[..., 0])
    alpha = rng.integers(0, 256, grey.shape, np.uint8)
    deep = rng.integers(0, 65536, (12, 17, 4), np.uint16)
    palette = image.quantize(32)
    frames = [Image.fromarray(np.roll(picture, 7 * i, axis=1)).quantize(32) for i in range(3)]
    cmyk = save(image.convert("CMYK"), "JPEG", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    files = {
        f"jpeg {sampling}": simplejpeg.encode_jpeg(picture, quality=80, colorsubsampling=sampling)
        for sampling in ("444", "422", "420", "440", "411")
    }
    files |= {
        "jpeg grey": save(Image.fromarray(grey), "JPEG"),
        "jpeg progressive": save(image, "JPEG", progressive=True),
        "jpeg restarts": save(image, "JPEG", restart_marker_blocks=2),
        "jpeg turned": save(image, "JPEG", exif=exif),
        "jpeg cmyk": cmyk,
        "jpeg cmyk without marker": change_adobe_marker(cmyk, None),
        "jpeg ycck": change_adobe_marker(cmyk, 2),
        "jpeg sampling 1x4": grey_jpeg_with_sampling((0x14, 0x11, 0x11)),
        "jpeg sampling mixed": grey_jpeg_with_sampling((0x22, 0x21, 0x12)),
        "jpeg 1x1": simplejpeg.encode_jpeg(picture[:1, :1].copy()),
        "png": save(image, "PNG"),
        "png alpha": save(Image.fromarray(np.dstack([picture, alpha])), "PNG"),
        "png grey": save(Image.fromarray(grey), "PNG"),
        "png grey alpha": save(Image.fromarray(np.dstack([grey, alpha]), "LA"), "PNG"),
        "png black and white": save(Image.fromarray(grey).convert("1"), "PNG"),
        "png palette": save(palette, "PNG"),
        "png palette alpha": save(palette, "PNG", transparency=bytes(range(0, 256, 8))),
        "png turned": save(image, "PNG", exif=exif),
        "png 1x1": save(Image.fromarray(picture[:1, :1]), "PNG"),
        "gif": save(frames[0], "GIF"),
        "gif animated": save(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=40),
        "webp": save(image, "WEBP", quality=70),
        "webp lossless": save(image, "WEBP", lossless=True),
        "bmp": save(image, "BMP"),
        "bmp grey": save(Image.fromarray(grey), "BMP"),
        "bmp 32 bits": save(Image.fromarray(np.dstack([picture, alpha])), "BMP"),
    }
    for channels, name in ((1, "grey"), (2, "grey alpha"), (3, "rgb"), (4, "rgb alpha")):
        files[f"png 16 bits {name}"] = tf.io.encode_png(deep[..., :channels]).numpy()
    return files


def make_webp_with_alpha(picture: np.ndarray) -> dict[str, bytes]:
    """WebP images that TensorFlow reads with four channels only; of an animation it gives all frames."""
    alpha = np.random.default_rng(2).integers(0, 256, picture.shape[:2], np.uint8)
    frames = [Image.fromarray(np.roll(picture, 7 * i, axis=1)) for i in range(3)]
    return {
        "webp alpha": save(Image.fromarray(np.dstack([picture, alpha])), "WEBP", lossless=True, exact=True),
        "webp animated": save(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
    }


def make_decoded(picture: np.ndarray) -> dict[str, np.ndarray]:
    golden = {}
    for name, encoded in make_files(picture).items():
        pixels = tf.io.decode_image(encoded, channels=3, expand_animations=False).numpy()
        golden |= {f"files/{name}": np.frombuffer(encoded, np.uint8), f"pixels/{name}": pixels}
    for name, encoded in make_webp_with_alpha(picture).items():
        pixels = tf.image.decode_webp(encoded, channels=4).numpy()
        pixels = pixels.reshape(-1, *pixels.shape[-3:])[0, ..., :3]
        golden |= {f"files/{name}": np.frombuffer(encoded, np.uint8), f"pixels/{name}": pixels}
    rng = np.random.default_rng(3)
    for name in ("jpeg 444", "jpeg 420", "jpeg 440", "jpeg cmyk", "jpeg grey"):
        encoded = golden[f"files/{name}"].tobytes()
        corners = np.sort(rng.integers(0, (23, 33), (3, 2, 2)), axis=1)
        windows = np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0] + 1], axis=1).astype(np.int32)
        golden[f"crops/{name}"] = windows
        for i, window in enumerate(windows):
            golden[f"crops/{name}/{i}"] = tf.image.decode_and_crop_jpeg(encoded, window, channels=3).numpy()
    return golden


def small_sides(height: int, width: int, size: int) -> tuple[int, int]:
    """The sides of big_vision's resize_small, with its types."""
    factor = tf.cast(size, tf.float32) / tf.cast(tf.minimum(height, width), tf.float32)
    return tuple(int(tf.cast(tf.round(tf.cast(side, tf.float32) * factor), tf.int32)) for side in (height, width))


def make_resized(picture: np.ndarray) -> dict[str, np.ndarray]:
    golden = {"flipped": tf.image.flip_left_right(picture).numpy()}
    for method in ("bilinear", "area", "bicubic"):
        for height, width in ((11, 13), (9, 50), (32, 20), (29, 41), (12, 17), (1, 1)):
            resized = tf.image.resize(picture, [height, width], method).numpy()
            golden[f"resized/{method}/{height}x{width}"] = np.round(100 * resized).astype(np.int16)
    rng = np.random.default_rng(4)
    asked = np.column_stack([rng.integers(1, 700, (400, 2)), rng.choice([32, 160, 224, 256, 384, 448, 512], 400)])
    # These fall on halves.
    asked = np.concatenate([asked, [(64, 65, 32), (64, 67, 32), (512, 513, 256), (448, 449, 224), (10, 15, 5)]])
    golden["small_sides"] = np.array([(*row, *small_sides(*row)) for row in asked.tolist()], np.int32)
    for size in (16, 25):
        area = tf.image.resize(picture, small_sides(*picture.shape[:2], size), "area")
        golden[f"small/{size}"] = tf.cast(tf.clip_by_value(area, 0, 255), tf.uint8).numpy()
    for size in (10, 11):
        top, left = (picture.shape[0] - size) // 2, (picture.shape[1] - size) // 2
        golden[f"central/{size}"] = tf.image.crop_to_bounding_box(picture, top, left, size, size).numpy()
    golden["value_range"] = (tf.range(256, dtype=tf.float32) / 127.5 - 1).numpy()
    return golden


def make_sampler() -> dict[str, np.ndarray]:
    golden = {}
    tf.random.set_seed(0)
    for height, width in ((375, 500), (640, 427), (32, 32)):

        @tf.function
        def draw(_, shape=(height, width, 3)):
            begin, size, _ = tf.image.sample_distorted_bounding_box(
                tf.constant(shape),
                tf.zeros([0, 0, 4]),
                min_object_covered=0.0,
                area_range=(0.05, 1.0),
                use_image_if_no_bounding_boxes=True,
            )
            return tf.concat([begin[:2], size[:2]], axis=0)

        boxes = tf.map_fn(draw, tf.range(DRAWS)).numpy()
        top, left, box_height, box_width = boxes.T
        quantities = {
            "top": (top, height),
            "left": (left, width),
            "height": (box_height, height + 1),
            "width": (box_width, width + 1),
            "area": (box_height * box_width / (height * width), 1.0001),
            "aspect": (box_width / box_height, 1.5),
        }
        for name, (values, end) in quantities.items():
            # Between integers, so that no count depends on rounding, and with at least 100 draws to a bin. Edges for
            # ratios are irrational.
            edges = np.unique(np.quantile(values, np.linspace(0, 1, 41)))
            edges = edges.round() + 0.5 if values.dtype.kind == "i" else edges + math.pi * 1e-7
            edges = np.concatenate([[-1.0], edges[edges < end - 1e-3], [end + 1.0]])
            counts = np.histogram(values, edges)[0]
            keep = np.concatenate([[True], counts[:-1] >= 100, [True]])
            edges = edges[keep]
            prefix = f"sampler/{height}x{width}/{name}"
            golden |= {prefix: np.histogram(values, edges)[0].astype(np.int32), f"{prefix}/edges": edges}
    return golden


def _blend(degenerate, image, factor):
    degenerate, image = tf.cast(degenerate, tf.float32), tf.cast(image, tf.float32)
    return tf.cast(tf.clip_by_value(degenerate + factor * (image - degenerate), 0.0, 255.0), tf.uint8)


def _per_channel(function):
    return lambda image, level: tf.stack([function(image[..., c]) for c in range(3)], axis=-1)


def _stretch(channel):
    low, high = tf.cast(tf.reduce_min(channel), tf.float32), tf.cast(tf.reduce_max(channel), tf.float32)
    if high <= low:
        return channel
    scale = 255.0 / (high - low)
    return tf.cast(tf.clip_by_value(tf.cast(channel, tf.float32) * scale - low * scale, 0.0, 255.0), tf.uint8)


def _flatten_histogram(channel):
    channel = tf.cast(channel, tf.int32)
    counts = tf.math.bincount(tf.reshape(channel, [-1]), minlength=256)
    last = tf.gather(counts, tf.reduce_max(channel))
    step = (tf.reduce_sum(counts) - last) // 255
    if step == 0:
        return tf.cast(channel, tf.uint8)
    table = tf.concat([[0], ((tf.cumsum(counts) + step // 2) // step)[:-1]], axis=0)
    return tf.cast(tf.gather(tf.clip_by_value(table, 0, 255), channel), tf.uint8)


def _contrast(image, level):
    grey = tf.cast(tf.image.rgb_to_grayscale(image), tf.int32)
    # The "mean" of the original is the mean of the histogram's 256 counts.
    mean = tf.reduce_sum(tf.cast(tf.histogram_fixed_width(grey, [0, 255], nbins=256), tf.float32)) / 256.0
    mean = tf.cast(tf.clip_by_value(mean, 0.0, 255.0), tf.uint8)
    return _blend(tf.ones_like(image) * mean, image, level * 1.8 + 0.1)


def _sharpness(image, level):
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[..., None, None] / 13.0
    batch = tf.cast(image, tf.float32)[None]
    smooth = tf.nn.depthwise_conv2d(batch, tf.tile(kernel, [1, 1, 3, 1]), [1, 1, 1, 1], "VALID")[0]
    smooth = tf.cast(tf.clip_by_value(smooth, 0.0, 255.0), tf.uint8)
    smooth = tf.concat([image[:1, 1:-1], smooth, image[-1:, 1:-1]], axis=0)
    smooth = tf.concat([image[:, :1], smooth, image[:, -1:]], axis=1)
    return _blend(smooth, image, level * 1.8 + 0.1)


def _project(image, transform):
    """Nearest neighbours; pixels from outside the image are grey."""
    known = tf.concat([image, tf.ones_like(image[..., :1])], axis=-1)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=known[None],
        transforms=tf.stack([tf.cast(value, tf.float32) for value in (*transform, 0.0, 0.0)])[None],
        output_shape=tf.shape(image)[:2],
        fill_value=0.0,
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]
    return tf.where(moved[..., 3:] == 0, tf.constant(128, tf.uint8), moved[..., :3])


def _rotate(image, level):
    angle = level * 30 * math.pi / 180
    last_row, last_column = image.shape[0] - 1.0, image.shape[1] - 1.0
    cos, sin = tf.cos(tf.constant(angle)), tf.sin(tf.constant(angle))
    x_offset = (last_column - (cos * last_column - sin * last_row)) / 2.0
    y_offset = (last_row - (sin * last_column + cos * last_row)) / 2.0
    return _project(image, [cos, -sin, x_offset, sin, cos, y_offset])


def _posterize(image, level):
    shift = 8 - int(level * 4)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)


def _solarize(image, level):
    threshold = int(level * 256)  # which becomes a uint8 in the graph of an input pipeline, silently modulo 256
    return tf.function(lambda pixels: tf.where(pixels < threshold, pixels, 255 - pixels))(image)


def _solarize_add(image, level):
    added = tf.clip_by_value(tf.cast(image, tf.int32) + int(level * 110), 0, 255)
    return tf.where(image < 128, tf.cast(added, tf.uint8), image)


def _cutout(image, level):
    half = int(level * 40)
    rows, columns = tf.range(image.shape[0])[:, None], tf.range(image.shape[1])[None]
    hole = (rows >= 8 - half) & (rows < 8 + half) & (columns >= 24 - half) & (columns < 24 + half)
    return tf.where(hole[..., None], tf.constant(128, tf.uint8), image)


LEVELS = (0.0, 0.3, 1.0, 1.5, 2.0)
MOVES = (0.0, 0.1, -0.1, 0.5, -1.5, 2.0)
# RandAugment as in AugReg: big_vision's archive/autoaugment.py, which names TensorFlow's EfficientNet as its origin.
OPERATIONS = {
    "autocontrast": (_per_channel(_stretch), (1.0,)),
    "equalize": (_per_channel(_flatten_histogram), (1.0,)),
    "invert": (lambda image, level: 255 - image, (1.0,)),
    "rotate": (_rotate, MOVES),
    "posterize": (_posterize, LEVELS),
    "solarize": (_solarize, LEVELS),
    "solarize_add": (_solarize_add, LEVELS),
    "color": (
        lambda image, level: _blend(
            tf.image.grayscale_to_rgb(tf.image.rgb_to_grayscale(image)), image, level * 1.8 + 0.1
        ),
        LEVELS,
    ),
    "contrast": (_contrast, LEVELS),
    "brightness": (lambda image, level: _blend(tf.zeros_like(image), image, level * 1.8 + 0.1), LEVELS),
    "sharpness": (_sharpness, LEVELS),
    "shear_x": (lambda image, level: _project(image, [1.0, level * 0.3, 0.0, 0.0, 1.0, 0.0]), MOVES),
    "shear_y": (lambda image, level: _project(image, [1.0, 0.0, 0.0, level * 0.3, 1.0, 0.0]), MOVES),
    "translate_x": (lambda image, level: _project(image, [1.0, 0.0, level * 100, 0.0, 1.0, 0.0]), (0.0, 0.1, -0.13)),
    "translate_y": (lambda image, level: _project(image, [1.0, 0.0, 0.0, 0.0, 1.0, level * 100]), (0.0, 0.1, -0.13)),
    "cutout": (_cutout, (0.0, 0.1, 1.0)),
}


def make_augmented(picture: np.ndarray) -> dict[str, np.ndarray]:
    golden = {"augmented": picture}
    for name, (operation, levels) in OPERATIONS.items():
        for level in levels:
            golden[f"augmented/{name}/{level}"] = operation(tf.constant(picture), level).numpy()
    return golden


def make_timm(picture: np.ndarray) -> dict[str, np.ndarray]:
    """The operations of "rand-m9-mstd0.5-inc1", DeiT's, at some magnitudes and in both directions."""
    path = pathlib.Path(importlib.util.find_spec("timm").origin).parent / "data" / "auto_augment.py"
    spec = importlib.util.spec_from_file_location("auto_augment", path)
    timm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(timm)
    options = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    golden = {}
    for name in timm._RAND_INCREASING_TRANSFORMS:
        for sign in (1, -1):  # one result where there is no direction
            for level in (0.05, 0.9):
                random.random = lambda sign=sign: 0.25 if sign > 0 else 0.75  # timm turns around above 0.5
                operation = timm.AugmentOp(name, prob=1.0, magnitude=10 * level, hparams=options)
                result = np.asarray(operation(Image.fromarray(picture)))
                if sign > 0 or not np.array_equal(result, golden[f"timm/{name}/{level}"]):
                    golden[f"timm/{name}/{sign * level}"] = result
    return golden


def compare(place: str) -> None:
    """Prints differences between vit_jax's pixels and TensorFlow's, in grey levels, over the images of a zip file."""
    from vit_jax.data import transforms

    differences: dict[str, list[np.ndarray]] = {}

    def add(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        error = ours.astype(np.float32) - theirs.astype(np.float32)
        facts = np.abs(error).max(), error.mean(), (error != 0).mean(), (np.abs(error) > 0.501).mean()
        differences.setdefault(name, []).append(np.array(facts))

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(place) as archive:
        for name in archive.namelist():
            if not name.lower().endswith((".jpg", ".jpeg")):
                continue
            encoded = archive.read(name)
            theirs = tf.io.decode_image(encoded, channels=3, expand_animations=False)
            ours = transforms.decode(encoded)
            add("decode", ours, theirs.numpy())
            box = transforms.inception_crop_box(*ours.shape[:2], rng)
            top, left, height, width = box
            crop = transforms.decode_crop(encoded, *box)
            add("decode_crop, against decode and slice", crop, theirs.numpy()[top : top + height, left : left + width])
            add("decode_crop", crop, tf.image.decode_and_crop_jpeg(encoded, box, channels=3).numpy())
            for method in transforms.RESIZE_METHODS:
                resized = tf.clip_by_value(tf.image.resize(crop, [224, 224], method), 0, 255).numpy()
                add(f"resize {method}", transforms.resize(crop, 224, 224, method), resized)
                add(f"resize {method}, rounded", transforms.resize(crop, 224, 224, method), np.rint(resized))
                add(f"resize {method}, cut off", transforms.resize(crop, 224, 224, method), np.trunc(resized))
    for name, facts in differences.items():
        largest, (_, bias, share, far) = np.max(facts, axis=0)[0], np.mean(facts, axis=0)
        print(
            f"{name:38s} largest {largest:6.3f}, mean {bias:7.4f}, values that differ {share:8.4%}, "
            f"by more than a half {far:8.4%} ({len(facts)} images)"
        )


def main() -> None:
    """Writes the file, or compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", metavar="ZIP", help="compare vit_jax's pixels of these images with TensorFlow's")
    args = parser.parse_args()
    if args.compare:
        compare(args.compare)
        return
    picture = make_picture(24, 34)
    golden = {"picture": picture}
    golden |= make_decoded(picture)
    golden |= make_resized(picture)
    golden |= make_sampler()
    small = make_picture(20, 27)
    golden |= make_augmented(small)
    golden |= make_timm(small)
    np.savez_compressed(FILE, **golden)
    print(f"{FILE}: {len(golden)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
