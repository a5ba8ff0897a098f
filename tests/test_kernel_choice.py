"""Chooses by name, or by JAX's version, platform and compute capability; logs the reason once."""

import functools
import inspect
import logging
from types import SimpleNamespace

import fasterrcnn_jax.scripts.train as train_script
import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
import tiny
from fasterrcnn_jax.kernels import choice
from fasterrcnn_jax.kernels import nms as nms_kernel
from fasterrcnn_jax.kernels.choice import choose

from fasterrcnn_jax import processes
from fasterrcnn_jax.ops import roi_alignment, roi_pooling, suppression
from fasterrcnn_jax.processes import kernel_line


@pytest.fixture(autouse=True)
def newest(monkeypatch):
    """Pretends a JAX that has the kernels, and clears what was logged."""
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    cached = choice._log_once, choice._difference, roi_alignment._forward, roi_alignment._backward
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    "platform, capability, chosen, reason",
    [
        ("cuda", (9, 0), "mosaic", None),
        ("cuda", (10, 0), "mosaic", None),
        ("cuda", (7, 5), "xla", "needs compute capability 8.0 or newer and this device has 7.5"),
        ("cuda", (11, 0), "xla", "it was never run on compute capability 11.0"),
        ("cuda", (12, 0), "xla", "the kernels do not compile for compute capability 12.0 in JAX 0.11.2 and 0.12.0.1"),
        ("cpu", (0, 0), "xla", "it needs a CUDA device and the platform of this device is cpu"),
        ("rocm", (0, 0), "xla", "the platform of this device is rocm"),
    ],
)
def test_without_a_named_implementation_the_device_decides(monkeypatch, caplog, platform, capability, chosen, reason):
    mosaic.pretend(monkeypatch, platform, capability)
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"):
        assert choose("pooling", None, unsupported=None) == chosen
        assert choose("pooling", None, unsupported=None) == chosen
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"pooling runs as {chosen}") and (reason or "") in message
    without_its_kernels = platform == "cuda" and reason is not None
    assert record.levelno == (logging.WARNING if without_its_kernels else logging.INFO)


def pretended_kernels(monkeypatch, *, wrong=False, error=None):
    """Puts plain JAX in the place of the kernels, or something that is not right; returns the calls."""
    called = []

    def stands_for(function, spoilt):
        def run(*arguments, **options):
            called.append(function.__name__)
            if error:
                raise error
            result = function(*arguments, **options)
            return spoilt(result) if wrong else result

        return run

    def keep_first(threshold, max_output):
        def launch(boxes, groups, num_valid):
            groups = jnp.zeros(boxes.shape[:2], jnp.int32) if groups is None else groups
            return jax.vmap(lambda *one: suppression._keep(*one, threshold, max_output))(boxes, groups, num_valid)

        return stands_for(launch, lambda kept: (kept[0], kept[1] - 1))

    forward = functools.partial(roi_alignment._forward_by_taking, unroll=False)
    functools.update_wrapper(forward, roi_alignment._forward_by_taking)
    monkeypatch.setattr(suppression.kernel, "keep_first", keep_first)
    # The features are right, and the gradient is not.
    monkeypatch.setattr(roi_alignment.kernel, "forward", stands_for(forward, lambda pooled: pooled))
    backward = roi_alignment._backward_by_adding
    monkeypatch.setattr(roi_alignment.kernel, "backward", stands_for(backward, lambda maps: (maps[0], 0.0 * maps[1])))
    monkeypatch.setattr(roi_pooling.kernel, "roi_pool", stands_for(roi_pooling._pool, lambda pooled: pooled * jnp.nan))
    return called


BOXES = np.array([[0, 0, 8, 8], [1, 0, 9, 8], [20, 20, 30, 30]], np.float32)
CALLS = {
    "nms": lambda: suppression.nms(BOXES, np.array([0.9, 0.8, 0.7]), iou_threshold=0.5),
    "roi_align": lambda: roi_alignment.roi_align(np.zeros((4, 4, 1)), BOXES, output_size=1, sampling_ratio=1),
    "roi_pool": lambda: roi_pooling.roi_pool(np.zeros((4, 4, 1)), BOXES, output_size=1),
}
DIFFERENT = {
    "nms": "the kernel keeps other boxes than plain JAX",
    "roi_align": "the features or the gradient of the kernel differ from those of plain JAX",
    "roi_pool": "the features or the gradient of the kernel differ from those of plain JAX",
}


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("wrong", [False, True], ids=["right kernel", "wrong kernel"])
def test_on_ampere_and_ada_a_check_decides_once_and_a_warning_says_what(monkeypatch, caplog, operation, wrong):
    mosaic.pretend(monkeypatch, "cuda", (8, 9))
    called = pretended_kernels(monkeypatch, wrong=wrong)
    # While it is traced, and mapped, as in the library.
    traced = jax.vmap(lambda _: CALLS[operation]())
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"):
        jax.eval_shape(traced, jnp.zeros(2))
        checked = len(called)
        assert checked
        jax.eval_shape(traced, jnp.zeros(2))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    if wrong:
        assert message.startswith(f"{operation} runs as xla: {DIFFERENT[operation]}")
        assert len(called) == checked, "plain JAX runs, and the kernel is not checked again"
    else:
        assert message == f"{operation} runs as mosaic: it agrees with plain JAX in a check on this device"


def test_a_kernel_that_fails_in_its_check_is_not_chosen(monkeypatch, caplog):
    mosaic.pretend(monkeypatch, "cuda", (8, 0))
    called = pretended_kernels(monkeypatch, error=RuntimeError("CUDA_ERROR_INVALID_VALUE\nmore"))
    assert CALLS["nms"]().valid.tolist() == [True, True, False]
    assert called == ["launch"]
    assert caplog.messages == [
        "nms runs as xla: the kernel fails on this device: RuntimeError: CUDA_ERROR_INVALID_VALUE"
    ]


def test_what_is_named_is_not_checked_and_another_device_is_checked_again(monkeypatch):
    mosaic.pretend(monkeypatch, "cuda", (8, 6))
    checks = []

    def check():
        checks.append(jax.config.jax_default_device)

    for implementation in ("mosaic", "xla"):
        assert choose("pooling", implementation, unsupported=None, check=check) == implementation
    assert not checks
    devices = jax.devices("cpu")[:2]
    for device in (*devices, devices[0]):
        with jax.default_device(device):
            assert choose("pooling", None, unsupported=None, check=check) == "mosaic"
    assert checks == devices and len(devices) == 2
    assert choose("cropping", None, unsupported=None) == "xla", "without a comparison"
    assert choose("pooling", None, unsupported="it takes no such thing", check=check) == "xla"


@pytest.mark.parametrize(
    "capability, most", [((8, 0), 6869), ((8, 6), 4138), ((8, 9), 4138), ((9, 0), 9000), ((10, 0), 9000)]
)
def test_the_shared_memory_of_a_device_bounds_the_kept_boxes(monkeypatch, capability, most):
    mosaic.pretend(monkeypatch, "cuda", capability)
    assert nms_kernel.unsupported(90_000, most) is None
    reason = nms_kernel.unsupported(90_000, most + 1)
    assert f"up to {most + 1}" in reason and (capability >= (9, 0) or "KiB of shared memory" in reason)
    # No more are kept than there are boxes, in whole tiles.
    assert nms_kernel.unsupported(most - most % 512, 90_000) is None


def test_a_device_that_says_how_much_shared_memory_it_has_is_believed(monkeypatch):
    client = SimpleNamespace(platform_version="cuda 13000")
    options = dict(platform="gpu", client=client, shared_memory_per_block_optin=100_000)
    gpu = SimpleNamespace(compute_capability="9.0", **options)
    monkeypatch.setattr(jax, "devices", lambda backend=None: [gpu])
    assert choice.shared_memory() == 100_000
    assert nms_kernel.unsupported(9000, 4000) is None and nms_kernel.unsupported(9000, 4096)


def test_a_list_that_a_device_cannot_hold_is_an_error_or_plain_jax(monkeypatch):
    mosaic.pretend(monkeypatch, "cuda", (8, 9))
    called = pretended_kernels(monkeypatch)
    scores, options = jnp.zeros(5000), dict(iou_threshold=0.5, max_output=4139)
    boxes = jnp.zeros((5000, 4))
    with pytest.raises(
        NotImplementedError, match="takes 100 KiB of shared memory and a block of this device has 99 KiB"
    ):
        suppression.nms(boxes, scores, **options, implementation="mosaic")
    jax.eval_shape(functools.partial(suppression.nms, **options), boxes, scores)
    assert not called


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


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (11, 0)])
def test_a_named_kernel_runs_from_ampere_on(monkeypatch, capability):
    mosaic.pretend(monkeypatch, "cuda", capability)
    assert choose("pooling", "mosaic", unsupported=None) == "mosaic"


@pytest.mark.parametrize(
    "platform, capability, unsupported, reason",
    [
        ("cpu", (0, 0), None, "platform of this device is cpu"),
        ("cuda", (7, 5), None, "needs compute capability 8.0 or newer and this device has 7.5"),
        ("cuda", (12, 1), None, "do not compile for compute capability 12.1 in JAX 0.11.2 and 0.12.0.1"),
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
    mosaic.pretend(monkeypatch, "cuda", (8, 9))
    assert "pip install" in kernel_line(None)
    for capability in ((7, 5), (12, 0)):  # a newer JAX would not be enough
        mosaic.pretend(monkeypatch, "cuda", capability)
        assert "pip install" not in kernel_line(None)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    mosaic.pretend(monkeypatch, "cuda", (8, 9))
    assert kernel_line(None) == (
        "kernels    checked: no GPU kernel was ever run on compute capability 8.9, so each is compared with plain JAX "
        "first, and a warning says which of the two runs"
    )
    for capability, reason in (
        ((7, 5), "and this device has 7.5"),
        ((11, 0), "never run on compute capability 11.0"),
        ((12, 0), "do not compile for compute capability 12.0 in JAX 0.11.2 and 0.12.0.1"),
    ):
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


def test_the_check_of_nms_has_boxes_of_several_tiles_with_groups_and_without(monkeypatch):
    """The kernels compare boxes of one tile and boxes of different tiles in different code."""
    seen = set()

    def nms(boxes, scores, valid, *, groups, **options):
        seen.add((len(boxes) > 2 * suppression.kernel.SWEEP_TILE, groups is None))
        return suppression.Kept(np.zeros(1, np.int32), np.ones(1, bool))

    monkeypatch.setattr(suppression, "nms", nms)
    assert suppression._kernel_differs() is None
    assert seen == {(True, True), (True, False)}
