"""Writes files of records without the libraries that the package reads them with."""

import itertools
import struct

import google_crc32c
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden" / "records"


def serialized(**features):
    """A `tf.train.Example` of bytes and lists of integers; "__" in a name stands for "/"."""
    example = tf_example_pb2.Example()
    for name, value in features.items():
        feature = example.features.feature[name.replace("__", "/")]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        else:
            feature.int64_list.value.extend(value)
    return example.SerializeToString()


def masked_crc(content):
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(record):
    length = struct.pack("<Q", len(record))
    return length + masked_crc(length) + record + masked_crc(record)


def write_tfrecord(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(map(framed, records)))
    return path


def write_array_record(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


WRITERS = {"tfrecord": write_tfrecord, "array_record": write_array_record}


def write_shards(folder, counts=(3, 2), file_format="tfrecord"):
    """Writes a file for each count, whose examples are numbered; returns the pattern that matches all files."""
    numbers = itertools.count()
    for shard, count in enumerate(counts):
        records = [
            serialized(image=b"image %d" % i, label=[i], file_name=b"%d.jpg" % i)
            for i in itertools.islice(numbers, count)
        ]
        WRITERS[file_format](folder / f"web.{file_format}-{shard:05d}-of-{len(counts):05d}", records)
    return f"{folder}/web*"


def numbers_of(source):
    """The numbers of the examples that `write_shards` wrote."""
    return [int(source[i]["image"].removeprefix(b"image ")) for i in range(len(source))]
