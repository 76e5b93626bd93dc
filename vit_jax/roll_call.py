"""A roll call before JAX connects the processes: says who is missing, where JAX would end the process with a core dump.

Process 0 listens at the address where JAX's coordination service will be; the others report there, with who they are.
When all are there, process 0 sends everyone the list of hosts and hands the port over to JAX.
"""

import contextlib
import errno
import json
import platform
import select
import socket
import time
from typing import Any

import jax

from vit_jax import __version__
from vit_jax.cluster import Cluster
from vit_jax.errors import UserError

LOST_STATUS = 75  # exit status: a process is missing, start all again. EX_TEMPFAIL of sysexits.h

_MAX_LINE = 1 << 20  # bytes
_PORT_SECONDS = 30.0  # an earlier run may still be ending


class PeerLostError(UserError):
    """Another process of the run is missing, and this one cannot go on without it.

    Attributes:
      exit_status: what to end with: `LOST_STATUS`, or what the other process ended with if it said why.
    """

    def __init__(self, message: str, exit_status: int = LOST_STATUS):
        super().__init__(message)
        self.exit_status = exit_status


def call(cluster: Cluster, timeout_seconds: float) -> list[str]:
    """Waits until all processes are there.

    Args:
      cluster: the processes.
      timeout_seconds: how long to wait for the others.

    Returns:
      The hosts' names, by process.

    Raises:
      PeerLostError: on process 0 and on all that have reported: who is missing; on others: process 0 cannot be reached.
      UserError: on process 0 and on all that have reported: who does not belong.
    """
    if cluster.process_id == 0:
        with _listen(cluster, timeout_seconds) as listener:
            return _Register(cluster, listener, timeout_seconds).fill()
    return _report(cluster, timeout_seconds)


def bind_host(cluster: Cluster) -> str:
    """The address that process 0 binds: all interfaces, unless only this host can be meant."""
    host = cluster.coordinator_address.rpartition(":")[0]
    if host in ("localhost", "127.0.0.1"):
        return "127.0.0.1"
    return "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - the other hosts come in here


def _who(cluster: Cluster) -> dict[str, Any]:
    return {
        "process": cluster.process_id,
        "num_processes": cluster.num_processes,
        "host": platform.node(),
        "versions": f"vit_jax {__version__} and jax {jax.__version__}",
    }


def _address(cluster: Cluster) -> tuple[str, int]:
    host, _, port = cluster.coordinator_address.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(cluster: Cluster, timeout_seconds: float) -> socket.socket:
    port, host = _address(cluster)[1], bind_host(cluster)
    give_up = time.monotonic() + min(timeout_seconds, _PORT_SECONDS)
    while True:
        try:
            if host == "[::]":
                return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
            return socket.create_server((host, port), backlog=512)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < give_up:
                time.sleep(0.5)
                continue
            raise UserError(
                f"process 0 cannot listen on port {port}: {error.strerror or error}. End what does, or choose another "
                "port in --coordinator_address on all hosts."
            ) from error


class _Register:
    """Process 0's list of who is there."""

    def __init__(self, cluster: Cluster, listener: socket.socket, timeout_seconds: float):
        self._ours, self._listener, self._timeout = _who(cluster), listener, timeout_seconds
        self._hosts: dict[int, str] = {0: self._ours["host"]}
        self._connections: dict[int, socket.socket] = {}
        self._strangers: dict[socket.socket, bytes] = {}  # connected, and what they have said of a line

    def fill(self) -> list[str]:
        deadline = time.monotonic() + self._timeout
        try:
            while len(self._hosts) < self._ours["num_processes"]:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise PeerLostError(self._describe_missing())
                waiting = [self._listener, *self._strangers, *self._connections.values()]
                for ready in select.select(waiting, [], [], min(remaining, 1.0))[0]:
                    self._receive(ready)
            hosts = [self._hosts[each] for each in range(len(self._hosts))]
            self._tell({"hosts": hosts})
            return hosts
        except UserError as error:
            self._tell({"error": str(error), "lost": isinstance(error, PeerLostError)})
            raise
        finally:
            for connection in [*self._connections.values(), *self._strangers]:
                connection.close()

    def _receive(self, ready: socket.socket) -> None:
        if ready is self._listener:
            connection, _ = ready.accept()
            connection.setblocking(False)
            self._strangers[connection] = b""
            return
        try:
            data = ready.recv(4096)
        except OSError:
            data = b""
        if ready not in self._strangers:
            if not data:  # it has ended; perhaps it comes again
                process = next(each for each, theirs in self._connections.items() if theirs is ready)
                del self._connections[process], self._hosts[process]
                ready.close()
            return
        line = self._strangers.pop(ready) + data
        if data and b"\n" not in line and len(line) < _MAX_LINE:
            self._strangers[ready] = line
            return
        who = _parse(line)
        if "process" not in who:  # none of ours, such as a scan of ports
            ready.close()
            return
        self._enroll(who, ready)

    def _enroll(self, who: dict[str, Any], connection: socket.socket) -> None:
        process, host = who["process"], who["host"]
        self._strangers[connection] = b""  # so that it is told, too, if it does not belong
        for what, said in (("num_processes", "was started for {} processes"), ("versions", "runs {}")):
            if who[what] != self._ours[what]:
                raise UserError(
                    f"process {process} on {host} {said.format(who[what])}, process 0 on {self._ours['host']} "
                    f"{said.format(self._ours[what])}. Run the same command in the same environment on every host."
                )
        if process in self._hosts:
            raise UserError(
                f"two processes are process {process}: one on {self._hosts[process]} and one on {host}. Each needs a "
                "--process_id of its own, from 0."
            )
        del self._strangers[connection]
        self._hosts[process], self._connections[process] = host, connection

    def _tell(self, message: dict[str, Any]) -> None:
        for connection in [*self._connections.values(), *self._strangers]:
            with contextlib.suppress(OSError):
                connection.settimeout(5)
                connection.sendall(json.dumps(message).encode() + b"\n")

    def _describe_missing(self) -> str:
        total = self._ours["num_processes"]
        missing = [each for each in range(total) if each not in self._hosts]
        there = ", ".join(f"{each} ({self._hosts[each]})" for each in sorted(self._hosts))
        return (
            f"{describe_processes(missing)} of {total} did not connect within {self._timeout:g} s; is the same command "
            f"running on every host? Connected: {there}."
        )


def describe_processes(processes: list[int], shown: int = 16) -> str:
    """`process 3`, `processes 3 and 5`, or the first of many and how many more."""
    names = [str(each) for each in processes[:shown]]
    if len(processes) > shown:
        return f"processes {', '.join(names)} and {len(processes) - shown} more"
    return f"process {names[0]}" if len(names) == 1 else f"processes {', '.join(names[:-1])} and {names[-1]}"


def _report(cluster: Cluster, timeout_seconds: float) -> list[str]:
    """Another process's side of it."""
    deadline = time.monotonic() + timeout_seconds
    reason = "no answer"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(_address(cluster), timeout=min(5.0, remaining)) as connection:
                connection.sendall(json.dumps(_who(cluster)).encode() + b"\n")
                # Process 0 may have started later than this one, and says itself if somebody does not come.
                connection.settimeout(timeout_seconds + 5)
                answer = _parse(connection.makefile("rb").readline(_MAX_LINE))
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            if "hosts" in answer:
                return answer["hosts"]
            if "error" in answer:
                raise (PeerLostError if answer["lost"] else UserError)(answer["error"])
            reason = "what listens there is not a run that is starting"
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
    raise PeerLostError(
        f"process {cluster.process_id} could not reach process 0 at {cluster.coordinator_address} within "
        f"{timeout_seconds:g} s ({reason}). Is the same command running on every host, is this the address of process "
        "0's host, and does the network let the port through?"
    )


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}
