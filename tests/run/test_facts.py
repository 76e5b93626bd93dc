"""The facts that a finished run records, and the messages when the data have changed since."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from tests.data.test_sources import write_image
from tests.test_train import quick_runs
from vit_jax import predict
from vit_jax.analysis import mistakes
from vit_jax.checkpoints import read_parameters
from vit_jax.config import base_config
from vit_jax.data.class_names import moved_names
from vit_jax.data.sources import absolute_dataset, open_source
from vit_jax.errors import UserError
from vit_jax.evaluate import evaluate
from vit_jax.run.facts import (
    MatchedByName,
    SplitFacts,
    describe_class_changes,
    open_as_trained,
    read_facts,
    write_facts,
)
from vit_jax.train import train
from vit_jax.weights import load, save

CLASSES = ("cat", "dog", "emu")


def make_config(root, **changes):
    config = base_config()
    config.data.dataset = f"{root}/pets"
    config.data.train_split, config.data.eval_split = "all[:80%]", "all[80%:]"
    config.data.image_size = 8
    config.data.flip = config.data.inception_crop = False
    config.model.name = "ViT-Ti/4"
    config.model.num_layers, config.model.hidden_dim, config.model.mlp_dim, config.model.num_heads = 1, 16, 16, 2
    config.batch_size, config.eval_batch_size, config.steps = 8, 8, 30
    config.optimizer.learning_rate = 0.01
    config.log_every_steps = 30
    config.checkpoint.keep_best = False
    with config.ignore_type():
        config.update_from_flattened_dict(changes)
    return config


def make_pets(folder, count=10):
    for number, name in enumerate(CLASSES):
        for image in range(count):
            write_image(folder / name / f"{image}.jpg", 20 + 100 * number + image)


@pytest.fixture(scope="module", autouse=True)
def quick(compilation_cache):
    with quick_runs(compilation_cache):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with images, `pets`, and a run that knows them well, `run`; sigmoid loss."""
    root = tmp_path_factory.mktemp("trained")
    make_pets(root / "pets")
    summary = train(make_config(root, loss="sigmoid"), str(root / "run"))
    assert summary["all[80%:]/accuracy"] == 1
    return root


@pytest.fixture
def root(trained, tmp_path):
    """The same, as if trained here, to be changed by a test."""
    shutil.copytree(trained, tmp_path / "root")
    for file in ("config.json", "facts.json", "starts.jsonl"):
        path = tmp_path / "root" / "run" / file
        path.write_text(path.read_text().replace(str(trained), str(tmp_path / "root")))
    return tmp_path / "root"


def make_old(run):
    """As an older version of this code left it."""
    (run / "facts.json").unlink()


def predictions(root, capsys, *arguments):
    capsys.readouterr()
    images = [str(root / "shown" / f"{name}.jpg") for name in CLASSES]
    for number, image in enumerate(map(os.fspath, images)):
        write_image(root / "shown" / f"{CLASSES[number]}.jpg", 22 + 100 * number)
        assert os.path.exists(image)
    assert predict.main([f"--weights={root / 'run'}", "--json", "--top=3", *arguments, *images]) == 0
    output = capsys.readouterr()
    rows = [json.loads(line)["predictions"] for line in output.out.splitlines()]
    return [row[0]["name"] for row in rows], rows, output.err


def rename(root):
    (root / "pets" / "cat").rename(root / "pets" / "zebra")


def test_a_run_keeps_what_its_parameters_mean(root):
    facts = read_facts(root / "run")
    assert (facts.class_names, facts.num_classes, facts.loss, facts.max_labels) == (CLASSES, 3, "sigmoid", 1)
    assert facts.preprocessing["image_size"] == [8, 8]
    assert facts.train.place == facts.eval.place == str(root / "pets")
    assert (facts.train.split, facts.train.num_images) == ("all[:80%]", 24)
    assert (facts.eval.split, facts.eval.num_images, sum(facts.eval.class_counts)) == ("all[80%:]", 6, 6)
    assert facts.eval.fingerprint == open_source(str(root / "pets"), "all[80%:]").fingerprint()
    write_facts(root, facts)
    assert read_facts(root) == facts


# ---- Predictions need no data set.


@pytest.mark.parametrize(
    "change",
    [
        rename,
        lambda root: shutil.rmtree(root / "pets"),
        lambda root: make_pets(root / "pets" / "aardvark", 1),
        lambda root: write_image(root / "pets" / "bee" / "0.jpg", 1),
    ],
    ids=["renamed", "gone", "nested", "added"],
)
def test_predictions_have_the_class_names_of_training_even_if_the_data_changed(root, change, capsys):
    change(root)
    assert predictions(root, capsys)[0] == list(CLASSES)


def test_a_relative_data_set_does_not_bind_a_run_to_a_working_folder(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "pets", tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    config = make_config(trained, steps=1, **{"data.dataset": "pets"})
    train(config, "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert set(predictions(tmp_path, capsys)[0]) <= set(CLASSES)
    assert evaluate(config, tmp_path / "run")["metrics"]["all[80%:]/examples"] == 6
    assert mistakes.main([str(tmp_path / "run")]) == 0


# ---- The loss of a run says what makes probabilities.


def test_a_run_with_the_sigmoid_loss_predicts_with_the_sigmoid(root, tmp_path, capsys):
    def total(rows):
        return [sum(each["probability"] for each in row) for row in rows]

    of_run = predictions(root, capsys)[1]
    assert of_run == predictions(root, capsys, "--probabilities=sigmoid")[1]
    softmax = predictions(root, capsys, "--probabilities=softmax")[1]
    assert total(softmax) == pytest.approx([1] * 3)
    assert max(abs(each - 1) for each in total(of_run)) > 1e-3
    assert mistakes.main([str(root / "run"), "--split=all"]) == 0
    by_default = (root / "run" / "predictions.csv").read_text()
    assert mistakes.main([str(root / "run"), "--split=all", "--probabilities=softmax"]) == 0
    assert (root / "run" / "predictions.csv").read_text() != by_default


@pytest.mark.parametrize(("to", "name"), [("vit", "a.npz"), ("timm", "a.safetensors"), ("huggingface", "folder")])
def test_names_and_loss_of_a_run_travel_with_its_converted_weights(trained, tmp_path, to, name):
    place = save(load(trained / "run"), tmp_path / name, to=to)
    found = load(place if to != "huggingface" else tmp_path / name)
    assert (found.class_names, found.probabilities) == (CLASSES, "sigmoid")
    assert found.without("head").probabilities is None


# ---- Evaluation and mistakes on data that have changed.


def remove_one(root):
    (root / "pets" / "dog" / "3.jpg").unlink()


def reorder(root):
    for before, after in (("cat", "x"), ("emu", "cat"), ("x", "emu")):
        (root / "pets" / before).rename(root / "pets" / after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"classes: no longer there: 'cat'; new: 'zebra'"),
        (remove_one, r"all\[80%:\]: 6 images, but others .*trained on may be among them"),
        (lambda root: write_image(root / "pets" / "fly" / "0.jpg", 1), r"3 classes then, 4 now; new: 'fly'"),
        (lambda root: shutil.rmtree(root / "pets" / "emu"), r"6 images then, 4 now .*emu had . and has 0"),
        (lambda root: (root / "pets" / "cat" / "0.jpg").rename(root / "pets" / "cat" / "new.jpg"), r"of other names"),
    ],
    ids=["renamed", "removed image", "added class", "removed class", "renamed image"],
)
def test_changed_data_are_refused_with_what_differs(root, change, message, capsys):
    change(root)
    with pytest.raises(UserError, match=rf"(?s)has changed since .*run was trained:.*{message}.*--allow_data_change"):
        evaluate(make_config(root), root / "run")
    assert mistakes.main([str(root / "run")]) == 1
    assert "--allow_data_change" in capsys.readouterr().err
    assert not (root / "run" / "evaluation.json").exists()


def test_current_data_are_used_on_request_with_labels_by_name(root, caplog, capsys):
    rename(root)
    metrics = evaluate(make_config(root, **{"data.eval_split": "all"}), root / "run", allow_data_change=True)["metrics"]
    assert metrics["all/examples"] == 20  # dogs and emus; a zebra is none of the run's classes
    assert metrics["all/accuracy"] == 1
    assert "10 images of classes that the head does not know are left out: 'zebra'" in caplog.text
    assert mistakes.main([str(root / "run"), "--split=all", "--allow_data_change"]) == 0
    assert "100.00 % of 20 images" in capsys.readouterr().out


def test_names_that_are_not_text_or_formulas_are_drawn_and_written(root, capsys):
    for before, after in ((b"cat", b"c\xe4t"), (b"dog", b"$\\frac_dog$")):
        os.rename(os.fsencode(root / "pets") + b"/" + before, os.fsencode(root / "pets") + b"/" + after)
    train(make_config(root, steps=1), root / "other")
    assert mistakes.main([str(root / "other"), "--split=all"]) == 0
    written = (root / "other" / "predictions.csv").read_text()
    assert r"pets/c\xe4t/0.jpg" in written
    assert r"$\frac_dog$" in written
    assert (root / "other" / "confusion.png").exists()


def test_data_that_moved_are_named_to_mistakes(root, capsys):
    (root / "pets").rename(root / "moved")
    assert mistakes.main([str(root / "run")]) == 1
    assert "--dataset=<path>" in capsys.readouterr().err
    assert mistakes.main([str(root / "run"), f"--dataset={root / 'moved'}"]) == 0
    assert evaluate(make_config(root, **{"data.dataset": f"{root}/moved"}), root / "run")["metrics"]
    (root / "moved" / "dog").rename(root / "moved" / "wolf")
    assert mistakes.main([str(root / "run"), f"--dataset={root / 'moved'}"]) == 1


def test_differences_between_training_and_evaluation_are_reported(root, caplog):
    evaluate(make_config(root, **{"data.eval_resize": "area", "loss": "softmax"}), root / "run")
    assert "trained with the sigmoid loss; the loss that is measured is softmax" in caplog.text
    assert "interpolation bilinear; now area" in caplog.text


# ---- Going on, and beginning with a run.


def test_a_run_does_not_resume_with_other_evaluation_examples(trained, tmp_path):
    shutil.copytree(trained / "pets", tmp_path / "pets")
    for file in sorted((tmp_path / "pets").glob("*/9.jpg")):
        target = tmp_path / "both" / "test" / file.parent.name / file.name
        target.parent.mkdir(parents=True)
        shutil.copy(file, target)
    shutil.copytree(tmp_path / "pets", tmp_path / "both" / "train")
    changes = {"data.dataset": str(tmp_path / "both"), "data.train_split": "train", "data.eval_split": "test"}
    changes["checkpoint.keep_best"] = True
    assert train(make_config(tmp_path, **changes), tmp_path / "run")["test/best_accuracy"] == 1
    (tmp_path / "both" / "test" / "cat" / "9.jpg").rename(tmp_path / "both" / "test" / "cat" / "8.jpg")
    longer = make_config(tmp_path, steps=31, **changes)
    with pytest.raises(UserError, match=r"(?s)test: 3 images, but others.*--allow_data_change"):
        train(longer, tmp_path / "run", allow_config_change=True)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 0, "test/accuracy": 2.0}\n')  # of the other examples
    summary = train(longer, tmp_path / "run", allow_config_change=True, allow_data_change=True)
    assert (summary["steps"], summary["best_step"]) == (31, 31)
    assert read_facts(tmp_path / "run").eval_since == 30
    assert read_parameters(tmp_path / "run" / "best")[0] == 31  # whatever the accuracy on the other examples was


def test_a_run_with_a_damaged_record_resumes(root):
    (root / "run" / "facts.json").write_text("{")
    longer = make_config(root, steps=31, loss="sigmoid")
    assert train(longer, root / "run", allow_config_change=True)["steps"] == 31
    assert read_facts(root / "run").class_names == CLASSES


# ---- What is recorded is the state, and not the config.


def test_a_run_is_not_made_shorter_than_it_is(root):
    before = (root / "run" / "config.json").read_text()
    with pytest.raises(UserError, match="has done 30 steps already, more than the 6 that it should have"):
        train(make_config(root, steps=6, loss="sigmoid"), root / "run", allow_config_change=True)
    assert (root / "run" / "config.json").read_text() == before


def test_a_summary_counts_what_was_seen_and_lists_what_was_changed(root, caplog):
    caplog.set_level("INFO")
    changes = {"batch_size": 16, "optimizer.learning_rate": 0.001, "loss": "sigmoid"}
    summary = train(make_config(root, steps=32, **changes), root / "run", allow_config_change=True)
    assert summary["steps"] == 32
    assert summary["epochs"] == (30 * 8 + 2 * 16) / 24
    assert summary["changed_on_the_way"] == [
        "batch_size 8 -> 16 from step 31 on",
        "optimizer.learning_rate 0.01 -> 0.001 from step 31 on",
        "steps 30 -> 32 from step 31 on",
    ]
    assert "at its end the run will have seen 11.33 epochs" in caplog.text
    assert "learning_rate 0.01 -> 0.001" in (root / "run" / "summary.md").read_text()


def test_a_head_is_kept_for_the_classes_it_was_trained_on(root):
    again = {"weights": str(root / "run"), "keep_head": True, "steps": 1}
    train(make_config(root, **again), root / "again")
    assert read_facts(root / "again").class_names == CLASSES
    rename(root)
    with pytest.raises(UserError, match=r"trained on other classes .*no longer there: 'cat'; new: 'zebra'"):
        train(make_config(root, **again), root / "third")


def test_a_converted_head_is_not_kept_if_a_name_means_another_label(root, tmp_path, caplog):
    save(load(root / "run"), tmp_path / "pets.npz")
    config = make_config(root, weights=str(tmp_path / "pets.npz"), keep_head=True, steps=1)
    (root / "pets" / "emu").rename(root / "pets" / "fox")  # may be another name of the same
    train(config, root / "renamed")
    assert "has other class names" in caplog.text
    (root / "pets" / "cat").rename(root / "pets" / "zebra")
    with pytest.raises(UserError, match="trained on other classes"):
        train(config, root / "third")


# ---- Runs of older versions.


def test_an_older_run_takes_class_names_from_unchanged_data(root, capsys):
    make_old(root / "run")
    names, _, notes = predictions(root, capsys)
    assert names == list(CLASSES)
    assert "has not changed" in notes
    assert mistakes.main([str(root / "run")]) == 0


@pytest.mark.parametrize(
    ("change", "note"),
    [(rename, "may have changed since"), (lambda root: shutil.rmtree(root / "pets"), "cannot be read")],
)
def test_an_older_run_has_no_names_if_its_data_may_be_others(root, change, note, capsys):
    make_old(root / "run")
    change(root)
    names, rows, notes = predictions(root, capsys)
    assert names == [None] * 3
    assert [row[0]["label"] for row in rows] == [0, 1, 2]
    assert note in notes
    assert mistakes.main([str(root / "run")]) == 1


# ---- The file itself.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "expected a JSON object"),
        ({"loss": "hinge"}, "loss is 'hinge'; expected one of softmax, sigmoid"),
        ({"class_names": ["cat", 7]}, "class_names"),
        ({"eval_since": -1}, "eval_since"),
        ({"class_names": list("abcd")}, "at most 3 names"),
        ({"train": None}, "train is None"),
        ({"version": 9}, "version 9; this code reads up to 1"),
        ({"preprocessing": {"mean": "x"}}, "preprocessing"),
    ],
)
def test_a_damaged_file_is_one_message(root, content, message):
    path = root / "run" / "facts.json"
    whole = json.loads(path.read_text())
    path.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(UserError, match=message):
        load(root / "run")


# ---- The parts.


def test_changes_of_classes_are_described():
    assert describe_class_changes(CLASSES, CLASSES) is None
    assert describe_class_changes(None, CLASSES) is None
    assert describe_class_changes(CLASSES, ("dog", "cat", "emu")).startswith(
        "the same 3 classes in another order: 'dog'"
    )
    assert describe_class_changes(CLASSES, ("cat", "dog\udce9", "emu")) == r"no longer there: 'dog'; new: 'dog\xe9'"
    assert moved_names(("a", "c", "x"), ("a", "b", "c")) == ["c"]


class _Records:
    """Examples with several labels each, or none, whose classes have names."""

    name, split, splits, class_names, num_classes, max_labels = "records", "all", ("all",), ["b", "x", "a"], 3, 2

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"image": b"", "label": ([0, 2], [1], -1)[index]}

    def fingerprint(self):
        return "records"

    def where(self, index):
        return str(index)


def test_several_or_no_labels_are_matched_by_name_too():
    matched = MatchedByName(_Records(), ("a", "b"))
    assert [matched[index]["label"] for index in range(3)] == [[1, 0], [], -1]
    assert (matched.num_classes, matched.unknown, matched.count_unknown()) == (2, ("x",), None)
    assert matched.fingerprint() != MatchedByName(_Records(), ("b", "a")).fingerprint()
    with pytest.raises(UserError, match="no class of records"):
        MatchedByName(_Records(), ("p", "q"))


def test_examples_are_compared_where_classes_have_no_names():
    source = open_source("digits", "test")
    kept = SplitFacts.of(source, "digits", "test")
    assert open_as_trained(lambda _: source, None, kept, what="run") is source
    with pytest.raises(UserError, match="test: 359 images then, 360 now"):
        open_as_trained(
            lambda _: source, None, dataclasses.replace(kept, fingerprint="other", num_images=359), what="run"
        )


def test_a_data_set_is_recorded_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "c, d").mkdir()
    for name in ("a.tfrecord", "b.tfrecord", "c, d/e.tfrecord"):
        (tmp_path / "data" / name).write_bytes(b"")
    monkeypatch.setenv("VIT_JAX_DATA", str(tmp_path))
    assert absolute_dataset("digits") is None
    assert absolute_dataset("data") == str(tmp_path / "data")
    assert absolute_dataset("data/a*,data/b*") == f"{tmp_path}/data/a*,{tmp_path}/data/b*"
    monkeypatch.chdir(tmp_path / "data")
    assert absolute_dataset("a*") == f"{tmp_path}/data/a*"
    assert absolute_dataset("c, d/*") == f"{tmp_path}/data/c, d/*"


def test_images_without_label_of_the_head_do_not_count_in_the_confusion_matrix():
    assert mistakes.confusion_matrix(np.array([0, -1]), np.array([0, 1]), 2).sum() == 1
