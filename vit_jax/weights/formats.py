"""The formats of released and foreign weights, a table each."""

import re
from collections.abc import Callable, Iterable

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
    KV,
    KV_BIAS,
    OUT_OF_HEADS,
    QKV,
    QKV_BIAS,
    Arrays,
    Format,
    Rule,
    Transform,
)

_BLOCK = "Transformer/encoderblock_{l}/"
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_1/"
_MAP = "MAPHead_0/"
_MAP_ATTENTION = _MAP + "MultiHeadDotProductAttention_0/"
_POSITIONS = "Transformer/posembed_input/pos_embedding"


def _has(*names: str) -> Callable[[Iterable[str]], bool]:
    return lambda given: set(names) <= set(given)


def _same(name: str) -> Rule:
    return Rule(name, name)


def _with_bias(theirs: str, ours: str | None = None) -> list[Rule]:
    """Flax's names of a layer; None: ours are the same."""
    return [Rule(f"{theirs}/{leaf}", f"{ours or theirs}/{leaf}") for leaf in ("kernel", "bias")]


def _scale_and_bias(theirs: str, ours: str | None = None, transform: Transform = CHANNELS) -> list[Rule]:
    """Flax's names of a normalisation; None: ours are the same."""
    return [Rule(f"{theirs}/{leaf}", f"{ours or theirs}/{leaf}", transform) for leaf in ("scale", "bias")]


def _weight_and_bias(theirs: str, ours: str, weight: Transform = DENSE) -> list[Rule]:
    """PyTorch's names of a layer."""
    return [Rule(f"{theirs}.weight", f"{ours}/kernel", weight), Rule(f"{theirs}.bias", f"{ours}/bias")]


def _norm(theirs: str, ours: str) -> list[Rule]:
    """PyTorch's names of a normalisation."""
    return [Rule(f"{theirs}.weight", f"{ours}/scale"), Rule(f"{theirs}.bias", f"{ours}/bias")]


# --- The released .npz of the ViT paper, AugReg, SAM and GSAM, and what this project's models call their arrays ---

_HYBRID_NPZ = [
    Rule("conv_root/kernel", "conv_root/kernel"),
    *_scale_and_bias("gn_root"),
    *[
        rule
        for number in ("1", "2", "3", "_proj")
        for rule in [
            _same("block{s}/unit{u}/conv" + number + "/kernel"),
            *_scale_and_bias("block{s}/unit{u}/gn" + number),
        ]
    ],
]

# Position embeddings other than the released ones, which only this project's files have.
_TABLE_8 = [
    _same(name)
    for place in ("Transformer/posembed_input/", _BLOCK + "posembed/")
    for name in (place + "pos_embedding_x", place + "pos_embedding_y")
]
_TABLE_8 += [_same(_BLOCK + "posembed/pos_embedding")]
_TABLE_8 += [_same(name + "relative_embedding") for name in ("Transformer/", _ATTENTION)]


def _map_head_npz() -> list[Rule]:
    return [
        _same(_MAP + "probe"),
        *_scale_and_bias(_MAP + "LayerNorm_0"),
        *[rule for name in ("query", "key", "value", "out") for rule in _with_bias(_MAP_ATTENTION + name)],
        *[rule for name in ("Dense_0", "Dense_1") for rule in _with_bias(_MAP + "MlpBlock_0/" + name)],
    ]


VIT = Format(
    name="vit",
    description="released ViT .npz",
    prefixes=("opt/target/", "params/"),
    is_recognised=lambda names: (
        {"embedding/kernel"} <= set(names)
        and any(re.search(r"encoderblock(_0)?/MlpBlock_3/", name) for name in names)
        and "pos_embedding" not in names
    ),
    # What some training runs kept beside the parameters of an attention layer.
    others=(r".*/unused",),
    rules=(
        *_HYBRID_NPZ,
        *_with_bias("embedding"),
        Rule("cls", "cls"),
        Rule(_POSITIONS, _POSITIONS),
        *_TABLE_8,
        *_scale_and_bias(_BLOCK + "LayerNorm_0"),
        *[rule for name in ("query", "key", "value", "out") for rule in _with_bias(_ATTENTION + name)],
        *_scale_and_bias(_BLOCK + "LayerNorm_2"),
        *[rule for name in ("Dense_0", "Dense_1") for rule in _with_bias(_BLOCK + "MlpBlock_3/" + name)],
        *_scale_and_bias("Transformer/encoder_norm"),
        *_map_head_npz(),
        *_with_bias("pre_logits"),
        *_with_bias("head"),
    ),
)


# --- big_vision's .npz: blocks count their layers from 0, positions are added before the class token joins ---


def _from_big_vision(arrays: Arrays) -> Arrays:
    if "cls" in arrays and _POSITIONS in arrays:
        positions = arrays[_POSITIONS]
        if positions.ndim != 3:
            raise UserError(f"pos_embedding has an unexpected shape, {positions.shape}.")
        # Its class token has no position embedding of its own.
        arrays[_POSITIONS] = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    return arrays


def _to_big_vision(arrays: Arrays) -> Arrays:
    if "cls" in arrays and _POSITIONS in arrays:
        positions = arrays[_POSITIONS]
        arrays |= {"cls": arrays["cls"] + positions[:, :1], _POSITIONS: positions[:, 1:]}
    return arrays


_BIG_VISION_BLOCK = "Transformer/encoderblock_{l}/"
BIG_VISION = Format(
    name="big_vision",
    description="big_vision ViT .npz",
    attributes={"gelu": "tanh"},
    prefixes=("params/", "opt/target/"),
    is_recognised=lambda names: (
        {"embedding/kernel"} <= set(names) and any(re.search(r"encoderblock(_0)?/MlpBlock_0/", name) for name in names)
    ),
    rules=(
        *_with_bias("embedding"),
        Rule("cls", "cls"),
        Rule("pos_embedding", _POSITIONS),
        *_scale_and_bias(_BIG_VISION_BLOCK + "LayerNorm_0", _BLOCK + "LayerNorm_0"),
        *[
            rule
            for name in ("query", "key", "value", "out")
            for rule in _with_bias(_BIG_VISION_BLOCK + "MultiHeadDotProductAttention_0/" + name, _ATTENTION + name)
        ],
        *_scale_and_bias(_BIG_VISION_BLOCK + "LayerNorm_1", _BLOCK + "LayerNorm_2"),
        *[
            rule
            for name in ("Dense_0", "Dense_1")
            for rule in _with_bias(_BIG_VISION_BLOCK + "MlpBlock_0/" + name, _BLOCK + "MlpBlock_3/" + name)
        ],
        *_scale_and_bias("Transformer/encoder_norm"),
        *_map_head_npz(),
        *_with_bias("pre_logits"),
        *_with_bias("head"),
    ),
    to_ours=_from_big_vision,
    from_ours=_to_big_vision,
)


# --- BiT's .npz with TensorFlow's names ---

_UNIT = "resnet/block{s}/unit{u:02d}/"
_OUR_UNIT = "block{s}/unit{u:02d}/"
BIT = Format(
    name="bit",
    description="released BiT .npz",
    is_recognised=lambda names: any(name.startswith("resnet/root_block/") for name in names),
    # TensorFlow numbered the layers of some files: standardized_conv2d_17, group_norm_3, head/conv2d_1.
    renames=((r"/(standardized_conv2d|group_norm|conv2d)_\d+/", r"/\1/"),),
    rules=(
        Rule("resnet/root_block/standardized_conv2d/kernel", "root_block/conv_root/kernel"),
        *[
            rule
            for letter, number in (("a", "1"), ("b", "2"), ("c", "3"))
            for rule in (
                Rule(f"{_UNIT}{letter}/standardized_conv2d/kernel", f"{_OUR_UNIT}conv{number}/kernel"),
                Rule(f"{_UNIT}{letter}/group_norm/gamma", f"{_OUR_UNIT}gn{number}/scale", CHANNELS),
                Rule(f"{_UNIT}{letter}/group_norm/beta", f"{_OUR_UNIT}gn{number}/bias", CHANNELS),
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
    prefixes=("params/", "opt/target/"),
    is_recognised=_has("root_block/conv_root/kernel", "norm-pre-head/scale"),
    rules=(
        Rule("root_block/conv_root/kernel", "root_block/conv_root/kernel"),
        *[
            rule
            for number in ("1", "2", "3")
            for rule in (
                _same(f"{_OUR_UNIT}conv{number}/kernel"),
                *_scale_and_bias(f"{_OUR_UNIT}gn{number}", f"{_OUR_UNIT}gn{number}", CHANNELS_OF_4D),
            )
        ],
        _same(f"{_OUR_UNIT}conv_proj/kernel"),
        *_scale_and_bias("norm-pre-head", "norm_pre_head", CHANNELS_OF_4D),
        *_with_bias("head"),
    ),
)


# --- This project's own names where no released layout has them: axial models ---

_AXIAL_BLOCK = "encoderblock_{l}/"
AXIAL = Format(
    name="axial",
    description="vit_jax .npz of an axial model",
    is_recognised=lambda names: any(re.search(r"/(row|column)/", name) for name in names),
    rules=(
        *_with_bias("embedding"),
        _same("posembed_input/pos_embedding"),
        *[
            rule
            for axis in ("row", "column")
            for rule in (
                *_scale_and_bias(f"{_AXIAL_BLOCK}{axis}/LayerNorm_0"),
                *_scale_and_bias(f"{_AXIAL_BLOCK}{axis}/LayerNorm_2"),
                *_with_bias(f"{_AXIAL_BLOCK}{axis}/MlpBlock_3/Dense_0"),
                *_with_bias(f"{_AXIAL_BLOCK}{axis}/MlpBlock_3/Dense_1"),
                *[
                    rule
                    for name in ("query", "key", "value", "out")
                    for place in (f"{_AXIAL_BLOCK}{axis}/MultiHeadDotProductAttention_1/", f"{_OUR_UNIT}{axis}/")
                    for rule in _with_bias(place + name)
                ],
                _same(f"{_OUR_UNIT}{axis}/relative_embedding"),
            )
        ],
        *_scale_and_bias("encoder_norm"),
        _same("root_block/conv_root/kernel"),
        *[
            rule
            for number in ("1", "2", "3")
            for rule in (
                _same(f"{_OUR_UNIT}conv{number}/kernel"),
                *_scale_and_bias(f"{_OUR_UNIT}gn{number}"),
            )
        ],
        _same(f"{_OUR_UNIT}conv_proj/kernel"),
        *_scale_and_bias("norm_pre_head"),
        *_with_bias("head"),
    ),
)


# --- timm's state dicts ---


def _refuse_lost_pre_logits(arrays: Arrays, library: str) -> Arrays:
    if "pre_logits/kernel" in arrays and (library == "timm" or "head/kernel" in arrays):
        place = "no place for the pre_logits layer" if library == "timm" else "no place for pre_logits beside a head"
        drop = "head" if library != "timm" else "pre_logits,head" if "head/kernel" in arrays else "pre_logits"
        raise UserError(
            f"{library} has {place}, so the file would be another model. Leave out what it cannot hold: --drop={drop}."
        )
    return arrays


def _name_lone_root(arrays: Arrays) -> Arrays:
    """R+Ti/16's backbone is its root, which timm then gives no name of its own."""
    if any(name.startswith(_BACKBONE + "stages.") for name in arrays):
        return arrays
    return {name.replace(_BACKBONE + "stem.", _BACKBONE): array for name, array in arrays.items()}


def _prefix_all_but_the_head(arrays: Arrays) -> Arrays:
    """ViTForImageClassification keeps the model under `vit.`; ViTModel alone does not."""
    if "classifier.weight" not in arrays:
        return arrays
    return {name if name.startswith("classifier.") else "vit." + name: array for name, array in arrays.items()}


def _timm_hybrid(root: str, unit: str) -> list[Rule]:
    return [
        Rule(root + "conv.weight", "conv_root/kernel", CONV),
        *_norm(root + "norm", "gn_root"),
        *[
            rule
            for number in ("1", "2", "3")
            for rule in (
                Rule(f"{unit}conv{number}.weight", "block{s}/unit{u}/conv" + number + "/kernel", CONV),
                *_norm(f"{unit}norm{number}", "block{s}/unit{u}/gn" + number),
            )
        ],
        Rule(f"{unit}downsample.conv.weight", "block{s}/unit{u}/conv_proj/kernel", CONV),
        *_norm(f"{unit}downsample.norm", "block{s}/unit{u}/gn_proj"),
    ]


_BACKBONE = "patch_embed.backbone."
_TIMM_BLOCK = "blocks.{l}."
TIMM = Format(
    name="timm",
    description="timm VisionTransformer state dict",
    is_recognised=_has("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    anchor=r"(?P<prefix>(.*\.)?)patch_embed\.proj\.weight",
    rules=(
        *_timm_hybrid(_BACKBONE + "stem.", _BACKBONE + "stages.{s0}.blocks.{u0}."),
        *_weight_and_bias("patch_embed.proj", "embedding", CONV),
        Rule("cls_token", "cls"),
        Rule("pos_embed", _POSITIONS),
        *_norm(_TIMM_BLOCK + "norm1", _BLOCK + "LayerNorm_0"),
        Rule(
            _TIMM_BLOCK + "attn.qkv.weight",
            (_ATTENTION + "query/kernel", _ATTENTION + "key/kernel", _ATTENTION + "value/kernel"),
            QKV,
        ),
        Rule(
            _TIMM_BLOCK + "attn.qkv.bias",
            (_ATTENTION + "query/bias", _ATTENTION + "key/bias", _ATTENTION + "value/bias"),
            QKV_BIAS,
        ),
        *_weight_and_bias(_TIMM_BLOCK + "attn.proj", _ATTENTION + "out", OUT_OF_HEADS),
        *_norm(_TIMM_BLOCK + "norm2", _BLOCK + "LayerNorm_2"),
        *_weight_and_bias(_TIMM_BLOCK + "mlp.fc1", _BLOCK + "MlpBlock_3/Dense_0"),
        *_weight_and_bias(_TIMM_BLOCK + "mlp.fc2", _BLOCK + "MlpBlock_3/Dense_1"),
        *_norm("norm", "Transformer/encoder_norm"),
        Rule("attn_pool.latent", _MAP + "probe"),
        *_weight_and_bias("attn_pool.q", _MAP_ATTENTION + "query", INTO_HEADS)[:1],
        Rule("attn_pool.q.bias", _MAP_ATTENTION + "query/bias", INTO_HEADS_BIAS),
        Rule("attn_pool.kv.weight", (_MAP_ATTENTION + "key/kernel", _MAP_ATTENTION + "value/kernel"), KV),
        Rule("attn_pool.kv.bias", (_MAP_ATTENTION + "key/bias", _MAP_ATTENTION + "value/bias"), KV_BIAS),
        *_weight_and_bias("attn_pool.proj", _MAP_ATTENTION + "out", OUT_OF_HEADS),
        *_norm("attn_pool.norm", _MAP + "LayerNorm_0"),
        *_weight_and_bias("attn_pool.mlp.fc1", _MAP + "MlpBlock_0/Dense_0"),
        *_weight_and_bias("attn_pool.mlp.fc2", _MAP + "MlpBlock_0/Dense_1"),
        # Older releases had this layer; today's have no place for it.
        *_weight_and_bias("pre_logits.fc", "pre_logits"),
        *_weight_and_bias("head", "head"),
    ),
    # The root of R+Ti/16 is the whole backbone.
    renames=((r"^patch_embed\.backbone\.(conv|norm)\.", r"patch_embed.backbone.stem.\1."),),
    from_ours=lambda arrays: _refuse_lost_pre_logits(arrays, "timm"),
    finish=_name_lone_root,
)

_TIMM_UNIT = "stages.{s0}.blocks.{u0}."
TIMM_BIT = Format(
    name="timm_bit",
    description="timm ResNetV2 (BiT) state dict",
    attributes={"root_padding": "zeros"},
    is_recognised=_has("stem.conv.weight", "stages.0.blocks.0.conv1.weight", "norm.weight"),
    # Not the stem of a hybrid's backbone.
    anchor=r"(?P<prefix>((?!.*backbone\.stem).*\.)?)stem\.conv\.weight",
    rules=(
        Rule("stem.conv.weight", "root_block/conv_root/kernel", CONV),
        *[
            rule
            for number in ("1", "2", "3")
            for rule in (
                Rule(f"{_TIMM_UNIT}conv{number}.weight", f"{_OUR_UNIT}conv{number}/kernel", CONV),
                *_norm(f"{_TIMM_UNIT}norm{number}", f"{_OUR_UNIT}gn{number}"),
            )
        ],
        Rule(f"{_TIMM_UNIT}downsample.conv.weight", f"{_OUR_UNIT}conv_proj/kernel", CONV),
        *_norm("norm", "norm_pre_head"),
        Rule("head.fc.weight", "head/kernel", HEAD_AS_CONV),
        Rule("head.fc.bias", "head/bias"),
    ),
)


# --- Hugging Face's ViT ---

_HF_LAYER = "encoder.layer.{l}."
HUGGINGFACE = Format(
    name="huggingface",
    description="Hugging Face ViT",
    is_recognised=_has("embeddings.patch_embeddings.projection.weight"),
    anchor=r"(?P<prefix>(.*?\.)??)(vit\.)?embeddings\.patch_embeddings\.projection\.weight",
    renames=((r"^vit\.", ""),),
    rules=(
        Rule("embeddings.cls_token", "cls"),
        Rule("embeddings.position_embeddings", _POSITIONS),
        *_weight_and_bias("embeddings.patch_embeddings.projection", "embedding", CONV),
        *_norm(_HF_LAYER + "layernorm_before", _BLOCK + "LayerNorm_0"),
        *[
            rule
            for name in ("query", "key", "value")
            for rule in (
                Rule(f"{_HF_LAYER}attention.attention.{name}.weight", f"{_ATTENTION}{name}/kernel", INTO_HEADS),
                Rule(f"{_HF_LAYER}attention.attention.{name}.bias", f"{_ATTENTION}{name}/bias", INTO_HEADS_BIAS),
            )
        ],
        *_weight_and_bias(_HF_LAYER + "attention.output.dense", _ATTENTION + "out", OUT_OF_HEADS),
        *_norm(_HF_LAYER + "layernorm_after", _BLOCK + "LayerNorm_2"),
        *_weight_and_bias(_HF_LAYER + "intermediate.dense", _BLOCK + "MlpBlock_3/Dense_0"),
        *_weight_and_bias(_HF_LAYER + "output.dense", _BLOCK + "MlpBlock_3/Dense_1"),
        *_norm("layernorm", "Transformer/encoder_norm"),
        # What transformers 5 calls them in memory; it still writes the names above unless told otherwise.
        *[
            rule
            for name, theirs in (("query", "q"), ("key", "k"), ("value", "v"))
            for rule in (
                Rule(f"layers.{{l}}.attention.{theirs}_proj.weight", f"{_ATTENTION}{name}/kernel", INTO_HEADS),
                Rule(f"layers.{{l}}.attention.{theirs}_proj.bias", f"{_ATTENTION}{name}/bias", INTO_HEADS_BIAS),
            )
        ],
        *_weight_and_bias("layers.{l}.attention.o_proj", _ATTENTION + "out", OUT_OF_HEADS),
        *_norm("layers.{l}.layernorm_before", _BLOCK + "LayerNorm_0"),
        *_norm("layers.{l}.layernorm_after", _BLOCK + "LayerNorm_2"),
        *_weight_and_bias("layers.{l}.mlp.fc1", _BLOCK + "MlpBlock_3/Dense_0"),
        *_weight_and_bias("layers.{l}.mlp.fc2", _BLOCK + "MlpBlock_3/Dense_1"),
        *_weight_and_bias("pooler.dense", "pre_logits"),
        *_weight_and_bias("classifier", "head"),
    ),
    from_ours=lambda arrays: _refuse_lost_pre_logits(arrays, "Hugging Face"),
    finish=_prefix_all_but_the_head,
)

FORMATS = {format.name: format for format in (VIT, BIG_VISION, BIT, BIG_VISION_BIT, AXIAL, TIMM, TIMM_BIT, HUGGINGFACE)}
