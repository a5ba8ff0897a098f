"""Prints the parameters, cost and shapes of a configuration's model: fasterrcnn-jax summary configs/voc.py

As in train.py, any field on the command line overrides the field in the file.
"""

import sys

from fasterrcnn_jax.models.summary import format_summary, summarize
from fasterrcnn_jax.printing import print_lines
from fasterrcnn_jax.scripts import cli

# The fields in the short help text.
SHOWN = ("data.class_names", "model.image.canvases", "model.backbone.name", "model.compute_dtype")


@cli.script
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = ["--config", *argv]
    config = cli.parse_config(argv, description=__doc__, usage="CONFIG.py", shown=SHOWN)
    # Without class names, show the network for one class.
    print_lines(*format_summary(summarize(config.model, max(1, len(config.data.class_names)))).split("\n"))


if __name__ == "__main__":
    cli.run_as_program(main)
