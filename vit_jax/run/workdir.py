"""The workdir: one run's folder, and the record of how it came about.

config.json      the resolved config; a workdir belongs to one config
model.json       what the model was made with: the config's fields, and those that its weights say
facts.json       names of the classes, loss, preprocessing, examples: what a finished run is used by (vit_jax.run.facts)
starts.jsonl     one line a start: time, command, package versions, git commit, devices
metrics.jsonl    what was measured, by step; metrics.damaged.jsonl: a damaged one, kept
tensorboard/     the same as TensorBoard events
curves.png       the same as a picture
checkpoints/     states to resume from
best/            the parameters of the best evaluation
emergency/       the state of a run that failed, to look into
failure.json     why its loss was not finite
accounting.json  what each start cost
profile/         traces of steps (docs/profiling.md)
stacks-*.txt     what each thread was doing when a step hung
summary.md       the result as a table; summary.json for programs

It lies on a disk, or in a bucket (`gs://bucket/folder`; docs/storage.md says what is different there).
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config import base_config, flatten
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, delete_left_over, is_remote, lock, parse_path, write_atomically
from vit_jax.json_files import read_json_lines, read_object
from vit_jax.multihost import processes

logger = logging.getLogger(__name__)

parse = parse_path  # until all callers use vit_jax.files

FAILURE = "failure.json"

PACKAGES = ("vit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "simplejpeg",
            "opencv-python-headless", "pillow", "tensorflow-datasets", "array_record", "scikit-learn", "ml_collections",
            "clu")  # fmt: skip


def _append_line(path: AnyPath, line: str) -> None:
    if is_remote(path):
        write_atomically(path, (path.read_text() if path.exists() else "") + line + "\n")
    else:
        with path.open("a") as file:
            file.write(line + "\n")


# Fields that do not change a run's result.
_WITHOUT_EFFECT = (
    *("data.expected_train_images", "data.expected_within", "data.how_to_prepare"),
    *("data.num_threads", "data.num_workers", "data.prefetch", "data.max_bad_records"),
    # The same up to rounding, and so that a run goes on with what hardware is left.
    *("mesh.data", "mesh.model", "sharding", "sharding_rules", "model.remat", "eval_batch_size"),
    *("compiler_options", "watchdog_seconds", "profile.first_step", "profile.num_steps"),
)


class LockLostError(UserError):
    """Another process may have taken over the workdir; nothing more may be written there."""


def end_process(error: LockLostError) -> None:
    """Ends this process as if it were killed, which does no harm at any moment; to go on writing would."""
    logger.error("%s", error)
    logging.shutdown()
    os._exit(1)


@contextlib.contextmanager
def locked(workdir: AnyPath | str, *, on_lost: Callable[[LockLostError], None] = end_process) -> Iterator[None]:
    """Creates the workdir and keeps other processes out of it. A lock ends with its process, however that ends.

    In a bucket it ends a minute after a process that was killed; see `_leased`.

    Args:
      workdir: the run's folder.
      on_lost: is called, from another thread, when a lock in a bucket was lost: it could not be renewed in time.

    Raises:
      UserError: the folder cannot be written, or another process is at work in it.
    """
    workdir = parse(workdir)
    if is_remote(workdir):
        with _leased(f"{workdir}/", on_lost):
            try:
                workdir.exists()
            except Exception as error:  # gcsfs has its own ways to find credentials, and no common error
                raise UserError(f"cannot read the workdir {workdir}: {type(error).__name__}: {error}") from error
            yield
        return
    busy = f"another process is training in the workdir {workdir}. Wait for it, end it, or choose another --workdir."
    with lock(workdir / ".lock", busy):
        delete_left_over(workdir, *_TEMPORARY)
        yield


# Temporary files of `write_atomically` and `opened`.
_TEMPORARY = (f".*.{'[0-9a-f]' * 8}.tmp", f".seen-{'[0-9a-f]' * 32}")

_LOCK = ".lock"
_HEARTBEAT_SECONDS = 15.0
_LEASE_SECONDS = 60.0  # without a heartbeat


@contextlib.contextmanager
def _leased(url: str, on_lost: Callable[[LockLostError], None] = end_process) -> Iterator[None]:
    """Keeps other processes out of a store without file locks, by an object that its holder rewrites now and then.

    Every write names the version of the object it replaces and is refused if that is no longer there (GCS:
    `ifGenerationMatch`), so that of two processes one wins, whatever their clocks say. A lock that stands still for
    `_LEASE_SECONDS` belongs to a dead process and is taken over; one of a dead process on this machine at once.

    Args:
      url: the folder, for TensorStore; ends in a slash.
      on_lost: see `locked`.

    Raises:
      UserError: the store cannot be reached, or the lock's holder lives.
    """
    import tensorstore

    ours = uuid.uuid4().hex

    def beat() -> bytes:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"id": ours, "host": platform.node(), "pid": os.getpid(), "pids_of": _pids_of(), "time": now}
        return json.dumps(holder).encode()

    try:
        store = tensorstore.KvStore.open(url).result(timeout=_LEASE_SECONDS)
        version = _acquire(store, url, beat)
    except UserError:
        raise
    except Exception as error:  # TensorStore raises ValueError for nearly everything
        reason = f"no answer within {_LEASE_SECONDS:.0f} s" if isinstance(error, TimeoutError) else error
        raise UserError(f"cannot write to the workdir {url}: {reason}. Choose another --workdir.") from error
    ended = threading.Event()

    def keep() -> None:
        nonlocal version
        while not ended.wait(_HEARTBEAT_SECONDS):
            try:
                if written := store.write(_LOCK, beat(), if_equal=version).result().generation:
                    version = written
                    continue
                found = store.read(_LOCK).result()
            except Exception:  # the network is away; the next beat tells whether the lock is, too
                logger.warning("could not renew the lock of %s", url, exc_info=True)
                continue
            # An earlier beat may have arrived although it seemed to have failed.
            if found.value and json.loads(found.value)["id"] == ours:
                version = found.stamp.generation
                continue
            on_lost(LockLostError(f"the lock of {url} was taken over while this process could not renew it; ending."))
            return

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):  # it runs out by itself
            store.write(_LOCK, None, if_equal=version).result()


def _acquire(store: Any, url: str, beat: Callable[[], bytes]) -> bytes:
    """Waits for the lock as long as its holder may be dead; returns the version of the object that says it is ours."""
    seen, since = b"", 0.0
    while True:
        found = store.read(_LOCK).result(timeout=_LEASE_SECONDS)
        stands_still = found.value == seen and time.monotonic() - since > _LEASE_SECONDS
        if not found.value or stands_still or _is_dead(found.value):
            written = store.write(_LOCK, beat(), if_equal=found.stamp.generation).result(timeout=_LEASE_SECONDS)
            if written.generation:
                return written.generation
            continue
        lock = json.loads(found.value)
        holder = f"process {lock['pid']} on {lock['host']}, last seen at {lock['time']}"
        if not seen:
            seen, since = found.value, time.monotonic()
            logger.info("%s was locked by %s; waiting up to a minute to see whether it still lives", url, holder)
        elif found.value != seen:
            raise UserError(
                f"another process is training in the workdir {url}: {holder}. Wait for it, end it, or choose another "
                "--workdir."
            )
        time.sleep(1)


def _pids_of() -> str:
    """Names the set of processes that a process id is one of: a container of a machine since it was started."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_dead(lock: bytes) -> bool:
    holder = json.loads(lock)
    if not holder["pids_of"] or holder["pids_of"] != _pids_of():
        return False  # who knows
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@contextlib.contextmanager
def opened(
    workdir: AnyPath | str,
    config: ConfigDict,
    *,
    allow_config_change: bool = False,
    on_lost: Callable[[LockLostError], None] = end_process,
) -> Iterator[None]:
    """The workdir, locked and checked by the main process, for all processes; see `locked` and `check_config`.

    Raises:
      UserError: as these two; the processes have different configs, or another folder each.
    """
    workdir = parse(workdir)
    processes.check_same("config", json.dumps(flatten(json.loads(config.to_json())), indent=0, sort_keys=True))
    if not processes.is_main_process():
        token = processes.broadcast_from_main("workdir")
        if not (workdir / f".{token}").exists():
            raise UserError(
                f"process {processes.process_id()} does not see the files that process 0 writes into the workdir "
                f"{workdir}. It must be one folder for all: on a shared disk, or in a bucket (gs://...)."
            )
        processes.barrier("all see the workdir")
        yield
        return
    with locked(workdir, on_lost=on_lost):
        check_config(workdir, config, allow_config_change=allow_config_change)
        if processes.process_count() > 1:
            token = f"seen-{uuid.uuid4().hex}"
            write_atomically(workdir / f".{token}", "")
            try:
                processes.broadcast_from_main("workdir", token)
                processes.barrier("all see the workdir")
            finally:
                (workdir / f".{token}").unlink()
        yield


def _recorded_config(workdir: AnyPath, *, allow_config_change: bool) -> dict[str, Any] | None:
    """The config that the workdir belongs to; None if it is new.

    If `config.json` is damaged, the newest start that `starts.jsonl` records counts.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        return read_object(path, allow_nan=True)
    except UserError as error:
        starts = workdir / "starts.jsonl"
        configs = []
        if starts.exists():
            for _, start in read_json_lines(starts, allow_nan=True, on_error=lambda _: None):
                if isinstance(start, dict) and isinstance(start.get("config"), dict):
                    configs.append(start["config"])
        if configs:
            logger.warning("%s Using the config of the last start in starts.jsonl instead.", error)
            return configs[-1]
        if allow_config_change:
            logger.warning("%s It is written again.", error)
            return None
        raise UserError(
            f"{error} Pass --allow_config_change to resume with the config of this command, or choose another "
            "--workdir."
        ) from error


def check_config(workdir: AnyPath | str, config: ConfigDict, *, allow_config_change: bool = False) -> None:
    """Checks that the workdir is new or belongs to this config.

    Raises:
      UserError: it belongs to another config; says which fields differ.
    """
    workdir = parse(workdir)
    recorded = _recorded_config(workdir, allow_config_change=allow_config_change)
    if recorded is None:
        return
    # Fields that are younger than the workdir had their defaults.
    before = flatten(json.loads(base_config().to_json())) | flatten(recorded)
    now = flatten(json.loads(config.to_json()))
    changes = [
        f"  {name}: {before.get(name, '(absent)')!r} -> {now.get(name, '(absent)')!r}"
        for name in sorted(before.keys() | now.keys())
        if name not in _WITHOUT_EFFECT and before.get(name, "(absent)") != now.get(name, "(absent)")
    ]
    if changes and not allow_config_change:
        raise UserError(
            f"the workdir {workdir} belongs to another config. Fields that differ (there -> here):\n"
            + "\n".join(changes)
            + "\nChoose another --workdir, or pass --allow_config_change to go on with the new config."
        )


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" where it was changed; None where it is not in its own git checkout."""
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    try:
        # Installed below some other project's checkout, it is not that project's commit.
        _run([*git, "ls-files", "--error-unmatch", pathlib.Path(__file__).name])
        return _run([*git, "describe", "--always", "--abbrev=40", "--dirty", "--match="])
    except (OSError, subprocess.SubprocessError):
        return None


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603


def record_start(workdir: AnyPath | str, config: ConfigDict, *, step: int, devices: Mapping[str, Any]) -> None:
    """Writes `config.json`, and appends how and where this start runs to `starts.jsonl`.

    Args:
      workdir: the run's folder.
      config: the resolved config.
      step: the step it starts from.
      devices: from `sharding.describe_devices`.
    """
    workdir = parse(workdir)
    resolved = json.loads(config.to_json())
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.orig_argv),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "devices": dict(devices),
        "packages": versions,
        "config": resolved,
    }
    write_atomically(workdir / "config.json", json.dumps(resolved, indent=2, sort_keys=True) + "\n")
    _append_line(workdir / "starts.jsonl", json.dumps(record))


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps that were made with one config.

    Attributes:
      first_step: the step they began after.
      config: its fields, flat.
    """

    first_step: int
    config: dict[str, Any]


def read_segments(workdir: AnyPath | str) -> list[Segment]:
    """The configs that a run's parameters came about with, in the order of the steps, from `starts.jsonl`.

    A start that went on from an earlier checkpoint made the steps after that anew, so earlier starts no longer count
    for them. Lines that are damaged are left out.
    """
    workdir = parse(workdir)
    path = workdir / "starts.jsonl"
    segments: list[Segment] = []
    defaults = flatten(json.loads(base_config().to_json()))  # of fields that are younger than a start
    for _, line in read_json_lines(path, allow_nan=True, on_error=lambda _: None) if path.exists() else ():
        try:
            segment = Segment(int(line["step"]), defaults | flatten(line["config"]))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        while segments and segments[-1].first_step >= segment.first_step:
            segments.pop()
        if not segments or segments[-1].config != segment.config:
            segments.append(segment)
    return segments


def describe_changes(segments: Sequence[Segment]) -> list[str]:
    """What changed between the segments of a run, of what can change its result: a line each; [] for one config."""
    changes = []
    for before, after in itertools.pairwise(segments):
        for name in sorted(before.config.keys() | after.config.keys()):
            then, now = (segment.config.get(name, "(absent)") for segment in (before, after))
            if then != now and name not in _WITHOUT_EFFECT:
                changes.append(f"{name} {then} -> {now} from step {after.first_step + 1:,} on")
    return changes
