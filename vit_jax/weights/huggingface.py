"""Reads and writes folders like Hugging Face's and timm's: a .safetensors file, and JSON files that describe it.

Hugging Face's ViT has `config.json` and `preprocessor_config.json`; timm has a `config.json` with its own fields.
"""

import pathlib
import re
from typing import Any

from vit_jax.errors import UserError
from vit_jax.json_files import Fields, read_optional
from vit_jax.models.layers import LAYER_NORM_EPSILON
from vit_jax.models.variants import VARIANTS
from vit_jax.weights import foreign_preprocessing
from vit_jax.weights.identify import ModelSpec
from vit_jax.weights.model_weights import Facts
from vit_jax.weights.preprocessing import MAX_SIDE, Preprocessing

MODEL_FILE = "model.safetensors"
_MAX_HEADS = 1024
_GELUS = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
# Hugging Face's names of losses; "regression" is none of ours.
_PROBLEM_TYPES = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}
_TIMM_GELUS = {"gelu": "exact", "gelu_tanh": "tanh"}
_TIMM_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
_TIMM_PATCHES = {"tiny": (16,), "small": (16, 8, 32), "base": (16, 8, 32), "large": (16, 14, 32), "huge": (14,)}
_TIMM_VIT = re.compile(r"(?:vit|deit)_(tiny|small|base|large|huge)_(?:patch\d+|r\d*_s\d+(?:_p8)?)_\d+")
_TIMM_HYBRIDS = {
    "R+Ti/16": "vit_tiny_r_s16_p8_224",
    "R26+S/32": "vit_small_r26_s32_224",
    "R50+ViT-L/32": "vit_large_r50_s32_224",
    "R50+L/32": "vit_large_r50_s32_224",
    "R50+ViT-B/16": "vit_base_r50_s16_224",
}
_TIMM_BIT = re.compile(r"resnetv2_\d+x\d+_bit")
_TIMM_BIT_NAMES = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
# Arguments of timm's VisionTransformer that arrays show, that are read here, or that matter in training alone.
_TIMM_ARGUMENTS = ("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth",
                   "num_heads", "mlp_ratio", "qkv_bias", "class_token", "fc_norm", "act_layer", "weight_init",
                   "init_values", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate",
                   "drop_path_rate", "strict_img_size", "dynamic_img_size")  # fmt: skip


def model_file(folder: pathlib.Path) -> pathlib.Path:
    """Returns the file with the arrays.

    Raises:
      UserError: there is none.
    """
    if (folder / MODEL_FILE).is_file():
        return folder / MODEL_FILE
    found = sorted(path.name for path in folder.iterdir())
    hint = "Nor has it a starts.jsonl, as a run's workdir has."
    if any(name.endswith(".index.json") for name in found):
        hint = "Weights in several parts are not read; save them as one file."
    elif any(name.endswith((".bin", ".pth")) for name in found):
        hint = "A .bin or .pth file is a pickle, which vit_jax does not read; publishers offer .safetensors beside it."
    elif "_CHECKPOINT_METADATA" in found or "_METADATA" in found:
        hint = "It is an Orbax checkpoint; name the workdir of its run instead."
    raise UserError(f"{folder} has no {MODEL_FILE}; there are {', '.join(found[:8]) or 'no files'}. {hint}")


def read_facts(folder: pathlib.Path) -> Facts:
    """Reads the JSON files of a folder.

    Raises:
      UserError: a file is damaged, or describes a model or a preprocessing that vit_jax cannot compute.
    """
    path = folder / "config.json"
    config = Fields(read_optional(path), str(path))
    if "architecture" in config or "pretrained_cfg" in config:
        return _read_timm(config)
    path = folder / "preprocessor_config.json"
    return _read_huggingface(config, Fields(read_optional(path), str(path)))


def _image_size(fields: Fields, name: str) -> tuple[int, int] | None:
    """Returns height and width, from one number or two."""
    if isinstance(fields.values.get(name), list):
        height, width = fields.integers(name, length=2, at_least=1, at_most=MAX_SIDE)
        return height, width
    side = fields.integer(name, None, at_least=1, at_most=MAX_SIDE)
    return None if side is None else (side, side)


# --- Hugging Face ---


def _read_huggingface(config: Fields, preprocessor: Fields) -> Facts:
    if (kind := config.text("model_type", "vit")) != "vit":
        raise UserError(f"a Hugging Face model of type {kind!r}; vit_jax reads 'vit'.")
    if (activation := config.text("hidden_act", "gelu")) not in _GELUS:
        raise UserError(f"the activation {activation!r} is not one of vit_jax's, which are {', '.join(_GELUS)}.")
    if (epsilon := config.number("layer_norm_eps", LAYER_NORM_EPSILON, at_least=0)) > 10 * LAYER_NORM_EPSILON:
        raise UserError(f"layer norms with epsilon {epsilon}; vit_jax's have {LAYER_NORM_EPSILON}.")
    if (pooler := config.text("pooler_act", "tanh")) != "tanh":
        raise UserError(f"a pooler with activation {pooler!r}; vit_jax's pre_logits layer has tanh.")
    image_size = _image_size(config, "image_size")
    preprocessing: Preprocessing | None = None
    notes: tuple[str, ...] = (f"no {preprocessor.where}: images are resized to a square, values in [-1, 1]",)
    if preprocessor.values:
        preprocessing, notes = foreign_preprocessing.read_huggingface(preprocessor, image_size)
    return Facts(
        num_heads=config.integer("num_attention_heads", None, at_least=1, at_most=_MAX_HEADS),
        overrides={"gelu": "exact"} if config.values and _GELUS[activation] == "exact" else {},
        image_size=image_size,
        preprocessing=preprocessing,
        class_names=_label_names(config.fields("id2label", None)),
        probabilities=_PROBLEM_TYPES.get(config.text("problem_type", "")),
        notes=notes,
    )


def _label_names(labels: Fields | None) -> tuple[str, ...] | None:
    """Names in the order of the labels; None if they only repeat the number ("LABEL_0")."""
    if labels is None or not labels.values:
        return None
    names = [labels.text(str(label), None) for label in range(len(labels.values))]
    if None in names:
        raise UserError(f"{labels.where} does not name label {str(names.index(None))!r}.")
    return None if all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names) else tuple(map(str, names))


def describe_for_huggingface(
    spec: ModelSpec, preprocessing: Preprocessing, names: tuple[str, ...] | None, probabilities: str | None = None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Makes the JSON files of a folder for transformers, by name, and notes about what they cannot express.

    Raises:
      UserError: transformers has no such preprocessing.
    """
    model = spec.create()
    height, width = spec.image_size or preprocessing.image_size
    config: dict[str, Any] = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if spec.num_classes else "ViTModel"],
        "hidden_size": model.hidden_dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "hidden_act": "gelu_pytorch_tanh" if model.gelu == "tanh" else "gelu",
        "layer_norm_eps": LAYER_NORM_EPSILON,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pooler_act": "tanh",
    }
    if spec.num_classes:
        names = names or tuple(f"LABEL_{label}" for label in range(spec.num_classes))
        config["id2label"] = {str(label): name for label, name in enumerate(names)}
        config["label2id"] = {name: label for label, name in enumerate(names)}
        if probabilities:
            config["problem_type"] = next(theirs for theirs, ours in _PROBLEM_TYPES.items() if ours == probabilities)
    processor, notes = foreign_preprocessing.write_huggingface(preprocessing)
    return {"config.json": config, "preprocessor_config.json": processor}, notes


# --- timm ---


def _read_timm(config: Fields) -> Facts:
    pretrained = config.fields("pretrained_cfg", None)
    fields = Fields({**config.values, **(pretrained.values if pretrained else {})}, config.where)
    architecture = config.text("architecture", "")
    vit = _TIMM_VIT.fullmatch(architecture.partition(".")[0])
    if not vit and not _TIMM_BIT.fullmatch(architecture.partition(".")[0]):
        # Others may differ in what no array shows: the GELU, the pooling, a norm before the blocks.
        raise UserError(
            f"timm's architecture {architecture!r:.100} may not be one of vit_jax's; it reads vit_*_patch*, "
            "deit_*_patch*, hybrids such as vit_base_r50_s16_224, and resnetv2_*_bit."
        )
    model_args = config.fields("model_args", Fields({}, f"{config.where}: model_args"))
    image_size = _image_size(model_args, "img_size")
    if "input_size" in fields:
        _, height, width = fields.integers("input_size", length=3, at_least=1, at_most=MAX_SIDE)
        image_size = height, width
    elif image_size:
        fields.values["input_size"] = [3, *image_size]
    num_heads = None
    if vit:
        usual = VARIANTS[_TIMM_SIZES[vit[1]]].num_heads
        num_heads = model_args.integer("num_heads", usual, at_least=1, at_most=_MAX_HEADS)
    return Facts(
        num_heads=num_heads,
        overrides=_timm_overrides(config, model_args) if vit else {},
        image_size=image_size,
        preprocessing=foreign_preprocessing.read_timm(fields),
        class_names=fields.texts("label_names", None) or None,
    )


def _timm_overrides(config: Fields, model_args: Fields) -> dict[str, Any]:
    act_layer = model_args.text("act_layer", "gelu")
    if act_layer not in _TIMM_GELUS:
        raise UserError(f"the activation {act_layer!r} is not one of vit_jax's, which are {', '.join(_TIMM_GELUS)}.")
    pool = model_args.text("global_pool", config.text("global_pool", "token"))
    if pool == "avg" and model_args.flag("class_token", True):
        raise UserError("the timm model has a class token but averages the others, which no model of vit_jax does.")
    for name, value in model_args.values.items():
        if name not in _TIMM_ARGUMENTS and value not in (None, False):
            raise UserError(
                f"{model_args.where}: {name} is {value!r:.50}, which vit_jax does not know; it may change what the "
                "model computes. Remove it if it does not."
            )
    return {"gelu": "exact"} if _TIMM_GELUS[act_layer] == "exact" else {}


def timm_name(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """Returns the name and arguments with which `timm.create_model` makes the same model.

    Raises:
      UserError: timm has no such model.
    """
    changed = {"stages", "width_factor", "resnet", "patch_size"} & spec.overrides.keys()
    bit = re.fullmatch(r"R(\d+)x(\d+)", spec.name)
    if bit and not changed and spec.name in _TIMM_BIT_NAMES:
        return f"resnetv2_{bit[1]}x{bit[2]}_bit", {}
    vit = re.fullmatch(r"ViT-(\w+)/(\d+)", spec.name)
    theirs = next((theirs for theirs, ours in _TIMM_SIZES.items() if vit and ours == vit[1]), None)
    if changed or (theirs is None and spec.name not in _TIMM_HYBRIDS):
        raise UserError(
            f"timm has no model like {spec}. Save it in this project's layout, without --to; or its state "
            "dict alone, as a .safetensors file, for a model that you build yourself."
        )
    model = spec.create()
    size = spec.image_size or (224, 224)
    arguments: dict[str, Any] = {"img_size": list(size)} if size != (224, 224) else {}
    if model.gelu == "tanh":
        arguments["act_layer"] = "gelu_tanh"
    if model.pool != "cls":
        # With fc_norm, timm would take the mean before the last layer norm.
        arguments |= {"class_token": False, "global_pool": "avg" if model.pool == "gap" else "map", "fc_norm": False}
    name = _TIMM_HYBRIDS.get(spec.name, "")
    if vit and theirs:
        patch_size = int(vit[2])
        is_known = patch_size in _TIMM_PATCHES[theirs]
        name = f"vit_{theirs}_patch{patch_size if is_known else _TIMM_PATCHES[theirs][0]}_224"
        arguments |= {} if is_known else {"patch_size": patch_size}
    dims = {"num_layers": "depth", "hidden_dim": "embed_dim", "num_heads": "num_heads"}
    arguments |= {theirs: spec.overrides[ours] for ours, theirs in dims.items() if ours in spec.overrides}
    if "mlp_dim" in spec.overrides:
        arguments["mlp_ratio"] = model.mlp_dim / model.hidden_dim
    return name, arguments


def describe_for_timm(
    spec: ModelSpec, preprocessing: Preprocessing, names: tuple[str, ...] | None, probabilities: str | None = None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Makes the `config.json` of a folder for timm, by name, and notes about what it cannot express.

    Raises:
      UserError: timm has no such model or preprocessing.
    """
    name, arguments = timm_name(spec)
    fields, notes = foreign_preprocessing.write_timm(preprocessing)
    if probabilities == "sigmoid":
        notes.append("timm has no field for the loss: take sigmoids of these logits, not a softmax")
    config = {
        "architecture": name,
        "num_classes": spec.num_classes,
        "model_args": arguments,
        "pretrained_cfg": {**fields, **({"label_names": list(names)} if names else {})},
    }
    return {"config.json": config}, notes
