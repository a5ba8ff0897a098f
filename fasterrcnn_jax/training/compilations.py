"""How often XLA compiled in this process, and for how long: shapes that change show in a log."""

import functools

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"  # also of programs that the compilation cache holds


_durations: list[float] = []


@functools.cache
def watch() -> None:
    """Counts from now on; once per process, because JAX keeps every listener."""

    def note(event: str, duration: float, **_) -> None:
        if event == _EVENT:
            _durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)


def so_far() -> dict[str, float]:
    """Returns the number of compilations and their seconds since `watch`, under names for a log."""
    return {"compilations": len(_durations), "compilation_seconds": sum(_durations)}
