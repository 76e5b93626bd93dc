"""Heartbeats: each process of a run shows that it is alive, and notices when another is not.

They go through JAX's coordination service, a key-value store in process 0, not through the devices, so they work when
devices hang. Anybody who reaches the port can write keys; values that no process of this run could have written are
ignored.
"""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from typing import Any

import jax

from vit_jax.console import encode_text, show_name
from vit_jax.json_files import Fields, JsonError, parse_json
from vit_jax.multihost.rendezvous import LOST_STATUS, PeerLostError, describe_processes

logger = logging.getLogger(__name__)

_PEERS = "vit_jax/peers"  # <kind>/<process>; the kinds are beat, failed, heard and left
_GRACE_SECONDS = 5.0  # for the main thread to end by itself once a peer is lost
_ANNOUNCING_SECONDS = 5.0
_LINGER_SECONDS = 10.0  # for others to read why process 0 ends, because the store ends with it
_MAX_MESSAGE = 20_000  # characters of another process's error


def end_process(message: str, exit_status: int) -> None:
    """Prints an error and ends this process at once, even if its threads hang."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, encode_text(f"error: {message}\n"))
    os._exit(exit_status)


def name_processes(processes: list[int], hosts: list[str]) -> str:
    """Formats `process 3 (host-d)`, or the numbers of several."""
    if len(processes) == 1:
        return f"process {processes[0]} ({hosts[processes[0]]})"
    return describe_processes(processes)


def read_values(store: Any, folder: str, num_processes: int) -> dict[int, str]:
    """Reads the values that processes put into a folder of the store."""
    found = {_parse_key(key)[1]: value for key, value in store.key_value_dir_get(f"{folder}/")}
    return {process: value for process, value in found.items() if process is not None and process < num_processes}


def gone(reason: str) -> PeerLostError:
    """Makes the error for a process that is gone, which ends the run."""
    return PeerLostError(f"{reason} Restart the same command on all hosts to resume from the newest checkpoint.")


class Heartbeats:
    """Sends this process's heartbeats and watches those of the others.

    Attributes:
      verdict: why this process has to end, or None.
    """

    def __init__(self, store: Any, process: int, hosts: list[str], lost_after_seconds: float):
        """Starts the threads; `store` is the client of JAX's coordination service."""
        self._store, self._process, self._hosts, self._lost_after = store, process, hosts, lost_after_seconds
        self.verdict: PeerLostError | None = None
        self._lost: set[int] = set()
        self._decided = threading.Event()
        self._leaving = threading.Event()
        now = time.monotonic()
        # The last heartbeat of each peer, and when it was new by this host's clock.
        self._seen = {peer: ("", now) for peer in range(len(hosts)) if peer != process}
        self._left: set[int] = set()
        self._answered = now  # when the store last answered
        # At most some 32 reads of all heartbeats a second, however many processes there are.
        self._interval = min(max(1.0, len(hosts) / 32), lost_after_seconds / 4)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=f"heartbeats.{target.__name__}", daemon=True).start()

    def leave(self) -> None:
        """Tells the others that this process ends as planned."""
        self._put("left", "")

    def stop(self) -> None:
        """Ends the heartbeats and the watch."""
        self._leaving.set()

    def announce_failure(self, message: str, exit_status: int) -> None:
        """See `processes.announce_failure`."""
        if self.verdict:  # the others will hear of the failure that caused it
            return
        self._leaving.set()
        self._put_in_time("failed", json.dumps({"message": message, "exit_status": exit_status}), _ANNOUNCING_SECONDS)
        if self._process == 0:
            self._acknowledge()

    def take_verdict(self, *, wait: bool = False) -> PeerLostError | None:
        """Returns the verdict, if any; the caller then ends the process. `wait` until a lost process is noticed."""
        if wait:
            self._decided.wait(self._lost_after + 3 * self._interval)
        if self.verdict is not None:
            self._acknowledge()
        return self.verdict

    def _acknowledge(self) -> None:
        """Acknowledges the verdict; process 0 waits until all living processes have done so.

        The store ends with process 0, and JAX ends processes that still need it with a core dump instead of a message.
        """
        if self._process != 0:
            self._put_in_time("heard", "", 1.0)
            return
        deadline = time.monotonic() + _LINGER_SECONDS
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the main thread may have left already
            while time.monotonic() < deadline:
                waiting = self._seen.keys() - self._left - self._lost
                for kind in ("heard", "failed"):
                    waiting -= read_values(self._store, f"{_PEERS}/{kind}", len(self._hosts)).keys()
                if not waiting:
                    break
                time.sleep(0.1)
            time.sleep(0.2)

    def _beat(self) -> None:
        """Writes this process's heartbeat and reads the others'. May hang with the store."""
        count = 0
        while not self._leaving.wait(self._interval):
            count += 1
            try:
                self._put("beat", str(count))
                shown = self._store.key_value_dir_get(f"{_PEERS}/")
            except jax.errors.JaxRuntimeError as error:
                logger.debug("the coordination service did not answer: %s", error)
                continue
            self._answered = now = time.monotonic()
            for key, value in shown:
                kind, process = _parse_key(key.removeprefix(f"{_PEERS}/"))
                if process is not None and process in self._seen:
                    self._hear(kind, process, value, now)

    def _hear(self, kind: str, process: int, value: str, now: float) -> None:
        if kind == "beat" and self._seen[process][0] != value:
            self._seen[process] = (value, now)
        elif kind == "left":
            self._left.add(process)
        elif kind == "failed" and (failure := _parse_failure(value)):
            message, status = failure
            text = f"{name_processes([process], self._hosts)} ended with: {message}"
            self._decide(gone(text) if status == LOST_STATUS else PeerLostError(text, status), {process})

    def _watch(self) -> None:
        """Decides that a process is lost. Touches nothing that can hang."""
        looked = time.monotonic()
        while not self._leaving.wait(min(0.5, self._interval)):
            now = time.monotonic()
            if now - looked > self._lost_after / 2:
                # This process itself was stopped and read no heartbeats meanwhile.
                self._answered = now
                self._seen = {peer: (beat, now) for peer, (beat, _) in self._seen.items()}
            looked = now
            lost, reason = self._find_lost(now)
            if lost:
                verb = "is" if len(lost) == 1 else "are"
                self._decide(gone(f"{name_processes(lost, self._hosts)} {verb} gone: {reason}"), set(lost))

    def _find_lost(self, now: float) -> tuple[list[int], str]:
        """Finds the lost processes, and the reason."""
        if now - self._answered > self._lost_after:
            return [0], f"it has not answered for {self._lost_after:g} s."
        # Up to the last answer: since then, only process 0 may be at fault.
        lost = {peer for peer, (_, at) in self._seen.items() if self._answered - at > self._lost_after}
        return sorted(lost - self._left), f"no sign of life for {self._lost_after:g} s."

    def _decide(self, verdict: PeerLostError, lost: set[int]) -> None:
        """Publishes the verdict, and ends the process if the main thread does not."""
        if self.verdict is not None or self._leaving.is_set():
            return
        self.verdict, self._lost = verdict, lost
        self._decided.set()
        threading.Thread(target=self._end, args=(verdict,), name="heartbeats.end", daemon=True).start()

    def _end(self, verdict: PeerLostError) -> None:
        """Ends the process: a collective that waits for a lost process cannot be interrupted."""
        time.sleep(_GRACE_SECONDS)
        self._acknowledge()
        end_process(str(verdict), verdict.exit_status)

    def _put(self, kind: str, value: str) -> None:
        self._store.key_value_set(f"{_PEERS}/{kind}/{self._process}", value, allow_overwrite=True)

    def _put_in_time(self, kind: str, value: str, seconds: float) -> None:
        """Writes to the store, which may hang or be gone."""

        def put() -> None:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._put(kind, value)

        thread = threading.Thread(target=put, daemon=True)
        thread.start()
        thread.join(seconds)


def _parse_key(key: str) -> tuple[str, int | None]:
    """The part of a key before the last `/`, and the process after it; None if that is not a number."""
    kind, _, process = key.rpartition("/")
    return kind, int(process) if re.fullmatch("[0-9]{1,9}", process) else None


def _parse_failure(value: str) -> tuple[str, int] | None:
    """Message and exit status of `announce_failure`; None if it could not have written this."""
    try:
        failure = Fields(parse_json(value, "the failure"), "the failure")
        lines = failure.text("message")[:_MAX_MESSAGE].splitlines()
        return "\n".join(map(show_name, lines)), failure.integer("exit_status", at_least=1, at_most=255)
    except JsonError:
        return None
