"""Names of files and classes as text that every terminal, file and picture can take."""

import contextlib
import io
import sys
import unicodedata
from collections.abc import Sequence

_ESCAPED = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, separators of lines and paragraphs


def show_name(name: str) -> str:
    r"""Escapes what cannot be shown: bytes that are not UTF-8 ("caf\xe9.jpg"), control characters, line breaks.

    Python represents bytes of file names that are not UTF-8 as surrogates, which can neither be printed nor encoded.
    """
    if name.isprintable():
        return name
    return "".join(_escape(each) if unicodedata.category(each) in _ESCAPED else each for each in name)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, as `os.fsdecode` represents it
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def encode_text(text: str) -> bytes:
    """Encodes a text of any length as UTF-8, with bytes of names that are not UTF-8 escaped as in `show_name`."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return "".join(_escape(each) if "\ud800" <= each <= "\udfff" else each for each in text).encode()


def show_names(names: Sequence[str], limit: int = 5) -> str:
    """Names in quotes with commas between them; counts those beyond `limit`."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(f"'{show_name(name)}'" for name in names[:limit]) + rest


def print_any_text() -> None:
    """Makes stdout and stderr escape what their encoding cannot represent, instead of raising. For commands."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, io.UnsupportedOperation):  # replaced, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
