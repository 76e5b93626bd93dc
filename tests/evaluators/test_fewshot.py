"""Features by name, and the few-shot evaluation on them."""

import contextlib
import functools
import json

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import multiprocess
from tests.conftest import DEVICES
from vit_jax import sharding
from vit_jax.data import transforms as images
from vit_jax.data.sources import ImageFolderSource, open_source
from vit_jax.data.sources.base import NO_LABEL, BadRecordError
from vit_jax.data.transforms import EvalTransform
from vit_jax.errors import UserError
from vit_jax.evaluators.evaluator_type import EvalData, Setup
from vit_jax.evaluators.features import FeatureExtractor, representation_shapes
from vit_jax.evaluators.fewshot import FewShot, draw_shots, read_labels
from vit_jax.evaluators.registry import complete
from vit_jax.models import create_model
from vit_jax.models.layers import normalize_images
from vit_jax.train_step import TrainState

CLASSES, SIZE = 4, 8


class Images:
    """Encoded pictures whose colour tells the class, with noise."""

    name, splits, class_names, num_classes, max_labels = "pictures", ("a",), ["ant", "bee", "cat", "dog"], CLASSES, 1

    def __init__(self, split, length, labels=None, unreadable=(), turned=0, unlabelled=()):
        self.split, self._length, self._labels, self._unreadable = split, length, labels, unreadable
        self._unlabelled = unlabelled
        self._turned = turned  # how far labels are from what the pictures show
        self.read = []

    def __len__(self):
        return self._length

    def shown(self, index):
        return index * 7 % CLASSES if self._labels is None else self._labels[index]

    def label(self, index):
        if index in self._unlabelled:
            return NO_LABEL
        return (self.shown(index) + self._turned) % CLASSES if self._turned else self.shown(index)

    def pixels(self, index):
        rng = np.random.default_rng([index, len(self.split)])
        colour = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [120, 120, 120]])[self.shown(index)]
        noise = rng.integers(-110, 110, (SIZE, SIZE, 3)) + rng.integers(-80, 80, 3)
        return (colour + noise).clip(0, 255).astype(np.uint8)

    def __getitem__(self, index):
        self.read.append(index)
        if index in self._unreadable:
            raise BadRecordError(f"cannot read picture {index}.")
        image = cv2.imencode(".png", self.pixels(index)[..., ::-1])[1].tobytes()
        return {"image": image, "label": self.label(index)}

    def fingerprint(self):
        return self.split

    def where(self, index):
        return f"picture {index}"


class Model(nn.Module):
    """Compiles in no time; images -> (logits, intermediates) with and without positions."""

    @nn.compact
    def __call__(self, images, *, train=False):
        embedded = nn.Conv(8, (4, 4), (4, 4), padding="VALID")(images)
        encoded = nn.tanh(nn.Dense(8)(embedded.reshape(len(images), -1, 8)))
        pre_logits = encoded[:, 0]
        intermediates = {"block_0": embedded.astype(jnp.bfloat16), "encoded": encoded, "pre_logits": pre_logits}
        return nn.Dense(2)(pre_logits), intermediates


def random_state(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), shapes)
    return TrainState(step=0, params=params, opt_state=(), rng=None)


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def state(model):
    return random_state(model)


@pytest.fixture(scope="module")
def vit():
    return create_model("ViT-Ti/4", num_classes=2, num_layers=2, hidden_dim=8, mlp_dim=8, num_heads=2)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module")
def outputs(model, state):
    """Intermediates of all pictures of a source."""
    apply = jax.jit(lambda images: model.apply({"params": state.params}, normalize_images(images))[1])

    @functools.cache
    def of(split, length):
        source = Images(split, length)
        return jax.device_get(apply(np.stack([source.pixels(index) for index in range(length)])))

    return lambda source: of(source.split, len(source))


def extractor(model, representations, on, batch_size=16, size=SIZE):
    return FeatureExtractor(Setup(model, on, None, EvalTransform(size), batch_size=batch_size), representations)


# Features.


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 8), (8, 16), (8, 5)])
def test_features_have_each_example_once_in_the_order_of_the_source(model, state, outputs, devices, batch_size):
    source, on = Images("test", 21), sharding.make_mesh(DEVICES[:devices])
    found = extractor(model, ("pre_logits", "encoded"), on, batch_size)(state.params, source)
    expected = outputs(source)
    assert found.labels.tolist() == [source.label(index) for index in range(21)]
    np.testing.assert_allclose(found.arrays["pre_logits"], expected["pre_logits"], rtol=1e-5, atol=1e-5)
    # Tokens are averaged.
    np.testing.assert_allclose(found.arrays["encoded"], expected["encoded"].mean(axis=1), rtol=1e-5, atol=1e-5)
    assert {array.dtype for array in found.arrays.values()} == {np.dtype(np.float32)}


def test_features_of_many_batches_are_in_order(model, state, mesh):
    source = Images("test", 45)
    whole = extractor(model, ["pre_logits"], mesh, 45)(state.params, source)
    parts = extractor(model, ["pre_logits"], mesh, 4)(state.params, source)
    np.testing.assert_allclose(parts.arrays["pre_logits"], whole.arrays["pre_logits"], rtol=1e-5, atol=1e-5)


def test_feature_maps_are_averaged_over_positions_in_float32(model, state, mesh, outputs):
    source = Images("test", 21)
    found = extractor(model, ["block_0"], mesh, 24)(state.params, source).arrays["block_0"]
    maps = outputs(source)["block_0"]
    assert (maps.shape, maps.dtype) == ((21, 2, 2, 8), jnp.bfloat16)
    np.testing.assert_allclose(found, maps.astype(np.float32).mean(axis=(1, 2)), rtol=1e-5, atol=1e-5)


def test_representations_are_all_intermediates_but_attention(vit):
    shapes = representation_shapes(vit.clone(return_attention=True), SIZE)
    assert set(shapes) == {"patch_embeddings", "encoder_input", "block_0", "block_1", "encoded", "pre_logits"}
    assert shapes["pre_logits"] == (8,)
    assert shapes["encoded"] == (5, 8)


def test_unknown_representation_is_an_error_with_the_nearest_name(model, mesh):
    with pytest.raises(UserError, match=r"unknown representation 'prelogits'. Did you mean 'pre_logits'\?"):
        extractor(model, ["prelogits"], mesh)
    for names in ("pre_logits", (), ("encoded", "encoded")):
        with pytest.raises(UserError, match="one or more different names"):
            extractor(model, names, mesh)


def test_parameters_for_another_image_size_are_an_error(vit, mesh):
    extract = extractor(vit, ["pre_logits"], mesh, size=12)
    with pytest.raises(UserError, match="the parameters are not for images of 12 x 12 pixels"):
        extract(random_state(vit).params, Images("test", 3))


# What is drawn.


def test_draws_match_the_released_evaluator_and_fewer_shots_are_a_subset():
    labels = np.random.default_rng(5).integers(3, size=40)
    labels[7] = NO_LABEL
    for seed in (0, 1):
        generator = np.random.default_rng(seed)
        permuted = [generator.permutation(np.where(labels == label)[0]) for label in range(3)]
        for shots in (1, 4):
            expected = np.concatenate([each[:shots] for each in permuted])
            assert draw_shots(labels, 3, shots, seed).tolist() == expected.tolist()
    assert set(draw_shots(labels, 3, 1, 0)) < set(draw_shots(labels, 3, 4, 0))


def test_draws_do_not_change_between_versions():
    # NumPy may change its generators; then so would published numbers.
    assert draw_shots(np.arange(30) % 3, 3, 2, seed=0).tolist() == [12, 18, 7, 28, 17, 14]


def test_labels_are_read_without_decoding(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", None)
    source = Images("pool", 30)
    assert read_labels(source).tolist() == [source.label(index) for index in range(30)]


def test_labels_that_a_source_knows_are_not_read():
    source = Images("pool", 30)
    source.labels = lambda: np.ones(30, int)
    assert read_labels(source).tolist() == [1] * 30
    assert not source.read


@pytest.mark.parametrize("split", ["all", "all[25%:]+all[:10%]"])
def test_a_folder_knows_its_labels(tmp_path, split, monkeypatch):
    for number in range(20):
        path = tmp_path / f"{number % 3}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    source = open_source(str(tmp_path), split)
    expected = [source[index]["label"] for index in range(len(source))]
    monkeypatch.setattr(ImageFolderSource, "__getitem__", None)
    assert read_labels(source).tolist() == expected


def few_shot(model, pool, test, on, *, validation=None, take_all=False, max_bad_records=0, transform=None, **fields):
    setup = Setup(model, on, None, transform or EvalTransform(SIZE), batch_size=16, max_bad_records=max_bad_records)
    entry = complete({"type": "fewshot", "crop_from": setup.transform.image_size, **fields}, "fewshot")
    return FewShot(entry, EvalData(test, pool=pool, validation=validation), setup, take_all=take_all)


@pytest.fixture(scope="module")
def by_hand(outputs):
    """Accuracy of a plain solution."""

    def accuracy(pool, test, shots, seed, l2, whiten=True, bias=100.0):
        labels = np.array([pool.label(index) for index in range(len(pool))])
        rows = draw_shots(labels, CLASSES, shots, seed)
        train, x = (outputs(source)["pre_logits"].astype(np.float64) for source in (pool, test))
        train = train[rows]
        mean, std = (train.mean(axis=0), train.std(axis=0) + 1e-5) if whiten else (0, 1)
        train, x = (np.insert((array - mean) / std, 0, bias, axis=1) for array in (train, x))
        targets = 2 * np.eye(CLASSES)[labels[rows]] - 1
        weights = np.linalg.solve(train.T @ train + l2 * np.eye(len(train.T)), train.T @ targets)
        true = np.array([test.label(index) for index in range(len(test))])
        return np.mean(((x @ weights).argmax(axis=1) == true)[true != NO_LABEL])

    return accuracy


@pytest.mark.parametrize("devices", [1, 8])
def test_accuracies_match_plain_solutions(model, state, by_hand, devices):
    pool, test = Images("pool", 60), Images("test", 83)
    on = sharding.make_mesh(DEVICES[:devices])
    evaluator = few_shot(model, pool, test, on, shots=(1, 5), l2=(16.0,), seeds=3)
    found = dict(evaluator.run(state))
    for shots in (1, 5):
        expected = [by_hand(pool, test, shots, seed, 16.0) for seed in range(3)]
        assert found[f"pre_logits/{shots}shot"] == pytest.approx(np.mean(expected))
        assert found[f"pre_logits/{shots}shot_std"] == pytest.approx(np.std(expected, ddof=1))
        assert 0.3 < np.mean(expected) < 0.98
    assert list(found) == [*(f"pre_logits/{name}" for name in ("1shot", "1shot_std", "5shot", "5shot_std")), "examples"]
    assert found["examples"] == 83


def test_only_the_images_drawn_go_through_the_model_and_each_once(model, state, mesh, monkeypatch):
    decoded = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda image, **how: decoded.append(image) or decode(image, **how))
    pool, test = Images("pool", 200), Images("test", 20)
    evaluator = few_shot(model, pool, test, mesh, shots=(1, 3), seeds=2)
    assert not decoded
    pool.read.clear()
    dict(evaluator.run(state))
    labels = read_labels(Images("pool", 200))
    drawn = np.unique(np.concatenate([draw_shots(labels, CLASSES, 3, seed) for seed in range(2)]))
    assert sorted(pool.read) == drawn.tolist()
    assert len(decoded) == len(drawn) + 20


def test_several_l2_values_without_validation_have_no_overall_result(model, state, mesh, by_hand):
    pool, test = Images("pool", 60), Images("test", 83)
    evaluator = few_shot(model, pool, test, mesh, shots=(5,), l2=(1.0, 2.0**20), seeds=[4])
    found = dict(evaluator.run(state))
    assert list(found) == ["pre_logits/5shot/l2=1", "pre_logits/5shot/l2=1.04858e+06", "examples"]
    assert found["pre_logits/5shot/l2=1"] == by_hand(pool, test, 5, 4, 1.0)


def test_l2_is_chosen_on_the_validation_split(model, state, mesh, by_hand):
    pool, test = Images("pool", 60), Images("test", 83)
    grid = (1e-4, 1.0, 2.0**20)
    chosen = []
    for validation in (Images("v", 50), Images("v", 50, turned=2)):  # where wrong is right, another l2 is the best
        evaluator = few_shot(model, pool, test, mesh, validation=validation, shots=(5,), l2=grid, seeds=2)
        found = dict(evaluator.run(state))
        on_validation = [np.mean([by_hand(pool, validation, 5, seed, l2) for seed in range(2)]) for l2 in grid]
        best = grid[int(np.argmax(on_validation))]
        chosen.append(best)
        assert found["pre_logits/5shot_l2"] == best
        assert found["pre_logits/5shot"] == found[f"pre_logits/5shot/l2={best:g}"]
        assert found["pre_logits/5shot_std"] == found[f"pre_logits/5shot/l2={best:g}_std"]
    assert chosen[0] != chosen[1]


def test_several_representations_at_once(model, state, mesh):
    pool, test = Images("pool", 60), Images("test", 40)
    names = ("pre_logits", "encoded", "block_0")
    together = few_shot(model, pool, test, mesh, shots=(3,), seeds=1, representations=names)
    found = dict(together.run(state))
    assert list(found) == [*(f"{name}/3shot" for name in names), "examples"]
    alone = few_shot(model, pool, test, mesh, shots=(3,), seeds=1, representations=names[1:2])
    assert dict(alone.run(state)) == {"encoded/3shot": found["encoded/3shot"], "examples": 40}


def test_whitening_and_constant_feature_follow_the_options(model, state, mesh, by_hand):
    # (With as many examples of each class, the constant feature makes a difference only without whitening.)
    pool, test = Images("pool", 60), Images("test", 83)
    forms = [{"whiten": True, "bias": 100.0}, {"whiten": False, "bias": 100.0}, {"whiten": False, "bias": 0.0}]
    expected = [by_hand(pool, test, 5, 3, 1.0, **form) for form in forms]
    assert len(set(expected)) == 3
    for form, accuracy in zip(forms[1:], expected[1:], strict=True):
        evaluator = few_shot(model, pool, test, mesh, shots=(5,), l2=(1.0,), seeds=[3], **form)
        assert dict(evaluator.run(state))["pre_logits/5shot"] == accuracy


def test_averaged_parameters_are_evaluated_if_there_are_any(model, state, mesh, by_hand):
    pool, test = Images("pool", 60), Images("test", 83)
    evaluator = few_shot(model, pool, test, mesh, shots=(5,), l2=(1.0,), seeds=[4])
    averaged = state.replace(params=jax.tree.map(np.zeros_like, state.params), average=state.params)
    assert dict(evaluator.run(averaged))["pre_logits/5shot"] == by_hand(pool, test, 5, 4, 1.0)


@pytest.mark.parametrize(
    ("transform", "fields", "expected"),
    [
        # As in the released evaluator.
        (EvalTransform(224), {"crop_from": None}, EvalTransform(224, resize="bilinear", crop_from=256)),
        (
            EvalTransform(8, resize="area"),
            {"image_size": 32, "crop_from": 40},
            EvalTransform(32, resize="area", crop_from=40),
        ),
    ],
)
def test_images_are_resized_and_cropped_as_configured(model, mesh, transform, fields, expected):
    evaluator = few_shot(model, Images("pool", 8), Images("test", 8), mesh, shots=(1,), transform=transform, **fields)
    assert evaluator._extract._setup.transform == expected


def test_images_without_label_do_not_count(model, state, mesh, by_hand):
    pool, test = Images("pool", 60, unlabelled=range(0, 60, 7)), Images("test", 83, unlabelled=range(0, 83, 3))
    evaluator = few_shot(model, pool, test, mesh, shots=(5,), l2=(1.0,), seeds=[4])
    found = dict(evaluator.run(state))["pre_logits/5shot"]
    assert found == by_hand(pool, test, 5, 4, 1.0) != by_hand(pool, Images("test", 83), 5, 4, 1.0)


def test_unreadable_images_are_left_out_if_that_is_allowed(model, state, mesh):
    test = Images("test", 40)
    shots = {"shots": (3,), "seeds": 1}
    drawn = draw_shots(read_labels(Images("pool", 60)), CLASSES, 3, 0)
    pool = Images("pool", 60)
    evaluator = few_shot(model, pool, test, mesh, max_bad_records=3, **shots)
    pool._unreadable = drawn[-3:]  # damaged after their labels were read: all of the last class
    assert 0.3 < dict(evaluator.run(state))["pre_logits/3shot"] <= 0.75
    evaluator = few_shot(model, Images("pool", 60), test, mesh, **shots)
    evaluator._drawn._parts[0][0]._unreadable = (drawn[0],)
    with pytest.raises(UserError, match=f"cannot read picture {drawn[0]}"):
        dict(evaluator.run(state))
    with pytest.raises(UserError, match="cannot read picture 5"):
        few_shot(model, Images("pool", 60, unreadable=(5,)), test, mesh, **shots)


# Bad input, found before anything is computed.


def test_more_shots_than_a_class_has_are_an_error_that_names_it(model, mesh):
    pool = Images("pool", 32, [0, 1, 2, 3, 0, 1, 3, 3] * 4)
    with pytest.raises(
        UserError, match=r"class 2 \('cat'\) of pictures/pool has 4 examples, fewer than 9 shots, and 2"
    ):
        few_shot(model, pool, Images("test", 8), mesh, shots=(1, 9))


def test_take_all_uses_all_examples_of_small_classes(model, state, mesh):
    pool, test = Images("pool", 32, [0, 1, 2, 3, 0, 1, 3, 3] * 4), Images("test", 40)
    evaluator = few_shot(model, pool, test, mesh, shots=(9,), seeds=1, take_all=True)
    pool.read.clear()
    dict(evaluator.run(state))
    assert len(pool.read) == 8 + 8 + 4 + 9


def test_class_without_example_is_an_error_even_with_take_all(model, mesh):
    pool = Images("pool", 20, [0, 3] * 10)
    with pytest.raises(UserError, match=r"class 1 \('bee'\) of pictures/pool has no example, nor have 1 other classes"):
        few_shot(model, pool, Images("test", 8), mesh, shots=(1,), take_all=True)
    with pytest.raises(UserError, match="no image of pictures/pool has a label"):
        few_shot(model, Images("pool", 3, [NO_LABEL] * 3), Images("test", 8), mesh)


def test_label_that_is_not_a_class_is_an_error(model, mesh):
    pool = Images("pool", 8)
    pool.labels = lambda: np.array([0, 1, 2, 3, 4, 0, 1, 2])
    with pytest.raises(UserError, match="pictures/pool has label 4, but there are 4 classes: labels are 0 to 3"):
        few_shot(model, pool, Images("test", 8), mesh, shots=(1,))


def test_sources_without_class_counts_have_the_classes_of_their_labels(model, mesh):
    pool, test = Images("pool", 6, [0, 0, 1, 2, 2, 2]), Images("test", 8)
    for source in (pool, test):
        source.num_classes = source.class_names = None
    with pytest.raises(UserError, match="class 1 of pictures/pool has 1 example, fewer than 2 shots"):
        few_shot(model, pool, test, mesh, shots=(2,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"shots": shots}, "shots must be a tuple of different")
            for shots in ((), (0, 1), (2, 2), (1.5,), (True,), 5)
        ),
        *(
            ({"l2": l2}, "l2 must be a tuple of different")
            for l2 in ((), (1.0, 0.0), (1.0, 1.0 + 1e-9), ("1",), 1024.0)
        ),
        *(({"seeds": seeds}, "seeds must be a tuple of different") for seeds in (0, -3, (-1,), (1, 1), (0.5,), 1.5)),
        ({"representations": ("logit",)}, "unknown representation 'logit'"),
    ],
)
def test_options_out_of_range_are_refused(model, mesh, changes, message):
    with pytest.raises(UserError, match=message):
        few_shot(model, Images("pool", 8), Images("test", 8), mesh, **changes)


def test_splits_of_other_classes_or_with_several_labels_are_refused(model, mesh):
    pool, other = Images("pool", 8), Images("test", 8)
    other.class_names = ["ant", "bee", "cow", "dog"]
    with pytest.raises(UserError, match="pictures/pool and pictures/test have different classes"):
        few_shot(model, pool, other, mesh)
    several = Images("test", 8)
    several.max_labels = 3
    for splits in ((pool, several), (several, pool)):
        with pytest.raises(UserError, match="pictures/test may have up to 3 labels"):
            few_shot(model, *splits, mesh)


L2_VALUES = {"l2": (1e-6, 1024.0)}


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (("train", "train"), {}, "'train' of digits, to test on, shares 1,437 of its 1,437 examples with 'train'"),
        (("train[:90%]", "test+train[80%:]"), {}, "shares 143 of its 647 examples with .* to draw from"),
        (("all", "test[:7]"), {}, "'test.:7.' of digits, to test on, shares 7 of its 7 examples with 'all'"),
        (
            ("train", "test", "train[:30%]"),
            L2_VALUES,
            "to choose l2 on, shares 431 of .* to draw from. Each",
        ),
        (("train", "test", "test[50%:]"), L2_VALUES, "to test on, shares 180 of its 360 examples with .* to choose l2"),
        (("train", "test[:50%]", "test[50%:]"), L2_VALUES, None),
        (("train", "test", "train[:30%]"), {}, None),  # nothing is chosen
    ],
)
def test_splits_that_share_examples_are_refused(model, mesh, splits, options, message):
    pool, test, *validation = (open_source("digits", split) for split in splits)
    options = {"shots": (1,), "validation": validation[0] if validation else None, **options}
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        few_shot(model, pool, test, mesh, **options)


# Several processes.

PROGRAM = """\
import json
from tests.evaluators.test_fewshot import evaluate_pictures
from vit_jax.multihost import processes
processes.initialize()
print("found", json.dumps(evaluate_pictures()), flush=True)
processes.shutdown()
"""


def evaluate_pictures():
    model = Model()
    evaluator = few_shot(model, Images("pool", 60), Images("test", 83), sharding.make_mesh(), shots=(2, 5))
    return dict(evaluator.run(random_state(model)))


def test_two_processes_find_the_same_as_one(tmp_path):
    with multiprocess.start(PROGRAM, tmp_path) as processes:
        ended = processes.all_ended()
    assert [each.returncode for each in ended] == [0, 0], ended
    found = [json.loads(each.output.split("found ", 1)[1].splitlines()[0]) for each in ended]
    assert found[0] == found[1] == evaluate_pictures()
    assert 0.3 < found[0]["pre_logits/5shot"] < 0.98
