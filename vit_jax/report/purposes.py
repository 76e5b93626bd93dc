"""What a run is for: its result counts, or it only chooses. Records decide; then what the protocol says of a split."""

import dataclasses
import itertools
import math
import pathlib
import re
import shlex
import statistics
from collections.abc import Mapping
from typing import Any

from vit_jax.data.sources.imagenet_variants import VARIANTS
from vit_jax.data.transfer_tasks import STAGES, TASKS
from vit_jax.report.names import data_set_name
from vit_jax.report.run_files import DamagedError, not_finite, read
from vit_jax.run.workdir import AnyPath, is_remote

FINAL, CHOOSES, NOT_CHOSEN = "final", "chooses", "not chosen"

RULE = "argument.rule"  # among the values that a sweep of configs/transfer.py tries

_STAGED_CONFIGS = ("transfer.py", "vtab.py")  # whose argument `stage` says what a run is for
_DECIDES_SPLITS = re.compile(r"-{1,2}config\.data\.(dataset|mixture|train_split|eval_split)\b")
_WHOLE_TEST = ("test", "testing")
_OF_SWEEPS = ("trials", "final")  # folders of a sweep's runs


@dataclasses.dataclass(frozen=True)
class Use:
    """What a run is for.

    Attributes:
      what: `FINAL`, or why it is no result.
      held_out: of a final run, the split by which its values were chosen and what they reached there; None where
        nothing was chosen, or it was not recorded.
      rules: what the best values of each rule of fine-tuning reached there, by its name in configs/transfer.py, where
        several were tried.
    """

    what: str
    held_out: tuple[str, float] | None = None
    rules: Mapping[str, float] = dataclasses.field(default_factory=dict)


def resolved(path: AnyPath) -> str:
    """A folder's name that is the same by whatever path it is named."""
    return str(path) if is_remote(path) else str(path.resolve())


class Sweeps:
    """What sweeps recorded of their runs."""

    def __init__(self) -> None:
        self._runs: dict[str, dict[str, Use]] = {}  # by a sweep's folder: by a run's folder
        self._unfinished: set[str] = set()  # folders of sweeps without results

    def add(self, file: AnyPath) -> list[str]:
        """Reads a `sweep.json`, or the `sweep_config.json` of a sweep without results.

        Returns:
          What is to be said of it, a line each.

        Raises:
          DamagedError: it is not what a sweep writes.
        """
        folder = file.parent
        if resolved(folder) in self._runs:
            return []
        content = read(file)
        try:
            if file.name == "sweep.json":
                uses = _uses(content)
            else:
                uses = {str(run): Use(CHOOSES) for run in dict(content["tried"])}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DamagedError(f"{file}: not what a sweep writes ({error!r})") from error
        self._runs[resolved(folder)] = {resolved(folder / run): use for run, use in uses.items()}
        lines = [f"{file}: {each}, which is not used" for each in not_finite(content)]
        if file.name != "sweep.json":
            self._unfinished.add(resolved(folder))
            lines.append(f"{folder}: a sweep without results yet; its finished final runs count one by one")
        return lines

    def use_of(self, folder: AnyPath) -> Use | None:
        """What a run is for by the innermost sweep that lists it; None if no sweep it may be of is around it."""
        run = resolved(folder)
        around = sorted((sweep for sweep in self._runs if run.startswith(sweep + "/")), key=len, reverse=True)
        for sweep in around:
            if run in self._runs[sweep]:
                return self._runs[sweep][run]
        if not around:
            return None
        inner = around[0]
        folders = run.removeprefix(inner + "/").split("/")[:-1]
        if not set(_OF_SWEEPS) & set(folders):
            return None  # it only lies there
        if inner not in self._unfinished:
            return Use(NOT_CHOSEN)
        return Use(CHOOSES) if "trials" in folders else None


def _uses(content: Any) -> dict[str, Use]:
    """What each run that a `sweep.json` lists is for, by its folder in the sweep's."""
    uses: dict[str, Use] = {}
    final: dict[str, Use] = {}
    for task in content["tasks"].values():
        use = _use_of_final(task, str(content.get("metric") or "accuracy"))
        for run in task["trials"]:
            uses[_folder(run)] = Use(CHOOSES)
        for run in task["final"]:
            final[_folder(run)] = use
    return uses | final


def _folder(run: Mapping[str, Any]) -> str:
    if not isinstance(run["workdir"], str):
        raise TypeError(f"workdir is {run['workdir']!r}")
    return run["workdir"]


def _use_of_final(task: Mapping[str, Any], metric: str) -> Use:
    """What the final runs of a task are for, with what its trials reached where they were measured alike."""
    plain, splits = metric.rpartition("/")[2], set()
    reached: dict[str, tuple[dict[str, Any], list[float]]] = {}  # of each candidate, by its values
    for run in task["trials"]:
        values = {name: value for name, value in dict(run.get("overrides") or {}).items() if name != "seed"}
        for name, value in dict(run.get("metrics") or {}).items():
            split, _, its = name.rpartition("/")
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if its == plain and is_number and split not in ("train", *VARIANTS) and "/" not in split:
                splits.add(split)
                reached.setdefault(str(sorted(values.items())), (values, []))[1].append(float(value))
    chosen = [statistics.fmean(found) for values, found in reached.values() if values == task.get("chosen")]
    if len(splits) != 1 or not chosen:
        return Use(FINAL)
    rules: dict[str, float] = {}
    for values, found in reached.values():
        if rule := values.get(RULE):
            rules[str(rule)] = max(rules.get(str(rule), -math.inf), statistics.fmean(found))
    return Use(FINAL, (splits.pop(), chosen[0]), rules if len(rules) > 1 else {})


def stage_of(command: str) -> str | None:
    """What a run is for by the command that started it; None where that does not say it.

    The configs for transfer have stages, of which "final" is the default. A command that sets the splits itself has
    no stage.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    if any(_DECIDES_SPLITS.match(word) for word in words):
        return None
    config = ""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config"):
            config = value if equals else following
    place, _, argument = config.partition(":")
    if pathlib.PurePath(place).name not in _STAGED_CONFIGS:
        return None
    given = {name: value for name, _, value in (pair.partition("=") for pair in argument.split(","))}
    stage = given.get("stage", "final")
    return {"final": FINAL, "choose": CHOOSES}[stage] if stage in STAGES else None


def use_by_protocol(dataset: str, split: str) -> tuple[str, bool]:
    """What a fine-tuned model's accuracy on a split is for, where nothing recorded says it.

    Args:
      dataset: as `config.data.dataset`.
      split: that it was measured on.

    Returns:
      `FINAL`, or why it is no result, and whether that is sure: a split of a data set of one's own may be its test set
      without being called so.
    """
    measured = f"{CHOOSES} (measured on {split})"
    if dataset.startswith("vtab:"):
        return (FINAL, True) if split == "test" else (measured, True)
    for task in TASKS.values():
        if data_set_name(task.dataset) == data_set_name(dataset):
            return (FINAL, True) if split == task.splits["final"][1] else (measured, True)
    plain = split.replace(" ", "").casefold()
    if plain.startswith(tuple(f"{name}[" for name in _WHOLE_TEST)):
        return f"measured on {split}, a part of the test set", True
    # An image folder without splits is one split, "all"; its last part is the test set (`vit_jax.data.transfer_tasks`).
    if plain in (*_WHOLE_TEST, "all[90%:]"):
        return FINAL, True
    return measured, plain.startswith("all[") or plain in ("all", "train", "full")
