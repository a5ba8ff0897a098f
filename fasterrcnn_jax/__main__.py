"""The command `python -m fasterrcnn_jax VERB ...`, installed as `fasterrcnn-jax`, and the list of its verbs.

A verb runs the script of the same name in fasterrcnn_jax/scripts. For train and evaluate, that script is the file at
the top of the repository.
"""

import importlib
import sys
from typing import NoReturn

from fasterrcnn_jax.printing import print_lines

VERBS = {
    "train": "trains a detector and evaluates it",
    "evaluate": "evaluates a checkpoint",
    "check": "looks for faults in labelled images and describes the data set",
    "predict": "detects objects in images",
    "export": "writes a detector as a program that JAX runs without this package",
    "tfds": "stores VOC or COCO for TFDS, without TensorFlow",
    "weights": "shows and converts weights files",
    "summary": "prints the parameters, cost and shapes of a model",
}
PROGRAM = "fasterrcnn-jax"
USAGE = f"usage: {PROGRAM} {{{','.join(VERBS)}}} SUBJECT [--FLAG VALUE ...]"


def main(argv: list[str] | None = None) -> int:
    """Runs the script that the first argument names, with the other arguments; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    verb, rest = (argv[0], argv[1:]) if argv else (None, [])
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = [f"  {name:{width}}  {meaning}" for name, meaning in VERBS.items()]
        print_lines(USAGE, "", *lines, "", f"{PROGRAM} VERB --help shows the arguments of a verb")
        return 0
    if verb not in VERBS:
        problem = "" if verb is None else f"\nerror: unknown verb {verb!r}"
        print(USAGE + problem, file=sys.stderr)
        return 2
    # The name of the program in the script's own usage and error messages.
    sys.argv[0] = f"{PROGRAM} {verb}"
    importlib.import_module(f"fasterrcnn_jax.scripts.{verb}").main(rest)
    return 0


def program() -> NoReturn:
    """Runs `main` as the installed command."""
    if len(sys.argv) > 1 and sys.argv[1] in VERBS:
        importlib.import_module("fasterrcnn_jax.scripts.cli").run_as_program(main)
    sys.exit(main())


if __name__ == "__main__":
    program()
