"""A disk that is full: the run ends in seconds with one line that names the file. A TensorBoard error alone does not
stop the run."""

import errno
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from fasterrcnn_jax.data.proposal_files import write_proposals
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.files import write_coco_json
from fasterrcnn_jax.inference.drawing import save_image
from fasterrcnn_jax.structures import Batch, GroundTruth
from fasterrcnn_jax.training import replay, run_folder, tensorboard
from fasterrcnn_jax.training.progress import MetricsWriter

ROOT = Path(__file__).parents[1]
FULL = OSError(errno.ENOSPC, "No space left on device")


class FullDisk:
    """A file, or a writer of events, that takes nothing."""

    def write(self, text):
        raise FULL

    def write_event(self, event):
        raise FULL

    flush = close = lambda self: None


def test_a_run_goes_on_without_tensorboard_and_says_so_once(tmp_path, caplog):
    with MetricsWriter(tmp_path, after=0) as metrics, caplog.at_level(logging.WARNING):
        metrics.write(1, {"loss": 1.0})
        metrics._board._writer.close()
        metrics._board._writer = FullDisk()
        for step in range(2, 50):  # more than any queue holds
            metrics.write(step, {"loss": 1.0})
        metrics.write_image(49, np.zeros((4, 4, 3), np.uint8))
    (record,) = caplog.records
    assert "TensorBoard events cannot be written (No space left on device)" in record.getMessage()
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 50)) and (tmp_path / "images" / "000049.png").is_file()


def test_a_run_begins_without_tensorboard_where_its_file_cannot_be_made(tmp_path, monkeypatch, caplog):
    def refuse(prefix):
        raise FULL

    monkeypatch.setattr(tensorboard, "EventsWriter", refuse)
    with MetricsWriter(tmp_path, after=0) as metrics, caplog.at_level(logging.WARNING):
        metrics.write(1, {"loss": 1.0})
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_metrics_that_cannot_be_written_name_their_file(tmp_path):
    with MetricsWriter(tmp_path, after=0) as metrics:
        metrics._lines.close()
        metrics._lines = FullDisk()
        with pytest.raises(InputError, match=r"metrics\.jsonl cannot be written: No space left on device"):
            metrics.write(1, {"loss": 1.0})


def test_events_are_what_tensorboard_reads(tmp_path):
    """Read back by the record format: length, checksum, event."""
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(tmp_path, after=4) as metrics:
        metrics.write(5, {"loss": 0.25, "undefined": None})
        metrics.write_image(5, np.zeros((4, 6, 3), np.uint8), split="test")
    (path,) = tmp_path.glob("events.out.tfevents.*")
    content, events = path.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert events[1].step == 5 and events[1].session_log.status == 1
    values = [(event.step, value.tag) for event in events for value in event.summary.value]
    assert values == [(5, "loss"), (5, "images/test")]
    assert events[2].summary.value[0].simple_value == 0.25 and events[3].summary.value[0].image.width == 6


def batch_of_zeros():
    boxes = np.zeros((1, 2, 4), np.float32)
    truth = GroundTruth(boxes, np.zeros((1, 2), np.int32), np.zeros((1, 2), bool))
    pair = np.ones((1, 2), np.float32)
    return Batch(np.zeros((1, 8, 8, 3), np.float32), pair, pair, np.zeros(1, np.int32), np.ones(1, bool), truth)


WRITERS = {
    "config": lambda folder: run_folder.write_config(tiny.config(folder), folder),
    "failed batch": lambda folder: replay.write_batch(folder, 3, batch_of_zeros(), ["a"]),
    "image": lambda folder: save_image(folder / "a.png", np.zeros((4, 4, 3), np.uint8)),
    "proposals": lambda folder: write_proposals(folder / "p.safetensors", {}, made_by="w"),
    "coco": lambda folder: write_coco_json(folder / "d.json", [], Dataset("empty", ("a",), (), (), (1,))),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_names_the_file_and_leaves_nothing_behind(tmp_path, monkeypatch, kind):
    def full(path, content):
        path.open("wb").close()  # the name fits, the content does not
        raise FULL

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=rf"{tmp_path}/.* cannot be written: No space left on device"):
        WRITERS[kind](tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 700 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_on_a_full_disk_ends_in_seconds_with_one_line(small_disk, tmp_path):
    tiny.write_voc(tmp_path / "voc", train=4, test=2)
    config = tiny.config(tmp_path, steps=400, checkpoint_every=4)
    path = tiny.write_config(tmp_path / "config.py", config)
    (tmp_path / "cache").mkdir()
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, ROOT / "train.py", "--config", path, "--run", small_disk / "run"]
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    # The error line, then the end: the process must not stay.
    lines, said_at = [], None
    with process:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("error: ") or "\nerror: " in line:
                said_at = time.monotonic()
        process.stdout.read()
        status = process.wait(timeout=60)
    assert status == 2, "".join(lines)[-2000:]
    assert said_at is not None and time.monotonic() - said_at < 10.0
    assert lines[-1].startswith("error: ") and f"{small_disk}/run/" in lines[-1], lines[-5:]
