import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from vit_jax.config import base_config
from vit_jax.errors import UserError
from vit_jax.planning import compiling, worker
from vit_jax.planning.rows import plan_row
from vit_jax.planning.search import with_fields
from vit_jax.planning.topologies import find_topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install --editable '.[plan]'"
)


def tiny(**fields):
    """A model whose step compiles in seconds, but is wide enough that matrix products are nearly all of its FLOPs."""
    return with_fields(
        base_config(),
        **{
            "model__name": "ViT-L/16", "model__num_layers": 1, "model__num_classes": 10, "model__dtype": "bfloat16",
            "data__image_size": 32, "optimizer__name": "sgd", "steps": 10, "batch_size": 256,
        } | fields,
    )  # fmt: skip


def stand_in(monkeypatch, code):
    """Puts other Python code in the place of the worker, in a real process."""
    popen = subprocess.Popen
    monkeypatch.setattr(
        compiling.subprocess,
        "Popen",
        lambda command, **kwargs: popen([sys.executable, "-c", textwrap.dedent(code), *command[3:]], **kwargs),
    )
    monkeypatch.setattr(compiling, "check_compiler", lambda: None)


def test_a_worker_that_crashes_is_a_row(monkeypatch):
    stand_in(monkeypatch, "import os, signal; print('bad things', flush=True); os.kill(os.getpid(), signal.SIGSEGV)")
    row = plan_row(tiny(), find_topology("v3-8"))
    assert row.status == "failed"
    assert "SIGSEGV" in row.message
    assert "bad things" in row.message


def test_a_worker_that_is_killed_is_told_as_a_lack_of_memory(monkeypatch):
    stand_in(monkeypatch, f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    assert "memory" in plan_row(tiny(), find_topology("v3-8")).message


def test_a_worker_that_takes_too_long_is_ended_and_is_a_row(monkeypatch):
    stand_in(monkeypatch, "import time; time.sleep(600)")
    row = plan_row(tiny(), find_topology("v3-8"), timeout_minutes=0.2 / 60)
    assert (row.status, row.fits) == ("timed out", False)


# A plan whose worker sleeps, but says who it is; it ends as `python -m vit_jax.plan` does.
_SLEEPING_PLAN = """
    import os, signal, subprocess, sys
    from vit_jax.config import base_config
    from vit_jax.planning import compiling
    from vit_jax.planning.topologies import find_topology

    popen = subprocess.Popen
    code = sys.argv[1]
    compiling.subprocess.Popen = lambda command, **kwargs: popen([sys.executable, "-c", code, *command[3:]], **kwargs)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    compiling.end_on_signals()
    compiling.compile_step(base_config(), find_topology("h100"), num_devices=1)
"""


def _start_sleeping_plan(folder, worker):
    """Starts it; returns the process and, once the worker has said so, the worker's number."""
    said = folder / "said"
    code = textwrap.dedent(worker) + textwrap.dedent(f"""
        import os, pathlib, time
        pathlib.Path({str(said)!r}).with_suffix(".tmp").write_text(str(os.getpid()))
        pathlib.Path({str(said)!r}).with_suffix(".tmp").rename({str(said)!r})
        time.sleep(600)
    """)
    plan = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_SLEEPING_PLAN), code],
        env=os.environ | {"TMPDIR": str(folder)},
    )
    _wait_for(said.exists)
    return plan, int(said.read_text())


def _wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def _is_gone(pid):
    """Whether a process has ended; who has nobody to wait for it may still be in the list, as a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_plan_that_is_ended_leaves_neither_worker_nor_folder(tmp_path, number):
    plan, worker_pid = _start_sleeping_plan(tmp_path, "")
    assert len(list(tmp_path.glob("vit_jax_plan_*"))) == 1
    plan.send_signal(number)
    assert plan.wait(60) == 128 + number
    assert _is_gone(worker_pid)
    assert list(tmp_path.glob("vit_jax_plan_*")) == []


def test_a_worker_ends_when_the_plan_has_no_time_to_say_so(tmp_path):
    watching = """
        import json, sys
        from vit_jax.planning.worker import end_with
        end_with(json.load(open(sys.argv[1]))["parent"], seconds=0.1)
    """
    plan, worker_pid = _start_sleeping_plan(tmp_path, watching)
    plan.kill()
    plan.wait(60)
    _wait_for(lambda: _is_gone(worker_pid), 30)


def test_the_worker_finds_the_package_of_a_clone_that_is_not_installed(monkeypatch, tmp_path):
    # -S: without site-packages, and so without any that is installed. It is found, though not what it needs.
    popen, package = subprocess.Popen, compiling.pathlib.Path(compiling.__file__).parents[1]
    code = "import importlib.util; print(importlib.util.find_spec('vit_jax').origin)"
    monkeypatch.setattr(
        compiling.subprocess, "Popen", lambda command, **kwargs: popen([sys.executable, "-S", "-c", code], **kwargs)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert str(package / "__init__.py") in plan_row(tiny(), find_topology("h100")).message


def test_more_devices_than_there_are_is_a_row():
    assert plan_row(tiny(), find_topology("v3-8"), num_devices=9).status == "refused"


def test_without_libtpu_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --editable '\.\[plan\]'"):
        plan_row(tiny(), find_topology("v3-8"))


@pytest.fixture(scope="module")
def gpu_row():
    return plan_row(tiny(), find_topology("h100-8"))


def test_gpus_are_planned_by_formula(gpu_row):
    assert gpu_row.status == "fits by formula"
    # Parameters and momentum in float32, images and labels, the step, the schedule's count of it, and a key.
    assert gpu_row.memory.arguments == 2 * 4 * gpu_row.num_parameters + 32 * (32 * 32 * 3 + 4) + 4 + 4 + 8


def test_what_a_gpu_keeps_for_the_backward_pass_is_among_its_temporaries(gpu_row):
    gradients = 4 * gpu_row.num_parameters
    assert gpu_row.memory.temporaries > gradients + 10 * 2 * 32 * 5 * 1024  # ten of bfloat16 [32, 5, 1024], at least


def test_what_the_config_gets_wrong_is_an_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(worker.logging, "disable", lambda level: None)  # this process goes on
    config = tiny(batch_size=13, accumulation_steps=2)
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    request.write_text(json.dumps({"config": json.loads(config.to_json()), "topology": None, "num_devices": 1}))
    worker.main(str(request), str(answer))
    given = json.loads(answer.read_text())
    assert given["status"] == "refused"
    assert "not divisible" in given["message"]


@pytest.fixture(scope="module")
def row():
    return plan_row(tiny(), find_topology("v3-8"))


@needs_libtpu
def test_the_step_that_trains_is_compiled_for_a_slice(row):
    assert row.status == "fits", row.message
    assert 15 < row.memory.usable / 2**30 < 16  # the compiler keeps some of the 16 GiB
    assert row.memory.arguments == pytest.approx(2 * 4 * row.num_parameters, rel=0.25)  # padded to tiles
    assert 0 < row.roofline.seconds < row.step_seconds


@needs_libtpu
def test_replicated_parameters_are_summed_up_once_by_all(row):
    sums = [each for each in row.collectives if each.kind == "all-reduce"]
    assert {each.group_size for each in sums} == {8}
    elements = sum(
        num_bytes // (2 if dtype == "bf16" else 4) for each in sums for dtype, num_bytes in each.bytes_by_dtype
    )
    assert elements == pytest.approx(row.num_parameters, rel=0.001)


@needs_libtpu
def test_formula_flops_are_within_a_percent_of_the_compilers(row):
    assert row.compiler_flops == pytest.approx(row.flops, rel=0.01)


@needs_libtpu
def test_whether_it_fits_is_known_without_compiling_to_the_end(row):
    placed = plan_row(tiny(), find_topology("v3-8"), memory_only=True)
    assert placed.status == "fits", placed.message
    assert placed.memory.total == pytest.approx(row.memory.total - row.memory.code, rel=0.05)
    assert placed.step_seconds is None


@needs_libtpu
@pytest.mark.parametrize("memory_only", [False, True])
def test_a_batch_that_is_too_large_is_a_row_with_its_overshoot(memory_only):
    row = plan_row(tiny(batch_size=8 * 2**17), find_topology("v3-8"), memory_only=memory_only)
    assert row.status == "does not fit"
    assert row.memory.overshoot > 0
    assert "GiB more than there is" in row.message


@needs_libtpu
def test_the_forward_pass_can_be_planned_on_one_core():
    narrow = tiny(batch_size=4, model__hidden_dim=64, model__mlp_dim=64, model__num_heads=1)
    row = plan_row(narrow, find_topology("v3-8"), num_devices=1, task="inference")
    assert row.status == "fits", row.message
    assert (row.num_cores, row.collectives, row.days) == (1, (), None)
