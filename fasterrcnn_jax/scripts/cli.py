"""Shared parts of the scripts: the command line, one-line error messages, the log, and the compilation cache."""

import dataclasses
import functools
import io
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, Protocol, runtime_checkable

import jax
import tyro
from PIL import Image

from fasterrcnn_jax import configs
from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config.rules import unread_fields
from fasterrcnn_jax.config.text import check_types, load_config
from fasterrcnn_jax.errors import InputError, NonFiniteLossError
from fasterrcnn_jax.models.detector import Detector, import_class
from fasterrcnn_jax.zoo import load

logger = logging.getLogger(__name__)

ERROR_STATUS = 2
# Not empty where this process is one script: then an error may end it.
_program: list[bool] = []
CONFIGS = Path(configs.__file__).parent


def parse_config(argv: list[str] | None, *, description: str | None) -> Config:
    """Returns the configuration of `--config FILE`, with every other argument applied to its field.

    Exits with status 2 and one message if an argument is unknown or its value is invalid.

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
        """Python file that builds the configuration; the fields below override it"""
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


def load_model(path: Path, backbone: str | None) -> Detector:
    """Returns the detector of a run folder, of one checkpoint, or of a weights file. All scripts load with this.

    Args:
      backbone: the user's `--backbone MODULE:CLASS`. A class that the file names is never imported.
    Raises:
      InputError: the path cannot be loaded, or the model needs a backbone class that is not given.
    """
    return load(path, backbone=None if backbone is None else import_class(backbone, "--backbone"))


def _config_path(argv: list[str]) -> Path | None:
    """Returns the path after --config. If there is no such file, a shipped configuration of that name is used."""
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            given = Path(argv[i + 1])
        elif argument.startswith("--config="):
            given = Path(argument.removeprefix("--config="))
        else:
            continue
        shipped = CONFIGS / given.name
        # A path in any other folder means the user's own file, not a shipped one.
        by_name = given.parent in (Path("."), Path("configs"))
        return shipped if by_name and not given.exists() and shipped.is_file() else given
    return None


@runtime_checkable
class Script(Protocol):
    """The main function of a script. Without `argv` it uses the command line of the process."""

    def __call__(self, argv: list[str] | None = None) -> None: ...


def script(main: Script) -> Script:
    """Wraps a script's main function: sets up the log and the compilation cache, and prints expected errors as one
    line."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        # File and class names may contain characters that the terminal's encoding does not have.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        # Our own limit, max_pixels, has been checked.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
        logging.getLogger("fasterrcnn_jax").setLevel(logging.INFO)
        # Orbax logs its housekeeping as warnings, and prints tracebacks for errors that we report in one line.
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
    stream = sys.stderr
    if _program:
        # Threads of the storage print tracebacks of the same error. They must not come after the line that says it.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        time.sleep(0.2)
    print(f"error: {error}", file=stream, flush=True)
    return ERROR_STATUS


def run_as_program(main: Callable[[], object]) -> NoReturn:
    """Runs a script's main function and ends the process with its exit status.

    After an error the process ends at once. Threads of the storage that still wait, for a full disk for example,
    would hold an ordinary exit for minutes.
    """
    _program.append(True)
    try:
        main()
        status: str | int | None = 0
    except SystemExit as ended:
        status = ended.code
    # Several processes take leave of each other in an ordinary exit.
    if status == ERROR_STATUS and not jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ERROR_STATUS)
    sys.exit(status)
