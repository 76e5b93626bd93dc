"""The paper's tables with ours beside them, and lists of all that was found."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

from vit_jax.protocols import TASKS
from vit_jax.published import paper
from vit_jax.published.paper import Score
from vit_jax.reporting.layout import Cell, Listing, Table
from vit_jax.reporting.names import UNKNOWN, data_set_name, kind_of, model_label, vtab_task
from vit_jax.reporting.origins import Origin
from vit_jax.reporting.records import ACCURACY, REAL, Record
from vit_jax.reporting.scores import Ours, Protocol, Result, choose, combine, group
from vit_jax.vtab import GROUPS
from vit_jax.vtab import TASKS as VTAB_TASKS

IMAGENET = "ImageNet"
# Of tables 5 and 6, in their order.
TASK_NAMES = ("CIFAR-10", "CIFAR-100", IMAGENET, REAL, "Flowers-102", "Pets")
# "Average" of table 7 and "Average-5" of figure 5: table 7's 89.33 of R50x1 is the mean of its five in table 6.
AVERAGE_OF = (IMAGENET, "CIFAR-10", "CIFAR-100", "Pets", "Flowers-102")
FIVE_SHOT = f"5-shot {IMAGENET}"
TABLE_8_MODEL = "ViT-B/16"
_POSITIONS = ("position_embedding", "position_embedding_at")
_WITHIN = 0.15  # of the paper's epochs, as `vit_jax.accounting.paper_core_days`

_FINE_TUNING_SIZE = 384
# 384 is no multiple of 14; 378 and 392 are the nearest that are.
_SIZES_OF_14 = (378, 392)


@dataclasses.dataclass(frozen=True)
class PreTrained:
    """A pre-trained model, and what was reached with it.

    Attributes:
      model: its label.
      origin: where its weights are from.
      tasks: settings by task: those of the paper, and VTAB's by their ids.
    """

    model: str
    origin: Origin
    tasks: dict[str, list[Result]]

    @property
    def data(self) -> str:
        """What it was pre-trained on."""
        return self.origin.data


def measure_of(task: str) -> str:
    """The name of a task's number in `Record.values`."""
    return REAL if task == REAL else ACCURACY


def pre_trained_models(records: Iterable[Record]) -> list[PreTrained]:
    """Pre-trained models with what was fine-tuned from them, on the paper's tasks and VTAB's.

    Left out: what only chooses, was trained from scratch, trained in part, or measured on anything but the test set.
    """
    models: dict[tuple[str, str], PreTrained] = {}
    for result in group(record for record in records if record.is_result):
        record = result.first
        if record.before is None or record.partial or not record.trained_on:
            continue
        for task in _tasks_of(record):
            key = (record.before.key, record.model)
            model = models.setdefault(key, PreTrained(record.model, record.before, {}))
            model.tasks.setdefault(task, []).append(result)
    return list(models.values())


def _tasks_of(record: Record) -> list[str]:
    """What a fine-tuned model's numbers are of."""
    tasks = []
    if of_vtab := vtab_task(record.dataset):
        is_test = record.evaluated_on == (record.trained_on, "test") and ACCURACY in record.values
        return [of_vtab] if is_test else []
    for task in TASKS.values():
        name = data_set_name(task.dataset)
        if record.trained_on != name:
            continue
        if ACCURACY in record.values and record.evaluated_on == (name, task.splits["final"][1]):
            tasks.append(name)
        if name == IMAGENET and REAL in record.values:
            tasks.append(REAL)
    return tasks


def protocol_of(task: str, model: str, *, table_2: bool = False) -> Protocol:
    """How the paper fine-tuned on a task.

    Args:
      task: as in `TASK_NAMES`, or the id of one of VTAB's.
      model: its name.
      table_2: whether as for table 2, where ImageNet is at a higher resolution and with Polyak averaging.
    """
    is_resnet = kind_of(model) == "BiT"  # at BiT's resolutions, if by BiT's rule
    sizes: tuple[int, ...] = () if is_resnet else (_FINE_TUNING_SIZE,)
    if model.endswith("/14"):
        sizes += _SIZES_OF_14
    if task in VTAB_TASKS:
        return Protocol(sizes, paper.TABLE_4["VTAB"].steps, train_split="train800val200")
    name = IMAGENET if task == REAL else task
    (train,) = (each.splits["final"][0] for each in TASKS.values() if data_set_name(each.dataset) == name)
    decay = None
    if table_2 and name == IMAGENET and not is_resnet:
        sizes, decay = ((518,) if model.endswith("/14") else (512,)), 0.9999
    return Protocol(sizes, paper.TABLE_4[name].steps, decay, train)


def ours_on(model: PreTrained, task: str, *, table_2: bool = False) -> Ours | None:
    """What was reached on a task with a pre-trained model."""
    candidates = model.tasks.get(task)
    if not candidates:
        return None
    result, notes = choose(candidates, protocol_of(task, model.model, table_2=table_2))
    ours = result.ours(measure_of(task))
    return None if ours is None else dataclasses.replace(ours, notes=(*ours.notes, *notes))


def vtab_scores(model: PreTrained) -> dict[str, Ours]:
    """Means over the groups of VTAB whose tasks are all there, and over all 19 ("mean")."""
    members = {name: [task.id for task in VTAB_TASKS.values() if task.group == name] for name in GROUPS}
    members["mean"] = list(VTAB_TASKS)
    scores = {}
    for name, tasks in members.items():
        if all(task in model.tasks for task in tasks):
            chosen = {task: choose(model.tasks[task], protocol_of(task, model.model)) for task in tasks}
            ours = combine([result for result, _ in chosen.values()], ACCURACY)
            if ours is not None:
                notes = dict.fromkeys(note for _, told in chosen.values() for note in told)
                scores[name] = dataclasses.replace(ours, notes=(*ours.notes, *notes))
    return scores


def average_of_five(model: PreTrained) -> Ours | None:
    """The mean over the tasks of `AVERAGE_OF`, if all are there."""
    if not all(task in model.tasks for task in AVERAGE_OF):
        return None
    return combine([choose(model.tasks[task], protocol_of(task, model.model))[0] for task in AVERAGE_OF], ACCURACY)


def _one_of_each(
    models: Sequence[PreTrained], tasks: Sequence[str]
) -> tuple[dict[tuple[str, str], PreTrained], list[str]]:
    """For each model and pre-training data the one that stands in a table, and remarks on those that do not.

    What they reached plays no part: the one with most tasks is taken, then one of the paper's own checkpoints or one
    that was pre-trained here, then the first by name.
    """
    by_name: dict[tuple[str, str], list[PreTrained]] = {}
    for model in models:
        if any(task in model.tasks for task in tasks):
            by_name.setdefault((model.model, model.data), []).append(model)
    chosen, remarks = {}, []
    for key, each in by_name.items():

        def rank(model: PreTrained) -> tuple[int, bool, str]:
            foreign = model.origin.is_released and not model.origin.name.startswith(("vit_", "bit_"))
            return (-sum(task in model.tasks for task in tasks), foreign, model.origin.name)

        first, *others = sorted(each, key=rank)
        chosen[key] = first
        told = f"{key[0]}, {key[1]}: from {first.origin.name}"
        remarks.append(
            f"{told}; not from {', '.join(other.origin.name for other in others)}." if others else f"{told}."
        )
    return chosen, remarks


def _column(model: str, data: str) -> str:
    return model if model.startswith("Noisy Student") else f"{model}, {data}"  # whose data would widen all lines


def table_2(models: Sequence[PreTrained]) -> Table:
    """Comparison with the state of the art."""
    tasks = [*next(iter(paper.TABLE_2.values()))]
    table = Table(
        "table_2",
        "Table 2: comparison with the state of the art, top-1 in percent",
        ("task",),
        "model and pre-training data",
        [_column(*key) for key in paper.TABLE_2],
        [(task,) for task in tasks],
    )
    chosen, remarks = _one_of_each(models, [task for task in tasks if task != "VTAB"] + list(VTAB_TASKS))
    for key, scores in paper.TABLE_2.items():
        ours: dict[str, Ours | None] = {}
        model: PreTrained | None = chosen.get(key)
        if model is not None:
            ours = {task: ours_on(model, task, table_2=True) for task in tasks if task != "VTAB"}
            ours["VTAB"] = vtab_scores(model).get("mean")
        for task in tasks:
            table.set((task,), _column(*key), Cell(scores.get(task), ours.get(task)))
        cost = None
        if model is not None and model.origin.tpuv3_core_days is not None:
            cost = Ours(model.origin.tpuv3_core_days, sources=(model.origin.name,))
        table.set(("TPUv3-core-days",), _column(*key), Cell(Score(paper.TPUV3_CORE_DAYS[key]), cost, digits=0))
    own = tuple(f"{_column(*key)}: " for key in paper.TABLE_2)
    table.remarks += [remark for remark in remarks if remark.startswith(own)]
    table.remarks += [
        "± is the sample standard deviation over seeds (n - 1); the paper does not say which it gives.",
        "The paper has two numbers for Noisy Student on ImageNet, 88.4 and 88.5.",
    ]
    return table


def table_5(models: Sequence[PreTrained]) -> Table:
    """Fine-tuned accuracy by pre-training data and model; ours that the paper does not have come last."""
    table = Table(
        "table_5",
        "Table 5: fine-tuned at 384, top-1 in percent",
        ("pre-trained on", "task"),
        "model",
        list(paper.TABLE_5_MODELS),
        [(data, task) for data, tasks in paper.TABLE_5.items() for task in tasks],
    )
    published = {
        (data, task, model): Score(value)
        for data, tasks in paper.TABLE_5.items()
        for task, values in tasks.items()
        for model, value in zip(paper.TABLE_5_MODELS, values, strict=True)
        if value is not None
    }
    for (data, task, name), score in published.items():
        table.set((data, task), name, Cell(score))
    chosen, table.remarks = _one_of_each(models, TASK_NAMES)
    for (name, data), model in sorted(chosen.items(), key=lambda item: _order(item[0])):
        for task in TASK_NAMES:
            if ours := ours_on(model, task):
                table.set((data, task), name, Cell(published.get((data, task, name)), ours))
    return table


def _order(key: tuple[str, str]) -> tuple[int, str, str]:
    """The paper's models first."""
    model, data = key
    known = model in paper.TABLE_5_MODELS
    return (paper.TABLE_5_MODELS.index(model) if known else len(paper.TABLE_5_MODELS), model, data)


_JFT = "JFT-300M"
_EXAFLOPS = "exaFLOPs"


def table_6(models: Sequence[PreTrained]) -> Table:
    """Transfer and what the pre-training cost; models that were pre-trained here on other data come last."""
    rows = {(row.model, _JFT, str(row.epochs)): row for row in paper.TABLE_6}
    table = Table(
        "table_6",
        "Table 6: transfer (top-1 in percent) and pre-training compute",
        ("model", "pre-trained on", "epochs"),
        "task",
        [*paper.TABLE_6[0].scores, _EXAFLOPS],
        list(rows),
    )
    for key, row in rows.items():
        for task, score in row.scores.items():
            table.set(key, task, Cell(Score(score)))
        table.set(key, _EXAFLOPS, Cell(Score(row.exaflops), digits=0))
    known = [model for model in models if model.origin.exaflops]
    # Several pre-trainings of a model may differ in length: a row each.
    by_row: dict[tuple[str, str, str], list[PreTrained]] = {}
    for model in known:
        by_row.setdefault((model.model, model.data, _epochs(model, rows)), []).append(model)
    for key in sorted(by_row, key=lambda key: (key not in rows, key)):
        chosen, remarks = _one_of_each(by_row[key], TASK_NAMES)
        for model in chosen.values():
            for task in TASK_NAMES:
                if ours := ours_on(model, task):
                    table.set(key, task, Cell(Score(rows[key].scores[task]) if key in rows else None, ours))
            cost = Ours(model.origin.exaflops or math.nan, sources=(model.origin.name,))
            published = Score(rows[key].exaflops) if key in rows else None
            table.set(key, _EXAFLOPS, Cell(published, cost, digits=max(0, 1 - math.floor(math.log10(cost.mean)))))
        table.remarks += remarks
    table.remarks.append(
        "Our exaFLOPs are by formula, without the head (python -m vit_jax.analysis.flops --table6); released "
        "checkpoints do not tell theirs, and are left out."
    )
    return table


def _epochs(model: PreTrained, rows: Iterable[tuple[str, str, str]]) -> str:
    """The paper's number of epochs where it is about that, for a row of its table, or our own."""
    if model.origin.epochs is None:
        return UNKNOWN
    for name, data, epochs in rows:
        if (name, data) == (model.model, model.data) and abs(model.origin.epochs / int(epochs) - 1) <= _WITHIN:
            return epochs
    return f"{model.origin.epochs:.3g}"


def table_8(records: Iterable[Record]) -> Table:
    """Position embeddings: ImageNet 5-shot linear accuracy, a share as in the paper."""
    kinds = list(dict.fromkeys(kind for kind, _ in paper.TABLE_8))
    places = list(dict.fromkeys(place for _, place in paper.TABLE_8))
    table = Table(
        "table_8",
        "Table 8: position embeddings, ImageNet 5-shot linear accuracy",
        ("model", "position embedding"),
        "added at",
        places,
        [(TABLE_8_MODEL, kind) for kind in kinds],
    )
    for (kind, place), value in paper.TABLE_8.items():
        table.set((TABLE_8_MODEL, kind), place, Cell(Score(value), digits=5))
    candidates: dict[tuple[str, str, str], list[Result]] = {}
    for result in group(record for record in records if record.is_result and FIVE_SHOT in record.values):
        record = result.first
        if record.before is not None and record.trained_on:
            continue  # fine-tuned
        model = model_label(record.fields, without=_POSITIONS)
        if kind_of(model) == "BiT":
            continue  # it has no position embedding
        kind = str(record.fields.get("position_embedding") or "learned_1d")
        place = str(record.fields.get("position_embedding_at") or "stem")
        candidates.setdefault((model, kind, place), []).append(result)
    for (model, kind, place), results in candidates.items():
        ranked = sorted(results, key=lambda result: (-len(result.records), str(result.first.path)))
        ours = ranked[0].ours(FIVE_SHOT, unit=1.0)
        if ours is None:
            continue
        notes = [*ours.notes, f"pre-trained on {ranked[0].first.origin.data}"]
        if len(ranked) > 1:
            notes.append(f"{len(ranked) - 1} more of other settings: see the table of results")
        score = paper.TABLE_8.get((kind, place)) if model == TABLE_8_MODEL else None
        cell = Cell(None if score is None else Score(score), dataclasses.replace(ours, notes=tuple(notes)), digits=5)
        table.set((model, kind), place, cell)
    return table


def table_9(models: Sequence[PreTrained]) -> Table:
    """VTAB-1k by task, with means over groups and over all."""
    table = Table(
        "table_9",
        "Table 9: VTAB-1k, top-1 in percent",
        ("group", "task"),
        "model and pre-training data",
        [_column(*key) for key in paper.TABLE_9],
        [],
    )
    chosen, remarks = _one_of_each(models, list(VTAB_TASKS))
    keys = [*paper.TABLE_9, *sorted(key for key in chosen if key not in paper.TABLE_9)]
    scores = {key: vtab_scores(chosen[key]) if key in chosen else {} for key in keys}
    for name in GROUPS:
        tasks = [task for task in VTAB_TASKS.values() if task.group == name]
        for task in tasks:
            for key in keys:
                published = None
                if key in paper.TABLE_9:
                    position = paper.VTAB_TASKS[name].index(task.name)
                    published = Score(paper.TABLE_9[key][name][position])
                ours = ours_on(chosen[key], task.id) if key in chosen else None
                table.set((name, task.name), _column(*key), Cell(published, ours, digits=1))
        for key in keys:
            published = None
            if key in paper.TABLE_9:
                published = Score(sum(paper.TABLE_9[key][name]) / len(paper.TABLE_9[key][name]))
            table.set((name, "mean"), _column(*key), Cell(published, scores[key].get(name), digits=1))
    for key in keys:
        published = Score(paper.TABLE_9_MEANS[key]) if key in paper.TABLE_9_MEANS else None
        table.set(("all", "mean"), _column(*key), Cell(published, scores[key].get("mean"), digits=1))
    table.remarks = [
        *remarks,
        "The paper's table has no means of groups; those beside ours are of its tasks. A mean of ours is there once "
        "all its tasks are.",
    ]
    return table


def paper_tables(records: Sequence[Record], models: Sequence[PreTrained]) -> list[Table]:
    """All of the paper's tables that there are, whether they have something of ours or not."""
    return [table_2(models), table_5(models), table_6(models), table_8(records), table_9(models)]


_USUAL_SPLITS = ("", "train")


def results_table(records: Sequence[Record]) -> Listing:
    """Every setting with a result, a line each: mean and standard deviation over its seeds."""
    results = group(record for record in records if record.is_result)
    names = _names_of_values([result.first for result in results])
    results = sorted(results, key=lambda result: _place_of(result.first))
    differences = _differences(results)
    rows, values = [], []
    for result, difference in zip(results, differences, strict=True):
        told = _describe(result.first)
        seeds = ", ".join(str(each.seed) for each in result.records if each.seed is not None)
        measured = [result.ours(name) for name in names]
        folder = str(result.first.path)
        if len(result.records) > 1:
            folder = f"{common_folder([str(each.path) for each in result.records])} ({len(result.records)})"
        rows.append([*map(_text, told), seeds, *map(_show, measured), folder])
        paths = " ".join(str(each.path) for each in result.records)
        numbers = [number for ours in measured for number in ((ours.mean, ours.std) if ours else (None, None))]
        values.append([*told, difference, seeds, *numbers, paths])
    rows, remarks = _shortened(rows, differences)
    told_of_std = (
        "± is the sample standard deviation over seeds (n - 1), or, of one run, over draws of few-shot images."
    )
    remarks += [told_of_std] if any("±" in cell for row in rows for cell in row) else []
    headings = [*_DESCRIBED, "seeds", *names, "folder"]
    of_values = [
        *_DESCRIBED,
        "differs in",
        "seeds",
        *(each for name in names for each in (name, f"{name} ±")),
        "folders",
    ]
    return Listing("results", "Results, percent: a line for each setting", headings, rows, of_values, values, remarks)


def common_folder(folders: Sequence[str]) -> str:
    """The folder that several are in, "..." where they have nothing in common; of buckets, too."""
    parts = zip(*(folder.split("/") for folder in folders), strict=False)
    shared = itertools.takewhile(lambda each: len(set(each)) == 1, parts)
    return "/".join(each[0] for each in shared) or "..."


def runs_table(records: Sequence[Record]) -> Listing:
    """Everything that was found, a line each, what only chooses among it."""
    names = _names_of_values(records)
    rows, values = [], []
    for record in sorted(records, key=lambda record: str(record.path)):
        told = [*_describe(record), record.seed, record.use]
        measured = [record.values[name].value if name in record.values else None for name in names]
        shown = ["" if value is None else f"{100 * value:.2f}" for value in measured]
        rows.append([*map(_text, told), *shown, str(record.path)])
        values.append([*told, *(None if value is None else 100 * value for value in measured), str(record.path)])
    rows, remarks = _shortened(rows, [""] * len(rows))
    headings = [*_DESCRIBED, "seed", "use", *names, "folder"]
    title = "All runs and evaluations that were found, percent"
    return Listing("runs", title, headings, rows, headings, values, remarks)


def _differences(results: Sequence[Result]) -> list[str]:
    """What sets apart those that `_describe` tells nothing different of; "" for the others."""
    alike: dict[str, list[Result]] = {}
    for result in results:
        alike.setdefault(str(_describe(result.first)), []).append(result)

    def difference(result: Result, others: Sequence[Result]) -> str:
        trainings = [other.first.training for other in others]
        fields = [
            name
            for name in result.first.training
            if any(training.get(name) != result.first.training[name] for training in trainings)
        ]
        told = [f"{name}={result.first.training[name]}" for name in sorted(fields)]
        if result.first.before and len({other.first.before.key for other in others if other.first.before}) > 1:
            told.append(f"from {common_folder([each.before.name for each in result.records if each.before])}")
        return ", ".join(told)

    return [difference(result, alike[str(_describe(result.first))]) for result in results]


def _shortened(rows: Sequence[Sequence[str]], differences: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Rows with marks for what sets models of one name apart, and for differences; what the marks mean."""
    marks: dict[str, str] = {}
    shortened = []
    for (model, *rest), difference in zip(rows, differences, strict=True):
        name, _, changes = model.partition(" (")
        for meaning in filter(None, (changes.removesuffix(")"), difference)):
            name += f" [{marks.setdefault(meaning, str(len(marks) + 1))}]"
        shortened.append([name, *rest])
    return shortened, [f"[{mark}] {meaning}" for meaning, mark in marks.items()]


def _names_of_values(records: Iterable[Record]) -> list[str]:
    """The names of all that was measured: accuracy first, few-shot last by number of shots."""
    names = {name for record in records for name in record.values if name != "top-5"}

    def order(name: str) -> tuple[bool, str, int, str]:
        shots, is_few_shot, rest = name.partition("-shot ")
        return (bool(is_few_shot), rest, int(shots) if is_few_shot else name != ACCURACY, name)

    return sorted(names, key=order)


_DESCRIBED = ("model", "pre-trained on", "trained on", "measured on", "pixels", "steps")


def _describe(record: Record) -> list[object]:
    """Cells that say what a record is of, as `_DESCRIBED` names them."""
    trained_on = record.trained_on
    if trained_on and record.train_split not in _USUAL_SPLITS:
        trained_on += f" {record.train_split}"
    measured_on = ""
    if ACCURACY in record.values:
        name, split = record.evaluated_on
        measured_on = str(split) if name == record.trained_on else f"{name} {split}"
    before = "" if record.before is None else record.before.data
    return [record.model, before, trained_on, measured_on, record.image_size, record.steps]


def _place_of(record: Record) -> tuple[str, str, str, str]:
    before = "" if record.before is None else record.before.data
    return (before, record.model, record.trained_on, str(record.path))


def _text(value: object) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _show(ours: Ours | None) -> str:
    if ours is None:
        return ""
    return f"{ours.mean:.2f}" if ours.std is None else f"{ours.mean:.2f} ± {ours.std:.2f}"
