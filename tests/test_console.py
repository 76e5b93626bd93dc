import io
import os
import pty
import subprocess
import sys
import time

import pytest

from vit_jax.console import (
    Progress,
    Tracked,
    encode_text,
    format_bytes,
    format_table,
    print_any_text,
    run_command,
    show_name,
    show_names,
)


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
def test_unprintable_text_is_escaped_and_the_rest_kept(name, shown):
    assert show_name(name) == shown
    shown.encode()


def test_texts_of_files_keep_their_lines_and_have_such_bytes_escaped():
    text = "| data | " + os.fsdecode(b"p\xe9ts") + " |\n\tL\u00f6we \u732b\n"
    expected = "| data | p\\xe9ts |\n\tL\u00f6we \u732b\n".encode()
    assert encode_text(text) == expected


def test_names_beyond_the_limit_are_counted():
    assert show_names(["a", "b\n", "c"], 2) == r"'a', 'b\n' and 1 more"


def test_no_print_fails_for_the_encoding_of_the_terminal(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1", errors="strict"))
    monkeypatch.setattr(sys, "stderr", None)
    print_any_text()
    print("猫", os.fsdecode(b"\xe9"), flush=True)
    assert raw.getvalue() == b"\\u732b \\udce9\n"


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (4e15, "4000.0 TB")],
)
def test_sizes_have_a_unit(count, shown):
    assert format_bytes(count) == shown


def test_tables_align_numbers_to_the_right_and_wide_characters_to_their_width():
    rows = [["[red]猫", 1234, "-"], ["a\nb", 5, "5.0 %"]]
    assert format_table(["name", "count", ""], rows).splitlines() == [
        "| name    | count |       |",
        "|---------|------:|------:|",
        "| [red]猫 |  1234 |     - |",
        "| a\\nb    |     5 | 5.0 % |",
    ]


def test_tables_of_any_width_are_never_wrapped_and_may_be_plain():
    rows = [["x" * 500, "v3-8"], ["y", ":smile: [b]"]]
    assert format_table(["a", "b"], rows, num_left=1, markdown=False).splitlines() == [
        "a" + " " * 511 + "b",
        "x" * 500 + " " * 9 + "v3-8",
        "y" + " " * 501 + ":smile: [b]",
    ]


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock takes 31 seconds."""
    seconds = iter(range(0, 10**6, 31))
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))


def test_progress_prints_occasional_lines_with_rate_and_time_left(clock, capsys):
    with Progress("scan", 100, done=20) as progress:
        progress.add(5, 40)
        assert capsys.readouterr().err == "scan: 5 images, 0.2 images/s, 40.0 % done, 0:01:33 left\n"
        progress.finish()
    assert capsys.readouterr().err == "scan: 5 images in 0:01:02, 0.1 images/s\n"


def test_progress_of_an_unknown_number_of_bytes(clock, capsys):
    Progress("w.npz", None, unit="bytes").add(62_000_000)
    assert capsys.readouterr().err == "w.npz: 62.0 MB, 2.0 MB/s\n"


def test_progress_outlives_the_reader_of_stderr(clock, monkeypatch):
    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    Progress("w.npz", None).add()


def test_tracked_batches_can_be_iterated_again_and_interrupted(caplog):
    stop = []

    def before_each():
        if stop:
            raise KeyboardInterrupt

    tracked = Tracked([1, 2, 3], "counting", 64, every_seconds=0, before_each=before_each)
    with caplog.at_level("INFO"):
        assert list(tracked) == list(tracked) == [1, 2, 3]
    assert "counting: 64 images" in caplog.text
    assert len(tracked) == 3
    stop.append(True)
    with pytest.raises(KeyboardInterrupt):
        list(tracked)


BAR = """
import logging, sys, time
from vit_jax import console
logging.basicConfig(stream=sys.stdout, format="%(message)s")
clock = iter(range(10**6))
time.monotonic = lambda: next(clock)
for batch in console.Tracked([1, 2, 3], "[b]evaluation", 64):
    if batch == 3:
        logging.warning("a line of the log")
        print("a line on stderr", file=sys.stderr)
print("end")
"""


def run_in_terminal(code, **environment):
    """What a program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", **environment}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 10_000):
            written += chunk
    except OSError:  # the terminal is closed
        pass
    os.close(ours)
    assert process.wait() == 0, written
    return written.decode()


def test_in_a_terminal_progress_is_a_bar_that_keeps_lines_and_cursor_intact():
    written = run_in_terminal(BAR)
    assert "64.0 images/s" in written.replace("64 images/s", "64.0 images/s")
    assert "[b]evaluation" in written
    assert "\x1b[2Ka line of the log\r\n" in written
    assert "a line on stderr" in written
    assert "\x1b[?25l" not in written  # hides the cursor
    last = written.split("a line on stderr")[1]
    assert "\x1b[2K" in last  # the bar is cleared
    assert last.endswith("end\r\n")


def test_in_a_notebook_without_widgets_progress_is_lines(monkeypatch, capsys, clock):
    monkeypatch.setitem(sys.modules, "ipykernel", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Progress("hash", None).add()
    assert capsys.readouterr().err == "hash: 1 images, 0.0 images/s\n"


def test_in_a_dumb_terminal_and_in_a_second_process_there_is_no_bar():
    quiet = BAR.replace("clock =", "logging.getLogger('vit_jax').setLevel(logging.WARNING); clock =")
    assert (
        run_in_terminal(quiet)
        == run_in_terminal(BAR, TERM="dumb")
        == "a line of the log\r\na line on stderr\r\nend\r\n"
    )


def test_ctrl_c_ends_a_command_with_one_line_and_status_130(capsys):
    def main(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
