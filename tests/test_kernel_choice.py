"""Chooses by name, or by JAX's version, platform and compute capability; logs the reason once."""

import inspect
import logging
from types import SimpleNamespace

import fasterrcnn_jax.scripts.train as train_script
import jax
import jax.numpy as jnp
import mosaic
import pytest
import tiny
from fasterrcnn_jax.kernels import choice
from fasterrcnn_jax.kernels.choice import choose

from fasterrcnn_jax import processes
from fasterrcnn_jax.processes import kernel_line


@pytest.fixture(autouse=True)
def newest(monkeypatch):
    """Pretends a JAX that has the kernels, and clears what was logged."""
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    choice._log_once.cache_clear()
    yield
    choice._log_once.cache_clear()


@pytest.mark.parametrize(
    "platform, capability, chosen, reason",
    [
        ("cuda", (9, 0), "mosaic", None),
        ("cuda", (10, 0), "mosaic", None),
        ("cuda", (8, 9), "xla", "needs compute capability 9.0 or newer and this device has 8.9"),
        ("cuda", (12, 0), "xla", "it was never run on compute capability 12.0"),
        ("cpu", (0, 0), "xla", "runs on CUDA devices and the platform of this device is cpu"),
        ("rocm", (0, 0), "xla", "the platform of this device is rocm"),
    ],
)
def test_without_a_named_implementation_the_device_decides(monkeypatch, caplog, platform, capability, chosen, reason):
    mosaic.pretend(monkeypatch, platform, capability)
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"):
        assert choose("pooling", None, unsupported=None) == chosen
        assert choose("pooling", None, unsupported=None) == chosen
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"pooling runs as {chosen}") and (reason or "") in message


def test_an_older_jax_has_no_kernels(monkeypatch):
    mosaic.pretend(monkeypatch)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert choose("pooling", None, unsupported=None) == "xla"
    with pytest.raises(NotImplementedError, match="pooling was asked for, but it needs JAX 0.11 or newer"):
        choose("pooling", "mosaic", unsupported=None)


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_without_a_cuda_device_nobody_is_told_of_a_version_of_jax(monkeypatch, caplog, platform):
    mosaic.pretend(monkeypatch, platform, (0, 0))
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"):
        assert choose("pooling", None, unsupported=None) == "xla"
    (message,) = caplog.messages
    assert "JAX" not in message and f"the platform of this device is {platform}" in message
    with pytest.raises(NotImplementedError, match=f"the platform of this device is {platform}"):
        choose("pooling", "mosaic", unsupported=None)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_a_named_kernel_runs_from_ampere_on(monkeypatch, capability):
    mosaic.pretend(monkeypatch, "cuda", capability)
    assert choose("pooling", "mosaic", unsupported=None) == "mosaic"


@pytest.mark.parametrize(
    "platform, capability, unsupported, reason",
    [
        ("cpu", (0, 0), None, "platform of this device is cpu"),
        ("cuda", (7, 5), None, "needs compute capability 8.0 or newer and this device has 7.5"),
        ("cuda", (9, 0), "it takes no such thing", "but it takes no such thing"),
    ],
)
def test_a_kernel_that_is_named_and_cannot_run_says_why(monkeypatch, platform, capability, unsupported, reason):
    mosaic.pretend(monkeypatch, platform, capability)
    with pytest.raises(NotImplementedError, match=reason):
        choose("pooling", "mosaic", unsupported=unsupported)
    assert choose("pooling", None, unsupported=unsupported) == "xla"
    assert choose("pooling", "xla", unsupported=unsupported) == "xla"


def test_train_says_once_why_a_gpu_runs_without_the_kernels(monkeypatch):
    mosaic.pretend(monkeypatch)
    assert kernel_line(None) is None
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    line = kernel_line(None)
    assert "it needs JAX 0.11 or newer and the installed JAX is" in line and "as plain JAX" in line
    assert "the GPU kernels are not used here" in line
    assert line.endswith("pip install 'fasterrcnn_jax[cuda13]' or, for CUDA 12, 'fasterrcnn_jax[cuda12]'")
    assert kernel_line("xla") is None  # chosen by name
    for capability in ((7, 5), (8, 9), (12, 0)):  # a newer JAX would not be enough
        mosaic.pretend(monkeypatch, "cuda", capability)
        monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
        assert "pip install" not in kernel_line(None) and "mosaic uses" not in kernel_line(None)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    mosaic.pretend(monkeypatch, "cuda", (8, 9))
    assert kernel_line(None).endswith(
        "it needs compute capability 9.0 or newer and this device has 8.9; train.implementation mosaic uses them, but "
        "they were never run on such a GPU"
    )
    for capability, reason in (((7, 5), "and this device has 7.5"), ((12, 0), "never run on compute capability 12.0")):
        mosaic.pretend(monkeypatch, "cuda", capability)
        assert kernel_line(None).endswith(reason)
    mosaic.pretend(monkeypatch, "cpu", (0, 0))
    assert kernel_line(None) is None


def test_train_prints_the_line_about_the_kernels(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(processes, "kernel_line", lambda implementation: f"kernels    none: {implementation}")
    monkeypatch.setattr(train_script, "say", said.append)
    monkeypatch.setattr(train_script, "fit", lambda *_, **__: None)
    tiny.write_voc(tmp_path / "voc", train=2, test=1)
    train_script.train_stages(tiny.config(tmp_path))
    assert said.count("kernels    none: None") == 1


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="must be None, 'xla' or 'mosaic', got 'triton'"):
        inspect.unwrap(choose)("pooling", "triton", unsupported=None)  # past the types that tests enforce


@pytest.mark.parametrize(
    "dtype, reason",
    [
        (jnp.float32, None),
        (jnp.bfloat16, None),
        (jnp.float16, "it takes float32 and bfloat16 features and these features are float16"),
    ],
)
def test_features_that_a_kernel_can_take(dtype, reason):
    assert choice.unsupported_features(dtype) == reason


@pytest.mark.parametrize("version, expected", [("cuda 13000", ("cuda", (9, 0))), ("rocm 6.2", ("rocm", (0, 0)))])
def test_the_device_is_the_one_that_programs_go_to(monkeypatch, version, expected):
    """The machine has a GPU with this driver; the default device may still be set to the CPU."""
    cpu = jax.devices("cpu")[0]
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0", client=SimpleNamespace(platform_version=version))
    monkeypatch.setattr(jax, "devices", lambda backend=None: [gpu])
    assert choice.device() == expected
    with jax.default_device(cpu):
        assert choice.device() == ("cpu", (0, 0))
