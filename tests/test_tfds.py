"""Tests TFDS data sets: our builder stores them from archives in the published layouts, and our reader reads them.

Most tests need the extra `tfds` and are skipped if it is not installed.
"""

import contextlib
import gzip
import importlib.util
import io
import json
import re
import shutil
import stat
import sys
import tarfile
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.data import coco, sources, tfds, tfds_builder, voc
from fasterrcnn_jax.data.images import read_image
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.scripts import tfds as script

needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None,
    reason="tensorflow-datasets is not installed: pip install 'fasterrcnn_jax[tfds]'",
)
FIELDS = ("image_hw", "boxes", "labels", "difficult", "crowd", "area")
SIZES = ((333, 499), (375, 500), (281, 467))  # height, width
COCO_IDS = [n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


def noise(generator, image_hw):
    return Image.fromarray(generator.integers(0, 255, (*image_hw, 3), dtype=np.uint8))


def voc_object(name, corners, *, difficult=0, pose="Left", more=""):
    tags = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    return (
        f"<object><name>{name}</name><pose>{pose}</pose><truncated>1</truncated><difficult>{difficult}</difficult>"
        f"{more}<bndbox>{tags}</bndbox></object>"
    )


def write_voc2007(folder):
    """Writes VOC2007 with two images in train, one in val and two in test; with irregular boxes as in real sets."""
    generator = np.random.default_rng(0)
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number, split in enumerate(("train", "train", "val", "test", "test")):
        image_id, (height, width) = f"{number:06d}", SIZES[number % 3]
        objects = []
        for _ in range(0 if number == 4 else 60):
            x, y = (sorted(generator.integers(1, side + 1, 2).tolist()) for side in (width, height))
            if x[1] > x[0] and y[1] > y[0]:
                name = voc.CLASS_NAMES[generator.integers(20)]
                objects.append(voc_object(name, (x[0], y[0], x[1], y[1]), difficult=generator.integers(2)))
        if number == 0:
            tags = "<xmin>9</xmin><ymin>9</ymin><xmax>12</xmax><ymax>12</ymax>"
            part = f"<part><name>head</name><bndbox>{tags}</bndbox></part>"
            objects += [
                voc_object("cat", (1, 1, width, height), more=part),
                voc_object("dog", (45.70000076293945, 30.1, 285.29999923706055, 200)),  # as some of VOC2012
                voc_object("sofa", (5, 6, width + 1, height + 1), pose="Sideways"),  # reaches outside
                voc_object("sofa", (5, 6, 5, 90)),  # one pixel wide
            ]
        noise(generator, (height, width)).save(folder / f"JPEGImages/{image_id}.jpg", quality=30)
        (folder / f"Annotations/{image_id}.xml").write_text(
            f"<annotation><filename>{image_id}.jpg</filename><size><width>{width}</width><height>{height}</height>"
            f"<depth>3</depth></size>{''.join(objects)}</annotation>"
        )
        with (folder / f"ImageSets/Main/{split}.txt").open("a") as file:
            file.write(f"{image_id}\n")


def write_coco2017(folder):
    """Writes train2017 with three images and val2017 with one: hundredths of pixels, a crowd, an empty image."""
    generator = np.random.default_rng(1)
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": n, "name": name} for n, name in zip(COCO_IDS, coco.CLASS_NAMES)]
    for split, numbers in (("train2017", (9, 100012, 532481)), ("val2017", (139,))):
        (folder / split).mkdir()
        images, annotations = [], []
        for place, image_id in enumerate(numbers):
            height, width = SIZES[place]
            name = f"{image_id:012d}.jpg"
            noise(generator, (height, width)).save(folder / split / name, quality=30)
            images.append({"id": image_id, "file_name": name, "height": height, "width": width})
            for _ in range(0 if image_id == 532481 else 40):
                x, y = (np.sort(generator.integers(0, side * 100, 2)) / 100 for side in (width, height))
                crowd = int(generator.integers(2))
                annotations.append(
                    {
                        "id": image_id * 100 + len(annotations),
                        "image_id": image_id,
                        "category_id": int(generator.choice(COCO_IDS)),
                        "bbox": [x[0], y[0], round(x[1] - x[0], 2), round(y[1] - y[0], 2)],
                        "area": round(float(generator.uniform(1, 9000)), 4),
                        "iscrowd": crowd,
                        "segmentation": {"counts": [5, 9], "size": [height, width]} if crowd else [[1, 1, 9, 9, 1, 9]],
                    }
                )
        # COCO's annotations are in no order of images.
        content = {"images": images[::-1], "annotations": annotations, "categories": categories}
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def pack(archive, folder, pattern):
    """Writes an archive of the files below `folder` whose path starts with `pattern`."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if re.match(pattern, name)]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name in names:
                file.write(folder / name, name)
    else:
        with tarfile.open(archive, "w") as file:
            for name in names:
                file.add(folder / name, name)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Returns a folder: root/ with voc/2007 and coco/2017, archives/, and unpacked/ with their content."""
    folder = tmp_path_factory.mktemp("tfds")
    unpacked, archives = folder / "unpacked", folder / "archives"
    write_voc2007(unpacked / "VOCdevkit/VOC2007")
    write_coco2017(unpacked)
    archives.mkdir()
    for name, pattern in (
        ("VOCtrainval_06-Nov-2007.tar", r"VOC.*(/00000[012]\.|/train\.|/val\.)"),
        ("VOCtest_06-Nov-2007.tar", r"VOC.*(/00000[34]\.|/test\.)"),
        ("train2017.zip", "train2017/"),
        ("val2017.zip", "val2017/"),
        ("annotations_trainval2017.zip", "annotations/"),
    ):
        pack(archives / name, unpacked, pattern)
    with tiny.restored_logging(), contextlib.redirect_stdout(io.StringIO()) as said:
        for name in ("voc/2007", "coco/2017"):
            script.main([name, str(archives), "--root", str(folder / "root")])
    (folder / "said.txt").write_text(said.getvalue())
    return folder


def one_sentence(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value) and ". " not in str(caught.value)
    return str(caught.value)


def assert_same_records(found, expected, fields=FIELDS):
    """Ignores the order, because TFDS sorts records by a hash of their names."""
    found = {record.id: record for record in found}
    assert sorted(found) == sorted(record.id for record in expected) and len(found) == len(expected)
    for record in expected:
        for field in fields:
            ours, theirs = np.asarray(getattr(found[record.id], field)), np.asarray(getattr(record, field))
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{record.id} {field}")
        np.testing.assert_array_equal(read_image(found[record.id].path), read_image(record.path))


@needs_tfds
@pytest.mark.parametrize("split, ours", [("train", "train"), ("validation", "val"), ("test", "test")])
def test_voc_comes_back_box_for_box(stored, split, ours):
    expected = voc.read_voc(stored / "unpacked/VOCdevkit/VOC2007", ours, voc.CLASS_NAMES)
    found = tfds.read_tfds(stored / "root", "voc/2007", split, voc.CLASS_NAMES)
    assert_same_records(found.records, expected.records)
    assert found.category_ids == expected.category_ids and found.class_names == voc.CLASS_NAMES
    assert sum("under two pixels" in note for note in found.notes) == (split == "train")
    assert not any(record.difficult.all() for record in found.records if len(record.boxes))


@needs_tfds
@pytest.mark.parametrize("split, ours", [("train", "train2017"), ("validation", "val2017")])
def test_coco_comes_back_box_for_box(stored, split, ours):
    """Except for areas, which TFDS stores as integers."""
    unpacked = stored / "unpacked"
    expected = coco.read_coco(unpacked / f"annotations/instances_{ours}.json", unpacked / ours, coco.CLASS_NAMES)
    found = tfds.read_tfds(stored / "root", "coco/2017", split, coco.CLASS_NAMES)
    assert_same_records(found.records, expected.records, FIELDS[:-1])
    assert_same_records(found.records, [r._replace(area=np.floor(r.area)) for r in expected.records])
    assert found.category_ids == expected.category_ids == tuple(COCO_IDS)
    assert any(record.crowd.any() for record in found.records)


@needs_tfds
def test_an_unpacked_folder_stores_the_same_as_its_archives(stored, tmp_path):
    folder, counts = tfds_builder.build("voc/2007", stored / "unpacked", tmp_path)
    assert folder == tmp_path / "voc/2007/5.0.0" and counts == {"train": 2, "validation": 1, "test": 2}
    for path in (stored / "root/voc/2007/5.0.0").glob("*array_record*"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


@needs_tfds
def test_the_script_says_what_it_stored_and_where(stored):
    assert (stored / "said.txt").read_text().splitlines() == [
        "train      2 images",
        "validation 1 images",
        "test       2 images",
        f"folder     {stored / 'root/voc/2007/5.0.0'}",
        "train      3 images",
        "validation 1 images",
        f"folder     {stored / 'root/coco/2017/1.1.0'}",
    ]


@needs_tfds
def test_stored_sets_have_exactly_the_features_of_tfds(stored):
    root = stored / "root"
    assert sorted(path.name for path in root.iterdir()) == ["coco", "voc"]
    module = tfds.import_tfds()
    example = module.builder_from_directory(root / "voc/2007/5.0.0").as_data_source("train")[0]
    assert set(example) == {"image", "image/filename", "objects", "labels", "labels_no_difficult"}
    assert set(example["objects"]) == {"bbox", "is_difficult", "is_truncated", "label", "pose"}
    assert set(example["objects"]["pose"]) <= {1, 2, 4} and all(example["objects"]["is_truncated"])
    assert set(example["labels"]) == set(example["objects"]["label"])
    example = module.builder_from_directory(root / "coco/2017/1.1.0").as_data_source("validation")[0]
    assert set(example) == {"image", "image/filename", "image/id", "objects"} and example["image/id"] == 139
    assert set(example["objects"]) == {"area", "bbox", "id", "is_crowd", "label"}
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("one_based", [True, False])
def test_pixels_and_their_hundredths_survive_float32(one_based):
    generator = np.random.default_rng(0)
    for _ in range(2000):
        height, width = generator.integers(20, 8000, 2).tolist()
        unit = 1 if one_based else 100
        x1, y1, x2, y2 = (
            int(generator.integers(low * unit, high * unit)) / unit
            for low, high in ((1, width // 2), (1, height // 2), (width // 2 + 3, width), (height // 2 + 3, height))
        )
        stored = np.array([y1 / height, x1 / width, y2 / height, x2 / width], np.float32)
        box = tfds._box(stored, "x", (height, width), one_based, defaultdict(list))
        shift = 1 if one_based else 0
        np.testing.assert_array_equal(box, np.array([x1 - shift, y1 - shift, x2, y2], np.float32))


@needs_tfds
def test_a_part_of_a_split_is_read_and_joined(stored):
    def ids(split):
        return [record.id for record in sources.open_split(data, split).records]

    data = DataConfig(root=stored / "root", layout="tfds", tfds_name="voc/2007:5.0.0", class_names=voc.CLASS_NAMES)
    whole = ids("test")
    assert ids("test[:50%]") == whole[:1] and ids("test[50%:]") == whole[1:]
    assert ids("test[50%:]+test[:50%]+train") == [whole[1], whole[0], *ids("train")]
    assert f"image id {whole[0]} is also in" in one_sentence(ids, "test+test[:1]")


@needs_tfds
@pytest.mark.parametrize("split", ["trian", "", "train[:", "test[5:]"])
def test_a_split_that_is_not_there_names_those_that_are(stored, split):
    message = one_sentence(tfds.read_tfds, stored / "root", "voc/2007", split, voc.CLASS_NAMES)
    assert repr(split) in message and str(stored / "root/voc/2007/5.0.0") in message
    assert split == "test[5:]" or "the splits are train, validation, test" in message


@needs_tfds
def test_records_are_read_once_and_images_only_when_needed(stored, monkeypatch):
    read = []
    whole = tfds._example
    monkeypatch.setattr(tfds, "_example", lambda source, n, place: read.append(n) or whole(source, n, place))
    records = tfds.read_tfds(stored / "root", "coco/2017", "train", coco.CLASS_NAMES).records
    assert read == [0, 1, 2]
    read_image(records[1].path)
    assert read == [0, 1, 2, 1]
    again = tfds.read_tfds(stored / "root", "coco/2017", "train", coco.CLASS_NAMES).records
    assert [record.path for record in again] == [record.path for record in records]
    assert len({record.path for record in (*records, *again)}) == 3
    assert str(records[1].path).endswith("/coco-train.array_record-00000-of-00001[1]")
    assert records[1].path.name == "coco-train.array_record-00000-of-00001[1]"


@needs_tfds
def test_several_threads_read_the_same_images_as_one(stored):
    records = tfds.read_tfds(stored / "root", "coco/2017", "train", coco.CLASS_NAMES).records
    alone = [record.path.read_bytes() for record in records]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda n: records[n % 3].path.read_bytes(), range(120)))
    assert together == alone * 40 and len(set(alone)) == 3


def store(root, examples, *, name="mine", version="1.0.0", file_format="array_record", objects=(), without=None):
    """Stores a custom data set with TFDS and returns its folder.

    `objects` replaces feature types of the objects; the features and examples do not have the feature `without`.
    """
    module = tfds.import_tfds()
    kinds = {"label": module.features.ClassLabel(names=["ring", "disc"]), "bbox": module.features.BBoxFeature()}
    features = {"image": module.features.Image(), "objects": module.features.Sequence(kinds | dict(objects))}
    features.pop(without, None)
    features |= {"image/filename": module.features.Text()} if "image/filename" in examples[0] else {}
    examples = [{key: example[key] for key in features} for example in examples]

    class Mine(module.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = module.core.Version(version)

        def _info(self):
            content = module.features.FeaturesDict(features)
            return module.core.DatasetInfo(builder=self, features=content, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": enumerate(examples)}

        def _generate_examples(self):
            raise NotImplementedError

    Mine.name = name
    Mine(data_dir=root, file_format=file_format).download_and_prepare()
    return root / name / version


def png(image_hw=(50, 100)):
    file = io.BytesIO()
    Image.new("RGB", image_hw[::-1], (9, 99, 199)).save(file, "PNG")
    return file.getvalue()


def example(*objects, image=None, **features):
    """Returns an example; `objects` are (label, (x1, y1, x2, y2)) in pixels of an image of 50 x 100."""
    boxes = [np.array([y1 / 50, x1 / 100, y2 / 50, x2 / 100]) for _, (x1, y1, x2, y2) in objects]
    listed = [{"label": label, "bbox": box} for (label, _), box in zip(objects, boxes)]
    return {"image": png() if image is None else image, "objects": listed, **features}


OBJECTS = [("disc", (10, 5, 30, 25)), ("ring", (0.5, 0.25, 100, 50))]


@needs_tfds
def test_a_custom_set_is_in_continuous_pixels(tmp_path):
    store(tmp_path, [example(*OBJECTS), example()])
    dataset = tfds.read_tfds(tmp_path, "mine", "train", ("disc", "ring"))
    record, empty = dataset.records
    np.testing.assert_array_equal(record.boxes, np.array([[10, 5, 30, 25], [0.5, 0.25, 100, 50]], np.float32))
    assert record.labels.tolist() == [1, 2] and dataset.category_ids == (2, 1) and empty.boxes.shape == (0, 4)
    assert record.area.tolist() == [400.0, 99.5 * 49.75] and not record.difficult.any() and not record.crowd.any()
    # Without a name of its own an image is called by its place, which no other split shares.
    assert [r.id for r in dataset.records] == [f"mine-train.array_record-00000-of-00001[{n}]" for n in (0, 1)]
    (part,) = tfds.read_tfds(tmp_path, "mine", "train[1:]", ("disc", "ring")).records
    assert part.id == empty.id


@needs_tfds
def test_an_image_is_called_by_its_file_and_two_of_one_name_are_refused(tmp_path):
    names = ("a/1.png", "b/1.png", "a/1.jpg")
    store(tmp_path, [example(*OBJECTS, **{"image/filename": name}) for name in names])
    first = tfds.read_tfds(tmp_path, "mine", "train[:2]", tiny.CLASS_NAMES).records
    assert [record.id for record in first] == ["a/1", "b/1"]
    message = one_sentence(tfds.read_tfds, tmp_path, "mine", "train", tiny.CLASS_NAMES)
    assert "[2]: image id a/1 is also the id of" in message and message.endswith("[0]")


@needs_tfds
def test_the_newest_version_is_read_unless_one_is_named(tmp_path):
    for version, count in (("1.9.0", 1), ("1.10.0", 2)):
        store(tmp_path, [example(*OBJECTS)] * count, version=version)
    for name, count in (("mine", 2), ("mine:1.10.0", 2), ("mine:1.9.0", 1)):
        assert len(tfds.read_tfds(tmp_path, name, "train", tiny.CLASS_NAMES).records) == count
    assert "mine/2.0.0" in one_sentence(tfds.read_tfds, tmp_path, "mine:2.0.0", "train", tiny.CLASS_NAMES)


@needs_tfds
def test_classes_are_found_by_name(tmp_path):
    store(tmp_path, [example(*OBJECTS)])
    message = one_sentence(tfds.read_tfds, tmp_path, "mine", "train", ("disc", "cube"))
    assert "no class is named 'cube'; it has ring, disc" in message
    message = one_sentence(tfds.read_tfds, tmp_path, "mine", "train", ("disc",))
    assert "objects[1], label: 'ring' is not one of the classes disc" in message
    lenient = tfds.read_tfds(tmp_path, "mine", "train", ("disc",), faults="skip")
    assert lenient.records[0].labels.tolist() == [1] and "'ring'" in lenient.notes[0]


@needs_tfds
def test_class_names_left_empty_are_those_that_the_set_declares(stored):
    data = DataConfig(root=stored / "root", layout="tfds", tfds_name="voc/2007", train_split="train+validation")
    assert sources.with_class_names(data).class_names == voc.CLASS_NAMES


@needs_tfds
@pytest.mark.parametrize(
    "case, said",
    [
        ("image", "must have the features image and objects with bbox and a class label, got objects with"),
        ("objects", "must have the features image and objects with bbox and a class label, got image"),
        ("classes", "got image, objects with objects of bbox, label"),
        ("format", "objects, bbox: must be in the format REL_YXYX, got YXYX"),
    ],
)
def test_a_set_without_boxes_is_refused(tmp_path, case, said):
    features = tfds.import_tfds().features
    label = 1 if case == "classes" else "ring"
    options = {
        "classes": {"objects": {"label": features.Scalar(np.int64)}},
        "format": {"objects": {"bbox": features.BBoxFeature(bbox_format="YXYX")}},
    }.get(case, {"without": case})
    store(tmp_path, [example((label, (1, 2, 3, 4)))], **options)
    assert said in one_sentence(tfds.read_tfds, tmp_path, "mine", "train", tiny.CLASS_NAMES)


def changed_json(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def run_code(folder):
    """Writes a module that TFDS would import for this feature; importing it would write a file."""
    (folder.parents[2] / "evil_feature.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    sys.path.insert(0, str(folder.parents[2]))
    kind = "tensorflow_datasets.core.features.image_feature.Image"
    changed_json(folder / "features.json", kind, "evil_feature.Image")


def hide_code(form):
    """A fault: a class outside TFDS in a place that TFDS parses by itself."""

    def spoil(folder):
        (folder.parents[2] / "evil_feature.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
        sys.path.insert(0, str(folder.parents[2]))
        path = folder / "features.json"
        top = json.loads(path.read_text())
        evil = {"type": "evil_feature.Image", "content": {}}
        if form == "jsonFeature":
            top["featuresDict"]["features"]["image"] = {
                "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
                "jsonFeature": {"json": json.dumps(evil)},
            }
        elif form == "legacy content":
            top["featuresDict"]["features"]["image"]["pythonClassName"] = "evil_feature.Image"
            content = json.dumps(top["featuresDict"])
            kind = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
            top = {"type": kind, "content": content, "proto_cls": "tensorflow_datasets.FeaturesDict"}
        elif form == "snake case":
            image = top["featuresDict"]["features"]["image"]
            image["python_class_name"] = "evil_feature.Image"
        else:
            sequence = top["featuresDict"]["features"]["objects"]["sequence"]
            sequence["jsonFeature"] = {"json": json.dumps(evil)}
        path.write_text(json.dumps(top))

    return spoil


def leave_the_folder(folder):
    outside = folder.parents[2] / "elsewhere"
    outside.mkdir()
    shard = next(folder.glob("*array_record*"))
    shutil.move(shard, outside / shard.name)
    shard.symlink_to(outside / shard.name)


def code_in_info(folder):
    """A fault: dataset_info.json contains features too, of a class outside TFDS."""
    run_code(folder)
    evil = (folder / "features.json").read_text()
    changed_json(
        folder / "features.json", "evil_feature.Image", "tensorflow_datasets.core.features.image_feature.Image"
    )
    top = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(top | {"features": json.loads(evil)}))


def leave_the_folder_by_name(folder):
    """A fault: the template of the file names leads to a shard outside the folder."""
    outside = folder.parents[2] / "elsewhere"
    outside.mkdir()
    for shard in folder.glob("*array_record*"):
        shutil.copy(shard, outside)
    changed_json(folder / "dataset_info.json", '"{DATASET}', '"../../../elsewhere/{DATASET}')


def declares(name, key, value):
    """A fault: a file says another size than the data has."""

    def spoil(folder):
        text = (folder / name).read_text()
        (folder / name).write_text(re.sub(rf'"{key}": (\[[^\]]*\]|"\d+")', f'"{key}": {json.dumps(value)}', text))
        assert text != (folder / name).read_text()

    return spoil


def cut(folder):
    shard = next(folder.glob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-40])


def overwrite(folder):
    """Changes bytes after the header; the length stays the same."""
    shard = next(folder.glob("*array_record*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:100] + b"\x55" * (len(content) - 200) + content[-100:])


FAULTS = {
    "no features": (lambda folder: (folder / "features.json").unlink(), ["features.json: not found", "--data.root"]),
    "no description": (lambda folder: (folder / "dataset_info.json").unlink(), ["not found"]),
    "features cut": (lambda f: (f / "features.json").write_text("{"), ["features.json: the file is not JSON"]),
    "features of nothing": (
        lambda f: (f / "features.json").write_text("[]"),
        ["the outermost feature: must be a feature"],
    ),
    "description cut": (
        lambda f: (f / "dataset_info.json").write_text("{"),
        ["dataset_info.json: the file is not JSON"],
    ),
    "code": (run_code, ["features.json", "pythonClassName", "TFDS's own", "'evil_feature.Image'"]),
    "code in jsonFeature": (hide_code("jsonFeature"), ["features.json, image", "jsonFeature"]),
    "code in a string of the outermost feature": (
        hide_code("legacy content"),
        ["features.json, the outermost feature"],
    ),
    "code under another spelling": (hide_code("snake case"), ["features.json, image", "python_class_name"]),
    "code in a sequence": (hide_code("in a sequence"), ["features.json, objects", "jsonFeature"]),
    "code in the description": (code_in_info, ["dataset_info.json: must be an object without features"]),
    "classes without end": (
        declares("features.json", "numClasses", str(2**40)),
        ["label, classLabel: must contain only numClasses, of at most 100,000", "1099511627776"],
    ),
    "one class more than any set has": (
        declares("features.json", "numClasses", "100001"),
        ["label, classLabel: must contain only numClasses, of at most 100,000", "100001"],
    ),
    "an outermost feature without its content": (
        lambda f: (f / "features.json").write_text('{"type": "FeaturesDict"}'),
        ["features.json: must contain a FeaturesDict with type, content and proto_cls"],
    ),
    "a shard outside the folder": (leave_the_folder_by_name, ["elsewhere", "is outside the folder"]),
    "records without end": (
        declares("dataset_info.json", "shardLengths", [str(2**40)]),
        ["mine-train.array_record-00000-of-00001 cannot hold 1,099,511,627,776 records"],
    ),
    "shards without end": (
        declares("dataset_info.json", "shardLengths", ["1"] * 100_000),
        ["dataset_info.json, splits: have 100,000 shards, but the folder has"],
    ),
    "a link to elsewhere": (leave_the_folder, ["is reached by a link to", "data.follow_links = True"]),
    "shard gone": (lambda f: next(f.glob("*array_record*")).unlink(), ["mine"]),
    "shard cut": (cut, ["mine-train.array_record"]),
    "shard overwritten": (overwrite, ["mine-train.array_record"]),
}


@needs_tfds
@pytest.mark.parametrize("case", FAULTS)
def test_a_damaged_folder_is_named_in_one_sentence(tmp_path, monkeypatch, case):
    monkeypatch.setattr(sys, "path", sys.path[:])
    damage, said = FAULTS[case]
    folder = store(tmp_path / "root", [example(*OBJECTS)] * 3)
    damage(folder)
    data = DataConfig(root=tmp_path / "root", layout="tfds", tfds_name="mine", class_names=tiny.CLASS_NAMES)
    message = one_sentence(sources.read, data, "train")
    assert str(tmp_path / "root/mine") in message and all(part in message for part in said)
    assert not (folder / "ran").exists()


@needs_tfds
@pytest.mark.parametrize(
    "bad, said",
    [
        (example(*OBJECTS, image=b"no image"), "[1]: not an image"),
        (example(*OBJECTS, image=png()[:-30]), "[1]: the image cannot be decoded"),
    ],
)
def test_a_faulty_image_is_named_by_its_place_or_skipped(tmp_path, bad, said):
    folder = store(tmp_path, [example(*OBJECTS), bad, example(*OBJECTS)])
    data = DataConfig(root=tmp_path, layout="tfds", tfds_name="mine", class_names=tiny.CLASS_NAMES, faults="skip")
    dataset = sources.open_split(data, "train")
    assert [record.id[-3:] for record in dataset.records] == ["[0]", "[2]"]
    assert said in dataset.notes[0] and str(folder / "mine-train") in dataset.notes[0]


@pytest.mark.parametrize(
    "stored, said",
    [
        ([np.nan, 0, 1, 1], "must be"),
        ([0.5, 0, 0.4, 1], "must be"),
        ([0, 0, 60, 80], "must be"),
        ([0, 0.2, 1, 0.2], None),
    ],
)
def test_invalid_boxes_are_refused_and_empty_ones_dropped(stored, said):
    found = defaultdict(list)
    arguments = np.array(stored, np.float32), "shard[3], objects[0]", (50, 100), False, found
    if said is None:
        assert tfds._box(*arguments) is None and found[coco.EMPTY] == ["shard[3], objects[0]"]
    else:
        assert one_sentence(tfds._box, *arguments).startswith("shard[3], objects[0], bbox: must be")


@pytest.mark.parametrize(
    "stored, one_based, expected",
    [
        ([-0.1, 0.5, 0.5, 1.25], False, [50, 0, 100, 25]),
        ([0.0, 0.0, 0.5, 0.5], True, [0, 0, 50, 25]),  # a VOC file that counts from 0
        ([0.02, 0.01, 1.0, 1.0], True, None),
    ],
)
def test_boxes_reaching_outside_are_clipped_and_counted(stored, one_based, expected):
    found = defaultdict(list)
    box = tfds._box(np.array(stored, np.float32), "shard[3], objects[0]", (50, 100), one_based, found)
    assert box.tolist() == (expected or [0, 0, 100, 50])
    clipped = [f"shard[3], objects[0], bbox: {np.array(stored, np.float32).tolist()}"]
    assert found[voc.CLIPPED] == (clipped if expected else [])


@pytest.mark.parametrize("index", [-1, 2])
def test_a_label_beyond_the_classes_is_refused(index):
    names = tiny.CLASS_NAMES
    message = one_sentence(tfds._label, index, "shard[3], objects[0]", names, {0: 1, 1: 2}, names)
    assert message == f"shard[3], objects[0], label: must be in 0..1, got {index}"
    assert [tfds._label(n, "", names, {0: 2, 1: 1}, names) for n in (0, 1)] == [2, 1]


def evil_tar(archive):
    with tarfile.open(archive, "w") as file:
        member = tarfile.TarInfo("../evil")
        file.addfile(member, io.BytesIO(b""))


ANNOTATIONS = "annotations_trainval2017.zip"


def sparse_tar(archive):
    """An archive of a file that declares 2^40 bytes and stores none (GNU's old form of sparse files)."""
    member = tarfile.TarInfo("VOCdevkit/large")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"\x80" + (2**40).to_bytes(11)  # the size with its holes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    archive.write_bytes(bytes(header) + bytes(10_240 - len(header)))


def zip_of_zeros(archive):
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train2017/large.jpg", bytes(50_000_000))


def zip_with_link(archive):
    with zipfile.ZipFile(archive, "w") as file:
        entry = zipfile.ZipInfo("train2017/link")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(entry, "../../outside")


def tar_with(kind, target):
    """An archive with a link of this kind, whose target is longer than PATH_MAX in part."""

    def write(archive):
        with tarfile.open(archive, "w") as file:
            member = tarfile.TarInfo("VOCdevkit/link")
            member.type, member.linkname = kind, target
            file.addfile(member)

    return write


@needs_tfds
@pytest.mark.parametrize(
    "name, write, said",
    [
        ("voc/2010", None, "must be one of voc/2007, voc/2012, coco/2017"),
        ("voc/2012", None, "must contain VOCtrainval_11-May-2012.tar, or their content"),
        ("coco/2017", None, "train2017.zip and annotations_trainval2017.zip and val2017.zip"),
        ("voc/2012", lambda path: path.write_bytes(b"no archive"), "cannot be unpacked"),
        ("voc/2012", evil_tar, "cannot be unpacked"),
        ("voc/2012", tar_with(tarfile.SYMTYPE, "inside"), "'VOCdevkit/link' is a link or a device"),
        ("voc/2012", tar_with(tarfile.SYMTYPE, "d/" * 2500 + "../" * 2501 + "evil"), "is a link or a device"),
        ("voc/2012", tar_with(tarfile.LNKTYPE, "inside"), "is a link or a device"),
        ("voc/2012", tar_with(tarfile.FIFOTYPE, ""), "is a link or a device"),
        ("voc/2012", sparse_tar, "its 10,240 bytes would unpack to 1,099,511,627,776"),
        ("voc/2012", lambda path: path.write_bytes(gzip.compress(bytes(10**6))), "cannot be unpacked"),
        ("coco/2017", zip_with_link, "'train2017/link' is a link or a device"),
        ("coco/2017", zip_of_zeros, "bytes would unpack to 50,000,000"),
        (
            "voc/2012",
            lambda path: tarfile.open(path, "w").close(),
            "does not contain VOCdevkit/VOC2012/ImageSets/Main/",
        ),
    ],
)
def test_archives_that_cannot_be_used_are_named_and_nothing_is_left(tmp_path, name, write, said):
    (tmp_path / "archives").mkdir()
    if write is not None:
        for archive in ("VOCtrainval_11-May-2012.tar",) if name == "voc/2012" else ("train2017.zip", ANNOTATIONS):
            write(tmp_path / "archives" / archive)
    assert said in one_sentence(tfds_builder.build, name, tmp_path / "archives", tmp_path / "root")
    assert not (tmp_path / "evil").exists() and [*tmp_path.glob("root/*")] == []


@needs_tfds
def test_a_fault_in_the_source_is_named_and_nothing_is_stored(stored, tmp_path):
    shutil.copytree(stored / "unpacked/VOCdevkit", tmp_path / "source/VOCdevkit")
    path = tmp_path / "source/VOCdevkit/VOC2007/Annotations/000002.xml"
    changed_json(path, "<difficult>1<", "<difficult>x<")
    message = one_sentence(tfds_builder.build, "voc/2007", tmp_path / "source", tmp_path / "root")
    assert str(path) in message and "got 'x'" in message and [*(tmp_path / "root").iterdir()] == []


@needs_tfds
def test_boxes_of_a_turned_image_are_not_stored(stored, tmp_path):
    """Readers of the stored set would take these boxes as boxes of the stored pixels."""
    shutil.copytree(stored / "unpacked/VOCdevkit", tmp_path / "source/VOCdevkit")
    folder = tmp_path / "source/VOCdevkit/VOC2007"
    height, width = SIZES[2]
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(np.random.default_rng(0), (width, height)).save(folder / "JPEGImages/000002.jpg", exif=exif)
    message = one_sentence(tfds_builder.build, "voc/2007", tmp_path / "source", tmp_path / "root")
    assert "JPEGImages/000002.jpg: its boxes refer to the image turned by EXIF" in message


@needs_tfds
def test_a_stored_set_is_not_overwritten(stored):
    message = one_sentence(tfds_builder.build, "voc/2007", stored / "archives", stored / "root")
    assert str(stored / "root/voc/2007/5.0.0") in message and "exists already" in message


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "google_crc32c", "importlib_resources"])
def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    data = DataConfig(root=tmp_path, layout="tfds", tfds_name="voc/2007", class_names=("cat",))
    said = "pip install 'fasterrcnn_jax[tfds]'"
    assert said in one_sentence(sources.open_split, data, "train")
    assert said in one_sentence(tfds_builder.build, "voc/2007", tmp_path, tmp_path)


@pytest.mark.parametrize(
    "layout, name", [("tfds", None), ("voc", "voc/2007"), *(("tfds", n) for n in ("../voc", "voc/..", "/voc", "voc:5"))]
)
def test_a_set_needs_a_name_and_other_layouts_have_none(layout, name):
    with pytest.raises(ValueError, match="tfds_name"):
        DataConfig(root=Path("x"), layout=layout, tfds_name=name)
