"""`fasterrcnn_jax.train` and `fasterrcnn_jax.evaluate`, as a Python program or a notebook calls them."""

import dataclasses
import logging
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny
from test_scripts import lines_of, steps_in

import fasterrcnn_jax
from fasterrcnn_jax import programs
from fasterrcnn_jax.config.text import load_config
from fasterrcnn_jax.data import loader
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.scripts import cli
from fasterrcnn_jax.training.evaluation import Outcome

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def environment():
    with (
        pytest.MonkeyPatch.context() as patch,
        tiny.restored_logging(),
        tiny.quick_compilation(),
        jax.numpy_dtype_promotion("standard"),  # Optax's schedules mix integers and floats
    ):
        patch.setenv("JAX_COMPILATION_CACHE_DIR", os.environ["FASTERRCNN_TEST_CACHE"])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny.write_voc(folder / "voc", train=9, test=5)
    config = tiny.config(folder, steps=STEPS, checkpoint_every=2, evaluate_every=2)
    image = dataclasses.replace(tiny.IMAGE, canvases=((96, 96),))
    model = dataclasses.replace(config.model, image=image)
    tiny.write_config(folder / "mine.py", dataclasses.replace(config, model=model))
    return folder


def of_the_process() -> tuple[Any, ...]:
    """Returns what a library must leave as it is: the handlers of signals, and the log."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    loggers = [logging.getLogger(name) for name in (None, "fasterrcnn_jax")]
    return handlers, [(log.level, log.handlers[:], log.disabled, log.propagate) for log in loggers]


class Trained(NamedTuple):
    result: programs.TrainingResult
    before: tuple[Any, ...]
    after: tuple[Any, ...]


def train(folder, run, **fields):
    return fasterrcnn_jax.train(folder / "voc", config=folder / "mine.py", run=run, **fields)


@pytest.fixture(scope="module")
def trained(folder):
    before = of_the_process()
    return Trained(train(folder, folder / "run"), before, of_the_process())


def test_a_training_returns_its_metrics_its_best_model_and_its_folder(folder, trained):
    result = trained.result
    assert result.folder == folder / "run" and result.best == folder / "run" / "best" and result.best.is_dir()
    assert {"AP50", "AP", "AP50/ring", "AP50/disc"} <= set(result.metrics)
    assert "mAP" in result.table and f"AP50 {result.metrics['AP50']:.2f}" in result.table
    assert result.model.class_names == tiny.CLASS_NAMES
    found = fasterrcnn_jax.predict(result.model, np.zeros((48, 72, 3), np.uint8))
    assert len(found.scores) == len(found.boxes)


def test_an_epoch_compiles_the_step_once_for_each_canvas(tmp_path, caplog):
    """The images have both orientations. Two epochs compile two steps, and nothing after both were met."""
    tiny.write_voc(tmp_path / "voc", train=16, test=2)
    tiny.write_config(tmp_path / "mine.py", tiny.config(tmp_path, steps=10, batch_size=4, evaluate_every=0))
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"):
        result = train(tmp_path, tmp_path / "run")
    compiled = [
        record.getMessage() for record in caplog.records if "compiling the training step" in record.getMessage()
    ]
    share = 4 // jax.local_device_count()
    expected = [f"({share}, 64, 96, 3)", f"({share}, 96, 64, 3)"]
    assert sorted(message.split("images ")[1] for message in compiled) == expected
    counts = [line["compilations"] for line in lines_of(result.folder, "gradient_norm")]
    assert counts[4:] == [counts[4]] * 6


def test_a_training_leaves_the_handlers_of_signals_and_the_log_as_they_were(trained):
    assert trained.before == trained.after


def test_the_same_call_continues_a_finished_run_without_training(folder, trained):
    again = train(folder, trained.result.folder)
    assert again.metrics == trained.result.metrics
    assert [line["step"] for line in lines_of(again.folder, "gradient_norm")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_training_in_another_thread_gives_the_same_numbers_and_handles_no_signal(folder, trained, tmp_path):
    results, before = [], of_the_process()
    thread = threading.Thread(target=lambda: results.append(train(folder, tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].metrics == trained.result.metrics and of_the_process() == before


class Interrupted:
    """Batches of which number `at` (from 1) comes together with Ctrl-C."""

    def __init__(self, batches, at):
        self.batches, self.at, self.met = batches, at, 0
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        self.met += 1
        if self.met == self.at:
            signal.raise_signal(signal.SIGINT)
        return next(self.batches)


def test_a_signal_saves_and_raises_keyboard_interrupt_and_the_same_call_continues(
    folder, trained, tmp_path, monkeypatch
):
    original, before = loader.training_batches, of_the_process()
    with monkeypatch.context() as patch:
        patch.setattr(loader, "training_batches", lambda *a, **k: Interrupted(original(*a, **k), 2))
        with pytest.raises(KeyboardInterrupt, match="the same command continues"):
            train(folder, tmp_path / "run")
    assert of_the_process() == before
    assert steps_in(tmp_path / "run")[-1] < STEPS
    assert train(folder, tmp_path / "run").metrics == trained.result.metrics


def test_a_run_starts_from_the_best_checkpoint_of_another(folder, trained, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fasterrcnn_jax"):
        train(folder, tmp_path / "run", init=trained.result.folder)
    assert f"{trained.result.best}: " in caplog.text
    first, again = (lines_of(run, "gradient_norm")[0] for run in (trained.result.folder, tmp_path / "run"))
    assert first["rpn_objectness"] != again["rpn_objectness"]


# ---------------------------------------------------------------- the configuration that a call means


@pytest.fixture
def asked(monkeypatch):
    """Returns a function: arguments of `train` -> the configuration that they mean. Nothing is trained."""
    seen = []

    def note(config):
        seen.append(config)
        return Outcome(config.run, {"AP50": None}, ("table",))

    monkeypatch.setattr(programs.training, "train_stages", note)

    def call(*args, **fields):
        fasterrcnn_jax.train(*args, **fields)
        return seen[-1]

    return call


def test_a_folder_alone_is_trained_on_as_by_the_command(asked, tmp_path):
    assert asked(tmp_path) == cli.parse_config([str(tmp_path)], description="")
    assert asked(str(tmp_path)) == asked(tmp_path)


def test_the_name_of_a_shipped_configuration_is_enough(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert asked(config="shapes.py") == load_config(cli.CONFIGS / "shapes.py")


def test_fields_are_given_by_their_last_part_or_by_their_full_name(asked, tmp_path):
    config = asked(
        tmp_path,
        init="weights.pth",
        epochs=3,
        batch_size=8,
        size=256,
        class_names=["ring"],
        split=0.7,
        run="here",
        **{"model.rpn.channels": 64, "train.steps": 10},
    )
    assert (config.init, config.run, config.size) == (Path("weights.pth"), Path("here"), 256)
    assert (config.train.epochs, config.train.batch_size, config.train.steps) == (3, 8, 10)
    assert (config.data.class_names, config.data.split, config.model.rpn.channels) == (("ring",), (0.7,), 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batchsize": 8}, "batchsize: no field has this name; .*batch_size"),
        (
            {"config": "folder.py", "channels": 8},
            "channels: several fields have this name; model.rpn.channels or model.box_head.channels",
        ),
        ({"batch_size": "eight"}, "train.batch_size must be int, got 'eight'"),
        ({"batch_size": 0}, "train.batch_size: batch_size must be positive, got 0"),
        ({"epochs": -1}, "train.epochs: epochs must be positive, got -1"),
        ({"data": "nowhere"}, "nowhere"),
        ({"config": "nothing.py"}, "nothing.py: no such file"),
        (
            {"config": "shapes.py", "init": "nowhere.pth", "data.shapes.num_train": 9, "data.shapes.num_test": 3},
            "nowhere.pth",
        ),
    ],
)
def test_a_call_that_cannot_be_used_raises_and_never_exits(tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        fasterrcnn_jax.train(**fields)


def test_a_run_of_other_settings_is_refused(folder, trained):
    with pytest.raises(InputError, match="train.learning_rate = 0.01, but 0.5 was requested"):
        train(folder, trained.result.folder, learning_rate=0.5)


# ---------------------------------------------------------------- evaluate


def test_an_evaluation_of_a_run_gives_the_metrics_of_its_training_and_writes_nothing(trained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = of_the_process(), sorted(trained.result.folder.rglob("*"))
    found = fasterrcnn_jax.evaluate(trained.result.folder)
    assert found.metrics == trained.result.metrics and found.split == "test"
    assert found.table in trained.result.table
    assert len(found.detections) == len(found.dataset.records) == 5
    assert before == (of_the_process(), sorted(trained.result.folder.rglob("*"))) and not list(tmp_path.iterdir())


def test_an_evaluation_takes_one_checkpoint_and_a_split(trained):
    step = lines_of(trained.result.folder, "test/AP50")[0]
    found = fasterrcnn_jax.evaluate(trained.result.folder / "checkpoints" / "2", split="test")
    assert step["step"] == 2 and found.metrics["AP50"] == step["test/AP50"]
    on_train = fasterrcnn_jax.evaluate(str(trained.result.best), split="train")
    assert on_train.split == "train" and len(on_train.detections) == 9


@pytest.mark.parametrize("renamed", [("disc", "ring"), ("disc", "square"), ("ring", "square")])
def test_a_folder_with_other_classes_is_evaluated_on_the_classes_of_the_model(folder, trained, tmp_path, renamed):
    """The folder has one class of two, or one that the model does not know, whose objects are left out."""
    root = Path(shutil.copytree(folder / "voc", tmp_path / "voc"))
    for path in (root / "Annotations").iterdir():
        path.write_text(path.read_text().replace(*renamed))
    found = fasterrcnn_jax.evaluate(trained.result.folder, root)
    labels = {int(label) for record in found.dataset.records for label in record.labels}
    gone = tiny.CLASS_NAMES.index(renamed[0]) + 1
    assert found.dataset.class_names == tiny.CLASS_NAMES and labels == {1, 2} - {gone}
    assert found.metrics[f"AP50/{renamed[0]}"] is None
    assert found.metrics["AP50"] == pytest.approx(found.metrics[f"AP50/{tiny.CLASS_NAMES[2 - gone]}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ckpt": "nowhere"}, "nowhere: no such file or folder"),
        ({"split": "tset"}, "tset"),
        ({"data": "nowhere"}, "nowhere"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
    ],
)
def test_an_evaluation_that_is_not_possible_raises_and_never_exits(trained, arguments, message):
    with pytest.raises(InputError, match=message):
        fasterrcnn_jax.evaluate(**{"ckpt": trained.result.folder} | arguments)
