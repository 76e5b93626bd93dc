"""What all preparations share: a thread pool that keeps order, and a folder that is built, resumed and renamed once."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from vit_jax.console import Progress
from vit_jax.data.prepare import tfds_layout
from vit_jax.data.prepare.index import Index
from vit_jax.errors import UserError
from vit_jax.files import check_space, full_disk_explained, lock, replace_whole

MAKE_ROOM = "Free some space, or choose another disk with --out."

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Maps on a thread pool; yields results in the order of the items and reads only a few items ahead."""
    window: collections.deque[concurrent.futures.Future[R]] = collections.deque()
    pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    try:
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) > 2 * threads:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def working_in(folder: pathlib.Path) -> Iterator[None]:
    """Creates a folder to prepare a data set in, and locks it against other processes.

    Raises:
      UserError: another process has locked it, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock_file = folder.with_name(f".{folder.name}.lock")  # beside it: everything inside becomes the data set
    busy = f"another process is writing {folder}. Wait for it, or stop it."
    with lock(lock_file, busy), full_disk_explained(folder):
        try:
            yield
        finally:
            lock_file.unlink(missing_ok=True)


def build(
    target: pathlib.Path,
    settings: dict[str, Any],
    source: dict[str, Any],
    write: Callable[[pathlib.Path, Index, dict[str, Any]], None],
) -> dict[str, Any]:
    """Builds a data set in `<target>.incomplete` and renames it once it is complete, or resumes doing so.

    Args:
      target: folder of the finished data set. If it exists, its manifest is compared.
      settings: everything that decides the result, JSON-compatible. "files" is only compared when resuming.
      source: the manifest's facts about the source.
      write: writes shards and manifest into a folder, and keeps its progress in the index. Takes the settings of the
        manifest.

    Returns:
      the manifest.

    Raises:
      UserError: the data set exists or was begun with other settings, another process is writing it, or the disk is
        full.
    """
    settings, source = json.loads(json.dumps([settings, source]))
    public = {name: value for name, value in settings.items() if name != "files"}
    if target.exists():
        manifest = tfds_layout.read_manifest(target)
        print(f"{target} already exists, with {manifest['counts']['examples']:,} examples.", file=sys.stderr)
        _refuse_other(manifest, target, public, source)
        return manifest
    folder = target.with_name(target.name + tfds_layout.UNFINISHED)
    with working_in(folder):
        if not (folder / tfds_layout.MANIFEST).exists():  # else a kill came just before the rename
            with contextlib.closing(Index(folder)) as index:
                # Without these, nothing is kept yet and new settings may replace the old ones.
                begun = index.fact("mark") is not None or index.fact("scanned") or any(folder.glob("*.npy"))
                before = index.fact("settings") or {}
                if index.fact("files") is not None:  # where earlier versions of `dedup` kept them
                    before["files"] = index.fact("files")
                if begun and before != settings:
                    difference = _difference(before, settings)
                    raise UserError(
                        f"{folder} was begun with other settings ({difference}). Rerun with the same settings to "
                        "resume, or remove the folder to start over."
                    )
                index.commit(settings=settings)
                write(folder, index, public)
        manifest = tfds_layout.read_manifest(folder)
        _refuse_other(manifest, folder, public, source)
        for leftover in [*folder.glob("index.sqlite*"), *folder.glob("*.npy")]:
            leftover.unlink()
        replace_whole(folder, target)
    return manifest


def _refuse_other(
    manifest: dict[str, Any], folder: pathlib.Path, settings: dict[str, Any], source: dict[str, Any]
) -> None:
    made = {name: value for name, value in manifest["source"].items() if name != "examples_sha256"}
    for what, old, new in (("settings", manifest["settings"], settings), ("files", made, source)):
        if old != new:
            raise UserError(
                f"{folder} was made with other {what} ({_difference(old, new)}). Remove it, or choose another --name "
                "or --version."
            )


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return "; ".join(
        "the source files are not the same, or have changed"
        if name in ("files", "archives")  # maybe thousands
        else f"{name} was {old.get(name)!r}, is {new.get(name)!r}"
        for name in names
    )


def write_shards(
    folder: pathlib.Path,
    index: Index,
    plan: Sequence[tuple[str, str, Callable[[], Iterator[bytes]]]],
    *,
    total: int,
    needed: int,
) -> dict[str, dict[str, tfds_layout.Shard]]:
    """Writes the shards that are missing.

    Args:
      folder: of the shards.
      index: remembers which shards are finished.
      plan: split and name of each shard, and a function that yields its records.
      total: number of examples.
      needed: bytes of all shards.

    Returns:
      all shards by split and name.

    Raises:
      UserError: the disk has too little space.
    """
    recorded = {name: tfds_layout.Shard(**facts) for name, facts in index.shards().items()}
    finished = {
        name: shard
        for name, shard in recorded.items()
        if (folder / name).is_file() and (folder / name).stat().st_size == shard.bytes
    }
    check_space(folder, needed - sum(shard.bytes for shard in finished.values()), MAKE_ROOM)
    done = sum(shard.examples for shard in finished.values())
    if finished:
        print(f"write: resumes after {done:,} of {total:,} examples", file=sys.stderr)
    shards: dict[str, dict[str, tfds_layout.Shard]] = {}
    with Progress("write", total, done=done) as progress:

        def counted(records: Iterator[bytes]) -> Iterator[bytes]:
            for record in records:
                yield record
                progress.add()

        for split, name, records in plan:
            if name not in finished:
                finished[name] = tfds_layout.write_shard(folder / name, counted(records()))
                index.finish_shard(name, dataclasses.asdict(finished[name]))
            shards.setdefault(split, {})[name] = finished[name]
        progress.finish()
    return shards
