"""Combines several data sets, drawn from by weight."""

from collections.abc import Sequence

from vit_jax.data.sources.base import Source, fingerprint_of
from vit_jax.data.sources.splits import SlicedSource
from vit_jax.errors import UserError


class Mixture(SlicedSource):
    """Sources, one after the other; `weights` tell the pipeline how often to draw from each.

    An epoch of a mixture has as many examples as all its sources together, but draws from each by its weight. Within a
    source, every example is used once before any is repeated.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        """Combines sources of the same classes.

        Args:
          sources: the parts.
          weights: share of the examples drawn from each; they need not sum to 1.

        Raises:
          UserError: there are no sources, a weight is not positive, or the classes differ.
        """
        if not sources or len(sources) != len(weights):
            raise UserError(f"a mixture takes a weight for each source; got {len(sources)} and {len(weights)}.")
        if not all(0 < weight < float("inf") for weight in weights):
            raise UserError(f"weights of a mixture must be more than 0, got {tuple(weights)}.")
        split = " + ".join(source.split for source in sources)
        super().__init__([(source, range(len(source))) for source in sources], split)
        self.name, self.splits = " + ".join(source.name for source in sources), (split,)
        self.starts = (0, *self._ends)
        self.weights = tuple(weight / sum(weights) for weight in weights)

    def fingerprint(self) -> str:
        """Changes with the sources' fingerprints and the weights."""
        return fingerprint_of([*(source.fingerprint() for source, _ in self.parts()), self.weights])
