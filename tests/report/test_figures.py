"""Figures 2, 3, 5, 10, 11 and 12 of the report: published numbers, ours, runs with parameters, damaged files."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from matplotlib.container import BarContainer

from tests.conftest import ROOT
from tests.report.study_runs import write_small
from tests.report.test_report import models_in, write_all_vtab, write_pre_training
from tests.report.workdirs import write_fine_tuning, write_json, write_starts
from vit_jax.paper import related, tables
from vit_jax.report import __main__ as report
from vit_jax.report import model_pictures
from vit_jax.report.collect import find
from vit_jax.report.figure_tables import FIGURE_2_PAPER, figure_2, figure_3, figure_5
from vit_jax.report.hardware_figures import LEFT, RIGHT, draw_hardware, hardware_tables
from vit_jax.report.pretrained import AVERAGE_OF
from vit_jax.report.study_figures import draw_figure_2

WORKDIRS = pathlib.Path(__file__).parent.parent / "golden/workdirs"


def test_figure_2_has_groups_that_are_published_and_says_which_are_not():
    table = figure_2([])
    paper = {(row[0], column): cell.paper.mean for (row, column), cell in table.cells.items()}
    vit, bit, vivi, s4l = FIGURE_2_PAPER
    natural = tables.TABLE_9["ViT-H/14", "JFT-300M"]["natural"]
    assert paper["natural (7)", vit] == pytest.approx(np.mean(natural))
    assert (paper["all 19", vit], paper["all 19", bit]) == (77.63, 76.29)  # table 2
    everything = [score for group in related.S4L_VTAB.values() for score in group]
    assert len(everything) == 19 and paper["all 19", s4l] == pytest.approx(np.mean(everything))
    assert [key for key in paper if key[1] == vivi] == [] and [key[0] for key in paper if key[1] == bit] == ["all 19"]
    assert vivi in table.columns and any("VIVI are not published as numbers" in remark for remark in table.remarks)


def test_figure_2_has_our_groups_beside_them(tmp_path):
    values = write_all_vtab(tmp_path)
    table = figure_2(models_in(tmp_path))
    ours = table.cells[("all 19",), "ViT-L/16, ImageNet-21k"].ours
    by_seed = np.mean(list(values.values()), axis=0)
    assert ours.mean == pytest.approx(by_seed.mean()) and ours.std == pytest.approx(by_seed.std(ddof=1))
    first = draw_figure_2(table).axes[0]
    heights = {
        each.get_label(): each.patches[0].get_height() for each in first.containers if isinstance(each, BarContainer)
    }
    assert heights["ViT-L/16, ImageNet-21k, ours"] == pytest.approx(by_seed.mean())
    assert heights["ViT-H/14, JFT-300M, published"] == 77.63


def test_figure_3_is_the_row_of_table_5_with_the_published_bit():
    paper = {(row[0], column): cell.paper.mean for (row, column), cell in figure_3([]).cells.items() if cell.paper}
    assert paper["ImageNet", "ViT-L/32"] == 71.16 and paper["JFT-300M", "R152x4"] == 87.54
    assert ("ImageNet", "R50x1") not in paper  # no number is published


def test_figure_5_has_the_mean_of_five_by_compute(tmp_path):
    pre = write_pre_training(tmp_path / "pre")
    names = {"ImageNet": "imagenet2012", "CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "Pets": "pets"}
    for place, task in enumerate(AVERAGE_OF):
        name = names.get(task, "flowers")
        write_fine_tuning(tmp_path / name, name, 0.8 + 0.02 * place, weights=pre)
    table = figure_5(models_in(tmp_path))
    row = ("ViT-B/16", "JFT-300M", "7")
    theirs = [tables.TABLE_6[1].scores[task] for task in AVERAGE_OF]
    assert table.cells[row, "Average-5"].paper.mean == pytest.approx(np.mean(theirs))
    assert table.cells[row, "Average-5"].ours.mean == pytest.approx(84)
    assert table.cells[row, "exaFLOPs"].difference == pytest.approx(0, abs=0.02 * 224)


def test_figure_12_has_both_halves_of_the_benchmarks_files(tmp_path):
    for name in ("figure_12.json", "figure_12_speed.json"):
        shutil.copy(ROOT / "docs" / name, tmp_path / name)
    found = find([str(tmp_path)])
    left, right = hardware_tables(found.hardware)
    assert (left.name, right.name) == (LEFT, RIGHT)
    assert right.cells[("train", "ViT-L/16"), "224 px"].ours.mean == 280  # docs/figure_12.md
    assert right.cells[("train", "ViT-H/14"), "224 px"].ours.mean == 93
    assert "images of 378 pixels, the nearest that the patches tile" in right.to_markdown()
    roofline = left.cells[("TPU v3 core, roofline", "ViT-B/32"), "224 px"].ours.mean
    assert roofline == pytest.approx(6974.08, abs=0.01) and "upper bound" in left.to_markdown()
    assert all(cell.paper is None for table in (left, right) for cell in table.cells.values())
    drawn = draw_hardware(found.hardware)
    train = next(axes for axes in drawn.axes if axes.get_title() == "train")
    lines = {line.get_label(): line.get_xydata().tolist() for line in train.lines}
    assert [224.0, 280.0] in lines["ViT-L/16"] and [378.0, 36.0] in lines["ViT-H/14"]


@pytest.mark.parametrize("content", ["{", '{"cells": []}', '[{"model": "ViT-B/16", "batch": 3}]', "[3]"])
def test_damaged_benchmark_is_one_line(tmp_path, content):
    write_small(tmp_path / "run", 0.5)
    (tmp_path / "figure_12.json").write_text(content)
    assert any("figure_12.json" in line for line in find([str(tmp_path)]).left_out)


def test_failed_cells_of_figure_12_are_left_out(tmp_path):
    cell = {"model": "ViT-B/16", "size": 224, "image_size": 224, "task": "train", "batch": 0, "status": "does not fit"}
    write_json(tmp_path / "figure_12.json", [cell, cell | {"size": 64, "image_size": 64, "batch": 7}])
    (table,) = hardware_tables(find([str(tmp_path)]).hardware)
    assert table.columns == ["64 px"]


@pytest.fixture(scope="module")
def with_parameters(tmp_path_factory):
    """Two finished runs with checkpoints that differ in their learning rate."""
    folder = tmp_path_factory.mktemp("parameters")
    for rate in (0.01, 0.02):
        path = folder / f"runs/{rate}"
        shutil.copytree(WORKDIRS / "run", path)
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        step = max(row["step"] for row in rows if "test/accuracy" in row)
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
        (path / "metrics.jsonl").write_text("".join(kept))
        write_json(path / "summary.json", {"model": "ViT-Ti/4", "steps": step, "epochs": 0.3})
        config = json.loads((path / "config.json").read_text())
        config["optimizer"]["learning_rate"] = rate
        write_json(path / "config.json", config)
    return folder


def test_figures_10_and_11_are_drawn_from_the_parameters_of_runs(with_parameters):
    out = with_parameters / "out"
    arguments = [str(with_parameters / "runs"), f"--out={out}", f"--images={WORKDIRS / 'images'}"]
    assert report.main(arguments) == 0
    text = (out / "report.md").read_text()
    for name in ("figure_10", "figure_11"):
        assert (out / f"{name}.png").stat().st_size > 5_000 and f"({name}.png)" in text
    assert "The paper has pictures without numbers." in text and "Not drawn" not in text
    assert "| ViT-Ti/4 | 0.02 " in text  # the table of the networks


def test_without_images_no_parameters_are_read_and_the_report_says_how_to_draw_them(with_parameters, monkeypatch):
    monkeypatch.setattr(model_pictures, "position_similarities", None)
    out = with_parameters / "without"
    assert report.main([str(with_parameters / "runs"), f"--out={out}"]) == 0
    text = (out / "report.md").read_text()
    assert "python -m vit_jax.analysis distance --weights=" in text and "vit_jax.analysis positions --weights=" in text
    assert not list(out.glob("figure_1*.png"))


def test_runs_without_parameters_are_not_drawn_and_say_so(tmp_path):
    for rate in (0.01, 0.02):
        path = write_small(tmp_path / f"runs/{rate}", 0.5, optimizer__learning_rate=rate)
        write_starts(path, [(0, {})], "python -m vit_jax.main --config=configs/studies/figure10_embeddings.py:run=low")
    assert report.main([str(tmp_path / "runs"), f"--out={tmp_path / 'out'}"]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert text.count("Not drawn") == 2 and not (tmp_path / "out/figure_10.png").exists()


def test_images_need_a_folder_for_the_picture_and_have_to_exist(tmp_path, capsys):
    write_small(tmp_path / "run", 0.5)
    assert report.main([str(tmp_path), "--images=photos"]) == 1
    assert "give --out=FOLDER too" in capsys.readouterr().err
    assert report.main([str(tmp_path), "--images=photos", f"--out={tmp_path / 'out'}"]) == 1
    assert "no file or folder matches 'photos'" in capsys.readouterr().err
    assert not (tmp_path / "out/report.md").exists()
