"""Reads the files of a run's workdir. A damaged file is a `UserError` that names it."""

import contextlib
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.config import base_config, flatten, with_present_names
from vit_jax.errors import UserError
from vit_jax.files import AnyPath
from vit_jax.json_files import Fields, read_json, read_object
from vit_jax.run.facts import RunFacts, read_facts
from vit_jax.run.metrics import TIME_PREFIX, read_jsonl
from vit_jax.run.workdir import FAILURE, Start, defaults, read_starts

_DIVERGED = re.compile(r"\S+ is (nan|inf|-inf) at step \d+")  # as in `vit_jax.run.journal.NonFiniteError`

# Fields of a config that code computes with, and those of them that may be None.
_TYPED = (
    *("seed", "batch_size", "train_only", "data.dataset", "data.train_split", "data.image_size", "data.mixture"),
    *("evals.fewshot.datasets", "evals.fewshot.test_split", "checkpoint.keep_best"),
)
_OPTIONAL = (
    *("weights", "polyak_decay", "data.eval_split", "data.eval_labels"),
    *("evals.fewshot.image_size", "evals.fewshot.crop_from"),
)


class RunResult:
    """A run's workdir, in the folder `path`. Each file is read once, when it is first needed."""

    def __init__(self, path: AnyPath):
        self.path = path

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The recorded config; see `config_fields`."""
        file = self.path / "config.json"
        return config_fields(read_json(file, allow_nan=True), file)

    @functools.cached_property
    def model(self) -> dict[str, Any] | None:
        """The arguments of `create_model`; None if an old version trained the run."""
        file = self.path / "model.json"
        if not file.exists():
            return None
        model = read_object(file, allow_nan=True)
        Fields(model, str(file)).text("name")
        return model

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`; {} if the run did not finish."""
        file = self.path / "summary.json"
        if not file.exists():
            return {}
        summary = read_object(file, allow_nan=True)  # a loss may be NaN
        fields = Fields(summary, str(file))
        fields.integer("steps", None, at_least=0), fields.text("model", None)
        fields.number("epochs", None, at_least=0), fields.number("tpuv3_core_days", None, at_least=0)
        return summary

    @property
    def steps(self) -> int | None:
        """The length of a finished run."""
        return self.summary.get("steps")

    @property
    def overlap(self) -> dict[str, int]:
        """The number of examples of each evaluation that were trained on."""
        return counts(self.summary.get("overlap"))

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`."""
        file = self.path / "metrics.jsonl"
        try:
            rows = read_jsonl(file)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}.") from error
        if not all("step" in row for row in rows):
            raise UserError(f"{file} is damaged: a row has no step.")
        return [row for row in rows if type(row["step"]) is int]

    @property
    def metrics(self) -> dict[str, Any]:
        """The last value of each metric, without times."""
        return self.metrics_at(None)

    def metrics_at(self, step: int | None) -> dict[str, Any]:
        """The last value of each metric, without times, up to and including a step; None: the last step."""
        last: dict[str, Any] = {}
        for row in self.rows:
            if step is None or row["step"] <= step:
                last |= row
        return {name: value for name, value in last.items() if name != "step" and not name.startswith(TIME_PREFIX)}

    def best_step(self, metric: str) -> int | None:
        """The step at which a metric was best, the first of several: the largest, or the smallest of a loss.

        None if the metric was never finite.
        """
        sign = -1 if metric.endswith("loss") else 1
        values = [(row["step"], row[metric]) for row in self.rows if isinstance(row.get(metric), int | float)]
        finite = [(sign * value, -step) for step, value in values if math.isfinite(value)]
        return -max(finite)[1] if finite else None

    @functools.cached_property
    def facts(self) -> RunFacts | None:
        """The run's facts about its data; None if they are missing or damaged."""
        try:
            return read_facts(self.path)
        except UserError:
            return None

    @functools.cached_property
    def starts(self) -> list[Start]:
        """The starts that can be read, in the order of time."""
        starts = []
        with contextlib.suppress(UserError):
            for start in read_starts(self.path, _YOUNGER):
                check_types(start.fields, self.path / "starts.jsonl")
                starts.append(start)
        return starts

    @functools.cached_property
    def failure(self) -> str:
        """The reason why a run that did not finish failed; "" if it did not fail."""
        if (self.path / FAILURE).exists():
            return str(read_object(self.path / FAILURE).get("reason", "the reason was not recorded"))
        failed_at, saved_at = (_newest_step(self.path / folder) for folder in ("emergency", "checkpoints"))
        return f"an error at step {failed_at}, whose state is in emergency/" if failed_at > saved_at else ""

    @property
    def status(self) -> str:
        """One of "finished", "diverged", "failed", "unfinished" and "missing"."""
        if (self.path / "summary.json").exists():
            return "finished"
        if self.failure:
            return "diverged" if self.divergence else "failed"
        return "unfinished" if (self.path / "config.json").exists() else "missing"

    @property
    def divergence(self) -> str:
        """The part of `failure` that says which number was not finite; "" if the run did not diverge."""
        found = _DIVERGED.search(self.failure)
        return found[0] if found else ""


def _newest_step(folder: AnyPath) -> int:
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=-1)


def counts(overlap: Any) -> dict[str, int]:
    """The positive whole numbers of an object in JSON."""
    given = overlap.items() if isinstance(overlap, dict) else ()
    return {name: count for name, count in given if type(count) is int and count > 0}


# Fields whose default differs from the behaviour of earlier versions, which did not have the field.
_YOUNGER = {"data.exif_orientation": False}


@functools.cache
def _types() -> dict[str, type]:
    """The type of each field in `_TYPED` and `_OPTIONAL`."""
    groups = {name: name.rpartition(".") for name in (*_TYPED, *_OPTIONAL)}
    config = base_config()
    return {name: (config[group] if group else config).get_type(field) for name, (group, _, field) in groups.items()}


def config_fields(config: Any, path: AnyPath) -> dict[str, Any]:
    """Returns the fields of a recorded config, flat and with defaults; raises `UserError` if it is not a config."""
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict) or "batch_size" not in config:
        raise UserError(f"{path} is not a config of vit_jax.")
    fields = {**defaults(), **_YOUNGER, **with_present_names(flatten(config))}
    check_types(fields, path)
    return fields


def check_types(fields: Mapping[str, Any], path: AnyPath) -> None:
    """Checks the types of the fields that code computes with; raises `UserError` for one that no config has."""
    names = {name: name for name in _types()}
    for name in fields:
        entry, _, field = name.rpartition(".")
        if f"evals.fewshot.{field}" in names and fields.get(f"{entry}.type") == "fewshot":
            names[name] = f"evals.fewshot.{field}"
    for name, like in names.items():
        value, kind = fields[name], _types()[like]
        as_json: Any = {tuple: list, float: (int, float)}.get(kind, kind)
        if value is None and like in _OPTIONAL:
            continue
        if not isinstance(value, as_json) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{path}: {name} is {value!r}, which is invalid.")
    if not all(isinstance(part, list) and len(part) == 2 for part in fields["data.mixture"]):
        raise UserError(f"{path}: data.mixture is {fields['data.mixture']!r}, which is invalid.")


def not_finite(content: Any, name: str = "") -> list[str]:
    """Says which numbers in a JSON value are not finite."""
    if isinstance(content, float) and not math.isfinite(content):
        return [f"{name} is {content}"]
    inside = {f"{name}.{key}".lstrip("."): each for key, each in content.items()} if isinstance(content, dict) else {}
    if isinstance(content, list):
        inside = {f"{name}[{index}]": each for index, each in enumerate(content)}
    return [found for key, each in inside.items() for found in not_finite(each, key)]
