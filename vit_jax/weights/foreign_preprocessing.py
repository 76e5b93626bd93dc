"""Converts Hugging Face's and timm's descriptions of preprocessing to ours and back.

Each field is applied exactly, or refused. What the other library cannot express becomes a note, or is refused. Facts
are from transformers 5.24 (image_processing_backends.py) and timm 1.0.31 (data/config.py and
data/transforms_factory.py).
"""

import math
from typing import Any

from vit_jax.errors import UserError
from vit_jax.json_files import Fields
from vit_jax.weights.preprocessing import LARGEST, MAX_SIDE, RESAMPLING, Preprocessing

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Defaults of absent fields, by the beginning of image_processor_type.
_VIT = {"size": 224, "crop": False, "resample": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3, "square": True}
_CLIP = {"size": 224, "crop": True, "resample": 3, "mean": _CLIP_MEAN, "std": _CLIP_STD, "square": False}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": _VIT,
    "DeiT": _VIT | {"size": 256, "crop": True, "resample": 3},
    "Bit": _CLIP,
    "CLIP": _CLIP,
}
_ENDINGS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")

_READ = {"do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
         "image_mean", "image_std", "do_convert_rgb", "default_to_square", "image_processor_type",
         "feature_extractor_type", "processor_class"}  # fmt: skip
# Fields that change no pixel.
_HARMLESS = {"data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "auto_map",
             "_valid_processor_keys", "_name_or_path", "transformers_version"}  # fmt: skip

_TIMM_INTERPOLATIONS = {"box" if name == "area" else name: name for name in RESAMPLING}


def read_huggingface(fields: Fields, image_size: tuple[int, int] | None) -> tuple[Preprocessing, tuple[str, ...]]:
    """Reads a `preprocessor_config.json`.

    Args:
      fields: the fields of the file.
      image_size: height and width from `config.json`, in pixels; for processors that do not resize.

    Returns:
      The preprocessing, and notes about fields that are not read.

    Raises:
      UserError: a field is malformed, or `Preprocessing` cannot compute what it asks for.
    """
    kind = fields.text("image_processor_type", fields.text("feature_extractor_type", "ViTImageProcessor"))
    name = next((kind.removesuffix(ending) for ending in _ENDINGS if kind.endswith(ending)), kind)
    if name not in _PROCESSORS:
        raise _refusal(fields, f"image_processor_type is {kind!r}", f"those of {', '.join(_PROCESSORS)}")
    defaults = _PROCESSORS[name]
    others = {name: value for name, value in fields.values.items() if name not in _READ and value is not None}
    for field, value in others.items():
        if field.startswith("do_") and value is not False:
            raise _refusal(fields, f"{field} is {value!r:.50}", "resizing, cropping and normalising")
    ignored = sorted(others.keys() - _HARMLESS)
    notes = (f"{fields.where}: fields that are not read: {', '.join(ignored)[:200]}",) if ignored else ()
    fields.flag("do_convert_rgb", None)  # images are always RGB here

    mean, std = _mean_and_std(fields, defaults)
    resample = fields.integer("resample", defaults["resample"], at_least=0, at_most=5)
    crops = fields.flag("do_center_crop", defaults["crop"])
    if not fields.flag("do_resize", True):
        if crops:
            raise _refusal(fields, "do_center_crop is true and do_resize false", "a crop after resizing")
        size = image_size or _size(fields, "size", defaults["size"], square=True)[1]
        return Preprocessing(size, mean, std, "none", antialias=True), notes
    square = fields.flag("default_to_square", defaults["square"])
    keeps_ratio, resized = _size(fields, "size", defaults["size"], square=square)
    cropped = _size(fields, "crop_size", 224, square=True)[1] if crops else resized
    if keeps_ratio and not crops:
        raise _refusal(fields, "size has a shortest_edge alone", "height and width, or a do_center_crop")
    if cropped[0] > resized[0] or cropped[1] > resized[1]:
        raise _refusal(fields, "crop_size is larger than size, which pads images", "a smaller crop")
    fractions = {_fraction(part, whole) for part, whole in zip(cropped, resized, strict=True)}
    if len(fractions) > 1:
        raise _refusal(fields, "crop_size has another shape than size", "the same shape")
    preprocessing = Preprocessing(
        image_size=cropped,
        mean=mean,
        std=std,
        resize="crop" if keeps_ratio else "square",
        crop_fraction=fractions.pop(),
        interpolation=next(name for name, number in RESAMPLING.items() if number == resample),
        antialias=True,
    )
    return preprocessing, notes


def _refusal(fields: Fields, what: str, instead: str) -> UserError:
    return UserError(
        f"{fields.where}: {what}, which vit_jax cannot compute; it knows {instead}. Correct the file, or load the "
        ".safetensors file alone and prepare images yourself."
    )


def _mean_and_std(fields: Fields, defaults: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Converts mean and std to values between 0 and 1; theirs apply to values times `rescale_factor`."""
    factor = fields.number("rescale_factor", 1 / 255, above=0, at_most=LARGEST)
    scale = 255 * factor if fields.flag("do_rescale", True) else 255.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    if fields.flag("do_normalize", True):
        mean, std = _channels(fields, "image_mean", defaults["mean"]), _channels(fields, "image_std", defaults["std"])
    if min(std) <= 0:
        raise fields.error("image_std", "numbers above 0")
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _channels(fields: Fields, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """A number for each channel; one number stands for all."""
    if isinstance(fields.values.get(name), list):
        return fields.numbers(name, length=3, at_least=-LARGEST, at_most=LARGEST)
    value = fields.number(name, None, at_least=-LARGEST, at_most=LARGEST)
    return default if value is None else (value, value, value)


def _size(fields: Fields, name: str, default: int, *, square: bool) -> tuple[bool, tuple[int, int]]:
    """Whether a size is that of the shorter side (so is one number unless `square`), and height and width."""
    value = fields.values.get(name)
    if isinstance(value, list):
        height, width = fields.integers(name, length=2, at_least=1, at_most=MAX_SIDE)
        return False, (height, width)
    if not isinstance(value, dict):
        side = fields.integer(name, default, at_least=1, at_most=MAX_SIDE)
        return not square, (side, side)
    inside = fields.fields(name)
    keys = {key for key, value in inside.values.items() if value is not None}
    if keys == {"height", "width"}:
        height, width = (inside.integer(key, at_least=1, at_most=MAX_SIDE) for key in ("height", "width"))
        return False, (height, width)
    if keys == {"shortest_edge"} and name == "size":
        side = inside.integer("shortest_edge", at_least=1, at_most=MAX_SIDE)
        return True, (side, side)
    raise fields.error(name, "height and width, or shortest_edge" if name == "size" else "height and width")


def _fraction(part: int, whole: int) -> float:
    """The quotient, adjusted so that `floor(part / quotient)` is exactly `whole`."""
    fraction = part / whole
    return fraction if math.floor(part / fraction) == whole else math.nextafter(fraction, 0)


def write_huggingface(preprocessing: Preprocessing) -> tuple[dict[str, Any], list[str]]:
    """Makes the content of `preprocessor_config.json`, and notes about what it cannot express.

    Raises:
      UserError: it cannot express how images are cropped.
    """
    height, width = preprocessing.image_size
    fields: dict[str, Any] = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": preprocessing.resize != "none",
        "size": {"height": height, "width": width},
        "resample": int(RESAMPLING[preprocessing.interpolation]),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    keeps_ratio = preprocessing.resize == "crop"
    if keeps_ratio or (preprocessing.resize == "square" and preprocessing.crop_fraction != 1):
        # ViTImageProcessor has no crop; these two have one, and are otherwise the same.
        whole = preprocessing.size_before_crop
        if keeps_ratio and height != width:
            raise UserError(
                f"Hugging Face has no central crop of {height}x{width}, which is not square. Save the weights in this "
                "project's layout, without --to."
            )
        fields |= {
            "image_processor_type": "BitImageProcessor" if keeps_ratio else "DeiTImageProcessor",
            "size": {"shortest_edge": whole[0]} if keeps_ratio else {"height": whole[0], "width": whole[1]},
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }
    notes = _antialias_notes(preprocessing, "transformers")
    if preprocessing.exif_orientation is False:
        notes.append(
            "transformers.image_utils.load_image turns images as EXIF says; these weights were trained without that"
        )
    if preprocessing.centre_to_even and "crop_size" in fields:
        notes.append("transformers cuts the centre out one pixel nearer to the upper left of some images")
    return fields, notes


def _antialias_notes(preprocessing: Preprocessing, library: str) -> list[str]:
    if preprocessing.antialias or preprocessing.resize == "none":
        return []
    return [
        f"{library} averages where it shrinks images; these weights were evaluated with {preprocessing.interpolation} "
        "without antialiasing, so results differ a little"
    ]


def read_timm(fields: Fields) -> Preprocessing:
    """Reads the fields of a `pretrained_cfg`; absent ones have timm's defaults.

    Raises:
      UserError: as in `read_huggingface`.
    """
    channels, height, width = fields.integers("input_size", (3, 224, 224), length=3, at_least=1, at_most=MAX_SIDE)
    if channels != 3:
        raise fields.error("input_size", "3 channels first")
    mode = fields.text("crop_mode", "center") or "center"
    if mode not in ("center", "squash"):
        raise _refusal(fields, f"crop_mode is {mode!r}", "'center' and 'squash'")
    if fields.integer("crop_border_pixels", 0):
        raise _refusal(fields, "crop_border_pixels is set", "resizing, cropping and normalising")
    interpolation = fields.text("interpolation", "bicubic") or "bicubic"
    if interpolation not in _TIMM_INTERPOLATIONS:
        raise _refusal(fields, f"interpolation is {interpolation!r}", ", ".join(_TIMM_INTERPOLATIONS))
    return Preprocessing(
        image_size=(height, width),
        mean=fields.numbers("mean", _IMAGENET_MEAN, length=3, at_least=-LARGEST, at_most=LARGEST),
        std=fields.numbers("std", _IMAGENET_STD, length=3, above=0, at_most=LARGEST),
        resize="square" if mode == "squash" else "crop",
        crop_fraction=fields.number("crop_pct", 0.875, above=0, at_most=1),
        interpolation=_TIMM_INTERPOLATIONS[interpolation],
        antialias=True,
        centre_to_even=True,
    )


def write_timm(preprocessing: Preprocessing) -> tuple[dict[str, Any], list[str]]:
    """Makes the fields of `pretrained_cfg`, and notes about what they cannot express.

    Raises:
      UserError: images are not resized, which timm always does.
    """
    if preprocessing.resize == "none":
        raise UserError(
            "timm resizes all images, which the preprocessing of these weights does not. Save them --to=huggingface, "
            "or in this project's layout, without --to."
        )
    theirs = {ours: name for name, ours in _TIMM_INTERPOLATIONS.items()}
    fields = {
        "input_size": [3, *preprocessing.image_size],
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "interpolation": theirs[preprocessing.interpolation],
        "crop_pct": preprocessing.crop_fraction,
        "crop_mode": "squash" if preprocessing.resize == "square" else "center",
    }
    notes = _antialias_notes(preprocessing, "timm")
    if preprocessing.exif_orientation:
        notes.append("timm does not turn images as EXIF says; these weights were evaluated with turned ones")
    return fields, notes
