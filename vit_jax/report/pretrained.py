"""Pre-trained models, and their results on the paper's tasks."""

import dataclasses
from collections.abc import Iterable, Sequence

from vit_jax.data.vtab import GROUPS
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.report.lineage import Lineage
from vit_jax.report.measured import ACCURACY, REAL, MeasuredModel
from vit_jax.report.names import TEST_SPLITS, data_set_name, kind_of, vtab_task
from vit_jax.report.recipes import IMAGENET, better_rule, choose, recipe_of, rule_of
from vit_jax.report.seeds import SeedGroup, SeedMean, combine, group

# Of tables 5 and 6, in their order.
TASK_NAMES = ("CIFAR-10", "CIFAR-100", IMAGENET, REAL, "Flowers-102", "Pets")
# "Average" of table 7 and "Average-5" of figure 5: table 7's 89.33 of R50x1 is the mean of its five in table 6.
AVERAGE_OF = (IMAGENET, "CIFAR-10", "CIFAR-100", "Pets", "Flowers-102")

_PAPERS_OWN = ("vit_", "bit_")  # prefixes of the released checkpoints of the two papers


@dataclasses.dataclass(frozen=True)
class PreTrained:
    """A pre-trained model, its lineage, and its settings by task: the paper's tasks, and VTAB's by their ids."""

    model: str
    lineage: Lineage
    tasks: dict[str, list[SeedGroup]]

    @property
    def data(self) -> str:
        """The data it was pre-trained on."""
        return self.lineage.data


def pre_trained_models(models: Iterable[MeasuredModel]) -> list[PreTrained]:
    """Groups fine-tuned models by their pre-trained model, for the paper's tasks and VTAB's.

    Leaves out models that only choose, were trained from scratch or in part, or were not measured on the test set.
    """
    found: dict[tuple[str, str], PreTrained] = {}
    for each in group(model for model in models if model.is_result):
        first = each.first
        if first.before is None or not first.trained_on or first.training.get("train_only"):
            continue
        for task in _tasks_of(each):
            pre_trained = PreTrained(first.model, first.before, {})
            pre_trained = found.setdefault((first.before.key, first.model), pre_trained)
            pre_trained.tasks.setdefault(task, []).append(each)
    return list(found.values())


def _tasks_of(fine_tuned: SeedGroup) -> list[str]:
    """The tasks on whose test sets a model was measured."""
    first = fine_tuned.first
    is_own = bool(fine_tuned.having(ACCURACY)) and data_set_name(first.dataset) == first.trained_on
    if of_vtab := vtab_task(first.dataset):
        return [of_vtab] if is_own and first.eval_split == "test" else []
    tasks = [first.trained_on] if is_own and first.eval_split == TEST_SPLITS.get(first.trained_on, ...) else []
    return [*tasks, REAL] if first.trained_on == IMAGENET and fine_tuned.having(REAL) else tasks


def result_on(model: PreTrained, task: str, *, table_2: bool = False) -> SeedMean | None:
    """The result of a pre-trained model on a task."""
    found = _chosen_on(model, task, table_2=table_2)
    mean = found and found[0].mean(REAL if task == REAL else ACCURACY)
    return mean.noted(*found[1]) if mean and found else None


def _chosen_on(model: PreTrained, task: str, *, table_2: bool = False) -> tuple[SeedGroup, list[str]] | None:
    """Chooses the setting to show for a pre-trained model on a task; also returns notes.

    For ResNets and hybrids, uses the better of the two fine-tuning rules, and notes which one.
    """
    candidates: Sequence[SeedGroup] = model.tasks.get(task, ())
    if not candidates:
        return None
    recipe = recipe_of(task, model.model, table_2=table_2, lineage=model.lineage)
    if kind_of(model.model) in ("ViT", "axial"):
        return choose(candidates, recipe)
    candidates, on_rules = better_rule(candidates, recipe)
    chosen, notes = choose(candidates, recipe)
    rule = rule_of(chosen.first)
    return chosen, [*([f"fine-tuned by {rule}"] if rule else []), *on_rules, *notes]


def dropout_of(model: MeasuredModel) -> float | None:
    """The dropout rate of a training; None if the model was not trained here, or has no dropout."""
    return model.training.get("model.dropout_rate") if model.steps is not None else None


def _chosen_on_all(model: PreTrained, tasks: Sequence[str]) -> list[tuple[SeedGroup, list[str]]]:
    """The settings to show for a pre-trained model on each task, with notes; [] unless all tasks have one."""
    found = [chosen for task in tasks if (chosen := _chosen_on(model, task))]
    return found if len(found) == len(tasks) else []


def vtab_scores(model: PreTrained) -> dict[str, SeedMean]:
    """Means over VTAB's complete groups, and over all 19 tasks ("mean")."""
    members = {name: [task.id for task in VTAB_TASKS.values() if task.group == name] for name in GROUPS}
    scores = {}
    for name, tasks in (members | {"mean": list(VTAB_TASKS)}).items():
        found = _chosen_on_all(model, tasks)
        if mean := combine([chosen for chosen, _ in found], ACCURACY):
            scores[name] = mean.noted(*dict.fromkeys(note for _, notes in found for note in notes))
    return scores


def average_of_five(model: PreTrained) -> SeedMean | None:
    """The mean over the tasks of `AVERAGE_OF`, if all have results."""
    return combine([chosen for chosen, _ in _chosen_on_all(model, AVERAGE_OF)], ACCURACY)


def one_of_each(
    models: Sequence[PreTrained], tasks: Sequence[str]
) -> tuple[dict[tuple[str, str], PreTrained], list[str]]:
    """Chooses one pre-trained model for each model name and pre-training data; remarks on the others.

    Ignores their results: takes the one with most tasks, then one of the paper's own checkpoints or one that was
    pre-trained here, then the first by name.
    """

    def rank(model: PreTrained) -> tuple[int, bool, str]:
        is_foreign = model.lineage.is_released and not model.lineage.name.startswith(_PAPERS_OWN)
        return (-sum(task in model.tasks for task in tasks), is_foreign, model.lineage.name)

    chosen: dict[tuple[str, str], PreTrained] = {}
    sources: dict[tuple[str, str], list[str]] = {}
    for model in sorted(models, key=rank):
        if any(task in model.tasks for task in tasks):
            key = (model.model, model.data)
            chosen.setdefault(key, model)
            sources.setdefault(key, []).append(model.lineage.name)
    remarks = []
    for key, (first, *others) in sources.items():
        remarks.append(f"{', '.join(key)}: from {first}{'; not from ' if others else ''}{', '.join(others)}.")
    return chosen, remarks
