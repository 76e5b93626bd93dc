import os
import pathlib
import sys
import zlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from vit_jax.run import compilation_cache
from vit_jax.run.compilation_cache import delete_damaged_entries, use_compilation_cache

ENTRY = zlib.compress(bytes(range(256)) * 1000)


@pytest.fixture
def entries(tmp_path, monkeypatch):
    """Writes entries as JAX does without zstandard."""
    monkeypatch.setitem(sys.modules, "zstandard", None)

    def write(**contents):
        for name, content in contents.items():
            (tmp_path / f"{name}-cache").write_bytes(content)
        return tmp_path

    return write


def names(directory):
    return sorted(path.name for path in directory.glob("*-cache"))


def test_entries_that_a_kill_cut_off_are_deleted_and_whole_ones_kept(entries):
    directory = entries(whole=ENTRY, cut=ENTRY[:-1], half=ENTRY[: len(ENTRY) // 2], empty=b"", more=ENTRY + b"x")
    changed = bytearray(ENTRY)
    changed[len(changed) // 2] ^= 1
    entries(changed=bytes(changed))
    delete_damaged_entries(directory)
    assert names(directory) == ["whole-cache"]


def test_an_entry_is_checked_once(entries, monkeypatch):
    checked = []
    monkeypatch.setattr(compilation_cache, "_is_whole", lambda path: checked.append(path.name) or True)
    directory = entries(old=ENTRY)
    os.utime(directory / "old-cache", (0, 0))
    delete_damaged_entries(directory)
    delete_damaged_entries(directory)
    assert checked == ["old-cache"]
    entries(new=ENTRY)
    delete_damaged_entries(directory)
    assert checked == ["old-cache", "new-cache"]


def test_no_cache_is_not_an_error(tmp_path):
    assert delete_damaged_entries(tmp_path / "none") == []


def test_a_damaged_entry_of_jax_is_replaced(tmp_path, monkeypatch):
    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in settings}
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))

    def compile_once() -> pathlib.Path:
        jax_cache.reset_cache()
        use_compilation_cache()
        jax.jit(lambda x: x * 2 + 3).lower(jnp.zeros(5)).compile()
        (entry,) = [path for path in tmp_path.glob("*-cache") if "lambda" in path.name]
        return entry

    try:
        entry = compile_once()
        content = entry.read_bytes()
        os.truncate(entry, len(content) // 2)
        assert compile_once() == entry
        assert entry.stat().st_size > len(content) // 2
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax_cache.reset_cache()
