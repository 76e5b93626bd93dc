"""The paper's studies in the report: what is compared with what, numbers, early stopping, scales, pictures."""

import json
import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from tests.report.study_runs import JFT, write_all_studies, write_on_jft, write_small
from tests.report.workdirs import write_fine_tuning, write_json, write_starts
from vit_jax.paper import figures_in_words
from vit_jax.report import __main__ as report
from vit_jax.report.collect import find
from vit_jax.report.paper_tables import table_5
from vit_jax.report.pretrained import pre_trained_models
from vit_jax.report.studies import STUDIES, find_comparisons, study_tables
from vit_jax.report.study_figures import draw_studies
from vit_jax.report.subjects import find_subjects

GOLDEN = pathlib.Path(__file__).parent / "studies.md"


def compared_in(folder):
    return find_comparisons(find_subjects(find([str(folder)]).models))


def tables_of(folder):
    return {table.name: table for table in study_tables(compared_in(folder))}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Runs of every study in one folder, and the report of them."""
    folder = tmp_path_factory.mktemp("studies")
    write_all_studies(folder / "runs")
    assert report.main([str(folder / "runs"), f"--out={folder / 'out'}"]) == 0
    return folder


@pytest.fixture(scope="module")
def compared(everything):
    return compared_in(everything / "runs")


@pytest.fixture(scope="module")
def tables(compared):
    return {table.name: table for table in study_tables(compared)}


def test_report_of_all_studies_is_as_before(everything):
    """If a change is meant: VIT_JAX_GOLDEN=1 writes tests/report/studies.md."""
    lines = (everything / "out/report.md").read_text().splitlines()
    text = "\n".join(lines[lines.index(next(line for line in lines if line.startswith("## Table"))) :]) + "\n"
    text = text.replace(str(everything), "").partition("## All runs")[0]
    text = "\n".join(" ".join(re.sub("-{3,}", "-", line).split()) for line in text.splitlines())  # any folder's width
    if os.environ.get("VIT_JAX_GOLDEN"):
        GOLDEN.write_text(text + "\n")
    assert text + "\n" == GOLDEN.read_text()


def test_each_study_has_a_table_and_a_picture(everything):
    names = {path.name for path in (everything / "out").iterdir()}
    pictures = ("figure_4", "figure_5_other", "figure_8", "figure_9", "figure_13")
    others = ("table_7_other", "table_8_other", "figure_4_other", "figure_8_other", "figure_9_other")
    assert {f"{name}.csv" for name in (*pictures, *others)} <= names
    for name in (*pictures, *(name for name in others if name.startswith("figure"))):
        pixels = np.asarray(Image.open(everything / f"out/{name}.png").convert("L"))
        assert pixels.shape[1] > 800 and 0.01 < np.mean(pixels < 250) < 0.5


def test_means_and_deviations_over_seeds_match_numpy(tmp_path):
    values = np.random.default_rng(0).uniform(0.3, 0.6, (2, 4))
    for (place, seed), value in np.ndenumerate(values):
        positions = {"position_embedding": ("none", "learned_1d")[place]}
        write_small(tmp_path / f"{place}_{seed}", value, seed=seed, model_fields=positions)
    table = tables_of(tmp_path)["table_8_other"]
    ours = {row[1]: cell.ours for (row, _), cell in table.cells.items()}
    for place, name in enumerate(("none", "learned_1d")):
        assert ours[name].mean == pytest.approx(100 * np.mean(values[place]))
        assert ours[name].std == pytest.approx(100 * np.std(values[place], ddof=1))
        assert ours[name].seeds == 4


def test_small_runs_and_the_papers_data_are_never_in_one_table(compared, tables):
    for each in compared:
        data = {member.data for member in each.members}
        assert data == {"cifar10.zip"} if not each.is_papers else all(name.startswith("JFT-300M") for name in data)
    for name, table in tables.items():
        assert ("not the paper's data" in table.title) == name.endswith("_other")
        assert not any(cell.paper for cell in table.cells.values())  # no figure of a study has published numbers


def test_figure_4_compares_a_model_over_sizes_and_says_where_it_is_ahead(tables):
    rows = [row[:2] for row in tables["figure_4"].rows]
    assert ("ViT-B/32", "9,000,000") in rows and ("R50x1", "303,000,000") in rows
    assert not any(model.startswith(("ViT-L/32", "Axial")) for model, _ in rows)  # the shapes have one size each
    by_images = "9,000,000: -12.00, 30,000,000: -5.00, 90,000,000: +2.00, 303,000,000: +5.00"
    assert f"ViT-B/32 minus R50x1, 5-shot ImageNet, by images: {by_images}" in tables["figure_4"].remarks
    small = "ViT-Ti/4 minus R26x1, accuracy, test, by images: 1,000: -9.60, 5,000: -3.60, 50,000: +2.40"
    assert small in tables["figure_4_other"].remarks


def test_figure_8_has_compute_relative_to_the_model_that_all_axes_share(tables):
    table = tables["figure_8"]
    relative = {row[:5]: cell.ours.mean for (row, name), cell in table.cells.items() if name == "relative compute"}
    assert relative["8", "1024", "2048", "16", "32"] == 1
    assert relative["16", "1024", "2048", "16", "32"] == pytest.approx(2, rel=0.05)  # twice the layers
    assert relative["8", "1024", "2048", "16", "16"] == pytest.approx(4, rel=0.05)  # four times the tokens


def test_figure_8_draws_a_line_through_the_base_for_each_dimension(compared):
    figure = draw_studies(compared)["figure_8"][1]
    (axes,) = (each for each in figure.axes if each.containers)
    lines = {each.get_label(): each.lines[0].get_xydata().tolist() for each in axes.containers}
    assert lines.keys() == {"depth", "width", "MLP width", "patch size", "several dimensions"}
    assert all([1.0, 50.0] in [[round(x, 6), round(y, 6)] for x, y in line] for line in lines.values())


def test_figure_9_draws_the_course_of_training(compared):
    figure = draw_studies(compared)["figure_9"][1]
    lines = {each.get_label(): each.lines[0].get_xydata() for each in figure.axes[0].containers}
    assert lines.keys() == {"cls, lr 0.0008", "gap, lr 0.0008", "gap, lr 0.0003"}
    np.testing.assert_allclose(lines["gap, lr 0.0003"], [[3.5, 30.05], [7, 60.1]], rtol=1e-3)


def test_networks_that_differ_in_something_else_are_not_compared(tmp_path):
    for number, kind in enumerate(("none", "learned_1d", "learned_2d")):
        fields = {"model_fields": {"position_embedding": kind}, "label_smoothing": 0.1 * (number == 2)}
        write_small(tmp_path / kind, 0.5, **fields)
    rows = tables_of(tmp_path)["table_8_other"].rows
    assert sorted(row[1] for row in rows) == ["learned_1d", "none"]


def test_a_run_of_a_study_page_belongs_to_that_study_alone(tmp_path):
    command = "python -m vit_jax.main --config=configs/studies/figure9_pooling.py:scale=small --workdir=x"
    for images in (1_000, 5_000):
        path = write_small(tmp_path / str(images), 0.5, images=images)
        write_starts(path, [(0, {})], command)
    assert compared_in(tmp_path) == []
    for images in (1_000, 5_000):
        write_starts(tmp_path / str(images), [(0, {})], command.replace("figure9_pooling", "figure4_data_size"))
    assert [each.study.name for each in compared_in(tmp_path)] == ["figure_4"]


def test_early_stopping_shows_the_numbers_of_the_step_that_counts(tmp_path):
    runs = [write_small(tmp_path / f"final/{name}/seed_0", 0.6, images=n) for name, n in (("a", 1_000), ("b", 5_000))]
    final = [{"workdir": str(run.relative_to(tmp_path)), "step": 250, "metrics": {}, "seed": 0} for run in runs]
    tasks = {run.parent.name: {"trials": [], "final": [each]} for run, each in zip(runs, final, strict=True)}
    write_json(tmp_path / "sweep.json", {"metric": "accuracy", "tasks": tasks, "means": {}})
    table = tables_of(tmp_path)["figure_4_other"]
    ours = [cell.ours for cell in table.cells.values()]
    assert [score.mean for score in ours] == [pytest.approx(30.0)] * 2  # at half of the run, half of the last
    assert all(any(note.startswith("early stopping") for note in score.notes) for score in ours)
    tasks["a"]["final"][0]["step"] = "soon"
    write_json(tmp_path / "sweep.json", {"metric": "accuracy", "tasks": tasks, "means": {}})
    assert any("is damaged" in line for line in find([str(tmp_path)]).left_out)


def test_early_stopping_at_a_step_without_evaluation_leaves_the_run_out(tmp_path):
    run = write_small(tmp_path / "final/seed_0", 0.6)
    write_small(tmp_path / "other", 0.6, steps=100)
    task = {"trials": [], "final": [{"workdir": str(run.relative_to(tmp_path)), "step": 7, "metrics": {}, "seed": 0}]}
    write_json(tmp_path / "sweep.json", {"metric": "accuracy", "tasks": {"a": task}, "means": {}})
    assert any("lacks the evaluation of step 7" in line for line in find([str(tmp_path)]).left_out)


def test_numbers_after_fine_tuning_are_columns_of_the_pre_training(tmp_path):
    for name, rate, value in (("adamw", 1e-3, 0.9), ("sgd", 0.1, 0.8)):
        fields = {"optimizer__name": name, "optimizer__learning_rate": rate, "model_fields": {"stages": (2, 2, 2)}}
        pre = write_small(tmp_path / f"pre_{name}", 0.6, "R26x1", **fields)
        write_fine_tuning(tmp_path / f"fine_{name}", "pets", value, model="R26x1", weights=pre)
    table = tables_of(tmp_path)["table_7_other"]
    assert table.columns == ["accuracy, test", "fine-tuned on Pets at 384 px"]
    ours = {(row[1], name): cell.ours.mean for (row, name), cell in table.cells.items()}
    assert ours["Adam", "fine-tuned on Pets at 384 px"] == pytest.approx(90)
    assert ours["SGD", "accuracy, test"] == pytest.approx(60)


def test_half_finished_and_damaged_runs_are_left_out_with_a_line(tmp_path):
    for images in (1_000, 5_000):
        write_small(tmp_path / f"{images}", 0.5, images=images)
    write_small(tmp_path / "half", 0.5, images=10_000, unfinished=True)
    (write_small(tmp_path / "damaged", 0.5, images=25_000) / "model.json").write_text("{")
    nan = write_small(tmp_path / "nan", 0.5, images=2_500)
    rows = [json.loads(line) for line in (nan / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["test/accuracy"] = float("nan")
    (nan / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = find([str(tmp_path)])
    assert {row[1] for row in tables_of(tmp_path)["figure_4_other"].rows} == {"1,000", "5,000"}
    for name, why in (("half", "not finished"), ("damaged", "model.json"), ("nan", "not a finite number")):
        assert any(name in line and why in line for line in found.left_out)


def test_part_of_imagenet_or_another_subset_of_jft_is_not_the_papers(tmp_path):
    for images in (9_000_000, 500_000):
        split = {"data__train_split": f"train[:{images}]", "images": images}
        write_on_jft(tmp_path / str(images), "ViT-B/32", 0.4, **split)
    write_on_jft(tmp_path / "all", "ViT-B/32", 0.6)
    tables = tables_of(tmp_path)
    assert {row[1] for row in tables["figure_4"].rows} == {"9,000,000", f"{JFT:,}"}
    assert "figure_4_other" not in tables  # one size alone compares nothing


def test_pre_training_without_labels_is_not_in_the_row_of_that_with_labels(tmp_path):
    pre = write_on_jft(tmp_path / "pre", "ViT-B/16", 0.3, objective="masked_patches")
    write_fine_tuning(tmp_path / "fine", "imagenet2012", 0.799, weights=pre)
    rows = {
        row for (row, _), cell in table_5(pre_trained_models(find([str(tmp_path)]).models)).cells.items() if cell.ours
    }
    assert rows == {("JFT-300M (masked patches)", "ImageNet")}
    assert "figure_4" not in tables_of(tmp_path)


def test_axial_models_have_compute_and_speed(tmp_path):
    for number, model in enumerate(("Axial-ViT-B/32", "ViT-B/32")):
        path = write_on_jft(tmp_path / str(number), model, 0.6 + 0.01 * number)
        with (path / "metrics.jsonl").open("a") as file:
            for rate in (1.0, 100.0 + number, 1000.0):
                file.write(json.dumps({"step": 1, "time/images_per_second_per_core": rate}) + "\n")
    table = tables_of(tmp_path)["figure_13"]
    ours = {(row[0], name): cell.ours.mean for (row, name), cell in table.cells.items()}
    assert ours["ViT-B/32", "images/s and core in training"] == 101  # the median
    assert ours["ViT-B/32", "exaFLOPs"] == pytest.approx(55, rel=0.03)  # table 6
    assert ours["Axial-ViT-B/32", "exaFLOPs"] > 1.5 * ours["ViT-B/32", "exaFLOPs"]  # "at the cost of more compute"


def test_statements_are_about_figures_and_tables_of_the_report(everything):
    shown = {study.name for study in STUDIES} | {"figure_2"}
    assert figures_in_words.STATEMENTS.keys() <= shown
    text = (everything / "out/report.md").read_text()
    assert figures_in_words.STATEMENTS["figure_4"] in text and "curves without numbers" in text
