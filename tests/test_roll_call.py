"""Threads stand for processes here: the roll call is but sockets."""

import contextlib
import dataclasses
import json
import socket
import threading
import time

import pytest

from tests.multiprocess import free_port
from vit_jax import roll_call
from vit_jax.cluster import Cluster
from vit_jax.errors import UserError


@dataclasses.dataclass
class Result:
    thread: threading.Thread
    hosts: list[str] | None = None
    error: str = ""

    def wait(self):
        self.thread.join(30)
        return self


def report(port, process_id, num_processes, timeout_seconds):
    """Calls the roll as one process, in a thread."""

    def run():
        try:
            cluster = Cluster(f"127.0.0.1:{port}", num_processes, process_id, "flags")
            result.hosts = roll_call.call(cluster, timeout_seconds)
        except UserError as error:
            result.error = str(error)

    result = Result(threading.Thread(target=run, daemon=True))
    result.thread.start()
    return result


def test_processes_that_come_in_any_order_learn_all_hosts():
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


def test_missing_process_is_named_to_all_that_came():
    port = free_port()
    results = [report(port, each, 4, 1) for each in (0, 1, 3)]
    for each in results:
        assert each.wait().error.startswith("process 2 of 4 did not connect within 1 s; is the same command running on")
        assert "Connected: 0 (" in each.error


def test_process_that_cannot_reach_process_0_says_where_it_tried():
    port = free_port()
    error = report(port, 1, 2, 0.5).wait().error
    assert error.startswith(
        f"process 1 could not reach process 0 at 127.0.0.1:{port} within 0.5 s (Connection refused)"
    )


def test_host_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"could not reach process 0 at no-such-host\.invalid:1234"):
        roll_call.call(Cluster("no-such-host.invalid:1234", 2, 1, "flags"), 0.3)


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
    main = report(port, 0, 2, 20)
    hello = roll_call._who(Cluster(f"127.0.0.1:{port}", 2, 1, "flags")) | {"versions": "vit_jax 0.0.1 and jax 0.9"}
    while main.thread.is_alive():
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as other:
            other.sendall(json.dumps(hello).encode() + b"\n")
            answer = json.loads(other.makefile().readline())
        time.sleep(0.1)
    assert " runs vit_jax 0.0.1 and jax 0.9, process 0 on " in main.error
    assert answer == {"error": main.error, "lost": False}


def test_process_that_ended_and_came_again_is_counted_once():
    port = free_port()
    main = report(port, 0, 3, 20)
    hello = json.dumps(roll_call._who(Cluster(f"127.0.0.1:{port}", 3, 1, "flags"))).encode() + b"\n"
    for _ in range(50):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(hello)
            time.sleep(0.2)
            break
        time.sleep(0.1)
    others = [report(port, each, 3, 20) for each in (1, 2)]
    assert all(len(each.wait().hosts or ()) == 3 for each in [main, *others]), main.error


def test_strangers_at_the_port_are_ignored():
    port = free_port()
    main = report(port, 0, 2, 20)
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"", b'{"process": ', b"\xff\x00\n"):
        for _ in range(50):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(said)
                break
            time.sleep(0.1)
    other = report(port, 1, 2, 20)
    assert len(other.wait().hosts) == len(main.wait().hosts) == 2


def test_port_that_is_taken_is_one_message(monkeypatch):
    monkeypatch.setattr(roll_call, "_PORT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = report(taken.getsockname()[1], 0, 2, 5).wait().error
    assert "cannot listen on port" in error
    assert "choose another port in --coordinator_address" in error


def test_many_missing_processes_are_counted():
    assert roll_call.describe_processes([3]) == "process 3"
    assert roll_call.describe_processes([3, 5]) == "processes 3 and 5"
    assert roll_call.describe_processes(list(range(100)), shown=3) == "processes 0, 1, 2 and 97 more"
