"""Trains a detector and evaluates it: python train.py --config configs/shapes.py

Started again on the same run folder it continues from the newest checkpoint. The run folder holds
config.json, metrics.jsonl, TensorBoard events, checkpoints/ and pictures/.
"""

import sys

from tqdm import tqdm

from fasterrcnn_jax import checkpoint, cli, parallel, run_folder, training
from fasterrcnn_jax.data import loader, sources
from fasterrcnn_jax.evaluation.results import evaluate_detections, format_table, metrics_dict
from fasterrcnn_jax.inference import detect_dataset
from fasterrcnn_jax.models.detector import create


@cli.script
def main(argv: list[str] | None = None) -> None:
    config = cli.parse_config(argv, description=__doc__)
    data, train = config.data, config.train
    parallel.check_batch_size(train.batch_size)

    train_set = sources.open_split(data, data.train_split)
    test_set = sources.open_split(data, data.test_split)
    batches = loader.training_batches(
        train_set,
        data,
        config.model.image,
        batch_size=train.batch_size,
        seed=train.seed,
        steps=train.steps,
    )

    model = create(config.model, data.class_names, seed=train.seed)
    optimizer = training.create_optimizer(train)
    graphdef, state = training.create_state(model, optimizer, seed=train.seed)
    step = parallel.data_parallel(
        training.make_train_step(graphdef, optimizer, axis_name=parallel.AXIS)
    )

    run_folder.open_run(config)
    with (
        run_folder.MetricsWriter(config.run) as metrics,
        checkpoint.open_checkpoints(config.run, keep=train.keep_checkpoints) as checkpoints,
    ):
        restored = checkpoint.restore(checkpoints, state, config=config)
        if restored is not None:
            state, position = restored
            batches.set_state(position)
            print(f"continuing {config.run} from step {state.step}")
        state = parallel.replicate(state)

        def evaluate(number):
            found = detect_dataset(
                training.merge(graphdef, state), test_set, batch_size=train.batch_size
            )
            result = evaluate_detections(found, test_set)
            picture = run_folder.write_picture(config.run, number, found, test_set)
            metrics.write(number, metrics_dict(result, data.class_names))
            return result, picture

        def report(number, step_metrics, batch):
            # Waits for the step, so it is called when the next one is already on the device.
            ids = [train_set.records[i].id for i in batch.image_index[batch.image_valid]]
            values = run_folder.finite_metrics(number, step_metrics, ids)
            metrics.write(number, values)
            bar.update(number - bar.n)
            rate = train.batch_size * (bar.format_dict["rate"] or 0.0)
            losses = {name: f"{value:.3f}" for name, value in values.items() if name != "gradient_norm"}
            bar.set_postfix(losses | {"images/s": f"{rate:.1f}"}, refresh=False)

        first = int(state.step) + 1
        interval = 0.1 if sys.stderr.isatty() else 15.0
        with tqdm(total=train.steps, initial=first - 1, unit="step", mininterval=interval) as bar:
            waiting = None
            for number in range(first, train.steps + 1):
                batch = next(batches)
                state, step_metrics = step(state, batch)
                if waiting is not None:
                    report(*waiting)
                waiting = (number, step_metrics, batch)
                due = number % train.checkpoint_every == 0 or number == train.steps
                if not due:
                    continue
                # Only a state whose own step was finite is saved.
                report(*waiting)
                waiting = None
                measured = None
                if number == train.steps or train.evaluate_every and number % train.evaluate_every == 0:
                    result, picture = evaluate(number)
                    measured = result.coco.ap50
                    bar.write(f"step {number}: AP50 {measured:.3f} on {data.test_split}")
                checkpoint.save(
                    checkpoints,
                    state,
                    config=config,
                    iterator_state=batches.get_state(),
                    ap50=measured,
                )

        if first > train.steps:  # nothing was left to train
            result, picture = evaluate(train.steps)
        print(format_table(test_set, result.voc07, result.voc_area, result.coco))
        print(f"checkpoint {checkpoints.directory / str(checkpoints.latest.step)}")
        print(f"picture    {picture}")


if __name__ == "__main__":
    main()
