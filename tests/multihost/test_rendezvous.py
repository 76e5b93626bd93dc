"""Threads stand for processes here: the rendezvous needs only sockets."""

import contextlib
import dataclasses
import errno
import json
import resource
import socket
import struct
import threading
import time

import pytest

from tests.multiprocess import free_port
from vit_jax.errors import UserError
from vit_jax.multihost import rendezvous
from vit_jax.multihost.cluster import Cluster


@dataclasses.dataclass
class Result:
    thread: threading.Thread
    hosts: list[str] | None = None
    error: str = ""

    def wait(self):
        self.thread.join(30)
        return self


def report(port, process_id, num_processes, timeout_seconds=20.0, token=""):
    """Comes to the rendezvous as one process, in a thread."""

    def run():
        try:
            cluster = Cluster(f"127.0.0.1:{port}", num_processes, process_id, "flags", token=token)
            result.hosts = rendezvous.call(cluster, timeout_seconds)
        except UserError as error:
            result.error = str(error)

    result = Result(threading.Thread(target=run, daemon=True))
    result.thread.start()
    return result


def all_came(*results):
    """Whether all processes, two of them, have learnt the same hosts."""
    return (
        all(len(each.wait().hosts or ()) == 2 for each in results) and len({tuple(each.hosts) for each in results}) == 1
    )


def connect(port):
    """A stranger's connection to process 0, which may not listen yet; its nonce is read."""
    for _ in range(100):
        with contextlib.suppress(ConnectionRefusedError):
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            nonce = rendezvous._read_line(connection, 20, 128).decode().removeprefix("vit_jax ")
            return connection, nonce
        time.sleep(0.1)
    raise AssertionError("process 0 does not listen")


def hello(**fields):
    """What process 1 of 3 says."""
    return {**rendezvous._who(Cluster("127.0.0.1:1", 3, 1, "flags")), "nonce": "0" * 32, **fields}


def lines_of(connection):
    """What process 0 says until it hangs up; a test fails if it does not."""
    with contextlib.suppress(ConnectionResetError):
        return connection.makefile("rb").read()
    return b""


def test_processes_that_report_in_any_order_learn_all_hosts():
    port = free_port()
    early = [report(port, each, 4, 20) for each in (3, 1)]
    time.sleep(0.2)
    late = [report(port, each, 4, 20) for each in (0, 2)]
    assert all(len(each.wait().hosts) == 4 for each in early + late)


def test_port_is_free_for_jax_when_all_are_there():
    port = free_port()
    results = [report(port, each, 3, 20) for each in range(3)]
    assert all(each.wait().hosts for each in results)
    socket.create_server(("127.0.0.1", port)).close()


def test_missing_process_is_named_to_all_that_reported():
    port = free_port()
    results = [report(port, each, 4, 1) for each in (0, 1, 3)]
    for each in results:
        assert each.wait().error.startswith("process 2 of 4 did not connect within 1 s; is the same command running on")
        assert "Connected: 0 (" in each.error


def test_process_that_cannot_reach_process_0_names_the_address():
    port = free_port()
    error = report(port, 1, 2, 0.5).wait().error
    assert error.startswith(
        f"process 1 could not reach process 0 at 127.0.0.1:{port} within 0.5 s (Connection refused)"
    )


def test_host_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"could not reach process 0 at no-such-host\.invalid:1234"):
        rendezvous.call(Cluster("no-such-host.invalid:1234", 2, 1, "flags"), 0.3)


def test_two_processes_of_the_same_number_are_refused_by_all():
    port = free_port()
    results = [report(port, each, 3, 20) for each in (0, 1)]
    time.sleep(0.7)
    results.append(report(port, 1, 3, 20))
    assert all(each.wait().error.startswith("two processes are process 1: one on ") for each in results)


def test_process_that_expects_another_number_of_processes_is_refused():
    port = free_port()
    results = [report(port, 0, 2, 20), report(port, 1, 3, 20)]
    for each in results:
        assert "was started for 3 processes, process 0 on " in each.wait().error


def test_process_of_another_version_is_refused():
    port = free_port()
    main = report(port, 0, 3, token="secret")
    connection, nonce = connect(port)
    connection.sendall(rendezvous._sign("secret", nonce, hello(versions="vit_jax 0.0.1 and jax 0.9")))
    answer = rendezvous._verify("secret", "0" * 32, lines_of(connection).rstrip())
    assert " runs vit_jax 0.0.1 and jax 0.9, process 0 on " in main.wait().error
    assert answer == {"error": main.error, "lost": False}


def test_process_that_ended_and_reported_again_counts_once():
    port = free_port()
    main = report(port, 0, 3)
    connection, nonce = connect(port)
    connection.sendall(rendezvous._sign("", nonce, hello()))
    time.sleep(0.2)
    connection.close()
    others = [report(port, each, 3) for each in (1, 2)]
    assert all(len(each.wait().hosts or ()) == 3 for each in [main, *others]), main.error


# Of a stranger who knows the protocol of a run without a token, or of a process that is out of order.
NO_MEMBERS = {
    "no object": b"[1, 2]",
    "deep": b"[" * 3000,
    "long number": b'{"process": ' + b"1" * 3000 + b"}",
    "number alone": b'{"process": 1}',
    "number out of range": hello(process=7),
    "process 0": hello(process=0),
    "negative": hello(process=-1),
    "list": hello(process=[1]),
    "bool": hello(process=True),
    "fraction": hello(process=1.0),
    "not a number": hello(num_processes=float("nan")),
    "huge": hello(num_processes=10**30),
    "another field": hello(more=1),
    "no host": hello(host=""),
    "host is an object": hello(host={}),
    "host colours the terminal": hello(host="\x1b[31mhost"),
    "host is half a character": hello(host="\ud800"),
    "long host": hello(host="h" * 300),
    "versions are null": hello(versions=None),
    "nonce is a number": hello(nonce=1),
    "short nonce": hello(nonce="0" * 31),
}


def test_messages_from_non_members_change_nothing():
    port = free_port()
    main = report(port, 0, 2)
    for name, what in NO_MEMBERS.items():
        text = what if isinstance(what, bytes) else json.dumps(what).encode()
        connection, nonce = connect(port)
        connection.sendall(rendezvous._proof("", nonce, text) + b" " + text + b"\n")
        assert lines_of(connection) == b"", name
        connection.close()
    assert main.thread.is_alive(), main.error
    assert all_came(main, report(port, 1, 2))


@pytest.mark.parametrize("token", ["", "secret"])
def test_strangers_at_the_port_are_ignored(token, monkeypatch):
    monkeypatch.setattr(rendezvous, "_HELLO_SECONDS", 1000.0)  # what they say must do
    port = free_port()
    main = report(port, 0, 2, token=token)
    lines = [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"process": 1}\n',
        b"[" * 5000 + b"\n",
        b"\xff\x00\n",
        b"\n",
        b" \n",
        b"x" * 100_000,  # no end of line
        rendezvous._sign("another", "0" * 32, hello(num_processes=2)),
    ]
    for line in lines:
        connection, _ = connect(port)
        with contextlib.suppress(OSError):  # it has hung up before all was said
            connection.sendall(line)
        assert lines_of(connection) == b"", line[:50]
        connection.close()
    for reset in (False, True):  # ends in the middle of a line
        connection, _ = connect(port)
        connection.sendall(b'{"process": ')
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert all_came(main, report(port, 1, 2, token=token))


def test_stranger_without_the_token_cannot_join():
    port = free_port()
    main = report(port, 0, 2, 1.0, token="secret")
    old, nonce = connect(port)
    old.close()
    for token, proven in (("", None), ("guess", None), ("secret", nonce)):  # the last was heard on another connection
        connection, nonce = connect(port)
        connection.sendall(rendezvous._sign(token, proven or nonce, hello(num_processes=2)))
        assert lines_of(connection) == b""
        connection.close()
    assert main.wait().error.endswith("Rejected, because their VIT_JAX_RUN_TOKEN differs from this one: 127.0.0.1.")


def test_process_with_another_token_is_reported():
    port = free_port()
    main, other = report(port, 0, 2, 1.0, token="secret"), report(port, 1, 2, 0.7)
    assert "(it rejected this process; is VIT_JAX_RUN_TOKEN the same on every host?)" in other.wait().error
    assert "Rejected, because their VIT_JAX_RUN_TOKEN differs from this one: 127.0.0.1." in main.wait().error


@pytest.fixture
def many_files():
    """Permits 4,000 open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] not in (-1, resource.RLIM_INFINITY) and before[1] < 4000:
        pytest.skip(f"the limit of open files is {before[1]}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(4000, before[0]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
def test_a_thousand_silent_connections_do_not_keep_members_out(monkeypatch):
    monkeypatch.setattr(rendezvous, "_HELLO_SECONDS", 1000.0)
    port = free_port()
    main = report(port, 0, 2)
    with contextlib.ExitStack() as cleanup:
        first = cleanup.enter_context(connect(port)[0])
        for _ in range(1100):
            cleanup.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
        assert lines_of(first) == b""  # it made room
        assert all_came(main, report(port, 1, 2))


def test_silent_connection_is_dropped_in_time(monkeypatch):
    monkeypatch.setattr(rendezvous, "_HELLO_SECONDS", 0.3)
    port = free_port()
    main = report(port, 0, 2)
    connection, _ = connect(port)
    for _ in range(100):  # a byte now and then
        try:
            connection.sendall(b"[")
        except OSError:
            break
        time.sleep(0.05)
    else:
        raise AssertionError("it may speak for ever")
    connection.close()
    assert all_came(main, report(port, 1, 2))


def test_without_room_for_connections_the_oldest_stranger_makes_room():
    class Full:
        def accept(self):
            raise OSError(errno.EMFILE, "Too many open files")

    register = rendezvous._Register(Cluster("127.0.0.1:1", 2, 0, "flags"), Full(), 1)
    ours, theirs = socket.socketpair()
    stranger = rendezvous._Connection(ours, "127.0.0.1", "", 0.0)
    register._strangers.append(stranger)
    register._selector.register(ours, rendezvous.selectors.EVENT_READ, stranger)
    register._accept()
    assert theirs.recv(1) == b""
    theirs.close()
    with pytest.raises(UserError, match=r"cannot open more connections: Too many .* `ulimit -n`"):
        register._accept()


GREETING = f"vit_jax {'0' * 32}\n".encode()
NO_RUN, NO_PROOF = "the program that listens there is not a starting run", "it rejected this process"
HOSTS = {"hosts": ["a", "b"]}


@pytest.mark.parametrize(
    ("greeting", "answer", "reason"),
    [
        pytest.param(b"", None, NO_RUN, id="nothing"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", None, NO_RUN, id="another protocol"),
        pytest.param(b"x" * 1000, None, NO_RUN, id="no line"),
        pytest.param(GREETING, b"", NO_PROOF, id="no answer"),
        pytest.param(GREETING, b'{"error": "go away", "lost": false}\n', NO_PROOF, id="refusal without proof"),
        pytest.param(GREETING, rendezvous._sign("guess", "0" * 32, HOSTS), NO_PROOF, id="hosts with a wrong proof"),
        pytest.param(GREETING, rendezvous._sign("secret", "0" * 32, HOSTS), NO_PROOF, id="hosts of an earlier start"),
    ],
)
def test_impostor_in_the_place_of_process_0_is_not_believed(greeting, answer, reason):
    ours, theirs = socket.socketpair()

    def pretend():
        theirs.sendall(greeting)
        if answer is not None:
            theirs.recv(4096)  # what we say of ourselves
            theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)

    impostor = threading.Thread(target=pretend)
    with ours, theirs:
        impostor.start()
        cluster = Cluster("127.0.0.1:1", 2, 1, "flags", token="secret")
        assert str(rendezvous._introduce(cluster, ours, 5, 5)).startswith(reason)
        impostor.join()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"hosts": "ab"},
        {"hosts": ["a"]},
        {"hosts": ["a", 1]},
        {"hosts": ["a", "\x1b[2J"]},
        {"error": "x"},
        {"error": 1, "lost": True},
        {"error": "x", "lost": "no"},
    ],
)
def test_invalid_answers_are_ignored(answer):
    assert not rendezvous._is_answer(answer, 2)


def test_slow_line_is_not_waited_for():
    ours, theirs = socket.socketpair()

    def drip():
        with contextlib.suppress(OSError):
            for _ in range(100):
                theirs.sendall(b"x")
                time.sleep(0.05)

    threading.Thread(target=drip, daemon=True).start()
    with ours, theirs, pytest.raises(TimeoutError):
        rendezvous._read_line(ours, 0.3, 1000)


def test_occupied_port_is_one_message(monkeypatch):
    monkeypatch.setattr(rendezvous, "_PORT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = report(taken.getsockname()[1], 0, 2, 5).wait().error
    assert "cannot listen on port" in error
    assert "another port in --coordinator_address" in error


def test_many_missing_processes_are_counted():
    assert rendezvous.describe_processes([3]) == "process 3"
    assert rendezvous.describe_processes([3, 5]) == "processes 3 and 5"
    assert rendezvous.describe_processes(list(range(100)), shown=3) == "processes 0, 1, 2 and 97 more"
