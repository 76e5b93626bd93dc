"""The results of a sweep: the choice, mean and standard deviation, as JSON and as tables."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vit_jax.console import format_table
from vit_jax.files import AnyPath, write_atomically
from vit_jax.run.metrics import TRAIN_PREFIX
from vit_jax.sweep.trials import SweepRun, SweepTask, TrialResult

Results = list[tuple[SweepRun, TrialResult]]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The state of a task.

    Attributes:
      task: the task.
      trials: the results of its candidates.
      chosen: the chosen values; None while trials are missing, or if all failed.
      final: its final runs; [] while nothing is chosen.
      notes: notes on the numbers.
    """

    task: SweepTask
    trials: Results
    chosen: dict[str, Any] | None
    final: Results
    notes: list[str]

    @property
    def due(self) -> list[SweepRun]:
        """The runs of the current stage, choosing or final, that a start of the sweep would train."""
        stage = self.trials if any(not result.is_over for _, result in self.trials) else [*self.trials, *self.final]
        return [run for run, result in stage if result.is_due]

    @property
    def is_complete(self) -> bool:
        """Whether values are chosen and all final runs are finished."""
        return self.chosen is not None and all(result.status == "finished" for _, result in self.final)

    @property
    def names(self) -> list[str]:
        """The names of all metrics of the final runs."""
        return list(dict.fromkeys(name for _, result in self.final for name in result.metrics))

    def values(self, name: str) -> list[float]:
        """A metric of the final runs, in the order of their seeds; [] unless all have a finite one."""
        values = [result.metrics.get(name, math.nan) for _, result in self.final]
        return values if all(map(math.isfinite, values)) else []

    @property
    def metric_values(self) -> list[float]:
        """The sweep's metric of the final runs; see `values`."""
        return self.values(self.final[0][0].metric) if self.final else []

    def statistics(self) -> tuple[dict[str, float], dict[str, float | None]]:
        """Mean and sample standard deviation of each metric of the final runs; no deviation for a single run."""
        values = {name: found for name in self.names if (found := self.values(name))}
        means = {name: statistics.fmean(found) for name, found in values.items()}
        return means, {name: _std(found) for name, found in values.items()}


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def collect(task: SweepTask) -> TaskResult:
    """Reads the runs of a task, and chooses."""
    trials = [(run, run.read()) for run in task.trials]
    chosen: dict[str, Any] | None = None
    notes: list[str] = []
    if not trials:
        chosen = task.candidates[0]
    elif all(result.is_over for _, result in trials):
        chosen, notes = _choose(task, trials)
    final = [(run, run.read()) for run in task.final_runs(chosen)] if chosen is not None else []
    result = TaskResult(task, trials, chosen, final, notes)
    notes += [*_notes_on_trials(trials), *_notes_on_final(result)]
    return result


# ---- The choice.


def _choose(task: SweepTask, trials: Results) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns the best candidate, or None, and notes."""
    means: list[tuple[float, dict[str, Any]]] = []
    for candidate in task.candidates:
        own = [(run, result) for run, result in trials if run.candidate == candidate]
        if all(result.status == "finished" for _, result in own):
            means.append((statistics.fmean(result.metrics[run.metric] for run, result in own), candidate))
    notes = [
        f"{_show_values(run.overrides)} {result.status}, and is not chosen from: {result.reason}"
        for run, result in trials
        if result.status != "finished"
    ]
    if not means:
        return None, [*notes, "Nothing can be chosen: no values were trained to the end."]
    better = min if task.sweep.metric.endswith("loss") else max
    means.sort(key=lambda pair: pair[0], reverse=better is max)  # stable: ties stay in order
    best, chosen = means[0]
    if ties := [candidate for mean, candidate in means[1:] if mean == best]:
        others = "; ".join(map(_show_values, ties))
        notes.append(f"{_show_values(chosen)} is no better than {others}, but comes first in the grid.")
    for field, value in chosen.items():
        if not _is_number(value):
            notes += _note_rivals(field, value, means, task.sweep.metric)
            continue
        tried = [each[field] for each in task.candidates if field in each and {**each, field: value} == chosen]
        if all(map(_is_number, tried)) and len(set(tried)) > 1:
            if value == min(tried):
                notes.append(f"{field}={value} is the smallest that was tried: a smaller one may be better still.")
            if value == max(tried):
                notes.append(f"{field}={value} is the largest that was tried: a larger one may be better still.")
    return chosen, notes


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _note_rivals(field: str, value: Any, means: Sequence[tuple[float, dict[str, Any]]], metric: str) -> Iterator[str]:
    """Names the winning value of an unordered field, such as a rule, and the best results of the other values.

    Args:
      field: the field.
      value: the chosen value.
      means: means of all candidates, the best first.
      metric: the metric of the choice.
    """
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for mean, candidate in means:
        if field in candidate:
            best.setdefault(str(candidate[field]), (mean, candidate))
    own = best.pop(str(value))[0]
    others = [f"{_show(metric, mean)} with {_show_values(each)}" for mean, each in best.values() if mean != own]
    if others:
        yield f"{field}={value} won: {_show(metric, own)}, against {', '.join(others)}."


def _notes_on_trials(trials: Results) -> list[str]:
    """Notes on the examples that the choice uses."""
    if trials and (name := trials[0][0].metric).startswith(TRAIN_PREFIX):
        return [f"The values are chosen by {name}, which is measured on the training data."]
    shared = max((result.num_trained_on for _, result in trials), default=0)
    if not shared:
        return []
    return [f"{shared:,} of the examples that the values are chosen by were trained on, by these runs or before."]


def _notes_on_final(result: TaskResult) -> list[str]:
    """Notes on missing final runs, and on numbers that do not cover all examples or runs."""
    final = result.final
    if not any(each.is_over for _, each in final):
        return []
    notes = list(result.task.notes)
    finished = [(run, each) for run, each in final if each.status == "finished"]
    if len(finished) < len(final):
        notes.append(f"There is no mean: {len(finished)} of {len(final)} final runs are finished.")
    for name in result.names:
        values = {run.seed: each.metrics.get(name) for run, each in finished}
        if odd := {seed: value for seed, value in values.items() if value is None or not math.isfinite(value)}:
            shown = {seed: "missing" if value is None else value for seed, value in odd.items()}
            listed = ", ".join(f"{value} with seed {seed}" for seed, value in shown.items())
            notes.append(f"{name} is {listed}, so there is no mean of it.")
        elif name.endswith("/examples") and len(set(values.values())) > 1:
            listed = ", ".join(f"{value:,.0f} with seed {seed}" for seed, value in values.items() if value is not None)
            notes.append(f"{name} differs: {listed}. The final runs are measured on different examples.")
    return notes


# ---- Over tasks.


def mean_over_tasks(results: Sequence[TaskResult]) -> dict[str, dict[str, Any]]:
    """Means over all tasks ("all") and over each group, if their tasks are complete; {} for a single task.

    The standard deviation is over the seeds, of the mean over the tasks.
    """
    means: dict[str, dict[str, Any]] = {}
    for group, names in _groups(results).items() if len(results) > 1 else ():
        values = [result.metric_values for result in results if result.task.name in names]
        if values and all(values):
            by_seed = [statistics.fmean(seed) for seed in zip(*values, strict=True)]
            mean, std = statistics.fmean(by_seed), _std(by_seed)
            means[group] = {"tasks": list(names), "seeds": len(by_seed), "mean": mean, "std": std}
    return means


def _groups(results: Sequence[TaskResult]) -> dict[str, Sequence[str]]:
    """Names of tasks by group."""
    return {"all": [result.task.name for result in results], **results[0].task.sweep.groups}


# ---- JSON and tables.


def write(results: Sequence[TaskResult], path: AnyPath) -> None:
    """Writes `sweep.json` and `sweep.md` into the sweep's folder."""
    write_atomically(path / "sweep.json", json.dumps(to_json(results, path), indent=2) + "\n")
    write_atomically(path / "sweep.md", to_markdown(results))


def to_json(results: Sequence[TaskResult], path: AnyPath) -> dict[str, Any]:
    """The content of `sweep.json`; folders are relative to `path`, the sweep's folder."""

    def show(run: SweepRun, result: TrialResult) -> dict[str, Any]:
        return {
            "overrides": run.overrides,
            "seed": run.seed,
            "workdir": str(run.path.relative_to(path)),
            "status": result.status,
            "reason": result.reason,
            "metrics": {name: value for name, value in result.metrics.items() if math.isfinite(value)},
        }

    tasks = {}
    for result in results:
        mean, std = result.statistics()
        tasks[result.task.name] = {
            "config": result.task.place,
            "arguments": list(result.task.arguments),
            "trials": [show(*each) for each in result.trials],
            "chosen": result.chosen,
            "final": [show(*each) for each in result.final],
            "final_metric": result.final[0][0].metric if result.final else None,
            "seeds": len(result.final) if mean else 0,
            "mean": mean,
            "std": std,
            "notes": result.notes,
        }
    return {"metric": results[0].task.sweep.metric, "tasks": tasks, "means": mean_over_tasks(results)}


def to_markdown(results: Sequence[TaskResult]) -> str:
    """The results as markdown tables."""
    parts = [f"# Sweep of {results[0].task.place.partition(':')[0]}"]
    for result in results:
        parts.append(f"## {result.task.name}")
        parts += [_trial_table(result)] if result.trials else []
        parts += [_final_table(result)] if result.final else []
        parts += ["\n".join(f"- {note}" for note in result.notes)] if result.notes else []
    if len(results) > 1:
        parts += ["## Over the tasks", _tasks_table(results)]
    if any(len(result.final) > 1 for result in results):
        parts.append("± is the sample standard deviation (n - 1) over the final runs' seeds.")
    return "\n\n".join(parts) + "\n"


def _trial_table(result: TaskResult) -> str:
    fields = list(dict.fromkeys(field for run, _ in result.trials for field in run.overrides))
    name = result.trials[0][0].metric
    rows = [
        [
            *(run.overrides.get(field, "") for field in fields),
            _show_metric(name, trial),
            "chosen" if run.candidate == result.chosen else trial.status,
        ]
        for run, trial in result.trials
    ]
    return _table([*fields, name, ""], rows)


def _final_table(result: TaskResult) -> str:
    first = result.final[0][0]
    own = [name for name in result.names if name.startswith(f"{first.config.data.eval_split}/")]
    shown = list(dict.fromkeys([first.metric, *own]))
    rows = [
        [
            run.seed,
            *(_show_metric(name, each) for name in shown),
            "" if each.status == "finished" else f"{each.status} {each.reason}".strip(),
        ]
        for run, each in result.final
    ]
    mean, std = result.statistics()
    if mean:
        cells = [_plus_minus(name, mean[name], std[name]) if name in mean else "" for name in shown]
        rows.append([f"mean of {len(result.final)}", *cells, ""])
    return _table(["final, seed", *shown, ""], rows)


def _tasks_table(results: Sequence[TaskResult]) -> str:
    name = results[0].task.sweep.metric.rpartition("/")[2]
    rows = [
        [
            f"mean of {group}",
            f"{len(each['tasks'])} tasks, {each['seeds']} seeds",
            _plus_minus(name, each["mean"], each["std"]),
        ]
        for group, each in mean_over_tasks(results).items()
    ]
    for group, names in _groups(results).items():
        if lacking := [each.task.name for each in results if each.task.name in names and not each.metric_values]:
            rows.append([f"mean of {group}", f"{len(names)} tasks", f"incomplete: {', '.join(lacking)}"])
    for result in results:
        values = result.metric_values
        shown = _plus_minus(name, statistics.fmean(values), _std(values)) if values else "incomplete"
        rows.append([result.task.name, _show_values(result.chosen or {}), shown])
    return _table(["", "chosen", name], rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return format_table(headings, rows, num_left=len(headings))


def _show_metric(name: str, result: TrialResult) -> str:
    return _show(name, result.metrics[name]) if name in result.metrics else ""


def _show(name: str, value: float) -> str:
    if name.endswith("accuracy"):
        return f"{100 * value:.2f} %"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.5g}"


def _plus_minus(name: str, mean: float, std: float | None) -> str:
    return _show(name, mean) if std is None else f"{_show(name, mean)} ± {_show(name, std)}"


def _show_values(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={value}" for field, value in overrides.items())
