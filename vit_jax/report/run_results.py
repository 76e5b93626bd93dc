"""Finds what runs, evaluations and sweeps left below folders, and reads it."""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit_jax.console import show_name
from vit_jax.errors import UserError
from vit_jax.report import lineage, settings
from vit_jax.report.lineage import Origin
from vit_jax.report.measured import ACCURACY, REAL, TOP_5, Measured, measure
from vit_jax.report.names import data_set_name, model_label
from vit_jax.report.purposes import FINAL, NOT_CHOSEN, Sweeps, Use, resolved, stage_of, use_by_protocol
from vit_jax.report.result import Record, go_together
from vit_jax.report.run_files import DamagedError, Run, as_fields, read, read_object, read_rows, read_run
from vit_jax.run.workdir import FAILURE, AnyPath, is_remote, parse

__all__ = ["ACCURACY", "REAL", "TOP_5", "Found", "Record", "find"]

LOOKED_FOR = "config.json and summary.json of a run, evaluation.json of --mode=eval, sweep.json of a sweep"

_FILES = ("sweep.json", "config.json", "evaluation.json")
_OF_SWEEPS = ("sweep.json", "sweep_config.json")  # the second is there before the first
_OF_RUNS = ("summary.json", "metrics.jsonl", "starts.jsonl", "model.json")  # a run has config.json beside them
_NEVER_RUNS = {"checkpoints", "best", "emergency", "tensorboard", "profile", "diverged"}  # of a run's own folders
_SWEEPS_ABOVE = 6  # folders around a given one that may be of the sweep it is a part of
_BEST = "best"


@dataclasses.dataclass
class Found:
    """What is below folders: the records, and a line for each thing that is left out."""

    records: list[Record]
    left_out: list[str]


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
            raise UserError(
                f"there is no folder {show_name(place)}; give workdirs of runs or sweeps, or folders with such."
            )
        if not root.is_dir():
            reader.left_out.append(f"{place}: not a folder")
            continue
        before = len(reader.files)
        reader.look_into(root)
        reader.look_above(root)
        if len(reader.files) == before:
            reader.left_out.append(f"{place}: nothing of a run in it")
    found = reader.read()
    found.left_out = [show_name(line) for line in found.left_out]
    if not found.records:
        told = "".join(f"\n  {line}" for line in found.left_out)
        raise UserError(
            f"no result in {', '.join(map(show_name, places))} or below. Looked for {LOOKED_FOR}.{told}\n"
            "Train (python -m vit_jax.main) or evaluate (--mode=eval) first, or name the folder that has the workdirs."
        )
    return found


class _Reader:
    """Collects files first: where a run stands in a sweep, or what it began with, may be told by any other."""

    def __init__(self):
        self.left_out: list[str] = []
        self.files: list[AnyPath] = []
        self._sweep_files: list[AnyPath] = []
        self._sweeps = Sweeps()
        self._given: dict[str, AnyPath] = {}  # folders that were looked into, as they were named
        self._runs: dict[str, Run | None] = {}  # by folder; None: there is none that can be read
        self._origins: dict[str, Origin] = {}

    def look_into(self, folder: AnyPath) -> None:
        """Notes what is in a folder and below."""
        if resolved(folder) in self._given:
            return
        self._given[resolved(folder)] = folder
        try:
            inside = sorted(folder.iterdir(), key=lambda path: path.name)
        except OSError as error:
            self.left_out.append(f"{folder}: {error.strerror or error}")
            return
        names = {path.name for path in inside}
        self.files += [folder / name for name in _FILES if name in names]
        described = [name for name in _OF_SWEEPS if name in names]
        self._sweep_files += [folder / name for name in described[:1]]
        is_run = "config.json" in names or any(name in names for name in _OF_RUNS)
        if is_run and not names & {"config.json", "evaluation.json"}:
            has = ", ".join(name for name in _OF_RUNS if name in names)
            self.left_out.append(f"{folder}: it has {has} of a run, but no config.json")
        for path in inside:
            is_own = is_run and path.name in _NEVER_RUNS
            if not is_own and not path.name.startswith(".") and path.is_dir():
                self.look_into(path)

    def look_above(self, folder: AnyPath) -> None:
        """Notes the sweeps that a folder may be a part of."""
        around = folder.parents if is_remote(folder) else pathlib.Path(folder).absolute().parents
        for above in list(around)[:_SWEEPS_ABOVE]:
            there = [above / name for name in _OF_SWEEPS if (above / name).is_file()]
            self._sweep_files += there[:1]

    def read(self) -> Found:
        """Reads what was noted."""
        for file in self._sweep_files:
            for name in _OF_SWEEPS if file.name == _OF_SWEEPS[0] else (file.name,):
                try:
                    if (file.parent / name).exists():
                        self.left_out += self._sweeps.add(file.parent / name)
                        break
                except DamagedError as problem:
                    self.left_out.append(str(problem))
        by_run: dict[str, list[Record]] = {}
        for file in self.files:
            try:
                if file.name == "config.json":
                    by_run[resolved(file.parent)] = [self._of_run(file.parent)]
            except DamagedError as problem:
                self.left_out.append(str(problem))
        for file in self.files:
            try:
                if file.name == "evaluation.json":
                    key, record, may_merge = self._of_evaluation(file)
                    self._add(by_run.setdefault(key, []), record, may_merge)
            except DamagedError as problem:
                self.left_out.append(str(problem))
        found = [record for of_run in by_run.values() for record in of_run]
        self.left_out += [
            f"{record.path}: {name} is no result: {value.flaw}"
            for record in found
            for name, value in record.values.items()
            if record.is_result and value.flaw and not name.endswith(TOP_5)
        ]
        records = self._without_repeats(map(_with_flaws, found))
        return Found(records, list(dict.fromkeys(self.left_out)))

    def _add(self, records: list[Record], record: Record, may_merge: bool) -> None:
        """Adds an evaluation to the records of the same parameters: to one of them, or as another."""
        for place, other in enumerate(records) if may_merge else ():
            shared = record.values.keys() & other.values.keys()
            if other.image_size != record.image_size or not all(
                record.values[name].agrees_with(other.values[name]) for name in shared
            ):
                continue
            if shared:
                self.left_out.append(
                    f"{record.path}: measures again what {other.path} tells, which counts: {_compare(record, other)}"
                )
            if added := {name: value for name, value in record.values.items() if name not in other.values}:
                besides = (*other.besides, str(record.path))
                records[place] = dataclasses.replace(other, values={**other.values, **added}, besides=besides)
            return
        records.append(record)

    def _without_repeats(self, records: Iterable[Record]) -> list[Record]:
        """Marks runs that repeat the seed of another one of their setting. The first folder counts."""
        kept: dict[tuple[str, tuple[str, str]], list[Record]] = {}
        marked = []
        for record in sorted(records, key=lambda record: str(record.path)):
            if record.is_result:
                others = kept.setdefault((record.setting, record.seeds), [])
                first = next((other for other in others if _repeats(record, other)), None)
                if first is None:
                    others.append(record)
                else:
                    self.left_out.append(
                        f"{record.path}: repeats {first.path}, its setting and its seed {record.seed}, and is not "
                        f"counted: {_compare(record, first)}"
                    )
                    marked.append(dataclasses.replace(record, use=f"repeats {first.path}"))
                    continue
            marked.append(record)
        return marked

    def _load(self, folder: AnyPath) -> Run | None:
        key = resolved(folder)
        if key not in self._runs:
            self._runs[key] = None
            run = read_run(folder)
            self._runs[key] = run and dataclasses.replace(run, path=self._given.get(key, folder))
        return self._runs[key]

    def _find_run(self, place: str) -> tuple[Run, str] | None:
        """The run whose workdir, or something inside of it, a config names; and what inside of it: "" for the workdir.

        What a workdir stands for are its best parameters, if it keeps them.
        """
        try:
            path = parse(place)
        except UserError:
            return None
        for folder in (path, *list(path.parents)[:3]):
            try:
                if (folder / "config.json").exists() and (folder / "metrics.jsonl").exists():
                    run = self._load(folder)
                    inside = str(path)[len(str(folder)) :].strip("/")
                    return None if run is None else (run, "" if inside == _BEST else inside)
            except (DamagedError, OSError) as problem:
                self.left_out.append(f"{place}: what these weights were trained on cannot be read: {problem}")
                return None
        # A relative path was meant from where the run was started, or the folder was moved since.
        parts = [part for part in path.parts if part not in ("/", ".", "..")]
        for taken in range(min(3, len(parts))):
            tail, inner = tuple(parts[: len(parts) - taken]), parts[len(parts) - taken :]
            if inner and inner[0] not in _NEVER_RUNS:
                continue
            inside = "/".join(inner)
            ends = [
                file.parent
                for file in self.files
                if file.name == "config.json" and tuple(file.parent.parts[-len(tail) :]) == tail
            ]
            if len(ends) == 1:
                try:
                    run = self._load(ends[0])
                except DamagedError:
                    return None
                return None if run is None else (run, "" if inside == _BEST else inside)
        return None

    def _origin_of(self, place: str) -> Origin:
        """Where the weights are from that a training begins with, by the place that its config names."""
        if released := lineage.find_released(place):
            return lineage.of_released(released)
        found = self._find_run(place)
        if found is None:
            return lineage.of_file(place)
        run, inside = found
        origin, key = self._origin_after(run), ""
        if inside:
            key = f"@{inside}"
        elif run.fields["checkpoint.keep_best"] and run.fields["data.eval_split"]:
            chosen_by = {name: value for name, value in run.fields.items() if name.startswith(("data.eval_", "eval_"))}
            key = f"@best {settings.key_of(chosen_by)}"
        if fingerprint := run.fingerprint("train"):
            key += f"@{fingerprint}"
        return dataclasses.replace(origin, key=origin.key + key)

    def _origin_after(self, run: Run) -> Origin:
        key = resolved(run.path)
        if key not in self._origins:
            self._origins[key] = lineage.of_file(str(run.path))  # should runs begin with each other
            before = self._origin_of(run.fields["weights"]) if run.fields["weights"] else None
            model = self._model_of(run)
            self._origins[key] = lineage.after_run(before, run, model, model_label(model), _changes(run))
        return self._origins[key]

    def _model_of(self, run: Run, *, asked: tuple[str, ...] = ()) -> dict[str, Any]:
        """What a run's model was made with, as far as files tell; `asked` are the runs that began with this one."""
        if run.model is not None:
            return run.model
        fields = {name.removeprefix("model."): value for name, value in run.fields.items() if name.startswith("model.")}
        fields = {name: value for name, value in fields.items() if value is not None}
        of_weights, place = {}, run.fields["weights"]
        if place and (released := lineage.find_released(place)):
            of_weights = {"name": released.model, **released.model_overrides}
        elif place and (found := self._find_run(place)) and str(found[0].path) not in asked:
            of_weights = self._model_of(found[0], asked=(*asked, str(run.path)))
        return {"name": run.summary.get("model", "unknown"), **of_weights, **fields}

    def _of_run(self, folder: AnyPath) -> Record:
        """The record of a run that finished."""
        run = self._load(folder)
        if run is None:
            raise DamagedError(f"{folder / 'config.json'}: no config of vit_jax")
        rows = read_rows(run.path)
        last = max((row["step"] for row in rows), default=0)
        if not run.summary:
            failed = run.path / FAILURE
            if failed.exists():  # of what it said, the rest is advice for a new start
                reason = str(read_object(failed).get("reason", "for a reason that was not recorded"))
                raise DamagedError(f"{run.path}: failed: {reason.partition('. ')[0]}")
            raise DamagedError(f"{run.path}: not finished (step {last})")
        if run.steps is None or last > run.steps:
            raise DamagedError(f"{run.path}: went on after its summary, and is at step {last}")
        metrics: dict[str, Any] = {}
        for row in rows:
            if row["step"] == run.steps:  # what is evaluated at all is evaluated at the end
                metrics |= row
        split = run.fields["data.eval_split"]
        if split is not None and not any(name.startswith(f"{split}/") for name in metrics):
            raise DamagedError(f"{run.path}: finished, but metrics.jsonl lacks the evaluation of step {run.steps}")
        model = self._model_of(run)
        overlap = run.summary.get("overlap")
        measured = measure(run.fields, model, metrics, fingerprint=run.fingerprint("eval"), overlap=overlap)
        self._tell(run.path, measured, f"{split}/accuracy")
        use = self._use_of(run)
        return Record(
            path=run.path,
            model=model_label(model),
            fields=model,
            origin=self._origin_after(run),
            use=use.what,
            held_out=use.held_out,
            rules=use.rules,
            **self._training_of(run),
            **_measured(run.fields, measured, self._origin_after(run).key),
        )

    def _tell(self, path: AnyPath, measured: Measured, main: str) -> None:
        """Tells which numbers are none. Without its main one, there is nothing to show.

        Raises:
          DamagedError: the main one is none.
        """
        for problem in measured.problems:
            if problem.startswith(f"{main} is"):
                raise DamagedError(f"{path}: {problem}")
        self.left_out += [f"{path}: {problem}" for problem in measured.problems]

    def _use_of(self, run: Run) -> Use:
        """What a run is for: as a sweep or its command says, or else by the protocol."""
        if (recorded := self._sweeps.use_of(run.path)) is not None:
            return recorded
        if run.starts and (stage := stage_of(run.starts[-1].command)) is not None:
            return Use(stage)
        split, dataset = run.fields["data.eval_split"], run.fields["data.dataset"]
        if split is None or not run.fields["weights"]:
            return Use(FINAL)
        what, is_sure = use_by_protocol(dataset, split)
        if not is_sure:
            self.left_out.append(
                f"{run.path}: no result, as nothing says that {split} is a test set. Final runs of a sweep count, and "
                "runs of configs/transfer.py with stage=final."
            )
        return Use(what)

    def _training_of(self, run: Run) -> dict[str, Any]:
        """The attributes of a record that say how its parameters were trained."""
        fields, changes = run.fields, tuple(_changes(run))
        training = settings.training_settings(fields, self._model_of(run), run.steps)
        return {
            "before": self._origin_of(fields["weights"]) if fields["weights"] else None,
            "trained_on": data_set_name(fields["data.dataset"]) if not fields["data.mixture"] else "mixture",
            "train_split": fields["data.train_split"],
            "train_images": (lineage.num_train_images(run), run.fingerprint("train")),
            "steps": run.steps,
            "batch_size": fields["batch_size"],
            "seed": fields["seed"],
            "polyak_decay": fields["polyak_decay"],
            "partial": tuple(fields["train_only"]),
            "training": training | ({"changed on the way": "; ".join(changes)} if changes else {}),
            "changes": changes,
        }

    def _of_evaluation(self, file: AnyPath) -> tuple[str, Record, bool]:
        """The record of an evaluation, what it is of, and whether it may stand in one line with others of that."""
        found = read(file)
        try:
            fields = as_fields(found["config"], file)
            place, metrics, model = found["weights"], dict(found["metrics"]), dict(found["model_fields"])
            name = model["name"]
            if not isinstance(place, str) or not isinstance(name, str):
                raise TypeError(f"weights {place!r}, model {name!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"{file}: not what an evaluation writes ({error!r})") from error
        shared: dict[str, Any] = {"path": file.parent, "model": model_label(model), "fields": model}
        released = lineage.find_released(place)
        if released is None and (of_run := self._find_run(place)) is not None:
            run, inside = of_run
            return self._of_evaluated_run(shared, run, inside, fields, model, metrics, found.get("overlap"))
        origin = self._origin_of(place)
        measured = measure(fields, model, metrics, overlap=found.get("overlap"))
        self._tell(file.parent, measured, "")
        before, trained_on, use = origin, "", FINAL
        if released and released.finetuning_data:
            before = lineage.of_pre_training(released)
            trained_on = data_set_name("tfds:" + released.finetuning_data)
            split, dataset = fields["data.eval_split"], fields["data.dataset"]
            if split is not None and data_set_name(dataset) == trained_on and ACCURACY in measured.values:
                what, is_sure = use_by_protocol(dataset, split)
                use = what if what == FINAL or not is_sure else f"measured on {split}, not on the test set"
        shared |= _measured(fields, measured, origin.key)
        return origin.key, Record(before=before, origin=origin, trained_on=trained_on, use=use, **shared), True

    def _of_evaluated_run(
        self,
        shared: dict[str, Any],
        run: Run,
        inside: str,
        fields: Mapping[str, Any],
        model: Mapping[str, Any],
        metrics: Mapping[str, Any],
        overlap: Any,
    ) -> tuple[str, Record, bool]:
        """The same for an evaluation of a run, or of what is `inside` of its folder."""
        notes: tuple[str, ...] = ()
        key = self._origin_after(run).key
        own = (run.fields["data.dataset"], run.fields["data.eval_split"])
        if inside:
            notes, key = (f"of {inside}, not of the last parameters",), f"{key}@{inside}"
        elif _kept_best(run):
            notes = (f"of the parameters that did best on {own[1]} on the way, not of the last",)
        is_last = not notes
        fingerprint = run.fingerprint("eval") if own == (fields["data.dataset"], fields["data.eval_split"]) else None
        measured = measure(fields, model, metrics, fingerprint=fingerprint, overlap=overlap, notes=notes)
        self._tell(shared["path"], measured, "")
        use = self._use_of_evaluation(run, fields) if ACCURACY in measured.values else Use(FINAL)
        sweep = self._sweeps.use_of(run.path)
        if sweep is not None and sweep.what == NOT_CHOSEN:
            use = sweep
        if not run.summary:
            use = Use("of a run that did not finish")
        elif not is_last and measured.values.keys() & {ACCURACY, REAL}:
            key += "@best"  # the run's own number is of its last parameters
        record = Record(
            origin=self._origin_after(run),
            use=use.what,
            held_out=use.held_out,
            rules=use.rules,
            **shared,
            **self._training_of(run),
            **_measured(fields, measured, key),
        )
        return resolved(run.path), record, not (inside or key.endswith("@best"))

    def _use_of_evaluation(self, run: Run, fields: Mapping[str, Any]) -> Use:
        """What an accuracy of a run is for that was measured after it."""
        split, dataset = fields["data.eval_split"], fields["data.dataset"]
        if (dataset, split) == (run.fields["data.dataset"], run.fields["data.eval_split"]):
            return self._use_of(run)
        if not run.fields["weights"] or data_set_name(dataset) != data_set_name(run.fields["data.dataset"]):
            return Use(FINAL)
        return Use(use_by_protocol(dataset, split)[0])


def _changes(run: Run) -> list[str]:
    return settings.changes_on_the_way([(start.step, start.fields) for start in run.starts])


def _kept_best(run: Run) -> bool:
    """Whether its folder stands for parameters chosen by an evaluation, other than its last ones."""
    return bool(
        run.fields["checkpoint.keep_best"]
        and run.fields["data.eval_split"]
        and run.summary.get("best_step", run.steps) != run.steps
    )


def _measured(fields: Mapping[str, Any], measured: Measured, key: str) -> dict[str, Any]:
    """The attributes of a record that say what was measured."""
    return {
        "evaluated_on": (data_set_name(fields["data.dataset"]), fields["data.eval_split"]),
        "image_size": fields["data.image_size"],
        "values": measured.values,
        "examples": measured.examples,
        "dataset": fields["data.dataset"],
        "setting": f"{key}|{fields['data.image_size']}",
    }


def _with_flaws(record: Record) -> Record:
    """A record that says so itself if none of its values is a result."""
    flaws = [value.flaw for value in record.values.values()]
    return dataclasses.replace(record, use=flaws[0]) if record.is_result and flaws and all(flaws) else record


def _repeats(record: Record, other: Record) -> bool:
    """Whether a record of the same setting and seed measured what another one did."""
    has_same = bool(record.values.keys() & other.values.keys()) or not (record.values or other.values)
    return has_same and go_together(record, other)


def _compare(record: Record, other: Record) -> str:
    """Whether what two measured is the same."""
    for name in sorted(record.values.keys() & other.values.keys()):
        here, there = record.values[name].value, other.values[name].value
        if here != there:
            return f"{name} is {100 * here:.2f} here, {100 * there:.2f} there."
    return "the numbers are the same."
