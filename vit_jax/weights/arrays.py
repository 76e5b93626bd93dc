"""Writes arrays and what is beside them to files, whole or not at all."""

import contextlib
import glob
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from vit_jax.errors import UserError
from vit_jax.files import delete_left_over
from vit_jax.json_files import read_object
from vit_jax.run.workdir import AnyPath
from vit_jax.weights.mapping import Arrays
from vit_jax.weights.reading import METADATA_KEY, sidecar_of


def read_json(path: AnyPath) -> dict[str, Any]:
    """Reads a JSON object; empty if there is no such file."""
    return read_object(path, allow_nan=True) if path.exists() else {}


def write_arrays(path: pathlib.Path, arrays: Arrays, description: dict[str, Any]) -> None:
    """Writes all arrays, so that the file is there as a whole or not at all.

    Args:
      path: of the file; its suffix, .npz or .safetensors, says the kind.
      arrays: by name.
      description: JSON-compatible; in the header of a .safetensors file, beside a .npz file as `<name>.json`.

    Raises:
      UserError: another suffix, or no space.
    """
    if path.suffix == ".safetensors":
        write_folder(path, arrays, description, {})
    elif path.suffix == ".npz":
        arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        check_space(path.parent, sum(array.nbytes for array in arrays.values()))
        # The description first, but under its name last: a disk that is full leaves both as they were.
        with replacing(sidecar_of(path)) as described, replacing(path) as temporary:
            _dump_json(described, description)
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
    else:
        raise UserError(f"{path}: name a .npz or .safetensors file.")


def write_folder(
    path: pathlib.Path, arrays: Arrays, description: dict[str, Any], others: dict[str, dict[str, Any]]
) -> None:
    """Writes a .safetensors file and the JSON files beside it: all of them, or none.

    Args:
      path: of the .safetensors file.
      arrays: by name.
      description: JSON-compatible; goes into the header.
      others: contents of JSON files, by name.

    Raises:
      UserError: no space, or the folder cannot be written to.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    is_new = not path.parent.exists()
    try:
        check_space(path.parent, sum(array.nbytes for array in arrays.values()))
        for each in (path, *(path.with_name(name) for name in others)):
            if each.is_dir():
                raise UserError(f"cannot write {each}: Is a directory.")
        # All are written before the first gets its name; the arrays get theirs last.
        with contextlib.ExitStack() as stack:
            # "format" is what other libraries look for.
            metadata = {"format": "pt", METADATA_KEY: json.dumps(description)}
            safetensors.numpy.save_file(arrays, stack.enter_context(replacing(path)), metadata=metadata)
            for name, content in others.items():
                _dump_json(stack.enter_context(replacing(path.with_name(name))), content)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        raise


def _dump_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")


def check_space(folder: pathlib.Path, needed: int) -> None:
    """Raises `UserError` unless the disk has so many bytes to spare."""
    _make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{needed / 1e9:.2f} GB are to be written to {folder}, where {free / 1e9:.2f} GB are free.")


def _make_folder(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}.") from error


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary file that takes the place of `path` when all is written."""
    _make_folder(path.parent)
    delete_left_over(path.parent, f".{glob.escape(path.name)}.*.tmp")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        with contextlib.suppress(OSError):  # it may be what could not be written
            temporary.unlink(missing_ok=True)
