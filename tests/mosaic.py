"""Helpers for tests of the Mosaic kernels: interpret mode, a pretended device, and lowering for CUDA on a CPU."""

import jax
from fasterrcnn_jax.kernels import choice, mosaic


def pretend(monkeypatch, platform="cuda", capability=choice.HOPPER):
    """Makes the library choose as if it ran on this device."""
    monkeypatch.setattr(choice, "device", lambda: (platform, capability))


def interpret(monkeypatch, *, detect_races=True):
    """Runs kernels step by step on the CPU as if on a Hopper GPU; this does not change traces made before."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    pretend(monkeypatch)
    monkeypatch.setattr(mosaic, "INTERPRET", plgpu.InterpretGPUParams(detect_races=detect_races))


def lowered_for_cuda(function, *arguments):
    """Returns the program of `function` for a CUDA device as text, made on any machine."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
