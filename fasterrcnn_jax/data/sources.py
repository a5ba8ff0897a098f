"""Opens the data sets that a configuration names, and folders of images without labels."""

import contextlib
import dataclasses
import difflib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.config.checks import AUTO
from fasterrcnn_jax.config.data import Layout as LayoutName
from fasterrcnn_jax.data import coco, csv_table, labelme, tfds, voc, yolo
from fasterrcnn_jax.data.faults import (
    skip_undecodable,
)
from fasterrcnn_jax.data.file_names import files_below
from fasterrcnn_jax.data.layouts import (
    IMAGE_EXTENSIONS,
    SPLIT_NAMES,
    WHOLE,
    Layout,
    names_below,
    part_of_a_name,
    splits_of,
)
from fasterrcnn_jax.data.records import Dataset, Finding, joined_names, labels_of
from fasterrcnn_jax.data.shapes import make_shapes
from fasterrcnn_jax.errors import InputError

logger = logging.getLogger(__name__)

OTHER_IDS = "Joined files give the classes different ids, so results have the ids 1, 2, 3 and so on"

_COCO_SITE = "https://cocodataset.org/#download"
_VOC_SITE = "http://host.robots.ox.ac.uk/pascal/VOC/"
_VOC_ARCHIVES = {
    "2007": "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar",
    "2012": "VOCtrainval_11-May-2012.tar",
}


def open_split(data: DataConfig, split: str) -> Dataset:
    """Returns the records of `split`; of several splits one after another if their names are joined by +.

    With `data.shapes`, draws the shapes data set first.

    Raises:
      InputError: no class names are given, the data is missing or has a fault, or joined splits share an image.
    """
    _draw_shapes(data)
    dataset = read(data, split)
    if data.faults == "skip":
        dataset = skip_undecodable(dataset)
    logger.info("%s: %d images", dataset.name, len(dataset.records))
    for note in dataset.notes:
        logger.warning("%s", note)
    return dataset


def read(data: DataConfig, split: str) -> Dataset:
    """Returns the same as `open_split`, but decodes no image and logs nothing."""
    if data.layout == AUTO:
        data = with_layout(data)
    names = split.split("+")
    if not data.class_names:
        found = joined_names(
            sorted({class_name for name in names for class_name in _class_names(data, name)}), most=1000
        )
        raise InputError(f"data.class_names is empty; give class names, the objects in {data.root} are named: {found}")
    return _joined([(name, read_split(data, name)) for name in names])


def read_split(data: DataConfig, name: str) -> Dataset:
    """Returns the records of one split; pixels are not decoded."""
    options = {"faults": data.faults, "max_pixels": data.max_pixels, "within": _within(data)}
    if data.tfds_name is not None:  # of layout tfds alone, and always
        return tfds.read_tfds(data.root, data.tfds_name, name, data.class_names, **options)
    if data.layout == "coco":
        return coco.read_coco(*_coco_place(data, name), data.class_names, **options)
    if data.layout in _WHOLE_FOLDER:
        _, read_folder = _WHOLE_FOLDER[data.layout]
        return read_folder(data.root, name, data.class_names, **options)
    root, of_list, places = _voc_place(data, name)
    return voc.read_voc(root, of_list, data.class_names, places, **options)


# Layouts whose files are found by the reader itself: its module and its function.
_WHOLE_FOLDER = {
    "yolo": (yolo, yolo.read_yolo),
    "labelme": (labelme, labelme.read_labelme),
    "csv": (csv_table, csv_table.read_csv),
}


def _within(data: DataConfig) -> Path | None:
    """Returns the folder that symbolic links must not lead out of, or None."""
    return None if data.follow_links else data.root


def _draw_shapes(data: DataConfig) -> None:
    shapes = data.shapes
    if shapes is not None:
        make_shapes(data.root, seed=shapes.seed, num_train=shapes.num_train, num_test=shapes.num_test)


def with_class_names(data: DataConfig) -> DataConfig:
    """Returns `data` as `understood` completes it."""
    return understood(data)[0]


def understood(data: DataConfig) -> tuple[DataConfig, Layout | None]:
    """Returns the same as `placed`, with class names. With `data.shapes`, draws the shapes data set first.

    If none are given, they are those of all splits, in the order that the data declares, or sorted where it declares
    none, as in VOC.

    Raises:
      InputError: as in `placed`; the training split cannot be read or has no class, or the data has no class of a given
        name.
    """
    _draw_shapes(data)
    data, layout = placed(data)
    if data.class_names:
        _check_class_names(data)
        return data, layout
    names = () if layout is None else _names_of_layout(layout)
    if not names:  # the splits are not known, or cannot be read
        found = dict.fromkeys(name for split in data.train_split.split("+") for name in _class_names(data, split))
        names = tuple(found if _declares(data) else sorted(found))
    if not names:
        # A fault of a file may be the reason, and reading says it.
        read(dataclasses.replace(data, class_names=("object",)), data.train_split)
        found = f"; {_seen(data.root)}" if layout is not None and NO_SIGN in layout.notes else ""
        raise InputError(f"{data.root}: no object of the split {data.train_split} has a class name{found}")
    return dataclasses.replace(data, class_names=names), layout


def _names_of_layout(layout: Layout) -> tuple[str, ...]:
    """Returns the class names of all splits of a layout."""
    if layout.data.class_names:
        return layout.data.class_names
    names = _names_of_splits(layout.data, layout.splits)
    return tuple(names if _declares(layout.data) else sorted(names))


def _check_class_names(data: DataConfig) -> None:
    """Raises InputError if a given class name is in no split: most likely it is mistyped."""
    absent, known = set(labels_of(data.class_names)), set()
    for name in _all_class_names(data):
        known.add(name)
        absent.discard(name)
        if not absent:
            return
    if not known:  # reading says what is missing
        return
    if data.layout == "yolo" and all(name.isdecimal() for name in known):  # class_names name the class numbers
        return
    name = next(name for name in labels_of(data.class_names) if name in absent)
    letters = {other.lower(): other for other in sorted(known)}
    near = [letters[word] for word in difflib.get_close_matches(name.lower(), letters, cutoff=0.6)]
    meant = f"did you mean {' or '.join(map(repr, near))}?" if near else f"they are named {joined_names(sorted(known))}"
    raise InputError(f"data.class_names: no object in {data.root} is named {name!r}; {meant}")


def _declares(data: DataConfig) -> bool:
    """Returns whether the layout lists its classes in an order."""
    return data.layout not in ("voc", "vocdevkit")


def _all_class_names(data: DataConfig) -> Iterator[str]:
    """Yields the class names of all splits."""
    if data.layout == "voc":
        yield from voc.object_names(data.root, _voc_places(data), within=_within(data))
        return
    splits = dict.fromkeys([*data.train_split.split("+"), *data.test_split.split("+"), *_splits(data)])
    for split in splits:
        yield from _names_of_splits(data, (split,))


def _names_of_splits(data: DataConfig, splits: Iterable[str]) -> dict[str, None]:
    """Returns the class names of some splits. A split that cannot be read has none here: reading it says why."""
    names = {}
    for split in splits:
        with contextlib.suppress(InputError):
            names |= dict.fromkeys(_class_names(data, split))
    return names


def _splits(data: DataConfig) -> tuple[str, ...]:
    """Returns the splits that the folder has; () where the layout does not tell without reading."""
    if data.layout == "voc":
        return voc.splits(data.root, _voc_places(data))
    if data.layout == "vocdevkit":
        return _devkit_splits(data.root)
    if data.layout in _WHOLE_FOLDER:
        return _WHOLE_FOLDER[data.layout][0].splits(data.root, within=_within(data))
    return (splits_of(data.root, data.coco_annotations) or ()) if data.layout == "coco" else ()


def _class_names(data: DataConfig, name: str) -> tuple[str, ...]:
    if data.tfds_name is not None:
        return tfds.class_names_of(data.root, data.tfds_name, within=_within(data))
    if data.layout == "coco":
        return coco.category_names(_coco_place(data, name)[0], within=_within(data))
    if data.layout in _WHOLE_FOLDER:
        return _WHOLE_FOLDER[data.layout][0].class_names_in(data.root, name, within=_within(data))
    return voc.class_names_in(*_voc_place(data, name), within=_within(data))


def _recognise_devkit(root: Path, *, within: Path | None = None) -> Layout | None:
    splits = _devkit_splits(root)
    if not splits:
        return None
    years = dict.fromkeys(f"VOC{split[:4]}" for split in splits)
    why = f"lists are in ImageSets/Main of {', '.join(years)}"
    return Layout("VOCdevkit", why, DataConfig(root=root, layout="vocdevkit"), splits)


def _devkit_splits(root: Path) -> tuple[str, ...]:
    years = sorted(root.glob("VOC[0-9][0-9][0-9][0-9]"))
    return tuple(f"{path.name[3:]}_{name}" for path in years for name in voc.splits(path) if name != WHOLE)


# By `data.layout`, in the order in which they are asked: the files of the first leave no doubt.
_RECOGNISERS: dict[str, Callable[..., Layout | None]] = {
    "vocdevkit": _recognise_devkit,
    "coco": coco.recognise,
    "voc": voc.recognise,
    "labelme": labelme.recognise,
    "yolo": yolo.recognise,
    "csv": csv_table.recognise,
}

# Fields that a layout sets.
PLACES = ("voc_images", "voc_annotations", "voc_lists", "voc_counts_from", "coco_annotations", "coco_images")


def recognise(root: Path, *, follow_links: bool = False) -> Layout:
    """Returns the layout of the labelled images in `root`, with the class names.

    A folder that contains nothing but one folder is taken for that folder.

    Args:
      follow_links: as `data.follow_links`.

    Raises:
      InputError: the folder has no known layout; the sentence says what was found. Or a file is a link out of it.
    """
    layout = _recognised(root, AUTO, follow_links)
    return layout._replace(data=dataclasses.replace(layout.data, class_names=_names_of_layout(layout)))


def _recognised(root: Path, named: LayoutName, follow_links: bool) -> Layout:
    """Returns the same as `recognise`, but the class names only where recognising reads them anyway.

    Args:
      named: the layout that the folder must have, as `data.layout` names it.
    Raises:
      InputError: as in `recognise`; or the folder is not of the named layout.
    """
    if root.is_file():
        raise InputError(f"{root}: must be the folder of the data set, but is a file; {_way_to_folder(root)}")
    if not root.is_dir():
        raise InputError(f"{root}: no such folder or configuration file")
    inner = _inner(root)
    within = None if follow_links else root
    files_below(inner, within)  # refuses links before any file is opened
    layout = None if named == AUTO else _RECOGNISERS[named](inner, within=within)
    notes = []
    if layout is None:
        fitting, faults = _fitting(inner, within)
        if named != AUTO:
            layout = _as_named(root, inner, named, fitting)
        elif not fitting:
            raise faults[0] if faults else InputError(f"{root}: no known layout of labelled images: {_seen(inner)}")
        else:
            layout, *others = fitting
            notes += [
                f"the folder could also be read as {other.name} with --data.layout {other.data.layout}"
                for other in others
            ]
    if inner != root:
        notes.insert(0, f"{root} contains only the folder {inner.relative_to(root)}, which is read")
    notes = (*notes[: inner != root], *layout.notes, *notes[inner != root :])
    return layout._replace(data=dataclasses.replace(layout.data, follow_links=follow_links), notes=notes)


def _fitting(root: Path, within: Path | None) -> tuple[list[Layout], list[InputError]]:
    """Returns every layout that a folder may have, the likeliest first, and the faults of files that tell a layout."""
    fitting, faults = [], []
    for recogniser in _RECOGNISERS.values():
        try:
            fitting.append(recogniser(root, within=within))
        except InputError as error:
            faults.append(error)
    return [layout for layout in fitting if layout is not None], faults


def _as_named(root: Path, inner: Path, named: LayoutName, others: Sequence[Layout]) -> Layout:
    """Returns the layout that `data.layout` names, of a folder that shows no sign of it.

    The reader may still find its files: YOLO labels that are all empty, for example.

    Raises:
      InputError: the folder has one of the other layouts, or none at all.
    """
    refused = f"{root}: not of layout {named}, which data.layout names"
    if others:
        raise InputError(
            f"{refused}, but {others[0].name} ({others[0].why}); use --data.layout {others[0].data.layout} or auto"
        )
    data = DataConfig(root=inner, layout=named)
    with contextlib.suppress(InputError):
        if splits := _splits(data):
            return Layout(named, AS_NAMED, data, splits, (NO_SIGN,))
    raise InputError(f"{refused}: {_seen(inner)}{_WAYS.get(named, '')}")


AS_NAMED = "as data.layout says"
NO_SIGN = "no file shows that the folder has this layout"
# What else helps where a folder has no files of a layout.
_WAYS = {
    "voc": "; give other places with --data.voc_images, --data.voc_annotations and --data.voc_lists",
    "vocdevkit": f"; unpack the archives from {_VOC_SITE} there, or give another folder with --data.root",
    "coco": f"; unpack images and annotations from {_COCO_SITE} there, or give other paths with "
    "--data.coco_annotations and --data.coco_images",
}


def _way_to_folder(file: Path) -> str:
    if file.suffix.lower() in (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"):
        return "unpack it"
    return f"give the folder that holds it and the images, for example {file.parent}"


def with_layout(data: DataConfig) -> DataConfig:
    """Returns `data` as `placed` completes it, with class names."""
    data, layout = placed(data)
    if layout is None or data.class_names:
        return data
    return dataclasses.replace(data, class_names=_names_of_layout(layout))


def placed(data: DataConfig) -> tuple[DataConfig, Layout | None]:
    """Returns `data` with the places of its files and the names of its splits, and its layout; None for TFDS.

    The layout "auto" is replaced by the one that is recognised, and a named one is recognised like it. Places that are
    given with a named layout stay. A split named train or test, which are the defaults, becomes another one of the
    folder if there is no such split.

    Raises:
      InputError: the folder is not of the layout; the sentence says what was found.
    """
    if data.layout == "tfds":
        return data, None
    if data.layout != AUTO and (_has_places(data) or not data.root.exists()):
        splits = _splits(data) if data.root.is_dir() else ()
        layout = Layout(data.layout, AS_NAMED, dataclasses.replace(data, class_names=()), splits)
    else:
        layout = _recognised(data.root, data.layout, data.follow_links)
    fields = {name: getattr(layout.data, name) for name in ("root", "layout", *PLACES)}
    train, test = data.train_split, data.test_split
    if layout.splits and train == "train" and "train" not in layout.splits:
        train = next((split for split in layout.splits if "train" in split.lower()), layout.splits[0])
    if test == "test" and "test" not in layout.splits:
        held_out = [split for split in layout.splits if split not in train.split("+") and "train" not in split.lower()]
        test = next((split for split in held_out if "test" in split.lower()), next(iter(held_out), test))
    found = dataclasses.replace(data, **fields, train_split=train, test_split=test)
    return (data if found == data else found), layout


def _has_places(data: DataConfig) -> bool:
    """Returns whether the places of a named layout are given, or the files of COCO are in the usual ones."""
    defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    if any(getattr(data, name) != defaults[name] for name in PLACES):
        return True
    # Its files are large, and recognising reads them.
    splits = _splits(data) if data.layout == "coco" else ()
    return any((data.root / data.coco_images.replace("{split}", split)).is_dir() for split in splits)


def _inner(root: Path) -> Path:
    """Returns the folder that holds the data: archives are often unpacked into a folder of their own name."""
    for _ in range(3):
        inside = [path for path in root.iterdir() if not path.name.startswith((".", "__MACOSX"))]
        folders = [path for path in inside if path.is_dir() and not path.is_symlink()]
        others = [
            path for path in inside if not path.is_dir() and not path.name.lower().startswith(("readme", "licen"))
        ]
        if len(folders) != 1 or others or _is_part(folders[0].name):
            break
        root = folders[0]
    return root


def _is_part(name: str) -> bool:
    """Returns whether a folder of that name belongs to a layout."""
    parts = (*SPLIT_NAMES, "images", "labels", "annotations", "jpegimages", "imagesets")
    return name.lower() in parts or re.fullmatch(r"VOC\d{4}", name) is not None


def _seen(root: Path) -> str:
    """Returns what a folder without a known layout contains, and what it lacks for the nearest one."""
    nearer = []
    for path in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))[:20]:
        with contextlib.suppress(InputError):
            if any(recogniser(path, within=root) is not None for recogniser in _RECOGNISERS.values()):
                nearer.append(path)
    if nearer:
        return f"did you mean {' or '.join(map(str, nearer[:3]))}, which have one?"
    counts = defaultdict(int)
    for name in names_below(root):
        counts[Path(name).suffix.lower() or "no extension"] += 1
    images = sum(counts.get(extension, 0) for extension in IMAGE_EXTENSIONS)
    if not counts:
        return "the folder contains no file"
    found = [f"{count} of {extension}" for extension, count in sorted(counts.items(), key=lambda pair: -pair[1])[:6]]
    found = f"the folder contains {', '.join(found)}"
    if counts.get(".json"):
        return f"{found}; the nearest layout is COCO, whose json has the lists images, annotations and categories"
    if counts.get(".xml") and not images:
        return f"{found}; the nearest layout is PASCAL VOC, which needs an image for each XML file"
    if counts.get(".xml"):
        return (
            f"{found}; the nearest layout is PASCAL VOC, whose XML files have the root <annotation> and are named like "
            "their images"
        )
    if counts.get(".csv"):
        columns = ", ".join(csv_table.REQUIRED)
        return f"{found}; the nearest layout is csv, whose first line must have the columns {columns}"
    if images:
        return f"{found}, and no annotations"
    return found


def _joined(splits: list[tuple[str, Dataset]]) -> Dataset:
    """Returns one data set with all records; image ids and category ids are made unique for result files.

    Files of several splits often number their images from 1. An id that several images have becomes SPLIT/ID.
    """
    datasets = [dataset for _, dataset in splits]
    first, *others = datasets
    split_of = {}
    for dataset in datasets:
        for record in dataset.records:
            if split_of.setdefault(str(record.path), dataset) is not dataset:
                raise InputError(
                    f"{dataset.name}: image id {record.id} is also in {split_of[str(record.path)].name}; "
                    "splits joined by + must not share images"
                )
    image_ids = [record.id for dataset in datasets for record in dataset.records]
    told_apart = len(set(image_ids)) < len(image_ids)
    records = [
        record._replace(id=f"{name}/{record.id}") if told_apart else record
        for name, dataset in splits
        for record in dataset.records
    ]
    findings = [finding for dataset in datasets for finding in dataset.findings]
    ids = first.category_ids
    if any(dataset.category_ids != ids for dataset in others):
        ids = tuple(range(1, len(first.class_names) + 1))
        findings.append(Finding(OTHER_IDS, f"{' and '.join(dataset.name for dataset in datasets)}", False))
    return first._replace(
        name=" + ".join(dataset.name for dataset in datasets),
        records=tuple(records),
        notes=tuple(note for dataset in datasets for note in dataset.notes),
        category_ids=ids,
        findings=tuple(findings),
    )


def _voc_places(data: DataConfig) -> voc.Places:
    if data.layout == "voc":
        return voc.Places(data.voc_images, data.voc_annotations, data.voc_lists, data.voc_counts_from)
    return voc.Places(counts_from=data.voc_counts_from)


def _voc_place(data: DataConfig, name: str) -> tuple[Path, str, voc.Places]:
    """Returns the folder of the data, the name of the list in it, and the places of its files."""
    places = _voc_places(data)
    if data.layout == "voc":
        if not data.root.is_dir():
            raise InputError(
                f"{data.root}: no such folder; it must contain JPEGImages, Annotations and ImageSets, "
                "give another folder with --data.root"
            )
        return data.root, name, places
    match = re.fullmatch(r"(\d{4})_(.+)", name)
    if match is None:
        raise InputError(f"split {name!r}: in a VOCdevkit it must be YEAR_NAME, for example 2007_trainval")
    year, list_name = match.groups()
    folder = data.root / f"VOC{year}"
    absent = folder
    if folder.is_dir():
        absent = folder / "ImageSets" / "Main" / f"{list_name}.txt"
    # The lists of 2007 come in two archives; the user may have unpacked only one of them.
    incomplete = year == "2007" and list_name in ("train", "val", "trainval", "test") and not absent.exists()
    if not folder.is_dir() or incomplete:
        archives = _VOC_ARCHIVES.get(year, "the archives of that year")
        raise InputError(
            f"{absent}: not found; unpack {archives} from {_VOC_SITE}, "
            "which creates a folder VOCdevkit, or give another folder with --data.root"
        )
    return folder, list_name, places


def _coco_place(data: DataConfig, name: str) -> tuple[Path, Path]:
    """Returns the annotation file and the folder of the images."""
    if not part_of_a_name(name):
        raise InputError(f"split must be a part of a file name, without a folder, got {name!r}")
    annotations, images = (
        data.root / pattern.replace("{split}", name) for pattern in (data.coco_annotations, data.coco_images)
    )
    existing = splits_of(data.root, data.coco_annotations)
    others = divide = ""
    if existing and name not in existing:
        others = f"; the existing splits are: {', '.join(existing)}"
        divide = ", or divide the training split with --data.split"
    for path, exists in ((annotations, annotations.is_file()), (images, images.is_dir())):
        if not exists:
            raise InputError(
                f"{path}: not found{others}; download images and annotations from {_COCO_SITE}, or give other paths "
                f"with --data.root, --data.coco_annotations and --data.coco_images{divide}"
            )
    return annotations, images
