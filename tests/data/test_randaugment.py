import pathlib
import re

import numpy as np
import pytest
import scipy.stats

from vit_jax.data import randaugment as augment
from vit_jax.errors import UserError

with np.load(pathlib.Path(__file__).parents[1] / "golden" / "images.npz") as _file:
    GOLDEN = {name: _file[name] for name in _file.files if name.startswith(("augmented", "timm", "picture"))}
PICTURE = GOLDEN["augmented"]


def results_of(prefix):
    return sorted(name.removeprefix(prefix) for name in GOLDEN if name.startswith(prefix))


def snake_case(timm_name):
    name = timm_name.removesuffix("Increasing").removesuffix("Rel").replace("AutoContrast", "Autocontrast")
    return re.sub("(?<=.)([A-Z])", r"_\1", name).lower()


@pytest.mark.parametrize("name", [name for name in results_of("augmented/") if not name.startswith("cutout")])
def test_operations_give_tensorflows_pixels(name):
    operation, level = name.split("/")
    # TensorFlow moves all images by as many pixels, ours by as many of 224.
    side = {"translate_x": PICTURE.shape[1], "translate_y": PICTURE.shape[0]}.get(operation, 224)
    result = augment.OPERATIONS["tensorflow"][operation](PICTURE, float(level) * 224 / side)
    np.testing.assert_array_equal(result, GOLDEN[f"augmented/{name}"])


@pytest.mark.parametrize("name", results_of("augmented/cutout/"))
def test_cutout_gives_tensorflows_pixels(name):
    result = augment.cutout(PICTURE, row=8, column=24, half=int(float(name) * 40))
    np.testing.assert_array_equal(result, GOLDEN[f"augmented/cutout/{name}"])


@pytest.mark.parametrize("name", results_of("timm/"))
def test_operations_give_timms_pixels(name):
    operation, level = name.split("/")
    result = augment.OPERATIONS["timm"][snake_case(operation)](PICTURE, float(level))
    np.testing.assert_array_equal(result, GOLDEN[f"timm/{name}"])


def test_the_operations_match_big_vision_and_timm():
    golden = {name.split("/")[0] for name in results_of("augmented/")}
    assert set(augment.OPERATIONS["tensorflow"]) == golden
    assert set(augment.OPERATIONS["timm"]) == {snake_case(name.split("/")[0]) for name in results_of("timm/")}


@pytest.mark.parametrize("size", [32, 224, 448])
def test_translations_keep_their_share_of_the_image(size):
    image = np.full((size, size, 3), 255, np.uint8)
    moved = augment.OPERATIONS["tensorflow"]["translate_x"](image, 1.5)
    assert (moved[0, :, 0] == 128).sum() == round(150 * size / 224)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y", "solarize_add"])
@pytest.mark.parametrize("implementation", ["tensorflow", "timm"])
def test_at_magnitude_0_what_moves_or_adds_changes_nothing(implementation, name):
    np.testing.assert_array_equal(augment.OPERATIONS[implementation][name](PICTURE, 0.0), PICTURE)


@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_at_magnitude_5_tensorflows_enhancements_change_nothing(name):
    np.testing.assert_array_equal(augment.OPERATIONS["tensorflow"][name](PICTURE, 0.5), PICTURE)


@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_at_magnitude_0_timms_enhancements_change_nothing(name):
    np.testing.assert_array_equal(augment.OPERATIONS["timm"][name](PICTURE, 0.0), PICTURE)


def test_timms_posterize_leaves_no_bit_at_magnitude_10():
    assert not augment.OPERATIONS["timm"]["posterize"](PICTURE, 1.0).any()


@pytest.mark.parametrize("value", [0, 77, 255])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (16, 16)])
@pytest.mark.parametrize("implementation", ["tensorflow", "timm"])
def test_even_and_tiny_images_keep_shape_and_type(implementation, shape, value):
    image = np.full((*shape, 3), value, np.uint8)
    for operation in augment.OPERATIONS[implementation].values():
        for level in (0.0, -0.7, 1.0):
            result = operation(image, abs(level)) if operation is not None else augment.cutout(image, 0, 0, 3)
            assert result.shape == image.shape
            assert result.dtype == np.uint8


RANDAUGMENTS = {"AugReg": augment.RandAugment(2, 15), "many": augment.RandAugment(30, 7), "DeiT": augment.DEIT}


@pytest.mark.parametrize("randaugment", RANDAUGMENTS.values(), ids=RANDAUGMENTS)
def test_the_result_follows_from_the_generator_and_the_argument_stays(randaugment):
    original = PICTURE.copy()
    different = set()
    for seed in range(40):
        first, second = (randaugment(PICTURE, np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(first, second)
        assert first.shape == PICTURE.shape
        assert first.dtype == np.uint8
        different.add(first.tobytes())
    np.testing.assert_array_equal(PICTURE, original)
    assert len(different) > 1


def test_no_layers_change_nothing():
    np.testing.assert_array_equal(augment.RandAugment(0)(PICTURE, np.random.default_rng(0)), PICTURE)


def one_layer(monkeypatch, randaugment, draws):
    """Counts (name, level) over many images; the operations are replaced by ones that tell who they are."""
    seen = []

    def tell(name):
        return lambda image, level: seen.append((name, level)) or image

    table = augment.OPERATIONS[randaugment.operations]
    for name in table:
        monkeypatch.setitem(table, name, tell(name))
    rng = np.random.default_rng(0)
    for _ in range(draws):
        randaugment(PICTURE, rng)
    return seen


def test_tensorflows_operations_are_always_applied_and_equally_likely(monkeypatch):
    seen = one_layer(monkeypatch, augment.RandAugment(1, 10), 8000)
    assert len(seen) == 8000
    _, counts = np.unique([name for name, _ in seen], return_counts=True)
    assert len(counts) == 16
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_timms_operations_are_applied_half_of_the_time(monkeypatch):
    seen = one_layer(monkeypatch, augment.RandAugment(1, 9, operations="timm"), 8000)
    assert scipy.stats.binomtest(len(seen), 8000).pvalue > 1e-4
    _, counts = np.unique([name for name, _ in seen], return_counts=True)
    assert len(counts) == 15
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize(
    ("implementation", "directed"),
    [
        ("tensorflow", {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}),
        (
            "timm",
            {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
            | {"color", "contrast", "brightness", "sharpness"},
        ),
    ],
)
def test_directed_operations_go_either_way(monkeypatch, implementation, directed):
    seen = one_layer(monkeypatch, augment.RandAugment(1, 10, operations=implementation), 4000)
    levels = {name: {level for other, level in seen if other == name} for name, _ in seen}
    assert {name for name, found in levels.items() if found == {1.0, -1.0}} == directed
    assert all(found == {1.0} for name, found in levels.items() if name not in directed)
    turned = [level for name, level in seen if name in directed]
    assert scipy.stats.binomtest(turned.count(-1.0), len(turned)).pvalue > 1e-4


def test_deits_magnitudes_spread_around_9_and_end_at_10(monkeypatch):
    levels = np.abs([level for _, level in one_layer(monkeypatch, augment.DEIT, 4000)])
    assert levels.max() == 1.0
    below = levels[levels < 1]
    expected = scipy.stats.truncnorm(-18, 2, loc=0.9, scale=0.05)
    assert scipy.stats.kstest(below, expected.cdf).pvalue > 1e-4
    assert scipy.stats.binomtest(int((levels == 1).sum()), len(levels), scipy.stats.norm.sf(2)).pvalue > 1e-4


def test_the_settings_of_augreg_match_big_vision():
    settings = {
        name: (setting.randaugment and (setting.randaugment.num_layers, setting.randaugment.magnitude))
        for name, setting in augment.AUGREG.items()
    }
    assert settings == {
        "none": None,
        "light1": (2, 0),
        "light2": (2, 10),
        "medium1": (2, 15),
        "medium2": (2, 15),
        "strong1": (2, 20),
        "strong2": (2, 20),
    }
    assert [setting.mixup_alpha for setting in augment.AUGREG.values()] == [0, 0, 0.2, 0.2, 0.5, 0.5, 0.8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"magnitude": 31}, "a magnitude from 0 to 30"),
        ({"magnitude": -1}, "a magnitude from 0 to 30"),
        ({"magnitude": 15, "operations": "timm"}, "a magnitude from 0 to 10"),
        ({"magnitude_std": -0.5}, "at least 0"),
        ({"num_layers": -1}, "at least 0"),
        ({"operations": "tensorflo"}, "Did you mean 'tensorflow'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        augment.RandAugment(**options)
