"""What is measured, and where it goes: terminal, JSON lines, TensorBoard."""

import collections
import contextlib
import json
import logging
import math
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import jax

from vit_jax.accounting import Ledger
from vit_jax.errors import UserError
from vit_jax.host import format_seconds
from vit_jax.json_files import read_json_lines
from vit_jax.workdir import AnyPath, is_remote, write_atomically

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

# Names of metrics that depend on the machine and the hour; all others are the same in every run of a config and seed.
TIME_PREFIX = "time/"
TRAIN_PREFIX = "train/"


_WORTH_TELLING = 0.02  # share of time spent waiting for input
_GOODPUT_WORTH_TELLING = 0.9


class NonFiniteError(UserError):
    """The loss or the gradient is infinite or not a number."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(f"{name} is {value} at step {step}.")
        self.step = step


class StepMetrics:
    """Averages the metrics of training steps over windows, without making the loop wait for the device.

    A step's metrics are read only when `lag` further steps were dispatched, by when they have long arrived. This also
    keeps the host from running further ahead than that.
    """

    def __init__(
        self,
        every_steps: int,
        emit: Callable[[int, dict[str, float]], None],
        *,
        state: Mapping[str, Any] | None = None,
        lag: int = 4,
    ):
        """Makes an empty window, or goes on with an unfinished one.

        Args:
          every_steps: steps in a window; windows end at its multiples.
          emit: called with the window's last step and the averages.
          state: the unfinished window, from `get_state`.
          lag: see above.
        """
        self._every_steps = every_steps
        self._emit = emit
        self._lag = lag
        self._pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self._sums: dict[str, float] = dict(state["sums"]) if state else {}
        self._count: int = state["count"] if state else 0

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was dispatched.

        Raises:
          NonFiniteError: some earlier step went wrong.
        """
        for value in metrics.values():
            value.copy_to_host_async()
        self._pending.append((step, metrics))
        if len(self._pending) > self._lag:
            self._read()

    def drain(self) -> None:
        """Waits for all steps. Raises as `push` does."""
        while self._pending:
            self._read()

    def _read(self) -> None:
        step, metrics = self._pending.popleft()
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(step, name, value)
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if step % self._every_steps == 0:
            averages = {name: total / self._count for name, total in self._sums.items()}
            self._sums, self._count = {}, 0
            self._emit(step, averages)

    def get_state(self) -> dict[str, Any]:
        """The unfinished window, JSON-compatible; a resumed run then reports the same averages. Call `drain` first."""
        return {"sums": dict(self._sums), "count": self._count}


def read_jsonl(path: AnyPath) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; [] where there is none. A last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = read_json_lines(path, allow_nan=True, on_error=lambda _: None)
    return [row for _, row in rows if isinstance(row, dict)]


_UPLOAD_SECONDS = 60.0


class MetricWriter:
    """Writes rows of metrics to `metrics.jsonl` and TensorBoard.

    Objects in a bucket cannot grow. For a workdir there, the files grow in a temporary folder and go up whole, with
    every `flush` and at most once a minute in between.
    """

    def __init__(self, workdir: AnyPath, *, step: int):
        """Opens the files and drops the rows that will be made again: a killed run may be ahead of its checkpoint.

        Args:
          workdir: the run's folder.
          step: the step the run starts from. An evaluation there will be made again too.
        """
        from tensorboardX import SummaryWriter

        def stays(row: dict[str, Any]) -> bool:
            evaluated = any(not name.startswith((TRAIN_PREFIX, TIME_PREFIX)) for name in row if name != "step")
            return row["step"] < step or (row["step"] == step and not evaluated)

        self._remote = workdir if is_remote(workdir) else None
        self._temporary = tempfile.TemporaryDirectory() if self._remote else None
        self._folder = pathlib.Path(self._temporary.name if self._temporary else workdir)
        rows = [row for row in read_jsonl(workdir / "metrics.jsonl") if stays(row)]
        path = self._folder / "metrics.jsonl"
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1)
        self._upload()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row; it is with the operating system when this returns.

        Raises:
          UserError: the workdir is in a bucket that cannot be written.
        """
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._remote and time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hands TensorBoard's events to the operating system, too; everything to the bucket. Raises as `write` does."""
        self._tensorboard.flush()
        self._upload()

    def _upload(self) -> None:
        if self._remote:
            for file in self._folder.rglob("*"):
                if file.is_file():
                    write_atomically(self._remote / str(file.relative_to(self._folder)), file.read_bytes())
            self._uploaded = time.monotonic()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._tensorboard.close()
        self._upload()
        if self._temporary:
            self._temporary.cleanup()


class Throughput:
    """Images per second between two marks, pauses left out.

    The mark of a step is made when its metrics are read. If the run waits for its input, that is some steps later, and
    the window after a pause shows a lower rate than the true one.
    """

    def __init__(
        self,
        batch_size: int,
        num_cores: int,
        flops_per_image: float = 0.0,
        *,
        peak_flops: float | None = None,
        ledger: Ledger | None = None,
    ):
        """Starts the clock.

        Args:
          batch_size: images in a step.
          num_cores: accelerator cores, or CPU cores where the CPU is the device.
          flops_per_image: of a training step; 0 where not known.
          peak_flops: FLOP/s of all devices together; None where not known.
          ledger: where waiting for input is entered; a mark then also tells what became of the time, pauses included.
        """
        self._batch_size, self._num_cores, self._flops_per_image = batch_size, num_cores, flops_per_image
        self._peak_flops, self._ledger = peak_flops, ledger
        self.restart(0)

    def restart(self, step: int) -> None:
        """Starts anew at a step, after something other than training took time."""
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting_for_input(self, last: Mapping[str, jax.Array] | None) -> Iterator[None]:
        """Counts what runs inside as waiting for the next batch, if the devices had nothing left to do at its end.

        Steps are dispatched ahead. While the last of them is not done, a batch that is late keeps no device waiting.

        Args:
          last: metrics of the step that was dispatched last; None before the first.
        """
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation("waiting_for_input"):  # to be seen in a profile
            yield
        if last is None or all(value.is_ready() for value in last.values()):  # type: ignore[attr-defined]
            waited = time.perf_counter() - start
            self._waited += waited
            if self._ledger:
                self._ledger.charge("input", waited)

    def mark(self, step: int) -> dict[str, float]:
        """The rates since the last mark, under `time/` names; {} if no step was made since."""
        steps, seconds, waited = step - self._step, time.perf_counter() - self._time, self._waited
        self.restart(step)
        if steps <= 0 or seconds <= 0:
            return {}
        rate = steps * self._batch_size / seconds
        flops = rate * self._flops_per_image
        rates = {
            f"{TIME_PREFIX}images_per_second": rate,
            f"{TIME_PREFIX}images_per_second_per_core": rate / self._num_cores,
            f"{TIME_PREFIX}step_seconds": seconds / steps,
            f"{TIME_PREFIX}input_wait": waited / seconds,  # at most this share of the time the devices had no batch
        }
        if flops:
            rates[f"{TIME_PREFIX}tflops_per_second"] = flops / 1e12
        if flops and self._peak_flops:
            rates[f"{TIME_PREFIX}mfu"] = flops / self._peak_flops  # model FLOPs utilisation
        shares = self._ledger.window() if self._ledger else {}
        return rates | {f"{TIME_PREFIX}{name}": value for name, value in shares.items()}


def format_row(step: int, num_steps: int, metrics: Mapping[str, float]) -> str:
    """One line for the terminal: where the run is, what it measures, how fast it is and when it will end."""
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps} {100 * step // num_steps:3d}%"]
    for name, value in metrics.items():
        if name == f"{TIME_PREFIX}images_per_second":
            parts.append(f"{value:.5g} images/s ({metrics[f'{name}_per_core']:.5g}/core)")
        elif name == f"{TIME_PREFIX}input_wait":
            if value >= _WORTH_TELLING:
                parts.append(f"waits {100 * value:.0f} % for input")
        elif name == f"{TIME_PREFIX}step_seconds":
            parts.append(f"ETA {format_seconds(value * (num_steps - step))}")
        elif name == f"{TIME_PREFIX}goodput":
            if value < _GOODPUT_WORTH_TELLING:
                parts.append(_tell_goodput(value, metrics))
        elif not name.startswith(TIME_PREFIX):
            parts.append(f"{name.removeprefix(TRAIN_PREFIX)} {value:.4g}")
    return "  ".join(parts)


def _tell_goodput(goodput: float, metrics: Mapping[str, float]) -> str:
    """How much of the time was training, and what took most of the rest, unless that is waiting, which is told."""
    most = max((name for name in metrics if name.endswith("_share")), key=lambda name: metrics[name])
    kind = most.removeprefix(TIME_PREFIX).removesuffix("_share").replace("_", "-")
    told = f"{100 * goodput:.0f} % of the time in training"
    return told if kind == "input" else f"{told}, {100 * metrics[most]:.0f} % in {kind}"


class SizedIterable(Protocol[T_co]):
    """Can be iterated, again and again, and knows how long that is."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...


class Progress(Generic[T]):
    """An iterable that tells now and then how far it is and how long it will take. Can be iterated again."""

    def __init__(
        self,
        items: SizedIterable[T],
        what: str,
        *,
        every_seconds: float = 10.0,
        before_each: Callable[[], None] = lambda: None,
    ):
        """Wraps the items.

        Args:
          items: what is iterated.
          what: names it in the log.
          every_seconds: how often it tells.
          before_each: called before each item; may raise to end the iteration.
        """
        self._items, self._what, self._every_seconds, self._before_each = items, what, every_seconds, before_each

    def __iter__(self) -> Iterator[T]:
        start = last = time.perf_counter()
        for done, item in enumerate(self._items):
            self._before_each()
            now = time.perf_counter()
            if done and now - last >= self._every_seconds:
                last = now
                left = format_seconds((now - start) / done * (len(self._items) - done))
                logger.info("%s: %d/%d batches, %s left", self._what, done, len(self._items), left)
            yield item
