"""A disk that is full: the run ends in seconds with one line that names the file. A TensorBoard error alone does not
stop the run."""

import contextlib
import errno
import io
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

from fasterrcnn_jax import atomic_write
from fasterrcnn_jax.data.proposal_files import write_proposals
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.files import write_coco_json, write_voc_files
from fasterrcnn_jax.inference.drawing import save_image
from fasterrcnn_jax.scripts import weights as weights_script
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


EMPTY = Dataset("empty", ("a",), (), (), (1,))
WRITERS = {
    "config": lambda folder: run_folder.write_config(tiny.config(folder), folder),
    "failed batch": lambda folder: replay.write_batch(folder, 3, batch_of_zeros(), ["a"]),
    "image": lambda folder: save_image(folder / "a.png", np.zeros((4, 4, 3), np.uint8)),
    "proposals": lambda folder: write_proposals(folder / "p.safetensors", {}, made_by="w"),
    "coco": lambda folder: write_coco_json(folder / "d.json", [], EMPTY),
    "voc": lambda folder: write_voc_files(folder, [], EMPTY, split="test"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_names_the_file_and_leaves_nothing_behind(tmp_path, monkeypatch, kind):
    class FullFile(io.FileIO):
        def write(self, content):  # the name fits, the content does not
            raise FULL

    monkeypatch.setattr(atomic_write, "open", FullFile, raising=False)
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


def fill(folder):
    with contextlib.suppress(OSError), (folder / "rest").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_weights_that_do_not_fit_are_named_and_the_file_before_them_stays(small_disk, small_run, capsys):
    path = small_disk / "w.safetensors"
    path.write_text("before")
    fill(small_disk)
    with tiny.restored_logging(), pytest.raises(SystemExit) as ended:
        weights_script.main(["convert", str(small_run), str(path)])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {path} cannot be written") and "No space left" in last
    assert path.read_text() == "before" and sorted(os.listdir(small_disk)) == ["rest", "w.safetensors"]


def watched(tmp_path, command, *, before=()):
    """Runs Python with a command; returns (exit status, stdout, lines of stderr, seconds from the error to the end).

    Args:
      before: a program that starts Python, with its arguments.
    """
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    process = subprocess.Popen(
        [*before, sys.executable, *map(str, command)],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    lines, said_at = [], None
    with process:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("error: ") or "\nerror: " in line:
                said_at = time.monotonic()
        out = process.stdout.read()
        status = process.wait(timeout=60)
    assert said_at is not None, "".join(lines)[-2000:]
    return status, out, lines, time.monotonic() - said_at


def assert_ended(status, lines, seconds, path):
    """The error line is the last one and names the file, and the process does not stay."""
    assert status == 2, "".join(lines)[-2000:]
    assert lines[-1].startswith("error: ") and str(path) in lines[-1], lines[-5:]
    assert seconds < 10.0


@pytest.fixture
def config_file(tmp_path):
    tiny.write_voc(tmp_path / "voc", train=4, test=2)
    return tiny.write_config(tmp_path / "config.py", tiny.config(tmp_path, steps=400, checkpoint_every=4))


def test_a_run_on_a_full_disk_ends_in_seconds_with_one_line(small_disk, tmp_path, config_file):
    status, _, lines, seconds = watched(tmp_path, ["train.py", "--config", config_file, "--run", small_disk / "run"])
    assert_ended(status, lines, seconds, f"{small_disk}/run/")


@pytest.mark.slow
def test_a_run_whose_checkpoint_does_not_fit_ends_in_seconds_with_one_line(tmp_path, config_file):
    """Needs no mount: files are limited to 100 kB."""
    limited = ("bash", "-c", 'ulimit -f 100; exec "$@"', "bash")  # blocks of 1024 bytes
    status, _, lines, seconds = watched(tmp_path, ["train.py", "--config", config_file], before=limited)
    assert_ended(status, lines, seconds, f"{tmp_path}/run/checkpoints/4")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["evaluate", "predict"])
def test_results_on_a_full_disk_end_in_seconds_with_one_line(small_disk, tmp_path, small_run, script):
    tiny.write_voc(tmp_path / "voc", train=1, test=2)
    fill(small_disk)
    command = {
        "evaluate": ["evaluate.py", "--ckpt", small_run, "--root", tmp_path / "voc"],
        "predict": ["-m", "fasterrcnn_jax", "predict", "--ckpt", small_run, "--images", tmp_path / "voc/JPEGImages"],
    }
    status, out, lines, seconds = watched(tmp_path, [*command[script], "--out", small_disk / "out"])
    assert_ended(status, lines, seconds, small_disk / "out")
    assert script == "predict" or "AP50" in out  # the table is printed before the files
