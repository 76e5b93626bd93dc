"""Reads and writes arrays in .npz and .safetensors files. Neither can run code; pickles are refused.

`open_arrays` reads headers only: names, shapes and dtypes. `ArrayFile.read` reads arrays after they are known to fit a
model, each into as many bytes as its header declares. So the model bounds the memory, whatever a file claims or
inflates to.
"""

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import shlex
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from vit_jax.errors import UserError
from vit_jax.files import check_space, replacing
from vit_jax.json_files import MAX_BYTES, parse_object, read_object
from vit_jax.weights.mapping import Arrays, list_names

DTYPES = ("float16", "bfloat16", "float32", "float64")
_METADATA_KEY = "vit_jax"  # in the header of a .safetensors file
_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
_PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_MAX_NPY_HEADER = 10_000  # bytes
_MAX_INFLATION = 1032  # the most that deflate compresses


class DamagedFileError(UserError):
    """A file is damaged or incomplete; downloading it again may help."""


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """A file of arrays whose headers were read.

    Attributes:
      path: the file.
      kind: ".npz" or ".safetensors", whatever the path's suffix.
      shapes: shapes of the arrays, by name.
      dtypes: names of the arrays' dtypes, by name.
      description: this project's description of the arrays; empty for other files.
      described_in: where the description is.
    """

    path: pathlib.Path
    kind: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    description: dict[str, Any]
    described_in: str

    def outline(self) -> Arrays:
        """Zeros of the arrays' shapes, which take no memory."""
        zero = np.float32(0)
        try:
            return {name: np.broadcast_to(zero, shape) for name, shape in self.shapes.items()}
        except ValueError as error:  # more dimensions or elements than NumPy supports
            raise UserError(f"{self.path} is damaged: {error}.") from error

    def check(self, names: Iterable[str]) -> None:
        """Checks that arrays can be weights.

        Raises:
          UserError: one is empty, or not of floating point numbers.
        """
        for name in names:
            if self.dtypes[name] not in DTYPES:
                raise UserError(
                    f"{self.path}: {name} holds {self.dtypes[name]}. Weights are {', '.join(DTYPES)}; convert it, "
                    "quantised weights with their scales."
                )
            if 0 in self.shapes[name]:
                raise UserError(f"{self.path}: {name} is empty, its shape is {self.shapes[name]}.")

    def read(self, names: Iterable[str]) -> Arrays:
        """Reads arrays.

        Raises:
          UserError: the file is damaged, or `check` refuses an array.
        """
        names = list(names)
        self.check(names)
        try:
            with _damage_explained(self.path, self.kind):
                if self.kind == ".npz":
                    with zipfile.ZipFile(self.path) as archive:
                        return {name: _read_npy(archive, f"{name}.npy") for name in names}
                with safetensors.safe_open(self.path, framework="np") as file:
                    return {name: file.get_tensor(name) for name in names}
        except MemoryError as error:
            size = sum(math.prod(self.shapes[name]) for name in names)
            raise UserError(f"there is not enough memory for the {size:,} numbers of {self.path}.") from error


def open_arrays(path: pathlib.Path) -> ArrayFile:
    """Reads the headers of a .npz or .safetensors file, whichever the content is.

    Raises:
      UserError: the file is of another kind, or damaged.
    """
    try:
        if not path.is_file():  # opening a FIFO would block
            raise UserError(f"{path} is not a file.")
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    if start.startswith(b"PK"):
        return _open_npz(path)
    if start[8:9] == b"{":
        return _open_safetensors(path, int.from_bytes(start[:8], "little"))
    if path.suffix in _PICKLES or start.startswith(_PICKLE_STARTS):
        raise _pickle_error(path)
    what = "neither .npz nor .safetensors" if start else "empty"
    raise DamagedFileError(f"{path} is {what}, or was cut off. Fetch it again.")


@contextlib.contextmanager
def _damage_explained(path: pathlib.Path, kind: str) -> Iterator[None]:
    """Turns the errors that a damaged file causes into one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers of Python 2 and the like
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib, NumPy and safetensors have no common error for damaged files
        raise DamagedFileError(f"{path} is a damaged or truncated {kind} file ({error}). Fetch it again.") from error


def _pickle_error(path: pathlib.Path) -> UserError:
    """Makes the error that says how to convert a PyTorch checkpoint."""
    # Takes bare state dicts, and those inside what timm, DeiT, Lightning and others save. `weights_only` runs no code
    # but that of the classes named here. Tensors are copied because tied ones cannot be saved.
    stem = path.name.partition(".")[0] or "weights"
    code = (
        "import argparse, torch, safetensors.torch as s; torch.serialization.add_safe_globals([argparse.Namespace]); "
        f"d = torch.load({path.name!r}, map_location='cpu', weights_only=True); "
        "d = next((d[k] for k in ('state_dict', 'model', 'module', 'model_state_dict', 'net') "
        "if isinstance(d.get(k), dict)), d); "
        "s.save_file({k: v.detach().clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
        f"{stem + '.safetensors'!r})"
    )
    is_plain = not set(path.name) & set('"$`\\!')
    command = f'python -c "{code}"' if is_plain else f"python -c {shlex.quote(code)}"
    return UserError(
        f"{path} is a pickle, which may run any code when it is read, so vit_jax does not read it. Convert it to "
        f".safetensors where torch is installed, in the file's folder; docs/weights.md has more:\n{command}"
    )


def check_finite(arrays: Arrays, where: object) -> None:
    """Checks that all values are finite.

    Raises:
      UserError: some are infinite or not a number; names the arrays.
    """
    if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(
            f"{where} has values that are infinite or not a number, in {list_names(bad)}. A model with them computes "
            "nothing; `python -m vit_jax.weights inspect` shows the rest."
        )


# --- .npz ---


def _sidecar_of(path: pathlib.Path) -> pathlib.Path:
    """The description beside a .npz file."""
    return path.with_name(path.name + ".json")


def _open_npz(path: pathlib.Path) -> ArrayFile:
    shapes, dtypes = {}, {}
    with _damage_explained(path, ".npz"), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if others := sorted(info.filename for info in infos if not info.filename.endswith(".npy")):
            if any(name.endswith("data.pkl") for name in others):
                raise _pickle_error(path)
            raise UserError(
                f"{path} is a zip file, but no .npz: it contains {', '.join(others[:3])}. Weights are .npz or "
                ".safetensors files."
            )
        if sum(info.compress_size for info in infos) > path.stat().st_size:
            raise ValueError("its members are longer than the file")
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name in shapes:
                raise ValueError(f"{name} occurs twice")
            shapes[name], dtype = _read_npy_header(archive, info)
            if dtype.hasobject:
                raise UserError(
                    f"{path} contains Python objects (a pickle), which may run any code when they are read, so vit_jax "
                    "does not. Save it again with plain arrays only."
                )
            dtypes[name] = "bfloat16" if dtype == np.dtype("V2") else dtype.newbyteorder("=").name
    sidecar = _sidecar_of(path)
    try:
        description = read_object(sidecar) if sidecar.exists() else {}
    except UserError as error:
        raise UserError(f"the description {error} Delete or repair it.") from error
    return ArrayFile(path, ".npz", shapes, dtypes, description, described_in=str(sidecar))


def _read_npy_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is compressed by method {info.compress_type}, which .npz files do not use")
    most = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else _MAX_INFLATION)
    if info.file_size > most:
        raise ValueError(f"{info.filename} claims {info.file_size:,} bytes, but has {info.compress_size:,}")
    with archive.open(info) as stream:
        start = io.BytesIO(stream.read(_MAX_NPY_HEADER))
    version = np.lib.format.read_magic(start)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{info.filename} is of version {version[0]} of .npy; weights are of 1 or 2")
    is_first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(start, max_header_size=_MAX_NPY_HEADER)
    if any(isinstance(side, bool) or side < 0 for side in shape):
        raise ValueError(f"{info.filename} has the shape {shape}")
    found = info.file_size - start.tell()
    if not dtype.hasobject and found != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{info.filename} has {found:,} bytes for the shape {shape} of {dtype}")
    return tuple(shape), dtype


def _read_npy(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False, max_header_size=_MAX_NPY_HEADER)
        stream.read(1)  # compares the checksum, at the end of the member
    # NumPy loses the name of bfloat16 when it saves.
    array = array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
    return array.astype(array.dtype.newbyteorder("="), copy=False)


# --- .safetensors ---


def _open_safetensors(path: pathlib.Path, header_bytes: int) -> ArrayFile:
    with _damage_explained(path, ".safetensors"):
        if header_bytes > min(MAX_BYTES, path.stat().st_size):
            raise ValueError(f"a header of {header_bytes:,} bytes")
        with safetensors.safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            found = {name: str(each.get_dtype()) for name, each in slices.items()}
            metadata = file.metadata() or {}
    try:
        description = parse_object(metadata.get(_METADATA_KEY, "{}"), f"the description in {path}")
    except UserError as error:
        raise UserError(f"{error} Delete or repair it.") from error
    dtypes = {name: _SAFETENSORS_DTYPES.get(dtype, dtype) for name, dtype in found.items()}
    return ArrayFile(path, ".safetensors", shapes, dtypes, description, described_in="its header")


# --- Writing ---


def write_arrays(
    path: pathlib.Path, arrays: Arrays, description: dict[str, Any], others: Mapping[str, dict[str, Any]] = {}
) -> None:
    """Writes a file of arrays and JSON files beside it: all of them, or none.

    Args:
      path: the file; its suffix, .npz or .safetensors, selects the kind.
      arrays: arrays by name.
      description: JSON-compatible; written into the header of a .safetensors file, or beside a .npz file as
        `<name>.npz.json`.
      others: contents of other JSON files, by name.

    Raises:
      UserError: another suffix, too little space, or a file cannot be written.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise UserError(f"{path}: name a .npz or .safetensors file.")
    contents = {path.with_name(name): content for name, content in others.items()}
    if path.suffix == ".npz":
        contents[_sidecar_of(path)] = description
    is_new = not path.parent.exists()
    try:
        arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        check_space(path.parent, sum(array.nbytes for array in arrays.values()), "Free some, or choose another folder.")
        for each in (path, *contents):
            if each.is_dir():
                raise UserError(f"cannot write {each}: Is a directory.")
        # All files are written before the first is renamed; the arrays are renamed last.
        with contextlib.ExitStack() as stack:
            _write(stack.enter_context(replacing(path)), path.suffix, arrays, description)
            for file, content in contents.items():
                stack.enter_context(replacing(file)).write_text(json.dumps(content, indent=2) + "\n")
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                path.parent.rmdir()
        raise


def _write(path: pathlib.Path, kind: str, arrays: Arrays, description: dict[str, Any]) -> None:
    if kind == ".npz":
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        return
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(description)}  # other libraries look for "format"
    try:
        safetensors.numpy.save_file(arrays, path, metadata=metadata)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
