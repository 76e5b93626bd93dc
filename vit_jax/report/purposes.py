"""Whether a run's numbers are results or only choose values, by its sweep or command, or else by its split."""

import dataclasses
import math
import pathlib
import re
import shlex
import statistics
from collections.abc import Mapping
from typing import Any

from vit_jax.data.imagenet_test_sets import IMAGENET_TEST_SETS
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, is_remote
from vit_jax.json_files import read_json
from vit_jax.report.names import TEST_SPLITS, data_set_name
from vit_jax.run.run_result import not_finite

FINAL, CHOOSES, NOT_CHOSEN = "final", "chooses", "not chosen"

RESULTS, DESCRIPTION = "sweep.json", "sweep_config.json"  # of a sweep; the second is written first

_STAGED_CONFIGS = ("transfer.py", "vtab.py")  # their argument `stage` sets a run's purpose
_RULE = "argument.rule"  # among the values that a sweep of configs/transfer.py tries
_SETS_SPLITS = re.compile(r"-{1,2}config\.data\.(dataset|mixture|train_split|eval_split)\b")
_TEST_SPLITS = ("test", "testing")


@dataclasses.dataclass(frozen=True)
class Purpose:
    """The purpose of a run.

    Attributes:
      what: `FINAL`, or why it is not a result.
      held_out: for a final run, the split that its values were chosen on and their metric there, if recorded.
      rules: the best metric of each fine-tuning rule there, by its name in configs/transfer.py, if several were tried.
      step: the step that counts, if the sweep stopped early; None: the last.
    """

    what: str
    held_out: tuple[str, float] | None = None
    rules: Mapping[str, float] = dataclasses.field(default_factory=dict)
    step: int | None = None


def resolved(path: AnyPath) -> str:
    """A folder's canonical name, the same for all paths to it."""
    return str(path) if is_remote(path) else str(path.resolve())


class SweepPurposes:
    """The purposes that sweeps recorded for their runs."""

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, Purpose]] = {}  # by a sweep's folder: by a run's folder
        self._unfinished: set[str] = set()  # folders of sweeps without results

    def add(self, file: AnyPath) -> list[str]:
        """Reads a `sweep.json`, or the `sweep_config.json` of a sweep without results; returns remarks for readers.

        Raises `UserError` if the file is damaged.
        """
        folder = file.parent
        if resolved(folder) in self._runs:
            return []
        content = read_json(file, allow_nan=True)
        try:
            if file.name == RESULTS:
                purposes = _purposes_in(content)
            else:
                purposes = {str(run): Purpose(CHOOSES) for run in dict(content["tried"])}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{file} is damaged: it is not what a sweep writes ({error!r}).") from error
        self._runs[resolved(folder)] = {resolved(folder / run): purpose for run, purpose in purposes.items()}
        remarks = [f"{file}: {each}, which is not used" for each in not_finite(content)]
        if file.name == DESCRIPTION:
            self._unfinished.add(resolved(folder))
            remarks.append(f"{folder}: a sweep without results yet; its finished final runs count one by one")
        return remarks

    def purpose_of(self, folder: AnyPath) -> Purpose | None:
        """The purpose of a run by the innermost sweep that lists it; None if it belongs to no sweep."""
        run = resolved(folder)
        around = sorted((sweep for sweep in self._runs if run.startswith(sweep + "/")), key=len, reverse=True)
        if listed := next((self._runs[sweep] for sweep in around if run in self._runs[sweep]), None):
            return listed[run]
        folders = run.removeprefix(around[0] + "/").split("/")[:-1] if around else []
        if not {"trials", "final"} & set(folders):
            return None  # it is in the sweep's folder, but not in the sweep
        if around[0] not in self._unfinished:
            return Purpose(NOT_CHOSEN)
        return Purpose(CHOOSES) if "trials" in folders else None


def _purposes_in(content: Mapping[str, Any]) -> dict[str, Purpose]:
    """The purpose of each run in a `sweep.json`, by its folder relative to the sweep's."""
    purposes: dict[str, Purpose] = {}
    final: dict[str, Purpose] = {}
    for task in content["tasks"].values():
        of_final = _purpose_of_final(task, str(task.get("metric") or content.get("metric") or "accuracy"))
        for runs, found, purpose in ((task["trials"], purposes, Purpose(CHOOSES)), (task["final"], final, of_final)):
            for run in runs:
                step = run.get("step")
                if not isinstance(run["workdir"], str) or not (step is None or type(step) is int):
                    raise TypeError(f"workdir is {run['workdir']!r}, step is {step!r}")
                found[run["workdir"]] = dataclasses.replace(purpose, step=step)
    return purposes | final


def _purpose_of_final(task: Mapping[str, Any], metric: str) -> Purpose:
    """The purpose of a task's final runs, with its trials' metrics if all were measured on the same split."""
    plain, splits = metric.rpartition("/")[2], set()
    reached: dict[str, tuple[dict[str, Any], list[float]]] = {}  # values and metrics of each candidate
    for run in task["trials"]:
        values = {name: value for name, value in dict(run.get("overrides") or {}).items() if name != "seed"}
        for name, value in dict(run.get("metrics") or {}).items():
            split, _, its = name.rpartition("/")
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if its == plain and is_number and split not in ("train", *IMAGENET_TEST_SETS) and "/" not in split:
                splits.add(split)
                reached.setdefault(str(sorted(values.items())), (values, []))[1].append(float(value))
    chosen = [statistics.fmean(found) for values, found in reached.values() if values == task.get("chosen")]
    if len(splits) != 1 or not chosen:
        return Purpose(FINAL)
    rules: dict[str, float] = {}
    for values, found in reached.values():
        if rule := values.get(_RULE):
            rules[str(rule)] = max(rules.get(str(rule), -math.inf), statistics.fmean(found))
    return Purpose(FINAL, (splits.pop(), chosen[0]), rules if len(rules) > 1 else {})


def study_of(command: str) -> str:
    """The figure or table of the paper that a run's page in configs/studies/ is for, like "figure_4"; "" if none."""
    found = re.search(r"--?config[= ]\S*studies/(?:(figure|table)(\d+)_\w*|(masked_patches))\.py", command)
    return (found[3] or f"{found[1]}_{found[2]}") if found else ""


def stage_of(command: str) -> str | None:
    """The purpose of a run by the command that started it; None if the command does not say.

    The configs for transfer have stages, of which "final" is the default. A command that sets the splits itself has
    no stage.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    configs = re.findall(r"(?:^|\0)--?config[=\0]([^\0:]*):?([^\0]*)", "\0".join(words))
    file, argument = configs[-1] if configs else ("", "")
    if pathlib.PurePath(file).name not in _STAGED_CONFIGS or any(_SETS_SPLITS.match(word) for word in words):
        return None
    stages = re.findall(r"(?:^|,)stage=([^,]*)", argument) or ["final"]
    return {"final": FINAL, "choose": CHOOSES}.get(stages[-1])


def purpose_by_split(dataset: str, split: str) -> tuple[str, bool]:
    """The purpose of a fine-tuned model's accuracy on a split, if none is recorded.

    Returns:
      `FINAL`, or why it is not a result; and whether that is certain: a split of a user's data set may be its test set
      under another name.
    """
    chooses = f"{CHOOSES} (measured on {split})"
    test_split = "test" if dataset.startswith("vtab:") else TEST_SPLITS.get(data_set_name(dataset))
    if test_split is not None:
        return FINAL if split == test_split else chooses, True
    plain = split.replace(" ", "").casefold()
    if plain.startswith(tuple(f"{name}[" for name in _TEST_SPLITS)):
        return f"measured on {split}, a part of the test set", True
    # An image folder without splits is one split, "all"; its last part is the test set (`vit_jax.data.transfer_tasks`).
    if plain in (*_TEST_SPLITS, "all[90%:]"):
        return FINAL, True
    return chooses, plain.startswith("all[") or plain in ("all", "train", "full")
