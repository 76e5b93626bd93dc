"""The processes of a run: they connect, wait for each other, and compare values that must be equal.

Everything goes through JAX's coordination service, a key-value store in process 0, never through the devices. In a
single process every function here returns at once.

docs/pods.md explains how to start a run on several hosts, and what happens after each fault.
"""

import contextlib
import ctypes
import json
import logging
import re
import signal
import socket
from typing import Any

import jax
from jax.experimental import multihost_utils

from vit_jax.errors import UserError
from vit_jax.json_files import parse_json
from vit_jax.multihost import cluster as clusters
from vit_jax.multihost import rendezvous
from vit_jax.multihost.cluster import Cluster
from vit_jax.multihost.heartbeats import Heartbeats, end_process, gone, name_processes, read_values
from vit_jax.multihost.rendezvous import PeerLostError, describe_processes

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 600.0  # for the last process to reach a barrier
_MAX_SHOWN = 5  # differing lines in an error


class _Run:
    """The run of several processes that this process belongs to."""

    def __init__(self, cluster: Cluster, hosts: list[str], lost_after_seconds: float):
        self.cluster, self.hosts = cluster, hosts
        # JAX documents no access to its key-value store; its own multihost helpers keep it here in JAX 0.10 to 0.12.
        self.store: Any = multihost_utils.distributed.global_state.client
        self.heartbeats = Heartbeats(self.store, cluster.process_id, hosts, lost_after_seconds)
        self.uses: dict[str, int] = {}  # how often each barrier, comparison or broadcast was used

    def gather(self, name: str, value: str, what: str) -> dict[int, str]:
        """Returns the values of all processes once all have arrived."""
        use = self.uses[name] = self.uses.get(name, 0) + 1
        folder, ours = f"vit_jax/{name}/{use}", self.cluster.process_id
        self.store.key_value_set(f"{folder}/{ours}", value)
        if use > 2:  # every process has read the values of the use before the last
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self.store.key_value_delete(f"vit_jax/{name}/{use - 2}/{ours}")
        try:
            self.store.wait_at_barrier(folder, round(_TIMEOUT_SECONDS * 1000))
        except jax.errors.JaxRuntimeError as error:
            if self.heartbeats.verdict:
                raise self.heartbeats.verdict from error
            arrived = read_values(self.store, folder, len(self.hosts)).keys()
            missing = sorted(set(range(len(self.hosts))) - arrived)
            who = f"{name_processes(missing, self.hosts)} did not arrive" if missing else "not all processes arrived"
            raise gone(f"{who} at {what!r} within {_TIMEOUT_SECONDS:g} s; see the logs for the reason.") from error
        return read_values(self.store, folder, len(self.hosts))


_run: _Run | None = None  # None: this is the only process


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_seconds: float = 300.0,
    lost_after_seconds: float = 60.0,
) -> None:
    """Connects the processes of a run; does nothing if this is the only one. Call it before devices are used.

    The three arguments or the environment describe the processes: see `multihost.cluster.find`.

    Args:
      coordinator_address: `host:port` of process 0; the port must be free there.
      num_processes: number of processes.
      process_id: number of this one, from 0.
      timeout_seconds: how long to wait for the others.
      lost_after_seconds: time without a heartbeat after which a process is lost. Must exceed the longest pause of
        Python in a healthy process.

    Raises:
      PeerLostError: a process does not start (the message names it), or this one cannot reach process 0.
      UserError: only some of the arguments are given, or a process does not belong (another number of processes, other
        versions, or a duplicate process number).
    """
    global _run  # noqa: PLW0603 - a process is in one run, as for JAX
    cluster = clusters.find(coordinator_address, num_processes, process_id)
    if cluster is None:
        return
    if _run is not None:
        raise UserError("processes.initialize was called twice.")
    address, number = cluster.coordinator_address, cluster.process_id
    logger.info(
        "process %d of %d (from %s); waiting for all at %s", number, cluster.num_processes, cluster.found_by, address
    )
    hosts = rendezvous.call(cluster, timeout_seconds)
    jax.config.update("jax_enable_preemption_service", False)  # it would take over SIGTERM
    _abort_as_lost_peer(cluster, hosts)
    jax.distributed.initialize(
        *(address, cluster.num_processes, number),
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"{rendezvous.bind_host(cluster)}:{address.rpartition(':')[2]}",
        initialization_timeout=max(30, round(timeout_seconds)),
        # JAX answers a lost process with a core dump; our message comes before it.
        heartbeat_timeout_seconds=round(2 * lost_after_seconds) + 5,
        shutdown_timeout_seconds=30,
    )
    _run = _Run(cluster, hosts, lost_after_seconds)
    logger.info("all %d processes are connected: %s%s", len(hosts), ", ".join(hosts[:16]), ", …" * (len(hosts) > 16))


def process_id() -> int:
    """The number of this process, from 0; touches no devices."""
    return 0 if _run is None else _run.cluster.process_id


def process_count() -> int:
    """The number of processes; touches no devices."""
    return 1 if _run is None else _run.cluster.num_processes


def is_main_process() -> bool:
    """Whether this is process 0, which writes the files that are written once."""
    return process_id() == 0


def barrier(name: str) -> None:
    """Waits until all processes arrive. A name may be reused.

    Raises:
      PeerLostError: not all arrived within 10 minutes; the message names the missing ones.
    """
    if _run is not None:
        _run.gather(f"barrier/{name}", "", what=name)


def check_same(name: str, value: str) -> None:
    """Checks that a text, such as the config or the command, is the same in all processes. `name` says what it is.

    Raises:
      UserError: in all processes; says which of them differ from process 0, and in which lines.
      PeerLostError: as in `barrier`.
    """
    if _run is None:
        return
    values = _run.gather(f"same/{name}", value, what=f"comparison of {name}")
    different = [process for process in sorted(values) if values[process] != values[0]]
    if not different:
        return
    first = different[0]
    theirs, ours = values[first].splitlines(), values[0].splitlines()
    lines = [f"  process {first}: {line}" for line in theirs if line not in ours][:_MAX_SHOWN]
    lines += [f"  process 0: {line}" for line in ours if line not in theirs][:_MAX_SHOWN]
    shown = "\n".join(lines)
    raise UserError(
        f"{name} of {describe_processes(different)} ({_run.hosts[first]}) differs from that "
        f"of process 0 ({_run.hosts[0]}). Run the same command with the same files on every host.\n{shown}"
    )


def broadcast_from_main(name: str, value: Any = None) -> Any:
    """Sends a value of process 0 to all processes, which get it as JSON returns it. A name may be reused.

    Raises:
      PeerLostError: as in `barrier`.
    """
    text = json.dumps(value)
    return parse_json(text if _run is None else _run.gather(f"broadcast/{name}", text, what=name)[0], name)


def lost_peer(error: BaseException) -> PeerLostError | None:
    """Returns the error to report if `error` was caused by the loss of another process; None if all are alive.

    When a process is missing, each library fails in its own way. So if an error may be one of communication, this waits
    for the verdict of the heartbeats.
    """
    cause: BaseException | None = error
    is_communication = False
    while cause is not None:
        if isinstance(cause, PeerLostError):
            return cause
        is_communication |= isinstance(cause, TimeoutError | ConnectionError) or bool(_COMMUNICATION.search(str(cause)))
        cause = cause.__cause__ or cause.__context__
    return _run.heartbeats.take_verdict(wait=is_communication) if _run else None


# How the runtime marks errors of communication. They come as JaxRuntimeError, as ValueError (from a jitted call, with
# gloo), and inside what Orbax raises.
_COMMUNICATION = re.compile(
    r"\b(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|DATA_LOSS): "
)


def announce_failure(message: str, exit_status: int = 1) -> None:
    """Tells the other processes that this one failed, so that they end with the same message and status.

    Takes at most 5 s. Process 0 then waits at most 10 s for the others to learn of it.
    """
    if _run is not None:
        _run.heartbeats.announce_failure(message, exit_status)


def shutdown() -> None:
    """Waits for all processes, then disconnects. After an error in one of them, call `announce_failure` instead.

    Raises:
      PeerLostError: as in `barrier`.
    """
    global _run
    if _run is None:
        return
    run, _run = _run, None
    run.heartbeats.leave()
    run.gather("barrier/shutdown", "", what="the end of the run")
    run.heartbeats.stop()
    jax.distributed.shutdown()
    _restore_abort()


_handler: Any = None  # must outlive its use by C


def _abort_as_lost_peer(cluster: Cluster, hosts: list[str]) -> None:
    """Ends this process with a message and an exit status, not JAX's core dump, when process 0 is gone.

    When the connection to the coordination service breaks, its client calls abort(), within milliseconds and from its
    own thread. Python's handlers would run in the main thread, too late; a C handler runs at once.
    """
    global _handler  # noqa: PLW0603 - as above
    if cluster.process_id == 0:
        return  # it runs the service itself

    def on_abort(_: int) -> None:
        lost = None if _run is None else _run.heartbeats.verdict
        if lost is None:
            try:
                socket.create_connection(cluster.address, timeout=2).close()
            except OSError:
                lost = gone(f"{name_processes([0], hosts)} is gone: the connection to it broke.")
        if lost is not None:
            end_process(str(lost), lost.exit_status)
        _restore_abort()  # something else: abort() ends the process when we return

    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


def _restore_abort() -> None:
    ctypes.CDLL(None).signal(signal.SIGABRT, None)  # SIG_DFL
