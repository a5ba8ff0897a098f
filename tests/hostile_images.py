"""Builds small image files that declare or expand to much; `read` decodes them for `budget.check`."""

import io
import struct
import zlib

from bad_cases import png
from PIL import Image

from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.data.records import StoredImage


def read(content: bytes) -> None:
    """Decodes an image file; for `budget.check`."""
    read_image(StoredImage("hostile", lambda: content))


def riff(kind: bytes, payload: bytes) -> bytes:
    chunk = kind + struct.pack("<I", len(payload)) + payload
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def encoded(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=image_format, **options)
    return buffer.getvalue()


def repeated_scans(count: int, side: int, mode: str = "RGB", *, progressive: bool = True) -> bytes:
    """Returns a JPEG of one colour whose last scan, of a few bytes, is repeated."""
    content = encoded(Image.new(mode, (side, side), "white"), "JPEG", progressive=progressive, quality=20)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + content[-2:]


def chunks(*parts: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG of one grey pixel with more chunks in front of its pixels."""
    whole = png(1, 1, 8, 0, b"\0\0")
    more = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return whole[:33] + more + whole[33:]


def tiff(*entries: tuple[int, int, int, int], more: bytes = b"") -> bytes:
    """Returns a TIFF of the (tag, type, count, value or offset) entries, and bytes behind its directory."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + more


SHORT, LONG, BYTE = 3, 4, 1


def tiff_image(width: int, height: int, *entries: tuple[int, int, int, int], more: bytes = bytes(100)) -> bytes:
    basic = {256: (LONG, 1, width), 257: (LONG, 1, height), 258: (SHORT, 1, 8), 259: (SHORT, 1, 1)}
    basic |= {262: (SHORT, 1, 1), 273: (LONG, 1, 8), 277: (SHORT, 1, 1), 278: (LONG, 1, height), 279: (LONG, 1, 100)}
    basic |= {tag: rest for tag, *rest in entries}
    return tiff(*((tag, *rest) for tag, rest in basic.items()), more=more)


def bmp_rle(width: int, height: int, data: bytes, *, bits: int = 8) -> bytes:
    start = 14 + 40 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 1 if bits == 8 else 2, len(data), 0, 0, 256, 0)
    return struct.pack("<2sIHHI", b"BM", start + len(data), 0, 0, start) + header + bytes(1024) + data


def gif_frames(count: int) -> bytes:
    frames = [Image.new("P", (9, 9), k % 3) for k in range(count)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def overlapping_tags(count: int, size: int) -> bytes:
    """Returns a TIFF of many tags that all view the same bytes of the file."""
    basic = [(tag, SHORT, 1, 1) for tag in (256, 257, 277, 278, 262)] + [(258, SHORT, 1, 8), (259, SHORT, 1, 1)]
    basic += [(273, LONG, 1, 8), (279, LONG, 1, 1)]
    at = 8 + 2 + 12 * (count + len(basic)) + 4
    return tiff(*basic, *((40_000 + k, BYTE, size, at) for k in range(count)), more=bytes(size))


BOMB = zlib.compress(bytes(10**8))
# Files and parts of what is said of them; None: they are read.
HOSTILE = {
    "a WebP of 34 bytes": (riff(b"VP8X", bytes(4) + b"\xff\x3f\0" * 2) + b"VP8 ", "too large: 16384 x 16384"),
    "a lossless WebP": (riff(b"VP8L", b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little")), "16383 x 16383"),
    "a PNG of 400 million pixels": (png(20_000, 20_000, 8, 2, bytes(9)), "data.max_pixels = 100,000,000"),
    "a PNG of one column": (png(1, 99_999_999, 8, 0, bytes(9)), "a side has at most 1,000,000 pixels"),
    "a profile that expands": (chunks((b"iCCP", b"a\0\0" + BOMB)), "cannot be decoded"),
    "texts that expand": (chunks(*[(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**6)))] * 80), "cannot be decoded"),
    "many chunks": (chunks(*[(b"tEXt", b"k\0")] * 60_000), None),
    "repeated scans": (repeated_scans(30_000, 300), "more than 100 scans pass over its 300 x 300 pixels"),
    "repeated scans of a large JPEG": (repeated_scans(200, 4000), "more than 93 scans"),
    "scans without progression": (repeated_scans(300, 300, "L", progressive=False), "more than 100 scans"),
    "tags that view the same bytes": (overlapping_tags(20_000, 700_000), None),
    "tiles larger than the image": (
        tiff_image(10, 10, (259, SHORT, 1, 5), (322, LONG, 1, 30_000), (323, LONG, 1, 30_000), (324, LONG, 1, 8)),
        "tile: the image is refused because it is too large: 30000 x 30000",
    ),
    "a GIF of many frames": (gif_frames(3000), None),
    "a frame beyond its GIF": (
        b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0x80, 0, 0) + bytes(6)
        + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2\x4c\1\0;",
        "too large for PIL.Image.MAX_IMAGE_PIXELS",
    ),
    "run lengths": (bmp_rle(9999, 10_000, b"\1\0\0\0" * 10_000), "allows 10,000,000 in a BMP of run lengths"),
    "a header of blanks": (b"P6 " + b" " * 900_000, "cannot be decoded"),
    "a file of segments": (b"\xff\xd8" + b"\xff\xfe\0\2" * 200_000, "cannot be decoded"),
}  # fmt: skip
