"""Runs a worker process for each step to compile, and reads its answer.

libtpu looks for TPUs when it is loaded, may wait for them, and holds a lock; a compiler may exhaust the host's memory
or crash. The process that makes the table never loads libtpu, so it is safe from that.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
from typing import Any

from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.plan.topologies import Topology

# With these, libtpu neither looks for TPUs on this machine nor refuses to be loaded twice. Its standard error is read
# only after a crash.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v3-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}


# Functions that the worker compiles; jit names their programs "jit_" and the function's name.
_MODULES = ("train_step", "infer")
_POLL_SECONDS = 0.2


def _wait_for_placement(process: subprocess.Popen[bytes], stages: pathlib.Path, timeout_seconds: float) -> int | None:
    """Waits until the compiler has placed all arrays; returns a device's bytes, or None if the process ended.

    The compiler writes this stage only for a program that fits. Raises `subprocess.TimeoutExpired`.
    """
    end = time.monotonic() + timeout_seconds
    while True:
        if any(stages.glob("*after_optimizations_after_buffer_assignment.txt")):
            for report in stages.glob("*memory-usage-report.txt"):
                if match := re.search(r"Total bytes: (\d+)", report.read_text()):
                    return int(match[1])
        try:
            process.wait(_POLL_SECONDS)
            return None
        except subprocess.TimeoutExpired:
            if time.monotonic() > end:
                raise


def end_on_signals() -> None:
    """Makes SIGTERM and SIGHUP raise `SystemExit`, so that workers end and files are deleted, as with Control-C.

    Call it from the main thread of a command. If SIGHUP is ignored (nohup), it stays so.
    """

    def end(number: int, frame: types.FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


def check_compiler() -> None:
    """Raises `UserError` if libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for TPUs compiles with libtpu, which is not installed: pip install --editable '.[plan]'. It "
            "needs no TPU. GPUs, such as --topology=h100-8, are planned by formula without it."
        )


def compile_step(
    config: ConfigDict,
    topology: Topology,
    *,
    num_devices: int,
    task: str = "train",
    timeout_minutes: float = 10.0,
    memory_only: bool = False,
) -> dict[str, Any]:
    """Compiles the step of a config in its own process; see `plan_row` for the arguments.

    `memory_only` ends the compilation when all arrays have their place in memory, after a fifth of its time.

    Returns:
      the worker's answer: "status" is "fits", "placed" (it fits, see `memory_only`), "does not fit", "formula" (GPUs,
      and slices that libtpu does not compile for, with the reason as "message"), "refused" (by vit_jax, with a message
      for the user), "failed" or "timed out"; see `worker` for other keys.

    Raises:
      UserError: libtpu is needed and not installed.
    """
    arguments: dict[str, Any] = {"num_devices": num_devices, "task": task, "timeout_minutes": timeout_minutes}
    answer = _ask_worker(config, topology, **arguments, memory_only=memory_only)
    if answer["status"] != "not compiled":
        return answer
    formula = _ask_worker(config, dataclasses.replace(topology, compiler_name=None), **arguments, memory_only=False)
    return {"message": answer["message"]} | formula


def request_of(config: ConfigDict, topology: Topology, *, num_devices: int, task: str) -> dict[str, Any]:
    """The request to a worker, as plain values; see `compile_step` for the arguments."""
    options = dict(topology.compiler_options)
    return {
        "config": json.loads(config.to_json()),
        "topology": topology.compiler_name,
        "topology_options": options | ({"num_slices": topology.num_slices} if topology.num_slices > 1 else {}),
        "num_slices": topology.num_slices,
        "num_devices": num_devices,
        "task": task,
    }


def _ask_worker(
    config: ConfigDict, topology: Topology, *, num_devices: int, task: str, timeout_minutes: float, memory_only: bool
) -> dict[str, Any]:
    """Runs one worker; see `compile_step`. The status "not compiled" means that libtpu does not know the topology."""
    environment = {**os.environ, **ENVIRONMENT}
    # So that the worker also runs from a clone that is not installed.
    search_path = [str(pathlib.Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))
    if topology.compiler_name is None:
        environment["JAX_NUM_CPU_DEVICES"] = str(num_devices)
    else:
        check_compiler()
    request = request_of(config, topology, num_devices=num_devices, task=task) | {"parent": os.getpid()}
    with tempfile.TemporaryDirectory(prefix="vit_jax_plan_") as folder:
        request_path, answer_path = pathlib.Path(folder, "request.json"), pathlib.Path(folder, "answer.json")
        stages = pathlib.Path(folder, "stages")
        if memory_only:
            dump = f"--xla_dump_to={stages} --xla_dump_hlo_module_re=jit_({'|'.join(_MODULES)})"
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {dump}"
        request_path.write_text(json.dumps(request))
        command = [sys.executable, "-m", "vit_jax.plan.worker", str(request_path), str(answer_path)]
        with pathlib.Path(folder, "log").open("w+") as log:
            # Its own process group, so that its children end with it.
            process = subprocess.Popen(  # noqa: S603 - ourselves
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            try:
                if memory_only:
                    placed = _wait_for_placement(process, stages, 60 * timeout_minutes)
                    if placed is not None:
                        known = json.loads(answer_path.with_suffix(".known").read_text())
                        return known | {"status": "placed", "needed": placed}
                else:
                    process.wait(60 * timeout_minutes)
            except subprocess.TimeoutExpired:
                return {"status": "timed out", "message": f"not compiled after {timeout_minutes:g} minutes"}
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if answer_path.exists():
                return json.loads(answer_path.read_text())
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.strip()]
        ended = f"ended by {signal.Signals(-process.returncode).name}" if process.returncode < 0 else "ended"
        if process.returncode == -signal.SIGKILL:
            ended += ", perhaps because the host ran out of memory"
        return {"status": "failed", "message": f"the compiler {ended}: {lines[-1] if lines else 'it wrote no message'}"}
