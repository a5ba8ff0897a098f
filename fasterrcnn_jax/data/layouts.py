"""How a folder of labelled images is laid out, guessed from what is in it."""

from pathlib import Path

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import coco, voc
from fasterrcnn_jax.errors import InputError

# Where COCO's images lie beside their annotations: as published, and as others lay them out.
_IMAGE_FOLDERS = ("{split}", "images/{split}", "images", "JPEGImages", ".")


def guess(root: Path) -> tuple[DataConfig, tuple[str, ...]]:
    """Returns the configuration of the data in `root` and the names of its splits.

    The classes are those that the file declares or the objects of all splits have.

    Raises:
      InputError: it is laid out in none of the ways that are known.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder or configuration")
    years = sorted(path for path in root.glob("VOC[0-9][0-9][0-9][0-9]") if voc.splits(path))
    if voc.splits(root):
        places = {name: (root, name) for name in voc.splits(root)}
        return DataConfig(root=root, class_names=_names(places)), tuple(places)
    if years:
        places = {f"{path.name[3:]}_{name}": (path, name) for path in years for name in voc.splits(path)}
        return DataConfig(root=root, layout="vocdevkit", class_names=_names(places)), tuple(places)
    files = sorted(root.glob("annotations/instances*.json")) or sorted(root.glob("instances*.json"))
    if not files:
        raise InputError(
            f"{root}: holds neither ImageSets/Main with JPEGImages and Annotations, nor VOC2007 or another year, "
            "nor annotations/instances_SPLIT.json"
        )
    prefix = "annotations/" if files[0].parent.name == "annotations" else ""
    pattern = f"{prefix}instances_{{split}}.json"
    splits = tuple(path.stem.removeprefix("instances_") for path in files if "_" in path.stem)
    if not splits:
        pattern, splits = f"{prefix}{files[0].name}", (files[0].stem,)
    images = next(
        folder
        for folder in _IMAGE_FOLDERS
        if all((root / folder.replace("{split}", split)).is_dir() for split in splits)
    )
    names = coco.category_names(root / pattern.replace("{split}", splits[0]))
    data = DataConfig(root=root, layout="coco", coco_annotations=pattern, coco_images=images, class_names=names)
    return data, splits


def _names(places: dict[str, tuple[Path, str]]) -> tuple[str, ...]:
    names = {name for place in places.values() for name in voc.class_names_in(*place)}
    if not names:
        raise InputError(f"{next(iter(places.values()))[0]}: no list of it names an object")
    return tuple(sorted(names))
