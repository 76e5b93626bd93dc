"""The result of a run, as JSON and as a table."""

import json
import math
from collections.abc import Mapping
from typing import Any

from vit_jax.console import format_seconds, format_table
from vit_jax.files import AnyPath, parse_path, write_atomically
from vit_jax.run.accounting import read_costs, total_cost
from vit_jax.run.facts import read_facts
from vit_jax.run.metrics import TIME_PREFIX, read_jsonl
from vit_jax.run.workdir import describe_changes, read_starts


def write_summary(
    workdir: AnyPath | str,
    head: Mapping[str, Any],
    *,
    eval_split: str | None,
    flops_per_image: float,
    paper_core_days: float | None,
    overlap: Mapping[str, int],
    seconds: float,
) -> dict[str, Any]:
    """Writes `summary.json` and `summary.md` of a finished run from the files in its workdir; returns the content.

    `head` has the first entries: the model, the data and the length of the run. FLOPs are of a training step per image,
    `overlap` is from `leakage.find_overlap`, and `seconds` is how long this start took.
    """
    workdir = parse_path(workdir)
    rows = read_jsonl(workdir / "metrics.jsonl")
    last = {name: value for row in rows for name, value in row.items()}
    summary = dict(head)
    # Without this, the config alone would hide that its length, batch size or learning rate changed between two starts.
    if changes := describe_changes(read_starts(workdir)):
        summary["changed_on_the_way"] = changes
    names = [f"{eval_split}/{name}" for name in ("accuracy", "loss", "examples")]
    summary |= {name: last[name] for name in names if name in last}
    facts = read_facts(workdir)
    since = facts.eval_since if facts else 0  # earlier evaluations used other examples
    evaluated = {row["step"]: row[names[0]] for row in rows if row["step"] >= since and names[0] in row}
    if finite := {step: accuracy for step, accuracy in evaluated.items() if math.isfinite(accuracy)}:
        best_step = max(finite, key=lambda step: (finite[step], -step))
        summary |= {f"{eval_split}/best_accuracy": finite[best_step], "best_step": best_step}
    summary |= {name: last[name] for name in ("train/loss", "train/accuracy") if name in last}
    for name in ("images_per_second", "mfu"):
        if values := sorted(row[TIME_PREFIX + name] for row in rows if TIME_PREFIX + name in row):
            summary[name] = values[len(values) // 2]
            if name == "images_per_second":
                summary["tflops_per_second"] = summary[name] * flops_per_image / 1e12
    if costs := read_costs(workdir):
        summary |= total_cost(costs)
        if paper_core_days is not None:
            summary["paper_tpuv3_core_days"] = paper_core_days
    summary |= {"overlap": dict(overlap), "seconds_of_this_start": seconds}
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(workdir / "summary.md", format_summary(summary) + "\n")
    return summary


def format_summary(summary: dict[str, Any]) -> str:
    """Formats the summary as a markdown table that also reads well in a terminal."""

    def show(name: str, value: Any) -> str:
        if name.endswith(("accuracy", "_share")) or name in ("goodput", "mfu"):
            return f"{100 * value:.2f} %"
        if name.startswith("seconds"):
            return format_seconds(value)
        if isinstance(value, list):
            return "; ".join(value)
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:,.5g}" if isinstance(value, float) else str(value)

    values = [(name, value) for name, value in summary.items() if name != "overlap"]
    values += [(f"{name}/examples trained on", count) for name, count in summary.get("overlap", {}).items()]
    return format_table(["", ""], [(name.replace("_", " "), show(name, value)) for name, value in values], num_left=1)
