"""Checkpoints through Orbax: written in the background, verified when they are read.

Orbax writes into a temporary folder and renames it when it is complete. Each checkpoint also has a fingerprint of every
array, and one checksum over its step, these fingerprints and the extra data. A checkpoint that was damaged later, or
renamed to another step, fails the checksum; it is set aside, and the one before is used.

In a bucket, where folders cannot be renamed, Orbax writes in place and adds an object `commit_success.txt` last; a
folder without it is not a checkpoint.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.files import AnyPath, is_remote, parse_path
from vit_jax.multihost import processes

logger = logging.getLogger(__name__)

PyTree = Any
T = TypeVar("T")

_SAVE_SECONDS = 1200  # longest wait for the other processes in a save; a large model takes minutes
_SPACE_FOR_SMALL_FILES = 1_000_000  # metadata, in bytes; generous
_ITEMS = ("tree", "extra")
_CHECKSUM = "checksum"
# The keys of versions before the checksum. Without a checksum, any other key is damage.
_KEYS_WITHOUT_CHECKSUM = {"arrays", "data", "window", "accuracy"}


class DamagedCheckpointError(Exception):
    """A checkpoint can be read, but its contents changed since it was written."""


# ---- Fingerprints and checksums.


def _fingerprint(leaf: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    position = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape)
    # Sums modulo 2^32 do not depend on the order, thus not on the sharding; odd weights detect swapped values.
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


@functools.cache
def _jitted_fingerprints(sharding: NamedSharding | None) -> jax.stages.Wrapped:
    return jax.jit(lambda leaves: jnp.stack(list(map(_fingerprint, leaves))), out_shardings=sharding)


def fingerprints(tree: PyTree) -> dict[str, int]:
    """Returns a 32-bit fingerprint of each array's bits by its path in the tree, for any sharding."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    sharding = leaves[0].sharding
    # Every process gets all of them.
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    values = np.asarray(_jitted_fingerprints(everywhere)(list(leaves)))
    return {jax.tree_util.keystr(path): int(value) for path, value in zip(paths, values, strict=True)}


def _check_fingerprints(tree: PyTree, expected: dict[str, int]) -> None:
    found = fingerprints(tree)
    differing = [name for name, value in expected.items() if found[name] != value]
    if differing:
        raise DamagedCheckpointError(f"contents of {len(differing)} arrays changed, such as {differing[0]}")


def _describe(tree: PyTree) -> dict[str, dict[str, Any]]:
    """Returns the shape and dtype of each array by its path, JSON-compatible."""
    return {
        jax.tree_util.keystr(path): {"shape": list(leaf.shape), "dtype": str(jnp.dtype(leaf.dtype))}
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _checksum(step: int, contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([step, contents], sort_keys=True).encode()).hexdigest()


# ---- Reading.


def _one_line(error: Exception, most: int) -> str:
    return re.sub(r"\s+", " ", str(error))[:most]


def _means_damage(error: Exception) -> bool:
    """Whether a read error means damaged files, rather than a problem of this machine or its network."""
    passing = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED",
               "Out of memory")  # fmt: skip
    cause: BaseException | None = error
    while cause:  # Orbax wraps TensorStore's errors
        if isinstance(cause, MemoryError) or any(word in str(cause) for word in passing):
            return False
        if type(cause).__module__.partition(".")[0] in ("aiohttp", "gcsfs", "google", "requests"):
            return False
        cause = cause.__cause__ or cause.__context__
    return not isinstance(error, OSError) or isinstance(error, FileNotFoundError)


def _read_extra(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the extra data of a checkpoint, and the description of its arrays.

    Raises:
      DamagedCheckpointError: they are not those that were saved for this step.
    """
    extra = manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]
    if not isinstance(extra, dict) or not isinstance(extra.get("arrays"), dict):
        raise DamagedCheckpointError("the description of its arrays is missing")
    if _CHECKSUM in extra:
        is_intact = extra.pop(_CHECKSUM) == _checksum(step, extra)
    else:
        is_intact = extra.keys() <= _KEYS_WITHOUT_CHECKSUM
    if not is_intact:
        raise DamagedCheckpointError(f"its contents do not match the checksum of step {step}")
    return extra, extra.pop("arrays")


def _read_tree(folder: AnyPath, like: PyTree) -> PyTree:
    """Reads arrays, except those that are None in `like`."""
    # Each process reads on its own: otherwise, one that finds its part damaged would leave the others waiting.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix=f"read_{jax.process_index()}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        args = ocp.args.PyTreeRestore(
            like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
        )
        tree = checkpointer.restore(folder / "tree", args=args)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array):  # Orbax returns the description of an array that it does not find
            raise DamagedCheckpointError(f"array {jax.tree_util.keystr(path)} is missing")
    return tree


def _newest_intact(
    manager: ocp.CheckpointManager,
    read: Callable[[int], T],
    check: Callable[[T], None] = lambda _: None,
    anywhere: Callable[[bool], bool] = bool,
) -> tuple[tuple[int, T] | None, list[int]]:
    """Finds the newest checkpoint that is intact.

    Args:
      manager: manager of the checkpoints.
      read: reads this process's part of the checkpoint of a step.
      check: raises `DamagedCheckpointError` unless everything that was read is intact; the same on all processes.
      anywhere: whether a flag is set in any process.

    Returns:
      its step and content, or None, and the steps of damaged ones.

    Raises:
      UserError: a checkpoint cannot be read, though it may be intact.
    """
    damaged: list[int] = []
    for step in sorted(manager.all_steps(), reverse=True):
        problem: Exception | None = None
        try:
            result = read(step)
        except UserError:
            raise
        except Exception as error:  # Orbax and TensorStore have no common error for damaged files
            problem = error
        is_damaged = anywhere(problem is not None)
        if not is_damaged:
            try:
                check(result)
                return (step, result), damaged
            except DamagedCheckpointError as error:
                problem = error
        reason = "as another process found"
        if problem is not None:
            reason = f"{type(problem).__name__}: {_one_line(problem, 200)}"
            if not _means_damage(problem):
                raise UserError(
                    f"cannot read the checkpoint of step {step} in {manager.directory} ({reason}). It may be intact, "
                    "and was left as it is. Fix the cause and run the same command again."
                ) from problem
        logger.warning("checkpoint of step %d is damaged (%s); trying the one before", step, reason)
        damaged.append(step)
    return None, damaged


class Checkpoints:
    """The checkpoints in one folder, `<directory>/<step>/`. All processes must make the same calls."""

    def __init__(self, directory: AnyPath | str, *, keep: int):
        """Opens or creates the folder, deletes incomplete checkpoints, and keeps the newest `keep`.

        Raises:
          UserError: the bucket cannot be used.
        """
        self._directory = _absolute(directory)
        try:
            self._manager = self._open(keep)
        except Exception as error:
            if not is_remote(self._directory):
                raise
            reason = f"{type(error).__name__}: {_one_line(error, 500)}"
            raise UserError(
                f"cannot open the checkpoints in {self._directory}: {reason}. See docs/storage.md for permissions."
            ) from error

    def _open(self, keep: int) -> ocp.CheckpointManager:
        # Orbax's own option does this in a thread that only the next save waits for.
        for half_written in ocp.utils.tmp_checkpoints(self._directory) if processes.is_main_process() else ():
            # In a bucket, any folder without the commit object counts as half-written, even somebody else's.
            if not is_remote(self._directory) or half_written.get().name.isdigit():
                half_written.get().rmtree()
        processes.barrier(f"{self._directory.name} are tidy")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self._directory.name),
            # If folders were made in the background, a full disk would keep other threads waiting for minutes.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False,
                timeout_secs=_SAVE_SECONDS,
                barrier_sync_fn=_barrier_between_threads,
            ),
        )
        return ocp.CheckpointManager(self._directory, options=options, item_names=_ITEMS)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree, extra: dict[str, Any] | None = None) -> None:
        """Saves in the background; arrays are copied before this returns, so they may be donated.

        Each process writes the parts that its devices hold.

        Args:
          step: names the checkpoint. Does nothing if it exists already.
          tree: arrays.
          extra: JSON-compatible data to save with them.

        Raises:
          UserError: this or an earlier checkpoint could not be written.
        """
        if step == self.latest_step():
            return
        prints = fingerprints(tree)
        arrays = {name: array | {"fingerprint": prints[name]} for name, array in _describe(tree).items()}
        contents = {"arrays": arrays, **(extra or {})}
        contents[_CHECKSUM] = _checksum(step, contents)
        args = ocp.args.Composite(tree=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave(contents))

        def write() -> None:
            # Checked first, because a write that fails half-way prints many tracebacks from other threads.
            self._check_space(tree)
            if not self._manager.save(step, args=args):
                raise RuntimeError(f"step {step} is not beyond the newest checkpoint, {self.latest_step()}")

        self._guard(write)

    def wait(self) -> None:
        """Waits until everything is on the disk.

        Raises:
          UserError: a checkpoint could not be written.
        """
        self._guard(self._manager.wait_until_finished)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the background work, but not after an error in a run of several processes: it would wait for them."""
        if kind is None or processes.process_count() == 1:
            self._guard(self._manager.close)

    def restore_latest(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Reads the newest intact checkpoint; damaged ones are set aside, with a warning.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct`s with the wanted shapes, dtypes and shardings.

        Returns:
          step, tree and extra data; None if there is no checkpoint.

        Raises:
          UserError: the checkpoint is of another model or optimizer, or all checkpoints are damaged.
        """
        newest = self._newest_intact(
            lambda step: self._read(step, like), lambda found: _check_fingerprints(found[0], found[2])
        )
        if newest is None:
            if self.latest_step() is None:
                return None
            raise UserError(
                f"all checkpoints in {self._directory} are damaged. Nothing was changed; move the folder away to start "
                "from step 0."
            )
        step, (tree, extra, _) = newest
        return step, tree, extra

    def latest_extra(self) -> tuple[int, dict[str, Any]] | None:
        """Returns step and extra data of the newest intact checkpoint, or None. Damaged ones are set aside."""
        newest = self._newest_intact(lambda step: _read_extra(self._manager, step)[0])
        if newest is None:
            for step in self._manager.all_steps():
                self.set_aside(step, "damaged")
        return newest

    def _newest_intact(
        self, read: Callable[[int], T], check: Callable[[T], None] = lambda _: None
    ) -> tuple[int, T] | None:
        newest, damaged = _newest_intact(self._manager, read, check, _anywhere)
        for step in damaged if newest else ():  # only if there is another one to resume from
            self.set_aside(step, "damaged")
        return newest

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any], dict[str, int]]:
        """Reads this process's part of a checkpoint: tree, extra data, and the fingerprints that were saved."""
        extra, saved = _read_extra(self._manager, step)
        prints = {name: array.pop("fingerprint") for name, array in saved.items()}
        wanted = _describe(like)
        if differing := sorted(name for name in wanted.keys() | saved.keys() if wanted.get(name) != saved.get(name)):
            raise UserError(
                f"the checkpoint of step {step} in {self._directory} is of another model, optimizer, rng or "
                f"polyak_decay; {len(differing)} arrays differ, such as {differing[0]}: "
                f"{saved.get(differing[0], 'absent')} saved, {wanted.get(differing[0], 'absent')} expected. Use the "
                "config and the version of vit_jax that wrote it, or another --workdir."
            )
        tree = _read_tree(self._directory / str(step), jax.tree.map(ocp.tree.to_shape_dtype_struct, like))
        return tree, extra, prints

    def set_aside(self, step: int, reason: str) -> None:
        """Renames a checkpoint to `<reason>-<step>`, so that it is kept but no longer used."""
        if processes.is_main_process():
            number = 0
            while (aside := self._directory / f"{reason}-{step}{f'-{number}' if number else ''}").exists():
                number += 1
            _rename(self._directory / str(step), aside)
            logger.warning("set aside the checkpoint of step %d as %s", step, aside)
        processes.barrier(f"{self._directory.name}/{step} is set aside")
        self._manager.reload()

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which will be repeated."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def _check_space(self, tree: PyTree) -> None:
        if is_remote(self._directory):
            return
        needed = int(1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(tree))) + _SPACE_FOR_SMALL_FILES
        # Measured by one process, so that all decide the same.
        free = processes.broadcast_from_main("free space", shutil.disk_usage(self._directory).free)
        if free < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes needed, {free:,} free")

    def _guard(self, write: Callable[[], object]) -> None:
        """Turns any failure to write into one error with the same advice."""
        try:
            write()
        except processes.PeerLostError:
            raise
        except Exception as error:
            advice = "Fix the cause"
            if not is_remote(self._directory):
                steps = sorted(int(path.name) for path in self._directory.glob("[0-9]*") if path.name.isdigit())
                whole = f"Complete checkpoints: {', '.join(map(str, steps)) or 'none'}."
                advice = f"{whole} Free some space, or repair the disk,"
            raise UserError(
                f"could not write a checkpoint to {self._directory}: {_one_line(error, 500)}\n"
                f"{advice} and run the same command again to resume from the newest one."
            ) from error


def _barrier_between_threads(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier, skipped after an error: the others never reach the barrier at the end of its threads."""
    if sys.exc_info()[0] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; all must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _absolute(directory: AnyPath | str) -> AnyPath:
    path = parse_path(directory)
    return path if is_remote(path) else path.absolute()


def _rename(source: AnyPath, target: AnyPath) -> None:
    if not is_remote(source):
        source.rename(target)
        return
    import fsspec

    # Copied by the store itself, then deleted: a kill in between leaves the damaged checkpoint in place, and the next
    # start sets it aside again.
    files, _ = fsspec.core.url_to_fs(str(source))
    files.copy(f"{source}/", f"{target}/", recursive=True)
    files.rm(str(source), recursive=True)


# ---- Reading without a run.

_VERBOSITY = threading.Lock()


@contextlib.contextmanager
def _open_for_reading(directory: AnyPath | str) -> Iterator[ocp.CheckpointManager | None]:
    """Yields the manager of the checkpoints in a folder, or None if there is no such folder."""
    path = _absolute(directory)
    if not path.is_dir():
        yield None
        return
    with _VERBOSITY:  # all threads share it
        verbosity = absl_logging.get_verbosity()
        absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns three times that it will not write
        try:
            options = ocp.CheckpointManagerOptions(read_only=True)
            manager = ocp.CheckpointManager(path, options=options, item_names=_ITEMS)
        finally:
            absl_logging.set_verbosity(verbosity)
    with manager:
        yield manager


def read_extra(directory: AnyPath | str) -> dict[str, Any] | None:
    """Reads the extra data of the newest checkpoint; None if there is no checkpoint, or it is damaged."""
    with _open_for_reading(directory) as manager:
        step = manager.latest_step() if manager else None
        if manager is None or step is None:
            return None
        try:
            return _read_extra(manager, step)[0]
        except Exception:  # Orbax and TensorStore have no common error for damaged files
            return None


def read_parameters(directory: AnyPath | str) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """Reads the parameters of the newest intact checkpoint in a folder, such as `<workdir>/best`. Changes nothing.

    A run may be writing others meanwhile. From a full training state it reads the parameters that are evaluated: the
    average, if there is one. Damaged checkpoints are skipped with a warning.

    Returns:
      step, nested parameters as NumPy arrays, and the extra data; None if there is no checkpoint.

    Raises:
      UserError: all are damaged.
    """
    with _open_for_reading(directory) as manager:
        if manager is None:
            return None
        newest, damaged = _newest_intact(manager, lambda step: _read_parameters(manager, step))
    if damaged and not newest:
        raise UserError(f"all checkpoints in {directory} are damaged: {', '.join(map(str, damaged))}.")
    return (newest[0], *newest[1]) if newest else None


def _read_parameters(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    extra, described = _read_extra(manager, step)
    part = next((name for name in ("average", "params") if any(path.startswith(f".{name}[") for path in described)), "")
    prefix = f".{part}" if part else ""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like: dict[tuple[str, ...], jax.ShapeDtypeStruct] = {}
    prints: dict[str, int] = {}
    for path, array in described.items():
        if path.startswith(f"{prefix}["):
            names = tuple(re.findall(r"\['([^']+)'\]", path))
            like[names] = jax.ShapeDtypeStruct(array["shape"], array["dtype"], sharding=here)
            prints[path.removeprefix(prefix)] = array["fingerprint"]
    params = flax.traverse_util.unflatten_dict(like)
    tree = _read_tree(manager.directory / str(step), {part: params} if part else params)
    params = tree[part] if part else tree
    _check_fingerprints(params, prints)
    return jax.tree.map(np.asarray, params), extra
