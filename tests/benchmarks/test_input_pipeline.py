import json
import os
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import simplejpeg

from benchmarks import input_peers, restore
from benchmarks import input_pipeline as benchmark
from tests.conftest import ROOT
from vit_jax.data import pipeline
from vit_jax.errors import UserError

BATCH_SIZE, IMAGE_SIZE = 8, 32
OURS, PEERS = ["vit_jax", "vit_jax host"], ["tf.data", "tf.data defaults", "tf.data float32", "PIL"]


def write_zip(path, members):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for member in members:
            image = rng.integers(0, 256, (48, 64, 3), np.uint8)
            archive.writestr(member, simplejpeg.encode_jpeg(image) if member.endswith(".JPEG") else b"text")
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The finished process and its JSON, with an interpreter for the peers that has no packages."""
    folder = tmp_path_factory.mktemp("input")
    bare = folder / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    data = write_zip(folder / "images.zip", [f"n{i % 3:02}_{i}.JPEG" for i in range(12)])
    flags = f"--rounds=1 --batches=3 --warm_up=1 --batch_size={BATCH_SIZE} --image_size={IMAGE_SIZE}"
    peers = [f"--python_tf={bare}", f"--python_torch={bare}"]
    script, output = ROOT / "benchmarks" / "input_pipeline.py", folder / "result.json"
    process = subprocess.run(
        [sys.executable, script, f"--data={data}", *flags.split(), *peers, f"--json={output}"],
        env={name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process, json.loads(output.read_text())


def test_our_rows_are_measured(measured):
    _, result = measured
    rows = result["rows"][:2]
    assert [row["name"] for row in rows] == OURS
    for row in rows:
        assert row["problem"] is None
        assert row["rounds"][0]["batch"] == f"uint8 [{BATCH_SIZE}, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        assert row["images_per_second"] == row["images_per_second_per_core"] * result["machine"]["cores"] > 0
        assert row["images_per_second"] == row["rounds"][0]["images_per_second"]
        assert row["startup_seconds"] > 0


@pytest.mark.skipif(not pathlib.Path("/proc/self/smaps_rollup").exists(), reason="memory is known only on Linux")
def test_memory_of_our_rows_matches_python_with_jax(measured):
    for row in measured[1]["rows"][:2]:
        assert 50e6 < row["pss_bytes"] <= row["peak_rss_bytes"] < 4e9


def test_peers_that_are_not_installed_are_named_and_left_out(measured):
    process, result = measured
    rows = result["rows"][2:]
    assert [row["name"] for row in rows] == PEERS
    for row in rows:
        assert row["problem"].startswith("not installed: No module named")
        assert row["rounds"] == []
        assert f"- {row['name']}: {row['problem']}" in process.stdout
    assert result["notes"]["floor of TensorFlow"].startswith("not installed: No module named 'tensorflow'")
    assert [row["to_tf_data"] for row in result["rows"]] == [row["to_pil"] for row in result["rows"]] == [None] * 6


def test_rows_are_compared_with_the_floor(measured):
    _, result = measured
    assert list(result["floor"]) == [
        "decode all (simplejpeg)",
        benchmark.FLOOR,
        "resize and flip (OpenCV)",
        "decode crop, resize, flip",
    ]
    for row in result["rows"][:2]:
        assert row["of_floor"] == pytest.approx(
            row["images_per_second"] / result["floor"][benchmark.FLOOR]["all_cores"]
        )


def test_tables_show_rows_and_floor(measured):
    process, result = measured
    lines = process.stdout.splitlines()
    for row in result["rows"]:
        cells = next(line for line in lines if line.startswith(f"| {row['name']} ")).split("|")
        assert cells[2].strip() == (f"{row['images_per_second']:.0f}" if row["rounds"] else "-")
    for what, rate in result["floor"].items():
        cells = next(line for line in lines if line.startswith(f"| {what} ")).split("|")
        assert [cell.strip() for cell in cells[2:4]] == [f"{rate['one_thread']:.0f}", f"{rate['all_cores']:.0f}"]


def test_our_processes_import_neither_tensorflow_nor_torch(measured):
    _, result = measured
    for name in [*OURS, "floor"]:
        assert "numpy" in result["versions"][name]
        assert not {"tensorflow", "torch"} & set(result["versions"][name])


def test_ratios_are_of_medians_and_to_the_faster_tf_data(monkeypatch):
    speeds = {
        "vit_jax": [90.0, 100.0, 500.0],
        "vit_jax host": [1.0] * 3,
        "tf.data": [100.0, 20.0, 90.0],
        "tf.data defaults": [200.0, 200.0, 1.0],
        "tf.data float32": [1.0] * 3,
        "PIL": [50.0] * 3,
    }
    turns = []

    def run_worker(worker, python, task):
        if worker == "floor":
            return {benchmark.FLOOR: {"one_thread": 100.0, "all_cores": 200.0}, "versions": {}}
        each = next(each for each in benchmark.contenders(arguments) if (each.worker, each.options) == (worker, task))
        turns.append(each.name)
        speed = speeds[each.name][(len(turns) - 1) // len(speeds)]
        return {**dict.fromkeys(benchmark.MEASURED), "images_per_second": speed, "versions": {}}

    monkeypatch.setattr(benchmark, "run_worker", run_worker)
    arguments = benchmark.make_parser().parse_args(["--rounds=3"])
    rows = {row["name"]: row for row in benchmark.throughput(arguments, {})["rows"]}
    assert rows["vit_jax"]["images_per_second"] == 100.0
    assert rows["vit_jax"]["least_and_most"] == [90.0, 500.0]
    assert rows["vit_jax"]["to_tf_data"] == 0.5
    assert rows["vit_jax"]["to_pil"] == 2.0
    assert rows["vit_jax"]["of_floor"] == 0.5
    assert rows["tf.data"]["to_tf_data"] == 0.45
    # Each round begins with another contender.
    assert turns[:: len(speeds)] == ["vit_jax", "vit_jax host", "tf.data"]


RESTORE = {"batch_size": 8, "image_size": 16}


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(restore, "WALKED_STEPS", 20)


def test_restore_is_exact_and_its_state_small(few_steps):
    result = restore.restore(RESTORE)
    assert result["is_exact"]
    assert result["state_bytes"] < 1000
    assert result["restore_seconds"] >= result["set_state_seconds"] > 0
    assert benchmark.describe({**result, "versions": {}}).startswith("step 1,000,000 of 14,000,000 examples")


def test_restore_notices_a_wrong_position(few_steps, monkeypatch):
    set_state = pipeline.TrainBatches.set_state

    def one_batch_off(self, state):
        set_state(self, {**state, "images": state["images"] + RESTORE["batch_size"]})

    monkeypatch.setattr(pipeline.TrainBatches, "set_state", one_batch_off)
    result = restore.restore(RESTORE)
    assert not result["equals_walked"]
    assert not result["equals_defined"]


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="there is no /proc")
def test_processes_that_were_started_count():
    alone = benchmark.memory_bytes()
    # More than this process may give back meanwhile.
    code = "held = bytearray(b'x') * 2**27; print(); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as child:
        child.stdout.readline()
        assert pathlib.Path(f"/proc/{child.pid}") in benchmark.process_tree()
        assert all(now > before + 2**26 for now, before in zip(benchmark.memory_bytes(), alone, strict=True))
        child.communicate("\n")


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="there is no /proc")
def test_threads_and_processes_may_end_while_they_are_counted(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""], stdin=-1) as child:
        child.wait()
    gone = pathlib.Path(f"/proc/{child.pid}")
    assert benchmark.read_if_there(gone / "task" / str(child.pid) / "children") == ""
    tree = benchmark.process_tree()
    monkeypatch.setattr(benchmark, "process_tree", lambda: [*tree, gone])
    assert benchmark.cpu_seconds() > 0
    assert all(size > 0 for size in benchmark.memory_bytes())


def test_class_is_the_folder_or_the_beginning_of_the_name(tmp_path):
    archive = write_zip(tmp_path / "a.zip", ["n01_first_one.JPEG", "x/cat/2.JPEG", "read.me"])
    benchmark.unpack(archive, tmp_path / "images")
    files = input_peers.list_files({"folder": tmp_path / "images"})
    assert [(str(path.relative_to(tmp_path / "images")), label) for path, label in files] == [
        ("train/cat/2.JPEG", 0),
        ("train/n01/n01_first_one.JPEG", 1),
    ]


def test_a_contender_that_fails_is_a_problem_with_a_reason(tmp_path):
    problem = benchmark.run_worker("floor", sys.executable, {"folder": str(tmp_path), "library": "opencv"})["problem"]
    assert problem.startswith("failed: FileNotFoundError: ")
    assert str(tmp_path / "train") in problem


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rounds=0", "--rounds must be at least 1"),
        ("--data=nowhere.zip", "nowhere.zip does not exist"),
        ("--data={text}", "cannot read .* as a zip file"),
        ("--data={empty}", "has no .jpg or .jpeg files"),
    ],
)
def test_mistakes_are_reported(tmp_path, flags, message):
    names = {"text": tmp_path / "text.zip"}
    names["text"].write_text("no archive")
    names["empty"] = write_zip(tmp_path / "empty.zip", ["a.txt"])
    arguments = benchmark.make_parser().parse_args(flags.format(**names).split())
    with pytest.raises(UserError, match=message):
        benchmark.benchmark(arguments)


def test_home_is_found_in_flags(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    arguments = benchmark.make_parser().parse_args(["--data=~/a.zip", "--python_tf=~/tf/python"])
    assert (str(arguments.data), arguments.python_tf) == ("/home/me/a.zip", "/home/me/tf/python")


def test_an_interpreter_that_does_not_exist_is_reported():
    with pytest.raises(UserError, match="cannot start /no/python"):
        benchmark.run_worker("tf_data", "/no/python", {})
