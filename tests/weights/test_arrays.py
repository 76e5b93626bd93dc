import contextlib
import io
import json
import os
import pathlib
import pickle
import re
import shlex
import shutil
import tracemalloc
import types
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from vit_jax.errors import UserError
from vit_jax.weights import load
from vit_jax.weights.arrays import open_arrays, write_arrays

ARRAYS = {
    "block/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "block/bias": np.array([1.5, -2.0, 3.0], np.float16),
    "norm/scale": np.array([0.5, 256.0], ml_dtypes.bfloat16),
}
DESCRIPTION = {"model": "ViT-B/16", "num_classes": 3, "image_size": [224, 384]}


def bytes_of(kind):
    """A small file of each kind."""
    arrays = {name: array for name, array in ARRAYS.items() if name != "norm/scale"}
    stream = io.BytesIO()
    if kind == "safetensors":
        return safetensors.numpy.save(arrays, {"format": "pt"})
    {"npz": np.savez, "compressed npz": np.savez_compressed}[kind](stream, **arrays)
    return stream.getvalue()


def read_arrays(path):
    opened = open_arrays(path)
    return opened.read(opened.shapes), opened.description


def refuses(path, *expected):
    with pytest.raises(UserError) as caught:
        read_arrays(path)
    for text in (re.escape(str(path)), *expected):
        assert re.search(text, str(caught.value)), f"{text!r} is not in: {caught.value}"


def snapshot(folder):
    """Names and contents of all files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(params=["weights.npz", "weights.safetensors"])
def path(request, tmp_path):
    return tmp_path / "folder" / request.param


# --- Whole files ---


def test_written_files_are_read_with_dtypes_and_description(path):
    write_arrays(path, ARRAYS, DESCRIPTION)
    found, description = read_arrays(path)
    assert description == DESCRIPTION
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_arrays_that_are_not_contiguous_are_written_as_what_they_are(path):
    array = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)
    write_arrays(path, {"a": array}, {})
    np.testing.assert_array_equal(read_arrays(path)[0]["a"], array)


def test_a_scalar_stays_a_scalar(path):
    write_arrays(path, {"a": np.array(7.0)}, {})
    assert read_arrays(path)[0]["a"].shape == ()


@pytest.mark.parametrize("kind", ["npz", "compressed npz", "safetensors"])
def test_files_of_others_are_read_and_have_no_description(kind, tmp_path):
    (tmp_path / "file").write_bytes(bytes_of(kind))  # told by what is in it, not by its name
    found, description = read_arrays(tmp_path / "file")
    assert description == {}
    np.testing.assert_array_equal(found["block/kernel"], ARRAYS["block/kernel"])


def test_other_libraries_can_read_what_is_written(tmp_path):
    arrays = {name: array for name, array in ARRAYS.items() if name != "norm/scale"}
    write_arrays(tmp_path / "a.npz", arrays, DESCRIPTION)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert set(file.files) == set(arrays)
    write_arrays(tmp_path / "a.safetensors", ARRAYS, DESCRIPTION)
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert file.metadata()["format"] == "pt"  # without it transformers refuses the file


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"name a \.npz or \.safetensors file"):
        write_arrays(tmp_path / "weights.pth", ARRAYS, {})
    assert not (tmp_path / "weights.pth").exists()


# --- Files that are not whole, or not what they seem ---


@pytest.mark.parametrize("kind", ["npz", "compressed npz", "safetensors"])
@pytest.mark.parametrize("percent", range(0, 100, 10))
def test_a_truncated_file_is_reported(kind, percent, tmp_path):
    content = bytes_of(kind)
    (tmp_path / "weights").write_bytes(content[: len(content) * percent // 100])
    refuses(tmp_path / "weights", "truncated|cut off", "[Ff]etch it again")


def test_a_file_without_its_last_byte_is_refused(tmp_path):
    for kind in ("npz", "compressed npz", "safetensors"):
        (tmp_path / "weights").write_bytes(bytes_of(kind)[:-1])
        refuses(tmp_path / "weights", "truncated")


@pytest.mark.parametrize("kind", ["npz", "compressed npz"])
@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_a_changed_byte_anywhere_never_changes_an_array_nor_ends_in_a_traceback(kind, mask, tmp_path):
    content = bytes_of(kind)
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= mask
        (tmp_path / "weights.npz").write_bytes(damaged)
        try:
            found, _ = read_arrays(tmp_path / "weights.npz")
        except UserError:
            refused += 1
        else:  # a date of the archive, or a name, which whoever reads the arrays checks
            for name in found.keys() & ARRAYS.keys():
                assert found[name].dtype == ARRAYS[name].dtype
                np.testing.assert_array_equal(found[name], ARRAYS[name])
    assert refused > len(content) / 3


def test_a_changed_byte_in_an_array_is_reported_as_damage(tmp_path):
    content = bytes_of("npz")
    position = content.index(ARRAYS["block/kernel"].tobytes()) + 5
    damaged = content[:position] + b"\x99" + content[position + 1 :]
    (tmp_path / "weights.npz").write_bytes(damaged)
    refuses(tmp_path / "weights.npz", "damaged", "CRC", "Fetch it again")


@pytest.mark.parametrize(("old", "new"), [(b"'<f4'", b"'<f2'"), (b"(3, 4)", b"(3, 2)"), (b"(3, 4)", b"(3, 5)")])
def test_a_header_that_says_another_number_of_bytes_is_reported_as_damage(old, new, tmp_path):
    content = bytes_of("npz")
    assert content.count(old) == 1
    (tmp_path / "weights.npz").write_bytes(content.replace(old, new))
    refuses(tmp_path / "weights.npz", "damaged", "Fetch it again")


def test_a_changed_header_of_a_safetensors_file_never_ends_in_a_traceback(tmp_path):
    content = bytes_of("safetensors")
    for position in range(content.rindex(b"}") + 1):
        damaged = bytearray(content)
        damaged[position] ^= 0x06
        (tmp_path / "weights.safetensors").write_bytes(damaged)
        with contextlib.suppress(UserError):  # a traceback of any other error fails the test
            read_arrays(tmp_path / "weights.safetensors")


def test_an_empty_file_is_reported(tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"")
    refuses(tmp_path / "weights.npz", "is empty", "Fetch it again")


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><html>Sign in</html>", b"hello\n", b"\0" * 100, b"P", b"\x93NUMPY"]
)
def test_a_file_of_another_kind_is_reported(content, tmp_path):
    (tmp_path / "weights.npz").write_bytes(content)
    refuses(tmp_path / "weights.npz", r"neither \.npz nor \.safetensors")


def test_a_zip_file_that_is_not_an_npz_is_reported_with_what_it_contains(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        archive.writestr("train/cat/1.jpg", b"x")
    refuses(tmp_path / "weights.npz", r"a zip file, but no \.npz", "train/cat/1.jpg")


def test_a_zip_file_whose_members_only_have_the_names_of_arrays_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        archive.writestr("a.npy", b"no array at all")
    refuses(tmp_path / "weights.npz", "damaged")


def test_a_pickled_npz_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was run"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    np.savez(tmp_path / "weights.npz", a=np.ones(3), b=np.array([Evil()], dtype=object))
    refuses(tmp_path / "weights.npz", "pickle", "may run any code")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_legacy_torch_file_is_refused_with_the_command_that_converts_it(protocol, tmp_path):
    path = tmp_path / "vit_b.pth"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol) + pickle.dumps({"a": 1}, protocol))
    refuses(
        path,
        "is a pickle",
        r"torch.load\('vit_b.pth', map_location='cpu', weights_only=True\).*'vit_b.safetensors'\)\"$",
    )


def test_a_legacy_torch_file_is_known_without_its_suffix(tmp_path):
    (tmp_path / "weights").write_bytes(pickle.dumps({"a": 1}, 2))
    refuses(tmp_path / "weights", "is a pickle")


def test_a_zipped_torch_file_is_refused_with_the_command_that_converts_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}, 2))
        archive.writestr("archive/data/0", b"\0" * 16)
    refuses(tmp_path / "pytorch_model.bin", "is a pickle", "safetensors", "weights_only=True")


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"\xff\xfe\x00"])
def test_a_damaged_description_is_named(content, tmp_path):
    write_arrays(tmp_path / "weights.npz", ARRAYS, DESCRIPTION)
    (tmp_path / "weights.npz.json").write_bytes(content)
    refuses(tmp_path / "weights.npz", r"description .*weights\.npz\.json is damaged", "Delete or repair it")


def test_a_damaged_description_in_a_safetensors_file_is_named(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3)}, tmp_path / "weights.safetensors", {"vit_jax": "{"})
    refuses(tmp_path / "weights.safetensors", "description in .* is damaged")


# --- Writing is all or nothing ---


@pytest.fixture
def before(path):
    """An older file of the same name, and the content of its folder."""
    write_arrays(path, {"old": np.ones(3)}, {"model": "old"})
    return snapshot(path.parent)


def test_an_existing_file_is_replaced_whole(path, before):
    write_arrays(path, ARRAYS, DESCRIPTION)
    assert snapshot(path.parent).keys() == before.keys()
    found, description = read_arrays(path)
    assert (found.keys(), description) == (ARRAYS.keys(), DESCRIPTION)


def test_a_disk_that_is_too_full_is_reported_before_anything_is_written(path, before, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=30_000_000))
    with pytest.raises(UserError, match=r"folder has 30\.0 MB free, but 40\.0 MB are needed"):
        write_arrays(path, {"a": np.zeros(10_000_000, np.float32)}, {})
    assert snapshot(path.parent) == before


def fail_half_way(error):
    def write(*arguments, **_):
        for target in arguments:
            if hasattr(target, "write"):  # an open file
                target.write(b"half")
            elif isinstance(target, os.PathLike):
                target.write_bytes(b"half")
        raise error

    return write


def test_a_failing_write_leaves_the_old_file_and_nothing_else(path, before, monkeypatch):
    monkeypatch.setattr(np, "savez", fail_half_way(OSError(28, "No space left on device")))
    rust_error = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")
    monkeypatch.setattr(safetensors.numpy, "save_file", fail_half_way(rust_error))
    with pytest.raises(UserError, match=r"cannot write .*weights\..*No space left on device"):
        write_arrays(path, ARRAYS, DESCRIPTION)
    assert snapshot(path.parent) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_an_interrupted_write_leaves_no_new_file(path, error, monkeypatch):
    monkeypatch.setattr(np, "savez", fail_half_way(error))
    monkeypatch.setattr(safetensors.numpy, "save_file", fail_half_way(error))
    with pytest.raises(type(error)):
        write_arrays(path, ARRAYS, DESCRIPTION)
    assert not path.parent.exists() or snapshot(path.parent) == {}


def test_arrays_are_not_replaced_if_their_description_cannot_be(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "weights.npz"
    write_arrays(path, {"old": np.ones(3)}, {"model": "old"})
    before = snapshot(path.parent)

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", no_space)
    with pytest.raises(UserError, match="cannot write"):
        write_arrays(path, ARRAYS, DESCRIPTION)
    monkeypatch.undo()
    assert snapshot(path.parent) == before


def test_a_rename_that_fails_leaves_the_old_file_and_nothing_else(path, before, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"cannot write .*Input/output error"):
        write_arrays(path, ARRAYS, DESCRIPTION)
    monkeypatch.undo()
    assert snapshot(path.parent) == before


def test_a_folder_in_place_of_the_file_is_reported(path):
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot write .*Is a directory"):
        write_arrays(path, ARRAYS, {})
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_file_in_place_of_the_folder_is_reported(path):
    path.parent.write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        write_arrays(path, ARRAYS, {})
    assert path.parent.read_text() == "a file"


def test_a_name_that_is_too_long_is_reported(path):
    with pytest.raises(UserError, match="cannot write"):
        write_arrays(path.with_name("a" * 240 + path.suffix), ARRAYS, {})


# --- Hostile content ---


def npz_with(path, name, header, body, *, compression=zipfile.ZIP_DEFLATED):
    """A .npz file of one member with this header, as text, and these bytes."""
    text = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name + ".npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body)
    return path


def npy(shape, descr="<f4"):
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        (npy("(3,)"), b"\0" * 13, "13 bytes for the shape"),  # more than it declares
        (npy("(3,)"), b"\0" * 11, "11 bytes for the shape"),
        (npy("(1000000000000,)"), b"\0" * 12, "12 bytes for the shape"),
        (npy("(-1, 3)"), b"\0" * 12, r"the shape \(-1, 3\)"),
        (npy("(True, 3)"), b"\0" * 12, "the shape|damaged"),
        ("(" * 5000, b"", "damaged"),
        ("{'descr': '<f4'}", b"", "damaged"),
        (npy("(3,)", "|O"), b"", "Python objects"),
    ],
    ids=range(8),
)
def test_a_member_that_is_not_what_its_header_declares_is_refused(header, body, message, tmp_path):
    refuses(npz_with(tmp_path / "weights.npz", "a", header, body), message)


def test_a_member_that_inflates_to_much_is_not_inflated(tmp_path):
    # 80 MB of zeros in 80 kB. Its names are no model's, so nothing of it is read; the headers alone are.
    size = 20_000_000
    path = npz_with(tmp_path / "weights.npz", "unknown", npy(f"({size},)"), bytes(4 * size))
    tracemalloc.start()
    opened = open_arrays(path)
    assert opened.outline()["unknown"].shape == (size,)
    with pytest.raises(UserError, match="no format that vit_jax knows"):
        load(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_header_that_inflates_to_much_is_not_inflated(tmp_path):
    path = tmp_path / "weights.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x02\x00" + (10**8).to_bytes(4, "little") + bytes(10**7))
    refuses(path, "damaged or truncated")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_has_no_bound_is_refused(compression, tmp_path):
    refuses(npz_with(tmp_path / "a.npz", "a", npy("(3,)"), bytes(12), compression=compression), "compressed by method")


def test_a_member_that_claims_too_many_bytes_is_refused(tmp_path):
    content = bytearray(bytes_of("compressed npz"))
    entry = content.index(b"PK\1\2")
    content[entry + 24 : entry + 28] = (10**9).to_bytes(4, "little")  # its size when inflated
    (tmp_path / "a.npz").write_bytes(content)
    refuses(tmp_path / "a.npz", "claims 1,000,000,000 bytes")


def test_a_duplicate_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for value in (1.0, 2.0):
            stream = io.BytesIO()
            np.save(stream, np.full(3, value, np.float32))
            archive.writestr("a.npy", stream.getvalue())
    refuses(tmp_path / "a.npz", "a occurs twice")


def safetensors_with(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"},  # they overlap
        {"a": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
        {"a": 5},
        b"{" * 20_000,
        b'{"a":' * 20_000,
    ],
    ids=range(9),
)
def test_an_impossible_safetensors_header_is_refused(header, tmp_path):
    refuses(safetensors_with(tmp_path / "a.safetensors", header, bytes(8)), "damaged or truncated .safetensors")


def test_a_header_longer_than_its_file_is_not_waited_for(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((2**40).to_bytes(8, "little") + b'{"a":')
    refuses(tmp_path / "a.safetensors", "a header of 1,099,511,627,776 bytes")


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (np.arange(3), "int64"),
        (np.arange(3, dtype=np.int8), "int8"),
        (np.array([True, False]), "bool"),
        (np.ones(3, np.complex64), "complex64"),
        (np.array(["cat", "dog"]), "str"),
        (np.array(["2020-01-01"], "datetime64[D]"), "datetime64"),
        (np.zeros(2, [("a", "<f4"), ("b", "<i4")]), "void"),
        (np.zeros((0, 3), np.float32), r"empty, its shape is \(0, 3\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arrays_that_are_not_weights_are_refused_by_name(array, kind, tmp_path):
    np.savez(tmp_path / "a.npz", **{"head/kernel": array, "good": np.ones(3, np.float32)})
    refuses(tmp_path / "a.npz", f"head/kernel .*{kind}")


def test_safetensors_of_other_dtypes_are_refused_by_name(tmp_path):
    header = {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}
    refuses(safetensors_with(tmp_path / "a.safetensors", header, bytes(8)), r"a holds F8_E4M3\. Weights are float16")
    safetensors.numpy.save_file({"a": np.arange(3)}, tmp_path / "b.safetensors")
    refuses(tmp_path / "b.safetensors", "a holds I64")


def test_arrays_in_another_byte_order_or_in_columns_are_read(tmp_path):
    array = np.arange(6.0).reshape(2, 3)
    np.savez(tmp_path / "a.npz", big=array.astype(">f4"), columns=np.asfortranarray(array), double=array)
    found, _ = read_arrays(tmp_path / "a.npz")
    assert [found[name].dtype for name in ("big", "columns", "double")] == [np.float32, np.float64, np.float64]
    assert found["big"].dtype.isnative
    for name in found:
        np.testing.assert_array_equal(found[name], array)


def test_what_is_not_a_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "weights.npz")
    refuses(tmp_path / "weights.npz", "is not a file")
    refuses(pathlib.Path("/dev/zero"), "is not a file")


def test_a_command_for_a_name_that_a_shell_would_change_is_quoted(tmp_path):
    path = tmp_path / "it's $HOME.pth"
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    with pytest.raises(UserError) as caught:
        read_arrays(path)
    code = shlex.split(str(caught.value).splitlines()[-1])
    assert code[:2] == ["python", "-c"]
    assert repr(path.name) in code[2]
    compile(code[2], "command", "exec")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    write_arrays(tmp_path / "old" / "model.safetensors", {"a": np.ones(3)}, {}, {"config.json": {"a": 1}})
    before = snapshot(tmp_path / "old")
    monkeypatch.setattr("pathlib.Path.write_text", fail)
    for folder in ("old", "new"):
        with pytest.raises(UserError, match="cannot write"):
            write_arrays(tmp_path / folder / "model.safetensors", ARRAYS, {}, {"config.json": {"a": 2}})
    assert snapshot(tmp_path / "old") == before
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    (tmp_path / "old" / "other.json").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*other.json: Is a directory"):
        write_arrays(tmp_path / "old" / "model.safetensors", ARRAYS, {}, {"other.json": {}})
    assert snapshot(tmp_path / "old") == before
