import contextlib
import email.utils
import errno
import hashlib
import http.server
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from base64 import b64encode

import pytest

from tests.conftest import ROOT
from vit_jax.errors import UserError
from vit_jax.weights import download
from vit_jax.weights.download import cached_path, fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
RETRIES = (0, 0, 0)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` at every path, as well or as badly as `server` is told to."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def trickle(self):
        """Sends headers a byte at a time, without an end."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            for _ in range(60):
                self.wfile.write(b"x")
                time.sleep(self.server.header_seconds)

    def do_GET(self):
        server = self.server
        request = types.SimpleNamespace(
            path=self.path, range=self.headers.get("Range"), if_range=self.headers.get("If-Range"), sent=0
        )
        server.requests.append(request)
        if server.statuses and (status := server.statuses.pop(0)):
            return self.send_error(status)
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content, start = server.content, 0
        match = re.fullmatch(r"bytes=(\d+)-", request.range or "")
        validators = (server.etag, server.last_modified)
        if match and server.ranges and (server.heeds_if_range is False or request.if_range in validators):
            start = int(match[1])
            if start >= len(content):
                return self.send_error(416)
        if server.header_seconds:
            return self.trickle()
        self.send_response(206 if start else 200)
        if start:
            first = start + server.range_shift
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if server.etag and not (start and server.parts_without_validator):
            self.send_header("ETag", server.etag)
        if server.last_modified and not (start and server.parts_without_validator):
            self.send_header("Last-Modified", server.last_modified)
        for name, value in server.headers.items():
            self.send_header(name, value)
        body = content[start:]
        if server.length == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        elif server.length == "told":
            self.send_header("Content-Length", str(len(body) + server.length_lie))
        self.end_headers()
        limit = server.drop_after.pop(0) if server.drop_after else len(body)
        with contextlib.suppress(OSError):  # the client may be dead
            self.send_body(body[:limit], request)
            if server.length == "chunked" and limit >= len(body):
                self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True
        return None

    def send_body(self, body, request):
        for position in range(0, len(body), self.server.piece):
            if self.server.pause_after is not None and position >= self.server.pause_after:
                assert self.server.go_on.wait(120)
            piece = body[position : position + self.server.piece]
            if self.server.length == "chunked":
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            else:
                self.wfile.write(piece)
            request.sent += len(piece)


@pytest.fixture
def server(monkeypatch):
    for name in list(os.environ):  # a proxy would not find this machine's loopback
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.etag, server.headers, server.requests = CONTENT, '"one"', {}, []
    server.last_modified = email.utils.formatdate(1e9, usegmt=True)
    server.statuses, server.drop_after, server.ranges, server.heeds_if_range = [], [], True, True
    server.length, server.length_lie, server.range_shift = "told", 0, 0
    server.redirect, server.parts_without_validator, server.header_seconds = None, False, 0
    server.piece, server.pause_after, server.go_on = 1 << 16, None, threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.url = f"{server.address}/models/weights.npz"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def get(tmp_path):
    """Fetches without waiting between attempts, into a cache of the test's own."""

    def get(place, **options):
        return fetch(place, **{"cache": tmp_path / "cache", "retry_seconds": RETRIES, "progress": False, **options})

    get.cache = tmp_path / "cache"
    return get


def fails(get, server, *expected, **options):
    """Fetches in vain; nothing may lie under the final name. Returns the message."""
    with pytest.raises(UserError) as caught:
        get(server.url, **options)
    assert not cached_path(server.url, get.cache).exists()
    for text in expected:
        assert re.search(text, str(caught.value)), f"{text!r} is not in: {caught.value}"
    return str(caught.value)


def partial(get, server):
    return pathlib.Path(f"{cached_path(server.url, get.cache)}.partial")


def start_fetch(url, cache):
    """A process of its own that fetches."""
    code = "import sys, pathlib; from vit_jax.weights.download import fetch; "
    code += "print(fetch(sys.argv[1], cache=pathlib.Path(sys.argv[2])))"
    return subprocess.Popen(
        [sys.executable, "-c", code, url, str(cache)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.01)


# Local places


def test_a_local_file_and_a_folder_are_returned_as_they_are(tmp_path):
    file = tmp_path / "a b+c.npz"
    file.write_bytes(b"x")
    assert fetch(str(file)) == file
    assert fetch(file) == file
    assert fetch(str(tmp_path)) == tmp_path
    assert fetch(file.as_uri()) == file
    assert fetch(f"file://localhost{tmp_path}") == tmp_path


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.npz").write_bytes(b"x")
    assert fetch("~/w.npz") == tmp_path / "w.npz"


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


def test_the_digest_of_a_local_file_is_checked(tmp_path):
    file = tmp_path / "w.npz"
    file.write_bytes(CONTENT)
    assert fetch(str(file), sha256=SHA256.upper()) == file
    with pytest.raises(UserError, match=f"{SHA256}(.|\n)*{'0' * 64}"):
        fetch(str(file), sha256="0" * 64)
    with pytest.raises(UserError, match="a folder has no SHA-256"):
        fetch(str(tmp_path), sha256=SHA256)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        fetch(str(file), sha256="abc")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "is no path"),
        ("a\0b", "is no path"),
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
        ("https://host:port/w.npz", "is no address"),
        ("https://[::1/w.npz", "is no address"),
        ("https://../w.npz", "does not name a host"),
    ],
)
def test_a_place_that_cannot_be_is_refused_with_what_to_type(place, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fetch(place, cache=tmp_path, retry_seconds=(), progress=False)


# Names in the cache


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("VIT_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert download.cache_folder() == pathlib.Path("/home/me/.cache/vit_jax/weights")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert download.cache_folder() == pathlib.Path("/xdg/vit_jax/weights")
    monkeypatch.setenv("VIT_JAX_CACHE", "~/weights")
    assert download.cache_folder() == pathlib.Path("/home/me/weights")
    assert cached_path("gs://b/k") == pathlib.Path("/home/me/weights/storage.googleapis.com/b/k")


def test_names_are_host_and_path(tmp_path):
    name = "gs://vit_models/imagenet21k+imagenet2012/R50+ViT-B_16.npz"
    expected = tmp_path / "storage.googleapis.com/vit_models/imagenet21k+imagenet2012/R50+ViT-B_16.npz"
    assert cached_path(name, tmp_path) == expected
    assert cached_path(name.replace("gs://", "https://storage.googleapis.com/"), tmp_path) == expected
    assert cached_path("http://Host:8080/a/b.npz#part", tmp_path) == tmp_path / "host%3A8080/a/b.npz"


def test_no_name_can_escape_the_cache(tmp_path):
    paths = ["..", "../..", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc", "..%2f..", "a/../../../b", "/etc/passwd", "//etc/passwd",
             "%2Fetc%2Fpasswd", ".", "a/./b", "a//b", "~/x", "~root/x", "..\\..\\x", "a%00b", "%", "%zz", "é", "a\nb",
             "con:x", "%252e%252e", "...", "x" * 5000 + ".npz", "é" * 300 + ".npz", "a.partial", "a.lock"]  # fmt: skip
    names = {}
    for path in paths:
        for place in (f"http://host/{path}/w.npz", f"http://host/x/{path}?q={path}", f"gs://bucket/{path}"):
            found = cached_path(place, tmp_path)
            relative = found.relative_to(tmp_path)
            assert not {"..", "."} & set(relative.parts), place
            assert os.path.normpath(found) == str(found)
            assert all(1 <= len(part.encode()) <= 220 and part.isprintable() for part in relative.parts)
            assert relative.parts[0] in ("host", "storage.googleapis.com")
            names.setdefault(relative, []).append(place)
    same = [places for places in names.values() if len(places) > 1]
    # Two spellings of one path may share a name; two files may not.
    assert all(len({re.sub("%2e", ".", place) for place in places}) == 1 for places in same), same


def test_another_query_is_another_file_and_its_text_stays_out_of_the_name(tmp_path):
    one, two, none = (cached_path(f"http://host/w.npz{query}", tmp_path) for query in ("?token=secret", "?v=2", ""))
    assert len({one, two, none}) == 3
    assert "secret" not in str(one)
    assert one.suffix == two.suffix == ".npz"


def test_no_name_is_that_of_what_lies_beside_a_download(tmp_path):
    for suffix in (".partial", ".partial.json", ".lock", ".unverified"):
        beside = f"{cached_path('http://host/w.npz', tmp_path)}{suffix}"
        assert str(cached_path(f"http://host/w.npz{suffix}", tmp_path)) != beside


# Downloads


def test_a_download_lies_in_the_cache_and_is_not_asked_for_again(server, get):
    path = get(server.url)
    assert path == cached_path(server.url, get.cache)
    assert path.read_bytes() == CONTENT
    assert get(server.url) == path
    assert get(server.url, sha256=SHA256) == path
    assert len(server.requests) == 1
    assert {each.name for each in path.parent.iterdir()} == {"weights.npz", "weights.npz.lock"}


def test_gs_addresses_are_asked_for_at_the_endpoint(server, get, monkeypatch):
    monkeypatch.setenv("VIT_JAX_GCS_ENDPOINT", f"{server.address}/mirror/")
    path = get("gs://vit_models/a+b/odd name?#.npz")
    assert path.read_bytes() == CONTENT
    assert server.requests[0].path == "/mirror/vit_models/a+b/odd%20name%3F%23.npz"
    assert path == get.cache / "storage.googleapis.com/vit_models/a+b/odd%20name%3F%23.npz"
    monkeypatch.setenv("VIT_JAX_GCS_ENDPOINT", "localhost:80")
    with pytest.raises(UserError, match=r"VIT_JAX_GCS_ENDPOINT is 'localhost:80'.*http"):
        get("gs://vit_models/a+b/other.npz")


def test_a_read_only_cache_that_has_the_file_is_enough(server, get):
    path = cached_path(server.url, get.cache)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert get(server.url, sha256=SHA256) == path
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # no lock was taken
    assert not server.requests


def test_a_dropped_connection_is_resumed_where_it_broke(server, get):
    server.drop_after = [300_000, 200_000]
    assert get(server.url).read_bytes() == CONTENT
    first, second, third = server.requests
    assert (first.range, second.range, third.range) == (None, "bytes=300000-", "bytes=500000-")
    assert second.if_range == '"one"'
    assert sum(request.sent for request in server.requests) == len(CONTENT)


def test_attempts_that_bring_something_are_not_counted(server, get):
    server.drop_after = [50_000] * 10
    assert get(server.url, retry_seconds=(0,)).read_bytes() == CONTENT
    assert len(server.requests) == 11


def test_waits_grow_as_given(server, get, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.statuses = [503, 500, 429]
    assert get(server.url, retry_seconds=(1, 3, 9)).read_bytes() == CONTENT
    assert waits == [1, 3, 9]


def test_what_came_of_a_failed_download_is_kept_for_the_next_call(server, get):
    server.drop_after = [400_000, 0, 0]
    message = fails(get, server, "the connection ended after 400,000 of 1,048,576 bytes", retry_seconds=(0,))
    assert "400,000 bytes that came are kept" in message
    assert partial(get, server).stat().st_size == 400_000
    assert get(server.url).read_bytes() == CONTENT
    assert server.requests[-1].range == "bytes=400000-"
    assert server.requests[-1].sent == len(CONTENT) - 400_000


def test_without_an_etag_the_date_tells_whether_the_file_is_the_same(server, get):
    server.etag, server.drop_after = None, [300_000]
    assert get(server.url).read_bytes() == CONTENT
    assert server.requests[1].if_range == server.last_modified
    assert server.requests[1].sent == len(CONTENT) - 300_000


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_anything_that_tells_it_is_the_same_it_starts_over(server, get, etag):
    server.etag, server.last_modified, server.drop_after = etag, None, [300_000]
    assert get(server.url).read_bytes() == CONTENT
    assert server.requests[1].range is None


def test_it_starts_over_when_the_server_does_not_honour_ranges(server, get):
    server.ranges, server.drop_after = False, [300_000]
    assert get(server.url).read_bytes() == CONTENT
    assert server.requests[1].range == "bytes=300000-"
    assert server.requests[1].sent == len(CONTENT)


def test_a_server_that_never_gets_further_is_given_up(server, get):
    server.ranges, server.drop_after = False, [300_000] * 99
    fails(get, server, "after 300,000 of", retry_seconds=(0, 0))
    assert len(server.requests) == 3  # one that brought something and two that brought no more than it


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_it_starts_over_when_the_file_changed(server, get, heeds_if_range):
    server.heeds_if_range = heeds_if_range
    server.drop_after = [300_000]
    fails(get, server, "after 300,000 of", retry_seconds=())
    server.content, server.etag = CONTENT[::-1] + b"more", '"two"'
    assert get(server.url).read_bytes() == server.content


def test_it_starts_over_when_the_file_became_shorter(server, get):
    server.drop_after = [300_000]
    fails(get, server, "after 300,000 of", retry_seconds=())
    server.content, server.heeds_if_range = b"short", False
    assert get(server.url).read_bytes() == b"short"


def test_it_starts_over_when_the_range_is_not_the_one_asked_for(server, get):
    server.drop_after, server.range_shift = [300_000], 5
    assert get(server.url).read_bytes() == CONTENT
    assert server.requests[2].range is None


@pytest.mark.parametrize("notes", ["", "{", "[]", '{"etag": "one"}', None])
def test_it_starts_over_when_the_notes_beside_the_partial_file_are_unusable(server, get, notes):
    partial(get, server).parent.mkdir(parents=True)
    partial(get, server).write_bytes(b"of something else")
    if notes is not None:
        pathlib.Path(f"{partial(get, server)}.json").write_text(notes)
    assert get(server.url).read_bytes() == CONTENT


def test_a_download_stopped_after_its_last_byte_is_not_asked_for_again(server, get):
    partial(get, server).parent.mkdir(parents=True)
    partial(get, server).write_bytes(CONTENT)
    notes = {"size": len(CONTENT), "etag": '"one"', "last_modified": None, "md5": hashlib.md5(CONTENT).hexdigest()}
    pathlib.Path(f"{partial(get, server)}.json").write_text(json.dumps(notes))
    assert get(server.url).read_bytes() == CONTENT
    assert not server.requests


def test_a_length_that_is_a_lie_is_noticed(server, get):
    server.length_lie = 10
    fails(get, server, "after 1,048,576 of 1,048,586 bytes", retry_seconds=())
    fails(get, server)


def test_an_answer_in_chunks_is_whole_or_resumed(server, get):
    server.length, server.drop_after = "chunked", [300_000]
    assert get(server.url).read_bytes() == CONTENT
    assert server.requests[1].range == f"bytes={server.requests[0].sent}-"


def test_an_answer_of_untold_length_needs_a_digest(server, get):
    server.length = "untold"
    fails(get, server, "does not tell the length.*Pass sha256")
    assert get(server.url, sha256=SHA256).read_bytes() == CONTENT


def test_the_md5_of_google_storage_is_checked(server, get):
    good, bad = (b64encode(hashlib.md5(content).digest()).decode() for content in (CONTENT, b"other"))
    server.headers = {"x-goog-hash": f"crc32c=AAAAAA==,md5={bad}"}
    fails(get, server, "damaged on its way", retry_seconds=(0,))
    assert len(server.requests) == 2
    assert not partial(get, server).exists()
    server.headers = {"x-goog-hash": f"crc32c=AAAAAA==,md5={good}"}
    assert get(server.url).read_bytes() == CONTENT


def test_a_wrong_digest_is_told_and_the_file_set_aside(server, get):
    wrong = "1" * 64
    message = fails(get, server, SHA256, wrong, "rm .*weights.npz.unverified", sha256=wrong)
    assert f"SHA-256: {SHA256}" in message
    aside = pathlib.Path(f"{cached_path(server.url, get.cache)}.unverified")
    assert aside.read_bytes() == CONTENT
    assert len(server.requests) == 1  # no use in trying again
    assert get(server.url, sha256=SHA256).read_bytes() == CONTENT


def test_a_cached_file_with_another_digest_is_told_and_not_deleted(server, get):
    path = get(server.url)
    with pytest.raises(UserError, match=f"{SHA256}(.|\n)*{'1' * 64}(.|\n)*rm {path}"):
        get(server.url, sha256="1" * 64)
    assert path.read_bytes() == CONTENT


def test_a_404_names_the_address_and_what_to_do(server, get):
    server.statuses = [404]
    fails(get, server, re.escape(server.url), "404", "Check the spelling", "list_checkpoints")
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 204])
def test_a_refusal_is_not_tried_again(server, get, status):
    server.statuses = [status]
    fails(
        get, server, f"does not give.*{status}", "Only public files", re.escape(str(cached_path(server.url, get.cache)))
    )
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_in_trouble_is_asked_again(server, get, status):
    server.statuses = [status, status]
    assert get(server.url).read_bytes() == CONTENT
    server.statuses = [status] * 9
    with pytest.raises(UserError, match=f"in 4 attempts: the server answered {status}"):
        get(f"{server.url}.other")


def test_without_a_connection_it_says_how_to_bring_the_file_by_hand(get):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/w.npz"
    path = cached_path(url, get.cache)
    with pytest.raises(UserError, match=f"cannot reach 127.0.0.1(.|\n)*by hand: download {url}(.|\n)*{path}$"):
        get(url)
    path.write_bytes(b"by hand")
    assert get(url).read_bytes() == b"by hand"


def test_a_host_without_a_valid_certificate_is_not_asked_again(get, monkeypatch):
    def refuse(_, request, **__):
        requests.append(request)
        error = ssl.SSLCertVerificationError()
        error.verify_message = "self-signed certificate"
        raise urllib.error.URLError(error)

    requests = []
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    with pytest.raises(UserError, match=r"host could not prove that it is host: self-signed certificate.*certificates"):
        get("https://host/w.npz")
    assert len(requests) == 1


def test_a_silent_server_is_given_up(server, get):
    server.pause_after = 100 * server.piece // 100  # after the first piece
    fails(get, server, "the connection broke.*timed out", retry_seconds=(), timeout_seconds=0.2)
    assert partial(get, server).stat().st_size == server.piece


def test_a_web_page_is_not_taken_for_the_file(server, get):
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    fails(get, server, "web page instead of a file", "by hand")


def test_a_web_page_that_passes_for_a_file_is_not_taken_for_it(server, get):
    server.content = b"\n<!DOCTYPE html><html>Sign in</html>"
    fails(get, server, "brought a web page")
    assert not partial(get, server).exists()


def test_an_empty_answer_is_no_file(server, get):
    server.content = b""
    fails(get, server, "in 4 attempts: the server sent an empty file")
    final = cached_path(server.url, get.cache)
    final.write_bytes(b"")  # as an older version kept it
    server.content = CONTENT
    assert get(server.url).read_bytes() == CONTENT


def test_a_redirect_leads_to_http_only_and_never_out_of_https(server, get):
    server.redirect = "ftp://127.0.0.1/weights.npz"
    fails(get, server, r"redirects from http:// to ftp://, which is not followed\. Give the address of the file itself")
    server.redirect = "file:///etc/passwd"
    fails(get, server, "redirects from http:// to file://|does not give")
    with pytest.raises(UserError, match="redirects from https:// to http://"):
        download._Redirects().redirect_request(
            urllib.request.Request("https://one/a?token=secret"), None, 302, "Found", {}, "http://one/b"
        )


def test_a_part_that_does_not_say_what_it_is_of_is_not_joined(server, get):
    server.drop_after, server.parts_without_validator = [700_000], True
    assert get(server.url).read_bytes() == CONTENT
    assert [request.range for request in server.requests] == [None, "bytes=700000-", None]


def test_a_download_ends_at_its_limit_of_time_and_keeps_what_came(server, get):
    fails(get, server, r"did not come in 0 seconds\. The [\d,]+ bytes that came are kept", limit_seconds=0.0)
    assert partial(get, server).stat().st_size > 0


def test_a_server_that_trickles_is_given_up(server, get, monkeypatch):
    hours = itertools.count(0, 3600)  # between two reads
    monkeypatch.setattr(download, "_CHUNK", 1024)
    monkeypatch.setattr(download, "time", types.SimpleNamespace(monotonic=lambda: next(hours), sleep=time.sleep))
    fails(get, server, "in 2 attempts: less than a kilobyte a second", retry_seconds=(0,), limit_seconds=1e9)


def test_a_server_that_trickles_its_headers_is_given_up(server, get):
    server.header_seconds = 0.05
    fails(get, server, r"no whole answer in 0\.8 s", timeout_seconds=0.2)


def test_an_answer_without_end_is_given_up(server, get, monkeypatch):
    monkeypatch.setattr(download, "_MAX_BYTES", 500_000)
    server.length = "chunked"
    fails(get, server, "has no end")


def test_an_encoded_answer_is_not_taken_for_the_file(server, get):
    server.headers = {"Content-Encoding": "gzip"}
    fails(get, server, r"comes encoded \(gzip\)")


def test_a_query_is_sent_but_not_shown(server, get, capfd):
    url = f"{server.url}?token=secret"
    server.statuses = [404]
    with pytest.raises(UserError) as caught:
        get(url)
    server.statuses = [500]
    path = get(url, progress=True)
    assert server.requests[-1].path.endswith("?token=secret")
    assert "secret" not in f"{caught.value}{path}{capfd.readouterr()}"


def test_space_is_checked_before_the_download(server, get, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_500_000))
    message = fails(get, server, "1,048,576 bytes more are needed, 1,500,000 are free", "VIT_JAX_CACHE")
    assert "another disk" in message
    assert partial(get, server).stat().st_size == 0
    monkeypatch.undo()
    assert get(server.url).read_bytes() == CONTENT


def test_a_disk_that_fills_up_keeps_what_came(server, get, monkeypatch):
    copy = download._Download._copy

    class Disk:
        def __init__(self, file):
            self.file = file

        def write(self, chunk):
            if self.file.tell() + len(chunk) > 500_000:
                self.file.write(chunk[: 500_000 - self.file.tell()])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file.write(chunk)

        def flush(self):
            self.file.flush()

    monkeypatch.setattr(
        download._Download, "_copy", lambda self, response, file, have: copy(self, response, Disk(file), have)
    )
    fails(get, server, r"no space left for .*: 548,576 bytes more are needed, [\d,]+ are free", "the same command")
    monkeypatch.undo()
    assert get(server.url).read_bytes() == CONTENT
    assert server.requests[-1].range == "bytes=500000-"


def test_a_cache_that_cannot_be_written_is_told(server, get):
    get.cache.parent.mkdir(exist_ok=True)
    get.cache.write_text("a file where the folder should be")
    fails(get, server, "cannot write to the cache .*: Not a directory.*VIT_JAX_CACHE")


def test_ctrl_c_leaves_the_partial_file_for_the_next_call(server, get, monkeypatch):
    read, calls = download._Download._read, []

    def interrupted(self, response):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, response)

    monkeypatch.setattr(download._Download, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get(server.url)
    monkeypatch.undo()
    kept = partial(get, server).stat().st_size
    assert 0 < kept < len(CONTENT)
    assert not cached_path(server.url, get.cache).exists()
    assert get(server.url).read_bytes() == CONTENT
    assert server.requests[-1].range == f"bytes={kept}-"


def test_after_kill_9_only_the_rest_is_asked_for(server, get):
    server.pause_after = 10 * server.piece
    process = start_fetch(server.url, get.cache)
    try:
        wait_until(lambda: partial(get, server).exists() and partial(get, server).stat().st_size == server.pause_after)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not cached_path(server.url, get.cache).exists()
    server.go_on.set()
    assert get(server.url).read_bytes() == CONTENT
    assert server.requests[-1].range == f"bytes={10 * server.piece}-"
    assert server.requests[-1].sent == len(CONTENT) - 10 * server.piece


def test_of_two_processes_one_downloads_and_the_other_waits(server, get):
    server.pause_after = 10 * server.piece
    first = start_fetch(server.url, get.cache)
    second = None
    try:
        wait_until(lambda: len(server.requests) == 1)
        second = start_fetch(server.url, get.cache)
        assert any("waiting for another process" in line for line in second.stderr)
        server.go_on.set()
        outputs = [process.communicate(timeout=60)[0].strip() for process in (first, second)]
    finally:
        for process in (first, second):
            if process:
                process.kill()
                process.communicate()
    assert outputs == [str(cached_path(server.url, get.cache))] * 2
    assert pathlib.Path(outputs[0]).read_bytes() == CONTENT
    assert len(server.requests) == 1


# Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_elsewhere_is_a_line_each_10_percent(server, get, capsys):
    get(server.url, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert 3 <= len(lines) <= 10
    assert all(re.fullmatch(r"weights.npz: [\d.]+/1.0 MB +\d+%  [\d.]+ MB/s  0:00:\d\d left", line) for line in lines)
    assert "100%" in lines[-1]


def test_progress_on_a_terminal_is_one_line_a_few_times_a_second(monkeypatch):
    terminal, clock = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = download._Progress("w.npz", 40_000_000, 100_000_000)
    for step in range(600):
        clock[0] = step / 100
        progress.update(40_000_000 + step * 100_000)
    progress.close()
    text = terminal.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    updates = text.strip("\r\n").split("\r")
    assert 15 <= len(updates) <= 21  # in six seconds
    assert updates[-1].split() == ["w.npz:", "99.9/100.0", "MB", "99%", "10.0", "MB/s", "0:00:00", "left"]


def test_progress_without_a_size_tells_bytes_and_rate(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = download._Progress("w.npz", 0, None)
    for step in range(26):
        clock[0] = float(step)
        progress.update(step * 1_000_000)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["w.npz: 10.0 MB  1.0 MB/s", "w.npz: 20.0 MB  1.0 MB/s", "w.npz: 25.0 MB  1.0 MB/s"]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_that_nobody_reads_stops_no_download(server, get, monkeypatch, terminal):
    class Closed(io.StringIO):
        def isatty(self):
            return terminal

        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    monkeypatch.setattr(download._Progress, "EVERY_SECONDS", 0)
    assert get(server.url, progress=True).read_bytes() == CONTENT


def test_no_progress_is_told_if_not_wanted(server, get, capsys):
    get(server.url)
    assert capsys.readouterr().err == ""
