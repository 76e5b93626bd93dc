"""One line of the package, broken on purpose."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A change that a test must notice.

    Attributes:
      path: file to change, relative to the checkout.
      old: text that occurs exactly once in the file.
      new: what replaces it.
      tests: the tests that must fail, as pytest's node ids, separated by spaces.
      why: the promise that the change breaks.
    """

    path: str
    old: str
    new: str
    tests: str
    why: str
