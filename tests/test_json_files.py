import json
import os

import pytest

from vit_jax import json_files
from vit_jax.errors import UserError
from vit_jax.json_files import Fields, JsonError, parse_json, parse_object, read_json, read_json_lines, read_object

NESTED = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ('{"a": ', "Expecting value"),
        (NESTED, "nested deeper than 64 levels"),
        ('{"a":' * 100_000, "nested deeper than 64 levels"),
        ("[" * 65 + "]" * 65, "nested deeper than 64 levels"),
        ("[" * 900 + "]" * 900, "nested deeper than 64 levels"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        ('{"deep": [{"a": 1, "a": 1}]}', "the key 'a' occurs twice"),
        ("NaN", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "1e999 is too large"),
        ("1" * 5000, "digits"),
        (b"\xff\xfe\xff", "decode"),
        (b'{"a": "\xff"}', "decode"),
        ("{} {}", "Extra data"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_text_that_is_not_json_is_an_error_that_names_it(text, reason):
    with pytest.raises(JsonError, match=f"^some/config.json is damaged or not JSON: .*{reason}"):
        parse_json(text, "some/config.json")
    assert issubclass(JsonError, UserError)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_written_by_editors_is_read(encoding):
    assert parse_json('{"a": ["é", 1.5, null]}'.encode(encoding), "a") == {"a": ["é", 1.5, None]}


def test_64_levels_are_read():
    assert json.dumps(parse_json("[" * 64 + "]" * 64, "a")) == "[" * 64 + "]" * 64
    assert len(parse_json("[" + "[]," * 200 + "[]]", "a")) == 201


def test_nan_is_a_number_only_where_it_is_allowed():
    assert repr(parse_json("[NaN, Infinity]", "a", allow_nan=True)) == "[nan, inf]"


@pytest.mark.parametrize("text", ["[]", "null", "5", '"{}"', "true"])
def test_only_an_object_is_accepted_as_an_object(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    for read in (lambda: parse_object(text, "a.json"), lambda: read_object(tmp_path / "a.json")):
        with pytest.raises(JsonError, match=r"a\.json is damaged: expected a JSON object"):
            read()


def test_files_that_cannot_be_read_are_errors_that_name_them(tmp_path):
    os.mkfifo(tmp_path / "fifo")  # opening it would block
    (tmp_path / "large.json").write_text("[" + "1," * 50 + "1]")
    for name, message in (("none", "does not exist"), ("fifo", "is not a file"), (".", "is not a file")):
        with pytest.raises(JsonError, match=message):
            read_json(tmp_path / name)
    with pytest.raises(JsonError, match=r"large\.json has more than 50 bytes"):
        read_json(tmp_path / "large.json", max_bytes=50)
    with pytest.raises(JsonError, match="cannot read /dev/zero: it is not a file"):
        read_json(type(tmp_path)("/dev/zero"))


def test_damaged_lines_are_errors_or_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 30)
    lines = [b'{"a": 1}', b"", b'{"a": \xff}', b"[" * 29, b"7" * 200, b'{"b": NaN}', b'{"b": 2}', b'{"cut off']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    errors = []
    found = list(read_json_lines(tmp_path / "rows.jsonl", on_error=errors.append))
    assert found == [(1, {"a": 1}), (7, {"b": 2})]
    assert [str(error).split(",")[1].split()[1] for error in errors] == ["3", "4", "5", "6", "8"]
    with pytest.raises(JsonError, match=r"rows\.jsonl, line 3 is damaged"):
        list(read_json_lines(tmp_path / "rows.jsonl"))
    with pytest.raises(JsonError, match="cannot read"):
        list(read_json_lines(tmp_path / "none.jsonl"))


FIELDS = Fields(
    {"layers": 12, "negative": -3, "huge": 10**400, "rate": 0.5, "yes": True, "name": "gelu", "null": None,
     "sizes": [224, 384], "mean": [0.5, 1, 0.25], "words": ["a", "b"], "inside": {"a": 1}, "mixed": [1, "2"],
     "nested": [[1, 2]]},
    "config.json",
)  # fmt: skip


def test_fields_of_the_right_type_and_range_are_returned():
    assert FIELDS.integer("layers", at_least=12, at_most=12) == 12
    assert FIELDS.number("layers") == 12.0
    assert FIELDS.number("rate", above=0, at_most=0.5) == 0.5
    assert FIELDS.flag("yes") is True
    assert FIELDS.text("name", choices=("gelu", "relu")) == "gelu"
    assert FIELDS.integers("sizes", length=2, at_least=224) == (224, 384)
    assert FIELDS.numbers("mean", length=3, at_most=1) == (0.5, 1.0, 0.25)
    assert FIELDS.texts("words") == ("a", "b")
    assert FIELDS.fields("inside").integer("a") == 1
    assert "layers" in FIELDS
    assert "null" not in FIELDS


def test_fields_that_are_absent_or_null_have_the_default():
    for name in ("absent", "null"):
        assert FIELDS.integer(name, 7) == FIELDS.number(name, 7) == 7
        assert FIELDS.integer(name, None) is FIELDS.fields(name, None) is FIELDS.numbers(name, None) is None
        assert FIELDS.integers(name, (1,)) == (1,)
        with pytest.raises(JsonError, match=f"^config.json: {name} is (missing|None); expected a whole number"):
            FIELDS.integer(name)


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: f.integer("name"), "name is 'gelu'; expected a whole number"),
        (lambda f: f.integer("yes"), "yes is True; expected a whole number"),
        (lambda f: f.integer("rate"), "rate is 0.5; expected a whole number"),
        (lambda f: f.integer("negative", at_least=1), "negative is -3; expected a whole number of at least 1"),
        (lambda f: f.integer("layers", at_most=0), "layers is 12; expected a whole number up to 0"),
        (lambda f: f.integer("huge", at_least=1, at_most=99), r"huge is 1000.*000; expected .* from 1 to 99"),
        (lambda f: f.number("huge"), "expected a number"),
        (lambda f: f.number("sizes"), r"sizes is \[224, 384\]; expected a number"),
        (lambda f: f.number("rate", above=0.5), "expected a number above 0.5"),
        (lambda f: f.flag("layers"), "layers is 12; expected true or false"),
        (lambda f: f.text("layers"), "expected a string"),
        (lambda f: f.text("name", choices=("relu", "tanh")), "expected one of relu, tanh"),
        (lambda f: f.integers("mixed"), r"mixed is \[1, '2'\]; expected a list of whole numbers"),
        (lambda f: f.integers("nested"), "expected a list of whole numbers"),
        (lambda f: f.integers("sizes", length=3), "expected a list of 3 whole numbers"),
        (lambda f: f.numbers("mean", above=0.25), "expected a list of numbers above 0.25"),
        (lambda f: f.numbers("layers"), "layers is 12; expected a list of numbers"),
        (lambda f: f.texts("name"), "expected a list of strings"),
        (lambda f: f.fields("words"), r"expected an object \{...\}"),
        (lambda f: f.fields("inside").text("a"), "^config.json: inside: a is 1; expected a string"),
        (lambda _: Fields([1], "config.json"), "expected a JSON object"),
    ],
)
def test_wrong_fields_are_errors_that_say_what_was_given_and_expected(read, message):
    with pytest.raises(JsonError, match=message):
        read(FIELDS)
