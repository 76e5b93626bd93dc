"""The files of a run's metrics: `metrics.jsonl`, and TensorBoard's events."""

import contextlib
import json
import logging
import pathlib
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.files import AnyPath, is_remote, parse_path, write_atomically
from vit_jax.json_files import JsonError, read_json_lines

logger = logging.getLogger(__name__)

# Metrics that depend on the machine and its load; all others are equal in every run of a config and seed.
TIME_PREFIX = "time/"
TRAIN_PREFIX = "train/"

_UPLOAD_SECONDS = 60.0


def read_jsonl(path: AnyPath | str) -> list[dict[str, Any]]:
    """Reads the rows of a JSON-lines file; [] if it does not exist.

    Skips damaged lines with a warning, and an incomplete last line, left by a kill, without one.
    """
    return _read_jsonl(parse_path(path))[0]


def _read_jsonl(path: AnyPath) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows of a JSON-lines file, and the number of its damaged lines."""
    if not path.exists():
        return [], 0
    rows: list[Any] = []  # in the order of the lines; an error where a line is not JSON
    for _, row in read_json_lines(path, allow_nan=True, on_error=rows.append):
        rows.append(row)
    if rows and isinstance(rows[-1], JsonError) and not path.read_bytes().endswith(b"\n"):
        del rows[-1]  # cut off by a kill, or being written
    whole = [row for row in rows if isinstance(row, dict)]
    if num_damaged := len(rows) - len(whole):
        logger.warning("%s: skipped %d damaged lines of %d", path, num_damaged, len(rows))
    return whole, num_damaged


class _TensorBoard:
    """Writes scalars as TensorBoard events, in the calling thread. After an error it warns once and stops writing.

    tensorboardX's own `SummaryWriter` hands events to a thread over a bounded queue. When that thread dies, which
    happens when the wall clock is set back by weeks, the caller waits forever.
    """

    _writer: Any = None

    def __init__(self, folder: pathlib.Path, *, step: int):
        with self._stopping_at_errors():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import SessionLog

            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{uuid.uuid4().hex[:8]}")
            # TensorBoard then drops the events of later steps in older files.
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._stopping_at_errors():
            from tensorboardX.summary import scalar

            for name, value in metrics.items() if self._writer else ():
                self._add(step, summary=scalar(name, value))

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        with self._stopping_at_errors():
            if self._writer:
                self._writer.flush()

    def close(self) -> None:
        with self._stopping_at_errors():
            if self._writer:
                self._writer.close()

    @contextlib.contextmanager
    def _stopping_at_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorBoard must not end a run
            self._writer = None
            logger.warning("TensorBoard events are no longer written: %s: %s", type(error).__name__, error)


class MetricWriter:
    """Writes rows of metrics to `metrics.jsonl` and TensorBoard.

    While the disk is full, rows wait in memory; `flush` raises if they still cannot be written. Objects in a bucket
    cannot grow: there, the files grow in a temporary folder and are uploaded by `flush`, and at most once a minute
    between two of them.
    """

    def __init__(self, workdir: AnyPath | str, *, step: int):
        """Opens the files, and drops rows after `step`, the last step done: they will be written again.

        Its evaluations will be repeated, too. A damaged `metrics.jsonl` is first copied to `metrics.damaged.jsonl`.

        Raises:
          UserError: `metrics.jsonl` cannot be written.
        """
        workdir = parse_path(workdir)
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
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in whole if _is_kept(row, step)))
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
        self._unwritten = b""
        self._tensorboard = _TensorBoard(self._folder / "tensorboard", step=step)
        self._upload()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row; raises `UserError` if a bucket cannot be written. While the disk is full, the row waits."""
        self._append(json.dumps({"step": step, **metrics}).encode() + b"\n")
        self._tensorboard.write(step, metrics)
        if self._remote and time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self.flush()

    def _append(self, line: bytes) -> OSError | None:
        """Writes waiting rows and this one; returns the error if that fails."""
        waiting, self._unwritten = self._unwritten, self._unwritten + line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not waiting:
                logger.warning("cannot write to %s (%s); its rows wait in memory", self._file.name, error.strerror)
            return error
        return None

    def flush(self) -> None:
        """Hands all rows to the operating system, or to the bucket; raises `UserError` if that fails."""
        if error := self._append(b""):
            raise UserError(
                f"cannot write to {self._file.name}: {error.strerror or error}. Free some space, or repair the disk, "
                "and run the same command again to resume from the newest checkpoint."
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


def _is_kept(row: Mapping[str, Any], step: int) -> bool:
    """Whether to keep a row when a run resumes after a step, because it will not be written again."""
    is_evaluation = any(not name.startswith((TRAIN_PREFIX, TIME_PREFIX)) for name in row if name != "step")
    return row["step"] < step or (row["step"] == step and not is_evaluation)
