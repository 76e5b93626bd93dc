"""Input of `prepare`: lists and archives from other systems, damaged ones and hostile ones."""

import contextlib
import io
import json
import os
import struct
import tarfile
import unicodedata
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.data.test_image_headers import exif_of, with_exif
from tests.data.test_prepare import WNIDS, add, examples, jpeg
from vit_jax.data import transforms
from vit_jax.data.prepare import archives
from vit_jax.data.prepare.__main__ import main
from vit_jax.data.prepare.near_duplicates import find_pairs, hash_image
from vit_jax.data.sources import open_source
from vit_jax.errors import UserError

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def write(root, files):
    for place, content in files.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(content)
    return root


def write_list(path, rows, encoding="utf-8"):
    path.write_bytes("".join(json.dumps(row) + "\r\n" for row in rows).encode(encoding))
    return path


def names_of(out, name="list"):
    return sorted(each["file_name"].decode() for each in examples(out / name / "1.0.0", "train"))


# ---- Lists.


def test_paths_of_windows_and_of_other_unicode_forms_are_found(tmp_path):
    encoding = "utf-8-sig"  # with the mark that Windows puts first
    write(
        tmp_path,
        {"img/cat/0.jpg": jpeg(0), f"img/{NFC}/1.jpg": jpeg(1), f"img/x/{NFD}.jpg": jpeg(2), "a\\b.jpg": jpeg(3)},
    )
    rows = [
        {"image": "img\\cat\\0.jpg", "label": NFC},
        {"image": f"img\\{NFD}\\1.jpg", "label": NFD},
        {"image": f"img/x/{NFC}.jpg", "label": "dog"},
        {"image": "a\\b.jpg", "label": "dog"},
    ]
    (tmp_path / "classes.txt").write_bytes(f"{NFD}\r\ndog\r\n".encode(encoding))
    place = write_list(tmp_path / "list.jsonl", rows, encoding)
    for more in ([], [f"--classes={tmp_path / 'classes.txt'}"]):
        out = tmp_path / f"out{len(more)}"
        assert main(["manifest", str(place), f"--out={out}", "--single_label", *more]) == 0
        assert names_of(out) == sorted(["img/cat/0.jpg", f"img/{NFC}/1.jpg", f"img/x/{NFD}.jpg", "a\\b.jpg"])
        source = open_source(str(out), "train")
        assert sorted(source.class_names) == sorted([NFC, "dog"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "C:\\img\\0.jpg", "label": 1}, "the Windows path"),
        ({"image": "\\\\server\\img\\0.jpg", "label": 1}, "the Windows path"),
        ({"image": "..\\img\\0.jpg", "label": 1}, "which is not in"),
        ({"image": "a\0b\\c.jpg", "label": 1}, "has the invalid path"),
        ([[]] * 3, "has no image"),
    ],
)
def test_rows_that_name_no_image_of_the_folder_are_refused(tmp_path, capsys, row, message):
    place = write_list(tmp_path / "list.jsonl", [row])
    assert main(["manifest", str(place), f"--out={tmp_path / 'out'}"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 5000 + b"\n", "not JSON"),
        (b'{"a":' * 2000 + b"\n", "not JSON"),
        (b'{"image": "a.jpg", "label": 1' + b"0" * 5000 + b"}", "not JSON"),
        ('{"image": "a.jpg", "label": 1}\n'.encode("utf-16"), "is UTF-16. Save it as UTF-8"),
        (b'{"image": "' + b"a" * 2**22, "more than 4,194,304 bytes"),
        (b"\xff\n", "not JSON"),
    ],
)
def test_files_that_are_not_lists_are_one_message(tmp_path, capsys, content, message):
    (tmp_path / "list.jsonl").write_bytes(content)
    assert main(["manifest", str(tmp_path / "list.jsonl"), f"--out={tmp_path / 'out'}"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error) < 600


def test_damaged_parquet_is_one_message(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    write(tmp_path, {f"{number}.jpg": jpeg(number) for number in range(20)})
    rows = {"image": [f"{number}.jpg" for number in range(20)], "label": list(range(20))}
    place = tmp_path / "list.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), place)
    whole, rng, refused = place.read_bytes(), np.random.default_rng(0), 0
    for trial in range(8):
        damaged = bytearray(whole)
        for at in rng.integers(4, len(whole) - 8, 6):
            damaged[at] ^= 0xFF
        place.write_bytes(damaged)
        refused += main(["manifest", str(place), f"--out={tmp_path / str(trial)}", "--no_verify"])
    assert refused > 3
    assert "as parquet" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["list", "classes", "image"])
def test_what_is_not_a_regular_file_is_not_opened(tmp_path, capsys, what):
    write(tmp_path, {"0.jpg": jpeg(0), "classes.txt": b"cat\n"})
    place = write_list(tmp_path / "list.jsonl", [{"image": "0.jpg", "label": "cat"}])
    path = {"list": place, "classes": tmp_path / "classes.txt", "image": tmp_path / "0.jpg"}[what]
    path.unlink()
    os.mkfifo(path)
    arguments = [str(place), f"--classes={tmp_path / 'classes.txt'}", f"--out={tmp_path / 'out'}"]
    assert main(["manifest", *arguments]) == 1
    assert ("there is no list" if what == "list" else "it is a FIFO") in capsys.readouterr().err


# ---- Folders.


def test_a_split_may_lack_classes_of_the_training_split(tmp_path, capsys):
    folder = write(tmp_path / "pets", {f"train/{name}/0.jpg": jpeg(i) for i, name in enumerate(("cat", "dog", "emu"))})
    write(
        folder, {"test/dog/0.jpg": jpeg(7), "val/cat/0.jpg": jpeg(8), "val/README.txt": b"", "annotations/a.xml": b""}
    )
    (folder / "test" / "emu").mkdir()
    assert main(["image_folder", str(folder), f"--out={tmp_path / 'out'}"]) == 0
    assert "note: split 'test' has no images of 2 of 3 classes: 'cat', 'emu'" in capsys.readouterr().err
    for split, label in (("test", 1), ("val", 0)):
        (example,) = examples(tmp_path / "out/pets/1.0.0", split)
        assert example["label"] == label


def test_names_that_are_not_text_are_prepared_escaped(tmp_path):
    folder = os.fsencode(tmp_path / "pets" / "train")
    for name in (b"d\xf6g", b"cat"):
        os.makedirs(os.path.join(folder, name))
        with open(os.path.join(folder, name, b"caf\xe9.jpg"), "wb") as file:
            file.write(jpeg(len(name)))
    assert main(["image_folder", str(tmp_path / "pets"), f"--out={tmp_path / 'out'}"]) == 0
    assert names_of(tmp_path / "out", "pets") == [r"cat/caf\xe9.jpg", r"d\xf6g/caf\xe9.jpg"]
    assert open_source(str(tmp_path / "out"), "train").class_names == ["cat", r"d\xf6g"]


# ---- Orientation.


def photo(seed, orientation):
    return with_exif(jpeg(seed, 48), exif_of(orientation))


def test_records_made_of_files_are_turned_as_the_files_are(tmp_path):
    folder = write(tmp_path / "pets", {"train/cat/0.jpg": photo(0, 6), "train/dog/0.jpg": jpeg(1)})
    rows = [{"image": f"train/{name}/0.jpg", "label": label} for label, name in enumerate(("cat", "dog"))]
    place = write_list(folder / "list.jsonl", rows)
    assert main(["image_folder", str(folder), f"--out={tmp_path / 'a'}"]) == 0
    assert main(["manifest", str(place), f"--out={tmp_path / 'b'}"]) == 0
    assert (
        main(["dedup", str(tmp_path / "a/pets/1.0.0"), f"--out={tmp_path / 'c'}", f"--against={folder}:train[:1]"]) == 0
    )
    shards = str(next((tmp_path / "a/pets/1.0.0").glob("*array_record*")))
    for prepared in (str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c"), shards):
        source = open_source(prepared, "all" if prepared == shards else "train")
        assert all(source[i]["exif_orientation"] for i in range(len(source)))
    assert photo(0, 6) in {source[i]["image"] for source in [open_source(shards, "all")] for i in range(2)}
    manifest = tmp_path / "a/pets/1.0.0/manifest.json"
    manifest.write_text(
        json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "exif_orientation"})
    )
    assert "exif_orientation" not in open_source(str(tmp_path / "a"), "train")[0]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_photo_and_its_upright_copy_are_near_duplicates(orientation):
    stored = photo(3, orientation)
    upright = io.BytesIO()
    Image.fromarray(transforms.decode(stored, exif_orientation=True)).save(upright, "PNG")
    found = find_pairs(hash_image(stored)[None], hash_image(upright.getvalue())[None])
    assert len(found[0]) == 1


def test_images_that_decode_refuses_are_not_hashed():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    bomb = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0) + bytes(4)
    )
    for content in (eps, bomb + struct.pack(">I", 2**32 - 1) + b"tEXt", b"II*\0" + bytes(50)):
        with pytest.raises((UserError, OSError)):
            hash_image(content)


# ---- Tar archives.


def tar_of(*members):
    """A tar of names with contents."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, inside in members:
            add(archive, name, inside)
    return content.getvalue()


def header(name, size, kind=b"0"):
    """A header whose size is written in base 256, as for sizes of 8 GiB and more, or negative ones."""
    field = (size % 2**96).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157], block[148:156] = field, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def nested(depth):
    content = tar_of(("a.jpg", b"x"))
    for _ in range(depth):
        content = tar_of((f"{WNIDS[0]}.tar", content))
    return content


ONE_PAX = header("pax", 512, b"x") + b"20 comment=xxxxxxxx\n".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header("a.jpg", -512) + bytes(1024), "near byte"),
        (header("a.jpg", -(2**70)) + bytes(1024), "near byte"),
        (header("a.jpg", 2**80) + bytes(1024), "near byte"),
        (header("long", -512, b"L") + bytes(2048), "a header of"),
        (header("long", 2**40, b"L") + bytes(2048), "a header of"),
        (header("pax", -512, b"x") + bytes(2048), "a header of"),
        (header("pax", 2**21, b"x") + bytes(2**21 + 1024), "a header of"),
        (ONE_PAX * 3000 + tar_of(("a.jpg", b"x")), "near byte"),
        (nested(30), "8 nested tars"),
        (tar_of(("a\\..\\..\\b.jpg", b"x")), "would leave the folder"),
        (tar_of(("/etc/b.jpg", b"x")), "would leave the folder"),
        (header("pax", 512, b"x") + b"17 path=ab\0c.jpg\n".ljust(512, b"\0") + tar_of(("a.jpg", b"x")), "would leave"),
        (header("sparse", 512, b"S") + bytes(1024), "sparse file"),
        (b"\xff" * 2048, "near byte"),
    ],
)  # fmt: skip
def test_invalid_tars_are_one_message(tmp_path, content, message):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list(archives.scan(archives.find_archives([path])))
    assert len(str(error.value)) < 1000


def test_any_damage_of_tar_headers_is_one_message(tmp_path):
    whole = tar_of((f"{WNIDS[0]}.tar", tar_of(("a.jpg", b"x"))), ("b" * 200 + ".jpg", b"y"), ("c.jpg", b"z"))
    path, rng = tmp_path / "a.tar", np.random.default_rng(0)
    for _ in range(120):
        damaged = bytearray(whole)
        block = 512 * int(rng.integers(len(whole) // 512))
        for at in rng.integers(100, 160, rng.integers(1, 3)):
            damaged[block + at] = rng.choice([0, 0x30, 0x37, 0x4C, 0x53, 0x78, 0x80, 0xFF])
        damaged[block + 148 : block + 156] = b" " * 8
        damaged[block + 148 : block + 156] = b"%06o\0 " % sum(damaged[block : block + 512])
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert sum(1 for _ in archives.scan([path])) < 100


def test_archives_that_are_not_regular_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    for place in (tmp_path, tmp_path / "a.tar"):
        with pytest.raises(UserError, match=r"a.tar as a tar file: it is a FIFO"):
            archives.find_archives([place])


def test_a_zip_of_endless_damage_is_one_message(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("train/cat/0.jpg", jpeg(0))
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[-10:-6] = b"\xff\xff\xff\x7f"  # where the table of contents begins
    (tmp_path / "a.zip").write_bytes(content)
    assert main(["image_folder", str(tmp_path / "a.zip"), f"--out={tmp_path / 'out'}"]) == 1
    assert "as a folder or zip file of images" in capsys.readouterr().err
