"""Ends a run whose steps hang, and shows where each thread was.

A collective that waits for a lost device or process cannot be interrupted from Python, and costs as much as one at
work.
"""

import contextlib
import faulthandler
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from vit_jax.files import AnyPath, parse_path
from vit_jax.multihost import processes
from vit_jax.multihost.heartbeats import end_process

logger = logging.getLogger(__name__)

HUNG_STATUS = 70  # exit status: a step hung; restart. EX_SOFTWARE of sysexits.h

_LONGER = 4  # factor on the time of the first step, which compiles, and of work inside `allow`
_ALARM_SECONDS = 60.0  # from this alarm to the interpreter's own
_WRITING_SECONDS = 20.0  # for the file with the stacks, which may be in a bucket that does not answer


class Watchdog:
    """Ends the process with `HUNG_STATUS` if no step is done for too long; see `beat` and `allow`.

    If the run is only a part of a program (`owns_process` is False), it logs the same message instead, once for each
    step that hangs.

    The stacks of all threads go to standard error and to `<folder>/stacks-<process>.txt`. If Python itself hangs (in C
    code that holds the interpreter's lock), they go to standard error a minute later, and this process does not end;
    the other processes miss its heartbeats.
    """

    def __init__(
        self,
        timeout_seconds: float,
        folder: AnyPath | str,
        *,
        allowance_seconds: float | None = None,
        owns_process: bool = True,
    ):
        """Makes a watchdog; `with` starts it.

        Args:
          timeout_seconds: longest time of a step; 0: no watchdog.
          folder: folder for the stacks; may be in a bucket.
          allowance_seconds: longest time of the first step, and the default of `allow`; None: 4 times as long.
          owns_process: whether the process may be ended.
        """
        self._owns_process = owns_process
        self._timeout = timeout_seconds
        self._allowance = _LONGER * timeout_seconds if allowance_seconds is None else allowance_seconds
        self._folder = parse_path(folder)
        self._tick = min(1.0, timeout_seconds / 20)
        # What is watched, and its allowance. The innermost counts.
        self._watched = [("the first step", self._allowance)]
        self._elapsed = 0.0
        self._reported: str | None = None  # the label of the last message
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._timeout:
            self._thread.join()

    def beat(self, step: int) -> None:
        """Records that a step is done; the next may take `timeout_seconds`."""
        with self._lock:
            self._watched[0] = (f"step {step + 1}", self._timeout)
            self._elapsed = 0.0

    @contextlib.contextmanager
    def allow(self, label: str, seconds: float | None = None) -> Iterator[None]:
        """Gives work that is not a step its own time: as much as the first step has, or `seconds`.

        Afterwards, the time of the step restarts.
        """
        with self._lock:
            self._watched.append((label, self._allowance if seconds is None else seconds))
            self._elapsed = 0.0
        try:
            yield
        finally:
            with self._lock:
                self._watched.pop()
                self._elapsed = 0.0

    def _watch(self) -> None:
        looked = time.monotonic()
        try:
            while not self._ended.wait(self._tick):
                now = time.monotonic()
                with self._lock:
                    # Time for which this process or its machine was stopped does not count.
                    self._elapsed += min(now - looked, 5 * self._tick)
                    label, allowed = self._watched[-1]
                    elapsed = self._elapsed
                looked = now
                if elapsed > allowed and label != self._reported:
                    self._reported = label
                    self._end(label, allowed)
                # If Python hangs, so does this thread, and the interpreter's own alarm goes off. It must not end the
                # process, because it also counts time in which the process was stopped (Ctrl-Z).
                faulthandler.dump_traceback_later(max(0.0, allowed - elapsed) + _ALARM_SECONDS, file=2)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, label: str, allowed: float) -> None:
        stacks = _describe_threads()
        print(stacks, file=sys.stderr, flush=True)
        path = self._folder / f"stacks-{processes.process_id()}.txt"

        def write() -> None:
            with contextlib.suppress(Exception):  # standard error has the stacks too
                path.write_text(stacks)

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        writing.join(_WRITING_SECONDS)
        found = f"{label} has not ended for {allowed:g} s; the stacks of all threads are above and in {path}."
        slow = "If it is just slow, raise watchdog_seconds (0: no watchdog)."
        if not self._owns_process:
            logger.error(
                "%s Restart this program if the step does not end; the run resumes from the newest checkpoint. %s",
                found,
                slow,
            )
            return
        message = f"{found} Restart the same command on all hosts to resume from the newest checkpoint. {slow}"
        processes.announce_failure(message, HUNG_STATUS)
        end_process(message, HUNG_STATUS)


def _describe_threads() -> str:
    """Lists the names and positions of all threads."""
    names = "\n".join(f"  {thread.ident:#018x} {thread.name}" for thread in threading.enumerate() if thread.ident)
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return f"Threads:\n{names}\n\n{file.read().decode()}"
