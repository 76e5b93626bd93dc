import os
import pathlib
import re

import pytest

from vit_jax.errors import UserError
from vit_jax.weights.download import cached_path, fetch


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    return tmp_path / "weights"


# --- Local places ---


def test_a_local_file_and_a_folder_are_returned_as_they_are(tmp_path, monkeypatch):
    file = tmp_path / "a b+c.npz"
    file.write_bytes(b"x")
    for place in (str(file), file, file.as_uri()):
        assert fetch(place) == file
    assert fetch(str(tmp_path)) == fetch(f"file://localhost{tmp_path}") == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("~/a b+c.npz") == file


def test_a_missing_local_file_is_an_error_with_the_nearest_name(tmp_path):
    (tmp_path / "ViT-B_16.npz").write_bytes(b"x")
    (tmp_path / "other").write_bytes(b"x")
    for place in (f"{tmp_path}/ViT-B_61.npz", f"file://{tmp_path}/ViT-B_61.npz"):
        with pytest.raises(UserError, match=r"there is no .*ViT-B_61.npz.*Did you mean '.*/ViT-B_16.npz'\?.*gs://"):
            fetch(place)


def test_a_missing_local_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere cannot be read or does not exist"):
        fetch(str(tmp_path / "nowhere" / "w.npz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is empty"):
        fetch(str(tmp_path / "empty" / "w.npz"))
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UserError, match="there is no"):
        fetch(str(tmp_path / "file" / "w.npz"))


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "is not a path"),
        ("a\0b", "is not a path"),
        ("file://elsewhere/w.npz", "names the machine 'elsewhere'"),
        ("file:///a%00b", "cannot read"),
        ("s3://bucket/w.npz", "s3:// is not supported.*gs://"),
        ("gs://", "does not name a bucket"),
        ("gs://Bucket!/w.npz", "does not name a bucket"),
        ("gs://bucket", "does not name a file"),
        ("gs://bucket/folder/", "does not name a file"),
        ("http:///w.npz", "does not name a host"),
        ("https://host", "does not name a file"),
        ("https://user:secret@host/w.npz", "names a user"),
        ("https://host:port/w.npz", "is not an address"),
        ("https://[::1/w.npz", "is not an address"),
        ("https://../w.npz", "does not name a host"),
    ],
)
def test_an_impossible_place_is_refused_with_what_to_type(place, message):
    with pytest.raises(UserError, match=message):
        fetch(place, retry_seconds=())


# --- Names in the cache ---


def test_names_are_host_and_path(cache):
    name = "gs://vit_models/imagenet21k+imagenet2012/R50+ViT-B_16.npz"
    expected = cache / "storage.googleapis.com/vit_models/imagenet21k+imagenet2012/R50+ViT-B_16.npz"
    assert cached_path(name) == expected
    assert cached_path(name.replace("gs://", "https://storage.googleapis.com/")) == expected
    assert cached_path("http://Host:8080/a/b.npz#part") == cache / "host%3A8080/a/b.npz"


def test_files_in_the_cache_of_older_versions_are_found(cache):
    older = cache.parent / "storage.googleapis.com" / "bucket" / "w.npz"
    older.parent.mkdir(parents=True)
    older.write_bytes(b"x")
    assert fetch("gs://bucket/w.npz") == older
    assert cached_path("gs://bucket/other.npz").is_relative_to(cache)


def test_no_name_can_escape_the_cache(cache):
    paths = ["..", "../..", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc", "..%2f..", "a/../../../b", "/etc/passwd", "//etc/passwd",
             "%2Fetc%2Fpasswd", ".", "a/./b", "a//b", "~/x", "~root/x", "..\\..\\x", "a%00b", "%", "%zz", "é", "a\nb",
             "con:x", "%252e%252e", "...", "x" * 5000 + ".npz", "é" * 300 + ".npz", "a.lock"]  # fmt: skip
    names = {}
    for path in paths:
        for place in (f"http://host/{path}/w.npz", f"http://host/x/{path}?q={path}", f"gs://bucket/{path}"):
            found = cached_path(place)
            relative = found.relative_to(cache)
            assert not {"..", "."} & set(relative.parts), place
            assert os.path.normpath(found) == str(found)
            assert all(1 <= len(part.encode()) <= 220 and part.isprintable() for part in relative.parts)
            assert relative.parts[0] in ("host", "storage.googleapis.com")
            names.setdefault(relative, []).append(place)
    same = [places for places in names.values() if len(places) > 1]
    # Two spellings of one path may share a name; two files may not.
    assert all(len({re.sub("%2e", ".", place) for place in places}) == 1 for places in same), same


def test_another_query_is_another_file_and_its_text_stays_out_of_the_name():
    one, two, none = (cached_path(f"http://host/w.npz{query}") for query in ("?token=secret", "?v=2", ""))
    assert len({one, two, none}) == 3
    assert "secret" not in str(one)
    assert one.suffix == two.suffix == ".npz"


def test_no_file_has_the_name_of_the_lock_of_another():
    lock = f"{cached_path('http://host/w.npz')}.lock"
    assert cached_path("http://host/w.npz.lock") != pathlib.Path(lock)
