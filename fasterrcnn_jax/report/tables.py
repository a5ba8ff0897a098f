"""Packs tables of numbers into a page: the rows that its lists show.

A table is a dictionary of columns. The columns become 32-bit integers, byte by byte, and are compressed with zlib; the
page's script unpacks them with the browser's own DecompressionStream. A list of ten thousand boxes takes 100 kB.
"""

import base64
import json
import zlib
from collections.abc import Mapping

import numpy as np

# Factor of a column's values in the packed integers, by its name; 1 for others.
SCALES = {
    **{"score": 10_000, "iou": 1_000, "aspect": 1_000, "first": 1_000, "second": 1_000},
    **{"x1": 10, "y1": 10, "x2": 10, "y2": 10, "side": 10},
}


def packed(tables: Mapping[str, Mapping[str, np.ndarray]], texts: Mapping[str, list[str]]) -> str:
    """Returns tables and lists of texts as one base64 text.

    The bytes before the compression: the length of a JSON header as four bytes, little-endian; the header; and of each
    column in turn the lowest bytes of all values, then the second bytes, and so on.

    Args:
      tables: columns [n] of numbers by table and name. Values are rounded to the steps of `SCALES`.
      texts: lists of texts by name.
    """
    described, planes = {}, []
    for name, columns in tables.items():
        described[name] = {
            "rows": len(next(iter(columns.values()))),
            "columns": [{"name": column, "scale": SCALES.get(column, 1)} for column in columns],
        }
        for column, values in columns.items():
            whole = np.rint(np.asarray(values, np.float64) * SCALES.get(column, 1))
            limited = np.clip(whole, -(2**31), 2**31 - 1).astype("<i4")
            planes.append(limited.view(np.uint8).reshape(-1, 4).T.tobytes())
    header = json.dumps({"tables": described, "texts": texts}, separators=(",", ":")).encode()
    content = b"".join([len(header).to_bytes(4, "little"), header, *planes])
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")
