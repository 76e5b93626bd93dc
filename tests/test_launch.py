"""The launchers without a cluster: fakes replace gcloud and srun."""

import ast
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

LAUNCH = ROOT / "launch"


@pytest.fixture(autouse=True)
def no_process_left(tmp_path, monkeypatch):
    """Ends processes that a test has started, in any session, even if the test failed."""
    mark = f"VIT_JAX_TEST_OF_LAUNCH={tmp_path}"
    monkeypatch.setenv(*mark.split("=", 1))  # and all processes inherit it
    yield
    for process in Path("/proc").glob("[0-9]*"):  # nothing of it on macOS
        with contextlib.suppress(OSError):  # another user's, or over meanwhile
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def local(*arguments, **options):
    command = [sys.executable, LAUNCH / "local.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_local_processes_find_each_other_and_their_devices():
    code = (
        "import jax, os; from vit_jax.multihost import processes; processes.initialize(timeout_seconds=60); "
        "print(processes.process_id(), jax.device_count(), jax.local_device_count()); processes.shutdown(); "
        "print('token', os.environ['VIT_JAX_RUN_TOKEN'])"
    )
    process = local("--num_processes=2", "--devices_per_process=3", "--", sys.executable, "-c", code, cwd=ROOT)
    assert process.returncode == 0, process.stdout
    assert {"[0] 0 6 3", "[1] 1 6 3"} <= set(process.stdout.splitlines())
    first, second = (line.split()[-1] for line in process.stdout.splitlines() if " token " in line)
    assert first == second
    assert len(first) == 32


def test_local_ends_all_when_one_fails_and_says_how_they_ended():
    script = 'if [ "$JAX_PROCESS_ID" = 1 ]; then exit 75; fi; exec sleep 60'
    process = local("--num_processes=3", "--grace_seconds=0.2", "--", "bash", "-c", script)
    assert process.returncode == 75
    assert "launch: the processes ended with 137, 75, 137" in process.stdout


def test_local_ends_though_a_killed_process_left_a_worker_that_holds_its_output():
    process = local("--num_processes=1", "--", "bash", "-c", "sleep 600 & kill -9 $$")
    assert process.returncode == 137
    assert "launch: the processes ended with 137" in process.stdout


def test_local_ends_with_the_status_of_an_error_whoever_was_first():
    process = local("--", "bash", "-c", 'if [ "$JAX_PROCESS_ID" = 0 ]; then exit 75; fi; sleep 0.3; exit 1')
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("statuses", "status", "starts"), [("75 143 0", 0, 3), ("75 1 0", 1, 2), ("75 75 75 0", 75, 3)]
)
def test_local_restarts_until_done_or_in_error(tmp_path, statuses, status, starts):
    script = f'cd {tmp_path}; echo x >> starts; set -- {statuses}; shift $(($(wc -l < starts) - 1)); exit "$1"'
    process = local("--num_processes=1", "--max_restarts=2", "--", "bash", "-c", script)
    assert process.returncode == status
    assert (tmp_path / "starts").read_text().count("x") == starts


def start_and_wait_for(command, text, times, **options):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    seen = ""
    while seen.count(text) < times:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return process


SAVES_ON_SIGTERM = 'trap "echo saves; exit 143" TERM; echo works; while true; do sleep 0.05; done'


def test_local_passes_signals_on_and_does_not_restart_a_stopped_run():
    command = [sys.executable, LAUNCH / "local.py", "--max_restarts=5", "--", "bash", "-c", SAVES_ON_SIGTERM]
    process = start_and_wait_for(command, "works", 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert output.count("saves") == 2
    assert "starting all again" not in output


@pytest.mark.parametrize(
    ("statuses", "status", "starts"), [("75 143 70 0", 0, 4), ("75 1 0", 1, 2), ("75 75 75 0", 75, 3)]
)
def test_until_done_restarts_until_done_or_in_error(tmp_path, statuses, status, starts):
    script = f'cd {tmp_path}; echo x >> starts; set -- {statuses}; shift $(($(wc -l < starts) - 1)); exit "$1"'
    limits = {"PAUSE_SECONDS": "0", "MAX_RESTARTS": "3" if starts == 4 else "2"}
    process = subprocess.run(
        [LAUNCH / "until_done.sh", "bash", "-c", script], env=os.environ | limits, timeout=60, check=False
    )
    assert process.returncode == status
    assert (tmp_path / "starts").read_text().count("x") == starts


def test_until_done_passes_sigterm_on_and_ends():
    process = start_and_wait_for([LAUNCH / "until_done.sh", "bash", "-c", SAVES_ON_SIGTERM], "works", 1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert output.count("saves") == 1
    assert "restart" not in output


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


# Hosts are folders, of several slices inside those of their nodes; a command for a host runs there.
# `failures/<command>` says how many more times it fails.
GCLOUD = """#!/usr/bin/env bash
set -e
echo "$*" >> "$CLOUD/calls"
slices=.
for each; do
  case $each in
    --worker=*) worker=${each#*=} ;;
    --command=*) command=${each#*=} ;;
    --node-count=2) slices="vit-0 vit-1" ;;
  esac
done
folder() { [ "$1" = vit ] && echo "$CLOUD" || echo "$CLOUD/$1"; }
left=$(cat "$CLOUD/failures/$4" 2>/dev/null || echo 0)
if [ "$left" -gt 0 ]; then
  echo $((left - 1)) > "$CLOUD/failures/$4"
  echo "ERROR: (gcloud.compute.tpus.$3.$4) UNAVAILABLE: try later" >&2
  exit 75
fi
case "$3 $4" in
  "queued-resources describe")
    [ -e "$CLOUD/state" ] || { echo "ERROR: (gcloud.compute.tpus.$3.$4) NOT_FOUND: Resource '$5' was …" >&2; exit 1; }
    cat "$CLOUD/state" ;;
  "queued-resources create")
    echo ACTIVE > "$CLOUD/state"
    for slice in $slices; do mkdir -p "$CLOUD/$slice/0" "$CLOUD/$slice/1"; done ;;
  "queued-resources delete") rm -r "$CLOUD/state" "$CLOUD/0" "$CLOUD/1" ;;
  "tpu-vm scp") for host in 0 1; do cp "$5" "$(folder "${6%%:*}")/$host/${6#*:}"; done ;;
  "tpu-vm ssh")
    [ "$worker" != all ] || worker="0 1"
    for host in $worker; do (cd "$(folder "$5")/$host" && bash -c "$command"); done ;;
esac
"""

# On a host: installs nothing, and as `venv/bin/python` notes what it was called with, then ends as it is told to.
HOST_PYTHON = """#!/usr/bin/env bash
mkdir -p venv/bin && cp "$0" venv/bin/python
[ "$2" = vit_jax.main ] || exit 0
printf '%s\\n' "$@" >> "$CLOUD/trained"
echo "$VIT_JAX_RUN_TOKEN" >> "$CLOUD/tokens"
echo x >> starts
set -- $STATUSES; shift $(($(wc -l < starts) - 1)); exit "$1"
"""


@pytest.fixture
def cloud(tmp_path):
    executable(tmp_path / "bin" / "gcloud", GCLOUD)
    executable(tmp_path / "bin" / "python3", HOST_PYTHON)
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CLOUD": str(tmp_path),
        "TPU_NAME": "vit",
        "TPU_ZONE": "zone",
        "TPU_TYPE": "v3-16",
        "POLL_SECONDS": "0.1",
        "MAX_FAILURES": "3",
        "PAUSE_SECONDS": "0",
    }


def tpu_vm(environment, *arguments):
    return subprocess.run(
        [LAUNCH / "tpu_vm.sh", *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="installs a commit of git")
def test_tpu_vm_books_installs_and_runs_until_the_run_is_done(cloud, tmp_path):
    process = tpu_vm(cloud | {"STATUSES": "75 0"}, "run", "--workdir=gs://bucket/a run")
    assert process.returncode == 0, process.stderr
    for _ in range(100):  # the script waits for host 0
        if (tmp_path / "1" / "run.status").exists():
            break
        time.sleep(0.1)
    trained = (tmp_path / "trained").read_text().splitlines()
    assert sorted(trained) == sorted(["-m", "vit_jax.main", "--workdir=gs://bucket/a run"] * 4)  # twice on two hosts
    assert (tmp_path / "0" / "vit_jax" / "vit_jax" / "main.py").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="installs a commit of git")
def test_tpu_vm_runs_several_slices_as_one_run(cloud, tmp_path):
    environment = cloud | {"STATUSES": "0", "TPU_SLICES": "2"}
    process = tpu_vm(environment, "run", "--workdir=gs://bucket/run")
    assert process.returncode == 0, process.stderr
    (created,) = [line for line in (tmp_path / "calls").read_text().splitlines() if " create " in line]
    assert " --node-count=2 --node-prefix=vit " in created
    assert "--node-id" not in created
    hosts = [tmp_path / slice_ / host for slice_ in ("vit-0", "vit-1") for host in "01"]
    for _ in range(100):  # the script waits for host 0 of slice 0
        if all((host / "run.status").exists() for host in hosts):
            break
        time.sleep(0.1)
    tokens = (tmp_path / "tokens").read_text().splitlines()
    assert len(tokens) == 4
    assert len(set(tokens)) == 1
    assert len(tokens[0]) == 32


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="installs a commit of git")
def test_tpu_vm_rebooks_a_preempted_slice(cloud, tmp_path):
    (tmp_path / "state").write_text("SUSPENDED")
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    process = tpu_vm(cloud | {"STATUSES": "1"}, "wait", "--workdir=gs://bucket/run")
    assert process.returncode == 1
    assert "the run ended with 1" in process.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.index("queued-resources delete") < calls.index("queued-resources create") < calls.index("tpu-vm scp")


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="installs a commit of git")
def test_tpu_vm_restarts_a_run_that_a_host_has_lost(cloud, tmp_path):
    environment = cloud | {"STATUSES": "0"}
    assert tpu_vm(environment, "create").returncode == tpu_vm(environment, "install").returncode == 0
    process = tpu_vm(environment, "wait", "--workdir=gs://bucket/run")
    assert "the run is gone, starting it again" in process.stderr
    assert process.returncode == 0


def fail(cloud, command, times):
    """Has gcloud fail at a command so many times."""
    folder = Path(cloud["CLOUD"]) / "failures"
    folder.mkdir(exist_ok=True)
    (folder / command).write_text(str(times))


def calls(cloud, command):
    """How often gcloud was called with a command."""
    return (Path(cloud["CLOUD"]) / "calls").read_text().count(f" {command} ")


@pytest.mark.parametrize("command", ["create", "run", "wait"])
def test_tpu_vm_gives_up_when_booking_always_fails(cloud, command):
    fail(cloud, "create", 1000)
    start = time.monotonic()
    process = tpu_vm(cloud | {"POLL_SECONDS": "0.3"}, command, *(["--workdir=runs/a"] if command != "create" else []))
    assert process.returncode == 1
    assert calls(cloud, "create") == 3
    assert time.monotonic() - start > 0.6  # two pauses
    assert "UNAVAILABLE" in process.stderr
    assert "booking failed, 3 of 3 times in a row" in process.stderr
    assert "giving up" in process.stderr


def test_tpu_vm_books_again_after_a_booking_that_failed(cloud, tmp_path):
    fail(cloud, "create", 1)
    process = tpu_vm(cloud, "create")
    assert process.returncode == 0, process.stderr
    assert calls(cloud, "create") == 2
    assert (tmp_path / "state").read_text() == "ACTIVE\n"


def test_tpu_vm_gives_up_before_booking_when_gcloud_never_gives_the_state(cloud):
    fail(cloud, "describe", 1000)
    for command in (["create"], ["run", "--workdir=runs/a"]):
        process = tpu_vm(cloud, *command)
        assert process.returncode == 1
        assert "looking at vit failed, 3 of 3 times in a row" in process.stderr
    assert calls(cloud, "create") == 0


def test_tpu_vm_pauses_after_deleting_a_failed_slice(cloud, tmp_path):
    (tmp_path / "state").write_text("FAILED")
    fail(cloud, "delete", 1000)
    start = time.monotonic()
    process = tpu_vm(cloud | {"POLL_SECONDS": "0.3"}, "create")
    assert process.returncode == 1
    assert time.monotonic() - start > 0.6
    assert calls(cloud, "delete") == 3


def test_tpu_vm_leaves_a_run_alone_when_gcloud_fails_while_it_waits(cloud, tmp_path):
    (tmp_path / "state").write_text("ACTIVE")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "run.status").write_text("0")
    fail(cloud, "describe", 5)  # more than MAX_FAILURES
    fail(cloud, "ssh", 1)
    process = tpu_vm(cloud, "wait", "--workdir=runs/a")
    assert process.returncode == 0
    assert "gcloud could not tell the state of vit" in process.stderr
    assert (calls(cloud, "create"), calls(cloud, "scp"), calls(cloud, "ssh")) == (0, 0, 2)


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="installs a commit of git")
def test_tpu_vm_starts_nothing_before_the_installation_is_done(cloud, tmp_path):
    fail(cloud, "scp", 1)
    process = tpu_vm(cloud | {"STATUSES": "0"}, "run", "--workdir=runs/a")
    assert process.returncode == 0, process.stderr
    done = [line.split()[3] for line in (tmp_path / "calls").read_text().splitlines()]
    assert [each for each in done if each in ("create", "scp", "ssh")][:4] == ["create", "scp", "scp", "ssh"]


@pytest.mark.parametrize("command", ["start", "run", "wait"])
def test_tpu_vm_refuses_a_command_without_arguments(cloud, tmp_path, command):
    process = tpu_vm(cloud, command)
    assert process.returncode == 1
    assert f"'{command}' needs the arguments of vit_jax.main" in process.stderr
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True), (143, True)])
def test_slurm_job_is_queued_again_unless_done_or_in_error(tmp_path, status, requeued):
    executable(
        tmp_path / "srun", f'#!/bin/sh\necho "$@" > {tmp_path}/ran; echo "$VIT_JAX_RUN_TOKEN" > token; exit {status}\n'
    )
    executable(tmp_path / "scontrol", f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    command = ["bash", LAUNCH / "slurm.sbatch", "--workdir=/runs/a"]
    process = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert len((tmp_path / "token").read_text().strip()) == 32
    assert (tmp_path / "ran").read_text().endswith("python -m vit_jax.main --workdir=/runs/a\n")
    assert (tmp_path / "requeued").exists() == requeued
    assert process.returncode == (0 if requeued else status)


def test_gke_manifest_runs_one_pod_a_host_and_gives_up_at_the_status_of_an_error():
    (manifest,) = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    (jobs,) = manifest["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    columns, rows = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert (
        job["parallelism"] == job["completions"] == columns * rows // container["resources"]["limits"]["google.com/tpu"]
    )
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [1]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never"  # or the policy does not hold
    assert container["command"][2:5] == ["python", "-m", "vit_jax.main"]
    (config,) = [each.removeprefix("--config=") for each in container["command"] if each.startswith("--config=")]
    assert (ROOT / config).exists()


@pytest.mark.parametrize("name", ["until_done.sh", "tpu_vm.sh", "slurm.sbatch"])
def test_shell_scripts_parse_and_begin_with_their_command(name):
    assert subprocess.run(["bash", "-n", LAUNCH / name], check=False).returncode == 0
    head = (LAUNCH / name).read_text().split("\nset ")[0]
    assert f"launch/{name} " in head


def test_every_launcher_begins_with_its_command():
    assert "python launch/local.py --" in ast.get_docstring(ast.parse((LAUNCH / "local.py").read_text()))
    for name in ("Dockerfile", "gke.yaml"):
        assert f"launch/{name}" in "".join((LAUNCH / name).read_text().splitlines(keepends=True)[:6])
