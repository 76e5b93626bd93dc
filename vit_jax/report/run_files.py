"""Files of runs, evaluations and sweeps, read without trust: each fault is a `DamagedError` that says what is wrong."""

import dataclasses
import functools
import json
import math
import types
from collections.abc import Mapping
from typing import Any

from vit_jax.config import base_config, flatten
from vit_jax.errors import UserError
from vit_jax.json_files import read_json, read_json_lines
from vit_jax.run.metrics import read_jsonl
from vit_jax.run.workdir import AnyPath


class DamagedError(Exception):
    """A file that is not what it should be. The message says which, and how."""


@dataclasses.dataclass(frozen=True)
class Start:
    """A start of a run: the step it went on from, its command, and its config, flat."""

    step: int
    command: str
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that has a run's config.json.

    Attributes:
      path: the folder.
      fields: of its config, flat.
      model: what its model was made with; None where no file says it.
      summary: {} if it did not finish.
      starts: as far as they were recorded.
      facts: of the data it was trained and evaluated on; {} where they were not recorded.
    """

    path: AnyPath
    fields: dict[str, Any]
    model: dict[str, Any] | None
    summary: dict[str, Any]
    starts: tuple[Start, ...] = ()
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def fingerprint(self, which: str) -> str | None:
        """The fingerprint of the images of "train" or "eval"; None where it was not recorded."""
        found = self._fact(which, "fingerprint")
        return found if isinstance(found, str) else None

    def num_images(self, which: str) -> int | None:
        """How many images "train" or "eval" has; None where it was not recorded."""
        found = self._fact(which, "num_images")
        return found if type(found) is int and found > 0 else None

    def _fact(self, which: str, name: str) -> Any:
        of_split = self.facts.get(which)
        return of_split.get(name) if isinstance(of_split, dict) else None

    @property
    def steps(self) -> int | None:
        """How long it was; None if it did not finish."""
        return self.summary.get("steps")


def read(path: AnyPath) -> Any:
    """The content of a JSON file, where Python's NaN and infinities are numbers."""
    try:
        return read_json(path, allow_nan=True)
    except UserError as error:
        raise DamagedError(f"{path}: cannot be read: {error}") from error


def read_object(path: AnyPath) -> dict[str, Any]:
    """The same, for one that holds an object."""
    content = read(path)
    if not isinstance(content, dict):
        raise DamagedError(f"{path}: not an object {{...}}")
    return content


# What is computed with: types, and whether None is a value as well.
_EXPECTED: dict[str, tuple[type | tuple[type, ...], bool]] = {
    "seed": (int, False),
    "weights": (str, True),
    "batch_size": (int, False),
    "data.dataset": (str, False),
    "data.train_split": (str, False),
    "data.eval_split": (str, True),
    "data.eval_labels": (str, True),
    "data.image_size": (int, False),
    "data.mixture": ((list, tuple), False),
    "train_only": ((list, tuple), False),
    "polyak_decay": ((int, float), True),
    "fewshot.datasets": ((list, tuple), False),
    "fewshot.test_split": (str, False),
    "fewshot.image_size": (int, True),
    "fewshot.crop_from": (int, True),
    "checkpoint.keep_best": (bool, False),
}


@functools.cache
def defaults() -> Mapping[str, Any]:
    """The default of each field of a config, as JSON has it."""
    return types.MappingProxyType(flatten(json.loads(base_config().to_json())))


# Fields whose default does something that earlier versions, which did not have them, never did.
_BEFORE = {"data.exif_orientation": False}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recorded config, flat; those that are younger than the record have what was done before."""
    return {**defaults(), **_BEFORE, **flatten(config)}


def as_fields(config: Any, path: AnyPath) -> dict[str, Any]:
    """The fields of a recorded config, checked; see `with_defaults`."""
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict) or "batch_size" not in config:
        raise DamagedError(f"{path}: no config of vit_jax")
    fields = with_defaults(config)
    for name, (kind, is_optional) in _EXPECTED.items():
        value = fields[name]
        if not (isinstance(value, kind) or (value is None and is_optional)) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise DamagedError(f"{path}: {name} is {value!r}, which no config has")
    if not all(isinstance(each, list | tuple) and len(each) == 2 for each in fields["data.mixture"]):
        raise DamagedError(f"{path}: data.mixture is {fields['data.mixture']!r}, which no config has")
    return fields


def read_run(folder: AnyPath) -> Run | None:
    """The run in a folder; None where there is none.

    Raises:
      DamagedError: a file of it cannot be read, or holds something else.
    """
    if not (folder / "config.json").exists():
        return None
    fields = as_fields(read(folder / "config.json"), folder / "config.json")
    model = read_object(folder / "model.json") if (folder / "model.json").exists() else None
    if model is not None and not isinstance(model.get("name"), str):
        raise DamagedError(f"{folder / 'model.json'}: it names no model")
    summary = read_object(folder / "summary.json") if (folder / "summary.json").exists() else {}
    _check_summary(summary, folder / "summary.json")
    try:
        facts = read_object(folder / "facts.json") if (folder / "facts.json").exists() else {}
    except DamagedError:
        facts = {}  # nothing is lost but a comparison
    return Run(folder, fields, model, summary, read_starts(folder), facts)


def _check_summary(summary: Mapping[str, Any], path: AnyPath) -> None:
    """Checks what is computed with. A number that is not finite is an error of the run."""
    for name in ("steps", "epochs", "tpuv3_core_days"):
        if (value := summary.get(name)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise DamagedError(f"{path}: {name} is {value!r}, not a finite number")
    if not isinstance(summary.get("steps", 0), int):
        raise DamagedError(f"{path}: steps is {summary['steps']!r}, not a whole number")
    if not isinstance(summary.get("model", ""), str):
        raise DamagedError(f"{path}: model is {summary['model']!r}, not a name")


def read_rows(workdir: AnyPath) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`."""
    try:
        rows = read_jsonl(workdir / "metrics.jsonl")
        return [row for row in rows if type(row["step"]) is int]
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{workdir}: metrics.jsonl is damaged ({error})") from error


def read_starts(workdir: AnyPath) -> tuple[Start, ...]:
    """The starts of a run, in their order; those whose line is damaged are left out."""
    path, starts = workdir / "starts.jsonl", []
    if not path.exists():
        return ()
    try:
        for _, row in read_json_lines(path, allow_nan=True, on_error=lambda _: None):
            if isinstance(row, dict) and type(row.get("step")) is int and isinstance(row.get("config"), dict):
                fields = with_defaults(row["config"])
                starts.append(Start(row["step"], str(row.get("command", "")), fields))
    except UserError:
        pass
    return tuple(starts)


def not_finite(content: Any, name: str = "") -> list[str]:
    """Where in a JSON value there are numbers that are not finite."""
    if isinstance(content, float) and not math.isfinite(content):
        return [f"{name} is {content}"]
    if isinstance(content, dict):
        return [found for key, each in content.items() for found in not_finite(each, f"{name}.{key}".lstrip("."))]
    if isinstance(content, list):
        return [found for place, each in enumerate(content) for found in not_finite(each, f"{name}[{place}]")]
    return []
