"""Trains a detector and evaluates it: python train.py --config configs/shapes.py

The same command continues the run from its newest checkpoint, to the same bits. The run folder holds config.json,
metrics.jsonl, TensorBoard events, checkpoints/ and images/. SIGTERM or SIGINT saves a checkpoint and ends the
training with status 75. After a loss that is not finite, --replay FILE shows where it comes from.
"""

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from fasterrcnn_jax import processes
from fasterrcnn_jax.config import Config
from fasterrcnn_jax.data import loader, sources
from fasterrcnn_jax.data.records import Dataset, ImageProposals
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.proposal_store import given_proposals, stored_proposals
from fasterrcnn_jax.models.detector import Detector, backbone_class, create_detector
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.structures import Batch
from fasterrcnn_jax.training import (
    checkpoint,
    compilations,
    preemption,
    replay,
    run_folder,
)
from fasterrcnn_jax.training.evaluation import Evaluator
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.progress import (
    LateReport,
    MetricsWriter,
    Progress,
    StepReport,
    say,
)
from fasterrcnn_jax.training.stages import Stage, failed_stage, split_names, stages_of
from fasterrcnn_jax.training.state import TrainState, merge
from fasterrcnn_jax.training.step import (
    TrainStep,
    create_state,
    data_parallel,
    make_train_step,
    replicate,
)
from fasterrcnn_jax.weights import load_weights


@cli.script
def main(argv: list[str] | None = None) -> None:
    config = cli.parse_config(argv, description=__doc__)
    processes.initialize(config.distributed)
    compilations.watch()
    config = dataclasses.replace(config, data=sources.with_class_names(config.data))
    stages = stages_of(config)
    if config.replay is not None:
        stages = (failed_stage(stages, config.replay),)
    for stage in stages:
        check_batch_size(config, stage)
    splits = {name: sources.open_split(config.data, name) for name in split_names(config)}
    train_set = prepare_training_set(splits[config.data.train_split], config.data)
    # A replay writes nothing.
    lock = run_folder.locked(config.run) if config.replay is None else contextlib.nullcontext()
    with lock, preemption.noted_signals() as asked_to_stop:
        for stage in stages:
            result = fit(config, stage, train_set, splits, asked_to_stop)
            if result is not None and processes.is_main():
                print("\n".join(filter(None, (stage.name, result))))


def fit(
    config: Config,
    stage: Stage,
    train_set: Dataset,
    splits: dict[str, Dataset],
    asked_to_stop: Callable[[], str | None],
) -> str | None:
    """Trains one stage to its end, evaluates it, and writes everything into its folder.

    Returns:
      The table of results and where the files are. None where a step was replayed, or nothing was left to do.
    """
    data, train, run = config.data, stage.train, stage.run
    best_split = train.best_split or data.test_split
    given = proposals_given_to(stage, splits)
    batches = loader.training_batches(
        train_set,
        data,
        config.model.image,
        batch_size=train.batch_size,
        seed=train.seed,
        steps=train.steps,
        process=processes.process(),
        proposals=given.get(data.train_split),
    )

    checkpoints = checkpoint.open_checkpoints(run, keep=train.keep_checkpoints)
    model = first_model(config, stage, fresh=checkpoints.latest is None)
    graphdef, state, step = create_training(stage, model)
    restored = checkpoint.restore(checkpoints, state, config=config)
    if restored is not None:
        state, position = restored
        loader.set_position(batches, position, str(run))
        say(f"continuing {run} from step {state.step}")
    state, done = replicate(state), int(state.step)
    if config.replay is not None:
        return replay_step(config.replay, stage, graphdef, state, step, batches, config.model.image.canvases)
    if processes.is_main():
        run_folder.write_config(config, run)

    metrics = MetricsWriter(run, after=done, silent=not processes.is_main())
    progress = Progress(stage, train_set, metrics, done=done)
    report, saver = LateReport(progress.write), checkpoint.DeferredSave(checkpoints)
    batch_size = processes.per_device(train.batch_size // train.accumulate)
    evaluator = Evaluator(stage, splits, given, best_split, metrics, batch_size, log=done < train.steps)
    result, stop = None, False
    with checkpoint.closing(checkpoints), metrics, progress:
        for number in range(done + 1, train.steps + 1):
            asked = time.perf_counter()
            batch = next(batches)
            data_wait = time.perf_counter() - asked
            state, numbers = step(state, batch)
            report.offer(StepReport(number, numbers, batch, data_wait))
            # Read one step late, like the losses. All processes know it then and end after the same step.
            stopping, stop = bool(stop), processes.any_process(asked_to_stop() is not None)

            is_last = number == train.steps
            is_due = is_last or stopping or number % train.checkpoint_every == 0
            if is_due or saver.pending is not None:
                report.flush()
            # The loss of this step is finite, so the state before it is worth keeping.
            saver.confirm()
            if is_due:
                saver.offer(checkpoint.snapshot(state, config=config, iterator_state=batches.get_state()))
            if is_last or (train.evaluate_every and number % train.evaluate_every == 0):
                with saver.confirmed_on_error():
                    result = evaluator.evaluate(merge(graphdef, state), best_split, number)
                saver.measured(result.values[stage.metric])
                progress.restart_clock()
            # After the evaluation of this step, which another start would not repeat.
            if stopping and not is_last:
                saver.confirm()
                say(f"asked to stop: saved step {number}, the same command continues {run}")
                sys.exit(preemption.EXIT_STATUS)
        saver.confirm()

        model = merge(graphdef, state)
        shown_before = done >= train.steps and run != config.run
        if not shown_before and (result is None or best_split != data.test_split):
            result = evaluator.evaluate(model, data.test_split, train.steps)
        for name in stage.proposes_on:
            path = run_folder.proposals_path(run, name)
            stored_proposals(path, model, splits[name], batch_size=batch_size, implementation=train.implementation)
        best = checkpoint.best(checkpoints)

    if result is None:
        return None
    lines = [result.table, f"checkpoint {run_folder.checkpoint_folder(run, train.steps)}"]
    if best is not None:
        lines.append(f"best       {run_folder.checkpoint_folder(run, best.step)}: {stage.metric} {best.metric:.3f}")
    return "\n".join(lines)


def check_batch_size(config: Config, stage: Stage) -> None:
    """Raises InputError unless the devices can share the batches of a stage evenly."""
    is_trains = stage.train.batch_size == config.train.batch_size
    field = "train.batch_size" if is_trains else "train.alternating.rpn_batch_size"
    processes.check_batch_size(stage.train.batch_size, accumulate=config.train.accumulate, field=field)


def proposals_given_to(stage: Stage, splits: dict[str, Dataset]) -> dict[str, dict[str, ImageProposals]]:
    """Returns the stored proposals that a stage uses instead of the RPN's proposals, by split and image id."""
    if stage.proposals is None:
        return {}
    paths = {name: run_folder.proposals_path(stage.proposals, name) for name in splits}
    return {name: given_proposals(path, splits[name]) for name, path in paths.items() if path.exists()}


def first_model(config: Config, stage: Stage, *, fresh: bool) -> Detector:
    """Returns the detector that a stage starts from.

    Args:
      fresh: the stage has no checkpoint yet. Otherwise the weights come from the checkpoint, not from `--init`.
    """
    if stage.first is not None:
        # The configuration is the user's own, so the class that it names may be imported.
        return checkpoint.load(stage.first, backbone=backbone_class(config.model.backbone))
    model = create_detector(config.model, config.data.class_names, seed=config.train.seed)
    return load_weights(model, config.init) if config.init is not None and fresh else model


def create_training(stage: Stage, model: Detector) -> tuple[nnx.GraphDef, TrainState, TrainStep]:
    """Returns the structure of `model`, the state at step 0, and the step on all devices."""
    train = stage.train
    optimizer = create_optimizer(train)
    graphdef, state = create_state(
        model, optimizer, seed=train.seed, averages=train.ema_decay is not None, parts=stage.parts
    )
    step = make_train_step(
        graphdef,
        optimizer,
        axis_name=processes.AXIS,
        losses=stage.losses,
        parts=stage.parts,
        accumulate=train.accumulate,
        ema_decay=train.ema_decay,
        implementation=train.implementation,
    )
    return graphdef, state, data_parallel(step)


def replay_step(
    path: Path,
    stage: Stage,
    graphdef: nnx.GraphDef,
    state: TrainState,
    step: TrainStep,
    batches: Iterator[Batch],
    canvases: tuple[tuple[int, int], ...],
) -> None:
    """Repeats the steps from the newest checkpoint to a failed one and prints how each of its images takes part.

    Nothing is saved.
    """
    number, ids, batch = replay.read_batch(path)
    if number <= state.step:
        raise InputError(
            f"--replay {path}: holds step {number}, but the newest checkpoint of {stage.run} is already at "
            f"step {int(state.step)}"
        )
    if number > stage.train.steps or tuple(batch.images.shape[1:3]) not in canvases:
        raise InputError(f"--replay {path}: holds step {number} of another run than {stage.run}")
    for _ in tqdm(range(int(state.step) + 1, number), desc="repeating steps", unit="step"):
        state, _ = step(state, next(batches))
    state = jax.tree.map(np.asarray, state)
    # An image alone gets as many RoIs as it gets in its batch.
    losses = functools.partial(
        stage.losses, num_devices=stage.train.batch_size, implementation=stage.train.implementation
    )
    print(replay.format_examined(number, replay.examine(graphdef, state, batch, ids, losses)))


if __name__ == "__main__":
    cli.run_as_program(main)
