"""The paper's tables, and those of released checkpoints, with ours beside them."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from vit_jax.data.vtab import GROUPS
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.paper import related, tables
from vit_jax.paper.tables import Score
from vit_jax.report.markdown import Cell, Table
from vit_jax.report.names import UNKNOWN, kind_of, model_label
from vit_jax.report.pretrained import (
    AVERAGE_OF,
    IMAGENET,
    TASK_NAMES,
    PreTrained,
    average_of_five,
    dropout_of,
    one_of_each,
    ours_on,
    vtab_scores,
)
from vit_jax.report.run_results import Record
from vit_jax.report.seeds import Ours, Result, group

FIVE_SHOT = f"5-shot {IMAGENET}"
TABLE_8_MODEL = "ViT-B/16"
_POSITIONS = ("position_embedding", "position_embedding_at")
_WITHIN = 0.15  # of the paper's epochs, as `vit_jax.run.accounting.paper_core_days`


def _column(model: str, data: str) -> str:
    return model if model.startswith("Noisy Student") else f"{model}, {data}"  # whose data would widen all lines


def table_2(models: Sequence[PreTrained]) -> Table:
    """Comparison with the state of the art."""
    tasks = [*next(iter(tables.TABLE_2.values()))]
    table = Table(
        "table_2",
        "Table 2: comparison with the state of the art, top-1 in percent",
        ("task",),
        "model and pre-training data",
        [_column(*key) for key in tables.TABLE_2],
        [(task,) for task in tasks],
    )
    chosen, remarks = one_of_each(models, [task for task in tasks if task != "VTAB"] + list(VTAB_TASKS))
    for key, scores in tables.TABLE_2.items():
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
        table.set(("TPUv3-core-days",), _column(*key), Cell(Score(tables.TPUV3_CORE_DAYS[key]), cost, digits=0))
    own = tuple(f"{_column(*key)}: " for key in tables.TABLE_2)
    table.remarks += [remark for remark in remarks if remark.startswith(own)]
    table.remarks += [
        "± is the sample standard deviation over seeds (n - 1); the paper does not say which it gives.",
        "Noisy Student on ImageNet: 88.4 as published, 88.5 by Touvron et al. (FixEfficientNet); the paper has both.",
    ]
    return table


def table_5(models: Sequence[PreTrained]) -> Table:
    """Fine-tuned accuracy by pre-training data and model; ours that the paper does not have come last."""
    table = Table(
        "table_5",
        "Table 5: fine-tuned at 384, top-1 in percent",
        ("pre-trained on", "task"),
        "model",
        list(tables.TABLE_5_MODELS),
        [(data, task) for data, tasks in tables.TABLE_5.items() for task in tasks],
    )
    published = {
        (data, task, model): Score(value)
        for data, tasks in tables.TABLE_5.items()
        for task, values in tasks.items()
        for model, value in zip(tables.TABLE_5_MODELS, values, strict=True)
        if value is not None
    }
    for (data, task, name), score in published.items():
        table.set((data, task), name, Cell(score))
    chosen, table.remarks = one_of_each(models, TASK_NAMES)
    for (name, data), model in sorted(chosen.items(), key=lambda item: _order(item[0])):
        for task in TASK_NAMES:
            if ours := ours_on(model, task):
                table.set((data, task), name, Cell(published.get((data, task, name)), ours))
    return table


def _order(key: tuple[str, str]) -> tuple[int, str, str]:
    """The paper's models first."""
    model, data = key
    known = model in tables.TABLE_5_MODELS
    return (tables.TABLE_5_MODELS.index(model) if known else len(tables.TABLE_5_MODELS), model, data)


_JFT = "JFT-300M"
_EXAFLOPS = "exaFLOPs"


def table_6(models: Sequence[PreTrained]) -> Table:
    """Transfer and what the pre-training cost; models that were pre-trained here on other data come last."""
    rows = {(row.model, _JFT, str(row.epochs)): row for row in tables.TABLE_6}
    table = Table(
        "table_6",
        "Table 6: transfer (top-1 in percent) and pre-training compute",
        ("model", "pre-trained on", "epochs"),
        "task",
        [*tables.TABLE_6[0].scores, _EXAFLOPS],
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
        chosen, remarks = one_of_each(by_row[key], TASK_NAMES)
        for model in chosen.values():
            for task in TASK_NAMES:
                if ours := ours_on(model, task):
                    table.set(key, task, Cell(Score(rows[key].scores[task]) if key in rows else None, ours))
            cost = Ours(model.origin.exaflops or math.nan, sources=(model.origin.name,))
            published = Score(rows[key].exaflops) if key in rows else None
            table.set(key, _EXAFLOPS, Cell(published, cost, digits=max(0, 1 - math.floor(math.log10(cost.mean)))))
        table.remarks += remarks
    table.remarks.append(
        "Our exaFLOPs are by formula, without the head (python -m vit_jax.costs.flops --table6); released "
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


def table_7(models: Sequence[PreTrained]) -> Table:
    """ResNets pre-trained with Adam and with SGD; those that were pre-trained here on other data come last."""
    names = {"adam": "Adam", "sgd": "SGD"}
    rows = {(model, _JFT, names[optimizer]): scores for (model, optimizer), scores in tables.TABLE_7.items()}
    tasks = [task for task in TASK_NAMES if task in AVERAGE_OF]
    table = Table(
        "table_7",
        "Table 7: ResNets pre-trained with Adam and with SGD, top-1 in percent",
        ("model", "pre-trained on", "optimizer"),
        "task",
        [*tasks, tables.TABLE_7_AVERAGE],
        list(rows),
    )
    for row, scores in rows.items():
        for task, score in scores.items():
            table.set(row, task, Cell(Score(score)))
    resnets = [model for model in models if kind_of(model.model) == "BiT" and model.origin.optimizer]
    by_row: dict[tuple[str, str, str], list[PreTrained]] = {}
    for model in resnets:
        optimizer = {"adamw": "Adam", "sgd": "SGD"}.get(str(model.origin.optimizer), str(model.origin.optimizer))
        by_row.setdefault((model.model, model.data, optimizer), []).append(model)
    for row in sorted(by_row, key=lambda row: (row not in rows, row)):
        chosen, remarks = one_of_each(by_row[row], tasks)
        for model in chosen.values():
            for task in (*tasks, tables.TABLE_7_AVERAGE):
                ours = average_of_five(model) if task == tables.TABLE_7_AVERAGE else ours_on(model, task)
                theirs = rows.get(row, {}).get(task)
                if ours:
                    table.set(row, task, Cell(None if theirs is None else Score(theirs), ours))
        table.remarks += remarks
    table.remarks.append("To be checked against the paper: the numbers with SGD. Those with Adam are table 6's.")
    return table


_WEIGHTS = {"vit_": "ViT", "augreg_": "AugReg"}


def released_table(models: Sequence[PreTrained]) -> Table:
    """What released ImageNet-21k models reach when they are fine-tuned, by the dropout at fine-tuning."""
    published: dict[tuple[tuple[str, str, str], str], float] = {
        (("ViT", f"{dropout:g}", task), name): score
        for dropout, by_model in related.RELEASED_FINE_TUNED.items()
        for name, scores in by_model.items()
        for task, score in scores.items()
    }
    published |= {(("AugReg", "0", IMAGENET), name): score for name, score in related.AUGREG_IMAGENET.items()}
    table = Table(
        "released",
        "Released ImageNet-21k models fine-tuned at 384, top-1 in percent",
        ("weights", "dropout at fine-tuning", "task"),
        "model",
        list(dict.fromkeys(name for _, name in published)),
        list(dict.fromkeys(row for row, _ in published)),
        publisher="README",
    )
    for (row, name), score in published.items():
        table.set(row, name, Cell(Score(score)))
    for model in models:
        family = next((family for prefix, family in _WEIGHTS.items() if model.origin.name.startswith(prefix)), None)
        if family is None or not model.origin.is_released or model.data != "ImageNet-21k":
            continue
        for task in AVERAGE_OF[:3]:
            by_dropout: dict[float, list[Result]] = {}
            for result in model.tasks.get(task, ()):
                if (dropout := dropout_of(result.first)) is not None:
                    by_dropout.setdefault(dropout, []).append(result)
            for dropout, results in by_dropout.items():
                of_dropout = dataclasses.replace(model, tasks={task: results})
                row = (family, f"{dropout:g}", task)
                theirs = published.get((row, model.model))
                table.set(row, model.model, Cell(None if theirs is None else Score(theirs), ours_on(of_dropout, task)))
    table.remarks.append(
        "ViT: README of google-research/vision_transformer of 2021-05-24, which calls 0.1 the ViT paper's. AugReg: the "
        "checkpoints that its authors recommend, each with its own learning rate."
    )
    return table


def table_8(records: Iterable[Record]) -> Table:
    """Position embeddings: ImageNet 5-shot linear accuracy, a share as in the paper."""
    kinds = list(dict.fromkeys(kind for kind, _ in tables.TABLE_8))
    places = list(dict.fromkeys(place for _, place in tables.TABLE_8))
    table = Table(
        "table_8",
        "Table 8: position embeddings, ImageNet 5-shot linear accuracy",
        ("model", "position embedding"),
        "added at",
        places,
        [(TABLE_8_MODEL, kind) for kind in kinds],
    )
    for (kind, place), value in tables.TABLE_8.items():
        table.set((TABLE_8_MODEL, kind), place, Cell(Score(value), digits=5))
    candidates: dict[tuple[str, str, str], list[Result]] = {}
    for result in group(record for record in records if FIVE_SHOT in record.results):
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
        ranked = sorted(
            results,
            key=lambda result: (
                len(result.first.changes) + len(result.first.values[FIVE_SHOT].notes),
                -len(result.records),
                str(result.first.path),
            ),
        )
        ours = ranked[0].ours(FIVE_SHOT, unit=1.0)
        if ours is None:
            continue
        notes = [*ours.notes, f"pre-trained on {ranked[0].first.origin.data}"]
        if len(ranked) > 1:
            notes.append(f"{len(ranked) - 1} more of other settings: see the table of results")
        notes += [f"its config was changed on the way, {change}" for change in ranked[0].first.changes]
        score = tables.TABLE_8.get((kind, place)) if model == TABLE_8_MODEL else None
        cell = Cell(None if score is None else Score(score), dataclasses.replace(ours, notes=tuple(notes)), digits=5)
        table.set((model, kind), place, cell)
    return table


_BIT_M_VTAB = {(model, "ImageNet-21k"): groups for model, groups in related.BIT_M_VTAB.items()}


def table_9(models: Sequence[PreTrained]) -> Table:
    """VTAB-1k by task, with means over groups and over all."""
    table = Table(
        "table_9",
        "Table 9: VTAB-1k, top-1 in percent",
        ("group", "task"),
        "model and pre-training data",
        [_column(*key) for key in (*tables.TABLE_9, *_BIT_M_VTAB)],
        [],
    )
    chosen, remarks = one_of_each(models, list(VTAB_TASKS))
    published_keys = (*tables.TABLE_9, *_BIT_M_VTAB)
    keys = [*published_keys, *sorted(key for key in chosen if key not in published_keys)]
    scores = {key: vtab_scores(chosen[key]) if key in chosen else {} for key in keys}
    for name in GROUPS:
        tasks = [task for task in VTAB_TASKS.values() if task.group == name]
        for task in tasks:
            for key in keys:
                published = None
                if key in tables.TABLE_9:
                    position = tables.VTAB_TASKS[name].index(task.name)
                    published = Score(tables.TABLE_9[key][name][position])
                ours = ours_on(chosen[key], task.id) if key in chosen else None
                table.set((name, task.name), _column(*key), Cell(published, ours, digits=1))
        for key in keys:
            published = None
            if key in tables.TABLE_9:
                published = Score(sum(tables.TABLE_9[key][name]) / len(tables.TABLE_9[key][name]))
            elif key in _BIT_M_VTAB:
                published = Score(_BIT_M_VTAB[key][name])
            table.set((name, "mean"), _column(*key), Cell(published, scores[key].get(name), digits=1))
    for key in keys:
        mean = tables.TABLE_9_MEANS.get(key, _BIT_M_VTAB.get(key, {}).get("mean"))
        published = None if mean is None else Score(mean)
        table.set(("all", "mean"), _column(*key), Cell(published, scores[key].get("mean"), digits=1))
    table.remarks = [
        *remarks,
        "The paper's table has no means of groups; those beside ours are of its tasks. A mean of ours is there once "
        "all its tasks are.",
        "BiT-M, R152x4 and R101x3 on ImageNet-21k: of the README of google-research/big_transfer, which says that they "
        "are re-runs and not the paper's models. The paper's figure 2 has BiT's groups as bars alone.",
    ]
    return table


def paper_tables(records: Sequence[Record], models: Sequence[PreTrained]) -> list[Table]:
    """All of the paper's tables that there are, whether they have something of ours or not."""
    return [
        table_2(models),
        table_5(models),
        table_6(models),
        table_7(models),
        table_8(records),
        table_9(models),
        released_table(models),
    ]
