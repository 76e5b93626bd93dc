"""The workdir: one run's folder, and the record of how it came about.

config.json      the resolved config; a workdir belongs to one config
starts.jsonl     one line a start: time, command, package versions, git commit, devices
metrics.jsonl    what was measured, by step
tensorboard/     the same as TensorBoard events
curves.png       the same as a picture
checkpoints/     states to resume from
best/            the parameters of the best evaluation
summary.md       the result as a table; summary.json for programs
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config import base_config
from vit_jax.errors import UserError

PACKAGES = ("vit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "simplejpeg",
            "opencv-python-headless", "scikit-learn", "ml_collections", "clu")  # fmt: skip


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a text file so that a reader sees the old content or the new, whole."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested fields: `{"model": {"name": "x"}}` to `{"model.name": "x"}`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


# Fields that cannot change a run's result.
_WITHOUT_EFFECT = ("data.expected_train_images", "data.how_to_prepare", "data.num_threads", "data.prefetch")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Creates the workdir and keeps other processes out of it. A lock ends with its process, however that ends.

    Raises:
      UserError: the folder cannot be written, or another process is at work in it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write to the workdir {workdir}: {reason}. Choose another --workdir.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in the workdir {workdir}. Wait for it, end it, or choose another "
                "--workdir."
            ) from error
        yield


def check_config(workdir: pathlib.Path, config: ConfigDict, *, allow_config_change: bool = False) -> None:
    """Checks that the workdir is new or belongs to this config.

    Raises:
      UserError: it belongs to another config; says which fields differ.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        recorded = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Move the workdir away, or choose another.") from error
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


def record_start(workdir: pathlib.Path, config: ConfigDict, *, step: int, devices: Mapping[str, Any]) -> None:
    """Writes `config.json`, and appends how and where this start runs to `starts.jsonl`.

    Args:
      workdir: the run's folder.
      config: the resolved config.
      step: the step it starts from.
      devices: from `partitioning.describe_devices`.
    """
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
    with (workdir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
