"""VTAB-1k: 19 tasks of a thousand labelled examples each. `docs/vtab.md` tells what they are and how to run them.

A task's examples are a source like any other: `open_source("vtab:clevr_count", "train800")`.
"""

from vit_jax.data.vtab.scores import group_means
from vit_jax.data.vtab.source import open_vtab
from vit_jax.data.vtab.tasks import GROUPS, TASKS, DataSet, Task, get_task

__all__ = ["GROUPS", "TASKS", "DataSet", "Task", "get_task", "group_means", "open_vtab"]
