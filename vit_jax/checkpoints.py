"""Checkpoints through Orbax: written in the background, several kept, and never half of one taken for a whole.

Orbax writes into a temporary folder and renames it when all is there. On top, each checkpoint carries a fingerprint of
every array and one checksum over its step, these fingerprints and the extra data. A checkpoint that was damaged later,
or renamed to another step, fails the checksum and is set aside; the one before is used.

In a bucket, where folders cannot be renamed, Orbax writes in place and an object `commit_success.txt` last; without it
a folder is no checkpoint.
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

# After so long a process that waits for the others in a save gives up; files of a large model take minutes.
_SAVE_SECONDS = 1200

_SPACE_FOR_SMALL_FILES = 1_000_000  # metadata, in bytes; generous


def _fingerprints(leaves: list[jax.Array]) -> jax.Array:
    def fingerprint(leaf: jax.Array) -> jax.Array:
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        position = jnp.arange(leaf.size, dtype=jnp.uint32).reshape(leaf.shape)
        # Sums modulo 2^32 do not depend on the order, thus not on how the array is sharded; the odd weights notice
        # values that changed places.
        return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)

    return jnp.stack([fingerprint(leaf) for leaf in leaves])


@functools.cache
def _jitted_fingerprints(sharding: NamedSharding | None) -> jax.stages.Wrapped:
    return jax.jit(_fingerprints, out_shardings=sharding)


def fingerprints(tree: PyTree) -> dict[str, int]:
    """A 32-bit fingerprint of each array's bits, by its path in the tree. Equal for every sharding of the array."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    sharding = leaves[0].sharding
    # Every process wants to know all of them.
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    values = np.asarray(_jitted_fingerprints(everywhere)(list(leaves)))
    return {jax.tree_util.keystr(path): int(value) for path, value in zip(paths, values, strict=True)}


def _describe(tree: PyTree, prints: dict[str, int] | None = None) -> dict[str, dict[str, Any]]:
    """Shape and dtype of each array by its path, and its fingerprint if given; JSON-compatible."""
    arrays: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        arrays[name] = {"shape": list(leaf.shape), "dtype": str(jnp.dtype(leaf.dtype))}
        if prints:
            arrays[name]["fingerprint"] = prints[name]
    return arrays


class DamagedCheckpointError(Exception):
    """A checkpoint that can be read, but not as it was written."""


_CHECKSUM = "checksum"
# What versions before the checksum saved. Any other key without a checksum is a damaged one.
_KEYS_WITHOUT_CHECKSUM = {"arrays", "data", "window", "accuracy"}


def _checksum(step: int, contents: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([step, contents], sort_keys=True).encode()).hexdigest()


def _verified(step: int, extra: Any) -> dict[str, Any]:
    """The extra data of a checkpoint without their checksum.

    Raises:
      DamagedCheckpointError: they are not those that were saved for this step.
    """
    if not isinstance(extra, dict) or not isinstance(extra.get("arrays"), dict):
        raise DamagedCheckpointError("the description of its arrays is missing")
    contents = {name: value for name, value in extra.items() if name != _CHECKSUM}
    if _CHECKSUM in extra:
        intact = extra[_CHECKSUM] == _checksum(step, contents)
    else:
        intact = contents.keys() <= _KEYS_WITHOUT_CHECKSUM
    if not intact:
        raise DamagedCheckpointError(f"its contents do not match the checksum of step {step}")
    return contents


def _means_damage(error: Exception) -> bool:
    """Whether an error in reading says that the files are bad, rather than the memory or the disk of this machine."""
    passing = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED",
               "Out of memory")  # fmt: skip
    way_to_a_bucket = ("aiohttp", "gcsfs", "google", "requests")
    cause: BaseException | None = error
    while cause:  # Orbax wraps what TensorStore says
        if isinstance(cause, MemoryError) or any(word in str(cause) for word in passing):
            return False
        if type(cause).__module__.partition(".")[0] in way_to_a_bucket:
            return False
        cause = cause.__cause__ or cause.__context__
    return not isinstance(error, OSError) or isinstance(error, FileNotFoundError)


class Checkpoints:
    """The checkpoints of one kind in one folder, `<directory>/<step>/`."""

    def __init__(self, directory: AnyPath | str, *, keep: int):
        """Opens or creates the folder and clears away what an interrupted write left.

        Args:
          directory: where the checkpoints lie.
          keep: number of newest checkpoints kept.

        Raises:
          UserError: they are in a bucket that cannot be used.
        """
        self._directory = _absolute(parse_path(directory))
        try:
            self._manager = self._open(keep)
        except Exception as error:
            if not is_remote(self._directory):
                raise
            reason = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:500]
            raise UserError(
                f"cannot open the checkpoints in {self._directory}: {reason}. See docs/storage.md for permissions."
            ) from error

    def _open(self, keep: int) -> ocp.CheckpointManager:
        # Orbax's own option does this in a thread that nothing but the next save waits for.
        for half_written in ocp.utils.tmp_checkpoints(self._directory) if processes.is_main_process() else ():
            # In a bucket any folder without the commit object is one, even what somebody else put there.
            if not is_remote(self._directory) or half_written.get().name.isdigit():
                half_written.get().rmtree()
        processes.barrier(f"{self._directory.name} are tidy")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=self._directory.name),
            # A folder that cannot be made (full disk) is an error at once; made in the background, the other
            # threads would wait for it for minutes.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False,
                timeout_secs=_SAVE_SECONDS,
                barrier_sync_fn=_barrier_between_threads,
            ),
        )
        return ocp.CheckpointManager(self._directory, options=options, item_names=("tree", "extra"))

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, tree: PyTree, extra: dict[str, Any] | None = None) -> None:
        """Saves in the background; arrays are copied before this returns, so they may be donated.

        All processes must call it, as all other methods, and each writes what its devices hold.

        Args:
          step: names the checkpoint. If it exists already nothing is done.
          tree: arrays.
          extra: JSON-compatible data that belong to them.

        Raises:
          UserError: this or an earlier checkpoint could not be written.
        """
        if step == self.latest_step():
            return
        contents = {"arrays": _describe(tree, fingerprints(tree)), **(extra or {})}
        contents[_CHECKSUM] = _checksum(step, contents)
        args = ocp.args.Composite(tree=ocp.args.StandardSave(tree), extra=ocp.args.JsonSave(contents))

        def write() -> None:
            # Asked first, because a write that fails half-way leaves a mess of tracebacks from other threads.
            self._check_space(tree)
            if not self._manager.save(step, args=args):
                raise RuntimeError(f"step {step} is not beyond the newest checkpoint, {self.latest_step()}")

        self._guard(write)

    def wait(self) -> None:
        """Returns when all is on disk.

        Raises:
          UserError: a checkpoint could not be written.
        """
        self._guard(self._manager.wait_until_finished)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Ends the background work. After an error of one of several processes it is left alone: the others wait."""
        if kind is None or processes.process_count() == 1:
            self._guard(self._manager.close)

    def restore_latest(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Reads the newest whole checkpoint; damaged ones are set aside, with a warning.

        Args:
          like: a tree of arrays or `jax.ShapeDtypeStruct`s with the shapes, dtypes and shardings that are wanted.

        Returns:
          step, tree and extra data; None if there is no checkpoint.

        Raises:
          UserError: the checkpoint is of another model or optimizer, or there are checkpoints and all are damaged.
        """
        newest = self._newest_whole(lambda step: self._read(step, like), self._compare)
        if newest is None and self.latest_step() is not None:
            raise UserError(
                f"all checkpoints in {self._directory} are damaged. Nothing was changed; move the folder away to start "
                "from step 0."
            )
        if newest is None:
            return None
        step, (tree, extra, _) = newest
        return step, tree, extra

    def latest_extra(self) -> tuple[int, dict[str, Any]] | None:
        """Returns step and extra data of the newest intact checkpoint, or None. Damaged ones are set aside."""
        newest = self._newest_whole(self._read_extra)
        if newest is None:
            for step in self._manager.all_steps():
                self.set_aside(step, "damaged")
        return newest

    def set_aside(self, step: int, reason: str) -> None:
        """Renames a checkpoint, so that it is no longer one, but still there: `<reason>-<step>`."""
        if processes.is_main_process():
            self._rename_aside(step, reason)
        processes.barrier(f"{self._directory.name}/{step} is set aside")
        self._manager.reload()

    def _rename_aside(self, step: int, reason: str) -> None:
        number = 0
        while (aside := self._directory / f"{reason}-{step}{f'-{number}' if number else ''}").exists():
            number += 1
        _rename(self._directory / str(step), aside)
        logger.warning("set aside the checkpoint of step %d as %s", step, aside)

    def drop_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps: they will be made again."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def _newest_whole(
        self, read: Callable[[int], T], is_whole: Callable[[T], None] = lambda _: None
    ) -> tuple[int, T] | None:
        """The newest checkpoint that `read` reads and `is_whole` accepts, on all processes, by raising no error."""
        damaged: list[int] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            problem: Exception | None = None
            try:
                result = read(step)
            except UserError:
                raise
            except Exception as error:  # Orbax and TensorStore have no common error for damaged files
                problem = error
            # Each process reads its own part, and may find it damaged while others do not.
            broken = _anywhere(problem is not None)
            if not broken:
                try:
                    is_whole(result)
                except DamagedCheckpointError as error:
                    problem, broken = error, True
            if not broken:
                for each in damaged:  # only now that there is another to go on from
                    self.set_aside(each, "damaged")
                return step, result
            reason = "as another process found"
            if problem is not None:
                reason = f"{type(problem).__name__}: {re.sub(chr(10), ' ', str(problem))[:200]}"
                if not _means_damage(problem):
                    raise UserError(
                        f"cannot read the checkpoint of step {step} in {self._directory} ({reason}). It may be whole "
                        "and was left as it is; see to the cause and run the same command again."
                    ) from problem
            logger.warning("checkpoint of step %d is damaged (%s); trying the one before", step, reason)
            damaged.append(step)
        return None

    def _read_extra(self, step: int) -> dict[str, Any]:
        return _read_extra(self._manager, step)

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any], dict[str, int]]:
        """Reads this process's part of a checkpoint: tree, extra data, and the fingerprints that were saved."""
        extra = self._read_extra(step)
        saved = extra.pop("arrays")
        expected_prints = {name: array.pop("fingerprint") for name, array in saved.items()}
        wanted = _describe(like)
        if wanted != saved:
            differing = sorted(name for name in wanted.keys() | saved.keys() if wanted.get(name) != saved.get(name))
            raise UserError(
                f"the checkpoint of step {step} in {self._directory} is of another model, optimizer, rng or "
                f"polyak_decay; {len(differing)} arrays differ, such as {differing[0]}: "
                f"{saved.get(differing[0], 'absent')} there, {wanted.get(differing[0], 'absent')} here. Use the config "
                "it was written with, or another --workdir."
            )
        # On its own: together, a process that finds its part damaged would leave the others waiting for it.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=f"read_{jax.process_index()}",
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
            args = ocp.args.PyTreeRestore(
                abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=True,  # arrays were compared; what is None here may be absent from older checkpoints
            )
            tree = checkpointer.restore(self._directory / str(step) / "tree", args=args)
        _check_all_read(tree)
        return tree, extra, expected_prints

    @staticmethod
    def _compare(result: tuple[PyTree, dict[str, Any], dict[str, int]]) -> None:
        tree, _, expected_prints = result
        found_prints = fingerprints(tree)
        differing = [name for name, expected in expected_prints.items() if found_prints[name] != expected]
        if differing:
            raise DamagedCheckpointError(f"contents of {len(differing)} arrays changed, such as {differing[0]}")

    def _check_space(self, tree: PyTree) -> None:
        if is_remote(self._directory):
            return
        needed = int(1.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(tree))) + _SPACE_FOR_SMALL_FILES
        # Of one process, so that all come to the same conclusion.
        free = processes.broadcast_from_main("free space", shutil.disk_usage(self._directory).free)
        if free < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes needed, {free:,} free")

    def _guard(self, write: Callable[[], object]) -> None:
        try:
            write()
        except processes.PeerLostError:
            raise
        except Exception as error:  # any failure to write ends the run with the same advice
            reason = re.sub(r"\s+", " ", str(error))[:500]
            if is_remote(self._directory):  # which may be out of reach
                whole, advice = "", "See to the cause"
            else:
                steps = sorted(int(path.name) for path in self._directory.glob("[0-9]*") if path.name.isdigit())
                whole = f"Whole checkpoints there: {', '.join(map(str, steps)) or 'none'}. "
                advice = "Free some space (or mend the disk)"
            raise UserError(
                f"could not write a checkpoint to {self._directory}: {reason}\n"
                f"{whole}{advice} and run the same command again; it goes on from the newest one."
            ) from error


def _read_extra(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    restored = manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))
    return _verified(step, restored["extra"])


def _check_all_read(tree: PyTree) -> None:
    """Orbax returns the description of an array that it does not find, in place of the array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array):
            raise DamagedCheckpointError(f"array {jax.tree_util.keystr(path)} is missing")


def _barrier_between_threads(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier, but not after an error: the others never come to the one by which its threads then end."""
    if sys.exc_info()[0] is None:
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _anywhere(flag: bool) -> bool:
    """Whether any process says yes; all must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _absolute(directory: AnyPath) -> AnyPath:
    return directory if is_remote(directory) else directory.absolute()


def _rename(source: AnyPath, target: AnyPath) -> None:
    if not is_remote(source):
        source.rename(target)
        return
    import fsspec

    # Copied (by the store itself) and then deleted: a kill in between leaves the checkpoint in place, damaged as it
    # is, and the next start sets it aside again.
    files, _ = fsspec.core.url_to_fs(str(source))
    files.copy(f"{source}/", f"{target}/", recursive=True)
    files.rm(str(source), recursive=True)


_VERBOSITY = threading.Lock()


@contextlib.contextmanager
def _open_for_reading(directory: AnyPath) -> Iterator[ocp.CheckpointManager]:
    with _VERBOSITY:  # which is one for all threads
        verbosity = absl_logging.get_verbosity()
        absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns, three times, that it will not write
        try:
            options = ocp.CheckpointManagerOptions(read_only=True)
            manager = ocp.CheckpointManager(_absolute(directory), options=options, item_names=("tree", "extra"))
        finally:
            absl_logging.set_verbosity(verbosity)
    with manager:
        yield manager


def read_extra(directory: AnyPath | str) -> dict[str, Any] | None:
    """The extra data of the newest checkpoint, arrays unread; None if there is no checkpoint, or it is damaged."""
    directory = parse_path(directory)
    if not directory.is_dir():
        return None
    with _open_for_reading(directory) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        try:
            return manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore()))["extra"]
        except Exception:  # Orbax and TensorStore have no common error for damaged files
            return None


def read_parameters(directory: AnyPath | str) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """Reads the newest whole checkpoint's parameters, such as those of `<workdir>/best`, and changes nothing there.

    Args:
      directory: of the checkpoints; a run may be writing others meanwhile. From a whole training state, the parameters
        that would be evaluated are read: the average, if there is one.

    Returns:
      step, nested parameters as NumPy arrays, and the extra data; None if there is no checkpoint. A damaged checkpoint
      is passed over with a warning.

    Raises:
      UserError: all are damaged.
    """
    directory = parse_path(directory)
    if not directory.is_dir():
        return None
    with _open_for_reading(directory) as manager:
        problem: UserError | None = None
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                parameters, extra = _read_parameters_of(manager, _absolute(directory) / str(step), step)
            except Exception as error:  # Orbax and TensorStore have no common error for damaged files
                reason = re.sub(r"\s+", " ", str(error))[:200]
                verb = "is damaged" if isinstance(error, DamagedCheckpointError) else "cannot be read"
                message = f"the checkpoint of step {step} in {directory} {verb}: {reason}."
                if not _means_damage(error):
                    raise UserError(message) from error
                logger.warning("%s", message)
                problem = problem or UserError(message)
                continue
            if problem:
                logger.warning("using the checkpoint of step %d instead", step)
            return step, parameters, extra
        if problem:
            raise problem
        return None


def _read_parameters_of(
    manager: ocp.CheckpointManager, folder: AnyPath, step: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    extra = _read_extra(manager, step)
    described = extra.pop("arrays")
    part = next((name for name in ("average", "params") if any(p.startswith(f".{name}[") for p in described)), "")
    prefix = f".{part}" if part else ""
    described = {path.removeprefix(prefix): array for path, array in described.items() if path.startswith(f"{prefix}[")}
    like: dict[str, Any] = {}
    for path, array in described.items():
        *modules, leaf = re.findall(r"\['([^']+)'\]", path)
        node = like
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jax.ShapeDtypeStruct(
            array["shape"], array["dtype"], sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        )
    wanted = {part: like} if part else like
    args = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(folder / "tree", args=args)
    tree = tree[part] if part else tree
    _check_all_read(tree)
    found = fingerprints(tree)
    for path, array in described.items():
        if array["fingerprint"] != found[path]:
            raise DamagedCheckpointError(f"{path} changed on disk")
    return jax.tree.map(np.asarray, tree), extra
