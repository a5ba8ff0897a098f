"""Detects objects in images: fasterrcnn-jax predict IMAGES --ckpt runs/shapes --out OUT

IMAGES are image files and folders of images; they are --images without the flag. Writes into OUT: detections.json in
COCO's result format, with file names as image_id; classes.txt, where line k names category_id k; and images/, with the
boxes drawn on each image. Images are rotated as their EXIF data says.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from fasterrcnn_jax.atomic_write import write_atomically
from fasterrcnn_jax.config import Config, DataConfig
from fasterrcnn_jax.data.images import record_pixels
from fasterrcnn_jax.data.records import Prediction
from fasterrcnn_jax.data.sources import open_images
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.evaluation.files import write_coco_json
from fasterrcnn_jax.inference.dataset import detect_dataset
from fasterrcnn_jax.inference.drawing import draw, save_image
from fasterrcnn_jax.printing import print_lines, printable
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.training import checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    images: tuple[Path, ...]
    """image files, and folders whose images are read; no labels are needed"""
    ckpt: Path
    """run folder (uses its best checkpoint), one checkpoint folder RUN/checkpoints/STEP, or a weights file"""
    backbone: str | None = None
    """MODULE:CLASS of your own backbone, if the model was trained with one; the class is imported"""
    out: Path
    """folder for the results"""
    faults: Literal["error", "skip"] = "error"
    """what to do with an image that cannot be decoded: stop with an error, or skip it with a warning; skip decodes
    every image twice"""
    max_pixels: int = DataConfig.max_pixels
    """largest number of pixels (width times height) of an image; a larger one is refused before it is decoded"""
    batch_size: int = 1
    """number of images detected at once"""
    score_threshold: float = 0.5
    """detections with a lower score are not drawn; detections.json contains all detections"""
    implementation: Literal["xla", "mosaic"] | None = None
    """implementation of NMS and region features: xla: plain JAX; mosaic: GPU kernels; None: GPU kernels where they can
    run"""


@cli.script
def main(argv: list[str] | None = None) -> None:
    usage = ("IMAGES --ckpt RUN --out OUT [--FLAG VALUE ...]",)
    arguments = cli.parse(Arguments, argv=argv, usage=usage, description=__doc__, subject="--images")
    if arguments.batch_size < 1:
        raise InputError(f"--batch_size must be positive, got {arguments.batch_size}")
    if arguments.max_pixels < 1:
        raise InputError(f"--max_pixels must be positive, got {arguments.max_pixels}")
    model = cli.load_model(arguments.ckpt, arguments.backbone)
    if arguments.ckpt.is_dir():
        check_detects(arguments.ckpt, checkpoint.load_run_config(arguments.ckpt))
    dataset = open_images(arguments.images, model.class_names, faults=arguments.faults, max_pixels=arguments.max_pixels)
    detections = detect_dataset(
        model, dataset, batch_size=arguments.batch_size, implementation=arguments.implementation
    )

    drawn_images = arguments.out / "images"
    write_coco_json(arguments.out / "detections.json", detections, dataset)
    write_atomically(arguments.out / "classes.txt", "".join(f"{printable(name)}\n" for name in model.class_names))
    for record, found in zip(dataset.records, detections, strict=True):
        names = tuple(model.class_names[label - 1] for label in found.labels)
        prediction = Prediction(found.boxes, found.scores, found.labels, names)
        drawn = draw(record_pixels(record), prediction, score_threshold=arguments.score_threshold)
        # Keep the whole file name: the folder may hold both a.jpg and a.png.
        save_image(drawn_images / f"{record.id}.png", drawn)
    print_lines(f"images     {len(dataset.records)}", f"files      {arguments.out}")


def check_detects(ckpt: Path, config: Config) -> None:
    """Raises InputError if a part of the detector was not trained in its run."""
    if config.train.scheme == "fast_rcnn":
        raise InputError(
            f"--ckpt {ckpt}: this is a box head trained alone, without an RPN; fasterrcnn-jax evaluate detects in "
            "given proposals"
        )
    if config.train.scheme == "rpn":
        raise InputError(f"--ckpt {ckpt}: this is an RPN trained alone, which detects no classes")


if __name__ == "__main__":
    cli.run_as_program(main)
