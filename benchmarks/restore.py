"""The cost of a restart in the middle of a long run, and a check that it is exact."""

import itertools
import json
import time
from typing import Any

RESTORE_EXAMPLES = 14_000_000  # as many images as ImageNet-21k has
RESTORE_STEP = 1_000_000
WALKED_STEPS = 1000


def restore(task: dict[str, Any]) -> dict[str, Any]:
    """Restores a late step of a large data set whose images are made from their number, and checks the batch."""
    import grain
    import jax
    import numpy as np

    from vit_jax.data.pipeline import PositionRandom, TrainBatches
    from vit_jax.data.transforms import TrainTransform
    from vit_jax.sharding import batch_sharding, make_mesh

    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)

    class Numbers:
        name = split = "numbers"
        splits, class_names, num_classes, max_labels = ("numbers",), None, RESTORE_EXAMPLES, 1

        def __len__(self) -> int:
            return RESTORE_EXAMPLES

        def __getitem__(self, index: int) -> dict[str, Any]:
            # Three bytes of the number, one a channel: no two images are equal.
            return {"image": noise + np.array([index & 255, index >> 8 & 255, index >> 16], np.uint8), "label": index}

        def fingerprint(self) -> str:
            return "numbers"

        def where(self, index: int) -> str:
            return f"number {index}"

    source: Any = Numbers()
    sharding, seed, batch_size = batch_sharding(make_mesh()), 0, task["batch_size"]

    def make(image_size: int) -> Any:
        transform = TrainTransform(image_size)
        return transform, TrainBatches(source, transform, sharding, batch_size=batch_size, seed=seed)

    def equal(batch: Any, other: Any) -> bool:
        return all(np.array_equal(batch[name], other[name]) for name in ("image", "label"))

    # As far as walking is affordable: a restored iterator returns the batch that another walked to.
    (_, walking), (_, restored) = make(8), make(8)
    for _ in itertools.islice(walking, WALKED_STEPS):
        pass
    state = json.loads(json.dumps(walking.get_state()))
    restored.set_state(state)
    equals_walked = equal(next(restored), next(walking))

    jax.block_until_ready(next(make(task["image_size"])[1]))  # the first batch of a process is slower
    first = RESTORE_STEP * batch_size
    start = time.perf_counter()
    transform, late = make(task["image_size"])
    late.set_state({**state, "images": first})
    set_seconds = time.perf_counter() - start
    batch = jax.block_until_ready(next(late))
    seconds = time.perf_counter() - start

    # Beyond: image by image from the definition of the stream, repeated here on purpose, without iterator or state. The
    # order is Grain's shuffle; crop and flip follow from the position's generator.
    order = grain.MapDataset.range(len(source)).shuffle(seed * 0x9E3779B1 % 2**32).repeat(2**31)
    labels = [int(order[first + i]) for i in range(batch_size)]
    random = PositionRandom(seed)
    images = [transform(source[label]["image"], random.at(first + i)) for i, label in enumerate(labels)]
    equals_defined = equal(batch, {"image": np.stack(images), "label": np.array(labels)})
    return {
        "examples": len(source),
        "step": RESTORE_STEP,
        "set_state_seconds": set_seconds,
        "restore_seconds": seconds,
        "state_bytes": len(json.dumps(late.get_state())),
        "equals_defined": equals_defined,
        "equals_walked": equals_walked,
        "is_exact": equals_defined and equals_walked,
    }
