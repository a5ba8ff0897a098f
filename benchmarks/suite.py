"""Shared parts of `kernels.py` and `end_to_end.py`: the command line, the loop over cases, the table and the report."""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import measure
from isolated import NO_TIME, run_child, run_isolated


class Suite(NamedTuple):
    script: str  # path of the benchmark, started again for its children
    description: str
    report: str  # file name
    goals: Callable[[bool], dict[str, float | None]]  # of all cases by name; takes whether they are tiny
    # Takes a case's name, sides to leave out, a function to call with a side before turning to it, one to call with
    # the figures so far, whether the case is tiny, and whether torch.compile is tried; returns the figures.
    measure_case: Callable[..., dict]
    environment: Callable[[bool], dict]  # takes whether the cases are tiny
    header: Sequence[str]
    cells: Callable[[dict], Sequence]  # of a result, one for each column after the name
    silence: float  # seconds after which a side hangs: its compilation, or its slowest run of calls
    each_alone: bool  # a process for each case


def run(suite: Suite, argv: list[str] | None = None) -> int:
    """Runs the cases that the command line selects.

    The exit status is 1, and the report has `faults`, if a result of ours is wrong, if one of our sides fails, or if
    the time ended before a case did.
    """
    parser = argparse.ArgumentParser(
        description=suite.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=measure.RESULTS / suite.report, help="file for the JSON report")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit; later cases are faults of the report")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--goals", action="store_true", help="only cases with a goal")
    some.add_argument("--others", action="store_true", help="only cases without a goal")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only cases whose names contain every WORD"
    )
    parser.add_argument("--skip", nargs="+", default=[], metavar="WORD", help="only cases whose names contain no WORD")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes for a quick test; the times mean nothing")
    parser.add_argument("--no_compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--without", nargs="*", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    tiny = arguments.tiny
    if arguments.child:
        run_case = functools.partial(suite.measure_case, tiny=tiny, compiled=not arguments.no_compile)
        environment = functools.partial(suite.environment, tiny)
        run_child(arguments.child, arguments.cases, arguments.without, environment, run_case)
        return 0

    goals = suite.goals(tiny)
    names = [
        name
        for name, goal in goals.items()
        if not (arguments.goals and goal is None) and not (arguments.others and goal is not None)
        if all(word in name for word in arguments.only) and not any(word in name for word in arguments.skip)
    ]
    if not names:
        parser.error(f"no case is selected; there are: {', '.join(goals)}")
    # A benchmark that is killed leaves a report that says what it had not reached.
    results, rows = {name: {"error": NO_TIME, "failed": {}} for name in names}, []

    def write(environment: dict) -> None:
        report = {"tiny": tiny, **environment, "faults": faults_of(results), "cases": results}
        measure.write_report(arguments.out, report)

    def kept(name: str, result: dict, environment: dict) -> None:
        results[name] = result
        write(environment)

    def done(name: str, result: dict, environment: dict) -> None:
        kept(name, result, environment)
        row = (name, result["error"]) if "error" in result else (name, *suite.cells(result))
        if "cut" in result:
            row = (f"{name} (cut: {result['cut']})", *row[1:])
        rows.append((*row, *[None] * (len(suite.header) + 1 - len(row))))
        print("  ".join(str(cell) for cell in row if cell is not None), flush=True)

    write({})
    with tempfile.TemporaryDirectory() as folder:
        run_isolated(
            [sys.executable, suite.script, *["--tiny"] * tiny, *["--no_compile"] * arguments.no_compile],
            names,
            Path(folder) / "journal",
            seconds=60.0 * arguments.minutes,
            # Tiny cases run on a CPU, which others may share.
            silence=5 * suite.silence if tiny else suite.silence,
            each_alone=suite.each_alone,
            done=done,
            kept=kept,
        )
    print()
    measure.print_table(("case", *suite.header), rows)
    faults = faults_of(results)
    for name, fault in faults.items():
        print(f"{name}: {fault}", file=sys.stderr)
    return 1 if faults else 0


def faults_of(results: dict[str, dict]) -> dict[str, str]:
    """Returns what is wrong, by the name of the case."""
    return {name: fault for name, result in results.items() if (fault := _fault(result))}


def _fault(result: dict) -> str | None:
    """Returns what is wrong with a result. Failures of torchvision are not faults."""
    if ended := result.get("error") or result.get("cut"):
        return ended
    ours = {side: reason for side, reason in result["failed"].items() if not side.startswith("torchvision")}
    if ours:
        return str(ours)
    return f"differs from torchvision: {result['differences']}" if result.get("agrees") is False else None
