import pytest

from vit_jax.errors import UserError
from vit_jax.plan.topologies import find_topology, list_topologies, slices


@pytest.mark.parametrize(
    ("name", "compiler_name", "chips", "cores", "devices"),
    [
        ("v2-8", "v2:2x2", 4, 8, 8),
        ("v3-512", "v3:16x16", 256, 512, 512),
        ("v3-2048", "v3:32x32", 1024, 2048, 2048),
        ("v4-128", "v4:4x4x4", 64, 128, 64),
        ("v5p-128", "v5p:4x4x4", 64, 128, 64),
        ("v5e-256", "v5e:16x16", 256, 256, 256),
        ("v6e-8", "v6e:2x4", 8, 8, 8),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128, 128),
    ],
)
def test_names_count_cores_or_chips_as_cloud_tpu_does(name, compiler_name, chips, cores, devices):
    topology = find_topology(name)
    assert topology.compiler_name == compiler_name
    assert (topology.num_chips, topology.num_cores, topology.num_devices) == (chips, cores, devices)


def test_every_listed_name_is_found_under_its_name():
    assert [find_topology(name).name for name in list_topologies()] == list_topologies()


def test_a_shape_is_a_name_too():
    assert find_topology("v4:4x4x8") == find_topology("v4-256")


@pytest.mark.parametrize("name", ["v4:2x2x16", "v4:4x4x12", "v5e:4x2", "v3:2x4"])
def test_a_slice_of_another_shape_is_named_by_it_and_found_again(name):
    topology = find_topology(name)
    assert (topology.name, topology.compiler_name) == (name, name)
    assert find_topology(topology.name) == topology


@pytest.mark.parametrize("name", ["v5litepod", " V5e", "v5litepod-16", "V5LITEPOD:4x4"])
def test_slices_of_a_generation_are_found_under_its_other_names(name):
    assert slices(name) == slices("v5e")


def test_the_accelerator_type_of_v5e_is_a_name_too():
    assert find_topology("v5litepod-16") == find_topology("V5litepod:4x4") == find_topology("v5e-16")


def test_a_v4_chip_is_one_device():
    assert find_topology("v4-8").compiler_options == {"chip_config_name": "megacore"}


def test_gpus_are_counted():
    assert find_topology("a100-80gb").num_devices == 1
    assert find_topology("h100-4").num_devices == 4
    assert find_topology("h100-4").compiler_name is None
    assert find_topology("h100-1") == find_topology("h100")
    assert find_topology("2xh100-08") == find_topology("2xh100-8")


@pytest.mark.parametrize(
    ("name", "slices_of", "devices"),
    [
        ("2xv5e-256", "v5e-256", 512), ("3 x V5litepod-16", "v5e-16", 48), ("2xv4:2x2x16", "v4:2x2x16", 128),
        ("4xh100-8", "h100-8", 32), ("1xv3-8", "v3-8", 8), ("2xironwood-8", "tpu7x-8", 16),
    ],
)  # fmt: skip
def test_several_slices_have_a_count_before_the_name_of_one(name, slices_of, devices):
    topology, one = find_topology(name), find_topology(slices_of)
    assert (topology.num_devices, topology.devices_per_slice) == (devices, one.num_devices)
    assert (topology.shape, topology.compiler_name) == (one.shape, one.compiler_name)
    assert find_topology(topology.name) == topology
    assert topology.interconnect_bandwidth == one.interconnect_bandwidth


def test_a_search_over_several_slices_grows_each_of_them():
    assert [topology.name for topology in slices("2xv5e")][:2] == ["2xv5e-1", "2xv5e-4"]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("v5e-256x2", "written 2xv5e-256"), ("2*v5e-256", "written 2xv5e-256"), ("v5e-512", "2xv5e-256"),
        ("h100-16", "2xh100-8"), ("h100-12", "NVLink joins the 8 GPUs .*2xh100-8"),
        ("0xv5e-8", "such as 2xv5e-8"), ("999xv5e-8", "1 to 256 slices"),
        ("v5e:99999x99999", "more than the 256"), ("2xv5e", "v5e-8"), ("v3-" + "9" * 5000, "Did you mean 'v3-2048'"),
        ("v3-" + "9" * 30, "Did you mean 'v3-2048'"), ("h100-" + "9" * 30, "Did you mean 'h100-8'"),
    ],
)  # fmt: skip
def test_other_spellings_of_several_slices_say_what_to_type(name, instead):
    with pytest.raises(UserError, match=instead) as error:
        find_topology(name)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("v3-500", "v3-512"), ("v4-100", "v4-128"), ("v5e-3", "v5e-4"), ("h20", "h200"), ("h100-0", "h100")],
)
def test_an_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(UserError, match=f"Did you mean '{nearest}'"):
        find_topology(name)


def test_a_shape_of_too_few_axes_is_refused():
    with pytest.raises(UserError, match="3 axes"):
        find_topology("v4:4x4")


def test_slices_of_a_generation_grow():
    chips = [topology.num_chips for topology in slices("v5p")]
    assert chips == sorted(chips)


@pytest.mark.parametrize(
    ("name", "torus"),
    [
        ("v2-256", (False, True)), ("v2-512", (True, True)), ("v3-512", (False, False)), ("v3-1024", (False, True)),
        ("v3-2048", (True, True)), ("v5e-128", (False, True)), ("v4-64", (False, False, False)),
        ("v4-128", (True, True, True)),
    ],
)  # fmt: skip
def test_an_axis_as_long_as_the_pod_is_a_ring(name, torus):
    assert find_topology(name).torus == torus


def test_a_ring_has_twice_the_bandwidth_of_a_line():
    line, half, ring = (find_topology(name) for name in ("v3-512", "v3-1024", "v3-2048"))
    assert ring.interconnect_bandwidth == ring.chip.interconnect_bandwidth == 2 * line.interconnect_bandwidth
    assert half.interconnect_bandwidth == 1.5 * line.interconnect_bandwidth
