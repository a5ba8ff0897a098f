"""Loads a detector that `fasterrcnn-jax export` wrote. It needs JAX and flatbuffers, and this one file of the package.

The file is a zip of a manifest, the weights, and one StableHLO program for each canvas of the network. Nothing in it is
a pickle. The manifest holds the digests of the other members, and the comment of the zip holds the digest of the
manifest.
"""

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

FORMAT, FORMAT_VERSION = "fasterrcnn_jax exported detector", 1
MANIFEST, WEIGHTS = "manifest.json", "weights.bin"

Size = tuple[int, int]  # (height, width)


class Found(NamedTuple):
    """The detections in one image, best first."""

    boxes: np.ndarray  # float32 [n, 4], xyxy in pixels of the original image
    scores: np.ndarray  # float32 [n]
    labels: np.ndarray  # int32 [n], 1 to the number of classes
    names: tuple[str, ...]  # class name of each detection


class ExportedDetector:
    """A detector from an exported file; `load_exported` makes it.

    Attributes:
      class_names: label k is `class_names[k - 1]`.
      canvas: (height, width) of the arrays that `__call__` takes, and so the size of the largest image.
      platforms: what the programs were lowered for: "cpu", "cuda", "tpu".
      network_canvases: (height, width) of each canvas of the network; each has a program.
      digest: SHA-256 of the manifest, which holds those of the weights and of the programs.
      manifest: everything that the file says of itself.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], digest: str, weights: list[Any], programs: dict[Size, Any]
    ):
        self.path, self.manifest, self.digest = path, manifest, digest
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.canvas: Size = _size(manifest["canvas"])
        self.platforms: tuple[str, ...] = tuple(manifest["platforms"])
        self.network_canvases: tuple[Size, ...] = tuple(programs)
        self._weights, self._programs = weights, programs
        self._compiled: dict[Size, Callable] = {}

    def __call__(self, images: Any, sizes: Any) -> dict[str, jax.Array]:
        """Returns boxes [b, d, 4], scores [b, d], labels [b, d] and valid [b, d] of a batch, in fixed shapes.

        Boxes are xyxy in pixels of the original images. Only entries whose `valid` is True are detections; the others
        are zero. Each batch size is compiled once for each canvas of the network. Images that need different canvases
        run one canvas after the other.

        Args:
          images: uint8 [b, height, width, 3], RGB, with the height and width of `canvas`. Each image lies in the upper
            left corner, and the rest is never read.
          sizes: whole numbers [b, 2], (height, width) of each image. An image of size zero has no detections.
        Raises:
          ValueError: an array has another shape or type, or an image is larger than the canvas.
        """
        sizes = np.asarray(sizes)
        height, width = self.canvas
        if images.ndim != 4 or images.shape[1:] != (height, width, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"images must be uint8 [batch, {height}, {width}, 3], got {images.dtype} {list(images.shape)}"
            )
        if sizes.shape != (len(images), 2) or not np.issubdtype(sizes.dtype, np.integer):
            raise ValueError(
                f"sizes must be (height, width) of each image, whole numbers [{len(images)}, 2], got {sizes.dtype} "
                f"{list(sizes.shape)}"
            )
        if not len(images):
            raise ValueError("there is no image in the batch")
        for row, size in enumerate(sizes):
            self.check_size(_size(size), f"image {row}", smallest=0)
        sizes = sizes.astype(np.int32)
        rows: dict[Size, list[int]] = {}
        for row, size in enumerate(sizes):
            if size.all():
                rows.setdefault(self.network_canvas(_size(size)), []).append(row)
        if len(rows) < 2:
            return self.on_canvas(next(iter(rows), next(iter(self._programs))), images, sizes)
        # Rows of size zero run with the first group.
        empty = [row for row in range(len(sizes)) if not sizes[row].all()]
        next(iter(rows.values())).extend(empty)
        parts = [self.on_canvas(canvas, images[np.array(chosen)], sizes[chosen]) for canvas, chosen in rows.items()]
        order = np.argsort(np.concatenate(list(rows.values())))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *parts)

    def predict(self, images: Sequence[np.ndarray], *, batch_size: int = 1) -> list[Found]:
        """Returns the detections in each image, in pixels of the image.

        Images are grouped by the canvas that they need. Every batch has exactly `batch_size` rows, so each canvas is
        compiled once.

        Args:
          images: uint8 [height, width, 3], RGB, of any sizes up to `canvas`.
        Raises:
          ValueError: an image has another shape or type or is larger than the canvas, or `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        positions: dict[Size, list[int]] = {}
        for position, image in enumerate(images):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(
                    f"image {position} must be uint8 [height, width, 3], got {image.dtype} {list(image.shape)}"
                )
            self.check_size(_size(image.shape), f"image {position}")
            positions.setdefault(self.network_canvas(_size(image.shape)), []).append(position)
        found: dict[int, Found] = {}
        for canvas, listed in positions.items():
            for start in range(0, len(listed), batch_size):
                chosen = listed[start : start + batch_size]
                pixels = np.zeros((batch_size, *self.canvas, 3), np.uint8)
                sizes = np.zeros((batch_size, 2), np.int32)
                for row, position in enumerate(chosen):
                    sizes[row] = height, width = _size(images[position].shape)
                    pixels[row, :height, :width] = images[position]
                batch = jax.device_get(self.on_canvas(canvas, pixels, sizes))
                for row, position in enumerate(chosen):
                    valid = batch["valid"][row]
                    boxes, scores, labels = (batch[name][row][valid] for name in ("boxes", "scores", "labels"))
                    found[position] = Found(boxes, scores, labels, tuple(self.class_names[k - 1] for k in labels))
        return [found[position] for position in range(len(images))]

    def network_canvas(self, image_hw: Size) -> Size:
        """Returns the canvas of the network that an image of this size runs on: the smallest one that it fits on."""
        sizes = self.manifest["sizes"]
        short, long = min(image_hw), max(image_hw)
        by_short = sizes["short_side"] * long <= sizes["long_side"] * short
        side, of = (sizes["short_side"], short) if by_short else (sizes["long_side"], long)
        whole = round if sizes["size_rounding"] == "nearest" else math.floor
        height, width = (max(1, whole(length * side / of)) for length in image_hw)
        fitting = [canvas for canvas in self._programs if canvas[0] >= height and canvas[1] >= width]
        return min(fitting, key=lambda canvas: canvas[0] * canvas[1])

    def on_device(self, device: Any) -> "ExportedDetector":
        """Returns the same detector with its weights on one `jax.Device`, which then runs it."""
        weights = jax.device_put(self._weights, device)
        return ExportedDetector(self.path, self.manifest, self.digest, weights, self._programs)

    def on_canvas(self, network_canvas: Size, images: Any, sizes: Any) -> dict[str, jax.Array]:
        """Returns the same as `__call__`, with all images on one canvas of the network, one of the manifest's.

        It may be called inside `jax.jit`; sizes are then not checked. An image that does not fit on the canvas becomes
        as large as fits.
        """
        if network_canvas not in self._compiled:
            self._compiled[network_canvas] = jax.jit(self._programs[network_canvas].call)
        return self._compiled[network_canvas](self._weights, images, sizes)

    def check_size(self, size: Size, name: str, *, smallest: int = 1) -> None:
        """Raises ValueError, which calls the image `name`, if a side is below `smallest` or larger than the canvas."""
        (height, width), most = size, self.canvas
        if min(size) < smallest:
            raise ValueError(f"{name} is {height} x {width} pixels (height x width), which is no size of an image")
        if height > most[0] or width > most[1]:
            wanted = f"{max(height, most[0])} {max(width, most[1])}"
            raise ValueError(
                f"{name} is {height} x {width} pixels (height x width), larger than the canvas of "
                f"{most[0]} x {most[1]} of {self.path}: make the image smaller, or export again with --canvas {wanted}"
            )


def load_exported(path: str | Path) -> ExportedDetector:
    """Returns the detector of a file that `fasterrcnn-jax export` wrote.

    The digests find a damaged file; they do not say who wrote it. Load programs only from people whom you trust.

    Raises:
      ValueError: the path is no such file, the file is damaged, or it holds no program for this process's platform or
        JAX.
    """
    path = Path(path)
    manifest, digest, members = _checked(path)
    here = export.default_export_platform()
    if here not in manifest["platforms"]:
        raise ValueError(
            f"{path}: the programs are for {', '.join(manifest['platforms'])}, and this process runs on {here}; export "
            f"again with --platforms {here}"
        )
    try:
        files = {_size(program["network_canvas"]): members[program["file"]] for program in manifest["programs"]}
        programs = {canvas: _program(path, files[canvas], manifest["versions"]["jax"]) for canvas in files}
        return ExportedDetector(path, manifest, digest, _weights(members[WEIGHTS], manifest["weights"]), programs)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: {MANIFEST} lacks {error}; the file is damaged") from error


def is_exported(path: str | Path) -> bool:
    """Returns whether the path is a file that looks like one of `fasterrcnn-jax export`; weights are also zips."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {MANIFEST, WEIGHTS} <= set(archive.namelist())
    # ValueError: a name of a file or of a member that cannot be encoded; NotImplementedError: a later version of zip.
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def packed(manifest: dict[str, Any], members: dict[str, bytes]) -> bytes:
    """Returns the bytes of a file with these members; the same members give the same bytes.

    Args:
      manifest: without `format`, `format_version` and `sha256`, which are added.
    """
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest, "sha256": digests}
    text = json.dumps(manifest, indent=1).encode()
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in {MANIFEST: text, **members}.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # a fixed date, and not compressed
        archive.comment = f"sha256:{hashlib.sha256(text).hexdigest()}".encode()
    return written.getvalue()


def read_manifest(path: str | Path) -> tuple[dict[str, Any], str]:
    """Returns what the file says of itself, and its digest, on any platform; checks every digest.

    Raises:
      ValueError: the path is no such file, or the file is damaged.
    """
    return _checked(Path(path))[:2]


def _checked(path: Path) -> tuple[dict[str, Any], str, dict[str, bytes]]:
    """Returns the manifest, its digest, and the members, which have the digests in the manifest."""
    try:
        members, digest = _members(path)
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a file of fasterrcnn-jax export, or damaged: {error}") from error
    if digest is None or hashlib.sha256(members[MANIFEST]).hexdigest() != digest:
        raise ValueError(f"{path}: {MANIFEST} does not have the digest that the file says; the file is damaged")
    manifest = json.loads(members[MANIFEST])
    if manifest.get("format") != FORMAT or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {manifest.get('format_version')!r} of {manifest.get('format')!r} cannot be read, "
            f"only {FORMAT_VERSION} of {FORMAT!r}"
        )
    for name, known in manifest["sha256"].items():
        if hashlib.sha256(members.get(name, b"")).hexdigest() != known:
            raise ValueError(f"{path}: {name} does not have the digest in the manifest; the file is damaged")
    return manifest, digest, members


def _members(path: Path) -> tuple[dict[str, bytes], str | None]:
    """Returns the content of each member that the format has, and the digest in the comment."""
    with zipfile.ZipFile(path) as archive:
        if not {MANIFEST, WEIGHTS} <= set(archive.namelist()):
            raise zipfile.BadZipFile(f"there is no {MANIFEST} or no {WEIGHTS} in it")
        # A small file could unpack to any size.
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise zipfile.BadZipFile("a part of it is compressed")
        members = {info.filename: archive.read(info) for info in archive.infolist()}
        kind, _, digest = archive.comment.decode().partition(":")
    return members, digest if kind == "sha256" else None


def _program(path: Path, content: bytes, written_by: str) -> export.Exported:
    try:
        program = export.deserialize(bytearray(content))
        # JAX would otherwise parse it in the first call, and fail there.
        program.mlir_module()
        return program
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs flatbuffers: pip install flatbuffers") from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: JAX {jax.__version__} cannot read the program that JAX {written_by} wrote; export again with JAX "
            f"{jax.__version__}, or install JAX {written_by} ({reason})"
        ) from error


def _weights(content: bytes, described: list[list[Any]]) -> list[jax.Array]:
    """Returns the arrays, which follow one another in `content`; each is described by its type and shape."""
    weights, start = [], 0
    for dtype, shape in described:
        count = math.prod(shape)
        array = np.frombuffer(content, jnp.dtype(dtype), count, start).reshape(shape)
        start += array.nbytes
        weights.append(jnp.asarray(array))
    return weights


def _size(values: Any) -> Size:
    return int(values[0]), int(values[1])
