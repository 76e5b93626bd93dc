"""Representations of all images of a source: a model's named intermediates, as arrays on the host."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_jax.console import Tracked
from vit_jax.data.pipeline import EvalBatches
from vit_jax.data.sources.base import Source
from vit_jax.data.transforms import EvalTransform
from vit_jax.errors import UserError, unknown_name
from vit_jax.models.layers import normalize_images
from vit_jax.sharding import DATA_AXIS, batch_sharding, replicated, within

_BATCHES_AHEAD = 4
_ATTENTION = "attention_"  # weights between tokens, which are not about an image's content


@dataclasses.dataclass(frozen=True)
class Features:
    """What a model makes of a source's examples, in the order of the source.

    Attributes:
      arrays: by representation, float32 `[examples, dim]`.
      labels: int32 `[examples]`, or `[examples, max_labels]` if the source has several; `NO_LABEL` where there is none,
        and where the image could not be read.
    """

    arrays: dict[str, np.ndarray]
    labels: np.ndarray


def representation_shapes(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    """Names of a model's intermediates that can be extracted, and their shapes for one image. Computes nothing.

    Args:
      model: images -> (logits, intermediates).
      image_size: side of the images, in pixels.
    """
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    (_, out), _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=False), images)
    return {name: tuple(array.shape[1:]) for name, array in out.items() if not name.startswith(_ATTENTION)}


class FeatureExtractor:
    """Extracts representations; compiled once for all sources.

    What has positions is averaged over them: tokens `[batch, tokens, dim]` (the class token among them) and feature
    maps `[batch, rows, columns, dim]`.
    """

    def __init__(
        self,
        model: nn.Module,
        representations: Sequence[str],
        mesh: Mesh,
        *,
        image_size: int,
        shardings: Any = None,
    ):
        """Compiles at the first call.

        Args:
          model: images -> (logits, intermediates).
          representations: names of intermediates, such as "pre_logits", "encoded" or "block_5".
          mesh: the devices of all processes.
          image_size: side of the images, in pixels.
          shardings: of the parameters; None: replicated.

        Raises:
          UserError: the model has no such intermediate, or none is asked for, or one twice.
        """
        if isinstance(representations, str) or not representations or len({*representations}) < len(representations):
            raise UserError(
                f"representations are one or more different names, such as ('pre_logits',); got {representations!r}."
            )
        known = representation_shapes(model, image_size)
        for name in representations:
            if name not in known:
                raise unknown_name("representation", name, known)
        self._dims = {name: known[name][-1] for name in representations}
        self._mesh, self._image_size = mesh, image_size

        def extract(params: Any, batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
            _, out = model.apply({"params": params}, normalize_images(batch["image"]), train=False)
            pooled = {
                name: out[name].astype(jnp.float32).mean(axis=tuple(range(1, out[name].ndim - 1)))
                for name in self._dims
            }
            return pooled, batch["label"]

        everywhere = replicated(mesh)
        self._extract = jax.jit(
            within(mesh, extract),
            in_shardings=(shardings or everywhere, batch_sharding(mesh)),
            out_shardings=everywhere,  # each process can read but what lies on its own devices
        )

    def __call__(
        self,
        params: Any,
        source: Source,
        transform: EvalTransform,
        *,
        batch_size: int,
        num_threads: int | None = None,
        max_bad_records: int = 0,
        before_each_batch: Callable[[], None] = lambda: None,
    ) -> Features:
        """Runs the model over each example of a source once. All processes must call it, and all get all features.

        The host does not wait for a batch before it hands over the next ones.

        Args:
          params: the model's parameters.
          source: the images, the same in all processes; each process decodes those of its own devices.
          transform: what is done to each image.
          batch_size: images at once over all devices; rounded up to a multiple of those that share a batch.
          num_threads: that decode; None: one for each core.
          max_bad_records: examples that may be left without label because they cannot be read.
          before_each_batch: called between batches; may raise to end the extraction.

        Raises:
          UserError: the parameters are not for images of this size, or more examples cannot be read.
        """
        sharing = self._mesh.shape[DATA_AXIS]
        batch_size = -(-batch_size // sharing) * sharing
        batches = EvalBatches(
            source,
            transform,
            batch_sharding(self._mesh),
            batch_size=batch_size,
            num_threads=num_threads,
            max_bad_records=max_bad_records,
        )
        arrays = {name: np.empty((len(source), dim), np.float32) for name, dim in self._dims.items()}
        labels = np.empty((len(source), source.max_labels) if source.max_labels > 1 else len(source), np.int32)

        def keep(start: int, results: tuple[dict[str, jax.Array], jax.Array]) -> None:
            outputs, given = jax.device_get(results)
            stop = min(start + batch_size, len(source))  # the last batch is filled up
            labels[start:stop] = given[: stop - start]
            for name, output in outputs.items():
                arrays[name][start:stop] = output[: stop - start]

        dispatched: collections.deque[tuple[int, Any]] = collections.deque()
        what = f"features of {source.name}/{source.split}"
        for number, batch in enumerate(Tracked(batches, what, batch_size, before_each=before_each_batch)):
            try:
                results = self._extract(params, {"image": batch["image"], "label": batch["label"]})
            except flax.errors.ScopeParamShapeError as error:
                raise UserError(
                    f"the parameters are not for images of {self._image_size} x {self._image_size} pixels: {error}\n"
                    "Use the size of training, or weights whose position embeddings were interpolated to this one."
                ) from error
            for array in jax.tree.leaves(results):
                array.copy_to_host_async()
            dispatched.append((number * batch_size, results))
            if len(dispatched) > _BATCHES_AHEAD:
                keep(*dispatched.popleft())
        for each in dispatched:
            keep(*each)
        return Features(arrays, labels)
