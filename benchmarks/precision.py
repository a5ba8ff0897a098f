"""Compares two runs that differ in `model.compute_dtype`: their loss curves and their smallest gradients.

    python benchmarks/precision.py RUN_FLOAT32 RUN_BFLOAT16

Both runs need their data. The gradients are computed with the weights of the newest checkpoint on the first batch of
the run, in the run's own data type. Loss scaling is only needed for types with too small a range. The script therefore
prints how many gradients are below the smallest value of float16 and of bfloat16, and how many are zero in bfloat16
but not in float32.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

# A checkout need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LOSSES = ("rpn_objectness", "rpn_box", "box_class", "box_delta")
WINDOW = 25  # steps that a mean is taken over
# Smallest positive values, subnormal ones included.
FLOAT16, BFLOAT16 = 2.0**-24, 2.0**-133


def loss_curve(run: Path) -> list[float]:
    """Returns the mean of the sum of losses over each window of steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    totals = [sum(line[name] for name in LOSSES) for line in lines if LOSSES[0] in line]
    return [float(np.mean(totals[start : start + WINDOW])) for start in range(0, len(totals), WINDOW)]


def gradients(run: Path, compute_dtype: str) -> np.ndarray:
    """Returns all gradients of a run's newest weights on its first batch as one vector."""
    import jax
    from flax import nnx

    from fasterrcnn_jax.data import loader, sources
    from fasterrcnn_jax.data.training_set import prepare_training_set
    from fasterrcnn_jax.models.detector import split
    from fasterrcnn_jax.models.faster_rcnn import training_losses
    from fasterrcnn_jax.training import checkpoint

    config = checkpoint.load_run_config(run)
    data, train = config.data, config.train
    dataset = prepare_training_set(sources.open_split(data, data.train_split), data)
    batch = next(
        loader.training_batches(
            dataset, data, config.model.image, batch_size=train.batch_size, seed=train.seed, steps=train.steps
        )
    )
    model = checkpoint.load(run)
    model.config = type(model.config)(**vars(model.config) | {"compute_dtype": compute_dtype})
    graphdef, params, frozen = split(model)

    @jax.jit
    def gradient(params):
        def total(params):
            losses = training_losses(nnx.merge(graphdef, params, frozen), batch, jax.random.key(0)).means.values()
            return sum(mean.sum / mean.count for mean in losses)

        return jax.grad(total)(params)

    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient(params))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float32", type=Path)
    parser.add_argument("bfloat16", type=Path)
    runs = vars(parser.parse_args())
    print("| steps | " + " | ".join(runs) + " |\n|---|---|---|")
    for number, values in enumerate(zip(*(loss_curve(run) for run in runs.values()), strict=True)):
        print(f"| {number * WINDOW + 1}-{(number + 1) * WINDOW} | " + " | ".join(f"{v:.4f}" for v in values) + " |")
    wide, narrow = (gradients(runs["bfloat16"], dtype) for dtype in ("float32", "bfloat16"))
    sizes = np.abs(narrow)
    print(f"\n{sizes.size} gradients of {runs['bfloat16']}, from {sizes[sizes > 0].min():.2g} to {sizes.max():.2g}")
    print(f"below float16's smallest value   {np.mean((sizes > 0) & (sizes < FLOAT16)):.4%}")
    print(f"below bfloat16's smallest value  {np.mean((sizes > 0) & (sizes < BFLOAT16)):.4%}")
    print(f"zero, and not zero in float32    {np.mean((narrow == 0) & (wide != 0)):.4%}")


if __name__ == "__main__":
    main()
