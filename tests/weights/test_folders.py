"""Folders of Hugging Face and timm: writing our own, and reading foreign ones."""

import json

import pytest

from tests.weights.helpers import NAMES, edit, refuses, strip_description
from tests.weights.test_formats import make_weights
from vit_jax.weights import Preprocessing, load, save


def test_a_huggingface_folder_has_what_transformers_reads(huggingface):
    config = json.loads((huggingface / "config.json").read_text())
    assert config["model_type"] == "vit"
    assert config["architectures"] == ["ViTForImageClassification"]
    expected = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    expected |= {"image_size": 16, "patch_size": 4, "num_channels": 3, "qkv_bias": True, "layer_norm_eps": 1e-6}
    assert config | expected == config
    assert config["hidden_act"] == "gelu_pytorch_tanh"
    assert config["id2label"] == dict(zip("01234", NAMES, strict=True))
    assert config["label2id"] == {name: label for label, name in enumerate(NAMES)}
    preprocessor = json.loads((huggingface / "preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"height": 16, "width": 16}
    assert preprocessor["image_mean"] == [0.1, 0.2, 0.3]
    assert preprocessor["image_std"] == [0.4, 0.5, 0.6]
    assert preprocessor["resample"] == 2  # Pillow's number of bilinear
    assert preprocessor["rescale_factor"] == 1 / 255


def test_a_foreign_huggingface_folder_has_labels_and_preprocessing(huggingface):
    found = load(huggingface)
    assert found.class_names == NAMES
    assert found.preprocessing == Preprocessing((16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), antialias=True)
    assert found.spec.create() == make_weights().spec.create()


def test_the_exact_gelu_of_huggingface_is_heeded(huggingface):
    edit(huggingface / "config.json", hidden_act="gelu")
    assert load(huggingface).spec.create().gelu == "exact"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "deit"}, "of type 'deit'; vit_jax reads 'vit'"),
        ({"model_type": "vit_mae"}, "of type 'vit_mae'"),
        ({"hidden_act": "relu"}, "activation 'relu' is not one of vit_jax's"),
        ({"pooler_act": "gelu"}, "pooler with activation 'gelu'"),
        ({"layer_norm_eps": 1e-3}, "epsilon 0.001; vit_jax's have 1e-06"),
        ({"id2label": {"0": "cat", "2": "dog"}}, "config.json: id2label does not name label '1'"),
        ({"id2label": {"0": "cat", "1": "dog"}}, "2 class names for 5 logits"),
    ],
)
def test_unsupported_features_are_refused(huggingface, fields, message):
    edit(huggingface / "config.json", **fields)
    refuses(message, huggingface)


@pytest.mark.parametrize(
    ("problem", "probabilities"),
    [
        ("multi_label_classification", "sigmoid"),
        ("single_label_classification", "softmax"),
        ("regression", None),
        (None, None),
    ],
)
def test_the_problem_of_huggingface_says_what_makes_probabilities(huggingface, problem, probabilities):
    edit(huggingface / "config.json", problem_type=problem)
    assert load(huggingface).probabilities == probabilities


def test_labels_that_only_repeat_numbers_are_not_names(huggingface):
    edit(huggingface / "config.json", id2label={str(label): f"LABEL_{label}" for label in range(5)})
    assert load(huggingface).class_names is None


def test_labels_of_a_model_without_a_head_are_left_out(huggingface):
    save(make_weights(num_classes=0), huggingface, to="huggingface")
    strip_description(huggingface / "model.safetensors")
    edit(huggingface / "config.json", id2label=dict(zip("01234", NAMES, strict=True)))
    assert load(huggingface).class_names is None


def test_a_centre_crop_of_huggingface_is_heeded(huggingface):
    edit(
        huggingface / "preprocessor_config.json",
        size={"shortest_edge": 20},
        crop_size={"height": 16, "width": 16},
        do_center_crop=True,
        resample=3,
    )
    found = load(huggingface).preprocessing
    assert (found.image_size, found.resize, found.crop_fraction) == ((16, 16), "crop", 0.8)
    assert found.interpolation == "bicubic"


def test_values_that_huggingface_does_not_normalize_are_left(huggingface):
    edit(huggingface / "preprocessor_config.json", do_normalize=False)
    found = load(huggingface).preprocessing
    assert (found.mean, found.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_damaged_json_is_named(huggingface, name):
    (huggingface / name).write_text('{"model_type": ')
    refuses(rf"{name} is damaged", huggingface)


def test_a_timm_folder_has_what_timm_reads(timm):
    config = json.loads((timm / "config.json").read_text())
    assert config["architecture"].startswith("vit_tiny_patch")
    assert config["num_classes"] == 5
    expected = {"img_size": [16, 16], "act_layer": "gelu_tanh", "embed_dim": 16, "depth": 2, "num_heads": 2}
    assert config["model_args"] | expected | {"mlp_ratio": 2.0} == config["model_args"]
    expected = {"input_size": [3, 16, 16], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    expected |= {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center", "label_names": list(NAMES)}
    assert config["pretrained_cfg"] == expected


def test_a_foreign_timm_folder_has_labels_and_preprocessing(timm):
    found = load(timm)
    assert found.class_names == NAMES
    expected = Preprocessing((16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "crop", 0.9, "bicubic", True, True)
    assert found.preprocessing == expected
    assert found.spec.create() == make_weights().spec.create()


def edit_model_args(folder, **fields):
    args = json.loads((folder / "config.json").read_text())["model_args"] | fields
    edit(folder / "config.json", model_args={name: value for name, value in args.items() if value is not None})


@pytest.mark.parametrize(
    "architecture", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_tiny_patch16_224.augreg"]
)
def test_timms_own_gelu_is_exact(timm, architecture):
    edit_model_args(timm, act_layer=None)
    edit(timm / "config.json", architecture=architecture)
    assert load(timm).spec.create().gelu == "exact"


@pytest.mark.parametrize("architecture", ["eva02_tiny_patch14_224", "vit_base_patch16_clip_224", "resnet50"])
def test_architectures_of_timm_that_may_compute_otherwise_are_refused(timm, architecture):
    edit(timm / "config.json", architecture=architecture)
    refuses(f"architecture '{architecture}' may not be one of vit_jax's", timm)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_layer": "relu"}, "activation 'relu'"),
        ({"global_pool": "avg"}, "has a class token but averages the others"),
    ],
)
def test_arguments_of_timm_that_compute_otherwise_are_refused(timm, fields, message):
    edit_model_args(timm, **fields)
    refuses(message, timm)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "has no model.safetensors; there are pytorch_model.bin. .*is a pickle"),
        ("model.safetensors.index.json", "several parts are not read"),
        (None, "there are no files"),
    ],
)
def test_a_folder_without_a_file_that_can_be_read_is_reported(name, message, tmp_path):
    if name:
        (tmp_path / name).write_bytes(b"x")
    refuses(message, tmp_path)
