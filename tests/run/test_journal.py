import contextlib
import errno
import json
import os
import struct
import time

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from tests.run.test_profiling import read_trace
from vit_jax.costs.hardware import Machine
from vit_jax.errors import UserError
from vit_jax.multihost.watchdog import Watchdog
from vit_jax.run.accounting import Ledger
from vit_jax.run.journal import Journal, NonFiniteError, StepMetrics, Throughput, format_row
from vit_jax.run.metrics import MetricWriter, read_jsonl
from vit_jax.run.profiling import Profiler

CPU = Machine("cpu", num_devices=1, num_cores=2, bf16_flops=None)


def collect(every_steps=2, **options):
    rows = []
    return rows, StepMetrics(every_steps, lambda step, values: rows.append((step, values)), **options)


def push(step_metrics, step, loss):
    step_metrics.push(step, {"loss": jnp.float32(loss)})


def test_windows_average_their_steps():
    rows, step_metrics = collect(every_steps=3)
    for step in range(1, 8):
        push(step_metrics, step, step)
    step_metrics.drain()
    assert rows == [(3, {"loss": 2.0}), (6, {"loss": 5.0})]


def test_steps_are_read_only_after_further_ones_were_dispatched():
    rows, step_metrics = collect(every_steps=1, lag=3)
    for step in range(1, 4):
        push(step_metrics, step, step)
    assert rows == []
    push(step_metrics, 4, 4)
    assert rows == [(1, {"loss": 1.0})]


def test_unfinished_window_continues_after_a_restart():
    rows, step_metrics = collect(every_steps=4)
    for step in range(1, 4):
        push(step_metrics, step, 0.1 * step)
    step_metrics.drain()
    state = json.loads(json.dumps(step_metrics.get_state()))
    resumed_rows, resumed = collect(every_steps=4, state=state)
    for each in (step_metrics, resumed):
        push(each, 4, 0.7)
        each.drain()
    assert resumed_rows == rows
    assert len(rows) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite_is_an_error_that_names_the_step(value):
    _, step_metrics = collect()
    push(step_metrics, 6, 1.0)
    push(step_metrics, 7, value)
    with pytest.raises(NonFiniteError, match=r"loss is (nan|inf) at step 7") as error:
        step_metrics.drain()
    assert error.value.step == 7


def test_rows_that_will_be_made_again_are_dropped_on_resume(tmp_path):
    with MetricWriter(tmp_path, step=0) as writer:
        for step in (50, 100, 150):
            writer.write(step, {"train/loss": 1.0 / step})
        writer.write(100, {"test/accuracy": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "train/lo')  # cut off by a kill
    with MetricWriter(tmp_path, step=100) as writer:
        writer.write(150, {"train/loss": 7.0})
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows == [
        {"step": 50, "train/loss": 1 / 50},
        {"step": 100, "train/loss": 1 / 100},
        {"step": 150, "train/loss": 7.0},
    ]


def events_of(workdir):
    """Scalars as TensorBoard reads them: (step, name, value); a start is (step, "start", 0)."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])  # tfrecord: length, checksum, data, checksum
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log"):
                found.append((event.step, "start", 0))
    return found


def test_tensorboard_gets_every_value_and_drops_repeated_ones(tmp_path):
    with MetricWriter(tmp_path, step=0) as writer:
        writer.write(3, {"train/loss": 0.25, "test/accuracy": 0.5})
    with MetricWriter(tmp_path, step=2) as writer:
        writer.write(3, {"train/loss": 0.75})
    assert sorted(events_of(tmp_path)) == sorted(
        [(1, "start", 0), (3, "train/loss", 0.25), (3, "test/accuracy", 0.5), (3, "start", 0), (3, "train/loss", 0.75)]
    )


def test_one_bad_byte_costs_one_row_and_a_copy_is_kept(tmp_path, caplog):
    with MetricWriter(tmp_path, step=0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"train/loss": 0.5})
    path = tmp_path / "metrics.jsonl"
    damaged = path.read_bytes().replace(b'"step": 2', b'"step": \xff') + b'["no object"]\n{"no": "step"}\n'
    path.write_bytes(damaged)
    assert [row.get("step") for row in read_jsonl(path)] == [1, 3, None]
    with MetricWriter(tmp_path, step=3) as writer:
        writer.write(4, {"train/loss": 0.25})
    assert [row["step"] for row in read_jsonl(path)] == [1, 3, 4]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damaged
    assert "skipped 2 damaged lines of 5" in caplog.text


def test_a_line_that_a_kill_cut_off_is_not_damage(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "train/lo')
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]
    MetricWriter(tmp_path, step=1).__exit__()
    assert not caplog.text
    assert not (tmp_path / "metrics.damaged.jsonl").exists()


def test_rows_wait_in_memory_while_the_disk_is_full(tmp_path, monkeypatch):
    class FullDisk:
        name = "metrics.jsonl"

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with MetricWriter(tmp_path, step=0) as writer:
        monkeypatch.setattr(writer, "_file", FullDisk())
        writer.write(1, {"train/loss": 0.5})
        writer.write(2, {"train/loss": 0.25})
        with pytest.raises(UserError, match="No space left on device"):
            writer.flush()  # a checkpoint would be saved next
        monkeypatch.undo()
        writer.write(3, {"train/loss": 0.125})
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_clock_that_goes_back_by_weeks_holds_nothing_up(tmp_path, monkeypatch):
    with MetricWriter(tmp_path, step=0) as writer:
        writer.write(1, {"train/loss": 0.5})
        writer.flush()
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 30 * 86400)
        for step in range(2, 30):  # more than a queue would hold
            writer.write(step, {"train/loss": 0.5})
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 29
    assert events_of(tmp_path)[-1] == (29, "train/loss", 0.5)


def test_no_run_ends_over_tensorboard(tmp_path, monkeypatch, caplog):
    with MetricWriter(tmp_path, step=0) as writer:
        monkeypatch.setattr("tensorboardX.RecordWriter.write", lambda *_: 1 / 0)
        for step in (1, 2):
            writer.write(step, {"train/loss": 0.5})
            writer.flush()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 2
    assert caplog.text.count("TensorBoard events are no longer written: ZeroDivisionError") == 1


def test_reading_no_metrics_is_empty(tmp_path):
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def ledger(clock):
    """A ledger of a run that trains."""
    ledger = Ledger()
    ledger.turn_to("training")
    return ledger


def test_throughput_counts_images_between_marks_and_leaves_pauses_out(clock, ledger):
    throughput = Throughput(ledger, 10, CPU)
    with ledger.spent_on("compile"):
        clock[0] += 5.0
    throughput.restart(4)
    clock[0] += 1.5
    with ledger.spent_on("evaluation"):
        clock[0] += 30.0
    clock[0] += 0.5
    ledger.charge("input", 0.5)
    rates = throughput.mark(8)
    assert {name: rates[f"time/{name}"] for name in (
        "images_per_second", "images_per_second_per_core", "step_seconds", "input_wait"
    )} == {
        "images_per_second": 20.0, "images_per_second_per_core": 10.0, "step_seconds": 0.5, "input_wait": 0.25
    }  # fmt: skip
    assert throughput.mark(8) == {}


def test_throughput_restarts_after_the_step_that_compiles(clock, ledger):
    throughput = Throughput(ledger, 10, CPU)
    clock[0] += 5.0
    throughput.restart(1)
    clock[0] += 2.0
    assert throughput.mark(3)["time/step_seconds"] == 1.0


@pytest.mark.parametrize(("peak_flops", "mfu"), [(60e12, 1.0), (None, None)])
def test_utilisation_is_the_share_of_a_known_peak(clock, ledger, peak_flops, mfu):
    machine = Machine("any", num_devices=1, num_cores=2, bf16_flops=peak_flops)
    throughput = Throughput(ledger, 10, machine, flops_per_image=3e12)
    clock[0] = 2.0
    rates = throughput.mark(4)
    assert rates["time/tflops_per_second"] == 60.0
    assert rates.get("time/mfu") == mfu


def test_a_mark_accounts_for_all_time_including_pauses(clock, ledger):
    throughput = Throughput(ledger, 10, CPU)
    clock[0] = 5.0
    with ledger.spent_on("evaluation"):
        clock[0] = 15.0
    clock[0] = 20.0
    ledger.charge("input", 1.0)
    row = throughput.mark(8)
    assert row["time/step_seconds"] == 1.25
    assert row["time/goodput"] == pytest.approx(9 / 20)
    assert row["time/evaluation_share"] == pytest.approx(10 / 20)
    assert row["time/input_share"] == pytest.approx(1 / 20)


def test_a_mark_without_steps_leaves_the_time_to_the_next(clock):
    ledger = Ledger()
    throughput = Throughput(ledger, 10, CPU)
    clock[0] = 8.0
    assert throughput.mark(0) == {}
    ledger.turn_to("training")
    clock[0] = 10.0
    assert throughput.mark(1)["time/start_up_share"] == pytest.approx(0.8)


class Value:
    """A metric of a step that the device has done, or not."""

    def __init__(self, is_done):
        self.is_ready = lambda: is_done
        self.copy_to_host_async = self.block_until_ready = lambda: None

    def __float__(self):
        return 0.5


@pytest.fixture
def make_journal(tmp_path, ledger):
    """Makes the journal of a run of 8 steps."""

    @contextlib.contextmanager
    def make(step=0, profiler=None):
        profiler = profiler or Profiler(tmp_path, first_step=None)
        parts = Throughput(ledger, 10, CPU), Watchdog(0, tmp_path), profiler
        with Journal(tmp_path, *parts, num_steps=8, log_every_steps=4) as journal:
            journal.start(step)
            yield journal

    return make


def test_there_is_a_batch_for_each_step_that_is_left(make_journal):
    for step in (0, 5, 8):
        with make_journal(step) as journal:
            assert len(list(journal.timed(iter(range(100))))) == 8 - step


@pytest.mark.parametrize(("is_done", "waited"), [(True, 4.0), (False, 1.0)])
def test_late_batch_is_not_waiting_time_while_the_devices_are_busy(is_done, waited, clock, ledger, make_journal):
    def batches():
        for seconds in (1.0, 3.0):
            clock[0] += seconds
            yield None

    with make_journal() as journal:
        for step, _ in enumerate(journal.timed(batches()), start=1):
            journal.end_step(step, {"loss": Value(is_done)})
            if step == 2:
                break
    assert ledger.seconds()["input"] == waited


def test_the_step_that_compiles_is_not_in_the_rates(clock, make_journal):
    rows = []
    with make_journal() as journal:
        journal.write = lambda step, metrics: rows.append(metrics)
        for step, _ in zip(range(1, 5), journal.timed(iter(range(8))), strict=False):
            clock[0] += 10.0 if step == 1 else 1.0
            journal.end_step(step, {"loss": Value(True)})
        journal.step_metrics.drain()
    assert rows[0]["time/step_seconds"] == 1.0


def test_a_profile_shows_the_wait_for_input(make_journal, tmp_path):
    with make_journal(profiler=Profiler(tmp_path / "profile", first_step=2, num_steps=1)) as journal:
        for step, _ in enumerate(journal.timed(iter(range(8))), start=1):
            journal.end_step(step, {"loss": jnp.float32(0.5)})
    names = [event.get("name") for event in read_trace(tmp_path / "profile/plugins/profile/steps_2-2")]
    assert names.count("train") == names.count("waiting_for_input") == 1


def test_a_pause_first_reads_the_metrics_of_all_steps_and_is_not_training_time(clock, ledger, make_journal):
    seen = []
    with make_journal() as journal:
        journal.write = lambda step, metrics: seen.append((step, metrics["train/loss"]))
        for step, _ in zip(range(1, 5), journal.timed(iter(range(8))), strict=False):
            journal.end_step(step, {"loss": Value(True)})
        assert seen == []
        with journal.pause("evaluation", "evaluation"):
            assert seen == [(4, 0.5)]
            clock[0] += 7.0
        assert journal.step_metrics.get_state() == {"sums": {}, "count": 0}
    assert ledger.seconds()["evaluation"] == 7.0


def test_nothing_follows_a_metric_that_is_not_finite(make_journal):
    with make_journal() as journal:
        journal.end_step(1, {"loss": jnp.float32("nan")})
        journal.end_step(2, {"loss": jnp.float32("nan")})
        with pytest.raises(NonFiniteError, match="at step 1"), journal.pause("checkpoint", "saving"):
            raise AssertionError
        with journal.pause("checkpoint", "what can be saved"):  # steps after it do not count
            pass


@pytest.mark.parametrize(("goodput", "told"), [(0.9, ""), (0.62, "  goodput 62 % (evaluation 30 %)")])
def test_row_shows_goodput_when_it_is_low(goodput, told):
    row = format_row(
        50, 200, {"train/loss": 1.5, "time/goodput": goodput, "time/input_share": 0.08, "time/evaluation_share": 0.3}
    )
    assert row == f"step  50/200  25%  loss 1.5{told}"


def test_row_mentions_waiting_for_input_once():
    row = format_row(50, 200, {"time/input_wait": 0.4, "time/goodput": 0.6, "time/input_share": 0.4})
    assert row == "step  50/200  25%  waits 40 % for input  goodput 60 %"


def test_row_shows_progress_speed_and_time_left():
    row = format_row(
        50, 200, {"train/loss": 1.5, "time/images_per_second": 640.0, "time/images_per_second_per_core": 320.0,
                  "time/step_seconds": 0.2}
    )  # fmt: skip
    assert row == "step  50/200  25%  loss 1.5  640 images/s  ETA 0:00:30"


def test_rows_fit_a_terminal():
    training = {"train/loss": 10.38, "train/accuracy": 0.000244, "train/grad_norm": 0.1234, "train/learning_rate": 1e-3}
    times = {"time/images_per_second": 12345.6, "time/step_seconds": 0.33, "time/input_wait": 0.019}
    (line,) = format_row(1000, 14062, training | times).splitlines()
    assert line == (
        "step  1000/14062   7%  loss 10.38  acc 0.000244  grad 0.1234  lr 0.001  12346 images/s  ETA 1:11:50"
    )
    few_shot = {f"fewshot/imagenet2012/{shots}shot_pre_logits_accuracy": 0.1234 for shots in (1, 5, 10, 25)}
    lines = format_row(1000, 14062, few_shot).splitlines()
    assert len(lines) == 4
    assert all(len(line) <= 111 for line in lines)
