r"""The costs of the paper's runs, for docs/paper.md: TPUv3-core-days, and hours on a v5e-256, by the planner.

    python benchmarks/paper_costs.py --docs=docs                 # minutes on two CPU cores; the same command resumes
    python benchmarks/paper_costs.py --docs=docs --report        # writes the tables of paper.md, computes nothing
    python benchmarks/paper_costs.py --docs=docs --compile configs/vit_i21k.py:model=ViT-B/16,epochs=90

Plans by formula need no compiler: a step's FLOPs at 40 % of the peak, and the sum of its gradients over the slice. They
do not tell whether a run fits. Compiled plans are better: those of paper_plans.json (`paper_plans.py`) replace the
formula where they are by the compiler's cycles, and --compile makes more of them (pip install --editable '.[plan]';
minutes each). Input, evaluation and checkpoints are not counted. The cost of a study is that of all its pre-training
runs, without fine-tuning.
"""

import argparse
import collections
import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

# So that it runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from ml_collections import ConfigDict

from benchmarks.common import insert_tables, progress, write_json
from vit_jax.console import format_table
from vit_jax.errors import UserError, unknown_name
from vit_jax.paper import tables
from vit_jax.plan import PlanRow, find_topology, plan_row
from vit_jax.plan.compiling import check_compiler, end_on_signals, request_of
from vit_jax.plan.plan_row import row_of
from vit_jax.plan.worker import estimate_by_formula
from vit_jax.sweep import Sweep
from vit_jax.sweep.trials import SweepTask, call, load_config, load_module

COSTS_JSON, PLANS_JSON = "paper_costs.json", "paper_plans.json"
CORES, HOURS = "v3-512", "v5e-256"  # the slices of the two columns
FEW_CORES = "v3-32"  # instead of the first, for batches of 512
Cost = dict[str, Any]


def jft_run(model: str, epochs: int) -> str:
    """The config of a row of table 6."""
    family = "vit" if model.startswith("ViT") else "hybrid" if "+" in model else "bit"
    return f"configs/{family}_jft.py:model={model},epochs={epochs}"


# The runs of each table of docs/paper.md, by the table's name.
RUNS = {
    "table 2": (
        "configs/vit_jft.py:model=ViT-H/14,epochs=14",
        "configs/vit_jft.py:model=ViT-L/16,epochs=14",
        "configs/vit_l16_i21k.py",
        "configs/bit_jft.py:model=R152x4",
    ),
    "table 4": (
        "configs/transfer.py:weights=none,model=ViT-H/14,dataset=imagenet2012,resolution=518",
        "configs/transfer.py:weights=none,model=ViT-L/16,dataset=imagenet2012,resolution=512",
        "configs/transfer.py:weights=none,model=ViT-L/16,dataset=imagenet2012,resolution=384",
        "configs/transfer.py:weights=none,model=ViT-L/16,dataset=cifar10",
        "configs/transfer.py:weights=none,model=ViT-L/16,dataset=pets",
        "configs/vtab.py:weights=none,model=ViT-L/16,task=pets",
    ),
    "masked patches": ("configs/masked_patches.py:model=ViT-B/16",),
    "table 5": (
        *(f"configs/vit_i21k.py:model={model},epochs=90" for model in tables.TABLE_5_MODELS),
        *(f"configs/vit_i21k.py:model={model},epochs=30" for model in ("ViT-L/16", "ViT-L/32")),
        *(f"configs/vit_i1k.py:model={model},epochs=300" for model in tables.TABLE_5_MODELS[:4]),
    ),
    "table 6": tuple(jft_run(row.model, row.epochs) for row in tables.TABLE_6),
}
# Studies, of which only the pre-training counts.
_STUDIES = {
    "appendix B.1.2": "masked_patches",
    "table 7": "table7_optimizers",
    "table 8": "table8_position_embeddings",
    "figure 3": "figure3_data_sets",
    "figure 4": "figure4_data_size",
    "figure 5": "figure5_compute",
    "figure 8": "figure8_shape",
    "figure 9": "figure9_pooling",
    "figure 10": "figure10_embeddings",
    "figure 13": "figure13_axial",
}
SWEEPS = {name: (f"configs/studies/{page}.py:scale=paper",) for name, page in _STUDIES.items()}


def configs_of(place: str) -> list[ConfigDict]:
    """The configs of the single run of `RUNS`, or of all runs of a study that begin without weights."""
    if not any(place in places for places in SWEEPS.values()):
        return [load_config(place, [])]
    described = call(load_module(place), "get_sweep", place)
    configs = []
    for sweep in [described] if isinstance(described, Sweep) else described:
        for name, argument in sweep.tasks.items():
            if name in sweep.weights:
                continue
            own = f"{place.partition(':')[0]}:{argument}"
            task = SweepTask(name, own, sweep, (), load_config(own, []), pathlib.Path("unused"))
            if task.base.weights is not None:
                continue
            tried = sweep.combinations()  # fields that cost nothing
            configs += [task.base] * (len(tried) if len(tried) > 1 else 0)
            configs += [task.final_run({}, seed=0).config] * sweep.seeds
    return configs


def num_images(config: ConfigDict) -> float:
    """The images of a run, with repetitions, by its length in the config."""
    if config.steps:
        return config.steps * config.batch_size
    return config.images or config.epochs * config.data.expected_train_images


def plan_by_formula(config: ConfigDict, slice_name: str) -> PlanRow:
    """Plans a run without a compiler, in this process."""
    topology = dataclasses.replace(find_topology(slice_name), compiler_name=None)
    devices = topology.num_devices
    answer = estimate_by_formula(request_of(config, topology, num_devices=devices, task="train"))
    return row_of(config, topology, answer, num_devices=devices)


def slices_of(config: ConfigDict) -> tuple[str, str]:
    """The slices to plan a run for."""
    return CORES if config.batch_size >= 1024 else FEW_CORES, HOURS


def _what_costs(config: ConfigDict) -> str:
    """The fields that a cost depends on: runs that differ in others cost the same."""
    fields = json.loads(config.to_json())
    model = {name: value for name, value in fields["model"].items() if name not in ("dropout_rate", "head_bias")}
    others = {name: fields.get(name) for name in ("batch_size", "accumulation_steps", "objective", "sharding")}
    return json.dumps([model, num_images(config), config.data.image_size, others], sort_keys=True)


def cost_by_formula(place: str, known: dict[tuple[str, str], PlanRow]) -> Cost:
    """The cost of a run, or of all runs of a study; `known` has plans of before, and gets the new ones."""
    configs = configs_of(place)
    counts = collections.Counter(map(_what_costs, configs))
    kinds = {_what_costs(config): config for config in configs}
    total: Cost = {"config": place, "runs": len(configs), "images": 0, "flops": 0.0, "plans": []}
    for number in range(2):
        plan: dict[str, Any] = {"core_days": 0.0, "hours": 0.0}
        for kind, config in kinds.items():
            key = kind, slices_of(config)[number]
            row = known[key] = known.get(key) or plan_by_formula(config, key[1])
            times = counts[kind]
            if row.days is None:
                raise UserError(f"{row.model} on {row.topology} has no estimate: {row.message or row.no_estimate}")
            plan |= {"slice": row.topology, "estimate": row.estimate}
            plan["core_days"] += times * row.core_days
            plan["hours"] += times * 24 * row.days
            if number == 0:
                total["images"] += times * row.num_steps * row.batch_size
                total["flops"] += times * row.num_steps * row.flops
        total["plans"].append(plan)
    return total


def use_compiled(cost: Cost, rows: Sequence[dict[str, Any]]) -> Cost:
    """Replaces plans by formula with compiled plans of the same run and slice; lower bounds are kept beside them.

    Args:
      cost: of a single run.
      rows: as of `PlanRow.to_json`, with the run as "config".
    """
    plans = [dict(plan) for plan in cost["plans"]]
    for plan in plans:
        for row in rows:
            if (row["topology"], row["status"]) != (plan["slice"], "fits"):
                continue
            numbers = {"core_days": row["core_days"], "hours": 24 * row["days"]}
            if row["estimate"] in ("cycles", "roofline"):
                plan.update({"estimate": row["estimate"], **numbers})
            else:
                plan["at_least"] = numbers
    return {**cost, "plans": plans}


def is_plan_of(row: dict[str, Any], cost: Cost, model: str) -> bool:
    """Whether a row of paper_plans.json is a plan of the run."""
    same = row["model"] == model and row["num_steps"] * row["batch_size"] == cost["images"]
    return cost["runs"] == 1 and same and abs(row["num_steps"] * row["flops"] / cost["flops"] - 1) < 1e-3


def read_costs(docs: pathlib.Path) -> dict[str, Cost]:
    """Costs so far, by config."""
    path = docs / COSTS_JSON
    return {cost["config"]: cost for cost in json.loads(path.read_text())} if path.exists() else {}


def text_of(plan: dict[str, Any], column: str) -> str:
    """A cell: the number, with a star if it is by formula, and the compiler's lower bound if there is one."""
    star = "\\*" if plan["estimate"] == "formula" else ""
    text = f"{_digits(plan[column])}{star}"
    return f"{text} (≥ {_digits(plan['at_least'][column])})" if "at_least" in plan else text


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.2g}" if value < 9.95 else f"{value:.0f}"


def table(costs: dict[str, Cost], name: str) -> str:
    """A Markdown table of the costs of `RUNS` or `SWEEPS`."""
    is_sweep = name in SWEEPS
    headings = ["config", *(["runs"] if is_sweep else []), "exaFLOPs", "TPUv3-core-days", "hours on v5e-256"]
    rows = []
    for place in (SWEEPS if is_sweep else RUNS)[name]:
        cost = costs[place]
        cores, hours = cost["plans"]
        cells = [f"`{place.removeprefix('configs/')}`", *([f"{cost['runs']:,}"] if is_sweep else [])]
        cells += [_digits(cost["flops"] / 1e18), text_of(cores, "core_days"), text_of(hours, "hours")]
        rows.append(cells)
    return format_table(headings, rows, num_left=1)


def write_page(docs: pathlib.Path) -> None:
    """Updates the costs in paper.md."""
    costs = read_costs(docs)
    insert_tables(docs / "paper.md", {f"costs of {name}": table(costs, name) for name in (*RUNS, *SWEEPS)})


def all_places() -> list[str]:
    """All runs and sweeps, each once."""
    return list(dict.fromkeys(place for group in (RUNS, SWEEPS) for places in group.values() for place in places))


def update(docs: pathlib.Path, compile_places: Sequence[str], timeout_minutes: float) -> None:
    """Computes missing costs, and compiled plans of some."""
    costs = read_costs(docs)
    stored = json.loads((docs / PLANS_JSON).read_text())
    known: dict[tuple[str, str], PlanRow] = {}
    for place in compile_places:
        if place not in {each for places in RUNS.values() for each in places}:
            raise unknown_name("run of docs/paper.md", place, all_places())
        check_compiler()
    for place in all_places():
        if place not in costs or place in compile_places:
            progress(place)
        if place not in costs:
            cost = cost_by_formula(place, known)
            model = configs_of(place)[0].model.name
            costs[place] = use_compiled(cost, [row for row in stored if is_plan_of(row, cost, model)])
        if place in compile_places:
            config = load_config(place, [])
            slices = map(find_topology, slices_of(config))
            rows = [plan_row(config, topology, timeout_minutes=timeout_minutes).to_json() for topology in slices]
            costs[place] = use_compiled(costs[place], rows)
        write_json(docs / COSTS_JSON, [costs[each] for each in all_places() if each in costs])


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--docs", type=pathlib.Path, default=pathlib.Path("docs"), help="folder of the page and results"
    )
    parser.add_argument("--report", action="store_true", help="only write the tables of paper.md")
    parser.add_argument("--compile", nargs="+", default=[], metavar="CONFIG", help="runs whose plans are compiled")
    parser.add_argument("--timeout_minutes", type=float, default=30.0, help="for one compilation")
    arguments = parser.parse_args(argv)
    end_on_signals()
    logging.disable(logging.WARNING)  # a plan may lack its data set
    # Devices to build meshes from; nothing runs on them.
    os.environ["JAX_NUM_CPU_DEVICES"] = "512"
    try:
        if not arguments.docs.is_dir():
            raise UserError(f"--docs={arguments.docs}: there is no such folder.")
        if not arguments.report:
            update(arguments.docs, arguments.compile, arguments.timeout_minutes)
        write_page(arguments.docs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
