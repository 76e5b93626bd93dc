import cv2
import numpy as np
import pytest
import simplejpeg

from vit_jax.data import images
from vit_jax.errors import UserError


def picture(height=48, width=64):
    """A smooth picture, which JPEG keeps well."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y / height, 255 * x / width, 128 + 0 * x], axis=-1).astype(np.uint8)


def jpeg(image):
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95)


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def test_jpeg_decodes_to_rgb():
    decoded = images.decode(jpeg(picture()))
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - picture()).max() < 12


def test_png_decodes_exactly_whatever_the_file_is_called():
    np.testing.assert_array_equal(images.decode(png(picture())), picture())


def test_grey_images_decode_to_three_equal_channels():
    grey = np.ascontiguousarray(picture()[..., :1])
    for encoded in (simplejpeg.encode_jpeg(grey, colorspace="gray"), cv2.imencode(".png", grey)[1].tobytes()):
        decoded = images.decode(encoded)
        assert decoded.shape == (48, 64, 3)
        np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])


@pytest.mark.parametrize("encode", [jpeg, png])
def test_truncated_images_are_refused_wherever_they_are_cut(encode):
    whole = encode(picture())
    for kept in np.linspace(0, len(whole) - 3, 40, dtype=int):
        with pytest.raises(images.ImageError):
            images.decode(whole[:kept])


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8", b"GIF89a" + bytes(100), b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_are_refused(content):
    with pytest.raises(images.ImageError):
        images.decode(content)


def test_stray_bytes_between_jpeg_segments_harm_nothing():
    whole = jpeg(picture())
    table = whole.index(b"\xff\xdb")
    stray = whole[:table] + b"\0\0" + whole[table:]
    assert np.abs(images.decode(stray).astype(int) - images.decode(whole)).max() <= 6  # another decoder's rounding
    with pytest.raises(images.ImageError):
        images.decode(stray[:-100])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (32, 32), (100, 1000)])
def test_inception_crops_stay_within_image_area_and_aspect_ratio(height, width):
    rng = np.random.default_rng(0)
    boxes = np.array([images.inception_crop_box(height, width, rng) for _ in range(2000)])
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
    heights = np.array([images.inception_crop_box(1000, 1000, rng)[2] for _ in range(4000)])
    # At aspect ratio a heights are uniform between sqrt(0.05/a) and min(1, 1/a) of the side; average over a.
    aspects = np.linspace(3 / 4, 4 / 3, 1001)
    expected = 1000 * ((np.sqrt(0.05 / aspects) + np.minimum(1, 1 / aspects)) / 2).mean()
    standard_error = heights.std() / np.sqrt(len(heights))
    assert abs(heights.mean() - expected) < 4 * standard_error + 1


def test_inception_crop_of_an_image_that_fits_no_box_is_the_whole_image():
    assert images.inception_crop_box(1, 1000, np.random.default_rng(0)) == (0, 0, 1, 1000)


def test_resize_small_keeps_the_aspect_ratio_and_central_crop_takes_the_centre():
    small = images.resize_small(picture(48, 64), 24)
    assert small.shape == (24, 32, 3)
    cropped = images.central_crop(small, 20)
    np.testing.assert_array_equal(cropped, small[2:22, 6:26])


def test_bilinear_resize_matches_the_closed_form_on_a_ramp():
    ramp = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 3, axis=-1)
    ramp = np.repeat(ramp, 4, axis=0)
    doubled = images.resize(ramp, 4, 32)[0, :, 0].astype(float)
    expected = np.clip((np.arange(32) + 0.5) / 2 - 0.5, 0, 15) * 10  # half-pixel centres, clamped at the border
    np.testing.assert_allclose(doubled, expected, atol=0.51)


def test_train_transform_flips_half_of_the_images():
    transform = images.TrainTransform(image_size=8, inception_crop=False)
    image = images.resize(picture(), 8, 8)
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
    np.testing.assert_array_equal(images.EvalTransform(16)(image), images.resize(image, 16, 16))
    cropped = images.EvalTransform(16, resize_small=24)(image)
    np.testing.assert_array_equal(cropped, images.central_crop(images.resize_small(image, 24), 16))


def test_resize_smaller_than_the_crop_is_refused():
    with pytest.raises(UserError, match=r"eval_resize_small 16 is less than data\.image_size 32"):
        images.EvalTransform(32, resize_small=16)


def test_orientation_in_exif_is_ignored_by_every_decoder():
    turned = bytes.fromhex("ffe100224578696600004d4d002a000000080001011200030000000100060000000000000000")
    upright = jpeg(picture())
    with_exif = upright[:2] + turned + upright[2:]
    stray = with_exif[: with_exif.index(b"\xff\xdb")] + b"\0\0" + with_exif[with_exif.index(b"\xff\xdb") :]
    for encoded in (with_exif, stray):
        assert images.decode(encoded).shape == (48, 64, 3)
