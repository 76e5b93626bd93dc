"""Arrays from and to files: NumPy's .npz and .safetensors. Neither can run code; pickles are refused."""

import contextlib
import glob
import io
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from vit_jax.errors import UserError
from vit_jax.files import delete_left_over
from vit_jax.json_files import parse_object, read_object
from vit_jax.weights.mapping import Arrays
from vit_jax.workdir import AnyPath

_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle")
_METADATA_KEY = "vit_jax"  # in the header of a .safetensors file


def read_arrays(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    """Reads all arrays of a file, and what this project wrote beside them.

    Args:
      path: of a .npz or .safetensors file; told apart by what is in it.

    Returns:
      The arrays by name, and the description that `write_arrays` was given, empty for files of others.

    Raises:
      UserError: not such a file, or not a whole one.
    """
    with path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"PK"):
        return _read_npz(path), _read_sidecar(path)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if path.suffix in _PICKLES or start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise _pickle_error(path)
    what = "empty" if not start else "neither .npz nor .safetensors"
    raise UserError(f"{path} is {what}, or was cut off. Fetch it again.")


def _pickle_error(path: pathlib.Path) -> UserError:
    return UserError(
        f"{path} is a pickle, which may run any code when it is read, so vit_jax does not. Where you trust it, turn it "
        'into a .safetensors file first: python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{path.name}', weights_only=True), '{path.stem}.safetensors')\""
    )


def _read_npz(path: pathlib.Path) -> Arrays:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
        if strangers := [name for name in members if not name.endswith(".npy")]:
            if any(name.endswith("data.pkl") for name in strangers):
                raise _pickle_error(path)
            raise UserError(
                f"{path} is a zip file, but no .npz: it contains {', '.join(sorted(strangers)[:3])}. "
                "Weights are .npz or .safetensors files."
            )
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy"): _read_member(archive, name) for name in members}
    except (UserError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and NumPy have no common error for damaged files
        if "Object arrays" in str(error):
            raise UserError(
                f"{path} contains Python objects (a pickle), which may run any code when they are read, so vit_jax "
                "does not. Save it again with plain arrays only."
            ) from error
        raise UserError(f"{path} is a damaged or truncated .npz file ({error}). Fetch it again.") from error


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array. All bytes of it are read, whatever its header says, because only then its checksum is compared."""
    return _as_bfloat16(np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False))


def _as_bfloat16(array: np.ndarray) -> np.ndarray:
    """NumPy forgets the name of bfloat16 when it saves, and knows two bytes without meaning when it loads."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def _read_safetensors(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        arrays = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is a damaged or truncated .safetensors file ({error}). Fetch it again.") from error
    return arrays, _parse(metadata.get(_METADATA_KEY, "{}"), path)


def _sidecar(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".json")


def _read_sidecar(path: pathlib.Path) -> dict[str, Any]:
    sidecar = _sidecar(path)
    if not sidecar.exists():
        return {}
    try:
        return read_object(sidecar)
    except UserError as error:
        raise UserError(f"the description {error} Delete or mend it.") from error


def _parse(text: str | bytes, path: AnyPath) -> dict[str, Any]:
    try:
        return parse_object(text, f"the description in {path}")
    except UserError as error:
        raise UserError(f"{error} Delete or mend it.") from error


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
        with replacing(_sidecar(path)) as described, replacing(path) as temporary:
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
            metadata = {"format": "pt", _METADATA_KEY: json.dumps(description)}
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
