"""Folders as Hugging Face and timm publish them: a .safetensors file, and JSON files that say what it is.

Hugging Face's ViT has `config.json` and `preprocessor_config.json`; timm has `config.json` with its own fields.
"""

import dataclasses
import pathlib
import re
from typing import Any

from vit_jax.errors import UserError
from vit_jax.models.vit import LAYER_NORM_EPSILON, VARIANTS
from vit_jax.weights.files import read_json, write_json
from vit_jax.weights.identify import ModelSpec
from vit_jax.weights.preprocessing import Preprocessing

MODEL_FILE = "model.safetensors"
_PILLOW_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_TIMM_SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
_TIMM_PATCHES = {"tiny": (16,), "small": (16, 8, 32), "base": (16, 8, 32), "large": (16, 14, 32), "huge": (14,)}
_TIMM_VIT = re.compile(r"(?:vit|deit)_(tiny|small|base|large|huge)_(?:patch\d+|r\d*_s\d+(?:_p8)?)_\d+")
_TIMM_BIT = re.compile(r"resnetv2_\d+x\d+_bit")
_TIMM_BIT_NAMES = ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4")
# Hugging Face's names of losses; "regression" is none of ours.
_PROBLEM_TYPES = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}
_TIMM_GELUS = {"gelu": "exact", "gelu_tanh": "tanh"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What stands beside the arrays.

    Attributes:
      num_heads: of the attention.
      overrides: attributes of the model that arrays do not tell.
      image_size: height and width, in pixels.
      preprocessing: from images to the model's input.
      class_names: of the logits.
      probabilities: what makes probabilities of the logits, "softmax" or "sigmoid"; None where nothing says.
      notes: what a user should know.
    """

    num_heads: int | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_size: tuple[int, int] | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] | None = None
    probabilities: str | None = None
    notes: tuple[str, ...] = ()


def model_file(folder: pathlib.Path) -> pathlib.Path:
    """The file with the arrays.

    Raises:
      UserError: there is none.
    """
    if (folder / MODEL_FILE).is_file():
        return folder / MODEL_FILE
    found = sorted(path.name for path in folder.iterdir())
    hint = ""
    if any(name.endswith(".index.json") for name in found):
        hint = " Weights in several parts are not read; save them as one file."
    elif any(name.endswith((".bin", ".pth")) for name in found):
        hint = " A .bin or .pth file is a pickle, which vit_jax does not read; publishers offer .safetensors beside it."
    raise UserError(f"{folder} has no {MODEL_FILE}; there are {', '.join(found[:8]) or 'no files'}.{hint}")


def _pair(size: Any) -> tuple[int, int] | None:
    """Height and width from the ways they are written."""
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))
    elif isinstance(size, int):
        size = size, size
    return (int(size[0]), int(size[1])) if size and all(size) else None


def read_facts(folder: pathlib.Path) -> Facts:
    """Reads the JSON files of a folder."""
    config = read_json(folder / "config.json")
    if "architecture" in config or "pretrained_cfg" in config:
        return _read_timm(config)
    return _read_huggingface(config, read_json(folder / "preprocessor_config.json"))


def _read_huggingface(config: dict[str, Any], preprocessor: dict[str, Any]) -> Facts:
    kind = config.get("model_type")
    if kind not in (None, "vit"):
        raise UserError(f"a Hugging Face model of type {kind!r}; vit_jax reads 'vit'.")
    overrides: dict[str, Any] = {}
    gelus = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
    activation = config.get("hidden_act", "gelu")
    if activation not in gelus:
        raise UserError(f"the activation {activation!r} is none of vit_jax's, which are {', '.join(gelus)}.")
    if config and gelus[activation] != "tanh":
        overrides["gelu"] = gelus[activation]
    epsilon = config.get("layer_norm_eps", LAYER_NORM_EPSILON)
    if epsilon > 10 * LAYER_NORM_EPSILON:
        raise UserError(f"layer norms with epsilon {epsilon}; vit_jax's have {LAYER_NORM_EPSILON}.")
    if (pooler := config.get("pooler_act", "tanh")) != "tanh":
        raise UserError(f"a pooler with activation {pooler!r}; vit_jax's pre_logits layer has tanh.")
    names = config.get("id2label")
    image_size = _pair(config.get("image_size"))
    preprocessing = None
    if preprocessor:
        if preprocessor.get("do_normalize", True):
            normal: dict[str, Any] = {
                "mean": tuple(preprocessor.get("image_mean", (0.5, 0.5, 0.5))),
                "std": tuple(preprocessor.get("image_std", (0.5, 0.5, 0.5))),
            }
        else:
            normal = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        resized, cropped = _pair(preprocessor.get("size")), _pair(preprocessor.get("crop_size"))
        crops = bool(cropped and resized and preprocessor.get("do_center_crop"))
        preprocessing = Preprocessing(
            image_size=(cropped if crops else resized) or image_size or (224, 224),
            resize="crop" if crops else "square",
            crop_fraction=min(cropped[0] / resized[0], 1.0) if crops and cropped and resized else 1.0,
            interpolation=_PILLOW_RESAMPLING.get(preprocessor.get("resample", 2), "bilinear"),
            antialias=True,
            **normal,
        )
    return Facts(
        num_heads=config.get("num_attention_heads"),
        overrides=overrides,
        image_size=image_size,
        preprocessing=preprocessing,
        class_names=_names(names),
        probabilities=_PROBLEM_TYPES.get(str(config.get("problem_type"))),
    )


def _names(names: dict[str, str] | None) -> tuple[str, ...] | None:
    """Names in the order of the labels; None where they only repeat the number ("LABEL_0")."""
    if not names or all(re.fullmatch(r"LABEL_\d+", name) for name in names.values()):
        return None
    try:
        return tuple(names[str(label)] for label in range(len(names)))
    except KeyError as error:
        raise UserError(f"id2label of config.json does not name label {error}.") from error


def write_huggingface(
    folder: pathlib.Path, spec: ModelSpec, preprocessing: Preprocessing, names: Any, probabilities: str | None = None
) -> None:
    """Writes `config.json` and `preprocessor_config.json`, as transformers reads them."""
    model = spec.create()
    image_size = spec.image_size or preprocessing.image_size
    config: dict[str, Any] = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if spec.num_classes else "ViTModel"],
        "hidden_size": model.hidden_dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "image_size": image_size[0] if image_size[0] == image_size[1] else list(image_size),
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
        names = names or [f"LABEL_{label}" for label in range(spec.num_classes)]
        config["id2label"] = {str(label): name for label, name in enumerate(names)}
        config["label2id"] = {name: label for label, name in enumerate(names)}
        if probabilities:
            problem_types = {ours: theirs for theirs, ours in _PROBLEM_TYPES.items()}
            config["problem_type"] = problem_types[probabilities]
    write_json(folder / "config.json", config)
    resampling = {name: number for number, name in _PILLOW_RESAMPLING.items()}
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": preprocessing.image_size[0], "width": preprocessing.image_size[1]},
            "resample": resampling[preprocessing.interpolation],
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(preprocessing.mean),
            "image_std": list(preprocessing.std),
        },
    )


def _read_timm(config: dict[str, Any]) -> Facts:
    fields = {**config, **config.get("pretrained_cfg", {})}
    size = fields.get("input_size")
    image_size = (int(size[1]), int(size[2])) if size else None
    architecture = config.get("architecture", "")
    match = _TIMM_VIT.fullmatch(architecture.partition(".")[0])
    if not match and not _TIMM_BIT.fullmatch(architecture.partition(".")[0]):
        # Others differ in what no array shows: the GELU, where the mean is taken, the preceding norm.
        raise UserError(
            f"timm's architecture {architecture!r} is none that vit_jax knows to be the same as its own; it reads "
            "vit_*_patch*, deit_*_patch*, hybrids such as vit_base_r50_s16_224, and resnetv2_*_bit."
        )
    model_args = config.get("model_args") or {}
    # timm's own GELU is exact; files of this project say that theirs is not.
    act_layer = model_args.get("act_layer", "gelu")
    if match and act_layer not in _TIMM_GELUS:
        raise UserError(f"the activation {act_layer!r} is none of vit_jax's, which are {', '.join(_TIMM_GELUS)}.")
    overrides = {"gelu": "exact"} if match and _TIMM_GELUS[act_layer] == "exact" else {}
    if match and model_args.get("global_pool") == "avg" and model_args.get("class_token", True):
        raise UserError(
            "a timm model with a class token whose head sees the mean of the others; vit_jax has none such."
        )
    crop = fields.get("crop_pct") or 1.0
    preprocessing = None
    if image_size and "mean" in fields and "std" in fields:
        preprocessing = Preprocessing(
            image_size=image_size,
            mean=tuple(fields["mean"]),
            std=tuple(fields["std"]),
            resize="square" if fields.get("crop_mode") == "squash" else "crop",
            crop_fraction=crop,
            interpolation=fields.get("interpolation") or "bicubic",
            antialias=True,
        )
    names = fields.get("label_names")
    return Facts(
        num_heads=model_args.get("num_heads", VARIANTS[_TIMM_SIZES[match[1]]].num_heads) if match else None,
        overrides=overrides,
        image_size=image_size,
        preprocessing=preprocessing,
        class_names=tuple(names) if names else None,
    )


def timm_name(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which `timm.create_model` makes the same model.

    Raises:
      UserError: timm has no such model.
    """
    of_architecture = {"stages", "width_factor", "resnet", "patch_size"} & spec.overrides.keys()
    if spec.name.startswith("Axial") or of_architecture:
        raise _no_timm_model(spec)
    if match := re.fullmatch(r"R(\d+)x(\d+)", spec.name):
        if spec.name not in _TIMM_BIT_NAMES:
            raise _no_timm_model(spec)
        return f"resnetv2_{match[1]}x{match[2]}_bit", {}
    sizes = {ours: theirs for theirs, ours in _TIMM_SIZES.items()}
    model = spec.create()
    size = spec.image_size or (224, 224)
    arguments: dict[str, Any] = {"img_size": list(size)} if size != (224, 224) else {}
    if model.gelu == "tanh":
        arguments["act_layer"] = "gelu_tanh"
    if model.pool != "cls":
        # Its mean is otherwise taken before the last layer norm.
        arguments |= {"class_token": False, "global_pool": "avg" if model.pool == "gap" else "map", "fc_norm": False}
    name = None
    if (match := re.fullmatch(r"ViT-(\w+)/(\d+)", spec.name)) and match[1] in sizes:
        theirs, patch_size = sizes[match[1]], int(match[2])
        known = patch_size in _TIMM_PATCHES[theirs]
        name = f"vit_{theirs}_patch{patch_size if known else _TIMM_PATCHES[theirs][0]}_224"
        arguments |= {} if known else {"patch_size": patch_size}
    elif spec.name in _TIMM_HYBRIDS:
        name = _TIMM_HYBRIDS[spec.name]
    if name is None:
        raise _no_timm_model(spec)
    dims = {"num_layers": "depth", "hidden_dim": "embed_dim", "num_heads": "num_heads"}
    arguments |= {theirs: spec.overrides[ours] for ours, theirs in dims.items() if ours in spec.overrides}
    if "mlp_dim" in spec.overrides:
        arguments["mlp_ratio"] = model.mlp_dim / model.hidden_dim
    return name, arguments


def _no_timm_model(spec: ModelSpec) -> UserError:
    return UserError(
        f"timm has no model by a name like {spec}. Save it in this project's layout, without --to; or its state dict "
        "alone, as a .safetensors file, for a model that you build yourself."
    )


_TIMM_HYBRIDS = {
    "R+Ti/16": "vit_tiny_r_s16_p8_224",
    "R26+S/32": "vit_small_r26_s32_224",
    "R50+ViT-L/32": "vit_large_r50_s32_224",
    "R50+L/32": "vit_large_r50_s32_224",
    "R50+ViT-B/16": "vit_base_r50_s16_224",
}


def write_timm(folder: pathlib.Path, spec: ModelSpec, preprocessing: Preprocessing, names: Any) -> None:
    """Writes `config.json`, as timm's hub folders have it."""
    name, arguments = timm_name(spec)
    height, width = preprocessing.image_size
    write_json(
        folder / "config.json",
        {
            "architecture": name,
            "num_classes": spec.num_classes,
            "model_args": arguments,
            "pretrained_cfg": {
                "input_size": [3, height, width],
                "mean": list(preprocessing.mean),
                "std": list(preprocessing.std),
                "interpolation": preprocessing.interpolation,
                "crop_pct": preprocessing.crop_fraction,
                "crop_mode": "squash" if preprocessing.resize == "square" else "center",
                **({"label_names": list(names)} if names else {}),
            },
        },
    )
