"""Several processes: each reads its share, and a run of two processes equals a run of one with as many devices.

The test starts the processes. They communicate over this machine's network and have a time limit, so a deadlock
is a failed test.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from fasterrcnn_jax import processes
from fasterrcnn_jax.config import DistributedConfig
from fasterrcnn_jax.config.rules import first_difference
from fasterrcnn_jax.data import loader
from fasterrcnn_jax.data.plan import BatchPlan, rows_of
from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.data.sources import open_split
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference import dataset as dataset_loop
from fasterrcnn_jax.inference.dataset import gathered
from fasterrcnn_jax.processes import (
    any_process,
    gather_rows,
    initialize,
    is_main,
    process,
)
from fasterrcnn_jax.training import preemption

TESTS = Path(__file__).parent
STEPS, BATCH_SIZE = 10, 4
LIMIT = 600  # seconds that a run may take on a busy machine
TOLERANCE = 1e-6  # of losses, and of each parameter's norm

CONFIG = """
import dataclasses, sys
from pathlib import Path
import jax
sys.path.insert(0, {tests!r})
import tiny
jax.config.update("jax_disable_most_optimizations", True)  # quicker to compile
jax.config.update("jax_enable_compilation_cache", False)
config = tiny.config(
    Path({folder!r}), steps={steps}, batch_size={batch_size}, learning_rate=1e-3, checkpoint_every={steps}
)
own = dataclasses.replace(config.model.backbone, own="my_nets:Tiny")
head = dataclasses.replace(config.model.box_head, channels=16)
square = dataclasses.replace(config.model.image, canvases=((96, 96),))
mixed = dataclasses.replace(config.model, backbone=own, box_head=head)
models = dict(own=mixed, square=dataclasses.replace(mixed, image=square), resnet18=config.model)
config = dataclasses.replace(config, model=models[{network!r}])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five portraits and four landscapes in turn: doubled, neither fills its last batch."""
    folder = tmp_path_factory.mktemp("work")
    tiny.write_voc(folder / "voc", train=11, test=7)
    values = dict(tests=str(TESTS), folder=str(folder), steps=STEPS, batch_size=BATCH_SIZE)
    for network in ("own", "square", "resnet18"):
        (folder / f"{network}.py").write_text(CONFIG.format(**values, network=network))
    # Three convolutions with dropout, which compile much faster than a ResNet.
    text = (TESTS.parent / "docs" / "backbone.md").read_text()
    (folder / "my_nets.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    return folder


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def started(folder, run, network, *, processes, devices, options=()):
    """Starts the processes of a run on `devices` virtual devices each."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(folder),
    }
    coordinator = f"127.0.0.1:{free_port()}"
    found = []
    for index in range(processes):
        argv = ["--config", str(folder / f"{network}.py"), "--run", str(folder / run), *options]
        if processes > 1:
            argv += ["--distributed.coordinator", coordinator]
            argv += ["--distributed.num_processes", str(processes), "--distributed.process_id", str(index)]
        command = [sys.executable, str(TESTS / "process_of_a_run.py"), str(folder / f"{run}_{index}.npz"), *argv]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found.append(subprocess.Popen(command, env=environment, cwd=folder, **pipes))
    return found


def ended(processes, status=0):
    """Returns the output of each process. Fails if a process does not end or has another exit status."""
    until = time.monotonic() + LIMIT
    try:
        printed = [process.communicate(timeout=max(1.0, until - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == status, text
    return printed


# By default all images use one canvas, so half as many programs are compiled.
SPLITS = [
    pytest.param(("square", 1), id="one-canvas"),
    pytest.param(("own", 1), id="two-canvases", marks=pytest.mark.slow),
    pytest.param(("own", 2), id="two-devices-each", marks=pytest.mark.slow),
    pytest.param(("resnet18", 1), id="resnet18", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=SPLITS)
def runs(folder, request):
    """Returns (run folder, output of each process, contents of each process) for one process and for two.

    Both have the same total number of devices.
    """
    network, devices = request.param
    found = []
    for count in (1, 2):
        run = f"{count}_{network}_{devices}"
        options = dict(processes=count, devices=2 * devices // count)
        printed = ended(started(folder, run, network, **options))
        held = [dict(np.load(folder / f"{run}_{index}.npz")) for index in range(count)]
        found.append((folder / run, printed, held))
    return found


def lines_of(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def test_two_processes_have_the_losses_of_one(runs):
    one, two = (lines_of(run, "gradient_norm") for run, _, _ in runs)
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))
    for line, other in zip(one, two, strict=True):
        for name in ("rpn_objectness", "rpn_box", "box_class", "box_delta", "gradient_norm"):
            assert line[name] > 0
            assert abs(other[name] - line[name]) <= TOLERANCE * line[name], (line["step"], name)


def test_two_processes_end_with_the_parameters_of_one(runs):
    (_, _, (one,)), (_, _, two) = runs
    names = [name for name in one if name.startswith("parameter ")]
    assert len(names) > 10
    for name in names:
        for held in two:
            assert np.linalg.norm(held[name] - one[name]) <= TOLERANCE * np.linalg.norm(one[name]), name


def test_each_process_trains_on_its_share_of_every_batch(runs):
    """If both processes had all rows, the numbers would be the same, for twice the work."""
    for count, (_, _, held) in zip((1, 2), runs):
        assert [of["rows"].tolist() for of in held] == [[BATCH_SIZE // count] * STEPS] * count


def test_every_image_is_evaluated_once_and_both_processes_have_all_detections(runs):
    (_, _, (one,)), (_, _, two) = runs
    (local, everywhere), *others = (held["devices"].tolist() for held in (one, *two))
    assert local == everywhere and others == [[local // 2, everywhere]] * 2
    shares = [held["looked_at"].tolist() for held in two]
    assert sorted(shares[0] + shares[1]) == list(range(7)) and shares[0] and shares[1]
    assert one["lengths"].sum() > 0
    for name in ("lengths", "labels", "boxes", "scores"):
        np.testing.assert_array_equal(two[0][name], two[1][name])
    for name in ("lengths", "labels"):
        np.testing.assert_array_equal(two[0][name], one[name])
    for name in ("boxes", "scores"):
        np.testing.assert_allclose(two[0][name], one[name], rtol=1e-4, atol=1e-4)


def test_one_process_prints_and_writes(runs):
    (one, _, _), (two, (first, second), _) = runs
    assert "AP50" in first and "AP50" not in second
    names = [sorted(re.sub(r"events\.out\..*", "events", path.name) for path in run.glob("*")) for run in (one, two)]
    assert names[0] == names[1] and names[1].count("events") == 1
    lines = [lines_of(run, "test/AP50") for run in (one, two)]
    assert [len(of) for of in lines] == [1, 1]
    kept = [{name: value for name, value in of[0].items() if name.startswith("test/")} for of in lines]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step_and_one_process_continues(folder):
    options = ("--train.steps", "60", "--train.checkpoint_every", "1000")
    processes = started(folder, "stopped", "square", processes=2, devices=1, options=options)
    numbers = folder / "stopped" / "metrics.jsonl"
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and not (numbers.exists() and len(numbers.read_text().splitlines()) > 4):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    ended(processes, status=preemption.EXIT_STATUS)
    (step,) = (int(path.name) for path in (folder / "stopped" / "checkpoints").iterdir())
    assert 4 < step < 60
    (printed,) = ended(started(folder, "stopped", "square", processes=1, devices=2, options=options))
    assert f"from step {step}" in printed
    ended(started(folder, "whole", "square", processes=1, devices=2, options=options))
    found, expected = (dict(np.load(folder / f"{run}_0.npz")) for run in ("stopped", "whole"))
    for name in (name for name in expected if name.startswith("parameter ")):
        assert np.linalg.norm(found[name] - expected[name]) <= TOLERANCE * np.linalg.norm(expected[name]), name


@given(st.integers(1, 4), st.integers(1, 4))
def test_the_rows_of_the_processes_are_the_batch_in_its_order(count, each):
    index = np.arange(count * each, dtype=np.int32)
    plan = BatchPlan((64, 96), index, index < 3)
    rows = [rows_of(plan, process, count) for process in range(count)]
    assert {len(of.image_index) for of in rows} == {each}
    np.testing.assert_array_equal(np.concatenate([of.image_index for of in rows]), plan.image_index)
    np.testing.assert_array_equal(np.concatenate([of.image_valid for of in rows]), plan.image_valid)


def test_processes_read_their_rows_of_the_same_batches(folder):
    data = tiny.config(folder).data
    train_set = prepare_training_set(open_split(data, "train"), data)

    def batches(process):
        options = dict(batch_size=BATCH_SIZE, seed=0, steps=7, process=process)
        return loader.training_batches(train_set, data, tiny.IMAGE, **options)

    whole, first, second = batches((0, 1)), batches((0, 2)), batches((1, 2))
    shapes, filling = set(), 0
    for batch, one, two in zip(whole, first, second, strict=True):
        shapes.add(batch.images.shape)
        filling += not two.image_valid.any()
        for leaf, *parts in zip(*(jax.tree.leaves(of) for of in (batch, one, two)), strict=True):
            np.testing.assert_array_equal(np.concatenate(parts), leaf)
    assert len(shapes) == 2 and filling > 0  # a process with only empty rows takes part too
    assert whole.get_state() == second.get_state()


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_each_image_is_evaluated_by_one_process_even_when_some_have_none(folder, count):
    dataset = open_split(tiny.config(folder).data, "test")
    met = []
    for index in range(count):
        batches = list(loader.evaluation_batches(dataset, tiny.IMAGE, batch_size=2, process=(index, count)))
        met += [int(position) for batch in batches for position in batch.image_index[batch.image_valid]]
    assert sorted(met) == list(range(7))


def found_in(position):
    """Returns the detections of an image: their number and values depend on its position."""
    rows = np.arange(position % 3, dtype=np.float32)
    return ImageDetections(position + rows[:, None] + np.float32([0, 1, 2, 3]), rows / 4, rows.astype(np.int32) + 1)


def test_detections_of_all_processes_are_in_the_order_of_the_data_set(monkeypatch):
    """Two shares, one after the other, as `gather_rows` returns them; one may be empty."""
    for shares in ([[4, 0, 3], [1, 2]], [[0, 1, 2], []]):
        sent = []
        with monkeypatch.context() as patch:
            patch.setattr(dataset_loop, "gather_rows", lambda rows, sent=sent: sent.append(rows) or rows)
            for share in shares:
                gathered({position: found_in(position) for position in share})
            together = iter([np.concatenate(parts) for parts in zip(sent[:3], sent[3:], strict=True)])
            patch.setattr(dataset_loop, "gather_rows", lambda rows, together=together: next(together))
            found = gathered({})
        assert len(found) == sum(map(len, shares))
        for position, detections in enumerate(found):
            for leaf, expected in zip(detections, found_in(position), strict=True):
                np.testing.assert_array_equal(leaf, expected)
                assert leaf.dtype == expected.dtype


def test_one_process_gathers_its_own_rows():
    rows = np.arange(6, dtype=np.int32).reshape(3, 2)
    np.testing.assert_array_equal(gather_rows(rows), rows)
    assert [bool(any_process(flag)) for flag in (False, True)] == [False, True]
    assert is_main() and process() == (0, 1)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(coordinator="host"), "coordinator must be HOST:PORT or detect, got 'host'"),
        (dict(coordinator=":5000"), "coordinator must be HOST:PORT"),
        (dict(coordinator="host:0"), "coordinator must be HOST:PORT"),
        (dict(coordinator="host:70000"), "coordinator must be HOST:PORT"),
        (dict(coordinator="host:5000"), "needs num_processes and process_id, got None and None"),
        (dict(coordinator="host:5000", num_processes=2), "needs num_processes and process_id, got 2 and None"),
        (dict(coordinator="host:5000", num_processes=2, process_id=2), "process_id must be in .*, got 2 of 2"),
        (dict(coordinator="host:5000", num_processes=2, process_id=-1), "process_id must be in .*, got -1 of 2"),
        (dict(coordinator="host:5000", num_processes=0, process_id=0), "process_id must be in .*, got 0 of 0"),
        (dict(coordinator="detect", num_processes=2), "num_processes is for coordinator HOST:PORT, got 2 with detect"),
        (dict(process_id=0), "process_id is for coordinator HOST:PORT, got 0 with None"),
    ],
)
def test_invalid_process_settings_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        DistributedConfig(**fields)


def test_a_run_continues_with_another_number_of_processes(tmp_path):
    alone = tiny.config(tmp_path)
    detected = dataclasses.replace(alone, distributed=DistributedConfig(coordinator="detect"))
    explicit = DistributedConfig(coordinator="host:5000", num_processes=2, process_id=1)
    assert first_difference(detected, dataclasses.replace(alone, distributed=explicit)) is None


def test_a_coordinator_that_does_not_answer_is_an_error_of_one_sentence(monkeypatch):
    monkeypatch.setattr(processes, "TIMEOUT", 0)
    monkeypatch.setattr(jax.distributed, "initialize", None)  # JAX would end the process
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=rf"distributed\.coordinator = '{address}' did not answer within 0 seconds"):
        initialize(DistributedConfig(coordinator=address, num_processes=2, process_id=1))


def test_a_missing_cluster_is_an_error_of_one_sentence(monkeypatch):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")  # JAX says this

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="does not run under SLURM, Open MPI, Kubernetes or Cloud TPU"):
        processes.initialize(DistributedConfig(coordinator="detect"))
