"""Fast R-CNN: a box head trained and evaluated on the user's own proposals, without an RPN."""

import contextlib
import dataclasses
import io
import json
import logging
import re
from pathlib import Path

import fasterrcnn_jax.scripts.evaluate as evaluate_script
import fasterrcnn_jax.scripts.train as train_script
import jax
import numpy as np
import pytest
import safetensors.numpy
import scipy.io
import tiny
from PIL import Image

import fasterrcnn_jax
import fasterrcnn_jax.scripts.predict as predict_script
from fasterrcnn_jax import zoo
from fasterrcnn_jax.config import DataConfig
from fasterrcnn_jax.config.rules import first_difference, unread_fields
from fasterrcnn_jax.data.fingerprint import Fingerprint
from fasterrcnn_jax.data.proposal_files import best_of_each, own_proposals, read_proposals, write_proposals
from fasterrcnn_jax.data.records import ImageProposals
from fasterrcnn_jax.data.sources import open_split
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import create_detector
from fasterrcnn_jax.models.faster_rcnn import box_training_losses
from fasterrcnn_jax.training import checkpoint
from fasterrcnn_jax.training.stages import stages_of

LIMIT = dict(field="model.test_proposals.post_nms_top_n", limit=4)
CONFIG = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_stages, tiny
config = tiny.config(Path({folder!r}), steps=4)
data = dataclasses.replace(config.data, proposals=Path({folder!r}) / "{{split}}.safetensors")
train = dataclasses.replace(config.train, scheme="fast_rcnn")
config = dataclasses.replace(config, model=test_stages.MODEL, data=data, train=train)
"""


def config_of(folder=Path("somewhere"), proposals=Path("{split}.safetensors"), **train):
    config = tiny.config(folder)
    data = dataclasses.replace(config.data, proposals=proposals)
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, scheme="fast_rcnn", **train))


def test_fast_rcnn_is_one_stage_without_an_rpn():
    config = config_of()
    (stage,) = stages_of(config)
    assert (stage.run, stage.train, stage.losses) == (config.run, config.train, box_training_losses)
    assert stage.parts == ("backbone", "neck", "box_head") and stage.evaluated == "detections in given proposals"
    assert stage.own_proposals == Path("{split}.safetensors") and stage.metric == "AP50"


def test_fast_rcnn_needs_a_file_and_no_other_scheme_reads_one():
    with pytest.raises(ValueError, match="train.scheme fast_rcnn needs data.proposals"):
        config_of(proposals=None)
    assert unread_fields(config_of()) == []
    joint = dataclasses.replace(config_of(), train=tiny.config(Path("x")).train)
    assert [line for line in unread_fields(joint) if line.startswith("data.proposals = ")] == [
        f"data.proposals = {Path('{split}.safetensors')!r} changes nothing with joint"
    ]
    assert first_difference(config_of(), config_of(proposals=Path("elsewhere"))) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with voc/, train.safetensors and test.safetensors: objects moved a little, and noise."""
    folder = tmp_path_factory.mktemp("fast_rcnn")
    tiny.write_voc(folder / "voc", train=6, test=3)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        found = {}
        for record in open_split(tiny.config(folder).data, split).records:
            height, width = record.image_hw
            near = np.repeat(record.boxes, 3, 0) + generator.uniform(-3, 3, (3 * len(record.boxes), 4))
            corner = generator.uniform(0, 20, (8, 2))
            boxes = np.concatenate([near, np.concatenate([corner, corner + generator.uniform(9, 25, (8, 2))], 1)])
            boxes = np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)
            found[record.id] = ImageProposals(boxes, generator.random(len(boxes), np.float32))
        write_proposals(folder / f"{split}.safetensors", found, made_by="a test")
    (folder / "mine.py").write_text(CONFIG.format(tests=str(Path(__file__).parent), folder=str(folder)))
    return folder


def dataset_of(folder, split="test"):
    return open_split(tiny.config(folder).data, split)


def test_own_proposals_come_best_first_and_clipped_by_a_pixel_at_most(folder, tmp_path, caplog):
    dataset = dataset_of(folder)
    first = dataset.records[0]
    height, width = first.image_hw
    boxes = np.float32([[5, 5, 9, 9], [-1, 0, width + 1, height], [1, 1, 2, 2], [2, 2, 3, 3], [3, 3, 4, 4]])
    others = {record.id: ImageProposals(boxes[:1], np.float32([1])) for record in dataset.records[1:]}
    stored = {first.id: ImageProposals(boxes, np.float32([0.1, 0.9, 0.5, 0.5, 0.2])), **others, "more": others["test1"]}
    write_proposals(tmp_path / "any.safetensors", stored, made_by="a test")
    with caplog.at_level(logging.WARNING):
        found = own_proposals(tmp_path / "any.safetensors", "test", dataset, **LIMIT)
    assert list(found) == [record.id for record in dataset.records]
    np.testing.assert_array_equal(found[first.id].scores, np.float32([0.9, 0.5, 0.5, 0.2, 0.1]))
    assert found[first.id].boxes[:3].tolist() == [[0, 0, width, height], [1, 1, 2, 2], [2, 2, 3, 3]]
    assert best_of_each(found, 2)[first.id].boxes.tolist() == [[0, 0, width, height], [1, 1, 2, 2]]
    (warning,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert warning.endswith(
        "1 images have more proposals than model.test_proposals.post_nms_top_n = 4; the best of each image are used"
    )


def test_joined_splits_have_a_file_each_and_parts_of_a_split_share_one(folder):
    both = dataset_of(folder, "train+test")
    found = own_proposals(folder / "{split}.safetensors", "train+test", both, field="x", limit=99)
    assert list(found) == [record.id for record in both.records]
    only = own_proposals(folder / "train.safetensors", "val", dataset_of(folder, "train"), field="x", limit=99)
    np.testing.assert_array_equal(only["train0"].boxes, found["train0"].boxes)


def test_files_of_joined_splits_may_number_their_images_alike(tmp_path):
    """Two COCO splits that count from 1: the joined data set calls an image SPLIT/ID."""
    (tmp_path / "annotations").mkdir()
    for split, colour in (("a", 50), ("b", 200)):
        (tmp_path / split).mkdir()
        images = [{"id": n, "file_name": f"{n}.png", "height": 40, "width": 60} for n in (1, 2)]
        for image in images:
            Image.new("RGB", (60, 40), (colour, image["id"], 0)).save(tmp_path / split / image["file_name"])
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [3, 4, 20, 24], "area": 480, "iscrowd": 0}
        categories = [{"id": n, "name": name} for n, name in enumerate(tiny.CLASS_NAMES, 1)]
        content = {"images": images, "annotations": [box], "categories": categories}
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
        found = {
            str(n): ImageProposals(np.float32([[0, 0, n, ord(split) - 90]]), np.ones(1, np.float32)) for n in (1, 2)
        }
        write_proposals(tmp_path / f"{split}.safetensors", found, made_by="a test")
    data = DataConfig(root=tmp_path, layout="coco", class_names=tiny.CLASS_NAMES)
    found = own_proposals(tmp_path / "{split}.safetensors", "a+b", open_split(data, "a+b"), **LIMIT)
    assert {name: of_image.boxes[0].tolist()[2:] for name, of_image in found.items()} == {
        "a/1": [1, 7],
        "a/2": [2, 7],
        "b/1": [1, 8],
        "b/2": [2, 8],
    }


def spoiled(change):
    """A fault: the boxes of the first image are others."""

    def spoil(stored):
        name = next(iter(stored))
        boxes = stored[name].boxes.copy()
        change(boxes)
        return stored | {name: stored[name]._replace(boxes=boxes)}

    return spoil


def swap_axes(boxes):
    boxes[:] = boxes[:, [0, 1, 2, 3]] + np.float32([0, 0, 500, 0])


def swap_corners(boxes):
    boxes[2] = boxes[2, [2, 3, 0, 1]]


FAULTS = {
    "outside": (spoiled(swap_axes), r"test.safetensors, image 'test0', boxes\[0\]: must be \(x1, y1, x2, y2\)"),
    "corners": (
        spoiled(swap_corners),
        r"boxes\[2\]: must be .* in pixels of the image of 72 x 48 \(width x height\), got",
    ),
    "empty": (spoiled(lambda boxes: boxes.__setitem__(1, 5.0)), r"boxes\[1\]: must be .* got \[5.0, 5.0, 5.0, 5.0\]"),
    "an image too few": (
        lambda stored: dict(list(stored.items())[:-1]),
        "no proposals for 1 images, the first is test2",
    ),
    "nothing": (
        lambda stored: {name: ImageProposals(of.boxes[:0], of.scores[:0]) for name, of in stored.items()},
        "has no boxes for any of the 3 images",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_its_images_is_refused_by_file_image_and_box(folder, tmp_path, fault):
    spoil, said = FAULTS[fault]
    stored, _ = read_proposals(folder / "test.safetensors")
    write_proposals(tmp_path / "test.safetensors", spoil(stored), made_by="a test")
    with pytest.raises(InputError, match=said) as caught:
        own_proposals(tmp_path / "{split}.safetensors", "test", dataset_of(folder), **LIMIT)
    assert "\n" not in str(caught.value) and ". " not in str(caught.value)


def called(main, *argv):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in argv])
        except SystemExit as caught:
            status = caught.code
    return status or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def trained(folder):
    with tiny.restored_logging(), tiny.quick_compilation(), jax.numpy_dtype_promotion("standard"):
        status, out, err = called(train_script.main, "--config", folder / "mine.py")
        assert status == 0, err
        yield folder / "run", out, err


def test_a_run_trains_backbone_and_box_head_and_leaves_the_rpn(trained):
    run, out, err = trained
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "gradient_norm" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line["box_class"] > 0 and line["rpn_objectness"] == 0 for line in steps)
    assert sum(line["box_foreground"] for line in steps) > 0
    model = fasterrcnn_jax.load(run)
    first = create_detector(model.config, model.class_names, seed=0)
    for one, other in zip(jax.tree.leaves(model.rpn_head), jax.tree.leaves(first.rpn_head), strict=True):
        np.testing.assert_array_equal(one, other)
    pairs = zip(jax.tree.leaves(model.box_head), jax.tree.leaves(first.box_head), strict=True)
    assert all(np.any(np.asarray(one) != np.asarray(other)) for one, other in pairs)


def test_evaluation_detects_in_the_proposals_of_the_run(trained, folder, tmp_path):
    run, out, err = trained
    (line,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "test/AP50" in line]
    status, again, err = called(evaluate_script.main, run, "--out", tmp_path / "own")
    assert status == 0 and f"AP50 {line['test/AP50']:.2f}" in again, err
    # Other proposals give other detections: each object itself.
    dataset = dataset_of(folder)
    objects = {
        record.id: ImageProposals(record.boxes, np.ones(len(record.boxes), np.float32)) for record in dataset.records
    }
    write_proposals(tmp_path / "objects.safetensors", objects, made_by="a test")
    status, _, err = called(
        evaluate_script.main, run, "--given", tmp_path / "objects.safetensors", "--out", tmp_path / "given"
    )
    assert status == 0, err
    counts = [len(json.loads((tmp_path / name / "detections.json").read_text())) for name in ("own", "given")]
    assert counts[0] > counts[1] > 0
    assert counts[1] <= 2 * sum(len(record.boxes) for record in dataset.records)


@pytest.mark.parametrize(
    "argv, said",
    [
        (("--proposals",), "is a box head trained alone, without an RPN; leave out --proposals"),
        (("--given", "none.safetensors"), "none.safetensors: the proposals file is missing, damaged"),
    ],
)
def test_a_wrong_evaluation_is_refused_in_one_line(trained, argv, said):
    status, _, err = called(evaluate_script.main, trained[0], *argv)
    assert status == 2 and said in err and "Traceback" not in err


def test_detection_without_proposals_says_that_there_is_no_rpn(trained, folder, tmp_path, monkeypatch):
    status, _, err = called(
        predict_script.main, folder / "voc/JPEGImages", "--ckpt", trained[0], "--out", tmp_path / "found"
    )
    assert status == 2 and "is a box head trained alone, without an RPN" in err
    said = []
    monkeypatch.setattr(zoo.logger, "warning", lambda text, *values: said.append(text % values))
    fasterrcnn_jax.load(trained[0])
    assert said == [f"{trained[0]}: train.scheme was fast_rcnn, so the RPN was not trained in this run"]


def test_other_proposals_are_noticed_when_a_run_continues(folder):
    """By content: a copied file is the same, a changed one is not."""
    splits = {"test": dataset_of(folder)}
    stored, _ = read_proposals(folder / "test.safetensors")
    before = Fingerprint(splits, {"test": stored}).text()
    assert Fingerprint(splits, {"test": dict(stored)}).changes(before) == []
    moved = stored | {"test0": stored["test0"]._replace(scores=stored["test0"].scores / 2)}
    (change,) = Fingerprint(splits, {"test": moved}).changes(before)
    assert change.startswith("proposals of test: ") and change.endswith(": 1, the first is test0")


def test_a_run_with_other_proposals_is_not_continued(trained, folder):
    path = folder / "train.safetensors"
    kept, (stored, _) = path.read_bytes(), read_proposals(path)
    name = next(iter(stored))
    write_proposals(path, stored | {name: stored[name]._replace(scores=stored[name].scores / 2)}, made_by="a test")
    try:
        status, _, err = called(train_script.main, "--config", folder / "mine.py")
    finally:
        path.write_bytes(kept)
    assert status == 2 and "proposals of train: " in err and "data.accept_changed" in err
    assert checkpoint.load_run_config(trained[0]).data.proposals == folder / "{split}.safetensors"


def test_the_documented_conversion_of_selective_search(folder, tmp_path, monkeypatch):
    """The lines of docs/data.md, on a file in the form of the VOC release: (ymin, xmin, ymax, xmax), counted from 1."""
    dataset = dataset_of(folder)
    boxes = np.empty((1, len(dataset.records)), object)
    for index, record in enumerate(dataset.records):
        height, width = record.image_hw
        boxes[0, index] = np.float64([[1, 1, height, width], [5, 3, 20, 30]])
    scipy.io.savemat(tmp_path / "voc_2007_test.mat", {"boxes": boxes}, do_compression=True)
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*loadmat[^`]*)```", text)
    code = code.replace("data/VOCdevkit/VOC2007", str(folder / "voc"))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    (written,) = tmp_path.glob("*.safetensors")
    assert written.name == "test.safetensors"
    found = own_proposals(tmp_path / "{split}.safetensors", "test", dataset, **LIMIT)
    for record in dataset.records:
        height, width = record.image_hw
        assert found[record.id].boxes.tolist() == [[0, 0, width, height], [2, 4, 30, 20]]
    assert safetensors.numpy.load_file(written)["counts"].tolist() == [2, 2, 2]
