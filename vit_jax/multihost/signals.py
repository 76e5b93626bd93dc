"""Stops a run on a signal: at once while there is nothing to save, later all processes together."""

import collections
import contextlib
import ctypes
import logging
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_jax.multihost import cloud_notices
from vit_jax.sharding import replicated

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_SAME_NOTICE_SECONDS = 1.0  # `timeout` and schedulers send a signal to a process and again to its group
_LAG = 4  # votes; that many steps run while a vote is computed, so nothing waits for it


class Stopped(Exception):  # noqa: N818 - not an error
    """The run was asked to stop, saved its state and stopped."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def set_handlers(signals: Sequence[int], handler: Any) -> dict[int, Any]:
    """Sets a handler for signals. Does nothing outside the main thread, where Python does not allow it.

    Returns:
      The previous handlers by signal, for `restore_handlers`; empty if none could be set.
    """
    if threading.current_thread() is not threading.main_thread():
        names = ", ".join(signal.Signals(each).name for each in signals)
        logger.info("not in the main thread: %s are left to the program, and neither save nor stop the run", names)
        return {}
    return {each: signal.signal(each, handler) for each in signals}


def restore_handlers(before: Mapping[int, Any]) -> None:
    """Undoes `set_handlers`. The system's default replaces a handler that was not set from Python."""
    for each, handler in before.items():
        signal.signal(each, signal.SIG_DFL if handler is None else handler)


class StopSignal:
    """Stops all processes at the same point on SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 (a notice by SLURM) to any of them.

    A signal may reach one machine only, so processes vote before each step: with a maximum over the devices that is
    computed between the steps and read some steps later.

    A process that only runs this run (`owns_process`) ends at once on a signal before `arm`, and on a second one after
    it: Python's handlers wait for C++ code, such as a long compilation, to return; the system's default does not. In
    another program, such as a notebook, its own handlers get these signals. In a thread no signal stops the run.

    Attributes:
      signum: the signal that asked to stop, or None.
    """

    def __init__(self, *, owns_process: bool = False):
        """Sets no handlers yet: `with` does."""
        self._owns_process = owns_process
        self.signum: int | None = None
        self._armed = self._collective = False
        self._before: dict[int, Any] = {}  # handlers
        self._preemption = contextlib.ExitStack()
        self._again: threading.Timer | None = None
        self._error: Exception | None = None
        self._first = 0.0  # when the first signal came

    def __enter__(self) -> "StopSignal":
        if self._owns_process:
            self._before = set_handlers(_SIGNALS, signal.SIG_DFL)
        return self

    def vote_over(self, mesh: Mesh) -> None:
        """Makes `check` a vote of the processes of a mesh, if there are several."""
        devices = list(mesh.devices.flat)
        self._collective = len({device.process_index for device in devices}) > 1
        self._votes: collections.deque[jax.Array] = collections.deque()
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._num_devices = len(devices)
        self._most = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def arm(self) -> None:
        """Makes a signal, or a preemption notice, ask to stop instead of ending the process at once.

        A second signal, a second or more later, still ends it at once. Further calls change nothing.
        """
        if self._armed:
            return
        self._armed = True
        self._preemption.enter_context(cloud_notices.watch(lambda _: self.ask()))
        if self._owns_process:
            set_handlers(_SIGNALS, self._receive)
        else:
            self._before = set_handlers(_SIGNALS, self._receive_beside_others)

    def __exit__(self, *_: object) -> None:
        self._preemption.close()
        if self._again is not None:
            self._again.cancel()
            self._again.join()
        restore_handlers(self._before)

    def _receive_beside_others(self, signum: int, frame: object) -> None:
        """Lets the first signal ask to stop; passes later ones to the program's own handler."""
        if self.signum is None:
            self._first = time.monotonic()
            self.ask(signum)
            logger.info("%s: saving and stopping", signal.Signals(signum).name)
        elif time.monotonic() - self._first > _SAME_NOTICE_SECONDS:
            handler = self._before[signum]
            if callable(handler):
                handler(signum, frame)
            elif handler != signal.SIG_IGN:
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)

    def _receive(self, signum: int, _: object) -> None:
        self.ask(signum)
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)
        self._again = threading.Timer(_SAME_NOTICE_SECONDS, _end_at_once_on_signals)
        self._again.daemon = True
        self._again.start()
        logger.info("%s: saving and stopping; once more to end at once", signal.Signals(signum).name)

    def ask(self, signum: int = signal.SIGTERM) -> None:
        """Asks to stop, like a signal; callable from any thread."""
        # SLURM's notice then has the same exit status.
        self.signum = signal.SIGTERM if signum == signal.SIGUSR1 else signum

    def fail(self, error: Exception) -> None:
        """Makes `check` raise an error in the loop's thread; callable from any thread."""
        self._error = error

    def check(self) -> None:
        """Raises if any process was asked to stop. All processes must call it at the same points.

        Raises:
          Stopped: at the same call on all processes; with several, some calls after the signal came.
          Exception: the argument of `fail`, only in this process.
        """
        if self._error is not None:
            raise self._error
        if not self._collective:
            if self.signum is not None:
                raise Stopped(self.signum)
            return
        ours = np.full(1, self.signum or 0, np.int32)
        votes = jax.make_array_from_callback((self._num_devices,), self._sharding, lambda _: ours)
        self._votes.append(self._most(votes))
        if len(self._votes) > _LAG and (signum := int(self._votes.popleft())):
            raise Stopped(signum)


def _end_at_once_on_signals() -> None:
    """Sets the system's default. Python can do that only in the main thread, which may be waiting for C++ code."""
    system = ctypes.CDLL(None)
    system.signal.argtypes, system.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    for each in _SIGNALS:
        system.signal(each, signal.SIG_DFL.value)
