"""Times every operation around the network: plain JAX, the GPU kernels, and torchvision's operators.

    python benchmarks/kernels.py [--out FILE.json] [--minutes 8] [--goals | --others] [--only WORD ...]
        [--skip WORD ...] [--tiny] [--no_compile]

All sides of an operation run in one process on the same inputs and take turns. First their results are compared. If
one of our results differs from torchvision's, or one of our sides fails, the report says so and the script exits with
status 1. For each operation it prints our best time, its speed relative to torchvision's best time, the goal for an
H200, and the ratio of our time to the floor. The floor is the time for moving the bytes or for doing the arithmetic,
at the rates measured on this device. `part_of_floor` in the report is the inverse of that ratio.
"""

import sys
from collections.abc import Callable

import measure
import numpy as np
import suite
from isolated import one_line
from operations import Operation, operations

# Input sets, and bytes of one from which two of them are more than any cache holds.
MANY, FEW, LARGE = 4, 2, 1e8


def measure_case(
    name: str,
    without: set[str],
    turn: Callable[[str], None],
    keep: Callable[[dict], None],
    *,
    tiny: bool,
    compiled: bool,
) -> dict:
    """Returns the figures of one operation; calls `keep` with those so far."""
    case = operations(tiny=tiny)[name]()
    rng = np.random.default_rng(0)
    inputs = [case.draw(rng) for _ in range(FEW if case.num_bytes > LARGE else MANY)]
    builders, waits = {}, {}
    # What has a goal first.
    for implementation in reversed(case.implementations):
        builders[implementation], waits[implementation] = case.ours(implementation), measure.block
    torch, torchvision = measure.peer()
    if torch:
        torch.compiler.reset()  # what it compiled for the cases before
        theirs = case.theirs(torch, torchvision)
        theirs = {side: build for side, build in theirs.items() if compiled or " compiled" not in side}
        builders |= theirs
        waits |= dict.fromkeys(theirs, measure.torch_wait)

    sides, firsts, early, differences, failed, unavailable = {}, {}, {}, {}, {}, {}

    def figures(times: dict, failed_later: dict) -> dict:
        found = _figures(case, early | times, differences, measure.measure_ceilings(tiny=tiny))
        return found | {"failed": failed | failed_later, "unavailable": unavailable}

    for side, build in builders.items():
        if side in without:
            continue
        turn(side)
        try:
            calls = [build(*arrays) for arrays in inputs]
            firsts[side] = calls[0]()
            waits[side](firsts[side])
            sides[side] = measure.Side(calls, waits[side])
            differences |= _differences(case, firsts, differences)
            early |= measure.interleaved({side: sides[side]}, measure.FIRST, turn)[0]
            keep(figures({}, {}))
        except NotImplementedError as error:
            unavailable[side] = str(error)
        except Exception as error:
            failed[side] = one_line(error)
            measure.require_device()
    firsts.clear()
    effort = measure.QUICK if tiny else measure.THOROUGH
    times, failed_later = measure.interleaved(sides, effort, turn, lambda times: keep(figures(times, {})))
    early.clear()
    return figures(times, failed_later)


def _differences(case: Operation, firsts: dict, known: dict) -> dict[str, float]:
    """Returns how far each of our results that is not known is from torchvision's first one."""
    reference = next((firsts[side] for side in firsts if side.startswith("torchvision")), None)
    if reference is None:
        return {}
    ours = (side for side in case.implementations if side in firsts and side not in known)
    return {side: case.difference(firsts[side], reference) for side in ours}


def _figures(case: Operation, times: dict, differences: dict, ceilings: measure.Ceilings) -> dict:
    floor = ceilings.floor_ms(case.num_bytes, case.flops)
    ours = {side: times[side].ms for side in case.implementations if side in times}
    theirs = {side: found.ms for side, found in times.items() if side not in case.implementations}
    best, fastest = min(ours, key=ours.get, default=None), min(theirs, key=theirs.get, default=None)
    return {
        "dtype_of_ours": case.dtype,
        "times_ms": {side: found._asdict() for side, found in times.items()},
        "best": best,
        "fastest_of_torchvision": fastest,
        "times_as_fast": theirs[fastest] / ours[best] if best and fastest else None,
        "goal": case.goal,
        "floor_ms": floor,
        "part_of_floor": floor / ours[best] if best else None,
        "times_the_floor": ours[best] / floor if best else None,
        "floor_goal": case.floor_goal,
        "num_bytes": case.num_bytes,
        "flops": case.flops,
        "differences": differences,
        "difference_limit": case.limit,
        "agrees": all(value <= case.limit for value in differences.values()) if differences else None,
    }


def _cells(result: dict) -> tuple:
    times, best, fastest = result["times_ms"], result["best"], result["fastest_of_torchvision"]

    def cell(value, form):
        return None if value is None else format(value, form)

    return (
        best,
        cell(best and times[best]["ms"], ".3f"),
        fastest and fastest.removeprefix("torchvision "),
        cell(fastest and times[fastest]["ms"], ".3f"),
        cell(result["times_as_fast"], ".2f"),
        cell(result["goal"], ".0f"),
        cell(result["times_the_floor"], ".1f"),
        cell(result["floor_goal"], ".1f"),
        {True: "yes", False: "NO", None: None}[result["agrees"]],
    )


SUITE = suite.Suite(
    script=__file__,
    description=__doc__,
    report="ops.json",
    goals=lambda tiny: {name: build().goal for name, build in operations(tiny=tiny).items()},
    measure_case=measure_case,
    environment=lambda tiny: measure.environment() | {"ceilings": measure.measure_ceilings(tiny=tiny)._asdict()},
    header=("ours", "ms", "torchvision", "ms", "ratio", "goal", "x floor", "goal", "agrees"),
    cells=_cells,
    silence=120.0,
    each_alone=False,
)

if __name__ == "__main__":
    sys.exit(suite.run(SUITE))
