r"""Plans the paper's largest runs on slices of TPU v3, without a TPU, and compares with the paper's core-days.

    pip install -e '.[plan]'
    python benchmarks/paper_plans.py --json=docs/paper_plans.json            # compiles; the same command resumes
    python benchmarks/paper_plans.py --json=docs/paper_plans.json --report   # the table alone

Each row is a plan of `python -m vit_jax.plan`; it takes one to five minutes on two CPU cores. docs/plan.md has the
table.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

# So that it runs from a clone that is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks.common import paper_config, progress, write_json
from vit_jax.console import format_table
from vit_jax.plan import find_topology, plan_row
from vit_jax.plan.compiling import end_on_signals

RUNS = {
    "vit_jft:model=ViT-L/16": "ViT-L/16, JFT, 14 epochs",
    "vit_jft:model=ViT-H/14": "ViT-H/14, JFT, 14 epochs",
    "vit_l16_i21k": "ViT-L/16, ImageNet-21k, 90 epochs",
    "bit_jft:model=R152x4": "R152x4, JFT, 40 epochs",
}
SLICES = ("v3-128", "v3-256", "v3-512", "v3-1024")


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table."""
    headings = ("run", "slice", "GiB a core of 15.48", "compiler", "by", "+ network", "images/s", "days", "core-days")
    headings += ("paper", "FLOPs against formula", "compiled in (CPU time)")
    lines = []
    for row in rows:
        cells = [RUNS[row["config"]], row["topology"]]
        if row["status"] == "fits":
            cells += [
                f"{row['memory']['total'] / 2**30:.2f}",
                f"{1e3 * row['compiler_seconds']:.0f} ms",
                row["estimate"],
                f"{1e3 * row['interconnect_seconds']:.0f} ms",
                f"{row['images_per_second']:,.0f}",
                f"{row['days']:.2f}",
                f"{row['core_days']:,.0f}",
                f"{row['paper_core_days']:,.0f}",
                f"{100 * (row['compiler_flops'] / row['flops'] - 1):+.1f} %" if row["compiler_flops"] else "-",
                f"{row['compile_seconds']:.0f} s ({row['cpu_seconds']:.0f} s)",
            ]
        else:
            cells += [row["status"], *[""] * 9]
        lines.append(cells)
    return format_table(headings, lines)


def main() -> None:
    """Plans what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where results are kept")
    parser.add_argument("--report", action="store_true", help="compile nothing")
    parser.add_argument("--timeout_minutes", type=float, default=30.0, help="for one compilation")
    flags = parser.parse_args()
    end_on_signals()
    rows = json.loads(flags.json.read_text()) if flags.json.exists() else []
    order = [(config, topology) for config in RUNS for topology in SLICES]
    for config, topology in order:
        others = [row for row in rows if (row["config"], row["topology"]) != (config, topology)]
        old = [row for row in rows if row not in others]
        if flags.report or any(row["status"] in ("fits", "does not fit") for row in old):
            continue
        progress(f"{config} on {topology} ...")
        row = plan_row(paper_config(config), find_topology(topology), timeout_minutes=flags.timeout_minutes)
        rows = [*others, {"config": config, **row.to_json()}]
        rows.sort(key=lambda row: order.index((row["config"], row["topology"])))
        write_json(flags.json, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
