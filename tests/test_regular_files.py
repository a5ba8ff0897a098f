"""A named pipe in place of a file is refused by every reader: opening it would wait for ever."""

import os
import shutil
import signal

import exports
import pytest
import tiny

import fasterrcnn_jax
from fasterrcnn_jax.data import coco, csv_table, images, labelme, proposal_files, voc, yolo
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.training import replay
from fasterrcnn_jax.training.progress import MetricsWriter

CLASSES = tiny.CLASS_NAMES


def in_voc(name):
    """Puts the pipe in place of one file of a VOC folder, and reads the folder to its pixels."""

    def read(path):
        root = path.parent / "voc"
        tiny.write_voc(root, train=2, test=1)
        target = root / name
        target.unlink()
        path.rename(target)
        for record in voc.read_voc(root, "train", CLASSES).records:
            images.record_pixels(record)

    return read


def in_export(write, read_folder, name):
    """Puts the pipe in place of one file that `write` makes, and reads the split "train" of the folder."""

    def read(path):
        root = path.parent / "set"
        write(root)
        (root / name).unlink()
        path.rename(root / name)
        read_folder(root, "train", exports.CLASSES)

    return read


def in_run(name):
    """Puts the pipe in place of one file of a run folder, and loads the run or opens its log."""

    def read(path, small_run):
        run = shutil.copytree(small_run, path.parent / "run")
        target = run / name
        target.unlink()
        path.rename(target)
        if name == "metrics.jsonl":
            MetricsWriter(run, after=2)
        else:
            fasterrcnn_jax.load(run)

    return read


@pytest.fixture(autouse=True)
def alarm():
    """A reader that waits fails after 20 seconds and does not stop the suite."""

    def ring(*_):
        raise TimeoutError("the reader waits for the pipe")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoints/2/_CHECKPOINT_METADATA", "checkpoints/2/meta/_strings.json"]
)
def test_a_named_pipe_in_a_run_folder_is_refused(tmp_path, small_run, name):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(InputError, match="must be a regular file, but is a named pipe"):
        in_run(name)(path, small_run)


READERS = {
    "weights": fasterrcnn_jax.load,
    "coco": lambda path: coco.read_coco(path, path.parent, CLASSES),
    "image": images.read_image,
    "proposals": proposal_files.read_proposals,
    "failed batch": replay.read_batch,
    "list of images": in_voc("ImageSets/Main/train.txt"),
    "annotation": in_voc("Annotations/train1.xml"),
    "image of a data set": in_voc("JPEGImages/train1.png"),
    "YOLO description": in_export(exports.write_yolo, yolo.read_yolo, "data.yaml"),
    "YOLO labels": in_export(exports.write_yolo, yolo.read_yolo, "labels/train/a.txt"),
    "LabelMe": in_export(exports.write_labelme, lambda root, *_: labelme.recognise(root), "a.json"),
    "csv": in_export(exports.write_csv, csv_table.read_csv, "train_labels.csv"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("kind", READERS)
def test_a_named_pipe_is_refused(tmp_path, kind):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    with pytest.raises(InputError, match="must be a regular file, but is a named pipe|no (such list|table of boxes)"):
        READERS[kind](path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="this system has no /dev/zero")
def test_a_device_is_refused(tmp_path):
    with pytest.raises(InputError, match="/dev/zero: must be a regular file, but is a device"):
        fasterrcnn_jax.load("/dev/zero")
