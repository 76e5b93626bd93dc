"""The result of a run as a table."""

import json
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vit_jax.console import format_seconds
from vit_jax.experiment.build import Experiment
from vit_jax.experiment.dry_run import count_parameters
from vit_jax.run import workdir as workdirs
from vit_jax.run.accounting import describe_cost, paper_core_days, read_starts, total_cost
from vit_jax.run.facts import read_facts
from vit_jax.run.journal import TIME_PREFIX, read_jsonl
from vit_jax.run.workdir import AnyPath, parse, write_atomically


def summarize(
    config: ConfigDict,
    workdir: AnyPath | str,
    experiment: Experiment,
    *,
    step: int,
    images: int,
    seconds: float,
    overlap: Mapping[str, int],
) -> dict[str, Any]:
    """Collects a finished run's result from its state and its metrics.

    The config alone does not tell how a run came about whose length, batch size or learning rate was changed between
    two starts.

    Args:
      config: the run's config.
      workdir: the run's folder.
      experiment: the run's parts.
      step: how many steps the parameters have made.
      images: how many images they have seen, each epoch counted anew.
      seconds: how long this start took.
      overlap: by evaluation, how many of its examples were trained on; see `leakage.find_overlap`.
    """
    workdir = parse(workdir)
    rows = read_jsonl(workdir / "metrics.jsonl")
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    summary: dict[str, Any] = {
        "model": experiment.model_name,
        "parameters": count_parameters(experiment.abstract_state.params),
        "dataset": config.data.dataset,
        "steps": step,
        "epochs": images / experiment.num_train_images,
    }
    if changes := workdirs.describe_changes(workdirs.read_starts(workdir)):
        summary["changed_on_the_way"] = changes
    split = config.data.eval_split
    for name in ("accuracy", "loss", "examples"):
        if f"{split}/{name}" in last:
            summary[f"{split}/{name}"] = last[f"{split}/{name}"]
    facts = read_facts(workdir)
    since = facts.eval_since if facts else 0  # before, the examples were others
    evaluations = [
        row for row in rows if row["step"] >= since and math.isfinite(row.get(f"{split}/accuracy", math.nan))
    ]
    if evaluations:
        best = max(evaluations, key=lambda row: row[f"{split}/accuracy"])
        summary |= {f"{split}/best_accuracy": best[f"{split}/accuracy"], "best_step": best["step"]}
    summary |= {name: last[name] for name in ("train/loss", "train/accuracy") if name in last}
    rates = sorted(row[name] for row in rows if (name := f"{TIME_PREFIX}images_per_second") in row)
    if rates:
        summary["images_per_second"] = rates[len(rates) // 2]
        summary["tflops_per_second"] = summary["images_per_second"] * experiment.train_flops / 1e12
    utilisations = sorted(row[name] for row in rows if (name := f"{TIME_PREFIX}mfu") in row)
    if utilisations:
        summary["mfu"] = utilisations[len(utilisations) // 2]
    if starts := read_starts(workdir):
        summary |= describe_cost(total_cost(starts))
        published = paper_core_days(experiment.model_name, config.data.image_size, images)
        if published is not None and not config.train_only:
            summary["paper_tpuv3_core_days"] = published
    summary["overlap"] = dict(overlap)
    summary["seconds_of_this_start"] = seconds
    return summary


def write_summary(
    config: ConfigDict,
    workdir: AnyPath | str,
    experiment: Experiment,
    *,
    step: int,
    images: int,
    seconds: float,
    overlap: Mapping[str, int],
) -> dict[str, Any]:
    """Writes `summary.json` and `summary.md`; see `summarize`."""
    workdir = parse(workdir)
    summary = summarize(config, workdir, experiment, step=step, images=images, seconds=seconds, overlap=overlap)
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_atomically(workdir / "summary.md", format_summary(summary) + "\n")
    return summary


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a markdown table that also reads well in a terminal."""

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
    rows = [(name.replace("_", " "), show(name, value)) for name, value in values]
    left, right = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"| {'':{left}} | {'':{right}} |", f"|-{'-' * left}-|-{'-' * right}:|"]
    return "\n".join(lines + [f"| {name:{left}} | {value:>{right}} |" for name, value in rows])
