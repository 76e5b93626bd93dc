"""The workdir, a run's folder: its lock, its config, and the record of its starts.

config.json      the resolved config; a workdir belongs to one config
model.json       attributes of the model: the config's fields, and those that come from its weights
facts.json       class names, loss, preprocessing and examples, to use a finished run (vit_jax.run.facts)
starts.jsonl     one line per start: time, command, package versions, git commit, devices
metrics.jsonl    metrics by step; metrics.damaged.jsonl: a copy of a damaged file
tensorboard/     the same as TensorBoard events
curves.png       the same as a picture
checkpoints/     states to resume from
best/            the parameters of the best evaluation
emergency/       the state of a run that failed, to examine
failure.json     why it failed
accounting.json  cost of each start
profile/         traces of steps (docs/profiling.md)
stacks-*.txt     stacks of all threads when a step hung
summary.md       the result as a table; summary.json for programs

It is on a disk or in a bucket (`gs://bucket/folder`; docs/storage.md explains the differences).
"""

import contextlib
import dataclasses
import datetime
import functools
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
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config import base_config, flatten, with_present_names
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, delete_left_over, is_remote, lock, parse_path, write_atomically
from vit_jax.json_files import JsonError, read_json_lines, read_object
from vit_jax.multihost import processes
from vit_jax.run.lease import LockLostError, lease

logger = logging.getLogger(__name__)

FAILURE = "failure.json"

PACKAGES = ("vit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "simplejpeg",
            "opencv-python-headless", "pillow", "tensorflow-datasets", "array_record", "scikit-learn", "ml_collections",
            "clu")  # fmt: skip

# Fields that change results only by rounding, each with the reason: a run may resume with other values. A name that
# ends in a dot is a group of fields.
WITHOUT_EFFECT = {
    "data.expected_train_images": "it is only compared with the data set",
    "data.expected_within": "it is only compared with the data set",
    "data.how_to_prepare": "it is part of a message",
    "data.num_threads": "the order of examples does not depend on it",
    "data.num_workers": "the order of examples does not depend on it",
    "data.prefetch": "the order of examples does not depend on it",
    "data.max_bad_records": "a run with more bad images ends; which images are bad is up to the data",
    "mesh.": "the same sums in another order; with rng='rbg' also other draws of the same noise, as with another seed",
    "sharding": "the same sums in another order",
    "sharding_rules": "the same sums in another order",
    "model.remat": "it computes the same again instead of keeping it",
    "compiler_options": "the same operations in another program",
    "eval_batch_size": "the same sums in another order",
    "watchdog_seconds": "it ends a run that hangs",
    "profile.": "it records what is computed",
}


# Temporary files of `write_atomically` and `opened`.
_TEMPORARY = (f".*.{'[0-9a-f]' * 8}.tmp", f".seen-{'[0-9a-f]' * 32}")


def end_process(error: LockLostError) -> None:
    """Ends this process as a kill would. That is safe at any moment, unlike further writes."""
    logger.error("%s", error)
    logging.shutdown()
    os._exit(1)


@contextlib.contextmanager
def locked(workdir: AnyPath | str, *, on_lost: Callable[[LockLostError], None] = end_process) -> Iterator[None]:
    """Creates the workdir and keeps other processes out of it. The lock ends with the process, even if it is killed.

    In a bucket it ends a minute after a process that was killed; see `vit_jax.run.lease`. `on_lost` is called from
    another thread when the lock was not renewed in time there and is lost.

    Raises:
      UserError: the folder cannot be written, or another process is at work in it.
    """
    workdir = parse_path(workdir)
    if is_remote(workdir):
        with lease(f"{workdir}/", on_lost):
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


@contextlib.contextmanager
def opened(
    workdir: AnyPath | str,
    config: ConfigDict,
    *,
    allow_config_change: bool = False,
    on_lost: Callable[[LockLostError], None] = end_process,
) -> Iterator[None]:
    """Locks and checks the workdir, in the main process for all processes; see `locked` and `check_config`.

    Raises:
      UserError: as in these two; or the processes have different configs or folders.
    """
    workdir = parse_path(workdir)
    processes.check_same("config", json.dumps(_fields(config), indent=0, sort_keys=True))
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


def _fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a config, flat, as JSON has them."""
    return flatten(json.loads(config.to_json()))


@functools.cache
def defaults() -> Mapping[str, Any]:
    """The default of each field of a config, flat, as JSON has it."""
    return types.MappingProxyType(_fields(base_config()))


def is_among(name: str, names: Iterable[str]) -> bool:
    """Whether a list names a field, by its name or as one of a group, such as "mesh."."""
    return any(name == each or (each.endswith(".") and name.startswith(each)) for each in names)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """Fields that changed and are not ignored, with both values."""
    values = {name: (before.get(name, "(absent)"), now.get(name, "(absent)")) for name in sorted({**before, **now})}
    return {name: (old, new) for name, (old, new) in values.items() if old != new and not is_among(name, ignored)}


def check_config(workdir: AnyPath | str, config: ConfigDict, *, allow_config_change: bool = False) -> None:
    """Checks that the workdir is new or has this config; raises `UserError` with the fields that differ.

    Fields newer than the workdir count with their defaults.
    """
    workdir = parse_path(workdir)
    recorded = _recorded_config(workdir, allow_config_change=allow_config_change)
    if recorded is None:
        return
    changes = _changed({**defaults(), **with_present_names(flatten(recorded))}, _fields(config), WITHOUT_EFFECT)
    if changes and not allow_config_change:
        lines = [f"  {name}: {before!r} -> {now!r}" for name, (before, now) in changes.items()]
        raise UserError(
            f"the workdir {workdir} belongs to another config. Fields that differ (there -> here):\n"
            + "\n".join(lines)
            + "\nChoose another --workdir, or pass --allow_config_change to resume with the new config."
        )


def _recorded_config(workdir: AnyPath, *, allow_config_change: bool) -> dict[str, Any] | None:
    """The config that the workdir belongs to, that of the last start if `config.json` is damaged; None if it is new."""
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        return read_object(path, allow_nan=True)
    except JsonError as error:
        if starts := _recorded_starts(workdir):
            logger.warning("%s Using the config of the last start in starts.jsonl instead.", error)
            return starts[-1]["config"]
        if allow_config_change:
            logger.warning("%s It is written again.", error)
            return None
        raise UserError(
            f"{error} Pass --allow_config_change to resume with the config of this command, or choose another "
            "--workdir."
        ) from error


def record_start(workdir: AnyPath | str, config: ConfigDict, *, step: int, devices: Mapping[str, Any]) -> None:
    """Writes `config.json`, and appends to `starts.jsonl` how and where a start from `step` runs.

    `devices` is from `sharding.describe_devices`.
    """
    workdir = parse_path(workdir)
    resolved = json.loads(config.to_json())
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
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
    path, line = workdir / "starts.jsonl", json.dumps(record) + "\n"
    if is_remote(path):
        write_atomically(path, (path.read_text() if path.exists() else "") + line)
    else:
        with path.open("a") as file:
            file.write(line)


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" if it was changed; None if it is not in its own git checkout."""

    def run(*arguments: str) -> str:
        command = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603

    try:
        # Installed below another project's checkout, the code is not that project's commit.
        run("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
        return run("describe", "--always", "--abbrev=40", "--dirty", "--match=")
    except (OSError, subprocess.SubprocessError):
        return None


@dataclasses.dataclass(frozen=True)
class Start:
    """A start of a run: the step it resumed from, its command, its config with defaults, flat, and its devices."""

    step: int
    command: str
    fields: dict[str, Any]
    device_kind: str = ""


def read_starts(workdir: AnyPath | str, younger: Mapping[str, Any] = types.MappingProxyType({})) -> list[Start]:
    """Reads the starts of a run from `starts.jsonl`, in order of time, without damaged lines.

    `younger` has values of fields newer than a start, if they are not the defaults.
    """
    before = {**defaults(), **younger}
    return [
        Start(
            each["step"],
            str(each.get("command", "")),
            {**before, **with_present_names(flatten(each["config"]))},
            _device_kind(each.get("devices")),
        )
        for each in _recorded_starts(parse_path(workdir))
    ]


def _device_kind(devices: Any) -> str:
    return str(devices.get("device_kind", "")) if isinstance(devices, dict) else ""


def _recorded_starts(workdir: AnyPath) -> list[dict[str, Any]]:
    path = workdir / "starts.jsonl"
    lines = read_json_lines(path, allow_nan=True, on_error=lambda _: None) if path.exists() else ()
    return [
        line
        for _, line in lines
        if isinstance(line, dict) and type(line.get("step")) is int and isinstance(line.get("config"), dict)
    ]


def describe_changes(
    starts: Iterable[Start],
    ignored: Iterable[str] = WITHOUT_EFFECT,
    resolve: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields,
) -> list[str]:
    """Describes how the config changed during a run, with one line per field; [] if it did not.

    A start that resumed from an earlier checkpoint repeated the steps after it: earlier starts do not count for these.
    Fields in `ignored` do not count. `resolve` converts the fields of a start before they are compared.
    """
    kept: list[Start] = []
    for start in starts:
        while kept and kept[-1].step >= start.step:
            kept.pop()
        kept.append(start)
    return [
        f"{name} {before} -> {now} from step {after.step + 1:,} on"
        for start, after in itertools.pairwise(kept)
        for name, (before, now) in _changed(resolve(start.fields), resolve(after.fields), ignored).items()
    ]
