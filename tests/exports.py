"""Writes the same images and boxes as labelling programs export them, for the tests of the readers."""

import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image

CLASSES = ("square", "disc")


class Labelled(NamedTuple):
    """One image; boxes are xyxy in continuous pixels."""

    name: str  # without extension
    size: tuple[int, int]  # width, height
    objects: tuple[tuple[str, tuple[float, float, float, float]], ...]


# Corners at pixels and between them, at the border, and an image without objects.
RECORDS = (
    Labelled("a", (96, 64), (("square", (10, 12, 40, 44)), ("disc", (52, 8, 88, 40)))),
    Labelled("b", (61, 83), (("disc", (0, 0, 61, 83)), ("disc", (3.5, 7.25, 20.75, 30.5)))),
    Labelled("c", (50, 50), ()),
)


def write_images(folder: Path, records=RECORDS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        Image.new("RGB", record.size, (90, 120, 60)).save(folder / f"{record.name}.png")


def yolo_line(number: int, box, size, digits=17) -> str:
    (x1, y1, x2, y2), (width, height) = box, size
    values = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
    return " ".join((str(number), *(f"{value:.{digits}f}" for value in values)))


def write_yolo_labels(folder: Path, records=RECORDS, classes=CLASSES, digits=17) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        lines = (yolo_line(classes.index(name), box, record.size, digits) for name, box in record.objects)
        (folder / f"{record.name}.txt").write_text("".join(f"{line}\n" for line in lines))


def write_yolo(folder: Path, splits=("train", "val"), records=RECORDS, classes=CLASSES) -> None:
    """Writes the layout of Ultralytics: images/SPLIT, labels/SPLIT and data.yaml."""
    for split in splits:
        write_images(folder / "images" / split, records)
        write_yolo_labels(folder / "labels" / split, records, classes)
    lines = ["path: .", *(f"{split}: images/{split}" for split in splits), "names:"]
    lines += [f"  {number}: {name}" for number, name in enumerate(classes)]
    (folder / "data.yaml").write_text("\n".join(lines) + "\n")


def shape(label, points, kind="rectangle", **fields):
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **fields}


def labelme_json(record: Labelled):
    shapes = [shape(name, [list(box[:2]), list(box[2:])]) for name, box in record.objects]
    return {
        "version": "5.2.1",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{record.name}.png",
        "imageData": None,
        "imageHeight": record.size[1],
        "imageWidth": record.size[0],
    }


def write_labelme(folder: Path, records=RECORDS) -> None:
    """Writes NAME.json beside each image."""
    write_images(folder, records)
    for record in records:
        (folder / f"{record.name}.json").write_text(json.dumps(labelme_json(record), indent=1))


def csv_lines(records=RECORDS) -> list[str]:
    """Returns the lines of a table with a header; a line with empty corners for an image without objects."""
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for record in records:
        start = f"{record.name}.png,{record.size[0]},{record.size[1]}"
        lines += [f"{start},{name},{','.join(map(str, box))}" for name, box in record.objects]
        lines += [] if record.objects else [f"{start},,,,,"]
    return lines


def write_csv(folder: Path, splits=("train", "test"), records=RECORDS) -> None:
    """Writes the layout of TensorFlow's tutorials: images/SPLIT and SPLIT_labels.csv."""
    for split in splits:
        write_images(folder / "images" / split, records)
        (folder / f"{split}_labels.csv").write_text("\n".join(csv_lines(records)) + "\n")


def voc_xml(record: Labelled, name: str, *, counts_from=1, decimals=False, extra="") -> str:
    def words(value):
        return f"{float(value)}" if decimals else f"{value}"

    objects = "".join(
        f"<object><name>{class_name}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>"
        f"<bndbox><xmin>{words(x1 + counts_from)}</xmin><ymin>{words(y1 + counts_from)}</ymin>"
        f"<xmax>{words(x2)}</xmax><ymax>{words(y2)}</ymax></bndbox></object>"
        for class_name, (x1, y1, x2, y2) in record.objects
    )
    width, height = record.size
    return (
        f"<annotation><folder>set</folder><filename>{name}</filename>{extra}"
        "<source><database>Unknown</database></source>"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size><segmented>0</segmented>"
        f"{objects}</annotation>\n"
    )


def write_xml(folder: Path, records=RECORDS, **options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        (folder / f"{record.name}.xml").write_text(voc_xml(record, f"{record.name}.png", **options))


def write_list(root: Path, split: str, lines) -> None:
    (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    (root / f"ImageSets/Main/{split}.txt").write_text("".join(f"{line}\n" for line in lines))


def write_voc(root: Path, splits=("train", "test"), records=RECORDS) -> None:
    """Writes a folder as PASCAL VOC published it."""
    write_images(root / "JPEGImages", records)
    write_xml(root / "Annotations", records)
    for split in splits:
        write_list(root, split, [record.name for record in records])


def write_vocdevkit(root: Path, records=RECORDS) -> None:
    write_voc(root / "VOC2007", records=records)


def write_voc_beside(root: Path, records=RECORDS) -> None:
    """Writes XML files beside the images, as labelImg does, with its list of predefined classes."""
    write_images(root, records)
    write_xml(root, records, extra="<path>C:\\photos\\set\\image.png</path>")
    (root / "predefined_classes.txt").write_text("dog\nperson\n")


def write_voc_beside_in_folders(root: Path, records=RECORDS) -> None:
    for day, record in enumerate(records):
        write_voc_beside(root / f"day{day}", records=(record,))


def write_voc_flat(root: Path, records=RECORDS) -> None:
    """Writes images/ and annotations/, as many data sets of Kaggle are."""
    write_images(root / "images", records)
    write_xml(root / "annotations", records)


def write_voc_label_studio(root: Path, records=RECORDS) -> None:
    write_images(root / "images", records)
    write_xml(root / "Annotations", records)


def write_voc_cvat(root: Path, records=RECORDS) -> None:
    """Writes CVAT's "PASCAL VOC 1.1": one list, and corners in continuous coordinates with decimals."""
    write_images(root / "JPEGImages", records)
    write_xml(root / "Annotations", records, counts_from=0, decimals=True)
    write_list(root, "default", [record.name for record in records])
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\n")


def write_voc_cvat_in_folders(root: Path, records=RECORDS) -> None:
    for record in records:
        write_images(root / f"JPEGImages/day {record.name}", (record,))
        write_xml(root / f"Annotations/day {record.name}", (record,), counts_from=0, decimals=True)
    write_list(root, "default", [f"day {record.name}/{record.name}" for record in records])


def write_voc_roboflow(root: Path, records=RECORDS) -> None:
    """Writes train/, valid/ and test/ with images and XML files together."""
    for split in ("train", "valid", "test"):
        write_images(root / split, records)
        write_xml(root / split, records)


def write_voc_split_folders(root: Path, records=RECORDS) -> None:
    for split in ("train", "val"):
        write_images(root / "images" / split, records)
        write_xml(root / "annotations" / split, records)


def write_voc_vott(root: Path, records=RECORDS) -> None:
    """Writes VoTT's export: a list per class and split, each with every image of the split and 1 or -1."""
    write_images(root / "JPEGImages", records)
    write_xml(root / "Annotations", records)
    for split in ("train", "val"):
        for class_name in CLASSES:
            has = [class_name in dict(record.objects) for record in records]
            lines = [f"{record.name}.png {1 if here else -1}" for record, here in zip(records, has, strict=True)]
            write_list(root, f"{class_name}_{split}", lines)


def write_voc_full_names(root: Path, records=RECORDS) -> None:
    """Writes a.png.xml for a.png."""
    write_images(root / "images", records)
    write_xml(root / "xml", records)
    for path in list((root / "xml").iterdir()):
        path.rename(path.with_name(f"{path.stem}.png.xml"))


def coco_json(records=RECORDS, *, first_id=1, file_name="{}.png", grouping=False, image_id=lambda number: number):
    """Returns COCO's content; ids of images, annotations and categories count from `first_id`."""
    images, annotations = [], []
    for number, record in enumerate(records, start=first_id):
        name = file_name.format(record.name)
        images.append({"id": number, "file_name": name, "width": record.size[0], "height": record.size[1]})
        for class_name, (x1, y1, x2, y2) in record.objects:
            annotations.append(
                {
                    "id": first_id + len(annotations),
                    "image_id": image_id(number),
                    "category_id": first_id + CLASSES.index(class_name),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "segmentation": [],
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=first_id)]
    if grouping:
        categories = [{"id": 0, "name": "shapes", "supercategory": "none"}] + [
            category | {"supercategory": "shapes"} for category in categories
        ]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_coco(root: Path, splits=("train2017", "val2017"), records=RECORDS) -> None:
    """Writes a folder as COCO published it, with files of other tasks beside."""
    for split in splits:
        write_images(root / split, records)
        write_json(root / f"annotations/instances_{split}.json", coco_json(records))
        captions = coco_json(records) | {"annotations": [{"id": 1, "image_id": 1, "caption": "a disc"}]}
        write_json(root / f"annotations/captions_{split}.json", captions)


def write_coco_train_json(root: Path, records=RECORDS) -> None:
    write_images(root / "images", records)
    for split in ("train", "val"):
        write_json(root / f"annotations/{split}.json", coco_json(records))


def write_coco_roboflow(root: Path, records=RECORDS) -> None:
    for split in ("train", "valid", "test"):
        write_images(root / split, records)
        write_json(root / split / "_annotations.coco.json", coco_json(records, grouping=True))
    (root / "README.roboflow.txt").write_text("shapes\n")


def write_coco_cvat(root: Path, records=RECORDS) -> None:
    write_images(root / "images", records)
    write_json(root / "annotations/instances_default.json", coco_json(records))


def write_coco_label_studio(root: Path, records=RECORDS, file_name="images/{}.png") -> None:
    write_images(root / "images", records)
    write_json(root / "result.json", coco_json(records, first_id=0, file_name=file_name))


def write_coco_label_studio_windows(root: Path, records=RECORDS) -> None:
    write_coco_label_studio(root, records, file_name="images\\{}.png")


def write_coco_any_name(root: Path, records=RECORDS) -> None:
    write_images(root / "pictures", records)
    write_json(root / "my labels.json", coco_json(records))


def write_coco_absolute(root: Path, records=RECORDS) -> None:
    for split in ("train", "val"):
        write_images(root / "images" / split, records)
        content = coco_json(records, file_name=f"/home/me/set/images/{split}/{{}}.png")
        write_json(root / f"annotations/instances_{split}.json", content)


def write_coco_beside(root: Path, records=RECORDS) -> None:
    """Writes train/train.json beside the images of train/."""
    for split in ("train", "valid"):
        write_images(root / split, records)
        write_json(root / split / f"{split}.json", coco_json(records))


def write_coco_via(root: Path, records=RECORDS) -> None:
    """Writes the export of the VGG image annotator: categories once per image, image_id as text, no sizes."""
    write_images(root, records)
    content = coco_json(records, image_id=str)
    content["images"] = [image | {"width": -1, "height": -1} for image in content["images"]]
    content["categories"] *= len(records)
    write_json(root / "via_export_coco.json", content)


# Every layout that a tool writes -> what writes it.
WRITERS = {
    "PASCAL VOC": write_voc,
    "VOCdevkit": write_vocdevkit,
    "labelImg": write_voc_beside,
    "labelImg in folders": write_voc_beside_in_folders,
    "Kaggle": write_voc_flat,
    "Label Studio VOC": write_voc_label_studio,
    "CVAT VOC": write_voc_cvat,
    "CVAT VOC in folders": write_voc_cvat_in_folders,
    "Roboflow VOC": write_voc_roboflow,
    "VOC in folders of splits": write_voc_split_folders,
    "VoTT": write_voc_vott,
    "XML named after the image file": write_voc_full_names,
    "COCO": write_coco,
    "COCO with train.json": write_coco_train_json,
    "Roboflow COCO": write_coco_roboflow,
    "CVAT COCO": write_coco_cvat,
    "Label Studio COCO": write_coco_label_studio,
    "Label Studio COCO on Windows": write_coco_label_studio_windows,
    "COCO of any name": write_coco_any_name,
    "COCO with absolute paths": write_coco_absolute,
    "COCO beside the images": write_coco_beside,
    "VIA": write_coco_via,
    "YOLO": write_yolo,
    "LabelMe": write_labelme,
    "csv": write_csv,
}
