"""VTAB-1k: 19 tasks with a thousand labelled examples each. `docs/vtab.md` describes them and how to run them.

A task's examples are a source like any other: `open_source("vtab:clevr_count", "train800")`.
"""

from vit_jax.data.vtab.source import open_vtab
from vit_jax.data.vtab.tasks import GROUPS, TASKS, DataSet, Task, get_task, group_means

__all__ = ["GROUPS", "TASKS", "DataSet", "Task", "get_task", "group_means", "open_vtab"]
