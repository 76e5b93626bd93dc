import itertools
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.experiment.test_build import digits_config
from vit_jax.costs.hardware import CHIPS, TPU_V3_CORE_BF16_FLOPS, Machine
from vit_jax.experiment import build
from vit_jax.experiment.run_records import record_result
from vit_jax.run import accounting
from vit_jax.run.accounting import Accounts, Ledger, StartCost, paper_core_days, read_costs, total_cost

CPU = Machine("cpu", num_devices=1, num_cores=2, bf16_flops=None)
V3_8 = Machine("TPU v3", num_devices=8, num_cores=8, bf16_flops=8 * 61.5e12)
V3_16 = Machine("TPU v3", num_devices=16, num_cores=16, bf16_flops=16 * 61.5e12)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(accounting.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def spent(ledger):
    return {kind: seconds for kind, seconds in ledger.seconds().items() if seconds}


def start(from_step, step, machine=V3_8, **seconds):
    return StartCost(
        "2026-11-21T12:00:00+00:00", from_step, step, machine, dict.fromkeys(accounting.KINDS, 0.0) | seconds
    )


def test_time_belongs_to_the_innermost_kind_and_to_no_other(clock):
    ledger = Ledger()
    clock(3)
    ledger.turn_to("training")
    clock(10)
    with ledger.spent_on("evaluation"):
        clock(4)
        with ledger.spent_on("checkpoint"):
            clock(2)
        clock(1)
    clock(5)
    assert spent(ledger) == {"start_up": 3, "training": 15, "evaluation": 5, "checkpoint": 2}


def test_every_moment_is_counted(clock):
    ledger = Ledger(start_up_seconds=7)
    for kind, seconds in zip(itertools.cycle(accounting.KINDS), range(30), strict=False):
        with ledger.spent_on(kind):
            clock(seconds)
        clock(1)
    assert sum(ledger.seconds().values()) == 7 + sum(range(30)) + 30


def test_time_that_ends_with_an_error_is_counted_and_the_outer_kind_continues(clock):
    ledger = Ledger()
    ledger.turn_to("training")
    with pytest.raises(OSError, match="full"), ledger.spent_on("checkpoint"):
        clock(2)
        raise OSError("full")
    clock(1)
    assert spent(ledger) == {"checkpoint": 2, "training": 1}


def test_time_can_be_charged_when_it_is_over(clock):
    ledger = Ledger()
    ledger.turn_to("training")
    clock(10)
    ledger.charge("input", 4)
    assert spent(ledger) == {"training": 6, "input": 4}


def test_a_kind_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"'checkpoints'.*checkpoint"), Ledger().spent_on("checkpoints"):
        pass


def test_a_window_has_the_shares_since_the_last_one(clock):
    ledger = Ledger()
    ledger.turn_to("training")
    clock(50)
    ledger.window()
    clock(6)
    with ledger.spent_on("evaluation"):
        clock(2)
    assert ledger.window() == {"goodput": 0.75, "evaluation_share": 0.25}
    assert ledger.window() == {}


def test_the_first_window_has_the_start_up_before_the_ledger(clock):
    ledger = Ledger(start_up_seconds=4)
    ledger.turn_to("training")
    clock(12)
    assert ledger.window() == {"goodput": 0.75, "start_up_share": 0.25}


def test_a_process_knows_how_old_it_is():
    program = "import time; time.sleep(0.5); from vit_jax.run.accounting import process_age; print(process_age())"
    age = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert 0.5 <= age < 60


def test_costs_are_cores_times_time():
    cost = total_cost([start(0, 100, V3_8, training=3600.0 * 24)])
    assert cost == pytest.approx({"starts": 1, "core_hours": 8 * 24, "tpuv3_core_days": 8, "goodput": 1.0})


def test_other_hardware_counts_as_tpu_v3_cores_of_the_same_peak():
    h200 = Machine("NVIDIA H200", num_devices=1, num_cores=1, bf16_flops=989e12)
    cost = total_cost([start(0, 100, h200, training=3600.0 * 24)])
    assert cost["core_hours"] == pytest.approx(24)
    assert cost["tpuv3_core_days"] == pytest.approx(989 / 61.5)


def test_a_run_with_a_start_on_unknown_hardware_has_no_core_days():
    cost = total_cost([start(0, 50, V3_8, training=60.0), start(50, 100, CPU, training=60.0)])
    assert "tpuv3_core_days" not in cost


def test_starts_add_up_weighted_by_their_cores():
    cost = total_cost([start(0, 50, V3_8, training=100.0), start(50, 100, V3_16, training=100.0, input=50.0)])
    assert cost["core_hours"] == pytest.approx((8 * 100 + 16 * 150) / 3600)
    assert (cost["goodput"], cost["input_share"]) == (2400 / 3200, 800 / 3200)


def test_steps_that_a_kill_undid_are_not_goodput():
    # Killed at step 100, from the checkpoint of step 80 on.
    cost = total_cost([start(0, 100, V3_8, training=50.0), start(80, 180, V3_8, training=50.0)])
    assert cost["redone_steps"] == 20
    assert (cost["goodput"], cost["redone_share"]) == pytest.approx((0.9, 0.1))


def test_a_summary_leaves_out_what_hardly_took_time():
    entries = total_cost([start(0, 100, training=99.0, evaluation=1.0, restore=1e-5)])
    assert entries["evaluation_share"] == pytest.approx(0.01)
    assert "restore_share" not in entries


def test_falling_back_beyond_a_whole_start_undoes_it_too():
    # The checkpoints of steps 80 and 100 were damaged.
    starts = [start(0, 90, training=90.0), start(80, 110, training=30.0), start(60, 200, training=140.0)]
    cost = total_cost(starts)
    assert cost["redone_steps"] == 30 + 30
    assert cost["redone_share"] == pytest.approx(60 / 260)


def test_a_start_that_made_no_step_costs_but_undoes_nothing():
    starts = [start(0, 100, training=90.0), start(100, 100, start_up=10.0), start(100, 150, training=50.0)]
    cost = total_cost(starts)
    assert cost["starts"] == 3
    assert "redone_steps" not in cost
    assert cost["start_up_share"] == pytest.approx(10 / 150)


def test_starts_of_a_run_are_kept_one_after_the_other(tmp_path, clock):
    first = Ledger(start_up_seconds=2)
    accounts = Accounts(tmp_path, first, V3_8, step=0)
    first.turn_to("training")
    clock(10)
    accounts.record(100)
    second = Ledger()  # after a kill
    accounts = Accounts(tmp_path, second, V3_16, step=80)
    with second.spent_on("restore"):
        clock(5)
    accounts.record(120)
    starts = read_costs(tmp_path)
    assert [(each.from_step, each.step, each.machine) for each in starts] == [(0, 100, V3_8), (80, 120, V3_16)]
    assert starts[0].seconds["training"] == 10
    assert starts[0].seconds["start_up"] == 2
    assert starts[1].seconds["restore"] == 5


def test_a_start_is_recorded_before_its_first_step(tmp_path):
    Accounts(tmp_path, Ledger(), CPU, step=30)
    (only,) = read_costs(tmp_path)
    assert (only.from_step, only.step) == (30, 30)


def test_records_between_two_rows_of_metrics_are_rare(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(accounting.time, "monotonic", lambda: now[0])
    accounts = Accounts(tmp_path, Ledger(), CPU, step=0)
    now[0] = 9.0
    accounts.record_if_due(10)
    assert read_costs(tmp_path)[0].step == 0
    now[0] = 10.0
    accounts.record_if_due(20)
    assert read_costs(tmp_path)[0].step == 20


def test_processes_that_do_not_write_do_not_touch_the_file(tmp_path):
    Accounts(tmp_path, Ledger(), CPU, step=0, writes=False).record(10)
    assert list(tmp_path.iterdir()) == []


def test_no_run_ends_over_its_accounts(tmp_path, caplog):
    accounts = Accounts(tmp_path, Ledger(), CPU, step=0)
    tmp_path.rename(tmp_path.with_name("away"))
    tmp_path.write_text("a file in the place of the folder")
    accounts.record(10)
    assert "could not record" in caplog.text


@pytest.mark.parametrize(
    "content",
    ['[{"time": "2026', "[null]", "{}x", "[" * 10**5, '[{"time": "x", "from_step": 0, "step": "7", "seconds": {}}]'],
)
def test_a_damaged_record_is_a_warning_and_costs_restart_at_zero(tmp_path, caplog, content):
    (tmp_path / "accounting.json").write_text(content)
    Accounts(tmp_path, Ledger(), CPU, step=7)
    assert (tmp_path / "accounting.damaged.json").read_text() == content
    assert "damaged" in caplog.text
    assert [each.step for each in read_costs(tmp_path)] == [7]


def test_the_record_is_json_with_a_line_for_a_start(tmp_path):
    Accounts(tmp_path, Ledger(), CPU, step=0)
    Accounts(tmp_path, Ledger(), CPU, step=5)
    text = (tmp_path / "accounting.json").read_text()
    assert [row["from_step"] for row in json.loads(text)] == [0, 5]
    assert len(text.splitlines()) == 4


@pytest.mark.parametrize(
    ("model", "num_images", "core_days"),
    [
        ("ViT-L/16", 303e6 * 14, 680),
        ("ViT-L/16", 303e6 * 7, None),
        ("ViT-L/16", 12.4e6 * 90, 230),
        ("ViT-H/14", 303e6 * 14, 2500),
        ("R152x4", 303e6 * 40, 9900),
        ("ViT-B/16", 303e6 * 14, None),
    ],
)
def test_the_papers_core_days_stand_beside_runs_of_its_size(model, num_images, core_days):
    assert paper_core_days(model, 224, num_images) == core_days
    assert paper_core_days(model, 384, num_images) is None


def test_the_summary_has_the_cost_of_the_run(tmp_path):
    config = digits_config()
    Accounts(tmp_path, Ledger(start_up_seconds=1800.0), V3_8, step=0)
    rows = [{"step": step, "time/mfu": mfu} for step, mfu in ((1, 0.1), (2, 0.5), (3, 0.4))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = record_result(build.build(config), tmp_path, 3, images=48, seconds=1800.0, overlap={})
    assert result["mfu"] == 0.4
    assert result["starts"] == 1
    assert result["core_hours"] == pytest.approx(4.0, rel=1e-3)
    assert result["tpuv3_core_days"] == pytest.approx(4.0 / 24, rel=1e-3)
    assert result["goodput"] == 0.0
    assert result["start_up_share"] == 1.0
    assert "paper_tpuv3_core_days" not in result
    text = (tmp_path / "summary.md").read_text()
    assert "start up share" in text
    assert "100.00 %" in text


def test_a_run_without_accounts_has_a_summary_without_costs(tmp_path):
    config = digits_config()
    assert "core_hours" not in record_result(build.build(config), tmp_path, 3, images=48, seconds=1.0, overlap={})


def test_the_page_explains_every_kind_and_lists_every_chip():
    page = (ROOT / "docs" / "accounting.md").read_text()
    for kind, meaning in accounting.KINDS.items():
        assert f"| `{kind}` | {meaning} |" in page
    for chip in CHIPS:
        kinds = ", ".join(f"`{kind}`" for kind in chip.device_kinds)
        days = chip.bf16_flops / TPU_V3_CORE_BF16_FLOPS
        assert f"| {chip.name} | {kinds} | {chip.bf16_flops / 1e12:g} | {days:.2f} |" in page
