"""Fine-tuning another program's weights to other classes: train, save, load, convert, and load again."""

import dataclasses

import jax
import numpy as np
import published_names
import pytest
import safetensors.numpy
import tiny
from published_names import by_rule
from test_weights import CHANNELS, FC, WIDTH, thin

import fasterrcnn_jax
from fasterrcnn_jax import __main__ as entry
from fasterrcnn_jax.config.families import IMAGENET_RGB, resnet_fpn
from fasterrcnn_jax.config.text import load_config
from fasterrcnn_jax.models.detector import create_detector
from fasterrcnn_jax.scripts import train


@pytest.fixture
def run(tmp_path):
    """Returns a function that trains on two classes from a weights file with four, and the configuration."""
    tiny.write_voc(tmp_path / "voc", train=4, test=2)
    shapes = published_names.torchvision_fpn(50, WIDTH, version=1, channels=CHANNELS, fc=FC, classes=4)
    init = tmp_path / "published.safetensors"
    safetensors.numpy.save_file(by_rule(shapes), init)
    config = tiny.config(tmp_path, steps=2, batch_size=4, learning_rate=1e-3)
    model = thin(resnet_fpn(50))
    image = dataclasses.replace(model.image, short_side=64, long_side=96, canvases=((96, 96),), **IMAGENET_RGB)
    model = dataclasses.replace(
        model,
        image=image,
        train_proposals=dataclasses.replace(model.train_proposals, post_nms_top_n=32),
        test_proposals=dataclasses.replace(model.test_proposals, post_nms_top_n=16),
        roi_sampling=dataclasses.replace(model.roi_sampling, rois_per_image=16),
        postprocess=dataclasses.replace(model.postprocess, score_threshold=0.0, max_detections=10),
    )
    config = dataclasses.replace(config, model=model)
    path = tiny.write_config(tmp_path / "fine.py", config)

    def start(*arguments):
        with tiny.restored_logging(), tiny.quick_compilation():
            train.main(["--config", str(path), *arguments])

    return start, load_config(path), init


def test_a_run_starts_from_another_programs_weights_and_its_own_are_saved_and_loaded(run, tmp_path, capsys):
    start, config, init = run
    start("--init", str(init))
    assert "the file has 4 classes, the model 2" in capsys.readouterr().err
    trained = fasterrcnn_jax.load(config.run)
    began = fasterrcnn_jax.load_weights(create_detector(config.model, tiny.CLASS_NAMES, seed=config.train.seed), init)
    stages = [[stage.blocks[0].convs[0].kernel[...] for stage in model.backbone.stages] for model in (trained, began)]
    np.testing.assert_array_equal(stages[0][0], stages[1][0])  # the first stage is fixed
    assert 0 < np.abs(stages[0][2] - stages[1][2]).max() < 0.1

    # Convert and load into a model with other random weights: every weight is replaced.
    out = tmp_path / "ours.safetensors"
    assert entry.main(["weights", "convert", str(config.run), str(out)]) == 0
    again = fasterrcnn_jax.create(config.model, tiny.CLASS_NAMES, weights=out, seed=99)
    for one, other in zip(jax.tree.leaves(trained), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    images = [tiny.rectangle_image((48, 72), (10, 10, 40, 40)), tiny.rectangle_image((72, 48), (5, 20, 30, 50), seed=1)]
    with tiny.quick_compilation():
        for one, other in zip(
            fasterrcnn_jax.predict(trained, images), fasterrcnn_jax.predict(again, images), strict=True
        ):
            assert len(one.scores) > 0
            for values, others in zip(one[:3], other[:3], strict=True):
                np.testing.assert_array_equal(values, others)


@pytest.mark.slow
def test_a_continued_run_does_not_need_its_initial_weights_file(run):
    start, config, init = run
    start("--init", str(init), "--train.steps", "2")
    before = fasterrcnn_jax.load(config.run)
    init.unlink()
    start("--init", str(init))
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(fasterrcnn_jax.load(config.run)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_that_do_not_fit_end_the_run_before_it_begins(run, capsys):
    start, config, init = run
    init.write_bytes(b"no weights")
    with pytest.raises(SystemExit) as caught:
        start("--init", str(init))
    assert caught.value.code == 2
    assert "published.safetensors: must be .safetensors" in capsys.readouterr().err
    assert not (config.run / "config.json").exists()
