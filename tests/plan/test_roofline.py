import dataclasses

import pytest

from vit_jax.plan import roofline as estimates
from vit_jax.plan.hlo import Collective
from vit_jax.plan.topologies import find_topology

MB = 1_000_000


def test_an_all_reduce_of_a_v3_pod_sends_twice_what_each_chip_has_but_its_own_part():
    pod = find_topology("v3-2048")  # 1024 chips, each 328 GB/s
    seconds = estimates.collective_seconds(Collective("all-reduce", (("f32", 1000 * MB),), 2048), pod)
    assert seconds == pytest.approx(2 * 1023 / 1024 * 1e9 / 328e9)


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter"])
def test_gathering_and_scattering_take_half_an_all_reduce(kind):
    topology = find_topology("v4-128")
    half = estimates.collective_seconds(Collective(kind, (("f32", MB),), 64), topology)
    whole = estimates.collective_seconds(Collective("all-reduce", (("f32", MB),), 64), topology)
    assert 2 * half == pytest.approx(whole)


def test_two_cores_of_a_chip_exchange_nothing_over_the_network():
    assert estimates.collective_seconds(Collective("all-reduce", (("f32", MB),), 2), find_topology("v3-8")) == 0


def test_turns_of_a_loop_add_up():
    topology = find_topology("v3-32")
    once, often = (Collective("all-gather", (("f32", MB),), 32, times=times) for times in (1, 24))
    assert estimates.collective_seconds(often, topology) == pytest.approx(
        24 * estimates.collective_seconds(once, topology)
    )


def test_exposed_leaves_out_what_overlaps():
    topology = find_topology("v3-32")
    both = [Collective("all-gather", (("f32", MB),), 32, overlapped=overlapped) for overlapped in (True, False)]
    everything = estimates.interconnect_seconds(both, topology)
    assert estimates.interconnect_seconds(both, topology, exposed=True) == pytest.approx(everything / 2)


def test_roofline_of_a_v3_core_is_half_a_chips():
    roofline = estimates.roofline(
        flops=61.5e12 * 8, memory_bytes=45e9, interconnect=0.05, num_devices=8, topology=find_topology("v3-8")
    )
    assert roofline.compute == pytest.approx(1.0)
    assert roofline.memory == pytest.approx(0.1)
    assert (roofline.seconds, roofline.limit) == (roofline.compute, "compute")


BOUND = estimates.Roofline(compute=0.1, memory=0.2, interconnect=0.9)


def test_a_step_takes_its_cycles_over_the_clock():
    assert estimates.compiler_seconds(470_000_000, find_topology("v3-8"), BOUND) == (pytest.approx(0.5), "cycles")


def test_cycles_that_come_to_less_than_the_roofline_are_replaced_by_it():
    assert estimates.compiler_seconds(94_000_000, find_topology("v3-8"), BOUND) == (0.2, "roofline")


@pytest.mark.parametrize(("name", "cycles", "reason"), [("v3-8", 0, "estimated no cycles"), ("h100", 10**9, "clock")])
def test_without_cycles_or_clock_there_is_no_time_but_a_reason(name, cycles, reason):
    seconds, why = estimates.compiler_seconds(cycles, find_topology(name), BOUND)
    assert seconds is None
    assert reason in why


@pytest.mark.parametrize(
    ("arguments", "seconds"),
    [((0.1, 0, 0), 0.1), ((-12.99, 13, 0), None), ((3.0, 1, 0), None), ((0.1, 0, 1), None), ((None, 0, 0), None)],
)
def test_the_compilers_own_sum_is_shown_only_if_it_knows_all_operations(arguments, seconds):
    assert estimates.optimal_seconds(*arguments) == seconds


@pytest.mark.parametrize(("kind", "passes"), [("all-reduce", 1.5), ("reduce-scatter", 0.75), ("all-gather", 3)])
def test_chips_exchange_their_parts_with_other_slices_over_the_data_centre_network(kind, passes):
    collective = Collective(kind, (("bf16", 25 * MB),), None, times=2, across_slices=True)
    # 25 Gbit/s a chip of v5e; two cores of a v3 chip share what is given.
    assert estimates.collective_seconds(collective, find_topology("4xv5e-256")) == pytest.approx(2 * passes * 0.008)
    v3 = dataclasses.replace(find_topology("4xv3-8"), dcn_bandwidth=25e9 / 8)
    assert estimates.collective_seconds(collective, v3) == pytest.approx(2 * 2 * passes * 0.008)


def test_an_exchange_within_slices_does_not_depend_on_their_number():
    collective = Collective("all-reduce", (("f32", MB),), None)
    one, two = (estimates.collective_seconds(collective, find_topology(name)) for name in ("v5e-16", "2xv5e-16"))
    assert one == two > 0
