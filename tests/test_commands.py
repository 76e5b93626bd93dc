"""Behaviour of all commands: --help, and a reader that stops early."""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import ROOT

# By command, something that its --help lists.
COMMANDS = {
    "vit_jax.main": "--[no]allow_config_change",
    "vit_jax.plan": "--topology",
    "vit_jax.data.show": "--images",
    "vit_jax.predict": "--top",
    "vit_jax.analysis": "rollout",
    "vit_jax.sweep": "--collect",
    "vit_jax.report": "--all",
    "vit_jax.weights": "convert",
    "vit_jax.data.prepare": "imagenet21k",
    "vit_jax.data.vtab": "manifest",
    "vit_jax.vtab": "manifest",
    "vit_jax.mistakes": "--probabilities",
    "vit_jax.curves": "--output",
    "vit_jax.costs.flops": "--table6",
}

# All in one process, which imports jax once. Prints the help, then the status of a start without a reader.
SCRIPT = """
    import os, runpy, sys
    from absl import flags

    stdout = os.dup(1)
    for command in sys.argv[1:]:
        for name in list(flags.FLAGS):
            delattr(flags.FLAGS, name)  # those of the command before
        print(f"## {command}", flush=True)
        for has_reader in (True, False):
            if not has_reader:
                reading, writing = os.pipe()
                os.close(reading)
                os.dup2(writing, 1)
            sys.argv = [command, "--help"]
            sys.stdout = open(1, "w", closefd=False)
            try:
                runpy.run_module(command, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                os.write(stdout, f"\\0{end.code}".encode())
            sys.stdout.close()
            for name in list(flags.FLAGS):
                delattr(flags.FLAGS, name)
            os.dup2(stdout, 1)
            sys.stdout = open(1, "w", closefd=False)
"""


@pytest.fixture(scope="module")
def helps():
    """What each command prints."""
    command = [sys.executable, "-Wignore::RuntimeWarning:runpy", "-c", textwrap.dedent(SCRIPT), *COMMANDS]
    environment = {**os.environ, "COLUMNS": "100"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    return dict(part.split("\n", 1) for part in process.stdout.split("## ")[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_flags_ends_with_status_0_and_survives_a_reader_that_goes_away(helps, command):
    text, *statuses = helps[command].split("\0")
    assert statuses == ["0", "0"]
    assert COMMANDS[command] in text
    if command in ("vit_jax.main", "vit_jax.plan", "vit_jax.data.show"):
        assert "--config=<" in text
        assert "--config.<field>" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_pipe_that_breaks_elsewhere_is_an_error(tmp_path):
    code = "from vit_jax.console import run_command\ndef main(_):\n    raise BrokenPipeError\nrun_command(main)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert process.returncode == 1
    assert b"BrokenPipeError" in process.stderr
