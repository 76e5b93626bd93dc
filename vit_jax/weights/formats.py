"""The formats of released and foreign weights, with a table for each."""

from collections.abc import Iterable

import numpy as np

from vit_jax.errors import UserError
from vit_jax.weights.mapping import (
    CHANNELS,
    CHANNELS_OF_4D,
    CONV,
    DENSE,
    HEAD_AS_CONV,
    HEAD_AS_TF_CONV,
    INTO_HEADS,
    INTO_HEADS_BIAS,
    OUT_OF_HEADS,
    Arrays,
    Format,
    Rule,
    Transform,
    list_names,
)

POSITIONS = "Transformer/posembed_input/pos_embedding"
_BLOCK = "Transformer/encoderblock_{l}/"
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_1/"
_HYBRID_UNIT = "block{s}/unit{u}/"
_MAP = "MAPHead_0/"
_MAP_ATTENTION = _MAP + "MultiHeadDotProductAttention_0/"
_FLAX_PREFIX = r"(opt/target/|params/)?"
_ALL_OTHERS_ARE_OURS = Rule("", "")


def _scale_and_bias(theirs: str, ours: str, transform: Transform = CHANNELS) -> list[Rule]:
    """Flax's names of a normalization."""
    return [Rule(f"{theirs}/{leaf}", f"{ours}/{leaf}", transform) for leaf in ("scale", "bias")]


def _layer(theirs: str, ours: str, weight: Transform = DENSE) -> list[Rule]:
    """PyTorch's names of a layer."""
    return [Rule(f"{theirs}.weight", f"{ours}/kernel", weight), Rule(f"{theirs}.bias", f"{ours}/bias")]


def _norm(theirs: str, ours: str) -> list[Rule]:
    """PyTorch's names of a normalization."""
    return [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]


def _into_heads(theirs: str, *ours: str) -> list[Rule]:
    """PyTorch's names of a projection to queries, keys or values, or to several of them."""
    return [
        Rule(f"{theirs}.weight", tuple(f"{name}/kernel" for name in ours), INTO_HEADS),
        Rule(f"{theirs}.bias", tuple(f"{name}/bias" for name in ours), INTO_HEADS_BIAS),
    ]


# --- The released .npz of the ViT paper, AugReg, SAM and GSAM; the names of this project's ViTs are the same ---

VIT = Format(
    name="vit",
    description="released ViT .npz",
    marks=("embedding/kernel", r"Transformer/encoderblock(_0)?/MlpBlock_3/.*"),
    prefix=_FLAX_PREFIX,
    ignored=(r".*/unused",),  # some training runs kept these beside the parameters of an attention layer
    rules=(
        *_scale_and_bias("gn_root", "gn_root"),
        *_scale_and_bias(_HYBRID_UNIT + "gn{n}", _HYBRID_UNIT + "gn{n}"),
        *_scale_and_bias(_HYBRID_UNIT + "gn_proj", _HYBRID_UNIT + "gn_proj"),
        _ALL_OTHERS_ARE_OURS,
    ),
)


# --- big_vision's .npz: it numbers the layers of a block from 0 and adds positions before the class token joins ---


def _from_big_vision(arrays: Arrays) -> Arrays:
    if "cls" in arrays and POSITIONS in arrays:
        positions = arrays[POSITIONS]
        if positions.ndim != 3:
            raise UserError(f"pos_embedding has an unexpected shape, {positions.shape}.")
        # Its class token has no position embedding.
        arrays[POSITIONS] = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    return arrays


def _to_big_vision(arrays: Arrays) -> Arrays:
    if "cls" in arrays and POSITIONS in arrays:
        positions = arrays[POSITIONS]
        arrays |= {"cls": arrays["cls"] + positions[:, :1], POSITIONS: positions[:, 1:]}
    return arrays


BIG_VISION = Format(
    name="big_vision",
    description="big_vision ViT .npz",
    attributes={"gelu": "tanh"},
    marks=("embedding/kernel", r"Transformer/encoderblock(_0)?/MlpBlock_0/.*"),
    prefix=_FLAX_PREFIX,
    rules=(
        Rule("pos_embedding", POSITIONS),
        Rule(_BLOCK + "MultiHeadDotProductAttention_0/", _ATTENTION),
        Rule(_BLOCK + "LayerNorm_1/", _BLOCK + "LayerNorm_2/"),
        Rule(_BLOCK + "MlpBlock_0/", _BLOCK + "MlpBlock_3/"),
        _ALL_OTHERS_ARE_OURS,
    ),
    to_ours=_from_big_vision,
    from_ours=_to_big_vision,
)


# --- BiT's .npz with TensorFlow's names, and big_vision's with Flax's ---

_UNIT = "resnet/block{s}/unit{u:02d}/"
_OUR_UNIT = "block{s}/unit{u:02d}/"
BIT = Format(
    name="bit",
    description="released BiT .npz",
    marks=(r"resnet/root_block/.*",),
    # TensorFlow numbered the layers of some files: standardized_conv2d_17, group_norm_3, head/conv2d_1.
    renames=((r"/(standardized_conv2d|group_norm|conv2d)_\d+/", r"/\1/"),),
    rules=(
        Rule("resnet/root_block/standardized_conv2d/kernel", "root_block/conv_root/kernel"),
        *[
            rule
            for a, number in (("a", "1"), ("b", "2"), ("c", "3"))
            for rule in (
                Rule(f"{_UNIT}{a}/standardized_conv2d/kernel", f"{_OUR_UNIT}conv{number}/kernel"),
                Rule(f"{_UNIT}{a}/group_norm/gamma", f"{_OUR_UNIT}gn{number}/scale", CHANNELS),
                Rule(f"{_UNIT}{a}/group_norm/beta", f"{_OUR_UNIT}gn{number}/bias", CHANNELS),
            )
        ],
        Rule(f"{_UNIT}a/proj/standardized_conv2d/kernel", f"{_OUR_UNIT}conv_proj/kernel"),
        Rule("resnet/group_norm/gamma", "norm_pre_head/scale", CHANNELS),
        Rule("resnet/group_norm/beta", "norm_pre_head/bias", CHANNELS),
        Rule("resnet/head/conv2d/kernel", "head/kernel", HEAD_AS_TF_CONV),
        Rule("resnet/head/conv2d/bias", "head/bias"),
    ),
)

BIG_VISION_BIT = Format(
    name="big_vision_bit",
    description="big_vision BiT .npz",
    attributes={"root_padding": "lowest"},
    marks=("root_block/conv_root/kernel", "norm-pre-head/scale"),
    prefix=_FLAX_PREFIX,
    rules=(
        *_scale_and_bias(_OUR_UNIT + "gn{n}", _OUR_UNIT + "gn{n}", CHANNELS_OF_4D),
        *_scale_and_bias("norm-pre-head", "norm_pre_head", CHANNELS_OF_4D),
        _ALL_OTHERS_ARE_OURS,
    ),
)


# --- Axial models, which no other library has ---

AXIAL = Format(
    name="axial",
    description="vit_jax .npz of an axial model",
    marks=(r".*/(row|column|height_axis|width_axis)/.*",),
    rules=(_ALL_OTHERS_ARE_OURS,),
)


# --- timm's state dicts ---


_BACKBONE = "patch_embed.backbone."


def _name_lone_root(arrays: Arrays) -> Arrays:
    """Renames the root of R+Ti/16, which is its whole backbone, to timm's name."""
    if any(name.startswith(_BACKBONE + "stages.") for name in arrays):
        return arrays
    return {name.replace(_BACKBONE + "stem.", _BACKBONE): array for name, array in arrays.items()}


def _timm_units(theirs: str, ours: str) -> list[Rule]:
    """The units of a ResNet."""
    return [
        Rule(theirs + "conv{n}.weight", ours + "conv{n}/kernel", CONV),
        *_norm(theirs + "norm{n}", ours + "gn{n}"),
        Rule(theirs + "downsample.conv.weight", ours + "conv_proj/kernel", CONV),
    ]


_TIMM_BLOCK = "blocks.{l}."
_TIMM_UNIT = "stages.{s0}.blocks.{u0}."
TIMM = Format(
    name="timm",
    description="timm VisionTransformer state dict",
    marks=(r"patch_embed\.proj\.weight", r"blocks\.0\.attn\.qkv\.weight"),
    prefix=r"(.*\.)?",
    rules=(
        Rule(_BACKBONE + "stem.conv.weight", "conv_root/kernel", CONV),
        *_norm(_BACKBONE + "stem.norm", "gn_root"),
        *_timm_units(_BACKBONE + _TIMM_UNIT, _HYBRID_UNIT),
        *_norm(_BACKBONE + _TIMM_UNIT + "downsample.norm", _HYBRID_UNIT + "gn_proj"),
        *_layer("patch_embed.proj", "embedding", CONV),
        Rule("cls_token", "cls"),
        Rule("pos_embed", POSITIONS),
        *_norm(_TIMM_BLOCK + "norm1", _BLOCK + "LayerNorm_0"),
        *_into_heads(_TIMM_BLOCK + "attn.qkv", *[_ATTENTION + name for name in ("query", "key", "value")]),
        *_layer(_TIMM_BLOCK + "attn.proj", _ATTENTION + "out", OUT_OF_HEADS),
        *_norm(_TIMM_BLOCK + "norm2", _BLOCK + "LayerNorm_2"),
        *_layer(_TIMM_BLOCK + "mlp.fc1", _BLOCK + "MlpBlock_3/Dense_0"),
        *_layer(_TIMM_BLOCK + "mlp.fc2", _BLOCK + "MlpBlock_3/Dense_1"),
        *_norm("norm", "Transformer/encoder_norm"),
        Rule("attn_pool.latent", _MAP + "probe"),
        *_into_heads("attn_pool.q", _MAP_ATTENTION + "query"),
        *_into_heads("attn_pool.kv", _MAP_ATTENTION + "key", _MAP_ATTENTION + "value"),
        *_layer("attn_pool.proj", _MAP_ATTENTION + "out", OUT_OF_HEADS),
        *_norm("attn_pool.norm", _MAP + "LayerNorm_0"),
        *_layer("attn_pool.mlp.fc1", _MAP + "MlpBlock_0/Dense_0"),
        *_layer("attn_pool.mlp.fc2", _MAP + "MlpBlock_0/Dense_1"),
        *_layer("pre_logits.fc", "pre_logits"),  # only older releases have this layer
        *_layer("head", "head"),
    ),
    renames=((r"^patch_embed\.backbone\.(conv|norm)\.", r"patch_embed.backbone.stem.\1."),),  # R+Ti/16
    finish=_name_lone_root,
)

TIMM_BIT = Format(
    name="timm_bit",
    description="timm ResNetV2 (BiT) state dict",
    attributes={"root_padding": "zeros"},
    marks=(r"stem\.conv\.weight", r"stages\.0\.blocks\.0\.conv1\.weight", r"norm\.weight"),
    prefix=r"((?!.*backbone\.stem).*\.)?",  # not the backbone of a hybrid
    rules=(
        Rule("stem.conv.weight", "root_block/conv_root/kernel", CONV),
        *_timm_units(_TIMM_UNIT, _OUR_UNIT),
        *_norm("norm", "norm_pre_head"),
        Rule("head.fc.weight", "head/kernel", HEAD_AS_CONV),
        Rule("head.fc.bias", "head/bias"),
    ),
)


# --- Hugging Face's ViT ---


def _prefix_all_but_the_head(arrays: Arrays) -> Arrays:
    """ViTForImageClassification keeps the model under `vit.`; ViTModel alone does not."""
    if "classifier.weight" not in arrays:
        return arrays
    return {name if name.startswith("classifier.") else "vit." + name: array for name, array in arrays.items()}


_HF_LAYER = "encoder.layer.{l}."
HUGGINGFACE = Format(
    name="huggingface",
    description="Hugging Face ViT",
    marks=(r"(vit\.)?embeddings\.patch_embeddings\.projection\.weight",),
    prefix=r"(.*?\.)??",
    renames=(
        (r"^vit\.", ""),
        # Names of transformers 5 in memory. It writes them into files only if asked to.
        (r"^layers\.", "encoder.layer."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    rules=(
        Rule("embeddings.cls_token", "cls"),
        Rule("embeddings.position_embeddings", POSITIONS),
        *_layer("embeddings.patch_embeddings.projection", "embedding", CONV),
        *_norm(_HF_LAYER + "layernorm_before", _BLOCK + "LayerNorm_0"),
        *[
            rule
            for name in ("query", "key", "value")
            for rule in _into_heads(f"{_HF_LAYER}attention.attention.{name}", _ATTENTION + name)
        ],
        *_layer(_HF_LAYER + "attention.output.dense", _ATTENTION + "out", OUT_OF_HEADS),
        *_norm(_HF_LAYER + "layernorm_after", _BLOCK + "LayerNorm_2"),
        *_layer(_HF_LAYER + "intermediate.dense", _BLOCK + "MlpBlock_3/Dense_0"),
        *_layer(_HF_LAYER + "output.dense", _BLOCK + "MlpBlock_3/Dense_1"),
        *_norm("layernorm", "Transformer/encoder_norm"),
        *_layer("pooler.dense", "pre_logits"),
        *_layer("classifier", "head"),
    ),
    finish=_prefix_all_but_the_head,
)

FORMATS = {format.name: format for format in (VIT, BIG_VISION, BIT, BIG_VISION_BIT, AXIAL, TIMM, TIMM_BIT, HUGGINGFACE)}


def find_format(names: Iterable[str]) -> Format:
    """Identifies the format of a file by the names of its arrays.

    Raises:
      UserError: there are no arrays, or their format is unknown.
    """
    names = list(names)
    if not names:
        raise UserError("it has no arrays.")
    for layout in FORMATS.values():
        if layout.is_format_of(names):
            return layout
    known = "; ".join(layout.description for layout in FORMATS.values())
    raise UserError(f"names such as {list_names(names)} match no format that vit_jax knows: {known}.")
