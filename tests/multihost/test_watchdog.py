"""Tests in separate processes, because the watchdog ends them."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.conftest import ROOT
from vit_jax.multihost.watchdog import HUNG_STATUS, Watchdog

HANGS = """
    import sys, threading, time
    from vit_jax.multihost.watchdog import Watchdog

    def data_loader_that_waits():
        threading.Event().wait()

    def train_step_that_hangs():
        threading.Lock().acquire() and threading.Event().wait()

    threading.Thread(target=data_loader_that_waits, name="loader", daemon=True).start()
    with Watchdog(0.5, sys.argv[1], allowance_seconds=30) as watchdog:
        for step in range(1, 18):
            watchdog.beat(step)
        train_step_that_hangs()
"""

# Holds the interpreter's lock, so that no Python thread runs.
STANDS_STILL = """
    import ctypes, sys
    from vit_jax.multihost import watchdog

    watchdog._ALARM_SECONDS = 0.2
    with watchdog.Watchdog(0.5, sys.argv[1]) as dog:
        dog.beat(1)
        import time; time.sleep(0.2)
        ctypes.PyDLL(None).sleep(1)
"""


@pytest.fixture(scope="module")
def hung(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hung")
    command = [sys.executable, "-c", textwrap.dedent(HANGS), str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False), folder


def test_hung_step_ends_the_process_with_its_status_and_one_message(hung):
    process, _ = hung
    assert process.returncode == HUNG_STATUS == 70
    last = process.stderr.splitlines()[-1]
    assert last.startswith("error: step 18 has not ended for 0.5 s; the stacks of all threads are above and in ")
    assert "Restart the same command" in last


def test_stacks_of_all_threads_are_written_and_printed(hung):
    process, folder = hung
    stacks = (folder / "stacks-0.txt").read_text()
    for expected in ("train_step_that_hangs", "data_loader_that_waits", "loader", "MainThread"):
        assert expected in stacks
        assert expected in process.stderr


def test_stacks_are_printed_even_if_python_stands_still(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(STANDS_STILL), str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert "Timeout (0:00:0" in process.stderr
    assert '"<string>", line 9 in <module>' in process.stderr


@pytest.fixture
def ends(monkeypatch):
    """What a watchdog in this process would have ended it for."""
    labels = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, label, allowed: (labels.append(label), self._ended.set()))
    return labels


def test_steps_in_time_and_slow_saves_are_left_alone(ends, tmp_path):
    with Watchdog(0.3, tmp_path, allowance_seconds=30) as watchdog:
        time.sleep(0.6)  # the first step compiles
        for step in range(1, 5):
            watchdog.beat(step)
            time.sleep(0.15)
        with watchdog.allow("saving"):
            time.sleep(0.6)
        time.sleep(0.15)
        watchdog.beat(5)
    assert ends == []


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path):
    code = """
        import sys, time
        from vit_jax.multihost.watchdog import Watchdog
        with Watchdog(1.0, sys.argv[1]) as watchdog:
            watchdog.beat(1)
            print("ready", flush=True)
            sys.stdin.readline()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        process.stdin.write("\n")
    assert process.returncode == 0


def test_work_that_is_allowed_more_time_is_watched_too(ends, tmp_path):
    with Watchdog(30, tmp_path) as watchdog:
        watchdog._tick = 0.05
        watchdog.beat(1)
        with watchdog.allow("saving"), watchdog.allow("writing", seconds=0.2):
            assert watchdog._ended.wait(10)
    assert ends == ["writing"]


def test_watchdog_with_zero_seconds_is_off(tmp_path):
    with Watchdog(0, tmp_path) as watchdog:
        watchdog.beat(1)
        assert not hasattr(watchdog, "_thread")


def test_watchdog_leaves_nothing_behind(tmp_path):
    with Watchdog(30, tmp_path) as watchdog:
        pass
    assert not watchdog._thread.is_alive()
    assert not list(tmp_path.iterdir())
