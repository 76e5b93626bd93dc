"""A plan before the hardware is booked: memory, time, core-days and money of a run, for slices that nobody has to own.

`plan_row(config, find_topology("v3-512"))` compiles the very step that trains, from shapes only, in a process of its
own, and returns a `PlanRow`. `largest_batch`, `smallest_slice` and `cheapest_remat` search. The command is
`python -m vit_jax.plan`; docs/plan.md says how to read it.
"""

from vit_jax.plan.plan_row import Memory, PlanRow, plan_row
from vit_jax.plan.search import cheapest_remat, largest_batch, smallest_slice
from vit_jax.plan.topologies import Topology, find_topology, list_topologies, slices

__all__ = [
    "Memory",
    "PlanRow",
    "Topology",
    "cheapest_remat",
    "find_topology",
    "largest_batch",
    "list_topologies",
    "plan_row",
    "slices",
    "smallest_slice",
]
