"""Starts Python commands as forks of a process that has already imported JAX, Flax, Orbax and matplotlib.

Python and those imports take five CPU seconds, more than all else in a short run. A fork starts at once and is a
process like any other: it has its own number, environment, output, signals and exit status. Only the seed of string
hashes is that of the process that forks, so there is one with each of two seeds. It never uses JAX's devices, whose
threads would not survive a fork. A run in a fork draws curves, which take half a second
each, only with `VIT_JAX_TEST_CURVES` in its environment.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import pathlib
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import types
import warnings

ROOT = pathlib.Path(__file__).parent.parent
# What commands import. `vit_jax.main` itself is not imported, because it defines flags when it runs.
IMPORTED = (
    *("vit_jax.evaluate", "vit_jax.train", "vit_jax.flags", "orbax.checkpoint", "tensorboardX", "sklearn.datasets"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
)


class Process:
    """`subprocess.Popen` for `[sys.executable, "-m", module, ...]` and `[sys.executable, "-c", code]`.

    Output goes to temporary files, which `communicate` reads, or to open files that are given. Hashes of strings depend
    on `hash_seed`, 0 or 1.
    """

    def __init__(self, command, env, stdout=None, stderr=None, hash_seed=0):
        assert command[0] == sys.executable and command[1] in ("-m", "-c"), command
        self.args, self.returncode = command, None
        self._stdout = stdout or tempfile.TemporaryFile()  # noqa: SIM115 - closed with this object
        self._stderr = self._stdout if stderr == subprocess.STDOUT else tempfile.TemporaryFile()  # noqa: SIM115
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            files = [self._stdout.fileno(), self._stderr.fileno(), theirs.fileno()]
            socket.send_fds(_server(hash_seed), [json.dumps({"command": command, "environment": env}).encode()], files)
        self.pid = self._receive()

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._receive()
            self._status.close()
        return self.returncode

    def _receive(self):
        if not (message := self._status.recv(32)):
            raise RuntimeError("the process that forks has ended; its error is on stderr")
        return int(message)

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self):
        self.send_signal(9)

    def communicate(self, timeout=None):
        self.wait(timeout)
        self._stdout.seek(0)
        self._stderr.seek(0)
        return self._stdout.read().decode(), self._stderr.read().decode()


@functools.cache
def _server(hash_seed):
    """The connection to a process that forks; it is started once for each test process and ends with that."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    environment["PYTHONHASHSEED"] = str(hash_seed)
    command = [sys.executable, "-m", "tests.warm_python", str(theirs.fileno())]
    with theirs:
        process = subprocess.Popen(  # in its own session: Ctrl-C ends the tests, which then end the forks
            command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], start_new_session=True
        )

    def end():
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(connection):
    """Forks for each request; returns the request, only in the new process."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 2**20, 3)
        if not message:
            os._exit(0)
        with warnings.catch_warnings():  # from Python 3.12 on, of the idle threads that OpenBLAS keeps
            warnings.simplefilter("ignore")
            is_parent = os.fork()
            if not is_parent:
                connection.close()
                process = os.fork()
        if not is_parent:
            output, errors, status = files
            if not process:
                os.dup2(output, 1)
                os.dup2(errors, 2)
                for file in files:
                    os.close(file)
                return json.loads(message)
            os.write(status, str(process).encode())
            for file in (output, errors):
                os.close(file)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # the test has ended
                os.write(status, str(code).encode())
            os._exit(0)
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _unbuffered(descriptor):
    return io.TextIOWrapper(open(descriptor, "wb", 0), write_through=True)


def _run(command, environment, inherited):
    """Runs `command` in this process, with the environment that it would have."""
    import jax
    import numpy as np

    for name in inherited:
        del os.environ[name]  # what an import has set stays
    os.environ.update(environment)
    for name, value in environment.items():
        if name.lower() in jax.config.values:
            given = {"true": True, "false": False}.get(value.lower(), value)
            jax.config.update(name.lower(), int(value) if value.isdigit() else given)
    np.random.seed()
    if "VIT_JAX_TEST_CURVES" not in environment:
        importlib.import_module("vit_jax.run.journal").plot_curves = lambda *_: None
    sys.stdout, sys.stderr = _unbuffered(1), _unbuffered(2)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.orig_argv, sys.argv = command, command[2:]
    if command[1] == "-m":
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        return
    sys.argv[0] = "-c"
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(command[2], "<string>", "exec"), vars(sys.modules["__main__"]))


if __name__ == "__main__":
    _inherited = list(os.environ)
    for _name in IMPORTED:
        importlib.import_module(_name)
    gc.freeze()
    _run(**_serve(socket.socket(fileno=int(sys.argv[1]))), inherited=_inherited)
