"""Trains a run in its own process.

So a run that crashes, hangs or takes all memory does not affect others, and each run has the whole accelerator, which
this process never touches. The command is the same that another machine would run.
"""

import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

from vit_jax.errors import UserError
from vit_jax.multihost.signals import Stopped, restore_handlers, set_handlers
from vit_jax.run.workdir import locked
from vit_jax.sweep.trials import SweepRun

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

# Asks Linux for SIGTERM when the sweep's process ends, then becomes the run. `preexec_fn` would run Python between fork
# and exec, which can deadlock where JAX has threads. 1 is PR_SET_PDEATHSIG of linux/prctl.h.
_END_WITH_SWEEP = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the sweep has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""


class FailedRunError(Exception):
    """A run ended with an error; the message says why."""


class Children:
    """Trains one run after the other, and passes signals on to the current one.

    Each run has its own session, so that Ctrl-C at a terminal reaches it only through this process.
    """

    _child: subprocess.Popen | None = None
    _signum: int | None = None

    def __enter__(self) -> "Children":
        self._before = set_handlers(_SIGNALS, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        restore_handlers(self._before)

    def _receive(self, signum: int, _: object) -> None:
        self._signum = signum
        if self._child is not None:
            self._child.send_signal(signum)

    def _check(self) -> None:
        if self._signum is not None:
            raise Stopped(signal.SIGTERM if self._signum == signal.SIGUSR1 else self._signum)

    def train(self, run: SweepRun) -> None:
        """Trains a run to its end.

        Raises:
          FailedRunError: it ended with an error.
          Stopped: this process got a signal and passed it on, or only the run got one.
        """
        self.wait_for_others(run)
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            # A file, because a pipe needs a constant reader and stays open as long as any process of the run.
            self._child = subprocess.Popen(  # noqa: S603 - our own command
                ending_with_this_process(run.command(sys.executable)), stderr=errors, start_new_session=True
            )
            if self._signum is not None:  # it came before the process existed
                self._child.send_signal(self._signum)
            try:
                status = self._child.wait()
            finally:
                self._child = None
            errors.seek(0)
            output = errors.read()
        print(output, end="", file=sys.stderr, flush=True)
        self._check()
        for signum in (signal.SIGTERM, signal.SIGINT):
            if status in (128 + signum, -signum):
                raise Stopped(signum)
        if status:
            raise FailedRunError(reason_of(status, output))

    def wait_for_others(self, run: SweepRun) -> None:
        """Waits while another process trains this run, on another machine or from a killed start."""
        for attempt in itertools.count():
            self._check()
            try:
                with locked(run.path):
                    return
            except UserError as error:
                if "another process" not in str(error):
                    raise
            if attempt == 0:
                logger.info("another process is training %s; waiting for it to end", run.path)
            time.sleep(0.2)


def ending_with_this_process(command: list[str]) -> list[str]:
    """Wraps a command so that Linux sends it SIGTERM when this process ends. Elsewhere, returns it unchanged."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _END_WITH_SWEEP, str(os.getpid()), *command]


def reason_of(status: int, output: str) -> str:
    """The reason why a process failed, from its exit status and stderr."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    _, is_ours, message = f"\n{output}".rpartition("\nerror: ")
    if is_ours:
        return " ".join(message.split())
    lines = output.strip().splitlines()
    exceptions = [line for line in lines if re.match(r"[\w.]+: ", line)]  # JAX adds remarks to its tracebacks
    return (exceptions or lines or [f"exit status {status}"])[-1]
