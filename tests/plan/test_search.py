import dataclasses

import pytest

from vit_jax.config import base_config
from vit_jax.plan import search
from vit_jax.plan.plan_row import Memory, PlanRow
from vit_jax.plan.topologies import find_topology


def make_row(config, topology, *, needed, usable, **fields):
    fits = needed <= usable
    return PlanRow(
        topology=topology.name, task="train", model=config.model.name, image_size=224, batch_size=config.batch_size,
        num_devices=topology.num_devices, num_cores=topology.num_cores, device="core", sharding=config.sharding,
        remat=config.model.remat or "none", scan_layers=False, accumulation_steps=config.accumulation_steps,
        status="fits" if fits else "does not fit", message=None if fits else "needs more",
        memory=Memory(needed, usable), flops=1e15, num_parameters=300_000_000, num_trained=300_000_000, **fields,
    )  # fmt: skip


class Machine:
    """A fake compiler with memory needs set by the test; it records its requests."""

    def __init__(self, needed, usable=1000):
        self.needed, self.usable, self.asked = needed, usable, []

    def __call__(self, config, topology):
        self.asked.append(config)
        return make_row(config, topology, needed=self.needed(config), usable=self.usable, compiler_seconds=0.1)


def v3_8_config(**fields):
    return search.with_fields(base_config(), batch_size=4096, **fields)


def test_the_largest_batch_of_a_linear_need_is_exact_and_takes_four_compilations():
    machine = Machine(lambda config: 100 + 70 * config.batch_size // 8)
    row = search.largest_batch(machine, v3_8_config(), find_topology("v3-8"))
    assert row.batch_size == 8 * 12
    assert len(machine.asked) == 4


@pytest.mark.parametrize("fitting", [1, 9, 800, 1187, 5000])
def test_the_largest_batch_is_found_although_the_compiler_rematerialises(fitting):
    # What fits without help is less than what fits with it, and what does not fit is told as without.
    machine = Machine(lambda config: 900 if config.batch_size // 8 <= fitting else 1001 + config.batch_size)
    row = search.largest_batch(machine, v3_8_config(), find_topology("v3-8"))
    assert row.fits
    assert fitting - max(1, fitting // search.RESOLUTION) < row.batch_size // 8 <= fitting


@pytest.mark.parametrize("fitting", [1, 9, 800, 1187, 1190, 1250, 5000])
def test_a_search_around_a_guess_finds_the_same_in_fewer_compilations_the_closer_it_is(fitting):
    machine = Machine(lambda config: 900 if config.batch_size // 8 <= fitting else 1001 + config.batch_size)
    row = search.largest_batch(machine, v3_8_config(), find_topology("v3-8"), first_guess=1200, near=True)
    assert row.fits
    assert fitting - max(1, fitting // search.RESOLUTION) < row.batch_size // 8 <= fitting
    if abs(fitting - 1200) < 1200 // (search.RESOLUTION + 1):
        assert len(machine.asked) == 2


def test_a_search_around_a_guess_ends_where_nothing_fits():
    machine = Machine(lambda config: 2000 + config.batch_size)
    row = search.largest_batch(machine, v3_8_config(), find_topology("v3-8"), first_guess=40, near=True)
    assert (row.status, row.batch_size) == ("does not fit", 8)


def test_smallest_batch_is_reported_if_none_fits():
    row = search.largest_batch(Machine(lambda config: 2000 + config.batch_size), v3_8_config(), find_topology("v3-8"))
    assert (row.status, row.batch_size) == ("does not fit", 8)


def test_a_search_stays_within_the_limits_of_a_config():
    def plan(config, topology):
        row = make_row(config, topology, needed=1, usable=2)
        refusal = {"status": "refused", "message": "batch_size must be at most 80"}
        return dataclasses.replace(row, **refusal) if config.batch_size > 80 else row

    row = search.largest_batch(plan, v3_8_config(), find_topology("v3-8"))
    assert (row.fits, row.batch_size) == (True, 80)


def test_a_search_ends_at_a_failed_row():
    def plan(config, topology):
        return dataclasses.replace(make_row(config, topology, needed=1, usable=2), status="failed", message="crash")

    assert search.largest_batch(plan, v3_8_config(), find_topology("v3-8")).message == "crash"


def test_the_batch_of_a_search_is_a_multiple_of_devices_and_parts():
    machine = Machine(lambda config: 100 + config.batch_size)
    search.largest_batch(machine, v3_8_config(accumulation_steps=4), find_topology("v3-8"))
    assert all(config.batch_size % 32 == 0 for config in machine.asked)


def test_the_warm_up_of_a_short_run_does_not_end_a_search():
    machine = Machine(lambda config: 100 + config.batch_size)
    search.largest_batch(machine, v3_8_config(epochs=1.0, optimizer__warmup_steps=10_000), find_topology("v3-8"))
    assert all(config.epochs is None and config.steps > 10_000 for config in machine.asked)


def test_the_smallest_slice_is_the_first_that_fits():
    sizes = []

    def plan(config, topology):
        sizes.append(topology.name)
        return make_row(config, topology, needed=64_000 // topology.num_devices, usable=1000)

    rows = list(search.smallest_slice(plan, v3_8_config(), "v3"))
    assert [row.topology for row in rows] == sizes == ["v3-8", "v3-32", "v3-64"]
    assert rows[-1].fits


def test_remat_is_tried_from_the_fastest_on_and_ends_with_what_fits():
    needs = {"none": 3000, "dots": 2000, "full": 900}
    machine = Machine(lambda config: needs[config.model.remat] / config.accumulation_steps)
    rows = list(search.cheapest_remat(machine, v3_8_config(), find_topology("v3-128")))
    assert rows[0].remat == "none"
    assert [row.fits for row in rows] == [False] * (len(rows) - 1) + [True]
    assert len({(row.remat, row.accumulation_steps) for row in rows}) == len(rows)


def test_accumulation_goes_no_further_than_the_batch_can_be_divided():
    machine = Machine(lambda config: 5000)
    config = search.with_fields(v3_8_config(), batch_size=256)  # two images a core of v3-128
    machine.usable = 3000  # two parts need at least half of 5,000
    rows = list(search.cheapest_remat(machine, config, find_topology("v3-128")))
    assert {row.accumulation_steps for row in rows} == {1, 2}


def test_parts_that_cannot_save_enough_are_not_compiled():
    machine = Machine(lambda config: 5000 if config.accumulation_steps < 8 else 900)
    rows = list(search.cheapest_remat(machine, v3_8_config(), find_topology("v3-128"), shardings=("replicated",)))
    assert {row.accumulation_steps for row in rows if row.remat == "none"} == {1, 8}


def test_options_are_ordered_by_expected_time():
    row = make_row(v3_8_config(), find_topology("v3-128"), needed=2, usable=1)
    found = search.options(
        v3_8_config(), find_topology("v3-128"), row, shardings=("replicated",), policies=("full", "dots", "none")
    )
    once = [option["model__remat"] for option in found if option["accumulation_steps"] == 1]
    assert once == ["none", "dots", "full"]
    assert found[0]["accumulation_steps"] == 1


def test_advice_names_flags_that_were_tried():
    machine = Machine(lambda config: 2000 if config.sharding == "replicated" else 500)
    config, topology = v3_8_config(), find_topology("v3-128")
    row = search.advise(machine, config, topology, machine(config, topology))
    assert not row.fits
    assert row.advice.startswith("--config.sharding=fsdp fits")


def test_advice_where_nothing_helps_says_so():
    machine = Machine(lambda config: 2000)
    config, topology = search.with_fields(v3_8_config(), batch_size=128), find_topology("v3-128")
    assert "larger slice" in search.advise(machine, config, topology, machine(config, topology)).advice


def test_a_row_that_fits_needs_no_advice():
    machine = Machine(lambda config: 1)
    config, topology = v3_8_config(), find_topology("v3-128")
    assert search.advise(machine, config, topology, machine(config, topology)).advice is None


def planned(machine, **fields):
    config, topology = v3_8_config(**fields), find_topology("v3-128")
    row = dataclasses.replace(machine(config, topology), scan_layers=bool(config.model.scan_layers))
    return search.advise(machine, config, topology, row).advice


def test_scanned_layers_that_do_not_fit_are_unrolled_first():
    machine = Machine(lambda config: 5000 if config.model.scan_layers else 900)
    advice = planned(machine, model__scan_layers=True)
    assert advice.startswith("--config.model.scan_layers=False fits: each layer is then compiled separately")
    assert len(machine.asked) == 2


def test_options_tried_after_unrolling_are_unrolled_too():
    machine = Machine(
        lambda config: 5000 if config.model.scan_layers else 1500 if config.sharding == "replicated" else 900
    )
    advice = planned(machine, model__scan_layers=True)
    assert advice == "--config.model.scan_layers=False --config.sharding=fsdp fits"
    assert not any(config.model.scan_layers for config in machine.asked[1:])


def test_scanned_layers_that_fit_have_a_note_on_their_cost():
    advice = planned(Machine(lambda config: 1), model__scan_layers=True)
    assert advice == "scan_layers costs memory and time a step: --config.model.scan_layers=False saves them"


@pytest.mark.parametrize(("name", "scans"), [("ViT-L/16", True), ("R50+ViT-B/16", True), ("R152x4", False)])
def test_row_that_takes_too_long_to_compile_suggests_scanned_layers(name, scans):
    config, topology = v3_8_config(model__name=name), find_topology("v3-8")
    row = dataclasses.replace(make_row(config, topology, needed=1, usable=2), status="timed out", message="10 minutes")
    advice = search.advise(None, config, topology, row).advice
    assert advice.startswith("raise --timeout_minutes")
    assert ("--config.model.scan_layers=True compiles one layer" in advice) == scans
    assert ("needs more memory and time" in advice) == scans


def test_with_fields_does_not_change_the_config():
    config = base_config()
    assert search.with_fields(config, model__remat="full").model.remat == "full"
    assert config.model.remat is None


def test_resnets_have_no_policy_for_dots():
    assert search.policies_of("R152x4") == ("none", "full")
    assert "dots" in search.policies_of("R50+ViT-B/16")
