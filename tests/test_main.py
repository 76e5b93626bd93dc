"""The training command: its files, its exit statuses and its messages."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import interruptions
from benchmarks.interruptions import differences, newest, steps_of
from tests.conftest import ROOT, main_command, main_environment
from tests.data.test_sources import write_image

TINY = "--config=tests/configs/tiny.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compilation_cache):
    """A finished run of 400 steps, started as users start it: its workdir, output, and the modules it imported."""
    folder = tmp_path_factory.mktemp("finished")
    workdir = folder / "run"
    at_exit = "import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
    (folder / "sitecustomize.py").write_text(at_exit)
    command = main_command(f"{TINY}:steps=400,checkpoint=100", f"--workdir={workdir}")
    environment = main_environment(compilation_cache, PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]))
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return workdir, process.stdout, process.stderr.split()


def wait_until(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline
        time.sleep(0.01)


def test_run_leaves_table_curves_checkpoints_metrics_and_records(finished):
    workdir, output, _ = finished
    assert "test/accuracy" in output
    assert "images/s" in output
    assert "ETA" in output
    assert (workdir / "summary.md").read_text().strip() in output
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert steps_of(workdir) == [300, 400]
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["test/examples"] == 360
    assert summary["test/best_accuracy"] >= summary["test/accuracy"] > 0.2
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["hidden_dim"] == 16
    (start,) = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
    assert start["packages"]["jax"]
    assert "vit_jax.main" in start["command"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(3, 400, 3))
    assert [row["step"] for row in rows if "test/accuracy" in row] == [200, 400]
    assert list((workdir / "tensorboard").iterdir())


def test_best_holds_the_parameters_of_the_best_evaluation(finished):
    workdir = finished[0]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    evaluations = {row["step"]: row["test/accuracy"] for row in rows if "test/accuracy" in row}
    best_step = max(evaluations, key=lambda step: (evaluations[step], -step))
    assert newest(workdir / "best").name == str(best_step)
    extra = json.loads((workdir / "best" / str(best_step) / "extra" / "metadata").read_text())
    assert extra["accuracy"] == evaluations[best_step]


def test_damaged_best_does_not_stop_a_run(finished, tmp_path, run_main):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    for path in (workdir / "best").rglob("metadata"):
        os.truncate(path, 1)
    process = run_main(f"{TINY}:steps=400,checkpoint=100", f"--workdir={workdir}", check=True)
    assert "damaged" in process.stdout


def test_signal_before_the_first_step_ends_the_run_at_once(tmp_path, start_main):
    process = start_main(f"{TINY}:steps=400", f"--workdir={tmp_path / 'run'}")
    wait_until((tmp_path / "run").exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == -signal.SIGTERM
    assert steps_of(tmp_path / "run") == []


def test_runs_killed_at_random_moments_end_as_if_nothing_had_happened(tmp_path, start_main, monkeypatch):
    output, kills = tmp_path / "result.json", os.environ.get("VIT_JAX_TEST_KILLS")
    as_for_users = {"XLA_FLAGS": ""} if kills else {}  # the other tests ask for less optimization
    arguments = [f"{TINY}:steps={1000 if kills else 400},checkpoint=40", f"--kills={kills or 2}", f"--output={output}"]

    seeds = itertools.cycle((0, 1))  # a restart has other hashes of strings than the start before it, as in real life

    def start(flags, workdir):
        log = workdir.with_suffix(".log").open("ab")
        return start_main(*flags, f"--workdir={workdir}", stdout=log, hash_seed=next(seeds), **as_for_users)

    monkeypatch.setattr(interruptions, "start", start)
    monkeypatch.setattr(sys, "argv", ["interruptions", *arguments])
    assert interruptions.main() == 0
    result = json.loads(output.read_text())
    assert result["differences"] == []
    assert len(result["kills"]) >= 2
    assert any(kill["while"] == "writing a checkpoint" for kill in result["kills"])


def test_signal_saves_ends_within_ten_seconds_and_resumes_exactly(finished, tmp_path, start_main, run_main):
    workdir = tmp_path / "run"
    arguments = (f"{TINY}:steps=400,checkpoint=100", f"--workdir={workdir}")
    process = start_main(*arguments)
    wait_until(lambda: (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").read_text(), process)
    process.send_signal(signal.SIGTERM)  # right after the first row, at step 3 or some steps later
    begin = time.time()
    output, _ = process.communicate(timeout=10)
    assert time.time() - begin < 10
    assert process.returncode == 143, output
    assert "SIGTERM: the state of step" in output
    assert 0 < max(steps_of(workdir)) < 400
    run_main(*arguments, check=True)
    assert differences(workdir, finished[0]) == []


def test_ctrl_c_with_worker_processes_saves_and_the_run_can_resume_without_them(
    finished, tmp_path, start_main, run_main
):
    workdir = tmp_path / "run"
    arguments = (f"{TINY}:steps=400,checkpoint=100", f"--workdir={workdir}")
    process = start_main(*arguments, "--config.data.num_workers=1")
    wait_until(lambda: (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").read_text(), process)
    children = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [int(pid) for path in children for pid in path.read_text().split()]
    assert len(workers) >= 2  # one for the data, one for its shared memory
    for pid in (*workers, process.pid):  # a terminal sends it to all of them
        os.kill(pid, signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130, output
    assert "SIGINT: the state of step" in output
    assert 0 < max(steps_of(workdir)) < 400
    deadline = time.time() + 10
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.time() < deadline
        time.sleep(0.1)
    process = run_main(*arguments, check=True)
    assert "data.num_workers changed from 1 to 0" in process.stdout
    assert differences(workdir, finished[0]) == []


def test_run_with_worker_processes_leaves_no_shared_memory_and_complains_of_nothing(tmp_path, run_main):
    arguments = (f"{TINY}:steps=4", f"--workdir={tmp_path / 'run'}", "--config.data.num_workers=1")
    # With a cache of its own: JAX complains of an entry that another test is writing.
    process = run_main(*arguments, check=True, XDG_CACHE_HOME=str(tmp_path))
    assert process.stderr == ""


def test_damaged_newest_checkpoint_is_skipped_with_a_warning(finished, tmp_path, run_main):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    # All files of arrays: of a single one the half that is lost may hold nothing that is still referred to.
    for path in (workdir / "checkpoints" / "400" / "tree").rglob("d/*"):
        os.truncate(path, path.stat().st_size // 2)
    process = run_main(f"{TINY}:steps=400,checkpoint=100", f"--workdir={workdir}", check=True)
    assert "checkpoint of step 400 is damaged" in process.stdout
    assert "resumed from the checkpoint of step 300" in process.stdout
    shutil.rmtree(workdir / "checkpoints" / "damaged-400")
    assert differences(workdir, finished[0]) == []


def test_training_imports_neither_tensorflow_nor_torch(finished):
    imported = {name.partition(".")[0] for name in finished[2]}
    assert {"jax", "matplotlib"} < imported  # at the start, and at the end
    assert not imported & {"tensorflow", "torch"}


def test_models_need_only_jax_and_flax():
    others = "{'grain', 'orbax', 'cv2', 'simplejpeg', 'sklearn', 'matplotlib', 'ml_collections', 'clu', 'absl'}"

    def imported(modules):
        code = f"import sys, {modules}; print(sorted({{name.split('.')[0] for name in sys.modules}} & {others}))"
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    ours = "vit_jax.models, vit_jax.train_step, vit_jax.optimizers, vit_jax.sharding"
    assert imported(ours) == imported("jax, flax.linen, optax")


def test_dry_run_shows_everything_and_makes_nothing(tmp_path, run_main):
    process = run_main("--config=configs/vit_l16_i21k.py", "--dry_run=full", check=True, VIT_JAX_DATA=str(tmp_path))
    for part in (
        "optimizer.b1: 0.9",  # all fields
        "Transformer/encoderblock_23/MlpBlock_3/Dense_1/kernel",  # all arrays
        "head left out 304,351,232",
        "no reading of L/16 reaches",
        "weight decay touches",  # decay mask
        "1.000e-03",  # schedule
        "training  ",  # what would be trained
        "image-net.org",  # how to prepare the data
    ):
        assert part in process.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_an_evaluation_shows_no_training(finished, run_main):
    output = run_main(TINY, f"--workdir={finished[0]}", "--mode=eval", "--dry_run", check=True).stdout
    assert f"weights   {finished[0]}: ViT-Ti/4, 10 classes" in output
    assert "measured  test: classification; 360 images of digits (test)" in output
    for word in ("training", "learning", "optimizer", "epochs", "decay", "checkpoint."):
        assert word not in output.partition("# What")[2]


def test_dry_run_with_a_length_an_unset_field_and_evaluation_on_training_data(run_main):
    process = run_main(
        "--config=configs/quickstart.py", "--dry_run", "--config.images=25600", "--config.optimizer.clip_norm=None",
        "--config.data.eval_split=train[:10]", check=True,
    )  # fmt: skip
    assert "training  200 steps of 128 images" in process.stdout
    assert "clip_norm" not in process.stdout
    assert "'train[:10]' of digits, which train[:10] is measured on, shares 10 of its 10 examples" in process.stdout


def test_missing_data_set_says_how_to_prepare_it(tmp_path, run_main):
    process = run_main("--config=configs/vit_l16_i21k.py", f"--workdir={tmp_path / 'run'}", VIT_JAX_DATA=str(tmp_path))
    assert process.returncode == 1
    assert "python -m vit_jax.data.prepare imagenet21k" in process.stderr
    assert "prepare tfds" not in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [TINY, "--config.optimizer.learning_rat=1"],
            "unknown config field 'learning_rat'. Did you mean 'learning_rate'?",
        ),
        ([TINY, "--config.epoch=None"], "unknown config field 'epoch'. Did you mean 'epochs'?"),
        ([TINY, "--config.data=None"], "data is a group of fields and cannot be None"),
        ([TINY, "--config.optimiser.name=sgd"], "unknown config field 'optimiser'. Did you mean 'optimizer'?"),
        ([TINY, "--config.batch_size=many"], "batch_size=many"),
        ([TINY, "--config.optimizer.lr=1"], "unknown config field 'optimizer.lr'. Did you mean 'optimizer.b"),
        ([TINY, "--config.model.patch_size=4"], "unknown config field 'model.patch_size'. Did you mean 'model."),
        ([TINY, "--config.xyzzy.name=4"], "unknown config field 'xyzzy'."),
        ([TINY, "--config.model.name=ViT-Ti4"], "Did you mean 'ViT-Ti/14'"),
        ([TINY, "--lost_after_seconds=nan"], "--lost_after_seconds must be at least 1 and at most 1,000,000, got nan"),
        (
            [TINY, "--config.steps=3", "--config.epochs", "2"],
            "--config.epochs=2.0 and --config.steps=3 both set the length of the run. Leave one of them out.",
        ),
        ([f"{TINY}:stesp=3"], "Did you mean 'steps'"),
        (["--config=configs/quickstrat.py"], "quickstrat.py"),
        ([], "--config is missing"),
        ([TINY, "--workdri=x"], "workdir"),
        ([TINY, "steps=3"], "unexpected argument 'steps=3'"),
    ],
)
def test_mistake_is_one_message_and_status_not_zero(arguments, message, tmp_path, run_main):
    process = run_main(*arguments, f"--workdir={tmp_path / 'run'}")
    assert process.returncode != 0
    assert message in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()


def test_workdir_of_another_config_is_refused_and_left_as_it_was(finished, tmp_path, run_main):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    arguments = (f"{TINY}:steps=400,checkpoint=100", f"--workdir={workdir}", "--config.optimizer.learning_rate=0.5")
    process = run_main(*arguments)
    assert process.returncode == 1
    assert "optimizer.learning_rate: 0.001 -> 0.5" in process.stderr
    assert "--allow_config_change" in process.stderr
    assert differences(workdir, finished[0]) == []
    run_main(*arguments, "--allow_config_change", check=True)


DIVERGES = ["--config.optimizer.learning_rate=1e38", "--config.optimizer.warmup_steps=10"]


def test_nan_loss_stops_the_run_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, run_main):
    workdir = tmp_path / "run"
    process = run_main(
        f"{TINY}:steps=12,checkpoint=1", f"--workdir={workdir}", *DIVERGES, "--config.evals.eval_split.every_steps=100"
    )
    assert process.returncode == 1
    assert " at step " in process.stderr
    assert "Traceback" not in process.stderr
    # The loss of step n is that of the parameters before its update. Step 1 has learning rate 0, step 2 does the harm,
    # step 3 has no finite loss any more.
    assert "at step 3." in process.stderr
    assert "The last good checkpoint is that of step 1." in process.stderr
    assert steps_of(workdir) == [1]
    assert (workdir / "checkpoints" / "diverged-2").is_dir()
    process = run_main(f"{TINY}:steps=4,checkpoint=1", f"--workdir={workdir}", "--allow_config_change", check=True)
    assert "resumed from the checkpoint of step 1" in process.stdout


def test_divergence_before_the_first_checkpoint_says_so(tmp_path, run_main):
    process = run_main(f"{TINY}:steps=12,checkpoint=30", f"--workdir={tmp_path / 'run'}", *DIVERGES)
    assert process.returncode == 1
    assert "No checkpoint was saved before it" in process.stderr
    assert "Traceback" not in process.stderr


def test_truncated_image_is_named_and_the_repaired_run_ends_as_if_nothing_had_happened(tmp_path, run_main):
    data = tmp_path / "data"
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            for number in range(40):
                write_image(data / split / name / f"{number}.jpg", 60 * label + number)
    arguments = (f"{TINY}:steps=6,checkpoint=3,data={data}",)
    run_main(*arguments, f"--workdir={tmp_path / 'whole'}", check=True)

    broken = data / "train" / "dog" / "7.jpg"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    process = run_main(*arguments, f"--workdir={tmp_path / 'run'}")
    assert process.returncode == 1
    assert f"cannot read {broken}: " in process.stderr
    assert "Traceback" not in process.stderr
    broken.write_bytes(content)
    run_main(*arguments, f"--workdir={tmp_path / 'run'}", check=True)
    assert differences(tmp_path / "run", tmp_path / "whole") == []


def mounted(script, **environment):
    """Runs a bash script where it may mount file systems, in a namespace of its own; skips if that is forbidden."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-ec"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*command, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("mount namespaces are not permitted here")
    return subprocess.run(
        [*command, script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_read_only_workdir_is_refused(tmp_path, compilation_cache):
    command = " ".join(main_command(f"{TINY}:steps=4", f"--workdir={tmp_path}/run"))
    process = mounted(f"mount -t tmpfs -o ro tmpfs {tmp_path}; {command}", **main_environment(compilation_cache))
    assert process.returncode == 1
    assert f"cannot write to {tmp_path}/run: Read-only file system" in process.stderr
    assert "Traceback" not in process.stderr


def test_full_disk_ends_the_run_with_the_last_checkpoint_intact_and_free_space_lets_it_resume(
    finished, tmp_path, compilation_cache, run_main
):
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = (f"{TINY}:steps=400,checkpoint=100", f"--workdir={disk}/run")
    command = " ".join(main_command(*arguments))
    script = f"""
        mount -t tmpfs -o size=3m tmpfs {disk}
        head -c 1650k /dev/zero > {disk}/ballast
        status=0; {command} > {tmp_path}/first.log 2>&1 || status=$?
        cp -r {disk}/run {tmp_path}/run
        exit $status
    """
    process = mounted(script, **main_environment(compilation_cache))
    log = (tmp_path / "first.log").read_text()
    assert process.returncode == 1, log + process.stderr
    assert "No space left on device" in log
    assert "Complete checkpoints: " in log
    assert "Traceback" not in log
    run_main(arguments[0], f"--workdir={tmp_path}/run", check=True)
    assert differences(tmp_path / "run", finished[0]) == []
