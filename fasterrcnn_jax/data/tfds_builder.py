"""Stores voc/2007, voc/2012 and coco/2017 as TFDS does, but without TensorFlow, which TFDS's own builders need.

Folders, features and the order of the records are those of TFDS's voc 5.0.0 and coco 1.1.0. Nothing is downloaded:
the user gives the published archives, or a folder into which they were unpacked. The splits without annotations (test
of VOC2012 and of COCO) are not stored.
"""

import contextlib
import io
import json
import stat
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasterrcnn_jax.data import coco, voc
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.data.tfds import first_sentence, import_tfds
from fasterrcnn_jax.errors import InputError, quoted
from fasterrcnn_jax.regular_files import check_regular

_POSES = ("frontal", "rear", "left", "right", "unspecified")
_VERSIONS = {"voc": "5.0.0", "coco": "1.1.0"}


class _Part(NamedTuple):
    """The source of one split."""

    split: str  # name of the split in TFDS
    source: str  # name of the split in the published archives
    archives: tuple[str, ...]
    listing: str  # file in the archives that names the split's images


def _voc_parts(year: str, **archives: str) -> tuple[_Part, ...]:
    names = {"train": "train", "val": "validation", "test": "test"}
    lists = f"VOCdevkit/VOC{year}/ImageSets/Main"
    return tuple(
        _Part(names[source], source, (archive,), f"{lists}/{source}.txt") for source, archive in archives.items()
    )


_PARTS = {
    "voc/2007": _voc_parts(
        "2007",
        train="VOCtrainval_06-Nov-2007.tar",
        val="VOCtrainval_06-Nov-2007.tar",
        test="VOCtest_06-Nov-2007.tar",
    ),
    "voc/2012": _voc_parts("2012", train="VOCtrainval_11-May-2012.tar", val="VOCtrainval_11-May-2012.tar"),
    "coco/2017": tuple(
        _Part(
            split,
            source,
            (f"{source}.zip", "annotations_trainval2017.zip"),
            f"annotations/instances_{source}.json",
        )
        for split, source in (("train", "train2017"), ("validation", "val2017"))
    ),
}


def build(name: str, archives: Path, root: Path) -> tuple[Path, dict[str, int]]:
    """Stores a data set below `root`; returns its folder and the number of images of each split.

    `read_voc` or `read_coco` checks every split first. Splits whose archives are missing are not stored.

    Args:
      name: voc/2007, voc/2012 or coco/2017.
      archives: folder that contains the archives or their unpacked content.
      root: the folder that TFDS calls data_dir. The archives are unpacked into it temporarily.

    Raises:
      InputError: the name is unknown, the data set is already stored, the archives of all its splits are missing,
        or an archive has a fault.
    """
    tfds = import_tfds()
    if name not in _PARTS:
        raise InputError(f"{name!r}: must be one of {', '.join(_PARTS)}; store other data sets with TFDS itself")
    version = _VERSIONS[name.split("/")[0]]
    folder = root / name / version
    if folder.exists():
        raise InputError(f"{folder}: exists already; remove it to store {name} again")
    present = [part for part in _PARTS[name] if _is_present(part, archives)]
    if not present:
        wanted = dict.fromkeys(archive for part in _PARTS[name] for archive in part.archives)
        raise InputError(f"{archives}: must contain {' and '.join(wanted)}, or their content; see docs/data.md")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unpacked_", dir=root) as unpacked:
        examples = {}
        for part in present:
            source = _unpacked(part, archives, Path(unpacked))
            examples[part.split] = (_voc_examples if name.startswith("voc") else _coco_examples)(tfds, source, part)
        builder = _builder(tfds, name, version, examples, root)
        # TFDS prints that it downloads the data set; nothing is downloaded, so its output is dropped.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=Path(unpacked) / "downloads")
    return folder, {part.split: builder.info.splits[part.split].num_examples for part in present}


def _builder(tfds: Any, name: str, version: str, examples: dict[str, Iterator], root: Path) -> Any:
    """Returns a builder that is not registered with TFDS, because TFDS has a builder of the same name."""
    set_name, config = name.split("/")
    features = (_voc_features if set_name == "voc" else _coco_features)(tfds)

    # For a base class that is known at run time alone, pyright assumes that it takes no argument.
    class Builder(  # pyright: ignore[reportGeneralTypeIssues]
        tfds.core.GeneratorBasedBuilder,
        skip_registration=True,  # pyright: ignore[reportCallIssue]
    ):
        name = set_name
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version=version)]

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            return examples

        def _generate_examples(self) -> Iterator:
            raise NotImplementedError("the split generators give the examples")

    return Builder(data_dir=root, file_format="array_record")


def _is_present(part: _Part, archives: Path) -> bool:
    return (archives / part.listing).is_file() or all((archives / name).is_file() for name in part.archives)


def _unpacked(part: _Part, archives: Path, unpacked: Path) -> Path:
    """Returns the folder with the part's files: `archives` if it has them, else `unpacked` after unpacking."""
    if (archives / part.listing).is_file():
        return archives
    for name in part.archives:
        done = unpacked / f"{name}.done"
        if done.exists():
            continue
        check_regular(archives / name)
        try:
            # Both methods refuse or correct paths outside the folder.
            if name.endswith(".zip"):
                with zipfile.ZipFile(archives / name) as file:
                    items = file.infolist()
                    _refuse_links([item.filename for item in items if _is_special(item.external_attr >> 16)])
                    _refuse_expansion(archives / name, sum(item.file_size for item in items))
                    file.extractall(unpacked)
            else:
                # The published archives are not compressed.
                with tarfile.open(archives / name, "r:") as file:
                    items = file.getmembers()
                    _refuse_links([item.name for item in items if not (item.isfile() or item.isdir())])
                    _refuse_expansion(archives / name, sum(item.size for item in items))
                    file.extractall(unpacked, filter="data")
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError, zlib.error) as error:
            raise InputError(f"{archives / name}: the archive cannot be unpacked: {first_sentence(error)}") from error
        done.touch()
    if not (unpacked / part.listing).is_file():
        raise InputError(f"{archives / part.archives[-1]}: the archive does not contain {part.listing}")
    return unpacked


def _is_special(mode: int) -> bool:
    """True for a link or a device. Archives of systems without file modes have 0."""
    return stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)


# The published archives unpack to at most 4 times their size.
MAX_EXPANSION = 20


def _refuse_expansion(archive: Path, unpacked: int) -> None:
    """Raises ValueError if the files of an archive declare far more bytes than it has."""
    size = archive.stat().st_size
    if unpacked > MAX_EXPANSION * size:
        raise ValueError(f"its {size:,} bytes would unpack to {unpacked:,}")


def _refuse_links(names: list[str]) -> None:
    """Raises ValueError if an archive contains links or devices; the published archives contain only files and folders.

    A link longer than PATH_MAX gets past the filter of Python before 3.11.13 and overwrites a file outside.
    """
    if names:
        raise ValueError(f"{quoted(names[0])} is a link or a device")


def _voc_features(tfds: Any) -> dict[str, Any]:
    label = tfds.features.ClassLabel(names=voc.CLASS_NAMES)
    return {
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "objects": tfds.features.Sequence(
            {
                "label": label,
                "bbox": tfds.features.BBoxFeature(),
                "pose": tfds.features.ClassLabel(names=_POSES),
                "is_truncated": np.bool_,
                "is_difficult": np.bool_,
            }
        ),
        "labels": tfds.features.Sequence(label),
        "labels_no_difficult": tfds.features.Sequence(label),
    }


def _voc_examples(tfds: Any, folder: Path, part: _Part) -> Iterator[tuple[str, dict[str, Any]]]:
    """Returns pairs of TFDS's key and features; checks all annotations before it returns."""
    root = (folder / part.listing).parents[2]
    dataset = voc.read_voc(root, part.source, voc.CLASS_NAMES)
    return (
        (
            record.id,
            _voc_example(tfds, root / "Annotations" / f"{record.id}.xml", record.path, record.image_hw),
        )
        for record in _as_stored(dataset)
    )


def _voc_example(tfds: Any, annotation: Path, image: Path, image_hw: tuple[int, int]) -> dict[str, Any]:
    height, width = image_hw
    objects = []
    for element in ElementTree.parse(annotation).getroot().findall("object"):
        x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{tag}", "")) for tag in ("xmin", "ymin", "xmax", "ymax"))
        pose = (element.findtext("pose") or "").strip().lower()
        objects.append(
            {
                "label": element.findtext("name", "").strip(),
                # VOC's 1-based indices, unconverted: TFDS stores these, and our TFDS reader converts them.
                "bbox": _parts(tfds, (x1 / width, y1 / height, x2 / width, y2 / height)),
                "pose": pose if pose in _POSES else "unspecified",
                "is_truncated": (element.findtext("truncated") or "").strip() == "1",
                "is_difficult": (element.findtext("difficult") or "").strip() == "1",
            }
        )
    return {
        "image": image,
        "image/filename": image.name,
        "objects": objects,
        "labels": sorted({item["label"] for item in objects}),
        "labels_no_difficult": sorted({item["label"] for item in objects if not item["is_difficult"]}),
    }


def _coco_features(tfds: Any) -> dict[str, Any]:
    return {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "image/filename": tfds.features.Text(),
        "image/id": np.int64,
        "objects": tfds.features.Sequence(
            {
                "id": np.int64,
                "area": np.int64,
                "bbox": tfds.features.BBoxFeature(),
                "label": tfds.features.ClassLabel(names=coco.CLASS_NAMES),
                "is_crowd": np.bool_,
            }
        ),
    }


def _coco_examples(tfds: Any, folder: Path, part: _Part) -> Iterator[tuple[str, dict[str, Any]]]:
    """Returns pairs of TFDS's key and features, as `_voc_examples` does."""
    listing = folder / part.listing
    dataset = coco.read_coco(listing, folder / part.source, coco.CLASS_NAMES)
    content = json.loads(listing.read_text("utf-8"))
    names = {item["id"]: item["name"] for item in content["categories"]}
    annotations = defaultdict(list)
    for item in sorted(content["annotations"], key=lambda item: item["id"]):
        annotations[str(item["image_id"])].append(item)
    return (
        (
            record.path.name,
            {
                "image": record.path,
                "image/filename": record.path.name,
                "image/id": int(record.id),
                "objects": [_coco_object(tfds, item, names, record.image_hw) for item in annotations[record.id]],
            },
        )
        for record in _as_stored(dataset)
    )


def _coco_object(tfds: Any, item: dict[str, Any], names: dict[int, str], image_hw: tuple[int, int]) -> dict[str, Any]:
    (height, width), (x, y, box_width, box_height) = image_hw, item["bbox"]
    return {
        "id": item["id"],
        "area": int(item.get("area", box_width * box_height)),
        "bbox": _parts(tfds, (x / width, y / height, (x + box_width) / width, (y + box_height) / height)),
        "label": names[item["category_id"]],
        "is_crowd": bool(item.get("iscrowd", 0)),
    }


def _parts(tfds: Any, corners: tuple[float, float, float, float]) -> Any:
    """Returns TFDS's box of xyxy in fractions of the image, clipped, because TFDS refuses boxes outside the image."""
    x1, y1, x2, y2 = (float(min(max(corner, 0.0), 1.0)) for corner in corners)
    return tfds.features.BBox(ymin=y1, xmin=x1, ymax=y2, xmax=x2)


def _as_stored(dataset: Dataset) -> tuple:
    """Returns the records; refuses boxes of a turned image, because TFDS's readers never apply the orientation."""
    turned = next((record.path for record in dataset.records if record.upright), None)
    if turned is not None:
        raise InputError(f"{turned}: its boxes refer to the image turned by EXIF, which TFDS does not support")
    return dataset.records
