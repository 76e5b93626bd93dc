"""The runs of a sweep: their configs, folders, commands and states."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import pathlib
import re
import shlex
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_jax.config import LENGTHS, check_fields, flatten, set_length
from vit_jax.data.sources import Source
from vit_jax.errors import UserError, unknown_name
from vit_jax.experiment.leakage import sources_behind
from vit_jax.files import AnyPath, is_remote, write_atomically
from vit_jax.flags import clear_field
from vit_jax.run.run_result import RunResult
from vit_jax.run.workdir import FAILURE, check_config
from vit_jax.sweep.spec import ARGUMENT, Sweep, check_sequence
from vit_jax.sweep.split_checks import compare_examples, warn_missing

# Trials keep only what they need to resume, because there are many, and the choice uses their last metrics.
_WHILE_CHOOSING = {"checkpoint.keep": 1, "checkpoint.keep_best": False}
_SLUG_LENGTH = 120  # file systems take 255 bytes


def load_module(place: str) -> types.ModuleType:
    """Imports the config file of `path:argument`; raises `UserError` if there is none, or no `get_config` in it."""
    path = pathlib.Path(place.partition(":")[0])
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"there is no config file {path}; --config takes one, such as configs/quickstart.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} is not a config file: it has no get_config.")
    return module


def call(module: types.ModuleType, function: str, place: str) -> Any:
    """Calls `get_config` or `get_sweep` of a config file with the argument after the colon, if there is one."""
    _, colon, argument = place.partition(":")
    try:
        return getattr(module, function)(*([argument] if colon else []))
    except TypeError as error:
        raise UserError(f"{function} of {place}: {error}") from error


def field_of(argument: str) -> str:
    """The field set by an argument such as --config.seed=3; raises `UserError` if it sets no field."""
    found = re.fullmatch(r"--(?:no)?config\.([\w.]+)(=.*)?", argument, re.DOTALL)
    if not found:
        raise UserError(f"unexpected argument {argument!r}; fields are set with --config.<field>=<value>.")
    return found[1]


def load_config(place: str, arguments: Sequence[str]) -> ConfigDict:
    """Loads the config that `vit_jax.main` would use for `path:argument` and `--config.<field>=<value>`.

    Raises:
      UserError: there is no such config, field or value.
    """
    config = call(load_module(place), "get_config", place)
    known = flatten(config.to_dict())
    for field in map(field_of, arguments):
        if any(name.startswith(f"{field}.") for name in known):
            raise UserError(f"{field} is a group of fields; set them one by one.")
        if field not in known:
            raise unknown_name("config field", field, known)
    given = [argument for argument in arguments if not argument.endswith("=None")]
    argv, values = ["sweep", *given], flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, "", values, lock_config=True, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    for argument in set(arguments) - set(given):
        clear_field(config, field_of(argument))
    set_length(config, set(map(field_of, given)))
    check_fields(config)
    return config


# Reading results makes the runs of a sweep again, with the same configs until the next `make_tasks`.
_loaded_config = functools.cache(load_config)


def with_arguments(place: str, arguments: Mapping[str, Any]) -> str:
    """Sets arguments of a config in `path:name=value,name=value`; a value cannot have a comma."""
    if not arguments:
        return place
    file, _, before = place.partition(":")
    pairs = [pair for pair in before.split(",") if pair and pair.partition("=")[0] not in arguments]
    for name, value in arguments.items():
        if "," in str(value):
            raise UserError(f"an argument of a config cannot have a comma in it, got {value!r} for {ARGUMENT}{name}.")
        pairs.append(f"{name}={value}")
    return f"{file}:{','.join(pairs)}"


def slug(overrides: Mapping[str, Any]) -> str:
    """A readable folder name for values of fields, different for different values."""
    text = ",".join(f"{field}={value}" for field, value in overrides.items())
    name = re.sub(r"[^\w.,=+-]+", "_", text)
    if name == text and len(name) <= _SLUG_LENGTH:
        return name
    return f"{name[:_SLUG_LENGTH]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """The state of a run.

    Attributes:
      run: the run.
      status: "finished"; "diverged": its loss, or the metric of the choice, is not finite, and would not be in another
        try; "unusable": it is finished, but lacks the metric, or evaluates training examples; "failed": another try may
        succeed; "unfinished"; "missing".
      metrics: the last value of each metric of a finished run.
      reason: why it failed, diverged or is unusable.
      num_trained_on: number of the metric's examples that were trained on.
      step: the step that counts with early stopping; None: the last.
    """

    run: "SweepRun"
    status: str
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""
    num_trained_on: int = 0
    step: int | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status in ("finished", "diverged", "unusable", "failed")

    @property
    def is_due(self) -> bool:
        """Whether a start of the sweep can train it now, for the first time or again."""
        return self.status not in ("finished", "diverged", "unusable") and self.run.has_weights


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A run of a sweep.

    Attributes:
      overrides: the fields that distinguish it, with values of the config's types.
      path: its workdir.
      arguments: the arguments of `vit_jax.main`, without the workdir.
      config: the resulting config.
      metric: full name of the metric of the choice.
      is_final: whether it is a final run.
      early_stopping: full name of the metric that picks the step that counts; None: the last step counts.
      before: workdir of the sweep's run whose weights it begins with, if any.
    """

    overrides: dict[str, Any]
    path: AnyPath
    arguments: tuple[str, ...]
    config: ConfigDict
    metric: str
    is_final: bool
    early_stopping: str | None = None
    before: AnyPath | None = None

    @property
    def has_weights(self) -> bool:
        """Whether the run whose weights it begins with is finished, if there is one."""
        return self.before is None or RunResult(self.before).status == "finished"

    @property
    def candidate(self) -> dict[str, Any]:
        """Its overrides without the seed: the values to choose among."""
        return {field: value for field, value in self.overrides.items() if field != "seed"}

    def command(self, python: str = "python") -> list[str]:
        """The command that trains it on any machine with access to the workdir."""
        return [python, "-m", "vit_jax.main", *self.arguments, f"--workdir={self.path}"]

    def command_line(self) -> str:
        """The command for a shell."""
        return shlex.join(self.command())

    def read(self) -> TrialResult:
        """How far it is. A run that has no finite value of the metric, or a damaged file, is of no use."""
        run = RunResult(self.path)
        try:
            if run.status != "finished":
                return TrialResult(self, run.status, reason=run.divergence or run.failure)
            step = run.best_step(self.early_stopping) if self.early_stopping else None
            metrics, overlap = run.metrics_at(step), run.overlap
        except UserError as error:
            return TrialResult(self, "failed", reason=str(error))
        if self.metric not in metrics or (self.early_stopping and step is None):
            missing = self.metric if self.metric not in metrics else self.early_stopping
            return TrialResult(self, "unusable", reason=self._no_metric(metrics, missing))
        if not math.isfinite(metrics[self.metric]):
            return TrialResult(self, "diverged", reason=f"{self.metric} is {metrics[self.metric]}")
        shared = next((count for name, count in overlap.items() if self.metric.startswith(f"{name}/")), 0)
        if self.is_final and shared:
            reason = f"{shared:,} of the examples that {self.metric} is measured on were trained on"
            return TrialResult(self, "unusable", reason=reason)
        return TrialResult(self, "finished", metrics, num_trained_on=shared, step=step)

    def check_metric(self) -> None:
        """Checks that it has the metric of the choice, if it is finished; raises `UserError` with its metrics."""
        run = RunResult(self.path)
        if run.status == "finished" and self.metric not in run.metrics:
            raise UserError(f"{self.path} {self._no_metric(run.metrics, self.metric)}. Choose another --metric.")

    def _no_metric(self, metrics: Iterable[str], missing: str | None) -> str:
        return f"has no metric {missing!r} to choose by; there are {', '.join(sorted(metrics))}"

    def record_failure(self, reason: str) -> None:
        """Records the reason of its failure."""
        if not is_remote(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / FAILURE, json.dumps({"reason": reason}, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class SweepTask:
    """A config with its candidates and their runs.

    Attributes:
      name: name of the task; the data set's if it is the only task.
      place: its config, `path:argument`.
      sweep: the description of the sweep.
      arguments: `--config.<field>=<value>` for all runs.
      base: the config with these arguments.
      path: folder of its runs.
      trials: the runs of the candidates; [] if there is nothing to choose.
      candidates: values of the grid's fields without the seed, in the grid's order.
      notes: sentences about the examples of the final runs.
      before: the task whose final runs give the initial weights, if any.
      begins_with: the values that were chosen there; None while nothing is chosen, when this task has no runs.
    """

    name: str
    place: str
    sweep: Sweep
    arguments: tuple[str, ...]
    base: ConfigDict
    path: AnyPath
    trials: list[SweepRun] = dataclasses.field(default_factory=list)
    candidates: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: tuple[str, ...] = ()
    before: "SweepTask | None" = None
    begins_with: dict[str, Any] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it has no runs yet, because the values of the task before it are not chosen."""
        return self.before is not None and self.begins_with is None

    def run_before(self, seed: int) -> SweepRun | None:
        """The run whose weights a run with this seed begins with, if any; raises `UserError` if it does not exist."""
        if self.before is None or self.begins_with is None:
            return None
        first, count = self.before.base.seed, self.before.sweep.seeds
        if count > 1 and not first <= seed < first + count:
            raise UserError(
                f"{self.name} has a run with seed {seed}, but {self.before.name}, whose weights it begins with, has "
                f"the seeds {first} to {first + count - 1}."
            )
        return self.before.final_run(self.begins_with, seed if count > 1 else first)

    def final_runs(self, chosen: Mapping[str, Any]) -> list[SweepRun]:
        """The final runs with the chosen values, one for each seed."""
        return [self.final_run(chosen, self.base.seed + number) for number in range(self.sweep.seeds)]

    def final_run(self, chosen: Mapping[str, Any], seed: int) -> SweepRun:
        """The final run with the chosen values and a seed."""
        replaced = LENGTHS if _sets_length(self.sweep.final) else ()
        kept = {field: value for field, value in chosen.items() if field not in replaced}
        folder = self.path / "final" / slug(chosen) if chosen else self.path / "final"
        values = {**kept, **self.sweep.final, "seed": seed}
        return self.make_run({"seed": seed}, values, folder / f"seed_{seed}", is_final=True)

    def make_run(
        self, overrides: Mapping[str, Any], values: Mapping[str, Any], path: AnyPath | None = None, *, is_final: bool
    ) -> SweepRun:
        """Makes a run that `overrides` distinguish; `values` of these and other fields override the arguments.

        The default of `path` is the workdir of a trial.
        """
        of_config = {name.removeprefix(ARGUMENT): value for name, value in values.items() if name.startswith(ARGUMENT)}
        values = {field: value for field, value in values.items() if not field.startswith(ARGUMENT)}
        if before := self.run_before(int(values.get("seed", self.base.seed))):
            values["weights"] = str(before.path)
        place = with_arguments(self.place, of_config)
        replaced = {*values, *(LENGTHS if _sets_length(values) else ())}
        kept = [argument for argument in self.arguments if field_of(argument) not in replaced]
        arguments = (*kept, *(_argument(field, value) for field, value in values.items()))
        config = _loaded_config(place, arguments)
        fields = flatten(config.to_dict()) | {f"{ARGUMENT}{name}": value for name, value in of_config.items()}
        typed = {field: fields[field] for field in overrides}
        metric, stop = (self._full_name(name, config) for name in (self.sweep.metric, self.sweep.early_stopping or ""))
        path = path or self.path / "trials" / slug(typed)
        return SweepRun(
            *(typed, path, (f"--config={place}", *arguments), config, metric, is_final),
            early_stopping=stop if self.sweep.early_stopping else None,
            before=before.path if before else None,
        )

    def _full_name(self, metric: str, config: ConfigDict) -> str:
        """The name in `metrics.jsonl` of a metric of a run with this config. Final runs may have another split."""
        metric = metric.removeprefix(f"{self.base.data.eval_split}/")
        return metric if "/" in metric else f"{config.data.eval_split}/{metric}"


def _argument(field: str, value: Any) -> str:
    if isinstance(value, bool):
        value = str(value).lower()
    return f"--config.{field}={tuple(value) if isinstance(value, list) else value}"


def _sets_length(values: Mapping[str, Any]) -> bool:
    """Whether one of the values is a length of a run, which replaces any other length."""
    return any(values.get(name) not in (None, "None") for name in LENGTHS)


def make_tasks(sweep: Sweep | Sequence[Sweep], place: str, arguments: Sequence[str], path: AnyPath) -> list[SweepTask]:
    """Makes and checks the tasks of a sweep, or of several that follow each other, in the folder `path`; runs nothing.

    `place` is the config, `path:argument`, and `arguments` are `--config.<field>=<value>` for all runs.

    Raises:
      UserError: a field, a value or a split is wrong, or existing runs have another config.
    """
    _loaded_config.cache_clear()
    warn_missing.cache_clear()
    sweeps = [sweep] if isinstance(sweep, Sweep) else list(sweep)
    check_sequence(sweeps)
    behind, file = functools.cache(sources_behind), place.partition(":")[0]
    tasks: dict[str, SweepTask] = {}
    for each in sweeps:
        _check_fields(each, arguments)
        if not each.tasks:
            base = load_config(place, arguments)
            return [complete(SweepTask(base.data.dataset, place, each, tuple(arguments), base, path), behind)]
        for name, argument in each.tasks.items():
            own, folder = f"{file}:{argument}", path / slug({"task": name}).removeprefix("task=")
            before = tasks.get(each.weights.get(name, ""))
            task = SweepTask(
                *(name, own, each, tuple(arguments), load_config(own, arguments), folder),
                before=before,
                begins_with=None if before is None or before.trials else before.candidates[0],
            )
            tasks[name] = task if task.is_waiting else complete(task, behind)
    return list(tasks.values())


def sweeps_of(tasks: Iterable[SweepTask]) -> list[Sweep]:
    """The sweeps that tasks belong to, in order."""
    found: list[Sweep] = []
    for task in tasks:
        if not any(task.sweep is each for each in found):
            found.append(task.sweep)
    return found


def _check_fields(sweep: Sweep, arguments: Sequence[str]) -> None:
    """Raises `UserError` if a field of all runs is also set by the sweep."""
    given = {field_of(argument) for argument in arguments}
    if sweep.weights and "weights" in given:
        raise UserError("the sweep sets weights, by the runs that its tasks begin with; leave --config.weights out.")
    for field in sweep.fields:
        if field in given:
            raise UserError(f"{field} is in the grid, and set with --config.{field} too; leave one of them out.")
        if field in LENGTHS and (other := given & {*LENGTHS}):
            raise UserError(
                f"{field} is in the grid, and --config.{min(other)} sets the length of the run too; leave one of them "
                "out."
            )


def complete(task: SweepTask, behind: Callable[[str | None], Sequence[Source]] = sources_behind) -> SweepTask:
    """Adds trials, candidates and notes to a task that does not wait, and checks them.

    `behind` is `experiment.leakage.sources_behind`, or a cached version of it.
    """
    if task.before is not None and task.before.trials:  # another choice there makes other runs here
        task = dataclasses.replace(task, path=task.path / slug(task.begins_with or {}))
    given = [field_of(argument) for argument in task.arguments]
    space = {field: value for field, value in _WHILE_CHOOSING.items() if field not in given}
    trials: dict[str, SweepRun] = {}
    candidates: dict[str, dict[str, Any]] = {}
    for combination in task.sweep.combinations():
        run = task.make_run(combination, {**space, **combination}, is_final=False)
        trials.setdefault(slug(run.overrides), run)
        candidates.setdefault(slug(run.candidate), run.candidate)
    is_choosing = len(trials) > 1 or not task.sweep.seeds
    choosing = list(trials.values()) if is_choosing else []
    finals = [task.final_run(candidate, task.base.seed) for candidate in candidates.values() if task.sweep.seeds]
    for run in (*choosing[:1], *finals[:1]):
        if run.metric.startswith("None/"):
            raise UserError(
                f"data.eval_split is None, so that no run has {task.sweep.metric!r}: set it, for example with "
                "--config.data.eval_split=validation, or with --final=data.eval_split=test for the final runs."
            )
    by, reported = ([(run.config, run.metric) for run in runs] for runs in (choosing, finals))
    stopped_by = [(run.config, run.early_stopping) for run in (*choosing, *finals) if run.early_stopping]
    notes = compare_examples(by, reported, behind, stopped_by)
    task = dataclasses.replace(task, trials=choosing, candidates=list(candidates.values()), notes=notes)
    begun = task.candidates if (task.path / "final").exists() else []
    for run in (*choosing, *(run for candidate in begun for run in task.final_runs(candidate))):
        try:
            check_config(run.path, run.config)
        except UserError as error:
            differences = str(error).rpartition("\n")[0]
            raise UserError(f"{differences}\nChoose another --workdir for the sweep with the new config.") from error
    return task
