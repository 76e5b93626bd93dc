"""Files of weights between vit_jax, timm and Hugging Face's transformers, and what the three compute from them.

These tests run models of full size in both libraries. They need torch, timm and transformers, 5 GB of memory and 2 GB
of disk, take 9 minutes on two cores, and are skipped where the libraries are not installed:

    python -m venv oracle
    oracle/bin/pip install --editable '.[test]' torch==2.13.0 transformers==5.23.0 pyyaml
    oracle/bin/pip install --no-deps timm==1.0.31
    oracle/bin/python -m pytest tests/test_oracle_weights.py -m oracle -s    # -s shows the differences measured
"""

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pathlib
import sys
import tempfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT
from tests.golden.weights_recipe import make_array, make_images
from tests.weights.oracles import (
    assert_same_arrays,
    in_released_layout,
    is_key_bias,
    outputs_and_gradients_of,
    outputs_of,
    unflatten,
)
from vit_jax.errors import UserError
from vit_jax.models import list_models
from vit_jax.weights import ModelSpec, Preprocessing, from_params, load, save
from vit_jax.weights.formats import FORMATS
from vit_jax.weights.huggingface import timm_name
from vit_jax.weights.identify import expected_shapes

GOLDEN = ROOT / "tests" / "golden"
NUM_CLASSES = 7

# Of logits of order 1, both in float32.
LOGIT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-3


@pytest.fixture(autouse=True, scope="module")
def full_precision():
    # Accelerators multiply float32 in fewer bits unless told otherwise.
    with jax.default_matmul_precision("highest"):
        yield


pytestmark = pytest.mark.oracle


def golden_script(name):
    """One of the scripts that make golden files, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(GOLDEN)
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def timm():
    """timm; torchvision, which its models import but do not use, need not be there."""
    pytest.importorskip("torch").set_num_threads(os.cpu_count() or 1)
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not there")
    if importlib.util.find_spec("torchvision") is None:
        golden_script("make_vit_golden").import_timm()
        # Others look whether torchvision is there, and are puzzled by its stubs.
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    return importlib.import_module("timm")


@pytest.fixture(scope="module")
def torch(timm):
    return importlib.import_module("torch")


@pytest.fixture(scope="module")
def transformers(timm):
    return pytest.importorskip("transformers")


@pytest.fixture
def folder():
    """A folder that is deleted after the test: these files are large, and pytest keeps those of three runs."""
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


# Our name, timm's name, height and width, our attributes, timm's arguments.
FULL_SIZE = {
    "ViT-Ti/16": ("vit_tiny_patch16_224", (224, 224), {}, {}),
    "ViT-S/16": ("vit_small_patch16_224", (224, 224), {}, {}),
    "ViT-B/16": ("vit_base_patch16_224", (224, 224), {}, {}),
    "ViT-B/32": ("vit_base_patch32_224", (224, 224), {}, {}),
    "ViT-L/16": ("vit_large_patch16_224", (224, 224), {}, {}),
    "R+Ti/16": ("vit_tiny_r_s16_p8_224", (224, 224), {}, {}),
    "R26+S/32": ("vit_small_r26_s32_224", (224, 224), {}, {}),
    "R50+L/32": ("vit_large_r50_s32_224", (224, 224), {}, {}),
    "R50+ViT-B/16": ("vit_base_r50_s16_224", (224, 224), {}, {}),
    "R50x1": ("resnetv2_50x1_bit", (224, 224), {}, {}),
    "R50x3": ("resnetv2_50x3_bit", (224, 224), {}, {}),
    "R101x1": ("resnetv2_101x1_bit", (224, 224), {}, {}),
    "R152x2": ("resnetv2_152x2_bit", (224, 224), {}, {}),
    # Other resolutions; timm would interpolate position embeddings of any other length.
    "ViT-B/32 384x384": ("vit_base_patch32_224", (384, 384), {}, {"img_size": 384}),
    "ViT-S/16 160x224": ("vit_small_patch16_224", (160, 224), {}, {"img_size": (160, 224)}),
    "R26+S/32 256x192": ("vit_small_r26_s32_224", (256, 192), {}, {"img_size": (256, 192)}),
    "R50x1 160x208": ("resnetv2_50x1_bit", (160, 208), {}, {}),
    # Other poolings and the other activation.
    "ViT-S/16 gap": (
        "vit_small_patch16_224",
        (224, 224),
        {"pool": "gap"},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    "ViT-S/16 map": (
        "vit_small_patch16_224",
        (224, 224),
        {"pool": "map"},
        {"class_token": False, "global_pool": "map", "fc_norm": False},
    ),
    "ViT-Ti/16 exact": ("vit_tiny_patch16_224", (224, 224), {"gelu": "exact"}, {"act_layer": "gelu"}),
}


def random_weights(name, image_size, num_classes=NUM_CLASSES, **overrides):
    """Weights of the sizes that make logits of order 1, see `make_array`."""
    shapes = expected_shapes(ModelSpec(name, num_classes, overrides), image_size)
    params = unflatten({name: make_array(name, shape) for name, shape in shapes.items()})
    return from_params(name, params, image_size=image_size, **overrides)


def timm_model(timm, name, **arguments):
    """A timm model in evaluation mode; ViTs have the GELU of the released weights by default."""
    if name.startswith("vit"):
        arguments = {"act_layer": "gelu_tanh", **arguments}
    return timm.create_model(name, **{"num_classes": NUM_CLASSES, **arguments}).eval()


def read_by_timm(torch, model, weights, folder):
    """Lets timm's own loader read what we write."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)  # a weight that the loader leaves out shows
    path = save(weights, folder / "weights.npz")
    model.load_pretrained(str(path))
    path.unlink()
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    return model


def outputs_of_torch(torch, model, images):
    with torch.no_grad():
        return model(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))


def randomize(torch, model, seed=0):
    """Gives a model of torch's weights of the sizes of `make_array`'s, which its own initial ones are not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.copy_(0.2 * noise + parameter.detach().round())  # scales are 1 at first, biases 0
            elif parameter.ndim == 3:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
                if parameter.ndim == 4 and parameter.shape[1] > 3 and parameter.shape[0] > NUM_CLASSES:
                    parameter.copy_(noise)  # standardised
    return model.eval()


@pytest.mark.parametrize("case", FULL_SIZE)
def test_logits_match_timm_which_reads_our_file(case, timm, torch, folder):
    theirs, image_size, overrides, arguments = FULL_SIZE[case]
    weights = random_weights(case.split(" ")[0], image_size, **overrides)
    images = make_images(2, *image_size)
    model = read_by_timm(torch, timm_model(timm, theirs, **arguments), weights, folder)
    expected = outputs_of_torch(torch, model, images).numpy()
    del model
    logits, _ = outputs_of(weights, images)
    error, size = np.abs(logits - expected).max(), expected.std()
    print(f"{case:<17} {theirs:<22} std of logits {size:.2f}, greatest difference {error:.1e}")
    assert 0.2 < size < 3, "the logits are not of order 1"
    assert np.abs(expected[0] - expected[1]).max() > 0.05, "the logits do not depend on the image"
    assert error <= LOGIT_TOLERANCE


def swapped(first, second):
    """Swaps the arrays of two names."""

    def change(arrays):
        def other(name):
            for a, b in ((first, second), (second, first)):
                if a in name:
                    return name.replace(a, b)
            return name

        return {name: arrays[other(name)] for name in arrays}

    return change


def without_position_of_class_token(arrays):
    name = "Transformer/posembed_input/pos_embedding"
    return {**arrays, name: np.concatenate([0 * arrays[name][:, :1], arrays[name][:, 1:]], axis=1)}


# How the least of mistakes moves the logits.
MISTAKES = {
    "layers swapped": ("ViT-Ti/16", swapped("encoderblock_3/", "encoderblock_8/")),
    "query and key swapped": (
        "ViT-Ti/16",
        swapped(
            "encoderblock_5/MultiHeadDotProductAttention_1/query", "encoderblock_5/MultiHeadDotProductAttention_1/key"
        ),
    ),
    "no position of the class token": ("ViT-Ti/16", without_position_of_class_token),
    "units of the hybrid swapped": ("R26+S/32", swapped("block3/unit2/conv2", "block3/unit1/conv2")),
    "biases of a hybrid's unit swapped": ("R26+S/32", swapped("block1/unit1/gn1/bias", "block1/unit1/gn2/bias")),
    "units of BiT swapped": ("R50x1", swapped("block3/unit02/", "block3/unit05/")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_weights_moves_logits_much_further_than_the_tolerance(mistake, timm, torch, folder):
    name, change = MISTAKES[mistake]
    weights = random_weights(name, (224, 224))
    images = make_images(2, 224, 224)
    model = read_by_timm(torch, timm_model(timm, FULL_SIZE[name][0]), weights, folder)
    expected = outputs_of_torch(torch, model, images).numpy()
    logits, _ = outputs_of(dataclasses.replace(weights, arrays=change(weights.arrays)), images)
    error = np.abs(logits - expected).max()
    print(f"{mistake:<34} {name:<10} greatest difference {error:.1e}")
    assert error > 100 * LOGIT_TOLERANCE


def test_the_other_gelu_changes_the_logits(timm, torch, folder):
    weights = random_weights("ViT-Ti/16", (224, 224))
    images = make_images(2, 224, 224)
    model = read_by_timm(torch, timm_model(timm, "vit_tiny_patch16_224", act_layer="gelu"), weights, folder)
    logits, _ = outputs_of(weights, images)
    error = np.abs(logits - outputs_of_torch(torch, model, images).numpy()).max()
    print(f"the other gelu: greatest difference {error:.1e}")
    assert error > LOGIT_TOLERANCE


SMALL = {
    "vit": ("ViT-Ti/16", {"num_layers": 2}, "vit_tiny_patch16_224", {"depth": 2, "img_size": 64}),
    "vit map": (
        "ViT-Ti/16",
        {"num_layers": 2, "pool": "map"},
        "vit_tiny_patch16_224",
        {"depth": 2, "img_size": 64, "class_token": False, "global_pool": "map", "fc_norm": False},
    ),
    "hybrid": ("R26+S/32", {"num_layers": 1}, "vit_small_r26_s32_224", {"depth": 1, "img_size": 64}),
    "bit": ("R50x1", {"stages": (1, 1, 1, 1)}, None, {}),
}


@pytest.mark.parametrize("case", SMALL)
def test_gradients_of_all_parameters_match_timm(case, timm, torch, folder):
    name, overrides, theirs, arguments = SMALL[case]
    weights = random_weights(name, (64, 64), **overrides)
    images, labels = make_images(2, 64, 64), (1, 4)
    if theirs:
        model = timm_model(timm, theirs, **arguments)
    else:
        # timm has no name for a ResNet of four units.
        make = timm.models.resnetv2._create_resnetv2_bit
        model = make("resnetv2_50x1_bit", layers=[1, 1, 1, 1], num_classes=NUM_CLASSES)
    model = read_by_timm(torch, model, weights, folder)
    logits = model(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    with np.load(save(weights, folder / "weights.npz")) as file:
        shapes = {name: array.shape for name, array in file.items()}
    # timm's loader tells which of its elements is which of the released layout: nothing of our tables is in this.
    expected = golden_script("make_weights_golden").gradients_by_name(model, shapes)

    _, gradients = outputs_and_gradients_of(weights, images, labels)
    gradients = in_released_layout(weights, gradients, folder / "gradients.npz")
    assert gradients.keys() == expected.keys()
    errors = {}
    for name, array in expected.items():
        if is_key_bias(name):
            assert max(np.abs(array).max(), np.abs(gradients[name]).max()) < 1e-6, name
        else:
            errors[name] = np.linalg.norm(gradients[name] - array) / np.linalg.norm(array)
    worst = max(errors, key=errors.get)
    print(f"{case:<8} {len(errors)} gradients, greatest relative difference {errors[worst]:.1e} ({worst})")
    assert errors[worst] <= GRADIENT_TOLERANCE


# timm's name and arguments, our name.
STATE_DICTS = {
    "vit": ("vit_tiny_patch16_224", {}, "ViT-Ti/16"),
    "vit 384": ("vit_base_patch32_384", {"depth": 2}, "ViT-B/32"),
    "vit gap": ("vit_tiny_patch16_224", FULL_SIZE["ViT-S/16 gap"][3], "ViT-Ti/16"),
    "vit map": ("vit_tiny_patch16_224", FULL_SIZE["ViT-S/16 map"][3], "ViT-Ti/16"),
    "vit without head": ("vit_tiny_patch16_224", {"num_classes": 0}, "ViT-Ti/16"),
    "root alone": ("vit_tiny_r_s16_p8_224", {}, "R+Ti/16"),
    "hybrid": ("vit_small_r26_s32_224", {}, "R26+S/32"),
    "hybrid of three stages": ("vit_base_r50_s16_224", {}, "R50+ViT-B/16"),
    "bit": ("resnetv2_50x1_bit", {}, "R50x1"),
}


@pytest.mark.parametrize("case", STATE_DICTS)
def test_a_state_dict_of_timm_round_trips_bit_exactly_and_computes_the_same(case, timm, torch, folder):
    name, arguments, ours = STATE_DICTS[case]
    # Nothing beside a bare file says which GELU it is for: timm's own is exact.
    gelu = {} if case == "bit" else {"act_layer": "gelu"}
    model = randomize(torch, timm_model(timm, name, **gelu, **arguments))
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    save_file(state, folder / "timm.safetensors")
    weights = load(folder / "timm.safetensors")
    if "depth" not in arguments:  # else Ti with overrides
        assert weights.spec.name == ours
    assert_same_arrays(load_file(save(weights, folder / "back.safetensors", to="timm")), state)

    size = weights.spec.image_size or (224, 224)
    images = make_images(2, *size)
    expected = outputs_of_torch(torch, model, images).numpy()
    logits, _ = outputs_of(weights, images)
    error = np.abs(logits - expected).max()
    print(f"{case:<24} {name:<22} std of logits {expected.std():.2f}, greatest difference {error:.1e}")
    assert error <= LOGIT_TOLERANCE * max(1, expected.std())

    # Our folder tells timm which model it is.
    file = save(weights, folder / "folder", to="timm")
    config = json.loads((folder / "folder" / "config.json").read_text())
    again = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"]).eval()
    again.load_state_dict({key: torch.from_numpy(array) for key, array in load_file(file).items()}, strict=True)
    np.testing.assert_array_equal(outputs_of_torch(torch, again, images).numpy(), expected)
    by_timm = timm.create_model(f"local-dir:{folder / 'folder'}", pretrained=True).eval()
    np.testing.assert_array_equal(outputs_of_torch(torch, by_timm, images).numpy(), expected)


# Every name, with one layer; and what a name does not tell.
FOLDERS = [(name, {"num_layers": 1}) for name in [*list_models("ViT-*"), *list_models("*+*")]]
FOLDERS += [(name, {}) for name in list_models("R*x*")]
FOLDERS += [
    ("ViT-S/16", {"num_layers": 1, "hidden_dim": 128, "mlp_dim": 256, "num_heads": 2}),
    ("R50x1", {"stages": (1, 1, 1, 1)}),
    ("R50x1", {"width_factor": 2}),
    ("R50+ViT-B/16", {"num_layers": 1, "resnet": (1, 1, 1)}),
    ("R50+ViT-B/16", {"num_layers": 1, "patch_size": 2}),
]


@pytest.mark.parametrize(("name", "overrides"), FOLDERS, ids=lambda value: str(value).replace(" ", ""))
def test_the_architecture_of_a_folder_for_timm_is_the_same_model_or_refused(name, overrides, timm, torch):
    spec = ModelSpec(name, NUM_CLASSES, overrides, None if name in list_models("R*x*") else (224, 224))
    try:
        architecture, arguments = timm_name(spec)
    except UserError:
        return
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=NUM_CLASSES, **arguments)
    shapes = expected_shapes(spec, (224, 224))
    layout = FORMATS["timm_bit" if name in list_models("R*x*") else "timm"]
    written = layout.write({name: np.broadcast_to(np.float16(0), shape) for name, shape in shapes.items()})
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: array.shape for name, array in written.items()} == expected


# timm's name and arguments, of which its folders tell the arguments.
TIMM_FOLDERS = {
    "gelu": ("vit_tiny_patch16_224", {}),
    "tanh gelu": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}),
    "other heads": ("vit_tiny_patch16_224", {"num_heads": 6}),
    "not square": ("vit_tiny_patch16_224", {"img_size": (160, 224)}),
    "384": ("vit_base_patch32_384", {"depth": 2}),
    "hybrid": ("vit_tiny_r_s16_p8_224", {}),
    "bit": ("resnetv2_50x1_bit", {}),
}


@pytest.mark.parametrize("case", TIMM_FOLDERS)
def test_a_folder_that_timm_saves_computes_the_same(case, timm, torch, folder):
    name, arguments = TIMM_FOLDERS[case]
    model = randomize(torch, timm.create_model(name, num_classes=NUM_CLASSES, **arguments))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    weights = load(folder)
    images = make_images(2, *(weights.spec.image_size or (224, 224)))
    expected = outputs_of_torch(torch, model, images).numpy()
    error = np.abs(outputs_of(weights, images)[0] - expected).max()
    print(f"{case:<22} {name:<27} greatest difference {error:.1e}")
    assert error <= LOGIT_TOLERANCE


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"act_layer": "quick_gelu"}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
        ("vit_base_patch32_siglip_256", {"depth": 2}),  # tanh by its name alone
    ],
    ids=str,
)
def test_a_folder_of_timm_that_computes_something_else_is_refused(name, arguments, timm, torch, folder):
    model = timm.create_model(name, num_classes=NUM_CLASSES, **arguments)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    with pytest.raises(UserError):
        load(folder)


HUGGINGFACE = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 64,
    "patch_size": 16,
    "num_labels": NUM_CLASSES,
}


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel", "ViTModel without pooler"])
def test_a_folder_of_huggingface_round_trips_bit_exactly_and_computes_the_same(
    kind, hidden_act, transformers, torch, folder
):
    config = transformers.ViTConfig(**HUGGINGFACE, hidden_act=hidden_act)
    kind, _, without = kind.partition(" ")
    arguments = {"add_pooling_layer": False} if without else {}
    model = randomize(torch, getattr(transformers, kind)(config, **arguments))
    model.save_pretrained(folder / "theirs")
    weights = load(folder / "theirs")
    file = save(weights, folder / "ours", to="huggingface")
    assert_same_arrays(load_file(file), load_file(folder / "theirs" / "model.safetensors"))

    again, info = getattr(transformers, kind).from_pretrained(folder / "ours", output_loading_info=True, **arguments)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert_same_arrays(
        {name: tensor.numpy() for name, tensor in again.state_dict().items()},
        {name: tensor.numpy() for name, tensor in model.state_dict().items()},
    )
    written = json.loads((folder / "ours" / "config.json").read_text())
    for field, value in json.loads((folder / "theirs" / "config.json").read_text()).items():
        # A model of theirs without classes has names of them nevertheless. Epsilons: see below.
        if field in written and field not in ("layer_norm_eps", "label2id", "id2label"):
            assert written[field] == value, field

    images = make_images(2, 64, 64)
    logits, out = outputs_of(weights, images)
    for theirs in (model, again.eval()):
        outputs = outputs_of_torch(torch, theirs, images)
        if kind == "ViTForImageClassification":
            pairs = [(logits, outputs.logits)]
        else:
            pairs = [(out["encoded"], outputs.last_hidden_state)]
            pairs += [] if without else [(out["pre_logits"], outputs.pooler_output)]
        for actual, expected in pairs:
            error = np.abs(np.asarray(actual) - expected.numpy()).max()
            print(f"{kind} {without:<14} {hidden_act:<17} std {expected.std():.2f}, greatest difference {error:.1e}")
            assert error <= LOGIT_TOLERANCE


def test_a_folder_with_the_names_of_transformers_5_is_read(transformers, torch, folder):
    model = randomize(torch, transformers.ViTForImageClassification(transformers.ViTConfig(**HUGGINGFACE)))
    model.save_pretrained(folder / "new", save_original_format=False)
    model.save_pretrained(folder / "old")
    assert_same_arrays(load(folder / "new").arrays, load(folder / "old").arrays)


def test_the_image_processor_of_transformers_reads_our_preprocessing(transformers, folder):
    preprocessing = Preprocessing(
        image_size=(64, 64), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), interpolation="bicubic", antialias=True
    )
    weights = dataclasses.replace(random_weights("ViT-Ti/16", (64, 64), num_layers=1), preprocessing=preprocessing)
    save(weights, folder, to="huggingface")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert (processor.size["height"], processor.size["width"]) == (64, 64)
    assert tuple(processor.image_mean) == preprocessing.mean
    assert tuple(processor.image_std) == preprocessing.std
    assert processor.do_resize and processor.do_rescale and processor.do_normalize
    loaded = load(folder).preprocessing
    assert loaded == preprocessing

    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
    np.testing.assert_allclose(loaded.normalize(loaded(image)), expected, atol=1e-5)


@pytest.mark.parametrize("resize", ["square", "crop"])
def test_our_crop_matches_the_processor_that_transformers_builds(resize, transformers, folder):
    preprocessing = Preprocessing((64, 64), resize=resize, crop_fraction=0.9, interpolation="bicubic", antialias=True)
    weights = dataclasses.replace(random_weights("ViT-Ti/16", (64, 64), num_layers=1), preprocessing=preprocessing)
    save(weights, folder, to="huggingface")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    image = np.random.default_rng(0).integers(0, 256, (90, 121, 3), dtype=np.uint8)
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
    np.testing.assert_allclose(preprocessing.normalize(preprocessing(image)), expected, atol=1e-5)
