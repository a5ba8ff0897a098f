"""Trains a detector and evaluates it: fasterrcnn-jax train FOLDER, or python train.py --config configs/shapes.py

The same command continues the run from its newest checkpoint, to the same bits. The run folder holds config.json,
metrics.jsonl, results.csv, curves.png, report.html, TensorBoard events, checkpoints/ and images/. SIGTERM or SIGINT
saves a checkpoint and ends the training with status 75. After a loss that is not finite, --replay FILE shows where it
comes from.
"""

import contextlib
import functools
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from fasterrcnn_jax import processes
from fasterrcnn_jax.config import Config, ImageConfig
from fasterrcnn_jax.config.checks import fitted
from fasterrcnn_jax.data import loader
from fasterrcnn_jax.data.fingerprint import Fingerprint
from fasterrcnn_jax.data.records import Dataset, ImageProposals
from fasterrcnn_jax.data.transforms import canvases_of
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.proposal_store import given_proposals, stored_proposals
from fasterrcnn_jax.inference.scoring import Score
from fasterrcnn_jax.models.detector import Detector, backbone_class, create_detector, parameter_count
from fasterrcnn_jax.printing import print_lines, progress_bar
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.structures import Batch
from fasterrcnn_jax.training import (
    checkpoint,
    compilations,
    preemption,
    replay,
    run_folder,
)
from fasterrcnn_jax.training.evaluation import (
    Evaluator,
    Outcome,
    Shown,
    also_used,
    is_within,
    outcome_of,
    write_run_report,
)
from fasterrcnn_jax.training.expected_time import Evaluations
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.patience import Patience
from fasterrcnn_jax.training.preparation import prepare, write_division
from fasterrcnn_jax.training.progress import (
    LateReport,
    MetricsWriter,
    Progress,
    StepReport,
    say,
)
from fasterrcnn_jax.training.stages import Stage, failed_stage, stages_of
from fasterrcnn_jax.training.state import TrainState, merge
from fasterrcnn_jax.training.step import (
    TrainStep,
    create_state,
    data_parallel,
    make_train_step,
    replicate,
)
from fasterrcnn_jax.zoo import load_weights


@cli.script
def main(argv: list[str] | None = None) -> None:
    try:
        train_stages(cli.parse_config(argv, description=__doc__))
    except preemption.Stopped as stopped:
        say(str(stopped))
        sys.exit(preemption.EXIT_STATUS)


def train_stages(config: Config) -> Outcome | None:
    """Trains every stage of a run, or continues it, and prints what comes of it.

    Returns:
      The results of the last stage. None where a step was replayed.
    Raises:
      InputError: the data or the run folder cannot be used.
      NonFiniteLossError: training diverged.
      preemption.Stopped: a signal asked the run to stop, and its last step is saved.
    """
    processes.initialize(config.distributed)
    compilations.watch()
    prepared = prepare(config)
    config, splits, train_set, understood, _ = prepared
    stages = stages_of(config)
    if config.replay is not None:
        stages = (failed_stage(stages, config.replay),)
    for stage in stages:
        check_batch_size(config, stage)
    for sentence in (*understood, processes.device_line(), f"run        {config.run}"):
        say(sentence)
    # Process 0 compares the data for all.
    fingerprint = Fingerprint(splits if processes.is_main() else {})
    # A replay writes nothing.
    lock = run_folder.locked(config.run) if config.replay is None else contextlib.nullcontext()
    outcome = None
    with lock:
        if config.replay is None and processes.is_main():
            write_division(prepared)
        for number, stage in enumerate(stages):
            # The newest checkpoint of all stages knows which data was accepted last.
            is_newest = not any(run_folder.has_checkpoints(later.run) for later in stages[number + 1 :])
            outcome = fit(config, stage, train_set, splits, fingerprint, compare=is_newest)
            if outcome is not None and processes.is_main():
                print_lines(*([stage.name] if stage.name else []), *outcome.lines)
                # Printed before: the table is what took the time.
                if config.train.report != "off" and outcome.shown is not None and stage.run == config.run:
                    print_lines(f"report     {write_run_report(config, stage.run, outcome.shown)}")
    return outcome


def fit(
    config: Config,
    stage: Stage,
    train_set: Dataset,
    splits: dict[str, Dataset],
    fingerprint: Fingerprint,
    *,
    compare: bool,
) -> Outcome | None:
    """Trains one stage to its end, evaluates it, and writes everything into its folder.

    Args:
      compare: the data must be as at the stage's newest checkpoint.
    Returns:
      The results of the best checkpoint. None where a step was replayed, or nothing was left to do.
    """
    data, train, run = config.data, stage.train, stage.run
    steps = fitted(train.steps, "train.steps")
    checkpoint_every = fitted(train.checkpoint_every, "train.checkpoint_every")
    evaluate_every = fitted(train.evaluate_every, "train.evaluate_every")
    best_split = train.best_split or data.test_split
    given = proposals_given_to(stage, splits)
    batches = loader.training_batches(
        train_set,
        data,
        config.model.image,
        batch_size=train.batch_size,
        seed=train.seed,
        steps=steps,
        process=processes.process(),
        proposals=given.get(data.train_split),
    )

    checkpoints = checkpoint.open_checkpoints(run, keep=train.keep_checkpoints)
    model = first_model(config, stage, fresh=checkpoints.latest is None)
    if checkpoints.latest is None:
        say(f"model      {parameter_count(model):,} parameters")
    graphdef, state, step = create_training(stage, model)
    restored = checkpoint.restore(checkpoints, state, config=config, data=fingerprint if compare else None)
    if restored is not None:
        state, position = restored
        loader.set_position(batches, position, str(run))
        say(f"continuing {run} from step {state.step}")
    state, done = replicate(state), int(state.step)
    if config.replay is not None:
        replay_step(config.replay, stage, graphdef, state, step, batches, config.model.image)
        return None
    if processes.is_main():
        run_folder.write_config(config, run)
    if run == config.run:
        # A process that was killed, or a user who removed the checkpoints, may have left another one.
        checkpoint.write_best(checkpoints, run, metric=stage.metric)
    fingerprint.read_in_background()

    metrics = MetricsWriter(run, after=done, silent=not processes.is_main())
    write_results = functools.partial(
        metrics.write_results, every=checkpoint_every, batch_size=train.batch_size, images=len(train_set.records)
    )
    say(f"curves     {run_folder.curves_path(run)}, and: tensorboard --logdir {shlex.quote(str(run))}")
    evaluations = Evaluations.of(splits[best_split], config.model.image, steps=steps, every=evaluate_every)
    canvases = canvases_of(train_set, config.model.image)
    progress = Progress(stage, train_set, metrics, done=done, canvases=canvases, evaluations=evaluations)
    report, saver = LateReport(progress.write), checkpoint.DeferredSave(checkpoints)
    batch_size = processes.per_device(train.batch_size // train.accumulate)
    evaluator = Evaluator(stage, splits, given, best_split, metrics, batch_size)
    patience = Patience(train, checkpoint.best(checkpoints))
    if patience.is_over(done) and done < steps:
        say(f"the training ended at step {done} by train.patience; a larger one trains on")
    trained_on, chosen_on = data.train_split, best_split if run == config.run else None

    def shown_of(score: Score, split: str, number: int) -> Shown:
        also = also_used(chose=split == chosen_on, trained=is_within(split, trained_on))
        return Shown(score, splits[split], split, also, number, metrics.history)

    result, stop = None, False
    with checkpoint.closing(checkpoints), metrics, progress, contextlib.ExitStack() as noting:
        asked_to_stop = None
        for number in range(done + 1, done + 1 if patience.is_over(done) else steps + 1):
            asked = time.perf_counter()
            batch = next(batches)
            data_wait = time.perf_counter() - asked
            if number == 1:
                metrics.write_first_batch(batch, config.model.image, train_set)
            state, numbers = step(state, batch)
            # Until the first step is compiled there is nothing to save, and a signal ends the process at once.
            asked_to_stop = asked_to_stop or noting.enter_context(preemption.noted_signals())
            report.offer(StepReport(number, numbers, batch, data_wait))
            # Read one step late, like the losses. All processes know it then and end after the same step.
            stopping, stop = bool(stop), processes.any_process(asked_to_stop() is not None)

            is_last = number == steps
            is_due = is_last or stopping or number % checkpoint_every == 0
            if is_due or saver.pending is not None:
                report.flush()
            # The loss of this step is finite, so the state before it is worth keeping.
            if saver.confirm() and run == config.run:
                checkpoint.write_best(checkpoints, run, metric=stage.metric)
            if is_due:
                position, seen = batches.get_state(), fingerprint.text()
                saver.offer(checkpoint.snapshot(state, config=config, iterator_state=position, data=seen))
            if is_last or (evaluate_every and number % evaluate_every == 0):
                with saver.confirmed_on_error():
                    result = evaluator.evaluate(merge(graphdef, state), best_split, number)
                    if train.report == "each" and run == config.run and not is_last and processes.is_main():
                        write_run_report(config, run, shown_of(result, best_split, number))
                saver.measured(result.values[stage.metric])
                patience.measured(number, result.values[stage.metric])
                progress.restart_clock()
            if is_due:
                with saver.confirmed_on_error():
                    write_results()
            # After the evaluation of this step, which another start would not repeat.
            if stopping and not is_last:
                saver.confirm()
                raise preemption.Stopped(f"asked to stop: saved step {number}, the same command continues {run}")
            if not is_last and patience.is_over(number):
                why = f"{train.patience} evaluations in a row were below the best {stage.metric}"
                say(f"step {number}: the training ends, because {why}")
                break
        saver.confirm()
        # Everything is saved, so from here a signal ends the process at once.
        stop = processes.any_process(asked_to_stop is not None and asked_to_stop() is not None)
        noting.close()
        last = int(state.step)
        if bool(stop) and (run != config.run or best_split != data.test_split):
            raise preemption.Stopped(f"asked to stop: saved step {last}, the same command continues {config.run}")

        model = merge(graphdef, state)
        for name in stage.proposes_on:
            path = run_folder.proposals_path(run, name)
            stored_proposals(path, model, splits[name], batch_size=batch_size, implementation=train.implementation)
        shown, chosen = last, None
        if run == config.run:
            chosen = checkpoint.write_best(checkpoints, run, metric=stage.metric)
            best = checkpoint.best(checkpoints)
            if best is not None and best.step != last:
                # The best checkpoint is what `load` takes, so it is what the table shows.
                own = backbone_class(config.model.backbone)
                model = checkpoint.load(run_folder.checkpoint_folder(run, best.step), backbone=own)
                shown, result = best.step, None
        shown_before = done >= last and run != config.run
        if not shown_before and (result is None or best_split != data.test_split):
            result = evaluator.evaluate(model, data.test_split, shown)
        write_results()
    return None if result is None else outcome_of(stage, shown_of(result, data.test_split, shown), last, chosen=chosen)


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
        # The stage continues from the newest checkpoint of the other, not from its best one.
        newest = run_folder.checkpoints_folder(stage.first)
        return checkpoint.load(newest, backbone=backbone_class(config.model.backbone))
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
    image: ImageConfig,
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
    if number > fitted(stage.train.steps, "train.steps") or tuple(batch.images.shape[1:3]) not in fitted(
        image.canvases, "model.image.canvases"
    ):
        raise InputError(f"--replay {path}: holds step {number} of another run than {stage.run}")
    for _ in progress_bar(
        range(int(state.step) + 1, number), title="repeating steps", total=number - int(state.step) - 1, unit="step"
    ):
        state, _ = step(state, next(batches))
    state = jax.tree.map(np.asarray, state)
    # An image alone gets as many RoIs as it gets in its batch.
    losses = functools.partial(
        stage.losses, num_devices=stage.train.batch_size, implementation=stage.train.implementation
    )
    print_lines(*replay.format_examined(number, replay.examine(graphdef, state, batch, ids, losses)).split("\n"))


if __name__ == "__main__":
    cli.run_as_program(main)
