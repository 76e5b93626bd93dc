"""Fine-tuning compared with the paper's: dropout, BiT-HyperRule, the better of two rules, and sources."""

import json
import statistics

import pytest

from tests.report.workdirs import write_evaluation, write_fine_tuning, write_run, write_sweep, write_vtab
from vit_jax.paper import related, tables
from vit_jax.report.collect import find
from vit_jax.report.listings import results_table
from vit_jax.report.paper_tables import released_table, table_2, table_5, table_6, table_7, table_9
from vit_jax.report.pretrained import pre_trained_models, recipe_of
from vit_jax.weights import get_checkpoint

BIT = {
    "optimizer__schedule": "drops",
    "optimizer__learning_rate": 0.003,
    "optimizer__clip_norm": None,
    "mixup_alpha": 0.1,
    "data__inception_crop": False,
}


def write_bit(path, task, accuracy, *, model="R50x1", size=384, **fields):
    """A final run of configs/transfer.py with rule=bit."""
    fields = {"weights": f"bit_m_{model.lower()}", "data__image_size": size, **BIT, **fields}
    return write_fine_tuning(path, task, accuracy, model=model, **fields)


def models_in(folder):
    return pre_trained_models(find([str(folder)]).models)


def cells_of_ours(table):
    return {key: cell for key, cell in table.cells.items() if cell.ours}


@pytest.mark.parametrize(
    ("weights", "dropout", "note"),
    [
        ("vit_b16_i21k", 0.1, None),
        ("vit_b16_i21k", 0.0, "model.dropout_rate=0.0, in the paper 0.1"),
        ("vit_b16_i21k", 0.2, "model.dropout_rate=0.2, in the paper 0.1"),
        ("augreg_b16_i21k", 0.0, None),
        ("augreg_b16_i21k", 0.1, "model.dropout_rate=0.1, by AugReg 0.0"),
        ("sam_b16_in1k", 0.1, None),  # nobody says
        ("dropout", 0.1, None),
        ("dropout", 0.0, "model.dropout_rate=0.0, in the paper 0.1"),
        ("plain", 0.0, None),
        ("plain", 0.1, None),
    ],
)
def test_dropout_of_fine_tuning_is_compared_and_shown(tmp_path, weights, dropout, note):
    if weights in ("dropout", "plain"):
        fields = {"data__dataset": "tfds:imagenet21k", "model_fields": {"dropout_rate": 0.1 * (weights == "dropout")}}
        weights = write_run(tmp_path / "pre", "ViT-B/16", {}, steps=10, images=14_000_000, **fields)
    write_fine_tuning(tmp_path / "fine", "cifar10", 0.9, weights=weights, model_fields={"dropout_rate": dropout})
    found = find([str(tmp_path)])
    (cell,) = cells_of_ours(table_5(pre_trained_models(found.models))).values()
    assert [each for each in cell.ours.notes if "dropout" in each] == ([note] if note else [])
    assert [row[6] for row in results_table(found.models).rows][-1] == f"{dropout:g}"


def test_papers_table_shows_its_dropout_and_that_of_released_models_both(tmp_path):
    for dropout, accuracy in ((0.0, 0.9902), (0.1, 0.9880)):
        fields = {"model_fields": {"dropout_rate": dropout}}
        write_fine_tuning(tmp_path / str(dropout), "cifar10", accuracy, **fields)
    models = models_in(tmp_path)
    ((_, cell),) = cells_of_ours(table_5(models)).items()
    assert cell.ours.mean == pytest.approx(98.80)
    cells = cells_of_ours(released_table(models))
    assert {key: round(cell.difference, 2) for key, cell in cells.items()} == {
        (("ViT", "0", "CIFAR-10"), "ViT-B/16"): 0.0,
        (("ViT", "0.1", "CIFAR-10"), "ViT-B/16"): 0.04,
    }
    text = released_table(models).to_markdown()
    assert "| README " in text and "| paper " not in text and "2021-05-24" in text


def test_augreg_s_models_stand_beside_their_own_numbers(tmp_path):
    fields = {"model": "ViT-Ti/16", "weights": "augreg_ti16_i21k", "model_fields": {"dropout_rate": 0.0}}
    write_fine_tuning(tmp_path / "a", "imagenet2012", 0.78, **fields)
    own = write_run(tmp_path / "pre", "ViT-Ti/16", {}, steps=9, images=14_000_000, data__dataset="tfds:imagenet21k")
    write_fine_tuning(tmp_path / "b", "imagenet2012", 0.5, model="ViT-Ti/16", weights=own)  # no released one
    ((key, cell),) = cells_of_ours(released_table(models_in(tmp_path))).items()
    assert key == (("AugReg", "0", "ImageNet"), "ViT-Ti/16") and cell.difference == pytest.approx(78 - 78.22)


def test_checkpoints_and_published_numbers_agree():
    """They are given twice: a checkpoint tells its own."""
    for model, scores in related.RELEASED_FINE_TUNED[0.0].items():
        name = "r50b16" if "+" in model else model.removeprefix("ViT-").replace("/", "").lower()
        told = get_checkpoint(f"vit_{name}_i21k").published_accuracy
        assert list(told.values()) == [scores["CIFAR-10"], scores["CIFAR-100"], scores["ImageNet"]]


def test_paper_is_nearer_to_the_released_results_with_dropout():
    nearer = 0
    for model in tables.TABLE_5_MODELS[:4]:
        for task in ("CIFAR-10", "CIFAR-100", "ImageNet"):
            own = tables.TABLE_5["ImageNet-21k"][task][tables.TABLE_5_MODELS.index(model)]
            without, with_it = (abs(related.RELEASED_FINE_TUNED[rate][model][task] - own) for rate in (0.0, 0.1))
            nearer += with_it < without
    assert nearer == 10


@pytest.mark.parametrize(
    ("model", "task", "size", "note"),
    [
        ("R50x1", "imagenet2012", 384, None),
        ("R50x1", "imagenet2012", 480, "BiT-HyperRule at 480 pixels, in the BiT paper at 384"),
        ("R152x4", "imagenet2012", 480, None),
        ("R152x4", "imagenet2012", 384, "BiT-HyperRule at 384 pixels, in the BiT paper at 480"),
        ("R50x1", "cifar10", 128, None),
        ("R152x4", "cifar10", 480, "BiT-HyperRule at 480 pixels, in the BiT paper at 128"),
        ("R50x3", "pets", 224, "BiT-HyperRule at 224 pixels, in the BiT paper at 384"),
    ],
)
def test_resnet_tuned_at_another_size_than_bits_has_a_note(tmp_path, model, task, size, note):
    write_bit(tmp_path, task, 0.8, model=model, size=size, mixup_alpha=0.0 if task == "pets" else 0.1)
    ((_, cell),) = cells_of_ours(table_5(models_in(tmp_path))).items()
    assert cell.ours.notes == ("one seed", "fine-tuned by BiT-HyperRule", *([note] if note else []))


def test_resnet_by_table_4_s_rule_is_at_384(tmp_path):
    write_fine_tuning(tmp_path, "cifar10", 0.9, model="R50x1", weights="bit_m_r50x1", data__image_size=128)
    ((_, cell),) = cells_of_ours(table_5(models_in(tmp_path))).items()
    assert cell.ours.notes == ("one seed", "fine-tuned by table 4's rule", "at 128 pixels, in the paper at 384")


def write_swept(path, run, held_out, rules=(), metrics=None):
    """A sweep whose only final run is `run`, chosen by its held-out accuracy."""
    write_sweep(path, ["trials/x", *(f"trials/{rule}" for rule, _ in rules)], [str(run.relative_to(path))])
    content = json.loads((path / "sweep.json").read_text())
    task = content["tasks"]["task"]
    chosen = {"optimizer.learning_rate": 0.01} | ({"argument.rule": rules[0][0]} if rules else {})
    values = [(chosen, held_out), *(({"argument.rule": rule}, value) for rule, value in rules[1:])]
    for trial, (overrides, value) in zip(task["trials"], values, strict=False):
        trial |= {"overrides": overrides, "metrics": metrics or {"train[98%:]/accuracy": value, "train/accuracy": 0.99}}
    task["chosen"] = chosen
    (path / "sweep.json").write_text(json.dumps(content))


@pytest.mark.parametrize(("by_table_4", "by_bit"), [(0.91, 0.90), (0.90, 0.91)])
def test_better_of_two_rules_is_chosen_on_held_out_not_test_images(tmp_path, by_table_4, by_bit):
    vit, bit = tmp_path / "vit", tmp_path / "bit"
    run = write_fine_tuning(vit / "final/0", "cifar10", 1 - by_table_4, model="R50x1", weights="bit_m_r50x1")
    write_swept(vit, run, by_table_4)
    write_swept(bit, write_bit(bit / "final/0", "cifar10", 1 - by_bit, size=128), by_bit)
    ((_, cell),) = cells_of_ours(table_5(models_in(tmp_path))).items()
    best, rule = (by_table_4, "table 4's rule") if by_table_4 > by_bit else (by_bit, "BiT-HyperRule")
    assert cell.ours.mean == pytest.approx(100 * (1 - best))
    assert cell.ours.notes[1] == f"fine-tuned by {rule}"
    assert set(cell.ours.notes[2].removeprefix("the better of two rules on train[98%:]: ").split(", ")) == {
        f"BiT-HyperRule {100 * by_bit:.2f} %",
        f"table 4's rule {100 * by_table_4:.2f} %",
    }


def test_sweep_that_tried_both_rules_says_which_won(tmp_path):
    write_swept(
        tmp_path, write_bit(tmp_path / "final/0", "cifar10", 0.9, size=128), 0.65, (("bit", 0.65), ("vit", 0.6))
    )
    ((_, cell),) = cells_of_ours(table_5(models_in(tmp_path))).items()
    assert cell.ours.notes == (
        "one seed",
        "fine-tuned by BiT-HyperRule",
        "the better of two rules on train[98%:]: BiT-HyperRule 65.00 %, table 4's rule 60.00 %",
    )


@pytest.mark.parametrize("recorded", ["none", "one", "other split", "not finite"])
def test_test_images_do_not_choose_between_rules(tmp_path, recorded):
    vit, bit = tmp_path / "vit", tmp_path / "bit"
    run = write_fine_tuning(vit / "final/0", "cifar10", 0.99, model="R50x1", weights="bit_m_r50x1", steps=20)
    other = write_bit(bit / "final/0", "cifar10", 0.5, size=128)
    if recorded != "none":
        write_swept(vit, run, 0.9)
    if recorded == "other split":
        write_swept(bit, other, 0.8, metrics={"train[90%:]/accuracy": 0.8})
    if recorded == "not finite":
        write_swept(bit, other, float("nan"))
    ((_, cell),) = cells_of_ours(table_5(models_in(tmp_path))).items()
    assert cell.ours.mean == pytest.approx(50)  # the one that does more as the paper does
    assert "of two rules; their accuracy on held-out images was not recorded, so neither is chosen" in cell.ours.notes


def test_hybrid_names_its_rule_and_a_vit_by_bits_rule_has_a_note(tmp_path):
    write_fine_tuning(tmp_path / "a", "cifar10", 0.9, model="R50+ViT-B/16", weights="vit_r50b16_i21k")
    write_fine_tuning(tmp_path / "b", "cifar10", 0.9, **BIT)
    cells = {key[1]: cell.ours.notes for key, cell in cells_of_ours(table_5(models_in(tmp_path))).items()}
    assert cells["R50+ViT-B/16"] == ("one seed", "fine-tuned by table 4's rule")
    assert "fine-tuned by BiT-HyperRule, which only ResNets try in the paper" in cells["ViT-B/16"]


@pytest.mark.parametrize(
    ("field", "note"),
    [
        ({"optimizer__name": "adamw"}, "optimizer.name=adamw, in the paper sgd"),
        ({"optimizer__weight_decay": 1e-4}, "optimizer.weight_decay=0.0001, in the paper 0.0"),
        (
            {"optimizer__learning_rate": 0.5},
            "optimizer.learning_rate=0.5, in the paper one of 0.001, 0.003, 0.01, 0.03",
        ),
        ({"optimizer__schedule": "linear"}, "optimizer.schedule=linear, in the paper cosine"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1, in the paper 0.0"),
        (
            {"data__eval_resize_small": 448},
            "evaluated on the centre of images whose shorter side is 448 pixels, not on whole images",
        ),
        ({"data__eval_resize": "area"}, "images to evaluate on are resized by area, in the released code bilinear"),
    ],
)
def test_other_differences_from_the_paper_are_noted(tmp_path, field, note):
    write_fine_tuning(tmp_path, "cifar10", 0.9, **field)
    ((_, cell),) = cells_of_ours(table_5(models_in(tmp_path))).items()
    assert cell.ours.notes == ("one seed", note)


def test_learning_rate_only_for_resnets_is_not_a_vits():
    assert 0.06 in recipe_of("ImageNet", "R50x1").learning_rates
    assert 0.06 in recipe_of("ImageNet", "R50+ViT-B/16").learning_rates
    assert 0.06 not in recipe_of("ImageNet", "ViT-B/16").learning_rates


def test_table_7_is_table_6_and_its_means_match_its_numbers():
    rows = {(row.model, row.epochs): row.scores for row in tables.TABLE_6}
    for (model, optimizer), scores in tables.TABLE_7.items():
        of_tasks = [value for task, value in scores.items() if task != tables.TABLE_7_AVERAGE]
        assert round(statistics.fmean(of_tasks), 2) == scores[tables.TABLE_7_AVERAGE] and len(of_tasks) == 5
        if optimizer == "adam":
            assert all(rows[model, 7][task] == value for task, value in scores.items() if task in rows[model, 7])


def test_table_7_has_ours_by_optimizer(tmp_path):
    for name in ("adamw", "sgd"):
        fields = {"data__dataset": "tfds:jft", "optimizer__name": name, "batch_size": 4096, "data__image_size": 224}
        steps = round(7 * 303_000_000 / 4096)
        pre = write_run(tmp_path / f"pre/{name}", "R50x1", {}, steps=steps, images=303_000_000, **fields)
        for task, accuracy in (("cifar10", 0.97), ("pets", 0.91)):
            write_bit(tmp_path / name / task, task, accuracy - 0.01 * (name == "sgd"), size=128, weights=str(pre))
    table = table_7(models_in(tmp_path))
    found = {(key[0][2], key[1]): round(cell.difference, 2) for key, cell in cells_of_ours(table).items()}
    assert found == {
        ("Adam", "CIFAR-10"): -0.67,
        ("Adam", "Pets"): -0.11,
        ("SGD", "CIFAR-10"): -1.46,
        ("SGD", "Pets"): -1.0,
    }
    assert any("Not yet checked" in remark for remark in table.remarks)
    assert len(cells_of_ours(table_6(models_in(tmp_path)))) == 3  # one of the two, and its cost


def test_bits_groups_of_vtab_and_noisy_students_second_number_are_shown(tmp_path):
    for task in ("camelyon", "eurosat", "resisc45", "retinopathy"):
        write_vtab(tmp_path / task, task, 0.85, model="R152x4", weights="bit_m_r152x4")
    table = table_9(models_in(tmp_path))
    cell = table.cells[("specialized", "mean"), "R152x4, ImageNet-21k"]
    assert (cell.paper.mean, round(cell.difference, 2)) == (85.67, -0.67)
    for groups in related.BIT_M_VTAB.values():
        sizes = {"natural": 7, "specialized": 4, "structured": 8}
        mean = sum(groups[name] * size for name, size in sizes.items()) / 19
        assert mean == pytest.approx(groups["mean"], abs=0.01)
    assert "88.40/88.50" in table_2([]).to_markdown()


def test_released_resnet_as_it_is_says_nothing_of_a_rule(tmp_path):
    fields = {"data__dataset": "tfds:imagenet2012", "data__eval_split": "validation", "data__image_size": 480}
    metrics = {"validation/accuracy": 0.85, "validation/examples": 50_000}
    write_evaluation(tmp_path, "bit_m_r152x4_in1k", metrics, model="R152x4", **fields)
    ((_, cell),) = cells_of_ours(table_5(models_in(tmp_path))).items()
    assert "a released checkpoint as it is: its fine-tuning was not done here" in cell.ours.notes
    assert not any("rule" in note for note in cell.ours.notes)
