import json

import jax
import numpy as np
import pytest

from vit_jax import partitioning
from vit_jax.data import pipeline
from vit_jax.data.images import EvalTransform, TrainTransform
from vit_jax.errors import UserError

SIZE = 6


class NumberedSource:
    """Image i has noise of its own, and label i."""

    name, split = "numbered", "train"

    def __init__(self, length, broken=None):
        self.class_names = [str(i) for i in range(length)]
        self._length, self._broken = length, broken

    def __len__(self):
        return self._length

    def fingerprint(self):
        return f"numbered-{self._length}"

    def __getitem__(self, index):
        if index == self._broken:
            raise UserError(f"image {index} is broken")
        return {"image": np.random.default_rng(index).integers(0, 256, (9, 7, 3), dtype=np.uint8), "label": index}


def sharding(devices=1):
    return partitioning.batch_sharding(partitioning.make_mesh(jax.devices()[:devices]))


def train_batches(length=10, batch_size=4, seed=5, devices=1, **options):
    return pipeline.TrainBatches(
        NumberedSource(length), TrainTransform(SIZE), sharding(devices), batch_size=batch_size, seed=seed, **options
    )


def take(batches, count):
    return [{name: np.asarray(array) for name, array in next(batches).items()} for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_batches_are_uint8_images_and_int32_labels_on_the_devices():
    batch = next(train_batches(batch_size=8, devices=8))
    assert batch["image"].shape == (8, SIZE, SIZE, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    assert len(batch["image"].sharding.device_set) == 8


def test_every_example_comes_once_an_epoch_in_another_order_each_time():
    labels = np.concatenate([batch["label"] for batch in take(train_batches(length=10, batch_size=4), 10)])
    epochs = labels.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_augmentation_differs_between_epochs():
    # A single example, looked at in one place of its batch: only the position in the stream can make a difference.
    images = {batch["image"][0].tobytes() for batch in take(train_batches(length=1, batch_size=1), 6)}
    assert len(images) > 3


def test_seed_decides_everything_and_number_of_threads_and_prefetch_nothing():
    first = take(train_batches(num_threads=1, prefetch=1), 6)
    assert_same(take(train_batches(num_threads=5, prefetch=4), 6), first)
    other = take(train_batches(seed=6), 6)
    assert any(not np.array_equal(a["image"], b["image"]) for a, b in zip(other, first, strict=True))


def test_restored_iterator_continues_exactly():
    batches = train_batches()
    take(batches, 7)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 5)
    resumed = train_batches()
    resumed.set_state(state)
    assert_same(take(resumed, 5), expected)
    batches.set_state(state)  # going back works too
    assert_same(take(batches, 5), expected)


def test_state_of_another_data_set_is_refused():
    state = train_batches(length=10).get_state()
    with pytest.raises(UserError, match="data set has changed"):
        train_batches(length=11).set_state(state)


def test_neighbouring_seeds_share_no_order_in_any_epoch():
    def orders(seed):
        labels = np.concatenate([batch["label"] for batch in take(train_batches(seed=seed, batch_size=10), 6)])
        return {tuple(epoch) for epoch in labels.reshape(6, 10)}

    assert not orders(0) & orders(1)


def test_state_is_that_of_the_batches_handed_out_not_of_those_read_ahead():
    batches = train_batches(prefetch=3)
    take(batches, 2)
    resumed = train_batches(prefetch=1)
    resumed.set_state(batches.get_state())
    assert_same(take(resumed, 1), take(batches, 1))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_global_batch_in_order(monkeypatch, processes):
    whole = take(train_batches(batch_size=8), 3)
    parts = []
    # Each process puts its own part on its own device; here they take turns in one process.
    for index in range(processes):
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(pipeline, "global_batch", lambda batch, _: batch)
        parts.append(take(train_batches(batch_size=8), 3))
    joined = [
        {name: np.concatenate([part[i][name] for part in parts]) for name in ("image", "label")} for i in range(3)
    ]
    assert_same(joined, whole)


def test_evaluation_counts_every_example_once_and_masks_the_padding():
    batches = pipeline.EvalBatches(NumberedSource(10), EvalTransform(SIZE), sharding(), batch_size=4)
    for _ in range(2):  # can be iterated again
        found = list(batches)
        assert len(found) == len(batches) == 3
        labels = np.concatenate([batch["label"] for batch in found])
        mask = np.concatenate([batch["mask"] for batch in found])
        assert labels[mask == 1].tolist() == list(range(10))
        assert mask.tolist() == [1] * 10 + [0] * 2


def test_evaluation_processes_share_all_examples(monkeypatch):
    seen = []
    for index in range(4):
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        monkeypatch.setattr(pipeline, "global_batch", lambda batch, _: batch)
        for batch in pipeline.EvalBatches(NumberedSource(10), EvalTransform(SIZE), sharding(), batch_size=8):
            seen += batch["label"][batch["mask"] == 1].tolist()
    assert sorted(seen) == list(range(10))


def test_error_in_a_source_reaches_the_caller():
    batches = pipeline.TrainBatches(NumberedSource(4, broken=2), TrainTransform(SIZE), sharding(), batch_size=4, seed=0)
    with pytest.raises(UserError, match="image 2 is broken"):
        next(batches)


def test_position_random_depends_on_seed_and_position_only():
    random = pipeline.PositionRandom(3)
    at_5 = random.at(5).random(7).tolist()
    random.at(6).integers(0, 10)  # leaves half of a 64-bit draw behind
    assert random.at(5).random(7).tolist() == at_5
    assert pipeline.PositionRandom(3).at(5).random(7).tolist() == at_5
    assert pipeline.PositionRandom(4).at(5).random(7).tolist() != at_5
    assert random.at(6).random(7).tolist() != at_5


def test_position_random_is_uniform_across_positions():
    random = pipeline.PositionRandom(0)
    first_draws = np.array([random.at(position).random() for position in range(10_000)])
    counts, _ = np.histogram(first_draws, bins=20, range=(0, 1))
    assert np.square(counts - 500).sum() / 500 < 43.8  # chi-squared, 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(first_draws[:-1], first_draws[1:])[0, 1]) < 0.04
