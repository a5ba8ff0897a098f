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
from fasterrcnn_jax.data.proposal_files import best_of_each, own_proposals
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
    chose_among_several,
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
    kernels = processes.kernel_line(config.train.implementation)
    for sentence in (*understood, processes.device_line(), kernels, f"run        {config.run}"):
        if sentence is not None:
            say(sentence)
    # Process 0 compares the data for all.
    given = proposals_given_to(config, stages[0], splits) if config.train.scheme == "fast_rcnn" else {}
    fingerprint = Fingerprint(splits, given) if processes.is_main() else Fingerprint({})
    # A replay writes nothing.
    lock = run_folder.locked(config.run) if config.replay is None else contextlib.nullcontext()
    outcome = None
    with lock:
        if config.replay is None and processes.is_main():
            write_division(prepared)
        for number, stage in enumerate(stages):
            # The newest checkpoint of all stages knows which data was accepted last.
            is_newest = not any(run_folder.has_checkpoints(later.run) for later in stages[number + 1 :])
            if number or not given:
                given = proposals_given_to(config, stage, splits)
            outcome = fit(config, stage, train_set, splits, given, fingerprint, compare=is_newest)
            if outcome is not None and processes.is_main():
                print_lines(*([stage.name] if stage.name else []), *outcome.lines)
                # Printed before: the table is what took the time.
                if config.train.report != "off" and outcome.shown is not None and stage.run == config.run:
                    said = report_of(config, stage.run, outcome.shown)
                    print_lines(*([] if said is None else [f"report     {said}"]))
    return outcome


def report_of(config: Config, run: Path, shown: Shown) -> str | None:
    """Writes the report of a run and returns a sentence about it; None: it cannot be written, and the reason is said.

    A training does not fail for its report.
    """
    try:
        return write_run_report(config, run, shown)
    except InputError as error:
        say(f"report     not written: {error}")
        return None


def fit(
    config: Config,
    stage: Stage,
    train_set: Dataset,
    splits: dict[str, Dataset],
    given: dict[str, dict[str, ImageProposals]],
    fingerprint: Fingerprint,
    *,
    compare: bool,
) -> Outcome | None:
    """Trains one stage to its end, evaluates it, and writes everything into its folder.

    Args:
      given: proposals that are used instead of the RPN's, by split and image id.
      compare: the data must be as at the stage's newest checkpoint.
    Returns:
      The results of the best checkpoint. None where a step was replayed, or nothing was left to do.
    """
    data, train, run = config.data, stage.train, stage.run
    steps = fitted(train.steps, "train.steps")
    checkpoint_every = fitted(train.checkpoint_every, "train.checkpoint_every")
    evaluate_every = fitted(train.evaluate_every, "train.evaluate_every")
    best_split = train.best_split or data.test_split
    trained_on = given.get(data.train_split)
    if trained_on is not None:
        trained_on = best_of_each(trained_on, config.model.train_proposals.post_nms_top_n)
    batches = loader.training_batches(
        train_set,
        data,
        config.model.image,
        batch_size=train.batch_size,
        seed=train.seed,
        steps=steps,
        process=processes.process(),
        proposals=trained_on,
    )

    choice = checkpoint.Choice(stage.metric, best_split)
    checkpoints = checkpoint.open_checkpoints(run, keep=train.keep_checkpoints, choice=choice)
    model = first_model(config, stage, fresh=checkpoints.latest is None)
    if checkpoints.latest is None:
        say(f"model      {parameter_count(model):,} parameters")
    graphdef, state, step = create_training(stage, model)
    restored = checkpoint.restore(checkpoints, state, config=config, data=fingerprint if compare else None)
    if restored is not None:
        state, position = restored
        loader.set_position(batches, position, str(run))
        say(f"continuing {run} from step {state.step}")
    state, done = processes.replicate(state), int(state.step)
    if config.replay is not None:
        replay_step(config.replay, stage, graphdef, state, step, batches, config.model.image)
        return None
    if processes.is_main():
        run_folder.write_config(config, run)
    if run == config.run:
        # A process that was killed, or a user who removed the checkpoints, may have left another one.
        checkpoint.write_best(checkpoints, run, choice=choice)
    before = checkpoint.best(checkpoints, choice)
    if before is not None and before.choice not in (None, choice):
        (old_metric, old_split), (metric, split) = before.choice, choice
        say(
            f"best       {metric} on {split} chooses from the next evaluation on; it is not compared with {old_metric} "
            f"on {old_split}, which chose before"
        )
        before = None
    fingerprint.read_in_background()

    metrics = MetricsWriter(run, after=done, silent=not processes.is_main())
    write_results = functools.partial(
        metrics.write_results, every=checkpoint_every, batch_size=train.batch_size, images=len(train_set.records)
    )
    say(f"curves     {run_folder.curves_path(run)}, and: tensorboard --logdir {shlex.quote(str(run))}")
    evaluations = Evaluations.of(splits[best_split], config.model.image, steps=steps, every=evaluate_every)
    canvases = canvases_of(train_set, config.model.image)
    progress = Progress(
        stage,
        train_set,
        metrics,
        done=done,
        canvases=canvases,
        evaluations=evaluations,
        afterwards=detected_afterwards(config, stage, splits, known=evaluations.canvases),
        checkpoint_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
    )
    report, saver = LateReport(progress.write), checkpoint.DeferredSave(checkpoints)
    batch_size = processes.per_device(train.batch_size // train.accumulate)
    evaluator = Evaluator(stage, splits, given, best_split, metrics, batch_size)
    patience = Patience(train, before)
    if patience.is_over(done) and done < steps:
        say(f"the training ended at step {done} by train.patience; a larger one trains on")

    def shown_of(score: Score, split: str, number: int, chosen_on: str | None) -> Shown:
        chose = chosen_on is not None and is_within(split, chosen_on)
        also = also_used(chose=chose, trained=is_within(split, data.train_split))
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
            if saver.pending is not None:
                if saver.confirm() and run == config.run:
                    checkpoint.write_best(checkpoints, run, choice=choice)
                progress.restart_clock()
            if is_due:
                position, seen = batches.get_state(), fingerprint.text()
                saver.offer(
                    checkpoint.snapshot(state, config=config, iterator_state=position, data=seen, choice=choice)
                )
            if is_last or (evaluate_every and number % evaluate_every == 0):
                with saver.confirmed_on_error():
                    result = evaluator.evaluate(merge(graphdef, state), best_split, number)
                    if train.report == "each" and run == config.run and not is_last and processes.is_main():
                        report_of(config, run, shown_of(result, best_split, number, best_split))
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
        shown, chosen, chosen_on = last, None, None
        if run == config.run:
            chosen = checkpoint.write_best(checkpoints, run, choice=choice)
            best = checkpoint.best(checkpoints, choice)
            deciding = best_split if best is None or best.choice is None else best.choice.split
            if chose_among_several(train, last=last, evaluated=metrics.evaluations(deciding)):
                chosen_on = deciding
            if best is not None and best.step != last:
                # The best checkpoint is what `load` takes, so it is what the table shows.
                own = backbone_class(config.model.backbone)
                model = checkpoint.load(run_folder.checkpoint_folder(run, best.step), backbone=own)
                shown, result = best.step, None
        shown_before = done >= last and run != config.run
        if not shown_before and (result is None or best_split != data.test_split):
            result = evaluator.evaluate(model, data.test_split, shown)
        write_results()
        if last > done:
            progress.say_time(last)
    if result is None:
        return None
    return outcome_of(stage, shown_of(result, data.test_split, shown, chosen_on), last, chosen=chosen)


def detected_afterwards(
    config: Config, stage: Stage, splits: dict[str, Dataset], *, known: frozenset[tuple[int, int]]
) -> list[Evaluations]:
    """Returns the sets of images that a stage detects objects in after its last step and its last evaluation.

    Args:
      known: canvases that detection is compiled for by then.
    """
    test = config.data.test_split

    def once(name: str) -> Evaluations:
        return Evaluations.of(splits[name], config.model.image, steps=1, every=0)

    whole = [once(name)._replace(shown=0) for name in stage.proposes_on]
    if (stage.train.best_split or test) != test:
        whole.append(once(test))
    return [detected._replace(canvases=detected.canvases - known) for detected in whole]


def check_batch_size(config: Config, stage: Stage) -> None:
    """Raises InputError unless the devices can share the batches of a stage evenly."""
    is_trains = stage.train.batch_size == config.train.batch_size
    field = "train.batch_size" if is_trains else "train.alternating.rpn_batch_size"
    processes.check_batch_size(stage.train.batch_size, accumulate=config.train.accumulate, field=field)


def proposals_given_to(
    config: Config, stage: Stage, splits: dict[str, Dataset]
) -> dict[str, dict[str, ImageProposals]]:
    """Returns the proposals that a stage uses instead of the RPN's proposals, by split and image id: stored, or own."""
    if stage.own_proposals is not None:
        found = {}
        for name, dataset in splits.items():
            part = "train_proposals" if name == config.data.train_split else "test_proposals"
            limit, field = getattr(config.model, part).post_nms_top_n, f"model.{part}.post_nms_top_n"
            found[name] = own_proposals(stage.own_proposals, name, dataset, field=field, limit=limit)
        return found
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
    examined = replay.examine(graphdef, state, batch, ids, losses, parts=stage.parts)
    print_lines(*replay.format_examined(number, examined).split("\n"))


if __name__ == "__main__":
    cli.run_as_program(main)
