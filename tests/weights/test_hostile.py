"""Hostile folders and files, and limits of other formats."""

import dataclasses
import json
import re

import numpy as np
import pytest
import safetensors.numpy

from tests.weights.helpers import edit, refuses, save_plain, strip_description
from tests.weights.test_formats import assert_same, make_weights
from vit_jax.errors import UserError
from vit_jax.weights import Preprocessing, load, save
from vit_jax.weights import huggingface as folders

# --- Hostile descriptions ---

HOSTILE = (None, True, -1, 0, 0.5, 10**9, 10**400, "x", "1", [], [[1, 2]], [1, "2"], {}, {"height": -5}, [10**9] * 3)
HUGGINGFACE_FIELDS = ("model_type", "hidden_act", "layer_norm_eps", "pooler_act", "image_size", "num_attention_heads",
                      "id2label", "problem_type")  # fmt: skip
PROCESSOR_FIELDS = ("image_processor_type", "do_resize", "size", "resample", "do_center_crop", "crop_size",
                    "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb",
                    "default_to_square", "do_pad")  # fmt: skip
TIMM_FIELDS = ("architecture", "model_args", "pretrained_cfg", "input_size", "mean", "std", "crop_pct", "crop_mode",
               "interpolation", "label_names", "crop_border_pixels")  # fmt: skip
TIMM_ARGUMENTS = ("num_heads", "act_layer", "global_pool", "class_token", "img_size", "norm_layer")


def is_refused_or_read(read):
    """Whether it is refused; any other error fails the test."""
    try:
        read()
    except UserError as error:
        assert len(str(error)) < 1000
        return True
    return False


@pytest.mark.parametrize(
    ("kind", "file", "fields"),
    [
        ("huggingface", "config.json", HUGGINGFACE_FIELDS),
        ("huggingface", "preprocessor_config.json", PROCESSOR_FIELDS),
        ("timm", "config.json", TIMM_FIELDS),
        ("timm", "model_args", TIMM_ARGUMENTS),
    ],
)
def test_no_field_of_foreign_json_ends_in_a_foreign_error(kind, file, fields, request):
    folder = request.getfixturevalue(kind)
    path = folder / ("config.json" if file == "model_args" else file)
    content = json.loads(path.read_text())
    refused = 0
    for field in fields:
        for value in HOSTILE:
            changed = content | {field: value}
            inside = "model_args" if file == "model_args" else "pretrained_cfg"
            if kind == "timm" and field in TIMM_ARGUMENTS + TIMM_FIELDS[3:]:
                changed = content | {inside: content[inside] | {field: value}}
            path.write_text(json.dumps(changed))
            refused += is_refused_or_read(lambda: folders.read_facts(folder))
    assert refused > 0.6 * len(fields) * len(HOSTILE)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"size": NaN}', '{"a": 1, "a": 2}', "[]"])
def test_json_that_is_not_what_it_should_be_is_refused(text, huggingface):
    for name in ("config.json", "preprocessor_config.json"):
        before = (huggingface / name).read_text()
        (huggingface / name).write_text(text)
        if "NaN" in text and name == "config.json":
            continue  # it has no such field
        refuses(f"{name}.*(damaged|size is)", huggingface)
        (huggingface / name).write_text(before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_resize": False, "do_center_crop": True}, "do_center_crop is true and do_resize false"),
        ({"do_pad": True}, "do_pad is True, which vit_jax cannot compute"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is True"),
        ({"image_processor_type": "ConvNextImageProcessor"}, "'ConvNextImageProcessor', which vit_jax cannot compute"),
        ({"size": {"shortest_edge": 16}}, "size has a shortest_edge alone"),
        ({"size": {"longest_edge": 16}}, "size is .*longest_edge.*expected height and width"),
        ({"do_center_crop": True, "crop_size": 20}, "crop_size is larger than size"),
        ({"do_center_crop": True, "size": [16, 32], "crop_size": [8, 8]}, "crop_size has another shape than size"),
        ({"resample": 6}, "resample is 6; expected a whole number from 0 to 5"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std is .*expected numbers above 0"),
        ({"rescale_factor": 0}, "rescale_factor is 0; expected a number above 0"),
    ],
    ids=str,
)
def test_preprocessing_of_huggingface_that_cannot_be_computed_is_refused(fields, message, huggingface):
    edit(huggingface / "preprocessor_config.json", **fields)
    refuses(message, huggingface)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"crop_mode": "border"},
            "crop_mode is 'border', which vit_jax cannot compute; it knows 'center'",
        ),
        ({"interpolation": "random"}, "interpolation is 'random'"),
        ({"crop_pct": 1.2}, "crop_pct is 1.2; expected a number above 0 up to 1"),
        ({"crop_border_pixels": 4}, "crop_border_pixels is set"),
        ({"input_size": [1, 16, 16]}, "expected 3 channels first"),
    ],
    ids=str,
)
def test_preprocessing_of_timm_that_cannot_be_computed_is_refused(fields, message, timm):
    config = json.loads((timm / "config.json").read_text())
    edit(timm / "config.json", pretrained_cfg=config["pretrained_cfg"] | fields)
    refuses(message, timm)


def test_fields_that_are_not_read_are_reported(huggingface):
    edit(huggingface / "preprocessor_config.json", brightness=2)
    assert any("not read: brightness" in note for note in load(huggingface).notes)
    (huggingface / "preprocessor_config.json").unlink()
    assert any("no " in note and "preprocessor_config.json" in note for note in load(huggingface).notes)


def test_a_timm_model_whose_function_may_be_another_is_refused(timm):
    config = json.loads((timm / "config.json").read_text())
    edit(timm / "config.json", model_args=config["model_args"] | {"norm_layer": "rmsnorm"})
    refuses("norm_layer is 'rmsnorm', which vit_jax does not know", timm)
    edit(timm / "config.json", model_args=config["model_args"], global_pool="avg")
    refuses("has a class token but averages the others", timm)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("overrides", {"num_layers": 10**9}, "num_layers is 1000000000; expected a whole number from 1 to"),
        ("overrides", {"num_layers": 255}, "num_layers is 255"),  # more than there are arrays
        ("overrides", {"hidden_dim": 10**12}, "hidden_dim"),
        ("overrides", {"patch_size": -4}, "patch_size is -4"),
        ("overrides", {"num_heads": "2"}, "num_heads is '2'"),
        ("overrides", {"stages": [[1]]}, r"stages is \[\[1\]\]"),
        ("overrides", {"stages": [10**9]}, "stages"),
        ("overrides", {"remat": "full"}, "remat is 'full'; expected no such attribute"),
        ("overrides", {"pool": ["cls"]}, "pool|unhashable|damaged"),
        ("model", "ViT-Ti/1000000000000", "model is 'ViT-Ti/1000000000000'"),
        ("model", "R50x" + "9" * 5000, "model"),
        ("num_classes", 10**18, "num_classes is 1000000000000000000; expected"),
        ("image_size", [10**9, 10**9], r"image_size is \[1000000000, 1000000000\]"),
        ("image_size", [10**4, 10**4], "."),
        ("class_names", [["cat"]] * 5, "class_names is .*expected a list of strings"),
        ("probabilities", "tanh", "probabilities is 'tanh'; expected one of softmax, sigmoid"),
        ("preprocessing", {"image_size": [10**9, 1]}, "image_size"),
        ("preprocessing", {"mean": [0.5, None, 0.5]}, "mean"),
    ],
    ids=str,
)
def test_a_hostile_description_is_refused_at_once(field, value, message, tmp_path):
    path = save(make_weights(), tmp_path / "weights.npz")
    edit(tmp_path / "weights.npz.json", **{field: value})
    refuses(message, path)


def test_names_that_claim_a_million_layers_are_refused_at_once(plain):
    arrays, path = plain
    name = "Transformer/encoderblock_{}/LayerNorm_0/scale"
    other = "not of this model"
    for layer, message in (("999999", "of 1,000,000 layers"), ("9" * 5000, other), ("٣", other)):
        refuses(message, save_plain(path, arrays | {name.format(layer): arrays[name.format(0)]}))
    refuses("not of this model: .*_01/", save_plain(path, arrays | {name.format("01"): arrays[name.format(0)]}))
    stacked = arrays | {"Transformer/encoderblock/x": np.zeros((10**6, 1), np.float32)}
    refuses(r"Transformer/encoderblock/x has an unexpected shape, \(1000000, 1\)", save_plain(path, stacked))
    refuses("unexpected shape", save_plain(path, arrays | {"Transformer/encoderblock/x": np.float32(0)}))


def test_values_that_are_not_numbers_are_refused_by_name_unless_they_are_allowed(plain):
    arrays, path = plain
    arrays["head/kernel"][0, 0], arrays["head/bias"][0] = np.inf, np.nan
    save_plain(path, arrays)
    refuses("infinite or not a number, in head/bias, head/kernel", path)
    assert np.isnan(load(path, allow_nan=True).arrays["head/bias"][0])


@pytest.mark.parametrize("prefix", ["module.", "net.vit._orig_mod."])
def test_state_dicts_of_training_libraries_are_read_with_any_prefix(prefix, timm, huggingface):
    for folder, wrap in ((timm, prefix), (huggingface, prefix)):
        expected = load(folder).arrays
        arrays = safetensors.numpy.load_file(folder / "model.safetensors")
        arrays = {wrap + name: array for name, array in arrays.items()} | {"criterion.weight": np.ones(3)}
        safetensors.numpy.save_file(arrays, folder / "model.safetensors")
        assert_same(load(folder).arrays, expected)


def test_two_models_in_a_file_are_an_error(timm):
    arrays = safetensors.numpy.load_file(timm / "model.safetensors")
    both = {f"{who}.{name}": array for name, array in arrays.items() for who in ("student", "teacher")}
    safetensors.numpy.save_file(both, timm / "model.safetensors")
    refuses("2 models, whose names begin with 'student.', 'teacher.'", timm)


def test_a_checkpoint_of_orbax_is_not_mistaken_for_weights(tmp_path):
    (tmp_path / "checkpoints" / "8" / "tree").mkdir(parents=True)
    (tmp_path / "checkpoints" / "8" / "_CHECKPOINT_METADATA").write_text("{}")
    refuses("an Orbax checkpoint.*name the workdir of its run", tmp_path / "checkpoints" / "8")


def test_a_damaged_file_of_the_cache_comes_with_the_command_that_deletes_it(cache):
    name = "augreg_ti16_i21k_in1k_384"
    path = cache(name, {})
    path.write_bytes(b"PK but no zip file")
    refuses(rf"damaged or truncated.*Delete the downloaded one first: rm .*{path.name}", name)


# --- What the other format cannot say ---


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing((16, 16), resize="crop", crop_fraction=0.8, interpolation="bicubic", antialias=True),
        Preprocessing((16, 16), crop_fraction=0.8, interpolation="area", antialias=True),
        Preprocessing((16, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), interpolation="lanczos", antialias=True),
        Preprocessing((16, 16), resize="none", antialias=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("to", ["huggingface", "timm"])
def test_preprocessing_survives_a_folder_of_others_or_is_refused_whole(to, preprocessing, tmp_path, caplog):
    weights = dataclasses.replace(make_weights(), preprocessing=preprocessing)
    if to == "timm" and preprocessing.resize == "none":
        with pytest.raises(UserError, match=r"timm resizes all images.*--to=huggingface"):
            save(weights, tmp_path / "a", to=to)
        assert not (tmp_path / "a").exists()
        return
    found = load(strip_description(save(weights, tmp_path / "a", to=to)).parent).preprocessing
    assert dataclasses.replace(found, centre_to_even=False) == preprocessing
    assert caplog.messages == []


def test_what_a_folder_of_others_cannot_say_is_reported(tmp_path, caplog):
    preprocessing = Preprocessing((16, 16), interpolation="area", exif_orientation=True)
    weights = dataclasses.replace(make_weights(), preprocessing=preprocessing, probabilities="sigmoid")
    save(weights, tmp_path / "timm", to="timm")
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]["interpolation"] == "box"
    told = "\n".join(caplog.messages)
    assert re.search("evaluated with area without antialiasing", told)
    assert re.search("take sigmoids", told)
    assert re.search("timm does not turn images", told)
    caplog.clear()
    save(weights, tmp_path / "a.safetensors", to="timm")
    assert "neither preprocessing nor class names" in caplog.text


def test_a_crop_that_is_not_square_is_not_written_for_huggingface(tmp_path):
    weights = make_weights(image_size=(8, 24))
    weights = dataclasses.replace(weights, preprocessing=Preprocessing((8, 24), resize="crop", crop_fraction=0.8))
    with pytest.raises(UserError, match="no central crop of 8x24"):
        save(weights, tmp_path / "a", to="huggingface")
    assert not (tmp_path / "a").exists()
