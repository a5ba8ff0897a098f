"""A run that is killed at any moment and started again ends with the same bits as an undisturbed run."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from launcher import Launcher
from orbax.checkpoint import v1 as ocp

from fasterrcnn_jax.data.proposal_files import read_proposals
from fasterrcnn_jax.training import run_folder
from fasterrcnn_jax.training.preemption import EXIT_STATUS

STEPS = 12
CONFIG = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import tiny
config = tiny.config(Path({folder!r}), steps={steps}, checkpoint_every=2, evaluate_every=2, keep_checkpoints=2)
image = dataclasses.replace(tiny.IMAGE, canvases=((96, 96),))
data = dataclasses.replace(config.data, flip="random")
config = dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, image=image))
"""
# Logged durations, which may differ between two runs of the same steps.
TIMES = {"time", "images_per_second", "data_wait", "compilations", "compilation_seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny.write_voc(folder / "voc", train=9, test=3)
    text = CONFIG.format(tests=str(Path(__file__).parent), folder=str(folder), steps=STEPS)
    (folder / "mine.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    with Launcher(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("cache")),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    ) as launcher:
        yield launcher


@pytest.fixture(scope="module")
def whole(launcher, folder):
    """Returns (run folder, digests) of the undisturbed run."""
    run = folder / "whole"
    pid = start(launcher, folder, run)
    assert launcher.wait(pid) == 0, log_of(run).read_text()
    return run, digests(run)


def log_of(run):
    return run.with_name(f"{run.name}.log")


def start(launcher, folder, run, *argv, **options):
    return launcher.start(["--config", folder / "mine.py", "--run", run, *argv], log=log_of(run), **options)


def finish(launcher, folder, run, **options):
    pid = start(launcher, folder, run, **options)
    assert launcher.wait(pid) == 0, log_of(run).read_text()


def refused(launcher, folder, run, message, *, quiet=True, **options):
    """Checks that an error is one line in the log, with exit status 2 and, if `quiet`, without any traceback."""
    log_of(run).unlink(missing_ok=True)
    status = launcher.wait(start(launcher, folder, run, **options))
    text = log_of(run).read_text()
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert status == 2 and not (quiet and "Traceback" in text) and len(lines) == 1, text
    assert text.rstrip().splitlines()[-1] == lines[0]
    assert re.search(message, lines[0]), lines[0]


def steps_in(run):
    folder = run / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def lines_in(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def numbers_in(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same_end(run, whole):
    assert numbers_in(run) == numbers_in(whole[0])
    assert digests(run) == whole[1]


def is_writing(run):
    folder = run / "checkpoints"
    return folder.is_dir() and any("tmp" in path.name for path in folder.iterdir())


def digests(run):
    """Returns SHA-256 of the last checkpoint, of the metrics, and of the last image."""
    metrics = hashlib.sha256(json.dumps(numbers_in(run)).encode())
    image = hashlib.sha256((run / "images" / f"{STEPS:06d}.png").read_bytes())
    return tuple(digest.hexdigest()[:16] for digest in (digest_of(run / "checkpoints" / str(STEPS)), metrics, image))


def digest_of(checkpoint):
    arrays = hashlib.sha256()
    found = ocp.load_checkpointables(checkpoint, {"model": None, "train": None, "meta": None})
    for part in ("model", "train"):
        for path, value in sorted(found[part].items()):
            arrays.update(f"{path} {value.dtype} {value.shape}".encode() + np.asarray(value).tobytes())
    arrays.update(found["meta"]["iterator"].encode())
    return arrays


def stop(launcher, pid, moment, seconds, number):
    """Waits until moment() is true and `seconds` longer, sends a signal, and returns the exit status."""
    deadline = time.monotonic() + 120
    while not moment() and launcher.status(pid) is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(seconds)
    if launcher.status(pid) is None:
        os.kill(pid, number)
    return launcher.wait(pid)


def moment_of(kind, run, generator):
    """Returns (condition, seconds to wait after it) for a kill of this kind."""
    if kind == "at the start":
        return (lambda: True), generator.uniform(0.0, 2.0)
    if kind == "while a checkpoint is written":
        return (lambda: is_writing(run)), generator.uniform(0.0, 0.03)
    before, further = lines_in(run), generator.randint(1, 4)
    return (lambda: lines_in(run) >= before + further), generator.uniform(0.0, 0.03)


KINDS = ("at the start", "between any steps", "while a checkpoint is written", "asked to stop")


def killed_and_started_again(launcher, folder, run, kinds, *, seed, threads=2):
    """Stops a run once per kind, one after the other, then lets it finish; returns one row per stop."""
    generator, rows = random.Random(seed), []
    for kind in kinds:
        pid = start(launcher, folder, run, threads=threads)
        moment, seconds = moment_of(kind, run, generator)
        number, status = (signal.SIGTERM, 75) if kind == "asked to stop" else (signal.SIGKILL, -9)
        ended = stop(launcher, pid, moment, seconds, number)
        half = [path.name for path in (run / "checkpoints").glob("*tmp*")]
        rows.append((kind, ended, lines_in(run), steps_in(run), half))
        if ended == 0:
            break
        assert ended == status, log_of(run).read_text()
    finish(launcher, folder, run, threads=threads)
    return rows


def test_a_run_that_is_killed_and_stopped_ends_with_the_same_bits(launcher, folder, whole):
    """The run is stopped after some step, and killed while it writes; also with more threads."""
    run = folder / "killed"
    kinds = ("asked to stop", "while a checkpoint is written")
    rows = killed_and_started_again(launcher, folder, run, kinds, seed=1, threads=3)
    assert [row[1] for row in rows] == [75, -9], rows
    said = re.search(r"asked to stop: saved step (\d+)", log_of(run).read_text())
    assert rows[0][3][-1] == int(said[1])
    assert rows[1][4], rows  # there was a partially written checkpoint
    assert_same_end(run, whole)
    assert not is_writing(run)


# Where the process is killed: (function, its call). Each start continues where the one before was killed.
MOMENTS = {
    "before the first checkpoint": ("fasterrcnn_jax.training.checkpoint:save", 1),
    "while the first evaluation runs": ("fasterrcnn_jax.training.evaluation:score", 1),
    "between metrics.jsonl and TensorBoard": ("fasterrcnn_jax.training.tensorboard:TensorBoard.add_scalar", 40),
    "while a checkpoint is written": ("os:rename", 1),
    "while left-overs are removed": ("shutil:rmtree", 1),
    "between an evaluation and its image": ("fasterrcnn_jax.training.evaluation:comparison_sheet", 2),
    "before the last results": ("fasterrcnn_jax.training.checkpoint:best", 1),
}


@pytest.mark.slow
def test_a_run_killed_at_named_moments_ends_with_the_same_bits(launcher, folder, whole, tmp_path):
    run = tmp_path / "run"
    for moment, place in MOMENTS.items():
        pid = start(launcher, folder, run, signal_at=(*place, signal.SIGKILL))
        assert launcher.wait(pid) == -signal.SIGKILL, f"{moment}: {log_of(run).read_text()}"
    finish(launcher, folder, run)
    assert_same_end(run, whole)


BATCH_NORM = """
backbone = dataclasses.replace(config.model.backbone, norm="batch")
config = dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
"""


@pytest.mark.slow
def test_a_run_with_batch_norm_that_is_killed_ends_with_the_same_bits(launcher, folder, tmp_path):
    """The running averages continue from the checkpoint, as the weights do."""
    (tmp_path / "mine.py").write_text((folder / "mine.py").read_text() + BATCH_NORM)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert launcher.wait(start(launcher, tmp_path, whole), seconds=500) == 0, log_of(whole).read_text()
    place = MOMENTS["between an evaluation and its image"]
    pid = start(launcher, tmp_path, run, signal_at=(*place, signal.SIGKILL))
    assert launcher.wait(pid) == -signal.SIGKILL, log_of(run).read_text()
    assert steps_in(run) and STEPS not in steps_in(run)
    finish(launcher, tmp_path, run)
    assert_same_end(run, (whole, digests(whole)))


ALTERNATING = """
import test_stages
from fasterrcnn_jax.config import AlternatingConfig
stages = AlternatingConfig(steps=(2, 2, 2, 2), decay_steps=(1, 1, 1, 1))
train = dataclasses.replace(config.train, scheme="alternating", alternating=stages, steps=8, decay_steps=())
config = dataclasses.replace(config, train=train, model=test_stages.MODEL)
"""
# Where the process is killed while one stage hands over to the next. Each start continues where the one before was
# killed. A start opens the checkpoints of the stages in their order, also of those that are complete.
HANDING_OVER = {
    "before stage 1 stores its proposals": ("fasterrcnn_jax.inference.proposal_store:write_proposals", 1),
    "between the proposals of two splits": ("fasterrcnn_jax.inference.proposal_store:write_proposals", 2),
    "before stage 2 begins": ("fasterrcnn_jax.training.checkpoint:open_checkpoints", 2),
    "before stage 3 takes the weights of stage 2": ("fasterrcnn_jax.training.checkpoint:load", 1),
    "before stage 3 stores its proposals": ("fasterrcnn_jax.inference.proposal_store:write_proposals", 1),
    "before stage 4 takes the weights of stage 3": ("fasterrcnn_jax.training.checkpoint:load", 2),
    "before the best checkpoint of stage 4 is copied": ("fasterrcnn_jax.training.checkpoint:write_best", 1),
}


@pytest.mark.slow
def test_alternating_training_killed_while_stages_hand_over_ends_with_the_same_bits(launcher, folder, tmp_path):
    (tmp_path / "mine.py").write_text((folder / "mine.py").read_text() + ALTERNATING)
    whole, run = tmp_path / "whole", tmp_path / "run"
    # The programs of four stages are compiled here.
    assert launcher.wait(start(launcher, tmp_path, whole), seconds=500) == 0, log_of(whole).read_text()
    for moment, place in HANDING_OVER.items():
        pid = start(launcher, tmp_path, run, signal_at=(*place, signal.SIGKILL))
        assert launcher.wait(pid) == -signal.SIGKILL, f"{moment}: {log_of(run).read_text()}"
    finish(launcher, tmp_path, run)
    folders = ["", *(f"stages/{path.name}" for path in sorted((whole / "stages").iterdir()))]
    assert len(folders) == 4
    for name in folders:
        assert numbers_in(run / name) == numbers_in(whole / name)
        one, other = (digest_of(of / name / "checkpoints" / "2").hexdigest() for of in (run, whole))
        assert one == other, name
        for path in sorted((whole / name / "proposals").glob("*.safetensors")):
            (found, maker), (expected, by) = (
                read_proposals(of / name / "proposals" / path.name) for of in (run, whole)
            )
            assert maker == by and list(found) == list(expected)
            assert all(np.array_equal(*pair) for id in found for pair in zip(found[id], expected[id], strict=True))


# Where a first signal comes: (function, its call, signal), the exit status, and the steps that are saved.
ASKED = {
    "while data is read": (("fasterrcnn_jax.data.sources:read_split", 1, signal.SIGTERM), -signal.SIGTERM, []),
    "Ctrl-C while data is read": (("fasterrcnn_jax.data.sources:read_split", 1, signal.SIGINT), -signal.SIGINT, []),
    "while the first step compiles": (
        ("fasterrcnn_jax.training.stages:training_losses", 1, signal.SIGTERM),
        -signal.SIGTERM,
        [],
    ),
    "while an evaluation runs": (
        ("fasterrcnn_jax.training.evaluation:score", 1, signal.SIGTERM),
        EXIT_STATUS,
        [2, 4],
    ),
    "while a checkpoint is written": (
        ("fasterrcnn_jax.training.checkpoint:_digest", 1, signal.SIGTERM),
        EXIT_STATUS,
        [4, 5],
    ),
    "after the last checkpoint": (
        ("fasterrcnn_jax.training.checkpoint:best", 1, signal.SIGTERM),
        -signal.SIGTERM,
        [10, 12],
    ),
}


@pytest.mark.parametrize(
    "signal_at, status, steps",
    [pytest.param(*case, id=moment, marks=pytest.mark.slow if case[2] else ()) for moment, case in ASKED.items()],
)
def test_a_request_to_stop_ends_the_run_at_each_moment(launcher, folder, whole, tmp_path, signal_at, status, steps):
    run = tmp_path / "run"
    assert launcher.wait(start(launcher, folder, run, signal_at=signal_at)) == status, log_of(run).read_text()
    assert steps_in(run) == steps and "Traceback" not in log_of(run).read_text()
    if steps:
        finish(launcher, folder, run)
        assert_same_end(run, whole)


def test_of_two_starts_at_once_one_trains_and_the_other_ends_with_one_sentence(launcher, folder):
    run, logs = folder / "twice", [folder / "twice.first.log", folder / "twice.second.log"]
    pids = [launcher.start(["--config", folder / "mine.py", "--run", run], log=log) for log in logs]
    deadline = time.monotonic() + 120
    while (ended := [launcher.status(pid) for pid in pids]) == [None, None]:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert sorted(ended, key=str) == [2, None]
    loser = ended.index(2)
    said = logs[loser].read_text()
    assert said.splitlines()[-1] == (
        f"error: --run {run}: another process is training in this run folder; wait for it, or choose another --run"
    )
    assert "Traceback" not in said
    os.kill(pids[1 - loser], signal.SIGKILL)
    assert launcher.wait(pids[1 - loser]) == -signal.SIGKILL
    with run_folder.locked(run):  # a killed holder frees it
        pass


@pytest.fixture
def stopped(launcher, folder, whole, tmp_path):
    """Returns a run without the checkpoint of its last step, so that it still has to be written."""
    run = Path(shutil.copytree(whole[0], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / str(STEPS))
    return run


@pytest.mark.slow
def test_a_full_disk_is_named_and_nothing_is_lost(launcher, folder, whole, stopped):
    """Files are limited to 200 kB: no checkpoint fits, everything else does."""
    before = steps_in(stopped)
    # Orbax's threads print that their event loop is closed; Python code cannot catch that.
    refused(launcher, folder, stopped, r"checkpoints/12 cannot be written \(.*", quiet=False, file_limit=200_000)
    assert steps_in(stopped) == before
    finish(launcher, folder, stopped)
    assert_same_end(stopped, whole)


@pytest.mark.slow
def test_a_folder_that_is_read_only_is_named_and_nothing_is_lost(launcher, folder, whole, stopped):
    before = steps_in(stopped)
    folders = [stopped, *(path for path in stopped.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        refused(launcher, folder, stopped, f"ermission denied.*{stopped}", plain_user=True)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert steps_in(stopped) == before
    finish(launcher, folder, stopped)
    assert_same_end(stopped, whole)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_runs_killed_at_many_moments_end_with_the_same_bits(launcher, folder, whole, threads, capsys):
    run = folder / f"killed {threads}"
    kinds = random.Random(threads).choices(KINDS, weights=(2, 3, 3, 1), k=7)
    rows = killed_and_started_again(launcher, folder, run, kinds, seed=threads, threads=threads)
    found = digests(run)
    with capsys.disabled():
        print(f"\n{threads} threads, {len(rows)} stops: {found}, never stopped: {whole[1]}")
        print("\n".join(f"  {row}" for row in rows))
    assert_same_end(run, whole)
