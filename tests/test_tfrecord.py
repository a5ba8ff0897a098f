"""Data sets of TFDS stored as tfrecord, as `tfds.load` leaves them: the same records as array_record, as strict.

The files are written here, record by record, with a checksum of our own.
"""

import importlib.util
import json
import struct
import sys

import numpy as np
import pytest
import tiny
from test_tfds import OBJECTS, changed_json, example, one_sentence, store

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import sources, tfds
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.tfrecord import TfRecordFile, masked_checksum
from fasterrcnn_jax.errors import InputError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None or importlib.util.find_spec("google_crc32c") is None,
    reason="tensorflow-datasets is not installed: pip install 'fasterrcnn_jax[tfds]'",
)


def table_of_crc32c():
    """RFC 3720: the polynomial 0x1EDC6F41, bits reversed."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


TABLE = table_of_crc32c()


def checksum(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def framed(data):
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", checksum(length)) + data + struct.pack("<I", checksum(data))


def as_tfrecord(folder):
    """Rewrites a stored data set: the same records in the frames of TFRecord. Returns its shards."""
    from array_record.python.array_record_module import ArrayRecordReader

    shards = []
    for shard in sorted(folder.glob("*array_record*")):
        reader = ArrayRecordReader(str(shard))
        records = reader.read_all()
        reader.close()
        shards.append(shard.with_name(shard.name.replace("array_record", "tfrecord")))
        shards[-1].write_bytes(b"".join(map(framed, records)))
        shard.unlink()
    changed_json(folder / "dataset_info.json", "array_record", "tfrecord")
    return shards


EXAMPLES = [example(*OBJECTS), example(), example(("ring", (2, 3, 40, 44)))]


def test_checksums_are_those_of_the_standard():
    """RFC 3720, B.4: 32 zero bytes, 32 bytes of ones, and the digits 1 to 9 of the usual catalogue."""
    for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (b"123456789", 0xE3069283)):
        assert masked_checksum(data) == checksum(data) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_records_images_and_boxes_are_those_of_array_record(tmp_path):
    before = store(tmp_path / "a", EXAMPLES)
    expected = tfds.read_tfds(tmp_path / "a", "mine", "train", tiny.CLASS_NAMES)
    as_tfrecord(store(tmp_path / "b", EXAMPLES))
    found = tfds.read_tfds(tmp_path / "b", "mine", "train", tiny.CLASS_NAMES)
    assert before.is_dir() and len(found.records) == 3
    for record, other in zip(found.records, expected.records, strict=True):
        for field in ("image_hw", "boxes", "labels", "difficult", "crowd", "area"):
            np.testing.assert_array_equal(getattr(record, field), getattr(other, field))
        np.testing.assert_array_equal(read_image(record.path), read_image(other.path))
    assert found.records[2].path.name == "mine-train.tfrecord-00000-of-00001[2]"
    assert "tensorflow" not in sys.modules


def test_a_part_of_a_split_is_read(tmp_path):
    as_tfrecord(store(tmp_path, EXAMPLES))
    whole = tfds.read_tfds(tmp_path, "mine", "train", tiny.CLASS_NAMES).records
    part = tfds.read_tfds(tmp_path, "mine", "train[1:]", tiny.CLASS_NAMES).records
    assert [record.id for record in part] == [record.id for record in whole[1:]]
    np.testing.assert_array_equal(part[1].boxes, whole[2].boxes)


def test_a_set_without_a_field_for_its_format_is_tfrecord(tmp_path):
    folder = store(tmp_path, EXAMPLES)
    as_tfrecord(folder)
    content = json.loads((folder / "dataset_info.json").read_text())
    del content["fileFormat"]
    (folder / "dataset_info.json").write_text(json.dumps(content))
    assert len(tfds.read_tfds(tmp_path, "mine", "train", tiny.CLASS_NAMES).records) == 3


def test_another_format_is_refused_with_the_command_that_rewrites_it(tmp_path):
    folder = store(tmp_path, EXAMPLES)
    changed_json(folder / "dataset_info.json", "array_record", "parquet")
    message = one_sentence(tfds.read_tfds, tmp_path, "mine", "train", tiny.CLASS_NAMES)
    assert "fileFormat: must be tfrecord or array_record, got parquet" in message
    assert f"`tfds convert_format --dataset_version_dir={folder} --out_file_format=array_record`" in message


def changed(position, new):
    """A fault: bytes are replaced, from a position or (negative) from the end."""

    def spoil(shard):
        content = bytearray(shard.read_bytes())
        at = position % len(content)
        content[at : at + len(new)] = new
        shard.write_bytes(content)

    return spoil


def length(value):
    """A fault: a hostile length with a checksum that fits it."""
    stored = struct.pack("<Q", value)
    return changed(0, stored + struct.pack("<I", checksum(stored)))


FAULTS = {
    "a length beyond the file": (length(2**20), ["length of the record at byte 0", "got 1,048,576"]),
    "a length beyond any memory": (length(2**63), ["must be at most", "got 9,223,372,036,854,775,808"]),
    "a length without end": (length(2**64 - 1), ["got 18,446,744,073,709,551,615"]),
    "a length with another checksum": (changed(0, b"\x01"), ["at byte 0: its checksum differs", "copy the file again"]),
    "data with another checksum": (changed(60, b"\x55\xaa"), ["[0], data: the checksum of the", "copy the file again"]),
    "another checksum of the data": (changed(-1, b"\x55"), ["[2], data: the checksum of the"]),
    "cut within the data": (lambda f: f.write_bytes(f.read_bytes()[:-40]), ["must be at most", "bytes that are left"]),
    "cut within a checksum": (lambda f: f.write_bytes(f.read_bytes()[:-2]), ["must be at most"]),
    "more bytes at the end": (lambda f: f.write_bytes(f.read_bytes() + b"\0" * 7), ["the file ends within it"]),
    "zeros at the end": (lambda f: f.write_bytes(f.read_bytes() + b"\0" * 64), ["its checksum differs"]),
    "compressed": (lambda f: f.write_bytes(__import__("gzip").compress(f.read_bytes())), ["not compressed"]),
    "empty": (lambda f: f.write_bytes(b""), ["cannot hold 3 records in its 0 bytes"]),
    "a record more": (lambda f: f.write_bytes(f.read_bytes() + framed(b"")), ["must have 3 records", "got 4"]),
    "a record fewer": (
        lambda f: f.write_bytes(f.read_bytes()[: -len(framed(bytes(TfRecordFile(f)[2])))]),
        ["must have 3 records, the shardLengths of dataset_info.json, got 2"],
    ),
    "data that are no example": (
        lambda f: f.write_bytes(b"".join(map(framed, (b"\xff" * 40, b"", b"")))),
        ["[0]: the record cannot be read"],
    ),
    "gone": (lambda f: f.unlink(), ["mine-train.tfrecord"]),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_damaged_file_is_named_in_one_sentence(tmp_path, case):
    damage, said = FAULTS[case]
    (shard,) = as_tfrecord(store(tmp_path / "root", EXAMPLES))
    damage(shard)
    data = DataConfig(root=tmp_path / "root", layout="tfds", tfds_name="mine", class_names=tiny.CLASS_NAMES)
    message = one_sentence(sources.read, data, "train")
    assert "mine" in message and all(part in message for part in said), message


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(framed(b"first") + framed(b"second"))
    file = TfRecordFile(path)
    assert [file[0], file[1]] == [b"first", b"second"] and len(file) == 2
    path.write_bytes(framed(b"first") + framed(b"other!")[:-1])
    with pytest.raises(InputError, match="must be at most 5, the bytes that are left, got 6"):
        file[1]


def test_random_changes_of_a_file_give_its_records_or_our_error(tmp_path):
    path, generator = tmp_path / "shard", np.random.default_rng(0)
    records = [bytes(generator.integers(0, 256, size, dtype=np.uint8)) for size in (0, 1, 40, 300)]
    whole = b"".join(map(framed, records))
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(generator.integers(1, 4)):
            at = int(generator.integers(len(content)))
            kind = generator.integers(3)
            if kind == 0:
                content[at] ^= 1 << int(generator.integers(8))
            elif kind == 1:
                del content[at : at + int(generator.integers(1, 20))]
            else:
                content[at:at] = generator.integers(0, 256, 3, dtype=np.uint8).tobytes()
            if not content:
                break
        path.write_bytes(content)
        try:
            file = TfRecordFile(path)
            found = [file[number] for number in range(len(file))]
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            # Whole records were cut off, which the counts of dataset_info.json show; no changed byte gets through.
            assert found == [record for record in records if record in found][: len(found)]
    assert refused > 300
