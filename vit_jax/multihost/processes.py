"""The processes of a run: how they come up, wait for each other, and notice that one is gone.

All of it goes through JAX's coordination service, a small store of keys in process 0, never through the devices: it
works before there are any, and when they hang. In a single process everything here returns at once.

docs/pods.md tells how to start a run on several hosts, and what happens at which fault.
"""

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from vit_jax.console import encode_text, show_name
from vit_jax.errors import UserError
from vit_jax.json_files import Fields, JsonError, parse_json
from vit_jax.multihost import cluster as clusters
from vit_jax.multihost import rendezvous
from vit_jax.multihost.cluster import Cluster
from vit_jax.multihost.rendezvous import LOST_STATUS, PeerLostError, describe_processes

__all__ = [
    "LOST_STATUS",
    "PeerLostError",
    "announce_failure",
    "barrier",
    "broadcast_from_main",
    "check_same",
    "end_process",
    "initialize",
    "is_main_process",
    "lost_peer",
    "process_count",
    "process_id",
    "shutdown",
]

logger = logging.getLogger(__name__)

_PEERS = "vit_jax/peers"  # <kind>/<process>: beat, failed, left
_GRACE_SECONDS = 5.0  # for the main thread to end by itself once a peer is lost
_SAYING_SECONDS = 5.0  # most that telling the others may take
_LINGER_SECONDS = 10.0  # for others to read why process 0 ends, before the store ends with it
_MAX_SHOWN = 5  # lines that differ
_MAX_MESSAGE = 20_000  # characters of another process's error


_run: "_Run | None" = None  # of this process, if it is one of several


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_seconds: float = 300.0,
    lost_after_seconds: float = 60.0,
) -> None:
    """Brings the processes of a run together; does nothing if this is the only one. Call it before devices are used.

    Which processes there are is told by the three arguments or by the environment: see `multihost.cluster.find`.

    Args:
      coordinator_address: `host:port` of process 0; the port must be free there.
      num_processes: how many processes there are.
      process_id: which of them this is, from 0.
      timeout_seconds: how long to wait for the others.
      lost_after_seconds: a process that gives no sign of life for so long is lost. More than the longest time for which
        Python can be at a standstill in a healthy process.

    Raises:
      PeerLostError: a process does not come up (says which), or this one cannot reach process 0.
      UserError: only some of the arguments are given, or a process does not belong (other number of processes, other
        versions, a number twice).
    """
    global _run  # noqa: PLW0603 - a process is in one run, as for JAX
    cluster = clusters.find(coordinator_address, num_processes, process_id)
    if cluster is None:
        return
    if _run is not None:
        raise UserError("distributed.initialize was called twice.")
    logger.info(
        "process %d of %d, found by %s; waiting for all at %s",
        *(cluster.process_id, cluster.num_processes, cluster.found_by, cluster.coordinator_address),
    )
    hosts = rendezvous.call(cluster, timeout_seconds)
    port = cluster.coordinator_address.rpartition(":")[2]
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away
    _abort_as_lost_peer(cluster, hosts)
    jax.distributed.initialize(
        *(cluster.coordinator_address, cluster.num_processes, cluster.process_id),
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"{rendezvous.bind_host(cluster)}:{port}",
        initialization_timeout=max(30, round(timeout_seconds)),
        # JAX's own answer to a lost process is a core dump; ours comes before it.
        heartbeat_timeout_seconds=round(2 * lost_after_seconds) + 5,
        shutdown_timeout_seconds=30,
    )
    _run = _Run(cluster, hosts, lost_after_seconds)
    logger.info(
        "all %d processes are there: %s", len(hosts), ", ".join(hosts[:16]) + (", …" if len(hosts) > 16 else "")
    )


def process_id() -> int:
    """Which process of the run this is, from 0; touches no devices."""
    return 0 if _run is None else _run.cluster.process_id


def process_count() -> int:
    """How many processes the run has; touches no devices."""
    return 1 if _run is None else _run.cluster.num_processes


def is_main_process() -> bool:
    """Whether this is the process that writes what is written once."""
    return process_id() == 0


def barrier(name: str, timeout_seconds: float = 600.0) -> None:
    """Waits until all processes have come here.

    Args:
      name: says where in the program; may be used again and again.
      timeout_seconds: how long to wait for the last one.

    Raises:
      PeerLostError: not all came; says which did not.
    """
    if _run is not None:
        _run.gather(f"barrier/{name}", "", timeout_seconds, what=name)


def check_same(name: str, value: str, timeout_seconds: float = 600.0) -> None:
    """Checks that a text, such as the config or the command, is the same in all processes.

    Args:
      name: what it is, for the message.
      value: this process's; of several lines those that differ are shown.
      timeout_seconds: how long to wait for the last process.

    Raises:
      UserError: in all processes: which differ from process 0, and in what.
      PeerLostError: not all came; says which did not.
    """
    if _run is None:
        return
    values = _run.gather(f"same/{name}", value, timeout_seconds, what=f"comparison of {name}")
    different = [process for process in sorted(values) if values[process] != values[0]]
    if not different:
        return
    first = different[0]
    theirs, ours = values[first].splitlines(), values[0].splitlines()
    lines = [f"  process {first}: {line}" for line in theirs if line not in ours][:_MAX_SHOWN]
    lines += [f"  process 0: {line}" for line in ours if line not in theirs][:_MAX_SHOWN]
    who = describe_processes(different)
    shown = "\n".join(lines)
    raise UserError(
        f"{name} of {who} ({_run.hosts[first]}) {'is' if len(different) == 1 else 'are'} not that of process 0 "
        f"({_run.hosts[0]}). Run the same command with the same files on every host.\n{shown}"
    )


def broadcast_from_main(name: str, value: Any = None, timeout_seconds: float = 600.0) -> Any:
    """Gives all processes a value of process 0.

    Args:
      name: says what it is; may be used again and again.
      value: what JSON can hold; only that of process 0 counts.
      timeout_seconds: how long to wait for process 0.

    Returns:
      The value of process 0, as it comes back from JSON.

    Raises:
      PeerLostError: process 0 did not come.
    """
    if _run is None:
        return json.loads(json.dumps(value))
    return _run.broadcast(name, value, timeout_seconds)


def lost_peer(error: BaseException) -> PeerLostError | None:
    """Tells whether an error came about because another process is gone.

    A collective, a barrier or a save that misses a process fails in as many ways as there are libraries. So this asks
    those who watch the processes, and waits for their verdict if the error may be one of communication.

    Args:
      error: what a collective, a barrier or a save raised.

    Returns:
      What to report and end with, or None if all processes live.
    """
    cause: BaseException | None = error
    while cause is not None:  # others may have wrapped it
        if isinstance(cause, PeerLostError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None if _run is None else _run.verdict(wait=_may_be_communication(error))


def announce_failure(message: str, exit_status: int = 1) -> None:
    """Tells the other processes that this one is about to end by an error of its own, so that they can say why.

    They end with the same status. Telling them takes 5 s at most. Process 0 then waits, for 10 s at most, until they
    have heard it.

    Args:
      message: of the error.
      exit_status: what this process ends with.
    """
    if _run is not None:
        _run.announce_failure(message, exit_status)


def shutdown(timeout_seconds: float = 600.0) -> None:
    """Leaves the run in good order: waits until all processes are here, then disconnects.

    Not after an error of one process: see `announce_failure`.

    Args:
      timeout_seconds: how long to wait for the others.

    Raises:
      PeerLostError: not all came; says which did not.
    """
    global _run
    if _run is None:
        return
    run, _run = _run, None
    run.leave(timeout_seconds)
    jax.distributed.shutdown()
    _restore_abort()


# What the runtime calls errors of communication. They come as JaxRuntimeError, as ValueError (from a jitted call, with
# gloo), and inside what Orbax raises.
_COMMUNICATION = re.compile(
    r"\b(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|DATA_LOSS): "
)


def _may_be_communication(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (TimeoutError, ConnectionError)) or _COMMUNICATION.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _restart(reason: str) -> PeerLostError:
    return PeerLostError(f"{reason} Restart the same command on all hosts; it goes on from the newest checkpoint.")


@dataclasses.dataclass
class _Seen:
    """The last beat of a process, and when it was new by this host's clock."""

    beat: str
    at: float


class _Run:
    """This process's part in a run of several."""

    def __init__(self, cluster: Cluster, hosts: list[str], lost_after_seconds: float):
        self.cluster, self.hosts = cluster, hosts
        self._lost_after = lost_after_seconds
        # JAX documents no way to its store of keys; its own multihost helpers keep it here in JAX 0.10 to 0.12.
        self._store: Any = multihost_utils.distributed.global_state.client
        self._uses: dict[str, int] = {}
        self._verdict: PeerLostError | None = None
        self._lost: set[int] = set()
        self._decided = threading.Event()
        self._leaving = threading.Event()
        now = time.monotonic()
        self._seen = {each: _Seen("", now) for each in range(len(hosts)) if each != cluster.process_id}
        self._answered = now  # when the store last did
        # So that of many processes no more than some 32 a second ask for the beats of all.
        self._interval = min(max(1.0, len(hosts) / 32), lost_after_seconds / 4)
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=f"distributed.{target.__name__}", daemon=True).start()

    @property
    def reason(self) -> PeerLostError | None:
        """Why this process ends, if that is decided."""
        return self._verdict

    # What all do together.

    def gather(self, name: str, value: str, timeout_seconds: float, what: str) -> dict[int, str]:
        """The values of all processes, when all have come."""
        use = self._uses[name] = self._uses.get(name, 0) + 1
        folder = f"vit_jax/{name}/{use}"
        self._store.key_value_set(f"{folder}/{self.cluster.process_id}", value)
        if use > 2:  # all have read those of the use before the last
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._store.key_value_delete(f"vit_jax/{name}/{use - 2}/{self.cluster.process_id}")
        try:
            self._store.wait_at_barrier(folder, round(timeout_seconds * 1000))
        except jax.errors.JaxRuntimeError as error:
            if self._verdict:
                raise self._verdict from error
            missing = sorted(set(range(len(self.hosts))) - self._read(folder).keys())
            again = "restart the same command on all hosts, and it goes on from the newest checkpoint."
            if not missing:
                raise PeerLostError(
                    f"not all processes came to {what!r} within {timeout_seconds:g} s; {again}"
                ) from error
            raise PeerLostError(
                f"{self._name(missing)} did not come to {what!r} within {timeout_seconds:g} s. See what the log there "
                f"says last; {again}"
            ) from error
        return self._read(folder)

    def broadcast(self, name: str, value: Any, timeout_seconds: float) -> Any:
        use = self._uses[f"broadcast/{name}"] = self._uses.get(f"broadcast/{name}", 0) + 1
        key = f"vit_jax/broadcast/{name}/{use}"
        if self.cluster.process_id == 0:
            self._store.key_value_set(key, json.dumps(value))
        try:
            return parse_json(self._store.blocking_key_value_get(key, round(timeout_seconds * 1000)), name)
        except (jax.errors.JaxRuntimeError, JsonError) as error:
            if self._verdict:
                raise self._verdict from error
            raise PeerLostError(f"{self._name([0])} did not say {name!r} within {timeout_seconds:g} s.") from error

    def leave(self, timeout_seconds: float) -> None:
        """Waits for the others; from then on nobody is missed."""
        self._put("left", "")
        self.gather("barrier/shutdown", "", timeout_seconds, what="the end of the run")
        self._leaving.set()

    def announce_failure(self, message: str, exit_status: int) -> None:
        if self._verdict:  # the failure of another is what the others will hear of
            return
        self._leaving.set()

        def say() -> None:
            try:
                self._put("failed", json.dumps({"message": message, "exit_status": exit_status}))
            except jax.errors.JaxRuntimeError:
                logger.warning("the other processes could not be told that this one ends")

        saying = threading.Thread(target=say, daemon=True)
        saying.start()
        saying.join(_SAYING_SECONDS)  # the store may hang
        if self.cluster.process_id == 0:
            self._before_the_end()

    def verdict(self, *, wait: bool) -> PeerLostError | None:
        if wait:
            self._decided.wait(self._lost_after + 3 * self._interval)
        if self._verdict is not None:
            self._before_the_end()  # to which the caller is about to come
        return self._verdict

    def _before_the_end(self) -> None:
        """Says that this process knows why it ends; process 0 waits until all that live have said so.

        Its store ends with it, and who still needs that is ended by JAX, with a core dump instead of a message.
        """
        if self.cluster.process_id != 0:
            say = threading.Thread(target=self._say_heard, daemon=True)
            say.start()
            say.join(1)  # the store may hang
            return
        deadline = time.monotonic() + _LINGER_SECONDS
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the main thread may have left already
            while time.monotonic() < deadline:
                knowing = self._read(f"{_PEERS}/heard").keys() | self._read(f"{_PEERS}/failed").keys()
                if not set(self._seen) - self._lost - knowing:
                    break
                time.sleep(0.1)
            time.sleep(0.2)

    # Watching.

    def _beat(self) -> None:
        """Shows that this process lives and reads what the others show. May hang with the store."""
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
                self._hear(kind, process, value, now)

    def _hear(self, kind: str, process: int | None, value: str, now: float) -> None:
        """Takes in what a process shows; what none of this run's can have written is ignored."""
        if process is None or process not in self._seen:
            return
        if kind == "beat" and self._seen[process].beat != value:
            self._seen[process] = _Seen(value, now)
        elif kind == "left":
            del self._seen[process]
        elif kind == "failed" and (failure := _parse_failure(value)):
            message, status = failure
            text = f"{self._name([process])} ended with: {message}"
            self._decide(_restart(text) if status == LOST_STATUS else PeerLostError(text, status), {process})

    def _watch(self) -> None:
        """Decides that a process is lost. Touches nothing that can hang."""
        looked = time.monotonic()
        while not self._leaving.wait(min(0.5, self._interval)):
            now = time.monotonic()
            if now - looked > self._lost_after / 2:
                # This process itself was at a standstill, and has heard of nobody meanwhile.
                self._answered = now
                for seen in list(self._seen.values()):
                    seen.at = now
            looked = now
            if now - self._answered > self._lost_after:
                self._decide(
                    _restart(f"{self._name([0])} is gone: it has not answered for {self._lost_after:g} s."), {0}
                )
                continue
            missing = [each for each, seen in list(self._seen.items()) if now - seen.at > self._lost_after]
            if missing:
                verb = "is" if len(missing) == 1 else "are"
                self._decide(
                    _restart(f"{self._name(sorted(missing))} {verb} gone: no sign of life for {self._lost_after:g} s."),
                    set(missing),
                )

    def _decide(self, verdict: PeerLostError, lost: set[int]) -> None:
        """Publishes the verdict, and ends the process if the main thread does not."""
        if self._verdict is not None or self._leaving.is_set():
            return
        self._verdict, self._lost = verdict, lost
        self._decided.set()
        threading.Thread(target=self._end, args=(verdict,), name="distributed.end", daemon=True).start()

    def _end(self, verdict: PeerLostError) -> None:
        """Ends the process: a collective that waits for a lost process cannot be interrupted."""
        time.sleep(_GRACE_SECONDS)
        self._before_the_end()
        end_process(str(verdict), verdict.exit_status)

    def _say_heard(self) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._put("heard", "")

    # The store.

    def _put(self, kind: str, value: str) -> None:
        self._store.key_value_set(f"{_PEERS}/{kind}/{self.cluster.process_id}", value, allow_overwrite=True)

    def _read(self, folder: str) -> dict[int, str]:
        found = {_parse_key(key)[1]: value for key, value in self._store.key_value_dir_get(f"{folder}/")}
        return {process: value for process, value in found.items() if process is not None and process < len(self.hosts)}

    def _name(self, processes: list[int]) -> str:
        if len(processes) == 1:
            return f"process {processes[0]} ({self.hosts[processes[0]]})"
        return describe_processes(processes)


def _parse_key(key: str) -> tuple[str, int | None]:
    """The part of a key before the last `/`, and the process after it; None if that is no number."""
    kind, _, process = key.rpartition("/")
    return kind, int(process) if re.fullmatch("[0-9]{1,9}", process) else None


def _parse_failure(value: str) -> tuple[str, int] | None:
    """Message and exit status of `announce_failure`; None if it cannot have written this."""
    try:
        said = Fields(parse_json(value, "the failure"), "the failure")
        lines = said.text("message")[:_MAX_MESSAGE].splitlines()
        return "\n".join(map(show_name, lines)), said.integer("exit_status", at_least=1, at_most=255)
    except JsonError:
        return None


def end_process(message: str, exit_status: int) -> None:
    """Prints an error and ends this process at once, whatever its threads do.

    Args:
      message: for people.
      exit_status: of the process.
    """
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, encode_text(f"error: {message}\n"))
    os._exit(exit_status)


_handler: Any = None  # must outlive its use by C


def _abort_as_lost_peer(cluster: Cluster, hosts: list[str]) -> None:
    """Turns the core dump by which JAX answers the end of process 0 into one message and an exit status.

    When the connection to the coordination service breaks, its client calls abort(), within milliseconds and from a
    thread of its own. Python's handlers run in the main thread, which never comes to it; one of C does.
    """
    global _handler  # noqa: PLW0603 - as above
    if cluster.process_id == 0:
        return  # it is its own service
    host, _, port = cluster.coordinator_address.rpartition(":")

    def on_abort(_: int) -> None:
        lost = None if _run is None else _run.reason
        if lost is None:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            except OSError:
                lost = _restart(f"process 0 ({hosts[0]}) is gone: the connection to it broke.")
        if lost is not None:
            end_process(str(lost), lost.exit_status)
        _restore_abort()  # something else: abort() ends the process when we return

    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


def _restore_abort() -> None:
    ctypes.CDLL(None).signal(signal.SIGABRT, None)  # SIG_DFL
