"""Finds runs, evaluations and sweeps below folders, and reads their numbers."""

import dataclasses
import fnmatch
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vit_jax.console import show_name
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, is_remote, parse_path
from vit_jax.json_files import Fields, read_object
from vit_jax.report import lineage, settings
from vit_jax.report.hardware_figures import HardwareNumber, read_hardware
from vit_jax.report.lineage import Lineage
from vit_jax.report.measured import ACCURACY, REAL, TOP_5, MeasuredModel, history_of, measure
from vit_jax.report.names import UNKNOWN, data_set_name, model_label
from vit_jax.report.purposes import (
    DESCRIPTION,
    FINAL,
    NOT_CHOSEN,
    RESULTS,
    Purpose,
    SweepPurposes,
    purpose_by_split,
    resolved,
    stage_of,
    study_of,
)
from vit_jax.run.metrics import TIME_PREFIX
from vit_jax.run.run_result import RunResult, config_fields

LOOKED_FOR = (
    "config.json and summary.json of a run, evaluation.json of --mode=eval, sweep.json of a sweep, figure_12*.json of "
    "benchmarks/figure_12.py"
)
_HARDWARE = "figure_12*.json"

_RUN, _EVALUATION = "config.json", "evaluation.json"
_OTHERS_OF_RUNS = ("summary.json", "metrics.jsonl", "starts.jsonl", "model.json")  # beside config.json
_NEVER_RUNS = {"checkpoints", "best", "emergency", "tensorboard", "profile", "diverged"}  # a run's own folders
_SWEEPS_ABOVE = 6  # how far above a given folder its sweep may be
_WEIGHTS_BELOW = 3  # folders between a run and weights inside it, as in <run>/best/100
_BEST = "best"


@dataclasses.dataclass
class FoundRuns:
    """The numbers found below folders, and a line for everything that is left out.

    `hardware` has those of figure 12, by the half of the figure.
    """

    models: list[MeasuredModel]
    left_out: list[str]
    hardware: dict[str, list[HardwareNumber]] = dataclasses.field(default_factory=dict)


def find(places: Sequence[str]) -> FoundRuns:
    """Reads all runs, evaluations and sweeps in some folders (or gs://bucket/folder) and below.

    Raises:
      UserError: a folder does not exist, or none has a result.
    """
    reader = _Reader()
    for place in places:
        root = parse_path(place)
        if not root.exists():
            raise UserError(
                f"there is no folder {show_name(place)}; give workdirs of runs or sweeps, or folders with such."
            )
        if not root.is_dir():
            reader.left_out.append(f"{place}: not a folder")
        elif not reader.look_into(root):
            reader.left_out.append(f"{place}: nothing of a run in it")
    found = reader.read()
    found.left_out = [show_name(line) for line in found.left_out]
    if not found.models and not found.hardware:
        listed = "".join(f"\n  {line}" for line in found.left_out)
        raise UserError(
            f"no result in {', '.join(map(show_name, places))} or below. Looked for {LOOKED_FOR}.{listed}\n"
            "Train (python -m vit_jax.main) or evaluate (--mode=eval) first, or name the folder that has the workdirs."
        )
    return found


class _Reader:
    """Collects files before reading them, because a run's sweep, or the run behind its weights, may come later."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self._given: dict[str, AnyPath] = {}  # the given folders, as the user named them
        self._run_folders: list[AnyPath] = []
        self._evaluations: list[AnyPath] = []
        self._sweep_files: list[AnyPath] = []
        self._hardware_files: list[AnyPath] = []
        self._sweeps = SweepPurposes()
        self._runs: dict[str, RunResult] = {}  # by folder
        self._lineages: dict[str, Lineage] = {}

    def look_into(self, root: AnyPath) -> bool:
        """Collects the files in a folder and below, and the sweeps around it; returns whether there are any."""
        before = self._num_files
        self._look_below(root)
        found = self._num_files > before
        around = root.parents if is_remote(root) else pathlib.Path(root).absolute().parents
        for folder in list(around)[:_SWEEPS_ABOVE]:
            self._sweep_files += [folder / name for name in (RESULTS, DESCRIPTION) if (folder / name).is_file()][:1]
        return found

    @property
    def _num_files(self) -> int:
        return len(self._run_folders + self._evaluations + self._sweep_files + self._hardware_files)

    def _look_below(self, folder: AnyPath) -> None:
        if resolved(folder) in self._given:
            return
        self._given[resolved(folder)] = folder
        try:
            inside = sorted(folder.iterdir(), key=lambda path: path.name)
        except OSError as error:
            self.left_out.append(f"{folder}: {error.strerror or error}")
            return
        names = {path.name for path in inside}
        self._run_folders += [folder] if _RUN in names else []
        self._evaluations += [folder] if _EVALUATION in names else []
        self._sweep_files += [folder / name for name in (RESULTS, DESCRIPTION) if name in names][:1]
        self._hardware_files += [path for path in inside if fnmatch.fnmatch(path.name, _HARDWARE)]
        others = [name for name in _OTHERS_OF_RUNS if name in names]
        if others and not names & {_RUN, _EVALUATION}:
            self.left_out.append(f"{folder}: it has {', '.join(others)} of a run, but no {_RUN}")
        for path in inside:
            is_own = path.name in _NEVER_RUNS and (others or _RUN in names)
            if not is_own and not path.name.startswith(".") and path.is_dir():
                self._look_below(path)

    def read(self) -> FoundRuns:
        """Reads the collected files."""
        for file in self._sweep_files:
            for each in dict.fromkeys((file, file.parent / DESCRIPTION)):  # the second if the first is damaged
                try:
                    if each.exists():
                        self.left_out += self._sweeps.add(each)
                        break
                except UserError as problem:
                    self.left_out.append(str(problem))
        by_run: dict[str, list[MeasuredModel]] = {}
        for read, folders in ((self._read_run, self._run_folders), (self._read_evaluation, self._evaluations)):
            for folder in folders:
                try:
                    read(folder, by_run)
                except UserError as problem:
                    self.left_out.append(str(problem))
        models = [model for of_run in by_run.values() for model in of_run]
        self.left_out += [
            f"{model.path}: {name} is not a result: {value.flaw}"
            for model in models
            for name, value in model.values.items()
            if model.is_result and value.flaw and not name.endswith(TOP_5)
        ]
        models = self._without_repeats([_with_flaws(model) for model in models])
        hardware = self._read_hardware()
        return FoundRuns(models, list(dict.fromkeys(self.left_out)), hardware)

    def _read_hardware(self) -> dict[str, list[HardwareNumber]]:
        halves: dict[str, list[HardwareNumber]] = {}
        for file in self._hardware_files:
            try:
                for half, numbers in read_hardware(file).items():
                    if numbers:
                        halves.setdefault(half, []).extend(numbers)
            except UserError as problem:
                self.left_out.append(str(problem))
        return halves

    def _add(self, models: list[MeasuredModel], model: MeasuredModel) -> None:
        """Adds an evaluation to a model with the same parameters, or as another model."""
        for index, other in enumerate(models):
            shared = model.values.keys() & other.values.keys()
            agrees = all(model.values[name].agrees_with(other.values[name]) for name in shared)
            if other.image_size != model.image_size or not agrees:
                continue
            if shared:
                self.left_out.append(
                    f"{model.path}: repeats what {other.path} measured, which counts: {_compare(model, other)}"
                )
            if model.values.keys() - shared:
                values, besides = {**model.values, **other.values}, (*other.besides, str(model.path))
                models[index] = dataclasses.replace(other, values=values, besides=besides)
            return
        models.append(model)

    def _without_repeats(self, models: Sequence[MeasuredModel]) -> list[MeasuredModel]:
        """Marks runs that repeat another run's setting and seed. The first folder counts."""
        marked: list[MeasuredModel] = []
        for model in sorted(models, key=lambda model: str(model.path)):
            kept = [other for other in marked if other.is_result] if model.is_result else []
            first = next((other for other in kept if _repeats(model, other)), None)
            marked.append(dataclasses.replace(model, purpose=Purpose(f"repeats {first.path}")) if first else model)
            if first:
                self.left_out.append(
                    f"{model.path}: repeats {first.path}, its setting and its seed {model.seed}, and is not counted: "
                    f"{_compare(model, first)}"
                )
        return marked

    def _load(self, folder: AnyPath) -> RunResult:
        """Loads the run in a folder; raises `UserError` if one of its files is damaged."""
        key = resolved(folder)
        run = self._runs.setdefault(key, RunResult(self._given.get(key, folder)))
        _ = run.fields, run.model, run.summary
        return run

    def _find_run(self, place: str) -> tuple[RunResult, str] | None:
        """Finds the run of weights that a config names, and their path in its workdir ("" for its best parameters)."""
        try:
            path = parse_path(place)
        except UserError:
            return None
        try:
            folder = next((each for each in [path, *path.parents][: _WEIGHTS_BELOW + 1] if _is_run(each)), None)
            if folder is None:
                path, folder = self._find_moved(path)
            if folder is None:
                return None
            inside = str(path)[len(str(folder)) :].strip("/")
            return self._load(folder), "" if inside == _BEST else inside
        except (UserError, OSError) as problem:
            self.left_out.append(f"{place}: what these weights were trained on cannot be read: {problem}")
            return None

    def _find_moved(self, path: AnyPath) -> tuple[AnyPath, AnyPath | None]:
        """Finds weights, and their run, among the runs that were found, by the end of their path.

        For relative paths, which start where the run was started, and for folders that have moved.
        """
        parts = [part for part in path.parts if part not in ("/", ".", "..")]
        for length in range(len(parts), max(0, len(parts) - _WEIGHTS_BELOW), -1):
            inside = parts[length:]
            ends = [folder for folder in self._run_folders if list(folder.parts[-length:]) == parts[:length]]
            if len(ends) == 1 and (not inside or inside[0] in _NEVER_RUNS):
                return ends[0].joinpath(*inside), ends[0]
        return path, None

    def _lineage_of(self, place: str) -> Lineage:
        """Finds the lineage of weights that a config names."""
        if released := lineage.find_released(place):
            return lineage.of_released(released)
        found = self._find_run(place)
        if found is None:
            return Lineage(place, UNKNOWN, place)
        run, inside = found
        key = f"@{inside}" if inside else ""
        if not inside and run.fields["checkpoint.keep_best"] and run.fields["data.eval_split"]:
            chosen_by = {name: value for name, value in run.fields.items() if name.startswith(("data.eval_", "eval_"))}
            key = f"@best {settings.key_of(chosen_by)}"
        if run.facts:
            key += f"@{run.facts.train.fingerprint}"
        after = self._lineage_after(run)
        return dataclasses.replace(after, key=after.key + key)

    def _lineage_after(self, run: RunResult) -> Lineage:
        key = resolved(run.path)
        if key not in self._lineages:
            self._lineages[key] = Lineage(str(run.path), UNKNOWN, str(run.path))  # in case of a cycle of runs
            before = self._lineage_of(run.fields["weights"]) if run.fields["weights"] else None
            changes = settings.config_changes(run.starts)
            self._lineages[key] = lineage.after_run(before, run, self._arguments_of(run), changes)
        return self._lineages[key]

    def _arguments_of(self, run: RunResult, *, asked: tuple[str, ...] = ()) -> dict[str, Any]:
        """The arguments of `create_model`, as far as known; `asked` are the runs that began with this one."""
        if run.model is not None:
            return run.model
        of_weights, place = {}, run.fields["weights"]
        if place and (released := lineage.find_released(place)):
            of_weights = {"name": released.model, **released.model_overrides}
        elif place and (found := self._find_run(place)) and str(found[0].path) not in asked:
            of_weights = self._arguments_of(found[0], asked=(*asked, str(run.path)))
        fields = {name: value for name, value in run.fields.items() if name.startswith("model.") and value is not None}
        given = {name.removeprefix("model."): value for name, value in fields.items()}
        return {"name": run.summary.get("model", "unknown"), **of_weights, **given}

    def _measure(
        self,
        path: AnyPath,
        fields: Mapping[str, Any],
        model: Mapping[str, Any],
        metrics: Mapping[str, Any],
        training: Mapping[str, Any],
        *,
        main: str = "",
        **how: Any,
    ) -> MeasuredModel:
        """Reads the numbers of a model; records those that are left out. `training` has attributes of its training.

        Raises:
          UserError: the number `main` is left out.
        """
        values, problems = measure(fields, model, metrics, **how)
        for problem in problems:
            if problem.startswith(f"{main} is"):
                raise UserError(f"{path}: {problem}")
        self.left_out += [f"{path}: {problem}" for problem in problems]
        return MeasuredModel(
            path=path,
            model=model_label(model),
            fields=model,
            dataset=fields["data.dataset"],
            eval_split=fields["data.eval_split"],
            image_size=fields["data.image_size"],
            values=values,
            **training,
        )

    def _read_run(self, folder: AnyPath, by_run: dict[str, list[MeasuredModel]]) -> None:
        """Reads the numbers of a run; raises `UserError` if it did not finish, or is damaged."""
        run = self._load(folder)
        fields, split = run.fields, run.fields["data.eval_split"]
        last = max((row["step"] for row in run.rows), default=0)
        if not run.summary:
            why = f"failed: {run.failure.partition('. ')[0]}" if run.failure else f"not finished (step {last})"
            raise UserError(f"{run.path}: {why}")
        if run.steps is None or last > run.steps:
            raise UserError(f"{run.path}: went on after its summary, and is at step {last}")
        purpose = self._purpose_of(run)
        metrics: dict[str, Any] = {}
        counts = run.steps if purpose.step is None else purpose.step
        for row in run.rows:
            if row["step"] == counts:  # every evaluation runs at the end
                metrics |= row
        if split is not None and not any(name.startswith(f"{split}/") for name in metrics):
            raise UserError(f"{run.path}: finished, but metrics.jsonl lacks the evaluation of step {counts}")
        model, training = self._arguments_of(run), self._training_of(run)
        fingerprint = run.facts.eval.fingerprint if run.facts and run.facts.eval else None
        how: dict[str, Any] = {"main": f"{split}/accuracy", "fingerprint": fingerprint, "overlap": run.overlap}
        if purpose.step is not None:
            training["key"] += "@early"
            how["notes"] = ["early stopping: the numbers of its best evaluation count, not those of the last step"]
        measured = self._measure(run.path, fields, model, metrics, training, **how)
        history = history_of(measured.values, run.rows)
        by_run[resolved(folder)] = [dataclasses.replace(measured, purpose=purpose, history=history)]

    def _purpose_of(self, run: RunResult) -> Purpose:
        """The purpose of a run, by its sweep or its command, or else by its split."""
        if (recorded := self._sweeps.purpose_of(run.path)) is not None:
            return recorded
        if run.starts and (stage := stage_of(run.starts[-1].command)) is not None:
            return Purpose(stage)
        split = run.fields["data.eval_split"]
        if split is None or not run.fields["weights"]:
            return Purpose(FINAL)
        what, is_sure = purpose_by_split(run.fields["data.dataset"], split)
        if not is_sure:
            self.left_out.append(
                f"{run.path}: not a result, because nothing says that {split} is a test set. Final runs of a sweep "
                "count, and runs of configs/transfer.py with stage=final."
            )
        return Purpose(what)

    def _training_of(self, run: RunResult) -> dict[str, Any]:
        """The attributes of a `MeasuredModel` that describe the training of its parameters."""
        fields, after = run.fields, self._lineage_after(run)
        return {
            "before": self._lineage_of(fields["weights"]) if fields["weights"] else None,
            "lineage": after,
            "key": after.key,
            "trained_on": data_set_name(fields["data.dataset"]) if not fields["data.mixture"] else "mixture",
            "train_images": (lineage.num_train_images(run), run.facts.train.fingerprint if run.facts else None),
            "seed": fields["seed"],
            "training": settings.training_settings(fields, self._arguments_of(run), run.steps),
            "changes": tuple(settings.config_changes(run.starts)),
            "speed": _speed(run),
            "device": run.starts[-1].device_kind if run.starts else "",
            "study": study_of(run.starts[-1].command) if run.starts else "",
        }

    def _read_evaluation(self, folder: AnyPath, by_run: dict[str, list[MeasuredModel]]) -> None:
        """Reads the numbers of an evaluation; raises `UserError` if it is damaged."""
        file = folder / _EVALUATION
        content = Fields(read_object(file, allow_nan=True), str(file))
        fields, place = config_fields(content.values.get("config"), file), content.text("weights")
        metrics, model = content.fields("metrics").values, content.fields("model_fields")
        model.text("name")
        how: dict[str, Any] = {"overlap": content.values.get("overlap")}
        released = lineage.find_released(place)
        run, inside = (None if released else self._find_run(place)) or (None, "")
        if run:
            training, split = self._training_of(run), run.fields["data.eval_split"]
            if inside:
                how["notes"] = [f"of {inside}, not of the last parameters"]
                training["key"] += f"@{inside}"
            elif run.fields["checkpoint.keep_best"] and split and run.summary.get("best_step", run.steps) != run.steps:
                how["notes"] = [f"of the best parameters on {split}, not of the last"]
            is_own_split = (run.fields["data.dataset"], split) == (fields["data.dataset"], fields["data.eval_split"])
            if is_own_split and run.facts and run.facts.eval:
                how["fingerprint"] = run.facts.eval.fingerprint
        else:
            origin = self._lineage_of(place)
            training = {"before": origin, "lineage": origin, "key": origin.key, "trained_on": ""}
            if released and released.finetuning_data:
                training["before"] = lineage.of_pre_training(released)
                training["trained_on"] = data_set_name("tfds:" + released.finetuning_data)
        measured = self._measure(folder, fields, model.values, metrics, training, **how)
        models = by_run.setdefault(resolved(run.path) if run else measured.key, [])
        measured = dataclasses.replace(measured, purpose=self._purpose_of_evaluation(run, fields, measured))
        if run and run.summary and "notes" in how and measured.values.keys() & {ACCURACY, REAL}:
            # The run's own number is for its last parameters.
            models.append(dataclasses.replace(measured, key=f"{measured.key}@best"))
        elif inside:
            models.append(measured)
        else:
            self._add(models, measured)

    def _purpose_of_evaluation(
        self, run: RunResult | None, fields: Mapping[str, Any], measured: MeasuredModel
    ) -> Purpose:
        """The purpose of the numbers of an evaluation: of a run, or of other weights."""
        split, dataset, has_accuracy = fields["data.eval_split"], fields["data.dataset"], ACCURACY in measured.values
        if run is None:
            if not has_accuracy or measured.trained_on != data_set_name(dataset):
                return Purpose(FINAL)
            what, is_sure = purpose_by_split(dataset, split)
            return Purpose(f"measured on {split}, not on the test set" if is_sure and what != FINAL else what)
        if not run.summary:
            return Purpose("of a run that did not finish")
        if (recorded := self._sweeps.purpose_of(run.path)) is not None and recorded.what == NOT_CHOSEN:
            return recorded
        own = run.fields["data.dataset"]
        if has_accuracy and (dataset, split) == (own, run.fields["data.eval_split"]):
            return self._purpose_of(run)
        is_own = bool(run.fields["weights"]) and data_set_name(dataset) == data_set_name(own)
        return Purpose(purpose_by_split(dataset, split)[0] if has_accuracy and is_own else FINAL)


def _speed(run: RunResult) -> float | None:
    """Images a second and core in training: the median over the rows of `metrics.jsonl`; None if not recorded."""
    rates = [row.get(f"{TIME_PREFIX}images_per_second_per_core") for row in run.rows]
    finite = [rate for rate in rates if isinstance(rate, int | float) and math.isfinite(rate)]
    return statistics.median(finite) if finite else None


def _is_run(folder: AnyPath) -> bool:
    return (folder / _RUN).exists() and (folder / "metrics.jsonl").exists()


def _with_flaws(model: MeasuredModel) -> MeasuredModel:
    """Sets the purpose if none of the values is a result."""
    flaws = [value.flaw for value in model.values.values()]
    if model.is_result and flaws and all(flaws):
        return dataclasses.replace(model, purpose=Purpose(flaws[0]))
    return model


def _repeats(model: MeasuredModel, other: MeasuredModel) -> bool:
    """Whether a model of the same setting and seed repeats another one's numbers."""
    if model.lineage.seeds != other.lineage.seeds or not model.goes_with(other):
        return False
    return bool(model.values.keys() & other.values.keys()) or not (model.values or other.values)


def _compare(model: MeasuredModel, other: MeasuredModel) -> str:
    """Says whether two models have the same numbers."""
    for name in sorted(model.values.keys() & other.values.keys()):
        here, there = model.values[name].value, other.values[name].value
        if here != there:
            return f"{name} is {100 * here:.2f} here, {100 * there:.2f} there."
    return "the numbers are the same."
