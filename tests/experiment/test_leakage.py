"""Training data of the runs behind weights."""

import json
import pathlib

import pytest

from vit_jax.data.sources import open_source
from vit_jax.experiment.leakage import find_overlap, sources_behind
from vit_jax.run.facts import MatchedByName, RunFacts, SplitFacts, write_facts


def write_run(path, *, weights=None, **data):
    """The files that record a run's training data."""
    path.mkdir(parents=True)
    (path / "starts.jsonl").write_text("{}\n")
    (path / "config.json").write_text(json.dumps({"weights": weights, "data": {"dataset": "digits", **data}}))
    return str(path)


def overlap(weights, split="test"):
    return find_overlap({"named": open_source("digits", split)}, weights).get("named", 0)


def test_data_of_all_runs_behind_weights_count(tmp_path, monkeypatch):
    first = write_run(tmp_path / "first", train_split="test[:10]")
    (tmp_path / "first" / "best" / "12").mkdir(parents=True)
    second = write_run(tmp_path / "second", weights=f"{first}/best/12", train_split="train[:90%]+test[5:7]")
    third = write_run(tmp_path / "third", weights=second, train_split="test[20:25]")
    (tmp_path / "third" / "exported.npz").touch()
    assert [overlap(place) for place in (first, second, third, f"{third}/exported.npz")] == [10, 10, 15, 15]
    assert overlap(second, "train[80%:]") == 143
    monkeypatch.chdir(third)
    assert [overlap(place) for place in ("exported.npz", ".", "vit_b16_i21k")] == [15, 15, 0]


def test_parts_of_a_mixture_count_and_missing_ones_are_reported(tmp_path, caplog):
    mixture = [["digits", 1.0], ["/nowhere/at/all", 2.0]]
    place = write_run(tmp_path / "mixed", train_split="test[:3]", mixture=mixture)
    assert overlap(place) == 3
    assert f"The training data of {place} are missing" in caplog.text and "/nowhere/at/all" in caplog.text


def test_runs_in_a_cycle_are_visited_once(tmp_path):
    place = write_run(tmp_path / "a", weights=str(tmp_path / "b"), train_split="test[:3]")
    write_run(tmp_path / "b", weights=place, train_split="test[3:4]")
    assert overlap(place) == 4


@pytest.mark.parametrize("change", ["nothing", "another image", "moved", "the classes"])
def test_training_data_that_have_changed_since_are_reported(tmp_path, monkeypatch, caplog, change):
    for name in ("cat", "dog"):
        for number in range(4):
            (tmp_path / "mine" / "train" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "mine" / "train" / name / f"{number}.jpg").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    source = open_source("mine", "train[:50%]")
    run = pathlib.Path(write_run(tmp_path / "run", dataset="mine", train_split="train[:50%]"))
    split = SplitFacts.of(source, "mine", "train[:50%]")
    write_facts(run, RunFacts(2, ("cat", "dog"), 1, "softmax", {}, split, None))
    if change == "another image":
        (tmp_path / "mine" / "train" / "cat" / "new.jpg").write_bytes(b"x")
    if change == "moved":  # the working folder
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    tested = open_source(str(tmp_path / "mine"), "train")
    if change == "the classes":
        tested = MatchedByName(tested, ("dog", "cat"))
    overlap = find_overlap({"train": tested}, str(run))
    assert ("have changed since" in caplog.text) == (change == "another image")
    assert overlap["train"] == (4 if change != "another image" else round(4.5))


@pytest.mark.parametrize("place", [None, "vit_b16_i21k", "https://host/x.npz", "hf-hub:timm/x", "/nowhere", "x" * 5000])
def test_weights_of_no_run_have_no_known_training_data(place):
    assert sources_behind(place) == []


@pytest.mark.parametrize(
    "config", ["[", "[]", '{"data": 3}', '{"data": {"dataset": 5}}', '{"data": {"train_split": "tr"}}']
)
def test_damaged_config_of_a_run_is_a_warning(tmp_path, config, caplog):
    place = write_run(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(config)
    assert sources_behind(place) == []
    assert place in caplog.text
