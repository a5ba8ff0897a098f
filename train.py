"""Trains a detector and evaluates it: python train.py --config configs/shapes.py

Started again on the same run folder it continues from the newest checkpoint, to the same bits. The run folder
holds config.json, metrics.jsonl, TensorBoard events, checkpoints/ and pictures/. Asked to stop, by SIGTERM or
SIGINT, it saves a checkpoint and exits with status 75. After a number that is not finite, --replay FILE says where
it came from.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from fasterrcnn_jax import checkpoint, cli, compilations, parallel, preemption, replay, run_folder, training
from fasterrcnn_jax.config import Config
from fasterrcnn_jax.data import loader, sources
from fasterrcnn_jax.data.records import Dataset
from fasterrcnn_jax.data.training_set import training_set
from fasterrcnn_jax.errors import InputError, NonFiniteLossError
from fasterrcnn_jax.models.detector import Detector, create
from fasterrcnn_jax.proposing import given_proposals, stored_proposals
from fasterrcnn_jax.scoring import Score, score, shown_proposals
from fasterrcnn_jax.stages import Stage, failed_stage, proposals_path, stages_of
from fasterrcnn_jax.weights import load_weights


@cli.script
def main(argv: list[str] | None = None) -> None:
    config = cli.parse_config(argv, description=__doc__)
    parallel.initialize(config.distributed)
    compilations.watch()
    config = dataclasses.replace(config, data=sources.with_class_names(config.data))
    data, train = config.data, config.train
    stages = stages_of(config)
    if config.replay is not None:
        stages = (failed_stage(stages, config.replay),)
    for stage in stages:
        size = stage.train.batch_size
        field = "train.batch_size" if size == train.batch_size else "train.alternating.rpn_batch_size"
        parallel.check_batch_size(size, accumulate=train.accumulate, field=field)
    names = dict.fromkeys((data.train_split, train.best_split or data.test_split, data.test_split))
    splits = {name: sources.open_split(data, name) for name in names}
    train_set = training_set(splits[data.train_split], data)
    with preemption.noted_signals() as asked_to_stop:
        for stage in stages:
            result = fit(config, stage, train_set, splits, asked_to_stop)
            if result is not None and parallel.is_main():
                print("\n".join(filter(None, (stage.name, result))))


def fit(
    config: Config,
    stage: Stage,
    train_set: Dataset,
    splits: dict[str, Dataset],
    asked_to_stop: Callable[[], str | None],
) -> str | None:
    """Trains one stage to its end, evaluates it, and leaves all that is found in its folder.

    Returns:
      The table and where things are; None where a step was replayed, or nothing was left to do.
    """
    data, train, run = config.data, stage.train, stage.run
    best_split = train.best_split or data.test_split
    given = {}
    if stage.proposals is not None:
        paths = {name: proposals_path(stage.proposals, name) for name in splits}
        given = {name: given_proposals(path, splits[name]) for name, path in paths.items() if path.exists()}
    batches = loader.training_batches(
        train_set,
        data,
        config.model.image,
        batch_size=train.batch_size,
        seed=train.seed,
        steps=train.steps,
        process=parallel.process(),
        proposals=given.get(data.train_split),
    )

    checkpoints = checkpoint.open_checkpoints(run, keep=train.keep_checkpoints)
    model = first_model(config, stage, fresh=checkpoints.latest is None)
    optimizer = training.create_optimizer(train)
    graphdef, state = training.create_state(
        model, optimizer, seed=train.seed, averages=train.ema_decay is not None, parts=stage.parts
    )
    step = parallel.data_parallel(
        training.make_train_step(
            graphdef,
            optimizer,
            axis_name=parallel.AXIS,
            losses=stage.losses,
            parts=stage.parts,
            accumulate=train.accumulate,
            ema_decay=train.ema_decay,
            implementation=train.implementation,
        )
    )

    # A bar that is disabled would write all the same.
    say = tqdm.write if parallel.is_main() else lambda *_: None
    restored = checkpoint.restore(checkpoints, state, config=config)
    if restored is not None:
        state, position = restored
        batches.set_state(position)
        say(f"continuing {run} from step {state.step}")
    state = parallel.replicate(state)
    first = int(state.step) + 1
    if config.replay is not None:
        return replayed(config, stage, graphdef, state, step, batches)
    batch_size = parallel.per_device(train.batch_size // train.accumulate)
    options = dict(batch_size=batch_size, implementation=train.implementation)
    done_before = first > train.steps and run != config.run
    if parallel.is_main():
        run_folder.write_config(config, run)

    rates = training.learning_rates(train)
    metrics = run_folder.MetricsWriter(run, after=first - 1, silent=not parallel.is_main())
    bar = tqdm(
        desc=stage.name or None,
        total=train.steps,
        initial=first - 1,
        unit="step",
        mininterval=0.1 if sys.stderr.isatty() else 15.0,
        disable=not parallel.is_main(),
    )
    reported = time.perf_counter()

    def report(number, numbers, batch, data_wait):
        # Waits for the device: called when it already works on the next step.
        nonlocal reported
        ids = [train_set.records[index].id for index in batch.image_index[batch.image_valid]]
        try:
            values = run_folder.finite_metrics(number, numbers, ids)
        except NonFiniteLossError as error:
            path = replay.write_batch(run, number, batch, ids, process=parallel.process()[0])
            raise NonFiniteLossError(f"{error}; --replay {path} says where it comes from") from None
        seconds, reported = time.perf_counter() - reported, time.perf_counter()
        rate = train.batch_size / seconds
        metrics.write(
            number,
            values
            | {"learning_rate": rates[number - 1], "images_per_second": rate, "data_wait": data_wait}
            | compilations.so_far(),
        )
        bar.update(number - bar.n)
        losses = {name: f"{values[name]:.3f}" for name in training.StepMetrics._fields[:4] if values[name]}
        bar.set_postfix(losses | {"images/s": f"{rate:.1f}"}, refresh=False)

    def evaluate(number: int, split: str) -> Score:
        # On one device, which never held more than its share of a batch.
        model, dataset = training.merge(graphdef, state), splits[split]
        result = score(model, dataset, of=stage.evaluated, given=given.get(split), **options)
        chosen = run_folder.pictured(dataset)
        proposals = shown_proposals(model, dataset, result, chosen, given=given.get(split), **options)
        if number >= first:  # a finished run is only shown again
            metrics.write(number, {f"{split}/{name}": value for name, value in result.values.items()})
        sheet = run_folder.sheet(dataset, chosen, result.detections, proposals)
        # The last step may be evaluated on both splits.
        picture = metrics.write_picture(number, sheet, of="" if split == best_split else split)
        say(f"step {number}: {result.headline} on {split}, picture {picture}")
        return result

    waiting = unsaved = None
    stop = False
    with checkpoints, metrics, bar:
        for number in range(first, train.steps + 1):
            asked = time.perf_counter()
            batch = next(batches)
            data_wait = time.perf_counter() - asked
            state, numbers = step(state, batch)
            if waiting is not None:
                report(*waiting)
            waiting = (number, numbers, batch, data_wait)
            # Of the step before, like its losses: all processes know it by now, and end after the same step.
            stopping, stop = bool(stop), parallel.any_process(asked_to_stop() is not None)
            due = number % train.checkpoint_every == 0 or number == train.steps or stopping
            if due or unsaved is not None:
                report(*waiting)
                waiting = None
            if unsaved is not None:
                # The loss of this step was finite: the state before it is worth keeping.
                checkpoint.save(checkpoints, **unsaved)
                unsaved = None
            if due:
                unsaved = checkpoint.snapshot(state, config=config, iterator_state=batches.get_state())
            if number == train.steps or train.evaluate_every and number % train.evaluate_every == 0:
                try:
                    result = evaluate(number, best_split)
                except BaseException:
                    # An evaluation that fails must not cost the steps before it.
                    checkpoint.save(checkpoints, **unsaved)
                    raise
                unsaved["measured"] = result.values[stage.metric]
                reported = time.perf_counter()  # the next step is not slow
            # After the evaluation of this step, if it has one: another start would not make it.
            if stopping and number < train.steps:
                checkpoint.save(checkpoints, **unsaved)
                say(f"asked to stop: saved step {number}, the same command continues {run}")
                sys.exit(preemption.EXIT_STATUS)
        if unsaved is not None:
            checkpoint.save(checkpoints, **unsaved)
        if not done_before and (first > train.steps or best_split != data.test_split):
            result = evaluate(train.steps, data.test_split)
        model = training.merge(graphdef, state)
        for name in stage.proposes_on:
            stored_proposals(proposals_path(run, name), model, splits[name], **options)
        best = checkpoint.best(checkpoints)

    if done_before:
        return None
    lines = [result.table, f"checkpoint {checkpoint.folder_of(run, train.steps)}"]
    if best is not None:
        lines.append(f"best       {checkpoint.folder_of(run, best[0])}: {stage.metric} {best[1]:.3f}")
    return "\n".join(lines)


def first_model(config: Config, stage: Stage, *, fresh: bool) -> Detector:
    """Returns the detector that a stage starts from; where it goes on, its weights are those of a checkpoint."""
    if stage.first is not None:
        return checkpoint.load(stage.first)
    model = create(config.model, config.data.class_names, seed=config.train.seed)
    return load_weights(model, config.init) if config.init is not None and fresh else model


def replayed(config, stage, graphdef, state, step, batches) -> None:
    """Makes the steps up to a failed one again, saving nothing, and prints what each of its images does to it."""
    number, ids, batch = replay.read_batch(config.replay)
    if number <= state.step:
        raise InputError(
            f"--replay {config.replay}: is of step {number}, and the newest checkpoint of {stage.run} of "
            f"step {int(state.step)}"
        )
    for _ in tqdm(range(int(state.step) + 1, number), desc="steps again", unit="step"):
        state, _ = step(state, next(batches))
    state = jax.tree.map(np.asarray, state)
    # An image by itself gets as many RoIs as in its batch.
    losses = functools.partial(
        stage.losses, num_devices=stage.train.batch_size, implementation=stage.train.implementation
    )
    print(replay.format_examined(number, replay.examine(graphdef, state, batch, ids, losses)))


if __name__ == "__main__":
    main()
