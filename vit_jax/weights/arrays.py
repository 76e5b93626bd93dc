"""Writes arrays and their descriptions to files, completely or not at all."""

import contextlib
import json
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from vit_jax.errors import UserError
from vit_jax.files import AnyPath, check_space, replacing
from vit_jax.json_files import read_object
from vit_jax.weights.mapping import Arrays
from vit_jax.weights.reading import METADATA_KEY, sidecar_of


def read_json(path: AnyPath) -> dict[str, Any]:
    """Reads a JSON object; empty if the file does not exist."""
    return read_object(path, allow_nan=True) if path.exists() else {}


def write_arrays(path: pathlib.Path, arrays: Arrays, description: dict[str, Any]) -> None:
    """Writes a file of arrays.

    Args:
      path: the file; its suffix, .npz or .safetensors, selects the kind.
      arrays: arrays by name.
      description: JSON-compatible; written into the header of a .safetensors file, or beside a .npz file as
        `<name>.npz.json`.

    Raises:
      UserError: another suffix, too little space, or the file cannot be written.
    """
    if path.suffix == ".safetensors":
        write_folder(path, arrays, description, {})
    elif path.suffix == ".npz":
        arrays = _prepare(path, arrays)
        # The description is written first but renamed last, so that a full disk changes neither file.
        with replacing(sidecar_of(path)) as sidecar, replacing(path) as temporary:
            _write_json(sidecar, description)
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
    else:
        raise UserError(f"{path}: name a .npz or .safetensors file.")


def write_folder(
    path: pathlib.Path, arrays: Arrays, description: dict[str, Any], others: dict[str, dict[str, Any]]
) -> None:
    """Writes a .safetensors file and JSON files beside it: all of them, or none.

    Args:
      path: the .safetensors file.
      arrays: arrays by name.
      description: JSON-compatible; written into the header.
      others: contents of the JSON files, by name.

    Raises:
      UserError: too little space, or a file cannot be written.
    """
    is_new = not path.parent.exists()
    try:
        arrays = _prepare(path, arrays)
        for each in (path, *(path.with_name(name) for name in others)):
            if each.is_dir():
                raise UserError(f"cannot write {each}: Is a directory.")
        # All files are written before the first is renamed; the arrays are renamed last.
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(replacing(path))
            metadata = {"format": "pt", METADATA_KEY: json.dumps(description)}  # other libraries look for "format"
            try:
                safetensors.numpy.save_file(arrays, temporary, metadata=metadata)
            except safetensors.SafetensorError as error:
                raise OSError(str(error)) from error
            for name, content in others.items():
                _write_json(stack.enter_context(replacing(path.with_name(name))), content)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        raise


def _prepare(path: pathlib.Path, arrays: Arrays) -> Arrays:
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    check_space(path.parent, sum(array.nbytes for array in arrays.values()), "Free some, or choose another folder.")
    return arrays


def _write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
