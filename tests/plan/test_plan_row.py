import dataclasses
import json

import pytest

from vit_jax.config import base_config
from vit_jax.plan.plan_row import GIB, Memory, failures, plan_record, plan_row, row_of
from vit_jax.plan.search import with_fields
from vit_jax.plan.table import format_plan, format_table
from vit_jax.plan.topologies import find_topology
from vit_jax.plan.worker import parse_out_of_memory, restore_config

ANSWER = {
    "status": "fits", "usable": 15 * GIB, "num_steps": 86_400, "num_parameters": 300, "parameter_bytes": 1200,
    "flops": 61.5e12 * 8 * 0.05, "arguments": 4 * GIB, "outputs": 4 * GIB, "aliased": 4 * GIB - 512,
    "temporaries": 2 * GIB, "code": 1024, "compiler_flops": 61.5e12 * 0.051, "optimal_seconds": 0.1,
    "lower_seconds": 1.0, "compile_seconds": 30.0, "cpu_seconds": 40.0,
    "versions": {"jax": "0.10.2", "libtpu": "0.0.52"},
    "program": {
        "collectives": [], "cycles": 94_000_000, "num_loops": 0, "num_unknown_loops": 0,
        "num_unknown_operations": 0,
    },
}  # fmt: skip


GPU_ANSWER = {
    "status": "formula", "num_steps": 86_400, "num_parameters": 300, "parameter_bytes": 1200, "gradient_bytes": 1200,
    "flops": 1e15, "arguments": 4 * GIB, "temporaries": 2 * GIB,
}  # fmt: skip


def make_gpu_row(config=None, name="h100-8", num_devices=8, **changes):
    return row_of(config or base_config(), find_topology(name), GPU_ANSWER | changes, num_devices=num_devices)


def make_row(name="v3-8", num_devices=8, price=None, config=None, **changes):
    return row_of(
        config or base_config(),
        find_topology(name),
        ANSWER | changes,
        num_devices=num_devices,
        price_per_core_hour=price,
    )


def test_memory_counts_what_is_written_over_an_argument_once():
    memory = make_row().memory
    assert memory.outputs == 512
    assert memory.total == 4 * GIB + 512 + 2 * GIB + 1024


def test_core_days_are_cores_times_days():
    row = make_row()
    assert (row.days, row.core_days) == pytest.approx((0.1, 0.8))


def test_core_days_of_v3_are_their_own_unit():
    row = make_row()
    assert row.tpuv3_core_days == pytest.approx(row.core_days)


def test_a_v4_device_counts_as_two_cores_of_its_own_and_more_of_v3():
    row = make_row("v4-8", num_devices=4)
    assert row.num_cores == 8
    assert row.core_days == pytest.approx(8 * row.days)
    assert row.tpuv3_core_days == pytest.approx(4 * row.days * 275 / 61.5)


def test_the_price_is_of_all_cores_and_hours():
    assert make_row(price=2.0).price == pytest.approx(0.1 * 24 * 8 * 2.0)


def test_flops_of_the_compiler_cover_all_devices():
    assert make_row().compiler_flops / make_row().flops == pytest.approx(1.02)


def test_flops_of_a_program_with_loops_are_omitted():
    assert make_row(program=ANSWER["program"] | {"num_loops": 1}).compiler_flops is None


def test_exchanges_that_nothing_overlaps_add_to_the_step():
    collective = {"kind": "all-reduce", "bytes_by_dtype": [["f32", 164_000_000]], "group_size": 8, "times": 1}
    exposed, overlapped = (
        make_row(program=ANSWER["program"] | {"collectives": [collective | {"overlapped": overlapped}]})
        for overlapped in (False, True)
    )
    # v3-8: a line of two chips along each of two axes, a link of 82 GB/s each; 2 x 3/4 of the array.
    assert exposed.step_seconds - 0.1 == pytest.approx(2 * 3 / 4 * 164e6 / 164e9)
    assert overlapped.step_seconds == pytest.approx(0.1)
    assert overlapped.roofline.interconnect == pytest.approx(exposed.roofline.interconnect)


def with_program(name="v3-8", changes=None, **fields):
    devices = find_topology(name).num_devices
    return make_row(name, num_devices=devices, program=ANSWER["program"] | fields, **(changes or {}))


@pytest.mark.parametrize("name", ["v3-8", "v5e-8"])
def test_a_negative_sum_of_the_compiler_touches_nothing(name):
    # On v4, v5e and v6e XLA takes a second off for each kernel that is prefetched in slices.
    row = with_program(name, {"optimal_seconds": -12.998}, num_unknown_operations=13)
    assert row == with_program(name, {"optimal_seconds": 0.1}, num_unknown_operations=13)
    assert row.step_seconds >= row.roofline.seconds > 0
    assert (row.estimate, row.optimal_seconds) == ("cycles", None)


@pytest.mark.parametrize("cycles", [1, 46_000_000])
def test_no_time_is_less_than_the_roofline(cycles):
    row = with_program(cycles=cycles)
    assert row.estimate == "roofline"
    assert row.step_seconds == row.compiler_seconds == pytest.approx(0.05)
    assert "the roofline, which replaces them" in format_plan([row])


def test_an_exchange_that_overlaps_but_takes_longest_is_the_roofline_too():
    long = {"kind": "all-reduce", "bytes_by_dtype": [["f32", 10**12]], "group_size": 8, "times": 1, "overlapped": True}
    row = with_program(collectives=[long])
    assert (row.estimate, row.interconnect_seconds) == ("roofline", 0)
    assert row.step_seconds == row.roofline.interconnect > row.compiler_seconds


def test_each_row_names_its_estimate_and_versions():
    rows = [make_row(), make_gpu_row(), with_program(cycles=1)]
    assert [row.to_json()["estimate"] for row in rows] == ["cycles", "formula", "roofline"]
    assert rows[0].to_json()["versions"] == {"jax": "0.10.2", "libtpu": "0.0.52"}
    lines = format_plan(rows).splitlines()
    end = lines[0].index("estimate") + len("estimate")
    assert [line[:end].split()[-1] for line in lines[1:4]] == ["cycles", "formula", "roofline"]
    assert "JAX 0.10.2, libtpu 0.0.52" in lines[-1]


def test_without_cycles_there_is_no_time_but_a_reason():
    row = with_program(cycles=0)
    assert (row.fits, row.step_seconds, row.days, row.images_per_second) == (True, None, None, None)
    assert "no time: the compiler estimated no cycles" in format_plan([row])


def between(num_bytes=25_000_000, kind="all-reduce"):
    return {"kind": kind, "bytes_by_dtype": [["bf16", num_bytes]], "group_size": None, "across_slices": True}


def test_the_network_between_slices_adds_to_the_step():
    row = with_program("2xv5e-4", collectives=[between()])
    assert row.interconnect_seconds == pytest.approx(0.008)  # 25 MB at 25 Gbit/s, once for two slices
    assert (row.num_slices, row.dcn_bandwidth, row.num_cores) == (2, 25e9 / 8, 8)
    assert "between slices 25 Gbit/s a chip" in format_plan([row])


def test_unknown_network_between_slices_gives_no_time():
    row = with_program("2xv4-8", collectives=[between()])
    assert (row.fits, row.step_seconds) == (True, None)
    assert row.roofline.seconds > 0
    assert "--dcn_gigabits" in format_plan([row])


def test_several_machines_reduce_within_and_between_by_formula():
    one = make_gpu_row(gradient_bytes=8_000_000)
    four = make_gpu_row(name="4xh100-8", num_devices=32, gradient_bytes=8_000_000)
    assert [each.kind for each in four.collectives if each.across_slices] == ["all-reduce"]
    # Each GPU sends an eighth of the sum, 1.5 times for four machines, at 400 Gbit/s.
    assert four.interconnect_seconds - one.interconnect_seconds == pytest.approx(1.5 * 1e6 / 50e9)


def test_several_slices_are_not_planned_in_part():
    row = plan_row(base_config(), find_topology("2xv5e-4"), num_devices=4)
    assert row.status == "refused"
    assert "leave --num_devices out" in row.message


def test_a_slice_that_libtpu_cannot_compile_for_is_a_row_marked_as_formula():
    message = "libtpu 1 does not compile it: JAX 2 cannot read its program"
    row = make_gpu_row(name="tpu7x-8", message=message)
    assert (row.status, row.estimate, row.num_cores) == ("fits by formula", "formula", 8)
    assert "yes*" in format_plan([row])
    assert "by formula, because libtpu 1 does not compile it" in format_plan([row])
    large = make_gpu_row(name="tpu7x-8", message=message, temporaries=200 * GIB)
    assert "does not fit: needs 108 GiB more than available (by formula, because libtpu 1" in format_plan([large])


def test_what_failed_or_timed_out_is_not_a_success():
    rows = [make_row(), make_row(status="timed out", message="not compiled after 10 minutes")]
    rows += [make_row(status=status, message="why") for status in ("failed", "refused")]
    rows.append(make_row(status="does not fit", needed=17 * GIB, message="no"))
    assert failures(rows) == ["v3-8, batch 4,096: timed out", "v3-8, batch 4,096: failed"]
    assert plan_record(rows)["success"] is False
    good = plan_record([rows[0], rows[3], rows[4]])
    assert (good["success"], good["failures"], good["versions"]) == (True, [], ANSWER["versions"])
    assert failures([rows[3]]) == ["v3-8, batch 4,096: refused"]


def test_the_papers_core_days_stand_beside_the_same_run():
    config = with_fields(base_config(), model__name="ViT-L/16", batch_size=4096)
    steps = round(303e6 * 14 / 4096)
    assert make_row(config=config, num_steps=steps).paper_core_days == 680
    assert make_row(config=config, num_steps=steps // 2).paper_core_days is None


def test_what_does_not_fit_is_reported_with_its_overshoot():
    row = make_row(status="does not fit", needed=17 * GIB, usable=15 * GIB, message="RESOURCE_EXHAUSTED: ...")
    assert (row.fits, row.message) == (False, "needs 2.00 GiB more than available")
    assert row.memory == Memory(17 * GIB, 15 * GIB)


def test_an_unreadable_out_of_memory_message_is_still_a_row():
    row = make_row(status="does not fit", needed=None, message="RESOURCE_EXHAUSTED: no numbers\nmore")
    assert (row.fits, row.memory, row.message) == (False, None, "RESOURCE_EXHAUSTED: no numbers")


def test_a_compiler_without_flops_is_still_a_row():
    row = make_row(compiler_flops=None)
    assert (row.fits, row.compiler_flops) == (True, None)
    assert "by the compiler" not in format_plan([row])


@pytest.mark.parametrize("changes", [{}, {"status": "does not fit", "needed": 17 * GIB}])
def test_data_sheet_gives_the_usable_memory_if_the_compiler_does_not(changes):
    row = make_row(usable=None, message="RESOURCE_EXHAUSTED" if changes else None, **changes)
    assert row.memory.usable == 16 * GIB
    assert format_plan([row])


@pytest.mark.parametrize("message", ["", "\n"])
def test_an_out_of_memory_message_without_a_word_is_still_a_row(message):
    assert make_row(status="does not fit", needed=None, message=message).message == "no message"


def test_table_shows_one_line_of_a_failure_and_json_all_of_it():
    row = make_row(status="failed", message="XlaRuntimeError: INTERNAL\nstack of the compiler\nmore")
    assert "XlaRuntimeError: INTERNAL" in format_plan([row])
    assert "stack of the compiler" not in format_plan([row])
    assert "stack of the compiler" in row.to_json()["message"]


def test_arrays_before_fusion_on_a_gpu_take_memory_but_no_time():
    few, many = make_gpu_row(), make_gpu_row(temporaries=50 * GIB)
    assert many.memory.total > few.memory.total
    assert many.step_seconds == few.step_seconds
    assert many.roofline == few.roofline


def test_gradients_of_frozen_parameters_are_not_exchanged():
    all_trained, head = make_gpu_row(parameter_bytes=10**9, gradient_bytes=10**9), make_gpu_row(parameter_bytes=10**9)
    assert head.collectives[0].num_bytes == 1200
    assert head.interconnect_seconds < all_trained.interconnect_seconds


def test_a_run_with_frozen_parameters_is_none_of_the_papers():
    config = with_fields(base_config(), model__name="ViT-L/16", batch_size=4096, train_only=("^head/",))
    assert make_row(config=config, num_steps=round(303e6 * 14 / 4096)).paper_core_days is None


def test_with_fsdp_each_part_of_the_batch_gathers_and_scatters():
    config = with_fields(base_config(), sharding="fsdp")
    one, four = (make_gpu_row(with_fields(config, accumulation_steps=parts)) for parts in (1, 4))
    assert [(each.kind, each.times) for each in one.collectives] == [("all-gather", 2), ("reduce-scatter", 1)]
    assert four.interconnect_seconds == pytest.approx(4 * one.interconnect_seconds)


@pytest.mark.parametrize(
    ("message", "needed", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (51.56G) exceeds available HBM (15.48G). HLO module: jit_train_step.",
            51.56, 15.48,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.50G of 15.48G hbm. Exceeded hbm "
            "capacity by 1.02G.",
            16.50, 15.48,
        ),
    ],
)  # fmt: skip
def test_messages_of_the_compiler_are_read(message, needed, available):
    assert parse_out_of_memory(message) == (round(needed * GIB), round(available * GIB))


def test_another_message_is_not_mistaken_for_one():
    assert parse_out_of_memory("INTERNAL: something else (51.56G)") is None


def test_a_config_reaches_the_worker_unchanged():
    config = base_config()
    config.data.mixture = (("a", 1.0), ("b", 2.0))
    config.model.num_layers = 3
    restored = restore_config(json.loads(config.to_json()))
    assert restored.to_dict() == config.to_dict()
    assert restored.data.mixture == (("a", 1.0), ("b", 2.0))


def test_a_row_becomes_json():
    row = json.loads(json.dumps(make_row().to_json()))
    assert row["step_seconds"] == pytest.approx(0.1)
    assert row["memory"]["usable"] == 15 * GIB


def test_the_table_leaves_out_what_no_row_has():
    table = format_table([make_row(), make_row("v4-8", num_devices=4)])
    assert "price" not in table
    assert "remat" not in table
    assert [line.split()[0] for line in table.splitlines()] == ["topology", "v3-8", "v4-8"]


def test_the_length_of_the_run_stands_beside_its_days():
    heading, row = format_table([make_row()]).splitlines()
    assert heading.index("images/s") < heading.index("steps") < heading.index("days")
    assert "86,400" in row


def test_the_plan_says_what_to_change():
    row = make_row(status="does not fit", needed=17 * GIB, usable=15 * GIB, message="RESOURCE_EXHAUSTED")
    plan = format_plan([dataclasses.replace(row, advice="--config.model.remat=full fits")])
    assert "needs 2.00 GiB more than available; --config.model.remat=full fits" in plan
