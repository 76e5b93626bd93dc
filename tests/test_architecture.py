"""The rules of docs/architecture.md: rooms import lower rooms only, and no module name is used twice."""

import ast
import collections
import pathlib
import sys

import pytest

from tests.conftest import ROOT

# From the lowest to the highest. A room is a package or a module in vit_jax/.
ROOMS = (
    *("errors", "console", "files", "json_files", "field_checks"),
    *("paper", "models", "costs", "objectives", "sharding", "optimizers", "train_step"),
    *("multihost", "data", "evaluators", "config", "flags", "checkpoints", "run", "weights", "experiment"),
    *("predict", "analysis", "train", "evaluate", "plan", "report", "sweep", "main"),
)
ALIASES = {"curves", "mistakes", "vtab", "analysis/flops", "data/show"}
JAX_ONLY = ("models", "objectives", "sharding", "optimizers", "train_step")


def modules():
    """The path of each module, without `vit_jax/` and `.py`, and its syntax tree."""
    for path in sorted((ROOT / "vit_jax").rglob("*.py")):
        name = path.relative_to(ROOT / "vit_jax").with_suffix("").as_posix()
        if name not in ALIASES and name != "__init__":
            yield name, ast.parse(path.read_text())


def imports(tree):
    """Full names of a module's imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_lower_rooms_only():
    upward = []
    for name, tree in modules():
        room = name.split("/")[0]
        for imported in imports(tree):
            package, _, rest = imported.partition(".")
            other = rest.split(".")[0]
            if package == "vit_jax" and other in ROOMS and ROOMS.index(other) > ROOMS.index(room):
                upward.append(f"{name} imports {imported}")
    assert upward == []


def test_every_room_has_its_place():
    assert {name.split("/")[0] for name, _ in modules()} == set(ROOMS)


def test_models_and_step_need_only_jax_flax_and_optax():
    for name, tree in modules():
        room = name.split("/")[0]
        allowed = {"vit_jax", "jax", "flax", "numpy"} | ({"optax"} if room != "models" else set())
        for imported in imports(tree) if room in JAX_ONLY else ():
            package = imported.split(".")[0]
            assert package in allowed or package in sys.stdlib_module_names, f"{name} imports {imported}"


def test_no_module_name_is_used_twice():
    names = collections.Counter(pathlib.PurePath(name).name for name, _ in modules())
    for shared in ("__init__", "__main__"):
        del names[shared]
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(("folder", "lines"), [("vit_jax", 500), ("benchmarks", 500), ("tests", 600)])
def test_files_are_short_enough_to_read(folder, lines):
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert [str(path) for path, length in lengths.items() if length > lines] == []


def test_model_and_loop_are_a_few_screens():
    assert len((ROOT / "vit_jax/models/vit.py").read_text().splitlines()) <= 350
    assert len((ROOT / "vit_jax/train.py").read_text().splitlines()) <= 150
