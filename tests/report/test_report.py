"""The paper's tables and figures with our numbers: values, choice of settings, notes, files."""

import csv
import io
import itertools
import re
import statistics

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tests.report.workdirs import write_evaluation, write_fine_tuning, write_json, write_run, write_vtab
from vit_jax.data.vtab import TASKS as VTAB_TASKS
from vit_jax.paper import tables as paper
from vit_jax.report import __main__ as report
from vit_jax.report import figures
from vit_jax.report.collect import find
from vit_jax.report.figure_tables import bit_area
from vit_jax.report.paper_tables import paper_tables, table_2, table_5, table_6, table_8, table_9
from vit_jax.report.pretrained import AVERAGE_OF, average_of_five, pre_trained_models, recipe_of, vtab_scores

JFT = 303_000_000


def models_in(folder):
    return pre_trained_models(find([str(folder)]).models)


def cells_of_ours(table):
    return {key: cell for key, cell in table.cells.items() if cell.ours}


def write_pre_training(path, model="ViT-B/16", *, epochs=7, images=JFT, metrics=None, **fields):
    defaults = {"data__dataset": "tfds:jft", "data__image_size": 224, "batch_size": 4096}
    return write_run(
        path, model, metrics or {}, steps=round(epochs * images / 4096), images=images, **defaults | fields
    )


def write_all_vtab(folder, seeds=(0, 1, 2), leave_out=()):
    """Accuracies by task and seed, in percent."""
    random = np.random.default_rng(0)
    values = {task: random.uniform(20, 99, len(seeds)) for task in VTAB_TASKS if task not in leave_out}
    for task, of_seeds in values.items():
        for seed, value in zip(seeds, of_seeds, strict=True):
            write_vtab(folder / f"{task}_{seed}", task, value / 100, seed=seed)
    return values


def test_cell_has_mean_standard_deviation_and_difference(tmp_path):
    accuracies = (0.9880, 0.9905, 0.9871)
    for seed, accuracy in enumerate(accuracies):
        write_fine_tuning(tmp_path / str(seed), "cifar10", accuracy, seed=seed)
    ((key, cell),) = cells_of_ours(table_5(models_in(tmp_path))).items()
    assert key == (("ImageNet-21k", "CIFAR-10"), "ViT-B/16") and cell.paper.mean == 98.95
    assert cell.ours.mean == pytest.approx(100 * np.mean(accuracies))
    assert cell.ours.std == pytest.approx(100 * np.std(accuracies, ddof=1))
    assert cell.difference == pytest.approx(100 * np.mean(accuracies) - 98.95)
    assert cell.ours.notes == ()


def test_differences_from_the_paper_are_noted_below_the_table(tmp_path):
    other = {
        "data__image_size": 224,
        "steps": 100,
        "batch_size": 64,
        "polyak_decay": 0.99,
        "data__train_split": "train[:9%]",
    }
    write_fine_tuning(tmp_path, "cifar10", 0.9, **other)
    text = table_5(models_in(tmp_path)).to_markdown()
    for note in (
        "one seed",
        "at 224 pixels, in the paper at 384",
        "steps=100, in the paper 10000",
        "batch_size=64, in the paper 512",
        "polyak_decay=0.99, in the paper None",
        "data.train_split=train[:9%], in the paper train",
    ):
        assert f"- {note}: ImageNet-21k, CIFAR-10 (ViT-B/16).\n" in text
    assert "±" not in text


def test_imagenet_of_table_2_is_the_one_at_512_with_polyak_averaging_and_of_table_5_that_at_384(tmp_path):
    both = {"model": "ViT-L/16", "weights": "vit_l16_i21k"}
    write_fine_tuning(tmp_path / "384", "imagenet2012", 0.85, **both)
    write_fine_tuning(tmp_path / "512", "imagenet2012", 0.86, data__image_size=512, polyak_decay=0.9999, **both)
    models = models_in(tmp_path)
    ((_, of_2),) = cells_of_ours(table_2(models)).items()
    ((_, of_5),) = cells_of_ours(table_5(models)).items()
    assert (of_2.ours.mean, of_5.ours.mean) == (86.0, 85.0)
    assert of_2.ours.notes == ("one seed", "1 more of other settings: see the table of results")


@pytest.mark.parametrize(
    ("task", "model", "sizes"),
    [
        ("ImageNet", "ViT-L/16", (512,)),
        ("ImageNet", "ViT-H/14", (518,)),
        ("CIFAR-10", "ViT-L/16", (384,)),
        ("ImageNet", "R152x4", ()),  # BiT's own
    ],
)
def test_resolutions_of_table_2(task, model, sizes):
    assert recipe_of(task, model, table_2=True).image_sizes == sizes


def test_imagenet_at_384_stands_in_table_2_with_a_note(tmp_path):
    write_fine_tuning(tmp_path, "imagenet2012", 0.85, real=0.88, model="ViT-L/16", weights="vit_l16_i21k")
    cells = cells_of_ours(table_2(models_in(tmp_path)))
    assert [key[0][0] for key in cells] == ["ImageNet", "ImageNet ReaL"]
    for cell in cells.values():
        assert "at 384 pixels, in the paper at 512" in cell.ours.notes
        assert "polyak_decay=None, in the paper 0.9999" in cell.ours.notes


def test_accuracy_does_not_choose_between_settings(tmp_path):
    for seed in range(2):
        write_fine_tuning(tmp_path / f"two_{seed}", "cifar10", 0.90, seed=seed)
    write_fine_tuning(tmp_path / "a_better_one", "cifar10", 0.99, optimizer__learning_rate=0.1)
    ((_, cell),) = cells_of_ours(table_5(models_in(tmp_path))).items()
    assert cell.ours.mean == pytest.approx(90.0)
    assert "1 more of other settings: see the table of results" in cell.ours.notes


def test_checkpoints_of_two_recipes_are_not_mixed(tmp_path):
    write_fine_tuning(tmp_path / "a", "cifar10", 0.95, weights="augreg_b16_i21k")
    write_fine_tuning(tmp_path / "b", "cifar10", 0.90, weights="vit_b16_i21k", seed=1)
    table = table_5(models_in(tmp_path))
    ((_, cell),) = cells_of_ours(table).items()
    assert cell.ours.mean == pytest.approx(90.0) and cell.ours.seeds == 1
    assert table.remarks == ["ViT-B/16, ImageNet-21k: from vit_b16_i21k; not from augreg_b16_i21k."]


def test_no_paper_cell_for_probes_changed_models_scratch_and_other_data(tmp_path):
    write_fine_tuning(tmp_path / "probe", "cifar10", 0.9, train_only=("^head/",))
    write_fine_tuning(tmp_path / "changed", "cifar10", 0.9, model_fields={"num_layers": 4})
    write_fine_tuning(tmp_path / "scratch", "cifar10", 0.9, weights="")
    write_fine_tuning(tmp_path / "elsewhere", "cifar10", 0.9, data__dataset="/data/cifar10.zip")
    cells = cells_of_ours(table_5(models_in(tmp_path)))
    assert [key[1] for key in cells] == ["ViT-B/16 (num_layers=4)"]
    assert all(cell.paper is None for cell in cells.values())


def test_models_and_data_that_the_paper_lacks_have_their_own_cells(tmp_path):
    pre = write_pre_training(tmp_path / "pre", "ViT-S/16", data__dataset="tfds:birds", images=10_000)
    write_fine_tuning(tmp_path / "fine", "pets", 0.7, model="ViT-S/16", weights=pre)
    table = table_5(models_in(tmp_path))
    assert list(cells_of_ours(table)) == [(("birds", "Pets"), "ViT-S/16")]
    assert table.columns[-1] == "ViT-S/16" and table.rows[-1] == ("birds", "Pets")


def test_released_checkpoint_that_was_only_evaluated_says_so(tmp_path):
    fields = {"data__dataset": "tfds:imagenet2012", "data__eval_split": "validation", "data__image_size": 384}
    metrics = {"validation/accuracy": 0.8397, "validation/examples": 50_000}
    write_evaluation(tmp_path, "vit_b16_i21k_in1k_384", metrics, **fields)
    ((key, cell),) = cells_of_ours(table_5(models_in(tmp_path))).items()
    assert key == (("ImageNet-21k", "ImageNet"), "ViT-B/16") and cell.difference == pytest.approx(0)
    assert "a released checkpoint as it is: its fine-tuning was not done here" in cell.ours.notes


def test_vtab_has_means_over_tasks_and_deviations_from_seed_to_seed(tmp_path):
    values = write_all_vtab(tmp_path)
    models = models_in(tmp_path)
    by_seed = np.mean(list(values.values()), axis=0)
    for table, row in ((table_2(models), ("VTAB",)), (table_9(models), ("all", "mean"))):
        ours = table.cells[row, "ViT-L/16, ImageNet-21k"].ours
        assert ours.mean == pytest.approx(by_seed.mean()) and ours.std == pytest.approx(by_seed.std(ddof=1))
    table = table_9(models)
    natural = [values[task.id] for task in VTAB_TASKS.values() if task.group == "natural"]
    ours = table.cells[("natural", "mean"), "ViT-L/16, ImageNet-21k"].ours
    assert ours.mean == pytest.approx(np.mean(natural))
    pets = table.cells[("natural", "Pets"), "ViT-L/16, ImageNet-21k"]
    assert pets.ours.mean == pytest.approx(values["pets"].mean()) and pets.paper.mean == 92.7


def test_vtab_without_all_its_tasks_has_no_mean(tmp_path):
    write_all_vtab(tmp_path, seeds=(0,), leave_out=["dmlab"])
    (model,) = models_in(tmp_path)
    assert vtab_scores(model).keys() == {"natural", "specialized"}


def test_vtab_of_tasks_with_other_seeds_has_no_deviation(tmp_path):
    values = write_all_vtab(tmp_path, seeds=(0, 1), leave_out=["dmlab"])
    write_vtab(tmp_path / "dmlab", "dmlab", 0.4)
    score = vtab_scores(models_in(tmp_path)[0])["mean"]
    assert score.std is None and "its tasks have different seeds, so there is no ±" in score.notes
    assert score.mean == pytest.approx((sum(each.mean() for each in values.values()) + 40) / 19)


def test_means_of_groups_beside_ours_match_the_papers_tasks():
    cells = table_9([]).cells
    assert cells[("specialized", "mean"), "ViT-H/14, JFT-300M"].paper.mean == pytest.approx(
        (83.3 + 96.7 + 91.4 + 76.6) / 4
    )
    for key, mean in paper.TABLE_9_MEANS.items():
        assert cells[("all", "mean"), ", ".join(key)].paper.mean == mean


def test_table_6_takes_a_pre_training_by_its_epochs_and_counts_its_compute(tmp_path):
    for epochs, accuracy in ((7, 0.86), (14, 0.87)):
        pre = write_pre_training(tmp_path / f"pre_{epochs}", "ViT-L/16", epochs=epochs)
        write_fine_tuning(tmp_path / f"fine_{epochs}", "imagenet2012", accuracy, model="ViT-L/16", weights=pre)
    cells = cells_of_ours(table_6(models_in(tmp_path)))
    assert len(cells) == 4
    for epochs, accuracy, exaflops in (("7", 86.0, 783), ("14", 87.0, 1567)):
        row = ("ViT-L/16", "JFT-300M", epochs)
        assert cells[row, "ImageNet"].ours.mean == accuracy
        assert cells[row, "exaFLOPs"].paper.mean == exaflops
        assert cells[row, "exaFLOPs"].ours.mean == pytest.approx(exaflops, rel=0.02)


def test_table_6_has_a_row_for_pre_training_on_other_data(tmp_path):
    pre = write_pre_training(tmp_path / "pre", data__dataset="tfds:web", images=40_000_000, epochs=10)
    write_fine_tuning(tmp_path / "fine", "pets", 0.9, weights=pre)
    cells = cells_of_ours(table_6(models_in(tmp_path)))
    assert {key[0] for key in cells} == {("ViT-B/16", "web", "10")}
    assert all(cell.paper is None for cell in cells.values())


def test_core_days_of_a_pre_training_stand_in_table_2(tmp_path):
    pre = write_pre_training(tmp_path / "pre", "ViT-L/16", epochs=14, core_days=900.0)
    write_fine_tuning(tmp_path / "fine", "pets", 0.9, model="ViT-L/16", weights=pre)
    cell = table_2(models_in(tmp_path)).cells[("TPUv3-core-days",), "ViT-L/16, JFT-300M"]
    assert (cell.paper.mean, cell.ours.mean) == (680, 900)


def few_shot_run(path, kind, place, value, model="ViT-B/16", **fields):
    positions = {"position_embedding": kind, "position_embedding_at": place}
    few_shot = {"evals__fewshot__datasets": ("tfds:imagenet2012",), "evals__fewshot__test_split": "validation"}
    metrics = {"fewshot/imagenet2012/pre_logits/5shot": value, "fewshot/imagenet2012/pre_logits/5shot_std": 0.002}
    configured = {f"model__{name}": value for name, value in positions.items()}
    return write_pre_training(
        path,
        model,
        metrics=metrics,
        model_fields=positions,
        evals__fewshot__image_size=224,
        **few_shot,
        **configured,
        **fields,
    )


def test_table_8_has_few_shot_accuracies_by_position_embedding(tmp_path):
    few_shot_run(tmp_path / "1d", "learned_1d", "stem", 0.65)
    few_shot_run(tmp_path / "2d", "learned_2d", "shared", 0.63)
    few_shot_run(tmp_path / "small", "learned_2d", "stem", 0.5, model="ViT-S/16")
    cells = cells_of_ours(table_8(find([str(tmp_path)]).models))
    assert cells[("ViT-B/16", "learned_1d"), "stem"].difference == pytest.approx(0.65 - 0.64206)
    assert cells[("ViT-B/16", "learned_2d"), "shared"].difference == pytest.approx(0.63 - 0.64022)
    small = cells[("ViT-S/16", "learned_2d"), "stem"]
    assert small.paper is None and small.ours.std == 0.002
    assert "one model; ± is over draws of few-shot images" in small.ours.notes


def test_pre_training_of_another_length_is_not_a_row_of_the_papers(tmp_path):
    pre = write_pre_training(tmp_path / "pre", "ViT-L/16", epochs=10)
    write_fine_tuning(tmp_path / "fine", "imagenet2012", 0.86, model="ViT-L/16", weights=pre)
    (model,) = models_in(tmp_path)
    assert {row for row, _ in cells_of_ours(table_6([model]))} == {("ViT-L/16", "JFT-300M", "10")}
    assert not any(figures._is_row_of(model, row) for row in paper.TABLE_6)


def test_resnet_has_no_place_among_position_embeddings(tmp_path):
    few_shot_run(tmp_path, "learned_1d", "stem", 0.5, model="R50x1")
    assert not table_8(find([str(tmp_path)]).models).has_ours


def test_compute_of_a_small_pre_training_is_not_rounded_to_nothing(tmp_path):
    pre = write_pre_training(tmp_path / "pre", "ViT-Ti/16", images=1000, data__dataset="tfds:birds")
    write_fine_tuning(tmp_path / "fine", "cifar10", 0.5, model="ViT-Ti/16", weights=pre)
    text = table_6(models_in(tmp_path)).to_markdown()
    assert re.search(r"\| 0\.0+[1-9]\d \|$", text, re.MULTILINE)


def test_folders_have_the_names_that_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pre = write_pre_training(tmp_path / "runs" / "pre")
    write_fine_tuning(tmp_path / "runs" / "fine", "cifar10", 0.5, weights=pre)
    assert {str(record.path) for record in find(["runs"]).models} == {"runs/pre", "runs/fine"}


def test_average_of_five_matches_table_7(tmp_path):
    """That says which tasks the paper means by it."""
    names = {"ImageNet": "imagenet2012", "CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "Pets": "pets"}
    names["Flowers-102"] = "flowers"
    rows = {(row.model, row.epochs): row for row in paper.TABLE_6}
    for model in ("R50x1", "R152x2"):
        row = rows[model, 7]
        values = (row.imagenet, row.cifar10, row.cifar100, row.pets, row.flowers)
        pre = write_pre_training(tmp_path / model / "pre", model)
        for name, value in zip(AVERAGE_OF, values, strict=True):
            task = names[name]
            write_fine_tuning(tmp_path / model / task, task, value / 100, model=model, weights=pre)
        (trained,) = models_in(tmp_path / model)
        published = paper.TABLE_7[model, "adam"][paper.TABLE_7_AVERAGE]
        assert average_of_five(trained).mean == pytest.approx(published, abs=0.005)


def test_tables_hold_all_that_is_published():
    tables = {table.name: table for table in paper_tables([], [])}
    published = {name: sum(cell.paper is not None for cell in table.cells.values()) for name, table in tables.items()}
    assert published == {
        "table_2": 4 * 7 + 2 + 5,
        "table_5": 6 * 4 + 2 * 6 * 5,
        "table_6": 18 * 7,
        "table_7": 4 * 6,
        "table_8": 8,
        "table_9": 3 * (19 + 3 + 1) + 2 * (3 + 1),
        "released": 2 * 5 * 3 + 9,
    }
    assert not any(table.has_ours for table in tables.values())
    assert tables["table_5"].cells[("JFT-300M", "Pets"), "ViT-L/32"].paper.mean == 95.83


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fine-tuned from a released checkpoint and from a pre-training of our own, and few-shot numbers."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, accuracy in enumerate((0.8360, 0.8420, 0.8411)):
        write_fine_tuning(folder / f"i21k_{seed}", "imagenet2012", accuracy, seed=seed)
    pre = few_shot_run(folder / "pre", "learned_1d", "stem", 0.65)
    for task, accuracy in (("imagenet2012", 0.843), ("cifar10", 0.99), ("cifar100", 0.92), ("pets", 0.95)):
        write_fine_tuning(folder / task, task, accuracy, weights=pre)
    write_fine_tuning(folder / "flowers", "flowers", 0.99, weights=pre)
    write_run(folder / "half", "ViT-B/16", {}, steps=10, unfinished=True, data__dataset="digits")
    return folder


@pytest.fixture(scope="module")
def written_with_figure_5(folder, tmp_path_factory):
    """The folder that the command writes, and figure 5, which takes seconds to draw."""
    out, drawn, draw = tmp_path_factory.mktemp("out") / "report", [], figures.figure_5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "figure_5", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
        assert report.main([str(folder), f"--out={out}"]) == 0
    return out, drawn[0]


@pytest.fixture(scope="module")
def written(written_with_figure_5):
    return written_with_figure_5[0]


def test_command_writes_tables_and_pictures(written):
    assert {path.name for path in written.iterdir()} == {
        *("report.md", "results.csv", "runs.csv", "table_5.csv", "table_6.csv", "table_8.csv", "released.csv"),
        *("figure_3.csv", "figure_4.csv", "figure_5.csv", "figure_3.png", "figure_4.png", "figure_5.png"),
    }
    text = (written / "report.md").read_text()
    assert "half: not finished (step 10)" in text and "![Figure 3" in text


def test_csv_has_the_numbers_whole(written):
    rows = list(csv.DictReader(io.StringIO((written / "table_5.csv").read_text())))
    (row,) = (row for row in rows if row["pre-trained on"] == "ImageNet-21k" and row["ours"])
    values = (83.60, 84.20, 84.11)
    assert (row["task"], row["model"], row["paper"], row["seeds"]) == ("ImageNet", "ViT-B/16", "83.97", "3")
    assert float(row["ours"]) == pytest.approx(statistics.fmean(values))
    assert float(row["ours_std"]) == pytest.approx(statistics.stdev(values))
    assert float(row["difference"]) == pytest.approx(statistics.fmean(values) - 83.97)
    assert len(row["folders"].split()) == 3


def test_markdown_tables_are_aligned(written):
    lines = (written / "report.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 40
    for before, line in itertools.pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            assert len(before) == len(line) and before.count("|") == line.count("|")


def test_command_prints_what_it_writes(folder, written, capsys):
    assert report.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    text = (written / "report.md").read_text()
    assert "83.97 ± 0.32" in printed and "## Table 5" in printed
    assert printed.strip() in text


def test_tables_without_anything_of_ours_are_printed_on_request(folder, capsys):
    report.main([str(folder)])
    assert "## Table 9" not in capsys.readouterr().out
    report.main([str(folder), "--all"])
    assert "## Table 9" in capsys.readouterr().out


def test_nothing_found_is_one_message_and_exit_status_1(tmp_path, capsys):
    write_json(tmp_path / "config.json", {"model_type": "vit"})
    assert report.main([str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: no result in") and "not a config of vit_jax" in captured.err
    assert not captured.out


def test_folder_that_cannot_be_written_is_one_message(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert report.main([str(folder), f"--out={tmp_path / 'file'}"]) == 1
    assert "Choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["figure_3", "figure_4", "figure_5"])
def test_pictures_are_not_empty(written, name):
    pixels = np.asarray(Image.open(written / f"{name}.png").convert("L"))
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800
    assert 0.02 < np.mean(pixels < 250) < 0.5
    # Something is drawn in each quarter.
    for part in np.array_split(pixels, 2, axis=0):
        for quarter in np.array_split(part, 2, axis=1):
            assert np.mean(quarter < 250) > 0.003


def points_of(axes, label):
    (container,) = (each for each in axes.containers if each.get_label() == label)
    return container.lines[0].get_xydata()


def test_figure_3_draws_table_5_and_ours_beside_it(folder):
    (axes,) = figures.figure_3(models_in(folder)).axes
    (line,) = (line for line in axes.lines if line.get_label() == "ViT-B/16, table 5")
    assert line.get_xydata().tolist() == [[0, 77.91], [1, 83.97], [2, 84.15]]
    found = {int(x): y for x, y in points_of(axes, "ViT-B/16, ours") if x > int(x)}  # beside the paper's
    assert found == {1: pytest.approx(83.97, abs=0.005), 2: pytest.approx(84.3)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ImageNet", "ImageNet-21k", "JFT-300M"]


def test_bit_is_an_area_between_published_numbers():
    assert bit_area() == {"ImageNet-21k": (80.68, 85.39), "JFT-300M": (77.54, 87.54)}


@pytest.fixture(scope="module")
def drawn_5(written_with_figure_5):
    return written_with_figure_5[1]


def test_figure_5_draws_table_6_and_ours_by_compute(drawn_5):
    mean, imagenet = drawn_5.axes
    (line,) = (line for line in imagenet.lines if line.get_label() == "BiT, table 6")
    assert [50.0, 77.54] in line.get_xydata().tolist() and len(line.get_xydata()) == 7
    for axes, expected in ((mean, (84.3 + 99 + 92 + 95 + 99) / 5), (imagenet, 84.3)):
        stars = [each.lines[0].get_xydata() for each in axes.containers if len(each.lines[0].get_xydata())]
        assert [star.tolist() for star in stars] == [[[pytest.approx(224, rel=0.02), pytest.approx(expected)]]]


def test_names_in_figure_5_do_not_cover_each_other(drawn_5):
    canvas = FigureCanvasAgg(drawn_5)
    canvas.draw()
    for axes in drawn_5.axes:
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in axes.texts if text.get_text()]
        assert len(boxes) == 18
        assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


def test_without_numbers_of_ours_there_are_pictures_only_on_request(monkeypatch):
    monkeypatch.setattr(figures, "write_beside", lambda *_: None)  # takes time
    assert figures.draw_all([], []) == {}
    assert figures.draw_all([], [], show_all=True).keys() == {"figure_2", "figure_3", "figure_5"}
