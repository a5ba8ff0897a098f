"""A named pipe in place of a file is refused by every reader: opening it would wait for ever."""

import os

import pytest
import tiny

import fasterrcnn_jax
from fasterrcnn_jax.data import coco, images, proposal_files, voc
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.training import replay

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


READERS = {
    "weights": fasterrcnn_jax.load,
    "coco": lambda path: coco.read_coco(path, path.parent, CLASSES),
    "image": images.read_image,
    "proposals": proposal_files.read_proposals,
    "failed batch": replay.read_batch,
    "list of images": in_voc("ImageSets/Main/train.txt"),
    "annotation": in_voc("Annotations/train1.xml"),
    "image of a data set": in_voc("JPEGImages/train1.png"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("kind", READERS)
def test_a_named_pipe_is_refused(tmp_path, kind):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    with pytest.raises(InputError, match="must be a regular file, but is a named pipe|no such list"):
        READERS[kind](path)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="this system has no /dev/zero")
def test_a_device_is_refused(tmp_path):
    with pytest.raises(InputError, match="/dev/zero: must be a regular file, but is a device"):
        fasterrcnn_jax.load("/dev/zero")
