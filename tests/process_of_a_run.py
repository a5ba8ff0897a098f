"""One process of a run: python process_of_a_run.py OUT ARGUMENTS-OF-train.py

Trains, detects once more with the newest checkpoint, and writes the values of this process to OUT.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from fasterrcnn_jax.data.sources import open_split  # noqa: E402
from fasterrcnn_jax.inference import dataset as dataset_loop  # noqa: E402
from fasterrcnn_jax.models.detector import backbone_class  # noqa: E402
from fasterrcnn_jax.processes import per_device  # noqa: E402
from fasterrcnn_jax.scripts import cli  # noqa: E402
from fasterrcnn_jax.scripts import train as train_script  # noqa: E402
from fasterrcnn_jax.training import checkpoint  # noqa: E402


def main(out, argv):
    rows, data_parallel = [], train_script.data_parallel

    def counting(step):
        run = data_parallel(step)
        return lambda state, batch: rows.append(len(batch.images)) or run(state, batch)

    train_script.data_parallel = counting
    train_script.main(argv)
    config = cli.parse_config(argv, description="")
    dataset = open_split(config.data, config.data.test_split)

    checkpoint.open_checkpoints(config.run, keep=1).close()  # as a run that is started again: together

    looked_at, gathered = [], dataset_loop.gathered
    dataset_loop.gathered = lambda found: looked_at.extend(found) or gathered(found)
    # The configuration of the test itself may name a backbone.
    model = checkpoint.load(config.run, backbone=backbone_class(config.model.backbone))
    found = dataset_loop.detect_dataset(model, dataset, batch_size=per_device(config.train.batch_size))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.split(model)[1])
    np.savez(
        out,
        **{f"parameter {jax.tree_util.keystr(path)}": leaf for path, leaf in leaves},
        rows=np.array(rows),
        looked_at=np.array(looked_at, np.int32),
        lengths=np.array([len(of.scores) for of in found]),
        boxes=np.concatenate([of.boxes for of in found]),
        scores=np.concatenate([of.scores for of in found]),
        labels=np.concatenate([of.labels for of in found]),
        devices=np.array([jax.local_device_count(), jax.device_count()]),
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
