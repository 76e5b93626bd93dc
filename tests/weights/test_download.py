import contextlib
import hashlib
import http.server
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
from base64 import b64encode

import pytest

from tests.conftest import ROOT
from vit_jax.errors import UserError
from vit_jax.weights import download
from vit_jax.weights.download import cached_path, fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PIECE = 1 << 16


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` at every path, with the faults that the server's attributes ask for."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may be gone
            if server.statuses and (status := server.statuses.pop(0)):
                self.send_error(status)
            elif server.redirect:
                self.send_response(302)
                self.send_header("Location", server.redirect)
                self.end_headers()
            elif server.header_seconds:
                self.trickle_headers()
            else:
                self.send_content()

    def trickle_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(60):
            self.wfile.write(b"x")
            time.sleep(self.server.header_seconds)

    def send_content(self):
        server = self.server
        is_chunked = server.length == "chunked"
        self.send_response(200)
        for name, value in server.headers.items():
            self.send_header(name, value)
        if is_chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif server.length == "stated":
            self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        body = server.content[: server.drop_after.pop(0) if server.drop_after else None]
        for position in range(0, len(body), PIECE):
            if position >= server.pause_after:
                assert server.go_on.wait(120)
            piece = body[position : position + PIECE]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" if is_chunked else piece)
        if is_chunked and len(body) == len(server.content):
            self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)  # a proxy would not find this machine's loopback
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.headers, server.requests, server.statuses = CONTENT, {}, [], []
    server.drop_after, server.length, server.redirect, server.header_seconds = [], "stated", None, 0
    server.pause_after, server.go_on = len(CONTENT), threading.Event()
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.url = f"{server.address}/models/weights.npz"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def get(place, **options):
    return fetch(place, **{"retry_seconds": (0, 0, 0), **options})


def fails(server, *expected, **options):
    """Fetches in vain; nothing but the lock may remain. Returns the message."""
    with pytest.raises(UserError) as caught:
        get(server.url, **options)
    folder = cached_path(server.url).parent
    assert not folder.is_dir() or {path.name for path in folder.iterdir()} <= {"weights.npz.lock"}
    for text in expected:
        assert re.search(text, str(caught.value)), f"{text!r} is not in: {caught.value}"
    return str(caught.value)


# --- Whole files ---


def test_a_download_is_in_the_cache_and_is_not_repeated(server):
    path = get(server.url)
    assert path == cached_path(server.url)
    assert path.read_bytes() == CONTENT
    assert get(server.url, sha256=SHA256.upper()) == path
    assert len(server.requests) == 1
    assert {each.name for each in path.parent.iterdir()} == {"weights.npz", "weights.npz.lock"}


def test_gs_addresses_are_fetched_from_the_endpoint(server, monkeypatch):
    monkeypatch.setenv("VIT_JAX_GCS_ENDPOINT", f"{server.address}/mirror/")
    path = get("gs://vit_models/a+b/odd name?#.npz")
    assert path.read_bytes() == CONTENT
    assert server.requests == ["/mirror/vit_models/a+b/odd%20name%3F%23.npz"]
    assert path == cached_path("gs://vit_models/a+b/odd name?#.npz")
    monkeypatch.setenv("VIT_JAX_GCS_ENDPOINT", "localhost:80")
    with pytest.raises(UserError, match=r"VIT_JAX_GCS_ENDPOINT is 'localhost:80'.*http"):
        get("gs://vit_models/a+b/other.npz")


def test_a_read_only_cache_that_has_the_file_is_enough(server):
    path = cached_path(server.url)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert get(server.url, sha256=SHA256) == path
    assert [each.name for each in path.parent.iterdir()] == [path.name]  # no lock was taken
    assert not server.requests


@pytest.mark.parametrize("length", ["stated", "chunked"])
def test_a_dropped_connection_is_tried_again(server, length):
    server.length, server.drop_after = length, [300_000, 0]
    assert get(server.url).read_bytes() == CONTENT
    assert len(server.requests) == 3


def test_a_file_that_stays_cut_off_is_given_up(server):
    server.drop_after = [300_000] * 2
    fails(server, r"in 2 attempts: the connection broke \(.*300000 bytes read", retry_seconds=(0,))


def test_waits_grow_as_given(server, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server.statuses = [503, 500, 429]
    assert get(server.url, retry_seconds=(1, 3, 9)).read_bytes() == CONTENT
    assert waits == [1, 3, 9]


def test_a_file_of_unknown_length_needs_a_digest(server):
    server.length = "unknown"
    fails(server, "does not state the length")
    assert get(server.url, sha256=SHA256).read_bytes() == CONTENT


def test_the_md5_of_google_storage_is_checked(server):
    good, bad = (b64encode(hashlib.md5(content).digest()).decode() for content in (CONTENT, b"other"))
    server.headers = {"x-goog-hash": f"crc32c=AAAAAA==,md5={bad}"}
    fails(server, "in 2 attempts: the file was damaged during the download", retry_seconds=(0,))
    assert len(server.requests) == 2
    server.headers = {"x-goog-hash": f"crc32c=AAAAAA==,md5={good}"}
    assert get(server.url).read_bytes() == CONTENT


def test_a_wrong_digest_is_an_error_with_both(server):
    fails(server, f"SHA-256: {SHA256}\n expected: {'1' * 64}", sha256="1" * 64)
    assert len(server.requests) == 1
    assert get(server.url, sha256=SHA256).read_bytes() == CONTENT


def test_a_file_of_the_cache_with_another_digest_is_not_deleted(server):
    path = get(server.url)
    with pytest.raises(UserError, match=f"{SHA256}(.|\n)*{'1' * 64}(.|\n)*rm {path}"):
        get(server.url, sha256="1" * 64)
    assert path.read_bytes() == CONTENT


def test_the_digest_of_a_local_file_is_checked(tmp_path):
    file = tmp_path / "w.npz"
    file.write_bytes(CONTENT)
    assert fetch(str(file), sha256=SHA256) == file
    with pytest.raises(UserError, match=f"{SHA256}(.|\n)*{'0' * 64}"):
        fetch(str(file), sha256="0" * 64)
    with pytest.raises(UserError, match="Only files have digests"):
        fetch(str(tmp_path), sha256=SHA256)
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        fetch(str(file), sha256="abc")


# --- Servers and networks that fail ---


def test_a_404_names_the_address_and_what_to_do(server):
    server.statuses = [404]
    fails(server, re.escape(server.url), "404", "Check the spelling", "vit_jax.weights list")
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 204])
def test_a_refusal_is_not_tried_again(server, status):
    server.statuses = [status]
    fails(server, f"refuses.*{status}", "Only public files", re.escape(str(cached_path(server.url))))
    assert len(server.requests) == 1


def test_a_server_in_trouble_is_given_up(server):
    server.statuses = [503] * 9
    fails(server, "in 4 attempts: the server answered 503")


def test_without_a_connection_the_error_says_where_to_put_the_file(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/w.npz?token=secret"
    with pytest.raises(UserError, match=r"cannot reach 127.0.0.1:\d+ \(Connection refused\)") as caught:
        get(url)
    assert str(caught.value).endswith(f"put it here:\n  {cached_path(url)}")
    assert "secret" not in str(caught.value)
    cached_path(url).write_bytes(b"by hand")
    assert get(url).read_bytes() == b"by hand"


def test_a_host_without_a_valid_certificate_is_not_asked_again(server, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout"]
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes certificates, is not installed")
    subprocess.run([*command, str(key), "-out", str(certificate)], check=True, capture_output=True)
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http://", "https://")
    with pytest.raises(UserError, match=r"could not prove that it is .*self-signed certificate.*REQUESTS_CA_BUNDLE"):
        get(url)


def test_a_silent_server_is_given_up(server):
    server.pause_after = PIECE
    fails(server, r"the connection broke \(.*timed out", retry_seconds=(), timeout_seconds=0.2)


def test_a_slow_server_is_given_up(server, monkeypatch):
    hours = itertools.count(0, 3600)  # between two reads
    monkeypatch.setattr(download, "_CHUNK", 1024)
    monkeypatch.setattr(download, "time", types.SimpleNamespace(monotonic=lambda: next(hours), sleep=time.sleep))
    fails(server, "in 2 attempts: it arrives at less than a kilobyte a second", retry_seconds=(0,), limit_seconds=1e9)


def test_a_server_with_slow_headers_is_given_up(server):
    server.header_seconds = 0.05
    fails(server, r"no complete answer in 0\.8 s", timeout_seconds=0.2, retry_seconds=())


def test_an_answer_without_end_is_given_up(server, monkeypatch):
    server.length = "chunked"
    fails(server, "has no end: .* bytes in 0 seconds", limit_seconds=0)
    monkeypatch.setattr(download, "_MAX_BYTES", 500_000)
    fails(server, "has no end: 5..,... bytes")


def test_a_web_page_is_not_mistaken_for_the_file(server):
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    fails(server, "web page, not a file", "put it here")
    server.headers, server.content = {}, b"\n<!DOCTYPE html><html>Sign in</html>"
    fails(server, "web page, not a file")


def test_an_empty_answer_is_not_a_file(server):
    server.content = b""
    fails(server, "in 4 attempts: the server sent an empty file")
    cached_path(server.url).write_bytes(b"")  # as an older version kept it
    server.content = CONTENT
    assert get(server.url).read_bytes() == CONTENT


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/weights.npz", "file:///etc/passwd"])
def test_a_redirect_to_another_scheme_is_not_followed(server, target):
    server.redirect = target
    fails(server, f"redirects from http:// to {target[:3]}.*not followed. Give the address of the file itself")
    assert len(server.requests) == 1


def test_a_redirect_never_leads_out_of_https():
    response = types.SimpleNamespace(is_redirect=True, url="https://one/a?token=secret", headers={"Location": "/b"})
    job = download._Download("https://one/a?token=secret", cached_path("https://one/a"), None, 1, 1)
    job._check_redirect(response)
    response.headers["Location"] = "http://one/b"
    with pytest.raises(UserError, match="one/a redirects from https:// to http://"):
        job._check_redirect(response)


def test_a_query_is_sent_but_not_shown(server, capfd, caplog):
    url = f"{server.url}?token=secret"
    server.statuses = [404, 500]
    with pytest.raises(UserError) as caught:
        get(url)
    path = get(url)
    assert server.requests[-1].endswith("?token=secret")
    assert "secret" not in f"{caught.value}{path}{capfd.readouterr()}{caplog.text}"


# --- The disk, and other processes ---


def test_space_is_checked_before_the_download(server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_500_000))
    fails(server, "1.5 MB free, but 2.0 MB are needed", "set VIT_JAX_CACHE to a folder on another disk")
    monkeypatch.undo()


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    fails(server, "cannot write to the cache .*: Not a directory. Set VIT_JAX_CACHE")


def test_ctrl_c_leaves_no_file(server, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(download._Download, "_check_answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get(server.url)
    assert [path.name for path in cached_path(server.url).parent.iterdir()] == ["weights.npz.lock"]


def start_fetch(url):
    """A process of its own that fetches."""
    code = "import sys; from vit_jax.weights.download import fetch; print(fetch(sys.argv[1]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, url],
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


def test_one_process_downloads_while_another_waits_even_if_the_first_is_killed(server):
    server.pause_after = 10 * PIECE
    with start_fetch(server.url) as first:
        wait_until(lambda: server.requests)
        with start_fetch(server.url) as second:
            assert "waiting for another process" in next(second.stderr)
            assert len(server.requests) == 1
            first.kill()
            wait_until(lambda: len(server.requests) == 2)
            server.go_on.set()
            output, _ = second.communicate(timeout=60)
    assert output.strip() == str(cached_path(server.url))
    assert cached_path(server.url).read_bytes() == CONTENT
