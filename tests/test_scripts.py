"""train.py and evaluate.py as a user runs them, on a data set and a detector that take seconds.

All runs share one compiled step and one compiled detection, through a compilation cache of this module.
"""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import sys
import types
from pathlib import Path

import fasterrcnn_jax.scripts.evaluate as evaluate_script
import fasterrcnn_jax.scripts.train as train_script
import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

import fasterrcnn_jax
from fasterrcnn_jax.data import loader
from fasterrcnn_jax.data.sources import open_split
from fasterrcnn_jax.data.training_set import prepare_training_set
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.scoring import Score
from fasterrcnn_jax.training import checkpoint

STEPS = 6
LOSSES = ("rpn_objectness", "rpn_box", "box_class", "box_delta")
# Logged numbers that depend on the machine, not on the run.
TIMINGS = ("time", "images_per_second", "data_wait", "compilations", "compilation_seconds")

CONFIG = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import tiny
config = tiny.config(Path({folder!r}), steps=6, checkpoint_every=2, evaluate_every=4, keep_checkpoints=2)
image = dataclasses.replace(tiny.IMAGE, canvases=((96, 96),))
config = dataclasses.replace(config, model=dataclasses.replace(config.model, image=image))
"""


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with (
        pytest.MonkeyPatch.context() as patch,
        tiny.restored_logging(),
        tiny.quick_compilation(),
        jax.numpy_dtype_promotion("standard"),  # Optax's schedules mix integers and floats
    ):
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny.write_voc(folder / "voc", train=9, test=5)
    (folder / "mine.py").write_text(CONFIG.format(tests=str(Path(__file__).parent), folder=str(folder)))
    return folder


def called(main, *argv):
    """Returns (exit status, stdout, stderr) of a script."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in argv])
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


def train(folder, *argv):
    return called(train_script.main, "--config", folder / "mine.py", *argv)


def refused(result, message):
    """Checks that an error is one line on stderr, after the log, with exit status 2."""
    status, out, err = result
    assert status == 2 and "Traceback" not in err and "error: " not in out
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert re.search(message, line), line
    return line


@pytest.fixture(scope="module")
def trained(folder):
    """Returns (run folder, stdout, stderr) of a whole run."""
    status, out, err = train(folder)
    assert status == 0, err
    return folder / "run", out, err


def values_of(run):
    state = nnx.split(checkpoint.load(run))[1]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def steps_in(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def lines_of(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def test_a_run_prints_its_table_and_where_things_are(trained):
    run, out, err = trained
    lines = out.splitlines()
    first = ["class", "ring", "disc", "mAP", "AP50", "split", "checkpoint", "best", "report"]
    assert [line.split()[0] for line in lines[-9:]] == first
    *lines, report = lines
    assert re.fullmatch(rf"report +{re.escape(str(run))}/report.html: \d\.\d MB, \d+ pictures", report)
    assert f"curves     {run}/curves.png, and: tensorboard --logdir {run}" in lines
    assert re.fullmatch(r"AP50 [01]\.\d\d", lines[-4])
    assert lines[-3] == "split      test, also used to choose the checkpoint"
    assert Path(lines[-2].split()[1]) == run.absolute() / "checkpoints" / "6"
    assert re.fullmatch(rf"best +{re.escape(str(run))}/best: step [246], AP50 [01]\.\d\d\d on test", lines[-1])
    assert sum(bool(line.startswith("took       ")) for line in lines) == 1


def test_the_report_is_about_the_table_that_was_printed(trained):
    run, out, _ = trained
    page = (run / "report.html").read_text()
    ap50 = re.search(r"AP50 ([01]\.\d\d)", table_of(out)[-1])[1]
    (shown,) = re.findall(r"<dt>AP50</dt><dd>([\d.]+)</dd>", page)
    assert f"{float(shown):.2f}" == ap50
    assert f"<h1>{run} on test</h1>" in page and "also used to choose the checkpoint" in page
    assert '<td class="text">AP50</td>' in page and "train.best_metric" in page
    rows = (run / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "2", "4", "6"]
    with Image.open(run / "curves.png") as image:
        assert image.size[0] > 1000


def test_the_report_is_written_at_each_evaluation_at_the_end_or_never(folder, monkeypatch):
    written = []
    real = train_script.write_run_report

    def noting(config, run, shown):
        before = (run / "report.html").read_bytes() if (run / "report.html").exists() else None
        # The table of the checkpoints so far is there while the run trains.
        last = (run / "results.csv").read_text().splitlines()[-1].split(",")[0]
        assert last == {0: "2", 1: "6"}[len(written) if config.train.report == "each" else 1]
        said = real(config, run, shown)
        written.append((shown.step, before is None, (run / "report.html").read_bytes() == before))
        return said

    monkeypatch.setattr(train_script, "write_run_report", noting)
    for mode in ("each", "end", "off"):
        written.clear()
        status, out, err = train(folder, "--run", folder / f"report_{mode}", "--train.report", mode)
        assert status == 0, err
        best = int(re.search(r"best: step (\d)", out)[1])
        # Evaluations are at steps 4 and 6; the end shows the best checkpoint.
        wanted = {"each": [(4, True, False), (best, False, False)], "end": [(best, True, False)], "off": []}
        assert written == wanted[mode]
        assert (folder / f"report_{mode}" / "report.html").exists() == (mode != "off")
        assert ("report     " in out) == (mode != "off")

    # A finished run gets a report later. Where it cannot be written, the training has not failed.
    def full(config, run, shown):
        raise InputError("report.html cannot be written: no space left")

    monkeypatch.setattr(train_script, "write_run_report", full)
    status, out, err = train(folder, "--run", folder / "report_off", "--train.report", "end")
    assert status == 0 and "report     not written: report.html cannot be written" in out + err
    monkeypatch.setattr(train_script, "write_run_report", real)
    status, out, err = train(folder, "--run", folder / "report_off", "--train.report", "end")
    assert status == 0 and (folder / "report_off" / "report.html").exists(), err


def table_of(out):
    """Returns the lines of the last table in the output of a script, the metric below it included."""
    lines = out.splitlines()
    start = max(number for number, line in enumerate(lines) if line.startswith("class "))
    return lines[start : start + 5]


def test_the_best_checkpoint_is_a_folder_of_its_own_that_load_and_evaluate_take(trained, folder, tmp_path):
    best = trained[0] / "best"
    step = re.search(r"^best .*: step (\d)", trained[1], re.MULTILINE)[1]
    assert best.is_dir() and not best.is_symlink()
    assert checkpoint.step_of(trained[0]) == checkpoint.step_of(best) == int(step)
    assert checkpoint.step_of(trained[0] / "checkpoints" / step) == int(step)
    chosen = values_of(trained[0] / "checkpoints" / step)
    for path in (trained[0], best, Path(shutil.copytree(best, tmp_path / "run" / "best"))):
        for name, value in values_of(path).items():
            np.testing.assert_array_equal(value, chosen[name])
    status, out, err = called(evaluate_script.main, tmp_path / "run")
    assert status == 0 and table_of(out) == table_of(trained[1]), err


def test_a_run_compiles_its_step_once(trained):
    assert trained[2].count("compiling the training step") == 1


def test_detection_runs_on_one_device_with_its_share_of_the_batch(trained):
    share = 4 // jax.local_device_count()
    assert re.findall(r"compiling detection for images (.*)", trained[2]) == [f"({share}, 96, 96, 3)"]


def test_the_run_folder_holds_configuration_numbers_images_and_checkpoints(trained):
    run = trained[0]
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == STEPS
    events = list(run.glob("events.out.tfevents.*"))
    assert len(events) == 1 and events[0].stat().st_size > 500
    assert steps_in(run) == [4, 6]
    for name in ("000004", "000006", "first_batch"):
        with Image.open(run / "images" / f"{name}.png") as image:
            assert min(image.size) > 100


def test_every_step_is_logged_with_its_four_losses(trained):
    steps = lines_of(trained[0], "gradient_norm")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert all(np.isfinite(line[name]) and line[name] >= 0 for name in LOSSES)
        assert line["time"] > 1.7e9


def test_every_step_is_logged_with_learning_rate_counts_and_times(trained):
    steps = lines_of(trained[0], "gradient_norm")
    assert [line["learning_rate"] for line in steps] == pytest.approx([0.01] * STEPS)
    assert any(line["rpn_foreground"] for line in steps) and any(line["box_foreground"] for line in steps)
    for line in steps:
        assert line["images_per_second"] > 0 and line["data_wait"] >= 0
    compiled = [line["compilations"] for line in steps]
    assert compiled == sorted(compiled) and 0 < compiled[-1]
    assert steps[-1]["compilation_seconds"] > 0


def test_every_evaluation_is_made_and_logged_once(trained):
    run, out, _ = trained
    evaluations = lines_of(run, "test/AP50")
    assert [line["step"] for line in evaluations] == [4, STEPS]
    assert f"{evaluations[-1]['test/AP50']:.2f}" == re.search(r"^AP50 (.*)$", out, re.MULTILINE)[1]
    assert {"test/voc07/ring", "test/AP50/disc", "test/AP"} <= set(evaluations[0])


def test_a_finished_run_started_again_evaluates_without_training(folder, trained, tmp_path):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    before = values_of(run)
    status, out, err = train(folder, "--run", run)
    assert status == 0 and f"from step {STEPS}" in out
    assert "compiling the training step" not in err
    assert [line["step"] for line in lines_of(run, "gradient_norm")] == list(range(1, STEPS + 1))
    # It evaluates a checkpoint whose numbers are already there.
    assert [line["step"] for line in lines_of(run, "test/AP50")] == [4, STEPS]
    assert table_of(out) == table_of(trained[1]) and "also used to choose the checkpoint" in out and "took " not in out
    for name, value in values_of(run).items():
        np.testing.assert_array_equal(value, before[name])


class Worsening:
    """An evaluator whose first evaluation is the best one."""

    def __init__(self, *_):
        pass

    def evaluate(self, model, split, number):
        return Score({"AP50": 0.5**number / 2, "AP": 0.5**number / 4}, "headline", "class \ntable", [], None)


def test_a_run_whose_evaluations_do_not_improve_ends_early_and_stays_ended(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_script, "Evaluator", Worsening)
    fields = ("--run", tmp_path / "run", "--train.checkpoint_every", 1, "--train.evaluate_every", 1)
    for said in ("step 3: the training ends, because 2 evaluations in a row were below the best AP50", "from step 3"):
        status, out, err = train(folder, *fields, "--train.patience", 2)
        assert status == 0 and said in out, err
        assert f"best       {tmp_path}/run/best: step 1, AP50 0.250" in out
        assert [line["step"] for line in lines_of(tmp_path / "run", "gradient_norm")] == [1, 2, 3]
    status, out, err = train(folder, *fields, "--train.patience", 3)
    assert status == 0 and "from step 3" in out, err
    assert [line["step"] for line in lines_of(tmp_path / "run", "gradient_norm")] == [1, 2, 3, 4]
    # Another metric chooses from here; its values are smaller, and they are not compared with those before.
    status, out, err = train(folder, *fields, "--train.patience", 1, "--train.best_metric", "AP")
    assert status == 0 and "from step 4" in out, err
    changed = "best       AP on test chooses from the next evaluation on; it is not compared with AP50 on test, which"
    assert f"{changed} chose before" in out and "step 6: the training ends" not in out
    assert f"best       {tmp_path}/run/best: step 5, AP 0.008 on test" in out
    status, out, err = train(folder, *fields, "--train.patience", 1, "--train.best_metric", "AP")
    assert status == 0 and "not compared" not in out and "step 5, AP 0.008 on test" in out


class Single(Worsening):
    """An evaluator that writes its numbers, as the real one does."""

    def __init__(self, stage, splits, given, best_split, metrics, batch_size):
        self.metrics = metrics

    def evaluate(self, model, split, number):
        result = super().evaluate(model, split, number)
        self.metrics.write(number, {f"{split}/{name}": value for name, value in result.values.items()})
        return result


def test_one_evaluation_at_the_end_chooses_nothing_and_a_second_one_does(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(train_script, "Evaluator", Single)
    fields = ("--run", run, "--train.evaluate_every", 0)
    status, out, err = train(folder, *fields, "--train.steps", 2)
    assert status == 0 and "\nsplit      test\n" in out, err
    status, evaluated, err = called(evaluate_script.main, run)
    assert status == 0 and "also used" not in evaluated, err
    # A longer run has two evaluated checkpoints, and the best of them is shown.
    status, out, err = train(folder, *fields, "--train.steps", 4)
    assert status == 0 and "\nsplit      test, also used to choose the checkpoint\n" in out, err
    status, evaluated, err = called(evaluate_script.main, run)
    assert status == 0 and "of " in evaluated and ", also used to choose the checkpoint\n" in evaluated, err


class Poisoned:
    """An iterator whose batch number `at` (from 1) has a NaN pixel."""

    def __init__(self, batches, at):
        self.batches, self.at, self.met = batches, at, 0
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        batch = next(self.batches)
        self.met += 1
        if self.met == self.at:
            batch.images[np.flatnonzero(batch.image_valid)[0], 3, 3] = np.nan
        return batch


@pytest.fixture(scope="module")
def stopped(folder):
    """Returns (run folder, result) of a run whose loss is NaN in step 5."""
    run = folder / "stopped"
    original = loader.training_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "training_batches", lambda *a, **k: Poisoned(original(*a, **k), 5))
        return run, train(folder, "--run", run)


def poison(patch, at):
    original = loader.training_batches
    patch.setattr(loader, "training_batches", lambda *a, **k: Poisoned(original(*a, **k), at))


def test_best_is_written_during_the_run_and_follows_the_checkpoints_that_are_left(folder, tmp_path, monkeypatch):
    run, first = tmp_path / "run", ("--train.evaluate_every", 2)
    monkeypatch.setattr(train_script, "Evaluator", Worsening)
    with monkeypatch.context() as patch:
        poison(patch, 6)  # the checkpoint of step 4 is written in step 5
        refused(train(folder, "--run", run, *first), "step 6: ")
    assert steps_in(run) == [2, 4] and same_weights(run / "best", run / "checkpoints" / "2")
    # The best checkpoint is taken away, and a process is killed before it writes another one.
    shutil.rmtree(run / "checkpoints" / "2")

    def killed(*_, **__):
        raise InputError("killed before the first step")

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "MetricsWriter", killed)
        refused(train(folder, "--run", run, *first), "killed before the first step")
    assert steps_in(run) == [4] and same_weights(run / "best", run / "checkpoints" / "4")


def same_weights(one, other):
    values = values_of(other)
    return all(np.array_equal(value, values[name]) for name, value in values_of(one).items())


def test_a_nan_loss_stops_the_run_and_names_step_loss_and_images(stopped, folder):
    line = refused(stopped[1], r"step 5: .*= nan.* on images train\d, train\d")
    assert any(name in line for name in LOSSES)
    data = dataclasses.replace(tiny.config(folder).data, root=folder / "voc")
    dataset = prepare_training_set(open_split(data, "train"), data)
    image = dataclasses.replace(tiny.IMAGE, canvases=((96, 96),))
    batches = list(loader.training_batches(dataset, data, image, batch_size=4, seed=0, steps=5))
    named = [dataset.records[i].id for i in batches[-1].image_index[batches[-1].image_valid]]
    assert f"on images {', '.join(named)};" in line


def test_the_failed_batch_is_written_and_replayed(stopped, folder):
    """Every image without the NaN pixel has finite gradients; nothing is saved."""
    run, (_, _, err) = stopped
    (path,) = (run / "failed").iterdir()
    assert path.name == "step_00000005.npz" and f"--replay {path}" in err
    before = steps_in(run), (run / "metrics.jsonl").read_text()
    status, out, err = train(folder, "--run", run, "--replay", path)
    assert status == 0, err
    assert before == (steps_in(run), (run / "metrics.jsonl").read_text())
    rows = out.splitlines()[-4:]
    ids = re.search(r"on images ([^;]*);", stopped[1][2])[1].split(", ")
    assert [row.split()[0] for row in rows] == ids
    assert rows[0].endswith("first not finite: pixels") and "nan" in rows[0]
    assert all("nan" not in row and "finite" not in row for row in rows[1:] if row.split()[0] != ids[0])


def test_a_failed_batch_of_another_run_is_refused(stopped, folder, tmp_path):
    """Its step is after the last one, or its images have another canvas; repeating steps would not reach it."""
    (path,) = (stopped[0] / "failed").iterdir()
    arrays = dict(np.load(path))
    for changed in ({"step": np.int64(7)}, {"images": arrays["images"][:, :64]}):
        np.savez_compressed(tmp_path / "other.npz", **arrays | changed)
        result = train(folder, "--run", stopped[0], "--replay", tmp_path / "other.npz")
        number = changed.get("step", 5)
        refused(result, rf"--replay .*other.npz: holds step {number} of another run than {stopped[0]}$")


def test_a_nan_loss_leaves_the_earlier_checkpoints_unchanged(stopped):
    run = stopped[0]
    # The state after step 4 is not saved, because the loss of step 5, which would have confirmed it, is NaN.
    assert steps_in(run) == [2]
    assert all(np.isfinite(value).all() for value in values_of(run).values())
    assert [line["step"] for line in lines_of(run, "gradient_norm")] == [1, 2, 3, 4]


def test_a_stopped_run_continues_to_the_same_weights(stopped, folder, trained):
    run = stopped[0]
    status, out, err = train(folder, "--run", run)
    assert status == 0 and "from step 2" in out, err
    expected = values_of(trained[0])
    for name, value in values_of(run).items():
        np.testing.assert_array_equal(value, expected[name])
    whole = {line["step"]: line for line in lines_of(trained[0], "gradient_norm")}
    for line in lines_of(run, "gradient_norm"):
        assert [line[name] for name in LOSSES] == [whole[line["step"]][name] for name in LOSSES]
    assert table_of(out) == table_of(trained[1])
    # The newest checkpoint is now later than the failed step.
    replay = train(folder, "--run", run, "--replay", run / "failed" / "step_00000005.npz")
    refused(replay, r"holds step 5, but the newest checkpoint of .* is already at step 6")


@pytest.mark.slow
def test_fifty_steps_twice_give_the_same_bits(folder):
    """Compares everything that is saved: weights, optimizer, position in the data, and every logged number."""
    runs = [folder / "fifty", folder / "fifty again"]
    options = ("--train.steps", 50, "--train.checkpoint_every", 50, "--train.evaluate_every", 0)
    options += ("--data.flip", "random")
    for run in runs:
        status, _, err = train(folder, "--run", run, *options)
        assert status == 0, err
    first, second = (values_of(run) for run in runs)
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name
    logs = [[{k: v for k, v in line.items() if k not in TIMINGS} for line in lines_of(run, "step")] for run in runs]
    assert logs[0] == logs[1] and len(logs[0]) == 51
    states = []
    for run in runs:
        with checkpoint.open_checkpoints(run, keep=2) as checkpoints:
            found = checkpoints.load_checkpointables(50)
        states.append(jax.tree.leaves({"train": found["train"], "iterator": found["meta"]["iterator"]}))
    for one, other in zip(*states, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_another_seed_gives_other_weights(folder, trained):
    """The compiled program is the same, because seeds are not part of it."""
    status, _, err = train(folder, "--run", folder / "seed", "--train.seed", "1")
    assert status == 0, err
    expected = values_of(trained[0])
    assert any(np.any(value != expected[name]) for name, value in values_of(folder / "seed").items())


def test_evaluate_needs_only_the_run_folder(trained, folder, tmp_path, monkeypatch):
    run = shutil.copytree(trained[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    status, out, err = called(evaluate_script.main, run)
    assert status == 0, err
    # The same table as at the end of training.
    assert table_of(out) == table_of(trained[1])
    assert re.search(r"^split +test of .*, also used to choose the checkpoint$", out, re.MULTILINE)
    # Our checkpoints have a part without arrays, of which Orbax says that it may be malformed.
    assert "malformed" not in err
    files = run / "evaluation" / "test"
    assert {path.name for path in files.iterdir()} == {
        "detections.json",
        "metrics.json",
        "comp4_det_test_ring.txt",
        "comp4_det_test_disc.txt",
    }
    # The numbers of the tables, for programs.
    content = json.loads((files / "metrics.json").read_text())
    assert f"{content['metrics']['AP50']:.2f}" == re.search(r"^AP50 (.*)$", out, re.MULTILINE)[1]
    for head in ("COCO ", "precision ", "recall ", "AP at IoU ", "best F1 ", "errors ", "missed ", "calibration: "):
        assert f"\n{head}" in f"\n{out}", head
    entries = json.loads((files / "detections.json").read_text())
    assert {entry["image_id"] for entry in entries} <= {f"test{i}" for i in range(5)} and len(entries) > 3
    lines = [line for path in files.glob("comp4*") for line in path.read_text().splitlines()]
    assert len(lines) == len(entries) and all(len(line.split()) == 6 for line in lines)


def test_evaluate_takes_a_step_a_split_a_folder_and_a_batch_size(trained, tmp_path):
    arguments = ("--split", "train", "--out", tmp_path / "files", "--root", trained[0].parent / "voc")
    arguments += ("--batch_size", "3")
    status, out, err = called(evaluate_script.main, "--ckpt", trained[0] / "checkpoints" / "4", *arguments)
    assert status == 0, err
    assert "compiling detection for images (3, 96, 96, 3)" in err
    assert re.search(r"^AP50 [01]\.\d\d$", out, re.MULTILINE) and "also used" not in out
    # The folder is that of the run.
    assert re.search(r"^split +train of .*, also trained on$", out, re.MULTILINE)
    assert (tmp_path / "files" / "comp4_det_train_ring.txt").is_file()


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--data.root", "nowhere"), "nowhere"),
        (("--data.train_split", "trian"), "trian"),
        (("--data.class_names", "rings", "disc"), "no object in .* is named 'rings'; did you mean 'ring'"),
        (("--data.layout", "coco"), r"not of layout coco, .* but PASCAL VOC .*; use --data.layout voc or auto"),
        (("--data.layout", "vocdevkit"), r"not of layout vocdevkit, .* use --data.layout voc or auto"),
        (("--train.batch_size", "6"), r"train.batch_size is 6, not a multiple of the \d+ devices"),
        (("--run", "mine.py"), "mine.py"),
    ],
)
def test_bad_input_to_train_is_named_in_one_line(folder, monkeypatch, argv, message):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    refused(train(folder, "--run", folder / "never", *argv) if argv[0] != "--run" else train(folder, *argv), message)
    assert sorted(folder.iterdir()) == before  # no run folder for a run that never began


def test_a_typo_names_the_nearest_field(folder):
    status, _, err = train(folder, "--train.learning_rat", "1")
    assert status == 2 and "Perhaps you meant" in err and "--train.learning_rate" in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--train.learning_rate", "0.5"), "train.learning_rate = 0.01, but 0.5 was requested"),
        pytest.param(
            ("--data.class_names", "disc", "ring"),
            r"data.class_names = \['ring', 'disc'\], but",
            marks=pytest.mark.slow,
        ),
        # Plans other batches.
        pytest.param(("--data.faults", "skip"), "data.faults = error, but skip was requested", marks=pytest.mark.slow),
    ],
)
def test_a_run_is_not_continued_with_another_configuration(folder, trained, tmp_path, argv, message):
    """Every checkpoint knows its configuration; a refusal changes nothing."""
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    before = (run / "config.json").read_text(), (run / "metrics.jsonl").read_text()
    refused(train(folder, "--run", run, *argv), message)
    assert before == ((run / "config.json").read_text(), (run / "metrics.jsonl").read_text())
    assert steps_in(run) == [4, 6]
    for name, value in values_of(run).items():
        np.testing.assert_array_equal(value, values_of(trained[0])[name])


def test_changed_data_stops_a_run_until_the_change_is_accepted(folder, trained, tmp_path):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "6")
    root = Path(shutil.copytree(folder / "voc", tmp_path / "voc"))
    path = root / "Annotations" / "train3.xml"
    path.write_text(path.read_text().replace("ring", "disc"))
    argv = ("--run", run, "--data.root", root)
    refused(train(folder, *argv), r"checkpoints/4: the data has changed .*labels or flags: 1, the first is train3")
    status, out, err = train(folder, *argv, "--data.accept_changed")
    assert status == 0 and "from step 4" in out and "the first is train3; the run continues" in err, err
    # The newest checkpoint now has the fingerprint of the changed data.
    path.write_text(path.read_text().replace("disc", "ring"))
    refused(train(folder, *argv), r"checkpoints/6: the data has changed .*the first is train3")


def test_an_evaluation_of_the_other_split_that_was_not_logged_is_logged_at_the_next_start(folder, trained, tmp_path):
    """As if killed after the last checkpoint, while data.test_split was evaluated."""
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    for _ in range(2):
        status, _, err = train(folder, "--run", run, "--data.test_split", "train", "--train.best_split", "test")
        assert status == 0, err
        assert [line["step"] for line in lines_of(run, "train/AP50")] == [STEPS]
        assert [line["step"] for line in lines_of(run, "test/AP50")] == [4, STEPS]


@pytest.mark.parametrize("steps", ["1", "3"])
def test_weights_that_overflow_are_never_saved(folder, tmp_path, steps):
    """This includes the weights of the last step, which no later loss checks."""
    fields = ("--train.learning_rate", "1e30", "--train.checkpoint_every", "1", "--train.steps", steps)
    result = train(folder, "--run", tmp_path / "run", *fields)
    refused(result, r"step \d: .*= (inf|nan).* on images train\d")
    folder_of_steps = tmp_path / "run" / "checkpoints"
    assert not [path for path in folder_of_steps.iterdir() if path.name.isdigit()]


def test_repeated_steps_are_logged_once(folder, trained, tmp_path):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "6")
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "rpn')  # an incomplete line, as after a kill
    status, _, err = train(folder, "--run", run)
    assert status == 0, err
    assert [line["step"] for line in lines_of(run, "gradient_norm")] == list(range(1, STEPS + 1))


def test_evaluate_prints_its_table_before_a_file_fails(trained, tmp_path):
    (tmp_path / "file").write_text("")
    result = called(evaluate_script.main, "--ckpt", trained[0], "--out", tmp_path / "file" / "out")
    refused(result, rf"{tmp_path}/file/out/detections\.json cannot be written: Not a directory")
    assert re.search(r"^AP50 [01]\.\d\d$", result[1], re.MULTILINE)


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--ckpt", "nowhere"), "nowhere: no such f"),
        (("--ckpt", "{folder}"), "contains no checkpoint"),
        (("--ckpt", "{run}", "--root", "nowhere"), "nowhere"),
        (("--ckpt", "{run}", "--split", "tset"), "tset"),
        (("--ckpt", "{run}", "--batch_size", "0"), "--batch_size must be positive, got 0"),
        (("--ckpt", "{run}", "--test_scales", "9"), r"--test_scales: scales must be in 0.25..4, got 9"),
        (("--ckpt", "{run}", "--compare", "{run}", "--proposals"), "leave out --proposals"),
        (("--ckpt", "{run}", "--compare", "nowhere"), "nowhere: no such f"),
    ],
)
def test_bad_input_to_evaluate_is_named_in_one_line(folder, trained, argv, message):
    names = {"folder": folder, "run": trained[0]}
    refused(called(evaluate_script.main, *(argument.format(**names) for argument in argv)), message)


def test_two_evaluations_of_the_same_model_are_compared_as_equal(trained, tmp_path):
    """Also at another batch size."""
    other, out_folder = trained[0] / "best", tmp_path / "out"
    options = ("--compare", other, trained[0], "--batch_size", 2, "--out", out_folder)
    status, out, err = called(evaluate_script.main, trained[0], *options)
    assert status == 0, err
    tables = out.split("\ncompare    ")[1:]
    assert len(tables) == 2
    for table in tables:
        assert "images     0 won, 0 lost, 5 equal" in table and "settings   0 fields differ" in table
        assert re.search(r"^mAP .* \+0\.000 \[\+0\.000, \+0\.000\] unclear +\+0\.000 ", table, re.MULTILINE), table
    content = json.loads((out_folder / "comparison.json").read_text())
    assert set(content) == {str(other), str(trained[0])} and content[str(other)]["AP"]["difference"] == 0.0


def test_a_comparison_lists_the_settings_that_differ(trained, tmp_path):
    options = ("--compare", trained[0], "--soft_nms", "gaussian", "--test_flip", "True", "--out", tmp_path)
    status, out, err = called(evaluate_script.main, trained[0], *options)
    assert status == 0, err
    assert "settings   2 fields differ" in out
    assert "           model.postprocess.soft_nms: gaussian -> None" in out
    assert "           model.test_augment.flip: True -> False" in out


@pytest.mark.parametrize("scheme", ["rpn", "fast_rcnn"])
def test_a_part_of_a_detector_is_not_compared(trained, monkeypatch, scheme):
    config = checkpoint.load_run_config(trained[0])
    partial = types.SimpleNamespace(train=types.SimpleNamespace(scheme=scheme))
    configs = {trained[0]: config, trained[0] / "best": partial}
    monkeypatch.setattr(evaluate_script, "_run_config", configs.__getitem__)
    arguments = evaluate_script.Arguments(ckpt=trained[0], compare=(trained[0] / "best",))
    with pytest.raises(InputError, match=f"best has train.scheme {scheme}.*compare whole detectors"):
        evaluate_script._check_compared(arguments, checkpoint.load(trained[0]))


def test_models_of_other_classes_are_not_compared(trained, small_run, tmp_path):
    model = fasterrcnn_jax.load(small_run)
    model.class_names = ("ring", "square")
    fasterrcnn_jax.save_weights(model, tmp_path / "other.safetensors")
    result = called(evaluate_script.main, trained[0], "--compare", tmp_path / "other.safetensors", "--out", tmp_path)
    refused(
        result, r"its classes are ring, square, and those of .* are ring, disc; compare models with the same classes"
    )


def test_evaluate_does_not_detect_with_an_rpn_trained_alone(trained, monkeypatch):
    config = checkpoint.load_run_config(trained[0])
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, scheme="rpn"))
    monkeypatch.setattr(checkpoint, "load_run_config", lambda path: config)
    refused(called(evaluate_script.main, "--ckpt", trained[0]), "is an RPN trained alone; add --proposals")


def test_evaluate_refuses_an_unknown_argument(capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate_script.main(["--checkpoint", "x"])
    assert caught.value.code == 2 and "--ckpt" in capsys.readouterr().err


def test_the_scripts_are_the_files_at_the_top():
    root = Path(__file__).parents[1]
    for module in (train_script, evaluate_script):
        name = Path(sys.modules[module.__name__].__file__).name
        assert Path(module.__file__).resolve() == (root / name).resolve()
