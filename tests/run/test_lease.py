import json
import subprocess
import sys
import threading
import time

import pytest

from vit_jax.errors import UserError
from vit_jax.run import lease as leases
from vit_jax.run.lease import lease
from vit_jax.run.workdir import end_process

# A lease needs a store that writes on condition, as buckets do, and TensorStore's files.


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "_HEARTBEAT_SECONDS", 0.1)
    return f"file://{tmp_path}/"


def test_only_one_of_several_processes_gets_the_lease(url):
    held, refused, ended = [], [], threading.Event()

    def want():
        try:
            with lease(url, end_process):
                held.append(1)
                ended.wait(60)
        except UserError:
            refused.append(1)
        if len(refused) == 3:
            ended.set()

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 3)


def test_lease_of_a_killed_process_of_this_machine_is_taken_over_at_once(tmp_path, url):
    code = f"import os, vit_jax.run.lease as w; lease = w.lease({url!r}, print); lease.__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert (tmp_path / ".lock").exists()
    with lease(url, end_process):
        pass
    assert not (tmp_path / ".lock").exists()


def test_lease_of_another_machine_is_taken_over_without_heartbeats(tmp_path, url, monkeypatch, caplog):
    monkeypatch.setattr(leases, "_LEASE_SECONDS", 1.5)
    holder = {"id": "1", "host": "other", "pid": 1, "pids_of": "other", "time": "2026-01-01T00:00:00+00:00"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    began = time.monotonic()
    with caplog.at_level("INFO"), lease(url, end_process):
        assert time.monotonic() - began > 1.5
    assert "locked by process 1 on other, last seen at 2026-01-01T00:00:00+00:00; waiting" in caplog.text


def test_process_that_lost_its_lease_ends_itself(tmp_path, url):
    code = (
        f"import time, vit_jax.run.lease as w, vit_jax.run.workdir as d\nw._HEARTBEAT_SECONDS = 0.1\n"
        f"lease = w.lease({url!r}, d.end_process)\nlease.__enter__()\n"
        f"open({str(tmp_path / '.lock')!r}, 'w').write('{{\"id\": \"another\"}}')\n"
        "time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=50).returncode == 1
    assert json.loads((tmp_path / ".lock").read_text()) == {"id": "another"}
