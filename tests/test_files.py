import errno
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import types

import pytest

from vit_jax import files
from vit_jax.errors import UserError


def test_path_is_a_folder_or_a_bucket(monkeypatch):
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("EPATH_USE_TF", "")
    assert files.parse_path("runs/a") == pathlib.Path("runs/a")
    assert files.parse_path("~/a") == pathlib.Path.home() / "a"
    path = files.parse_path("gs://bucket/runs/a/")
    assert str(path / "config.json") == "gs://bucket/runs/a/config.json"
    assert files.is_remote(path)
    assert not files.is_remote(pathlib.Path("runs/a"))


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://", "http://host/run"])
def test_other_stores_are_refused(path):
    with pytest.raises(UserError, match=f"cannot use '{path}'.*gs://bucket/folder"):
        files.parse_path(path)


def test_bucket_without_gcsfs_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"pip install --editable '\.\[gcs\]'"):
        files.parse_path("gs://bucket/run")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"VIT_JAX_CACHE": "/fast", "XDG_CACHE_HOME": "/xdg"}, "/fast/indices"),
        ({"VIT_JAX_CACHE": "~/fast"}, "~/fast/indices"),
        ({"VIT_JAX_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/vit_jax/indices"),
        ({}, "~/.cache/vit_jax/indices"),
    ],
)
def test_environment_sets_the_cache_folder(monkeypatch, variables, folder):
    for name in ("VIT_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert files.cache_folder("indices") == pathlib.Path(folder).expanduser()


def test_atomic_write_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write_atomically(path, "old")

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*file\.json: No space left on device"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]


def test_text_is_written_in_utf8_with_bytes_of_names_escaped(tmp_path):
    files.write_atomically(tmp_path / "new" / "summary.md", "Löwe " + os.fsdecode(b"p\xe9ts"))
    assert (tmp_path / "new" / "summary.md").read_bytes() == "Löwe p\\xe9ts".encode()


def test_a_block_that_fails_replaces_nothing(tmp_path):
    path = tmp_path / "a.npz"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/a: (Not a directory|File exists)"):
        files.write_atomically(tmp_path / "file" / "a", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: Is a directory"):
        files.write_atomically(tmp_path / "folder", "")


def test_temporary_files_that_a_kill_left_are_deleted_and_others_kept(tmp_path):
    others = [".a[1].json.young.tmp", ".b.json.0123abcd.tmp", "notes.tmp"]
    for name in (".a[1].json.0123abcd.tmp", *others):
        (tmp_path / name).touch()
        if "young" not in name:
            os.utime(tmp_path / name, (0, 0))
    files.write_atomically(tmp_path / "a[1].json", "")
    assert {path.name for path in tmp_path.iterdir()} == {*others, "a[1].json"}


def test_a_lock_keeps_others_out_until_it_is_released_or_its_process_ends(tmp_path):
    path = tmp_path / ".lock"
    with files.lock(path, "busy"), pytest.raises(UserError, match="busy"), files.lock(path, "busy"):
        pass
    code = f"import os, pathlib, vit_jax.files as f; f.lock(pathlib.Path({str(path)!r}), '').__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with files.lock(path, "busy"):
        pass


def test_a_lock_can_be_waited_for_in_the_same_process_too(tmp_path):
    waiting, order = threading.Event(), []

    def wait():
        with files.lock(tmp_path / "lock", "busy", on_wait=waiting.set):
            order.append("second")

    thread = threading.Thread(target=wait)
    with files.lock(tmp_path / "lock", "busy"):
        thread.start()
        assert waiting.wait(60)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    import fcntl

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.lock(tmp_path / "lock", "busy"):
        assert "cannot be locked" in caplog.text


def test_space_is_checked_where_the_folder_will_be(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000 if path == tmp_path else 0))
    files.check_space(tmp_path / "a" / "b", 1000, "")
    with pytest.raises(UserError, match=r"b has 1\.0 kB free, but 1\.5 kB are needed\. Make room\."):
        files.check_space(tmp_path / "a" / "b", 1500, "Make room.")


def test_a_full_disk_is_one_message_for_our_files_and_for_libraries(tmp_path):
    """array_record says so in words of its own, on a disk that is really full."""
    from array_record.python import array_record_module

    with pytest.raises(UserError, match="disk is full"), files.full_disk_explained(tmp_path):
        pathlib.Path("/dev/full").write_bytes(bytes(100_000))
    with pytest.raises(UserError, match=r"disk is full.*No space left"), files.full_disk_explained(tmp_path):
        writer = array_record_module.ArrayRecordWriter("/dev/full", "group_size:1,uncompressed")
        for _ in range(100):
            writer.write(bytes(100_000))
        writer.close()
    with pytest.raises(KeyError), files.full_disk_explained(tmp_path):
        raise KeyError("another error")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, words in ((tmp_path, "a folder"), (tmp_path / "fifo", "a FIFO"), ("/dev/zero", "a device")):
        with pytest.raises(OSError, match=f"it is {words}, not a regular file"):
            files.read_regular(path, 100)
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert files.read_text_lines(tmp_path / "file") == ["a", "b"]
    assert files.read_regular(tmp_path / "file", 1, start=3) == b"\xef\xbb\xbf"
    with pytest.raises(OSError, match="it has 7 bytes, and at most 6 are read"):
        files.read_regular(tmp_path / "file", 6)


def test_a_file_that_becomes_a_fifo_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(files, "stat_regular", lambda _: None)  # what it was a moment ago
    with pytest.raises(OSError, match="it is a FIFO"):
        files.open_regular(tmp_path / "fifo")


def test_importing_it_imports_neither_jax_nor_libraries():
    code = "import sys, vit_jax.files, vit_jax.console; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"\b(jax|numpy|etils|rich|filelock|sqlite3)\b", loaded)
