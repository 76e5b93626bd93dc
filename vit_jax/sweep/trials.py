"""The runs of a sweep: their configs, folders and commands, and what is there of them."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import pathlib
import re
import shlex
import types
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from vit_jax.config import LENGTHS, check_fields, flatten, set_length
from vit_jax.errors import UserError, unknown_name
from vit_jax.json_files import read_object
from vit_jax.run.metrics import TIME_PREFIX, read_jsonl
from vit_jax.run.workdir import FAILURE, AnyPath, check_config, is_remote, write_atomically
from vit_jax.sweep import split_checks
from vit_jax.sweep.spec import ARGUMENT, Sweep

# While choosing, only what a run needs to go on: the choice is by the end of a run, and there are many.
_WHILE_CHOOSING = {"checkpoint.keep": 1, "checkpoint.keep_best": False}

_DIVERGED = re.compile(r"\S+ is (nan|inf|-inf) at step \d+")  # as `vit_jax.run.journal.NonFiniteError` says it
_SLUG_LENGTH = 120  # file systems take 255 bytes


def load_module(place: str) -> types.ModuleType:
    """The config file of `path:argument`.

    Raises:
      UserError: there is none, or it is no config.
    """
    path = pathlib.Path(place.partition(":")[0])
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"there is no config file {path}; --config takes one, such as configs/quickstart.py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} is no config file: it has no get_config.")
    return module


def call(module: types.ModuleType, function: str, place: str) -> Any:
    """What `get_config` or `get_sweep` of a config file gives for the argument after the colon, if there is one."""
    _, colon, argument = place.partition(":")
    try:
        return getattr(module, function)(*([argument] if colon else []))
    except TypeError as error:
        raise UserError(f"{function} of {place}: {error}") from error


def field_of(argument: str) -> str:
    """The field that an argument such as --config.seed=3 sets.

    Raises:
      UserError: it is none.
    """
    found = re.fullmatch(r"--(?:no)?config\.([\w.]+)(=.*)?", argument, re.DOTALL)
    if not found:
        raise UserError(f"unexpected argument {argument!r}; fields are set with --config.<field>=<value>.")
    return found[1]


def load_config(place: str, arguments: Sequence[str]) -> ConfigDict:
    """The config that `vit_jax.main` would use.

    Args:
      place: `path:argument`.
      arguments: as on the command line, `--config.<field>=<value>`.

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
    cleared = [argument for argument in arguments if argument.endswith("=None")]
    argv = ["sweep", *(argument for argument in arguments if argument not in cleared)]
    values = flags.FlagValues()
    try:
        holder = config_flags.DEFINE_config_dict("config", config, "", values, lock_config=True, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    with config.ignore_type(), config.unlocked():
        config.update_from_flattened_dict(dict.fromkeys(map(field_of, cleared)))
    set_length(config, {field_of(argument) for argument in arguments if argument not in cleared})
    check_fields(holder.value)
    return holder.value


# The runs of a sweep are made again whenever its results are read; their configs stay the same until `make_tasks`.
_loaded_config = functools.cache(load_config)


def _argument(field: str, value: Any) -> str:
    if isinstance(value, bool):
        value = str(value).lower()
    return f"--config.{field}={tuple(value) if isinstance(value, list) else value}"


def slug(overrides: Mapping[str, Any]) -> str:
    """A folder's name for values of fields: readable, and another for other values."""
    text = ",".join(f"{field}={value}" for field, value in overrides.items())
    name = re.sub(r"[^\w.,=+-]+", "_", text)
    if name == text and len(name) <= _SLUG_LENGTH:
        return name
    return f"{name[:_SLUG_LENGTH]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Attributes:
      overrides: the fields it was made for, with values of the config's types.
      path: its workdir.
      arguments: of `vit_jax.main`, without the workdir.
      config: what these mean.
    """

    overrides: dict[str, Any]
    path: AnyPath
    arguments: tuple[str, ...]
    config: ConfigDict

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.config.seed

    @property
    def candidate(self) -> dict[str, Any]:
        """What it stands for where values are chosen: its overrides without the seed."""
        return {field: value for field, value in self.overrides.items() if field != "seed"}

    def command(self, python: str = "python") -> list[str]:
        """What trains it, on any machine that sees the workdir."""
        return [python, "-m", "vit_jax.main", *self.arguments, f"--workdir={self.path}"]

    def command_line(self) -> str:
        """The command for a shell."""
        return shlex.join(self.command())

    def check(self) -> None:
        """Checks that what is there is of this config.

        Raises:
          UserError: it is not; says which fields differ.
        """
        try:
            check_config(self.path, self.config)
        except UserError as error:
            differences = str(error).rpartition("\n")[0]
            raise UserError(f"{differences}\nChoose another --workdir for the sweep with the new config.") from error

    def read(self) -> "Result":
        """What there is of it.

        Raises:
          UserError: a file of it is damaged.
        """
        if (self.path / "summary.json").exists():
            last: dict[str, float] = {}
            for row in read_jsonl(self.path / "metrics.jsonl"):
                last |= row
            metrics = {name: value for name, value in last.items() if not name.startswith(TIME_PREFIX)}
            metrics.pop("step", None)
            overlap = read_object(self.path / "summary.json", allow_nan=True).get("overlap")  # a loss may be NaN
            counts = overlap.items() if isinstance(overlap, dict) else ()
            return Result("finished", metrics, overlap={name: n for name, n in counts if isinstance(n, int) and n > 0})
        if (self.path / FAILURE).exists():
            reason = str(read_object(self.path / FAILURE).get("reason", "it is not known why"))
            diverged = _DIVERGED.search(reason)
            return Result("diverged", reason=diverged[0]) if diverged else Result("failed", reason=reason)
        if not (self.path / "config.json").exists():
            return Result("missing")
        failed_at, saved_at = (_newest_step(self.path / folder) for folder in ("emergency", "checkpoints"))
        if failed_at > saved_at:  # started by its command alone, which leaves no reason
            reason = f"an error at step {failed_at}, whose state is in emergency/"
            return Result("failed", reason=reason)
        return Result("unfinished")

    def record_failure(self, reason: str) -> None:
        """Writes down why it failed."""
        if not is_remote(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / FAILURE, json.dumps({"reason": reason}, indent=2) + "\n")

    def forget_failure(self) -> None:
        """Makes it one that may be tried again."""
        (self.path / FAILURE).unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Result:
    """What there is of a run.

    Attributes:
      status: "finished"; "diverged": its loss, or the metric to choose by, was not finite, and would not be the next
        time; "unusable": it is finished, but has no such metric, or evaluates what it trained on; "failed": it may do
        better the next time; "unfinished": it was begun; "missing".
      metrics: the last value of each, once it is finished; no times.
      reason: why it failed, diverged or is unusable.
      overlap: by evaluation, the number of examples that were trained on, once it is finished.
    """

    status: str
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    reason: str = ""
    overlap: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status in ("finished", "diverged", "unusable", "failed")

    @property
    def is_due(self) -> bool:
        """Whether the next start of the sweep would train it, for the first time or again."""
        return self.status not in ("finished", "diverged", "unusable")


def _newest_step(folder: AnyPath) -> int:
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=-1)


@dataclasses.dataclass(frozen=True)
class Task:
    """A config for which values are chosen, with the runs that choose them.

    Attributes:
      name: of the task; of the only one the data set's.
      place: its config, `path:argument`.
      sweep: what is tried.
      arguments: `--config.<field>=<value>` for all runs.
      base: the config with these.
      path: folder of its runs.
      trials: the runs to choose by; [] where there is nothing to choose.
      candidates: what is chosen from, in the grid's order: values of the grid's fields without the seed.
      notes: what a reader of the final runs' numbers should know of the examples, in sentences.
    """

    name: str
    place: str
    sweep: Sweep
    arguments: tuple[str, ...]
    base: ConfigDict
    path: AnyPath
    trials: list[Run]
    candidates: list[dict[str, Any]]
    notes: tuple[str, ...] = ()

    def final_runs(self, chosen: Mapping[str, Any]) -> list[Run]:
        """The final runs with chosen values, one a seed."""
        return [self.final_run(chosen, self.base.seed + number) for number in range(self.sweep.seeds)]

    def final_run(self, chosen: Mapping[str, Any], seed: int) -> Run:
        """The final run with chosen values and a seed."""
        final = self.sweep.final
        replaced = LENGTHS if _sets_length(final) else ()
        kept = {field: value for field, value in chosen.items() if field not in replaced}
        values = {**kept, **final, "seed": seed}
        folder = self.path / "final" / slug(chosen) if chosen else self.path / "final"
        return _make_run(self.place, self.arguments, {"seed": seed}, values, folder / f"seed_{seed}")

    def metric_of(self, run: Run) -> str:
        """The full name in a run's `metrics.jsonl` of the metric to choose by; final runs may have another split."""
        plain = self.sweep.metric.removeprefix(f"{self.base.data.eval_split}/")
        return plain if "/" in plain else f"{run.config.data.eval_split}/{plain}"


def _sets_length(values: Mapping[str, Any]) -> bool:
    """Whether one of the values is the length of a run, which then replaces any other."""
    return any(values.get(name) not in (None, "None") for name in LENGTHS)


def _make_run(
    place: str, arguments: Sequence[str], overrides: Mapping[str, Any], values: Mapping[str, Any], path: AnyPath
) -> Run:
    """A run with the values of some fields in place of the arguments' ones; `overrides` are what it shows of them."""
    of_config = {field.removeprefix(ARGUMENT): value for field, value in values.items() if field.startswith(ARGUMENT)}
    values = {field: value for field, value in values.items() if not field.startswith(ARGUMENT)}
    place = with_arguments(place, of_config)
    replaced = {*values, *(LENGTHS if _sets_length(values) else ())}
    kept = [argument for argument in arguments if field_of(argument) not in replaced]
    resolved = (*kept, *(_argument(field, value) for field, value in values.items()))
    config = _loaded_config(place, resolved)
    fields = flatten(config.to_dict()) | {f"{ARGUMENT}{name}": value for name, value in of_config.items()}
    return Run({field: fields[field] for field in overrides}, path, (f"--config={place}", *resolved), config)


def with_arguments(place: str, arguments: Mapping[str, Any]) -> str:
    """Sets arguments of a config in `path:name=value,name=value`.

    Raises:
      UserError: a value has a comma in it.
    """
    if not arguments:
        return place
    file, _, before = place.partition(":")
    pairs = [pair for pair in before.split(",") if pair and pair.partition("=")[0] not in arguments]
    for name, value in arguments.items():
        if "," in str(value):
            raise UserError(f"an argument of a config cannot have a comma in it, got {value!r} for {ARGUMENT}{name}.")
        pairs.append(f"{name}={value}")
    return f"{file}:{','.join(pairs)}"


def make_tasks(sweep: Sweep, place: str, arguments: Sequence[str], path: AnyPath) -> list[Task]:
    """Makes and checks the tasks of a sweep; runs nothing.

    Args:
      sweep: what is tried.
      place: the config, `path:argument`.
      arguments: `--config.<field>=<value>` for all runs.
      path: the sweep's folder.

    Raises:
      UserError: a field, a value or a split is not as it should be, or runs that are there have another config.
    """
    _loaded_config.cache_clear()
    given = {field_of(argument) for argument in arguments}
    for field in sweep.fields:
        if field in given:
            raise UserError(f"{field} is in the grid, and set with --config.{field} too; leave one of them out.")
        if field in LENGTHS and (other := given & {*LENGTHS}):
            raise UserError(
                f"{field} is in the grid, and --config.{min(other)} sets the length of the run too; leave one of them "
                "out."
            )
    file, opened = place.partition(":")[0], split_checks.Splits()
    if not sweep.tasks:
        task = _make_task("", place, sweep, arguments, path, opened)
        return [dataclasses.replace(task, name=task.base.data.dataset)]
    return [
        _make_task(
            name, f"{file}:{argument}", sweep, arguments, path / slug({"task": name}).removeprefix("task="), opened
        )
        for name, argument in sweep.tasks.items()
    ]


def _make_task(
    name: str, place: str, sweep: Sweep, arguments: Sequence[str], path: AnyPath, opened: split_checks.Splits
) -> Task:
    space = {field: value for field, value in _WHILE_CHOOSING.items() if field not in map(field_of, arguments)}
    trials: dict[str, Run] = {}
    candidates: dict[str, dict[str, Any]] = {}
    for combination in sweep.combinations():
        run = _make_run(place, arguments, combination, {**space, **combination}, path)
        run = dataclasses.replace(run, path=path / "trials" / slug(run.overrides))
        trials.setdefault(slug(run.overrides), run)
        candidates.setdefault(slug(run.candidate), run.candidate)
    choosing = len(trials) > 1 or not sweep.seeds
    task = Task(
        name=name,
        place=place,
        sweep=sweep,
        arguments=tuple(arguments),
        base=load_config(place, arguments),
        path=path,
        trials=list(trials.values()) if choosing else [],
        candidates=list(candidates.values()),
    )
    _check_metric(task)
    task = dataclasses.replace(task, notes=_compare_examples(task, opened))
    begun = task.candidates if (path / "final").exists() else []
    for run in (*task.trials, *(run for candidate in begun for run in task.final_runs(candidate))):
        run.check()
    return task


def _check_metric(task: Task) -> None:
    """Checks that there is a part of the data to choose by, and one to report."""
    finals = [task.final_run(task.candidates[0], task.base.seed)] if task.sweep.seeds else []
    for run in (*task.trials[:1], *finals):
        if task.metric_of(run).startswith("None/"):
            raise UserError(
                f"data.eval_split is None, so that no run has {task.sweep.metric!r}: set it, for example with "
                "--config.data.eval_split=validation, or with --final=data.eval_split=test for the final runs."
            )


def _compare_examples(task: Task, opened: split_checks.Splits) -> tuple[str, ...]:
    """Compares what the runs of a task, of all candidates, train on, choose by and report.

    Returns:
      What a reader of the numbers should know.

    Raises:
      UserError: a use shares examples with another one, or candidates are compared on different examples.
    """
    notes = []
    chosen_by: list[split_checks.Examples] = []
    finals = [task.final_run(candidate, task.base.seed) for candidate in task.candidates if task.sweep.seeds]
    for runs, role in ((task.trials, split_checks.CHOSEN_BY), (finals, split_checks.REPORTED)):
        for run in runs:
            measured = opened.measured(run.config, task.metric_of(run))
            if measured is None:
                continue
            for trained_on in opened.trained_on(run.config):
                opened.check(measured, role, trained_on, split_checks.TRAINED_ON)
            for behind in opened.behind(run.config):
                if role == split_checks.REPORTED:
                    opened.check(measured, role, behind, split_checks.WEIGHTS)
            if role == split_checks.CHOSEN_BY:
                chosen_by.append(measured)
            elif len(task.candidates) > 1:
                for examples in chosen_by:
                    opened.check(measured, role, examples, split_checks.CHOSEN_BY)
            if role == split_checks.REPORTED and (note := split_checks.part_of_split(run.config, measured)):
                notes.append(note)
    for examples in chosen_by[1:]:
        if not split_checks.is_same(chosen_by[0], examples):
            raise UserError(
                f"the values would be compared on different examples, {chosen_by[0].split!r} of {chosen_by[0].dataset} "
                f"and {examples.split!r} of {examples.dataset}. Evaluate all on the same, or make a sweep of each."
            )
    return tuple(dict.fromkeys(notes))
