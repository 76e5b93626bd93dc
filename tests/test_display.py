import io
import os
import sys

import pytest

from vit_jax.display import encode_text, print_any_text, show_name, show_names
from vit_jax.run.workdir import write_atomically


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat", "cat"),
        ("Löwe 猫 \u3000x", "Löwe 猫 \u3000x"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
        ("two\nlines\x1b[31m", r"two\nlines\x1b[31m"),
        ("lone \ud800", r"lone \ud800"),
        ("line\u2028separator", r"line\u2028separator"),
    ],
)
def test_what_cannot_be_shown_is_escaped_and_all_else_kept(name, shown):
    assert show_name(name) == shown
    shown.encode()


def test_texts_of_files_keep_their_lines_and_have_such_bytes_escaped(tmp_path):
    text = "| data | " + os.fsdecode(b"p\xe9ts") + " |\n\tL\u00f6we \u732b\n"
    expected = "| data | p\\xe9ts |\n\tL\u00f6we \u732b\n".encode()
    assert encode_text(text) == expected
    write_atomically(tmp_path / "summary.md", text)
    assert (tmp_path / "summary.md").read_bytes() == expected


def test_names_beyond_the_limit_are_counted():
    assert show_names(["a", "b\n", "c"], 2) == r"'a', 'b\n' and 1 more"


def test_no_print_fails_for_the_encoding_of_the_terminal(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1", errors="strict"))
    monkeypatch.setattr(sys, "stderr", None)
    print_any_text()
    print("猫", os.fsdecode(b"\xe9"), flush=True)
    assert raw.getvalue() == b"\\u732b \\udce9\n"
