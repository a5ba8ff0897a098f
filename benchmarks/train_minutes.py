"""Trains our detector and torchvision's on a folder of images for the same time, both from random weights.

    python benchmarks/train_minutes.py --data FOLDER [--minutes 1.2] [--limit 8.6] [--config FILE.py] [--out FILE.json]

Our detector is a configuration, configs/folder.py by default. Their detector is torchvision's ResNet-18-FPN with group
norm and random weights on images of the same size; its anchors are half as large as by default, because the images are
small. Both read the same batches from our loader, have the same optimizer, learning-rate schedule and clipping, and are
evaluated by our evaluator. The clock counts only the steps and their data. It stops for compilation (the first step of
each canvas) and evaluation. A few trial steps, which are discarded, determine how many steps fit. The report has the
loss and AP50 during training. The script exits with status 1 if our side fails, or if the time ends before a side
does; the points of its curve so far are in the report.
"""

import argparse
import functools
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import measure
import numpy as np
from isolated import NO_TIME, run_child, run_isolated

from fasterrcnn_jax.config import Config
from fasterrcnn_jax.config.families import resnet_fpn
from fasterrcnn_jax.config.text import load_config
from fasterrcnn_jax.data import loader, sources
from fasterrcnn_jax.data.records import Dataset, ImageDetections
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.evaluation.report import evaluate_detections
from fasterrcnn_jax.inference.dataset import detect_dataset
from fasterrcnn_jax.inference.prediction import to_original
from fasterrcnn_jax.models.detector import create_detector
from fasterrcnn_jax.processes import AXIS, replicate
from fasterrcnn_jax.structures import Batch, Detections
from fasterrcnn_jax.training.optimizer import create_optimizer, learning_rate_schedule
from fasterrcnn_jax.training.preparation import prepare
from fasterrcnn_jax.training.state import merge
from fasterrcnn_jax.training.step import (
    create_state,
    data_parallel,
    make_train_step,
)

FOLDER_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "folder.py"
CALIBRATION = 10  # steps
POINTS = 4  # of the curve


class Trainer(NamedTuple):
    """A detector and its training step."""

    step: Callable[[Batch], Callable[[], float]]  # starts a step; what it returns waits for the loss
    detect: Callable[[Dataset], list[ImageDetections]]


def our_trainer(config: Config) -> Trainer:
    train = config.train
    model = create_detector(config.model, config.data.class_names, seed=train.seed)
    optimizer = create_optimizer(train)
    graphdef, state = create_state(model, optimizer, seed=train.seed)
    devices = jax.local_devices()[:1]
    step = make_train_step(graphdef, optimizer, axis_name=AXIS, implementation=train.implementation)
    mapped = data_parallel(step, devices=devices)
    holder = [replicate(state, devices=devices)]

    def run(batch):
        holder[0], metrics = mapped(holder[0], batch)
        return lambda: float(sum(metrics[:4]))

    def detect(dataset):
        model = merge(graphdef, holder[0])
        return detect_dataset(model, dataset, batch_size=train.batch_size, implementation=train.implementation)

    return Trainer(run, detect)


def their_config(config: Config) -> Config:
    """Returns the configuration of torchvision's detector, with our image size, smaller anchors and group norm."""
    image = config.model.image
    canvases = tuple(tuple(-(-side // 32) * 32 for side in canvas) for canvas in image.canvases)
    model = resnet_fpn(18, norm="group")
    rpn = replace(model.rpn, anchor_base=model.rpn.anchor_base / 2)
    return replace(config, model=replace(model, image=replace(image, canvases=canvases), rpn=rpn))


def their_trainer(config: Config) -> Trainer:
    import torchvision_detectors as theirs

    torch, device, train = theirs.torch, measure.torch_device(), config.train
    model = theirs.create(config.model, len(config.data.class_names))
    rates = np.asarray(jax.vmap(learning_rate_schedule(train))(jnp.arange(train.steps))).tolist()
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    # A trial may take more steps than the schedule has.
    taken = itertools.chain(rates, itertools.repeat(rates[-1]))

    def inputs(batch):
        rows = np.flatnonzero(batch.image_valid)
        images = torch.from_numpy(batch.images[rows]).permute(0, 3, 1, 2).contiguous().to(device)
        return rows, images, [tuple(int(side) for side in batch.image_hw[row]) for row in rows]

    def run(batch):
        model.train()
        rows, images, sizes = inputs(batch)
        targets = []
        for row in rows:
            boxes, labels, valid = (x[row] for x in batch.ground_truth)
            arrays = {"boxes": boxes[valid], "labels": labels[valid].astype(np.int64)}
            targets.append({name: torch.from_numpy(x).to(device) for name, x in arrays.items()})
        rate = next(taken)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = sum(theirs.forward(model, images, sizes, targets).values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm or math.inf)
        optimizer.step()
        return lambda: float(loss.detach())

    def detect(dataset):
        model.eval()
        results = [None] * len(dataset.records)
        for batch in loader.evaluation_batches(dataset, config.model.image, batch_size=train.batch_size):
            rows, images, sizes = inputs(batch)
            with torch.inference_mode():
                found = theirs.forward(model, images, sizes)
            for row, one in zip(rows.tolist(), found, strict=True):
                index = int(batch.image_index[row])
                boxes, scores, labels = (one[name].cpu().numpy() for name in ("boxes", "scores", "labels"))
                alone = (boxes[None], scores[None], labels[None].astype(np.int32), np.ones((1, len(scores)), bool))
                results[index] = to_original(Detections(*alone), 0, batch.scale[row], dataset.records[index].image_hw)
        return results

    return Trainer(run, detect)


def train_for(
    make: Callable[[Config], Trainer],
    config: Config,
    *,
    seconds: float,
    turn: Callable[[], None],
    keep: Callable[[dict], None],
) -> dict:
    """Returns the results of training for `seconds`.

    Args:
      turn: called from time to time.
      keep: called with the results so far.
    """
    train_split, test_split = (
        sources.open_split(config.data, name) for name in (config.data.train_split, config.data.test_split)
    )
    dataset = prepare_training_set(train_split, config.data)

    def batches(steps: int) -> Iterator[Batch]:
        options = dict(batch_size=config.train.batch_size, seed=config.train.seed, steps=steps)
        return loader.training_batches(dataset, config.data, config.model.image, **options)

    trainer, seen, lasted = make(config), set(), []
    for batch in batches(CALIBRATION + 1):
        start = time.monotonic()
        trainer.step(batch)()
        if batch.images.shape in seen:
            lasted.append(time.monotonic() - start)
        seen.add(batch.images.shape)
    per_step = statistics.median(lasted)
    turn()

    steps = max(int(seconds / per_step), POINTS)
    warmup = min(config.train.warmup_steps, steps // 10)
    config = replace(config, train=replace(config.train, steps=steps, warmup_steps=warmup, decay_steps=()))
    trainer, planned = make(config), batches(steps)
    spent, waited, compiling, done, curve, loss, shapes = 0.0, 0.0, 0.0, 0, [], None, set()
    for point in range(1, POINTS + 1):
        start, outside = time.monotonic(), compiling
        while done < steps * point // POINTS and spent + time.monotonic() - start - (compiling - outside) < seconds:
            asked = time.monotonic()
            batch = next(planned)
            got = time.monotonic()
            waited += got - asked
            before, loss = loss, trainer.step(batch)
            done += 1
            if before:
                before()  # the device works on the next step meanwhile and never lags behind the clock
            if batch.images.shape not in shapes:
                shapes.add(batch.images.shape)
                loss()
                compiling += time.monotonic() - got
        value = loss() if loss else math.nan
        spent += time.monotonic() - start - (compiling - outside)
        found = evaluate_detections(trainer.detect(test_split), test_split).coco
        # NaN is not JSON.
        value, ap50, ap = (float(x) if math.isfinite(x) else None for x in (value, found.ap50, found.ap))
        curve.append({"seconds": spent, "steps": done, "loss": value, "AP50": ap50, "AP": ap})
        result = {
            "steps": done,
            "planned_steps": steps,
            "seconds": spent,
            "waited_for_data_seconds": waited,
            "images_per_second": done * config.train.batch_size / spent,
            "compile_seconds": compiling,
            "curve": curve,
            "AP50": ap50,
            "AP": ap,
        }
        keep(result)
        turn()
        if spent >= seconds:
            break
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in VOC layout with the splits train and test")
    parser.add_argument("--config", type=Path, default=FOLDER_CONFIG, help="configuration of our detector and training")
    parser.add_argument("--minutes", type=float, default=1.2, help="training time of each of the two detectors")
    parser.add_argument("--limit", type=float, default=8.6, help="minutes for everything, compilation included")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "train.json", help="file for the JSON report")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--without", nargs="*", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    seconds = 60.0 * arguments.minutes
    if arguments.child:
        config = load_config(arguments.config)
        run = arguments.child.with_name("run")
        config = prepare(replace(config, run=run, data=replace(config.data, root=arguments.data))).config

        def run_case(name: str, without: set[str], turn: Callable[[str], None], keep: Callable[[dict], None]) -> dict:
            if name in without:
                return {}
            turn(name)
            options = dict(seconds=seconds, turn=functools.partial(turn, name), keep=keep)
            if name == "ours":
                return train_for(our_trainer, config, **options)
            if measure.peer()[0] is None:
                return {"unavailable": measure.peer()[1]}
            return train_for(their_trainer, their_config(config), **options)

        run_child(arguments.child, arguments.cases, arguments.without, measure.environment, run_case)
        return 0

    results = {name: {"error": NO_TIME} for name in ("ours", "torchvision")}

    def faults() -> dict[str, str]:
        ended = {name: result.get("error") or result.get("cut") for name, result in results.items()}
        if not ended["ours"] and results["ours"].get("AP50") is None:
            ended["ours"] = str(results["ours"])
        return {name: fault for name, fault in ended.items() if fault and (name == "ours" or fault == NO_TIME)}

    def kept(name: str, result: dict, environment: dict) -> None:
        results[name] = result
        about = {"minutes": arguments.minutes, "config": arguments.config.name, **environment}
        measure.write_report(arguments.out, about | {"faults": faults(), "sides": results})

    def done(name: str, result: dict, environment: dict) -> None:
        kept(name, result, environment)
        print(f"{name}: {result.get('error') or result}", flush=True)

    kept("ours", results["ours"], {})
    with tempfile.TemporaryDirectory() as folder:
        run_isolated(
            [sys.executable, __file__, "--data", str(arguments.data), "--config", str(arguments.config)]
            + ["--minutes", str(arguments.minutes)],
            list(results),
            Path(folder) / "journal",
            seconds=60.0 * arguments.limit,
            # The first step of a canvas compiles, and so does its detection.
            silence=max(seconds + 300, 30.0 * arguments.limit),
            each_alone=True,
            done=done,
            kept=kept,
        )
    print()
    figures = ("AP50", "AP", "steps", "seconds", "images_per_second")
    rows = [
        (name, *(value if value is None else round(value, 3) for value in map(result.get, figures)))
        for name, result in results.items()
    ]
    measure.print_table(("side", *figures), rows)
    for name, fault in faults().items():
        print(f"{name}: {fault}", file=sys.stderr)
    return 1 if faults() else 0


if __name__ == "__main__":
    sys.exit(main())
