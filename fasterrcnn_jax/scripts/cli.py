"""What the scripts share: the command line, errors without a traceback, the log, the compilation cache."""

import dataclasses
import functools
import io
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import tyro

from fasterrcnn_jax import configs
from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config.rules import unread_fields
from fasterrcnn_jax.config.text import check_types, load_config
from fasterrcnn_jax.errors import InputError, NonFiniteLossError

logger = logging.getLogger(__name__)

CONFIGS = Path(configs.__file__).parent


def parse_config(argv: list[str] | None, *, description: str) -> Config:
    """Returns the configuration of `--config FILE` with every other argument applied to its field.

    Exits with status 2 and one message where an argument is unknown or its value invalid.

    Raises:
      InputError: the file cannot be used.
    """
    argv = sys.argv[1:] if argv is None else argv
    path = _config_path(argv)
    if path is None and {"-h", "--help"} & set(argv):
        path = CONFIGS / "shapes.py"
    if path is None:
        raise InputError("--config FILE is missing, for example --config configs/shapes.py")
    default = load_config(path)

    @dataclasses.dataclass(frozen=True)
    class CommandLine:
        config: Path
        """Python file that builds the configuration; every field below overrides it"""
        fields: Annotated[Config, tyro.conf.arg(name="")]

    parsed = tyro.cli(
        CommandLine,
        description=description,
        args=argv,
        default=CommandLine(path, default),
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands,),
    )
    check_types(parsed.fields, "command line")
    for sentence in unread_fields(parsed.fields):
        logger.warning("%s", sentence)
    return parsed.fields


def _config_path(argv: list[str]) -> Path | None:
    """Finds --config; a name that is no file here is looked up among the configurations we ship."""
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            given = Path(argv[i + 1])
        elif argument.startswith("--config="):
            given = Path(argument.removeprefix("--config="))
        else:
            continue
        shipped = CONFIGS / given.name
        # From any other folder it would be a file that was not asked for.
        by_name = given.parent in (Path("."), Path("configs"))
        return shipped if by_name and not given.exists() and shipped.is_file() else given
    return None


def script(main: Callable[[list[str] | None], None]) -> Callable[[list[str] | None], None]:
    """Wraps a script's main: sets up log and compilation cache, prints an expected error as one line."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        # Names of files and classes may hold what the terminal's encoding has not.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
        logging.getLogger("fasterrcnn_jax").setLevel(logging.INFO)
        # Orbax reports its own housekeeping as warnings, and with tracebacks what we say in one line.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fasterrcnn_jax"
            jax.config.update("jax_compilation_cache_dir", str(cache))
        try:
            main(argv)
        except (InputError, NonFiniteLossError, OSError) as error:
            sys.exit(_one_line(error))

    return run


def _one_line(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
