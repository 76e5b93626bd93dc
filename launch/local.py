r"""Runs a command as several processes of one run on this machine. They find each other over loopback.

    python launch/local.py --num_processes=2 --devices_per_process=4 -- \
        python -m vit_jax.main --config=configs/quickstart.py --workdir=/tmp/quickstart

It shows on a laptop what a pod does: start-up, saving together, the loss of a process, a restart. Each line of output
starts with the number of its process. SIGTERM and Ctrl-C go to all processes. When a process fails, the others have
--grace_seconds to notice and to end; then they are killed. When all have ended, their remaining children, such as data
workers, are killed. With --max_restarts=N all are restarted, at most N times, unless they exited with 0 (done) or 1 (an
error that the same command would repeat).

The exit status is 0 if all exited with 0; 1 if one exited with 1; otherwise that of the process that failed first.

Needs only Python.
"""

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Launcher:
    """Starts the processes, passes signals on, and ends all when one fails."""

    def __init__(self, command: list[str], num_processes: int, devices_per_process: int | None, grace_seconds: float):
        """Installs handlers that pass signals on."""
        self._command, self._num_processes = command, num_processes
        self._devices, self._grace = devices_per_process, grace_seconds
        self._processes: list[subprocess.Popen[bytes]] = []
        self.asked_to_stop = False
        for each in _PASSED_ON:
            signal.signal(each, self._pass_on)

    def run(self) -> int:
        """Runs the processes once; returns the exit status of all together."""
        address, token = f"127.0.0.1:{_free_port()}", secrets.token_hex(16)
        self._processes = []
        printers = []
        for process_id in range(self._num_processes):
            # Its own session, so that Ctrl-C reaches it only once, through us.
            process = subprocess.Popen(  # noqa: S603 - the user's own command
                self._command,
                env=self._environment(address, token, process_id),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._processes.append(process)
            printers.append(threading.Thread(target=_print_lines, args=(process_id, process.stdout)))
            printers[-1].start()
        first_failure = self._wait()
        # Workers of a killed process survive it and keep its output open.
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for printer in printers:
            printer.join()
        statuses = [_status(process.returncode) for process in self._processes]
        print(f"launch: the processes ended with {', '.join(map(str, statuses))}", flush=True)
        return 1 if 1 in statuses else first_failure

    def _environment(self, address: str, token: str, process_id: int) -> dict[str, str]:
        environment = {
            "VIT_JAX_RUN_TOKEN": token,
            **os.environ,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(self._num_processes),
            "JAX_PROCESS_ID": str(process_id),
            "PYTHONUNBUFFERED": "1",
        }
        if self._devices is not None:
            environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self._devices)}
        return environment

    def _wait(self) -> int:
        """Waits for all; returns the status of the first that failed."""
        first_failure, deadline = 0, None
        while running := [process for process in self._processes if process.poll() is None]:
            failed = [_status(process.returncode) for process in self._processes if process.returncode]
            if failed and deadline is None:
                first_failure, deadline = failed[0], time.monotonic() + self._grace
            if deadline is not None and time.monotonic() > deadline:
                print(f"launch: killing {len(running)} that did not end within {self._grace:g} s", flush=True)
                for process in running:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            time.sleep(0.05)
        return first_failure or next((_status(each.returncode) for each in self._processes if each.returncode), 0)

    def _pass_on(self, signum: int, _: object) -> None:
        self.asked_to_stop = self.asked_to_stop or signum != signal.SIGUSR1
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signum)


def _print_lines(process_id: int, output: IO[bytes]) -> None:
    for line in output:
        sys.stdout.buffer.write(b"[%d] %s\n" % (process_id, line.rstrip(b"\n")))
        sys.stdout.buffer.flush()


def _status(returncode: int) -> int:
    """Returns the status as a shell does: 128 + n after signal n."""
    return 128 - returncode if returncode < 0 else returncode


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument(
        "--devices_per_process", type=int, help="simulated CPU devices; by default each process uses the real devices"
    )
    parser.add_argument("--grace_seconds", type=float, default=90.0)
    parser.add_argument("--max_restarts", type=int, default=0)
    parser.add_argument("command", nargs="+", help="after --")
    flags = parser.parse_args()
    if flags.num_processes < 1:
        parser.error(f"--num_processes must be at least 1, got {flags.num_processes}")
    launcher = Launcher(flags.command, flags.num_processes, flags.devices_per_process, flags.grace_seconds)
    for restarts in range(flags.max_restarts + 1):
        status = launcher.run()
        if status in (0, 1) or launcher.asked_to_stop or restarts == flags.max_restarts:
            return status
        print(f"launch: starting all again, restart {restarts + 1} of {flags.max_restarts}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
