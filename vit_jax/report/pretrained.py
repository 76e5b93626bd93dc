"""Pre-trained models, and what was reached with them on the paper's tasks."""

import dataclasses
from collections.abc import Iterable, Sequence

from vit_jax.data.transfer_tasks import TASKS, hyper_rule_sizes
from vit_jax.data.vtab import GROUPS
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.experiment.fine_tuning import VIT_DROPOUT
from vit_jax.paper import tables
from vit_jax.report.lineage import Origin
from vit_jax.report.names import data_set_name, kind_of, vtab_task
from vit_jax.report.run_results import ACCURACY, REAL, Record
from vit_jax.report.seeds import Ours, Protocol, Result, better_rule, choose, combine, group, rule_of

IMAGENET = "ImageNet"
# Of tables 5 and 6, in their order.
TASK_NAMES = ("CIFAR-10", "CIFAR-100", IMAGENET, REAL, "Flowers-102", "Pets")
# "Average" of table 7 and "Average-5" of figure 5: table 7's 89.33 of R50x1 is the mean of its five in table 6.
AVERAGE_OF = (IMAGENET, "CIFAR-10", "CIFAR-100", "Pets", "Flowers-102")

_FINE_TUNING_SIZE = 384
# 384 is no multiple of 14; 378 and 392 are the nearest that are.
_SIZES_OF_14 = (378, 392)
_LARGE_BIT = "R152x4"  # which alone the BiT paper fine-tunes at 480 pixels
_ONLY_FOR_RESNETS = 0.06  # of table 4's learning rates: its footnote


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
        for task in _tasks_of(result):
            key = (record.before.key, record.model)
            model = models.setdefault(key, PreTrained(record.model, record.before, {}))
            model.tasks.setdefault(task, []).append(result)
    return list(models.values())


def _tasks_of(result: Result) -> list[str]:
    """What a fine-tuned model's numbers are of."""
    tasks, record = [], result.first
    if of_vtab := vtab_task(record.dataset):
        is_test = record.evaluated_on == (record.trained_on, "test") and result.having(ACCURACY)
        return [of_vtab] if is_test else []
    for task in TASKS.values():
        name = data_set_name(task.dataset)
        if record.trained_on != name:
            continue
        if result.having(ACCURACY) and record.evaluated_on == (name, task.splits["final"][1]):
            tasks.append(name)
        if name == IMAGENET and result.having(REAL):
            tasks.append(REAL)
    return tasks


def protocol_of(task: str, model: str, *, table_2: bool = False, origin: Origin | None = None) -> Protocol:
    """How the paper fine-tuned on a task.

    Args:
      task: as in `TASK_NAMES`, or the id of one of VTAB's.
      model: its name.
      table_2: whether as for table 2, where ImageNet is at a higher resolution and with Polyak averaging.
      origin: of the pre-trained weights, which say with what dropout they are fine-tuned; None: they are not known.
    """
    is_resnet = kind_of(model) == "BiT"
    # BiT's numbers in table 2 are at the resolutions of its own paper.
    sizes: tuple[int, ...] = () if is_resnet and table_2 else (_FINE_TUNING_SIZE,)
    if model.endswith("/14"):
        sizes += _SIZES_OF_14
    if task in VTAB_TASKS:
        row = tables.TABLE_4["VTAB"]
        return Protocol(sizes, row.steps, train_split="train800val200", learning_rates=row.learning_rates)
    name = IMAGENET if task == REAL else task
    (transfer,) = (each for each in TASKS.values() if data_set_name(each.dataset) == name)
    decay = None
    if table_2 and name == IMAGENET and not is_resnet:
        sizes, decay = ((518,) if model.endswith("/14") else (512,)), 0.9999
    has_resnet = kind_of(model) != "ViT"
    rates = tables.TABLE_4[name].learning_rates
    _, bit_size = hyper_rule_sizes(small_images=transfer.small_images, is_large=model == _LARGE_BIT)
    return Protocol(
        sizes,
        tables.TABLE_4[name].steps,
        decay,
        transfer.splits["final"][0],
        learning_rates=tuple(rate for rate in rates if has_resnet or rate != _ONLY_FOR_RESNETS),
        dropout=None if origin is None or is_resnet else _dropout_after(origin),
        bit_size=bit_size if has_resnet else None,
    )


def _dropout_after(origin: Origin) -> tuple[float, str] | None:
    """The dropout that weights are fine-tuned with, and who says so; None where nobody does.

    The README of the released code has 0.1 for the paper. For models pre-trained on JFT-300M, which saw none, nothing
    is said.
    """
    if origin.is_released and origin.name.startswith("augreg_"):
        return 0.0, "by AugReg"
    if origin.is_released and not origin.name.startswith("vit_"):
        return None
    return (VIT_DROPOUT, "in the paper") if origin.is_released or origin.dropout else None


def ours_on(model: PreTrained, task: str, *, table_2: bool = False) -> Ours | None:
    """What was reached on a task with a pre-trained model."""
    chosen = chosen_on(model, task, table_2=table_2)
    if chosen is None:
        return None
    result, notes = chosen
    ours = result.ours(measure_of(task))
    return None if ours is None else dataclasses.replace(ours, notes=(*ours.notes, *notes))


def chosen_on(model: PreTrained, task: str, *, table_2: bool = False) -> tuple[Result, list[str]] | None:
    """The setting that stands for a pre-trained model on a task, and notes on it; None where there is none.

    Of ResNets and hybrids the better of two rules of fine-tuning counts, and a note says which that is.
    """
    candidates: Sequence[Result] = model.tasks.get(task, ())
    if not candidates:
        return None
    protocol = protocol_of(task, model.model, table_2=table_2, origin=model.origin)
    told: list[str] = []
    if kind_of(model.model) != "ViT":
        candidates, told = better_rule(candidates, protocol)
    result, notes = choose(candidates, protocol)
    if kind_of(model.model) != "ViT" and result.first.steps is not None and (rule := rule_of(result.first)):
        told = [f"fine-tuned by {rule}", *told]
    return result, [*told, *notes]


def dropout_of(record: Record) -> float | None:
    """The dropout of a training; None for what was not trained here, or has none."""
    return record.training.get("model.dropout_rate") if record.steps is not None else None


def vtab_scores(model: PreTrained) -> dict[str, Ours]:
    """Means over the groups of VTAB whose tasks are all there, and over all 19 ("mean")."""
    members = {name: [task.id for task in VTAB_TASKS.values() if task.group == name] for name in GROUPS}
    members["mean"] = list(VTAB_TASKS)
    scores = {}
    for name, tasks in members.items():
        if all(task in model.tasks for task in tasks):
            chosen = {task: found for task in tasks if (found := chosen_on(model, task))}
            ours = combine([result for result, _ in chosen.values()], ACCURACY)
            if ours is not None:
                notes = dict.fromkeys(note for _, told in chosen.values() for note in told)
                scores[name] = dataclasses.replace(ours, notes=(*ours.notes, *notes))
    return scores


def average_of_five(model: PreTrained) -> Ours | None:
    """The mean over the tasks of `AVERAGE_OF`, if all are there."""
    if not all(task in model.tasks for task in AVERAGE_OF):
        return None
    chosen = [found[0] for task in AVERAGE_OF if (found := chosen_on(model, task))]
    return combine(chosen, ACCURACY)


def one_of_each(
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
