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
    names: Callable[[bool], Sequence[str]]  # of the cases; takes whether they are tiny
    # Takes a case's name, sides to leave out, a function to call with a side before turning to it, whether the
    # case is tiny, and whether torch.compile is tried; returns the figures.
    measure_case: Callable[..., dict]
    environment: Callable[[bool], dict]  # takes whether the cases are tiny
    header: Sequence[str]
    cells: Callable[[dict], Sequence]  # of a result, one for each column after the name
    silence: float  # seconds after which a side hangs: its compilation, or its slowest run of calls
    each_alone: bool  # a process for each case


def run(suite: Suite, argv: list[str] | None = None) -> int:
    """Runs the cases that the command line selects; the exit status is 1 if one of ours is wrong or fails."""
    parser = argparse.ArgumentParser(
        description=suite.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=measure.RESULTS / suite.report, help="file for the JSON report")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit; later cases are left out")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only cases whose names contain every WORD"
    )
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

    names = [name for name in suite.names(tiny) if all(word in name for word in arguments.only)]
    if not names:
        parser.error(f"no case has all of {arguments.only} in its name; there are: {', '.join(suite.names(tiny))}")
    results, rows = {}, []

    def done(name: str, result: dict, environment: dict) -> None:
        results[name] = result
        row = (name, result["error"]) if "error" in result else (name, *suite.cells(result))
        rows.append((*row, *[None] * (len(suite.header) + 1 - len(row))))
        print("  ".join(str(cell) for cell in row if cell is not None), flush=True)
        measure.write_report(arguments.out, {"tiny": tiny, **environment, "cases": results})

    with tempfile.TemporaryDirectory() as folder:
        run_isolated(
            [sys.executable, suite.script, *["--tiny"] * tiny, *["--no_compile"] * arguments.no_compile],
            names,
            Path(folder) / "journal",
            seconds=60.0 * arguments.minutes,
            silence=suite.silence,
            each_alone=suite.each_alone,
            done=done,
        )
    print()
    measure.print_table(("case", *suite.header), rows)
    faults = {name: fault for name, result in results.items() if (fault := _fault(result))}
    for name, fault in faults.items():
        print(f"{name}: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _fault(result: dict) -> str | None:
    """Returns what is wrong with our side of a result. Failures of torchvision and lack of time are not faults."""
    if result.get("error", NO_TIME) != NO_TIME:
        return result["error"]
    ours = {side: reason for side, reason in result["failed"].items() if not side.startswith("torchvision")}
    if ours:
        return str(ours)
    return f"differs from torchvision: {result['differences']}" if result.get("agrees") is False else None
