r"""Plans a run before you book hardware: does it fit, how long does a step take, what does the run cost.

    python -m vit_jax.plan --config=configs/vit_l16_i21k.py --topology=v3-512,v4-128,v5e-256
    python -m vit_jax.plan --config=configs/vit_jft.py:model=ViT-H/14 --topology=v3-128 --config.sharding=fsdp

Compiles the training step for each slice on this machine, from shapes only. It needs libtpu
(pip install --editable '.[plan]'), but neither the data set nor a TPU. A row takes half a minute to three minutes on
two CPU cores. --config.model.scan_layers=True computes the same and compiles faster, but that program needs more memory
and time. A step that does not fit is reported within seconds, with a change that fits (unless --noadvise).

Topologies of Cloud TPU: v2-8 to v2-512, v3-8 to v3-2048, v4-8 to v4-4096, v5e-1 to v5e-256 (v5litepod), v5p-8
to v5p-8192, v6e-1 to v6e-256, tpu7x-8 to tpu7x-18432; or a shape in chips, such as v4:4x4x8. Several slices are
2xv5e-256: data-parallel, over the data-centre network. GPUs, such as h100-8 (a100-40gb, a100-80gb, h100, h200, b200; up
to eight in a machine, joined by NVLink; 4xh100-8 is four machines), are planned by formula.

The exit status is 1 if a row failed or timed out, or if all were refused.

Searches change the config, one field at a time:

    --search=batch --topology=v3-8 --num_devices=1     the largest batch that a v3 core holds
    --search=slice --topology=v3                       the smallest slice of that generation that fits the config
    --search=remat --topology=v3-128                   the cheapest rematerialisation, with accumulation, that fits

Fields of the config are set as for training: --config.batch_size=8192. docs/plan.md explains the table and its
accuracy.
"""

import dataclasses
import json
import math
import pathlib
import sys
import time

from absl import flags
from ml_collections import ConfigDict

from vit_jax import flags as common_flags
from vit_jax.errors import UserError
from vit_jax.flags import define_config, report
from vit_jax.plan.compiling import check_compiler, end_on_signals
from vit_jax.plan.plan_row import PlanRow, failures, plan_record, plan_row
from vit_jax.plan.search import rows_for
from vit_jax.plan.table import format_plan
from vit_jax.plan.topologies import Topology, find_topology, normalise, slices

_CONFIG = define_config()
_TOPOLOGY = flags.DEFINE_list(
    "topology", [], "Slices, comma-separated: v3-512,v4-128; generations for --search=slice: v3,v5e."
)
_SEARCH = flags.DEFINE_enum(
    "search", "none", ["none", "batch", "slice", "remat"], "What to search on each topology, see above."
)
_NUM_DEVICES = flags.DEFINE_integer(
    "num_devices", None, "Use only this number of JAX devices of each topology.", lower_bound=1
)
_ADVISE = flags.DEFINE_bool("advise", True, "For a row that does not fit, search a change that makes it fit.")
_PRICE = flags.DEFINE_float(
    "price_per_core_hour", None, "Price per hour of a TensorCore or GPU, in any currency.", lower_bound=0.0
)
_TIMEOUT_MINUTES = flags.DEFINE_float("timeout_minutes", 10.0, "Time limit of a compilation.", lower_bound=0.0)
_DCN = flags.DEFINE_float(
    "dcn_gigabits",
    None,
    "Gbit/s that a chip (GPU) can send to other slices (machines); default: the data sheet's.",
    lower_bound=0.0,
)
_JSON = flags.DEFINE_string("json", None, "File for all rows, with more fields than the table.")


def _plan(config: ConfigDict, topology: Topology, *, memory_only: bool = False) -> PlanRow:
    """Makes a row, and reports it on standard error."""
    if _DCN.value is not None:
        topology = dataclasses.replace(topology, dcn_bandwidth=_DCN.value * 1e9 / 8)
    devices = topology.num_devices if _NUM_DEVICES.value is None else _NUM_DEVICES.value
    verb = "compiling" if topology.compiler_name else "estimating"
    print(
        f"{verb} for {devices} {topology.device_name}{'s' if devices > 1 else ''} of {topology.name}: batch "
        f"{config.batch_size:,} in {config.accumulation_steps} part(s), sharding {config.sharding}, remat "
        f"{config.model.remat or 'none'} ...",
        end=" ",
        file=sys.stderr,
        flush=True,
    )
    start = time.perf_counter()
    row = plan_row(
        config,
        topology,
        num_devices=_NUM_DEVICES.value,
        timeout_minutes=_TIMEOUT_MINUTES.value,
        price_per_core_hour=_PRICE.value,
        memory_only=memory_only,
    )
    print(f"{row.status} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
    return row


def _check_flags() -> None:
    if not _TOPOLOGY.value:
        raise UserError("--topology is missing, e.g. --topology=v3-512,v4-128.")
    find = slices if _SEARCH.value == "slice" else find_topology
    for name in _TOPOLOGY.value:
        find(name)
    if _SEARCH.value == "slice" and _NUM_DEVICES.value is not None:
        raise UserError("--search=slice uses whole slices: leave --num_devices out.")
    for flag in (_TIMEOUT_MINUTES, _PRICE, _DCN):
        if flag.value is not None and not (math.isfinite(flag.value) and (flag is _PRICE or flag.value > 0)):
            raise UserError(f"--{flag.name}={flag.value:g} must be a number above 0.")
    if _DCN.value is not None and all(normalise(name)[0].isalpha() for name in _TOPOLOGY.value):
        raise UserError("--dcn_gigabits is for the network between slices: give several, such as --topology=2xv5e-256.")
    if _JSON.value and not pathlib.Path(_JSON.value).absolute().parent.is_dir():
        raise UserError(f"--json={_JSON.value}: there is no such folder.")


def _main(_: list[str]) -> int:
    end_on_signals()
    try:
        find = (lambda name: slices(name)[0]) if _SEARCH.value == "slice" else find_topology
        if any(find(name).compiler_name for name in _TOPOLOGY.value):
            check_compiler()
        rows: list[PlanRow] = []
        for name in _TOPOLOGY.value:
            for row in rows_for(
                _plan,
                _CONFIG.value,
                name,
                search=_SEARCH.value,
                num_devices=_NUM_DEVICES.value,
                advice=_ADVISE.value,
            ):
                rows.append(row)
                if _JSON.value:  # after each row, because a long search may be interrupted
                    record = {"command": sys.argv, **plan_record(rows)}
                    pathlib.Path(_JSON.value).write_text(json.dumps(record, indent=2) + "\n")
        print(format_plan(rows))
    except UserError as error:
        return report(error)
    if failed := failures(rows):
        print(f"not planned: {'; '.join(failed)}", file=sys.stderr)
        return 1
    return 0


def run() -> None:
    """Entry point of `python -m vit_jax.plan`."""
    common_flags.run(_main, _CONFIG, _check_flags)


if __name__ == "__main__":
    run()
