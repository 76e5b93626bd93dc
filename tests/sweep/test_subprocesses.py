"""Sweeps: the process of a run, and signals to it and to the sweep."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vit_jax.multihost.signals import Stopped
from vit_jax.sweep.subprocesses import Children, FailedRunError, ending_with_this_process, reason_of


class Program:
    """A few lines in place of a run."""

    def __init__(self, path, code, *arguments):
        self.path, self.code, self.arguments = path, code, arguments

    def command(self, python):
        return [python, "-S", "-c", self.code, *map(str, self.arguments)]


@pytest.mark.parametrize("end", ["sys.exit(143)", "os.kill(os.getpid(), 15)"])
def test_signal_to_only_the_run_ends_the_sweep(end, tmp_path):
    with Children() as children, pytest.raises(Stopped, match="SIGTERM"):
        children.train(Program(tmp_path, f"import os, sys; {end}"))


def test_run_that_is_killed_for_its_memory_has_failed(tmp_path):
    with Children() as children, pytest.raises(FailedRunError, match="ended by SIGKILL"):
        children.train(Program(tmp_path, "import os; os.kill(os.getpid(), 9)"))


def test_signal_is_passed_on_to_the_run_and_ends_the_sweep(tmp_path):
    heard = tmp_path / "heard"
    listen = """if True:
        import pathlib, signal, sys, time
        def hear(signum, _):
            with open(sys.argv[1], "a") as file:
                file.write(f"{signum} ")
        signal.signal(signal.SIGTERM, hear)
        open(sys.argv[1], "a").close()
        while not pathlib.Path(sys.argv[1]).read_text():
            time.sleep(0.01)
    """

    def kill():
        while not heard.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=kill)
    with Children() as children:
        killer.start()
        with pytest.raises(Stopped, match="SIGTERM"):
            children.train(Program(tmp_path, listen, heard))
        killer.join()
    assert heard.read_text().split() == ["15"]


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no such signal")
def test_run_ends_when_its_sweep_is_killed():
    """To Linux the parent is the thread that started the process; it need not be killed to be gone."""
    started = []
    run = [sys.executable, "-S", "-c", "import time; print('runs', flush=True); time.sleep(60)"]

    def start():
        started.append(subprocess.Popen(ending_with_this_process(run), stdout=subprocess.PIPE))
        assert started[0].stdout.readline() == b"runs\n"

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    with started[0] as process:
        assert process.wait(timeout=30) == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="the system has no such signal")
def test_run_does_not_start_after_its_sweep_was_killed(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # the parent of processes whose own parent has ended
    command = ending_with_this_process([sys.executable, "-S", "-c", "print('runs')"])
    process = subprocess.run(command, capture_output=True, check=False)
    assert (process.returncode, process.stdout) == (1, b"")


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (1, "warning: a\nerror: no such\nthing.\n", "no such thing."),
        (1, 'Traceback\n  File "x"\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: 8 GB\n-----\nRemarks.\n',
         "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: 8 GB"),
        (-9, "", "ended by SIGKILL"),
        (3, "", "exit status 3"),
    ],
)  # fmt: skip
def test_reason_of_a_failure_is_what_the_run_said_last(status, said, reason):
    assert reason_of(status, said) == reason
