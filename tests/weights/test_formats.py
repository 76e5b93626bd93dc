"""The tables of formats against names and layouts of other libraries, written out independently."""

import functools
import re

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.models.layers import stack_layers
from vit_jax.weights import ModelSpec, Preprocessing, Weights
from vit_jax.weights.formats import FORMATS, find_format
from vit_jax.weights.identify import expected_shapes

TINY = {"num_layers": 2, "hidden_dim": 16, "mlp_dim": 32, "num_heads": 2}
BIT = {"name": "R26x1", "stages": (1, 1)}
HYBRID = {"name": "R50+ViT-B/16", "resnet": (1, 1), "image_size": (16, 16)}
ROOT_HYBRID = {"name": "R+Ti/16", "image_size": (64, 64)}


@functools.cache  # many tests make the same few models, and tracing one takes most of a test's time
def traced_shapes(name, num_classes, image_size, overrides):
    return expected_shapes(ModelSpec(name, num_classes, dict(overrides), image_size), image_size)


def make_weights(name="ViT-Ti/4", *, num_classes=5, image_size=(16, 16), seed=0, dtype=np.float32, **overrides):
    """Random arrays of a small model; nothing is compiled."""
    overrides = overrides if re.match(r"R\d+x|AxialResNet", name) else TINY | overrides
    spec = ModelSpec(name, num_classes, overrides, image_size)
    rng = np.random.default_rng(seed)
    arrays = {
        path: rng.normal(size=shape, scale=0.3).astype(dtype)
        for path, shape in traced_shapes(name, num_classes, image_size, tuple(overrides.items())).items()
    }
    return Weights(spec, arrays, Preprocessing().at(image_size))


def logits(weights, seed=7, **overrides):
    images = np.random.default_rng(seed).uniform(-1, 1, (2, *weights.preprocessing.image_size, 3)).astype(np.float32)
    apply = jax.jit(weights.spec.create(**overrides).apply)
    return np.asarray(apply({"params": weights.params}, images)[0])


def assert_same(found, expected):
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert np.ascontiguousarray(found[name]).tobytes() == np.ascontiguousarray(array).tobytes(), name


# --- What other libraries call our arrays, and how they turn them ---


def pytorch_layer(theirs, ours, arrays):
    return {f"{theirs}.weight": arrays[f"{ours}/kernel"].T, f"{theirs}.bias": arrays[f"{ours}/bias"]}


def pytorch_norm(theirs, ours, arrays):
    return {f"{theirs}.weight": arrays[f"{ours}/scale"], f"{theirs}.bias": arrays[f"{ours}/bias"]}


def pytorch_conv(theirs, ours, arrays):
    return {f"{theirs}.weight": arrays[f"{ours}/kernel"].transpose(3, 2, 0, 1)}


def projection_into_heads(arrays, name):
    """PyTorch's [out, in], where the outputs of head 0 come first."""
    kernel, bias = arrays[f"{name}/kernel"], arrays[f"{name}/bias"]
    width, heads, head_dim = kernel.shape
    weight = np.empty((heads * head_dim, width), kernel.dtype)
    for head in range(heads):
        for dim in range(head_dim):
            weight[head * head_dim + dim] = kernel[:, head, dim]
    return weight, bias.reshape(-1)


def projection_out_of_heads(arrays, name):
    kernel = arrays[f"{name}/kernel"]
    heads, head_dim, width = kernel.shape
    weight = np.empty((width, heads * head_dim), kernel.dtype)
    for head in range(heads):
        for dim in range(head_dim):
            weight[:, head * head_dim + dim] = kernel[head, dim]
    return weight, arrays[f"{name}/bias"]


def as_timm(arrays):
    """A ViT's state dict."""
    theirs = {
        "pos_embed": arrays["Transformer/posembed_input/pos_embedding"],
        **pytorch_conv("patch_embed.proj", "embedding", arrays),
        "patch_embed.proj.bias": arrays["embedding/bias"],
        **pytorch_norm("norm", "Transformer/encoder_norm", arrays),
    }
    if "cls" in arrays:
        theirs["cls_token"] = arrays["cls"]
    if "head/kernel" in arrays:
        theirs |= pytorch_layer("head", "head", arrays)
    for layer in range(2):
        block, ours = f"blocks.{layer}.", f"Transformer/encoderblock_{layer}/"
        attention = ours + "MultiHeadDotProductAttention_1/"
        theirs |= pytorch_norm(block + "norm1", ours + "LayerNorm_0", arrays)
        parts = [projection_into_heads(arrays, attention + name) for name in ("query", "key", "value")]
        theirs[block + "attn.qkv.weight"] = np.concatenate([weight for weight, _ in parts])
        theirs[block + "attn.qkv.bias"] = np.concatenate([bias for _, bias in parts])
        theirs[block + "attn.proj.weight"], theirs[block + "attn.proj.bias"] = projection_out_of_heads(
            arrays, attention + "out"
        )
        theirs |= pytorch_norm(block + "norm2", ours + "LayerNorm_2", arrays)
        theirs |= pytorch_layer(block + "mlp.fc1", ours + "MlpBlock_3/Dense_0", arrays)
        theirs |= pytorch_layer(block + "mlp.fc2", ours + "MlpBlock_3/Dense_1", arrays)
    return theirs


def as_huggingface(arrays):
    theirs = {
        "embeddings.cls_token": arrays["cls"],
        "embeddings.position_embeddings": arrays["Transformer/posembed_input/pos_embedding"],
        **pytorch_conv("embeddings.patch_embeddings.projection", "embedding", arrays),
        "embeddings.patch_embeddings.projection.bias": arrays["embedding/bias"],
        **pytorch_norm("layernorm", "Transformer/encoder_norm", arrays),
    }
    for layer in range(2):
        block, ours = f"encoder.layer.{layer}.", f"Transformer/encoderblock_{layer}/"
        attention = ours + "MultiHeadDotProductAttention_1/"
        theirs |= pytorch_norm(block + "layernorm_before", ours + "LayerNorm_0", arrays)
        for name in ("query", "key", "value"):
            place = f"{block}attention.attention.{name}"
            theirs[f"{place}.weight"], theirs[f"{place}.bias"] = projection_into_heads(arrays, attention + name)
        place = block + "attention.output.dense"
        theirs[f"{place}.weight"], theirs[f"{place}.bias"] = projection_out_of_heads(arrays, attention + "out")
        theirs |= pytorch_norm(block + "layernorm_after", ours + "LayerNorm_2", arrays)
        theirs |= pytorch_layer(block + "intermediate.dense", ours + "MlpBlock_3/Dense_0", arrays)
        theirs |= pytorch_layer(block + "output.dense", ours + "MlpBlock_3/Dense_1", arrays)
    if "pre_logits/kernel" in arrays:
        theirs |= pytorch_layer("pooler.dense", "pre_logits", arrays)
    if "head/kernel" not in arrays:
        return theirs
    return {f"vit.{name}": array for name, array in theirs.items()} | pytorch_layer("classifier", "head", arrays)


def as_big_vision(arrays):
    """Only the names, of a model without class token."""
    theirs = {}
    for name, array in arrays.items():
        new = name.replace("Transformer/posembed_input/pos_embedding", "pos_embedding")
        if "encoderblock" in name:
            new = new.replace("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0")
            new = new.replace("LayerNorm_2", "LayerNorm_1").replace("MlpBlock_3", "MlpBlock_0")
        theirs[new] = array
    return theirs


def as_bit(arrays):
    theirs = {
        "resnet/root_block/standardized_conv2d/kernel": arrays["root_block/conv_root/kernel"],
        "resnet/group_norm/gamma": arrays["norm_pre_head/scale"],
        "resnet/group_norm/beta": arrays["norm_pre_head/bias"],
    }
    for stage in (1, 2):
        unit = f"block{stage}/unit01/"
        for letter, number in zip("abc", "123", strict=True):
            theirs[f"resnet/{unit}{letter}/standardized_conv2d/kernel"] = arrays[f"{unit}conv{number}/kernel"]
            theirs[f"resnet/{unit}{letter}/group_norm/gamma"] = arrays[f"{unit}gn{number}/scale"]
            theirs[f"resnet/{unit}{letter}/group_norm/beta"] = arrays[f"{unit}gn{number}/bias"]
        theirs[f"resnet/{unit}a/proj/standardized_conv2d/kernel"] = arrays[f"{unit}conv_proj/kernel"]
    if "head/kernel" in arrays:
        theirs["resnet/head/conv2d/kernel"] = arrays["head/kernel"][None, None]
        theirs["resnet/head/conv2d/bias"] = arrays["head/bias"]
    return theirs


def as_timm_bit(arrays):
    theirs = {
        **pytorch_conv("stem.conv", "root_block/conv_root", arrays),
        **pytorch_norm("norm", "norm_pre_head", arrays),
        "head.fc.weight": arrays["head/kernel"].T[:, :, None, None],
        "head.fc.bias": arrays["head/bias"],
    }
    for stage in (1, 2):
        ours, unit = f"block{stage}/unit01/", f"stages.{stage - 1}.blocks.0."
        for number in "123":
            theirs |= pytorch_conv(f"{unit}conv{number}", f"{ours}conv{number}", arrays)
            theirs |= pytorch_norm(f"{unit}norm{number}", f"{ours}gn{number}", arrays)
        theirs |= pytorch_conv(f"{unit}downsample.conv", f"{ours}conv_proj", arrays)
    return theirs


def as_big_vision_bit(arrays):
    return {
        name.replace("norm_pre_head", "norm-pre-head"): array[None, None, None]
        if re.search(r"(gn\d|norm_pre_head)/", name)
        else array
        for name, array in arrays.items()
    }


CASES = {
    "timm": ("timm", as_timm, {}),
    "timm gap": ("timm", as_timm, {"pool": "gap"}),
    "timm without head": ("timm", as_timm, {"num_classes": 0}),
    "huggingface": ("huggingface", as_huggingface, {}),
    "huggingface without head": ("huggingface", as_huggingface, {"num_classes": 0}),
    "huggingface with pooler": ("huggingface", as_huggingface, {"num_classes": 0, "pre_logits": True}),
    "big_vision gap": ("big_vision", as_big_vision, {"pool": "gap", "pre_logits": True}),
    "big_vision map": ("big_vision", as_big_vision, {"pool": "map"}),
    "big_vision sincos_2d": ("big_vision", as_big_vision, {"position_embedding": "sincos_2d"}),
    "bit": ("bit", as_bit, BIT),
    "bit without head": ("bit", as_bit, BIT | {"num_classes": 0}),
    "timm bit": ("timm_bit", as_timm_bit, BIT),
    "big_vision bit": ("big_vision_bit", as_big_vision_bit, BIT),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A format, arrays of ours, and the same as the other library has them."""
    format_name, as_theirs, attributes = CASES[request.param]
    arrays = make_weights(**attributes).arrays
    return FORMATS[format_name], arrays, as_theirs(arrays)


def test_their_names_and_layouts_are_read(case):
    layout, ours, theirs = case
    assert_same(layout.read(theirs, num_heads=2), ours)


def test_our_arrays_are_written_with_their_names_and_layouts(case):
    layout, ours, theirs = case
    assert_same(layout.write(ours), theirs)


def test_a_format_is_identified_by_its_names(case):
    layout, _, theirs = case
    assert find_format(theirs) is layout


def test_timm_attention_pooling_is_read_and_written():
    arrays = make_weights(pool="map", num_classes=0).arrays
    attention = "MAPHead_0/MultiHeadDotProductAttention_0/"
    theirs = as_timm({name: array for name, array in arrays.items() if not name.startswith("MAPHead_0")})
    theirs["attn_pool.latent"] = arrays["MAPHead_0/probe"]
    theirs["attn_pool.q.weight"], theirs["attn_pool.q.bias"] = projection_into_heads(arrays, attention + "query")
    parts = [projection_into_heads(arrays, attention + name) for name in ("key", "value")]
    theirs["attn_pool.kv.weight"] = np.concatenate([weight for weight, _ in parts])
    theirs["attn_pool.kv.bias"] = np.concatenate([bias for _, bias in parts])
    out = projection_out_of_heads(arrays, attention + "out")
    theirs["attn_pool.proj.weight"], theirs["attn_pool.proj.bias"] = out
    theirs |= pytorch_norm("attn_pool.norm", "MAPHead_0/LayerNorm_0", arrays)
    theirs |= pytorch_layer("attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0", arrays)
    theirs |= pytorch_layer("attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1", arrays)
    assert_same(FORMATS["timm"].read(theirs, num_heads=2), arrays)
    assert_same(FORMATS["timm"].write(arrays), theirs)


def test_timm_hybrids_are_read_and_written():
    arrays = make_weights(**HYBRID).arrays
    backbone = "patch_embed.backbone."
    theirs = as_timm(arrays)
    theirs |= pytorch_conv(backbone + "stem.conv", "conv_root", arrays)
    theirs |= pytorch_norm(backbone + "stem.norm", "gn_root", arrays)
    for stage in (1, 2):
        ours, unit = f"block{stage}/unit1/", f"{backbone}stages.{stage - 1}.blocks.0."
        for number in "123":
            theirs |= pytorch_conv(f"{unit}conv{number}", f"{ours}conv{number}", arrays)
            theirs |= pytorch_norm(f"{unit}norm{number}", f"{ours}gn{number}", arrays)
        theirs |= pytorch_conv(f"{unit}downsample.conv", f"{ours}conv_proj", arrays)
        theirs |= pytorch_norm(f"{unit}downsample.norm", f"{ours}gn_proj", arrays)
    assert_same(FORMATS["timm"].read(theirs, num_heads=2), arrays)
    assert_same(FORMATS["timm"].write(arrays), theirs)


def test_the_root_that_is_timms_whole_backbone_is_read_and_written():
    arrays = make_weights(**ROOT_HYBRID).arrays
    theirs = as_timm(arrays)
    theirs |= pytorch_conv("patch_embed.backbone.conv", "conv_root", arrays)
    theirs |= pytorch_norm("patch_embed.backbone.norm", "gn_root", arrays)
    assert_same(FORMATS["timm"].read(theirs, num_heads=2), arrays)
    assert_same(FORMATS["timm"].write(arrays), theirs)


def test_huggingfaces_names_in_memory_are_read_like_those_in_files():
    arrays = make_weights().arrays
    renamed = {
        "encoder.layer": "layers",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    theirs = {}
    for name, array in as_huggingface(arrays).items():
        theirs[functools.reduce(lambda new, pair: new.replace(*pair), renamed.items(), name)] = array
    assert "vit.layers.1.attention.q_proj.weight" in theirs
    assert "vit.layers.1.mlp.fc2.weight" in theirs
    assert_same(FORMATS["huggingface"].read(theirs, num_heads=2), arrays)


# --- What files have beside, before and instead of the plain names ---


@pytest.mark.parametrize("attributes", [{}, {"pool": "map", "pre_logits": True}, HYBRID, ROOT_HYBRID])
def test_the_released_names_are_ours(attributes):
    arrays = make_weights(**attributes).arrays
    assert find_format(arrays) is FORMATS["vit"]
    assert_same(FORMATS["vit"].read(arrays), arrays)
    assert_same(FORMATS["vit"].write(arrays), arrays)


@pytest.mark.parametrize(
    ("format_name", "prefix"),
    [
        ("vit", "opt/target/"),
        ("vit", "params/"),
        ("big_vision", "opt/target/"),
        ("big_vision", "params/"),
        ("big_vision_bit", "params/"),
        ("timm", "module."),
        ("timm", "model."),
        ("timm_bit", "module."),
    ],
)
def test_a_prefix_of_all_names_is_taken_off_and_what_lacks_it_is_not_a_parameter(format_name, prefix):
    weights = make_weights(**(BIT if "bit" in format_name else {"pool": "gap"}))
    layout = FORMATS[format_name]
    theirs = {prefix + name: array for name, array in layout.write(weights.arrays).items()}
    theirs |= {"opt/state/step": np.array(7), "chrono/accum_train_time": np.array(1.0)}
    assert find_format(theirs) is layout
    assert_same(layout.read(theirs, num_heads=2), weights.arrays)


def test_group_norms_of_older_hybrids_lose_their_leading_axes():
    arrays = make_weights(**HYBRID).arrays
    older = {
        name: array[None, None, None] if re.search(r"gn(\d|_root|_proj)/", name) else array
        for name, array in arrays.items()
    }
    assert older["gn_root/scale"].shape == (1, 1, 1, 64)
    assert_same(FORMATS["vit"].read(older), arrays)


def test_numbers_and_projections_that_tensorflow_appended_to_names_are_ignored():
    arrays = make_weights(**BIT).arrays
    numbered = {}
    for index, (name, array) in enumerate(as_bit(arrays).items()):
        number = f"_{index}" if index % 3 else ""  # some have none
        numbered[re.sub(r"/(standardized_conv2d|group_norm|conv2d)/", rf"/\g<1>{number}/", name)] = array
    assert any(re.search(r"a/proj/standardized_conv2d_\d+/kernel", name) for name in numbered)
    assert any(re.search(r"head/conv2d_\d+/", name) for name in numbered)
    assert find_format(numbered) is FORMATS["bit"]
    assert_same(FORMATS["bit"].read(numbered), arrays)


def test_two_spellings_of_one_name_are_refused():
    theirs = as_bit(make_weights(**BIT).arrays)
    name = "resnet/block1/unit01/a/standardized_conv2d"
    with pytest.raises(UserError, match="two arrays of the file are called"):
        FORMATS["bit"].read(theirs | {f"{name}_3/kernel": theirs[f"{name}/kernel"]})


def test_extra_training_arrays_beside_attention_parameters_are_skipped():
    arrays = make_weights().arrays
    beside = {"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/unused": np.zeros(3, np.float32)}
    assert_same(FORMATS["vit"].read(arrays | beside), arrays)


@pytest.mark.parametrize("format_name", ["vit", "big_vision"])
def test_scanned_layers_are_read_like_unrolled_ones(format_name):
    arrays = make_weights(pool="gap", num_layers=12).arrays  # more than ten, so that 10 does not come before 2
    unrolled = FORMATS[format_name].write(arrays)
    scanned = {}
    for name, array in unrolled.items():
        if match := re.fullmatch(r"(Transformer/encoderblock)_0(/.*)", name):
            stack = [unrolled[f"{match[1]}_{layer}{match[2]}"] for layer in range(12)]
            scanned[match[1] + match[2]] = np.stack(stack)
        elif "encoderblock_" not in name:
            scanned[name] = array
    assert find_format(scanned) is FORMATS[format_name]
    assert_same(FORMATS[format_name].read(scanned), arrays)


def test_a_scanned_model_of_ours_is_read_like_an_unrolled_one():
    weights = make_weights()
    scanned = flax.traverse_util.flatten_dict(stack_layers(weights.params), sep="/")
    assert_same(FORMATS["vit"].read({name: np.asarray(array) for name, array in scanned.items()}), weights.arrays)


# --- big_vision adds positions before the class token joins ---


def test_big_visions_class_token_takes_over_its_position():
    arrays = make_weights().arrays
    positions = arrays["Transformer/posembed_input/pos_embedding"]
    theirs = FORMATS["big_vision"].write(arrays)
    np.testing.assert_array_equal(theirs["cls"], arrays["cls"] + positions[:, :1])
    np.testing.assert_array_equal(theirs["pos_embedding"], positions[:, 1:])


def test_to_big_vision_and_back_changes_only_the_class_tokens_position():
    arrays = make_weights().arrays
    positions = arrays["Transformer/posembed_input/pos_embedding"]
    back = FORMATS["big_vision"].read(FORMATS["big_vision"].write(arrays))
    zero = np.concatenate([np.zeros_like(positions[:, :1]), positions[:, 1:]], axis=1)
    moved = {"cls": arrays["cls"] + positions[:, :1], "Transformer/posembed_input/pos_embedding": zero}
    assert_same(back, arrays | moved)


@pytest.mark.parametrize("attributes", [{}, {"position_embedding": "sincos_2d"}, {"pool": "map"}])
def test_to_big_vision_and_back_changes_no_logits(attributes):
    weights = make_weights(num_layers=1, **attributes)
    back = FORMATS["big_vision"].read(FORMATS["big_vision"].write(weights.arrays))
    again = Weights(weights.spec, back, weights.preprocessing)
    assert np.abs(logits(weights)).max() > 0.1
    np.testing.assert_allclose(logits(again), logits(weights), atol=1e-5)


# --- Dtypes ---


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize(
    ("format_name", "attributes"),
    [("vit", {}), ("timm", {}), ("huggingface", {}), ("big_vision", {"pool": "gap"}), ("bit", {**BIT, "stages": (1,)})],
)
def test_formats_keep_dtypes(format_name, attributes, dtype):
    arrays = make_weights(dtype=dtype, **attributes).arrays
    theirs = FORMATS[format_name].write(arrays)
    assert {array.dtype for array in theirs.values()} == {np.dtype(dtype)}
    assert_same(FORMATS[format_name].read(theirs, num_heads=2), arrays)


# --- What does not fit ---


@pytest.mark.parametrize("case", ["timm", "huggingface", "bit"], indirect=True)
def test_names_that_no_rule_knows_are_listed(case):
    layout, _, theirs = case
    strangers = {f"adapter_{index}.scale": np.zeros(3) for index in range(11)}
    with pytest.raises(UserError) as caught:
        layout.read(theirs | strangers, num_heads=2)
    message = str(caught.value)
    assert f"11 of the file's {len(theirs) + 11} names" in message
    assert "adapter_0.scale" in message
    assert "and 3 more" in message


def test_arrays_that_a_format_has_no_name_for_are_listed():
    with pytest.raises(UserError, match=r"no name for .* arrays, first block1/unit1/conv1/kernel.*--to=vit"):
        FORMATS["huggingface"].write(make_weights(**HYBRID).arrays)


def test_a_format_that_joins_arrays_reports_missing_partners():
    arrays = make_weights().arrays
    name = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/"
    del arrays[name + "key/kernel"]
    with pytest.raises(UserError, match=f"no name for 2 of the model's .*{name}query/kernel"):
        FORMATS["timm"].write(arrays)


def test_names_of_no_format_are_listed_with_the_formats_that_are_known():
    with pytest.raises(UserError, match=r"conv1\.weight, fc\.bias.*no format.*released ViT .npz.*Hugging Face"):
        find_format({"conv1.weight": np.zeros(3), "fc.bias": np.zeros(3)})


def test_no_arrays_at_all_are_reported():
    with pytest.raises(UserError, match="no arrays"):
        find_format({})


@pytest.mark.parametrize("case", ["timm", "huggingface", "bit", "timm bit"], indirect=True)
def test_arrays_that_cannot_be_converted_are_refused_with_name_and_shape(case):
    layout, _, theirs = case
    name, array = next((name, array) for name, array in theirs.items() if array.ndim == 4 and "head" not in name)
    flat = {"timm": array.reshape(-1), "huggingface": array[0]}.get(layout.name, array[0, 0])
    if layout.name == "bit":  # whose kernels are laid out as ours; the check of shapes comes later
        name, flat = "resnet/head/conv2d/kernel", np.zeros(())
    expected = f"{name.removeprefix('vit.')} has an unexpected shape, {flat.shape}"
    with pytest.raises(UserError, match=re.escape(expected)):
        layout.read({**theirs, name: flat}, num_heads=2)


@pytest.mark.parametrize(
    ("case", "name"),
    [("bit", "resnet/head/conv2d/kernel"), ("timm bit", "head.fc.weight")],
    indirect=["case"],
)
def test_a_head_that_is_a_convolution_over_more_than_one_pixel_is_refused_with_its_shape(case, name):
    layout, _, theirs = case
    # Of a model that would be another: to take one of the four pixels would be wrong silently.
    larger = np.tile(theirs[name], (2, 2, 1, 1) if layout.name == "bit" else (1, 1, 2, 2))
    with pytest.raises(UserError, match=f"{re.escape(name)}.*{re.escape(str(larger.shape))}"):
        layout.read({**theirs, name: larger})


def test_the_number_of_heads_must_be_given_if_arrays_do_not_show_it():
    with pytest.raises(UserError, match=r"does not say how many attention heads.*--model="):
        FORMATS["timm"].read(as_timm(make_weights().arrays))


def test_reading_and_writing_leave_what_is_given_as_it_is():
    for format_name in ("vit", "big_vision", "timm", "huggingface"):
        arrays = make_weights().arrays
        theirs = FORMATS[format_name].write(arrays)
        before = dict(theirs)
        FORMATS[format_name].read(theirs, num_heads=2)
        assert_same(arrays, make_weights().arrays)
        assert_same(theirs, before)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_parameters_are_the_trees_that_models_take(scan_layers):
    weights = make_weights()
    model = weights.spec.create(scan_layers=scan_layers)
    expected = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32)))["params"]
    params = weights.scanned_params if scan_layers else weights.params
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
