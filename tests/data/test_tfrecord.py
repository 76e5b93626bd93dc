import gzip
import os
import resource
import struct

import numpy as np
import pytest

from tests.data.record_files import framed, masked_crc, serialized, write_shards, write_tfrecord
from vit_jax.data.sources import BadRecordError, open_source
from vit_jax.data.sources.tfrecord import tfrecord_index
from vit_jax.errors import UserError


def index_of(path):
    return path.with_name(f".{path.name}.index")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shard(tmp_path):
    return write_tfrecord(
        tmp_path / "data" / "x.tfrecord", [serialized(image=b"image %d" % i, label=[i]) for i in range(5)]
    )


def make_unreadable(shard):
    """Overwrites a file with bytes that cannot be indexed, but keeps its size and time."""
    times = shard.stat()
    shard.write_bytes(b"x" * times.st_size)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))


# ---- The index.


def test_index_has_the_offsets_of_all_records(shard):
    sizes = [len(framed(serialized(image=b"image %d" % i, label=[i]))) for i in range(5)]
    np.testing.assert_array_equal(tfrecord_index(str(shard)), np.cumsum([0, *sizes]))


def test_index_is_kept_beside_the_file_and_used_again(shard):
    tfrecord_index(str(shard))
    assert sorted(path.name for path in shard.parent.iterdir()) == [".x.tfrecord.index", "x.tfrecord"]
    make_unreadable(shard)
    assert len(tfrecord_index(str(shard))) == 6


def test_index_goes_to_the_cache_if_it_cannot_be_beside_the_file(tmp_path, cache):
    shards = [write_tfrecord(tmp_path / str(count) / "x.tfrecord", [b"record"] * count) for count in (2, 3)]
    for shard in shards:
        index_of(shard).mkdir()
    for _ in range(2):  # the second time from the cache, where files of the same name have their own
        assert [len(tfrecord_index(str(shard))) for shard in shards] == [3, 4]
        for shard in shards:
            make_unreadable(shard)
    assert [path.name.split("-")[0] for path in (cache / "indices").iterdir()] == ["x.tfrecord"] * 2


def test_file_is_read_even_if_no_index_can_be_kept(shard, cache, caplog):
    index_of(shard).mkdir()
    cache.write_text("a file where the folder should be")
    assert len(tfrecord_index(str(shard))) == 6
    assert "no folder for its index can be written" in caplog.text


def test_changed_file_is_indexed_again(shard):
    tfrecord_index(str(shard))
    with shard.open("ab") as file:
        file.write(framed(b"one more"))
    assert len(tfrecord_index(str(shard))) == 7


def test_rewritten_file_of_the_same_size_is_indexed_again(tmp_path):
    shard = write_tfrecord(tmp_path / "x.tfrecord", [b"12345678", b"1"])
    tfrecord_index(str(shard))
    write_tfrecord(shard, [b"1", b"12345678"])
    os.utime(shard, ns=(1, 1))
    assert tfrecord_index(str(shard)).tolist() == [0, 17, 41]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "other", "earlier version", "huge", "FIFO"])
def test_damaged_index_is_made_again(shard, damage):
    expected = tfrecord_index(str(shard)).tolist()
    index = index_of(shard)
    whole = index.read_bytes()
    index.unlink()
    if damage == "FIFO":
        os.mkfifo(index)
    elif damage == "huge":
        with index.open("wb") as file:
            file.truncate(2**40)  # a hole, which takes no disk
    else:
        earlier = (
            b"\x93NUMPY\1\0\x76\0" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (10,), }".ljust(117) + b"\n"
        )
        contents = {
            "truncate": whole[:-8],
            "empty": b"",
            "other": b"something else",
            "earlier version": earlier + whole,
        }
        contents["flip"] = whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:]
        index.write_bytes(contents[damage])
    assert tfrecord_index(str(shard)).tolist() == expected
    assert index.read_bytes() == whole


# ---- Files.


def test_more_files_than_may_be_open_are_read(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 64 + 2 * len(os.listdir("/dev/fd"))
    pattern = write_shards(tmp_path / "data", counts=[1] * limit)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        source = open_source(pattern, "all")
        assert [source[i]["label"] for i in range(limit)] == list(range(limit))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_truncated_file_is_refused_with_the_record_and_its_offset(shard, cut):
    begin = int(tfrecord_index(str(shard))[4])
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(UserError, match=rf"x.tfrecord is truncated: it ends within record 4, .* at byte {begin}"):
        open_source(str(shard), "all")


def test_file_that_is_cut_within_a_header_is_truncated(shard):
    begin = int(tfrecord_index(str(shard))[4])
    os.truncate(shard, begin + 5)
    with pytest.raises(UserError, match=rf"it ends within record 4, .* at byte {begin}"):
        tfrecord_index(str(shard))


def test_damaged_length_is_refused_with_the_record_and_its_offset(shard):
    begin = int(tfrecord_index(str(shard))[2])
    content = bytearray(shard.read_bytes())
    content[begin + 1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(1, 1))
    with pytest.raises(UserError, match=rf"x.tfrecord is damaged at byte {begin}, where record 2 should begin"):
        open_source(str(shard), "all")


def test_file_that_shrinks_while_it_is_read_is_named(shard):
    source = open_source(str(shard), "all")
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(BadRecordError, match=r"cannot read record 4 .*the file ends at byte"):
        source[4]


def test_compressed_file_is_refused(shard):
    shard.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(UserError, match="is compressed"):
        open_source(str(shard), "all")


def test_a_record_of_a_terabyte_is_not_read(tmp_path):
    path = write_tfrecord(tmp_path / "x.tfrecord", [serialized(image=b"a", label=[0])])
    length = struct.pack("<Q", 2**40)
    with path.open("ab") as file:
        file.write(length + masked_crc(length))
        file.truncate(file.tell() + 2**40 + 4)  # a hole, which takes no disk
    source = open_source(str(path), "all")
    assert source[0]["image"] == b"a"
    with pytest.raises(BadRecordError, match="1,099,511,627,776 bytes, more than"):
        source[1]
