import json
import math
import pathlib

import cv2
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from vit_jax.data.transforms import ImageError
from vit_jax.errors import UserError
from vit_jax.json_files import Fields
from vit_jax.weights import Preprocessing, foreign_preprocessing

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def photo(height, width, seed=0):
    """Noise, in which every way to resample shows."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(image, height, width, resample):
    return np.asarray(PIL.Image.fromarray(image).resize((width, height), resample))


@pytest.mark.parametrize(("height", "width"), [(40, 90), (90, 40), (16, 16), (8, 12), (1, 1)])
@pytest.mark.parametrize("resize", ["square", "crop"])
def test_any_image_becomes_the_models_input(height, width, resize):
    result = Preprocessing((16, 24), resize=resize, crop_fraction=0.875)(photo(height, width))
    assert result.shape == (16, 24, 3)
    assert result.dtype == np.uint8


def test_square_resizes_the_whole_image_whatever_its_shape():
    image = photo(40, 90)
    expected = np.rint(cv2.resize(image.astype(np.float32), (24, 16), interpolation=cv2.INTER_LINEAR))
    np.testing.assert_array_equal(Preprocessing((16, 24))(image), expected)


def test_crop_keeps_the_aspect_ratio_and_cuts_out_the_centre():
    image = photo(40, 80)
    resized = np.rint(cv2.resize(image.astype(np.float32), (40, 20), interpolation=cv2.INTER_LINEAR))
    expected = resized[2:18, 12:28]
    np.testing.assert_array_equal(Preprocessing((16, 16), resize="crop", crop_fraction=0.8)(image), expected)


def test_crop_of_a_tall_image_cuts_above_and_below():
    image = photo(80, 40)
    resized = np.rint(cv2.resize(image.astype(np.float32), (20, 40), interpolation=cv2.INTER_LINEAR))
    expected = resized[12:28, 2:18]
    np.testing.assert_array_equal(Preprocessing((16, 16), resize="crop", crop_fraction=0.8)(image), expected)


def test_an_image_of_the_right_size_is_left_as_it_is():
    image = photo(16, 16)
    for resize in ("square", "crop"):
        for antialias in (False, True):
            np.testing.assert_array_equal(Preprocessing((16, 16), resize=resize, antialias=antialias)(image), image)


@pytest.mark.parametrize(
    ("interpolation", "resample"),
    [
        ("bilinear", PIL.Image.Resampling.BILINEAR),
        ("bicubic", PIL.Image.Resampling.BICUBIC),
        ("nearest", PIL.Image.Resampling.NEAREST),
    ],
)
def test_antialias_is_pillows_resize(interpolation, resample):
    image = photo(40, 90)
    found = Preprocessing((16, 24), interpolation=interpolation, antialias=True)(image)
    np.testing.assert_array_equal(found, by_pillow(image, 16, 24, resample))


def test_shrinking_averages_with_antialias_only():
    image = photo(160, 160)
    plain, antialiased = Preprocessing((16, 16))(image), Preprocessing((16, 16), antialias=True)(image)
    assert plain.std() > 3 * antialiased.std()


def test_mean_and_std_of_a_half_give_minus_one_to_one():
    values = Preprocessing().normalize(np.array([[[0, 127, 255]]], np.uint8))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, [[[-1, -1 / 255, 1]]], atol=1e-6)


def test_normalize_is_of_each_channel():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = photo(4, 5)
    expected = (image / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(Preprocessing(mean=mean, std=std).normalize(image), expected, atol=1e-5)


def test_normalize_takes_jax_arrays_and_batches():
    images = np.stack([photo(4, 5, seed) for seed in range(3)])
    found = Preprocessing().normalize(jnp.asarray(images))
    assert isinstance(found, jnp.ndarray)
    np.testing.assert_allclose(found, Preprocessing().normalize(images), atol=1e-6)


def test_json_and_back_changes_nothing():
    given = Preprocessing((224, 384), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "crop", 0.875, "bicubic", True, True)
    assert Preprocessing.from_json(json.loads(json.dumps(given.to_json()))) == given


@pytest.mark.parametrize("fields", [{"sise": 3}, {"std": [0.5, "a", 0.5]}, {"image_size": None}, {"std": []}])
def test_foreign_json_is_refused(fields):
    with pytest.raises(UserError, match="preprocessing"):
        Preprocessing.from_json(fields)


@pytest.mark.parametrize("fields", [None, 5, "abc", []])
def test_json_that_is_not_a_dictionary_is_refused(fields):
    with pytest.raises(UserError, match="preprocessing"):
        Preprocessing.from_json(fields)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"resize": "squash"}, "resize must be one of square, crop, none .*'squash'"),
        ({"interpolation": "random"}, "interpolation one of bilinear, bicubic, nearest.*'random'"),
        ({"interpolation": "lanczos"}, "lanczos needs antialias=True"),
        ({"crop_fraction": 0.0}, "crop_fraction must be more than 0"),
        ({"crop_fraction": 1.1}, "crop_fraction must be .* at most 1"),
        ({"std": (0.5, 0.0, 0.5)}, "std more than 0"),
        ({"image_size": (0, 224)}, "image_size at least 1"),
    ],
)
def test_impossible_values_are_refused(attributes, message):
    with pytest.raises(UserError, match=message):
        Preprocessing(**attributes)


@pytest.mark.parametrize(("given", "expected"), [(384, (384, 384)), ((224, 384), (224, 384))])
def test_another_image_size_changes_nothing_else(given, expected):
    preprocessing = Preprocessing(resize="crop", crop_fraction=0.9, mean=(0.1, 0.2, 0.3))
    assert preprocessing.at(given) == Preprocessing(expected, resize="crop", crop_fraction=0.9, mean=(0.1, 0.2, 0.3))


# --- Hugging Face's and timm's ways, against what they compute (golden/make_preprocessing_golden.py) ---

CONFIGS = json.loads((GOLDEN / "preprocessing.json").read_text())


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "preprocessing.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in CONFIGS for name in CONFIGS[library]])
def test_a_config_of_others_is_computed_as_its_library_computes_it(library, name, golden):
    fields = Fields(CONFIGS[library][name], "config.json")
    if library == "timm":
        preprocessing, notes = foreign_preprocessing.read_timm(fields), ()
    else:
        size = (41, 63) if name == "no resize" else None
        preprocessing, notes = foreign_preprocessing.read_huggingface(fields, size)
    assert notes == ()
    ours, theirs = preprocessing.normalize(preprocessing(golden["image"])), golden[f"{library}/{name}"]
    ours = ours[::28, ::28] if (library, name) == ("huggingface", "all defaults") else ours
    scale = 1 / (255 * min(preprocessing.std))  # of one of the image's 256 values
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * scale)


def test_a_crop_of_huggingface_is_cut_from_exactly_the_size_it_names():
    for whole in range(1, 300):
        for part in range(1, whole + 1):
            fraction = foreign_preprocessing._fraction(part, whole)
            assert math.floor(part / fraction) == whole, (part, whole)
            assert fraction <= 1


def test_without_resizing_only_images_of_the_right_size_are_accepted():
    preprocessing = Preprocessing((16, 24), resize="none")
    image = photo(16, 24)
    assert preprocessing(image) is image
    with pytest.raises(ImageError, match=r"40 x 90 pixels .*does not resize, so images must have 16 x 24"):
        preprocessing(photo(40, 90))


def test_an_image_that_a_crop_would_make_too_large_is_refused():
    with pytest.raises(ImageError, match="pixels after resizing"):
        Preprocessing((224, 224), resize="crop", antialias=True)(photo(1, 4000))
