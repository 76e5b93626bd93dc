import dataclasses
import functools
import http.server
import json
import os
import re
import shutil
import threading
import types

import flax.traverse_util
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.weights.helpers import NAMES, edit, refuses, save_plain, strip_description
from tests.weights.test_formats import BIT, HYBRID, ROOT_HYBRID, TINY, assert_same, logits, make_weights
from vit_jax.data.class_names import class_names
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.models.layers import stack_layers
from vit_jax.models.position_embeddings import KINDS, PLACES
from vit_jax.weights import ModelSpec, Preprocessing, Weights, from_params, get_checkpoint, load, save
from vit_jax.weights.download import cached_path
from vit_jax.weights.formats import FORMATS
from vit_jax.weights.identify import expected_shapes

FAMILIES = {
    "cls": {},
    "gap": {"pool": "gap"},
    "map": {"pool": "map"},
    "headless": {"num_classes": 0},
    "pre_logits": {"pre_logits": True},
    "representation": {"num_classes": 0, "pre_logits": True},
    "hybrid": HYBRID,
    "root hybrid": ROOT_HYBRID,
    "bit": BIT,
    "bit of big_vision": BIT | {"root_padding": "lowest"},
    "axial": {"name": "Axial-ViT-Ti/4"},
    "axial resnet": {"name": "AxialResNet-26", "stages": (1,)},
}
# What each format can hold; it refuses the rest.
HOLDS = {
    None: tuple(FAMILIES),
    "big_vision": ("cls", "gap", "map", "headless", "pre_logits", "representation", "bit of big_vision"),
    "timm": ("cls", "gap", "map", "headless", "root hybrid"),
    "huggingface": ("cls", "headless", "representation"),
}
SUFFIX = {None: ".npz", "big_vision": ".npz", "timm": "", "huggingface": ""}
POSITIONS = "Transformer/posembed_input/pos_embedding"


def snapshot(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


# --- There and back ---


@pytest.mark.parametrize(("to", "family"), [(to, family) for to, held in HOLDS.items() for family in held])
def test_saved_weights_are_loaded_bit_exactly(to, family, tmp_path):
    weights = make_weights(**FAMILIES[family])
    if weights.spec.num_classes:
        weights = dataclasses.replace(weights, class_names=NAMES)
    if to == "big_vision" and weights.arrays.get("cls") is not None:
        # The function is the same, the arrays are not: see test_formats.
        weights.arrays[POSITIONS][:, 0] = 0
    save(weights, tmp_path / f"saved{SUFFIX[to]}", to=to)
    found = load(tmp_path / f"saved{SUFFIX[to]}")
    assert found.spec == weights.spec
    assert found.preprocessing == weights.preprocessing
    assert found.class_names == weights.class_names
    assert_same(found.arrays, weights.arrays)


@pytest.mark.parametrize(
    ("to", "family"),
    [(to, family) for to, held in HOLDS.items() for family in held if (to, family) != (None, "bit of big_vision")],
)
def test_a_model_is_identified_without_a_description(to, family, tmp_path):
    weights = make_weights(**FAMILIES[family])
    file = strip_description(save(weights, tmp_path / f"saved{SUFFIX[to]}", to=to))
    found = load(file.parent if file.suffix == ".safetensors" else file)
    assert found.spec.create() == weights.spec.create()
    if not family.startswith("bit"):
        assert found.spec.image_size == weights.spec.image_size
    if to != "big_vision":
        assert_same(found.arrays, weights.arrays)


@pytest.mark.parametrize(
    ("to", "family"),
    [(to, family) for to in HOLDS for family in FAMILIES if family not in HOLDS[to]],
)
def test_a_format_that_cannot_hold_a_model_says_what_to_type(to, family, tmp_path):
    with pytest.raises(UserError, match=r"--to=(vit|bit|axial)|without --to|--drop="):
        save(make_weights(**FAMILIES[family]), tmp_path / f"saved{SUFFIX[to]}", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "to"), [("pre_logits", "timm"), ("representation", "timm"), ("pre_logits", "huggingface")]
)
def test_leaving_out_what_the_message_says_is_enough(family, to, tmp_path):
    weights = make_weights(**FAMILIES[family])
    with pytest.raises(UserError) as caught:
        save(weights, tmp_path / "saved", to=to)
    parts = re.search(r"--drop=([a-z_,]+)", str(caught.value))[1].split(",")
    save(weights.without(*parts), tmp_path / "saved", to=to)
    assert load(tmp_path / "saved").arrays.keys() < weights.arrays.keys()


def test_the_padding_of_bits_root_goes_with_the_format_and_the_description(tmp_path):
    released, big_vision = make_weights(**BIT), make_weights(**BIT, root_padding="lowest")
    for weights, to in ((released, None), (big_vision, None), (big_vision, "big_vision")):
        assert load(save(weights, tmp_path / "a.npz", to=to)).spec == weights.spec
    bare = load(strip_description(save(big_vision, tmp_path / "b.npz", to="big_vision")))
    assert bare.spec.create().root_padding == "lowest"
    with pytest.raises(UserError, match=r"big_vision BiT .npz is of a model with root_padding='lowest'"):
        save(released, tmp_path / "c.npz", to="big_vision")
    with pytest.raises(UserError, match=r"timm .* root_padding='zeros'; this one has 'lowest'"):
        save(big_vision, tmp_path / "c.safetensors", to="timm")


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_position_embedding_is_loaded_with_its_description(kind, at, tmp_path):
    weights = make_weights(position_embedding=kind, position_embedding_at=at, image_size=(8, 16))
    found = load(save(weights, tmp_path / "saved.npz"))
    assert found.spec == weights.spec
    assert_same(found.arrays, weights.arrays)


@pytest.mark.parametrize("to", ["timm", "huggingface", "big_vision"])
@pytest.mark.parametrize("attributes", [{"position_embedding": kind} for kind in KINDS[2:4]]
                         + [{"position_embedding": "none"}, {"position_embedding_at": "every_layer"},
                            {"position_embedding_at": "shared"}])  # fmt: skip
def test_formats_refuse_unknown_position_embeddings(to, attributes, tmp_path):
    with pytest.raises(UserError, match=r"position embeddings.*--to=vit"):
        save(make_weights(**attributes), tmp_path / f"saved{SUFFIX[to]}", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", [None, "big_vision", "timm", "huggingface"])
def test_description_gives_images_that_are_not_square(to, tmp_path):
    weights = make_weights(image_size=(8, 24))
    weights.arrays[POSITIONS][:, 0] = 0
    save(weights, tmp_path / f"saved{SUFFIX[to]}", to=to)
    found = load(tmp_path / f"saved{SUFFIX[to]}")
    assert found.spec.image_size == found.preprocessing.image_size == (8, 24)
    assert_same(found.arrays, weights.arrays)


def test_images_that_are_not_square_can_be_given_without_a_description(tmp_path):
    path = save_plain(tmp_path / "plain.npz", make_weights(image_size=(8, 24)).arrays)
    found = load(path, image_size=(8, 24))
    assert found.spec.image_size == found.preprocessing.image_size == (8, 24)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("to", [None, "timm", "huggingface"])
def test_dtypes_are_kept(to, dtype, tmp_path):
    weights = make_weights(dtype=dtype)
    save(weights, tmp_path / f"saved{SUFFIX[to]}", to=to)
    assert_same(load(tmp_path / f"saved{SUFFIX[to]}").arrays, weights.arrays)


def test_from_format_to_format_changes_no_logits(tmp_path):
    weights = make_weights(num_layers=1)
    save(weights, tmp_path / "one", to="huggingface")
    save(load(tmp_path / "one"), tmp_path / "two", to="timm")
    save(load(tmp_path / "two"), tmp_path / "three.npz", to="big_vision")
    save(load(tmp_path / "three.npz"), tmp_path / "four.npz")
    assert np.abs(logits(weights)).max() > 0.1
    np.testing.assert_allclose(logits(load(tmp_path / "four.npz")), logits(weights), atol=1e-5)


@pytest.mark.parametrize(
    ("to", "path", "message"),
    [
        (None, "folder", r"is a \.npz file; name it so"),
        (None, "a.safetensors", r"is a \.npz file; name it so instead of 'a.safetensors'"),
        ("huggingface", "a.npz", "is a folder; name a folder instead of a.npz"),
        ("huggingface", "a.safetensors", "is a folder; name a folder instead of a.safetensors"),
        ("timm", "a.npz", "name .* instead of a.npz"),
        ("pytorch", "a", "unknown format to write 'pytorch'"),
        ("hugingface", "a", "Did you mean 'huggingface'"),
    ],
)
def test_a_name_that_does_not_suit_the_format_is_refused(to, path, message, tmp_path):
    with pytest.raises(UserError, match=message):
        save(make_weights(), tmp_path / path, to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["cls", "hybrid", "bit"])
def test_a_timm_file_is_read_without_a_folder(family, tmp_path):
    # It needs no name of timm's, so it can hold hybrids and ResNets of any depth.
    weights = make_weights(**FAMILIES[family])
    save(weights, tmp_path / "weights.safetensors", to="timm")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]
    assert_same(load(tmp_path / "weights.safetensors").arrays, weights.arrays)


def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    for to, name in ((None, "a.npz"), ("timm", "a.safetensors"), ("huggingface", "a")):
        with pytest.raises(UserError, match=r"1\.0 kB free, but .* are needed"):
            save(make_weights(), tmp_path / name, to=to)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- What is taken for granted ---


def test_unknown_number_of_heads_follows_from_the_size_with_a_note(tmp_path):
    weights = make_weights("ViT-S/4", num_layers=1, hidden_dim=384, num_heads=6)
    file = strip_description(save(weights, tmp_path / "a.safetensors", to="timm"))
    found = load(file)
    assert any("6 attention heads: taken from ViT-S" in note for note in found.notes)
    assert_same(found.arrays, weights.arrays)


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_unknown_gelu_is_the_librarys_with_a_note(to, tmp_path):
    weights = make_weights("ViT-Ti/4", num_layers=1, hidden_dim=192, num_heads=3)
    file = strip_description(save(weights, tmp_path / "folder", to=to))
    found = load(file)
    assert found.spec.create().gelu == "exact"
    assert any("gelu=exact" in note for note in found.notes)


def test_unknown_number_of_heads_can_be_given(tmp_path):
    # Of two sizes that differ in their heads alone, S has 6.
    weights = make_weights("ViT-b/4", num_layers=12, hidden_dim=384, mlp_dim=1536, num_heads=12)
    file = strip_description(save(weights, tmp_path / "a", to="huggingface"))
    found = load(file, model="ViT-b/4")
    assert found.spec.name == "ViT-b/4"
    assert_same(found.arrays, weights.arrays)


def test_a_thousand_classes_are_assumed_to_be_imagenets_with_a_note(tmp_path):
    found = load(save_plain(tmp_path / "a.npz", make_weights(num_classes=1000).arrays))
    assert found.class_names[0] == "tench, Tinca tinca"
    assert found.notes == ("1,000 classes: assumed to be those of imagenet2012",)


def test_other_numbers_of_classes_have_no_names(tmp_path):
    found = load(save_plain(tmp_path / "a.npz", make_weights().arrays))
    assert (found.class_names, found.notes) == (None, ())


def test_big_vision_without_embeddings_has_fixed_ones(tmp_path):
    weights = make_weights(pool="gap", position_embedding="sincos_2d")
    file = strip_description(save(weights, tmp_path / "a.npz", to="big_vision"))
    assert load(file).spec.create() == weights.spec.create()


@pytest.mark.parametrize("format_name", ["huggingface", "timm"])
def test_embeddings_that_a_format_always_has_must_be_there(format_name, request):
    folder = request.getfixturevalue(format_name)
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    name = next(name for name in arrays if re.search("pos_embed|position_embeddings", name))
    del arrays[name]
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    refuses(name.removeprefix("vit."), folder)


# --- Wrong files ---


def test_a_file_of_another_model_than_requested_names_both_and_the_first_differences(plain):
    arrays, path = plain
    save_plain(path, arrays)
    refuses(
        [
            r"this is ViT-Ti/4, 5 classes, num_layers=4.*not ViT-S/16",
            r"missing: Transformer/encoderblock_10/LayerNorm_0/bias",
            r"Transformer/encoder_norm/bias: \(16,\).*\(384,\)",
        ],
        path,
        model="ViT-S/16",
    )


def test_requesting_a_vit_refuses_a_resnet(tmp_path):
    path = strip_description(save(make_weights(**BIT), tmp_path / "a.npz"))
    refuses("this is R50x1.*not ViT-B/16.*\n.*missing", path, model="ViT-B/16")


def test_requesting_the_model_of_a_file_loads_it(tmp_path):
    weights = make_weights(num_layers=12, hidden_dim=192, mlp_dim=768, num_heads=3, pool="gap", pre_logits=True)
    assert load(save_plain(tmp_path / "a.npz", weights.arrays), model="ViT-Ti/4").spec.name == "ViT-Ti/4"


def test_a_mistyped_model_comes_with_the_nearest(plain):
    arrays, path = plain
    refuses("Did you mean 'ViT-B/16'", save_plain(path, arrays), model="ViT-B16")


def test_a_file_of_another_resolution_names_both_shapes(plain):
    arrays, path = plain
    refuses(rf"{POSITIONS}: \(1, 17, 16\).*\(1, 37, 16\)", save_plain(path, arrays), image_size=(24, 24))


def test_a_described_file_of_another_resolution_names_both_shapes(tmp_path):
    path = save(make_weights(), tmp_path / "weights.npz")
    refuses("16x16.*24x24|17, 16.*37, 16", path, image_size=(24, 24))


def test_a_missing_head_is_named(plain):
    arrays, path = plain
    del arrays["head/kernel"]
    refuses("head/", save_plain(path, arrays))


def test_a_layer_missing_in_the_middle_is_named(plain):
    arrays, path = plain
    whole = {name: array for name, array in arrays.items() if "encoderblock_1/" not in name}
    refuses("missing: Transformer/encoderblock_1/LayerNorm_0/bias", save_plain(path, whole))


def test_an_extra_array_is_named(plain):
    arrays, path = plain
    refuses("Transformer/adapter/kernel", save_plain(path, arrays | {"Transformer/adapter/kernel": np.zeros(3)}))


def test_a_transposed_array_is_named_with_both_shapes(plain):
    arrays, path = plain
    name = "Transformer/encoderblock_2/MlpBlock_3/Dense_1/kernel"
    refuses(rf"{name}: \(16, 32\).*\(32, 16\)", save_plain(path, arrays | {name: arrays[name].T}))


def test_differences_have_the_files_own_names(timm):
    arrays = safetensors.numpy.load_file(timm / "model.safetensors")
    del arrays["blocks.1.norm2.weight"]
    safetensors.numpy.save_file(arrays, timm / "model.safetensors")
    refuses("missing: blocks.1.norm2.weight", timm)


def test_a_file_that_its_description_does_not_fit_is_refused_with_the_descriptions_name(tmp_path):
    path = save(make_weights(), tmp_path / "weights.npz")
    save_plain(path, make_weights(num_classes=7).arrays)  # by another program, which does not know of the description
    refuses([r"head/kernel: \(16, 7\).*\(16, 5\)", "weights.npz.json"], path)


def arrays_of_the_former_axial_resnet():
    """Some arrays of an earlier version's model: BiT's units, with ViT's attention for their 3x3 convolutions."""
    arrays = {"root_block/conv_root/kernel": np.zeros((7, 7, 3, 64), np.float32)}
    for axis in ("row", "column"):
        for name, shape in (("query/kernel", (64, 8, 8)), ("relative_embedding", (3, 8, 8))):
            arrays[f"block1/unit01/{axis}/{name}"] = np.zeros(shape, np.float32)
    return arrays | {"head/kernel": np.zeros((256, 5), np.float32), "head/bias": np.zeros(5, np.float32)}


@pytest.mark.parametrize("description", [{}, {"model": "AxialResNet-26", "overrides": {"root_padding": "zeros"}}])
def test_an_axial_resnet_of_an_earlier_version_is_refused_whatever_describes_it(description, tmp_path):
    path = save_plain(tmp_path / "former.npz", arrays_of_the_former_axial_resnet())
    if description:
        (tmp_path / "former.npz.json").write_text(json.dumps(description | {"num_classes": 5, "preprocessing": {}}))
    refuses(r"AxialResNet is of an earlier version.*Use the version that trained it, or train it again\.$", path)


def test_an_axial_resnet_of_an_earlier_version_in_memory_is_refused():
    params = flax.traverse_util.unflatten_dict(arrays_of_the_former_axial_resnet(), sep="/")
    with pytest.raises(UserError, match="AxialResNet is of an earlier version"):
        from_params("AxialResNet-26", params, image_size=8, stages=(1,))


def test_a_truncated_npz_is_reported(tmp_path):
    path = save(make_weights(), tmp_path / "weights.npz")
    path.write_bytes(path.read_bytes()[:-1000])
    refuses("damaged or truncated .npz", path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "ViT-X/16"},
        {"model": 5},
        {"num_classes": "five"},
        {"num_classes": -1},
        {"overrides": []},
        {"overrides": {"hidden": 16}},
        {"overrides": {"hidden_dim": "16"}},
        {"image_size": "abc"},
        {"image_size": [1, 2, 3]},
        {"preprocessing": None},
        {"preprocessing": []},
        {"class_names": 5},
        {"class_names": ["cat"]},
        {"model": None},
        {"preprocessing": {"mean": "abc"}},
    ],
    ids=json.dumps,
)
def test_a_wrong_description_is_a_user_error(change, tmp_path):
    path = save(make_weights(), tmp_path / "weights.npz")
    edit(tmp_path / "weights.npz.json", **change)
    with pytest.raises(UserError):
        load(path)


def test_a_path_that_does_not_exist_comes_with_the_nearest(tmp_path):
    save(make_weights(), tmp_path / "ViT-Ti_4.npz")
    refuses(r"there is no .*Did you mean '.*ViT-Ti_4\.npz'", tmp_path / "ViT-Ti_16.npz")


def test_a_mistyped_checkpoint_comes_with_the_nearest():
    refuses("unknown released checkpoint .*Did you mean 'augreg_b16_i21k_in1k_384'", "augreg_b16_i21k_in1k_348")


def test_a_file_that_looks_like_a_checkpoints_name_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(make_weights(num_classes=0), tmp_path / "mine", to="huggingface")
    assert load("mine").source == "mine"


# --- Parts ---


def test_weights_without_head_have_neither_its_arrays_nor_its_names():
    weights = dataclasses.replace(make_weights(pre_logits=True), class_names=NAMES)
    found = weights.without("head", "pre_logits")
    assert found.spec.create() == make_weights(num_classes=0).spec.create()
    assert found.class_names is None
    assert found.arrays.keys() == make_weights(num_classes=0).arrays.keys()
    assert "head/kernel" in weights.arrays


@pytest.mark.parametrize(
    ("part", "message"),
    [("Transformer", "cannot do without Transformer"), ("haed", "no 'haed'"), ("pre_logits", "no 'pre_logits'")],
)
def test_parts_that_a_model_needs_cannot_be_left_out(part, message):
    with pytest.raises(UserError, match=message):
        make_weights().without(part)


def test_parameters_in_memory_become_weights():
    weights = make_weights()
    for params in (weights.params, stack_layers(weights.params)):
        found = from_params("ViT-Ti/4", params, image_size=16, class_names=NAMES, scan_layers=True, **TINY)
        assert found.spec == weights.spec
        assert found.preprocessing == Preprocessing((16, 16))
        assert_same(found.arrays, weights.arrays)


def test_parameters_of_another_model_are_refused():
    with pytest.raises(UserError, match="missing: MAPHead_0"):
        from_params("ViT-Ti/4", make_weights(pool="gap").params, image_size=16, pool="map", **TINY)


# --- Released checkpoints ---


def released_arrays(name, /, **changes):
    """Zeros of a released checkpoint's model."""
    checkpoint = get_checkpoint(name)
    size = changes.pop("image_size", checkpoint.image_size)
    spec = ModelSpec(checkpoint.model, checkpoint.num_classes, dict(checkpoint.model_overrides))
    spec = dataclasses.replace(spec, **changes)
    return {path: np.zeros(shape, np.float32) for path, shape in expected_shapes(spec, (size, size)).items()}


def test_a_released_checkpoint_is_fetched_by_its_name(tmp_path, monkeypatch):
    name = "augreg_ti16_i21k_in1k_384"
    path = tmp_path / "served" / get_checkpoint(name).url.removeprefix("gs://")
    path.parent.mkdir(parents=True)
    save_plain(path, {f"opt/target/{key}": array for key, array in released_arrays(name).items()})

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for variable in [each for each in os.environ if each.lower().endswith("_proxy")]:
            monkeypatch.delenv(variable)
        monkeypatch.setenv("VIT_JAX_GCS_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
        found = load(name)
        server.shutdown()
    assert found.spec == ModelSpec("ViT-Ti/16", 1000, {}, (384, 384))
    assert found.preprocessing == Preprocessing((384, 384))
    assert len(found.class_names) == 1000
    assert found.class_names[0] == "tench, Tinca tinca"
    assert (found.source, found.format, found.notes) == (name, "vit", ())
    assert cached_path(get_checkpoint(name).url).is_file()


def test_a_released_hybrid_is_loaded_from_the_cache(cache):
    name = "augreg_rti16_i21k_in1k_224"
    cache(name, released_arrays(name))
    found = load(name)
    assert found.spec == ModelSpec("R+Ti/16", 1000, {}, (224, 224))
    assert found.class_names == class_names("imagenet2012")


def test_a_released_big_vision_model_is_loaded_with_its_own_preprocessing(cache):
    name = "plain_s16_in1k_90ep"
    cache(name, FORMATS["big_vision"].write(released_arrays(name)))
    found = load(name)
    checkpoint = get_checkpoint(name)
    assert found.spec.create() == create_model(checkpoint.model, num_classes=1000, **checkpoint.model_overrides)
    assert found.preprocessing == Preprocessing((224, 224), resize="crop", crop_fraction=0.875)


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({"num_classes": 10}, "10 classes"),
        ({"name": "ViT-Ti/32"}, "ViT-Ti/32"),
        ({"overrides": {"pool": "gap"}}, "pool=gap"),
        ({"image_size": 224}, "224x224"),
    ],
    ids=str,
)
def test_a_file_of_another_model_under_a_released_name_is_refused(changes, held, cache):
    name = "augreg_ti16_i21k_in1k_384"
    cache(name, released_arrays(name, **changes))
    refuses([f"holds .*{held}", f"{name} is ViT-Ti/16 with 1,000 classes", "Delete it to fetch it again"], name)


def test_weights_say_what_they_are():
    weights = make_weights()
    assert isinstance(weights, Weights)
    description = json.loads(json.dumps(weights.describe()))
    assert description["model"] == "ViT-Ti/4"
    assert description["image_size"] == [16, 16]
    assert description["preprocessing"]["resize"] == "square"
