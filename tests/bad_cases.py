"""Builds 128 faulty or irregular data sets: each is a healthy set of two images in which one image is changed.

A VOC folder contains `ok` and `odd`; a COCO file contains the images 10 and 11, and 10 is the changed image. `CASES`
has the expected result of each case, in the words of `outcome`; docs/bad_inputs.md is generated from it.
"""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fasterrcnn_jax.data.coco import read_coco
from fasterrcnn_jax.data.faults import FAULTY_IMAGE, FAULTY_OBJECT, skip_undecodable
from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.voc import read_voc
from fasterrcnn_jax.errors import InputError

CLASSES = ("square", "disc")
WIDTH, HEIGHT = 96, 64
COLOUR = (90, 120, 60)

OBJECTS = """<object><name>square</name><difficult>0</difficult>
<bndbox><xmin>10</xmin><ymin>10</ymin><xmax>39</xmax><ymax>39</ymax></bndbox></object>
<object><name>disc</name><difficult>0</difficult>
<bndbox><xmin>52</xmin><ymin>25</ymin><xmax>83</xmax><ymax>56</ymax></bndbox></object>"""
SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
BOXES = [[9, 9, 39, 39], [51, 24, 83, 56]]


def annotation(filename="odd.png"):
    return f"<annotation>\n<filename>{filename}</filename>\n{SIZE}\n{OBJECTS}\n</annotation>\n"


def instances():
    """Returns a healthy COCO file: images 10 and 11 with two objects each; category ids 3 and 7."""
    annotations = [
        {"id": n, "image_id": image, "category_id": category, "bbox": bbox, "area": area, "iscrowd": 0}
        for n, image, category, bbox, area in (
            (1, 10, 3, [9, 9, 30, 30], 800.5),
            (2, 10, 7, [51.25, 24, 32, 32], 700),
            (3, 11, 3, [9, 9, 30, 30], 900),
            (4, 11, 7, [51, 24, 32, 32], 1024),
        )
    ]
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in (10, 11)],
        "categories": [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}],
        "annotations": annotations,
    }


def write_voc(root: Path) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name in ("ok", "odd"):
        Image.new("RGB", (WIDTH, HEIGHT), COLOUR).save(root / f"JPEGImages/{name}.png")
        (root / f"Annotations/{name}.xml").write_text(annotation(f"{name}.png"))
    (root / "ImageSets/Main/train.txt").write_text("ok\nodd\n")


def write_coco(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    for name in ("10", "11"):
        Image.new("RGB", (WIDTH, HEIGHT), COLOUR).save(root / f"images/{name}.png")
    (root / "instances.json").write_text(json.dumps(instances()))


# What spoils a VOC folder.


def xml_of(root):
    return root / "Annotations/odd.xml"


def replace(old, new):
    """Returns a fault: the first `old` in the changed annotation becomes `new`."""

    def spoil(root):
        text = xml_of(root).read_text()
        assert old in text
        xml_of(root).write_text(text.replace(old, new, 1))

    return spoil


def content(new):
    """Returns a fault: the changed annotation has these bytes."""
    return lambda root: xml_of(root).write_bytes(new)


def listing(new):
    """Returns a fault: the list of split train has these bytes."""
    return lambda root: (root / "ImageSets/Main/train.txt").write_bytes(new)


def with_first_object(xml):
    return replace(OBJECTS.split("</object>")[0] + "</object>", xml)


def edges(xmin, ymin, xmax, ymax):
    """Returns a fault: the first box of the changed annotation has these edges."""
    old = "<xmin>10</xmin><ymin>10</ymin><xmax>39</xmax><ymax>39</ymax>"
    return replace(old, f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>")


def odd_image(image, name="odd.jpg", **options):
    """Returns a fault: the changed image has these pixels and this file name."""

    def spoil(root):
        (root / "JPEGImages/odd.png").unlink()
        image.save(root / "JPEGImages" / name, **options)

    return spoil


def pixels(new, name="odd.jpg"):
    """Returns a fault: the changed image is a file with these bytes."""

    def spoil(root):
        (root / "JPEGImages/odd.png").unlink()
        (root / "JPEGImages" / name).write_bytes(new)

    return spoil


def of_size(width, height):
    """Returns a fault: the changed image has this size, and its only object covers it."""

    def spoil(root):
        odd_image(Image.new("RGB", (width, height), COLOUR), "odd.png")(root)
        box = f"<xmin>1</xmin><ymin>1</ymin><xmax>{width}</xmax><ymax>{height}</ymax>"
        xml = annotation().replace(OBJECTS, f"<object><name>square</name><bndbox>{box}</bndbox></object>")
        xml_of(root).write_text(xml.replace(SIZE, f"<size><width>{width}</width><height>{height}</height></size>"))

    return spoil


def both(*faults):
    return lambda root: [fault(root) for fault in faults] and None


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return odd_image(Image.new("RGB", (WIDTH, HEIGHT), COLOUR), exif=exif)


def cut_jpeg(root):
    odd_image(noise())(root)
    path = root / "JPEGImages/odd.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def png(width, height, depth, colour, rows):
    """Returns the bytes of a PNG file with the given header fields and uncompressed data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = b"\x89PNG\r\n\x1a\n"
    for kind, payload in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        parts += struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))
    return parts


def palette():
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return odd_image(image, "odd.png", transparency=bytes([0, 128, 255]))


def doctype(declaration, use):
    return content(
        f'<?xml version="1.0"?>\n<!DOCTYPE annotation [{declaration}]>\n'.encode()
        + annotation().replace("<name>square", f"<name>{use}").encode()
    )


LAUGHS = '<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in zip("abcdefghi", "bcdefghij")
)


def encoded(encoding, declaration="", *, filename="odd.png", mark=b""):
    return lambda root: xml_of(root).write_bytes(mark + (declaration + annotation(filename)).encode(encoding))


def listed_outside(root):
    # What a careless join would load is there.
    shutil.copy(xml_of(root), root.parent / "outside.xml")
    shutil.copy(root / "JPEGImages/odd.png", root.parent / "outside.png")
    listing(b"ok\n../../outside\n")(root)


def renamed(new):
    """Returns a change: the image and its annotation have another name, also in the list."""

    def spoil(root):
        replace("<filename>odd", f"<filename>{new}")(root)
        xml_of(root).rename(root / f"Annotations/{new}.xml")
        (root / "JPEGImages/odd.png").rename(root / f"JPEGImages/{new}.png")
        listing(f"ok\n{new}\n".encode())(root)

    return spoil


def no_objects_at_all(root):
    for name in ("ok", "odd"):
        path = root / f"Annotations/{name}.xml"
        path.write_text(path.read_text().replace(OBJECTS, ""))


# What spoils a COCO file.


def changed(path, value):
    """Returns the content with `value` at `path`, for example ("images", 0, "id"); None deletes the item."""
    content = instances()
    *way, last = path
    item = content
    for step in way:
        item = item[step]
    if value is None:
        del item[last]
    else:
        item[last] = value
    return content


def twice(key):
    content = instances()
    content[key].append(content[key][0])
    return content


def of_annotation(key, value):
    return changed(("annotations", 0, key), value)


def of_image(key, value):
    return changed(("images", 0, key), value)


def holding(new):
    """Returns a fault: the COCO file has this content, given as JSON or as bytes."""
    text = new if isinstance(new, bytes) else json.dumps(new).encode()
    return lambda root: (root / "instances.json").write_bytes(text)


def crowd(segmentation):
    return holding(changed(("annotations", 0), instances()["annotations"][0] | {"iscrowd": 1, **segmentation}))


def with_items(key, change):
    """Returns the content with every item of a list replaced by `change(item)`; None removes the item."""
    items = [change(item) for item in instances()[key]]
    return instances() | {key: [item for item in items if item is not None]}


def long_ids():
    moved = with_items("annotations", lambda a: a | {"id": 2**53 - a["id"], "image_id": a["image_id"] + 2**40})
    return moved | {"images": [image | {"id": image["id"] + 2**40} for image in instances()["images"]]}


def in_subfolder(file_name):
    """Returns a change: the changed image is in a subfolder, and `file_name` says so."""

    def spoil(root):
        (root / "images/sub").mkdir()
        (root / "images/10.png").rename(root / "images/sub/10.png")
        holding(of_image("file_name", file_name))(root)

    return spoil


class Case(NamedTuple):
    spoil: Callable[[Path], None]
    strict: str
    lenient: str
    says: tuple[str, ...] = ()  # parts of the message, strict and lenient


READ, NOTED, ERROR = "read", "read, noted", "error"
NO_IMAGE, NO_OBJECT = "image skipped", "object skipped"


def fine(spoil):
    return Case(spoil, READ, READ)


def noted(spoil, *says):
    return Case(spoil, NOTED, NOTED, says)


def refused(spoil, *says):
    return Case(spoil, ERROR, ERROR, says)


def bad_image(spoil, *says):
    return Case(spoil, ERROR, NO_IMAGE, says)


def bad_object(spoil, *says):
    return Case(spoil, ERROR, NO_OBJECT, says)


XML = "Annotations/odd.xml"
ANNOTATION_1 = "instances.json, annotation 1"

CASES = {
    "voc_truncated_jpeg": bad_image(cut_jpeg, "JPEGImages/odd.jpg", "decoded"),
    "voc_zero_byte_jpeg": bad_image(pixels(b""), "JPEGImages/odd.jpg", "empty"),
    "voc_text_named_jpg": bad_image(pixels(b"<html>404</html>"), "JPEGImages/odd.jpg", "not an image"),
    "voc_png_bytes_named_jpg": fine(odd_image(noise(), format="PNG")),
    "voc_png_alpha": fine(odd_image(Image.new("RGBA", (WIDTH, HEIGHT), (9, 8, 7, 0)), "odd.png")),
    "voc_png_palette_transparent": fine(palette()),
    "voc_gray_jpeg": fine(odd_image(Image.new("L", (WIDTH, HEIGHT), 77))),
    "voc_cmyk_jpeg": fine(odd_image(Image.new("RGB", (WIDTH, HEIGHT), (220, 20, 20)).convert("CMYK"))),
    "voc_png_16bit_gray": noted(
        odd_image(Image.fromarray(np.tile(np.arange(WIDTH, dtype=np.uint16) * 680, (HEIGHT, 1))), "odd.png"),
        "16 bits", "JPEGImages/odd.png",
    ),
    "voc_png_12bit_gray": noted(
        odd_image(Image.fromarray(np.tile(np.arange(WIDTH, dtype=np.uint16) * 42, (HEIGHT, 1))), "odd.png"),
        "16 bits", "JPEGImages/odd.png",
    ),
    "voc_png_16bit_rgb": fine(
        pixels(png(WIDTH, HEIGHT, 16, 2, (b"\0" + b"\xc8\x12" * 3 * WIDTH) * HEIGHT), "odd.png")
    ),
    "voc_exif_rotated_xml_stored_frame": fine(turned(6)),
    "voc_exif_rotated_xml_display_frame": fine(
        both(turned(6), replace(SIZE, f"<size><width>{HEIGHT}</width><height>{WIDTH}</height></size>"),
             replace("<xmin>52</xmin><ymin>25</ymin><xmax>83<", "<xmin>9</xmin><ymin>25</ymin><xmax>40<"))
    ),
    "voc_exif_orientation_invalid_0": fine(turned(0)),
    "voc_image_1x1": noted(of_size(1, 1), XML, "object 1", "under two pixels"),
    "voc_panorama_6000x40": fine(of_size(6000, 40)),
    "voc_tall_40x6000": fine(of_size(40, 6000)),
    "voc_png_bomb_20000x20000": bad_image(
        pixels(png(20000, 20000, 8, 2, bytes(1000)), "odd.png"), "JPEGImages/odd.png", "too large"
    ),
    "voc_xml_no_objects": fine(replace(OBJECTS, "")),
    "voc_all_images_no_objects": fine(no_objects_at_all),
    "voc_box_inverted": bad_object(edges(60, 10, 39, 39), XML, "object 1", "xmin 60", "xmax 39"),
    "voc_box_zero_area": noted(edges(10, 10, 10, 10), XML, "object 1", "under two pixels"),
    "voc_box_partly_outside": noted(edges(-5, 10, 140, 39), XML, "object 1", "xmin -5", "xmax 140", "clipped"),
    "voc_box_fully_outside": bad_object(edges(200, 10, 260, 39), XML, "object 1", "xmin 200", "outside"),
    "voc_box_nan": bad_object(edges("nan", 10, 39, 39), XML, "object 1, xmin", "'nan'"),
    "voc_box_inf": bad_object(edges(10, 10, "inf", 39), XML, "object 1, xmax", "'inf'"),
    "voc_box_text": bad_object(edges("ten", 10, 39, 39), XML, "object 1, xmin", "'ten'"),
    "voc_box_empty_tag": bad_object(edges("", 10, 39, 39), XML, "object 1, xmin", "''"),
    "voc_box_float": fine(edges(10.6, 10.2, 39.4, 39)),
    "voc_box_huge_number": bad_object(edges(10, 10, "1e300", 39), XML, "object 1, xmax", "1e300"),
    "voc_missing_bndbox": bad_object(
        with_first_object("<object><name>square</name></object>"), XML, "object 1, bndbox"
    ),
    "voc_missing_ymax": bad_object(replace("<ymax>39</ymax>", ""), XML, "object 1, ymax"),
    "voc_bndbox_other_order": fine(
        replace(
            "<xmin>10</xmin><ymin>10</ymin><xmax>39</xmax><ymax>39</ymax>",
            "<ymax>39</ymax><xmax>39</xmax><ymin>10</ymin><xmin>10</xmin>",
        )
    ),
    "voc_part_bndbox_first": fine(
        replace(
            "<object>",
            "<object><part><name>head</name>"
            "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>",
        )
    ),
    "voc_no_difficult_truncated": fine(replace("<difficult>0</difficult>", "")),
    "voc_difficult_object": fine(replace("<difficult>0", "<difficult>1")),
    "voc_difficult_false": noted(replace("<difficult>0", "<difficult>False"), XML, "object 1", "'False'"),
    "voc_difficult_maybe": bad_object(replace("<difficult>0", "<difficult>maybe"), XML, "object 1, difficult"),
    "voc_unknown_class": noted(
        replace("<name>disc", "<name>triangle"), XML, "object 2, name", "'triangle'", "outside data.class_names"
    ),
    "voc_class_name_padded": noted(
        both(replace("<name>square", "<name> square\n"), replace("<name>disc", "<name>Disc")),
        XML, "object 2, name", "'Disc'", "outside data.class_names",
    ),
    "voc_class_name_missing": bad_object(replace("<name>square</name>", ""), XML, "object 1, name"),
    "voc_missing_size": fine(replace(SIZE, "")),
    "voc_size_zero": noted(
        replace(SIZE, "<size><width>0</width><height>0</height></size>"), XML, "<size>", "size of the image"
    ),
    "voc_size_empty": noted(replace(SIZE, "<size><width/><height/></size>"), XML, "<size>", "size of the image"),
    "voc_size_mismatch": bad_image(
        replace(SIZE, f"<size><width>{HEIGHT}</width><height>{WIDTH}</height></size>"),
        XML, "size", "64 x 96", "96 x 64", "swapped",
    ),
    "voc_duplicate_box": fine(replace("</annotation>", OBJECTS + "</annotation>")),
    "voc_box_covers_image": fine(edges(1, 1, WIDTH, HEIGHT)),
    "voc_many_boxes_500": fine(replace("</annotation>", OBJECTS * 249 + "</annotation>")),
    "voc_xml_truncated": bad_image(content(annotation()[:200].encode()), XML, "not well-formed", "line"),
    "voc_xml_empty": bad_image(content(b""), XML, "not well-formed"),
    "voc_xml_wrong_root": bad_image(content(b"<html><body>404</body></html>"), XML, "not a VOC annotation"),
    "voc_xml_latin1_undeclared": bad_image(encoded("latin-1", filename="café.png"), XML, "not well-formed", "line 2"),
    "voc_xml_latin1_declared": fine(encoded("latin-1", '<?xml version="1.0" encoding="ISO-8859-1"?><!-- é -->')),
    "voc_xml_utf16": fine(encoded("utf-16", '<?xml version="1.0" encoding="UTF-16"?>')),
    "voc_xml_utf8_bom": fine(encoded("utf-8", mark=b"\xef\xbb\xbf")),
    "voc_xml_document_type": fine(content(b"<!DOCTYPE annotation>\n" + annotation().encode())),
    "voc_xml_billion_laughs": bad_image(doctype(LAUGHS, "&j;"), XML, "refused", "entities"),
    "voc_xml_external_entity": bad_image(
        doctype('<!ENTITY e SYSTEM "file:///etc/hostname">', "&e;"), XML, "refused", "entities"
    ),
    "voc_path_traversal_filename": noted(
        replace("<filename>odd.png", "<filename>../../../../../../etc/passwd"), XML, "filename", "etc/passwd"
    ),
    "voc_absolute_filename": noted(
        replace("<filename>odd.png", "<filename>/etc/passwd"), XML, "filename", "'/etc/passwd'"
    ),
    "voc_path_traversal_list_id": bad_image(listed_outside, "train.txt line 2", "'../../outside'"),
    "voc_filename_names_other_image": noted(
        replace("<filename>odd.png", "<filename>ok.png"), XML, "filename", "'ok.png'"
    ),
    "voc_filename_without_extension": fine(replace("<filename>odd.png", "<filename>odd")),
    "voc_extension_upper_JPG": fine(both(odd_image(noise(), "odd.JPG"), replace("odd.png", "odd.JPG"))),
    "voc_extension_bmp": fine(both(odd_image(noise(), "odd.bmp"), replace("odd.png", "odd.jpg"))),
    "voc_extension_XML": fine(lambda root: xml_of(root).rename(root / "Annotations/odd.XML") and None),
    "voc_listed_image_absent": bad_image(
        lambda root: (root / "JPEGImages/odd.png").unlink(), "JPEGImages/odd.png", "no such image", "train.txt line 2"
    ),
    "voc_listed_xml_absent": bad_image(
        lambda root: xml_of(root).unlink(), XML, "no such annotation", "train.txt line 2"
    ),
    "voc_unlisted_files": fine(lambda root: shutil.copy(xml_of(root), root / "Annotations/extra.xml")),
    "voc_list_crlf_bom_blank": fine(listing(b"\xef\xbb\xbfok \r\n\r\n  odd\r\n\r\n")),
    "voc_list_class_style": noted(listing(b"ok  1\nodd -1\n"), "train.txt line 1", "follows the name"),
    "voc_list_with_extension": fine(listing(b"ok.jpg\nodd.jpg\n")),
    "voc_list_of_xml": fine(listing(b"ok.xml\nodd.xml\n")),
    "voc_list_with_folders": noted(listing(b"ok\nJPEGImages/odd.png\n"), "train.txt line 2", "folder"),
    "voc_list_other_letters": noted(listing(b"ok\nODD\n"), "train.txt line 2", "ODD"),
    "voc_list_duplicate_id": noted(listing(b"ok\nodd\nodd\n"), "train.txt line 3", "odd", "Repeated"),
    "voc_list_empty": refused(listing(b""), "train.txt", "is empty"),
    "voc_list_missing": refused(
        lambda root: (root / "ImageSets/Main/train.txt").unlink(), "ImageSets/Main/train.txt", "no such list"
    ),
    "voc_name_spaces_unicode": fine(renamed("café no 1")),
    "coco_healthy_sparse_ids": fine(lambda root: None),
    "coco_missing_category": bad_object(
        holding(of_annotation("category_id", 99)), ANNOTATION_1, "category_id", "99"
    ),
    "coco_no_categories_key": refused(holding(changed(("categories",), None)), "instances.json, categories", "missing"),
    "coco_category_id_zero": fine(
        holding(
            with_items("annotations", lambda a: a | {"category_id": {3: 0, 7: 7}[a["category_id"]]})
            | {"categories": [{"id": 0, "name": "square"}, {"id": 7, "name": "disc"}]}
        )
    ),
    "coco_duplicate_category_names": refused(
        holding(changed(("categories", 1, "name"), "square")), "instances.json, categories", "'square'", "3 and 7"
    ),
    "coco_repeated_categories": noted(
        holding(instances() | {"categories": instances()["categories"] * 2}), "categories[2]", "Repeated"
    ),
    "coco_grouping_category": noted(
        holding(
            instances()
            | {"categories": [{"id": 0, "name": "things"},
                              *(c | {"supercategory": "things"} for c in instances()["categories"])]}
        ),
        "instances.json, category 0", "'things'",
    ),
    "coco_category_names_padded": fine(holding(with_items("categories", lambda c: c | {"name": f" {c['name']} "}))),
    "coco_category_name_number": noted(
        holding(instances() | {"categories": [*instances()["categories"], {"id": 9, "name": 0}],
                               "annotations": [*instances()["annotations"],
                                               instances()["annotations"][0] | {"id": 5, "category_id": 9}]}),
        "annotation 5, category_id: 9 ('0')", "outside data.class_names",
    ),
    "coco_duplicate_image_ids": refused(holding(of_image("id", 11)), "instances.json, images", "id 11", "twice"),
    "coco_repeated_image": noted(holding(twice("images")), "image 10", "Repeated"),
    "coco_duplicate_annotation_ids": bad_object(
        holding(changed(("annotations", 1, "id"), 1)), "instances.json, annotations", "id 1", "twice"
    ),
    "coco_negative_width": bad_object(holding(of_annotation("bbox", [9, 9, -30, 30])), ANNOTATION_1, "bbox", "-30"),
    "coco_zero_width": noted(holding(of_annotation("bbox", [9, 9, 0, 30])), ANNOTATION_1, "bbox", "dropped"),
    "coco_bbox_three_numbers": bad_object(holding(of_annotation("bbox", [9, 9, 30])), ANNOTATION_1, "bbox"),
    "coco_bbox_null": bad_object(
        holding(json.dumps(instances()).replace("[9, 9, 30, 30]", "null", 1).encode()), ANNOTATION_1, "bbox", "None"
    ),
    "coco_bbox_nan": bad_object(
        holding(of_annotation("bbox", [9, float("nan"), 30, 30])), ANNOTATION_1, "bbox", "nan"
    ),
    "coco_bbox_strings": noted(
        holding(of_annotation("bbox", ["9", "9", "30", "30"])), ANNOTATION_1, "bbox", "'9'", "as text"
    ),
    "coco_bbox_beyond_image": noted(
        holding(changed(("annotations", 1, "bbox"), [60, 25, 80, 60])), "annotation 2, bbox", "clipped"
    ),
    "coco_missing_bbox_key": bad_object(holding(of_annotation("bbox", None)), ANNOTATION_1, "bbox", "missing"),
    "coco_missing_bbox_with_outline": noted(
        holding(changed(("annotations", 0), {key: value for key, value in instances()["annotations"][0].items()
                                             if key != "bbox"} | {"segmentation": [[9, 10, 39, 9, 30, 39]]})),
        ANNOTATION_1, "extent of the outline",
    ),
    "coco_missing_area": noted(holding(of_annotation("area", None)), "annotation 1", "area"),
    "coco_area_null": noted(
        holding(json.dumps(instances()).replace("800.5", "null", 1).encode()), "annotation 1", "area"
    ),
    "coco_missing_iscrowd": fine(holding(of_annotation("iscrowd", None))),
    "coco_iscrowd_false": fine(holding(with_items("annotations", lambda a: a | {"iscrowd": False}))),
    "coco_ignore": noted(holding(of_annotation("ignore", 1)), ANNOTATION_1, "ignore", "crowds"),
    "coco_no_annotation_ids": noted(
        holding(with_items("annotations", lambda a: {key: value for key, value in a.items() if key != "id"})),
        "annotations[0]", "without an id",
    ),
    "coco_crowd_rle_uncompressed": fine(crowd({"segmentation": {"counts": [3000, 3144], "size": [64, 96]}})),
    "coco_crowd_rle_compressed": fine(crowd({"segmentation": {"counts": "PPYo0", "size": [64, 96]}})),
    "coco_all_crowd": fine(
        holding(with_items("annotations", lambda a: a | {"iscrowd": int(a["image_id"] == 10)}))
    ),
    "coco_image_without_annotations": fine(
        holding(with_items("annotations", lambda a: None if a["image_id"] == 10 else a))
    ),
    "coco_no_annotations_key": refused(
        holding(changed(("annotations",), None)), "instances.json, annotations", "missing"
    ),
    "coco_annotation_of_unknown_image": bad_object(
        holding(of_annotation("image_id", 999)), ANNOTATION_1, "image_id", "999"
    ),
    "coco_image_file_missing": bad_image(
        lambda root: (root / "images/10.png").unlink(), "image 10, file_name", "no image file '10.png'"
    ),
    "coco_image_size_mismatch": bad_image(
        holding(changed(("images", 0), instances()["images"][0] | {"width": HEIGHT, "height": WIDTH})),
        "image 10", "64 x 96", "96 x 64", "images/10.png",
    ),
    "coco_image_size_missing": noted(
        holding(
            with_items("images", lambda image: {key: image[key] for key in ("id", "file_name")})
        ),
        "image 10", "width",
    ),
    "coco_image_size_null": noted(
        holding(json.dumps(instances()).replace("96", "null").encode()), "image 10", "width"
    ),
    "coco_image_size_minus_one": noted(
        holding(with_items("images", lambda image: image | {"width": -1, "height": -1})), "image 10", "width"
    ),
    "coco_path_traversal": bad_image(
        holding(of_image("file_name", "../../../../../../etc/passwd")), "image 10, file_name", "etc/passwd"
    ),
    "coco_path_absolute": noted(
        holding(of_image("file_name", "/home/me/set/10.png")), "image 10, file_name", "'/home/me/set/10.png' as 10.png"
    ),
    "coco_path_backslash": noted(in_subfolder("sub\\10.png"), "image 10, file_name", "Windows"),
    "coco_path_other_letters": noted(holding(of_image("file_name", "10.PNG")), "image 10, file_name", "as 10.png"),
    "coco_subfolder_file_name": fine(in_subfolder("sub/10.png")),
    "coco_ids_as_strings": noted(
        holding(with_items("annotations", lambda a: a | {"image_id": str(a["image_id"])})),
        "annotation 1, image_id", "'10'", "as text",
    ),
    "coco_truncated_json": refused(
        holding(json.dumps(instances()).encode()[:200]), "instances.json", "line 1 column"
    ),
    "coco_results_list": refused(holding([{"image_id": 10, "score": 0.5}]), "instances.json", "list"),
    "coco_utf8_bom": fine(holding(b"\xef\xbb\xbf" + json.dumps(instances()).encode())),
    "coco_empty_lists": refused(holding(instances() | {"images": [], "annotations": []}), "instances.json", "is empty"),
    "coco_ids_beyond_int32": fine(holding(long_ids())),
}  # fmt: skip


def build(name: str, root: Path) -> None:
    """Writes the named case into the new folder `root`."""
    (write_voc if name.startswith("voc") else write_coco)(root)
    CASES[name].spoil(root)


def read(root: Path, *, faults="error"):
    """Reads a case, ours or of the shared collection, and decodes its images."""
    if (root / "ImageSets").exists() or (root / "JPEGImages").exists():
        dataset = read_voc(root, "train", CLASSES, faults=faults)
    else:
        place = root / "instances.json"
        place = place if place.exists() else root / "annotations/instances.json"
        dataset = read_coco(place, root / "images", CLASSES, faults=faults)
    if faults == "skip":
        dataset = skip_undecodable(dataset)
    for record in dataset.records:
        assert record_pixels(record).shape == (*record.image_hw, 3)
    return dataset


def outcome(root: Path, *, faults="error") -> tuple[str, str]:
    """Returns the outcome of a case, as in docs/bad_inputs.md, and the message."""
    try:
        dataset = read(root, faults=faults)
    except InputError as error:
        return ERROR, str(error)
    said = " ".join(dataset.notes)
    sentences = {finding.sentence for finding in dataset.findings}
    if FAULTY_IMAGE in sentences:
        return NO_IMAGE, said
    if FAULTY_OBJECT in sentences:
        return NO_OBJECT, said
    return (NOTED if said else READ), said
