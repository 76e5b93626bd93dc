"""Paths, regular files, atomic writes, locks, free space and the cache folder. Imports only fast modules.

Environment variable:

VIT_JAX_CACHE   folder for what can be made or downloaded again: weights/, indices/ and compiled/ below it;
                otherwise $XDG_CACHE_HOME/vit_jax, otherwise ~/.cache/vit_jax
"""

import contextlib
import errno
import glob
import io
import logging
import os
import pathlib
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from vit_jax.console import encode_text, format_bytes
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    # A path on a disk or in a bucket; both have the methods that are used here.
    AnyPath: TypeAlias = pathlib.Path | epath.Path
else:
    AnyPath = pathlib.PurePath

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "VIT_JAX_CACHE"

_LEFT_OVER_SECONDS = 60.0  # younger temporary files may be in use
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


# ---- Paths.


def parse_path(path: str | os.PathLike[str]) -> AnyPath:
    """Makes the path of a folder or file: on a disk (`~` is the home folder), or `gs://bucket/folder`.

    Raises:
      UserError: it is in another kind of store, or gcsfs, which accesses buckets, is not installed.
    """
    path = str(path)
    if path.startswith("gs:/") and not path.startswith("gs://"):
        raise UserError(f"{path!r} was the address of a bucket before it became a path: give it as a string.")
    scheme, found, rest = path.partition("://")
    if not found:
        try:
            return pathlib.Path(path).expanduser()
        except RuntimeError as error:
            raise UserError(f"cannot use {path!r} as a folder: {error}") from error
    if scheme != "gs" or not rest.strip("/"):
        raise UserError(f"cannot use {path!r} as a workdir: expected a folder, or gs://bucket/folder.")
    # Otherwise etils imports TensorFlow for gs:// if it is installed.
    os.environ["EPATH_USE_TF"] = "false"
    try:
        import fsspec
        import gcsfs  # noqa: F401 - etils imports it too late for a good message
        from etils import epath
    except ImportError as error:
        raise UserError(f"{path} needs gcsfs ({error}); pip install --editable '.[gcs]'") from error
    # gcsfs would cache listings forever, although TensorStore writes to the bucket too.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(path.rstrip("/"))


def is_remote(path: AnyPath) -> bool:
    """Whether a path is in a bucket, which has no file locks, no appending and no renaming of folders."""
    return str(path).startswith("gs://")


def cache_folder(kind: str) -> pathlib.Path:
    """The folder that caches `kind`: "weights", "indices" or "compiled". See the top of this module."""
    folder = os.environ.get(CACHE_VARIABLE)
    folder = folder or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vit_jax")
    return pathlib.Path(folder, kind).expanduser()


# ---- Regular files. Opening a FIFO would block forever, and a device such as /dev/zero never ends.


def stat_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a regular file, following links; `OSError` if it does not exist or is a folder, FIFO or device."""
    status = os.stat(path)
    _check_regular(status.st_mode)
    return status


def open_regular(path: str | os.PathLike[str]) -> int:
    """Opens a regular file for reading; returns its descriptor. Raises `OSError` like `stat_regular`."""
    stat_regular(path)
    # O_NONBLOCK: it may have become a FIFO since.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_regular(os.fstat(descriptor).st_mode)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: str | os.PathLike[str], most: int, start: int | None = None) -> bytes:
    """Reads a whole regular file, or its first `start` bytes.

    Args:
      path: of the file.
      most: largest size in bytes; a larger file is an error.
      start: number of bytes to read; None: all.

    Raises:
      OSError: it does not exist, is too large, or as in `stat_regular`.
    """
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        if start is not None:
            return file.read(start)
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(f"it has {size:,} bytes, and at most {most:,} are read")
        return file.readall()


def read_text_lines(path: pathlib.Path, most: int = 2**26) -> list[str]:
    """The lines of a UTF-8 text file, with or without a byte order mark; else `OSError` or `ValueError`."""
    content = read_regular(path, most)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16: save it as UTF-8")
    return content.decode("utf-8-sig").splitlines()


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise OSError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file")


# ---- Atomic writes.


def sync(path: pathlib.Path) -> None:
    """Waits until a file, or a folder's list of entries, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_whole(temporary: pathlib.Path, path: pathlib.Path) -> None:
    """Renames a finished file or folder to `path`, durably, so that `path` is whole or does not exist."""
    sync(temporary)
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # some file systems cannot sync folders
        sync(path.parent)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path to write to; its file replaces `path` when the block ends. Creates the folder.

    Raises:
      UserError: it could not be written; `path` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        delete_left_over(path.parent, f".{glob.escape(path.name)}.*.tmp")
        yield temporary
        replace_whole(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):  # the folder may not exist
            temporary.unlink(missing_ok=True)


def write_atomically(path: AnyPath | str, content: str | bytes) -> None:
    """Writes a file so that readers see the complete old or new content. Creates the folder.

    Raises:
      UserError: it could not be written.
    """
    path = parse_path(path)
    data = encode_text(content) if isinstance(content, str) else content
    if not is_remote(path):
        with replacing(path) as temporary:
            temporary.write_bytes(data)
        return
    try:
        path.write_bytes(data)  # an object in a bucket appears only when complete
    except Exception as error:  # gcsfs, aiohttp and google.auth have no common error
        raise UserError(
            f"cannot write {path}: {type(error).__name__}: {error}. Fix the cause and rerun the same command to resume "
            "from the newest checkpoint."
        ) from error


def write_figure(path: AnyPath | str, figure: Any) -> None:
    """Writes a matplotlib figure as PNG, with `write_atomically`."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())


def delete_left_over(folder: pathlib.Path, *patterns: str) -> None:
    """Deletes a killed process's temporary files: those last written over a minute ago.

    Args:
      folder: their folder, which need not exist.
      *patterns: patterns for `pathlib.Path.glob`, such as ".config.json.*.tmp".
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # another user's, or already deleted
                if path.is_file() and time.time() - path.stat().st_mtime > _LEFT_OVER_SECONDS:
                    path.unlink()


# ---- Locks.


@contextlib.contextmanager
def lock(path: pathlib.Path, message: str, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds a file lock, which ends with the process even if it is killed. The lock file stays.

    Args:
      path: the lock file. It and its folder are created.
      message: the error message if another process holds the lock.
      on_wait: called before waiting for the other process; None: raise instead of waiting.

    Raises:
      UserError: another process holds the lock, or the lock file cannot be written.
    """
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file_lock = filelock.FileLock(path, thread_local=False)
        try:
            file_lock.acquire(blocking=False)
        except filelock.Timeout as error:
            if on_wait is None:
                raise UserError(message) from error
            on_wait()
            file_lock.acquire(timeout=1e9)  # without a timeout, a thread could not wait for another of its process
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(
                f"cannot write to {path.parent}: {error.strerror or error}. Choose another folder."
            ) from error
        logger.warning("%s cannot be locked: do not run this twice at once (%s)", path.parent, error.strerror)
    try:
        yield
    finally:
        file_lock.release()


# ---- Free space.


def check_space(folder: pathlib.Path, needed: int, remedy: str) -> None:
    """Raises `UserError` unless `needed` bytes are free where `folder` is or will be; `remedy` says what to do."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise UserError(f"{folder} has {format_bytes(free)} free, but {format_bytes(needed)} are needed. {remedy}")


@contextlib.contextmanager
def full_disk_explained(folder: pathlib.Path) -> Iterator[None]:
    """Turns the many ways in which libraries report a full disk or quota into one `UserError`."""
    try:
        yield
    except Exception as error:
        # array_record quotes the system in a RuntimeError; SQLite takes an exceeded quota for a failed write.
        full = getattr(error, "errno", None) in _FULL or any(os.strerror(number) in str(error) for number in _FULL)
        if full or getattr(error, "sqlite_errorname", None) in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):
            raise UserError(
                f"the disk is full, or a quota is used up, at {folder} ({error}). Finished parts are kept. Make room "
                "and rerun the same command to resume."
            ) from error
        raise
