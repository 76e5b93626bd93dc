"""Training gives the same result for any split of the state."""

import shlex

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.conftest import DEVICES, ROOT
from vit_jax import optimizers
from vit_jax import sharding as partitioning
from vit_jax.config import base_config
from vit_jax.errors import UserError
from vit_jax.experiment import build as experiments
from vit_jax.experiment import dry_run
from vit_jax.models import create_model
from vit_jax.objectives.classification import Classification
from vit_jax.train_step import TrainState, TrainStep

pytestmark = pytest.mark.usefixtures("eight_devices")

STEPS = 8


def config_of(**fields):
    config = base_config()
    config.data.image_size = 16
    config.data.dataset = "digits"
    config.model.name = "ViT-Ti/4"
    config.model.num_layers = 1
    config.model.hidden_dim = 128
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.dropout_rate = 0.1
    config.model.pre_logits = True
    config.mixup_alpha = 0.5
    config.batch_size = 32
    config.steps = STEPS
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 5
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    config.polyak_decay = 0.9
    config.update_from_flattened_dict(fields)
    return config


def losses(devices, num_steps=STEPS, **fields):
    config = config_of(**fields)
    experiment = experiments.build(config, devices=DEVICES[:devices])
    step, state = experiment.step, experiment.init_state()
    sharding = partitioning.batch_sharding(experiment.mesh)
    found = []
    for number in range(num_steps):
        random = np.random.default_rng(number)
        images = random.integers(0, 256, (32, 16, 16, 3), np.uint8)
        labels = random.integers(0, 10, 32, np.int32)
        state, metrics = step(state, partitioning.global_batch({"image": images, "label": labels}, sharding))
        found.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    return np.array(found), state


def norm(tree):
    return np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def on_one_device():
    found, state = losses(1)
    return found, jax.device_get(state)


@pytest.mark.parametrize(
    "fields",
    [
        {"sharding": "replicated"},
        {"sharding": "fsdp"},
        {"sharding": "fsdp+tensor", "mesh.model": 4},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_eight_devices_equal_one_for_any_split_of_the_state(on_one_device, fields):
    found, state = losses(8, **fields)
    expected, expected_state = on_one_device
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for ours, theirs in ((state.params, expected_state.params), (state.average, expected_state.average)):
        apart = jax.tree.map(lambda a, b: np.asarray(a) - b, ours, theirs)
        assert norm(apart) < 1e-4 * norm(theirs)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_split_state_takes_its_share_of_memory(scan_layers):
    config = config_of(sharding="fsdp", **{"model.scan_layers": scan_layers})
    state = experiments.build(config).step.abstract_state
    kernels = [leaf for leaf in jax.tree.leaves(state) if leaf.size >= partitioning.SMALLEST_SPLIT]
    assert partitioning.bytes_per_device(kernels) * 8 == partitioning.total_bytes(kernels)
    assert partitioning.bytes_per_device(state) < partitioning.total_bytes(state) / 5  # biases and norms are whole


def abstract_params(name="ViT-Ti/16", **attributes):
    model = create_model(name, num_classes=10, **attributes)
    optimizer = optimizers.make_optimizer("adamw", lambda step: 0.1)
    return TrainStep(model, optimizer, Classification(), image_size=32, polyak_decay=0.9).abstract_state


def specs(preset, rules=(), *, model=1, name="ViT-Ti/16", **attributes):
    mesh = partitioning.make_mesh(model=model)
    return partitioning.parameter_specs(abstract_params(name, **attributes).params, mesh, preset, rules)


def test_heads_and_hidden_units_are_split_over_the_model_axis_and_the_rest_over_data():
    found = specs("fsdp+tensor", model=4, num_heads=4)
    block = "Transformer/encoderblock_0/"
    assert found[block + "MultiHeadDotProductAttention_1/query/kernel"] == PartitionSpec("data", "model", None)
    assert found[block + "MultiHeadDotProductAttention_1/query/bias"] == PartitionSpec("model", None)
    assert found[block + "MultiHeadDotProductAttention_1/out/kernel"] == PartitionSpec("model", None, "data")
    assert found[block + "MlpBlock_3/Dense_0/kernel"] == PartitionSpec("data", "model")
    assert found[block + "MlpBlock_3/Dense_1/kernel"] == PartitionSpec("model", "data")
    assert found[block + "LayerNorm_0/scale"] == PartitionSpec()


def test_scanned_layers_are_split_as_unrolled_ones_are():
    found = specs("fsdp+tensor", model=4, num_heads=4, scan_layers=True)
    name = "Transformer/encoderblock/MultiHeadDotProductAttention_1/query/kernel"
    assert found[name] == PartitionSpec(None, "data", "model", None)


def test_a_user_rule_comes_first_and_the_preset_ignores_its_matches():
    rules = [("Dense_1/kernel", (None, None)), ("Dense_0/kernel", ("data", None))]
    found = specs("fsdp", rules)
    block = "Transformer/encoderblock_3/MlpBlock_3/"
    assert specs("fsdp")[block + "Dense_0/kernel"] == PartitionSpec(None, "data")
    assert found[block + "Dense_0/kernel"] == PartitionSpec("data", None)
    assert specs("fsdp")[block + "Dense_1/kernel"] == PartitionSpec("data", None)
    assert found[block + "Dense_1/kernel"] == PartitionSpec()


def test_documented_command_is_accepted(run_main):
    page = (ROOT / "docs" / "sharding.md").read_text()
    flags = shlex.split(next(line for line in page.splitlines() if line.startswith("--config.sharding=")))
    wider = ["--config.model.hidden_dim=128", "--config.model.mlp_dim=256"]
    process = run_main(
        "--config=configs/quickstart.py", "--dry_run=full", *flags, *wider, check=True, JAX_NUM_CPU_DEVICES="8"
    )
    row = next(line.split() for line in process.stdout.splitlines() if "_0/MlpBlock_3/Dense_0/kernel" in line)
    assert row[-4:-2] == ["data", "-"]


def test_moments_and_average_are_split_like_their_parameters():
    mesh = partitioning.make_mesh()
    state = abstract_params()
    found = partitioning.state_shardings(state, mesh, partitioning.parameter_specs(state.params, mesh, "fsdp"))
    spec = PartitionSpec("data", None)
    name = "['Transformer']['encoderblock_0']['MlpBlock_3']['Dense_1']['kernel']"
    same = [
        sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(found)
        if jax.tree_util.keystr(path).endswith(name)
    ]
    assert same == [spec] * 4  # parameter, two moments, average
    assert found.step.spec == PartitionSpec()


def test_arrays_of_another_shape_than_their_parameter_are_whole():
    def shapes(*sizes):
        return {"head": {"bias": jax.ShapeDtypeStruct(sizes, np.float32)}}

    state = TrainState(None, shapes(2**15), {"v_row": shapes(1), "v_col": shapes(2**15, 1), "v": shapes(2**15)}, None)
    mesh = partitioning.make_mesh()
    found = partitioning.state_shardings(state, mesh, partitioning.parameter_specs(state.params, mesh, "fsdp"))
    specs = {name: moment["head"]["bias"].spec for name, moment in found.opt_state.items()}
    assert specs == {"v_row": PartitionSpec(), "v_col": PartitionSpec(), "v": PartitionSpec("data")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "fdsp"}, "unknown sharding 'fdsp'. Did you mean 'fsdp'"),
        ({"preset": "fsdp", "rules": [("hed/kernel", ("data",))]}, "'hed/kernel' matches no parameter. Examples of "),
        ({"preset": "fsdp", "rules": [("head/kernel", ("modle", None))]}, "unknown mesh axis.*'modle'. Did you mean"),
        ({"preset": "fsdp", "rules": [("head/bias", (None, "data"))]}, "gives head/bias 2 axes, but its shape is"),
        ({"preset": "fsdp", "rules": [("head/kernel", (None, "data"))]}, "head/kernel.*10 is not divisible by 8"),
        ({"preset": "fsdp", "rules": [("Dense_0/kernel", ("data", "data"))]}, "names mesh axis 'data' twice"),
        ({"preset": "fsdp", "rules": [("Dense_0/kernel", "data")]}, "sharding_rules takes pairs"),
        ({"preset": "fsdp", "rules": ["head/kernel"]}, "sharding_rules takes pairs"),
        ({"preset": "fsdp", "rules": [("head/(", ("data",))]}, "sharding_rules takes pairs"),
        ({"preset": "fsdp+tensor", "model": 8}, "cannot be split over mesh axis 'model': 3 is not divisible by"),
        ({"preset": "fsdp", "model": 2}, "no parameter is split over it.*Use sharding='fsdp.tensor'"),
        ({"preset": "fsdp+tensor", "model": 2, "name": "R26x1"}, "model has no rules for it"),
    ],
)
def test_impossible_sharding_is_refused_with_a_reason(arguments, message):
    with pytest.raises(UserError, match=message):
        specs(**arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "mesh.data 3 does not divide the 8 devices"),
        ({"data": 2, "model": 2}, "4 devices, but there are 8"),
        ({"data": -1, "model": -1}, "one of them may be -1"),
        ({"data": 0}, "must be at least 1"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        partitioning.make_mesh(**sizes)


def test_mesh_uses_the_remaining_devices():
    assert dict(partitioning.make_mesh(model=2).shape) == {"data": 4, "model": 2}
    assert dict(partitioning.make_mesh(data=2, model=-1).shape) == {"data": 2, "model": 4}


def test_batch_is_split_only_over_the_data_axis():
    mesh = partitioning.make_mesh(model=4)
    batch = partitioning.global_batch({"x": np.arange(16)}, partitioning.batch_sharding(mesh))
    shards = sorted((shard.device.id, shard.data.tolist()) for shard in batch["x"].addressable_shards)
    assert [rows for _, rows in shards] == 4 * [list(range(8))] + 4 * [list(range(8, 16))]


def test_table_says_what_is_split_and_what_a_device_holds():
    state = experiments.build(config_of(sharding="fsdp")).step.abstract_state
    table = dry_run.parameter_table(state.params, full=True)
    row = next(line.split() for line in table.splitlines() if "encoderblock_0/MlpBlock_3/Dense_0/kernel" in line)
    assert row[1:] == ["1", "128x256", f"{128 * 256:,}", "-", "data", f"{4 * 128 * 256 // 8:,}"]
