"""The cost of a run and how it spends its time: core-hours, TPUv3-core-days, goodput (docs/accounting.md).

Reads only clocks and waits for no device. Steps are dispatched ahead, so the time of a single step is unknown. The loop
records when it does something else; the rest is training.
"""

import collections
import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from vit_jax.costs.hardware import TPU_V3_CORE_BF16_FLOPS, Machine
from vit_jax.errors import UserError
from vit_jax.files import AnyPath, is_remote, parse_path, write_atomically
from vit_jax.json_files import Fields, read_json
from vit_jax.paper import tables

logger = logging.getLogger(__name__)

# Everything that a run spends time on. Each moment belongs to one of them.
KINDS = {
    "training": "everything that is none of the following",
    "redone": "training that a kill undid: the steps after the checkpoint from which the next start resumed",
    "start_up": "imports, waiting for other processes, opening data sets, making parameters",
    "restore": "reading a checkpoint",
    "compile": "the first step of a start, which waits for compilation",
    "input": "waiting for a batch while the devices are idle",
    "checkpoint": "the loop waits for a checkpoint; writing in the background is training",
    "evaluation": "evaluating the model",
    "profiling": "starting or writing a profile",
    "report": "drawing curves, making tables",
}


class Ledger:
    """Seconds of this start by kind. Each moment is counted once, under the innermost kind.

        ledger = Ledger()                    # start_up from here on
        ledger.turn_to("training")
        with ledger.spent_on("evaluation"):
            with ledger.spent_on("checkpoint"):  # not evaluation
                ...

    Only for the thread of the loop.
    """

    def __init__(self, *, start_up_seconds: float = 0.0):
        """Starts the clock; the process has been running for `start_up_seconds` already (see `process_age`)."""
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._window_began = dict(self._seconds)
        self._seconds["start_up"] = start_up_seconds
        self._kinds = ["start_up"]  # the innermost last
        self._since = time.perf_counter()

    def turn_to(self, kind: str) -> None:
        """From now on, counts time outside any `spent_on` under this kind."""
        self._settle(kind)
        self._kinds[0] = kind

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """Counts the time inside under this kind, not under the surrounding one."""
        self._settle(kind)
        self._kinds.append(kind)
        try:
            with jax.profiler.TraceAnnotation(kind):  # shows in a profile
                yield
        finally:
            self._settle()
            self._kinds.pop()

    def charge(self, kind: str, seconds: float) -> None:
        """Moves time that has just passed from the current kind to another one."""
        self._settle(kind)
        self._seconds[self._kinds[-1]] -= seconds
        self._seconds[kind] += seconds

    def seconds(self) -> dict[str, float]:
        """Returns the seconds until now by kind, for all `KINDS`. Their sum is the time since the start."""
        self._settle()
        return dict(self._seconds)

    def total_seconds(self) -> float:
        """Returns the time since the start."""
        return sum(self.seconds().values())

    def window(self) -> dict[str, float]:
        """Returns shares of the time since the last call: `goodput` is training's, the others are `<kind>_share`."""
        now = self.seconds()
        spent = {kind: seconds - self._window_began[kind] for kind, seconds in now.items()}
        total = sum(spent.values())
        self._window_began = now
        if total <= 0:
            return {}
        goodput = spent.pop("training") / total
        return {"goodput": goodput, **{f"{kind}_share": each / total for kind, each in spent.items() if each > 0}}

    def _settle(self, next_kind: str = "training") -> None:
        if next_kind not in KINDS:
            raise ValueError(f"unknown kind of time {next_kind!r}; known: {', '.join(KINDS)}.")
        now = time.perf_counter()
        self._seconds[self._kinds[-1]] += now - self._since
        self._since = now


def process_age() -> float:
    """Returns the seconds since this process started, including imports; 0 if the system does not say."""
    try:
        # Fields 3 and later of proc_pid_stat(5) follow the name, which may contain spaces and brackets.
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


@dataclasses.dataclass(frozen=True)
class StartCost:
    """The record of a start of a run: the step it resumed from, its last recorded step, and seconds by kind (`KINDS`).

    `time` is when it began, in UTC.
    """

    time: str
    from_step: int
    step: int
    machine: Machine
    seconds: dict[str, float]


_FILE = "accounting.json"
# A kill loses at most this much. In a bucket every record is a request.
_SECONDS_BETWEEN_RECORDS = 10.0
_SECONDS_BETWEEN_REMOTE_RECORDS = 60.0


class Accounts:
    """Keeps `accounting.json`: every start of a run with its machine, its steps and its seconds by kind.

    Unlike rows of `metrics.jsonl`, entries are never dropped. If the file cannot be written, a warning is logged.
    """

    def __init__(self, workdir: AnyPath | str, ledger: Ledger, machine: Machine, *, step: int, writes: bool = True):
        """Adds this start, which resumes from `step`, to the earlier ones. Exactly one process of a run `writes`."""
        workdir = parse_path(workdir)
        self._path, self._ledger, self._machine, self._from_step = workdir / _FILE, ledger, machine, step
        self._writes = writes
        self._before = read_costs(workdir) if writes else []
        if writes and not self._before and self._path.exists():
            with contextlib.suppress(OSError, UserError):  # damaged, and about to be overwritten
                write_atomically(self._path.with_name("accounting.damaged.json"), self._path.read_bytes())
        began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ledger.total_seconds())
        self._began = began.isoformat(timespec="seconds")
        self._every_seconds = _SECONDS_BETWEEN_REMOTE_RECORDS if is_remote(workdir) else _SECONDS_BETWEEN_RECORDS
        self.record(step)

    def record(self, step: int) -> None:
        """Records the state of this start."""
        self._recorded = time.monotonic()
        if not self._writes:
            return
        start = StartCost(self._began, self._from_step, step, self._machine, self._ledger.seconds())
        rows = [json.dumps(dataclasses.asdict(each)) for each in [*self._before, start]]
        try:
            write_atomically(self._path, "[\n" + ",\n".join(rows) + "\n]\n")
        except (OSError, UserError) as error:
            logger.warning("could not record the cost of the run: %s", error)

    def record_if_due(self, step: int) -> None:
        """Records this start if the last record is old enough."""
        if time.monotonic() - self._recorded >= self._every_seconds:
            self.record(step)


def read_costs(workdir: AnyPath | str) -> list[StartCost]:
    """Reads the starts of a run, in order; [] if none are recorded, or with a warning if the record is damaged."""
    path = parse_path(workdir) / _FILE
    try:
        return [_parse_start(Fields(row, str(path))) for row in read_json(path)] if path.exists() else []
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged (%s); the cost of earlier starts is not counted", path, error)
        return []


def _parse_start(row: Fields) -> StartCost:
    machine = row.fields("machine")
    machine.integer("num_cores", at_least=1), machine.number("bf16_flops", None)
    seconds = row.fields("seconds")
    return StartCost(
        time=row.text("time"),
        from_step=row.integer("from_step", at_least=0),
        step=row.integer("step", at_least=0),
        machine=Machine(**machine.values),
        seconds=dict.fromkeys(KINDS, 0.0) | {kind: seconds.number(kind) for kind in seconds.values},
    )


def total_cost(starts: Sequence[StartCost]) -> dict[str, Any]:
    """Adds up the starts of a run. Time between starts costs nothing, because no hardware was in use.

    If a later start repeated some steps of a start, the same share of that start's training time counts as `redone`.

    Returns:
      Entries of a summary: `starts`, their number; `core_hours`, the sum of cores (`Machine.num_cores`) times hours;
      `redone_steps`, the steps that were lost, if any; `tpuv3_core_days`, days on TPU v3 cores with the same total
      peak, if all peaks are known; `goodput`, training's share of the core-hours, and `<kind>_share` of the other
      `KINDS` without negligible ones.
    """
    redone_steps, flops = 0, 0.0
    kept = math.inf  # no later start resumed before this step
    core_seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
    for start in reversed(starts):
        lost = start.step - min(start.step, max(start.from_step, kept))
        kept = min(kept, start.from_step)
        redone_steps += int(lost)
        seconds = dict(start.seconds)
        if lost:
            again = seconds["training"] * lost / (start.step - start.from_step)
            seconds["training"] -= again
            seconds["redone"] += again
        for kind, each in seconds.items():
            core_seconds[kind] += each * start.machine.num_cores
        flops += sum(seconds.values()) * (math.nan if start.machine.bf16_flops is None else start.machine.bf16_flops)
    total = sum(core_seconds.values())
    entries: dict[str, Any] = {"starts": len(starts), "core_hours": total / 3600}
    if redone_steps:
        entries["redone_steps"] = redone_steps
    if not math.isnan(flops):
        entries["tpuv3_core_days"] = tpuv3_core_days(flops)
    shares = {kind: each / total for kind, each in core_seconds.items() if each > 0}
    entries["goodput"] = shares.pop("training", 0.0)
    return entries | {f"{kind}_share": share for kind, share in shares.items() if share >= 5e-5}


def tpuv3_core_days(peak_flops: float) -> float:
    """Converts peak FLOP/s times seconds of any devices to core-days of TPU v3, the unit of the paper's table 2.

    The peak is that of bfloat16. Runs that use their hardware equally well get the same number on any hardware. It does
    not measure work: a run that wastes half its time costs twice as much.
    """
    return peak_flops / (TPU_V3_CORE_BF16_FLOPS * 86400)


# Images of the pre-trainings in table 2: images of an epoch times epochs (section 4.1, table 3). BiT-L's 40 epochs are
# from Kolesnikov et al. 2020, section 3.2.
_PAPER_IMAGES = {
    ("ViT-H/14", "JFT-300M"): tables.JFT_IMAGES * 14,
    ("ViT-L/16", "JFT-300M"): tables.JFT_IMAGES * 14,
    ("ViT-L/16", "ImageNet-21k"): 14_000_000 * 90,
    ("R152x4", "JFT-300M"): tables.JFT_IMAGES * 40,
}


def paper_core_days(model: str, image_size: int, num_images: float) -> float | None:
    """Returns the TPUv3-core-days that the paper reports for a pre-training of this size, or None.

    `num_images` counts each epoch anew. Numbers within 15 % are the same: copies of ImageNet-21k differ by as much.
    """
    for key, images in _PAPER_IMAGES.items():
        if key[0] == model and image_size == tables.PRE_TRAINING_SIZE and abs(num_images / images - 1) <= 0.15:
            return float(tables.TPUV3_CORE_DAYS[key])
    return None
