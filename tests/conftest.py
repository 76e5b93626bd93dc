import gc
import os
import pathlib
import subprocess
import sys

from tests import FLAGS_OF_ALL, XLA_FLAGS, warm_python

os.environ["XLA_FLAGS"] = XLA_FLAGS  # not `setdefault`: workers inherit what `pytest_configure` sets

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Tracing makes many objects that live on. To look through them as often as Python does takes a twelfth of the time.
gc.set_threshold(100_000, 20, 50)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

DEVICES: list[jax.Device] = []  # eight. A run has two of them unless its test takes more: eight take a third longer.

# Each test process takes the next file when it is done with one. The longest come first, so that all end together.
SLOW = ["main", "several_processes", "train_step", "gcs", "slices", "faults", "compiling", "flops", "train"]


def pytest_configure():
    all_devices = jax.devices
    DEVICES.extend(all_devices())  # reads the flags
    os.environ["XLA_FLAGS"] = FLAGS_OF_ALL  # for the processes that tests start
    jax.devices = lambda *backend: all_devices(*backend) if backend else DEVICES[:2]


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": position for position, name in enumerate(SLOW)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW)))


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: DEVICES)


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """A cache of compiled programs that all the processes of this test session share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # this process's folder is in that of the session
        folder = folder.parent
    (folder / "cache").mkdir(exist_ok=True)
    return folder / "cache"


@pytest.fixture
def run_main(start_main):
    """Runs `python -m vit_jax.main` in a fork; returns the finished process."""

    def run(*arguments, check=False, timeout=300, **environment):
        process = start_main(*arguments, stderr=None, **environment)
        output, errors = process.communicate(timeout)
        if check:
            assert process.returncode == 0, output + errors
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    return run


@pytest.fixture
def start_main(compilation_cache):
    """Starts `python -m vit_jax.main` in a fork (see `warm_python`), in the background; ends it with the test."""
    processes = []

    def start(*arguments, stdout=None, stderr=subprocess.STDOUT, hash_seed=0, **environment):
        command, environment = main_command(*arguments), main_environment(compilation_cache, **environment)
        processes.append(warm_python.Process(command, environment, stdout, stderr, hash_seed))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def main_command(*arguments):
    return [sys.executable, "-m", "vit_jax.main", *map(str, arguments)]


def main_environment(cache, **extra):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    common = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS, "PYTHONUNBUFFERED": "1"}
    return {**clean, **common, "XDG_CACHE_HOME": str(cache), **extra}


def data_file(name):
    """A file of the data that some tests want: in $VIT_JAX_DATA, or in ../shared/data; skips the test without it."""
    folder = pathlib.Path(os.environ.get("VIT_JAX_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / name).exists():
        pytest.skip(f"{name} is not in {folder}; set VIT_JAX_DATA to where it is")
    return folder / name
