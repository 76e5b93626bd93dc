"""Finds what runs, evaluations and sweeps left below folders, and reads it."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vit_jax.config import base_config, flatten
from vit_jax.errors import UserError
from vit_jax.json_files import read_json
from vit_jax.metrics import read_jsonl
from vit_jax.protocols import TASKS
from vit_jax.reporting import origins
from vit_jax.reporting.names import data_set_name, model_label
from vit_jax.reporting.origins import Origin
from vit_jax.workdir import FAILURE, AnyPath, is_remote, parse

LOOKED_FOR = "config.json and summary.json of a run, evaluation.json of --mode=eval, sweep.json of a sweep"

# Names of metrics of `vit_jax.evaluation.make_evaluations`, and how a reader knows them.
VARIANT_NAMES = {
    "real": "ImageNet ReaL",
    "imagenet_v2": "ImageNet-V2",
    "imagenet_r": "ImageNet-R",
    "imagenet_a": "ImageNet-A",
    "imagenet_sketch": "ImageNet-Sketch",
    "objectnet": "ObjectNet",
}
ACCURACY, TOP_5, REAL = "accuracy", "top-5", VARIANT_NAMES["real"]

_NOT_CHOSEN = "not chosen"
_NEVER_RUNS = {"checkpoints", "best", "emergency", "tensorboard", "profile", "diverged"}  # of a run's own folders
_FEW_SHOT = re.compile(r"fewshot/(?P<where>.+)/(?P<representation>[^/]+)/(?P<shots>\d+)shot(?P<std>_std)?")
_USUAL_REPRESENTATION = "pre_logits"
_FEW_SHOT_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Value:
    """A number that was measured, as a share; `std` is over draws of few-shot images, where there are several.

    What a reader should know of it is in `notes`.
    """

    value: float
    std: float | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Record:
    """What was measured of parameters: by the run that trained them, or by an evaluation.

    Attributes:
      path: the run's folder, or that of the evaluation.
      model: its label, such as "ViT-B/16".
      fields: what the model was made with, as far as that is known.
      before: where the weights are from that the training began with; None: it began anew.
      origin: where the measured parameters are from, that training included.
      trained_on: the name of the training's data set; "" for weights that were not trained any further.
      dataset: that `ACCURACY` is of, as the config has it.
      evaluated_on: its name, and the split.
      examples: how many images `ACCURACY` is of.
      image_size: at which it was measured, in pixels.
      setting: the same for what may be averaged: it differs in seeds alone.
      values: what was measured, by name: `ACCURACY`, "top-5", names of `VARIANT_NAMES`, "5-shot <data set>".
      train_split: what the training saw of its data set.
      steps: of the training; None where it is not known.
      batch_size: of it.
      seed: of it.
      polyak_decay: of it.
      partial: patterns of the parameters that were trained, if not all.
      training: the fields of its config, flat, that set it apart from others.
      use: "final", or why it is no result: it only chooses, or was not chosen.
    """

    path: AnyPath
    model: str
    fields: dict[str, Any]
    before: Origin | None
    origin: Origin
    trained_on: str
    dataset: str
    evaluated_on: tuple[str, str | None]
    examples: int | None
    image_size: int
    setting: str
    values: dict[str, Value]
    train_split: str = ""
    steps: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    polyak_decay: float | None = None
    partial: tuple[str, ...] = ()
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    use: str = "final"

    @property
    def is_result(self) -> bool:
        """Whether its numbers are results."""
        return self.use == "final"


@dataclasses.dataclass
class Found:
    """What is below folders: the records, and a line for each thing that is left out."""

    records: list[Record]
    left_out: list[str]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A folder that has a run's config.json."""

    path: AnyPath
    fields: dict[str, Any]
    model: dict[str, Any] | None  # what its model was made with
    summary: dict[str, Any]


class _DamagedError(Exception):
    """A file that is not as it should be; the message says which and how."""


def find(places: Sequence[str]) -> Found:
    """Reads all runs, evaluations and sweeps in some folders and below.

    Args:
      places: folders, or gs://bucket/folder.

    Raises:
      UserError: there is no such folder, or nothing in any of them.
    """
    reader = _Reader()
    for place in places:
        root = parse(place)
        if not root.exists():
            raise UserError(f"there is no folder {place}; give workdirs of runs or sweeps, or folders with such.")
        if not root.is_dir():
            reader.left_out.append(f"{place}: not a folder")
            continue
        before = len(reader.files)
        reader.look_into(root)
        if len(reader.files) == before:
            reader.left_out.append(f"{place}: nothing of a run in it")
    found = reader.read()
    if not found.records:
        told = "".join(f"\n  {line}" for line in found.left_out)
        raise UserError(
            f"no result in {', '.join(places)} or below. Looked for {LOOKED_FOR}.{told}\n"
            "Train (python -m vit_jax.main) or evaluate (--mode=eval) first, or name the folder that has the workdirs."
        )
    return found


def _read_json(path: AnyPath) -> Any:
    try:
        return read_json(path, allow_nan=True)
    except UserError as error:
        raise _DamagedError(f"{path}: cannot be read: {error}") from error


def _as_fields(config: Any, path: AnyPath) -> dict[str, Any]:
    """The fields of a recorded config, flat; those that are younger than the file have their defaults.

    Raises:
      _DamagedError: it is no config of this project.
    """
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict) or "batch_size" not in config:
        raise _DamagedError(f"{path}: no config of vit_jax")
    return flatten(json.loads(base_config().to_json())) | flatten(config)


def _resolved(path: AnyPath) -> str:
    return str(path) if is_remote(path) else str(path.resolve())


class _Reader:
    """Collects files first: where a run stands in a sweep, or what it began with, may be told by any other."""

    def __init__(self):
        self.left_out: list[str] = []
        self.files: list[AnyPath] = []
        self._given: dict[str, AnyPath] = {}  # folders that were looked into, as they were named
        self._runs: dict[str, _Run | None] = {}  # by folder; None: there is none that can be read
        self._origins: dict[str, Origin] = {}

    def look_into(self, folder: AnyPath) -> None:
        """Notes what is in a folder and below."""
        resolved = _resolved(folder)
        if resolved in self._given:
            return
        self._given[resolved] = folder
        try:
            inside = sorted(folder.iterdir(), key=lambda path: path.name)
        except OSError as error:
            self.left_out.append(f"{folder}: {error.strerror or error}")
            return
        names = {path.name for path in inside}
        self.files += [folder / name for name in ("sweep.json", "config.json", "evaluation.json") if name in names]
        if "sweep_config.json" in names and "sweep.json" not in names:
            self.left_out.append(f"{folder}: a sweep without results yet; its finished runs count one by one")
        for path in inside:
            if path.name not in _NEVER_RUNS and not path.name.startswith(".") and path.is_dir():
                self.look_into(path)

    def read(self) -> Found:
        """Reads what was noted."""
        uses = self._read_sweeps()
        records: dict[str, Record] = {}
        for file in self.files:
            if file.name == "config.json":
                try:
                    run = self._load(file.parent)
                    if run is None:
                        raise _DamagedError(f"{file}: no config of vit_jax")
                    record = self._of_run(run)
                except _DamagedError as problem:
                    self.left_out.append(str(problem))
                    continue
                use = _use_in(uses, file.parent)
                records[_resolved(file.parent)] = dataclasses.replace(record, use=use) if use else record
        others: list[Record] = []
        for file in self.files:
            if file.name == "evaluation.json":
                try:
                    record, of_run = self._of_evaluation(file)
                except _DamagedError as problem:
                    self.left_out.append(str(problem))
                    continue
                if of_run and (use := _use_in(uses, parse(of_run))) == _NOT_CHOSEN:
                    record = dataclasses.replace(record, use=use)
                key = of_run or f"{record.origin.key}|{record.setting}"
                if key in records and _is_of_the_same(records[key], record):
                    records[key] = _merged(records[key], record)
                elif of_run:
                    others.append(record)
                else:
                    records[key] = record
        return Found([*map(_checked, records.values()), *map(_checked, others)], self.left_out)

    def _read_sweeps(self) -> dict[str, dict[str, str]]:
        """By a sweep's folder, what each of its runs is for."""
        uses: dict[str, dict[str, str]] = {}
        for file in self.files:
            if file.name != "sweep.json":
                continue
            try:
                tasks = _read_json(file)["tasks"].values()
                trials = {run["workdir"]: "chooses" for task in tasks for run in task["trials"]}
                final = {run["workdir"]: "final" for task in tasks for run in task["final"]}
            except _DamagedError as problem:
                self.left_out.append(str(problem))
                continue
            except (KeyError, TypeError, AttributeError) as error:
                self.left_out.append(f"{file}: not what a sweep writes ({error!r})")
                continue
            uses[_resolved(file.parent)] = {
                _resolved(file.parent / workdir): use for workdir, use in (trials | final).items()
            }
        return uses

    def _load(self, folder: AnyPath) -> _Run | None:
        """The run in a folder; None where there is none. What it says of itself may still be damaged.

        Raises:
          _DamagedError: it cannot be read.
        """
        key = _resolved(folder)
        if key in self._runs:
            return self._runs[key]
        self._runs[key] = None
        if not (folder / "config.json").exists():
            return None
        fields = _as_fields(_read_json(folder / "config.json"), folder / "config.json")
        model = _read_json(folder / "model.json") if (folder / "model.json").exists() else None
        summary = _read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
        if not isinstance(summary, dict) or not (model is None or (isinstance(model, dict) and "name" in model)):
            raise _DamagedError(f"{folder}: model.json or summary.json is not what a run writes")
        self._runs[key] = _Run(self._given.get(key, folder), fields, model, summary)
        return self._runs[key]

    def _find_run(self, place: str) -> _Run | None:
        """The run whose workdir, or a file inside of it, is a place as a config names it."""
        try:
            path = parse(place)
        except UserError:
            return None
        for folder in (path, *list(path.parents)[:3]):
            try:
                if (folder / "config.json").exists() and (folder / "metrics.jsonl").exists():
                    return self._load(folder)
            except (_DamagedError, OSError):
                return None
        # A relative path was meant from where the run was started, or the folder was moved since.
        tail = tuple(part for part in path.parts if part not in ("/", ".", ".."))
        ends = [
            file.parent
            for file in self.files
            if file.name == "config.json" and tail and tuple(file.parent.parts[-len(tail) :]) == tail
        ]
        try:
            return self._load(ends[0]) if len(ends) == 1 else None
        except _DamagedError:
            return None

    def _origin_of(self, place: str) -> Origin:
        """Where weights are from, by the place that a config names."""
        if released := origins.find_released(place):
            return origins.of_released(released)
        run = self._find_run(place)
        return origins.of_file(place) if run is None else self._origin_after(run)

    def _origin_after(self, run: _Run) -> Origin:
        key = _resolved(run.path)
        if key not in self._origins:
            self._origins[key] = origins.of_file(str(run.path))  # should runs begin with each other
            before = self._origin_of(run.fields["weights"]) if run.fields["weights"] else None
            model = self._model_of(run)
            self._origins[key] = origins.after_run(
                before, str(run.path), run.fields, model, model_label(model), run.summary
            )
        return self._origins[key]

    def _model_of(self, run: _Run) -> dict[str, Any]:
        """What a run's model was made with, as far as files tell."""
        if run.model is not None:
            return run.model
        fields = {name.removeprefix("model."): value for name, value in run.fields.items() if name.startswith("model.")}
        fields = {name: value for name, value in fields.items() if value is not None}
        of_weights = self._model_at(run.fields["weights"]) if run.fields["weights"] else {}
        return {"name": run.summary.get("model", "unknown"), **of_weights, **fields}

    def _model_at(self, place: str) -> dict[str, Any]:
        if released := origins.find_released(place):
            return {"name": released.model, **released.model_overrides}
        run = self._find_run(place)
        return {} if run is None else dict(self._model_of(run))

    def _of_run(self, run: _Run) -> Record:
        """The record of a run that finished."""
        rows = _read_rows(run.path)
        last = max((row["step"] for row in rows), default=0)
        if not run.summary:
            failed = run.path / FAILURE
            if failed.exists():  # of what it said, the rest is advice for a new start
                raise _DamagedError(f"{run.path}: failed: {str(_read_json(failed)['reason']).partition('. ')[0]}")
            raise _DamagedError(f"{run.path}: not finished (step {last})")
        steps = run.summary.get("steps")
        if not isinstance(steps, int) or last > steps:
            raise _DamagedError(f"{run.path}: went on after its summary, and is at step {last}")
        metrics: dict[str, float] = {}
        for row in rows:
            if row["step"] == steps:  # what is evaluated at all is evaluated at the end
                metrics |= row
        split = run.fields["data.eval_split"]
        if split is not None and not any(name.startswith(f"{split}/") for name in metrics):
            raise _DamagedError(f"{run.path}: finished, but metrics.jsonl lacks the evaluation of step {steps}")
        model = self._model_of(run)
        return Record(
            path=run.path,
            model=model_label(model),
            fields=model,
            origin=self._origin_after(run),
            **self._training_of(run),
            **_measured(run.fields, metrics, self._origin_after(run)),
        )

    def _training_of(self, run: _Run) -> dict[str, Any]:
        """The attributes of a record that say how its parameters were trained."""
        fields = run.fields
        return {
            "before": self._origin_of(fields["weights"]) if fields["weights"] else None,
            "trained_on": data_set_name(fields["data.dataset"]) if not fields["data.mixture"] else "mixture",
            "train_split": fields["data.train_split"],
            "steps": run.summary.get("steps"),
            "batch_size": fields["batch_size"],
            "seed": fields["seed"],
            "polyak_decay": fields["polyak_decay"],
            "partial": tuple(fields["train_only"]),
            "training": origins.setting_fields(fields),
        }

    def _of_evaluation(self, file: AnyPath) -> tuple[Record, str | None]:
        """The record of an evaluation, and the folder of the run that trained what it is of, if that is known."""
        found = _read_json(file)
        try:
            fields = _as_fields(found["config"], file)
            place, metrics, model = str(found["weights"]), dict(found["metrics"]), dict(found["model_fields"])
        except (KeyError, TypeError, ValueError) as error:
            raise _DamagedError(f"{file}: not what an evaluation writes ({error!r})") from error
        origin = self._origin_of(place)
        shared: dict[str, Any] = {"path": file.parent, "model": model_label(model), "fields": model, "origin": origin}
        shared |= _measured(fields, metrics, origin)
        run = None if (released := origins.find_released(place)) else self._find_run(place)
        if run is not None:
            if _kept_best(run):
                note = f"of the parameters that did best on {run.fields['data.eval_split']} on the way, not of the last"
                shared["values"] = {
                    name: dataclasses.replace(value, notes=(*value.notes, note))
                    for name, value in shared["values"].items()
                }
            return Record(**shared, **self._training_of(run)), _resolved(run.path)
        before, trained_on = origin, ""
        if released and released.finetuning_data:
            before = origins.of_pre_training(released)
            trained_on = data_set_name("tfds:" + released.finetuning_data)
        return Record(before=before, trained_on=trained_on, **shared), None


def _read_rows(workdir: AnyPath) -> list[dict[str, Any]]:
    try:
        rows = read_jsonl(workdir / "metrics.jsonl")
        return [row for row in rows if isinstance(row["step"], int)]
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError(f"{workdir}: metrics.jsonl is damaged ({error})") from error


def _kept_best(run: _Run) -> bool:
    """Whether its folder stands for parameters chosen by an evaluation, other than its last ones."""
    return bool(
        run.fields["checkpoint.keep_best"]
        and run.fields["data.eval_split"]
        and run.summary.get("best_step", run.summary.get("steps")) != run.summary.get("steps")
    )


def _use_in(uses: Mapping[str, Mapping[str, str]], folder: AnyPath) -> str | None:
    """What a run is for, if it is one of a sweep."""
    key = _resolved(folder)
    for sweep, runs in uses.items():
        if key in runs:
            return runs[key]
        if key.startswith(sweep + "/"):
            return _NOT_CHOSEN
    return None


def _measured(fields: Mapping[str, Any], metrics: Mapping[str, float], origin: Origin) -> dict[str, Any]:
    """The attributes of a record that say what was measured, on what and how."""
    metrics = {
        name: value for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)
    }
    split, dataset = fields["data.eval_split"], fields["data.dataset"]
    values: dict[str, Value] = {}
    anew = bool(fields["data.eval_labels"])  # ImageNet's images with other labels
    for metric, name in (
        ("accuracy", REAL if anew else ACCURACY),
        ("top5_accuracy", f"{REAL} {TOP_5}" if anew else TOP_5),
    ):
        if split is not None and f"{split}/{metric}" in metrics:
            values[name] = Value(metrics[f"{split}/{metric}"])
    for variant, name in VARIANT_NAMES.items():
        if f"{variant}/accuracy" in metrics:
            values[name] = Value(metrics[f"{variant}/accuracy"])
    values |= dict(_few_shot(fields, metrics))
    how = (dataset, split, fields["data.image_size"], fields["data.eval_resize"], fields["data.eval_resize_small"])
    return {
        "evaluated_on": (data_set_name(dataset), split),
        "image_size": fields["data.image_size"],
        "values": values,
        "examples": int(metrics[f"{split}/examples"]) if f"{split}/examples" in metrics else None,
        "dataset": dataset,
        "setting": f"{origin.key}|{how}",
    }


def _is_of_training(split: str, dataset: str) -> bool:
    """Whether a split to evaluate on is made of training images, as one to choose by is."""
    if dataset.startswith("vtab:"):
        return not split.startswith("test")
    # An image folder without splits is one split, "all"; its last part is the test set (`vit_jax.protocols`).
    if split.startswith(("all", "full")):
        return split.replace(" ", "") != "all[90%:]"
    return any(part.startswith("train") for part in split.split("+"))


def _few_shot(fields: Mapping[str, Any], metrics: Mapping[str, float]) -> Iterator[tuple[str, Value]]:
    """Few-shot accuracies by name: "5-shot ImageNet"."""
    datasets = [str(dataset) for dataset in fields["fewshot.datasets"]]
    for metric, value in metrics.items():
        match = _FEW_SHOT.fullmatch(metric)
        if not match or match["std"]:
            continue
        dataset = _few_shot_data_set(match["where"], datasets)
        name = f"{match['shots']}-shot {data_set_name(dataset)}"
        known = {task.dataset: task.splits["final"][1] for task in TASKS.values()}
        if (split := fields["fewshot.test_split"]) != known.get(dataset, "test"):
            name += f" {split}"
        if match["representation"] != _USUAL_REPRESENTATION:
            name += f" ({match['representation']})"
        size = fields["fewshot.image_size"] or fields["data.image_size"]
        notes = () if size == _FEW_SHOT_SIZE else (f"few-shot images at {size} pixels, usually {_FEW_SHOT_SIZE}",)
        yield name, Value(value, metrics.get(f"{metric}_std"), notes)


def _few_shot_data_set(where: str, datasets: Sequence[str]) -> str:
    """The data set of a config that an evaluator bears the short name of."""
    return next((each for each in datasets if re.fullmatch(f"(.*[:/])?{re.escape(where)}/*", each)), where)


def _is_of_the_same(record: Record, evaluation: Record) -> bool:
    """Whether an evaluation of the same parameters measured in the same way, or no accuracy of its own."""
    alone = ACCURACY not in evaluation.values and evaluation.image_size == record.image_size
    return record.setting == evaluation.setting or alone


def _merged(record: Record, evaluation: Record) -> Record:
    """A record with what an evaluation measured besides; of what both have, the record's counts."""
    return dataclasses.replace(record, values={**evaluation.values, **record.values})


# Test sets of the paper's tasks: the validation images of ImageNet, and what TFDS says of the others.
_TEST_IMAGES = {"imagenet2012": 50_000, "cifar10": 10_000, "cifar100": 10_000, "pets": 3_669, "flowers": 6_149}


def _checked(record: Record) -> Record:
    """A record that is no result if it was fine-tuned to choose, or measured on some of a test set's images alone."""
    split = record.evaluated_on[1]
    if record.is_result and record.before is not None and split is not None and _is_of_training(split, record.dataset):
        return dataclasses.replace(record, use=f"chooses (measured on {split})")
    for name, task in TASKS.items():
        is_it = record.evaluated_on == (data_set_name(task.dataset), task.splits["final"][1])
        if is_it and record.is_result and record.examples not in (None, _TEST_IMAGES[name]):
            return dataclasses.replace(record, use=f"measured on {record.examples:,} of {_TEST_IMAGES[name]:,} images")
    return record
