"""Plans a run without its hardware: memory, time, core-days and price on a slice of accelerators.

`plan_row(config, find_topology("v3-512"))` compiles the training step from shapes, in its own process, and returns a
`PlanRow`. `largest_batch`, `smallest_slice` and `cheapest_remat` search. The command is `python -m vit_jax.plan`;
docs/plan.md explains its output.
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
