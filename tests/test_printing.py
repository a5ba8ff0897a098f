"""Names of strangers are printed so that they cannot steer a terminal, forge a line, or hide."""

import ast
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import unicodedata

import bad_cases
import foreign_files
import numpy as np
import pytest
import safetensors.numpy
import test_imports
import test_tfds
import test_weights
import tiny
from PIL import Image

from fasterrcnn_jax import __main__ as verbs
from fasterrcnn_jax import printing
from fasterrcnn_jax.data.records import ImageDetections
from fasterrcnn_jax.errors import InputError, NonFiniteLossError
from fasterrcnn_jax.evaluation.report import evaluate_detections, format_table
from fasterrcnn_jax.inference.drawing import draw_boxes
from fasterrcnn_jax.printing import printable
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.structures import LossTerms
from fasterrcnn_jax.training.progress import say
from fasterrcnn_jax.training.replay import Examined, format_examined

FORGED = "error: all is well"
# For places that may hold any character; XML has no C0 control characters and no lone surrogates.
EVIL = f"x\x1b[2J\x07\r\n{FORGED}\u202e\u200b\x9b2J\ud800\u2028"
XML = f"x\n{FORGED}\u202e\u200b\x9b2J\u2028"
LATIN = f"x\x1b[2J\x07\r\n{FORGED}\x9b2J"  # for Python 2
NAME = f"x\x1b[2J\x07\r\n{FORGED}\u202e\u200b.png"


def check_harmless(text):
    """Checks that printed text has no character that is not shown, and that no line is forged."""
    hidden = {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert not hidden
    assert FORGED in " ".join(text.replace("│", " ").split()), "the name is not in the output, so nothing is tested"
    assert not any(line.strip(" │").startswith(FORGED) for line in text.split("\n"))


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[31m\x07\t\r\n", r"\x1b[31m\x07\t\r\n"),
        ("\x7f\x85\x9b", r"\x7f\x85\x9b"),
        ("a\u202eb\u2066\u200b\ufeff\u00ad", r"a\u202eb\u2066\u200b\ufeff\xad"),
        ("\u2028\u2029", r"\u2028\u2029"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\udce9.jpg"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_characters_that_are_not_shown_are_escaped(text, shown):
    assert printable(text) == shown and printable(shown) == shown


def test_text_of_any_language_emoji_and_backslashes_stay():
    text = "Fußgänger 行人 راكب دراجة पैदल 👍🏽 ☎️ \U0001fae8 a\u00a0b\u3000c C:\\new"
    assert printable(text) == text


@pytest.mark.parametrize("kind", [InputError, NonFiniteLossError])
def test_the_message_of_an_error_is_printable_for_a_caller_who_catches_it(kind):
    assert str(kind(f"{EVIL}: bad")) == f"{printable(EVIL)}: bad"


def voc_class(root):
    bad_cases.write_voc(root)
    text = (root / "Annotations/odd.xml").read_text()
    (root / "Annotations/odd.xml").write_text(text.replace("square", XML, 1))
    return ["check", root]


def voc_class_in_training(*class_names):
    def arguments(root):
        voc_class(root)
        config = tiny.config(root.parent)
        data = dataclasses.replace(config.data, root=root, test_split="train", class_names=class_names)
        # It ends before the first step, after it has said what it understood.
        config = dataclasses.replace(config, data=data, init=root / "absent")
        return ["train", "--config", tiny.write_config(root / "mine.py", config)]

    return arguments


def voc_identifier(root):
    bad_cases.write_voc(root)
    (root / "ImageSets/Main/train.txt").write_text(f"ok\nx\x1b[2J\x07{FORGED}\u202e\n")
    return ["check", root]


def voc_image(root):
    bad_cases.write_voc(root)
    text = (root / "Annotations/odd.xml").read_text()
    (root / "Annotations/odd.xml").write_text(text.replace("odd.png", XML, 1))
    return ["check", root]


def coco(change):
    def write(root):
        bad_cases.write_coco(root)
        content = bad_cases.instances()
        change(content)
        (root / "annotations").mkdir()
        (root / "annotations/instances_images.json").write_text(json.dumps(content))
        return ["check", root]

    return write


def images(root):
    root.mkdir()
    Image.new("RGB", (9, 9)).save(root / "fine.png")
    (root / NAME).write_bytes(b"no image")
    (root / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    return ["predict", "--ckpt", root.parent / "run", "--images", root, "--out", root.parent / "out"]


def inspect(write):
    def arguments(root):
        root.mkdir()
        write(root / "weights")
        return ["weights", "inspect", root / "weights"]

    return arguments


def convert(root):
    """The file to write has a hostile name."""
    root.mkdir()
    foreign_files.write_zip(root / "fpn.pth", test_weights.fpn_arrays())
    return ["weights", "convert", root / "fpn.pth", root / NAME.replace(".png", ".safetensors")]


def data_folder(root):
    bad_cases.write_voc(root / NAME)
    return ["check", root / NAME]


def stored_model(field, value):
    """A weights file whose stored model has this value in this field."""

    def arguments(root):
        root.mkdir()
        model = dataclasses.asdict(tiny.MODEL) | {field: value}
        stored = {"class_names": json.dumps(["a"]), "model_config": json.dumps(model)}
        safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, root / "a.safetensors", stored)
        return ["predict", "--ckpt", root / "a.safetensors", "--images", root, "--out", root]

    return arguments


def run_folder(field, value):
    """A run folder whose checkpoint has a configuration with this value in this field."""

    def arguments(root):
        strings = shutil.copytree(root.parent / "run", root) / "checkpoints/2/meta/_strings.json"
        meta = json.loads(strings.read_text())
        config = json.loads(meta["config"])
        part, *rest = config, *field.split(".")
        for name in rest[:-1]:
            part = part[name]
        part[rest[-1]] = value
        texts = {name: text for name, text in meta.items() if name != "digest"} | {"config": json.dumps(config)}
        digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
        strings.write_text(json.dumps(texts | {"digest": digest}))
        bad_cases.write_voc(root / "voc")
        return ["evaluate", "--ckpt", root, "--root", root / "voc"]

    return arguments


def tfds_feature(root):
    # The root is a folder of TFDS with a data set "mine" whose features have a hostile name.
    folder = test_tfds.store(root, [test_tfds.example(*test_tfds.OBJECTS)])
    content = json.loads((folder / "features.json").read_text())
    content["featuresDict"]["features"][EVIL] = {"pythonClassName": EVIL}
    (folder / "features.json").write_text(json.dumps(content))
    path = tiny.write_config(root / "mine.py", tiny.config(root.parent))
    return ["train", "--config", path, "--data.root", root, "--data.layout", "tfds", "--data.tfds_name", "mine"]


def refused_argument(*argv):
    return lambda root: [*argv, EVIL.replace("\ud800", "")]


def safe(path):
    safetensors.numpy.save_file({XML: np.ones(2, np.float32)}, path)


def write_global(path):
    """A pickle that names the function `system` of a module with a hostile name."""
    names = (b"X" + len(name).to_bytes(4, "little") + name for name in (XML.encode(), b"system"))
    path.write_bytes(b"\x80\x04" + b"".join(names) + b"\x93.")


SOURCES = {
    "VOC class name in the table": voc_class,
    "VOC class name that is not configured": voc_class_in_training("square", "disc"),
    "VOC class name where none is configured": voc_class_in_training(),
    "VOC image id": voc_identifier,
    "VOC file name in XML": voc_image,
    "COCO category": coco(lambda content: content["categories"][0].update(name=EVIL)),
    "COCO file name": coco(lambda content: content["images"][0].update(file_name=EVIL)),
    "COCO value": coco(lambda content: content["annotations"][0].update(bbox=EVIL)),
    "file name": images,
    "name of a file to write": convert,
    "name of a data set's folder": data_folder,
    "name of a folder that does not exist": lambda root: [
        "predict",
        "--ckpt",
        root / EVIL,
        "--images",
        root,
        "--out",
        root,
    ],
    "tensor name in .safetensors": inspect(safe),
    "tensor name in .pth": inspect(lambda path: foreign_files.write_zip(path, {EVIL: np.ones(2, np.float32)})),
    "tensor name in .pkl": inspect(lambda path: foreign_files.write_python2_pkl(path, {LATIN: np.ones(2, np.float32)})),
    "module name in a pickle": inspect(write_global),
    "value in a configuration": run_folder("model.backbone.name", EVIL),
    "name of a field": run_folder(EVIL, 1),
    "backbone class": run_folder("model.backbone.own", f"{EVIL}:Net"),
    "split in a configuration": run_folder("data.test_split", EVIL),
    "model of a weights file": stored_model(EVIL, 1),
    "TFDS feature": tfds_feature,
    "verb": refused_argument(),
    "file name as an argument too many": refused_argument("evaluate", "--ckpt", "run"),
    "file name as a value": refused_argument("evaluate", "--ckpt", "run", "--batch_size"),
    "file name as a field": refused_argument("train", "--config", "shapes.py"),
    "file name as a second folder": refused_argument("check", "root"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_hostile_name_cannot_steer_the_terminal_or_forge_a_line(source, tmp_path, small_run, capsys):
    if source == "TFDS feature":
        pytest.importorskip("tensorflow_datasets")
    (tmp_path / "run").symlink_to(small_run)
    arguments = [str(argument) for argument in SOURCES[source](tmp_path / "root")]
    capsys.readouterr()
    with tiny.restored_logging():
        try:
            verbs.main(arguments)
        except SystemExit as ended:
            assert ended.code in (0, 1, 2, 3)  # 3: predict has skipped files that cannot be read
    printed = capsys.readouterr()
    check_harmless(printed.out + printed.err)


def test_a_log_record_is_one_printable_line(capsys):
    @cli.script
    def main(argv=None):
        logging.getLogger("fasterrcnn_jax.data").info("%s: 3 images", EVIL)
        logging.getLogger("another").warning(EVIL)

    with tiny.restored_logging():
        main([])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{printable(EVIL)}: 3 images", printable(EVIL)]


@pytest.mark.parametrize("error", [OSError(EVIL), FileNotFoundError(2, EVIL, EVIL), InputError(EVIL)])
def test_the_line_of_an_error_is_one_printable_line(capsys, error):
    @cli.script
    def main(argv=None):
        raise error

    with tiny.restored_logging(), pytest.raises(SystemExit):
        main([])
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    check_harmless(said)


def test_a_line_above_the_progress_bar_is_printable(capsys):
    say(f"continuing {EVIL}")
    assert capsys.readouterr().out == f"continuing {printable(EVIL)}\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(printing, "LINE_EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    # An evaluation within a training.
    with (
        printing.progress_bar(title="", total=9, unit="step"),
        printing.progress_bar(title="voc", total=3, unit="image") as bar,
    ):
        bar.delay = bar.mininterval = 0.0
        for _ in range(3):
            bar.update()
    said = capsys.readouterr().err
    if is_terminal:
        assert "\r" in said and "|" in said
    else:
        assert "\r" not in said and "\x1b" not in said
        assert re.fullmatch(r"((0 of 9 steps|voc: \d of 3 images), 00:00\n)+", said) and "voc: 3 of 3" in said
        # The bar refreshes again where it closes.
        lines = said.splitlines()
        assert all(one != other for one, other in zip(lines, lines[1:], strict=False))


def test_hostile_names_keep_the_columns_of_a_table(tmp_path, capsys):
    """A name is made printable before its width counts, and it cannot add a row."""
    data = tiny.dataset(tmp_path, [(np.zeros((9, 9, 3), np.uint8), [[1, 1, 5, 5]], [1])], class_names=(EVIL, "disc"))
    nothing = ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    metrics = evaluate_detections([nothing], data)
    table = format_table(data, metrics.voc07, metrics.voc_area, metrics.coco).split("\n")
    assert len(table) == 5 and len({len(line) for line in table[:4]}) == 1
    check_harmless("\n".join(table))
    rows = [Examined(name, LossTerms(*[np.float32(1)] * 4), np.float32(1), None) for name in (EVIL, "fine")]
    _, *table, _ = format_examined(7, rows).split("\n")
    assert len(table) == 3 and len({len(line) for line in table}) == 1
    check_harmless("\n".join(table))
    foreign_files.write_zip(tmp_path / "a.pth", {name: np.ones(2, np.float32) for name in (EVIL, "fine")})
    with tiny.restored_logging():
        verbs.main(["weights", "inspect", str(tmp_path / "a.pth")])
    assert len({line.index("  float32  2") for line in capsys.readouterr().out.split("\n")[-3:-1]}) == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_name_that_the_terminal_cannot_show_is_escaped(encoding, tmp_path, monkeypatch):
    """PYTHONIOENCODING gives streams like these."""
    root = tmp_path / "voc"
    bad_cases.write_voc(root)
    for path in root.glob("Annotations/*.xml"):
        path.write_text(path.read_text().replace("square", "\u884c\u4eba \U0001f6b4"), encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    with tiny.restored_logging(), pytest.raises(SystemExit) as ended:
        verbs.main(["check", str(root)])
    out.flush()
    assert ended.value.code in (0, 1, 2)
    assert rb"\u884c\u4eba \U0001f6b4 " in out.buffer.getvalue()


def test_a_caption_with_line_breaks_is_drawn():
    image = np.zeros((40, 60, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[5, 5, 30, 30]], np.float32), np.array([1], np.int32), [EVIL])
    assert drawn.any()


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_every_module_prints_with_the_one_function():
    """Outside it, only the line of an error is printed, and the titles of progress bars are made printable."""
    prints, titles = set(), set()
    for name, path in test_imports.MODULES.items():
        for function, call in calls(path):
            if function in ("print", "sys.stdout.write", "sys.stderr.write", "tqdm.write"):
                prints.add((name, function))
            if function == "tqdm":
                titles |= {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "desc"}
    assert prints == {
        ("printing", "print"),
        ("scripts.cli", "print"),
        ("__main__", "print"),
        ("training.progress", "tqdm.write"),
    }
    assert titles and all(re.match(r"(f'\{)?printable\(|'", title) for title in titles)
