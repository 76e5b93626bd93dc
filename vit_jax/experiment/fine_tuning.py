"""Derives the model, dropout rate and resolution of fine-tuning from its initial weights.

Downloads nothing, and reads arrays only if nothing else identifies the model.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from vit_jax.config import CHECKS, flatten
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, parse_path
from vit_jax.json_files import read_optional
from vit_jax.models import create_model
from vit_jax.weights import get_checkpoint, list_checkpoints
from vit_jax.weights import load as load_weights
from vit_jax.weights.download import cached_path

PAGE_SIZES = (384, 480, 128)  # defaults of configs/transfer.py and configs/vtab.py, in pixels
VIT_DROPOUT = 0.1  # README of google-research/vision_transformer, 2021-05-24: "as in the ViT paper"

# Dropout at fine-tuning by the family of a released checkpoint, with its source. The paper gives rates for pre-training
# on ImageNet and ImageNet-21k (table 3), but none for fine-tuning.
_DROPOUT = {
    "vit": (VIT_DROPOUT, "as the released README says of the ViT paper's checkpoints; AugReg's would have 0"),
    "augreg": (0.0, "as AugReg's released config says; the ViT paper's checkpoints would have 0.1"),
    "sam": (0.0, "pre-trained without dropout"),
    "gsam": (0.0, "pre-trained without dropout"),
    "plain": (0.0, "pre-trained without dropout"),
    "bit": (0.0, "BiT's ResNets have no dropout"),
}


def dropout_of(weights: str | None) -> tuple[float, str]:
    """The default dropout rate of fine-tuning with some weights (see `config.weights`), and its source in words.

    0.1 for the ViT paper's released checkpoints, a run's own for its workdir, 0 for all others.
    """
    if weights is None:
        return 0.0, "trained from scratch; table 3 has 0.1 on ImageNet"
    if name := _released_name(weights):
        return _DROPOUT[name.split("_")[0]]
    if (run := _workdir(weights)) is not None:
        rate: Any = flatten(read_optional(run / "config.json")).get("model.dropout_rate")
        known = CHECKS["model.dropout_rate"].accepts(rate)
        return float(rate) if known else 0.0, "as the run that made these weights, by its config.json"
    return 0.0, f"nothing says how these weights were trained; the ViT paper's checkpoints would have {VIT_DROPOUT:g}"


def choose_dropout(argument: str, weights: str | None) -> float | None:
    """The value of `model.dropout_rate` for a config's argument `dropout`: a rate, or "" for that of `dropout_of`.

    Returns None for no dropout, which models without dropout accept too.

    Raises:
      UserError: the argument is not a rate.
    """
    if not argument:
        return dropout_of(weights)[0] or None
    try:
        rate = float(argument)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < 1:
        raise UserError(
            f"config argument 'dropout' takes a rate of at least 0 and less than 1, such as 0.1, got {argument!r}."
        )
    return rate or None


def model_of(weights: str | None, name: str = "") -> dict[str, Any]:
    """The model of weights (see `config.weights`) as arguments of `create_model`; {} if it is not known yet."""
    if name or weights is None:
        return {"name": name} if name else {}
    if released := _released_name(weights):
        checkpoint = get_checkpoint(released)
        return {"name": checkpoint.model, **checkpoint.model_overrides}
    if (run := _workdir(weights)) is not None:
        fields = read_optional(run / "model.json") or read_optional(run / "config.json").get("model", {})
        known = {key: value for key, value in fields.items() if value is not None and key != "num_classes"}
        return known if "name" in known else {}
    path = cached_path(weights) if "://" in weights else pathlib.Path(weights).expanduser()
    if not path.exists():
        return {}
    try:
        return dict(_fields_of_file(weights, path.stat().st_mtime_ns))
    except UserError:
        return {}  # building the run reports the error


def fitting_size(size: int, model: Mapping[str, Any]) -> int:
    """The largest image size up to `size` that the patches tile, such as 378 for 384 and patches of 14 pixels.

    `model` is from `model_of`; if it is empty, any size fits.
    """
    if not model:
        return size
    attributes = {key: value for key, value in model.items() if key in ("patch_size", "resnet")}
    made = create_model(model["name"], num_classes=0, **attributes)
    if not hasattr(made, "grid"):
        return size  # a ResNet takes any size

    def fits(side: int) -> bool:
        try:
            made.grid(side, side)
        except UserError:
            return False
        return True

    return next((side for side in range(size, 0, -1) if fits(side)), size)


def _released_name(weights: str) -> str | None:
    """The released checkpoint of a name or an address; None for other weights."""
    if weights in list_checkpoints():
        return weights
    if "://" not in weights:
        return None
    place = cached_path(weights)  # the same for gs:// and https://
    return next((name for name in list_checkpoints() if cached_path(get_checkpoint(name).url) == place), None)


def _workdir(weights: str) -> AnyPath | None:
    """The path if it is a run's workdir, else None."""
    if "://" in weights and (not weights.startswith("gs://") or weights.endswith((".npz", ".safetensors"))):
        return None
    path = parse_path(weights)
    try:
        is_run = (path / "config.json").exists() and (path / "starts.jsonl").exists()
    except Exception as error:  # gcsfs, aiohttp and google.auth have no common error
        raise UserError(f"cannot read {weights}: {type(error).__name__}: {error}") from error
    return path if is_run else None


@functools.lru_cache(maxsize=8)
def _fields_of_file(weights: str, _changed: int) -> tuple[tuple[str, Any], ...]:
    spec = load_weights(weights).spec
    return ("name", spec.name), *spec.overrides.items()
