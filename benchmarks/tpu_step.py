r"""Studies speed and memory of a training step on TPU v3 with XLA's TPU compiler, without a TPU.

    pip install -e '.[plan]'
    python benchmarks/tpu_step.py --json=tpu_step.json                    # compiles; the same command resumes
    python benchmarks/tpu_step.py --json=tpu_step.json --study=memory --trial='fsdp*'

Two studies: `time`, ViT-L/16 on JFT at batch 4096 on 512 cores, layers unrolled; `memory`, ViT-H/14 on JFT at batch
4096 on 128 cores. A trial is the config of the paper's run with some fields changed; `vit_jax.plan.plan_row` compiles
the step that trains. Each trial is written when it is done; the same command repeats only those that failed. A trial
takes 1 to 15 minutes on two CPU cores. docs/tpu_speed.md has the results.
"""

import argparse
import fnmatch
import json
import pathlib
import sys
from typing import Any

# So that it runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from ml_collections import ConfigDict

from benchmarks.common import number, paper_config, progress, write_json
from vit_jax.console import format_table
from vit_jax.errors import UserError, unknown_name
from vit_jax.plan import find_topology, plan_row
from vit_jax.plan.compiling import end_on_signals

FSDP = {"sharding": "fsdp"}
SCAN = {"model.scan_layers": True}
REMAT = {"model.remat": "full"}

# name: (config, slice, {trial: fields that it changes})
STUDIES: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "time": (
        "vit_jft:model=ViT-L/16",
        "v3-512",
        {
            "fsdp": FSDP,
            "replicated": {},
            "fsdp, half_logits": FSDP | {"model.attention": "half_logits"},
            "replicated, half_logits": {"model.attention": "half_logits"},
            "replicated, bfloat16 momentum": {"optimizer.momentum_dtype": "bfloat16"},
            "fsdp, remat dots": FSDP | {"model.remat": "dots"},
            "fsdp, softmax loss": FSDP | {"loss": "softmax"},
        },
    ),
    "memory": (
        "vit_jft:model=ViT-H/14",
        "v3-128",
        {
            "fsdp, scan, remat full, 32 parts": FSDP | SCAN | REMAT | {"accumulation_steps": 32},
            "fsdp, scan, remat full": FSDP | SCAN | REMAT,
            "replicated, scan": SCAN,
            "fsdp, scan, remat full, 8 parts": FSDP | SCAN | REMAT | {"accumulation_steps": 8},
            "fsdp, scan": FSDP | SCAN,
            "fsdp, scan, remat dots": FSDP | SCAN | {"model.remat": "dots"},
            "replicated, scan, remat full": SCAN | REMAT,
            "fsdp, scan, remat full, 2 parts": FSDP | SCAN | REMAT | {"accumulation_steps": 2},
            "fsdp, scan, remat full, 32 parts, bfloat16 momentum": FSDP
            | SCAN
            | REMAT
            | {"accumulation_steps": 32, "optimizer.momentum_dtype": "bfloat16"},
            "replicated": {},
        },
    ),
}


def make_config(study: str, trial: str) -> ConfigDict:
    """The config of a trial."""
    run, _, trials = STUDIES[study]
    config = paper_config(run)
    config.update_from_flattened_dict(trials[trial])
    return config


def run(study: str, trial: str, timeout_minutes: float) -> dict[str, Any]:
    """Compiles one trial; the plan's row as plain values."""
    _, topology, trials = STUDIES[study]
    row = plan_row(make_config(study, trial), find_topology(topology), timeout_minutes=timeout_minutes)
    return {"study": study, "trial": trial, "changes": trials[trial]} | row.to_json()


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table of trials."""
    rows = []
    for result in results:
        memory = result["memory"]
        cells = [result["trial"], result["status"], number(memory["total"] if memory else None, ".2f", 1e-9, " GB")]
        for name in ("optimal_seconds", "compiler_seconds", "interconnect_seconds", "step_seconds"):
            cells.append(number(result.get(name), ".1f", 1e3, " ms"))
        rows.append(cells)
    headings = ("trial", "", "bytes a core", "at the peak", "cycles", "exposed collectives", "step")
    return format_table(headings, rows, num_left=2)


def main() -> None:
    """Runs the trials that are missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where results are kept")
    parser.add_argument("--study", choices=STUDIES, help="only this one")
    parser.add_argument("--trial", default="*", help="only trials of such names; * stands for anything")
    parser.add_argument("--timeout_minutes", type=float, default=30.0, help="for one compilation")
    flags = parser.parse_args()
    end_on_signals()
    results = json.loads(flags.json.read_text()) if flags.json.exists() else []
    done = {(result["study"], result["trial"]) for result in results if result["status"] in ("fits", "does not fit")}
    studies = [flags.study] if flags.study else list(STUDIES)
    asked = [(study, trial) for study in studies for trial in STUDIES[study][2] if fnmatch.fnmatch(trial, flags.trial)]
    if not asked:
        raise unknown_name("trial", flags.trial, [trial for study in studies for trial in STUDIES[study][2]])
    for study, trial in asked:
        if (study, trial) in done:
            continue
        progress(f"{study}: {trial} ...")
        result = run(study, trial, flags.timeout_minutes)
        results = [old for old in results if (old["study"], old["trial"]) != (study, trial)] + [result]
        write_json(flags.json, results)
    for study in studies:
        print(f"\n{study}: {STUDIES[study][0]}, {STUDIES[study][1]}\n")
        print(table([result for result in results if result["study"] == study]))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
