"""Saves weights in this project's format or in those of other libraries."""

import logging
import pathlib
import re
from typing import Any

from vit_jax.errors import UserError, unknown_name
from vit_jax.weights.arrays import write_arrays
from vit_jax.weights.formats import FORMATS
from vit_jax.weights.huggingface import MODEL_FILE, describe_for_huggingface, describe_for_timm, timm_name
from vit_jax.weights.identify import ModelSpec
from vit_jax.weights.mapping import Format
from vit_jax.weights.model_weights import Weights

logger = logging.getLogger(__name__)

# Position embeddings other than "learned_1d" that a format has.
_POSITION_EMBEDDINGS = {"vit": ("learned_2d", "relative", "sincos_2d", "none"), "big_vision": ("sincos_2d",)}


def save(weights: Weights, path: str | pathlib.Path, *, to: str | None = None) -> pathlib.Path:
    """Saves weights, completely or not at all.

    Args:
      weights: from `load` or `from_params`.
      path: a .npz file; for timm a .safetensors file or a folder; for Hugging Face a folder.
      to: "vit", "bit" or "axial" (the released .npz layout of these models), "big_vision", "timm" or "huggingface";
        None: the released layout.

    Returns:
      The file with the arrays.

    Raises:
      UserError: the format cannot hold the model or its preprocessing, or the disk is full; nothing is written. Other
        things that the format cannot express are logged as warnings.
    """
    path = pathlib.Path(path)
    layout = _layout_for(weights.spec, to)
    model = weights.spec.create()
    is_timm = layout.name in ("timm", "timm_bit")
    is_folder = layout.name == "huggingface" or (is_timm and path.suffix != ".safetensors")
    _check_model(weights.spec, model, layout)
    if is_timm and is_folder:
        timm_name(weights.spec)  # raises if timm has none
    arrays = layout.write(weights.arrays)

    if is_folder:
        if path.suffix in (".npz", ".safetensors"):
            raise UserError(f"{layout.description} is a folder; name a folder instead of {path.name}.")
        describe = describe_for_timm if is_timm else describe_for_huggingface
        described, notes = describe(weights.spec, weights.preprocessing, weights.class_names, weights.probabilities)
        file = path / MODEL_FILE
        write_arrays(file, arrays, weights.describe(), described)
    else:
        wanted = ".safetensors" if is_timm else ".npz"
        if path.suffix != wanted:
            raise UserError(f"{layout.description} is a {wanted} file; name it so instead of {path.name!r}.")
        file, notes = path, _notes_of_file(layout, model, path)
        write_arrays(file, arrays, weights.describe())
    for note in notes:
        logger.warning("note: %s", note)
    return file


def _layout_for(spec: ModelSpec, to: str | None) -> Format:
    is_bit = re.fullmatch(r"R\d+x\d+", spec.name) is not None
    is_axial = spec.name.startswith("Axial")
    own = "bit" if is_bit else "axial" if is_axial else "vit"
    if to in (None, own):
        return FORMATS[own]
    if to not in ("big_vision", "timm", "huggingface"):
        raise unknown_name("format to write", str(to), [own, "big_vision", "timm", "huggingface"])
    if is_axial or (is_bit and to == "huggingface"):
        raise UserError(f"{to} has no model like {spec.name}. Save it --to={own}.")
    return FORMATS[f"{to}_bit" if is_bit else to]


def _check_model(spec: ModelSpec, model: Any, layout: Format) -> None:
    """Raises `UserError` unless the format has such a model."""
    is_vit = re.fullmatch(r"ViT-\w+/\d+", spec.name) is not None
    if layout.name in ("huggingface", "big_vision") and not is_vit:
        raise UserError(f"{layout.description} has no hybrids; save {spec.name} --to=vit or --to=timm.")
    if getattr(model, "pre_logits", False) and (
        layout.name == "timm" or (layout.name == "huggingface" and spec.num_classes)
    ):
        drop = "head" if layout.name == "huggingface" else "pre_logits,head" if spec.num_classes else "pre_logits"
        raise UserError(f"{layout.description} has no place for this pre_logits layer. Leave out --drop={drop}.")
    if layout.name == "huggingface" and model.pool != "cls":
        raise UserError(f"Hugging Face's ViT has a class token; save {spec} --to=vit or --to=timm.")
    if layout.name != "vit" and getattr(model, "position_embedding_at", "stem") != "stem":
        raise UserError(f"{layout.description} has position embeddings at the stem alone; save {spec} --to=vit.")
    kind = getattr(model, "position_embedding", "learned_1d")
    if kind != "learned_1d" and kind not in _POSITION_EMBEDDINGS.get(layout.name, ()):
        raise UserError(f"{layout.description} has no such position embeddings; save {spec} --to=vit.")
    for attribute, value in layout.attributes.items():
        if (given := getattr(model, attribute)) != value:
            raise UserError(
                f"a {layout.description} is of a model with {attribute}={value!r}; this one has {given!r} and would "
                "compute something else there. Save it without --to."
            )


def _notes_of_file(layout: Format, model: Any, path: pathlib.Path) -> list[str]:
    """Notes about what other libraries cannot learn from a single file."""
    if layout.name in ("timm", "timm_bit"):
        return ["timm reads neither preprocessing nor class names of a single file; name a folder to write them too"]
    if layout.name in ("big_vision", "big_vision_bit"):
        return [f"big_vision has no place for preprocessing and class names; {path.name}.json has them, for vit_jax"]
    if getattr(model, "root_padding", "zeros") != "zeros":
        return [
            f"{path.name}.json says that the root is padded with the lowest number; released code of BiT, which does "
            "not read it, pads with zeros"
        ]
    return []
