"""The report recognises the runs of the pages in configs/studies/ by what these record."""

import json
import pathlib

import pytest

from tests.conftest import ROOT
from tests.report.workdirs import write_json
from vit_jax.config import flatten
from vit_jax.report import lineage
from vit_jax.report.collect import find
from vit_jax.report.studies import find_comparisons, study_tables
from vit_jax.report.subjects import find_subjects
from vit_jax.sweep import Sweep
from vit_jax.sweep.trials import call, load_module

# By page: the table's name at each scale, and the networks in it. Figures 3 and 5 and table 7 of the paper's scale are
# of fine-tuned models, which other tests have.
PAGES = {
    "figure4_data_size": {"paper": ("figure_4", 6 * 4), "small": ("figure_4_other", 3 * 6)},
    "figure8_shape": {"paper": ("figure_8", 17), "small": ("figure_8_other", 11)},
    "figure9_pooling": {"paper": ("figure_9", 3), "small": ("figure_9_other", 3)},
    "figure10_embeddings": {"paper": ("figure_10", 3), "small": ("figure_10_other", 3)},
    "table8_position_embeddings": {"paper": ("table_8", 8), "small": ("table_8_other", 8)},
    "figure3_data_sets": {"small": ("figure_3_other", 6)},
    "masked_patches": {"small": ("masked_patches_other", 8)},
    "figure5_compute": {"small": ("figure_5_other", 6)},
    "table7_optimizers": {"small": ("table_7_other", 4)},
    "figure13_axial": {"paper": ("figure_13", 6), "small": ("figure_13_other", 6)},
}


def write_pages_runs(folder, page, scale):
    """A finished run for each task of a page's sweeps: from scratch, then fine-tuned from those."""
    path = str(ROOT / f"configs/studies/{page}.py")
    place = f"{path}:scale={scale}"
    described = call(load_module(place), "get_sweep", place)
    runs = {}
    for sweep in [described] if isinstance(described, Sweep) else described[: 2 if scale == "small" else 1]:
        for name, argument in sweep.tasks.items():
            stage = f",stage={sweep.final['argument.stage']}" if "argument.stage" in sweep.final else ""
            own = f"{path}:{argument}{stage}"
            config = json.loads(call(load_module(own), "get_config", own).to_json())
            if name in sweep.weights:
                config["weights"] = str(runs[sweep.weights[name]])
            runs[name] = write_pages_run(folder / name.replace("/", "_"), config, own)


def write_pages_run(run, config, own):
    """A finished run with a page's config. Without a model's name, it has the model of its weights."""
    fields = flatten(config)
    write_json(run / "config.json", config)
    model = {name[6:]: value for name, value in fields.items() if name.startswith("model.") and value is not None}
    if config["weights"]:
        model = json.loads((pathlib.Path(config["weights"]) / "model.json").read_text()) | model
    write_json(run / "model.json", {"num_classes": 10, **model})
    images = fields["data.expected_train_images"] or 303_000_000
    length = fields["images"] or (fields["epochs"] or 0) * images or fields["steps"] * fields["batch_size"]
    steps = round(length / fields["batch_size"])
    metrics = {f"{fields['data.eval_split']}/accuracy": 0.5} if fields["data.eval_split"] else {}
    for dataset in fields["evals.fewshot.datasets"]:
        metrics[f"fewshot/{dataset.removeprefix('tfds:')}/pre_logits/5shot"] = 0.4
    (run / "metrics.jsonl").write_text(json.dumps({"step": steps, **metrics}) + "\n")
    write_json(run / "summary.json", {"model": model["name"], "steps": steps, "epochs": length / images})
    start = {"step": 0, "command": f"python -m vit_jax.main --config={own} --workdir=x", "config": config}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    return run


@pytest.mark.parametrize(("page", "scale"), [(page, scale) for page, scales in PAGES.items() for scale in scales])
def test_runs_of_a_page_are_one_comparison_of_their_study(tmp_path, monkeypatch, page, scale):
    monkeypatch.setattr(lineage, "_exaflops", lambda *_: 1.0)  # seconds for a ResNet
    write_pages_runs(tmp_path, page, scale)
    found = find([str(tmp_path)])
    table, count = PAGES[page][scale]
    compared = find_comparisons(find_subjects(found.models))
    assert found.left_out == []
    if table == "table_8":
        assert not compared  # the paper's own table has them
        return
    assert [(each.name, len(each.rows)) for each in study_tables(compared)] == [(table, count)]
    if page in ("masked_patches", "figure3_data_sets", "figure5_compute", "table7_optimizers"):
        assert all(any(name.startswith("fine-tuned on downstream") for name in each.measures) for each in compared)
