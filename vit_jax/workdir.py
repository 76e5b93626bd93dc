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

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import uuid
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

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


def prepare(workdir: pathlib.Path, config: ConfigDict, *, allow_config_change: bool = False) -> None:
    """Creates the workdir, or checks that it is this config's, and records the config.

    Raises:
      UserError: the folder cannot be written, or belongs to another config.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".{uuid.uuid4().hex[:8]}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir}: {error.strerror}. Choose another --workdir."
        ) from error

    path = workdir / "config.json"
    now = json.loads(config.to_json())
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}). Move the workdir away, or choose another.") from error
        old, new = flatten(before), flatten(now)
        changes = [
            f"  {name}: {old.get(name, '(absent)')!r} -> {new.get(name, '(absent)')!r}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name, "(absent)") != new.get(name, "(absent)")
        ]
        if changes and not allow_config_change:
            raise UserError(
                f"the workdir {workdir} belongs to another config. Fields that differ (there -> here):\n"
                + "\n".join(changes)
                + "\nChoose another --workdir, or pass --allow_config_change to go on with the new config."
            )
    write_atomically(path, json.dumps(now, indent=2, sort_keys=True) + "\n")


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" where it was changed; None outside a git checkout."""
    folder = pathlib.Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--match="]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None


def record_start(workdir: pathlib.Path, *, step: int, devices: Mapping[str, Any]) -> None:
    """Appends how and where this start runs to `starts.jsonl`.

    Args:
      workdir: the run's folder.
      step: the step it starts from.
      devices: from `partitioning.describe_devices`.
    """
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
    }
    with (workdir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
