"""`python -m fasterrcnn_jax VERB ...`, installed as `fasterrcnn-jax`: the one place that names the verbs.

A verb runs the script of its name; of train and evaluate that is the very file at the top of the repository.
"""

import importlib
import sys

VERBS = {
    "train": "trains a detector and evaluates it",
    "evaluate": "evaluates a checkpoint",
    "check": "looks for faults in labelled images and describes them",
    "predict": "finds objects in a folder of images",
    "tfds": "stores VOC or COCO for TFDS, without TensorFlow",
    "weights": "shows and converts files of weights",
    "summary": "prints parameters, cost and shapes of a model",
}
PROGRAM = "fasterrcnn-jax"
USAGE = f"usage: {PROGRAM} {{{','.join(VERBS)}}} ..."


def main(argv: list[str] | None = None) -> int:
    """Runs the script that the first argument names on the others; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    verb, rest = (argv[0], argv[1:]) if argv else (None, [])
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = [f"  {name:{width}}  {meaning}" for name, meaning in VERBS.items()]
        print("\n".join([USAGE, "", *lines, "", f"{PROGRAM} VERB --help lists the arguments of a verb"]))
        return 0
    if verb not in VERBS:
        problem = "" if verb is None else f"\nerror: unknown verb {verb!r}"
        print(USAGE + problem, file=sys.stderr)
        return 2
    # What the script's own usage and errors call the program.
    sys.argv[0] = f"{PROGRAM} {verb}"
    importlib.import_module(f"fasterrcnn_jax.scripts.{verb}").main(rest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
