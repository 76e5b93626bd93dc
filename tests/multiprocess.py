"""Starts the processes of a run on this machine: real processes on loopback, with simulated CPU devices."""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

from tests import XLA_FLAGS, warm_python


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environments(num_processes, devices_per_process=1, cache=None, **extra):
    """The environment of each process, in which `processes.initialize()` finds the others.

    `extra` values may be lists, one value a process.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "SLURM_"))}
    common = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices_per_process),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": XLA_FLAGS,
        "PYTHONUNBUFFERED": "1",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": [str(each) for each in range(num_processes)],
    }
    if cache is not None:
        common["XDG_CACHE_HOME"] = str(cache)
    merged = {**clean, **common, **extra}
    return [
        {name: value if isinstance(value, str) else value[process] for name, value in merged.items()
         if value is not None}
        for process in range(num_processes)
    ]  # fmt: skip


@dataclasses.dataclass
class Ended:
    returncode: int
    output: str


class Processes:
    """The running processes; ends them with the `with` block."""

    def __init__(self, command, environments, folder):
        self._files = [open(folder / f"process-{each}.log", "w+b") for each in range(len(environments))]  # noqa: SIM115
        self.processes = [
            warm_python.Process(command, environment, file, subprocess.STDOUT, hash_seed=process % 2)
            for process, (environment, file) in enumerate(zip(environments, self._files, strict=True))
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        for file in self._files:
            file.close()

    def __getitem__(self, process):
        return self.processes[process]

    def output(self, process):
        self._files[process].seek(0)
        return self._files[process].read().decode()

    def wait_for(self, text, times=1, timeout=60, processes=None):
        """Waits until each process has written a text so many times."""
        deadline = time.monotonic() + timeout
        for each in range(len(self.processes)) if processes is None else processes:
            while self.output(each).count(text) < times:
                ended = self.processes[each].poll() is not None
                if ended and self.output(each).count(text) >= times:
                    break
                assert not ended, f"process {each} ended without {text!r}:\n{self.output(each)}"
                assert time.monotonic() < deadline, f"process {each} did not write {text!r}:\n{self.output(each)}"
                time.sleep(0.05)

    def wait_for_handlers(self, signum, timeout=60):
        """Waits until each process has a handler for a signal, before which the signal ends it at once."""
        deadline = time.monotonic() + timeout
        for each, process in enumerate(self.processes):
            while True:
                assert process.poll() is None, f"process {each} ended:\n{self.output(each)}"
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
                if int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signum - 1) & 1:
                    break
                assert time.monotonic() < deadline, f"process {each} does not handle the signal:\n{self.output(each)}"
                time.sleep(0.05)

    def ended(self, process, timeout=400):
        """Waits until a process has ended; returns its status and output."""
        try:
            self.processes[process].wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"process {process} still runs:\n{self.output(process)}") from error
        return Ended(self.processes[process].returncode, self.output(process))

    def all_ended(self, timeout=400):
        return [self.ended(each, timeout) for each in range(len(self.processes))]


def start(code, folder, num_processes=2, devices_per_process=1, **environment):
    """Starts `python -c code` several times; `folder` takes their output."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return Processes(command, environments(num_processes, devices_per_process, **environment), folder)


def start_main(arguments, folder, num_processes=2, devices_per_process=1, cache=None, **environment):
    """Starts `python -m vit_jax.main` several times; `folder` gets their output, `cache` their compiled programs."""
    command = [sys.executable, "-m", "vit_jax.main", *map(str, arguments)]
    return Processes(command, environments(num_processes, devices_per_process, cache, **environment), folder)
