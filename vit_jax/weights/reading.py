"""Reads arrays from .npz and .safetensors files. Neither can run code; pickles are refused.

A file is opened first: names, shapes and dtypes, at the cost of its headers. Its arrays are read when they are known to
be those of a model, each into as many bytes as its header declares. Memory is thus bounded by the model, whatever a
file claims or inflates to.
"""

import dataclasses
import io
import math
import pathlib
import shlex
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from vit_jax.errors import UserError
from vit_jax.json_files import MAX_BYTES, parse_object, read_object
from vit_jax.run.workdir import AnyPath
from vit_jax.weights.mapping import Arrays, list_names

METADATA_KEY = "vit_jax"  # in the header of a .safetensors file
DTYPES = ("float16", "bfloat16", "float32", "float64")
_SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
_PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_NPY_START = 12  # bytes up to the header's text, at most
_MAX_NPY_HEADER = 10_000  # bytes
_MAX_INFLATION = 1032  # deflate cannot do more
_CHUNK = 1 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """A file whose headers are read.

    Attributes:
      path: of the file.
      shapes: of the arrays, by name.
      dtypes: names of their dtypes, or of what else they hold.
      description: what this project wrote beside the arrays; empty for files of others.
      read_all: reads the arrays of these names.
    """

    path: pathlib.Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    description: dict[str, Any]
    read_all: Callable[[Sequence[str]], Arrays]

    def outline(self) -> Arrays:
        """Zeros in place of the arrays, which take no memory."""
        zero = np.float32(0)
        try:
            return {name: np.broadcast_to(zero, shape) for name, shape in self.shapes.items()}
        except ValueError as error:  # more dimensions, or more elements, than NumPy has numbers for
            raise UserError(f"{self.path} is damaged: {error}.") from error

    def check(self, names: Iterable[str]) -> None:
        """Checks that arrays can be weights.

        Raises:
          UserError: one is empty, or holds other values than floating point numbers.
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
            return self.read_all(names)
        except MemoryError as error:
            size = sum(math.prod(self.shapes[name]) for name in names)
            raise UserError(f"{self.path} holds {size:,} numbers, for which there is not enough memory.") from error


def read_arrays(path: pathlib.Path) -> tuple[Arrays, dict[str, Any]]:
    """Reads all arrays of a file, and what `files.write_arrays` was given as description."""
    opened = open_arrays(path)
    return opened.read(opened.shapes), opened.description


def open_arrays(path: pathlib.Path) -> ArrayFile:
    """Reads the headers of a .npz or .safetensors file; told apart by what is in it.

    Raises:
      UserError: not such a file, or not a whole one.
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
    what = "empty" if not start else "neither .npz nor .safetensors"
    raise UserError(f"{path} is {what}, or was cut off. Fetch it again.")


def _pickle_error(path: pathlib.Path) -> UserError:
    """Says how to turn a checkpoint of PyTorch into a file that is read."""
    # Bare state dicts, and those inside what timm, DeiT, Lightning and others save; only tensors are kept, as copies
    # because tied ones cannot be saved. `weights_only` runs no code but that of the classes named here.
    stem = path.name.partition(".")[0] or "weights"
    code = (
        "import argparse, torch, safetensors.torch as s; torch.serialization.add_safe_globals([argparse.Namespace]); "
        f"d = torch.load({path.name!r}, map_location='cpu', weights_only=True); "
        "d = next((d[k] for k in ('state_dict', 'model', 'module', 'model_state_dict', 'net') "
        "if isinstance(d.get(k), dict)), d); "
        "s.save_file({k: v.detach().clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
        f"{stem + '.safetensors'!r})"
    )
    plain = not set(path.name) & set('"$`\\!')
    command = f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}"
    return UserError(
        f"{path} is a pickle, which may run any code when it is read, so vit_jax does not. Turn it into a .safetensors "
        f"file where torch is installed, in its folder; docs/weights.md has more:\n{command}"
    )


# --- .npz ---


@dataclasses.dataclass(frozen=True)
class _Member:
    """An array inside a .npz file.

    Attributes:
      info: of the zip file.
      start: bytes before the values.
      shape: of the array.
      in_columns: whether values are in Fortran's order.
      dtype: of the values.
    """

    info: zipfile.ZipInfo
    start: int
    shape: tuple[int, ...]
    in_columns: bool
    dtype: np.dtype


def _open_npz(path: pathlib.Path) -> ArrayFile:
    members = _guarded(path, lambda: _read_members(path))

    def read_all(names: Sequence[str]) -> Arrays:
        def read() -> Arrays:
            with zipfile.ZipFile(path) as archive:
                return {name: _read_member(archive, members[name]) for name in names}

        return _guarded(path, read)

    return ArrayFile(
        path=path,
        shapes={name: member.shape for name, member in members.items()},
        dtypes={name: _dtype_name(member.dtype) for name, member in members.items()},
        description=_read_sidecar(path),
        read_all=read_all,
    )


def _guarded(path: pathlib.Path, read: Callable[[], Any]) -> Any:
    """Turns the errors of a damaged file into one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers of Python 2 and the like
            return read()
    except (UserError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and NumPy have no common error for damaged files
        raise UserError(f"{path} is a damaged or truncated .npz file ({error}). Fetch it again.") from error


def _read_members(path: pathlib.Path) -> dict[str, _Member]:
    members: dict[str, _Member] = {}
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if strangers := sorted(info.filename for info in infos if not info.filename.endswith(".npy")):
            if any(name.endswith("data.pkl") for name in strangers):
                raise _pickle_error(path)
            raise UserError(
                f"{path} is a zip file, but no .npz: it contains {', '.join(strangers[:3])}. Weights are .npz or "
                ".safetensors files."
            )
        if sum(info.compress_size for info in infos) > path.stat().st_size:
            raise ValueError("its members are longer than the file")
        for info in infos:
            name = info.filename.removesuffix(".npy")
            if name in members:
                raise ValueError(f"{name} is there twice")
            _check_inflation(info)
            with archive.open(info) as stream:
                members[name] = _read_npy_header(stream, info)
            if members[name].dtype.hasobject:
                raise UserError(
                    f"{path} contains Python objects (a pickle), which may run any code when they are read, so vit_jax "
                    "does not. Save it again with plain arrays only."
                )
    return members


def _check_inflation(info: zipfile.ZipInfo) -> None:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is compressed by method {info.compress_type}, which .npz files do not use")
    is_stored = info.compress_type == zipfile.ZIP_STORED
    most = info.compress_size if is_stored else _MAX_INFLATION * info.compress_size
    if info.file_size > most:
        raise ValueError(f"{info.filename} claims {info.file_size:,} bytes, of which {info.compress_size:,} are there")


def _read_npy_header(stream: Any, info: zipfile.ZipInfo) -> _Member:
    start = stream.read(_NPY_START)
    major = np.lib.format.read_magic(io.BytesIO(start))[0]
    if major not in (1, 2):
        raise ValueError(f"{info.filename} is of version {major} of .npy; weights are of 1 or 2")
    size_bytes = 2 if major == 1 else 4
    length = int.from_bytes(start[8 : 8 + size_bytes], "little")
    if length > _MAX_NPY_HEADER:
        raise ValueError(f"{info.filename} has a header of {length:,} bytes")
    end = 8 + size_bytes + length
    header = io.BytesIO(start + stream.read(max(end - len(start), 0)))
    header.seek(8)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(header, max_header_size=_MAX_NPY_HEADER)
    if any(isinstance(side, bool) or side < 0 for side in shape):
        raise ValueError(f"{info.filename} has the shape {shape}")
    if not dtype.hasobject and end + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename} has {info.file_size - end:,} bytes for the shape {shape} of {dtype}")
    return _Member(info, end, tuple(shape), in_columns, dtype)


def _read_member(archive: zipfile.ZipFile, member: _Member) -> np.ndarray:
    """One array. Its last byte is read too, because only then its checksum is compared."""
    flat = np.empty(math.prod(member.shape), member.dtype)
    view, filled = flat.view(np.uint8).data, 0
    with archive.open(member.info) as opened:
        stream: Any = opened
        stream.read(member.start)
        while filled < len(view):
            count = stream.readinto(view[filled : filled + _CHUNK])
            if not count:
                raise ValueError(f"{member.info.filename} is cut off")
            filled += count
        stream.read(1)
    array = flat.reshape(member.shape[::-1]).T if member.in_columns else flat.reshape(member.shape)
    # NumPy forgets the name of bfloat16 when it saves.
    array = array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _dtype_name(dtype: np.dtype) -> str:
    return "bfloat16" if dtype == np.dtype("V2") else dtype.newbyteorder("=").name


def _read_sidecar(path: pathlib.Path) -> dict[str, Any]:
    sidecar = sidecar_of(path)
    if not sidecar.exists():
        return {}
    try:
        return read_object(sidecar)
    except UserError as error:
        raise UserError(f"the description {error} Delete or mend it.") from error


def sidecar_of(path: pathlib.Path) -> pathlib.Path:
    """The description beside a .npz file."""
    return path.with_name(path.name + ".json")


# --- .safetensors ---


def _open_safetensors(path: pathlib.Path, header_bytes: int) -> ArrayFile:
    if header_bytes > min(MAX_BYTES, path.stat().st_size):
        raise UserError(
            f"{path} is a damaged or truncated .safetensors file (a header of {header_bytes:,} bytes). Fetch it again."
        )

    def read_all(names: Sequence[str]) -> Arrays:
        try:
            with safetensors.safe_open(path, framework="np") as file:
                return {name: file.get_tensor(name) for name in names}
        except safetensors.SafetensorError as error:
            raise _safetensors_error(path, error) from error

    try:
        with safetensors.safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            found = {name: str(each.get_dtype()) for name, each in slices.items()}
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise _safetensors_error(path, error) from error
    return ArrayFile(
        path=path,
        shapes=shapes,
        dtypes={name: _SAFETENSORS_DTYPES.get(dtype, dtype) for name, dtype in found.items()},
        description=_parse(metadata.get(METADATA_KEY, "{}"), path),
        read_all=read_all,
    )


def _safetensors_error(path: pathlib.Path, error: Exception) -> UserError:
    return UserError(f"{path} is a damaged or truncated .safetensors file ({error}). Fetch it again.")


def _parse(text: str, path: AnyPath) -> dict[str, Any]:
    try:
        return parse_object(text, f"the description in {path}")
    except UserError as error:
        raise UserError(f"{error} Delete or mend it.") from error


def check_finite(arrays: Arrays, where: object) -> None:
    """Checks that all values are numbers.

    Raises:
      UserError: some are infinite or not a number; names the arrays.
    """
    if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise UserError(
            f"{where} has values that are infinite or not a number, in {list_names(bad)}. A model with them computes "
            "nothing; `python -m vit_jax.weights inspect` shows the rest."
        )
