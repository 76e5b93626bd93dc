"""Published numbers that appear twice, or also in words."""

import itertools
import statistics

import pytest

from vit_jax.models import list_models
from vit_jax.paper import related, tables


def test_masked_patch_prediction_differs_from_table_5_as_the_text_says():
    score = tables.MASKED_PATCH_IMAGENET["ViT-B/16"]
    column = tables.TABLE_5_MODELS.index("ViT-B/16")
    assert score - tables.TABLE_5["ImageNet"]["ImageNet"][column] == pytest.approx(2, abs=0.05)
    assert round(tables.TABLE_5["JFT-300M"]["ImageNet"][column] - score) == 4


@pytest.mark.parametrize(("model", "epochs"), [("ViT-B/32", 7), ("ViT-B/16", 7), ("ViT-L/32", 7), ("ViT-L/16", 14)])
def test_models_that_are_in_tables_5_and_6_have_the_same_numbers_in_both(model, epochs):
    (row,) = (row for row in tables.TABLE_6 if (row.model, row.epochs) == (model, epochs))
    column = tables.TABLE_5_MODELS.index(model)
    assert row.scores == {task: values[column] for task, values in tables.TABLE_5["JFT-300M"].items()}


@pytest.mark.parametrize("key", list(tables.TABLE_9))
def test_mean_of_vtab_is_the_mean_of_its_tasks(key):
    mean = statistics.fmean(itertools.chain(*tables.TABLE_9[key].values()))
    assert round(mean, 1) == tables.TABLE_9_MEANS[key]
    assert mean == pytest.approx(tables.TABLE_2[key]["VTAB"].mean, abs=0.02)


@pytest.mark.parametrize("metric", ["top-1", "top-5"])
def test_bit_on_objectnet_grows_with_the_model_and_with_the_data_as_the_text_says(metric):
    scores = {column: score[metric] for column, score in related.BIT_OBJECTNET.items()}
    for data in ("ImageNet", "ImageNet-21k", "JFT-300M"):
        of_models = [scores[model, data] for model in ("R50x1", "R50x3", "R101x3", "R152x4")]
        assert of_models == sorted(of_models)
    for model in ("R50x1", "R50x3", "R101x3", "R152x4"):
        of_data = [scores[model, data] for data in ("ImageNet", "ImageNet-21k", "JFT-300M")]
        assert of_data == sorted(of_data)
    assert all(each["top-1"] < each["top-5"] for each in related.BIT_OBJECTNET.values())
    # Section 3.6 of BiT says 80.0 too; ViT-H/14 is above.
    assert scores["R152x4", "JFT-300M"] < tables.OBJECTNET["ViT-H/14", "JFT-300M"][metric]
    assert related.BIT_OBJECTNET["R152x4", "JFT-300M"]["top-5"] == 80.0


def test_numbers_on_objectnet_belong_to_known_models():
    assert {model for model, _ in (*related.BIT_OBJECTNET, *tables.OBJECTNET)} <= set(list_models())
