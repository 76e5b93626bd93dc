"""What is measured, and where it goes: terminal, JSON lines, TensorBoard."""

import collections
import contextlib
import json
import logging
import math
import pathlib
import platform
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import jax

from vit_jax.console import format_seconds
from vit_jax.errors import UserError
from vit_jax.json_files import JsonError, read_json_lines
from vit_jax.run.accounting import Ledger
from vit_jax.run.workdir import AnyPath, is_remote, parse, write_atomically

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


def read_jsonl(path: AnyPath | str) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; [] if there is none.

    A last line that a kill cut off is left out. So are damaged lines, with a warning.
    """
    path = parse(path)
    return _read_jsonl(path)[0]


def _read_jsonl(path: AnyPath) -> tuple[list[dict[str, Any]], int]:
    """Rows of a JSON-lines file, and how many of its lines are damaged."""
    if not path.exists():
        return [], 0
    rows: list[Any] = []  # of lines in their order; an error for one that is not JSON
    for _, row in read_json_lines(path, allow_nan=True, on_error=rows.append):
        rows.append(row)
    if rows and isinstance(rows[-1], JsonError) and not path.read_bytes().endswith(b"\n"):
        del rows[-1]  # cut off by a kill, or being written
    whole = [row for row in rows if isinstance(row, dict)]
    if num_damaged := len(rows) - len(whole):
        logger.warning("%s: damaged lines are left out: %d of %d", path, num_damaged, len(rows))
    return whole, num_damaged


_UPLOAD_SECONDS = 60.0


class _TensorBoard:
    """Writes scalars as TensorBoard events, in the calling thread. If that fails, says so once and gives up.

    tensorboardX's own `SummaryWriter` hands events to a thread over a queue of limited length. When that thread dies,
    as it does when the wall clock is set back by weeks, the caller waits for ever.
    """

    def __init__(self, folder: pathlib.Path, *, step: int):
        """Opens a new file of events.

        Args:
          folder: created if it is missing.
          step: TensorBoard drops what earlier files have of later steps.
        """
        self._file: Any = None
        with self._giving_up_on_errors():
            import tensorboardX
            from tensorboardX.proto import event_pb2

            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{uuid.uuid4().hex[:8]}"
            self._file = tensorboardX.RecordWriter(str(folder / name))
            self._write(event_pb2.Event(file_version="brain.Event:2"))
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(step=step + 1, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._giving_up_on_errors():
            from tensorboardX import summary
            from tensorboardX.proto import event_pb2

            for name, value in metrics.items():
                self._write(event_pb2.Event(step=step, summary=summary.scalar(name, value)))

    def flush(self) -> None:
        with self._giving_up_on_errors():
            if self._file:
                self._file.flush()

    def close(self) -> None:
        with self._giving_up_on_errors():
            if self._file:
                self._file.close()
        self._file = None

    def _write(self, event: Any) -> None:
        if self._file:
            event.wall_time = time.time()
            self._file.write(event.SerializeToString())

    @contextlib.contextmanager
    def _giving_up_on_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, no run ends over a picture
            self._file = None
            logger.warning("TensorBoard events are no longer written: %s: %s", type(error).__name__, error)


class MetricWriter:
    """Writes rows of metrics to `metrics.jsonl` and TensorBoard.

    Rows that cannot be written, on a full disk, wait in memory and are written later; `flush` insists on them. An
    error of TensorBoard is a warning.

    Objects in a bucket cannot grow. For a workdir there, the files grow in a temporary folder and go up whole, with
    every `flush` and at most once a minute in between.
    """

    def __init__(self, workdir: AnyPath | str, *, step: int):
        """Opens the files and drops the rows that will be made again: a killed run may be ahead of its checkpoint.

        Args:
          workdir: the run's folder. If `metrics.jsonl` there is damaged, it is copied to `metrics.damaged.jsonl`
            first.
          step: the step the run starts from. An evaluation there will be made again too.

        Raises:
          UserError: `metrics.jsonl` cannot be written.
        """

        def stays(row: dict[str, Any]) -> bool:
            evaluated = any(not name.startswith((TRAIN_PREFIX, TIME_PREFIX)) for name in row if name != "step")
            return row["step"] < step or (row["step"] == step and not evaluated)

        workdir = parse(workdir)
        self._remote = workdir if is_remote(workdir) else None
        self._temporary = tempfile.TemporaryDirectory() if self._remote else None
        self._folder = pathlib.Path(self._temporary.name if self._temporary else workdir)
        rows, num_damaged = _read_jsonl(workdir / "metrics.jsonl")
        whole = [row for row in rows if isinstance(row.get("step"), int)]
        path = self._folder / "metrics.jsonl"
        try:
            if num_damaged or len(whole) < len(rows):
                write_atomically(workdir / "metrics.damaged.jsonl", (workdir / "metrics.jsonl").read_bytes())
                logger.warning("%s is damaged; a copy is kept as metrics.damaged.jsonl", workdir / "metrics.jsonl")
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in whole if stays(row)))
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
        self._unwritten = b""
        self._tensorboard = _TensorBoard(self._folder / "tensorboard", step=step)
        self._upload()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row; it is with the operating system when this returns, unless the disk is full.

        Raises:
          UserError: the workdir is in a bucket that cannot be written.
        """
        self._append(json.dumps({"step": step, **metrics}).encode() + b"\n")
        self._tensorboard.write(step, metrics)
        if self._remote and time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self.flush()

    def _append(self, line: bytes) -> OSError | None:
        """Writes what waits and the line; returns what went wrong."""
        waited = bool(self._unwritten)
        self._unwritten += line
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            if not waited:
                logger.warning("cannot write to %s (%s); its rows wait in memory", self._file.name, error.strerror)
            return error
        return None

    def flush(self) -> None:
        """Hands TensorBoard's events to the operating system, too; everything to the bucket.

        Raises:
          UserError: rows of metrics could not be written, or the workdir is in a bucket that cannot be.
        """
        if error := self._append(b""):
            raise UserError(
                f"cannot write to {self._file.name}: {error.strerror or error}. Free some space (or mend the disk) and "
                "run the same command again; it resumes from the newest checkpoint."
            ) from error
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
        self._append(b"")
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
