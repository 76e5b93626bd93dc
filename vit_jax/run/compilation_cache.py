"""A cache of compiled programs on disk, which saves a second start from compiling again."""

import importlib
import logging
import os
import pathlib
import time
import zlib

import jax

from vit_jax.files import cache_folder

logger = logging.getLogger(__name__)

_CHECKED = ".checked"  # entries older than this file were checked
_CHUNK_BYTES = 2**20


def use_compilation_cache() -> None:
    """Keeps compiled programs in `$JAX_COMPILATION_CACHE_DIR`, or in `compiled/` of the cache folder.

    Deletes entries that a kill truncated first. JAX would find them unreadable at every start, compile, and never
    replace them.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    directory = jax.config.values["jax_compilation_cache_dir"]
    if directory and "://" not in directory:
        delete_damaged_entries(pathlib.Path(directory))


def delete_damaged_entries(directory: pathlib.Path) -> list[pathlib.Path]:
    """Deletes entries that cannot be decompressed, among those newer than the last check, and returns them.

    An entry that another process is writing may be deleted too. That process continues, and its program is compiled
    again at the next start.
    """
    stamp = directory / _CHECKED
    deleted: list[pathlib.Path] = []
    try:
        since = stamp.stat().st_mtime_ns if stamp.exists() else 0
        if since > time.time_ns():  # the clock was set back since
            since = 0
        new = [path for path in directory.glob("*-cache") if path.stat().st_mtime_ns >= since]
        if new:
            stamp.touch()  # before reading, so that entries written meanwhile are newer
        for path in new:
            if not _is_whole(path):
                path.unlink(missing_ok=True)
                deleted.append(path)
    except OSError as error:  # nothing depends on the cache
        logger.warning("cannot check the compilation cache %s: %s", directory, error)
    if deleted:
        logger.info("deleted %d damaged entries of the compilation cache %s", len(deleted), directory)
    return deleted


def _is_whole(path: pathlib.Path) -> bool:
    """Whether the file is one complete compressed stream, in the format that JAX reads on this machine."""
    try:
        zstandard = importlib.import_module("zstandard")  # used by JAX if it is installed, else zlib
        decompressor = zstandard.ZstdDecompressor().decompressobj()
    except ImportError:
        decompressor = zlib.decompressobj()
    with path.open("rb") as file:
        while not decompressor.eof:
            chunk = file.read(_CHUNK_BYTES)
            if not chunk:
                return False
            try:
                decompressor.decompress(chunk)
            except Exception:  # zlib.error, zstandard.ZstdError
                return False
        return not file.read(1) and not decompressor.unused_data
