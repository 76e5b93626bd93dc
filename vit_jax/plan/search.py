"""Searches over plans with few compilations.

The compiler knows the memory of a program after a fifth of its work (`memory_only`). Memory grows almost linearly with
the batch, so two sizes predict the limit. Near the limit, the prediction fails: XLA rematerialises by itself until the
program fits, and if it cannot, reports the memory without that. So the prediction is only the first guess; bisection
does the rest.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from ml_collections import ConfigDict

from vit_jax.plan.plan_row import PlanRow
from vit_jax.plan.topologies import Topology, find_topology, slices

LARGEST_BATCH = 2**17  # images per device
RESOLUTION = 32  # the largest batch is found to within 1/32, or one image
MOST_ACCUMULATION = 32


Planner: TypeAlias = Callable[[ConfigDict, Topology], PlanRow]  # `plan_row` with all other arguments bound


def with_fields(config: ConfigDict, **fields: Any) -> ConfigDict:
    """Copies a config with other values; "model__remat" means `config.model.remat`."""
    copy = ConfigDict(config.to_dict(preserve_field_references=False), type_safe=False)
    for name, value in fields.items():
        *path, last = name.split("__")
        part = copy
        for each in path:
            part = part[each]
        part[last] = value
    return copy


def largest_batch(
    plan: Planner,
    config: ConfigDict,
    topology: Topology,
    *,
    num_devices: int | None = None,
    first_guess: int = 4096,
    near: bool = False,
) -> PlanRow:
    """Finds the row with the largest batch that fits.

    Args:
      plan: makes a row, with the same `num_devices`.
      config: its batch size is ignored.
      topology: the slice.
      num_devices: number of its devices to use; None: all.
      first_guess: images per device to try first; better too many than too few.
      near: whether the guess is close, as from a search for another image size: searches around it in growing steps,
        instead of downwards from it.

    Returns:
      the row of the largest batch that fits, to within one image or 1 / `RESOLUTION`; of the smallest batch if none
      fits; the first row that failed for another reason than memory. Without the run's length and costs.
    """
    unit = (topology.num_devices if num_devices is None else num_devices) * config.accumulation_steps
    # Evaluation and the run's length do not affect the memory of a step, but may be invalid with another batch.
    length = {"epochs": None, "images": None, "steps": config.optimizer.warmup_steps + 1000}
    costs: Any = dict.fromkeys(("num_steps", "days", "core_days", "tpuv3_core_days", "paper_core_days", "price"))
    step = max(1, first_guess // (RESOLUTION + 1))
    fitting: dict[int, PlanRow] = {}
    too_large: dict[int, PlanRow] = {}
    size = min(first_guess, LARGEST_BATCH)
    while True:
        row = plan(with_fields(config, batch_size=size * unit, eval_batch_size=None, **length), topology)
        row = dataclasses.replace(row, **costs)
        if row.fits:
            fitting[size] = row
        elif row.status.startswith("does not fit") or (row.status == "refused" and "batch_size" in (row.message or "")):
            too_large[size] = row  # the config allows no larger batch
        else:
            return row
        low, high = max(fitting, default=0), min(too_large, default=None)
        if high is None:
            if low >= LARGEST_BATCH:
                return fitting[low]
            size = min(low + (step if near else low), LARGEST_BATCH)
            step *= 2
        elif high - low <= max(1, low // RESOLUTION):
            return fitting[low] if fitting else too_large[high]
        elif near:
            size = (low + high) // 2 if fitting else max(1, high - step)
            step *= 2
        else:
            size = _next_size(fitting, too_large)


def _next_size(fitting: dict[int, PlanRow], too_large: dict[int, PlanRow]) -> int:
    """The next size to try, between the largest that fits and the smallest that does not."""
    low, high = max(fitting, default=0), min(too_large)
    if len(too_large) == 1 and not fitting:
        return max(1, high // 2)
    sizes = sorted(too_large)[:2]
    needed = [(size, memory) for size in sizes if (memory := too_large[size].memory)]
    if len(needed) == 2 and needed[0][1].total < needed[1][1].total:
        # The straight line through two sizes predicts what fits without XLA's rematerialisation: try that first.
        (x1, first), (x2, second) = needed
        guess = math.floor(x1 + (first.usable - first.total) * (x2 - x1) / (second.total - first.total))
        if low == 0 and guess < high:
            return max(1, guess)
        if low == guess and high - low > 2:
            return low + max(1, low // RESOLUTION)  # usually the last size
    middle = max(1, (low + high) // 2)
    return min(middle, low + math.ceil(low / 4)) if low else middle  # rematerialisation does not gain much


def smallest_slice(plan: Planner, config: ConfigDict, generation: str) -> Iterator[PlanRow]:
    """Plans the slices of a generation ("v3", "h100" or a slice of it), smallest first, up to the first that fits.

    Slices whose devices do not divide the batch are rows as well ("refused").
    """
    for topology in slices(generation):
        row = plan(config, topology)
        yield row
        if row.fits:
            return


# Work of a step relative to "none": "full" computes the forward pass twice, a third more; "dots" keeps the results of
# matrix products and repeats the operations between them, which are limited by memory: 1.1 is a guess that only decides
# the order.
_REMAT_WORK = {"none": 1.0, "dots": 1.1, "full": 4 / 3}


def options(
    config: ConfigDict, topology: Topology, row: PlanRow, *, shardings: Sequence[str], policies: Sequence[str]
) -> list[dict[str, Any]]:
    """Ways to save memory, as arguments of `with_fields`; the fastest first, estimated without compiling.

    Counts the arithmetic at the peak rate times the work of the policy, the memory traffic of summing gradients (each
    part reads the sum and its own gradients, and writes the sum) and of the update, and the interconnect. `row` is of
    the config on the slice; it has FLOPs and parameters, but need not fit.
    """
    if row.flops is None or row.num_trained is None:
        return []
    chip, share = topology.chip, topology.share_of_chip
    gradients = 4 * row.num_trained
    interconnect = topology.interconnect_bandwidth or math.inf
    found = []
    steps = config.accumulation_steps
    while steps <= MOST_ACCUMULATION and config.batch_size % (row.num_devices * steps) == 0:
        for sharding, remat in itertools.product(shardings, policies):
            parts = 1 if sharding == "replicated" else row.num_devices
            compute = row.flops / row.num_devices / (chip.bf16_flops * share) * _REMAT_WORK[remat]
            adding = 0 if steps == 1 else 3 * steps * gradients / parts / (chip.hbm_bandwidth * share)
            updating = 7 * gradients / parts / (chip.hbm_bandwidth * share)  # Adam reads 4 arrays and writes 3
            passes = 1 if sharding == "replicated" else 0.5 + steps  # bfloat16: all-reduce; or scatter and gathers
            sending = passes * gradients / interconnect
            fields = {"sharding": sharding, "model__remat": remat, "accumulation_steps": steps}
            found.append((compute + adding + updating + sending, fields))
        steps *= 2
    return [fields for _, fields in sorted(found, key=lambda each: each[0])]


def policies_of(model: str) -> tuple[str, ...]:
    """Rematerialisation policies of a model."""
    return ("none", "full") if model.startswith("R") and "ViT" not in model else tuple(_REMAT_WORK)


def can_scan(model: str) -> bool:
    """Whether a model has layers to scan: ViTs and hybrids."""
    return "+" in model or model.startswith("ViT-")


def cheapest_remat(
    plan: Planner,
    config: ConfigDict,
    topology: Topology,
    row: PlanRow | None = None,
    *,
    shardings: Sequence[str] | None = None,
) -> Iterator[PlanRow]:
    """Plans rematerialisation policies and parts of the batch, the fastest first, up to the first that fits.

    The config's `model.remat` changes, and its `accumulation_steps` grow. `row` is the unchanged config's row, if
    known, which saves a compilation. `shardings` are the choices; None: only the config's.
    """
    if row is None:
        row = plan(with_fields(config, model__remat="none"), topology)
        yield row
        if row.fits:
            return
        config = with_fields(config, model__remat="none")
    too_large = [row]
    for fields in options(
        config, topology, row, shardings=shardings or (row.sharding,), policies=policies_of(row.model)
    ):
        if any(_is_hopeless(**fields, known=known) for known in too_large):
            continue
        tried = plan(with_fields(config, **fields), topology)
        yield tried
        if tried.fits:
            return
        too_large.append(tried)


def _is_hopeless(sharding: str, model__remat: str, accumulation_steps: int, known: PlanRow) -> bool:
    """Whether an option cannot fit, because it differs from a row that does not fit only in the parts of the batch.

    With n times as many parts, it still needs at least 1 / n of the memory.
    """
    if (sharding, model__remat) != (known.sharding, known.remat):
        return False
    times = accumulation_steps / known.accumulation_steps
    return times <= 1 or (known.memory is not None and known.memory.total / times > known.memory.usable)


UNROLL = "--config.model.scan_layers=False"
_UNROLL_COSTS = "each layer is then compiled separately, which takes longer; the step computes the same"
_SCAN_COSTS = (
    "--config.model.scan_layers=True compiles one layer instead of all, but the loop keeps stacks of all layers: the "
    "step needs more memory and time"
)


def advise(plan: Planner, config: ConfigDict, topology: Topology, row: PlanRow) -> PlanRow:
    """Adds advice to the row of a config: a change that was tried and fits, or the cost of scanned layers."""
    if row.status == "timed out":
        advice = "raise --timeout_minutes"
        if not row.scan_layers and can_scan(row.model):
            advice += f", or: {_SCAN_COSTS}"
        return dataclasses.replace(row, advice=advice)
    if row.fits and row.scan_layers:
        return dataclasses.replace(row, advice=f"scan_layers costs memory and time a step: {UNROLL} saves them")
    if not row.status.startswith("does not fit"):
        return row
    known, unroll = row, ""
    if row.scan_layers:
        unrolled_config = with_fields(config, model__scan_layers=False)
        unrolled = plan(unrolled_config, topology)
        if unrolled.fits:
            return dataclasses.replace(row, advice=f"{UNROLL} fits: {_UNROLL_COSTS}")
        if unrolled.status.startswith("does not fit"):
            known, config, unroll = unrolled, unrolled_config, f"{UNROLL} "
    shardings = [row.sharding, *([] if row.num_devices == 1 or row.sharding != "replicated" else ["fsdp"])]
    for tried in cheapest_remat(plan, config, topology, known, shardings=shardings):
        if tried.fits:
            changes = {
                "sharding": (config.sharding, tried.sharding),
                "model.remat": (config.model.remat or "none", tried.remat),
                "accumulation_steps": (config.accumulation_steps, tried.accumulation_steps),
            }
            flags = [f"--config.{name}={after}" for name, (before, after) in changes.items() if after != before]
            return dataclasses.replace(row, advice=f"{unroll}{' '.join(flags)} fits")
    tried_fields = "scan_layers, sharding" if unroll else "sharding"
    advice = f"no {tried_fields}, remat policy or accumulation fits: use a smaller batch or a larger slice"
    return dataclasses.replace(row, advice=advice)


def rows_for(
    plan: Callable[..., PlanRow],
    config: ConfigDict,
    name: str,
    *,
    search: str = "none",
    num_devices: int | None = None,
    advice: bool = True,
) -> Iterator[PlanRow]:
    """Makes the rows that the command prints for one topology or, with `search`, for a search on it.

    A search compiles only until memory is known; its result is then planned completely, with the run's own length.
    `plan` makes a row, with the same `num_devices`; it takes `memory_only` as `plan_row` does. With `advice`, and
    without a search, a row that does not fit gets a change that makes it fit.
    """
    probe = functools.partial(plan, memory_only=True)
    found: Iterable[PlanRow]
    if search == "none":
        topology = find_topology(name)
        row = plan(config, topology)
        yield advise(probe, config, topology, row) if advice and topology.compiler_name else row
        return
    if search == "slice":
        found = smallest_slice(probe, config, name)
    elif search == "remat":
        found = cheapest_remat(probe, config, find_topology(name))
    else:
        found = [largest_batch(probe, config, find_topology(name), num_devices=num_devices)]
    for row in found:
        if not row.fits:
            yield row
            continue
        fields = {"batch_size": row.batch_size, "model__remat": row.remat, "accumulation_steps": row.accumulation_steps}
        if row.batch_size != config.batch_size:
            fields["eval_batch_size"] = None
        confirmed = plan(with_fields(config, **fields), find_topology(row.topology))
        if confirmed.status == "refused":  # the run may be too short for a larger batch, which still fits
            confirmed = dataclasses.replace(row, message=confirmed.message)
        yield confirmed
