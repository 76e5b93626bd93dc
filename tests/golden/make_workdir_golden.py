"""Makes tests/golden/workdirs: a run, a sweep, an evaluation and exported weights, with their expected results.

They were written by the version of commit f5672a4, so that tests show that its files can still be used. Only that
version runs this script; the numbers are those of eight CPU devices, as in the tests. In a checkout of it, with this
script and tests/golden/workdirs/config.py copied there:

    cd tests/golden/workdirs
    PYTHONPATH=../../.. python ../make_workdir_golden.py

run/            SIGTERM came in step 37 of 60: between two checkpoints, two logged rows and two evaluations
sweep/          four finished runs, without their parameters
evaluation/     `python -m vit_jax.main --mode=eval` of run/
weights.npz     as `python -m vit_jax.weights convert run weights.npz` writes it, with weights.npz.json
images/         three digits, for predictions
end.npz         the parameters of the same run when nothing interrupts it
expected.json   metrics, predictions, mistakes, and rows of the report
layouts.json    the arrays of the training state by name, for each option that changes them
"""

import contextlib
import csv
import io
import json
import os
import pathlib
import platform
import shutil
import signal
import sys

os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import cv2
import jax
import numpy as np
from sklearn.datasets import load_digits

from vit_jax import experiment as experiments
from vit_jax import mistakes, predict, report, sweep
from vit_jax.checkpoints import Checkpoints
from vit_jax.evaluate import evaluate
from vit_jax.train import Stopped, train
from vit_jax.weights import load, save

STOP_AT = 37
SWEEP = ("--grid=optimizer.learning_rate=0.003,0.01", "--seeds=2", "--config.steps=12", "--config.polyak_decay=None",
         "--config.data.eval_split=train[90%:]", "--final=data.train_split=train,data.eval_split=test")  # fmt: skip
# Fields that change config.py.
LAYOUTS = {
    "adamw": {},
    "sgd": {"optimizer.name": "sgd"},
    "sgd_bfloat16": {"optimizer.name": "sgd", "optimizer.momentum_dtype": "bfloat16"},
    "adamw_bfloat16": {"optimizer.momentum_dtype": "bfloat16"},
    "parameters_bfloat16": {"model.param_dtype": "bfloat16"},
    "no_polyak": {"polyak_decay": None},
    "no_clipping": {"optimizer.clip_norm": None},
    "no_weight_decay": {"optimizer.weight_decay": 0.0},
    "constant": {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0},
    "layer_decay": {"optimizer.layer_decay": 0.75},
    "accumulation": {"accumulation_steps": 4},
    "rbg": {"rng": "rbg"},
    "scan_layers": {"model.scan_layers": True},
    "scan_layers_layer_decay": {"model.scan_layers": True, "optimizer.layer_decay": 0.75},
    "train_only": {"train_only": ("^head/",)},
    "train_only_sgd": {"train_only": ("^head/", "encoder_norm"), "optimizer.name": "sgd"},
    "gap": {"model.pool": "gap"},
    "map": {"model.pool": "map"},
    "pre_logits": {"model.pre_logits": True},
    "relative": {"model.position_embedding": "relative"},
    "learned_2d": {"model.position_embedding": "learned_2d", "model.position_embedding_at": "every_layer"},
    "resnet": {"model.name": "R50x1", "model.stages": (1, 1), "optimizer.name": "sgd"},
    "hybrid": {"model.name": "R+Ti/16", "model.num_layers": 1, "polyak_decay": None},
}
SIZES = tuple(f"model.{name}" for name in ("num_layers", "hidden_dim", "mlp_dim", "num_heads", "dropout_rate"))


def make_config():
    sys.path.insert(0, ".")
    import config

    return config.get_config()


def interrupt(step):
    """SIGTERM comes while a step is taken."""
    make = experiments.make_step

    def make_noted(*args):
        take, steps = make(*args), iter(range(1, 1000))

        def noted(*args):
            if next(steps) == step:
                signal.raise_signal(signal.SIGTERM)
            return take(*args)

        return noted

    experiments.make_step = make_noted
    return lambda: setattr(experiments, "make_step", make)


def make_run(config):
    undo = interrupt(STOP_AT)
    try:
        train(config, "run")
        raise AssertionError("nothing interrupted the run")
    except Stopped:
        undo()


def describe(tree):
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def make_layouts():
    """By option, the trees of arrays that the state consists of; `trees` holds each that is different once."""
    trees, layouts = {}, {}
    for name, fields in LAYOUTS.items():
        config = make_config()
        resized = dict.fromkeys(SIZES) | {"data.image_size": 32} if "model.name" in fields else {}
        changed = resized | fields
        with config.ignore_type():
            config.update_from_flattened_dict(changed)
        parts = {}
        for key, array in describe(experiments.build(config).abstract_state).items():
            part, bracket, rest = key.partition("['")
            parts.setdefault(part, {})[bracket + rest] = array
        names = {part: trees.setdefault(json.dumps(tree), f"{name}{part}") for part, tree in parts.items()}
        layouts[name] = {"fields": changed, "state": names}
    return {"trees": {name: json.loads(tree) for tree, name in trees.items()}, "layouts": layouts}


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def captured(call, *arguments):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert call(list(arguments)) == 0
    return output.getvalue()


def read_rows(path):
    rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def clean(folder):
    """Deletes files that no test needs, and the names of this machine."""
    # Orbax leaves there what it has merged into tree/d.
    for path in [*folder.rglob("tensorboard"), *folder.rglob("ocdbt.process_0")]:
        shutil.rmtree(path)
    for pattern in ("curves.png", ".lock", "*.log"):
        for path in folder.rglob(pattern):
            path.unlink()
    for path in folder.rglob("starts.jsonl"):
        command = f"python -m vit_jax.main --config=config.py --workdir={path.parent}"
        starts = [json.loads(line) | {"host": "host", "command": command} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(start) + "\n" for start in starts))
    for path in folder.rglob("commit_success.txt"):
        path.write_text(path.read_text().replace(f"{os.getcwd()}/", ""))
    for path in filter(pathlib.Path.is_file, folder.rglob("*")):
        content = path.read_bytes()
        for word in (os.getcwd(), sys.prefix, f'"{platform.node()}"'):
            assert word.encode() not in content, (path, word)


def main():
    """Writes everything."""
    jax.config.update("jax_num_cpu_devices", 8)
    config = make_config()
    for name in ("run", "sweep", "evaluation", "images", "whole", "mistakes", "report"):
        shutil.rmtree(name, ignore_errors=True)

    whole = train(config, "whole")
    parts = experiments.build(config)
    with Checkpoints("whole/checkpoints", keep=1) as checkpoints:
        _, state, _ = checkpoints.restore_latest(parts.abstract_state)
    end = {"params" + jax.tree_util.keystr(path): np.asarray(leaf)
           for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}  # fmt: skip
    np.savez_compressed("end.npz", **end)
    expected = {"rows": read_rows("whole/metrics.jsonl")}
    expected["summary"] = {key: whole[key] for key in ("steps", "epochs", "test/accuracy", "test/best_accuracy")}

    make_run(config)
    clean(pathlib.Path("run"))
    for path in sorted(pathlib.Path("run/best").glob("[0-9]*"), key=lambda path: int(path.name))[:-1]:
        shutil.rmtree(path)
    weights = load("run")
    save(weights, "weights.npz")
    config.weights = "run"
    evaluated = evaluate(config, "evaluation")
    expected["evaluation"] = {key: evaluated[key] for key in ("model", "parameters", "metrics", "overlap")}

    images, labels = load_digits(return_X_y=True)
    pathlib.Path("images").mkdir()
    for number in (3, 5, 8):
        digit = images[np.flatnonzero(labels == number)[0]].reshape(8, 8)
        cv2.imwrite(f"images/{number}.png", np.round(digit * 255 / 16).astype(np.uint8))
    predicted = captured(predict.main, "--weights=run", "--json", "--top=10", "images")
    expected["predictions"] = [json.loads(line) for line in predicted.splitlines()]

    shutil.copytree("run", "mistakes")
    captured(mistakes.main, "mistakes")
    matrix = np.zeros((10, 10), int)
    for row in read_csv("mistakes/predictions.csv"):
        matrix[int(row["true"]), int(row["predicted"])] += 1
    expected["confusion"] = matrix.tolist()

    expected["sweep"] = list(SWEEP)
    print(captured(sweep.main, "--config=config.py", "--workdir=sweep", *SWEEP))
    for name in ("checkpoints", "best"):
        for path in pathlib.Path("sweep").rglob(name):
            shutil.rmtree(path)
    clean(pathlib.Path("sweep"))
    print(captured(report.main, "run", "sweep", "evaluation", "--out=report"))
    expected["results"] = read_csv("report/results.csv")
    expected["runs"] = read_csv("report/runs.csv")

    pathlib.Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    pathlib.Path("layouts.json").write_text(json.dumps(make_layouts(), indent=1) + "\n")
    for name in ("whole", "mistakes", "report", "__pycache__"):
        shutil.rmtree(name, ignore_errors=True)


if __name__ == "__main__":
    main()
