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
from vit_jax.plan import compiling, worker
from vit_jax.plan.plan_row import plan_row, row_of
from vit_jax.plan.search import with_fields
from vit_jax.plan.table import format_plan
from vit_jax.plan.topologies import find_topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install --editable '.[plan]'"
)


def tiny(**fields):
    """A model whose step compiles in seconds, but is wide enough that matrix products are nearly all of its FLOPs."""
    return with_fields(
        base_config(),
        **{
            "model__name": "ViT-B/16", "model__num_layers": 1, "model__hidden_dim": 512, "model__mlp_dim": 2048,
            "model__num_heads": 4, "model__num_classes": 10, "model__dtype": "bfloat16", "data__image_size": 32,
            "optimizer__name": "sgd", "steps": 10, "batch_size": 128,
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


def test_a_killed_worker_is_reported_as_out_of_memory(monkeypatch):
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
    from vit_jax.plan import compiling
    from vit_jax.plan.topologies import find_topology

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
        import json, pathlib, sys
        from vit_jax.plan.worker import end_with
        request = pathlib.Path(sys.argv[1])
        end_with(json.loads(request.read_text())["parent"], request.parent, seconds=0.1)
    """
    plan, worker_pid = _start_sleeping_plan(tmp_path, watching)
    plan.kill()
    plan.wait(60)
    _wait_for(lambda: _is_gone(worker_pid), 30)
    assert list(tmp_path.glob("vit_jax_plan_*")) == []


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


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --editable '\.\[plan\]'"):
        plan_row(tiny(), find_topology("v3-8"))


@pytest.mark.parametrize("status", ["fits", "does not fit"])
def test_slices_that_libtpu_cannot_compile_for_are_planned_by_formula(monkeypatch, status):
    asked = []

    def ask(config, topology, **arguments):
        asked.append(topology.compiler_name)
        return {"status": "formula"} if topology.compiler_name is None else {"status": "not compiled", "message": "why"}

    monkeypatch.setattr(compiling, "_ask_worker", ask)
    answer = compiling.compile_step(tiny(), find_topology("tpu7x-8"), num_devices=8)
    assert (asked, answer) == (["tpu7x:2x2x1", None], {"status": "formula", "message": "why"})


def ask(folder, config, name="h100", num_devices=1):
    """What a worker answers, in this process."""
    request, answer = folder / "request.json", folder / "answer.json"
    asked = compiling.request_of(config, find_topology(name), num_devices=num_devices, task="train")
    request.write_text(json.dumps(asked))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.logging, "disable", lambda level: None)  # keep the logs of this process
        worker.main(str(request), str(answer))
    return json.loads(answer.read_text())


@pytest.fixture(scope="module")
def gpu_row(tmp_path_factory):
    answer = ask(tmp_path_factory.mktemp("gpu"), tiny(), "h100-8", num_devices=8)
    return row_of(tiny(), find_topology("h100-8"), answer, num_devices=8)


def test_gpus_are_planned_by_formula(gpu_row):
    assert gpu_row.status == "fits by formula"
    # Parameters and momentum in float32, images and labels, the step, the schedule's count of it, and a key.
    assert gpu_row.memory.arguments == 2 * 4 * gpu_row.num_parameters + 16 * (32 * 32 * 3 + 4) + 4 + 4 + 8


def test_arrays_for_the_backward_pass_on_a_gpu_count_as_temporaries(gpu_row):
    gradients = 4 * gpu_row.num_parameters
    assert gpu_row.memory.temporaries > gradients + 10 * 2 * 16 * 5 * 512  # ten of bfloat16 [16, 5, 512], at least


def test_with_frozen_parameters_neither_gradients_nor_their_flops_are_planned(tmp_path):
    everything = ask(tmp_path, tiny(batch_size=8))
    head = ask(tmp_path, tiny(batch_size=8, train_only=("^head/",)))
    assert head["gradient_bytes"] == 4 * (512 * 10 + 10)
    assert head["temporaries"] < everything["temporaries"] - 4 * 2_500_000
    assert 1 / 3 < head["flops"] / everything["flops"] < 0.334
    # Without the gradient of the pixels.
    embedding = 8 * 2 * 4 * 512 * 16**2 * 3
    assert everything["flops"] - everything["least_flops"] == embedding


@pytest.mark.parametrize(
    "fields", [{"batch_size": 10**12}, {"steps": 10**18}, {"batch_size": 2**24, "steps": 2**31 - 1}]
)
def test_absurd_values_are_a_row(tmp_path, fields):
    answer = ask(tmp_path, tiny(**fields))
    row = row_of(tiny(**fields), find_topology("h100"), answer, num_devices=1)
    assert row.status in ("refused", "does not fit by formula")
    assert format_plan([row])


def test_config_error_is_an_answer(tmp_path):
    given = ask(tmp_path, tiny(batch_size=13, accumulation_steps=2))
    assert given["status"] == "refused"
    assert "not divisible" in given["message"]


TOO_LARGE = 8 * 2**18  # images
# One of each generation, and two slices; each compiles in seconds. On v4 an MLP is large enough that its kernels are
# prefetched in slices, which XLA's own sum of seconds takes a second off for each.
SMALLEST = ("v2-8", "v3-8", "v4-8", "v5e-1", "v5p-8", "v6e-1", "tpu7x-8", "2xv3-8")
_ALL_IN_ONE = """
    import json, os, pathlib, sys
    os.environ |= json.loads(sys.argv[1])
    from vit_jax.plan import worker
    for name, request in json.loads(sys.argv[2]).items():
        try:
            answer = worker.compile_for_tpu(request, pathlib.Path(sys.argv[3]))
        except worker.CannotCompileError as error:
            answer = {"status": "not compiled", "message": str(error)}
        print("answer", json.dumps([name, answer]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Answers and rows of all that is compiled, in one process: those of `SMALLEST`, and two others on v3-8."""
    narrow = tiny(batch_size=16, data__image_size=16, model__hidden_dim=128, model__mlp_dim=256, model__num_heads=1)
    asked = {name: (narrow, name, "train", None) for name in SMALLEST}
    asked["v3-8"] = (tiny(), "v3-8", "train", None)
    asked["v4-8"] = (with_fields(narrow, model__mlp_dim=8192), "v4-8", "train", None)
    asked["too large"] = (tiny(batch_size=TOO_LARGE), "v3-8", "train", None)
    asked["inference"] = (narrow, "v3-8", "inference", 1)
    requests, made = {}, {}
    for key, (config, name, task, num_devices) in asked.items():
        topology = find_topology(name)
        made[key] = (config, topology, num_devices or topology.num_devices, task)
        requests[key] = compiling.request_of(config, topology, num_devices=made[key][2], task=task)
    result = subprocess.run(
        [
            sys.executable, "-c", textwrap.dedent(_ALL_IN_ONE), json.dumps(compiling.ENVIRONMENT),
            json.dumps(requests), str(tmp_path_factory.mktemp("known") / "known"),
        ],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    lines = [line.removeprefix("answer ") for line in result.stdout.splitlines() if line.startswith("answer ")]
    answers = dict(map(json.loads, lines))
    assert list(answers) == list(requests), result.stderr[-2000:]
    return {
        key: (answer, row_of(config, topology, answer, num_devices=num_devices, task=task))
        for key, answer in answers.items()
        for config, topology, num_devices, task in [made[key]]
        if answer["status"] != "not compiled"
    }


@pytest.fixture(scope="module")
def rows_of_all_generations(answers):
    return {name: answer for name, answer in answers.items() if name in SMALLEST}


@pytest.fixture(scope="module")
def row(answers):
    """A wide model on v3-8."""
    return answers["v3-8"][1]


@needs_libtpu
def test_the_step_that_trains_is_compiled_for_a_slice(row):
    assert row.status == "fits", row.message
    assert 15 < row.memory.usable / 2**30 < 16  # the compiler keeps some of the 16 GiB
    assert row.memory.arguments == pytest.approx(2 * 4 * row.num_parameters, rel=0.25)  # padded to tiles
    assert 0 < row.roofline.seconds < row.step_seconds


@needs_libtpu
def test_on_no_topology_a_step_is_faster_than_its_roofline(rows_of_all_generations):
    # JAX 0.10 cannot read some programs for TPU7x.
    assert set(rows_of_all_generations) >= set(SMALLEST) - {"tpu7x-8", "2xv3-8"}
    for name, (_, row) in rows_of_all_generations.items():
        assert row.status == "fits", (name, row.message)
        assert row.versions["libtpu"], name
        if name != "2xv3-8":  # no data sheet tells the network between slices of v3
            assert (row.estimate, row.step_seconds >= row.roofline.seconds > 0) == ("cycles", True), name
            assert row.step_seconds < 0.01, name
        if row.optimal_seconds is not None:
            assert 0 < row.optimal_seconds < 0.01, name
    assert rows_of_all_generations["v4-8"][0]["optimal_seconds"] < -1  # what the estimate must not use


@needs_libtpu
def test_two_slices_exchange_gradients_within_and_between(rows_of_all_generations):
    _, row = rows_of_all_generations["2xv3-8"]
    sent = [each.num_bytes for each in row.collectives if each.across_slices]
    # In bfloat16, each core an eighth of its slice's sum, but for small arrays, which are not split.
    assert 2 * row.num_parameters / 8 <= sum(sent) < 2 * row.num_parameters * 0.6
    assert {each.group_size for each in row.collectives if not each.across_slices} == {8}
    assert row.step_seconds is None
    assert "--dcn_gigabits" in row.no_estimate


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


def check_too_large(row):
    assert row.status == "does not fit"
    assert row.memory.overshoot > 0
    assert "GiB more than available" in row.message


@needs_libtpu
def test_a_batch_that_is_too_large_is_a_row_with_its_overshoot(answers):
    check_too_large(answers["too large"][1])


@needs_libtpu
def test_a_batch_that_is_too_large_is_known_without_compiling_to_the_end():
    check_too_large(plan_row(tiny(batch_size=TOO_LARGE), find_topology("v3-8"), memory_only=True))


@needs_libtpu
def test_the_forward_pass_can_be_planned_on_one_core(answers):
    _, row = answers["inference"]
    assert row.status == "fits", row.message
    assert (row.num_cores, row.collectives, row.days) == (1, (), None)
