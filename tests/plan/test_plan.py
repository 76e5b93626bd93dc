"""The command: the rows of each search, and one run from end to end."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.plan.test_search import make_row
from vit_jax.config import base_config
from vit_jax.plan import search
from vit_jax.plan.table import format_plan

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SECONDS = 0.1


class Planner:
    """A fake compiler with memory needs set by the test; it records its requests."""

    def __init__(self, needed, usable=1000, shortest=0):
        self.needed, self.usable, self.shortest, self.asked = needed, usable, shortest, []

    def __call__(self, config, topology, *, memory_only=False):
        self.asked.append((config, topology.name, memory_only))
        gpu = topology.compiler_name is None
        row = make_row(config, topology, needed=self.needed(config, topology), usable=self.usable)
        if gpu:
            row = dataclasses.replace(row, status=f"{row.status} by formula")
        elif memory_only:
            return row
        if not memory_only and row.fits and config.steps < self.shortest:
            return dataclasses.replace(row, status="refused", message="too short", memory=None)
        if not row.fits:
            return row
        days = SECONDS * config.steps / 86_400
        return dataclasses.replace(
            row, compiler_seconds=SECONDS, num_steps=config.steps, days=days, core_days=days * row.num_cores, price=days
        )


def config_of(**fields):
    return search.with_fields(base_config(), **{"batch_size": 4096, "epochs": None, "steps": 86_400} | fields)


def rows_for(planner, name, *, config=None, **arguments):
    return list(search.rows_for(planner, config or config_of(), name, **arguments))


@pytest.mark.parametrize("name", ["v3-8", "h100-8"])
def test_without_a_search_there_is_one_row_of_the_whole_step(name):
    planner = Planner(lambda config, topology: 1)
    (row,) = rows_for(planner, name)
    assert (row.fits, row.topology, row.days) == (True, name, pytest.approx(SECONDS))
    assert [memory_only for _, _, memory_only in planner.asked] == [False]


@pytest.mark.parametrize(("advice", "told"), [(True, "--config.sharding=fsdp fits"), (False, None)])
def test_row_that_does_not_fit_has_advice_on_request(advice, told):
    planner = Planner(lambda config, topology: 2000 if config.sharding == "replicated" else 500)
    (row,) = rows_for(planner, "v3-128", advice=advice)
    assert (row.fits, row.advice) == (False, told)


@pytest.mark.parametrize("name", ["v3-8", "h100-8"])
def test_the_largest_batch_is_planned_with_the_length_of_the_run(name):
    planner = Planner(lambda config, topology: 100 + 70 * config.batch_size // 8)
    (row,) = rows_for(planner, name, search="batch")
    assert (row.batch_size, row.num_steps, row.days) == (8 * 12, 86_400, pytest.approx(SECONDS))
    assert [memory_only for _, _, memory_only in planner.asked[-2:]] == [True, False]


@pytest.mark.parametrize("name", ["v3-8", "h100-8"])
def test_run_too_short_for_the_largest_batch_has_no_costs(name):
    planner = Planner(lambda config, topology: 100 + 70 * config.batch_size // 8, shortest=100_000)
    (row,) = rows_for(planner, name, search="batch")
    assert (row.fits, row.batch_size) == (True, 8 * 12)
    assert (row.num_steps, row.days, row.core_days, row.price) == (None,) * 4
    assert "fits, but the run is refused: too short" in format_plan([row])


def test_the_batch_of_some_devices_is_a_multiple_of_them():
    planner = Planner(lambda config, topology: 100 + 70 * config.batch_size)
    (row,) = rows_for(planner, "v3-8", search="batch", num_devices=1)
    assert row.batch_size == 12


@pytest.mark.parametrize(
    ("name", "tried"), [("v5litepod", ["v5e-1", "v5e-4", "v5e-8"]), ("H100", ["h100", "h100-2", "h100-4", "h100-8"])]
)
def test_the_smallest_slice_is_planned_to_the_end(name, tried):
    planner = Planner(lambda config, topology: 8000 // topology.num_devices)
    rows = rows_for(planner, name, search="slice")
    assert [row.topology for row in rows] == tried
    assert [row.fits for row in rows] == [False] * (len(tried) - 1) + [True]
    assert rows[-1].days == pytest.approx(SECONDS)
    assert planner.asked[-1][1:] == (tried[-1], False)


@pytest.mark.parametrize("name", ["v3-8", "h100-8"])
def test_the_cheapest_remat_is_planned_to_the_end(name):
    needs = {"none": 9000, "dots": 8000, "full": 900}
    planner = Planner(lambda config, topology: needs[config.model.remat or "none"])
    rows = rows_for(planner, name, search="remat")
    assert [row.fits for row in rows] == [False] * (len(rows) - 1) + [True]
    assert (rows[-1].remat, rows[-1].days) == ("full", pytest.approx(SECONDS))
    assert [memory_only for _, _, memory_only in planner.asked] == [True] * len(rows) + [False]


def test_search_without_result_plans_nothing_again():
    planner = Planner(lambda config, topology: 2000)
    assert not any(row.fits for row in rows_for(planner, "v3-8", search="batch"))
    assert all(memory_only for _, _, memory_only in planner.asked)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A run of the command for GPUs: its output and its file."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    result = subprocess.run(
        [
            sys.executable, "-m", "vit_jax.plan", "--config=configs/quickstart.py", "--topology=H100-2",
            "--config.batch_size=64", "--price_per_core_hour=2", f"--json={path}",
        ],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(path.read_text())


def test_a_row_that_timed_out_is_not_a_success(tmp_path):
    path = tmp_path / "plan.json"
    result = subprocess.run(
        [
            sys.executable, "-m", "vit_jax.plan", "--config=configs/quickstart.py", "--topology=h100",
            "--timeout_minutes=1e-6", f"--json={path}",
        ],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "not planned: h100, batch" in result.stderr
    record = json.loads(path.read_text())
    assert (record["success"], [row["status"] for row in record["rows"]]) == (False, ["timed out"])


def test_the_command_prints_a_table(command):
    output, _ = command
    heading, row, *_ = output.splitlines()
    assert heading.split()[:2] == ["topology", "cores"]
    assert row.split()[:4] == ["h100-2", "2", "64", "yes*"]
    assert "NVLink" in output


def test_the_command_writes_all_fields(command):
    _, record = command
    (row,) = record["rows"]
    assert (row["topology"], row["status"], row["batch_size"]) == ("h100-2", "fits by formula", 64)
    assert row["price"] == pytest.approx(2 * 24 * row["core_days"])
    assert row["collectives"]["all-reduce"]["count"] == 1
