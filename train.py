"""Trains a detector and evaluates it: python train.py --config configs/shapes.py

Started again on the same run folder it continues from the newest checkpoint. The run folder holds
config.json, metrics.jsonl, TensorBoard events, checkpoints/ and pictures/.
"""

import sys

from tqdm import tqdm

from fasterrcnn_jax import checkpoint, cli, parallel, run_folder, training
from fasterrcnn_jax.data import loader, sources
from fasterrcnn_jax.data.training_set import training_set
from fasterrcnn_jax.evaluation.results import evaluate_detections, format_table, metrics_dict
from fasterrcnn_jax.inference import detect_dataset
from fasterrcnn_jax.models.detector import create
from fasterrcnn_jax.weights import load_weights


@cli.script
def main(argv: list[str] | None = None) -> None:
    config = cli.parse_config(argv, description=__doc__)
    data, train = config.data, config.train
    parallel.check_batch_size(train.batch_size)

    best_split = train.best_split or data.test_split
    names = dict.fromkeys((data.train_split, best_split, data.test_split))
    splits = {name: sources.open_split(data, name) for name in names}
    train_set = training_set(splits[data.train_split], data)
    batches = loader.training_batches(
        train_set,
        data,
        config.model.image,
        batch_size=train.batch_size,
        seed=train.seed,
        steps=train.steps,
    )

    checkpoints = checkpoint.open_checkpoints(config.run, keep=train.keep_checkpoints)
    model = create(config.model, data.class_names, seed=train.seed)
    if config.init is not None and checkpoints.latest is None:
        model = load_weights(model, config.init)
    optimizer = training.create_optimizer(train)
    graphdef, state = training.create_state(model, optimizer, seed=train.seed)
    step = parallel.data_parallel(
        training.make_train_step(
            graphdef, optimizer, axis_name=parallel.AXIS, implementation=train.implementation
        )
    )

    restored = checkpoint.restore(checkpoints, state, config=config)
    if restored is not None:
        state, position = restored
        batches.set_state(position)
        print(f"continuing {config.run} from step {state.step}")
    state = parallel.replicate(state)
    first = int(state.step) + 1
    run_folder.write_config(config)

    metrics = run_folder.MetricsWriter(config.run, after=first - 1)
    bar = tqdm(
        total=train.steps,
        initial=first - 1,
        unit="step",
        mininterval=0.1 if sys.stderr.isatty() else 15.0,
    )

    def report(number, numbers, batch):
        # Waits for the device: called when it already works on the next step.
        ids = [train_set.records[index].id for index in batch.image_index[batch.image_valid]]
        values = run_folder.finite_metrics(number, numbers, ids)
        metrics.write(number, values)
        bar.update(number - bar.n)
        rate = train.batch_size * (bar.format_dict["rate"] or 0.0)
        losses = {name: f"{value:.3f}" for name, value in values.items() if "norm" not in name}
        bar.set_postfix(losses | {"images/s": f"{rate:.1f}"}, refresh=False)

    def evaluate(number, split):
        model = training.merge(graphdef, state)
        # On one device, which never held more than its share of a batch.
        found = detect_dataset(
            model,
            splits[split],
            batch_size=parallel.per_device(train.batch_size),
            implementation=train.implementation,
        )
        result = evaluate_detections(found, splits[split])
        named = metrics_dict(result, data.class_names)
        if number >= first:  # a finished run is only shown again
            metrics.write(number, {f"{split}/{name}": value for name, value in named.items()})
        picture = run_folder.write_picture(config.run, number, found, splits[split])
        bar.write(f"step {number}: AP50 {result.coco.ap50:.3f} on {split}, picture {picture}")
        return result

    waiting = unsaved = None
    with checkpoints, metrics, bar:
        for number in range(first, train.steps + 1):
            batch = next(batches)
            state, numbers = step(state, batch)
            if waiting is not None:
                report(*waiting)
            waiting = (number, numbers, batch)
            due = number % train.checkpoint_every == 0 or number == train.steps
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
                unsaved["measured"] = run_folder.metric(result, train.best_metric)
        if unsaved is not None:
            checkpoint.save(checkpoints, **unsaved)
        if first > train.steps or best_split != data.test_split:
            result = evaluate(train.steps, data.test_split)
        best = checkpoint.best(checkpoints)

    print(format_table(splits[data.test_split], result.voc07, result.voc_area, result.coco))
    print(f"checkpoint {checkpoint.folder_of(config.run, train.steps)}")
    if best is not None:
        print(f"best       {checkpoint.folder_of(config.run, best[0])}: {train.best_metric} {best[1]:.3f}")


if __name__ == "__main__":
    main()
