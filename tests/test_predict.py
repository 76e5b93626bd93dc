"""`python -m vit_jax.predict` and its parts."""

import dataclasses
import json
import os
import subprocess
import sys

import cv2
import flax.traverse_util
import jax
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from tests.conftest import ROOT, main_environment
from vit_jax import predict
from vit_jax.errors import UserError
from vit_jax.models import create_model
from vit_jax.weights import Preprocessing, from_params, save
from vit_jax.weights.identify import ModelSpec, expected_shapes

TINY = {"num_layers": 1, "hidden_dim": 16, "mlp_dim": 32, "num_heads": 2}
NAMES = ("cat", "dog", "owl")


def make_weights(size=8, num_classes=3, names=NAMES, **overrides):
    attributes = TINY | overrides
    shapes = expected_shapes(ModelSpec("ViT-Ti/4", num_classes, attributes), (size, size))
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    params = flax.traverse_util.unflatten_dict(params, sep="/")
    return from_params("ViT-Ti/4", params, image_size=size, class_names=names, **attributes)


@pytest.fixture
def weights_file(tmp_path):
    return save(make_weights(), tmp_path / "weights.npz")


@pytest.fixture
def folder(tmp_path):
    for index in range(5):
        pixels = np.random.default_rng(index).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        path = tmp_path / "images" / "sub" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), pixels)
    return tmp_path / "images"


def run(*arguments):
    return predict.main([str(argument) for argument in arguments])


def expected_probabilities(weights, path, size=8):
    pixels = cv2.imread(str(path))[..., ::-1]
    resized = np.rint(cv2.resize(pixels.astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR))
    model = create_model("ViT-Ti/4", num_classes=3, **TINY)
    logits, _ = model.apply({"params": weights.params}, resized[None].astype(np.float32) / 127.5 - 1)
    return np.asarray(jax.nn.softmax(logits))[0]


def test_json_has_each_image_with_the_models_probabilities_the_likeliest_first(weights_file, folder, capsys):
    assert run(f"--weights={weights_file}", "--json", "--top=3", "--batch_size=2", folder) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(folder / "sub" / f"{index}.png") for index in range(5)]
    for row in rows:
        expected = expected_probabilities(make_weights(), row["image"])
        assert [each["label"] for each in row["predictions"]] == np.argsort(-expected).tolist()
        for each in row["predictions"]:
            assert each["name"] == NAMES[each["label"]]
            assert each["probability"] == pytest.approx(expected[each["label"]], abs=1e-5)


def test_text_names_the_top_classes(weights_file, folder, capsys):
    assert run(f"--weights={weights_file}", "--top=2", folder / "sub" / "0.png") == 0
    lines = capsys.readouterr().out.splitlines()
    expected = expected_probabilities(make_weights(), folder / "sub" / "0.png")
    first = int(expected.argmax())
    assert lines[0] == str(folder / "sub" / "0.png")
    assert len(lines) == 3
    assert f"{100 * expected[first]:.2f} %" in lines[1]
    assert f"{NAMES[first]} ({first})" in lines[1]


def test_batch_size_changes_no_probability(weights_file, folder, capsys):
    outputs = []
    for batch_size in (1, 3, 32):
        run(f"--weights={weights_file}", "--json", "--top=3", f"--batch_size={batch_size}", folder)
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        outputs.append([[each["probability"] for each in row["predictions"]] for row in rows])
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-6)
    np.testing.assert_allclose(outputs[0], outputs[2], atol=1e-6)


def test_files_folders_and_patterns_name_each_image_once(folder):
    first = str(folder / "sub" / "0.png")
    found = predict.find_images([first, str(folder), str(folder / "**" / "[01].png")])
    assert found.images == [str(folder / "sub" / f"{index}.png") for index in range(5)]
    assert found.others == found.errors == []


def test_names_that_are_not_text_are_shown_escaped(weights_file, folder, capsys):
    name = os.fsdecode(b"caf\xe9\n.png")
    (folder / "sub" / "0.png").rename(folder / name)
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    assert run(f"--weights={weights_file}", "--top=1", folder) == 1
    output = capsys.readouterr()
    assert output.out.splitlines()[0] == str(folder / r"caf\xe9\n.png")
    assert rf"cannot read {folder}/\xff.png: not an image" in output.err
    assert run(f"--weights={weights_file}", "--top=1", "--json", folder / name) == 0
    assert json.loads(capsys.readouterr().out)["image"] == str(folder / name)  # which opens the file


def test_skipped_files_of_a_folder_are_reported(weights_file, folder, capsys, monkeypatch):
    (folder / "notes.txt").write_text("notes")
    (folder / "Thumbs.db").write_bytes(b"")
    assert run(f"--weights={weights_file}", folder) == 0
    errors = capsys.readouterr().err
    assert f"skipped 1 files that are not images: '{folder}/notes.txt'" in errors
    assert "Thumbs" not in errors
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    assert run(f"--weights={weights_file}", folder) == 1
    errors = capsys.readouterr().err
    assert f"cannot read {folder}/IMG_1.HEIC: .HEIC is not supported; convert it" in errors
    assert "1 of 6 images could not be read" in errors

    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", f"{folder}/private"))
        yield str(folder / "sub"), [], []

    monkeypatch.setattr("os.walk", walk)
    assert run(f"--weights={weights_file}", folder) == 1
    assert f"cannot read {folder}/private: Permission denied" in capsys.readouterr().err


def test_images_are_found_by_suffix_or_first_bytes_and_litter_is_left_out(folder):
    content = (folder / "sub" / "0.png").read_bytes()
    for name in ("a.jfif", "b", "c.dat"):
        (folder / name).write_bytes(content)
    for name in ("notes.txt", "._0.png", "@eaDir/0.png", ".cache/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if name != "notes.txt" else b"BM is a text")
    os.mkfifo(folder / "pipe.png")
    expected = [*(folder / name for name in ("a.jfif", "b", "c.dat")), *(folder / "sub").iterdir()]
    assert predict.find_images([str(folder)]).images == sorted(map(str, expected))
    assert str(folder / "._0.png") not in predict.find_images([f"{folder}/*.*", str(folder / "sub")]).images


def test_loops_of_links_end(folder):
    for name in ("loop", "again"):
        (folder / name).symlink_to(folder)  # followed, they give 2^40 paths
    for place in (str(folder), f"{folder}/**/*.png"):
        assert len(predict.find_images([place]).images) == 5


@pytest.mark.parametrize("kind", ["FIFO", "/dev/zero"])
def test_what_is_not_a_regular_file_is_reported_and_not_opened(weights_file, folder, capsys, kind):
    place = folder / "pipe" if kind == "FIFO" else kind
    os.mkfifo(place) if kind == "FIFO" else None
    assert run(f"--weights={weights_file}", "--json", place, folder / "sub" / "0.png") == 1
    output = capsys.readouterr()
    assert f"cannot read {place}: it is a {'FIFO' if kind == 'FIFO' else 'device'}" in output.err
    assert len(output.out.splitlines()) == 1


@pytest.mark.parametrize("turned", [None, True, False])
def test_photos_are_seen_as_their_exif_says_unless_the_weights_say_otherwise(folder, tmp_path, capsys, turned):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stored = PIL.Image.fromarray(pixels)
    stored.getexif()[0x0112] = 6
    stored.save(tmp_path / "stored.png", exif=stored.getexif())
    PIL.ImageOps.exif_transpose(stored).save(tmp_path / "upright.png")
    PIL.Image.fromarray(pixels).save(tmp_path / "plain.png")
    weights = make_weights()
    preprocessing = dataclasses.replace(weights.preprocessing, exif_orientation=turned)
    weights = dataclasses.replace(weights, preprocessing=Preprocessing.from_json(preprocessing.to_json()))
    names = [tmp_path / f"{name}.png" for name in ("stored", "plain" if turned is False else "upright")]
    run(f"--weights={save(weights, tmp_path / 'w.npz')}", "--json", "--top=3", *names)
    first, second = (json.loads(line)["predictions"] for line in capsys.readouterr().out.splitlines())
    assert first == second


def test_unreadable_images_are_reported_and_the_others_answered(weights_file, folder, capsys):
    (folder / "broken.jpg").write_bytes(b"no image")
    assert run(f"--weights={weights_file}", "--json", folder) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 5
    assert f"cannot read {folder / 'broken.jpg'}: not an image" in output.err
    assert "1 of 6 images" in output.err


def test_another_image_size_interpolates_the_position_embeddings(folder):
    predictor = predict.Predictor(make_weights(), batch_size=2, image_size=16)
    images = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (0, 255)])
    probabilities = predictor(images)
    assert probabilities.shape == (2, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_a_path_is_enough_for_a_model_that_predicts(tmp_path):
    weights = make_weights()
    predictor = predict.Predictor(save(weights, tmp_path / "w.npz"), batch_size=1)
    image = predictor.preprocessing(np.full((30, 20, 3), 200, np.uint8))[None]
    np.testing.assert_array_equal(predictor(image), predict.Predictor(weights, batch_size=1)(image))


def test_sigmoid_treats_each_class_independently():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    softmax = predict.Predictor(make_weights(), batch_size=1)(images)
    sigmoid = predict.Predictor(make_weights(), batch_size=1, probabilities="sigmoid")(images)
    odds = sigmoid / (1 - sigmoid)
    np.testing.assert_allclose(odds / odds.sum(), softmax, rtol=1e-3)


def test_the_preprocessing_of_the_weights_is_applied(folder, tmp_path, capsys):
    weights = make_weights()
    mean, std = (0.1, 0.2, 0.3), (0.3, 0.2, 0.1)
    params = flax.traverse_util.unflatten_dict(weights.arrays, sep="/")
    other = from_params("ViT-Ti/4", params, image_size=8, preprocessing=Preprocessing(mean=mean, std=std), **TINY)
    run(f"--weights={save(other, tmp_path / 'other.npz')}", "--json", "--top=3", folder / "sub" / "0.png")
    row = json.loads(capsys.readouterr().out)
    pixels = cv2.imread(str(folder / "sub" / "0.png"))[..., ::-1].astype(np.float32)
    pixels = np.rint(cv2.resize(pixels, (8, 8), interpolation=cv2.INTER_LINEAR))
    logits, _ = create_model("ViT-Ti/4", num_classes=3, **TINY).apply(
        {"params": params}, ((pixels / 255 - mean) / std)[None].astype(np.float32)
    )
    expected = np.asarray(jax.nn.softmax(logits))[0]
    assert row["predictions"][0]["name"] is None
    assert row["predictions"][0]["probability"] == pytest.approx(expected.max(), abs=1e-5)


def test_weights_without_a_head_or_with_one_of_zeros_are_refused():
    with pytest.raises(UserError, match="has no head"):
        predict.Predictor(make_weights(num_classes=0, names=None))
    weights = make_weights()
    weights.arrays["head/kernel"] *= 0
    with pytest.raises(UserError, match="all zeros"):
        predict.Predictor(weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights=augreg_b16_i21k_in1k_348", "{folder}"], "Did you mean 'augreg_b16_i21k_in1k_384'"),
        (["--weights={weights}", "{folder}/none.png"], "no file or folder matches"),
        (["--weights={weights}", "{folder}/*.gif"], "no file or folder matches"),
        (["--weights={weights}", "{empty}"], "there are no images"),
        (["--weights={weights}", "{texts}"], "There are other files, such as '{texts}/a.txt'"),
        (["--weights={weights}", ""], "no file or folder matches ''"),
        (["--weights={weights}", "x" * 300], "no file or folder matches"),
        (["--weights={weights}", "~nobody-of-this-name/a.png"], "no file or folder matches"),
        (["--weights={weights}", "{folder}", "--top=0"], "must be at least 1"),
        (["--weights={weights}", "{folder}", "--image_size=1000000"], "at least 1 and at most 16,384"),
        (["--weights={weights}", "{folder}", "--image_size=9"], "not divisible by the patch size 4"),
        (["--weights={weights}", "{folder}", "--model=ViT-B/16"], "not ViT-B/16"),
    ],
)
def test_each_mistake_is_one_message(arguments, message, weights_file, folder, tmp_path, capsys):
    for name in ("empty", "texts"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    places = {"weights": weights_file, "folder": folder, "empty": tmp_path / "empty", "texts": tmp_path / "texts"}
    assert run(*(argument.format(**places) for argument in arguments)) == 1
    output = capsys.readouterr()
    assert message.format(**places) in output.err
    assert output.err.startswith("error: ")
    assert not output.out


def test_command_answers_in_its_own_process(weights_file, folder, compilation_cache):
    process = subprocess.run(
        [sys.executable, "-m", "vit_jax.predict", f"--weights={weights_file}", str(folder)],
        cwd=ROOT,
        env=main_environment(compilation_cache),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count(" %  ") == 15
