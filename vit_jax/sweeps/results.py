"""What came out of a sweep: the choice, mean and standard deviation, as JSON and as tables."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.errors import UserError
from vit_jax.sweeps.runs import Result, Run, Task
from vit_jax.workdir import AnyPath, write_atomically


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What is there of a task.

    Attributes:
      task: the task.
      trials: its runs to choose by.
      chosen: the chosen values; None while trials are missing, or if all went wrong.
      final: its final runs; [] while nothing is chosen.
      notes: what a reader of the numbers should know.
    """

    task: Task
    trials: list[tuple[Run, Result]]
    chosen: dict[str, Any] | None
    final: list[tuple[Run, Result]]
    notes: list[str]

    @property
    def due(self) -> list[Run]:
        """The runs of this stage, choosing or final, that a start of the sweep would train."""
        stage = self.trials if any(not result.is_over for _, result in self.trials) else [*self.trials, *self.final]
        return [run for run, result in stage if result.is_due]

    @property
    def is_complete(self) -> bool:
        """Whether something is chosen and all final runs are there."""
        return self.chosen is not None and all(result.status == "finished" for _, result in self.final)

    def values(self, name: str) -> list[float]:
        """A metric of the final runs, in the order of their seeds; [] if not all are there and have a finite one."""
        values = [result.metrics.get(name, math.nan) for _, result in self.final]
        return values if all(map(math.isfinite, values)) else []

    @property
    def metric_values(self) -> list[float]:
        """The sweep's metric of the final runs; see `values`."""
        return self.values(self.task.metric_of(self.final[0][0])) if self.final else []


def collect(task: Task) -> TaskResult:
    """Reads what is there of a task, and chooses.

    Raises:
      UserError: the runs do not have the metric to choose by.
    """
    trials = [(run, _checked(task, run)) for run in task.trials]
    chosen: dict[str, Any] | None = None
    notes: list[str] = []
    if not trials:
        chosen = task.candidates[0]
    elif all(result.is_over for _, result in trials):
        chosen, notes = _choose(task, trials)
    final = [(run, _checked(task, run)) for run in task.final_runs(chosen)] if chosen is not None else []
    return TaskResult(task, trials, chosen, final, notes)


def _checked(task: Task, run: Run) -> Result:
    """What is there of a run, which did not finish if it has no finite value of the metric."""
    result, name = run.read(), task.metric_of(run)
    if result.status != "finished":
        return result
    if name not in result.metrics:
        known = ", ".join(sorted(result.metrics))
        raise UserError(f"{run.path} has no metric {name!r} to choose by; choose another --metric. There are: {known}.")
    if not math.isfinite(result.metrics[name]):
        return Result("diverged", reason=f"{name} is {result.metrics[name]}")
    return result


def _choose(task: Task, trials: Sequence[tuple[Run, Result]]) -> tuple[dict[str, Any] | None, list[str]]:
    """The best candidate, None if there is none, and what is to be said of it."""
    means: list[tuple[float, dict[str, Any]]] = []
    for candidate in task.candidates:
        own = [(run, result) for run, result in trials if run.candidate == candidate]
        if all(result.status == "finished" for _, result in own):
            means.append((statistics.fmean(result.metrics[task.metric_of(run)] for run, result in own), candidate))
    notes = [
        f"{_show_values(run.overrides)} {result.status}, and is not chosen from: {result.reason}"
        for run, result in trials
        if result.status != "finished"
    ]
    if not means:
        return None, [*notes, "Nothing can be chosen: no values were trained to the end."]
    better = min if task.sweep.metric.endswith("loss") else max
    best, chosen = better(means, key=lambda pair: pair[0])  # the first of equal ones
    if ties := [candidate for mean, candidate in means if mean == best and candidate is not chosen]:
        others = "; ".join(map(_show_values, ties))
        notes.append(f"{_show_values(chosen)} is no better than {others}, but comes first in the grid.")
    for field, value in chosen.items():
        tried = [candidate[field] for candidate in task.candidates if field in candidate]
        if any(isinstance(each, bool) or not isinstance(each, int | float) for each in tried) or len(set(tried)) < 2:
            continue
        for extreme, word, beyond in ((min, "smallest", "smaller"), (max, "largest", "larger")):
            if value == extreme(tried):
                notes.append(f"{field}={value} is the {word} that was tried: a {beyond} one may be better still.")
    return chosen, notes


def _statistics(result: TaskResult) -> tuple[dict[str, float], dict[str, float | None]]:
    """Mean and sample standard deviation of each metric of the final runs; None for that of one run."""
    names = [name for name in (result.final[0][1].metrics if result.final else ()) if result.values(name)]
    mean = {name: statistics.fmean(result.values(name)) for name in names}
    return mean, {name: _std(result.values(name)) for name in names}


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def mean_over_tasks(results: Sequence[TaskResult]) -> dict[str, dict[str, Any]]:
    """Means over all tasks ("all") and over those of each group, where all these are complete; {} for a single task.

    The standard deviation is that of the mean over the tasks, from one seed to the next.
    """
    if len(results) < 2:
        return {}
    groups = {"all": [result.task.name for result in results], **results[0].task.sweep.groups}
    means: dict[str, dict[str, Any]] = {}
    for group, names in groups.items():
        values = [result.metric_values for result in results if result.task.name in names]
        if values and all(values):
            by_seed = [statistics.fmean(seed) for seed in zip(*values, strict=True)]
            means[group] = {"tasks": list(names), "mean": statistics.fmean(by_seed), "std": _std(by_seed)}
    return means


def to_json(results: Sequence[TaskResult], path: AnyPath) -> dict[str, Any]:
    """What `sweep.json` holds; folders are relative to the sweep's, which is `path`."""

    def show(run: Run, result: Result) -> dict[str, Any]:
        finite = {name: value for name, value in result.metrics.items() if math.isfinite(value)}
        workdir = str(run.path.relative_to(path))
        return {
            "overrides": run.overrides,
            "seed": run.seed,
            "workdir": workdir,
            "status": result.status,
            "reason": result.reason,
            "metrics": finite,
        }

    tasks = {}
    for result in results:
        mean, std = _statistics(result)
        tasks[result.task.name] = {
            "config": result.task.place,
            "arguments": list(result.task.arguments),
            "trials": [show(*each) for each in result.trials],
            "chosen": result.chosen,
            "final": [show(*each) for each in result.final],
            "final_metric": result.task.metric_of(result.final[0][0]) if result.final else None,
            "mean": mean,
            "std": std,
            "notes": result.notes,
        }
    return {"metric": results[0].task.sweep.metric, "tasks": tasks, "means": mean_over_tasks(results)}


def to_markdown(results: Sequence[TaskResult]) -> str:
    """The same as tables for people."""
    sweep = results[0].task.sweep
    lines = [f"# Sweep of {results[0].task.place.partition(':')[0]}", ""]
    for result in results:
        lines += [f"## {result.task.name}", ""]
        if result.trials:
            name = result.task.metric_of(result.trials[0][0])
            lines += [*_trial_table(result, name), ""]
        if result.final:
            lines += [*_final_table(result), ""]
        lines += [f"- {note}" for note in result.notes] + [""] * bool(result.notes)
    if len(results) > 1:
        name = sweep.metric.rpartition("/")[2]
        means = mean_over_tasks(results)
        rows = [
            [f"mean of {group}", f"{len(mean['tasks'])} tasks", _plus_minus(name, mean["mean"], mean["std"])]
            for group, mean in means.items()
        ]
        for result in results:
            values = result.metric_values
            shown = _plus_minus(name, statistics.fmean(values), _std(values)) if values else "incomplete"
            rows.append([result.task.name, _show_values(result.chosen or {}), shown])
        lines += ["## Over the tasks", "", *_table(["", "chosen", name], rows), ""]
    if any(len(result.final) > 1 for result in results):
        lines += ["± is the sample standard deviation (n - 1) over the final runs' seeds.", ""]
    return "\n".join(lines)


def _trial_table(result: TaskResult, name: str) -> list[str]:
    fields = list(dict.fromkeys(field for run, _ in result.trials for field in run.overrides))

    def row(run: Run, trial: Result) -> list[str]:
        value = _show(name, trial.metrics[name]) if name in trial.metrics else ""
        status = "chosen" if run.candidate == result.chosen else trial.status
        return [*(str(run.overrides.get(field, "")) for field in fields), value, status]

    return _table([*fields, name, ""], [row(*each) for each in result.trials])


def _final_table(result: TaskResult) -> list[str]:
    split = result.final[0][0].config.data.eval_split
    shown = [name for name in result.final[0][1].metrics if name.startswith(f"{split}/")]
    shown = list(dict.fromkeys([result.task.metric_of(result.final[0][0]), *shown]))
    rows = [
        [str(run.seed), *(_show(name, each.metrics[name]) if name in each.metrics else "" for name in shown),
         "" if each.status == "finished" else f"{each.status} {each.reason}".strip()]
        for run, each in result.final
    ]  # fmt: skip
    mean, std = _statistics(result)
    if mean:
        rows.append(["mean", *(_plus_minus(name, mean[name], std[name]) for name in shown), ""])
    return _table(["final, seed", *shown, ""], rows)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (heading, *rows)) for column in range(len(heading))]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(f'{cell:{width}}' for cell, width in zip(cells, widths, strict=True))} |"

    return [line(heading), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]


def _show(name: str, value: float) -> str:
    if name.endswith("accuracy"):
        return f"{100 * value:.2f} %"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.5g}"


def _plus_minus(name: str, mean: float, std: float | None) -> str:
    return _show(name, mean) if std is None else f"{_show(name, mean)} ± {_show(name, std)}"


def _show_values(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={value}" for field, value in overrides.items())


def write(results: Sequence[TaskResult], path: AnyPath) -> None:
    """Writes `sweep.json` and `sweep.md` into the sweep's folder."""
    write_atomically(path / "sweep.json", json.dumps(to_json(results, path), indent=2) + "\n")
    write_atomically(path / "sweep.md", to_markdown(results))
