"""The promises of all preparations: the same bytes after any interruption, and nothing half-written."""

import contextlib
import functools
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import simplejpeg

from tests.conftest import ROOT
from vit_jax.data.class_names import wordnet_ids
from vit_jax.data.prepare import archives, tfds_layout, work
from vit_jax.data.prepare.__main__ import main
from vit_jax.data.prepare.imagenet21k import ONLY_RELEASED, class_map, list_classes
from vit_jax.data.prepare.index import tfds_order

WNIDS = wordnet_ids("imagenet21k")[100:104]
NAME = "imagenet21k/1.0.0"


@functools.cache
def jpeg(seed, side=24):
    """A small picture, unlike any of another seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(coarse.repeat(side // 4, 0).repeat(side // 4, 1)), quality=90)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def class_tar(number, files):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, image in files:
            add(archive, f"{WNIDS[number]}_{name}.JPEG", image)
    return content.getvalue()


def class_files(images=30):
    """By class: names and images. One image is in two other classes and twice in one, another is cut short."""
    files = [[(str(i), jpeg(1000 * number + i)) for i in range(images)] for number in range(4)]
    files[1].append(("9999", jpeg(0)))
    files[3] += [("9999", jpeg(0)), ("8888", jpeg(0))]
    files[2].append(("7777", jpeg(5)[:200]))
    return files


def write_whole(path, files):
    with tarfile.open(path, "w") as archive:
        for number, of_class in enumerate(files):
            add(archive, f"winter21_whole/{WNIDS[number]}.tar", class_tar(number, of_class))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An archive as that of winter 2021: 4 classes of 30 images and some copies."""
    return write_whole(tmp_path_factory.mktemp("archive") / "winter21_whole.tar", class_files())


@pytest.fixture(scope="module")
def prepared(whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared")
    run(whole, out)
    return out / NAME


def run(archive, out, *more):
    assert main(["imagenet21k", str(archive), f"--out={out}", "--num_shards=3", *more]) == 0


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def examples(folder, split="full"):
    import tensorflow_datasets as tfds

    skip = {"image": tfds.decode.SkipDecoding()}
    return list(tfds.builder_from_directory(folder).as_data_source(split, decoders=skip))


def by_name(folder):
    return {example["file_name"].decode(): example for example in examples(folder)}


# ---- ImageNet-21k.


def test_tfds_reads_the_result_and_images_are_unchanged(prepared):
    found = by_name(prepared)
    for number, files in enumerate(class_files()):
        for name, image in files:
            if name.isdigit() and int(name) < 30:
                assert found[f"{WNIDS[number]}_{name}.JPEG"]["image"] == image


def test_the_result_is_read_without_tensorflow(prepared):
    program = (
        "import sys, tensorflow_datasets as tfds;"
        f"source = tfds.builder_from_directory({str(prepared)!r}).as_data_source('full[:7]');"
        "assert source[6]['image'].shape == (24, 24, 3) and len(source) == 7; assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_copies_are_one_example_with_the_labels_of_all(prepared):
    found = by_name(prepared)
    assert sorted(found[f"{WNIDS[0]}_0.JPEG"]["labels"]) == [100, 101, 103]
    assert [f"{WNIDS[number]}_9999.JPEG" in found for number in (1, 3)] == [False, False]
    assert len(found) == 4 * 30


def test_labels_match_the_released_heads(prepared):
    import tensorflow_datasets as tfds

    names = tfds.builder_from_directory(prepared).info.features["labels"].feature.names
    assert tuple(names) == wordnet_ids("imagenet21k")


def test_single_label_is_an_example_for_each_pair_of_image_and_class(whole, tmp_path):
    run(whole, tmp_path, "--labels=single")
    found = examples(tmp_path / "imagenet21k_single/1.0.0")
    labels = [example["label"] for example in found if example["image"] == jpeg(0)]
    assert sorted(labels) == [100, 101, 103]
    assert len(found) == 4 * 30 + 2


def test_single_label_keeps_copies_of_an_image_together(whole, tmp_path):
    run(whole, tmp_path, "--labels=single")
    found = examples(tmp_path / "imagenet21k_single/1.0.0")
    places = [place for place, example in enumerate(found) if example["image"] == jpeg(0)]
    assert places == list(range(places[0], places[0] + 3))


def test_the_order_matches_tfds(prepared):
    from tensorflow_datasets.core.hashing import Hasher

    names = [example["file_name"].decode() for example in examples(prepared)]
    assert names == sorted(names, key=Hasher("full").hash_key)
    assert int.from_bytes(tfds_order("full", names[0]), "big") == Hasher("full").hash_key(names[0])


def test_the_manifest_counts(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["counts"] == {"images": 123, "broken": 1, "merged": 3, "examples": 120, "classes": 21843}
    assert manifest["max_labels"] == 3
    assert len(manifest["classes_without_images"]) == 21843 - 4
    assert manifest["splits"]["full"]["slices"] == {"test": "[:25600]"}  # there are too few for val and train


def test_a_broken_image_is_left_out_and_named(prepared):
    (broken,) = json.loads((prepared / "manifest.json").read_text())["broken"]
    assert broken["file_name"] == f"{WNIDS[2]}_7777.JPEG"
    assert "JPEG" in broken["reason"]


def test_too_many_broken_images_are_an_error(whole, tmp_path, capsys):
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}", "--max_broken=0"]) == 1
    assert "--max_broken=0" in capsys.readouterr().err


def test_broken_images_stay_without_verification(whole, tmp_path):
    run(whole, tmp_path, "--no_verify")
    assert len(examples(tmp_path / NAME)) == 121


def test_twice_gives_the_same_bytes(whole, prepared, tmp_path):
    run(whole, tmp_path, "--threads=1")
    assert contents(tmp_path / NAME) == contents(prepared)


def test_the_form_of_the_archive_does_not_change_the_shards(prepared, tmp_path):
    (tmp_path / "classes").mkdir()
    for number, files in enumerate(class_files()):
        (tmp_path / "classes" / f"{WNIDS[number]}.tar").write_bytes(class_tar(number, files))
    flat = tmp_path / "flat.tar"
    with tarfile.open(flat, "w") as archive:
        for number, files in reversed(list(enumerate(class_files()))):
            for name, image in files:
                add(archive, f"all/{WNIDS[number]}/{WNIDS[number]}_{name}.JPEG", image)
    run(tmp_path / "classes", tmp_path / "a")
    run(flat, tmp_path / "b")
    for out in ("a", "b"):
        found = contents(tmp_path / out / NAME)
        assert {name: found[name] for name in found if name != "manifest.json"} == {
            name: content for name, content in contents(prepared).items() if name != "manifest.json"
        }


def test_classes_of_the_archive_are_numbered_from_zero(whole, tmp_path):
    run(whole, tmp_path, "--classes=archive")
    assert {label for example in examples(tmp_path / NAME) for label in example["labels"]} == {0, 1, 2, 3}


def test_a_class_that_the_list_lacks_is_an_error(whole, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("\n".join(WNIDS[:2]))
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}", f"--classes={tmp_path / 'classes.txt'}"]) == 1
    assert f"class {WNIDS[2]}" in capsys.readouterr().err


def test_fall11_lacks_two_classes_of_the_released_heads():
    assert len(list_classes("fall11")) == 21841
    positions = class_map(list_classes("fall11"), list_classes("released"))
    assert sorted(set(range(21843)) - set(positions)) == [
        wordnet_ids("imagenet21k").index(name) for name in ONLY_RELEASED
    ]
    assert class_map(ONLY_RELEASED, list_classes("fall11")) == [-1, -1]


# ---- Interruptions.


def has_mark(folder):
    """Whether a part of the scan is in the index."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{folder / 'index.sqlite'}?mode=ro", uri=True)) as index:
            return index.execute("SELECT * FROM fact WHERE name = 'mark'").fetchone() is not None
    except sqlite3.OperationalError:  # not there yet, or being written
        return False


def test_killed_again_and_again_it_gives_the_same_bytes(tmp_path):
    archive = write_whole(tmp_path / "whole.tar", class_files(500))
    run(archive, tmp_path / "whole", "--num_shards=9", "--classes=archive")
    more = [archive, f"--out={tmp_path / 'killed'}", "--num_shards=9", "--classes=archive"]
    folder = tmp_path / "killed" / "imagenet21k" / "1.0.0.incomplete"
    for reached in (lambda: has_mark(folder), lambda: list(folder.glob("*-00001-of-00009"))):
        process = subprocess.Popen(
            [sys.executable, "-m", "vit_jax.data.prepare", "imagenet21k", *more], cwd=ROOT, stderr=subprocess.PIPE
        )
        while process.poll() is None and not reached():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed" / NAME).exists()
    assert main(["imagenet21k", *map(str, more)]) == 0
    assert contents(tmp_path / "killed" / NAME) == contents(tmp_path / "whole" / NAME)


def test_finished_shards_are_not_written_again(whole, prepared, tmp_path, monkeypatch):
    written = []
    write_shard = tfds_layout.write_shard

    def fail_at_the_third(path, made):
        written.append(path.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write_shard(path, made)

    monkeypatch.setattr(tfds_layout, "write_shard", fail_at_the_third)
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}", "--num_shards=3"]) == 130
    run(whole, tmp_path)
    assert [name[-14:] for name in written] == [f"{number:05d}-of-00003" for number in (0, 1, 2, 2)]
    assert contents(tmp_path / NAME) == contents(prepared)


def test_an_interruption_says_that_the_same_command_resumes(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tfds_layout, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}"]) == 130
    assert "rerun the same command to resume" in capsys.readouterr().err


def test_a_shard_cut_short_is_written_again(whole, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_layout, "describe", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}", "--num_shards=3"]) == 130
    monkeypatch.undo()
    shard = next((tmp_path / "imagenet21k/1.0.0.incomplete").glob("*-00001-of-*"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    run(whole, tmp_path)
    assert contents(tmp_path / NAME) == contents(prepared)


def test_a_kill_before_the_last_rename_is_repaired(whole, prepared, tmp_path):
    folder = tmp_path / "imagenet21k" / "1.0.0.incomplete"
    shutil.copytree(prepared, folder)
    (folder / "index.sqlite").write_bytes(b"")
    run(whole, tmp_path)
    assert contents(tmp_path / NAME) == contents(prepared)


def test_other_settings_after_a_kill_before_the_last_rename_are_refused(whole, prepared, tmp_path, capsys):
    shutil.copytree(prepared, tmp_path / "imagenet21k" / "1.0.0.incomplete")
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}", "--classes=archive", "--num_shards=3"]) == 1
    assert "classes was" in capsys.readouterr().err
    assert not (tmp_path / NAME).exists()


def test_a_finished_data_set_is_left_alone(whole, prepared, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    run(whole, prepared.parent.parent)
    assert {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()} == before
    assert "already exists" in capsys.readouterr().err


def test_other_archives_than_a_data_set_was_made_of_are_refused_in_few_words(prepared, tmp_path, capsys):
    for number in range(4):
        (tmp_path / f"{WNIDS[number]}.tar").write_bytes(class_tar(number, [("1", jpeg(1))]))
    assert main(["imagenet21k", str(tmp_path), f"--out={prepared.parent.parent}", "--num_shards=3"]) == 1
    error = capsys.readouterr().err
    assert "made with other files (the source files are not the same" in error and WNIDS[0] not in error


def test_other_settings_do_not_mix_with_a_finished_data_set(whole, prepared, capsys):
    assert main(["imagenet21k", str(whole), f"--out={prepared.parent.parent}", "--num_shards=2"]) == 1
    assert "num_shards was 3, is 2" in capsys.readouterr().err


def test_other_settings_do_not_mix_with_a_begun_data_set(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tfds_layout, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}"]) == 130
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}", "--classes=archive"]) == 1
    assert "begun with other settings (classes was" in capsys.readouterr().err


def test_an_archive_that_has_changed_is_noticed(tmp_path, monkeypatch, capsys):
    archive = write_whole(tmp_path / "whole.tar", class_files(3))
    monkeypatch.setattr(tfds_layout, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["imagenet21k", str(archive), f"--out={tmp_path}"]) == 130
    os.utime(archive, (1, 1))
    assert main(["imagenet21k", str(archive), f"--out={tmp_path}"]) == 1
    assert "the source files are not the same" in capsys.readouterr().err


def test_an_image_that_changes_after_the_scan_is_noticed(tmp_path, monkeypatch, capsys):
    archive = write_whole(tmp_path / "whole.tar", class_files(3))
    with monkeypatch.context() as interrupted:
        interrupted.setattr(tfds_layout, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["imagenet21k", str(archive), f"--out={tmp_path}"]) == 130
    content, times = archive.read_bytes(), archive.stat()
    archive.write_bytes(content.replace(jpeg(1), bytes(len(jpeg(1)))))
    os.utime(archive, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(["imagenet21k", str(archive), f"--out={tmp_path}"]) == 1
    assert "has changed since it was scanned" in capsys.readouterr().err


def test_a_damaged_index_is_one_message(whole, tmp_path, capsys):
    folder = tmp_path / "imagenet21k" / "1.0.0.incomplete"
    folder.mkdir(parents=True)
    (folder / "index.sqlite").write_bytes(b"no index" * 1000)
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}"]) == 1
    assert "Remove the .incomplete folder" in capsys.readouterr().err


def test_two_processes_do_not_prepare_into_the_same_folder(whole, tmp_path, capsys):
    folder = tmp_path / "imagenet21k" / "1.0.0.incomplete"
    folder.mkdir(parents=True)
    with work.working_in(folder):
        assert main(["imagenet21k", str(whole), f"--out={tmp_path}"]) == 1
    assert "another process" in capsys.readouterr().err


# ---- Full disks.


def test_a_full_disk_is_reported_and_repaired(tmp_path):
    """A limit on the size of files stands for the full disk: the system refuses to write in the same way."""
    archive = tmp_path / "whole.tar"
    with tarfile.open(archive, "w") as tar:
        for number in range(100):
            add(tar, f"{WNIDS[0]}/{number}.JPEG", jpeg(number, side=240))
    limited = """if True:
        import resource, sys
        from vit_jax.data.prepare.__main__ import main
        limit = 256_000  # above the index, below the shard
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.exit(main(sys.argv[1:]))
    """
    process = subprocess.run(
        [sys.executable, "-c", limited, "imagenet21k", archive, f"--out={tmp_path}", "--classes=archive"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert "disk is full" in process.stderr and "Traceback" not in process.stderr
    assert not (tmp_path / NAME).exists()
    assert main(["imagenet21k", str(archive), f"--out={tmp_path}", "--classes=archive"]) == 0
    assert len(examples(tmp_path / NAME)) == 100


def test_preparation_that_cannot_fit_does_not_start(whole, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}"]) == 1
    assert "10.0 kB free" in capsys.readouterr().err


# ---- Archives that are not as they should be.


@pytest.mark.parametrize(
    "name", ["../evil.JPEG", "/etc/evil.JPEG", "a/../../evil.JPEG", "C:/evil.JPEG", "..\\evil.JPEG"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_paths_out_of_the_folder_are_refused(tmp_path, capsys, name, nested):
    archive = tmp_path / f"{WNIDS[0]}.tar"
    inner = io.BytesIO()
    with tarfile.open(archive if not nested else None, "w", fileobj=inner if nested else None) as tar:
        add(tar, name, jpeg(1))
    if nested:
        with tarfile.open(archive, "w") as tar:
            add(tar, f"{WNIDS[0]}.tar", inner.getvalue())
    assert main(["imagenet21k", str(archive), f"--out={tmp_path / 'out'}"]) == 1
    assert "would leave the folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, capsys, kind):
    archive = tmp_path / f"{WNIDS[0]}.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("link.JPEG")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    assert main(["imagenet21k", str(archive), f"--out={tmp_path / 'out'}"]) == 1
    assert "only files are read" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_a_truncated_archive_is_an_error(whole, tmp_path, capsys, keep):
    content = whole.read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: int(keep * len(content)) // 512 * 512 + 100])
    assert main(["imagenet21k", str(tmp_path / "cut.tar"), f"--out={tmp_path / 'out'}"]) == 1
    assert "truncated or damaged" in capsys.readouterr().err


def test_an_archive_cut_between_two_members_is_an_error(tmp_path, capsys):
    """tarfile by itself mistakes the last complete member for the end."""
    archive = write_whole(tmp_path / "whole.tar", class_files(3))
    with tarfile.open(archive) as tar:
        cut = tar.getmembers()[2].offset
    archive.write_bytes(archive.read_bytes()[:cut])
    assert main(["imagenet21k", str(archive), f"--out={tmp_path / 'out'}"]) == 1
    assert "no end mark" in capsys.readouterr().err


def test_a_damaged_header_is_not_mistaken_for_the_end(tmp_path, capsys):
    archive = write_whole(tmp_path / "whole.tar", class_files(3))
    with tarfile.open(archive) as tar:
        place = tar.getmembers()[2].offset
    content = bytearray(archive.read_bytes())
    content[place : place + 100] = b"\xff" * 100
    archive.write_bytes(content)
    assert main(["imagenet21k", str(archive), f"--out={tmp_path / 'out'}"]) == 1
    assert "truncated or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("nested", [False, True])
def test_compressed_archives_are_refused_with_the_command_that_helps(tmp_path, capsys, nested):
    import gzip

    compressed = gzip.compress(class_tar(0, [("1", jpeg(1))]))
    archive = tmp_path / "winter21_whole.tar.gz"
    archive.write_bytes(compressed)
    if nested:
        with tarfile.open(archive, "w") as tar:
            add(tar, f"{WNIDS[0]}.tar", compressed)
    assert main(["imagenet21k", str(archive), f"--out={tmp_path / 'out'}"]) == 1
    assert "gunzip" in capsys.readouterr().err


def test_a_text_beside_the_classes_is_left_out_and_named(tmp_path):
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        add(tar, "README.txt", b"Please cite")
        add(tar, f"{WNIDS[0]}.tar", class_tar(0, [("1", jpeg(1))]))
    run(tmp_path / "whole.tar", tmp_path)
    (broken,) = tfds_layout.read_manifest(tmp_path / NAME)["broken"]
    assert (broken["file_name"], broken["reason"]) == ("README.txt", "neither an image nor in a class")
    assert len(examples(tmp_path / NAME)) == 1


def test_classes_in_an_archive_in_an_archive_are_found(prepared, tmp_path):
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        add(tar, "2021/whole.tar", write_whole(tmp_path / "whole.tar", class_files()).read_bytes())
    run(tmp_path / "outer.tar", tmp_path)
    shards = [name for name in contents(prepared) if "array_record" in name]
    assert shards and all(contents(tmp_path / NAME)[name] == contents(prepared)[name] for name in shards)


def test_an_image_of_no_class_is_an_error(tmp_path, capsys):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        add(tar, "holiday.jpg", jpeg(1))
    assert main(["imagenet21k", str(tmp_path / "photos.tar"), f"--out={tmp_path / 'out'}"]) == 1
    assert "no class for" in capsys.readouterr().err


def test_a_scan_resumes_from_any_mark(whole):
    everything = list(archives.scan([whole]))
    for place, mark in enumerate(everything):
        if isinstance(mark, archives.Mark):
            assert list(archives.scan([whole], mark)) == everything[place + 1 :]


# ---- Work.


def test_only_a_few_items_are_read_ahead():
    taken = []
    results = work.ordered_map(lambda item: item, (taken.append(i) or i for i in range(1000)), 2)
    for expected in range(500):
        assert next(results) == expected
        assert len(taken) <= expected + 6
    results.close()


def test_results_keep_their_order_though_threads_do_not():
    def slow_first(item):
        time.sleep(0.02 * (item % 4 == 0))
        return item

    assert list(work.ordered_map(slow_first, range(40), 4)) == list(range(40))


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(work.ordered_map(lambda item: 1 // item, [1, 0, 1], 2))


# ---- check.


def test_check_accepts_an_unchanged_data_set(prepared, capsys):
    assert main(["check", str(prepared)]) == 0
    assert "all 6 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, not"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "has changed"),
        (lambda path: (path.parent / "more").touch(), "more is not in the manifest"),
    ],
    ids=["missing", "shorter", "changed", "too many"],
)
def test_check_finds_damage(prepared, tmp_path, capsys, damage, words):
    folder = shutil.copytree(prepared, tmp_path / "copy")
    damage(next(folder.glob("*-00001-of-*")))
    assert main(["check", str(folder)]) == 1
    assert words in capsys.readouterr().out


def test_check_needs_a_manifest(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Big Birds", "9lives", "a/b"])
def test_names_that_tfds_cannot_find_are_refused(whole, tmp_path, capsys, name):
    assert main(["imagenet21k", str(whole), f"--out={tmp_path}", f"--name={name}"]) == 1
    assert "invalid data set name" in capsys.readouterr().err
