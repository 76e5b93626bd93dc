import errno
import json
import os
import struct
import time

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from vit_jax.errors import UserError
from vit_jax.run import journal
from vit_jax.run.accounting import Ledger
from vit_jax.run.journal import MetricWriter, NonFiniteError, Progress, StepMetrics, Throughput


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


def test_unfinished_window_goes_on_after_a_restart():
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
    rows = journal.read_jsonl(tmp_path / "metrics.jsonl")
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


def test_tensorboard_gets_every_value_and_drops_those_that_are_made_again(tmp_path):
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
    assert [row.get("step") for row in journal.read_jsonl(path)] == [1, 3, None]
    with MetricWriter(tmp_path, step=3) as writer:
        writer.write(4, {"train/loss": 0.25})
    assert [row["step"] for row in journal.read_jsonl(path)] == [1, 3, 4]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damaged
    assert "damaged lines are left out: 2 of 5" in caplog.text


def test_a_line_that_a_kill_cut_off_is_no_damage(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "train/lo')
    assert journal.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1}]
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
    assert [row["step"] for row in journal.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_clock_that_goes_back_by_weeks_holds_nothing_up(tmp_path, monkeypatch):
    with MetricWriter(tmp_path, step=0) as writer:
        writer.write(1, {"train/loss": 0.5})
        writer.flush()
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now - 30 * 86400)
        for step in range(2, 30):  # more than a queue would hold
            writer.write(step, {"train/loss": 0.5})
    assert len(journal.read_jsonl(tmp_path / "metrics.jsonl")) == 29
    assert events_of(tmp_path)[-1] == (29, "train/loss", 0.5)


def test_no_run_ends_over_tensorboard(tmp_path, monkeypatch, caplog):
    with MetricWriter(tmp_path, step=0) as writer:
        monkeypatch.setattr("tensorboardX.RecordWriter.write", lambda *_: 1 / 0)
        for step in (1, 2):
            writer.write(step, {"train/loss": 0.5})
            writer.flush()
    assert len(journal.read_jsonl(tmp_path / "metrics.jsonl")) == 2
    assert caplog.text.count("TensorBoard events are no longer written: ZeroDivisionError") == 1


def test_reading_no_metrics_is_empty(tmp_path):
    assert journal.read_jsonl(tmp_path / "metrics.jsonl") == []


def test_throughput_counts_images_between_marks_and_leaves_pauses_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])
    throughput = Throughput(batch_size=10, num_cores=2)
    now[0] = 5.0
    throughput.restart(4)  # compilation
    with throughput.waiting_for_input(None):
        now[0] = 5.5
    now[0] = 7.0
    assert throughput.mark(8) == {
        "time/images_per_second": 20.0,
        "time/images_per_second_per_core": 10.0,
        "time/step_seconds": 0.5,
        "time/input_wait": 0.25,
    }
    assert throughput.mark(8) == {}


def test_late_batch_is_no_waiting_while_the_devices_are_at_work(monkeypatch):
    class Value:
        def __init__(self, ready):
            self.is_ready = lambda: ready

    now = [0.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])
    throughput = Throughput(batch_size=10, num_cores=2)
    for ready, seconds in ((False, 3.0), (True, 1.0)):
        with throughput.waiting_for_input({"loss": Value(ready)}):
            now[0] += seconds
    assert throughput.mark(2)["time/input_wait"] == 0.25


def test_utilisation_is_the_share_of_the_peak(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])
    throughput = Throughput(batch_size=10, num_cores=2, flops_per_image=3e12, peak_flops=60e12)
    now[0] = 2.0
    rates = throughput.mark(4)
    assert rates["time/tflops_per_second"] == 60.0
    assert rates["time/mfu"] == 1.0


def test_there_is_no_utilisation_where_the_peak_is_not_known(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])
    throughput = Throughput(batch_size=10, num_cores=2, flops_per_image=3e12, peak_flops=None)
    now[0] = 2.0
    assert "time/mfu" not in throughput.mark(4)


def test_a_mark_tells_what_became_of_the_time_pauses_included(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])
    ledger = Ledger()
    ledger.turn_to("training")
    throughput = Throughput(batch_size=10, num_cores=2, ledger=ledger)
    now[0] = 5.0
    with ledger.spent_on("evaluation"):
        now[0] = 15.0
    throughput.restart(4)
    with throughput.waiting_for_input(None):
        now[0] = 16.0
    now[0] = 20.0
    row = throughput.mark(8)
    assert row["time/step_seconds"] == 1.25
    assert row["time/goodput"] == pytest.approx(9 / 20)
    assert row["time/evaluation_share"] == pytest.approx(10 / 20)
    assert row["time/input_share"] == pytest.approx(1 / 20)


def test_a_mark_without_steps_leaves_the_time_to_the_next(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal.time, "perf_counter", lambda: now[0])
    ledger = Ledger()
    throughput = Throughput(batch_size=10, num_cores=2, ledger=ledger)
    now[0] = 8.0
    assert throughput.mark(0) == {}
    ledger.turn_to("training")
    now[0] = 10.0
    assert throughput.mark(1)["time/start_up_share"] == pytest.approx(0.8)


@pytest.mark.parametrize(("goodput", "told"), [(0.9, ""), (0.62, "  62 % of the time in training, 30 % in evaluation")])
def test_row_tells_where_the_time_went_when_little_of_it_was_training(goodput, told):
    row = journal.format_row(
        50, 200, {"train/loss": 1.5, "time/goodput": goodput, "time/input_share": 0.08, "time/evaluation_share": 0.3}
    )
    assert row == f"step  50/200  25%  loss 1.5{told}"


def test_row_tells_of_waiting_for_input_once():
    row = journal.format_row(50, 200, {"time/input_wait": 0.4, "time/goodput": 0.6, "time/input_share": 0.4})
    assert row == "step  50/200  25%  waits 40 % for input  60 % of the time in training"


def test_row_shows_progress_speed_and_time_left():
    row = journal.format_row(
        50, 200, {"train/loss": 1.5, "time/images_per_second": 640.0, "time/images_per_second_per_core": 320.0,
                  "time/step_seconds": 0.2}
    )  # fmt: skip
    assert row == "step  50/200  25%  loss 1.5  640 images/s (320/core)  ETA 0:00:30"


def test_progress_yields_all_items_again_and_again_and_stops_when_told(caplog):
    stop = []

    def before_each():
        if stop:
            raise KeyboardInterrupt

    progress = Progress([1, 2, 3], "counting", every_seconds=0, before_each=before_each)
    with caplog.at_level("INFO"):
        assert list(progress) == list(progress) == [1, 2, 3]
    assert "counting: 1/3" in caplog.text
    stop.append(True)
    with pytest.raises(KeyboardInterrupt):
        list(progress)
