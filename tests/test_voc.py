"""Tests the VOC reader: exact pixels on healthy folders, one clear sentence for every fault."""

import re
import shutil

import numpy as np
import pytest
from bad_cases import (
    BOXES,
    CLASSES,
    HEIGHT,
    OBJECTS,
    SIZE,
    WIDTH,
    annotation,
    content,
    listed_outside,
    listing,
    replace,
    with_first_object,
    write_voc,
    xml_of,
)
from PIL import Image

from fasterrcnn_jax.data.images import read_image, record_pixels
from fasterrcnn_jax.data.voc import CLASS_NAMES, DECIMALS, NO_XML, Places, read_voc
from fasterrcnn_jax.errors import InputError


@pytest.fixture
def root(tmp_path):
    """Returns a healthy folder of two images, `ok` and `odd`; the tests change `odd`."""
    write_voc(tmp_path / "set")
    return tmp_path / "set"


def doctype(encoding):
    text = annotation().replace(
        "<annotation>", '<!DOCTYPE annotation [<!ENTITY e SYSTEM "file:///etc/hostname">]>\n<annotation>'
    )
    return f'<?xml version="1.0" encoding="{encoding}"?>\n{text}'.encode(encoding)


FAULTS = {
    "box inverted": (replace("<xmin>10", "<xmin>45"), ["odd.xml", "object 1", "xmin 45", "xmax 39"]),
    "box inverted in y": (replace("<ymax>56", "<ymax>5"), ["odd.xml", "object 2", "ymin 25", "ymax 5"]),
    "box right of the image": (
        replace("<xmin>52</xmin><ymin>25</ymin><xmax>83<", "<xmin>200</xmin><ymin>25</ymin><xmax>260<"),
        ["odd.xml", "object 2", "xmin 200", "xmax 260", "outside", "96"],
    ),
    "box above the image": (
        replace("<ymin>10</ymin><xmax>39</xmax><ymax>39<", "<ymin>-9</ymin><xmax>39</xmax><ymax>-3<"),
        ["odd.xml", "object 1", "ymin -9", "ymax -3", "outside"],
    ),
    "nan": (replace("<xmin>10", "<xmin>NaN"), ["odd.xml", "object 1, xmin", "NaN"]),
    "infinity": (replace("<xmax>83", "<xmax>inf"), ["odd.xml", "object 2, xmax", "inf"]),
    "huge number": (replace("<xmax>83", "<xmax>1e300"), ["odd.xml", "object 2, xmax", "1e300"]),
    "wrapped 16-bit number": (replace("<xmin>52", "<xmin>65535"), ["odd.xml", "object 2, xmin", "65535"]),
    "text for a number": (replace("<xmin>10", "<xmin>ten"), ["odd.xml", "object 1, xmin", "'ten'"]),
    # A fuzzer's finding: such a message was as long as the file.
    "endless text for a number": (replace("<xmin>10", "<xmin>" + "a" * 5000), ["odd.xml", "object 1, xmin", "a ..."]),
    "endless id": (listing(b"ok\n" + b"[" * 5000), ["train.txt line 2", "[ ..."]),
    "endless tag": (content(b"<" + b"a" * 5000 + b"/>"), ["odd.xml", "not a VOC annotation"]),
    "empty number": (replace("<xmin>10", "<xmin>"), ["odd.xml", "object 1, xmin", "''"]),
    "no ymax": (replace("<ymax>56</ymax>", ""), ["odd.xml", "object 2, ymax"]),
    "two xmin": (replace("<xmin>10</xmin>", "<xmin>10</xmin><xmin>12</xmin>"), ["odd.xml", "object 1, xmin", "2"]),
    "no bndbox": (
        lambda root: xml_of(root).write_text(annotation().replace("bndbox", "polygon")),
        ["odd.xml", "object 1, bndbox"],
    ),
    "no class": (replace("<name>square</name>", ""), ["odd.xml", "object 1, name"]),
    "empty class": (replace("<name>square<", "<name><"), ["odd.xml", "object 1, name", "''"]),
    "difficult not 0 or 1": (
        replace("<difficult>0", "<difficult>maybe"),
        ["odd.xml", "object 1, difficult", "'maybe'"],
    ),
    "size swapped": (
        replace(SIZE, "<size><width>64</width><height>96</height></size>"),
        ["odd.xml", "size", "64 x 96", "96 x 64", "odd.png", "swapped"],
    ),
    "size wrong": (replace("<width>96", "<width>97"), ["odd.xml", "size", "97 x 64", "96 x 64", "odd.png"]),
    "size is text": (replace("<width>96", "<width>wide"), ["odd.xml", "size, width", "'wide'"]),
    "xml cut": (lambda root: content(xml_of(root).read_bytes()[:200])(root), ["odd.xml", "line"]),
    "xml empty": (content(b""), ["odd.xml", "not well-formed"]),
    "xml of another kind": (content(b"<html><body>404</body></html>"), ["odd.xml", "not a VOC annotation", "<html>"]),
    "xml in an unknown encoding": (
        lambda root: xml_of(root).write_text('<?xml version="1.0" encoding="klingon"?>' + annotation()),
        ["odd.xml"],
    ),
    "xml in undeclared latin-1": (
        lambda root: xml_of(root).write_bytes(annotation("café.png").encode("latin-1")),
        ["odd.xml", "not well-formed", "line 2"],
    ),
    "xml is a folder": (
        lambda root: (xml_of(root).unlink(), xml_of(root).mkdir()),
        ["odd.xml", "no such annotation file"],
    ),
    "entity": (lambda root: xml_of(root).write_bytes(doctype("utf-8")), ["odd.xml", "refused", "entities"]),
    "entity in UTF-16": (lambda root: xml_of(root).write_bytes(doctype("utf-16")), ["odd.xml", "refused", "entities"]),
    "id outside the folder": (listed_outside, ["train.txt line 2", "'../../outside'"]),
    "id absolute": (listing(b"/etc/passwd\n"), ["train.txt line 1", "'/etc/passwd'"]),
    "id is the parent": (listing(b"ok\n..\n"), ["train.txt line 2", "'..'"]),
    "image absent": (
        lambda root: (root / "JPEGImages/odd.png").unlink(),
        ["JPEGImages/odd.png", "no such image", "train.txt line 2"],
    ),
    "annotation absent": (lambda root: xml_of(root).unlink(), ["Annotations/odd.xml", "no such", "train.txt line 2"]),
    "image empty": (lambda root: (root / "JPEGImages/odd.png").write_bytes(b""), ["JPEGImages/odd.png", "empty"]),
    "image is text": (
        lambda root: (root / "JPEGImages/odd.png").write_bytes(b"<html>404</html>"),
        ["JPEGImages/odd.png", "not an image"],
    ),
    "list empty": (listing(b"\xef\xbb\xbf\r\n \r\n"), ["train.txt", "list of split train is empty"]),
    "list not UTF-8": (listing("ok\ncafé\n".encode("latin-1")), ["train.txt", "not UTF-8"]),
    "list absent": (
        lambda root: (root / "ImageSets/Main/train.txt").rename(root / "ImageSets/Main/val.txt"),
        ["ImageSets/Main/train.txt", "no such list", "val"],
    ),
    "no lists at all": (lambda root: shutil.rmtree(root / "ImageSets"), ["ImageSets/Main/train.txt", "none"]),
    "no image folder": (lambda root: shutil.rmtree(root / "JPEGImages"), ["JPEGImages", "no such folder"]),
    "no annotation folder": (lambda root: shutil.rmtree(root / "Annotations"), ["Annotations", "no such folder"]),
    "no folder": (shutil.rmtree, ["set: no such folder"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_in_one_sentence(root, fault):
    spoil, parts = FAULTS[fault]
    spoil(root)
    with pytest.raises(InputError) as caught:
        read_voc(root, "train", CLASSES)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert str(root) in message and "\n" not in message and len(message) < 600


# case -> (change, boxes expected of `odd`, parts of the one note expected or None for no note)
READ_ANYWAY = {
    "healthy": (lambda root: None, BOXES, None),
    "fractions of pixels": (replace("<xmin>10", "<xmin>10.5"), [[9.5, 9, 39, 39], BOXES[1]], None),
    "blanks around a number": (replace("<xmin>10", "<xmin>\n 10 "), BOXES, None),
    "blanks around a class": (replace("<name>square", "<name> square\n "), BOXES, None),
    "other order of edges": (
        replace(
            "<xmin>10</xmin><ymin>10</ymin><xmax>39</xmax><ymax>39</ymax>",
            "<ymax>39</ymax><xmax>39</xmax><ymin>10</ymin><xmin>10</xmin>",
        ),
        BOXES,
        None,
    ),
    "boxes of parts first": (
        replace(
            "<object>",
            "<object><part><name>head</name>"
            "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>",
        ),
        BOXES,
        None,
    ),
    "no difficult": (replace("<difficult>0</difficult>", ""), BOXES, None),
    "no objects": (replace(OBJECTS, ""), [], None),
    "no size": (replace(SIZE, ""), BOXES, None),
    "size zero": (
        replace(SIZE, "<size><width>0</width><height>0</height></size>"),
        BOXES,
        ["<size>", ": 1, the first in", "odd.xml"],
    ),
    "size with fractions": (replace("<width>96", "<width>96.0"), BOXES, None),
    "same object twice": (replace("</annotation>", OBJECTS + "</annotation>"), BOXES + BOXES, None),
    "box covers the image": (
        with_first_object(
            "<object><name>disc</name>"
            "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>96</xmax><ymax>64</ymax></bndbox></object>"
        ),
        [[0, 0, 96, 64], BOXES[1]],
        None,
    ),
    "box from zero": (
        replace("<xmin>10</xmin><ymin>10", "<xmin>0</xmin><ymin>0"),
        [[0, 0, 39, 39], BOXES[1]],
        ["clipped: 1", "odd.xml, object 1", "xmin 0"],
    ),
    "boxes partly outside": (
        lambda root: (replace("<xmin>10", "<xmin>-5")(root), replace("<xmax>83", "<xmax>140")(root)),
        [[0, 9, 39, 39], [51, 24, 96, 56]],
        ["clipped: 2", "odd.xml, object 1", "xmin -5"],
    ),
    "box below and right of the image": (
        replace("<xmax>83</xmax><ymax>56", "<xmax>97</xmax><ymax>65"),
        [BOXES[0], [51, 24, 96, 64]],
        ["clipped: 1", "odd.xml, object 2", "ymax 65"],
    ),
    "box of one pixel": (replace("<xmax>39", "<xmax>10"), BOXES[1:], ["dropped: 1", "odd.xml, object 1"]),
    "box of no pixel counted from zero": (
        with_first_object(
            "<object><name>disc</name>"
            "<bndbox><xmin>0</xmin><ymin>9</ymin><xmax>0</xmax><ymax>20</ymax></bndbox></object>"
        ),
        BOXES[1:],
        ["dropped: 1", "odd.xml, object 1"],
    ),
    "box of two pixels": (replace("<xmax>39", "<xmax>11"), [[9, 9, 11, 39], BOXES[1]], None),
    "one pixel left after clipping": (
        replace("<xmin>52</xmin><ymin>25</ymin><xmax>83", "<xmin>96</xmin><ymin>25</ymin><xmax>120"),
        BOXES[:1],
        ["dropped: 1", "odd.xml, object 2"],
    ),
    "latin-1 declared": (
        lambda root: xml_of(root).write_bytes(
            ('<?xml version="1.0" encoding="ISO-8859-1"?><!-- é -->' + annotation()).encode("latin-1")
        ),
        BOXES,
        None,
    ),
    "UTF-16": (
        lambda root: xml_of(root).write_bytes(
            ('<?xml version="1.0" encoding="UTF-16"?>' + annotation()).encode("utf-16")
        ),
        BOXES,
        None,
    ),
    "UTF-8 with byte order mark": (
        lambda root: xml_of(root).write_bytes(b"\xef\xbb\xbf" + annotation().encode()),
        BOXES,
        None,
    ),
    "filename of another image": (
        replace("<filename>odd.png", "<filename>ok.png"),
        BOXES,
        ["<filename>", ": 1", "odd.xml, filename", "'ok.png'"],
    ),
    "filename outside": (
        replace("<filename>odd.png", "<filename>../../../../etc/passwd"),
        BOXES,
        ["<filename>", "odd.xml, filename", "etc/passwd"],
    ),
    "filename absolute": (
        replace("<filename>odd.png", "<filename>/etc/passwd"),
        BOXES,
        ["<filename>", "odd.xml, filename", "'/etc/passwd'"],
    ),
    "filename with somebody's folder": (replace("<filename>odd", "<filename>C:\\photos\\odd"), BOXES, None),
    "filename without extension": (replace("<filename>odd.png", "<filename>odd"), BOXES, None),
    "no filename": (replace("<filename>odd.png</filename>", ""), BOXES, None),
    "list with mark, CRLF and blanks": (listing(b"\xef\xbb\xbfok \r\n\r\n  odd\r\n\r\n"), BOXES, None),
    "list with extensions": (listing(b"ok.jpg\nodd.PNG\n"), BOXES, None),
    "list with class column": (listing(b"ok  1\nodd -1\n"), BOXES, ["follows the name", ": 2", "train.txt line 1"]),
    "list with more columns": (
        listing(b"ok\t1\t2\nodd, 3, 4\n"),
        BOXES,
        ["follows the name", ": 2", "train.txt line 1"],
    ),
    "list with quotation marks": (listing(b'"ok"\n"odd"\n'), BOXES, ["follows the name", ": 2"]),
    "list with comments": (listing(b"# images\nok\nodd\n#\n"), BOXES, ["Comments", ": 2", "train.txt line 1"]),
    "list of PowerShell": (listing("ok\r\nodd\r\n".encode("utf-16")), BOXES, None),
    "size null": (replace("<width>96", "<width>None"), BOXES, ["<size>", "odd.xml"]),
    "size not a number": (replace("<width>96", "<width> NaN "), BOXES, ["<size>", "odd.xml"]),
    "blanks before the declaration": (
        lambda root: xml_of(root).write_text('\n <?xml version="1.0"?>' + annotation()),
        BOXES,
        None,
    ),
    "list with repeated id": (listing(b"ok\nodd\nodd\n"), BOXES, ["Repeated", ": 1", "train.txt line 3", "odd"]),
    "list with folders": (listing(b"JPEGImages/ok.png\nodd\n"), BOXES, ["folder in a line", "train.txt line 1"]),
    "list with paths of another machine": (
        listing(b"ok\nC:\\photos\\set 1\\odd.JPG\n"),
        BOXES,
        ["folder in a line", "train.txt line 2"],
    ),
    "list of XML files": (listing(b"ok.xml\nodd.XML\n"), BOXES, None),
    "list in other letters": (listing(b"ok\nODD\n"), BOXES, ["upper or lower case", ": 1", "train.txt line 2"]),
    "XML in capital letters": (lambda root: xml_of(root).rename(root / "Annotations/odd.XML"), BOXES, None),
    "size empty": (replace(SIZE, "<size><width/><height/></size>"), BOXES, ["<size>", "odd.xml"]),
    "size without sides": (replace(SIZE, "<size></size>"), BOXES, ["<size>", "odd.xml"]),
    "size minus one": (replace("<width>96", "<width>-1"), BOXES, ["<size>", "odd.xml"]),
    "size zero with a point": (replace("<width>96", "<width>0.0"), BOXES, ["<size>", "odd.xml"]),
    "size half zero": (replace("<width>96", "<width>0"), BOXES, ["<size>", "odd.xml"]),
    "size without height": (replace("<height>64</height>", ""), BOXES, ["<size>", "odd.xml"]),
    "document type": (
        lambda root: xml_of(root).write_text('<?xml version="1.0"?>\n<!DOCTYPE annotation>\n' + annotation()),
        BOXES,
        None,
    ),
    "document type of another place": (
        lambda root: xml_of(root).write_text('<!DOCTYPE annotation SYSTEM "/etc/hostname">\n' + annotation()),
        BOXES,
        None,
    ),
    "other class": (
        replace("<name>disc", "<name>triangle"),
        BOXES[:1],
        ["classes outside data.class_names", ": 1", "odd.xml, object 2, name: 'triangle'"],
    ),
    "class in other case": (replace("<name>disc", "<name>Disc"), BOXES[:1], ["odd.xml, object 2, name: 'Disc'"]),
    "endless class": (replace("<name>disc", "<name>" + "a" * 5000), BOXES[:1], ["odd.xml, object 2, name", "aaa ."]),
    **{
        f"difficult {text!r}": (
            replace("<difficult>0", f"<difficult>{text}"),
            BOXES,
            None if text in ("0.0", "1.0") else ["<difficult>", "odd.xml, object 1", repr(text)],
        )
        for text in ("False", "true", "no", "", "Unspecified", "0.0", "1.0")
    },
    "unlisted files": (lambda root: (root / "JPEGImages/extra.png").write_bytes(b""), BOXES, None),
}


@pytest.mark.parametrize("case", READ_ANYWAY)
def test_oddity_is_read_as_stated(root, case):
    change, boxes, parts = READ_ANYWAY[case]
    change(root)
    dataset = read_voc(root, "train", CLASSES)
    assert [r.id for r in dataset.records] == ["ok", "odd"]
    ok, odd = dataset.records
    np.testing.assert_array_equal(ok.boxes, BOXES)
    np.testing.assert_array_equal(odd.boxes, np.reshape(np.array(boxes, np.float32), (-1, 4)))
    assert odd.path == root / "JPEGImages/odd.png" and odd.image_hw == (HEIGHT, WIDTH)
    assert len(odd.boxes) == len(odd.labels) == len(odd.difficult)
    if parts is None:
        assert dataset.notes == ()
    else:
        (note,) = dataset.notes
        assert [part for part in parts if part not in note] == [], note


@pytest.mark.parametrize(
    "text, expected",
    [("1", True), ("1.0", True), ("True", True), ("yes", True), ("Y", True), ("0", False), ("", False), ("-1", False)]
    + [("null", False), ("NaN", False), ("n/a", False), ("Undefined", False), ("F", False)],
)
def test_difficult_is_read_as_it_is_written(root, text, expected):
    replace("<difficult>0", f"<difficult>{text}")(root)
    assert read_voc(root, "train", CLASSES).records[1].difficult.tolist() == [expected, False]


def test_an_empty_entry_of_a_document_type_is_still_refused(root):
    xml_of(root).write_text("<!DOCTYPE annotation SYSTEM 'a.dtd' []>" + annotation())
    with pytest.raises(InputError, match="odd.xml: the file is refused"):
        read_voc(root, "train", CLASSES)


def test_corners_that_count_from_0_are_taken_as_they_are(root):
    for name in ("ok", "odd"):
        path = root / f"Annotations/{name}.xml"
        path.write_text(path.read_text().replace("</xmin>", ".0</xmin>").replace("</ymax>", ".5</ymax>"))
    read = read_voc(root, "train", CLASSES, Places(counts_from=0))
    np.testing.assert_array_equal(read.records[1].boxes, np.float32([[10, 10, 39, 39.5], [52, 25, 83, 56.5]]))
    assert read.notes == () and read_voc(root, "train", CLASSES).notes == ()


def test_corners_that_all_have_decimals_are_noted_where_they_are_counted_from_1(root):
    for name in ("ok", "odd"):
        path = root / f"Annotations/{name}.xml"
        path.write_text(re.sub(r"<([xy]m..)>(\d+)<", r"<\1>\2.0<", path.read_text()))
    dataset = read_voc(root, "train", CLASSES)
    np.testing.assert_array_equal(dataset.records[1].boxes, np.float32(BOXES))
    assert [finding.sentence for finding in dataset.findings] == [DECIMALS]
    assert read_voc(root, "train", CLASSES, Places(counts_from=0)).notes == ()


def test_a_name_in_other_letters_that_fits_two_files_is_a_fault(root):
    for name in ("Odd", "oDD"):
        shutil.copy(xml_of(root), root / f"Annotations/{name}.xml")
    listing(b"ok\nODD\n")(root)
    xml_of(root).unlink()
    with pytest.raises(InputError, match="ODD: no such file, and several differ in letters only"):
        read_voc(root, "train", CLASSES)


def test_without_lists_a_split_is_every_xml_file_and_images_without_one_are_left_out(root):
    shutil.copy(root / "JPEGImages/ok.png", root / "JPEGImages/new.png")
    dataset = read_voc(root, "all", CLASSES, Places(lists=None))
    assert [record.id for record in dataset.records] == ["odd", "ok"]
    (note,) = dataset.notes
    assert note == f"{NO_XML}: 1, the first in {root / 'JPEGImages/new.png'}."
    with pytest.raises(InputError, match="no such split; the existing splits are: all"):
        read_voc(root, "train", CLASSES, Places(lists=None))


def test_ids_with_folders_are_read(root):
    for day in ("1", "2"):
        for folder, name in (("JPEGImages", "ok.png"), ("Annotations", "ok.xml")):
            (root / folder / day).mkdir(exist_ok=True)
            shutil.copy(root / folder / name, root / folder / day / name)
    listing(b"1/ok\n2\\ok.png\n")(root)
    dataset = read_voc(root, "train", CLASSES)
    assert [record.id for record in dataset.records] == ["1/ok", "2/ok"] and dataset.notes == ()
    assert dataset.records[1].path == root / "JPEGImages/2/ok.png"


def test_a_faulty_line_of_the_list_is_skipped_when_faults_are(root):
    listed_outside(root)
    dataset = read_voc(root, "train", CLASSES, faults="skip")
    assert [record.id for record in dataset.records] == ["ok"] and dataset.findings[0].is_fault


def test_arrays_have_the_stated_types_and_shapes(root):
    replace(OBJECTS, "")(root)
    for record, count in zip(read_voc(root, "train", CLASSES).records, (2, 0), strict=True):
        assert record.boxes.dtype == np.float32 and record.boxes.shape == (count, 4)
        assert record.labels.dtype == np.int32 and record.labels.shape == (count,)
        assert record.difficult.dtype == bool and record.difficult.shape == (count,)
        assert record.crowd.shape == (count,) and not record.crowd.any()  # VOC knows none
        np.testing.assert_array_equal(record.area, [900, 1024][:count])


def test_classes_are_numbered_from_one_in_result_files(root):
    assert read_voc(root, "train", CLASSES).category_ids == (1, 2)
    assert len(set(CLASS_NAMES)) == 20 and sorted(CLASS_NAMES) == list(CLASS_NAMES)


def test_labels_count_from_one_in_the_order_of_class_names(root):
    np.testing.assert_array_equal(read_voc(root, "train", CLASSES).records[0].labels, [1, 2])
    np.testing.assert_array_equal(read_voc(root, "train", CLASSES[::-1]).records[0].labels, [2, 1])


def test_difficult_object_is_kept_with_its_flag(root):
    replace("<difficult>0", "<difficult>1")(root)
    np.testing.assert_array_equal(read_voc(root, "train", CLASSES).records[1].difficult, [True, False])


def test_flags_and_labels_stay_with_their_box_when_another_is_dropped(root):
    replace("<xmax>39", "<xmax>10")(root)
    replace("<name>disc</name><difficult>0", "<name>disc</name><difficult>1")(root)
    record = read_voc(root, "train", CLASSES).records[1]
    np.testing.assert_array_equal(record.labels, [2])
    np.testing.assert_array_equal(record.difficult, [True])


def test_box_is_exact_to_the_pixel(root):
    """White object in columns 20..49 and rows 12..40 counted from 0: VOC counts 21..50 and 13..41."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[12:41, 20:50] = 255
    Image.fromarray(pixels).save(root / "JPEGImages/odd.png")
    with_first_object(
        "<object><name>square</name>"
        "<bndbox><xmin>21</xmin><ymin>13</ymin><xmax>50</xmax><ymax>41</ymax></bndbox></object>"
    )(root)
    record = read_voc(root, "train", CLASSES).records[1]
    x1, y1, x2, y2 = record.boxes[0].astype(int)
    white = read_image(record.path)[..., 0] == 255
    assert white[y1:y2, x1:x2].all() and white.sum() == (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("extension", [".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG"])
def test_image_is_found_under_every_extension_whatever_filename_says(root, extension):
    (root / "JPEGImages/odd.png").rename(root / f"JPEGImages/odd{extension}")
    assert read_voc(root, "train", CLASSES).records[1].path == root / f"JPEGImages/odd{extension}"


def test_filename_tells_an_unusual_extension(root):
    Image.open(root / "JPEGImages/odd.png").save(root / "JPEGImages/odd.Bmp", format="BMP")
    (root / "JPEGImages/odd.png").unlink()
    replace("odd.png", "odd.Bmp")(root)
    assert read_voc(root, "train", CLASSES).records[1].path == root / "JPEGImages/odd.Bmp"


def test_filename_chooses_among_images_of_one_id(root):
    Image.new("RGB", (5, 5)).save(root / "JPEGImages/odd.jpg")
    assert read_voc(root, "train", CLASSES).records[1].path == root / "JPEGImages/odd.png"


def test_filename_of_another_image_is_ignored(root):
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages/odd.jpg")
    replace("odd.png", "ok.png")(root)
    assert read_voc(root, "train", CLASSES).records[1].path == root / "JPEGImages/odd.jpg"


@pytest.mark.parametrize("name", ["café no 1", "odd.v2", "odd.jpg", "odd -1", "a & b"])
def test_name_with_blanks_and_dots_is_an_id_when_its_files_exist(root, name):
    # `odd` exists too, which is what a shortened reading of the line would find.
    shutil.copy(xml_of(root), root / f"Annotations/{name}.xml")
    shutil.copy(root / "JPEGImages/odd.png", root / f"JPEGImages/{name}.png")
    listing(f"ok\n{name}\n".encode())(root)
    record = read_voc(root, "train", CLASSES).records[1]
    assert record.id == name and record.path == root / f"JPEGImages/{name}.png"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stated", ["stored", "shown"])
def test_object_is_on_its_pixels_whichever_frame_of_an_exif_image_the_size_states(root, orientation, stated):
    """White object in columns 20..49 and rows 12..40 of the image with the stated size."""
    turns_axes = orientation >= 5 and stated == "shown"
    height, width = (WIDTH, HEIGHT) if turns_axes else (HEIGHT, WIDTH)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[12:41, 20:50] = 255
    # What is stored so that viewers show `pixels`, where that is the frame that is stated.
    stored = read_turned_back(pixels, orientation) if turns_axes else pixels
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(root / "JPEGImages/odd.png", exif=exif)
    replace(SIZE, f"<size><width>{width}</width><height>{height}</height></size>")(root)
    replace("<xmin>10</xmin><ymin>10</ymin><xmax>39</xmax><ymax>39<",
            "<xmin>21</xmin><ymin>13</ymin><xmax>50</xmax><ymax>41<")(root)  # fmt: skip
    replace("<xmax>83", "<xmax>60")(root)
    dataset = read_voc(root, "train", CLASSES)
    record = dataset.records[1]
    assert record.image_hw == (height, width) and record.upright == turns_axes
    x1, y1, x2, y2 = record.boxes[0].astype(int)
    white = record_pixels(record)[..., 0] == 255
    assert white.shape == (height, width)
    assert white[y1:y2, x1:x2].all() and white.sum() == (x2 - x1) * (y2 - y1)
    # A mirrored or upside-down image has one size in both frames: the size does not tell, and that is said.
    assert len(dataset.notes) == (orientation in (2, 3, 4))


def read_turned_back(pixels, orientation):
    """Returns the pixels to store so that a viewer that applies `orientation` shows the given pixels."""
    back = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}  # fmt: skip
    return np.array(Image.fromarray(pixels).transpose(back[orientation]))


def test_without_a_decisive_size_the_orientation_is_not_applied_but_noted(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "JPEGImages/odd.png", exif=exif)
    replace(SIZE, "")(root)
    dataset = read_voc(root, "train", CLASSES)
    assert dataset.records[1].image_hw == (HEIGHT, WIDTH) and not dataset.records[1].upright
    assert "EXIF orientation was not applied" in dataset.notes[0] and "odd.png: orientation 6" in dataset.notes[0]
    Image.new("RGB", (WIDTH, WIDTH)).save(root / "JPEGImages/odd.png", exif=exif)
    replace("</annotation>", f"<size><width>{WIDTH}</width><height>{WIDTH}</height></size></annotation>")(root)
    assert "odd.png: orientation 6" in read_voc(root, "train", CLASSES).notes[0]


def test_split_without_any_object_is_read(root):
    for name in ("ok", "odd"):
        path = root / f"Annotations/{name}.xml"
        path.write_text(path.read_text().replace(OBJECTS, ""))
    assert sum(len(r.boxes) for r in read_voc(root, "train", CLASSES).records) == 0


def test_missing_split_names_splits_but_not_the_lists_per_class(root):
    for name in ("val", "disc_train", "disc_val", "small_set"):
        (root / f"ImageSets/Main/{name}.txt").write_text("ok\n")
    with pytest.raises(
        InputError,
        match="existing splits are: train, val, small_set; name one, for example --data.test_split train, or ",
    ):
        read_voc(root, "test", CLASSES)


@pytest.mark.parametrize("split", ["", "../train", "sub/train", "a\\b", "train\0"])
def test_split_must_be_a_plain_name(root, split):
    with pytest.raises(InputError, match="split must be"):
        read_voc(root, split, CLASSES)


@pytest.mark.parametrize("class_names", [(), ("disc", "disc")])
def test_class_names_must_be_different_names(root, class_names):
    with pytest.raises(InputError, match="class_names"):
        read_voc(root, "train", class_names)


def test_root_may_be_a_string_and_the_name_says_folder_and_split(root):
    dataset = read_voc(str(root), "train", CLASSES)
    assert dataset.class_names == CLASSES
    assert str(root) in dataset.name and "train" in dataset.name


def test_pixels_are_not_decoded_when_the_set_is_read(root):
    path = root / "JPEGImages/odd.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    record = read_voc(root, "train", CLASSES).records[1]
    with pytest.raises(InputError, match="odd.png"):
        read_image(record.path)
