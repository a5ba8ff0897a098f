"""Counts the XLA compilations of this process and their seconds. Changing array shapes then show up in the log."""

import functools

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"  # JAX also sends it for programs from the compilation cache


_durations: list[float] = []


@functools.cache
def watch() -> None:
    """Starts counting. Cached, so that it registers once per process: JAX keeps every listener."""

    def note(event: str, duration_secs: float, **_: object) -> None:
        if event == _EVENT:
            _durations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)


def so_far() -> dict[str, float]:
    """Returns the number of compilations and their total seconds since `watch`, with names for the log."""
    return {"compilations": len(_durations), "compilation_seconds": sum(_durations)}
