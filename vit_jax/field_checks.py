"""Checks for the fields of a config: each accepts or refuses a value, and describes what it expects."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Check(Protocol):
    """The values that a field takes. `expected` completes "<field> must be ..."."""

    @property
    def expected(self) -> str: ...  # noqa: D102
    @property
    def accepts(self) -> Callable[[Any], bool]: ...  # noqa: D102


MOST_FLOAT = float(np.finfo(np.float32).max)


def as_float32(number: float) -> float:
    """The number as float32 rounds it; infinite if it is too large."""
    with np.errstate(over="ignore"):
        return float(np.float32(number))


@dataclasses.dataclass(frozen=True)
class Number:
    """A number in a range. A fraction must also be in the range after rounding to float32, which computes with it."""

    low: float  # smallest value
    high: float = MOST_FLOAT  # largest value; by default any finite one
    whole: bool = False  # whether fractions are refused
    open_low: bool = False  # whether `low` itself is refused
    open_high: bool = False  # whether `high` itself is refused
    also: float | None = None  # an accepted value outside the range
    hint: str = ""  # ends the message

    @property
    def expected(self) -> str:
        """The range in words."""
        parts = []
        if self.low > -MOST_FLOAT:
            parts.append(f"{'more than' if self.open_low else 'at least'} {self.low:,}")
        if self.high < MOST_FLOAT:
            parts.append(f"{'less than' if self.open_high else 'at most'} {self.high:,}")
        texts = [" and ".join(parts)] if parts else []
        texts += ["a whole number"] if self.whole else [] if len(parts) == 2 else ["a finite number"]
        also = f", or {self.also:g}" if self.also is not None else ""
        return ", ".join(texts) + also + self.hint

    def accepts(self, value: Any) -> bool:
        """Whether a value is such a number. A bool is not."""
        if isinstance(value, bool) or not isinstance(value, numbers.Integral if self.whole else numbers.Real):
            return False
        if value == self.also:
            return True
        return self.contains(value) and (self.whole or self.contains(as_float32(float(value))))

    def contains(self, number: Any) -> bool:
        """Whether an unrounded number is in the range."""
        is_above = number > self.low if self.open_low else number >= self.low
        return is_above and (number < self.high if self.open_high else number <= self.high)


@dataclasses.dataclass(frozen=True)
class Value:
    """A check that calls a function; see `Check`."""

    expected: str
    accepts: Callable[[Any], bool]


def instance(kind: type | tuple[type, ...], expected: str) -> Value:
    """Accepts values of a type."""
    return Value(expected, lambda value: isinstance(value, kind))


def one_of(*choices: str) -> Value:
    """Accepts the choices."""
    *first, last = map(repr, choices)
    return Value(f"{', '.join(first)} or {last}", choices.__contains__)


@dataclasses.dataclass(frozen=True)
class Several:
    """A tuple."""

    each: Check  # check of its elements
    at_least: int = 0  # smallest number of elements
    distinct: bool = False  # whether all elements must differ

    @property
    def expected(self) -> str:
        """The elements in words."""
        different = "different " if self.distinct else ""
        return f"a tuple of {different}values{', not empty' if self.at_least else ''}, each {self.each.expected}"

    def accepts(self, value: Any) -> bool:
        """Whether a value is a tuple of such elements."""
        if not isinstance(value, tuple | list) or len(value) < self.at_least:
            return False
        return all(map(self.each.accepts, value)) and not (self.distinct and len(set(value)) < len(value))


LARGEST = 2**31 - 1  # steps are counted in int32, and seeds are passed as int32
STEPS = Number(1, LARGEST, whole=True)
COUNT = Number(0, LARGEST, whole=True)
BATCH = Number(1, 2**24, whole=True)
PIXELS = Number(1, 2**14, whole=True)
SIZE = Number(1, 2**20, whole=True)  # of a dimension of a model
LAYERS = Number(1, 1000, whole=True)
SHARE = Number(0, 1, open_high=True)
POSITIVE_SHARE = Number(0, 1, open_low=True)
NOT_NEGATIVE = Number(0)
FLAG = instance(bool, "True or False")
TEXT = instance(str, "text")  # names of parts, such as `optimizer.name`, are checked where the part is made
ANY_TUPLE = instance((tuple, list), "a tuple")
DTYPE = one_of("float32", "bfloat16", "float16")
DEVICES = Number(1, 2**20, whole=True, also=-1)
