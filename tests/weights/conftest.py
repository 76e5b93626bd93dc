"""Folders and files of weights, to be changed."""

import dataclasses

import pytest

from tests.weights.helpers import NAMES, save_plain, strip_description
from tests.weights.test_formats import make_weights
from vit_jax.weights import Preprocessing, get_checkpoint, save
from vit_jax.weights.download import cached_path


@pytest.fixture
def huggingface(tmp_path):
    weights = dataclasses.replace(
        make_weights(), class_names=NAMES, preprocessing=Preprocessing((16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    )
    return strip_description(save(weights, tmp_path / "hf", to="huggingface")).parent


@pytest.fixture
def timm(tmp_path):
    weights = dataclasses.replace(
        make_weights(),
        class_names=NAMES,
        preprocessing=Preprocessing((16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "crop", 0.9, "bicubic", True),
    )
    return strip_description(save(weights, tmp_path / "timm", to="timm")).parent


@pytest.fixture
def plain(tmp_path):
    """Arrays of a tiny ViT, and where to save them."""
    return make_weights(num_layers=4).arrays, tmp_path / "weights.npz"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own; nothing can be fetched from elsewhere."""
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIT_JAX_GCS_ENDPOINT", "http://127.0.0.1:9")

    def put(name, arrays):
        path = cached_path(get_checkpoint(name).url)
        path.parent.mkdir(parents=True)
        return save_plain(path, arrays)

    return put
