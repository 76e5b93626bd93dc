"""What came out of a sweep: the choice, mean and standard deviation, as JSON and as tables."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vit_jax.errors import UserError
from vit_jax.run.metrics import TRAIN_PREFIX
from vit_jax.run.workdir import AnyPath, write_atomically
from vit_jax.sweep.trials import Result, Run, Task


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
    """Reads what is there of a task, and chooses."""
    trials = [(run, read(task, run)) for run in task.trials]
    chosen: dict[str, Any] | None = None
    notes: list[str] = []
    if not trials:
        chosen = task.candidates[0]
    elif all(result.is_over for _, result in trials):
        chosen, notes = _choose(task, trials)
    final = [(run, read(task, run, is_final=True)) for run in task.final_runs(chosen)] if chosen is not None else []
    notes += [*_notes_on_trials(task, trials), *_notes_on_final(task, final)]
    return TaskResult(task, trials, chosen, final, notes)


def read(task: Task, run: Run, *, is_final: bool = False) -> Result:
    """What is there of a run, which is of no use if it has no finite value of the metric."""
    try:
        result = run.read()
    except UserError as error:
        return Result("failed", reason=str(error))
    name = task.metric_of(run)
    if result.status != "finished":
        return result
    if name not in result.metrics:
        return Result("unusable", reason=_no_metric(name, result))
    if not math.isfinite(result.metrics[name]):
        return Result("diverged", reason=f"{name} is {result.metrics[name]}")
    if is_final and (shared := _trained_on(name, result)):
        return Result("unusable", reason=f"{shared:,} of the examples that {name} is measured on were trained on")
    return result


def check_metric(task: Task, run: Run) -> None:
    """Checks that a run, if it is finished, has the metric to choose by.

    Raises:
      UserError: it has not; says which there are.
    """
    if (result := run.read()).status == "finished" and (name := task.metric_of(run)) not in result.metrics:
        raise UserError(f"{run.path} {_no_metric(name, result)}. Choose another --metric.")


def _no_metric(name: str, result: Result) -> str:
    return f"has no metric {name!r} to choose by; there are {', '.join(sorted(result.metrics))}"


def _trained_on(metric: str, result: Result) -> int:
    """How many of the examples that a metric is measured on were trained on."""
    return next((count for name, count in result.overlap.items() if metric.startswith(f"{name}/")), 0)


def _notes_on_trials(task: Task, trials: Sequence[tuple[Run, Result]]) -> list[str]:
    """What is to be said of the examples that values are chosen by."""
    if trials and (name := task.metric_of(trials[0][0])).startswith(TRAIN_PREFIX):
        return [f"The values are chosen by {name}, which is measured on what is trained on."]
    shared = max((_trained_on(task.metric_of(run), result) for run, result in trials), default=0)
    if not shared:
        return []
    return [f"{shared:,} of the examples that the values are chosen by were trained on, by these runs or before."]


def _notes_on_final(task: Task, final: Sequence[tuple[Run, Result]]) -> list[str]:
    """What is to be said of the final runs: which are missing, and which numbers are not of all examples or runs."""
    if not any(result.is_over for _, result in final):
        return []
    notes = list(task.notes)
    finished = [(run, result) for run, result in final if result.status == "finished"]
    if len(finished) < len(final):
        notes.append(f"There is no mean: {len(finished)} of {len(final)} final runs are finished.")
    for name in _names(final):
        values = {run.seed: result.metrics.get(name) for run, result in finished}
        odd = {seed: value for seed, value in values.items() if value is None or not math.isfinite(value)}
        if odd:
            listed = ", ".join(
                f"{'missing' if value is None else value} with seed {seed}" for seed, value in odd.items()
            )
            notes.append(f"{name} is {listed}, so there is no mean of it.")
        elif name.endswith("/examples") and len(set(values.values())) > 1:
            listed = ", ".join(f"{value:,.0f} with seed {seed}" for seed, value in values.items() if value is not None)
            notes.append(f"{name} differs: {listed}. The final runs are measured on different examples.")
    return notes


def _names(final: Sequence[tuple[Run, Result]]) -> list[str]:
    """Names of all metrics that final runs have."""
    return list(dict.fromkeys(name for _, result in final for name in result.metrics))


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
        if not _is_number(value):
            notes += _rivals(field, value, means, better, task.sweep.metric)
            continue
        tried = [each[field] for each in task.candidates if field in each and {**each, field: value} == chosen]
        if not all(map(_is_number, tried)) or len(set(tried)) < 2:
            continue
        for extreme, word, beyond in ((min, "smallest", "smaller"), (max, "largest", "larger")):
            if value == extreme(tried):
                notes.append(f"{field}={value} is the {word} that was tried: a {beyond} one may be better still.")
    return chosen, notes


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rivals(
    field: str, value: Any, means: Sequence[tuple[float, dict[str, Any]]], better: Callable[..., Any], metric: str
) -> Iterator[str]:
    """Says which value of a field that has no order, such as a rule, won, and how good the best of the others were."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for mean, candidate in means:
        if field in candidate:
            pair, key = (mean, candidate), str(candidate[field])
            best[key] = better(best.get(key, pair), pair, key=lambda pair: pair[0])
    own = best.pop(str(value))[0]
    others = [f"{_show(metric, mean)} with {_show_values(each)}" for mean, each in best.values() if mean != own]
    if others:
        yield f"{field}={value} won: {_show(metric, own)}, against {', '.join(others)}."


def _statistics(result: TaskResult) -> tuple[dict[str, float], dict[str, float | None]]:
    """Mean and sample standard deviation of each metric of the final runs; None for that of one run."""
    names = [name for name in _names(result.final) if result.values(name)]
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
    means: dict[str, dict[str, Any]] = {}
    for group, names in _groups(results).items():
        values = [result.metric_values for result in results if result.task.name in names]
        if values and all(values):
            by_seed = [statistics.fmean(seed) for seed in zip(*values, strict=True)]
            mean, seeds = statistics.fmean(by_seed), len(by_seed)
            means[group] = {"tasks": list(names), "seeds": seeds, "mean": mean, "std": _std(by_seed)}
    return means


def _groups(results: Sequence[TaskResult]) -> dict[str, Sequence[str]]:
    """Names of tasks by group."""
    return {"all": [result.task.name for result in results], **results[0].task.sweep.groups}


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
            "seeds": len(result.final) if mean else 0,
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
            [
                f"mean of {group}",
                f"{len(mean['tasks'])} tasks, {mean['seeds']} seeds",
                _plus_minus(name, mean["mean"], mean["std"]),
            ]
            for group, mean in means.items()
        ]
        for group, names in _groups(results).items():
            if lacking := [each.task.name for each in results if each.task.name in names and not each.metric_values]:
                rows.append([f"mean of {group}", f"{len(names)} tasks", f"incomplete: {', '.join(lacking)}"])
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
    shown = [name for name in _names(result.final) if name.startswith(f"{split}/")]
    shown = list(dict.fromkeys([result.task.metric_of(result.final[0][0]), *shown]))
    rows = [
        [str(run.seed), *(_show(name, each.metrics[name]) if name in each.metrics else "" for name in shown),
         "" if each.status == "finished" else f"{each.status} {each.reason}".strip()]
        for run, each in result.final
    ]  # fmt: skip
    mean, std = _statistics(result)
    if mean:
        cells = [_plus_minus(name, mean[name], std[name]) if name in mean else "" for name in shown]
        rows.append([f"mean of {len(result.final)}", *cells, ""])
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
