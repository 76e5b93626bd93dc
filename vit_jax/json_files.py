"""Reads JSON from other programs or damaged disks: bounded and strict, with errors that name file and field.

`json.loads` alone raises `RecursionError` for deep nesting, takes `NaN` and `1e999` for numbers, keeps the last of two
equal keys, and says nothing about types. Here, every fault is a `JsonError`, which is a `UserError`.

    fields = Fields(read_object(path), str(path))
    layers = fields.integer("num_hidden_layers", at_least=1, at_most=1000)
"""

import io
import json
import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from vit_jax.errors import UserError
from vit_jax.files import AnyPath

MAX_BYTES = 16 * 2**20  # of a file; parsed, the worst content takes 25 times as much memory
MAX_LINE_BYTES = 2**20  # of a line of a JSON-lines file
_LARGEST = 1.7e308  # what a float holds; a JSON integer may be larger
MAX_DEPTH = 64  # nested arrays and objects; recursive code can process the result safely

T = TypeVar("T")
_REQUIRED: Any = object()


class JsonError(UserError):
    """The text is not the expected JSON."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:30]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
_WITH_NAN = json.JSONDecoder(object_pairs_hook=_unique)


def _check_depth(value: Any) -> None:
    left = [(value, 1)]
    while left:
        each, depth = left.pop()
        if isinstance(each, (dict, list)):
            if depth > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
            left += [(child, depth + 1) for child in (each.values() if isinstance(each, dict) else each)]


def parse_json(text: str | bytes, where: object, *, allow_nan: bool = False, max_bytes: int = MAX_BYTES) -> Any:
    """Parses JSON.

    Args:
      text: str, or bytes in UTF-8 (with or without a byte order mark), UTF-16 or UTF-32.
      where: the text's name in errors, such as its path.
      allow_nan: accept `NaN` and `Infinity`, which Python writes although JSON does not have them.
      max_bytes: longest text to parse.

    Raises:
      JsonError: not JSON, too long, nested deeper than `MAX_DEPTH`, or with a key twice.
    """
    if len(text) > max_bytes:
        raise JsonError(f"{where} has {len(text):,} bytes; at most {max_bytes:,} are read as JSON.")
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        value = (_WITH_NAN if allow_nan else _STRICT).decode(text.removeprefix("\ufeff"))
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
    except (ValueError, RecursionError) as error:
        reason = f"nested deeper than {MAX_DEPTH} levels" if isinstance(error, RecursionError) else error
        raise JsonError(f"{where} is damaged or not JSON: {reason}.") from error
    return value


def read_json(path: AnyPath, *, allow_nan: bool = False, max_bytes: int = MAX_BYTES) -> Any:
    """Reads a JSON file; arguments and errors as in `parse_json`.

    Raises:
      JsonError: it cannot be read, is not a regular file, or as in `parse_json`.
    """
    try:
        if not path.is_file():  # opening a FIFO would block
            raise JsonError(f"cannot read {path}: it {'is not a file' if path.exists() else 'does not exist'}.")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise JsonError(f"cannot read {path}: {error.strerror or error}.") from error
    if len(content) > max_bytes:
        raise JsonError(f"{path} has more than {max_bytes:,} bytes, the most that are read as JSON.")
    return parse_json(content, path, allow_nan=allow_nan, max_bytes=max_bytes)


def parse_object(text: str | bytes, where: object, *, allow_nan: bool = False) -> dict[str, Any]:
    """Parses JSON that must be an object, `{...}`; arguments and errors as in `parse_json`."""
    return _as_object(parse_json(text, where, allow_nan=allow_nan), where)


def read_object(path: AnyPath, *, allow_nan: bool = False, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Reads a JSON file that must be an object, `{...}`; arguments and errors as in `read_json`."""
    return _as_object(read_json(path, allow_nan=allow_nan, max_bytes=max_bytes), path)


def read_optional(path: AnyPath) -> dict[str, Any]:
    """Reads a JSON object that may contain NaN; an empty one if there is no file."""
    return read_object(path, allow_nan=True) if path.exists() else {}


def _as_object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise JsonError(f"{where} is damaged: expected a JSON object {{...}}, got {reprlib.repr(value)}.")
    return value


def read_json_lines(
    path: AnyPath,
    *,
    allow_nan: bool = False,
    on_error: Callable[[JsonError], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Reads a JSON-lines file of any length, one line at a time.

    Args:
      path: the file.
      allow_nan: see `parse_json`.
      on_error: called for a line that is not JSON, such as one that a kill cut off; the line is then skipped. None
        raises.

    Yields:
      The number of each line, from 1, and its value. Empty lines are left out.

    Raises:
      JsonError: the file cannot be read, or `on_error` is None and a line is not JSON or has more than
        `MAX_LINE_BYTES`.
    """
    try:
        with path.open("rb") as raw:
            # A file in a bucket has no `readline` of a size.
            file = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
            number, continues = 0, False
            while line := file.readline(MAX_LINE_BYTES + 1):
                whole = not continues
                continues = not line.endswith(b"\n") and len(line) > MAX_LINE_BYTES
                number += whole
                if not whole or not line.strip():
                    continue
                try:
                    value = parse_json(line, f"{path}, line {number:,}", allow_nan=allow_nan, max_bytes=MAX_LINE_BYTES)
                except JsonError as error:
                    if on_error is None:
                        raise
                    on_error(error)
                else:
                    yield number, value
    except OSError as error:
        raise JsonError(f"cannot read {path}: {error.strerror or error}.") from error


class Fields:
    """A JSON object with methods that read fields by type and range.

    Each method returns the field's value, or `default` if the field is absent or null; without a default, that is an
    error. `limits` of numbers are `at_least`, `at_most` and `above`.

    Attributes:
      values: the object.
      where: its name in errors, such as its path.
    """

    def __init__(self, values: Any, where: str):
        self.where = where
        self.values = _as_object(values, where)

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def error(self, name: str, expected: str) -> JsonError:
        """Makes the error for a field with an unexpected value."""
        given = reprlib.repr(self.values[name]) if name in self.values else "missing"
        return JsonError(f"{self.where}: {name} is {given}; expected {expected}. Correct the file, or fetch it again.")

    def _get(self, name: str, default: Any, expected: str, is_valid: Callable[[Any], bool]) -> Any:
        value = self.values.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if not is_valid(value):
            raise self.error(name, expected)
        return value

    def _list(self, name: str, default: Any, expected: str, length: int | None, is_valid: Callable[[Any], bool]) -> Any:
        def check(value: Any) -> bool:
            return isinstance(value, list) and length in (None, len(value)) and all(map(is_valid, value))

        number = "" if length is None else f"{length} "
        value = self._get(name, default, f"a list of {number}{expected}", check)
        return tuple(value) if isinstance(value, list) else value

    def integer(self, name: str, default: T = _REQUIRED, **limits: float) -> int | T:
        """A whole number."""
        return self._get(name, default, f"a whole number{_words(**limits)}", lambda v: _is_integer(v, **limits))

    def number(self, name: str, default: T = _REQUIRED, **limits: float) -> float | T:
        """A finite number."""
        value = self._get(name, default, f"a number{_words(**limits)}", lambda v: _is_number(v, **limits))
        return float(value) if _is_number(value) else value

    def flag(self, name: str, default: T = _REQUIRED) -> bool | T:
        """True or false."""
        return self._get(name, default, "true or false", lambda v: isinstance(v, bool))

    def text(self, name: str, default: T = _REQUIRED, *, choices: Sequence[str] = ()) -> str | T:
        """A string, one of `choices` if there are any."""
        expected = f"one of {', '.join(choices)}" if choices else "a string"
        return self._get(name, default, expected, lambda v: isinstance(v, str) and (not choices or v in choices))

    def integers(
        self, name: str, default: T = _REQUIRED, *, length: int | None = None, **limits: float
    ) -> tuple[int, ...] | T:
        """A list of whole numbers, as a tuple."""
        expected = f"whole numbers{_words(**limits)}"
        return self._list(name, default, expected, length, lambda v: _is_integer(v, **limits))

    def numbers(
        self, name: str, default: T = _REQUIRED, *, length: int | None = None, **limits: float
    ) -> tuple[float, ...] | T:
        """A list of finite numbers, as a tuple."""
        expected = f"numbers{_words(**limits)}"
        found = self._list(name, default, expected, length, lambda v: _is_number(v, **limits))
        return tuple(map(float, found)) if found is not default else found

    def texts(self, name: str, default: T = _REQUIRED) -> tuple[str, ...] | T:
        """A list of strings, as a tuple."""
        return self._list(name, default, "strings", None, lambda v: isinstance(v, str))

    def fields(self, name: str, default: T = _REQUIRED) -> "Fields | T":
        """An object inside this one."""
        value = self._get(name, default, "an object {...}", lambda v: isinstance(v, dict))
        return Fields(value, f"{self.where}: {name}") if isinstance(value, dict) else value


def _words(*, at_least: float | None = None, at_most: float | None = None, above: float | None = None) -> str:
    words = "" if above is None else f" above {above}"
    if at_least is not None and at_most is not None:
        return f"{words} from {at_least} to {at_most}"
    if at_least is not None:
        return f"{words} of at least {at_least}"
    return words if at_most is None else f"{words} up to {at_most}"


def _is_number(value: Any, *, at_least: float = -_LARGEST, at_most: float = _LARGEST, above: float = -math.inf) -> bool:
    is_finite = type(value) in (int, float) and abs(value) <= _LARGEST  # NaN compares as false
    return is_finite and at_least <= value <= at_most and value > above


def _is_integer(value: Any, **limits: float) -> bool:
    return type(value) is int and (not limits or _is_number(value, **limits))
