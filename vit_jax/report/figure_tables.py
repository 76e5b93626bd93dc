"""Figures 2, 3 and 5 as tables: the numbers behind the pictures."""

import statistics
from collections.abc import Sequence

from vit_jax.data.vtab import GROUPS
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.paper import related, tables
from vit_jax.paper.figures_in_words import STATEMENTS
from vit_jax.report.markdown import Table
from vit_jax.report.paper_tables import column_name, cost_of, digits_of, epochs_of, table_5
from vit_jax.report.pretrained import AVERAGE_OF, PreTrained, average_of_five, one_of_each, result_on, vtab_scores
from vit_jax.report.recipes import IMAGENET
from vit_jax.weights import get_checkpoint

# The smallest and the largest BiT with published numbers on ImageNet: pre-trained on ImageNet-21k, from the README of
# google-research/big_transfer and BiT's table 1; on JFT-300M, from the paper's tables 6 and 2; on ImageNet, none.
SMALLEST_BIT, LARGEST_BIT = "R50x1", "R152x4"
AVERAGE_5 = "Average-5"
ALL_TASKS = "all 19"
FIGURE_2_PAPER = ("ViT-H/14, JFT-300M", "R152x4, JFT-300M", "VIVI-Ex-100%, R50x3", "S4L, R50x1")  # its bars


def says(name: str) -> str:
    """A remark with the paper's statement about a figure or a table."""
    return f"The paper says: {STATEMENTS[name]}."


def figure_2(models: Sequence[PreTrained]) -> Table:
    """VTAB-1k by group of tasks."""
    table = Table("figure_2", "Figure 2: VTAB-1k by group, top-1 in percent", ("tasks",), "model", [*FIGURE_2_PAPER])
    groups = {key: _group_means(of_group) for key, of_group in tables.TABLE_9.items()}
    groups |= {(model, "ImageNet-21k"): means for model, means in related.BIT_M_VTAB.items()}
    published = {column_name(*key): means for key, means in groups.items()}
    published[FIGURE_2_PAPER[3]] = _group_means(related.S4L_VTAB)
    for column, means in published.items():
        table.publish({(_row_of(group), column): mean for group, mean in means.items()}, digits=1)
    whole = {column_name(*key): of["VTAB"] for key, of in tables.TABLE_2.items() if "VTAB" in of}
    table.publish({(_row_of("mean"), column): score for column, score in whole.items()}, digits=1)
    chosen, remarks = one_of_each(models, list(VTAB_TASKS))
    for key, model in sorted(chosen.items()):
        for group, mean in vtab_scores(model).items():
            table.add_ours(_row_of(group), column_name(*key), mean, digits=1)
    table.remarks = [
        *remarks,
        says("figure_2"),
        "The figure has bars without numbers. ViT's are means of table 9, over all tasks table 2's. BiT-L's groups "
        "and VIVI are not published as numbers. BiT-M: README of google-research/big_transfer. S4L: the row "
        "Sup-Rotation-100% of VTAB's own results; the paper does not say whether its bar is that model.",
    ]
    return table


def _group_means(of_group: dict[str, tuple[float, ...]]) -> dict[str, float]:
    means = {name: statistics.fmean(scores) for name, scores in of_group.items()}
    return means | {"mean": statistics.fmean(score for scores in of_group.values() for score in scores)}


def _row_of(group: str) -> tuple[str]:
    size = sum(task.group == group for task in VTAB_TASKS.values())
    return (ALL_TASKS if group == "mean" else f"{group} ({size})",)


FIGURE_2_ROWS = [_row_of(name)[0] for name in ("mean", *GROUPS)]


def bit_area() -> dict[str, tuple[float, float]]:
    """ImageNet top-1 of the smallest and of the largest BiT, by pre-training data, in percent."""
    of_21k = (get_checkpoint(f"bit_m_{SMALLEST_BIT.lower()}").published_accuracy or {})["imagenet2012"]
    (smallest,) = (row.imagenet for row in tables.TABLE_6 if row.model == SMALLEST_BIT)
    return {
        "ImageNet-21k": (of_21k, related.BIT_M_IMAGENET[LARGEST_BIT]),
        "JFT-300M": (smallest, tables.TABLE_2[LARGEST_BIT, "JFT-300M"][IMAGENET].mean),
    }


def figure_3(models: Sequence[PreTrained]) -> Table:
    """ImageNet after fine-tuning, by pre-training data: the rows of table 5, and BiT."""
    source = table_5(models)
    title = "Figure 3: ImageNet top-1 after fine-tuning, by pre-training data, in percent"
    table = Table("figure_3", title, ("pre-trained on",), "model", list(source.columns), remarks=list(source.remarks))
    table.cells = {((data,), name): cell for ((data, task), name), cell in source.cells.items() if task == IMAGENET}
    used = {name for _, name in table.cells}
    table.columns = [name for name in table.columns if name in used]
    for data, area in bit_area().items():
        for name, score in zip((SMALLEST_BIT, LARGEST_BIT), area, strict=True):
            table.publish({((data,), name): score})
    table.remarks += [
        says("figure_3"),
        "The figure has curves without numbers. Those of ViT are table 5's. BiT on JFT-300M: tables 6 and 2; on "
        "ImageNet-21k: README of google-research/big_transfer and BiT's table 1; on ImageNet, no number is published.",
    ]
    return table


def figure_5(models: Sequence[PreTrained]) -> Table:
    """Transfer against the compute of pre-training: table 6's numbers, as the figure shows them."""
    title = "Figure 5: transfer (top-1 in percent) against pre-training compute"
    table = Table("figure_5", title, ("model", "pre-trained on", "epochs"), "task", ["exaFLOPs", AVERAGE_5, IMAGENET])
    for row in tables.TABLE_6:
        name = (row.model, "JFT-300M", str(row.epochs))
        table.publish({(name, AVERAGE_5): statistics.fmean(row.scores[task] for task in AVERAGE_OF)})
        table.publish({(name, IMAGENET): row.scores[IMAGENET]})
        table.publish({(name, "exaFLOPs"): row.exaflops}, digits=0)
    for model in models:
        exaflops, own = model.lineage.exaflops, (model.model, model.data, epochs_of(model))
        ours = {AVERAGE_5: average_of_five(model), IMAGENET: result_on(model, IMAGENET)}
        if not exaflops or not any(ours.values()):
            continue
        taken = any(cell.ours for (other, _), cell in table.cells.items() if other == own)
        own = (*own[:2], f"{own[2]} ({model.lineage.name})") if taken else own
        table.add_ours(own, "exaFLOPs", cost_of(model, exaflops), digits=digits_of(exaflops))
        for column, score in ours.items():
            table.add_ours(own, column, score)
    table.remarks += [
        says("figure_5"),
        f"{AVERAGE_5} is the mean over {', '.join(AVERAGE_OF[:-1])} and {AVERAGE_OF[-1]}, as in table 7. It has "
        "points without numbers; these are table 6's.",
    ]
    return table


def figure_tables(models: Sequence[PreTrained]) -> list[Table]:
    """Figures 2, 3 and 5 as tables, with or without numbers of ours."""
    return [figure_2(models), figure_3(models), figure_5(models)]
