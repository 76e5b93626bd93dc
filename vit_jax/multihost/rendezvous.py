"""Gathers the processes of a run before JAX connects them, and names missing ones, where JAX would dump core.

Process 0 listens at the address that JAX's coordination service will use; the others report there. When all have
reported, process 0 sends everyone the list of hosts and leaves the port to JAX.

Anybody who reaches the port may talk to it, so each side proves that it knows the run's token. Lines of text:

    process 0    vit_jax <nonce>
    the other    <proof> {"process": 3, ..., "nonce": <its nonce>}
    process 0    <proof> {"hosts": [...]}

A proof is the HMAC-SHA256, under the token, of the other side's nonce and the text that follows. Without a token the
key is empty, and a proof shows only that the other side speaks this protocol. Lines that no member could have sent are
dropped without an answer.
"""

import contextlib
import dataclasses
import errno
import hmac
import json
import os
import platform
import re
import secrets
import selectors
import socket
import time
from typing import Any

import jax

from vit_jax import __version__
from vit_jax.console import show_name
from vit_jax.errors import UserError
from vit_jax.json_files import JsonError, parse_object
from vit_jax.multihost.cluster import MAX_PROCESSES, TOKEN_VARIABLE, Cluster

LOST_STATUS = 75  # exit status: a process is missing; restart all. EX_TEMPFAIL of sysexits.h

_PORT_SECONDS = 30.0  # an earlier run may still be ending
_HELLO_SECONDS = 10.0  # for a connection to introduce itself, and for process 0 to greet it
_ANSWER_SECONDS = 10.0  # for all members together to receive the answer
_MAX_STRANGERS = 128  # connections without an introduction; one more replaces the oldest
_MAX_HELLO = 4096  # bytes
_MAX_ANSWER = 1 << 22  # bytes; names of hosts of 16,384 processes
_MAX_HOST = 253  # characters
_MAX_SHOWN_ADDRESSES = 4


class PeerLostError(UserError):
    """Another process of the run is missing, so this one cannot continue.

    Attributes:
      exit_status: for this process: `LOST_STATUS`, or that of the other process if it announced why it ended.
    """

    def __init__(self, message: str, exit_status: int = LOST_STATUS):
        super().__init__(message)
        self.exit_status = exit_status


def call(cluster: Cluster, timeout_seconds: float) -> list[str]:
    """Waits until all processes have reported; returns the hosts' names, by process.

    Raises:
      PeerLostError: a process is missing (process 0, and those that have reported, name it), or process 0 cannot be
        reached (in the others).
      UserError: a process does not belong; process 0, and those that have reported, name it.
    """
    if cluster.process_id == 0:
        with _listen(cluster, timeout_seconds) as listener:
            return _Register(cluster, listener, timeout_seconds).fill()
    return _report(cluster, timeout_seconds)


def bind_host(cluster: Cluster) -> str:
    """The address that process 0 binds: all interfaces, unless all processes are on this host."""
    if cluster.address[0] in ("localhost", "127.0.0.1"):
        return "127.0.0.1"
    return "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104 - the other hosts connect here


def _who(cluster: Cluster) -> dict[str, Any]:
    return {
        "process": cluster.process_id,
        "num_processes": cluster.num_processes,
        "host": show_name(platform.node())[:_MAX_HOST] or "?",
        "versions": f"vit_jax {__version__} and jax {jax.__version__}",
    }


def _listen(cluster: Cluster, timeout_seconds: float) -> socket.socket:
    port, host = cluster.address[1], bind_host(cluster)
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
                f"process 0 cannot listen on port {port}: {error.strerror or error}. Stop the program that uses "
                "it, or set another port in --coordinator_address on all hosts."
            ) from error


@dataclasses.dataclass(eq=False)
class _Connection:
    """A connection to process 0."""

    socket: socket.socket  # non-blocking
    address: str  # of the other side
    nonce: str  # sent to it in the greeting
    since: float  # when it was accepted
    received: bytes = b""  # the part of its line received so far
    who: dict[str, Any] = dataclasses.field(default_factory=dict)  # its introduction; empty until then


class _Register:
    """Process 0's list of the processes that have reported."""

    def __init__(self, cluster: Cluster, listener: socket.socket, timeout_seconds: float):
        self._ours, self._token = _who(cluster), cluster.token
        self._listener, self._timeout = listener, timeout_seconds
        self._hosts: dict[int, str] = {0: self._ours["host"]}
        self._members: list[_Connection] = []  # includes a process that does not belong, if any
        self._strangers: list[_Connection] = []  # the oldest first
        self._turned_away: list[str] = []  # addresses whose proof was wrong
        self._selector = selectors.DefaultSelector()

    def fill(self) -> list[str]:
        deadline = time.monotonic() + self._timeout
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        try:
            while len(self._hosts) < self._ours["num_processes"]:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise PeerLostError(self._describe_missing())
                for key, _ in self._selector.select(min(remaining, 1.0)):
                    connection = key.data
                    if connection is None:
                        self._accept()
                    elif connection in self._strangers:  # one that was dropped meanwhile is in neither list
                        self._read(connection)
                    elif connection in self._members:  # sends nothing more, so it has ended; it may report again
                        del self._hosts[connection.who["process"]]
                        self._drop(connection)
                while self._strangers and self._strangers[0].since < time.monotonic() - _HELLO_SECONDS:
                    self._drop(self._strangers[0])
            hosts = [self._hosts[each] for each in range(len(self._hosts))]
            self._answer({"hosts": hosts})
            return hosts
        except UserError as error:
            self._answer({"error": str(error), "lost": isinstance(error, PeerLostError)})
            raise
        finally:
            self._selector.close()
            for each in [*self._members, *self._strangers]:
                each.socket.close()

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                if not self._strangers:
                    raise UserError(
                        f"process 0 cannot open more connections: {error.strerror}. Raise the limit with `ulimit -n` "
                        "before the start."
                    ) from error
                self._drop(self._strangers[0])
            return  # or the other side has disconnected already
        connection.setblocking(False)
        ip = str(address[0]).removeprefix("::ffff:")
        stranger = _Connection(connection, ip, secrets.token_hex(16), time.monotonic())
        try:
            connection.send(f"vit_jax {stranger.nonce}\n".encode())  # fits into an empty buffer
        except OSError:
            connection.close()
            return
        self._strangers.append(stranger)
        self._selector.register(connection, selectors.EVENT_READ, stranger)
        if len(self._strangers) > _MAX_STRANGERS:
            self._drop(self._strangers[0])

    def _read(self, stranger: _Connection) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = stranger.socket.recv(_MAX_HELLO)
        stranger.received += data
        if data and b"\n" not in stranger.received and len(stranger.received) < _MAX_HELLO:
            return
        line = stranger.received.partition(b"\n")[0]
        who = _verify(self._token, stranger.nonce, line)
        if who is None and re.match(rb"[0-9a-f]{64} \{", line) and stranger.address not in self._turned_away:
            self._turned_away = [*self._turned_away, stranger.address][-_MAX_SHOWN_ADDRESSES:]
        if who is None or not _is_member(who):
            self._drop(stranger)
            return
        stranger.who = who
        self._strangers.remove(stranger)
        self._members.append(stranger)
        self._check(who)
        self._hosts[who["process"]] = who["host"]

    def _check(self, who: dict[str, Any]) -> None:
        """Raises `UserError` if a process that knows the token does not belong."""
        process, host = who["process"], who["host"]
        for what, said in (("num_processes", "was started for {} processes"), ("versions", "runs {}")):
            if who[what] != self._ours[what]:
                raise UserError(
                    f"process {process} on {host} {said.format(who[what])}, process 0 on {self._ours['host']} "
                    f"{said.format(self._ours[what])}. Run the same command in the same environment on every host."
                )
        if process in self._hosts:
            raise UserError(
                f"two processes are process {process}: one on {self._hosts[process]} and one on {host}. Each needs its "
                "own --process_id, counted from 0."
            )

    def _drop(self, connection: _Connection) -> None:
        (self._members if connection.who else self._strangers).remove(connection)
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _answer(self, message: dict[str, Any]) -> None:
        deadline = time.monotonic() + _ANSWER_SECONDS
        for each in self._members:
            with contextlib.suppress(OSError):
                each.socket.settimeout(max(0.1, deadline - time.monotonic()))
                each.socket.sendall(_sign(self._token, each.who["nonce"], message))

    def _describe_missing(self) -> str:
        total = self._ours["num_processes"]
        missing = [each for each in range(total) if each not in self._hosts]
        connected = ", ".join(f"{each} ({self._hosts[each]})" for each in sorted(self._hosts))
        message = (
            f"{describe_processes(missing)} of {total} did not connect within {self._timeout:g} s; is the same command "
            f"running on every host? Connected: {connected}."
        )
        if self._turned_away:
            addresses = ", ".join(self._turned_away)
            message += f" Rejected, because their {TOKEN_VARIABLE} differs from this one: {addresses}."
        return message


def describe_processes(processes: list[int], shown: int = 16) -> str:
    """Formats `process 3`, `processes 3 and 5`, or the first of many and the number of others."""
    names = [str(each) for each in processes[:shown]]
    if len(processes) > shown:
        return f"processes {', '.join(names)} and {len(processes) - shown} more"
    return f"process {names[0]}" if len(names) == 1 else f"processes {', '.join(names[:-1])} and {names[-1]}"


def _report(cluster: Cluster, timeout_seconds: float) -> list[str]:
    """Reports to process 0 until it answers; returns the hosts' names."""
    deadline = time.monotonic() + timeout_seconds
    reason = "no answer"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(cluster.address, timeout=min(5.0, remaining)) as connection:
                answer = _introduce(cluster, connection, remaining, timeout_seconds)
        except TimeoutError:
            reason = "no answer"
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            if isinstance(answer, str):
                reason = answer
            elif "hosts" in answer:
                return answer["hosts"]
            else:
                raise (PeerLostError if answer["lost"] else UserError)(answer["error"])
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
    raise PeerLostError(
        f"process {cluster.process_id} could not reach process 0 at {cluster.coordinator_address} within "
        f"{timeout_seconds:g} s ({reason}). Is the same command running on every host, is this the address of process "
        "0's host, and does the network let the port through?"
    )


def _introduce(
    cluster: Cluster, connection: socket.socket, remaining: float, timeout_seconds: float
) -> dict[str, Any] | str:
    """Introduces this process; returns process 0's answer, or why there is none."""
    greeting = _read_line(connection, min(_HELLO_SECONDS, remaining), limit=128)
    if not (match := re.fullmatch(rb"vit_jax ([0-9a-f]{32})", greeting)):
        return "the program that listens there is not a starting run"
    nonce = secrets.token_hex(16)
    connection.sendall(_sign(cluster.token, match[1].decode(), {**_who(cluster), "nonce": nonce}))
    # Process 0 may have started later than this process, and answers also when a process is missing.
    line = _read_line(connection, timeout_seconds + _ANSWER_SECONDS, _MAX_ANSWER)
    answer = _verify(cluster.token, nonce, line)
    if answer is None or not _is_answer(answer, cluster.num_processes):
        return f"it rejected this process; is {TOKEN_VARIABLE} the same on every host?"
    return answer


def _read_line(connection: socket.socket, seconds: float, limit: int) -> bytes:
    """Reads a line of at most `limit` bytes, or what comes before the connection ends; may raise `TimeoutError`."""
    deadline = time.monotonic() + seconds
    received = bytearray()
    while b"\n" not in received[-4096:] and len(received) < limit:
        if (remaining := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        connection.settimeout(remaining)
        if not (data := connection.recv(4096)):
            break
        received += data
    return bytes(received).partition(b"\n")[0]


def _proof(token: str, nonce: str, text: bytes) -> bytes:
    return hmac.new(os.fsencode(token), nonce.encode() + b" " + text, "sha256").hexdigest().encode()


def _sign(token: str, nonce: str, message: dict[str, Any]) -> bytes:
    text = json.dumps(message).encode()
    return _proof(token, nonce, text) + b" " + text + b"\n"


def _verify(token: str, nonce: str, line: bytes) -> dict[str, Any] | None:
    """The message of a line; None if its sender does not know the token, or if it is not a JSON object."""
    proof, _, text = line.partition(b" ")
    if not hmac.compare_digest(proof, _proof(token, nonce, text)):
        return None
    try:
        return parse_object(text, "the message")
    except JsonError:
        return None


def _is_member(who: dict[str, Any]) -> bool:
    """Whether a message is an introduction that a member could have sent."""
    return (
        who.keys() == {"process", "num_processes", "host", "versions", "nonce"}
        and type(who["process"]) is type(who["num_processes"]) is int
        and 0 < who["process"] < who["num_processes"] <= MAX_PROCESSES
        and _is_text(who["host"], _MAX_HOST)
        and _is_text(who["versions"], 256)
        and _is_text(who["nonce"], 32)
        and re.fullmatch("[0-9a-f]{32}", who["nonce"]) is not None
    )


def _is_answer(answer: dict[str, Any], num_processes: int) -> bool:
    if "hosts" in answer:
        hosts = answer["hosts"]
        return isinstance(hosts, list) and len(hosts) == num_processes and all(_is_text(h, _MAX_HOST) for h in hosts)
    is_error = answer.keys() == {"error", "lost"} and isinstance(answer["lost"], bool)
    return is_error and _is_text(answer["error"], _MAX_ANSWER)


def _is_text(value: Any, longest: int) -> bool:
    """Whether a value is text that may be printed, without control characters."""
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()
