"""The command line: overrides, help, and errors as one line with exit status 2."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from fasterrcnn_jax import __main__ as verbs
from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config.text import load_config
from fasterrcnn_jax.errors import InputError, NonFiniteLossError
from fasterrcnn_jax.scripts import cli

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "configs" / "shapes.py"


def parse(*argv):
    return cli.parse_config(["--config", str(SHAPES), *argv], description="Trains.")


def refused(capsys, *argv):
    """Returns the text that is printed for arguments that end the program with status 2."""
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out and "Traceback" not in printed.err
    return " ".join(printed.err.replace("│", " ").split())


def test_without_overrides_the_file_is_the_configuration():
    assert parse() == load_config(SHAPES)


def test_overrides_change_their_field_and_nothing_else():
    default = load_config(SHAPES)
    parsed = parse(
        *("--train.learning_rate", "0.5"),
        *("--model.rpn.anchor_scales", "0.5", "1"),
        *("--model.image.canvases", "160", "224", "224", "160", "224", "224"),
        *("--data.class_names", "a b", "c"),
        *("--run", "elsewhere"),
        *("--model.backbone.norm=frozen_batch", "--data.flip=none", "--data.no_keep_empty"),
    )
    expected = dataclasses.replace(
        default,
        run=Path("elsewhere"),
        train=dataclasses.replace(default.train, learning_rate=0.5),
        data=dataclasses.replace(default.data, class_names=("a b", "c"), flip="none", keep_empty=False),
        model=dataclasses.replace(
            default.model,
            rpn=dataclasses.replace(default.model.rpn, anchor_scales=(0.5, 1.0)),
            image=dataclasses.replace(default.model.image, canvases=((160, 224), (224, 160), (224, 224))),
            backbone=dataclasses.replace(default.model.backbone, norm="frozen_batch"),
        ),
    )
    assert parsed == expected


def test_a_value_without_effect_gives_a_warning(caplog):
    parse("--model.box_head.dropout", "0.1")
    assert caplog.messages == ["model.box_head.dropout = 0.1 changes nothing with resnet18"]
    caplog.clear()
    parse()
    assert caplog.messages == []


@pytest.mark.parametrize(
    "argv, expected",
    [
        (("--train.learning_rte", "0.1"), "--train.learning_rte.*Perhaps you meant.*--train.learning_rate"),
        (("--trian.steps", "5"), "--trian.steps.*--train.steps"),
        (("--train.steps", "0"), "steps must be positive, got 0"),
        (("--train.steps", "many"), "--train.steps.*'many'"),
        (("--train.steps",), "--train.steps"),
        (("--train.warmup_steps", "99999"), "warmup_steps.*99999"),
        (("--model.backbone.name", "resnet19"), "'resnet19'.*--model.backbone.name.*'resnet18', 'resnet34'"),
        (("--model.image.canvases", "160", "224", "160"), "--model.image.canvases"),
        (("--train.seed", "-1"), "seed.*got -1"),
        (("stray",), "stray"),
    ],
)
def test_a_bad_argument_is_named(capsys, argv, expected):
    assert re.search(expected, refused(capsys, *argv))


def fields_of(cls, prefix=""):
    for field in dataclasses.fields(cls):
        types = (field.type, *getattr(field.type, "__args__", ()))  # the second of `ShapesConfig | None`
        inner = next((of for of in types if dataclasses.is_dataclass(of)), None)
        if inner:
            yield from fields_of(inner, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


PYRAMID = SHAPES.with_name("coco_resnet50_fpn.py")


@pytest.mark.parametrize(
    "argv", [["--config", str(SHAPES), "--help_all"], ["--config", str(PYRAMID), "--help_all"], ["--help_all"]]
)
def test_help_all_lists_every_field_with_its_default(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        cli.parse_config(argv, description="Trains.")
    assert not caught.value.code
    text = capsys.readouterr().out
    # A part that is None, such as the pyramid of a network with one feature map, has no fields in the help text.
    absent = {} if "coco_resnet50_fpn.py" in str(argv) else {"model.fpn."}
    absent = absent if "shapes.py" in str(argv) else {*absent, "data.shapes."}
    names = [name for name in fields_of(Config) if not name.startswith(tuple(absent))]
    assert len(names) > 50
    for name in names:
        leaf = name.rsplit(".", 1)[-1]
        options = (f"--{name} ", f"--{name},", name.replace(leaf, f"no_{leaf}"))
        assert any(option in text for option in options), name
    assert text.count("(default: ") >= len(names)
    assert "schedule steps: numbers of optimizer steps after which" in text


def test_a_shipped_config_is_found_by_name_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("shapes.py", "configs/shapes.py"):
        for argv in (["--config", name], [f"--config={name}"]):
            assert cli.parse_config(argv, description="") == load_config(SHAPES)


def test_an_existing_file_wins_over_a_shipped_config_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes.py").write_text(
        f"{SHAPES.read_text()}\nimport dataclasses\nconfig = dataclasses.replace(config, run=Path('mine'))\n"
    )
    assert cli.parse_config(["--config", "shapes.py"], description="").run == Path("mine")


@pytest.mark.parametrize("name", ["elsewhere/shapes.py", "/shapes.py", "shape.py", "configs", "."])
def test_a_missing_config_file_is_not_replaced_by_a_shipped_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        cli.parse_config(["--config", name], description="")


@pytest.mark.parametrize("argv", [[], ["--train.steps", "3"], ["--config"]])
def test_a_missing_config_argument_is_an_error(argv):
    with pytest.raises(InputError, match="give a folder of labelled images, or --config FILE"):
        cli.parse_config(argv, description="")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["somewhere", "--help"], ["--config", str(SHAPES), "--help"]])
def test_help_shows_the_fields_that_most_runs_set(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        cli.parse_config(argv, description="Trains.")
    assert not caught.value.code
    text = capsys.readouterr().out
    assert all(f"--{name} (default: " in text for name in cli.IMPORTANT) and "--help_all" in text
    assert len(text.splitlines()) < 80 and "pre_nms_top_n" not in text


def test_a_leading_folder_is_the_data_of_the_configuration_for_folders(tmp_path):
    parsed = cli.parse_config([str(tmp_path), "--train.epochs", "3"], description="")
    assert parsed.data.root == tmp_path and parsed.data.layout == "auto" and parsed.train.epochs == 3
    parsed = cli.parse_config([str(tmp_path), "--config", str(SHAPES)], description="")
    assert parsed.data.root == tmp_path and parsed.model == load_config(SHAPES).model


@dataclasses.dataclass(frozen=True)
class Subject:
    files: tuple[Path, ...]
    """files to read"""
    deep: bool = False
    """read folders too"""


def subject(*argv):
    return cli.parse(
        Subject, argv=list(argv), usage=("FILES [--deep]",), description="Reads.\n\nAll.", subject="--files"
    )


def test_the_subject_of_a_verb_leads_without_its_flag():
    expected = Subject((Path("a"), Path("b")), True)
    assert subject("a", "b", "--deep") == subject("--files", "a", "b", "--deep") == expected
    assert subject("--deep", "--files", "a", "b") == expected


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_a_verb_is_its_usage_and_each_field(capsys, monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["fasterrcnn-jax read"])
    with pytest.raises(SystemExit) as ended:
        subject("a", flag)
    assert not ended.value.code
    assert capsys.readouterr().out.splitlines() == [
        "usage: fasterrcnn-jax read FILES [--deep]",
        "",
        "Reads.",
        "",
        "All.",
        "",
        "  --files (required)",
        "      files to read",
        "  --deep (default: False)",
        "      read folders too",
    ]


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_every_verb_has_a_help_of_the_same_look(capsys, monkeypatch, restored_logging, verb):
    monkeypatch.setattr(sys, "argv", [""])
    with pytest.raises(SystemExit) as ended:
        verbs.main([verb, "-h"])
    lines = capsys.readouterr().out.splitlines()
    assert not ended.value.code and len(lines) < 80
    assert re.match(rf"usage: fasterrcnn-jax {verb} \w+", lines[0])
    assert any(re.match(r"  (--\w|[A-Z]+$)", line) for line in lines), lines


def test_a_leading_configuration_file_is_the_configuration():
    assert cli.parse_config([str(SHAPES)], description="") == load_config(SHAPES)


@pytest.fixture
def restored_logging():
    with tiny.restored_logging():
        yield


@pytest.mark.parametrize("error", [InputError("a file"), NonFiniteLossError("step 3")])
def test_expected_errors_end_a_script_with_one_line(capsys, restored_logging, error):
    @cli.script
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_unexpected_error_keeps_its_traceback(restored_logging):
    @cli.script
    def main(argv=None):
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        main([])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train.py", "--config", "absent.py"], "error: --config absent.py: no such file"),
        (["train.py", "--config", "folder.py", "--data.root", "nowhere", "--data.class_names", "a"], "error: nowhere"),
        (["evaluate.py", "--ckpt", "nowhere"], "error: nowhere: no such f"),
        (["-m", "fasterrcnn_jax", "train", "--config", "bad.py"], "error: --config bad.py: SyntaxError"),
    ],
    ids=["config", "root", "checkpoint", "verb"],
)
def test_a_program_reports_a_fault_in_one_line(tmp_path, argv, message):
    (tmp_path / "bad.py").write_text("def (:\n")
    script = [argv[0]] if argv[0] == "-m" else [str(ROOT / argv[0])]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *script, *argv[1:]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert re.match(message, done.stderr)


def test_verbs_run_the_scripts_and_unknown_ones_are_refused(capsys):
    assert verbs.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in verbs.VERBS)
    assert verbs.main(["trian"]) == 2 and "unknown verb 'trian'" in capsys.readouterr().err
    assert verbs.main([]) == 2 and "usage" in capsys.readouterr().err


STUCK = """
import threading, time
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.scripts import cli


@cli.script
def main(argv=None):
    threading.Thread(target=time.sleep, args=(60,)).start()  # as a thread of the storage that waits for a full disk
    raise InputError("file: no space left")


cli.run_as_program(main)
"""


def test_a_program_ends_after_an_error_even_if_a_thread_waits():
    command = [sys.executable, "-c", STUCK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "error: file: no space left")
