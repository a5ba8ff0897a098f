"""Trains a configuration on one repeated batch and prints compile time, seconds per step, memory, and the losses.

    python benchmarks/full_size.py --config configs/voc.py --data.root FOLDER --train.steps 6

Takes a value, or several, for every field of the configuration, as train.py does. Unlike train.py, it repeats one
batch and saves nothing.
"""

import argparse
import ast
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax

# A checkout need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fasterrcnn_jax.config import Config  # noqa: E402
from fasterrcnn_jax.config.text import load_config, with_fields  # noqa: E402
from fasterrcnn_jax.data import loader, sources  # noqa: E402
from fasterrcnn_jax.data.training_set import prepare_training_set  # noqa: E402
from fasterrcnn_jax.errors import InputError  # noqa: E402
from fasterrcnn_jax.models.detector import create_detector  # noqa: E402
from fasterrcnn_jax.processes import AXIS, check_batch_size, replicate  # noqa: E402
from fasterrcnn_jax.training.optimizer import create_optimizer  # noqa: E402
from fasterrcnn_jax.training.step import create_state, data_parallel, make_train_step  # noqa: E402


def parse_config(argv: list[str] | None) -> Config:
    """Returns the configuration of `--config FILE` with the fields that the other arguments give, --train.steps 6."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="Python file that builds the configuration")
    arguments, fields = parser.parse_known_args(argv)
    values: dict[str, list[Any]] = {}
    for word in fields:
        if word.startswith("--"):
            given = values.setdefault(word.removeprefix("--"), [])
        elif values:
            given.append(_value(word))
        else:
            parser.error(f"{word} belongs to no field: --FIELD VALUE")
    try:
        single = {name: given[0] if len(given) == 1 else given for name, given in values.items()}
        return with_fields(load_config(arguments.config), single)
    except InputError as error:
        parser.error(str(error))


def _value(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (SyntaxError, ValueError):
        return word


def main(argv: list[str] | None = None) -> None:
    config = parse_config(argv)
    data, train = config.data, config.train
    check_batch_size(train.batch_size)
    dataset = prepare_training_set(sources.open_split(data, data.train_split), data)
    batch = next(
        loader.training_batches(
            dataset, data, config.model.image, batch_size=train.batch_size, seed=train.seed, steps=train.steps
        )
    )
    print(f"images {batch.images.shape}, {int(batch.ground_truth.valid.sum())} objects, {jax.devices()}")

    model = create_detector(config.model, data.class_names, seed=train.seed)
    optimizer = create_optimizer(train)
    graphdef, state = create_state(model, optimizer, seed=train.seed)
    trained, fixed = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.frozen))
    print(f"{trained / 1e6:.1f} M values trained, {fixed / 1e6:.1f} M not")
    step = data_parallel(make_train_step(graphdef, optimizer, axis_name=AXIS))
    state = replicate(state)
    seconds = []
    for number in range(1, train.steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        values = {name: float(value) for name, value in metrics._asdict().items()}  # waits
        seconds.append(time.perf_counter() - start)
        losses = "  ".join(f"{name} {values[name]:.4f}" for name in list(values)[:4])
        print(f"step {number}  {seconds[-1]:6.2f} s  sum {sum(list(values.values())[:4]):.4f}  {losses}", flush=True)
    steady = sorted(seconds[1:])
    print(f"first step (with compilation) {seconds[0]:.1f} s, others: median {steady[len(steady) // 2]:.2f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process {peak:.1f} GiB")
    for device in jax.local_devices():
        if statistics := device.memory_stats():
            print(f"{device}: peak {statistics['peak_bytes_in_use'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
