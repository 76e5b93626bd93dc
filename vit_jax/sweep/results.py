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
from vit_jax.sweep.trials import SweepRun, SweepTask, TrialResult, complete, sweeps_of


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
    trials: list[TrialResult]
    chosen: dict[str, Any] | None
    final: list[TrialResult]
    notes: list[str]

    @property
    def due(self) -> list[SweepRun]:
        """The runs of the current stage, choosing or final, that a start of the sweep would train."""
        is_chosen = all(trial.is_over for trial in self.trials)
        return [each.run for each in (*self.trials, *(self.final if is_chosen else ())) if each.is_due]

    @property
    def is_complete(self) -> bool:
        """Whether values are chosen and all final runs are finished."""
        return self.chosen is not None and all(each.status == "finished" for each in self.final)

    @property
    def names(self) -> list[str]:
        """The names of all metrics of the final runs."""
        return list(dict.fromkeys(name for each in self.final for name in each.metrics))

    def values(self, name: str) -> list[float]:
        """A metric of the final runs, in the order of their seeds; [] unless all have a finite one."""
        values = [each.metrics.get(name, math.nan) for each in self.final]
        return values if all(map(math.isfinite, values)) else []

    @property
    def metric_values(self) -> list[float]:
        """The sweep's metric of the final runs; see `values`."""
        return self.values(self.final[0].run.metric) if self.final else []

    def statistics(self) -> tuple[dict[str, float], dict[str, float | None]]:
        """Mean and sample standard deviation of each metric of the final runs; no deviation for a single run."""
        values = {name: found for name in self.names if (found := self.values(name))}
        means = {name: statistics.fmean(found) for name, found in values.items()}
        return means, {name: _std(found) for name, found in values.items()}


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def begin(tasks: Sequence[SweepTask]) -> list[SweepTask]:
    """Gives tasks that waited for the choice of the task before them their runs, where the values are now chosen."""
    begun: dict[str, SweepTask] = {}
    for each in tasks:
        task = each
        if each.before is not None:
            before = begun[each.before.name]
            task = dataclasses.replace(each, before=before)
            if task.is_waiting and (chosen := collect(before).chosen) is not None:
                task = complete(dataclasses.replace(task, begins_with=chosen))
        begun[task.name] = task
    return list(begun.values())


def collect(task: SweepTask) -> TaskResult:
    """Reads the runs of a task, and chooses."""
    if task.before is not None and task.is_waiting:
        note = f"It begins with the weights of {task.before.name}, whose values are not chosen."
        return TaskResult(task, [], None, [], [note])
    trials = [run.read() for run in task.trials]
    chosen: dict[str, Any] | None = None
    notes: list[str] = []
    if not trials:
        chosen = task.candidates[0]
    elif all(trial.is_over for trial in trials):
        chosen, notes = _choose(task, trials)
    final = [run.read() for run in task.final_runs(chosen)] if chosen is not None else []
    result = TaskResult(task, trials, chosen, final, notes)
    notes += [*_notes_on_trials(trials), *_notes_on_final(result)]
    return result


def _choose(task: SweepTask, trials: Sequence[TrialResult]) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns the best candidate, or None, and notes."""
    means: list[tuple[float, dict[str, Any]]] = []
    for candidate in task.candidates:
        own = [trial for trial in trials if trial.run.candidate == candidate]
        if all(trial.status == "finished" for trial in own):
            means.append((statistics.fmean(trial.metrics[trial.run.metric] for trial in own), candidate))
    notes = [
        f"{_show_values(trial.run.overrides)} {trial.status}, and is not chosen from: {trial.reason}"
        for trial in trials
        if trial.status != "finished"
    ]
    if not means:
        return None, [*notes, "Nothing can be chosen: no values were trained to the end."]
    means.sort(key=lambda pair: pair[0], reverse=not task.sweep.metric.endswith("loss"))  # stable: ties stay in order
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
    """Names the winning value of an unordered field, such as a rule, and the best results of the other values."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for mean, candidate in means:
        if field in candidate:
            best.setdefault(str(candidate[field]), (mean, candidate))
    own = best.pop(str(value))[0]
    others = [f"{_show(metric, mean)} with {_show_values(each)}" for mean, each in best.values() if mean != own]
    if others:
        yield f"{field}={value} won: {_show(metric, own)}, against {', '.join(others)}."


def _notes_on_trials(trials: Sequence[TrialResult]) -> list[str]:
    """Notes on the examples that the choice uses."""
    if trials and (name := trials[0].run.metric).startswith(TRAIN_PREFIX):
        return [f"The values are chosen by {name}, which is measured on the training data."]
    if not (shared := max((trial.num_trained_on for trial in trials), default=0)):
        return []
    return [f"{shared:,} of the examples that the values are chosen by were trained on, by these runs or before."]


def _notes_on_final(result: TaskResult) -> list[str]:
    """Notes on missing final runs, and on numbers that do not cover all examples or runs."""
    if not any(each.is_over for each in result.final):
        return []
    notes = list(result.task.notes)
    finished = [each for each in result.final if each.status == "finished"]
    if len(finished) < len(result.final):
        notes.append(f"There is no mean: {len(finished)} of {len(result.final)} final runs are finished.")
    for name in result.names:
        values = {each.run.config.seed: each.metrics.get(name) for each in finished}
        if odd := {seed: value for seed, value in values.items() if value is None or not math.isfinite(value)}:
            listed = ", ".join(f"{'missing' if odd[seed] is None else odd[seed]} with seed {seed}" for seed in odd)
            notes.append(f"{name} is {listed}, so it has no mean.")
        elif name.endswith("/examples") and len(set(values.values())) > 1:
            listed = ", ".join(f"{value:,.0f} with seed {seed}" for seed, value in values.items())
            notes.append(f"{name} differs: {listed}. The final runs are measured on different examples.")
    return notes


def mean_over_tasks(results: Sequence[TaskResult]) -> dict[str, dict[str, Any]]:
    """Means over all tasks ("all") and over each group, if their tasks are complete; {} for one task or alternatives.

    Of several sweeps, the last one's tasks count.

    The standard deviation is over the seeds, of the mean over the tasks.
    """
    means: dict[str, dict[str, Any]] = {}
    results = _of_last_sweep(results)
    is_averaged = len(results) > 1 and not results[0].task.sweep.are_alternatives
    for group, names in _groups(results).items() if is_averaged else ():
        values = [result.metric_values for result in results if result.task.name in names]
        if values and all(values):
            by_seed = [statistics.fmean(seed) for seed in zip(*values, strict=True)]
            mean, std = statistics.fmean(by_seed), _std(by_seed)
            means[group] = {"tasks": list(names), "seeds": len(by_seed), "mean": mean, "std": std}
    return means


def _of_last_sweep(results: Sequence[TaskResult]) -> list[TaskResult]:
    last = sweeps_of(result.task for result in results)[-1]
    return [result for result in results if result.task.sweep is last]


def _groups(results: Sequence[TaskResult]) -> dict[str, Sequence[str]]:
    """Names of tasks by group."""
    return {"all": [result.task.name for result in results], **results[0].task.sweep.groups}


def write(results: Sequence[TaskResult], path: AnyPath) -> None:
    """Writes `sweep.json` and `sweep.md` into the sweep's folder."""
    write_atomically(path / "sweep.json", json.dumps(to_json(results, path), indent=2) + "\n")
    write_atomically(path / "sweep.md", to_markdown(results))


def to_json(results: Sequence[TaskResult], path: AnyPath) -> dict[str, Any]:
    """The content of `sweep.json`; folders are relative to `path`, the sweep's folder."""

    def show(result: TrialResult) -> dict[str, Any]:
        return {
            "overrides": result.run.overrides,
            "seed": result.run.config.seed,
            "workdir": str(result.run.path.relative_to(path)),
            "status": result.status,
            "reason": result.reason,
            "metrics": {name: value for name, value in result.metrics.items() if math.isfinite(value)},
        } | ({} if result.step is None else {"step": result.step})

    tasks = {}
    for result in results:
        mean, std = result.statistics()
        tasks[result.task.name] = {
            "config": result.task.place,
            "arguments": list(result.task.arguments),
            "trials": list(map(show, result.trials)),
            "chosen": result.chosen,
            "final": list(map(show, result.final)),
            "final_metric": result.final[0].run.metric if result.final else None,
            "seeds": len(result.final) if mean else 0,
            "mean": mean,
            "std": std,
            "notes": result.notes,
        }
        if result.task.before is not None:
            tasks[result.task.name]["begins_with"] = result.task.before.name
        if result.task.sweep.metric != results[-1].task.sweep.metric:
            tasks[result.task.name]["metric"] = result.task.sweep.metric
    return {"metric": results[-1].task.sweep.metric, "tasks": tasks, "means": mean_over_tasks(results)}


def to_markdown(results: Sequence[TaskResult]) -> str:
    """The results as markdown tables."""
    parts = [f"# Sweep of {results[0].task.place.partition(':')[0]}"]
    for result in results:
        parts.append(f"## {result.task.name}")
        parts += [_trial_table(result.trials, result.chosen)] if result.trials else []
        parts += [_final_table(result)] if result.final else []
        parts += ["\n".join(f"- {note}" for note in result.notes)] if result.notes else []
    if len(last := _of_last_sweep(results)) > 1:
        parts += ["## Over the tasks", _tasks_table(last)]
    if any(len(result.final) > 1 for result in results):
        parts.append("± is the sample standard deviation (n - 1) over the final runs' seeds.")
    return "\n\n".join(parts) + "\n"


def _trial_table(trials: Sequence[TrialResult], chosen: Mapping[str, Any] | None) -> str:
    fields = list(dict.fromkeys(field for trial in trials for field in trial.run.overrides))
    name = trials[0].run.metric
    rows = []
    for trial in trials:
        status = "chosen" if trial.run.candidate == chosen else trial.status
        rows.append([*(trial.run.overrides.get(field, "") for field in fields), _show_metric(name, trial), status])
    return format_table([*fields, name, ""], rows, num_left=len(fields) + 2)


def _final_table(result: TaskResult) -> str:
    first = result.final[0].run
    own = [name for name in result.names if name.startswith(f"{first.config.data.eval_split}/")]
    shown = list(dict.fromkeys([first.metric, *own, *result.task.sweep.more_metrics]))
    rows = []
    for each in result.final:
        problem = "" if each.status == "finished" else f"{each.status} {each.reason}".strip()
        problem = problem or (f"step {each.step:,}" if each.step is not None else "")
        rows.append([each.run.config.seed, *(_show_metric(name, each) for name in shown), problem])
    mean, std = result.statistics()
    if mean:
        cells = [_plus_minus(name, mean[name], std[name]) if name in mean else "" for name in shown]
        rows.append([f"mean of {len(result.final)}", *cells, ""])
    return format_table(["final, seed", *shown, ""], rows, num_left=len(shown) + 2)


def _tasks_table(results: Sequence[TaskResult]) -> str:
    sweep = results[0].task.sweep
    name, rows = sweep.metric.rpartition("/")[2], []
    more = [""] * len(sweep.more_metrics)
    for group, each in mean_over_tasks(results).items():
        count = f"{len(each['tasks'])} tasks, {each['seeds']} seeds"
        rows.append([f"mean of {group}", count, _plus_minus(name, each["mean"], each["std"]), *more])
    for group, names in () if sweep.are_alternatives else _groups(results).items():
        if lacking := [each.task.name for each in results if each.task.name in names and not each.metric_values]:
            rows.append([f"mean of {group}", f"{len(names)} tasks", f"incomplete: {', '.join(lacking)}", *more])
    for result in results:
        metrics = (result.metric_values, *map(result.values, sweep.more_metrics))
        cells = [
            _plus_minus(metric, statistics.fmean(values), _std(values)) if values else "incomplete"
            for metric, values in zip((name, *sweep.more_metrics), metrics, strict=True)
        ]
        rows.append([result.task.name, _show_values(result.chosen or {}), *cells])
    return format_table(["", "chosen", name, *sweep.more_metrics], rows, num_left=3)


def _show_metric(name: str, result: TrialResult) -> str:
    return _show(name, result.metrics[name]) if name in result.metrics else ""


def _show(name: str, value: float) -> str:
    if name.endswith(("accuracy", "shot")):
        return f"{100 * value:.2f} %"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.5g}"


def _plus_minus(name: str, mean: float, std: float | None) -> str:
    return _show(name, mean) if std is None else f"{_show(name, mean)} ± {_show(name, std)}"


def _show_values(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={value}" for field, value in overrides.items())
