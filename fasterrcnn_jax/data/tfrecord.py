"""Reads the records of TFRecord files, the format that TFDS stores by default, without TensorFlow.

A file is a sequence of records: the length of the data as a little-endian integer of 64 bits, a checksum of these 8
bytes, the data, and a checksum of the data (tensorflow.org/tutorials/load_data/tfrecord). A checksum is CRC-32C
(RFC 3720, appendix B.4), rotated and shifted so that data that hold checksums keep theirs.
"""

import importlib
import struct
from array import array
from pathlib import Path

from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.regular_files import check_regular

_HEADER, _CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
_MASK = 0xA282EAD8
REMEDY = "copy the file again, or store the data set again with TFDS"


class TfRecordFile:
    """The records of one file by number. Only their places are in memory; each read opens the file, for any thread.

    Raises:
      InputError: the file is missing, or a length in it does not fit: it is cut, damaged, compressed or no TFRecord.
    """

    def __init__(self, path: Path):
        check_regular(path)
        self.path = path
        # Places of the headers; array("Q") takes 8 bytes for each.
        self._starts = array("Q")
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                start = 0
                while start < size:
                    file.seek(start)
                    length = self._length(file.read(_HEADER.size), start, size)
                    self._starts.append(start)
                    start += _HEADER.size + length + _CHECKSUM.size
        except OSError as error:
            raise InputError(f"{path}: the file cannot be read: {error.strerror or error}") from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> bytes:
        """Returns the data of a record.

        Raises:
          InputError: the checksum of the data is another one, or the file has changed since it was opened.
        """
        start = self._starts[number]
        with open(self.path, "rb") as file:
            size = self.path.stat().st_size
            file.seek(start)
            length = self._length(file.read(_HEADER.size), start, size)
            data, stored = file.read(length), file.read(_CHECKSUM.size)
        if len(stored) != _CHECKSUM.size or _CHECKSUM.unpack(stored)[0] != masked_checksum(data):
            raise InputError(
                f"{self.path}[{number}], data: the checksum of the {length:,} bytes from byte {start:,} differs from "
                f"the stored one; {REMEDY}"
            )
        return data

    def _length(self, header: bytes, start: int, size: int) -> int:
        """Returns the length of the data, which the rest of the file can hold: the length itself may be hostile."""
        where = f"{self.path}, length of the record at byte {start:,}"
        if len(header) < _HEADER.size:
            raise InputError(f"{where}: the file ends within it; {REMEDY}")
        length, stored = _HEADER.unpack(header)
        if stored != masked_checksum(header[:8]):
            raise InputError(f"{where}: its checksum differs from the stored one; {REMEDY}, not compressed")
        left = size - start - _HEADER.size - _CHECKSUM.size
        if length > left:
            raise InputError(
                f"{where}: must be at most {max(left, 0):,}, the bytes that are left, got {length:,}; {REMEDY}"
            )
        return length


def masked_checksum(data: bytes) -> int:
    """Returns the checksum as TFRecord stores it."""
    # An extension module, which only the extra tfds installs.
    checksum = importlib.import_module("google_crc32c").value(data)
    return (((checksum >> 15) | (checksum << 17)) + _MASK) & 0xFFFFFFFF
