"""Lint, formatting and types, and what the README promises of itself."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.mutations.__main__ import read_tables


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_linter_formatter_and_type_checker_pass(command):
    process = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr


def test_links_in_the_documents_exist():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_readme_marks_its_two_commands():
    blocks = re.findall(r"<!-- newcomer: (\w+) -->\n```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    commands = dict(blocks)
    assert "python -m vit_jax.main --config=configs/quickstart.py --workdir=" in commands["run"]
    assert commands["test"].strip().endswith("pytest")


def test_mutations_change_the_code_as_it_is():
    for mutation in read_tables():
        assert (ROOT / mutation.path).read_text().count(mutation.old) == 1, (mutation.path, mutation.old)


def test_nothing_is_pickled_and_the_core_imports_neither_tensorflow_nor_torch():
    for path in (ROOT / "vit_jax").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"allow_pickle=True|^\s*(import|from) (pickle|tensorflow|torch)\b", text, re.M), path
