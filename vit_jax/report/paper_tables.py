"""The paper's tables, and a table of released checkpoints, with our numbers."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from vit_jax.data.vtab import GROUPS
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.paper import related, tables
from vit_jax.report.markdown import Row, Table
from vit_jax.report.measured import MeasuredModel
from vit_jax.report.names import PRE_TRAINING_IMAGES, UNKNOWN, kind_of, model_label
from vit_jax.report.pretrained import (
    AVERAGE_OF,
    TASK_NAMES,
    PreTrained,
    average_of_five,
    dropout_of,
    one_of_each,
    result_on,
    vtab_scores,
)
from vit_jax.report.recipes import IMAGENET, others_note
from vit_jax.report.seeds import SeedGroup, SeedMean, group
from vit_jax.report.subjects import FIVE_SHOT

TABLE_8_MODEL = "ViT-B/16"
_JFT = "JFT-300M"
_EXAFLOPS = "exaFLOPs"
_POSITIONS = ("position_embedding", "position_embedding_at")
_WITHIN = 0.15  # of the paper's epochs, as `vit_jax.run.accounting.paper_core_days`


def column_name(model: str, data: str) -> str:
    """The name of the column of a pre-trained model."""
    return model if model.startswith("Noisy Student") else f"{model}, {data}"  # its data would widen all lines


def table_2(models: Sequence[PreTrained]) -> Table:
    """Comparison with the state of the art."""
    title = "Table 2: comparison with the state of the art, top-1 in percent"
    table = Table("table_2", title, ("task",), "model and pre-training data")
    core_days = ("TPUv3-core-days",)
    table.publish(
        {((task,), column_name(*key)): score for key, of in tables.TABLE_2.items() for task, score in of.items()}
    )
    table.publish({(core_days, column_name(*key)): days for key, days in tables.TPUV3_CORE_DAYS.items()}, digits=0)
    chosen, remarks = one_of_each(models, [*TASK_NAMES, *VTAB_TASKS])
    for key, model in ((key, model) for key, model in chosen.items() if key in tables.TABLE_2):
        column = column_name(*key)
        for task in TASK_NAMES:
            table.add_ours((task,), column, result_on(model, task, table_2=True))
        table.add_ours(("VTAB",), column, vtab_scores(model).get("mean"))
        table.add_ours(core_days, column, cost_of(model, model.lineage.tpuv3_core_days), digits=0)
    own = tuple(f"{column_name(*key)}: " for key in tables.TABLE_2)
    table.remarks = [
        *(remark for remark in remarks if remark.startswith(own)),
        "± is the sample standard deviation over seeds (n - 1); the paper does not say which it gives.",
        "Noisy Student on ImageNet: 88.4 as published, 88.5 by Touvron et al. (FixEfficientNet); the paper has both.",
    ]
    return table


def cost_of(model: PreTrained, cost: float | None) -> SeedMean | None:
    """The cost of a pre-training as a number of a table."""
    return None if cost is None else SeedMean(cost, sources=(model.lineage.name,))


def table_5(models: Sequence[PreTrained]) -> Table:
    """Fine-tuned accuracy by pre-training data and model; rows and columns that the paper lacks come last."""
    title, names = "Table 5: fine-tuned at 384, top-1 in percent", tables.TABLE_5_MODELS
    table = Table("table_5", title, ("pre-trained on", "task"), "model", list(names))
    for data, tasks in tables.TABLE_5.items():
        for task, scores in tasks.items():
            by_model = zip(names, scores, strict=True)
            table.publish({((data, task), model): score for model, score in by_model if score is not None})
    chosen, table.remarks = one_of_each(models, TASK_NAMES)
    for name, data in sorted(chosen, key=lambda key: ([*names, key[0]].index(key[0]), key)):  # the paper's first
        for task in TASK_NAMES:
            table.add_ours((data, task), name, result_on(chosen[name, data], task))
    return table


def _by_row(
    table: Table, models: Mapping[Row, list[PreTrained]], tasks: Sequence[str]
) -> Iterable[tuple[Row, PreTrained]]:
    """Fills in one model's results for each row; rows that the paper lacks come last. Yields the models."""
    published = table.rows
    for row in sorted(models, key=lambda row: (row not in published, row)):
        chosen, remarks = one_of_each(models[row], tasks)
        table.remarks += remarks
        for model in chosen.values():
            for task in tasks:
                table.add_ours(row, task, result_on(model, task))
            yield row, model


def table_6(models: Sequence[PreTrained]) -> Table:
    """Transfer and compute of pre-training; models that were pre-trained here on other data come last."""
    title = "Table 6: transfer (top-1 in percent) and pre-training compute"
    table = Table("table_6", title, ("model", "pre-trained on", "epochs"), "task")
    for row in tables.TABLE_6:
        name = (row.model, _JFT, str(row.epochs))
        table.publish({(name, task): score for task, score in row.scores.items()})
        table.publish({(name, _EXAFLOPS): row.exaflops}, digits=0)
    by_row: dict[Row, list[PreTrained]] = {}  # several pre-trainings of a model may differ in length
    for model in models:
        if model.lineage.exaflops:
            by_row.setdefault((model.model, model.data, epochs_of(model)), []).append(model)
    for key, model in _by_row(table, by_row, TASK_NAMES):
        exaflops = model.lineage.exaflops or math.nan
        table.add_ours(key, _EXAFLOPS, cost_of(model, exaflops), digits=digits_of(exaflops))
    table.remarks.append(
        "Our exaFLOPs are by formula, without the head (python -m vit_jax.costs.flops --table6); released "
        "checkpoints do not record theirs, and are left out."
    )
    return table


def digits_of(number: float) -> int:
    """Decimals with which a positive number keeps two digits at least."""
    return max(0, 1 - math.floor(math.log10(number)))


def epochs_of(model: PreTrained) -> str:
    """The paper's number of epochs if ours is close to it, for a row of its table; otherwise ours."""
    if model.lineage.epochs is None:
        return UNKNOWN
    for row in tables.TABLE_6:
        if (row.model, _JFT) == (model.model, model.data) and abs(model.lineage.epochs / row.epochs - 1) <= _WITHIN:
            return str(row.epochs)
    return f"{model.lineage.epochs:.3g}"


def table_7(models: Sequence[PreTrained]) -> Table:
    """ResNets pre-trained with Adam and with SGD; those that were pre-trained here on other data come last."""
    names = {"adam": "Adam", "adamw": "Adam", "sgd": "SGD"}
    tasks = [task for task in TASK_NAMES if task in AVERAGE_OF]
    title = "Table 7: ResNets pre-trained with Adam and with SGD, top-1 in percent"
    columns = [*tasks, tables.TABLE_7_AVERAGE]
    table = Table("table_7", title, ("model", "pre-trained on", "optimizer"), "task", columns)
    for (model, optimizer), scores in tables.TABLE_7.items():
        table.publish({((model, _JFT, names[optimizer]), task): score for task, score in scores.items()})
    by_row: dict[Row, list[PreTrained]] = {}
    for each in models:
        if kind_of(each.model) == "BiT" and each.lineage.optimizer:
            used = names.get(each.lineage.optimizer, each.lineage.optimizer)
            by_row.setdefault((each.model, each.data, used), []).append(each)
    for row, each in _by_row(table, by_row, tasks):
        table.add_ours(row, tables.TABLE_7_AVERAGE, average_of_five(each))
    table.remarks.append("Not yet checked against the paper: the numbers with SGD. Those with Adam are table 6's.")
    return table


def table_8(models: Iterable[MeasuredModel]) -> Table:
    """Position embeddings: ImageNet 5-shot linear accuracy, as a share, like the paper's."""
    title = "Table 8: position embeddings, ImageNet 5-shot linear accuracy"
    table = Table("table_8", title, ("model", "position embedding"), "added at")
    published = {((TABLE_8_MODEL, kind), place): score for (kind, place), score in tables.TABLE_8.items()}
    table.publish(published, digits=5)
    candidates: dict[tuple[Row, str], list[SeedGroup]] = {}
    for each in group(model for model in models if FIVE_SHOT in model.results):
        name = model_label(each.first.fields, without=_POSITIONS)
        is_fine_tuned = each.first.before is not None and each.first.trained_on
        is_papers = each.first.lineage.data in PRE_TRAINING_IMAGES
        if is_fine_tuned or not is_papers or kind_of(name) == "BiT":  # a ResNet has no position embedding
            continue
        kind = str(each.first.fields.get("position_embedding") or "learned_1d")
        place = str(each.first.fields.get("position_embedding_at") or "stem")
        candidates.setdefault(((name, kind), place), []).append(each)

    shown = {TABLE_8_MODEL} | {name for ((name, kind), place) in candidates if (kind, place) != ("learned_1d", "stem")}

    def rank(each: SeedGroup) -> tuple[int, int, str]:
        differences = len(each.first.changes) + len(each.first.values[FIVE_SHOT].notes)
        return (differences, -len(each.models), str(each.first.path))

    for (row, place), groups in candidates.items():
        if row[0] not in shown:  # a model with the usual position embedding alone compares nothing
            continue
        ranked = sorted(groups, key=rank)
        first, mean = ranked[0].first, ranked[0].mean(FIVE_SHOT, unit=1.0)
        notes = [f"pre-trained on {first.lineage.data}", *others_note(ranked)]
        notes += [f"its config changed during the run, {change}" for change in first.changes]
        table.add_ours(row, place, mean and mean.noted(*notes), digits=5)
    return table


def table_9(models: Sequence[PreTrained]) -> Table:
    """VTAB-1k by task, with means over groups and over all."""
    title = "Table 9: VTAB-1k, top-1 in percent"
    table = Table("table_9", title, ("group", "task"), "model and pre-training data")
    bit = {(model, "ImageNet-21k"): means for model, means in related.BIT_M_VTAB.items()}
    for name in GROUPS:
        for task in (each.name for each in VTAB_TASKS.values() if each.group == name):
            position = tables.VTAB_TASKS[name].index(task)
            scores = {key: of_group[name][position] for key, of_group in tables.TABLE_9.items()}
            table.publish({((name, task), column_name(*key)): score for key, score in scores.items()}, digits=1)
        means = {key: sum(of_group[name]) / len(of_group[name]) for key, of_group in tables.TABLE_9.items()}
        means |= {key: of_group[name] for key, of_group in bit.items()}
        table.publish({((name, "mean"), column_name(*key)): mean for key, mean in means.items()}, digits=1)
    means = tables.TABLE_9_MEANS | {key: of_group["mean"] for key, of_group in bit.items()}
    table.publish({(("all", "mean"), column_name(*key)): mean for key, mean in means.items()}, digits=1)
    chosen, remarks = one_of_each(models, list(VTAB_TASKS))
    for key in sorted(chosen):
        for each in VTAB_TASKS.values():
            table.add_ours((each.group, each.name), column_name(*key), result_on(chosen[key], each.id), digits=1)
        for name, mean in vtab_scores(chosen[key]).items():
            row = ("all", "mean") if name == "mean" else (name, "mean")
            table.add_ours(row, column_name(*key), mean, digits=1)
    table.remarks = [
        *remarks,
        "The paper's table has no means of groups; those beside ours are computed from its tasks. Our means need all "
        "of their tasks.",
        "BiT-M, R152x4 and R101x3 on ImageNet-21k: from the README of google-research/big_transfer, which says that "
        "they are re-runs and not the paper's models. The paper's figure 2 has BiT's groups only as bars.",
    ]
    return table


_FAMILIES = {"vit": "ViT", "augreg": "AugReg"}


def released_table(models: Sequence[PreTrained]) -> Table:
    """Results of fine-tuning released ImageNet-21k models, by dropout rate."""
    title = "Released ImageNet-21k models fine-tuned at 384, top-1 in percent"
    table = Table("released", title, ("weights", "dropout at fine-tuning", "task"), "model", publisher="README")
    for dropout, by_model in related.RELEASED_FINE_TUNED.items():
        for name, scores in by_model.items():
            table.publish({(("ViT", f"{dropout:g}", task), name): score for task, score in scores.items()})
    augreg = ("AugReg", "0", IMAGENET)
    table.publish({(augreg, name): score for name, score in related.AUGREG_IMAGENET.items()})
    for model in models:
        family = _FAMILIES.get(model.lineage.name.partition("_")[0])
        if family is None or not model.lineage.is_released or model.data != "ImageNet-21k":
            continue
        for task in AVERAGE_OF[:3]:
            candidates = model.tasks.get(task, ())
            used = {rate for each in candidates if (rate := dropout_of(each.first)) is not None}
            for dropout in sorted(used):
                groups = [each for each in candidates if dropout_of(each.first) == dropout]
                ours = result_on(dataclasses.replace(model, tasks={task: groups}), task)
                table.add_ours((family, f"{dropout:g}", task), model.model, ours)
    table.remarks.append(
        "ViT: README of google-research/vision_transformer of 2021-05-24, which calls 0.1 the ViT paper's. AugReg: the "
        "checkpoints that its authors recommend, each with its own learning rate."
    )
    return table


def paper_tables(measured: Sequence[MeasuredModel], models: Sequence[PreTrained]) -> list[Table]:
    """All of the paper's tables, with or without numbers of ours."""
    before, after = (table_2, table_5, table_6, table_7), (table_9, released_table)
    return [*(make(models) for make in before), table_8(measured), *(make(models) for make in after)]
