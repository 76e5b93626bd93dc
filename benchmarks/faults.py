r"""Injects faults into a run of several processes and shows that its result is bit-identical to a run without faults.

    python -m benchmarks.faults --config=configs/quickstart.py --faults=20 --num_processes=2 --devices_per_process=2 \
        --config.checkpoint.every_steps=20 --config.evals.eval_split.every_steps=40 --config.log_every_steps=20

Runs the config once without faults; then again with a fault at a random moment, and a restart of the same command after
each: SIGTERM to one or to all processes, `kill -9` of process 0, of another or of all, a process that hangs, a full
disk; at any time, while a checkpoint is written, or in an evaluation. After each fault it checks that

- all processes end within --within seconds, with the status in docs/faults.md;
- each survivor reports in one message what happened and what to do;
- no half-written checkpoint counts as whole, and the next start resumes from the newest.

At the end it compares parameters, optimizer state, data position, best parameters and all metrics but times with the
run without faults. With --elastic each start has another number of processes and devices; then the losses must agree to
--tolerance, and the data position exactly. Prints a table, writes JSON to --output, and exits with status 1 if there
was a problem. Other flags are passed to vit_jax.main.

The disk is a small one in memory, which Linux lets every user mount in a new namespace. Where that is forbidden
(`unshare --user --map-root-user --mount true` fails) there are no full disks, and a message says so.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator

from benchmarks.interruptions import differences, newest, steps_of, unfinished, wait_for
from vit_jax.multihost.rendezvous import LOST_STATUS
from vit_jax.run.metrics import read_jsonl

DISK_BYTES = 256_000_000
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
IN_NAMESPACE = "FAULTS_MAY_MOUNT"  # environment variable: this process is in it

TERM_ONE, TERM_ALL, STOP_ONE, FULL = "SIGTERM to one", "SIGTERM to all", "SIGSTOP of one", "disk full"
KILL_MAIN, KILL_OTHER, KILL_ALL = "kill -9 of process 0", "kill -9 of another", "kill -9 of all"
KINDS = (TERM_ONE, TERM_ALL, STOP_ONE, FULL, KILL_MAIN, KILL_OTHER, KILL_ALL)
SIGNALS = {TERM_ONE: signal.SIGTERM, TERM_ALL: signal.SIGTERM, STOP_ONE: signal.SIGSTOP}  # otherwise SIGKILL
ANY_TIME, SAVING, EVALUATING = "at any time", "saving", "evaluating"
ELASTIC = ((1, 4), (4, 1), (2, 1), (2, 2), (1, 2))  # processes and devices of each, one start after the other

ADVICE = {  # by exit status: what the message of each process must contain
    LOST_STATUS: ("Restart the same command on all hosts to resume from the newest checkpoint.",),
    1: ("No space left on device", "the same command"),
}
TERMINATED = 128 + signal.SIGTERM


@dataclasses.dataclass
class Outcome:
    """A fault and its consequences."""

    fault: str
    moment: str
    statuses: list[int]  # by process; -n: ended by signal n
    seconds: float  # until all had ended
    steps: tuple[list[int], list[int]]  # of the checkpoints before this start and after the fault
    messages: list[str]
    problems: list[str]


class Start:
    """The processes of one start; their output goes to files."""

    def __init__(self, flags: list[str], workdir: pathlib.Path, shape: tuple[int, int], logs: pathlib.Path):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(shape[1]),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(shape[0]),
        }
        command = [sys.executable, "-m", "vit_jax.main", *flags, f"--workdir={workdir}"]
        self.numbers = range(shape[0])
        self._logs = [logs.with_name(f"{logs.name}-{number}.log") for number in self.numbers]
        self.processes = []
        for number, log in enumerate(self._logs):
            environment["JAX_PROCESS_ID"] = str(number)
            with log.open("wb") as file:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))

    def output(self, number: int) -> str:
        """All that a process has written."""
        return self._logs[number].read_text(errors="replace")

    def errors(self, number: int) -> list[str]:
        """A process's messages for people."""
        return [f"error: {text}".strip() for text in ("\n" + self.output(number)).split("\nerror: ")[1:]]

    def are_together(self) -> bool:
        """Whether the processes are connected."""
        return len(self.processes) == 1 or f"all {len(self.processes)} processes are connected" in self.output(0)

    def send(self, signum: int, victims: Iterable[int]) -> None:
        """Sends a signal to some of the processes."""
        for victim in victims:
            self.processes[victim].send_signal(signum)

    def end(self, seconds: float, but: list[int]) -> list[int]:
        """Waits until all processes except `but` have ended, then kills the rest; returns those that did not end."""
        deadline = time.monotonic() + seconds
        others = [number for number in self.numbers if number not in but]
        while any(self.processes[each].poll() is None for each in others) and time.monotonic() < deadline:
            time.sleep(0.02)
        left = [each for each in others if self.processes[each].poll() is None]
        for process in self.processes:
            process.kill()
            process.wait()
        return left

    def finish(self) -> None:
        """Waits for the end of the run; exits if a process fails."""
        for number, process in enumerate(self.processes):
            if process.wait() != 0:
                sys.exit(f"process {number} ended with {process.returncode}:\n{self.output(number)[-5000:]}")


class Harm:
    """Injects faults into the run in a workdir."""

    def __init__(self, workdir: pathlib.Path, eval_every: int | None, within: float):
        self._workdir, self._eval_every, self._within = workdir, eval_every, within
        self._remember()

    def _remember(self) -> None:
        """Notes the checkpoints and starts before the next start."""
        self._steps = steps_of(self._workdir)
        self._num_starts = len(read_jsonl(self._workdir / "starts.jsonl"))

    def _new_starts(self) -> list[dict]:
        return read_jsonl(self._workdir / "starts.jsonl")[self._num_starts :]

    def do(self, start: Start, kind: str, *, step: int, delay: float, moment: str) -> Outcome | None:
        """Injects a fault some seconds after the checkpoint of a step, at the next moment of a kind.

        Returns:
          its consequences; None if the run finished first.
        """
        everyone = list(start.numbers)
        if kind == STOP_ONE and len(everyone) == 1:
            kind = KILL_ALL  # no other process could notice
        one = random.choice((everyone[1:] if kind == KILL_OTHER else []) or everyone)
        victims = {KILL_MAIN: [0], FULL: []}.get(kind, everyone if kind in (TERM_ALL, KILL_ALL) else [one])
        killing_time = None

        def is_time() -> bool:
            nonlocal killing_time
            if killing_time is None:
                # Before they are connected, the others wait for a lost process, so that only it need be restarted.
                if not start.are_together() or max(steps_of(self._workdir), default=0) < step:
                    return False
                killing_time = time.monotonic() + delay
            return time.monotonic() >= killing_time and moment in (ANY_TIME, self._moment())

        reached, observed = wait_for(is_time, *start.processes), self._moment()
        begin = time.monotonic()
        if not reached:
            kind, victims = "nothing", []
        with self._full_disk(start) if kind == FULL else contextlib.nullcontext():
            start.send(SIGNALS.get(kind, signal.SIGKILL), victims)
            left = start.end(self._within, but=victims if kind == STOP_ONE else [])
        statuses = [process.returncode for process in start.processes]
        if not reached and set(statuses) == {0}:
            return None
        outcome = Outcome(
            fault=f"{kind} ({victims[0]})" if len(victims) == 1 and kind != KILL_MAIN else kind,
            moment=observed,
            statuses=statuses,
            seconds=time.monotonic() - begin,
            steps=(self._steps, steps_of(self._workdir)),
            messages=[error for number in start.numbers for error in start.errors(number)],
            problems=[f"process {number} did not end within {self._within:g} s" for number in left],
        )
        if not _is_allowed(kind, victims, statuses):
            outcome.problems.append(f"ended with {statuses}")
        outcome.problems += self._problems(start, outcome)
        self._remember()
        return outcome

    def _moment(self) -> str:
        """What the run is doing, judged by its files."""
        if not self._new_starts():
            return "starting"
        last = (read_jsonl(self._workdir / "metrics.jsonl") or [{"step": 0}])[-1]
        begun = [path.name.partition(".")[0] for path in (self._workdir / "checkpoints").glob("[0-9]*")]
        is_due = self._eval_every and last["step"] % self._eval_every == 0 and "train/loss" in last
        if is_due and str(last["step"]) in begun:  # the step's save comes first
            return EVALUATING
        return SAVING if unfinished(self._workdir) else "training"

    @contextlib.contextmanager
    def _full_disk(self, start: Start) -> Iterator[None]:
        ballast, is_full, ended = self._workdir.with_name("ballast"), threading.Event(), threading.Event()

        def fill() -> None:
            with ballast.open("wb") as file:
                while not ended.wait(0.005):  # the run may delete files
                    space, size = os.fstatvfs(file.fileno()), os.fstat(file.fileno()).st_size
                    with contextlib.suppress(OSError):
                        os.posix_fallocate(file.fileno(), size, max(space.f_bavail, 1) * space.f_frsize)
                    is_full.set()

        thread = threading.Thread(target=fill)
        start.send(signal.SIGSTOP, start.numbers)  # otherwise they could finish writing before the disk is full
        thread.start()
        is_full.wait()
        start.send(signal.SIGCONT, start.numbers)
        yield
        ended.set()
        thread.join()
        ballast.unlink()

    def _problems(self, start: Start, outcome: Outcome) -> Iterator[str]:
        """Problems after a fault."""
        for number, status in enumerate(outcome.statuses):
            output, errors = start.output(number), start.errors(number)
            if status in ADVICE and (len(errors) != 1 or not all(each in errors[0] for each in ADVICE[status])):
                yield f"process {number} does not say in one message what to do"
            if status in ADVICE and ADVICE[status][-1] not in output.splitlines()[-1]:
                yield f"process {number} says more after its message"
            if "Traceback" in output and outcome.fault != FULL:  # then threads of Orbax print some first
                yield f"process {number} shows a traceback"
            if "set aside" in output or "is damaged" in output:
                yield f"process {number} found a damaged checkpoint"
        before, after = (max(steps, default=0) for steps in outcome.steps)
        if set(outcome.statuses) == {TERMINATED} and f"the state of step {after} is saved" not in start.output(0):
            yield "process 0 does not say that the state is saved"
        if after < before:
            yield "the newest checkpoint is lost"
        for record in self._new_starts():
            if record["step"] != before:
                yield f"started from step {record['step']} instead of {before}"


def _is_allowed(kind: str, victims: list[int], statuses: list[int]) -> bool:
    """Whether the exit statuses fit the fault."""
    hit = {statuses[victim] for victim in victims}
    others = {status for number, status in enumerate(statuses) if number not in victims}
    if kind == FULL:
        return others == {1}
    if kind not in (TERM_ONE, TERM_ALL):
        return hit == {-signal.SIGKILL} and others <= {LOST_STATUS}
    # Before the first step a signal ends a process at once, and the others miss it.
    at_once = -signal.SIGTERM in hit and hit <= {-signal.SIGTERM, LOST_STATUS} and others <= {LOST_STATUS}
    return set(statuses) == {TERMINATED} or at_once


def elastic_differences(workdir: pathlib.Path, reference: pathlib.Path, tolerance: float) -> tuple[list[str], float]:
    """Differences of two runs on other numbers of devices, and the largest relative difference of a loss."""
    ours, theirs = (read_jsonl(path / "metrics.jsonl") for path in (workdir, reference))
    apart = {
        f"{name} of step {row['step']}": abs(row[name] / expected[name] - 1)
        for row, expected in zip(ours, theirs, strict=False)
        for name in row.keys() & expected.keys()
        if name.endswith("/loss")
    }
    found = [f"{name} by {difference:.1e}" for name, difference in apart.items() if difference > tolerance]
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        found.append("steps of metrics.jsonl")
    extras = [newest(path / "checkpoints") / "extra" / "metadata" for path in (workdir, reference)]
    positions = [json.loads(extra.read_text())["data"] for extra in extras]
    if positions[0] != positions[1]:
        found.append(f"data position {positions[0]} instead of {positions[1]}")
    return found, max(apart.values(), default=0.0)


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--devices_per_process", type=int, default=2)
    parser.add_argument("--elastic", action="store_true", help="another number of processes and devices at each start")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative, of losses with --elastic")
    parser.add_argument("--within", type=float, default=90.0, help="seconds from a fault to the end of all processes")
    parser.add_argument("--seed", type=int, default=0, help="of the random faults and moments")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--logs", type=pathlib.Path, help="folder for what the processes write")
    options, others = parser.parse_known_args()
    may_mount = IN_NAMESPACE in os.environ
    if not may_mount and shutil.which("unshare") and subprocess.run([*NAMESPACE, "true"], check=False).returncode == 0:
        os.environ[IN_NAMESPACE] = "1"
        os.execvp(NAMESPACE[0], [*NAMESPACE, *sys.orig_argv])  # runs this command again, inside
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary, contextlib.ExitStack() as cleanup:
        disk = pathlib.Path(temporary, "disk")
        disk.mkdir()
        if may_mount:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", disk], check=True)
            cleanup.callback(lambda: subprocess.run(["umount", "--lazy", disk], check=False))
        logs = options.logs or pathlib.Path(temporary, "logs")
        logs.mkdir(parents=True, exist_ok=True)
        return run(options, [f"--config={options.config}", *others], disk, logs, can_fill=may_mount)


def run(
    options: argparse.Namespace, flags: list[str], disk: pathlib.Path, logs: pathlib.Path, *, can_fill: bool
) -> int:
    """Runs the config without and with faults, and reports; returns the exit status."""
    random.seed(options.seed)
    shape = (options.num_processes, options.devices_per_process)
    reference, workdir = disk / "reference", disk / "harmed"
    begin = time.monotonic()
    Start(flags, reference, shape, logs / "reference").finish()
    seconds = time.monotonic() - begin
    config = json.loads((reference / "config.json").read_text())
    every, eval_every = config["checkpoint"]["every_steps"], config["evals"]["eval_split"]["every_steps"]
    num_steps = json.loads((reference / "summary.json").read_text())["steps"]
    kinds = [kind for kind in KINDS if kind != FULL or can_fill]
    print(f"without faults: {seconds:.1f} s, {num_steps} steps, a checkpoint every {every}")
    print("" if can_fill else "no full disks: `unshare --user --mount` is forbidden here, so none can be mounted\n")
    print(f"{'':>3}  {'fault':24}{'while':12}{'ended with':17}{'after':>7}  checkpoints", flush=True)

    harm = Harm(workdir, eval_every, options.within)
    outcomes: list[Outcome] = []
    rounds = -(-options.faults // len(kinds))
    for kind in [kind for _ in range(rounds) for kind in random.sample(kinds, len(kinds))][: options.faults]:
        number = len(outcomes) + 1
        newest_step = max(steps_of(workdir), default=0)
        # Leaves enough steps for the later starts.
        room = (num_steps - newest_step) // (options.faults - number + 3)
        moments = [ANY_TIME, SAVING, EVALUATING] if eval_every and eval_every <= room else [ANY_TIME, SAVING]
        moment = SAVING if kind == FULL else random.choice(moments)
        room -= {ANY_TIME: 0, SAVING: every, EVALUATING: eval_every}[moment]
        this_shape = ELASTIC[number % len(ELASTIC)] if options.elastic else shape
        outcome = harm.do(
            Start(flags, workdir, this_shape, logs / f"start-{number:02}"),
            kind,
            step=newest_step + random.randint(0, max(0, room)),
            # After a restart the checkpoint already exists, so that short delays fall into the start-up.
            delay=random.uniform(0.1, 1.0) * seconds * every / num_steps,
            moment=moment,
        )
        if outcome is None:
            print("the run ended before all faults were made; use a longer config for more")
            break
        outcomes.append(outcome)
        statuses = " ".join(map(str, outcome.statuses))
        print(f"{number:3}  {outcome.fault:24}{outcome.moment:12}{statuses:17}{outcome.seconds:5.1f} s", end="  ")
        print(*outcome.steps, sep=" -> ", flush=True)
        for problem in outcome.problems:
            print(f"     PROBLEM: {problem}", flush=True)
    Start(flags, workdir, shape, logs / "last").finish()

    if options.elastic:
        found, largest = elastic_differences(workdir, reference, options.tolerance)
        same = f"the same data, losses within {largest:.1e}"
    else:
        found, same, largest = differences(workdir, reference), "identical to the bit", 0.0
    found += [f"{path.name} in {path.parent.name}" for path in workdir.glob("*/damaged-*")]
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    print(
        f"\n{len(outcomes)} faults, {len(problems)} problems; " + (f"DIFFERENT: {', '.join(found)}" if found else same)
    )
    result = {
        "flags": flags,
        "seconds_without_faults": seconds,
        "faults": [dataclasses.asdict(outcome) for outcome in outcomes],
        "largest_difference": largest,
        "differences": found,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return int(bool(found or problems))


if __name__ == "__main__":
    sys.exit(main())
