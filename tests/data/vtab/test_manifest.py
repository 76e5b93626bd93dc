import contextlib
import dataclasses
import hashlib
import io
import json

import cv2
import numpy as np
import pytest

from tests.data.vtab import prepared
from vit_jax.data.vtab import TASKS, open_vtab
from vit_jax.data.vtab.__main__ import main
from vit_jax.data.vtab.manifest import make_manifest, read_manifest
from vit_jax.errors import UserError

TRAIN, VALIDATION = 589_824, 73_728  # of dSprites
SPRITE = np.array([[0, 1], [1, 1]], np.uint8)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return prepared.features_of("dsprites", tmp_path_factory.mktemp("features"))


def example(features, number, compression=1, **fields):
    """An example of dSprites as TFDS has it: a sprite, here of four pixels, at its place."""
    x, y = number % 32, number // 32
    pixels = np.zeros((64, 64, 1), np.uint8)
    pixels[2 * y : 2 * y + 2, 2 * x : 2 * x + 2, 0] = SPRITE
    pixels[0, 0] = fields.pop("corner", pixels[0, 0])
    image = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, compression])[1].tobytes()
    given = {"image": image, "label_x_position": x, "label_y_position": y, "label_orientation": number % 40}
    return prepared.serialize(features, prepared.example(features, 0, **(given | fields)))


@pytest.fixture(scope="module")
def made(features):
    """A thousand examples."""
    return [example(features, number) for number in range(1000)]


def prepare(data_dir, made, *, first=800):
    """Prepares dSprites with these thousand examples; the first `first` of them lie in a file of their own."""
    files = [made[:first], *([made[first:800]] if first < 800 else []), TRAIN - 800, made[800:], VALIDATION * 2 - 200]
    prepared.write(data_dir, "dsprites", {"train": files})


@pytest.fixture
def use(tmp_path, monkeypatch):
    """Looks for data sets only in a folder."""

    def run(folder):
        monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
        monkeypatch.delenv("VIT_JAX_DATA", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))

    return run


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    """The data set, as others have it."""
    folder = tmp_path_factory.mktemp("theirs")
    prepare(folder, made)
    return folder


@pytest.fixture(scope="module")
def written(folder):
    """Runs the command that writes a manifest; returns the file and the output."""
    path, printed = folder / "theirs.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("TFDS_DATA_DIR", str(folder))
        patch.setenv("HOME", str(folder))
        patch.delenv("VIT_JAX_DATA", raising=False)
        assert main(["manifest", f"--out={path}"]) == 0
    return path, printed.getvalue()


@pytest.fixture
def theirs(written, use, folder):
    """A manifest of the data set, which is prepared here too."""
    use(folder)
    return written[0]


@pytest.fixture
def ours(use, tmp_path):
    """Prepares the data set here, from these examples."""

    def run(examples, **options):
        use(tmp_path / "data")
        prepare(tmp_path / "data", examples, **options)

    return run


def with_changed(made, **others):
    """The examples with others at some numbers: `at_3=...`."""
    changed = {int(name.removeprefix("at_")): other for name, other in others.items()}
    return [changed.get(number, one) for number, one in enumerate(made)]


def rewritten(path, tmp_path, change):
    """A copy of a manifest with another content."""
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(change(json.loads(path.read_text()))))
    return copy


def with_other_pixels(*numbers):
    """Changes some examples' pixels in a manifest, and its digest."""

    def change(content):
        for entry in content["tasks"].values():
            for number in numbers:
                entry["pixels"][number] = f"{number:016x}"
            entry["digest"] = digest_of(entry)
        return content

    return change


def digest_of(entry):
    """The digest over all examples: a line for each with the digest of its pixels and its label."""
    lines = [f"{pixels} {label}\n" for pixels, label in zip(entry["pixels"], entry["labels"], strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_manifest_covers_all_prepared_tasks(written):
    path, printed = written
    content = read_manifest(path)
    assert list(content["tasks"]) == ["dsprites_location", "dsprites_orientation"]
    assert "OpenCV" in content["decoder"]
    location, orientation = content["tasks"].values()
    assert location["data"] == orientation["data"] == "dsprites:2.0.0"
    assert location["labels"] == [number % 32 // 2 for number in range(1000)]
    assert orientation["labels"][:5] == [0, 0, 0, 1, 1]
    assert location["pixels"] == orientation["pixels"]
    assert len(set(location["pixels"])) == 1000
    assert f"dsprites_location     {location['digest'][:16]}  dsprites:2.0.0" in printed
    assert "2 of 19 tasks in" in printed


def test_label_of_location_is_where_the_sprite_is(folder, use):
    use(folder)
    source = open_vtab("dsprites_location", "train800val200")
    for number in range(0, 1000, 37):  # each sprite is in one of 32 places of two columns, two places to a class
        columns = np.flatnonzero(source[number]["image"].any(axis=(0, 2)))
        assert {column // 4 for column in columns} == {source[number]["label"]}


def test_digests_are_of_shape_pixels_and_labels_and_so_the_same_on_all_machines(written):
    entry = read_manifest(written[0])["tasks"]["dsprites_location"]
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[62:, 14:16] = 255 * SPRITE[..., None]  # number 999 is at x = 7, y = 31
    assert entry["pixels"][999] == hashlib.sha256(b"(64, 64, 3) " + pixels.tobytes()).hexdigest()[:16]
    assert entry["digest"] == digest_of(entry)


def test_same_examples_in_other_files_and_other_compression_have_the_same_digests(theirs, ours, made, features, capsys):
    others = [example(features, number, compression=0) for number in range(20)]
    assert all(len(a) != len(b) for a, b in zip(made, others, strict=False))
    ours([*others, *made[20:]], first=300)
    assert main(["check", str(theirs), "--tasks=dsprites_location"]) == 0
    assert "1 of 1 tasks have the same thousand examples" in capsys.readouterr().out


def test_examples_with_another_label_or_pixel_are_named(theirs, ours, made, features, capsys):
    other_label, other_pixel = example(features, 3, label_x_position=31), example(features, 800, corner=1)
    ours(with_changed(made, at_3=other_label, at_800=other_pixel))
    assert main(["check", str(theirs), "--tasks=dsprites_location"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "dsprites_location: 2 of 1,000 examples differ, 2 do not exist there "
        "(dsprites:2.0.0 here, dsprites:2.0.0 there)",
        "  train800[3]: label 15 here, 1 there",
        "  val200[0]: other pixels",
        "0 of 1 tasks have the same thousand examples in the same order",
    ]


def test_other_order_is_distinguished_from_other_examples(theirs, tmp_path, capsys):
    def swap(content):
        for entry in content["tasks"].values():
            for values in (entry["pixels"], entry["labels"]):
                values[0], values[1] = values[1], values[0]
            entry["digest"] = digest_of(entry)
        return content

    assert main(["check", str(theirs), str(rewritten(theirs, tmp_path, swap))]) == 1
    assert "dsprites_location: the same examples in another order\n" in capsys.readouterr().out


def test_only_the_first_examples_that_differ_are_named(theirs, tmp_path, capsys):
    ours = rewritten(theirs, tmp_path, with_other_pixels(*range(10, 1000)))
    assert main(["check", str(theirs), str(ours), "--tasks=dsprites_location"]) == 1
    printed = capsys.readouterr().out
    assert "990 of 1,000 examples differ" in printed
    named = [line.split(":")[0].strip() for line in printed.splitlines() if line.startswith("  ")]
    assert named == [f"train800[{i}]" for i in (10, 11, 12, 13, 14)]


def test_other_decoder_is_reported_if_pixels_differ(theirs, tmp_path, capsys):
    foreign = rewritten(theirs, tmp_path, lambda content: content | {"decoder": "TensorFlow 2.21"})
    assert main(["check", str(theirs), str(foreign)]) == 0
    assert "TensorFlow" not in capsys.readouterr().out
    foreign = rewritten(foreign, tmp_path, with_other_pixels(3))
    assert main(["check", str(foreign), str(theirs)]) == 1
    assert "by TensorFlow 2.21 there, which alone may change a JPEG's pixels" in capsys.readouterr().out


def test_two_files_are_compared_without_the_data(theirs, use, tmp_path, capsys):
    use(tmp_path)
    assert main(["check", str(theirs), str(theirs)]) == 0
    assert "2 of 2 tasks" in capsys.readouterr().out


def test_tasks_that_only_one_side_has_are_named(theirs, tmp_path, capsys):
    def add(content):
        content["tasks"]["dtd"] = content["tasks"].pop("dsprites_location")
        return content

    other = str(rewritten(theirs, tmp_path, add))
    for pair in ([str(theirs), other], [other, str(theirs)], [other]):
        assert main(["check", *pair]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0].startswith("not compared, because only one side has them: ")
        assert "dtd" in printed[0]
        assert printed[1] == "1 of 1 tasks have the same thousand examples in the same order"


def test_task_to_check_that_is_not_prepared_says_how_to_prepare_it(theirs, tmp_path, capsys):
    def rename(content):
        return content | {"tasks": {"dtd": content["tasks"]["dsprites_location"]}}

    assert main(["check", str(rewritten(theirs, tmp_path, rename)), "--tasks=dtd"]) == 1
    assert "python -m vit_jax.data.prepare tfds dtd" in capsys.readouterr().err


def test_manifest_that_was_changed_is_refused(theirs, tmp_path, capsys):
    def change(content):
        content["tasks"]["dsprites_location"]["labels"][0] = 7
        return content

    assert main(["check", str(rewritten(theirs, tmp_path, change))]) == 1
    assert "was changed: the digest of dsprites_location does not match its examples" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{", '{"format": 1}', '{"format": 1, "tasks": {"dtd": 3}}'])
def test_file_that_is_not_a_manifest_is_refused(tmp_path, capsys, content):
    path = tmp_path / "theirs.json"
    path.write_text(content)
    assert main(["check", str(path)]) == 1
    assert f"cannot read {path} as a manifest" in capsys.readouterr().err


def test_manifest_of_a_later_format_is_refused(tmp_path, capsys):
    path = tmp_path / "theirs.json"
    path.write_text('{"format": 2, "tasks": {}}')
    assert main(["check", str(path)]) == 1
    assert "is of format 2; this version reads 1" in capsys.readouterr().err


def test_manifests_without_a_common_task_are_not_called_the_same(theirs, tmp_path, capsys):
    def rename(content):
        return content | {"tasks": {"dtd": content["tasks"]["dsprites_location"]}}

    assert main(["check", str(rewritten(theirs, tmp_path, rename))]) == 1
    assert "no task to compare" in capsys.readouterr().err


def test_list_says_what_is_prepared(folder, use, capsys):
    use(folder)
    assert main(["list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert list(lines) == list(TASKS)
    here = [name for name, line in lines.items() if line.split()[-1] == "2.0.0"]
    assert here == ["dsprites_location", "dsprites_orientation"]
    assert all(line.endswith(" -") for name, line in lines.items() if name not in here)


def test_manifest_of_nothing_says_how_to_get_data(tmp_path, use, capsys):
    use(tmp_path)
    assert main(["manifest", f"--out={tmp_path / 'x.json'}"]) == 1
    assert "no data set of VTAB is prepared" in capsys.readouterr().err
    assert main(["manifest", "--tasks=resisc45", f"--out={tmp_path / 'x.json'}"]) == 1
    assert "tfds resisc45 --manual_dir=<folder>" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_manifest_without_its_folder_is_refused_before_reading(folder, use, capsys):
    use(folder)
    assert main(["manifest", "--tasks=resisc45", f"--out={folder / 'none' / 'x.json'}"]) == 1
    assert f"there is no folder {folder / 'none'}" in capsys.readouterr().err


@pytest.mark.parametrize("pixels", [None, TASKS["dsprites_location"].data.pixels])
def test_image_that_cannot_be_decoded_is_named(ours, made, features, pixels):
    ours(with_changed(made, at_2=example(features, 2, image=b"\x89PNG\r\n\x1a\n")))
    with pytest.raises(UserError, match=r"cannot read record 2 of .*dsprites-train.*: not an image"):
        task = TASKS["dsprites_location"]
        make_manifest([dataclasses.replace(task, data=dataclasses.replace(task.data, pixels=pixels))])
