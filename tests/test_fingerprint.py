"""Data that changes between two starts is noticed by its contents, not by its place, and stops the run by name."""

import dataclasses
import json
import os
import shutil
import time

import jax.numpy as jnp
import pytest
import tiny

from fasterrcnn_jax.data.fingerprint import Fingerprint
from fasterrcnn_jax.data.records import StoredImage
from fasterrcnn_jax.data.sources import open_split
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.training import checkpoint
from fasterrcnn_jax.training.state import TrainState

STATE = TrainState(
    step=jnp.int32(2),
    params={"w": jnp.zeros(2)},
    averaged=None,
    frozen={},
    running={},
    opt_state={},
    key=jnp.zeros(2, jnp.uint32),
)


def look_at(config, *, read=True):
    """Returns the fingerprint as a start takes it; with `read`, when its thread has ended."""
    data = config.data
    fingerprint = Fingerprint({name: open_split(data, name) for name in (data.train_split, data.test_split)})
    if read:
        fingerprint.read_in_background()
        fingerprint._reader.join()
    return fingerprint


def save(config, text):
    with checkpoint.open_checkpoints(config.run, keep=1) as checkpoints:
        checkpoint.save(checkpoints, state=STATE, config=config, iterator_state={}, measured=None, data=text)


def restore(config):
    with checkpoint.open_checkpoints(config.run, keep=1) as checkpoints:
        return checkpoint.restore(checkpoints, STATE, config=config, data=look_at(config, read=False))


@pytest.fixture
def config(tmp_path):
    tiny.write_voc(tmp_path / "voc", train=4, test=3)
    config = tiny.config(tmp_path)
    save(config, look_at(config).text())
    return config


def in_list(config, change):
    path = config.data.root / "ImageSets/Main/train.txt"
    path.write_text("".join(f"{name}\n" for name in change(path.read_text().split())))


def in_labels(config, name, before, after):
    path = config.data.root / "Annotations" / f"{name}.xml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))


def in_pixels(config, name, *, keeps_size):
    """Changes one byte of a palette, or writes a larger file."""
    path = config.data.root / "JPEGImages" / f"{name}.png"
    content, before = bytearray(path.read_bytes()), path.stat()
    content[-20] ^= 1
    path.write_bytes(content if keeps_size else content + b"more")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (10**9 if keeps_size else 0)))


CHANGES = {
    "an image added": (lambda config: in_list(config, lambda names: [*names, "test0"]), r"added: 1, .* is test0"),
    "an image removed": (lambda config: in_list(config, lambda names: names[1:]), r"removed: 1, .* is train0"),
    "another order": (
        lambda config: in_list(config, lambda names: [*names[:2], names[3], names[2]]),
        r"another place of the list: 2, the first is train3",
    ),
    "a box moved": (
        lambda config: in_labels(config, "train2", "<xmax>", "<xmax>1"),
        r"\(train\): .*boxes, labels or flags: 1, the first is train2",
    ),
    "another class": (
        lambda config: in_labels(config, "train1", "disc", "ring"),
        r"\(train\): .*boxes, labels or flags: 1, the first is train1",
    ),
    "an object made difficult": (
        lambda config: in_labels(config, "train0", "<bndbox>", "<difficult>1</difficult><bndbox>"),
        r"\(train\): .*flags: 1, the first is train0",
    ),
    "labels of the other split": (
        lambda config: in_labels(config, "test1", "ring", "disc"),
        r"\(test\): .*boxes, labels or flags: 1, the first is test1",
    ),
    "pixels of equal size": (
        lambda config: in_pixels(config, "train3", keeps_size=True),
        r"\(train\): image files have other contents: 1, the first is .*JPEGImages/train3\.png",
    ),
    "a larger file of equal time": (
        lambda config: in_pixels(config, "train3", keeps_size=False),
        r"\(train\): image files have other contents: 1, the first is .*JPEGImages/train3\.png",
    ),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_a_change_stops_the_run_in_one_sentence_with_place_and_count(config, change, message):
    assert restore(config)[0].step == 2
    change(config)
    with pytest.raises(InputError, match=rf"checkpoints/2: the data has changed .*{message}") as caught:
        restore(config)
    assert "\n" not in str(caught.value) and "--data.accept_changed" in str(caught.value)


def test_an_accepted_change_is_warned_about_and_is_the_new_fingerprint(config, caplog):
    in_labels(config, "train1", "disc", "ring")
    accepted = dataclasses.replace(config, data=dataclasses.replace(config.data, accept_changed=True))
    assert restore(accepted)[0].step == 2
    (record,) = [record for record in caplog.records if "has changed" in record.getMessage()]
    assert record.levelname == "WARNING" and "train1" in record.getMessage()
    save(dataclasses.replace(accepted, run=config.run / "next"), look_at(accepted).text())
    # The field itself is no other configuration.
    assert restore(dataclasses.replace(config, run=config.run / "next"))[0].step == 2


def test_data_that_is_copied_moved_or_touched_is_equal(config, tmp_path):
    copied = shutil.copytree(config.data.root, tmp_path / "elsewhere" / "copy", copy_function=shutil.copyfile)
    moved = dataclasses.replace(config, data=dataclasses.replace(config.data, root=copied))
    for path in copied.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    assert restore(moved)[0].step == 2
    in_pixels(moved, "train3", keeps_size=True)
    with pytest.raises(InputError, match=rf"first is {copied}/JPEGImages/train3\.png"):
        restore(moved)


def test_a_file_is_read_only_where_its_time_changed(config, monkeypatch):
    read = []
    monkeypatch.setattr("fasterrcnn_jax.data.fingerprint._file_digest", lambda path: read.append(path.name) or "x")
    restore(config)
    assert read == []
    os.utime(config.data.root / "JPEGImages" / "test1.png", ns=(1, 1))
    with pytest.raises(InputError, match="other contents"):
        restore(config)
    assert read == ["test1.png"]


def test_digests_of_unchanged_files_are_taken_over(config):
    first = look_at(config).text()
    later = look_at(config, read=False)
    assert later.changes(first) == [] and later.text() == first


def test_a_file_that_changed_before_it_was_read_is_not_taken_as_equal(tmp_path):
    tiny.write_voc(tmp_path / "voc", train=2, test=1)
    config = tiny.config(tmp_path)
    save(config, look_at(config, read=False).text())
    assert restore(config)[0].step == 2
    os.utime(config.data.root / "JPEGImages" / "train1.png", ns=(1, 1))
    with pytest.raises(InputError, match="written again before the checkpoint knew their contents: 1, .*train1"):
        restore(config)


def test_a_file_of_many_images_is_compared_once(config):
    """As in a data set of TFDS, where a place is SHARD[POSITION]."""
    shard = config.data.root / "a[b].array_record-00000-of-00001"
    shard.write_bytes(b"first")
    dataset = open_split(config.data, "train")
    images = [StoredImage(f"{shard}[{position}]", bytes) for position in range(len(dataset.records))]
    records = tuple(record._replace(path=image) for record, image in zip(dataset.records, images, strict=True))
    splits = {"train": dataset._replace(records=records)}
    stored = Fingerprint(splits).text()
    assert Fingerprint(splits).changes(stored) == []
    shard.write_bytes(b"another")
    (change,) = Fingerprint(splits).changes(stored)
    assert change.endswith(f"image files have other contents: 1, the first is {shard}")


def test_a_checkpoint_without_a_fingerprint_continues_and_says_so(tmp_path, caplog):
    tiny.write_voc(tmp_path / "voc", train=2, test=1)
    config = tiny.config(tmp_path)
    save(config, None)
    with caplog.at_level("INFO"):
        assert restore(config)[0].step == 2
    assert "checkpoints/2 has no fingerprint of the data" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "3", '{"train": 5}', '{"train": {"a": 7}}', '{"train": {"a": ["x", "y"]}}', "[" * 100_000]
)
def test_a_text_that_is_no_fingerprint_raises_our_error(config, text):
    with pytest.raises(InputError, match="the fingerprint of the data is damaged"):
        look_at(config, read=False).changes(text)


@pytest.mark.slow
def test_fifty_thousand_images_take_five_seconds_at_most(tmp_path, capsys):
    """At the start, at the next start, and at each checkpoint; printed with -s."""
    tiny.write_voc(tmp_path / "voc", train=1, test=1)
    (dataset, count) = open_split(tiny.config(tmp_path).data, "train"), 50_000
    content, (record,) = dataset.records[0].path.read_bytes(), dataset.records
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(count):
        (folder / f"{index:06d}.png").write_bytes(content + str(index).encode())
    records = tuple(record._replace(id=f"{i:06d}", path=folder / f"{i:06d}.png") for i in range(count))
    many, seconds = dataset._replace(records=records), {}

    def timed(what, function):
        before = time.perf_counter()
        result = function()
        seconds[what] = time.perf_counter() - before
        return result

    first = timed("first start", lambda: Fingerprint({"train": many}))
    timed("contents, in the background", lambda: (first.read_in_background(), first._reader.join()))
    text = timed("text for a checkpoint", first.text)
    assert timed("next start", lambda: Fingerprint({"train": many}).changes(text)) == []
    for record in records:
        os.utime(record.path, ns=(1, 1))
    assert timed("next start, all files read again", lambda: Fingerprint({"train": many}).changes(text)) == []
    with capsys.disabled():
        print(f"\n{count} images, {len(text) / 1e6:.1f} MB", {what: round(value, 2) for what, value in seconds.items()})
    assert len(json.loads(text)["train"]) == count
    # The annotations are checked while the tests run, so this is slower than a start of train.py.
    assert max(seconds["first start"], seconds["next start"], seconds["text for a checkpoint"]) < 5.0
