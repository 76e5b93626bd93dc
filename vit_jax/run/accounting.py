"""What a run cost and where its time went: core-hours, TPUv3-core-days, goodput. docs/accounting.md explains them.

Only clocks are read, and no device is waited for. Steps are dispatched ahead, so that the time of a single step cannot
be told; what can be told is when the loop did something else. The remainder is training.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from vit_jax.costs.hardware import TPU_V3_CORE_BF16_FLOPS, Machine
from vit_jax.errors import UserError
from vit_jax.json_files import Fields, read_json
from vit_jax.paper import tables
from vit_jax.run.workdir import AnyPath, is_remote, parse, write_atomically

logger = logging.getLogger(__name__)

# All that a run spends time on. Each moment belongs to one of them.
KINDS = {
    "training": "the devices train, or could: all that is none of the following",
    "redone": "training that a kill undid: the steps after the checkpoint that the next start went on from",
    "start_up": "imports, processes that wait for each other, data sets, parameters",
    "restore": "a checkpoint is read",
    "compile": "the first step of a start, which waits for its compilation",
    "input": "no batch was there and the devices had run dry",
    "checkpoint": "the loop stands still for a checkpoint; what is written behind its back is training",
    "evaluation": "the model is evaluated",
    "profiling": "a profile is begun or written",
    "report": "pictures and tables are made",
}


class Ledger:
    """Where the time of this start goes: seconds by kind, each moment counted once, under the innermost kind.

        ledger = Ledger()                    # start_up from here on
        ledger.turn_to("training")
        with ledger.spent_on("evaluation"):
            ...
            with ledger.spent_on("checkpoint"):  # no evaluation meanwhile
                ...

    For the thread of the loop alone.
    """

    def __init__(self, *, start_up_seconds: float = 0.0):
        """Starts the clock.

        Args:
          start_up_seconds: how long the process has been there already; see `process_age`.
        """
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._seconds["start_up"] = start_up_seconds
        self._told = dict(self._seconds, start_up=0.0)
        self._kinds = ["start_up"]  # the innermost last
        self._since = time.perf_counter()

    def turn_to(self, kind: str) -> None:
        """From now on time is spent on this kind, wherever no `spent_on` says otherwise."""
        self._check(kind)
        self._settle()
        self._kinds[0] = kind

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """What runs inside is spent on this kind, and not on that around it."""
        self._check(kind)
        self._settle()
        self._kinds.append(kind)
        try:
            with jax.profiler.TraceAnnotation(kind):  # to be seen in a profile
                yield
        finally:
            self._settle()
            self._kinds.pop()

    def charge(self, kind: str, seconds: float) -> None:
        """Moves time that has just passed from the present kind to another, where only the end tells what it was."""
        self._check(kind)
        self._settle()
        self._seconds[self._kinds[-1]] -= seconds
        self._seconds[kind] += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by kind until now, all kinds of `KINDS`. Their sum is the time since the start."""
        self._settle()
        return dict(self._seconds)

    def window(self) -> dict[str, float]:
        """Shares of the time since the last call: `goodput` is training's; others as `<kind>_share` if there are."""
        now = self.seconds()
        spent = {kind: seconds - self._told[kind] for kind, seconds in now.items()}
        total = sum(spent.values())
        self._told = now
        if total <= 0:
            return {}
        goodput = spent.pop("training") / total
        return {"goodput": goodput, **{f"{kind}_share": each / total for kind, each in spent.items() if each > 0}}

    def _settle(self) -> None:
        now = time.perf_counter()
        self._seconds[self._kinds[-1]] += now - self._since
        self._since = now

    @staticmethod
    def _check(kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of time {kind!r}; there are {', '.join(KINDS)}.")


def process_age() -> float:
    """Seconds since this process was started, its imports included; 0 where the system does not tell (Linux does)."""
    try:
        import os
        import pathlib

        # Fields 3 and later of proc_pid_stat(5), after the name, which may have spaces and brackets; 22 is the start.
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


@dataclasses.dataclass(frozen=True)
class Start:
    """A start of a run, as far as it was recorded.

    Attributes:
      time: when it began, in UTC.
      from_step: the step it went on from.
      step: the last step it is known to have made.
      machine: the devices.
      seconds: by kind; see `KINDS`.
    """

    time: str
    from_step: int
    step: int
    machine: Machine
    seconds: dict[str, float]


_FILE = "accounting.json"
# A kill loses at most this. In a bucket every record is a request.
_SECONDS_BETWEEN_RECORDS = 10.0
_SECONDS_BETWEEN_REMOTE_RECORDS = 60.0


class Accounts:
    """Keeps `accounting.json`: every start of a run with its machine, its steps and its seconds by kind.

    Rows of `metrics.jsonl` beyond a checkpoint are dropped when they are made again; this file forgets nothing. It is
    rewritten whole, so that a kill at any moment leaves the former or the new. No run ends because it cannot be
    written: that is a warning.
    """

    def __init__(self, workdir: AnyPath | str, ledger: Ledger, machine: Machine, *, step: int, writes: bool = True):
        """Adds a start to those before, and records it.

        Args:
          workdir: the run's folder.
          ledger: of this start.
          machine: from `describe_machine`.
          step: the step this start goes on from.
          writes: whether this process writes; one of a run's does.
        """
        workdir = parse(workdir)
        self._path, self._ledger, self._machine, self._from_step = workdir / _FILE, ledger, machine, step
        self._writes = writes
        self._before = read_starts(workdir) if writes else []
        if writes and not self._before and self._path.exists():
            with contextlib.suppress(OSError, UserError):  # damaged, and about to be overwritten
                write_atomically(self._path.with_name("accounting.damaged.json"), self._path.read_bytes())
        began = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=sum(ledger.seconds().values()))
        self._began = began.isoformat(timespec="seconds")
        self._every_seconds = _SECONDS_BETWEEN_REMOTE_RECORDS if is_remote(workdir) else _SECONDS_BETWEEN_RECORDS
        self.record(step)

    def record(self, step: int) -> None:
        """Records this start as it stands now."""
        self._recorded = time.monotonic()
        if not self._writes:
            return
        start = Start(self._began, self._from_step, step, self._machine, self._ledger.seconds())
        rows = [json.dumps(dataclasses.asdict(each)) for each in [*self._before, start]]
        try:
            write_atomically(self._path, "[\n" + ",\n".join(rows) + "\n]\n")
        except (OSError, UserError) as error:
            logger.warning("could not record what the run costs: %s", error)

    def record_if_due(self, step: int) -> None:
        """Records this start if that was last done some time ago; cheap enough for every row of metrics."""
        if time.monotonic() - self._recorded >= self._every_seconds:
            self.record(step)


def read_starts(workdir: AnyPath | str) -> list[Start]:
    """The starts of a run, in order; [] where none are recorded, or the record is damaged (with a warning)."""
    workdir = parse(workdir)
    path = workdir / _FILE
    if not path.exists():
        return []
    try:
        return [_parse_start(Fields(row, str(path))) for row in read_json(path)]
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged (%s); what the run cost before is not counted", path, error)
        return []


def _parse_start(row: Fields) -> Start:
    machine = row.fields("machine")
    machine.integer("num_cores", at_least=1), machine.number("bf16_flops", None)
    seconds = row.fields("seconds")
    return Start(
        time=row.text("time"),
        from_step=row.integer("from_step", at_least=0),
        step=row.integer("step", at_least=0),
        machine=Machine(**machine.values),
        seconds=dict.fromkeys(KINDS, 0.0) | {kind: seconds.number(kind) for kind in seconds.values},
    )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run cost, all its starts together. Time between starts costs nothing here: nobody held the hardware.

    Attributes:
      starts: how many there were.
      redone_steps: steps that were made and lost, because a start went on from an earlier checkpoint.
      core_hours: cores of each start (`Machine.num_cores`) times its hours.
      tpuv3_core_days: days on as many TPU v3 cores as have the same peak; None where a peak is not known (CPU).
      shares: of the core-hours, by kind (see `KINDS`); `training` is the goodput. Kinds without time are left out.
    """

    starts: int
    redone_steps: int
    core_hours: float
    tpuv3_core_days: float | None
    shares: dict[str, float]


def total_cost(starts: Sequence[Start]) -> Cost:
    """Adds up the starts of a run.

    Training of steps that a later start made again is moved to `redone`: of the time that a start trained, the share
    that these steps are of all its steps.
    """
    redone_steps, kept = 0, None  # `kept`: no later start begins before it
    core_seconds, core_seconds_of, flops = 0.0, dict.fromkeys(KINDS, 0.0), 0.0
    known = bool(starts)
    for start in reversed(starts):
        lost = 0 if kept is None else start.step - min(start.step, max(start.from_step, kept))
        kept = start.from_step if kept is None else min(kept, start.from_step)
        redone_steps += lost
        seconds = dict(start.seconds)
        if lost:
            again = seconds["training"] * lost / (start.step - start.from_step)
            seconds["training"] -= again
            seconds["redone"] += again
        for kind, each in seconds.items():
            core_seconds_of[kind] = core_seconds_of.get(kind, 0.0) + each * start.machine.num_cores
        elapsed = sum(seconds.values())
        core_seconds += elapsed * start.machine.num_cores
        if start.machine.bf16_flops is None:
            known = False
        else:
            flops += elapsed * start.machine.bf16_flops
    return Cost(
        starts=len(starts),
        redone_steps=redone_steps,
        core_hours=core_seconds / 3600,
        tpuv3_core_days=tpuv3_core_days(flops) if known else None,
        shares={kind: each / core_seconds for kind, each in core_seconds_of.items() if each > 0},
    )


def tpuv3_core_days(peak_flops: float) -> float:
    """Core-days of TPU v3 with the same peak: devices' peak FLOP/s times seconds, over that of a core's day.

    The paper's table 2 gives cores times days. Other hardware is translated by its peak with bfloat16, so that a run
    which makes as good use of its hardware comes to the same number wherever it runs. It is no measure of the work
    done: a run that wastes half its time costs twice as much.
    """
    return peak_flops / (TPU_V3_CORE_BF16_FLOPS * 86400)


# Images of a pre-training, for which table 2 gives core-days: those of an epoch, and the epochs (section 4.1, table 3).
# BiT-L's are from Kolesnikov et al. 2020, section 3.2: 40 epochs.
_PAPER_IMAGES = {
    ("ViT-H/14", "JFT-300M"): tables.JFT_IMAGES * 14,
    ("ViT-L/16", "JFT-300M"): tables.JFT_IMAGES * 14,
    ("ViT-L/16", "ImageNet-21k"): 14_000_000 * 90,
    ("R152x4", "JFT-300M"): tables.JFT_IMAGES * 40,
}


def paper_core_days(model: str, image_size: int, num_images: float) -> float | None:
    """What the paper reports for a pre-training of this size, in TPUv3-core-days; None where it reports none.

    Args:
      model: its name.
      image_size: in pixels.
      num_images: that the run trains on, each epoch counted anew. Up to 15 % more or less is the same size: copies of
        ImageNet-21k differ by as much.
    """
    for key, images in _PAPER_IMAGES.items():
        if key[0] == model and image_size == tables.PRE_TRAINING_SIZE and abs(num_images / images - 1) <= 0.15:
            return float(tables.TPUV3_CORE_DAYS[key])
    return None


def describe_cost(cost: Cost) -> dict[str, Any]:
    """The cost as entries of a summary; what is not known, or hardly took time, is left out."""
    entries: dict[str, Any] = {"starts": cost.starts, "core_hours": cost.core_hours}
    if cost.redone_steps:
        entries["redone_steps"] = cost.redone_steps
    if cost.tpuv3_core_days is not None:
        entries["tpuv3_core_days"] = cost.tpuv3_core_days
    entries["goodput"] = cost.shares.get("training", 0.0)
    shares = {kind: share for kind, share in cost.shares.items() if kind != "training" and share >= 5e-5}
    return entries | {f"{kind}_share": share for kind, share in shares.items()}
