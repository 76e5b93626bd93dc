"""Writes the files of runs, evaluations and sweeps without training. `test_collect.py` has real ones."""

import json

from vit_jax.config import base_config, flatten
from vit_jax.report.measured import vtab_test_images
from vit_jax.run import facts

# What configs/transfer.py and configs/vtab.py set, and how many test images there are.
FINE_TUNING = {
    "imagenet2012": ("tfds:imagenet2012", "train", "validation", 20_000, 50_000),
    "cifar10": ("tfds:cifar10", "train", "test", 10_000, 10_000),
    "cifar100": ("tfds:cifar100", "train", "test", 10_000, 10_000),
    "pets": ("tfds:oxford_iiit_pet", "train", "test", 500, 3_669),
    "flowers": ("tfds:oxford_flowers102", "train+validation", "test", 500, 6_149),
}
# What both set.
OPTIMIZER = {
    "optimizer__name": "sgd",
    "optimizer__learning_rate": 0.01,
    "optimizer__clip_norm": 1.0,
    "optimizer__warmup_steps": 500,
    "optimizer__momentum_dtype": "bfloat16",
}
# The dropout that configs/transfer.py fine-tunes weights with, where it is not 0.
DROPOUT_AFTER = {name: 0.1 for name in ("vit_b16_i21k", "vit_b32_i21k", "vit_l16_i21k", "vit_r50b16_i21k")}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def make_config(fields):
    config = base_config()
    config.unlock()
    config.model.name = None
    config.update_from_flattened_dict(fields)
    return json.loads(config.to_json())


def write_run(
    path, model, metrics, *, steps, images=1000, model_fields=None, core_days=None, unfinished=False, **fields
):
    """A run with these metrics, shares, at its last step. `images` is the number of training images."""
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    fields = {"steps": steps, "batch_size": 512, **fields}
    write_json(path / "config.json", make_config(fields))
    write_json(path / "model.json", {"name": model, "num_classes": 10, "dtype": "bfloat16", **(model_fields or {})})
    rows = [{"step": max(1, steps // 2), **{name: value / 2 for name, value in metrics.items()}}]
    rows.append({"step": steps, "train/loss": 0.5, "time/images_per_second": 10.0})
    if not unfinished:
        rows.append({"step": steps, **metrics})
        summary = {"model": model, "dataset": fields["data.dataset"], "steps": steps}
        summary["epochs"] = steps * fields["batch_size"] / images
        if core_days is not None:
            summary["tpuv3_core_days"] = core_days
        write_json(path / "summary.json", summary)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_facts(path, *, num_images=1000, train="train", evaluation="eval"):
    """The record of the data: the number of training images, and fingerprints."""
    train = facts.SplitFacts("tfds:cifar10", None, "train", None, num_images, train)
    evaluated = facts.SplitFacts("tfds:cifar10", None, "test", None, 10_000, evaluation)
    facts.write_facts(path, facts.RunFacts(10, None, 1, "softmax", {}, train, evaluated))


def write_starts(path, starts, command=""):
    """The starts of a run: the step of each, and the fields in which its config differs from that in config.json."""
    config = flatten(json.loads((path / "config.json").read_text()))
    lines = [
        {
            "step": step,
            "command": command,
            "config": make_config(config | {name.replace("__", "."): value for name, value in fields.items()}),
        }
        for step, fields in starts
    ]
    (path / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_fine_tuning(path, task, accuracy, *, model="ViT-B/16", weights="vit_b16_i21k", seed=0, real=None, **fields):
    """A final run of configs/transfer.py."""
    dataset, train, split, steps, examples = FINE_TUNING[task]
    split = fields.get("data__eval_split", split)
    metrics = {f"{split}/accuracy": accuracy, f"{split}/top5_accuracy": 1.0, f"{split}/examples": examples}
    if real is not None:
        metrics |= {"real/accuracy": real, "real/examples": 46_837}
    defaults = {
        "data__dataset": dataset,
        "data__train_split": train,
        "data__eval_split": split,
        "data__image_size": 384,
        "weights": str(weights),
        "seed": seed,
        "steps": steps,
        **OPTIMIZER,
    }
    fields = {**defaults, **fields}
    if weights in DROPOUT_AFTER and "model_fields" not in fields:
        fields["model_fields"] = {"dropout_rate": DROPOUT_AFTER[weights]}
    return write_run(path, model, metrics, **fields)


def write_vtab(path, task, accuracy, *, model="ViT-L/16", weights="vit_l16_i21k", seed=0, **fields):
    """A final run of configs/vtab.py."""
    defaults = {
        "data__dataset": f"vtab:{task}",
        "data__train_split": "train800val200",
        "data__eval_split": "test",
        "data__image_size": 384,
        "weights": str(weights),
        "seed": seed,
        "steps": 2_500,
        **OPTIMIZER,
    }
    fields = {**defaults, **fields}
    split, (examples, *_) = fields["data__eval_split"], vtab_test_images(task)
    return write_run(path, model, {f"{split}/accuracy": accuracy, f"{split}/examples": examples}, **fields)


def write_evaluation(path, weights, metrics, *, model="ViT-B/16", **fields):
    """What --mode=eval leaves."""
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    content = {
        "weights": str(weights),
        "model": model,
        "model_fields": {
            "name": model,
            "num_classes": 10,
            "dtype": "bfloat16",
            **{name.removeprefix("model."): value for name, value in fields.items() if name.startswith("model.")},
        },
        "image_size": fields.get("data.image_size", 224),
        "parameters": 86_000_000,
        "time": "2026-11-21T12:00:00+00:00",
        "devices": {},
        "metrics": metrics,
        "config": make_config(fields),
    }
    write_json(path / "evaluation.json", content)
    return path


def write_sweep(path, trials, final, name="task"):
    """The sweep.json beside runs that are there: folders, relative to the sweep's."""

    def show(workdir):
        return {"overrides": {}, "seed": 0, "workdir": workdir, "status": "finished", "reason": "", "metrics": {}}

    task = {"config": "configs/x.py", "arguments": [], "trials": [*map(show, trials)], "final": [*map(show, final)]}
    write_json(path / "sweep.json", {"metric": "accuracy", "tasks": {name: task}, "means": {}})
