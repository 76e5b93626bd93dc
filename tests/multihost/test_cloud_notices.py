"""Tests against a real HTTP server that waits for a change like Google's metadata server."""

import contextlib
import http.server
import threading
import urllib.parse

import pytest

from vit_jax.multihost import cloud_notices


class MetadataServer:
    """Answers at once to who does not know the value of now, and otherwise when it changes."""

    def __init__(self):
        self.values = {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
        self.changed = threading.Condition()
        self.waiting = 0
        self.closed = False

    def set(self, name, value):
        with self.changed:
            self.values[name] = value
            self.changed.notify_all()

    def get(self, name, known):
        with self.changed:
            self.waiting += 1
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.closed or tag(self.values[name]) != known, timeout=20)
            self.waiting -= 1
            return self.values[name]

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def wait_until_asked(self):
        """Until both values are known to the client, which waits for a change of each."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.waiting == 2, timeout=20)


def tag(value):
    return f"tag-of-{value}"


def watchers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("preemption")]


@pytest.fixture
def server(monkeypatch):
    state = MetadataServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query))
            assert self.headers["Metadata-Flavor"] == "Google"
            assert query["wait_for_change"] == "true"
            value = state.get(url.path.removeprefix("/computeMetadata/v1/"), query["last_etag"])
            with contextlib.suppress(OSError):
                self.send_response(200)
                self.send_header("ETag", tag(value))
                self.end_headers()
                self.wfile.write(value.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        http_server.daemon_threads, http_server.block_on_close = True, False
        threading.Thread(target=http_server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{http_server.server_address[1]}")
        yield state
        state.close()
        for thread in watchers():
            thread.join(10)
        http_server.shutdown()
        assert not watchers()


class Notices(list):
    def __init__(self):
        self.came = threading.Event()

    def __call__(self, reason):
        self.append(reason)
        self.came.set()


@pytest.mark.parametrize(
    ("name", "value"),
    [("instance/preempted", "TRUE"), ("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")],
)
def test_notice_is_reported_when_it_comes(server, name, value):
    notices = Notices()
    with cloud_notices.watch(notices):
        server.wait_until_asked()
        assert not notices
        server.set(name, value)
        assert notices.came.wait(10)
    assert notices == [f"{name} is {value}"]


def test_notice_that_was_there_before_is_reported(server):
    server.set("instance/preempted", "TRUE")
    notices = Notices()
    with cloud_notices.watch(notices):
        assert notices.came.wait(10)


def test_two_notices_are_reported_once(server):
    notices = Notices()
    with cloud_notices.watch(notices):
        server.wait_until_asked()
        server.set("instance/preempted", "TRUE")
        assert notices.came.wait(10)
        server.set("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
        for thread in watchers():
            thread.join(10)
            assert not thread.is_alive()
    assert len(notices) == 1


@pytest.mark.parametrize("value", ["MIGRATE_ON_HOST_MAINTENANCE", "<html>Log in</html>"])
def test_maintenance_that_the_machine_survives_and_a_page_of_a_proxy_are_not_notices(server, value):
    notices = Notices()
    with cloud_notices.watch(notices):
        server.wait_until_asked()
        server.set("instance/maintenance-event", value)
        assert not notices.came.wait(0.5)


def test_watch_continues_after_the_server_was_away(server, monkeypatch):
    monkeypatch.setattr(cloud_notices, "_RETRY_SECONDS", 0.1)
    asked, metadata = [], cloud_notices.metadata

    def unreliable(*arguments, **options):
        asked.append(1)
        if len(asked) <= 4:
            raise OSError("Connection refused")
        return metadata(*arguments, **options)

    monkeypatch.setattr(cloud_notices, "metadata", unreliable)
    notices = Notices()
    with cloud_notices.watch(notices):
        server.wait_until_asked()
        server.set("instance/preempted", "TRUE")
        assert notices.came.wait(10)


def test_nothing_is_watched_outside_googles_cloud(monkeypatch):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(cloud_notices.pathlib.Path, "read_text", lambda _: "Standard PC (Q35 + ICH9, 2009)\n")
    with cloud_notices.watch(lambda _: None):
        assert not watchers()
