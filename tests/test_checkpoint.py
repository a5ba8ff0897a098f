"""Checkpoints: same bits after reading, detection from a checkpoint alone, no partial checkpoints, clear errors."""

import contextlib
import dataclasses
import gc
import inspect
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.prediction import predict
from fasterrcnn_jax.models.detector import Detector
from fasterrcnn_jax.scripts import train
from fasterrcnn_jax.training import checkpoint
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.stages import stages_of
from fasterrcnn_jax.training.state import TrainState
from fasterrcnn_jax.training.step import create_state

ROOT = Path(__file__).parents[1]
# When reading fails, Orbax leaves coroutines that were never awaited and callbacks to a closed event loop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    pytest.mark.filterwarnings(
        "ignore:(?s)Exception ignored.*(never awaited|Event loop is closed):pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def environment():
    with tiny.quick_compilation():
        yield
    # Collect garbage here, so that these warnings do not appear in another test module.
    time.sleep(0.1)
    gc.collect()


@pytest.fixture(scope="module")
def model(random_weights):
    frozen = dataclasses.replace(tiny.MODEL, backbone=dataclasses.replace(tiny.MODEL.backbone, norm="frozen_batch"))
    return random_weights(lambda: Detector(frozen, tiny.CLASS_NAMES, rng=np.random.default_rng(0)), seed=4)


@pytest.fixture(scope="module")
def state(model):
    """Returns a state in the middle of a run: every value that training changes is non-zero."""
    optimizer = create_optimizer(tiny.config(Path("x")).train)
    _, state = create_state(model, optimizer, seed=5)
    generator = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf: (
            jnp.asarray(generator.standard_normal(leaf.shape), leaf.dtype) if leaf.dtype == jnp.float32 else leaf + 3
        ),
        state.opt_state,
    )
    return state._replace(opt_state=moved)


@pytest.fixture(scope="module")
def config(tmp_path_factory, model):
    config = tiny.config(tmp_path_factory.mktemp("checkpoints"))
    return dataclasses.replace(config, model=model.config)


def at(state, step, *, shift=0.0):
    params = jax.tree.map(lambda leaf: leaf + jnp.float32(shift), state.params)
    return state._replace(step=jnp.int32(step), params=params)


def blank_state():
    """Returns a state with one weight, for tests that need no detector."""
    key = jnp.zeros(2, jnp.uint32)
    return TrainState(
        step=jnp.int32(0), params={"w": jnp.zeros(2)}, averaged=None, frozen={}, running={}, opt_state={}, key=key
    )


def save(run, state, config, *, keep=2, ap50s):
    """Saves `state` at every {step: AP50}; step n's weights are shifted by n - 1 tenths."""
    checkpoints = checkpoint.open_checkpoints(run, keep=keep)
    with checkpoint.closing(checkpoints):
        for step, ap50 in ap50s.items():
            checkpoint.save(
                checkpoints,
                state=at(state, step, shift=(step - 1) / 10),
                config=config,
                iterator_state={"next_index": step * 10},
                measured=ap50,
            )


@pytest.fixture(scope="module")
def run(config, state):
    """Returns a run folder with checkpoints of step 1 (not shifted) and step 2."""
    save(config.run, state, config, ap50s={1: 0.5, 2: 0.25})
    return config.run


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def restore(run, state, config):
    with checkpoint.open_checkpoints(run, keep=2) as checkpoints:
        return checkpoint.restore(checkpoints, state, config=config)


def steps_in(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def assert_same_bits(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert leaf.dtype == expected.dtype
        np.testing.assert_array_equal(leaf, expected)


def parameters(model):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.split(model)[1])
    }


def test_a_run_folder_may_be_relative(copied, state, config, monkeypatch):
    monkeypatch.chdir(copied.parent)
    with checkpoint.open_checkpoints(Path(copied.name), keep=2) as checkpoints:
        restored, _ = checkpoint.restore(checkpoints, state, config=config)
    assert restored.step == 2
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["1", "2"]
    assert checkpoint.load(Path(copied.name)).class_names == tiny.CLASS_NAMES


def test_the_newest_checkpoint_comes_back_bit_for_bit(run, state, config):
    blank = jax.tree.map(jnp.zeros_like, state)
    restored, position = restore(run, blank, config)
    assert_same_bits(restored, at(state, 2, shift=0.1))
    assert position == {"next_index": 20}


def test_a_folder_without_checkpoints_restores_nothing(tmp_path, state, config):
    assert restore(tmp_path / "new", state, config) is None


@pytest.mark.parametrize(
    "keep, ap50s, kept",
    [
        (1, {1: None, 2: None, 3: None}, [3]),
        (2, {1: 0.1, 2: 0.9, 3: 0.2, 4: None, 5: 0.3}, [2, 4, 5]),
        (1, {1: 0.4, 2: 0.3, 3: 0.8, 4: 0.7}, [3, 4]),
        (2, {1: 0.5, 2: float("nan"), 3: None, 4: float("nan")}, [1, 3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, config, keep, ap50s, kept):
    tiny_state = blank_state()
    save(tmp_path, tiny_state, config, keep=keep, ap50s=ap50s)
    assert steps_in(tmp_path) == kept


def test_the_best_checkpoint_is_remembered_when_a_run_continues(tmp_path, config):
    tiny_state = blank_state()
    save(tmp_path, tiny_state, config, keep=1, ap50s={1: 0.9, 2: 0.1})
    save(tmp_path, tiny_state, config, keep=1, ap50s={3: 0.2, 4: None})
    assert steps_in(tmp_path) == [1, 4]


def test_load_takes_a_run_its_checkpoints_or_one_of_them(run, model, monkeypatch):
    first, newest = checkpoint.load(run / "checkpoints" / "1"), checkpoint.load(run)
    before = parameters(model)
    for name, leaf in parameters(first).items():
        np.testing.assert_array_equal(leaf, before[name])
    assert any(np.any(leaf != before[name]) for name, leaf in parameters(newest).items())
    by_other_names = [checkpoint.load(run / "checkpoints"), checkpoint.load(str(run))]
    monkeypatch.chdir(run / "checkpoints" / "2")
    by_other_names.append(checkpoint.load("."))
    for other in by_other_names:
        for name, leaf in parameters(other).items():
            np.testing.assert_array_equal(leaf, parameters(newest)[name])
    assert checkpoint.run_of(".").samefile(run)


def test_a_load_logs_nothing(run, caplog):
    """The storage would warn that a part without arrays may be damaged: `meta` holds texts alone."""
    with caplog.at_level("WARNING"):
        checkpoint.load(run)
    assert not [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("below", [".", "checkpoints", "checkpoints/1"])
def test_a_checkpoint_knows_its_run(run, below):
    assert checkpoint.run_of(run / below).samefile(run)


def test_class_names_and_configuration_come_from_the_checkpoint_alone(copied, config):
    model = checkpoint.load(copied)
    assert model.class_names == tiny.CLASS_NAMES and model.config == config.model
    assert checkpoint.load_run_config(copied / "checkpoints" / "1") == config


PROGRAM = """
import sys
import numpy as np
import fasterrcnn_jax
model = fasterrcnn_jax.load(sys.argv[1])
pixels = np.load(sys.argv[2])
found = fasterrcnn_jax.predict(model, pixels)
np.savez(sys.argv[3], boxes=found.boxes, scores=found.scores, labels=found.labels, names=found.class_names)
"""


def test_a_fresh_process_detects_the_same_bits(run, model, tmp_path):
    pixels = tiny.rectangle_image((60, 80), (10, 12, 40, 44))
    np.save(tmp_path / "pixels.npy", pixels)
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [run / "checkpoints" / "1", tmp_path / "pixels.npy", tmp_path / "found.npz"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found, expected = np.load(tmp_path / "found.npz"), predict(model, pixels)
    assert len(expected.scores)
    np.testing.assert_array_equal(found["boxes"], expected.boxes)
    np.testing.assert_array_equal(found["scores"], expected.scores)
    np.testing.assert_array_equal(found["labels"], expected.labels)
    assert tuple(found["names"]) == expected.class_names


def test_an_interrupted_save_leaves_the_previous_checkpoint_usable(copied, state, config):
    """A killed process leaves a folder under a temporary name with part of the content."""
    half = copied / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(copied / "checkpoints" / "2", half)
    shutil.rmtree(half / "train")
    newest = parameters(checkpoint.load(copied / "checkpoints" / "2"))
    for name, leaf in parameters(checkpoint.load(copied)).items():
        np.testing.assert_array_equal(leaf, newest[name])
    assert half.exists()  # loading does not change a run folder
    restored, _ = restore(copied, state, config)
    assert restored.step == 2 and not half.exists()
    save(copied, state, config, ap50s={3: None})
    assert steps_in(copied) == [1, 2, 3]  # 1 is the best


@contextlib.contextmanager
def full_disk(bytes_per_file):
    """Limits the size of files, so that a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [300, 100_000])
def test_a_full_disk_is_named_and_leaves_the_checkpoints_before_it(copied, state, config, room):
    message = r"checkpoints/3 cannot be written \(.*the checkpoints before"
    with pytest.raises(OSError, match=message) as caught, full_disk(room):
        save(copied, state, config, keep=1, ap50s={3: 0.75})
    assert "\n" not in str(caught.value)
    assert steps_in(copied) == [1, 2]
    assert_same_bits(restore(copied, state, config)[0], at(state, 2, shift=0.1))
    save(copied, state, config, keep=1, ap50s={3: 0.75})
    assert steps_in(copied) == [3]
    assert [path.name for path in (copied / "checkpoints").iterdir()] == ["3"]


def test_files_that_are_not_checkpoints_are_ignored(copied):
    (copied / "checkpoints" / "9").write_text("")
    (copied / "checkpoints" / "7.damaged").mkdir()
    expected = parameters(checkpoint.load(copied / "checkpoints" / "2"))
    for name, leaf in parameters(checkpoint.load(copied)).items():
        np.testing.assert_array_equal(leaf, expected[name])


def test_an_absent_or_empty_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="absent: no such folder"):
        checkpoint.load(tmp_path / "absent")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for path in (tmp_path / "empty", tmp_path / "empty" / "checkpoints"):
        for function in (checkpoint.load, checkpoint.load_run_config, checkpoint.run_of):
            with pytest.raises(InputError, match=f"{path}: contains no checkpoint"):
                function(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file, not a run folder"):
        checkpoint.load(tmp_path / "file")


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(part):
    def damage(step):
        path = largest_file(step / part)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def flip_bit(part):
    """Flips a bit in the middle of the largest file, in a value, so that the file can still be parsed."""

    def damage(step):
        path = largest_file(step / part)
        values = bytearray(path.read_bytes())
        values[len(values) // 2] ^= 4
        path.write_bytes(bytes(values))

    return damage


def rewrite(name, change):
    def damage(step):
        path = step / name
        path.write_text(change(path.read_text()))

    return damage


# Kinds of damage to a checkpoint, and the error message of each.
DAMAGE = {
    "model removed": (lambda step: shutil.rmtree(step / "model"), "incomplete or damaged"),
    "meta removed": (lambda step: shutil.rmtree(step / "meta"), "incomplete or damaged"),
    "nothing left": (lambda step: [shutil.rmtree(part) for part in step.iterdir() if part.is_dir()], "incomplete"),
    "model cut": (cut("model"), "incomplete or damaged"),
    "meta is no json": (rewrite("meta/_strings.json", lambda text: "{]" + text), "incomplete or damaged"),
    "model flipped": (flip_bit("model"), "damaged: model differs from what was saved"),
    "field renamed": (
        rewrite("meta/_strings.json", lambda text: text.replace("short_side", "shirt_side")),
        "damaged: meta differs from what was saved",
    ),
    "digit changed": (
        rewrite("meta/_strings.json", lambda text: text.replace("64", "65", 1)),
        "damaged: meta differs from what was saved",
    ),
}
DAMAGE_TO_TRAINING = {
    "optimizer flipped": (flip_bit("train"), "damaged: train differs from what was saved"),
    "optimizer cut": (cut("train"), "incomplete or damaged"),
    "metric changed": (
        rewrite("metrics/metrics", lambda text: text.replace("0.25", "0.75")),
        "damaged: metrics differs from what was saved",
    ),
    "metric is no json": (rewrite("metrics/metrics", lambda text: "{]"), "incomplete or damaged"),
}


def kinds(damage):
    return pytest.mark.parametrize("damage, message", damage.values(), ids=damage)


@kinds(DAMAGE)
def test_a_damaged_checkpoint_that_was_named_is_refused_in_one_line(copied, damage, message):
    named = copied / "checkpoints" / "2"
    damage(named)
    with pytest.raises(InputError, match=f"checkpoints/2: .*{message}") as caught:
        checkpoint.load(named)
    assert "\n" not in str(caught.value)


@kinds(DAMAGE)
def test_a_run_with_a_damaged_checkpoint_is_loaded_from_the_one_before_with_a_warning(copied, damage, message, caplog):
    expected = parameters(checkpoint.load(copied / "checkpoints" / "1"))
    damage(copied / "checkpoints" / "2")
    before = sorted(copied.rglob("*"))
    for name, leaf in parameters(checkpoint.load(copied)).items():
        np.testing.assert_array_equal(leaf, expected[name])
    (record,) = [record for record in caplog.records if record.name.startswith("fasterrcnn_jax")]
    assert record.levelname == "WARNING" and re.search(
        f"checkpoints/2: .*{message}.*; the checkpoint before it is used", record.getMessage()
    )
    assert sorted(copied.rglob("*")) == before  # loading does not change a run folder


@kinds(DAMAGE | DAMAGE_TO_TRAINING)
def test_training_sets_a_damaged_checkpoint_aside_and_goes_on_from_the_one_before(
    copied, state, config, damage, message, caplog
):
    damage(copied / "checkpoints" / "2")
    left = {path.name for path in (copied / "checkpoints" / "2").rglob("*")}
    restored, position = restore(copied, state, config)
    assert_same_bits(restored, at(state, 1))
    assert position == {"next_index": 10}
    (record,) = [record for record in caplog.records if record.name.startswith("fasterrcnn_jax")]
    assert record.levelname == "WARNING" and re.search(
        f"checkpoints/2: .*{message}.*; it is renamed to 2.damaged, and the run continues from .*/1$",
        record.getMessage(),
    )
    assert {path.name for path in (copied / "checkpoints" / "2.damaged").rglob("*")} == left
    save(copied, state, config, ap50s={2: None})
    assert restore(copied, state, config)[0].step == 2


def test_a_checkpoint_damaged_twice_is_set_aside_under_another_name(copied, state, config):
    for _ in range(2):
        cut("model")(copied / "checkpoints" / "2")
        assert restore(copied, state, config)[0].step == 1
        save(copied, state, config, ap50s={2: None})
    names = {path.name for path in (copied / "checkpoints").iterdir()}
    assert names == {"1", "2", "2.damaged", "2.damaged.damaged"}


def test_a_damaged_metric_of_an_older_checkpoint_is_set_aside_too(copied, state, config):
    """Orbax could not open the folder with such a checkpoint in it."""
    (copied / "checkpoints" / "1" / "metrics" / "metrics").write_text("{]")
    assert restore(copied, state, config)[0].step == 2
    assert (copied / "checkpoints" / "1.damaged").is_dir()


def test_without_an_intact_checkpoint_nothing_starts_and_nothing_is_renamed(copied, state, config):
    flip_bit("model")(copied / "checkpoints" / "2")
    cut("model")(copied / "checkpoints" / "1")
    before = sorted(copied.rglob("*"))
    message = "no checkpoint is intact.*checkpoints/2: .*model differs.*checkpoints/1: .*incomplete"
    with pytest.raises(InputError, match=message) as caught:
        restore(copied, state, config)
    assert "\n" not in str(caught.value) and sorted(copied.rglob("*")) == before
    with pytest.raises(InputError, match="checkpoints/1: .*incomplete"):
        checkpoint.load(copied / "checkpoints")


def test_averaged_weights_are_saved_and_used_for_detection(tmp_path, state, config, model):
    averaged = jax.tree.map(lambda leaf: leaf + 1.0, state.params)
    moving = state._replace(averaged=averaged)
    save(tmp_path, moving, config, ap50s={1: None})
    assert_same_bits(restore(tmp_path, moving, config)[0], at(moving, 1))
    plain, loaded = parameters(model), parameters(checkpoint.load(tmp_path))
    changed = {name for name in plain if np.any(plain[name] != loaded[name])}
    assert len(changed) == len(jax.tree.leaves(averaged))
    for name in changed:
        np.testing.assert_array_equal(loaded[name], plain[name] + np.float32(1.0))


def test_values_that_do_not_fit_the_model_are_named(copied, state, config):
    other = state._replace(key=jnp.zeros(4, jnp.uint32))
    with pytest.raises(InputError, match=r"2 does not fit its model: key is uint32\[2\], expected uint32\[4\]"):
        restore(copied, other, config)
    with pytest.raises(InputError, match="averaged/.* is nothing, expected float32"):
        restore(copied, state._replace(averaged=state.params), config)


@pytest.mark.parametrize(
    "part, values, message",
    [
        ("data", {"class_names": ("ring", "disc", "cube")}, r"data.class_names = \['ring', 'disc'\], .*'cube'"),
        ("data", {"class_names": ("disc", "ring")}, r"data.class_names"),
        ("train", {"optimizer": "adamw"}, "train.optimizer = sgd, but adamw"),
        ("train", {"steps": 5}, "train.steps = 6, but 5"),
        ("train", {"steps": 9, "batch_size": 2}, "train.batch_size = 4, but 2"),
        ("train", {"learning_rate": 0.5}, "train.learning_rate = 0.01, but 0.5.*with --init"),
    ],
)
def test_another_configuration_is_refused_by_field_and_values(run, state, config, part, values, message):
    other = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})
    with pytest.raises(InputError, match=f"checkpoints/2 is from a run with .*{message}"):
        restore(run, state, other)


def test_a_run_may_become_longer(copied, state, config):
    longer = dataclasses.replace(config.train, steps=9, epochs=2.0, warmup_steps=1, decay_steps=(8,))
    assert restore(copied, state, dataclasses.replace(config, train=longer))[0].step == 2


def test_a_run_may_be_moved(copied, state, config):
    moved = dataclasses.replace(config, run=copied)
    assert restore(copied, state, moved)[0].step == 2


def test_meta_is_plain_text(run):
    """The configuration can be read without this package."""
    text = json.loads((run / "checkpoints" / "1" / "meta" / "_strings.json").read_text())
    assert json.loads(text["config"])["data"]["class_names"] == list(tiny.CLASS_NAMES)


CHOICE = checkpoint.Choice("AP50", "test")


def write_best(run):
    with checkpoint.open_checkpoints(run, keep=2) as checkpoints:
        return checkpoint.write_best(checkpoints, run, choice=CHOICE)


@pytest.fixture(scope="module")
def step_of(run):
    """Returns a function: path -> the step whose weights `load` takes. Those of step n are shifted by n - 1 tenths."""
    first = checkpoint.read_weights(run / "checkpoints" / "1").arrays
    name = min(name for name in first if name.startswith("rpn_head"))
    return lambda path: 1 + round(10 * float((checkpoint.read_weights(path).arrays[name] - first[name]).mean()))


def test_best_is_a_copy_of_the_best_checkpoint_for_detection_alone(copied, config, step_of, tmp_path):
    assert write_best(copied) == "step 1, AP50 0.500 on test"
    best = copied / "best"
    assert {path.name for path in best.iterdir() if path.is_dir()} == {"model", "meta"}
    assert not best.is_symlink() and not any(path.is_symlink() for path in best.rglob("*"))
    assert {path.name for path in copied.iterdir()} == {"checkpoints", "best"}
    elsewhere = shutil.copytree(best, tmp_path / "ring_detector")
    for path in (copied, best, elsewhere):
        assert checkpoint.load_run_config(path) == config and step_of(path) == 1
    assert checkpoint.run_of(copied).samefile(copied) and checkpoint.run_of(best).samefile(copied)
    assert step_of(copied / "checkpoints") == 2
    expected = parameters(checkpoint.load(copied / "checkpoints" / "1"))
    for name, leaf in parameters(checkpoint.load(copied)).items():
        np.testing.assert_array_equal(leaf, expected[name])


def test_without_an_evaluation_best_is_the_newest_and_the_line_says_so(tmp_path, config):
    save(tmp_path, blank_state(), config, ap50s={1: None, 2: float("nan")})
    assert write_best(tmp_path) == "step 2, the newest, because no checkpoint was evaluated"
    assert (tmp_path / "best" / "model").is_dir()
    assert write_best(tmp_path / "empty") is None and not (tmp_path / "empty" / "best").exists()


class Killed(BaseException):
    """Ends a function at any place, as a signal does, without any handler of errors."""


@pytest.mark.parametrize("owner, name, count", [(shutil, "copytree", 1), (Path, "rename", 2), (shutil, "rmtree", 1)])
def test_a_process_killed_while_it_writes_best_leaves_the_old_or_the_new_one(
    copied, state, config, step_of, monkeypatch, owner, name, count
):
    write_best(copied)
    save(copied, state, config, ap50s={3: 0.9})
    function = getattr(owner, name)
    for fatal in range(1, count + 1):
        calls = []

        def killed(*arguments, calls=calls, fatal=fatal, **options):
            calls.append(name)
            if len(calls) == fatal:
                if name == "copytree":
                    (arguments[1] / "model").mkdir(parents=True)  # half of the copy is written
                raise Killed
            return function(*arguments, **options)

        with checkpoint.open_checkpoints(copied, keep=2) as checkpoints, monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(Killed):
                checkpoint.write_best(checkpoints, copied, choice=CHOICE)
        assert step_of(copied) == (3 if name == "rmtree" else 1)
    assert write_best(copied) == "step 3, AP50 0.900 on test" and step_of(copied) == 3
    assert {path.name for path in copied.iterdir()} == {"checkpoints", "best"}


def test_a_damaged_best_is_replaced_by_the_newest_checkpoint_with_a_warning(copied, step_of, caplog):
    write_best(copied)
    flip_bit("model")(copied / "best")
    assert step_of(copied) == 2
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("fasterrcnn_jax")]
    assert re.search("best: .*model differs.*; the newest intact checkpoint is used", message)
    with pytest.raises(InputError, match="best: .*model differs"):
        checkpoint.load(copied / "best")


def test_a_stage_starts_from_the_newest_checkpoint_of_the_stage_before(copied, config):
    write_best(copied)
    stage = stages_of(config)[0]._replace(first=copied)
    newest = parameters(checkpoint.load(copied / "checkpoints" / "2"))
    for name, leaf in parameters(train.first_model(config, stage, fresh=True)).items():
        np.testing.assert_array_equal(leaf, newest[name])


def test_a_best_that_cannot_be_written_is_named_and_the_old_one_stays(copied, state, config, step_of, monkeypatch):
    write_best(copied)
    save(copied, state, config, ap50s={3: 0.9})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        with pytest.raises(OSError, match="best cannot be written .*No space left.*; the checkpoints are unchanged"):
            write_best(copied)
    assert step_of(copied) == 1


def test_the_best_checkpoint_is_the_latest_of_several_with_the_same_metric():
    measured = ((2, 0.5), (4, 0.75), (6, 0.75), (8, 0.25))
    found = [types.SimpleNamespace(step=step, metrics={"best": metric}) for step, metric in measured]
    found.append(types.SimpleNamespace(step=10, metrics=None))
    assert inspect.unwrap(checkpoint.best)(types.SimpleNamespace(checkpoints=found)) == (6, 0.75, None)


OTHER = checkpoint.Choice("AP", "val")


def save_chosen(run, config, values, choice, *, first=1):
    with checkpoint.open_checkpoints(run, keep=1, choice=choice) as checkpoints:
        for step, value in enumerate(values, start=first):
            state = blank_state()._replace(step=jnp.int32(step))
            checkpoint.save(checkpoints, state=state, config=config, iterator_state={}, measured=value, choice=choice)


def chosen(run, choice):
    with checkpoint.open_checkpoints(run, keep=1, choice=choice) as checkpoints:
        return checkpoint.best(checkpoints, choice), checkpoint.write_best(checkpoints, run, choice=choice)


def test_values_of_another_metric_are_not_compared_and_the_line_names_metric_and_split(tmp_path, config):
    save_chosen(tmp_path, config, (0.9, 0.8), CHOICE)
    # Nothing was measured by the other choice yet.
    assert chosen(tmp_path, OTHER) == ((1, 0.9, CHOICE), "step 1, AP50 0.900 on test")
    save_chosen(tmp_path, config, (0.1,), OTHER, first=3)
    assert chosen(tmp_path, OTHER) == ((3, 0.1, OTHER), "step 3, AP 0.100 on val")
    save_chosen(tmp_path, config, (0.3, 0.2), OTHER, first=4)
    assert chosen(tmp_path, OTHER) == ((4, 0.3, OTHER), "step 4, AP 0.300 on val")
    assert steps_in(tmp_path) == [4, 5]


def test_a_metric_that_an_earlier_release_stored_without_its_name_is_compared(tmp_path, config):
    save_chosen(tmp_path, config, (0.9,), None)
    save_chosen(tmp_path, config, (0.8,), CHOICE, first=2)
    assert chosen(tmp_path, CHOICE) == ((1, 0.9, None), "step 1, AP50 0.900 on test")
