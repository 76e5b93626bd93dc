"""Removal of near-duplicates of test images from a pre-training set."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.test_prepare import contents, examples
from tests.data.test_prepare_sets import NUMBERED, write_list
from vit_jax.data.prepare import tfds_layout
from vit_jax.data.prepare.__main__ import main
from vit_jax.data.prepare.index import Index
from vit_jax.data.sources import open_source


def picture(seed):
    """A smooth random picture: unlike any of another seed, and like itself when resized."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8))
    return coarse.resize((240, 180), Image.Resampling.BICUBIC)


def encode(image, quality=90):
    encoded = io.BytesIO()
    image.convert("RGB").save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


def crop(image, share):
    """Leaves out a share of width and height, at all sides alike."""
    width, height = image.size
    x, y = round(width * share / 2), round(height * share / 2)
    return image.crop((x, y, width - x, height - y))


COPIES = {
    "encoded anew": lambda image: encode(image, quality=30),
    "half the size": lambda image: encode(
        image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)
    ),
    "32 x 32": lambda image: encode(image.resize((32, 32), Image.Resampling.LANCZOS)),
    "square": lambda image: encode(image.resize((224, 224), Image.Resampling.BILINEAR)),
    "grey": lambda image: encode(image.convert("L")),
    "mirrored": lambda image: encode(ImageOps.mirror(image)),
    "cropped by 3 %": lambda image: encode(crop(image, 0.03)),
}


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory):
    """20 pictures of their own, and copies of test pictures 0 to 6."""
    folder = tmp_path_factory.mktemp("pretraining")
    (folder / "web").mkdir()
    rows = []
    images = {f"own{i}.jpg": encode(picture(100 + i)) for i in range(20)}
    images |= {f"{name}.jpg": copy(picture(i)) for i, (name, copy) in enumerate(COPIES.items())}
    for name, image in images.items():
        (folder / "web" / name).write_bytes(image)
        rows.append(json.dumps({"image": name, "labels": [len(rows)]}))
    (folder / "web/web.jsonl").write_text("\n".join(rows))
    assert main(["manifest", str(folder / "web/web.jsonl"), f"--out={folder}", "--num_shards=3"]) == 0
    (folder / "tests/test/any").mkdir(parents=True)
    for i in range(10):
        (folder / f"tests/test/any/{i}.jpg").write_bytes(encode(picture(i)))
    return folder


@pytest.fixture(scope="module")
def cleaned(pretraining, tmp_path_factory):
    out = tmp_path_factory.mktemp("cleaned")
    assert main([*clean(pretraining), f"--out={out}"]) == 0
    return out / "web_dedup/1.0.0"


def clean(folder):
    return ["dedup", str(folder / "web/1.0.0"), "--against", f"{folder / 'tests'}:test"]


def test_copies_of_test_images_are_removed_and_others_kept(cleaned):
    names = {example["file_name"].decode() for example in examples(cleaned, "train")}
    assert names == {f"own{i}.jpg" for i in range(20)}


def test_kept_examples_are_unchanged_and_in_order(cleaned, pretraining):
    before = [e for e in examples(pretraining / "web/1.0.0", "train") if e["file_name"].startswith(b"own")]
    assert [(e["image"], e["labels"]) for e in examples(cleaned, "train")] == [
        (e["image"], e["labels"]) for e in before
    ]


def test_the_report_names_each_pair(cleaned):
    report = json.loads((cleaned / "report.json").read_text())
    found = {pair["file_name"].removesuffix(".jpg"): pair for pair in report["pairs"]}
    assert list(COPIES) == sorted(found, key=lambda name: found[name]["against_index"])
    assert [name for name, pair in found.items() if pair["mirrored"]] == ["mirrored"]
    assert (report["removed"], report["examples"], report["against"][0]["found"]) == (7, 27, 7)


def test_images_that_cannot_be_compared_stay_in_and_are_counted(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "tests/test/any").mkdir(parents=True)
    black = encode(Image.new("RGB", (64, 64)))
    for name, image in (("black", black), ("own", encode(picture(1)))):
        (tmp_path / "web" / f"{name}.jpg").write_bytes(image)
    (tmp_path / "web/web.jsonl").write_text('{"image": "black.jpg", "label": 0}\n{"image": "own.jpg", "label": 1}')
    (tmp_path / "tests/test/any/black.jpg").write_bytes(black)
    assert main(["manifest", str(tmp_path / "web/web.jsonl"), f"--out={tmp_path}"]) == 0
    assert main([*clean(tmp_path), f"--out={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out/web_dedup/1.0.0/report.json").read_text())
    assert (report["removed"], report["not_compared"], report["against"][0]["not_compared"]) == (0, 1, 1)
    assert "1 examples could not be compared" in (tmp_path / "out/web_dedup/1.0.0/report.html").read_text()


def test_the_pictures_show_each_pair(cleaned):
    page = (cleaned / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 14
    assert "7 of 27 examples removed" in page


def test_a_cleaned_set_passes_its_check(cleaned):
    assert main(["check", str(cleaned)]) == 0


def test_cleaning_that_was_interrupted_gives_the_same_bytes(cleaned, pretraining, tmp_path, monkeypatch):
    write_shard = tfds_layout.write_shard

    def only_the_first(path, made):
        if "-00000-" not in path.name:
            raise KeyboardInterrupt
        return write_shard(path, made)

    monkeypatch.setattr(tfds_layout, "write_shard", only_the_first)
    assert main([*clean(pretraining), f"--out={tmp_path}"]) == 130
    monkeypatch.undo()
    # Earlier versions kept the files beside the settings.
    with contextlib.closing(Index(tmp_path / "web_dedup/1.0.0.incomplete")) as index:
        settings = index.fact("settings")
        index.commit(files=settings.pop("files"), settings=settings)
    assert main([*clean(pretraining), f"--out={tmp_path}"]) == 0
    assert contents(tmp_path / "web_dedup/1.0.0") == contents(cleaned)


def test_a_cleaned_set_stays_unless_settings_change(cleaned, pretraining, capsys):
    again = [*clean(pretraining), f"--out={cleaned.parent.parent}"]
    before = contents(cleaned)
    assert main(again) == 0
    assert main([*again, "--sure=10"]) == 1
    assert "made with other settings" in capsys.readouterr().err
    assert contents(cleaned) == before


def test_a_cleaned_set_knows_how_many_labels_an_image_may_have(tmp_path):
    path = write_list(tmp_path, [{"image": "images/0.jpg", "labels": list(range(40))}])
    assert main(["manifest", str(path), f"--out={tmp_path}"]) == 0
    assert main(["dedup", str(tmp_path / "web/1.0.0"), "--against", "digits:test", f"--out={tmp_path}"]) == 0
    source = open_source(str(tmp_path / "web_dedup/1.0.0"), "train")
    assert source.max_labels == 40 and source[0]["label"] == list(range(40))


def test_cleaning_does_not_resume_with_another_set_of_the_same_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests/test/any").mkdir(parents=True)
    (tmp_path / "tests/test/any/0.jpg").write_bytes(encode(picture(1)))
    prepare = ["manifest", str(write_list(tmp_path, NUMBERED)), f"--out={tmp_path}"]
    assert main(prepare) == 0
    with monkeypatch.context() as patch:
        patch.setattr(tfds_layout, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*clean(tmp_path), f"--out={tmp_path}"]) == 130
    shutil.rmtree(tmp_path / "web")
    write_list(tmp_path, NUMBERED[1:] + NUMBERED[:1])
    (tmp_path / "images/0.jpg").write_bytes(encode(picture(1)))
    assert main(prepare) == 0
    assert main([*clean(tmp_path), f"--out={tmp_path}"]) == 1
    assert "the source files are not the same" in capsys.readouterr().err


def test_a_prepared_set_can_be_the_test_set(pretraining, tmp_path):
    folder = pretraining / "web/1.0.0"
    assert main(["dedup", str(folder), "--against", f"{folder}:train[:5]", f"--out={tmp_path}"]) == 0
    assert len(examples(tmp_path / "web_dedup/1.0.0", "train")) == 22


def test_a_test_image_that_cannot_be_read_resembles_nothing(tmp_path):
    """Not even a plain image, whose hash has hardly a bit set."""
    (tmp_path / "white.jpg").write_bytes(encode(Image.new("RGB", (50, 50), "white")))
    (tmp_path / "web.jsonl").write_text('{"image": "white.jpg", "label": 0}')
    (tmp_path / "tests/test/any").mkdir(parents=True)
    (tmp_path / "tests/test/any/broken.jpg").write_bytes(b"no picture")
    assert main(["manifest", str(tmp_path / "web.jsonl"), f"--out={tmp_path}"]) == 0
    assert main([*clean(tmp_path), f"--out={tmp_path}"]) == 0
    assert len(examples(tmp_path / "web_dedup/1.0.0", "train")) == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--against", "nosplit"], "has no split"),
        (["--against", "no/such/folder:test"], "no/such/folder"),
        (["--against", "digits:test", "--split=full"], "unknown split"),
        (["--against", "digits:test", "--near=40"], "--near=40"),
    ],
)
def test_impossible_requests_to_dedup_are_errors(pretraining, tmp_path, capsys, more, words):
    assert main(["dedup", str(pretraining / "web/1.0.0"), f"--out={tmp_path}", *more]) == 1
    assert words in capsys.readouterr().err


def test_dedup_of_a_set_with_another_image_feature_is_one_message(tmp_path, capsys):
    folder = tmp_path / "birds/1.0.0"
    folder.mkdir(parents=True)
    name = tfds_layout.shard_name("birds", "train", 0, 1)
    shards = {"train": {name: tfds_layout.write_shard(folder / name, [b"any"])}}
    import tensorflow_datasets as tfds

    named = tfds.features.FeaturesDict(
        {"picture": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=1)}
    )
    tfds_layout.describe(folder, shards, named, name="birds", version="1.0.0", num_classes=1, source={}, settings={})
    assert main(["dedup", str(folder), "--against", "digits:test", f"--out={tmp_path}"]) == 1
    assert "has no feature image, only" in capsys.readouterr().err
