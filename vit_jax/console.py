"""Text for terminals and files: durations, sizes, names, tables and progress. Imports only fast modules."""

import contextlib
import dataclasses
import datetime
import importlib.util
import io
import logging
import os
import re
import select
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NoReturn, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, separators of lines and paragraphs
_BAR_SECONDS = 0.2  # between updates of a bar
_NUMBER = re.compile(r"[-+]?\d.*|-?")  # a cell that begins as a number, or is empty


def num_cpus() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def format_seconds(seconds: float) -> str:
    """Formats a duration as 0:01:23 or 2 days, 0:01:23."""
    return str(datetime.timedelta(seconds=round(seconds)))


def format_bytes(count: float) -> str:
    """Formats a size as 1.3 TB or 512 bytes."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


# ---- Names of files and classes, as text for any terminal, file and picture.


def show_name(name: str) -> str:
    r"""Escapes unprintable characters: bytes that are not UTF-8 ("caf\xe9.jpg"), control characters, line breaks.

    Python represents bytes of file names that are not UTF-8 as surrogates, which can neither be printed nor encoded.
    """
    if name.isprintable():
        return name
    return "".join(_escape(each) if unicodedata.category(each) in _ESCAPED else each for each in name)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as `os.fsdecode` represents it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def show_names(names: Sequence[str], limit: int = 5) -> str:
    """Formats quoted names, separated by commas; counts those beyond `limit`."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{show_name(name)}'" for name in names[:limit]) + rest


def quote_argument(value: str) -> str:
    """Writes a value of a config's argument so that `config.parse_config_string` reads it: quoted if it has commas."""
    if "," not in value and not value.startswith(("'", '"')):
        return value
    quote = "'" if '"' in value else '"'
    return value.replace(",", "\\,") if quote in value else f"{quote}{value}{quote}"


def encode_text(text: str) -> bytes:
    """Encodes a text of any length as UTF-8, with bytes of names that are not UTF-8 escaped as in `show_name`."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return "".join(_escape(each) if "\ud800" <= each <= "\udfff" else each for each in text).encode()


def print_any_text() -> None:
    """Makes stdout and stderr escape unencodable characters instead of raising. For commands."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, io.UnsupportedOperation):  # replaced, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


# ---- Commands.


def run_command(main: Callable[[list[str]], object]) -> NoReturn:
    """Runs a command with the arguments of this process, and exits with its status.

    Ctrl-C is one line and exit status 130. A reader of stdout that stops early (`| head`) is not an error.
    """
    try:
        try:
            status = main(sys.argv[1:])
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
        sys.stdout.flush()
    except BrokenPipeError:
        if not lost_reader():  # another pipe, such as a worker's
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at its end
        status = 0
    sys.exit(status)  # type: ignore[arg-type]


def lost_reader() -> bool:
    """Whether stdout has lost its reader."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def wrap_parts(parts: Sequence[str], *, columns: int = 111, indent: int = 0) -> str:
    """Joins parts by two spaces into lines of at most `columns` (a log line with its time then has 120).

    Args:
      parts: the texts.
      columns: length of a line.
      indent: spaces before lines but the first.
    """
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= columns:
            lines[-1] += f"  {part}"
        else:
            lines.append(" " * indent + part)
    return "\n".join(lines)


# ---- Tables.


def format_table(
    headings: Sequence[str], rows: Sequence[Sequence[object]], *, num_left: int | None = None, markdown: bool = True
) -> str:
    """Formats an aligned table, which reads well in a terminal too.

    Args:
      headings: headings of the columns.
      rows: their cells, shown by `str` and `show_name`.
      num_left: number of columns that are aligned to the left; the others are aligned to the right. None: columns of
        numbers are aligned to the right.
      markdown: whether to draw the lines of a markdown table; otherwise, spaces separate the columns.

    Returns:
      lines of any length, without a line break at the end.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    texts = [[show_name(str(cell)) for cell in row] for row in rows]
    if num_left is None:
        right = [all(_NUMBER.fullmatch(row[column]) for row in texts) for column in range(len(headings))]
    else:
        right = [column >= num_left for column in range(len(headings))]
    table = Table(box=box.MARKDOWN) if markdown else Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, is_right in zip(headings, right, strict=True):
        table.add_column(Text(show_name(heading)), justify="right" if is_right else "left", no_wrap=True)
    for row in texts:
        table.add_row(*map(Text, row))
    output = io.StringIO()
    Console(file=output, width=10**6, color_system=None, force_terminal=False, force_jupyter=False).print(table)
    lines = [line.rstrip() for line in output.getvalue().splitlines() if line.strip()]
    if markdown:
        rules = lines[1].strip("|").split("|")
        rules = [rule[:-1] + ":" if is_right else rule for rule, is_right in zip(rules, right, strict=True)]
        lines[1] = f"|{'|'.join(rules)}|"
    return "\n".join(lines)


# ---- Progress.


def _print_to_stderr(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Shows the progress of long work, its rate and the time left.

    In terminals and notebooks, a bar that appears after a second and disappears at the end; elsewhere, a line from time
    to time. A context manager.

        with Progress("hash", total=len(paths)) as progress:
            for path in paths:
                ...
                progress.add()
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        *,
        unit: str = "images",
        done: float = 0.0,
        bar: bool = True,
        every_seconds: float = 30.0,
        report: Callable[[str], None] = _print_to_stderr,
    ):
        """Starts the clock.

        Args:
          what: name of the work, such as "scan".
          total: amount of work; None: unknown.
          unit: unit of the work that `add` counts: "images" or "bytes".
          done: the part of `total` that an earlier start did.
          bar: whether to show a bar if possible; False if results are printed to the same terminal.
          every_seconds: time between lines.
          report: called with each line.
        """
        self._what, self._total, self._unit = what, total, unit
        self._first = self._done = done
        self._count, self._start = 0.0, time.monotonic()
        self._every_seconds, self._report = every_seconds, report
        self._bar = _Bar(what, total) if bar and _can_show_bars() else None
        self._shown = 1.0 - _BAR_SECONDS if self._bar else 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, count: float = 1, done: float | None = None) -> None:
        """Counts work in `unit`; `done` is the part of `total` done so far, if `total` has another unit."""
        self._count += count
        self._done = self._done + count if done is None else done
        elapsed = time.monotonic() - self._start
        if elapsed - self._shown >= (_BAR_SECONDS if self._bar else self._every_seconds):
            self._shown = elapsed
            if self._bar:
                self._bar.show(self._done, self._describe(elapsed))
            else:
                self._report(f"{self._what}: {self._describe(elapsed)}")

    def finish(self) -> None:
        """Ends the bar and reports how long everything took."""
        self.__exit__()
        elapsed = max(time.monotonic() - self._start, 1e-9)
        self._report(
            f"{self._what}: {self._amount(self._count)} in {format_seconds(elapsed)}, "
            f"{self._amount(self._count / elapsed)}/s"
        )

    def _amount(self, count: float) -> str:
        if self._unit == "bytes":
            return format_bytes(count)
        digits = 1 if 0 < count < 10 and count != int(count) else 0
        return f"{count:,.{digits}f} {self._unit}"

    def _describe(self, elapsed: float) -> str:
        """The amount, the rate, the share done and the time left."""
        parts = [self._amount(self._count), f"{self._amount(self._count / max(elapsed, 1e-9))}/s"]
        if self._total:
            parts.append(f"{100 * self._done / self._total:.1f} % done")
            if self._done > self._first:
                left = elapsed * max(self._total - self._done, 0) / (self._done - self._first)
                parts.append(f"{format_seconds(left)} left")
        return ", ".join(parts)


class SizedIterable(Protocol[T_co]):
    """Can be iterated repeatedly, and has a length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[T_co]: ...


@dataclasses.dataclass(frozen=True)
class Tracked(Generic[T]):
    """Batches that show their progress during iteration. Can be iterated repeatedly.

    Attributes:
      batches: the batches.
      what: name on the terminal and in the log.
      batch_size: images in a batch.
      every_seconds: time between lines in the log.
      before_each: called before each batch; may raise to end the iteration.
    """

    batches: SizedIterable[T]
    what: str
    batch_size: int
    _: dataclasses.KW_ONLY
    every_seconds: float = 30.0
    before_each: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[T]:
        logger = logging.getLogger("vit_jax")
        with Progress(
            self.what,
            len(self.batches),
            bar=logger.level <= logging.INFO,  # of several processes only the main one logs
            every_seconds=self.every_seconds,
            report=logger.info,
        ) as progress:
            for number, batch in enumerate(self.batches, start=1):
                self.before_each()
                yield batch
                progress.add(self.batch_size, number)


def _can_show_bars() -> bool:
    """Whether stderr is a terminal that can move its cursor, or this is a notebook with the widgets that bars need."""
    if "ipykernel" in sys.modules:
        return importlib.util.find_spec("ipywidgets") is not None
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # replaced, or closed
        return False


class _Bar:
    """A bar that disappears at its end. Lines logged or printed to stderr meanwhile stay intact."""

    def __init__(self, what: str, total: float | None):
        self._what, self._total = what, total
        self._bar: Any = None

    def show(self, done: float, text: str) -> None:
        if self._bar is None:
            self._start()
        self._bar.update(self._task, completed=done, text=text, refresh=True)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        class OurConsole(Console):
            def show_cursor(self, show: bool = True) -> bool:
                return False  # a killed process would leave the terminal without a cursor

        self._console = OurConsole(stderr=True)
        columns = [TextColumn("{task.fields[what]}", markup=False), BarColumn(20)]
        columns.append(TextColumn("{task.fields[text]}", markup=False))
        self._bar = Progress(*columns, console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._task = self._bar.add_task("", total=self._total, what=show_name(self._what), text="")
        self._handlers = list(logging.getLogger().handlers)
        for handler in self._handlers:
            handler.addFilter(self._make_room)
        self._bar.start()

    def _make_room(self, _: logging.LogRecord) -> bool:
        """Clears the bar's line before a line of the log; the next update draws it again."""
        from rich.control import Control, ControlType

        self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
        return True

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            for handler in self._handlers:
                handler.removeFilter(self._make_room)
            self._bar = None
