"""Files of weights of vit_jax, timm and transformers, against golden files that golden/make_weights_golden.py made."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT
from tests.golden.weights_recipe import checksum, make_array, make_images, make_torch_array, probe_gradient
from tests.weights.oracles import (
    assert_same_arrays,
    in_released_layout,
    is_key_bias,
    outputs_and_gradients_of,
    outputs_of,
    unflatten,
)
from vit_jax.weights import ModelSpec, from_params, load, save
from vit_jax.weights.formats import FORMATS
from vit_jax.weights.identify import expected_shapes

GOLDEN = ROOT / "tests" / "golden"
NAMES = json.loads((GOLDEN / "weights_names.json").read_text())

# In units of the root mean square of each array. The oracle computes in float64, so that the differences are our
# rounding and, in hybrids, the other epsilons; measured on a CPU, they are a third of these or less.
GOLDEN_TOLERANCES = {"logits": 6e-6, "pre_logits": 3e-5, "encoded": 3e-5, "block_0": 3e-5, "others": 5e-5}
GOLDEN_GRADIENT_TOLERANCE = 5e-5


@pytest.fixture(autouse=True, scope="module")
def full_precision():
    # Accelerators multiply float32 in fewer bits unless told otherwise.
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "weights.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module", params=NAMES["models"])
def released(request, golden, tmp_path_factory):
    """A small model's arrays in the released layout, our weights from a file of them, and timm's results."""
    name = request.param
    arrays = {key: make_array(key, tuple(shape)) for key, shape in NAMES["models"][name]["arrays"].items()}
    assert checksum(arrays) == NAMES["models"][name]["checksum"], "the weights are not those of the golden file"
    path = tmp_path_factory.mktemp(name) / "released.npz"
    np.savez(path, **arrays)
    results = {key.removeprefix(name + "/"): array for key, array in golden.items() if key.startswith(name + "/")}
    return arrays, load(path, image_size=(64, 96)), results


@pytest.fixture(scope="module")
def ours(released):
    """Our outputs and gradients."""
    return outputs_and_gradients_of(released[1], make_images(2, 64, 96), (1, 4))


def test_a_released_file_gives_the_outputs_of_timm(released, ours):
    _, weights, expected = released
    for name, array in expected.items():
        if name == "gradient":
            continue
        actual = ours[0][name]
        actual = actual[..., ::32] if actual.ndim == 4 else actual  # the file has not all channels of feature maps
        assert actual.shape == array.shape, name
        error = np.abs(actual - array).max() / np.sqrt(np.mean(array**2))
        print(f"{weights.spec.name:<15} {name:<12} {error:.1e}")
        tolerance = GOLDEN_TOLERANCES.get(name, GOLDEN_TOLERANCES["others"])
        assert error <= tolerance, f"{name} is off by {error:.2g}"


def test_gradients_of_a_released_file_match_timm(released, ours, tmp_path):
    arrays, weights, expected = released
    gradients = in_released_layout(weights, ours[1], tmp_path / "gradients.npz")
    assert gradients.keys() == arrays.keys()
    worst = 0.0
    for name, (norm, product) in zip(sorted(arrays), expected["gradient"], strict=True):
        our_norm, our_product = probe_gradient(name, gradients[name])
        if is_key_bias(name):
            assert max(norm, our_norm) < 1e-6, name
            continue
        # With a direction of elements of variance 1 the product is of the order of the gradient's norm.
        error = max(abs(our_norm - norm), abs(our_product - product)) / norm
        worst = max(worst, error)
        assert error <= GOLDEN_GRADIENT_TOLERANCE, f"{name} is off by {error:.2g}"
    print(f"{weights.spec.name:<15} gradients    {worst:.1e}")


def test_a_released_file_is_written_as_timms_loader_reads_it(released, tmp_path):
    arrays, weights, _ = released
    with np.load(save(weights, tmp_path / "ours.npz")) as file:
        assert_same_arrays(dict(file), arrays)


def test_a_released_file_is_converted_as_by_timms_loader(released, request):
    _, weights, _ = released
    name = request.node.callspec.params["released"]
    state = FORMATS["timm_bit" if name == "bit" else "timm"].write(weights.arrays)
    assert checksum(state) == NAMES["models"][name]["state_dict_checksum"]


def test_a_folder_of_huggingface_gives_the_logits_of_transformers(golden, tmp_path):
    arrays = {name: make_torch_array(name, tuple(shape)) for name, shape in NAMES["huggingface"]["arrays"].items()}
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(NAMES["huggingface"]["config"]))
    weights = load(tmp_path)
    logits, _ = outputs_of(weights, make_images(2, 64, 64))
    expected = golden["huggingface/logits"]
    error = np.abs(logits - expected).max() / np.sqrt(np.mean(expected**2))
    print(f"huggingface     logits       {error:.1e}")
    assert error <= GOLDEN_TOLERANCES["logits"]
    assert_same_arrays(load_file(save(weights, tmp_path / "ours", to="huggingface")), arrays)


@pytest.mark.parametrize(
    "row",
    NAMES["state_dicts"],
    ids=lambda row: "-".join(
        [row["library"], row["model"], *map(str, row["overrides"].values()), str(row["num_classes"])]
    ),
)
def test_files_for_other_libraries_have_exactly_their_names_and_shapes(row, tmp_path):
    size, overrides = tuple(row["image_size"]), row["overrides"]
    shapes = expected_shapes(ModelSpec(row["model"], row["num_classes"], overrides), size)
    params = unflatten({name: np.zeros(shape, np.float16) for name, shape in shapes.items()})
    weights = from_params(row["model"], params, image_size=size, **overrides)
    written = load_file(save(weights, tmp_path / "folder", to=row["library"]))
    assert {name: list(array.shape) for name, array in written.items()} == row["arrays"]
