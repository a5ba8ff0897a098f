"""Tests `check`: it finds planted faults and the known faults of a real data set."""

import dataclasses
import io
import re
import shutil
import sys
from pathlib import Path

import exports
import numpy as np
import pytest
import test_report
import tiny
from PIL import Image

from fasterrcnn_jax import __main__ as program
from fasterrcnn_jax.config import DataConfig, ModelConfig
from fasterrcnn_jax.data import check, overlap, sources
from fasterrcnn_jax.data.anchor_scales import fit_scales, fit_sizes, size_iou
from fasterrcnn_jax.data.records import box_iou
from fasterrcnn_jax.scripts.check import anchor_lines

BCCD = Path(__file__).parents[2] / "shared" / "data" / "bccd"


def run(*arguments):
    """Runs `check` and returns the exit status."""
    with tiny.restored_logging(), pytest.raises(SystemExit) as ended:
        program.main(["check", *map(str, arguments)])
    return ended.value.code


@pytest.fixture
def clean(tmp_path):
    """Writes five training and three test images, all different."""
    tiny.write_voc(tmp_path / "voc", train=5, test=3)
    return tmp_path / "voc"


def xml(root, name, *objects):
    """Replaces the objects of an annotation with the given (class, xmin, ymin, xmax, ymax) objects."""
    path = root / f"Annotations/{name}.xml"
    lines = "".join(
        f"<object><name>{kind}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
        "</bndbox></object>"
        for kind, a, b, c, d in objects
    )
    path.write_text(re.sub("<object>.*</object>|(?=</annotation>)", lines, path.read_text(), count=1))


def test_a_clean_folder_exits_with_0_and_is_described(clean, capsys):
    assert run(clean) == 0
    said = capsys.readouterr().out
    assert "images     5, 1 without an object; objects per image 0 to 2, median 1" in said
    assert "sizes      72 x 48: 3, 48 x 72: 2" in said
    # Objects, images with one, difficult, crowds; sides of 24 pixels, square.
    assert re.search(r"^ring +4 +4 +0 +0 +24 +24 +24 +1.00 +1.00$", said, re.MULTILINE)
    assert re.search(r"^all +6 +4 ", said, re.MULTILINE)
    assert "15 pairs of images, compared for the same pixels and for shifted views" in said
    assert said.endswith("no fault, and nothing odd\n")


def test_the_page_shows_doubles_and_leaks_with_pictures_and_counts_a_union_once(clean, capsys, monkeypatch, tmp_path):
    xml(clean, "train0", ("ring", 3, 3, 42, 42), ("disc", 9, 9, 30, 30), ("ring", 7, 3, 42, 42))
    shutil.copy(clean / "JPEGImages/train1.png", clean / "JPEGImages/test1.png")
    shutil.copy(clean / "JPEGImages/train2.png", clean / "JPEGImages/train4.png")
    sets = clean / "ImageSets/Main"
    (sets / "trainval.txt").write_text((sets / "train.txt").read_text() + (sets / "test.txt").read_text())
    monkeypatch.chdir(tmp_path)
    assert run(clean, "--report") == 2
    assert re.search(r"^report   voc_report.html: 0\.\d MB$", capsys.readouterr().out, re.MULTILINE)
    page = (tmp_path / "voc_report.html").read_text()
    assert "The split trainval is the union of others and is not counted again." in page
    reader = test_report.read(page)
    tables, texts = test_report.unpacked(reader.scripts["packed"])
    buttons = reader.of("button", "data-total")
    assert [b for b in buttons if len(test_report.rows_of(tables, b)) != int(b["data-total"])] == []
    assert len(texts["images"]) == 8 and sorted(texts["splits"]) == ["test", "train"]
    # Two pictures of each: the box that is nearly twice there, the image twice, and the leak.
    kinds = re.findall(r"<h3>(.*): (\d) shown</h3>", page)
    assert sorted(kinds) == sorted(
        [(kind, "1") for kind in (check.SAME_PIXELS, check.SAME_PIXELS_WITHIN, check.NEARLY_SAME_BOX)]
    )
    assert page.count('class="picture"') == 6
    # The two boxes stand side by side, in the same part of the image.
    first, second = (float(x) for x in re.findall(r'<rect class="found" x="([\d.]+)"', page))
    assert second - first == pytest.approx(4, abs=0.2)
    told = [place for place in texts["places"] if "train1.png" in place and "test1.png" in place]
    assert len(told) == 1


PLANTED = {
    "a box twice": (
        lambda root: xml(root, "train0", ("ring", 3, 3, 30, 30), ("disc", 9, 9, 40, 40), ("ring", 3, 3, 30, 30)),
        1, ["The same box of the same class", "train0.png: [2, 2, 30, 30] and [2, 2, 30, 30]"],
    ),
    "a box nearly twice": (
        lambda root: xml(root, "train0", ("ring", 3, 3, 42, 42), ("ring", 4, 3, 42, 42)),
        1, ["Boxes of the same class almost coincide", "train0.png", "IoU 0.975"],
    ),
    "an object of two classes": (
        lambda root: xml(root, "train0", ("ring", 3, 3, 42, 42), ("disc", 4, 3, 42, 42)),
        1, ["Boxes of two classes", "train0.png"],
    ),
    "a box of one pixel": (
        lambda root: xml(root, "train1", ("ring", 3, 3, 3, 3), ("ring", 9, 9, 30, 30)),
        1, ["under two pixels", "train1.xml, object 1"],
    ),
    "a box over the border": (
        lambda root: xml(root, "test0", ("ring", 3, 3, 300, 30)), 1, ["clipped", "test0.xml, object 1", "xmax 300"],
    ),
    "a box outside": (
        lambda root: xml(root, "test1", ("ring", 300, 3, 310, 30), ("ring", 3, 3, 30, 30)),
        2, ["FAULT", "test1.xml, object 1", "xmin 300", "outside"],
    ),
    "a class nobody meant": (
        lambda root: xml(root, "train2", ("", 3, 3, 30, 30)), 2, ["FAULT", "train2.xml, object 1, name", "''"],
    ),
    "a cut image": (
        lambda root: (root / "JPEGImages/train3.png").write_bytes((root / "JPEGImages/train3.png").read_bytes()[:900]),
        2, ["FAULT", "train3.png: the image cannot be decoded"],
    ),
    "an annotation that is none": (
        lambda root: (root / "Annotations/test2.xml").write_text("<html/>"), 2, ["FAULT", "test2.xml: not a VOC"],
    ),
    "an image in two splits under two names and formats": (
        lambda root: Image.open(root / "JPEGImages/train0.png").save(root / "JPEGImages/test0.png", "BMP"),
        2, ["FAULT", "Images with the same pixels are in both splits: 1", "train0.png and ", "test0.png"],
    ),
    "an image twice in a split": (
        lambda root: shutil.copy(root / "JPEGImages/train0.png", root / "JPEGImages/train2.png"),
        1, ["same pixels appear more than once in a split: 1", "train2.png and ", "train0.png"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found_with_its_file_and_sets_the_exit_status(clean, fault, capsys):
    plant, status, parts = PLANTED[fault]
    plant(clean)
    assert run(clean) == status
    said = capsys.readouterr().out
    assert [part for part in parts if part not in said] == [], said
    assert said.count("FAULT:") + said.count("note:") == 1


def test_names_that_the_output_cannot_encode_are_escaped(clean, monkeypatch):
    xml(clean, "train0", ("größe", 3, 3, 30, 30))
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert run(clean) == 0
    output.flush()
    assert b"gr\\xf6\\xdfe " in output.buffer.getvalue()


def test_every_fault_is_printed_with_all(clean, capsys):
    xml(clean, "train0", *[("ring", 300, 3, 310, 30)] * 25, ("ring", 3, 3, 30, 30))
    assert run(clean) == 2
    assert "and 5 more; --all prints them" in capsys.readouterr().out
    assert run(clean, "--all") == 2
    said = capsys.readouterr().out
    assert "Faulty objects were skipped: 25" in said and "train0.xml, object 25:" in said and "more;" not in said


def test_an_image_above_max_pixels_is_a_fault(clean, capsys):
    most = 72 * 48
    assert run(clean, "--max_pixels", most) == 0
    Image.new("RGB", (73, 48)).save(clean / "JPEGImages/train0.png")
    assert run(clean, "--max_pixels", most) == 2
    assert "train0.png: the image is refused because it is too large: 73 x 48" in capsys.readouterr().out
    assert run(clean, "--max_pixels", 0) == 2
    assert "--max_pixels must be positive, got 0" in capsys.readouterr().err
    fields = ["--data.root", clean, "--data.class_names", *tiny.CLASS_NAMES, "--data.test_split", "train"]
    assert run("folder.py", *fields, "--data.max_pixels", most) == 2
    assert "data.max_pixels = 3,456" in capsys.readouterr().out


def test_coinciding_boxes_are_those_that_a_comparison_of_all_pairs_finds(tmp_path):
    """A box is found if it almost coincides with an earlier one that was not found itself."""
    rng = np.random.default_rng(0)
    for scale in (1.0, 30.0, 900.0):
        low, side = rng.uniform(0, 4, (300, 2)) * scale, rng.uniform(0.9, 1.4, (300, 2)) * scale
        boxes = np.concatenate([low.round(1), (low + side).round(1)], axis=1).astype(np.float32)
        boxes[200:] = boxes[rng.integers(0, 200, 100)] + rng.uniform(-0.06, 0.06, (100, 4)).astype(np.float32) * scale
        labels, crowd = rng.integers(1, 4, 300).astype(np.int32), rng.random(300) < 0.05
        image = tiny.rectangle_image((48, 72), (3, 4, 23, 28))
        record = tiny.dataset(tmp_path, [(image, [(3, 4, 23, 28)], [1])]).records[0]
        iou, expected, found = box_iou(boxes, boxes), [], set(np.flatnonzero(crowd).tolist())
        for j in range(300):
            limits = np.where(labels == labels[j], 0.8, 0.9)
            first = next((i for i in range(j) if i not in found and iou[i, j] > limits[i]), None)
            if j not in found and first is not None:
                found.add(j)
                expected.append((first, j, iou[first, j]))
        got = list(check.coinciding(record._replace(boxes=boxes, labels=labels, crowd=crowd)))
        assert got == expected and len(got) > 50


def test_images_of_one_content_are_paired_once_each():
    """A hundred equal images in both splits are a hundred findings, not ten thousand."""
    equal = [overlap.trace(np.full((9, 9, 3), 7, np.uint8))] * 100
    assert [(pair.first, pair.second) for pair in overlap.identical(equal, equal)] == [(k, 0) for k in range(100)]


def test_a_configuration_is_checked_with_its_fields_overridden_and_its_anchors_compared(clean, capsys):
    fields = ["--data.root", clean, "--data.class_names", *tiny.CLASS_NAMES]
    assert run("folder.py", *fields, "--model.rpn.anchor_scales", "9", "10", "--data.test_split", "train") == 0
    said = capsys.readouterr().out
    assert "\ntrain: " in said and "\ntest: " not in said
    assert "anchor_scales 9 10" in said and "(320 to 320 pixels)" in said
    # 24 pixels become 24 x 320 / 72, which is 6.67 times 16.
    assert re.search(r"k-means .* --model.rpn.anchor_scales 6\.6\d ", said)


def test_a_folder_takes_the_fields_that_train_takes(clean, capsys):
    assert run(clean, "--data.class_names", "disc") == 1
    said = capsys.readouterr().out
    assert "\ntrain: " in said and "\ntest: " in said and "\nring  " not in said
    assert "Objects of classes outside data.class_names were ignored: 7" in said
    assert run(clean, "--data.classnames", "disc") == 2
    assert "--data.class_names" in capsys.readouterr().err


def test_other_paths_are_refused(clean, capsys):
    assert run(clean / "nowhere") == 2
    assert "no such folder" in capsys.readouterr().err
    assert run(clean / "JPEGImages") == 2
    assert "no known layout" in capsys.readouterr().err


def test_a_sheet_shows_images_with_boxes_where_they_are(clean, tmp_path):
    assert run(clean, "--sheets", tmp_path / "sheets") == 0
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["test.jpg", "train.jpg"]
    sheet = np.array(Image.open(tmp_path / "sheets/train.jpg"))
    assert sheet.shape == (320, 1600, 3)
    # One image in every column, the two shapes with white beside or below them.
    assert all(sheet[:, k * 320 : k * 320 + 200].std() > 20 for k in range(5))


def test_the_first_lines_say_the_layout_why_and_the_command(tmp_path, capsys):
    exports.write_voc_beside(tmp_path / "my set", records=exports.RECORDS[:1])
    assert run(tmp_path / "my set") == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "layout     PASCAL VOC, XML beside the images: 1 XML files beside images of the same names in the folder",
        "splits     all",
        "classes    2: disc, square",
        f"train      fasterrcnn-jax train '{tmp_path / 'my set'}'",
    ]


def test_a_split_that_cannot_be_read_hides_no_fault_of_another(clean, capsys):
    (clean / "ImageSets/Main/test.txt").write_text("")
    xml(clean, "train0", ("ring", 300, 3, 310, 30))
    xml(clean, "train1", ("ring", 3, 3, 30, 30), ("disc", 300, 3, 310, 30))
    assert run(clean) == 2
    said = capsys.readouterr().out
    for part in ("Splits cannot be read: 1", "test.txt: the list of split test is empty", "objects were skipped: 2"):
        assert part in said
    assert "train0.xml, object 1" in said and "train1.xml, object 2" in said


def test_faults_are_shown_where_no_object_has_a_class(clean, capsys):
    for path in (clean / "Annotations").iterdir():
        path.write_text('<!DOCTYPE a [<!ENTITY b "c">]>' + path.read_text())
    assert run(clean) == 2
    said = capsys.readouterr().out
    assert "FAULT: No object of the data set has a class name: 1" in said
    assert "Faulty images were skipped: 8" in said and "train0.xml: the file is refused" in said


def test_a_folder_with_one_split_is_checked_with_a_configuration_that_divides_it(tmp_path, capsys):
    exports.write_voc_beside(tmp_path / "set", records=exports.RECORDS[:1])
    assert run("folder.py", "--data.root", tmp_path / "set") == 0
    said = capsys.readouterr().out
    assert "\nall: " in said and "Splits cannot be read" not in said


def test_links_out_of_a_folder_are_followed_where_asked_and_the_command_says_so(tmp_path, capsys):
    exports.write_voc_beside(tmp_path / "set", records=exports.RECORDS[:1])
    (image,) = (path for path in (tmp_path / "set").iterdir() if path.suffix in (".png", ".jpg"))
    image.rename(tmp_path / image.name)
    image.symlink_to(tmp_path / image.name)
    assert run(tmp_path / "set") == 2 and "link" in capsys.readouterr().err
    assert run(tmp_path / "set", "--follow_links") == 0
    assert f"fasterrcnn-jax train {tmp_path / 'set'} --data.follow_links" in capsys.readouterr().out
    assert run("folder.py", "--data.root", tmp_path / "set", "--follow_links") == 0


def test_the_folder_may_come_after_the_flags(clean, tmp_path):
    assert run("--sheets", tmp_path / "sheets", "--all", clean) == 0
    assert (tmp_path / "sheets" / "train.jpg").exists()


def test_a_configuration_with_layout_auto_is_checked(tmp_path, capsys):
    exports.write_coco_roboflow(tmp_path)
    assert run("folder.py", "--data.root", tmp_path, "--data.layout", "auto", "--data.test_split", "valid") == 2
    said = capsys.readouterr().out
    assert said.startswith("layout     COCO as Roboflow writes it") and "\nvalid: " in said and "\ntest: " not in said
    assert "category 0 'shapes' is left out" in said


def test_a_subset_of_the_classes_is_no_fault(clean, capsys):
    assert run("folder.py", "--data.root", clean, "--data.class_names", "ring") == 1
    said = capsys.readouterr().out
    assert "note: Objects of classes outside data.class_names were ignored: 3" in said and "FAULT" not in said
    assert run("folder.py", "--data.root", clean, "--data.class_names", "rings") == 2
    assert "named 'rings'; did you mean 'ring'?" in capsys.readouterr().err


def test_images_with_more_objects_than_boxes_are_said(clean, capsys):
    xml(clean, "train0", *[("ring", x, y, x + 2, y + 2) for x in range(1, 60, 4) for y in range(1, 40, 4)])
    assert run(clean) == 1
    said = capsys.readouterr().out
    assert (
        "1 of 5 images have more than 100 objects, up to 150, but a detector returns no more boxes than "
        "model.postprocess.max_detections = 100; its recall is at most 0.677"
    ) in said
    fields = ["--data.root", clean, "--model.postprocess.max_detections", "200"]
    run("folder.py", *fields)
    assert "more objects" not in capsys.readouterr().out
    run("folder.py", *fields, "--model.test_proposals.post_nms_top_n", "120")
    assert "than model.test_proposals.post_nms_top_n = 120; its recall is at most" in capsys.readouterr().out


def test_a_list_that_joins_other_lists_is_not_compared_with_them(clean, capsys):
    """trainval joins train and val; train and test, which share an image, are still compared."""
    names = (clean / "ImageSets/Main/train.txt").read_text().split()
    for split, part in (("train", names[:3]), ("val", names[3:]), ("trainval", names)):
        (clean / f"ImageSets/Main/{split}.txt").write_text("\n".join(part))
    assert run(clean) == 0
    assert capsys.readouterr().out.count("pairs of images") == 3
    (clean / "ImageSets/Main/test.txt").write_text("test0\ntrain0\n")
    assert run(clean) == 2
    assert "in both splits: 1" in capsys.readouterr().out


def field(seed, height=400, width=600):
    """Returns an image with structure at every scale, so that only identical parts of it are similar."""
    rng = np.random.default_rng(seed)
    blobs = [
        Image.fromarray(rng.normal(0, 2 * cell, (height // cell, width // cell)).astype(np.float32))
        for cell in (10, 20, 50)
    ]
    grey = sum(np.asarray(blob.resize((width, height), Image.Resampling.BICUBIC)) for blob in blobs)
    return np.repeat(np.clip(grey + 128, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("x, y", [(0, 0), (60, 0), (-30, 45), (120, -90)])
def test_a_shifted_view_is_found_with_its_shift(x, y):
    """Two overlapping parts of one large image are shifted views."""
    whole = field(1)
    one = whole[100:340, 130:450]
    other = whole[100 + y : 340 + y, 130 + x : 450 + x] if (x, y) != (0, 0) else one // 2 + 40
    (found,) = overlap.shifted_views([overlap.trace(field(2)[:240, :320]), overlap.trace(one)], [overlap.trace(other)])
    assert (found.first, found.second) == (1, 0) and found.correlation > 0.8
    # A pixel of the small image is 4 of this one.
    np.testing.assert_allclose(np.array(found.shift) * 320, [-x, -y], atol=5)


def test_the_correlation_is_pearsons_over_what_two_views_have_in_common():
    one, other = (overlap.trace(field(seed)[:240, :320]).thumbnail for seed in (1, 2))
    mixed = 0.9 * one + 0.1 * other
    assert np.abs(overlap._detail(np.full((7, 30), 5.0, np.float32))).max() < 1e-6
    best, shift = overlap._best_shift(overlap._spectra(one, 1), overlap._spectra(mixed, 1), one.size, 1)
    assert shift == (0.0, 0.0)
    np.testing.assert_allclose(best, np.corrcoef(one.ravel(), mixed.ravel())[0, 1], atol=1e-6)


def test_images_of_one_colour_and_of_other_shapes_are_no_views_of_each_other():
    flat = [overlap.trace(np.full((60, 80, 3), value, np.uint8)) for value in (0, 100)]
    odd = [overlap.trace(np.zeros(shape, np.uint8)) for shape in ((1, 1, 3), (40, 6000, 3), (6000, 40, 3))]
    assert overlap.shifted_views([*flat, *odd], [*flat, *odd, overlap.trace(field(1))]) == []
    assert overlap.identical(flat, odd) == [] and len(overlap.identical(flat, flat)) == 2


def test_many_pairs_are_compared_by_their_pixels_only(monkeypatch, clean):
    monkeypatch.setattr(check, "MOST_PAIRS", 14)
    data = DataConfig(root=clean, class_names=tiny.CLASS_NAMES)
    one, other = (check.check_split(sources.read(data, name)) for name in ("train", "test"))
    assert check.shared_images(one, other)[1].endswith("only for the same pixels: too many for shifted views")


def test_size_iou_is_the_iou_of_boxes_with_one_centre():
    got = size_iou(np.float64([[10, 20], [4, 4]]), np.float64([[10, 10], [20, 40]]))
    np.testing.assert_allclose(got, [[0.5, 0.25], [0.16, 16 / 800]])


def test_fit_finds_the_scales_that_the_boxes_were_made_with():
    """The boxes have three scales, are wide or high, and vary a little."""
    rng = np.random.default_rng(0)
    scale, ratio = rng.choice([3.0, 8.0, 20.0], 600), rng.choice([0.5, 1.0, 2.0], 600)
    sizes = np.stack([16 * scale / np.sqrt(ratio), 16 * scale * np.sqrt(ratio)], axis=1)
    sizes *= rng.uniform(0.95, 1.05, sizes.shape)

    def anchors_of(scales):
        return [np.float64([[16 * s / r**0.5, 16 * s * r**0.5] for r in (0.5, 1.0, 2.0)]) for s in scales]

    fitted = fit_scales(sizes, (8.0, 16.0, 32.0), anchors_of)
    np.testing.assert_allclose(fitted, [3, 8, 20], rtol=0.03)
    # What fits already is left.
    assert fit_scales(sizes[:1] * 0 + 128, (8.0,), anchors_of) == (8.0,)
    centres = fit_sizes(sizes, 9)
    assert size_iou(sizes, centres).max(axis=1).mean() > 0.9


@pytest.mark.parametrize("model", [tiny.MODEL, tiny.FPN, ModelConfig()])
def test_suggested_scales_fit_no_worse_than_the_configured(model, clean):
    data = DataConfig(root=clean, class_names=tiny.CLASS_NAMES)
    lines = anchor_lines(sources.read(data, "train"), model)
    configured, fitted, free = (float(re.search(r" ([01]\.\d{3}) ", line)[1]) for line in lines[2:])
    assert configured <= fitted and free == 1.0
    dataset = sources.read(data, "train")
    assert "no box" in anchor_lines(dataset._replace(records=dataset.records[4:]), model)[0]


def test_crowds_may_lie_over_objects(tmp_path):
    box = (3, 4, 23, 28)
    dataset = tiny.dataset(tmp_path, [(tiny.rectangle_image((48, 72), box), [box, box], [1, 1])], crowd=[[False, True]])
    assert check.box_findings(dataset.records[0]) == []
    assert len(check.box_findings(dataset.records[0]._replace(crowd=np.zeros(2, bool)))) == 1


@pytest.fixture(scope="module")
def cells():
    """Returns the splits of the blood cell data set, not decoded."""
    if not BCCD.is_dir():
        pytest.skip(f"{BCCD.name} is not in the folder {BCCD.parents[1].name} beside the repository")
    layout = sources.recognise(BCCD)
    data = layout.data
    assert layout.splits == ("train", "trainval", "val", "test") and data.class_names == ("Platelets", "RBC", "WBC")
    return {name: sources.read(dataclasses.replace(data, faults="skip"), name) for name in ("train", "val", "test")}


def test_known_tiny_and_duplicate_boxes_of_the_cells_are_found(cells):
    """The expected findings are from SOURCE.md of the data set."""
    findings = [finding for dataset in cells.values() for finding in dataset.findings]
    findings += [f for dataset in cells.values() for record in dataset.records for f in check.box_findings(record)]
    assert not any(finding.is_fault for finding in findings)
    small = sorted(re.findall(r"BloodImage_\d+", " ".join(f.where for f in findings if "under two" in f.sentence)))
    assert small == ["BloodImage_00338", "BloodImage_00343"]
    doubled = [finding for finding in findings if finding.sentence == check.NEARLY_SAME_BOX]
    assert len(doubled) == 8 and len(findings) == 10


@pytest.mark.slow
def test_known_shared_views_of_the_cells_are_found(cells):
    """The expected pairs are from extra/overlapping_fields.tsv of the data set."""
    checked = {name: check.check_split(dataset) for name, dataset in cells.items()}
    known = {
        tuple(sorted(line.split("\t")[1:3]))
        for line in (BCCD / "extra/overlapping_fields.tsv").read_text().splitlines()[1:]
        if len({*line.split("\t")[3:5]}) == 2
    }
    found = set()
    for one, other in (("test", "train"), ("test", "val"), ("train", "val")):
        shared, _ = check.shared_images(checked[one], checked[other])
        found |= {tuple(sorted(re.findall(r"BloodImage_\d+", finding.where))) for finding in shared}
    assert len(known) == 15 and known <= found
    # Five more; laid beside each other they show the same cells.
    more = {("00019", "00020"), ("00040", "00041"), ("00225", "00262"), ("00232", "00255"), ("00276", "00277")}
    assert found - known == {tuple(f"BloodImage_{number}" for number in pair) for pair in more}
