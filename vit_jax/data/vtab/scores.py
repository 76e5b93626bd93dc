"""VTAB's score: the mean over its tasks."""

from collections.abc import Mapping

from vit_jax.data.vtab.tasks import GROUPS, TASKS, get_task


def group_means(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Means over groups of tasks, and over all 19, each task counting the same (table 9, figure 2).

    Args:
      accuracies: of each task, by its id; of which unit does not matter.

    Returns:
      A value for each of "natural", "specialized" and "structured" whose tasks are all there, and "mean" if all 19 are.
      A mean over fewer tasks is no VTAB score.

    Raises:
      UserError: there is no such task.
    """
    for name in accuracies:
        get_task(name)
    members = {group: [task.id for task in TASKS.values() if task.group == group] for group in GROUPS}
    members["mean"] = list(TASKS)
    return {
        group: sum(accuracies[task] for task in tasks) / len(tasks)
        for group, tasks in members.items()
        if all(task in accuracies for task in tasks)
    }
