"""The training step gives the same numbers on 1, 2 and 4 devices, with pmap and with shard_map."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, PartitionSpec

from fasterrcnn_jax import processes
from fasterrcnn_jax.config import TrainConfig
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.models.detector import create_detector
from fasterrcnn_jax.processes import AXIS, check_batch_size, device_line, per_device, replicate
from fasterrcnn_jax.structures import Batch, GroundTruth
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.step import (
    create_state,
    data_parallel,
    make_train_step,
)

B, G, STEPS = 4, 3, 4
TRAIN = TrainConfig(steps=20, batch_size=B, learning_rate=1e-3)
TOLERANCE = 1e-6  # of losses, and of each parameter's norm; the devices' sums are added in another order

pytestmark = pytest.mark.skipif(jax.local_device_count() < 4, reason="needs four devices")


@pytest.fixture(scope="module")
def start():
    """Returns (step of one device, state in NumPy) for the small network of docs/backbone.md."""
    text = (Path(__file__).parents[1] / "docs" / "backbone.md").read_text()
    example = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], example)
    config = dataclasses.replace(
        tiny.MODEL,
        backbone=dataclasses.replace(tiny.MODEL.backbone, own="my_nets:Tiny"),
        box_head=dataclasses.replace(tiny.MODEL.box_head, channels=16),
    )
    with tiny.quick_compilation(), jax.numpy_dtype_promotion("standard"):
        model = create_detector(config, tiny.CLASS_NAMES, seed=0, backbone=example["Tiny"])
        optimizer = create_optimizer(TRAIN)
        graphdef, state = create_state(model, optimizer, seed=0)
        yield make_train_step(graphdef, optimizer, axis_name=AXIS), jax.device_get(state)


def batch_of(step):
    """Returns a batch of four rows: two objects; no object; an empty row; one object."""
    generator = np.random.default_rng(step)
    height, width = tiny.IMAGE.canvases[0]
    valid = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]], bool)
    near = generator.uniform(0, 30, (B, G, 2))
    boxes = np.concatenate((near, near + generator.uniform(16, 30, (B, G, 2))), axis=2) * valid[..., None]
    shown = np.array([True, True, False, True])
    return Batch(
        images=generator.normal(size=(B, height, width, 3)).astype(np.float32) * shown[:, None, None, None],
        image_hw=np.float32([(height, width)] * B) * shown[:, None],
        scale=np.ones((B, 2), np.float32),
        image_index=np.int32([7, 3, 0, 9]),
        image_valid=shown,
        ground_truth=GroundTruth(boxes.astype(np.float32), valid.astype(np.int32), valid),
    )


def by_pmap(step, devices):
    return data_parallel(step, devices=devices)


def by_shard_map(step, devices):
    """Maps the step with shard_map instead of pmap. With check_vma, JAX would already sum the gradients: wrong here."""
    whole, rows = PartitionSpec(), PartitionSpec(AXIS)
    mesh = Mesh(np.array(devices), (AXIS,))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, rows), out_specs=(whole, whole), check_vma=False)
    return jax.jit(mapped, donate_argnums=0)


@pytest.fixture(scope="module")
def trained(start):
    """Returns {name: (losses of each step, last state)} for each way to map the step."""
    step, state = start
    ways = {"pmap 1": (by_pmap, 1), "pmap 2": (by_pmap, 2), "pmap 4": (by_pmap, 4), "shard_map 4": (by_shard_map, 4)}
    found = {}
    for name, (mapping, count) in ways.items():
        devices = jax.local_devices()[:count]
        run = mapping(step, devices)
        now, losses = replicate(jax.tree.map(np.array, state), devices=devices), []
        for number in range(STEPS):
            now, metrics = run(now, batch_of(number))
            losses.append(np.array(metrics[:5], np.float64))
        found[name] = np.array(losses), jax.device_get(now)
    return found


@pytest.mark.parametrize("name", ["pmap 2", "pmap 4", "shard_map 4"])
def test_steps_are_the_same_however_they_are_mapped(trained, start, name):
    losses, state = trained[name]
    expected_losses, expected = trained["pmap 1" if name.startswith("pmap") else "pmap 4"]
    assert (expected_losses > 0).all()
    # One loss is only about 5e-7: the last bit of float32 in its terms is more than a millionth of it.
    np.testing.assert_allclose(losses, expected_losses, rtol=TOLERANCE, atol=1e-3 * TOLERANCE)
    for first, leaf, other in zip(*(jax.tree.leaves(of.params) for of in (start[1], expected, state)), strict=True):
        assert np.any(leaf != first)
        assert np.linalg.norm(other - leaf) <= TOLERANCE * np.linalg.norm(leaf)


def test_a_batch_is_shared_by_the_devices_of_all_processes(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [per_device(size) for size in (16, 8, 3)] == [2, 1, 1]
    check_batch_size(16, accumulate=2)
    with pytest.raises(InputError, match=r"batch_size is 12, not a multiple of the 8 devices of 2 processes"):
        check_batch_size(12)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about a GPU that JAX does not use")
def test_a_gpu_that_jax_does_not_use_is_named_with_the_remedy(tmp_path, monkeypatch):
    driver = tmp_path / "nvidiactl"
    monkeypatch.setattr(processes, "NVIDIA_DRIVER", driver)
    assert device_line() == f"device     {jax.device_count()} x cpu (cpu)"
    driver.touch()
    assert device_line().endswith(
        "; this computer has an NVIDIA GPU, but JAX does not see it: pip install 'jax[cuda13]'"
    )
