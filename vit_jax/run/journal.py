"""Reports the progress of a training run: metrics, throughput, time by kind, curves."""

import collections
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax

from vit_jax.console import format_seconds, wrap_parts
from vit_jax.costs.hardware import Machine
from vit_jax.errors import UserError
from vit_jax.files import AnyPath
from vit_jax.multihost import processes
from vit_jax.multihost.watchdog import Watchdog
from vit_jax.run.accounting import Accounts, Ledger
from vit_jax.run.curves import plot_curves
from vit_jax.run.metrics import TIME_PREFIX, TRAIN_PREFIX, MetricWriter
from vit_jax.run.profiling import Profiler

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch")

_SECONDS_BETWEEN_CURVES = 60.0
_LONG_WAIT = 0.02  # share of the time spent waiting for input that the terminal reports
_LOW_GOODPUT = 0.9  # share of the time spent training below which the terminal reports it


class NonFiniteError(UserError):
    """The loss or the gradient of a step is infinite or not a number."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(f"{name} is {value} at step {step}.")
        self.step = step


class StepMetrics:
    """Averages the metrics of training steps over windows, without making the loop wait for the device.

    Reads the metrics of a step after `lag` more steps were dispatched, when they have long arrived. This also keeps the
    host at most `lag` steps ahead.
    """

    def __init__(
        self,
        every_steps: int,
        emit: Callable[[int, dict[str, float]], None],
        *,
        state: Mapping[str, Any] | None = None,
        lag: int = 4,
    ):
        """Continues the unfinished window `state`, from `get_state`, or starts one.

        Windows end at multiples of `every_steps`; `emit` is called with their last step and their averages.
        """
        self._every_steps, self._emit, self._lag = every_steps, emit, lag
        self._pending: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()
        self._sums: dict[str, float] = dict(state["sums"]) if state else {}
        self._count: int = state["count"] if state else 0

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a dispatched step; raises `NonFiniteError` if an earlier value is not finite."""
        for value in metrics.values():
            value.copy_to_host_async()
        self._pending.append((step, metrics))
        if len(self._pending) > self._lag:
            self._read()

    def drain(self) -> None:
        """Waits for all steps and reads their metrics. Raises as `push` does."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, metrics = self._pending.popleft()
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                self._pending.clear()  # later steps do not count
                raise NonFiniteError(step, name, value)
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if step % self._every_steps == 0:
            averages = {name: total / self._count for name, total in self._sums.items()}
            self._sums, self._count = {}, 0
            self._emit(step, averages)

    def get_state(self) -> dict[str, Any]:
        """Returns the unfinished window, JSON-compatible, so that a resumed run reports the same averages."""
        return {"sums": dict(self._sums), "count": self._count}


class Throughput:
    """Images per second between two marks. Counts only the ledger's training and input time.

    A mark is made when the metrics of its step are read, a few steps after it was dispatched.
    """

    def __init__(self, ledger: Ledger, batch_size: int, machine: Machine, flops_per_image: float = 0.0):
        """Starts at step 0. `machine` is all devices; FLOPs are of a training step per image, 0 if unknown."""
        self.ledger, self.machine, self._batch_size = ledger, machine, batch_size
        self._flops_per_image = flops_per_image
        self.restart(0)

    def restart(self, step: int) -> None:
        """Restarts after a step."""
        self._step, self._before = step, self.ledger.seconds()

    def mark(self, step: int) -> dict[str, float]:
        """Returns the rates since the last mark under `time/` names; {} if there was no step since."""
        steps, before = step - self._step, self._before
        if steps <= 0:
            return {}
        self.restart(step)
        training, waited = (self._before[kind] - before[kind] for kind in ("training", "input"))
        seconds = training + waited
        if seconds <= 0:
            return {}
        rate = steps * self._batch_size / seconds
        rates = {"images_per_second": rate, "images_per_second_per_core": rate / self.machine.num_cores}
        # At most the share `input_wait` of the time, the devices had no batch.
        rates |= {"step_seconds": seconds / steps, "input_wait": waited / seconds}
        if flops := rate * self._flops_per_image:
            rates["tflops_per_second"] = flops / 1e12
            if self.machine.bf16_flops:
                rates["mfu"] = flops / self.machine.bf16_flops  # model FLOPs utilisation
        return {f"{TIME_PREFIX}{name}": value for name, value in (rates | self.ledger.window()).items()}


class Journal:
    """Reports what the training loop hands over, without making the loop wait.

    Work that is not training runs inside `pause`, so that neither throughput nor the watchdog mistakes it for a step.
    The main process writes the files. The time of this start is entered in `ledger`,
    and `step_metrics` has those of the steps under way.
    """

    def __init__(
        self,
        workdir: AnyPath,
        throughput: Throughput,
        watchdog: Watchdog,
        profiler: Profiler,
        *,
        num_steps: int,
        log_every_steps: int,
    ):
        """Makes the journal of a run; `start` opens its files. Metrics of `log_every_steps` are averaged into a row."""
        self.ledger = throughput.ledger
        self._workdir, self._throughput, self._watchdog, self._profiler = workdir, throughput, watchdog, profiler
        self._num_steps, self._log_every_steps = num_steps, log_every_steps
        self._writer: MetricWriter | None = None
        self._accounts: Accounts | None = None
        self._cleanup, self._profiled_step = contextlib.ExitStack(), contextlib.ExitStack()
        self._last_metrics: Mapping[str, Any] = {}
        self._drawn = -math.inf  # time of the last curves.png

    def __enter__(self) -> "Journal":
        self._cleanup.enter_context(self._watchdog)
        self._cleanup.enter_context(self._profiler)
        return self

    def start(self, step: int, window: Mapping[str, Any] | None = None) -> None:
        """Opens the files after `step`, with the unfinished window of metrics that was saved with it.

        Rows of later steps are dropped, since they will be written again.
        """
        is_main = processes.is_main_process()
        self._first_step, self._step = step + 1, step
        self.step_metrics = StepMetrics(self._log_every_steps, self._write_window, state=window)
        self._accounts = Accounts(self._workdir, self.ledger, self._throughput.machine, step=step, writes=is_main)
        if is_main:
            self._writer = self._cleanup.enter_context(MetricWriter(self._workdir, step=step))
        self.ledger.turn_to("compile")

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields a batch for each remaining step, and records the time that the devices had to wait for it."""
        for step in range(self._first_step, self._num_steps + 1):
            self._profiled_step.enter_context(self._profiler.step(step))
            yield self._next(batches)  # keeps no reference: the memory of a batch is free before the next arrives

    def _next(self, batches: Iterator[Batch]) -> Batch:
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation("waiting_for_input"):  # shows in a profile
            batch = next(batches)
        # Steps are dispatched ahead, so a late batch delays no device until the last step is done.
        if all(value.is_ready() for value in self._last_metrics.values()):
            self.ledger.charge("input", time.perf_counter() - start)
        return batch

    def end_step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a dispatched step, to read, average and report some steps later.

        Raises as `StepMetrics.push` does.
        """
        self._profiled_step.close()
        self._step, self._last_metrics = step, metrics
        self.step_metrics.push(step, metrics)
        self._watchdog.beat(step)
        if step == self._first_step:  # the step that compiles
            jax.block_until_ready(metrics)
            self.ledger.turn_to("training")
            self.record_costs()
            self._throughput.restart(step)
            logger.info("first step done %.1f s after the start", self.ledger.total_seconds())
        self._profiler.end_of_step(step, metrics)

    def _write_window(self, step: int, averages: Mapping[str, float]) -> None:
        row = {f"{TRAIN_PREFIX}{name}": value for name, value in averages.items()}
        self.write(step, row | self._throughput.mark(step))
        if self._accounts:
            self._accounts.record_if_due(step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a row of metrics to the files and the terminal."""
        if self._writer:
            self._writer.write(step, metrics)
        logger.info("%s", format_row(step, self._num_steps, metrics))

    def is_due(self, step: int, every_steps: int | None) -> bool:
        """Whether something is due after a step: every `every_steps` (None: never), and at the end of the run."""
        return step == self._num_steps or (every_steps is not None and step % every_steps == 0)

    @contextlib.contextmanager
    def pause(self, kind: str, what: str) -> Iterator[None]:
        """Waits for the steps under way, and records the time inside under another kind (see `accounting.KINDS`).

        `what` describes the work inside for the watchdog, which allows more time than for a step.

        Raises:
          NonFiniteError: a metric of a step is not finite; nothing that depends on it is done.
        """
        self.step_metrics.drain()
        with self.ledger.spent_on(kind), self._watchdog.allow(what):
            yield

    def flush(self) -> None:
        """Writes all rows to disk; raises `UserError` if that fails."""
        if self._writer:
            self._writer.flush()

    def record_costs(self) -> None:
        """Records the cost of this start until now."""
        if self._accounts:
            self._accounts.record(self._step)

    def draw_curves_if_due(self) -> None:
        """Draws `curves.png` during training, at most once a minute."""
        if self._step < self._num_steps and time.monotonic() - self._drawn > _SECONDS_BETWEEN_CURVES:
            self._draw_curves()

    def finish(self) -> None:
        """Draws `curves.png` and records the cost of the whole start."""
        self._draw_curves()
        self.record_costs()

    def _draw_curves(self) -> None:
        if not self._writer:
            return
        self._drawn = time.monotonic()
        with self.ledger.spent_on("report"):
            try:
                self._writer.flush()
                plot_curves([self._workdir], self._workdir / "curves.png")
            except Exception as error:  # a picture must not end a run
                logger.warning("could not draw curves.png: %s: %s", type(error).__name__, error)

    def __exit__(self, *error: Any) -> None:
        self.record_costs()
        self._profiled_step.close()
        self._cleanup.__exit__(*error)


_SHORT_NAMES = {"train/accuracy": "acc", "train/grad_norm": "grad", "train/learning_rate": "lr"}


def format_row(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """Formats a row for the terminal: progress, metrics, speed, time left. Breaks lines at 111 columns."""
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps} {100 * step // num_steps:3d}%"]
    times = {name.removeprefix(TIME_PREFIX): value for name, value in metrics.items() if name.startswith(TIME_PREFIX)}
    for name, value in metrics.items():
        if not name.startswith(TIME_PREFIX):
            parts.append(f"{_SHORT_NAMES.get(name, name.removeprefix(TRAIN_PREFIX))} {value:.4g}")
    if "images_per_second" in times:
        rate = times["images_per_second"]
        parts.append(f"{rate:.3g} images/s" if rate < 100 else f"{rate:.0f} images/s")
    if "step_seconds" in times:
        parts.append(f"ETA {format_seconds(times['step_seconds'] * (num_steps - step))}")
    if times.get("input_wait", 0.0) >= _LONG_WAIT:
        parts.append(f"waits {100 * times['input_wait']:.0f} % for input")
    if times.get("goodput", 1.0) < _LOW_GOODPUT:
        share, kind = max((value, name.removesuffix("_share")) for name, value in times.items() if "_share" in name)
        most = "" if kind == "input" else f" ({kind.replace('_', '-')} {100 * share:.0f} %)"
        parts.append(f"goodput {100 * times['goodput']:.0f} %{most}")
    return wrap_parts(parts, indent=15)
