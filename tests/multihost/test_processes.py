"""Real processes on loopback: their messages and exit statuses."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests import multiprocess
from tests.conftest import ROOT
from vit_jax.multihost import heartbeats, processes
from vit_jax.multihost.rendezvous import LOST_STATUS

TOGETHER = """
    from vit_jax.multihost import processes
    from vit_jax.errors import UserError

    def attempt(label, function, *arguments):
        try:
            print(label, function(*arguments), flush=True)
        except UserError as error:
            print(label, type(error).__name__, error, flush=True)

    processes.initialize(timeout_seconds=60)
    process = processes.process_id()
    print("number", process, "of", processes.process_count(), "main", processes.is_main_process())
    for _ in range(4):
        attempt("barrier", processes.barrier, "same name")
    attempt("broadcast", processes.broadcast_from_main, "x", {"of": process})
    attempt("same", processes.check_same, "the command", "python -m vit_jax.main")
    attempt("different", processes.check_same, "the config", f"seed = 0\\nbatch_size = {8 + 8 * (process == 1)}")
    if process == 2:
        for other in (0, 1):
            processes._run.store.blocking_key_value_get(f"process {other} gave up", 60_000)
    processes._TIMEOUT_SECONDS = 1
    attempt("late", processes.barrier, "late")
    if process != 2:
        processes._run.store.key_value_set(f"process {process} gave up", "")
    processes._TIMEOUT_SECONDS = 60
    processes.shutdown()
    print("left", flush=True)
"""

# Trains until it is killed, as vit_jax.main does; a process whose number is in FAIL ends by an error of its own.
TRAINING = """
    import os, sys, time
    import jax, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from vit_jax.multihost import processes

    processes.initialize(timeout_seconds=60, lost_after_seconds=3)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(lambda x: x - x.mean(), out_shardings=sharding)
    try:
        x = jax.make_array_from_process_local_data(sharding, np.arange(2.0))
        for number in range(1_000_000):
            x = step(x).block_until_ready()
            if number == 2:
                print("trains", flush=True)
                if os.environ["FAIL"] == str(processes.process_id()):
                    processes.announce_failure("no space left on the disk")
                    os._exit(1)
            time.sleep(0.02)
    except Exception as error:  # some collectives fail when a process is gone, others wait for ever
        if not (lost := processes.lost_peer(error)):
            raise
        print(f"error: {lost}", flush=True)
        os._exit(lost.exit_status)
"""

RESTART = "Restart the same command on all hosts to resume from the newest checkpoint."


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Three processes that find each other by srun's variables."""
    slurm = {
        "JAX_COORDINATOR_ADDRESS": None,
        "SLURM_JOB_ID": str(multiprocess.free_port()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": ["0", "1", "2"],
    }
    with multiprocess.start(TOGETHER, tmp_path_factory.mktemp("together"), 3, **slurm) as processes:
        ended = processes.all_ended()
    for each in ended:
        assert each.returncode == 0, each.output
    return [each.output.splitlines() for each in ended]


def lines_of(output, label):
    return [line.removeprefix(label).strip() for line in output if line.startswith(label + " ")]


def test_processes_of_srun_start_and_end_together(together):
    assert [lines_of(output, "number") for output in together] == [
        ["0 of 3 main True"],
        ["1 of 3 main False"],
        ["2 of 3 main False"],
    ]
    assert all(output[-1] == "left" for output in together)


def test_barrier_names_can_be_reused(together):
    assert all(lines_of(output, "barrier") == ["None"] * 4 for output in together)


def test_all_processes_get_the_value_of_the_main_process(together):
    assert all(lines_of(output, "broadcast") == ["{'of': 0}"] for output in together)


def test_equal_values_pass_and_differing_ones_are_named_in_all_processes(together):
    for output in together:
        assert lines_of(output, "same") == ["None"]
        (message,) = lines_of(output, "different")
        assert message.startswith("UserError the config of process 1 (")
        assert "differs from that of process 0" in message
        assert "  process 1: batch_size = 16" in output
        assert "  process 0: batch_size = 8" in output
        assert not any("seed" in line for line in output)


def test_barrier_names_the_missing_process(together):
    for output in together[:2]:
        (message,) = lines_of(output, "late")
        assert message.startswith("PeerLostError process 2 (")
        assert "did not arrive at 'late' within 1 s" in message


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Processes that train together; to each group something else happens. Gives how another of the group ended.

    `test_faults.py` does the same to process 1.
    """
    folder = tmp_path_factory.mktemp("faults")
    happens = {
        "kill 0": (0, signal.SIGKILL),
        "stop 0": (0, signal.SIGSTOP),
        "fail 0": None,
    }
    with contextlib.ExitStack() as cleanup:
        groups = {}
        for name in happens:
            (folder / name).mkdir()
            fail = name[-1] if name.startswith("fail") else ""
            # Of three, those that live hear nothing of each other either when the first stands still.
            group = multiprocess.start(TRAINING, folder / name, 3 if name == "stop 0" else 2, FAIL=fail)
            groups[name] = cleanup.enter_context(group)
        for name, what in happens.items():
            if what:
                groups[name].wait_for("trains")
                groups[name][what[0]].send_signal(what[1])
        yield {name: group.ended(1 - int(name[-1]), timeout=60) for name, group in groups.items()}


@pytest.mark.parametrize("name", ["kill 0", "stop 0"])
def test_survivor_of_a_lost_process_ends_with_one_message_and_the_status_to_restart(faults, name):
    ended = faults[name]
    assert ended.returncode == LOST_STATUS == 75, ended.output
    last = ended.output.splitlines()[-1]
    assert last.startswith(f"error: process {name[-1]} (")
    assert " is gone: " in last
    assert last.endswith(RESTART)
    assert ended.output.count("error: process") == 1


def test_other_process_reports_the_failure_and_ends_with_its_status(faults):
    ended = faults["fail 0"]
    assert ended.returncode == 1, ended.output
    last = ended.output.splitlines()[-1]
    assert last.startswith("error: process 0 (")
    assert last.endswith("ended with: no space left on the disk")


def test_single_process_contacts_nobody_and_touches_no_devices():
    code = """
import socket, time
from vit_jax.multihost import processes
socket.socket.connect = socket.socket.bind = None
start = time.perf_counter()
processes.initialize()
processes.barrier("alone")
processes.check_same("the config", "x")
assert processes.broadcast_from_main("x", (1, 2)) == [1, 2]
assert processes.is_main_process() and processes.process_count() == 1
assert processes.lost_peer(RuntimeError("x")) is None
processes.announce_failure("x")
processes.shutdown()
assert time.perf_counter() - start < 0.1
"""
    # A platform that does not exist: whatever asks for devices fails.
    (environment,) = multiprocess.environments(1, JAX_COORDINATOR_ADDRESS=None, JAX_PLATFORMS="no_such_platform")
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr


def test_process_without_its_peers_reports_them_missing(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(
        processes.PeerLostError, match=r"processes 1 and 2 of 3 did not connect within 0\.3 s; is the same command"
    ):
        processes.initialize(f"127.0.0.1:{multiprocess.free_port()}", 3, 0, timeout_seconds=0.3)


class Store:
    """JAX's store of keys, to which anybody can write who reaches its port."""

    def __init__(self, written):
        self.keys = {f"vit_jax/peers/{key}": value for key, value in written.items()}
        self.reads = 0

    def key_value_set(self, key, value, allow_overwrite=False):
        self.keys[key] = value

    def key_value_dir_get(self, folder):
        self.reads += 1
        return [(key, value) for key, value in self.keys.items() if key.startswith(folder)]


# Process 0 runs; the others are 1 to 10, and 10 fails in the end.
NO_FAILURES = [
    "",
    "[" * 100_000,
    "[]",
    "{}",
    '{"message": 1, "exit_status": 1}',
    '{"message": "", "exit_status": 0}',
    '{"message": "", "exit_status": 256}',
    '{"message": "", "exit_status": "1"}',
]
NO_PEERS = ["beat", "beat/x", "beat/-1", "beat/0", "beat/77", "beat/1/2/3", "", "failed/99", "unknown/1"]


def test_keys_that_no_process_could_have_written_are_ignored(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(heartbeats, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(heartbeats, "_LINGER_SECONDS", 0.0)
    monkeypatch.setattr(heartbeats, "end_process", lambda *_: ended.set())
    failures = {f"failed/{process}": said for process, said in enumerate(NO_FAILURES, start=1)}
    store = Store(dict.fromkeys(NO_PEERS, "1") | failures)
    run = heartbeats.Heartbeats(store, 0, list("abcdefghijk"), lost_after_seconds=8.0)
    run._interval = 0.01  # from the second beat on
    try:
        deadline = time.monotonic() + 20
        while store.reads < 3:
            assert time.monotonic() < deadline, "it reads no more"
            time.sleep(0.01)
        assert run.verdict is None
        assert heartbeats.read_values(store, "vit_jax/peers/beat", 11).keys() == {0, 3}
        store.keys["vit_jax/peers/failed/10"] = '{"message": "full \\u001b[31mdisk", "exit_status": 1}'
        assert run._decided.wait(20)
        assert str(run.verdict) == "process 10 (k) ended with: full \\x1b[31mdisk"
        assert ended.wait(20)
    finally:
        run.stop()
        if run._decided.is_set():
            ended.wait(20)  # the real one must not be called when the test is over


def test_no_other_process_counts_as_lost_while_process_0_does_not_answer():
    """Each process hears of the others through process 0, so their last beats may be older than its last answer."""
    run = heartbeats.Heartbeats(Store({}), 1, list("abc"), lost_after_seconds=60.0)
    run.stop()
    run._answered, run._seen = 100.0, {0: ("1", 100.0), 2: ("1", 99.0)}
    assert run._find_lost(159.5)[0] == []
    assert run._find_lost(160.5) == ([0], "it has not answered for 60 s.")
    run._answered = 160.0
    assert run._find_lost(160.5) == ([2], "no sign of life for 60 s.")
    run._left.add(2)
    assert run._find_lost(160.5)[0] == []
