import io
import pathlib
import struct
import zlib

import cv2
import numpy as np
import pytest
import scipy.stats
import simplejpeg
from PIL import Image

from vit_jax.data import randaugment, transforms
from vit_jax.errors import UserError
from vit_jax.models.layers import normalize_images

with np.load(pathlib.Path(__file__).parents[1] / "golden" / "images.npz") as _file:
    GOLDEN = dict(_file)
FILES = {name.removeprefix("files/"): GOLDEN[name].tobytes() for name in GOLDEN if name.startswith("files/")}
JPEGS = sorted(name for name in FILES if name.startswith("jpeg"))


def picture(height=48, width=64):
    """A smooth picture, which JPEG keeps well."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], axis=-1).astype(np.uint8)


def jpeg(image):
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95)


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def save(image, file_format, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format, **options)
    return buffer.getvalue()


def png_that_claims(height, width, content=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def replaced(encoded, position, content):
    return encoded[:position] + content + encoded[position + len(content) :]


def golden(prefix):
    return sorted(name.removeprefix(prefix) for name in GOLDEN if name.startswith(prefix) and "edges" not in name)


def test_jpeg_decodes_to_rgb():
    decoded = transforms.decode(jpeg(picture()))
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - picture()).max() < 12


def test_png_decodes_exactly_whatever_the_file_is_called():
    np.testing.assert_array_equal(transforms.decode(png(picture())), picture())


def test_grey_images_decode_to_three_equal_channels():
    grey = np.ascontiguousarray(picture()[..., :1])
    for encoded in (simplejpeg.encode_jpeg(grey, colorspace="gray"), cv2.imencode(".png", grey)[1].tobytes()):
        decoded = transforms.decode(encoded)
        assert decoded.shape == (48, 64, 3)
        np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])


@pytest.mark.parametrize("name", sorted(FILES))
def test_every_kind_of_file_decodes_to_tensorflows_pixels(name):
    np.testing.assert_array_equal(transforms.decode(FILES[name]), GOLDEN[f"pixels/{name}"])


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_size_is_known_from_the_header(name):
    height, width = GOLDEN[f"pixels/{name}"].shape[:2]
    # Cut off 50 bytes behind what says the size: that cannot have needed the pixels.
    start = FILES[name].index(b"\xff\xda") if name.startswith("jpeg") else 0
    assert transforms.size_of(FILES[name]) == transforms.size_of(FILES[name][: start + 50]) == (height, width)


def test_palette_bmp_decodes_to_its_colours():
    # TensorFlow gives the numbers of the colours.
    colours = np.repeat([[(200, 30, 40)], [(10, 220, 30)]], 8, axis=1).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(colours).quantize(2).save(encoded, "BMP")
    np.testing.assert_array_equal(transforms.decode(encoded.getvalue()), colours)


def test_animated_png_gives_its_first_frame():
    frames = [Image.fromarray(picture()[::step]) for step in (1, -1)]
    encoded = io.BytesIO()
    frames[0].save(encoded, "PNG", save_all=True, append_images=frames[1:])
    assert b"acTL" in encoded.getvalue()
    np.testing.assert_array_equal(transforms.decode(encoded.getvalue()), picture())


def test_bmp_with_the_top_row_first_is_not_upside_down():
    encoded = replaced(save(picture()[::-1], "BMP"), 22, struct.pack("<i", -48))
    assert transforms.size_of(encoded) == (48, 64)
    np.testing.assert_array_equal(transforms.decode(encoded), picture())


@pytest.mark.parametrize("name", ["jpeg 420", "jpeg progressive", "jpeg cmyk", "png", "gif", "webp", "bmp"])
def test_truncated_images_are_refused_wherever_they_are_cut(name):
    whole = FILES[name]
    for kept in np.linspace(0, len(whole) - 3, 40, dtype=int):
        with pytest.raises(transforms.ImageError):
            transforms.decode(whole[:kept])
        with pytest.raises(transforms.ImageError):
            transforms.decode_crop(whole[:kept], 0, 0, 5, 5)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"<svg/>", b"\xff\xd8", b"GIF89a" + bytes(100), b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0"]
)
def test_bytes_that_are_not_an_image_are_refused(content):
    for function in (transforms.decode, transforms.size_of):
        if function is transforms.decode or not content.startswith(b"\x89"):
            with pytest.raises(transforms.ImageError):
                function(content)


def test_an_empty_file_is_called_empty():
    with pytest.raises(transforms.ImageError, match="empty file"):
        transforms.decode(b"")


def test_files_with_bytes_changed_lost_and_added_are_refused_or_crop_as_they_decode():
    rng = np.random.default_rng(0)
    names = sorted(FILES)
    refused = 0
    for _ in range(2000):
        encoded = bytearray(FILES[names[rng.integers(len(names))]])
        place, length = int(rng.integers(2, min(len(encoded), 700))), int(rng.integers(0, 3))
        encoded[place : place + length] = rng.integers(0, 256, int(rng.integers(0, 3)), np.uint8).tobytes()
        try:
            height, width = transforms.size_of(bytes(encoded))
            if height * width > 10**6:
                continue
            decoded = transforms.decode(bytes(encoded))
        except transforms.ImageError:
            refused += 1
            continue
        assert decoded.shape == (height, width, 3)
        crop = transforms.decode_crop(bytes(encoded), 0, 0, (height + 1) // 2, width)
        np.testing.assert_array_equal(crop, decoded[: (height + 1) // 2])
    assert 200 < refused < 1900


FRAME = FILES["jpeg 444"].index(b"\xff\xc0")
BOMBS = {
    "jpeg": replaced(FILES["jpeg 444"], FRAME + 5, b"\xff" * 4),
    "png": png_that_claims(50_000, 50_000),
    "gif": replaced(FILES["gif"], 6, b"\xff" * 4),
    "bmp": replaced(FILES["bmp"], 18, struct.pack("<ii", 60_000, -60_000)),
    "webp": replaced(FILES["webp"], 26, b"\xff\x3f\xff\x3f"),
    "webp lossless": replaced(FILES["webp lossless"], 21, b"\xff\xff\xff\x0f"),
    "webp animated": replaced(FILES["webp animated"], 24, b"\xff\x7f\x00" * 2),
}


@pytest.mark.parametrize("name", sorted(BOMBS))
@pytest.mark.parametrize(
    "function", [transforms.size_of, transforms.decode, lambda e: transforms.decode_crop(e, 0, 0, 1, 1)]
)
def test_decompression_bombs_are_refused_by_their_headers(function, name):
    with pytest.raises(transforms.ImageError, match=r"at most 89,478,485 are decoded"):
        function(BOMBS[name])


@pytest.mark.parametrize("encoded", [png_that_claims(0, 5), replaced(FILES["jpeg 444"], FRAME + 5, b"\0\0")])
def test_images_without_pixels_are_refused(encoded):
    with pytest.raises(transforms.ImageError, match=r"an image of \d x \d+ pixels"):
        transforms.decode(encoded)


def test_files_that_hold_fewer_pixels_than_they_claim_are_refused():
    for encoded in (
        png_that_claims(3000, 3000, zlib.compress(b"\0" * 100)),
        replaced(FILES["jpeg 444"], FRAME + 5, struct.pack(">HH", 3000, 3000)),
        replaced(FILES["bmp"], 18, struct.pack("<ii", 3000, 3000)),
        replaced(FILES["gif"], FILES["gif"].index(b"\x2c\0\0\0\0") + 5, b"\xff" * 4),  # a frame beyond the screen
    ):
        with pytest.raises(transforms.ImageError):
            transforms.decode(encoded)


def test_damage_amid_the_pixels_of_a_jpeg_is_refused():
    whole = FILES["jpeg restarts"]
    middle = whole.index(b"\xff\xd1")
    without_an_interval = whole[: whole.index(b"\xff\xd0")] + whole[middle:]
    stray_before_restart = whole[:middle] + b"\x55" * 9 + whole[middle:]
    ended_early = replaced(FILES["jpeg 420"], len(FILES["jpeg 420"]) // 2 + 200, b"\xff\xd9")
    for encoded in (without_an_interval, stray_before_restart, ended_early):
        for function in (transforms.decode, lambda e: transforms.decode_crop(e, 0, 0, 22, 34)):
            with pytest.raises(transforms.ImageError, match="not a whole JPEG"):
                function(encoded)


@pytest.mark.parametrize("stray", [b"\0\0", b"\xff\0", b"\xff", b"abc\xff\0\xff"])
@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xc0", b"\xff\xda", b"\xff\xd9"])
def test_stray_bytes_between_jpeg_segments_harm_nothing(marker, stray):
    whole = jpeg(picture())
    place = whole.index(marker)
    odd = whole[:place] + stray + whole[place:]
    np.testing.assert_array_equal(transforms.decode(odd), transforms.decode(whole))
    np.testing.assert_array_equal(transforms.decode_crop(odd, 3, 5, 20, 30), transforms.decode(whole)[3:23, 5:35])
    with pytest.raises(transforms.ImageError):
        transforms.decode(odd[:-100])


@pytest.mark.parametrize("name", ["jpeg 420", "png", "gif", "webp", "bmp"])
def test_bytes_behind_the_end_harm_nothing(name):
    longer = FILES[name] + bytes(5000)
    np.testing.assert_array_equal(transforms.decode(longer), GOLDEN[f"pixels/{name}"])
    np.testing.assert_array_equal(transforms.decode_crop(longer, 2, 3, 9, 8), GOLDEN[f"pixels/{name}"][2:11, 3:11])


@pytest.mark.parametrize("name", JPEGS)
def test_a_crop_of_any_height_has_the_pixels_of_the_whole(name):
    whole = transforms.decode(FILES[name])
    height, width = whole.shape[:2]
    for bottom in range(1, height + 1):
        top, left = bottom // 2, min(bottom // 3, width - 1)
        crop = transforms.decode_crop(FILES[name], top, left, bottom - top, width - left)
        np.testing.assert_array_equal(crop, whole[top:bottom, left:])


@pytest.mark.parametrize("name", sorted(set(FILES) - set(JPEGS)))
def test_a_crop_of_other_formats_has_the_pixels_of_the_whole(name):
    whole = transforms.decode(FILES[name])
    height, width = (side // 2 + 1 for side in whole.shape[:2])
    crop = transforms.decode_crop(FILES[name], whole.shape[0] - height, 0, height, width)
    np.testing.assert_array_equal(crop, whole[-height:, :width])


@pytest.mark.parametrize("name", ["jpeg 444", "jpeg 440", "jpeg cmyk", "jpeg grey"])
def test_a_crop_has_the_pixels_of_tensorflows_crop(name):
    for i, window in enumerate(GOLDEN[f"crops/{name}"].tolist()):
        np.testing.assert_array_equal(transforms.decode_crop(FILES[name], *window), GOLDEN[f"crops/{name}/{i}"])


def test_a_crop_with_halved_chroma_differs_from_tensorflows_in_the_first_and_last_columns_only():
    # TensorFlow's decoder interpolates chroma across columns as if the image ended there; ours sees the neighbours.
    differences = 0
    for i, window in enumerate(GOLDEN["crops/jpeg 420"].tolist()):
        crop, theirs = transforms.decode_crop(FILES["jpeg 420"], *window), GOLDEN[f"crops/jpeg 420/{i}"]
        np.testing.assert_array_equal(crop[:, 1:-1], theirs[:, 1:-1])
        differences += np.count_nonzero(crop != theirs)
    assert differences


def test_jpeg_of_three_separate_scans_is_cropped_as_it_decodes():
    block = "00" + "1010"  # "as before" and "end", by the tables of the luma
    whole = bytearray(simplejpeg.encode_jpeg(np.full((32, 32, 3), 128, np.uint8), colorsubsampling="444"))
    scan = whole.index(b"\xff\xda")
    encoded = bytes(whole[:scan])
    for component in (1, 2, 3):
        # The first block of each is brighter by 3 steps, and those after it as the one before.
        bits = "011" + "11" + "1010" + block * 15
        bits += "1" * (-len(bits) % 8)
        encoded += b"\xff\xda\x00\x08\x01" + bytes([component, 0, 0, 63, 0])
        encoded += int(bits, 2).to_bytes(len(bits) // 8, "big")
    encoded += b"\xff\xd9"
    decoded = transforms.decode(encoded)
    assert len(np.unique(decoded.reshape(-1, 3), axis=0)) == 1
    assert (decoded[0, 0] != 128).any()
    np.testing.assert_array_equal(transforms.decode_crop(encoded, 2, 3, 9, 10), decoded[2:11, 3:13])


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5), (0, -1, 5, 5), (20, 0, 5, 5), (0, 30, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0)]
)
def test_crops_that_reach_out_of_the_image_are_refused(box):
    for name in ("jpeg 420", "png"):
        with pytest.raises(UserError, match=r"exceeds the image of 24 x 34"):
            transforms.decode_crop(FILES[name], *box)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (32, 32), (100, 1000)])
def test_inception_crops_stay_within_image_area_and_aspect_ratio(height, width):
    rng = np.random.default_rng(0)
    boxes = np.array([transforms.inception_crop_box(height, width, rng) for _ in range(2000)])
    top, left, crop_height, crop_width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + crop_height <= height).all()
    assert (left + crop_width <= width).all()
    area = crop_height * crop_width / (height * width)
    assert area.min() >= 0.05
    assert area.max() <= 1
    # Widths are rounded to a pixel.
    assert ((crop_width + 0.51) / crop_height >= 3 / 4).all()
    assert ((crop_width - 0.51) / crop_height <= 4 / 3).all()


def test_inception_crop_draws_the_height_uniformly_not_the_area():
    rng = np.random.default_rng(0)
    heights = np.array([transforms.inception_crop_box(1000, 1000, rng)[2] for _ in range(4000)])
    # At aspect ratio a heights are uniform between sqrt(0.05/a) and min(1, 1/a) of the side; average over a.
    aspects = np.linspace(3 / 4, 4 / 3, 1001)
    expected = 1000 * ((np.sqrt(0.05 / aspects) + np.minimum(1, 1 / aspects)) / 2).mean()
    standard_error = heights.std() / np.sqrt(len(heights))
    assert abs(heights.mean() - expected) < 4 * standard_error + 1


def test_inception_crop_of_an_image_that_fits_no_box_is_the_whole_image():
    assert transforms.inception_crop_box(1, 1000, np.random.default_rng(0)) == (0, 0, 1, 1000)


@pytest.mark.parametrize("shape", ["375x500", "640x427", "32x32"])
def test_inception_crops_are_distributed_as_tensorflows(shape):
    height, width = map(int, shape.split("x"))
    rng = np.random.default_rng(0)
    # TensorFlow's default aspect ratios; ours end at 4/3.
    draws = [transforms.inception_crop_box(height, width, rng, aspect_ratios=(0.75, 1.33)) for _ in range(100_000)]
    top, left, crop_height, crop_width = np.array(draws).T
    quantities = {
        "top": top,
        "left": left,
        "height": crop_height,
        "width": crop_width,
        "area": crop_height * crop_width / (height * width),
        "aspect": crop_width / crop_height,
    }
    for name, values in quantities.items():
        theirs = GOLDEN[f"sampler/{shape}/{name}"]
        ours = np.histogram(values, GOLDEN[f"sampler/{shape}/{name}/edges"])[0]
        assert ours.sum() == theirs.sum() == 100_000
        common = ours + theirs >= 20  # for chi-squared to hold
        # Two samples from one distribution give less than 1e-4 in one of 10,000 comparisons; seeds are fixed.
        assert scipy.stats.chi2_contingency([ours[common], theirs[common]]).pvalue > 1e-4, name


def test_areas_drawn_uniformly_would_not_pass_for_tensorflows():
    theirs = GOLDEN["sampler/375x500/area"]
    area = np.random.default_rng(0).uniform(0.05, 1, 100_000)
    ours = np.histogram(area, GOLDEN["sampler/375x500/area/edges"])[0]
    assert scipy.stats.chi2_contingency([ours, theirs]).pvalue < 1e-100


@pytest.mark.parametrize("name", golden("resized/"))
def test_resize_gives_tensorflows_values_rounded(name):
    method, size = name.split("/")
    expected = GOLDEN[f"resized/{name}"].astype(float) / 100
    resized = transforms.resize(GOLDEN["picture"], *map(int, size.split("x")), method)
    assert resized.dtype == np.uint8
    error = np.abs(resized - expected.clip(0, 255))
    # The golden file tells hundredths. TensorFlow's bicubic looks its weights up in a table of 1,024 steps.
    assert error.max() <= (0.6 if method == "bicubic" else 0.51)
    assert (error > 0.51).mean() < 0.005


@pytest.mark.parametrize(("length", "size"), [(58, 224), (87, 224), (116, 224), (30, 90), (223, 224)])
def test_growing_by_area_takes_the_mean_over_what_each_new_pixel_covers(length, size):
    # 58, 87 and 116 have borders in common with 224, where OpenCV alone is a pixel off.
    old = np.random.default_rng(0).integers(0, 256, length, np.uint8)
    expected = np.repeat(old, size).reshape(size, length).mean(axis=1)
    image = np.repeat(old[:, None, None], 3, axis=-1)
    for grown in (
        transforms.resize(image, size, 1, "area")[:, 0],
        transforms.resize(image[None, :, 0], 1, size, "area")[0],
    ):
        np.testing.assert_allclose(grown[:, 0], expected, rtol=0, atol=0.501)


def test_an_unknown_resize_method_names_the_known_ones():
    for make in (
        lambda: transforms.resize(picture(), 8, 8, "bicubik"),
        lambda: transforms.TrainTransform(8, resize="bicubik"),
        lambda: transforms.EvalTransform(8, resize="bicubik"),
    ):
        with pytest.raises(UserError, match=r"unknown resize method 'bicubik'. Did you mean 'bicubic'\? Known: area,"):
            make()


@pytest.mark.parametrize("method", transforms.RESIZE_METHODS)
def test_resizing_to_the_same_size_changes_nothing(method):
    np.testing.assert_array_equal(transforms.resize(GOLDEN["picture"], 24, 34, method), GOLDEN["picture"])


def test_resize_small_rounds_the_sides_as_big_vision_does():
    for height, width, size, *expected in GOLDEN["small_sides"].tolist():
        if max(expected) < 600:  # larger ones take long and tell nothing else
            image = np.zeros((height, width, 3), np.uint8)
            assert transforms.resize_small(image, size).shape == (*expected, 3)


@pytest.mark.parametrize("size", [16, 25])
def test_resize_small_by_area_differs_from_big_visions_only_by_rounding(size):
    ours = transforms.resize_small(GOLDEN["picture"], size, "area").astype(int)
    # big_vision cuts off, so half of its values are one less.
    assert set(np.unique(ours - GOLDEN[f"small/{size}"])) == {0, 1}


@pytest.mark.parametrize("size", [10, 11])
def test_central_crop_is_tensorflows(size):
    np.testing.assert_array_equal(transforms.central_crop(GOLDEN["picture"], size), GOLDEN[f"central/{size}"])


def test_central_crop_of_a_smaller_image_is_refused():
    with pytest.raises(UserError, match="cannot cut 49 x 49 pixels out of 48 x 64"):
        transforms.central_crop(picture(), 49)


def test_random_crops_fall_on_all_places_alike():
    image = np.arange(9, dtype=np.uint8).reshape(3, 3, 1).repeat(3, axis=-1)
    rng = np.random.default_rng(0)
    corners = [int(transforms.random_crop(image, 2, rng)[0, 0, 0]) for _ in range(4000)]
    values, counts = np.unique(corners, return_counts=True)
    assert values.tolist() == [0, 1, 3, 4]
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_the_device_maps_bytes_to_tensorflows_value_range():
    values = np.asarray(normalize_images(np.arange(256, dtype=np.uint8)))
    np.testing.assert_allclose(values, GOLDEN["value_range"], rtol=0, atol=6e-8)


def test_resize_small_keeps_the_aspect_ratio_and_central_crop_takes_the_centre():
    small = transforms.resize_small(picture(48, 64), 24)
    assert small.shape == (24, 32, 3)
    cropped = transforms.central_crop(small, 20)
    np.testing.assert_array_equal(cropped, small[2:22, 6:26])


def test_bilinear_resize_matches_the_closed_form_on_a_ramp():
    ramp = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 3, axis=-1)
    ramp = np.repeat(ramp, 4, axis=0)
    doubled = transforms.resize(ramp, 4, 32)[0, :, 0].astype(float)
    expected = np.clip((np.arange(32) + 0.5) / 2 - 0.5, 0, 15) * 10  # half-pixel centres, clamped at the border
    np.testing.assert_allclose(doubled, expected, atol=0.51)


def test_train_transform_flips_half_of_the_images():
    transform = transforms.TrainTransform(image_size=8, inception_crop=False)
    image = transforms.resize(picture(), 8, 8)
    rng = np.random.default_rng(0)
    flipped = 0
    for _ in range(400):
        result = transform(image, rng)
        if not np.array_equal(result, image):
            np.testing.assert_array_equal(result, image[:, ::-1])
            flipped += 1
    assert 160 < flipped < 240


def test_eval_transform_resizes_to_the_square_or_crops_the_centre():
    image = picture(48, 96)
    np.testing.assert_array_equal(transforms.EvalTransform(16)(image), transforms.resize(image, 16, 16))
    cropped = transforms.EvalTransform(16, resize_small=24)(image)
    np.testing.assert_array_equal(cropped, transforms.central_crop(transforms.resize_small(image, 24), 16))


def test_image_whose_resized_longer_side_would_fill_the_memory_is_refused():
    with pytest.raises(transforms.ImageError, match=r"256 x 5,120,000 pixels"):
        transforms.EvalTransform(224, resize_small=256)(np.zeros((1, 20_000, 3), np.uint8))


def test_resize_smaller_than_the_crop_is_refused():
    with pytest.raises(UserError, match=r"eval_resize_small 16 is less than data\.image_size 32"):
        transforms.EvalTransform(32, resize_small=16)


def test_evaluation_crops_the_centre_of_a_square_where_asked():
    image = np.arange(30 * 50 * 3, dtype=np.uint64).reshape(30, 50, 3).astype(np.uint8)
    square = transforms.resize(image, 24, 24)
    np.testing.assert_array_equal(transforms.EvalTransform(16, crop_from=24)(image), square[4:20, 4:20])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_from": 15}, "crop_from 15 must be at least the image size, 16"),
        ({"crop_from": 24, "resize_small": 20}, "set either"),
    ],
)
def test_square_that_cannot_be_cropped_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        transforms.EvalTransform(16, **options)


def test_a_flip_is_tensorflows():
    transform = transforms.TrainTransform(image_size=24, inception_crop=False)
    square = GOLDEN["picture"][:, :24].copy()
    flipped = next(
        r for r in (transform(square, np.random.default_rng(seed)) for seed in range(20)) if (r != square).any()
    )
    np.testing.assert_array_equal(flipped, GOLDEN["flipped"][:, -24:])


TRANSFORMS = {
    "default": transforms.TrainTransform(20),
    "area": transforms.TrainTransform(20, resize="area", flip=False, min_area=0.5),
    "whole image": transforms.TrainTransform(20, inception_crop=False, resize="bicubic"),
    "random crop": transforms.TrainTransform(20, inception_crop=False, random_crop_from=28),
    "randaugment": transforms.TrainTransform(20, randaugment=randaugment.RandAugment()),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", ["jpeg 420", "jpeg cmyk", "jpeg restarts", "png", "jpeg 1x1", "webp animated"])
def test_train_transforms_make_the_same_of_a_file_and_of_its_pixels(transform, name):
    decoded = transforms.decode(FILES[name])
    for seed in range(10):
        of_file = transform(FILES[name], np.random.default_rng(seed))
        assert of_file.shape == (20, 20, 3)
        assert of_file.dtype == np.uint8
        np.testing.assert_array_equal(of_file, transform(decoded, np.random.default_rng(seed)))


@pytest.mark.parametrize("transform", [transforms.EvalTransform(20), transforms.EvalTransform(16, 20, "area")])
def test_eval_transforms_make_the_same_of_a_file_and_of_its_pixels(transform):
    for encoded in FILES.values():
        np.testing.assert_array_equal(transform(encoded), transform(transforms.decode(encoded)))


@pytest.mark.parametrize("method", transforms.RESIZE_METHODS)
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_images_20000_pixels_wide_are_images_as_any_other(file_format, method):
    stripes = np.zeros((6, 20_000, 3), np.uint8)
    stripes[:, 10_000:] = 255
    encoded = save(stripes, file_format)
    assert transforms.size_of(encoded) == (6, 20_000)
    evaluated = transforms.EvalTransform(32, resize=method)(encoded)
    assert (evaluated[:, :15] == 0).all()
    assert (evaluated[:, 17:] == 255).all()
    trained = transforms.TrainTransform(32, resize=method)(encoded, np.random.default_rng(0))
    assert trained.shape == (32, 32, 3)


def test_random_crop_is_cut_from_the_whole_image_resized():
    transform = transforms.TrainTransform(20, inception_crop=False, flip=False, random_crop_from=28)
    resized = transforms.resize(GOLDEN["picture"], 28, 28)
    result = transform(GOLDEN["picture"], np.random.default_rng(0))
    places = [(y, x) for y in range(9) for x in range(9) if np.array_equal(result, resized[y : y + 20, x : x + 20])]
    assert len(places) == 1


def test_two_ways_to_crop_at_once_are_refused():
    with pytest.raises(UserError, match=r"inception_crop and data\.random_crop_from"):
        transforms.TrainTransform(20, random_crop_from=28)


def test_a_random_crop_from_less_than_its_size_is_refused():
    with pytest.raises(UserError, match=r"random_crop_from 16 is less than data\.image_size 20"):
        transforms.TrainTransform(20, inception_crop=False, random_crop_from=16)


def test_orientation_in_exif_is_ignored_by_every_decoder():
    turned = bytes.fromhex("ffe100224578696600004d4d002a000000080001011200030000000100060000000000000000")
    upright = jpeg(picture())
    with_exif = upright[:2] + turned + upright[2:]
    stray = with_exif[: with_exif.index(b"\xff\xdb")] + b"\0\0" + with_exif[with_exif.index(b"\xff\xdb") :]
    for encoded in (with_exif, stray):
        assert transforms.decode(encoded).shape == (48, 64, 3)
