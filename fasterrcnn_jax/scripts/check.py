"""Looks for faults in labelled images and describes the data set: fasterrcnn-jax check FOLDER

Reads every annotation and decodes every image. The layout and the classes are recognised; the first lines say what was
recognised and why, and how to train on it. The exit status is 0 if nothing is wrong, 1 if something is odd but a rule
says how it is read, and 2 if there is a fault that stops training (--data.faults skip skips it) or if an image is in
two splits.
"""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from fasterrcnn_jax.config import DataConfig, ModelConfig
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.config.text import load_config
from fasterrcnn_jax.data import check, sources
from fasterrcnn_jax.data.anchor_scales import Scales, anchor_sizes, fit_sizes, model_scales, size_iou
from fasterrcnn_jax.data.fitting import fit
from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.layouts import Layout
from fasterrcnn_jax.data.records import Dataset, Finding, ImageRecord, joined_names
from fasterrcnn_jax.data.transforms import network_size
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.drawing import draw_boxes, save_image
from fasterrcnn_jax.ops.anchors import level_cells, strides_of
from fasterrcnn_jax.printing import print_lines
from fasterrcnn_jax.report.data_page import DataSet, write_data_report
from fasterrcnn_jax.scripts import cli

# A sheet shows at most SHEET images, COLUMNS in a row; the longer side of each has SIDE pixels.
SHEET, COLUMNS, SIDE = 40, 5, 320
# Findings whose images are looked for, to come first on a sheet.
SEARCHED = 1000
CAPPED = "Images have more objects than a detector returns"
UNREADABLE = "Splits cannot be read"
NO_CLASS = "No object of the data set has a class name"
# Without --all, at most this many findings of one kind are printed.
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Arguments:
    folder: Annotated[Path, tyro.conf.Positional]
    """folder of labelled images; or a configuration file (.py), whose fields are then flags"""
    sheets: Path | None = None
    """folder to write one sheet per split into: a JPEG of many images with their boxes"""
    report: bool = False
    """write NAME_report.html into the working folder, for a data folder NAME: the data set and its findings, as one
    page that opens from disk"""
    all: bool = False
    """print every finding, not only 20 of each kind"""
    max_pixels: int | None = None
    """report images of more pixels as faults, without decoding them; None: data.max_pixels"""
    follow_links: bool = False
    """open files that symbolic links in the folder place outside of it; otherwise they are refused"""


@cli.script
def main(argv: list[str] | None = None) -> None:
    usage = ("FOLDER | CONFIG.py [--FLAG VALUE ...]",)
    arguments, fields = cli.parse(Arguments, argv=argv, usage=usage, description=__doc__, fields=True)
    is_file = arguments.folder.suffix == ".py"
    links = ["--data.follow_links"] if arguments.follow_links else []
    if is_file or fields:
        config = cli.parse_config([str(arguments.folder), *fields], description=__doc__)
        data = config.data
        data = dataclasses.replace(data, follow_links=data.follow_links or arguments.follow_links)
        data, layout = sources.understood(data)
        splits = (data.train_split, config.train.best_split or data.test_split, data.test_split)
        if layout is not None:
            layout = layout._replace(data=dataclasses.replace(layout.data, class_names=data.class_names))
            print_lines(*layout_lines(layout, shlex.join([str(arguments.folder), *fields, *links])))
            # A training divides the only split.
            if not is_file or (len(layout.splits) == 1 and data.split and data.test_split == "test"):
                splits = layout.splits
        splits = dict.fromkeys(splits)
    else:
        layout = sources.recognise(arguments.folder, follow_links=arguments.follow_links)
        print_lines(*layout_lines(layout, shlex.join([str(arguments.folder), *links])))
        config = load_config(cli.start(silent=True))
        data, splits = layout.data, layout.splits
    max_pixels = data.max_pixels if arguments.max_pixels is None else arguments.max_pixels
    if max_pixels < 1:
        raise InputError(f"--max_pixels must be positive, got {max_pixels}")
    data = dataclasses.replace(data, faults="skip", max_pixels=max_pixels)

    checked, findings = read_all(data, splits)
    for name, split in checked.items():
        print_lines("", f"{name}: {split.dataset.name}", *check.table(split.dataset))
    for one, other in _apart(checked):
        found, compared = check.shared_images(checked[one], checked[other])
        findings += found
        print_lines("", compared)
    datasets = [split.dataset for split in checked.values()]
    model = config.model
    if datasets:
        largest = max(datasets, key=lambda dataset: len(dataset.records))
        with contextlib.suppress(InputError):  # no object to fit anchors to
            model = fit(config, datasets, largest).config.model
        print_lines("", *anchor_lines(largest, model))
    for split in checked.values():
        caps = check.capped_recall(split.dataset.records, model)
        findings += [Finding(CAPPED, f"{split.dataset.name}: {sentence}", False) for sentence in caps]
    print_lines("", *finding_lines(findings, SHOWN if not arguments.all else len(findings)))
    if arguments.sheets is not None:
        for name, split in checked.items():
            print_lines(f"sheet    {write_sheet(arguments.sheets, name, split.dataset)}")
    if arguments.report:
        name = data.root.resolve().name
        unions = _unions(checked)
        datasets_of = {split: one.dataset for split, one in checked.items() if split not in unions}
        # What a union alone has is what its parts have with each other.
        again = {id(finding) for union in unions for finding in checked[union].dataset.findings}
        shown = tuple(finding for finding in findings if id(finding) not in again)
        page = DataSet(name, datasets_of, tuple(sorted(unions)), shown)
        print_lines(f"report   {write_data_report(Path(f'{name}_report.html'), page)}")
    sys.exit(severity(findings))


def layout_lines(layout: Layout, arguments: str) -> list[str]:
    """Returns the lines that say what was recognised in a folder, and the command that trains on it.

    Args:
      arguments: those of the command.
    """
    names = layout.data.class_names
    return [
        f"layout     {layout.name}: {layout.why}",
        *(f"           {note}" for note in layout.notes),
        f"splits     {', '.join(layout.splits)}",
        f"classes    {len(names)}: {joined_names(names)}",
        f"train      fasterrcnn-jax train {arguments}",
    ]


def read_all(data: DataConfig, splits: Iterable[str]) -> tuple[dict[str, check.Checked], list[Finding]]:
    """Returns the splits that can be read, and all findings; a split that cannot be read is a fault among others."""
    findings = []
    if not data.class_names:
        findings.append(Finding(NO_CLASS, str(data.root), True))
        # The faults that are the reason are found whatever the classes are.
        data = dataclasses.replace(data, class_names=("object",))
    checked = {}
    for name in splits:
        try:
            checked[name] = check.check_split(sources.read(data, name))
        except InputError as error:
            findings.append(Finding(UNREADABLE, str(error), True))
    findings += [finding for split in checked.values() for finding in split.dataset.findings]
    return checked, findings


def severity(findings: list[Finding]) -> int:
    """Returns the exit status."""
    return 2 if any(finding.is_fault for finding in findings) else 1 if findings else 0


def finding_lines(findings: list[Finding], shown: int) -> list[str]:
    """Returns the lines to print: faults first, then notes, with a heading and a count for each kind."""
    lines = []
    for sentence, is_fault in sorted({(f.sentence, f.is_fault) for f in findings}, key=lambda kind: not kind[1]):
        places = list(dict.fromkeys(finding.where for finding in findings if finding.sentence == sentence))
        lines.append(f"{'FAULT' if is_fault else 'note'}: {sentence}: {len(places)}")
        lines += [f"  {where}" for where in places[:shown]]
        if len(places) > shown:
            lines.append(f"  and {len(places) - shown} more; --all prints them")
    return lines or ["no fault, and nothing odd"]


def _unions(checked: dict[str, check.Checked]) -> set[str]:
    """Returns the splits that are the union of other splits, like trainval."""
    ids = {name: {record.path for record in split.dataset.records} for name, split in checked.items()}
    return {
        name
        for name in ids
        if len(parts := [part for part in ids if ids[part] < ids[name]]) > 1
        and set().union(*(ids[part] for part in parts)) == ids[name]
    }


def _apart(checked: dict[str, check.Checked]) -> Iterator[tuple[str, str]]:
    """Yields the pairs of splits to compare. A union of other splits is not compared with them."""
    unions = _unions(checked)
    yield from combinations([name for name in checked if name not in unions], 2)


def anchor_lines(dataset: Dataset, model: ModelConfig) -> list[str]:
    """Returns a table of how well anchors fit the boxes.

    The rows are the model's anchors, the best anchors with the same number of scales, and the best of any shape.
    """
    sizes = check.network_sizes(dataset.records, lambda image_hw: network_size(image_hw, model.image))
    if not len(sizes):
        return ["anchors    no fit: the data set has no boxes"]
    rpn, strides = model.rpn, strides_of(model)

    def line(name: str, anchors: np.ndarray, words: str) -> str:
        iou = size_iou(sizes, anchors).max(axis=1)
        return f"{name:10} {iou.mean():8.3f} {(iou >= rpn.fg_iou).mean():10.1%}  {words}"

    cells = np.concatenate([level_cells(model, level) for level in range(len(strides))])
    configured = cells[:, 2:] - cells[:, :2]
    free = fit_sizes(sizes, min(len(configured), len(sizes)))
    ratios = " ".join(f"{ratio:g}" for ratio in rpn.anchor_ratios)
    if rpn.anchor_sizes is None:
        given, best = fitted(rpn.anchor_scales, "model.rpn.anchor_scales"), model_scales(model, sizes)
        rows = [
            line("config", configured, f"anchor_scales {_words(given)}, ratios {ratios}"),
            line("k-means", np.concatenate(anchor_sizes(model, best)), f"--model.rpn.anchor_scales {_words(best)}"),
        ]
    else:
        given = ", ".join(map(_words, rpn.anchor_sizes))
        rows = [line("config", configured, f"anchor_sizes {given}, ratios {ratios}")]
    small = (sizes.min(axis=1) < strides[0]).mean()
    return [
        f"anchors    for {dataset.name} at network scale ({model.image.short_side} to {model.image.long_side} pixels); "
        f"{small:.1%} of the boxes are narrower than a feature cell",
        f"{'':10} {'mean IoU':>8} {f'>= {rpn.fg_iou:g}':>10}",
        *rows,
        line("any shape", free, " ".join(f"{width:.0f}x{height:.0f}" for width, height in free)),
    ]


def _words(scales: Scales) -> str:
    return " ".join(f"{scale:g}" for scale in scales)


def write_sheet(folder: Path, name: str, dataset: Dataset) -> Path:
    """Writes one image that shows many images with their boxes.

    Images with a finding come first; the others are spread evenly over the data set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A part of many findings, because the text is searched for every image.
    told = " ".join(finding.where for finding in dataset.findings[:SEARCHED])
    named = [record for record in dataset.records if f"/{record.path.name}" in told or f"/{record.id}.xml" in told]
    spread = np.linspace(0, len(dataset.records) - 1, min(SHEET, len(dataset.records))).astype(int)
    others = [dataset.records[index] for index in spread]
    chosen = list({record.path: record for record in [*named[: SHEET // 2], *others]}.values())[:SHEET]
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, max(1, rows) * SIDE), "white")
    for number, record in enumerate(chosen):
        row, column = divmod(number, COLUMNS)
        sheet.paste(Image.fromarray(_shown(record, dataset.class_names)), (column * SIDE, row * SIDE))
    path = folder / f"{name.replace('+', '_')}.jpg"
    save_image(path, np.array(sheet))
    return path


def _shown(record: ImageRecord, class_names: tuple[str, ...]) -> np.ndarray:
    image = Image.fromarray(record_pixels(record))
    scale = (SIDE - 8) / max(image.size)
    image = image.resize([max(1, round(side * scale)) for side in image.size])
    captions = [class_names[label - 1] for label in record.labels]
    return draw_boxes(np.array(image), record.boxes * np.float32(scale), record.labels, captions)


if __name__ == "__main__":
    cli.run_as_program(main)
