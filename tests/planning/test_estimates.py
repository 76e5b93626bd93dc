import pytest

from vit_jax.planning import estimates
from vit_jax.planning.hlo import Collective
from vit_jax.planning.topologies import find_topology

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


def test_an_estimate_without_loops_is_the_compilers():
    assert estimates.with_loops(0.25, 100, 100) == 0.25


def test_an_estimate_with_loops_grows_as_the_cycles():
    assert estimates.with_loops(0.25, 300, 100) == pytest.approx(0.75)


def test_an_estimate_without_cycles_is_the_compilers():
    assert estimates.with_loops(0.25, 0, 0) == 0.25


def test_days():
    assert estimates.days(0.5, 172_800) == pytest.approx(1.0)


def test_straight_line():
    assert estimates.straight_line([(1, 10), (3, 20)], 25) == pytest.approx(4.0)
