import contextlib
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.data.record_files import serialized, write_tfrecord
from tests.data.test_prepare_input import photo
from vit_jax import sharding as partitioning
from vit_jax.data import pipeline
from vit_jax.data import transforms as images
from vit_jax.data.sources import open_source
from vit_jax.data.sources.base import NO_LABEL, BadRecordError
from vit_jax.data.sources.mixture import Mixture
from vit_jax.data.transforms import EvalTransform, TrainTransform
from vit_jax.errors import UserError

SIZE = 6


class NumberedSource:
    """Image i has its own noise, and label i, or that in `labels`. The images at `broken` cannot be read."""

    name, split, splits = "numbered", "train", ("train",)

    def __init__(self, length, broken=(), labels=None, max_labels=1, num_classes=None):
        self.class_names = None
        self.num_classes, self.max_labels = num_classes, max_labels
        self._length, self._broken, self._labels = length, broken, labels

    def __len__(self):
        return self._length

    def fingerprint(self):
        return f"numbered-{self._length}"

    def where(self, index):
        return f"image {index}"

    def __getitem__(self, index):
        if index in self._broken:
            raise BadRecordError(f"cannot read {self.where(index)}.")
        image = np.random.default_rng(index).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        return {"image": image, "label": self._labels[index] if self._labels else index}


def sharding(devices=1):
    return partitioning.batch_sharding(partitioning.make_mesh(jax.devices()[:devices]))


def train_batches(length=10, batch_size=4, seed=5, devices=1, source=None, **options):
    source = source or NumberedSource(length)
    return pipeline.TrainBatches(
        source, TrainTransform(SIZE), sharding(devices), batch_size=batch_size, seed=seed, **options
    )


def take(batches, count):
    return [{name: np.asarray(array) for name, array in next(batches).items()} for _ in range(count)]


def take_local(batches, count):
    with contextlib.closing(batches):
        return [batches.next_local() for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def test_memory_is_reused_only_without_views_of_it():
    memory = pipeline.BatchMemory()
    array = memory.empty(2, 3)
    array[:] = 1
    address, view = array.ctypes.data, array[1:, ::-1].T
    del array
    other = memory.empty(2, 3)
    other[:] = 2
    assert (view == 1).all()
    assert other.ctypes.data != address
    del view
    assert memory.empty(2, 3).ctypes.data == address
    assert memory.empty(5, 7).shape == (5, 7)  # of another size


def test_batches_that_are_kept_keep_their_images():
    kept = [next(batches) for batches in [train_batches(batch_size=8)] for _ in range(12)]
    assert_same(
        [{name: np.asarray(array) for name, array in batch.items()} for batch in kept],
        take(train_batches(batch_size=8), 12),
    )


def test_batches_are_uint8_images_and_int32_labels_on_the_devices():
    batch = next(train_batches(batch_size=8, devices=2))
    assert batch["image"].shape == (8, SIZE, SIZE, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    assert len(batch["image"].sharding.device_set) == 2


def test_every_epoch_has_each_example_once_in_a_new_order():
    labels = np.concatenate([batch["label"] for batch in take(train_batches(length=10, batch_size=4), 10)])
    epochs = labels.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_augmentation_differs_between_epochs():
    # A single example, looked at in one place of its batch: only the position in the stream can make a difference.
    images = {batch["image"][0].tobytes() for batch in take(train_batches(length=1, batch_size=1), 6)}
    assert len(images) > 3


def test_only_the_seed_determines_the_batches():
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


def test_state_counts_batches_handed_out_not_those_read_ahead():
    batches = train_batches(prefetch=3)
    take(batches, 2)
    resumed = train_batches(prefetch=1)
    resumed.set_state(batches.get_state())
    assert_same(take(resumed, 1), take(batches, 1))


def rows_of(process, processes, batch_size):
    return np.split(np.arange(batch_size), processes)[process]


@pytest.mark.parametrize("processes", [2, 4, 7])
def test_processes_share_each_global_batch_in_order(processes):
    whole = take_local(train_batches(batch_size=28), 3)
    parts = [take_local(train_batches(batch_size=28, rows=rows_of(i, processes, 28)), 3) for i in range(processes)]
    joined = [
        {name: np.concatenate([part[i][name] for part in parts]) for name in ("image", "label")} for i in range(3)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("processes", [1, 2, 4, 7])
@pytest.mark.parametrize(("length", "per_process"), [(1, 1), (5, 3), (28, 1), (30, 2), (97, 5)])
def test_every_process_count_sees_each_example_exactly_once_an_epoch(processes, length, per_process):
    batch_size, epochs = processes * per_process, 3
    steps = -(-epochs * length // batch_size)
    parts = [
        take_local(train_batches(length, batch_size, rows=rows_of(i, processes, batch_size), num_threads=1), steps)
        for i in range(processes)
    ]
    labels = np.concatenate([part[step]["label"] for step in range(steps) for part in parts])
    for epoch in labels[: epochs * length].reshape(epochs, length):
        assert sorted(epoch) == list(range(length))


@pytest.mark.parametrize("num_threads", [2, 16])
def test_number_of_threads_changes_nothing(num_threads):
    expected = take_local(train_batches(50, 16, num_threads=1), 4)
    assert_same(take_local(train_batches(50, 16, num_threads=num_threads, prefetch=3), 4), expected)


def test_rows_of_a_process_need_not_be_adjacent():
    whole = take_local(train_batches(batch_size=6), 2)
    part = take_local(train_batches(batch_size=6, rows=np.array([1, 2, 5])), 2)
    assert_same(part, [{name: batch[name][[1, 2, 5]] for name in ("image", "label")} for batch in whole])


def test_worker_processes_change_nothing_and_a_restart_may_have_another_number(caplog):
    expected = take(train_batches(30), 6)
    with contextlib.closing(train_batches(30, num_workers=2)) as batches:
        assert_same(take(batches, 3), expected[:3])
        state = batches.get_state()
    assert state["num_workers"] == 2
    with contextlib.closing(train_batches(30, num_workers=1)) as batches, caplog.at_level("INFO"):
        batches.set_state(state)
        assert "data.num_workers changed from 2 to 1" in caplog.text
        assert_same(take(batches, 3), expected[3:])


def test_worker_process_has_its_bad_records_counted_and_is_a_user_error_when_it_is_killed():
    source = NumberedSource(4, broken=(2,))
    with contextlib.closing(train_batches(source=source, max_bad_records=1, num_workers=1)) as batches:
        batches.next_local()
        assert batches.bad_records.count == 1
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(UserError, match=r"worker process of the input was killed.*data\.num_workers"):
            for _ in range(20):  # some are ready
                batches.next_local()


def test_worker_processes_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from tests.data.test_pipeline import train_batches\n"
        "if __name__ == '__main__':\n"
        "    batches = train_batches(30, num_workers=1)\n"
        "    batches.next_local()\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = pathlib.Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment, text=True) as parent:
        worker = pathlib.Path("/proc", parent.stdout.readline().strip())
        assert worker.exists()
        parent.kill()
    for _ in range(100):
        if not worker.exists() or "\nState:\tZ" in (worker / "status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"{worker} still runs")


def test_restore_in_a_huge_data_set_is_exact_and_its_state_small():
    source, batch_size, step = NumberedSource(14_000_000), 4, 1_000_000_000
    batches = train_batches(source=source, batch_size=batch_size)
    state = batches.get_state() | {"images": batch_size * step}
    assert len(json.dumps(state)) < 1000
    batches.set_state(state)
    (found,) = take(batches, 1)
    # Position by position, by what the pipeline is made of.
    order, random, transform = pipeline.IndexStream(source, 5), pipeline.PositionRandom(5), TrainTransform(SIZE)
    for i in range(batch_size):
        index = order[batch_size * step + i]
        assert found["label"][i] == index
        expected = transform(source[index]["image"], random.at(batch_size * step + i))
        np.testing.assert_array_equal(found["image"][i], expected)


def test_restart_with_a_fitting_batch_size_continues_with_the_next_example():
    batches = train_batches(batch_size=4)
    take(batches, 3)
    other = train_batches(batch_size=6)
    other.set_state(batches.get_state())
    np.testing.assert_array_equal(take(other, 1)[0]["image"][:4], take(batches, 1)[0]["image"])
    with pytest.raises(UserError, match="has seen 12 images, and no batch of 5 ends there"):
        train_batches(batch_size=5).set_state(train_batches(batch_size=4).get_state() | {"images": 12})


def test_bad_records_are_left_out_and_reported_up_to_the_limit(caplog):
    source = NumberedSource(8, broken=(3, 6))
    batches = train_batches(source=source, batch_size=8, max_bad_records=2)
    with caplog.at_level("WARNING"):
        batch = batches.next_local()
    assert sorted(batch["label"]) == [NO_LABEL, NO_LABEL, 0, 1, 2, 4, 5, 7]
    assert not batch["image"][batch["label"] == NO_LABEL].any()
    assert batches.bad_records.count == 2
    assert "cannot read image 3; skipped (1 of at most 2)" in caplog.text
    with pytest.raises(UserError, match=r"cannot read image 6\. .*More than data\.max_bad_records=1"):
        train_batches(source=source, batch_size=8, max_bad_records=1).next_local()


def test_bad_record_that_comes_in_each_epoch_is_counted_and_reported_once(caplog):
    batches = train_batches(source=NumberedSource(8, broken=(3, 6)), batch_size=8, max_bad_records=2)
    with caplog.at_level("WARNING"):
        take_local(batches, 5)
    assert batches.bad_records.count == 2
    assert caplog.text.count("skipped") == 2


def test_image_that_does_not_decode_is_a_bad_record_with_its_place():
    class Broken(NumberedSource):
        def __getitem__(self, index):
            return {"image": b"not an image", "label": index}

    with pytest.raises(UserError, match=r"cannot read image \d: (.|\n)*set data\.max_bad_records"):
        next(train_batches(source=Broken(4)))


def test_several_labels_fill_a_row_and_none_leave_it_empty():
    labels = [[2, 0], [], [1], NO_LABEL, 3]
    batches = train_batches(source=NumberedSource(5, labels=labels, max_labels=2), batch_size=5)
    batch = batches.next_local()
    assert batch["label"].shape == (5, 2)
    assert sorted(batch["label"].tolist()) == sorted([[2, 0], [-1, -1], [1, -1], [-1, -1], [3, -1]])


def test_more_labels_than_provided_for_are_refused():
    with pytest.raises(UserError, match=r"image 0 has 2 labels, but at most 1 .*data\.max_labels"):
        next(train_batches(source=NumberedSource(1, labels=[[0, 1]]), batch_size=1))


@pytest.mark.parametrize("label", [4, -2])
def test_impossible_label_is_refused(label):
    with pytest.raises(UserError, match=rf"image 0 has label {label}, but with 4 classes"):
        next(train_batches(source=NumberedSource(1, labels=[label], num_classes=4), batch_size=1))


def test_mixture_draws_by_weight_and_uses_each_source_once_before_repeating():
    first, second = NumberedSource(6, labels=[0] * 6), NumberedSource(9, labels=[1] * 9)
    mixture = Mixture([first, second], weights=[3, 1])
    order = pipeline.IndexStream(mixture, seed=2)
    drawn = [order[i] for i in range(240)]
    from_first, from_second = [i for i in drawn if i < 6], [i for i in drawn if i >= 6]
    assert len(from_first) == 180
    for epoch in np.reshape(from_first, (30, 6)):
        assert sorted(epoch) == list(range(6))
    for epoch in np.reshape(from_second[:54], (6, 9)):
        assert sorted(epoch) == list(range(6, 15))
    batch = train_batches(source=mixture, batch_size=8).next_local()
    assert batch["label"].tolist().count(0) == 6
    assert mixture.where(7) == "image 1"


def test_mixture_of_many_small_sets_permutes_each_once_an_epoch():
    pipeline._permutation.cache_clear()
    order = pipeline.IndexStream(Mixture([NumberedSource(50 + i) for i in range(20)], weights=[1] * 20), seed=2)
    for position in range(20 * 50):
        assert order[position] is not None
    assert pipeline._permutation.cache_info().misses == 20


def test_mixture_of_different_classes_or_impossible_weights_is_refused():
    with pytest.raises(UserError, match="different classes"):
        Mixture([NumberedSource(2, num_classes=2), NumberedSource(2, num_classes=3)], weights=[1, 1])
    with pytest.raises(UserError, match="more than 0"):
        Mixture([NumberedSource(2), NumberedSource(2)], weights=[1, 0])


def test_mixture_with_other_weights_is_another_data_set():
    parts = [NumberedSource(2), NumberedSource(3)]
    assert Mixture(parts, [1, 1]).fingerprint() == Mixture(parts, [2, 2]).fingerprint()
    assert Mixture(parts, [1, 1]).fingerprint() != Mixture(parts, [1, 2]).fingerprint()


def test_evaluation_counts_every_example_once_and_masks_the_padding():
    batches = pipeline.EvalBatches(NumberedSource(10), EvalTransform(SIZE), sharding(), batch_size=4)
    for _ in range(2):  # can be iterated again
        found = list(batches)
        assert len(found) == len(batches) == 3
        labels = np.concatenate([batch["label"] for batch in found])
        mask = np.concatenate([batch["mask"] for batch in found])
        assert labels[mask == 1].tolist() == list(range(10))
        assert mask.tolist() == [1] * 10 + [0] * 2


def test_evaluation_keeps_no_memory_when_it_is_over():
    batches = pipeline.EvalBatches(NumberedSource(30), EvalTransform(SIZE), sharding(), batch_size=4)
    assert sum(len(batch["mask"]) for batch in batches) == 32
    assert not batches._loader._memory._free


def test_evaluation_processes_share_all_examples(monkeypatch):
    monkeypatch.setattr(pipeline, "global_batch", lambda batch, *_: batch)
    seen = []
    for index in range(4):
        for batch in pipeline.EvalBatches(
            NumberedSource(10), EvalTransform(SIZE), sharding(), batch_size=8, rows=rows_of(index, 4, 8)
        ):
            seen += batch["label"][batch["mask"] == 1].tolist()
    assert sorted(seen) == list(range(10))


def test_bad_records_of_an_evaluation_have_no_label():
    source = NumberedSource(5, broken=(2,))
    batches = pipeline.EvalBatches(source, EvalTransform(SIZE), sharding(), batch_size=8, max_bad_records=1)
    for _ in range(2):  # counted once
        (batch,) = batches
        assert np.asarray(batch["label"])[:5].tolist() == [0, 1, NO_LABEL, 3, 4]
    with pytest.raises(UserError, match="cannot read image 2"):
        list(pipeline.EvalBatches(source, EvalTransform(SIZE), sharding(), batch_size=8))


def test_bad_record_reaches_the_caller():
    with pytest.raises(UserError, match="cannot read image 2"):
        next(train_batches(source=NumberedSource(4, broken=(2,))))


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


def test_each_image_is_turned_as_its_own_source_says_unless_the_transform_does(tmp_path):
    encoded = photo(5, 6)
    for name in ("cat", "dog"):
        (tmp_path / "folder" / "train" / name).mkdir(parents=True)
        (tmp_path / "folder" / "train" / name / "0.jpg").write_bytes(encoded)
    write_tfrecord(tmp_path / "records" / "x.tfrecord", [serialized(image=encoded, label=[0])] * 2)
    (tmp_path / "records" / "classes.txt").write_text("cat\ndog\n")
    folder = open_source(str(tmp_path / "folder"), "train[:50%]+train[50%:]")
    records = open_source(str(tmp_path / "records" / "x.tfrecord"), "all")
    mixture = Mixture([folder, records], [1, 1])
    upright, stored = (images.decode(encoded, exif_orientation=turn) for turn in (True, False))
    for turn, expected in ((None, [upright] * 2 + [stored] * 2), (True, [upright] * 4), (False, [stored] * 4)):
        for transform, random in (
            (EvalTransform(SIZE, exif_orientation=turn), False),
            (TrainTransform(SIZE, exif_orientation=turn), True),
        ):
            batch, bad = pipeline.BatchLoader(mixture, transform).load(range(4))
            generators = pipeline.PositionRandom(0)
            for index, image in enumerate(expected):
                seen = transform(image, generators.at(index)) if random else transform(image)
                np.testing.assert_array_equal(batch["image"][index], seen)
            assert not bad


def test_a_run_of_a_version_that_turned_no_image_resumes_only_without_turning(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.jpg").write_bytes(photo(5, 6))
    folder = open_source(str(tmp_path), "train[:50%]+train[50%:]")

    def batches(turn=None, source=folder):
        return pipeline.TrainBatches(
            source, TrainTransform(SIZE, exif_orientation=turn), sharding(), batch_size=2, seed=0
        )

    old = batches().get_state()
    batches().set_state(old)
    assert old.pop("exif_orientation") is True
    with pytest.raises(UserError, match=r"--config.data.exif_orientation=False --allow_config_change"):
        batches().set_state(old)
    with pytest.raises(UserError, match="EXIF orientation"):
        batches(source=Mixture([folder, folder], [1, 1])).set_state(
            {**old, "examples": Mixture([folder, folder], [1, 1]).fingerprint()}
        )
    batches(turn=False).set_state(old)
