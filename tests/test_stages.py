"""Alternating training: the trained parts and proposals of each stage, and the result of all four stages.

Most tests share one whole run of train.py; a compilation cache of this module compiles each program once.
"""

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path

import fasterrcnn_jax.scripts.evaluate as evaluate_script
import fasterrcnn_jax.scripts.train as train_script
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from fasterrcnn_jax.config import (
    AlternatingConfig,
    BackboneConfig,
    BoxHeadConfig,
    TrainConfig,
)
from fasterrcnn_jax.config.rules import unread_fields
from fasterrcnn_jax.config.text import load_config
from fasterrcnn_jax.data.proposal_files import read_proposals, write_proposals
from fasterrcnn_jax.data.sources import open_split
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.dataset import propose_dataset
from fasterrcnn_jax.inference.proposal_store import (
    digest,
    given_proposals,
    stored_proposals,
)
from fasterrcnn_jax.models.detector import Detector, create_detector
from fasterrcnn_jax.models.faster_rcnn import (
    box_training_losses,
    find_proposals,
    rpn_training_losses,
    training_losses,
)
from fasterrcnn_jax.structures import Batch, GroundTruth
from fasterrcnn_jax.training import checkpoint
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.training.run_folder import proposals_path
from fasterrcnn_jax.training.stages import failed_stage, stages_of
from fasterrcnn_jax.training.state import PARTS
from fasterrcnn_jax.training.step import create_state, make_train_step

STEPS = 3
TRAIN = dict(steps=20, batch_size=2, learning_rate=0.1)
# The backbone that compiles fastest, on one canvas, so that each program is compiled once.
MODEL = dataclasses.replace(
    tiny.MODEL,
    image=dataclasses.replace(tiny.IMAGE, canvases=((96, 96),)),
    backbone=BackboneConfig(name="vgg16", width=8, norm="none", fixed_stages=0),
    box_head=BoxHeadConfig(channels=16),
)
CONFIG = """
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_stages, tiny
from fasterrcnn_jax.config import AlternatingConfig
config = tiny.config(
    Path({folder!r}),
    scheme="alternating",
    alternating=AlternatingConfig(steps=(3, 3, 3, 3), decay_steps=(2, 2, 2, 2)),
    steps=12,
    checkpoint_every=2,
    ema_decay=0.9,
)
config = dataclasses.replace(config, model=test_stages.MODEL)
"""
NAMES = ("1_rpn", "2_detector", "3_rpn")


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


def alternating(folder=Path("somewhere"), *, steps=(4, 7, 5, 4), decay_steps=(3, 6, 4, 2), **fields):
    stages = AlternatingConfig(steps=steps, decay_steps=decay_steps, rpn_batch_size=fields.pop("rpn_batch_size", None))
    return tiny.config(folder, **dict(scheme="alternating", alternating=stages, steps=20) | fields)


def test_joint_training_is_one_stage():
    config = tiny.config(Path("somewhere"))
    (stage,) = stages_of(config)
    assert (stage.run, stage.train, stage.losses) == (config.run, config.train, training_losses)
    assert stage.parts == PARTS and stage.evaluated == "detections"
    assert (stage.first, stage.proposals, stage.proposes_on) == (None, None, ())


def test_the_rpn_alone_is_one_stage_without_a_box_head():
    config = tiny.config(Path("somewhere"), scheme="rpn")
    (stage,) = stages_of(config)
    assert (stage.run, stage.train, stage.losses) == (config.run, config.train, rpn_training_losses)
    assert stage.parts == ("backbone", "neck", "rpn_head") and stage.evaluated == "proposals"


def test_four_stages_train_what_the_paper_says():
    """Ren et al. 2015 (arXiv:1506.01497), section 3.2."""
    config = alternating()
    first, second, third, fourth = stages_of(config)
    runs = [config.run / "stages" / name for name in NAMES]
    assert [stage.run for stage in (first, second, third, fourth)] == [*runs, config.run]
    losses = [stage.losses for stage in (first, second, third, fourth)]
    assert losses == [rpn_training_losses, box_training_losses] * 2
    assert first.parts == ("backbone", "neck", "rpn_head") and second.parts == ("backbone", "neck", "box_head")
    assert third.parts == ("rpn_head",) and fourth.parts == ("box_head",)
    assert [stage.first for stage in (first, second, third, fourth)] == [None, None, runs[1], runs[2]]
    assert [stage.proposals for stage in (first, second, third, fourth)] == [None, runs[0], None, runs[2]]
    assert first.proposes_on == ("train", "test") and third.proposes_on == ("train",)
    assert [stage.evaluated for stage in (first, second, third, fourth)] == [
        "proposals",
        "detections in given proposals",
        "proposals",
        "detections",
    ]


def test_a_split_that_decides_which_checkpoint_is_best_has_proposals_too():
    assert stages_of(alternating(best_split="held_out"))[0].proposes_on == ("train", "held_out", "test")


def test_each_stage_has_its_own_steps_falls_and_batch_size():
    stages = [stage.train for stage in stages_of(alternating(rpn_batch_size=2, batch_size=4))]
    assert [train.steps for train in stages] == [4, 7, 5, 4]
    assert [train.decay_steps for train in stages] == [(3,), (6,), (4,), (2,)]
    assert [train.batch_size for train in stages] == [2, 4, 2, 4]
    assert [train.batch_size for train in (stage.train for stage in stages_of(alternating()))] == [4] * 4
    cosine = [stage.train for stage in stages_of(alternating(schedule="cosine"))]
    assert [(train.steps, train.decay_steps) for train in cosine] == [(4, ()), (7, ()), (5, ()), (4, ())]


def test_the_shipped_stages_are_those_of_py_faster_rcnn():
    config = load_config(Path(__file__).parents[1] / "configs" / "voc_alternating.py")
    stages = [stage.train for stage in stages_of(config)]
    assert [train.steps for train in stages] == [80000, 40000, 80000, 40000]
    assert [train.decay_steps for train in stages] == [(60000,), (30000,), (60000,), (30000,)]
    assert [train.batch_size for train in stages] == [1, 2, 1, 2]
    assert {(train.learning_rate, train.decay_factor) for train in stages} == {(1e-3, 0.1)}
    proposals, largest = config.model.train_proposals, max(h * w for h, w in config.model.image.canvases)
    assert (proposals.post_nms_top_n, proposals.nms_threshold, proposals.min_size) == (2000, 0.7, 16.0)
    assert proposals.pre_nms_top_n >= largest // 16**2 * 9
    assert config.model.roi_sampling.rois_per_batch == 128 and config.model.roi_features.operator == "pool"
    assert unread_fields(config) == []


def test_the_folder_of_a_failed_batch_selects_its_stage(tmp_path):
    stages = stages_of(alternating(tmp_path))
    for stage in stages:
        assert failed_stage(stages, stage.run / "failed" / "step_00000005.npz") is stage
    with pytest.raises(InputError, match=r"--replay .*/copied\.npz: .* in the run folder of a stage: .*1_rpn, "):
        failed_stage(stages, tmp_path / "copied.npz")
    (joint,) = stages_of(tiny.config(tmp_path))
    assert failed_stage((joint,), tmp_path / "copied.npz") is joint


STAGES = AlternatingConfig(steps=(5, 5, 5, 5), decay_steps=(4, 4, 4, 4))
INVALID = [
    (dict(steps=19), r"steps must be the sum of alternating.steps, got 19 and \(5, 5, 5, 5\)"),
    (dict(warmup_steps=5), r"warmup_steps must be less than the steps of each stage, got 5 and \(5, 5, 5, 5\)"),
    (dict(decay_steps=(3,)), r"scheme alternating uses alternating.decay_steps; .* got \(3,\)"),
    (
        dict(alternating=dataclasses.replace(STAGES, decay_steps=(4, 4, 5, 4))),
        r"each of alternating.decay_steps must be less than .* got \(4, 4, 5, 4\)",
    ),
    (
        dict(alternating=dataclasses.replace(STAGES, rpn_batch_size=3), accumulate=2),
        "alternating.rpn_batch_size must be a multiple of accumulate, got 3 and 2",
    ),
]


@pytest.mark.parametrize("fields, message", INVALID)
def test_stages_that_do_not_fit_together_are_refused(fields, message):
    valid = dict(TRAIN, scheme="alternating", alternating=STAGES)
    TrainConfig(**valid)
    with pytest.raises(ValueError, match=message):
        TrainConfig(**valid | fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(steps=(5, 0, 5, 5)), "steps must be positive, got 0"),
        (dict(decay_steps=(5, 5, 5, -1)), "decay_steps must be positive, got -1"),
        (dict(rpn_batch_size=0), "rpn_batch_size must be positive, got 0"),
    ],
)
def test_values_of_a_single_stage_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        AlternatingConfig(**fields)


def test_fields_of_stages_without_effect_are_named():
    joint = tiny.config(Path("somewhere"), alternating=STAGES)
    assert [sentence.split(" = ")[0] for sentence in unread_fields(joint)] == [
        "train.alternating.steps",
        "train.alternating.decay_steps",
    ]
    assert unread_fields(alternating()) == []
    (sentence,) = unread_fields(alternating(schedule="cosine"))
    assert sentence.startswith("train.alternating.decay_steps") and sentence.endswith("nothing with cosine")


# The losses, on one batch of noise.

B, G = 3, 3
H, W = MODEL.image.canvases[0]
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model(random_weights):
    return random_weights(lambda: Detector(MODEL, tiny.CLASS_NAMES, rng=np.random.default_rng(0)))


@pytest.fixture(scope="module")
def batch():
    """Returns a batch whose last row is empty."""
    generator = np.random.default_rng(3)
    corners = generator.uniform(0, 40, (B, G, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(8, 24, (B, G, 2))], axis=2)
    return Batch(
        images=jnp.asarray(generator.standard_normal((B, H, W, 3)), jnp.float32),
        image_hw=jnp.asarray([[H, W], [H - 8.0, W], [H, W]], jnp.float32),
        scale=jnp.ones((B, 2)),
        image_index=jnp.arange(B, dtype=jnp.int32),
        image_valid=jnp.asarray([True, True, False]),
        ground_truth=GroundTruth(
            jnp.asarray(boxes, jnp.float32),
            jnp.asarray(generator.integers(1, 3, (B, G)), jnp.int32),
            jnp.ones((B, G), bool),
        ),
    )


def losses_of(losses, model, batch):
    return jax.device_get(jax.jit(losses)(model, batch, KEY))


def proposed(model, batch):
    """Returns the proposals that joint training makes from the same batch."""
    found = jax.jit(find_proposals)(model, batch.images, batch.image_hw, batch.scale)
    return batch._replace(proposals=found)


def without(model, part):
    """Returns the detector without one of its parts."""
    graphdef, state = nnx.split(model)
    copied = nnx.merge(graphdef, state)
    setattr(copied, part, None)
    return copied


def assert_zero(tree):
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(tree))


def test_losses_of_the_rpn_alone_are_those_of_joint_training(model, batch):
    """The box head takes no part in the computation."""
    joint = losses_of(training_losses, model, batch)
    alone = losses_of(rpn_training_losses, without(model, "box_head"), batch)
    np.testing.assert_allclose(
        jax.tree.leaves((alone.rpn_objectness, alone.rpn_box)),
        jax.tree.leaves((joint.rpn_objectness, joint.rpn_box)),
        rtol=1e-6,
    )
    assert alone.rpn_foreground == joint.rpn_foreground > 0
    assert_zero((alone.box_class, alone.box_delta, alone.box_foreground))


def test_losses_of_the_box_head_alone_are_those_of_joint_training_on_the_same_proposals(model, batch):
    """The RPN takes no part in the computation."""
    joint = losses_of(training_losses, model, batch)
    alone = losses_of(box_training_losses, without(model, "rpn_head"), proposed(model, batch))
    np.testing.assert_allclose(
        jax.tree.leaves((alone.box_class, alone.box_delta)),
        jax.tree.leaves((joint.box_class, joint.box_delta)),
        rtol=1e-6,
    )
    assert alone.box_foreground == joint.box_foreground > 0
    assert alone.box_class.count == 2 * MODEL.roi_sampling.rois_per_image  # two images of three rows
    assert_zero((alone.rpn_objectness, alone.rpn_box, alone.rpn_foreground))


def test_the_box_head_sees_the_proposals_that_it_is_given(model, batch):
    whole = proposed(model, batch)
    none = whole._replace(proposals=whole.proposals._replace(valid=jnp.zeros_like(whole.proposals.valid)))
    found = losses_of(box_training_losses, model, none)
    # Only the ground-truth boxes are left as RoIs.
    assert found.box_foreground == found.box_class.count == 2 * G
    assert losses_of(box_training_losses, model, whole).box_class.count > 2 * G


def test_a_batch_without_proposals_does_not_train_the_box_head(model, batch):
    with pytest.raises(ValueError, match="the proposals in the batch, and this batch holds none"):
        jax.eval_shape(box_training_losses, model, batch, KEY)


@pytest.mark.parametrize("part", ["rpn_head", "box_head"])
def test_a_step_changes_only_the_parts_of_its_stage(model, batch, part):
    """Other parts keep their bits, also in the averaged weights, and have no entries in the optimizer's state."""
    optimizer = create_optimizer(TrainConfig(**TRAIN, weight_decay=0.1))
    graphdef, state = create_state(model, optimizer, seed=0, averages=True, parts=(part,))
    losses = {"rpn_head": rpn_training_losses, "box_head": box_training_losses}[part]
    step = make_train_step(graphdef, optimizer, axis_name="one", ema_decay=0.9, losses=losses, parts=(part,))
    batches = jax.tree.map(lambda leaf: leaf[None], proposed(model, batch))
    after, numbers = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="one"))(state, batches)
    moved = set()
    for old, new in ((state.params, after.params), (state.averaged, after.averaged)):
        for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True):
            if not np.array_equal(leaf, other[0]):
                moved.add(path[0].key)
    assert moved == {part}
    sizes = {leaf.size for leaf in jax.tree.leaves(state.opt_state)}
    assert sizes <= {leaf.size for leaf in jax.tree.leaves(state.params[part])} | {1}
    assert float(numbers.gradient_norm[0]) > 0


# Four stages through train.py.


def called(main, *argv):
    """Returns (exit status, stdout, stderr) of a script."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in argv])
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    tiny.write_voc(folder / "voc", train=9, test=5)
    (folder / "mine.py").write_text(CONFIG.format(tests=str(Path(__file__).parent), folder=str(folder)))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """Returns (run folder, stdout, stderr) of a whole run."""
    status, out, err = called(train_script.main, "--config", folder / "mine.py")
    assert status == 0, err
    return folder / "run", out, err


def parts_of(run):
    """Returns {part: values by path} of the newest checkpoint."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.split(checkpoint.load(run))[1]):
        found.setdefault(path[0].key, {})[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def same(values, others):
    return values.keys() == others.keys() and all(np.array_equal(values[name], others[name]) for name in values)


def test_the_last_stage_has_the_trunk_rpn_and_head_of_the_earlier_stages(trained):
    run = trained[0]
    first, second, third, last = (parts_of(path) for path in (*(run / "stages" / name for name in NAMES), run))
    assert same(last["backbone"], second["backbone"]) and same(last["backbone"], third["backbone"])
    assert same(last["rpn_head"], third["rpn_head"]) and same(third["box_head"], second["box_head"])
    # The trunk is new; the RPN and the head were trained.
    assert not same(second["backbone"], first["backbone"])
    assert not same(third["rpn_head"], second["rpn_head"]) and not same(last["box_head"], third["box_head"])
    # The untrained part of each of the first two stages has its initial values.
    assert same(first["box_head"], fresh(run)["box_head"])
    assert same(second["rpn_head"], fresh(run)["rpn_head"])


def fresh(run):
    config = checkpoint.load_run_config(run)
    model = create_detector(config.model, config.data.class_names, seed=config.train.seed)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.split(model)[1]):
        found.setdefault(path[0].key, {})[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def lines_of(run, key):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def test_each_stage_leaves_an_ordinary_run_folder(trained):
    run = trained[0]
    for path, losses, none in (
        (run / "stages" / "1_rpn", "rpn_objectness", "box_class"),
        (run / "stages" / "2_detector", "box_class", "rpn_objectness"),
        (run / "stages" / "3_rpn", "rpn_objectness", "box_class"),
        (run, "box_class", "rpn_objectness"),
    ):
        steps = lines_of(path, "gradient_norm")
        assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
        assert all(line[losses] > 0 and line[none] == 0 for line in steps)
        assert json.loads((path / "config.json").read_text())["train"]["scheme"] == "alternating"
        assert checkpoint.load_run_config(path).train.scheme == "alternating"


def test_rpn_stages_report_recall_and_box_head_stages_report_precision(trained):
    run, out, err = trained
    for name in ("1_rpn", "3_rpn"):
        (line,) = lines_of(run / "stages" / name, "test/proposal_AR_1000")
        assert line["step"] == STEPS and 0 <= line["test/proposal_AR_1000"] <= line["test/proposal_recall50_2000"] <= 1
    for path in (run / "stages" / "2_detector", run):
        (line,) = lines_of(path, "test/AP50")
        assert line["step"] == STEPS and (path / "images" / "000003.png").is_file()
    said = out + err
    assert said.count(f"step {STEPS}: AR@300 of the proposals ") == said.count(f"step {STEPS}: AP50 ") == 2


def test_stored_proposals_are_those_of_their_stage(trained):
    run = trained[0]
    config = checkpoint.load_run_config(run)
    for name, splits in (("1_rpn", ("train", "test")), ("3_rpn", ("train",))):
        path = run / "stages" / name
        model = checkpoint.load(path)
        assert {file.stem for file in (path / "proposals").iterdir()} == set(splits)
        for split in splits:
            dataset = open_split(config.data, split)
            stored, made_by = read_proposals(proposals_path(path, split))
            assert made_by == digest(model)
            for record, expected in zip(dataset.records, propose_dataset(model, dataset, batch_size=1), strict=True):
                found = stored[record.id]
                np.testing.assert_array_equal(found.boxes, expected.boxes)
                height, width = record.image_hw
                assert (found.boxes >= 0).all() and (found.boxes <= [width, height, width, height]).all()
                assert (np.diff(found.scores) <= 0).all() and len(found.boxes) > 4


def test_the_run_is_evaluated_like_any_other(trained):
    run = trained[0]
    status, out, err = called(evaluate_script.main, "--ckpt", run)
    assert status == 0, err
    (line,) = lines_of(run, "test/AP50")
    assert f"AP50 {line['test/AP50']:.2f}" in out


def test_a_finished_run_only_prints_its_results_again(trained, folder):
    run = trained[0]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("proposals/*")}
    status, out, err = called(train_script.main, "--config", folder / "mine.py")
    assert status == 0, err
    assert "compiling the training step" not in err and out.count("VOC area") == 1
    assert {path: path.stat().st_mtime_ns for path in run.rglob("proposals/*")} == before
    assert [line["step"] for line in lines_of(run, "gradient_norm")] == list(range(1, STEPS + 1))


def test_replay_repeats_a_step_only_in_its_stage(folder, monkeypatch):
    met = []
    monkeypatch.setattr(train_script, "fit", lambda config, stage, *_, **__: met.append(stage.name))
    batch = folder / "run" / "stages" / "2_detector" / "failed" / "step_00000001.npz"
    status, _, err = called(train_script.main, "--config", folder / "mine.py", "--replay", batch)
    assert (status, met) == (0, ["2_detector"]), err


def test_an_interrupted_run_ends_with_the_same_bits(trained, folder, tmp_path):
    """The run folder is as if killed in stage 2 after the checkpoint of step 2: later files are deleted."""
    run = trained[0]
    again = tmp_path / "again"
    shutil.copytree(run / "stages" / "1_rpn", again / "stages" / "1_rpn")
    shutil.copytree(run / "stages" / "2_detector", again / "stages" / "2_detector")
    shutil.rmtree(again / "stages" / "2_detector" / "checkpoints" / "3")
    status, out, err = called(train_script.main, "--config", folder / "mine.py", "--run", again)
    assert status == 0, err
    assert f"continuing {again}/stages/2_detector from step 2" in out
    for path in ("stages/2_detector", "stages/3_rpn", "."):
        found, expected = parts_of(again / path), parts_of(run / path)
        assert all(same(found[part], expected[part]) for part in expected)


def test_the_data_is_compared_with_the_newest_checkpoint_of_all_stages(trained, folder, tmp_path, monkeypatch):
    """A change that a later stage accepted is no change for the stages before it."""
    for name in NAMES[:2]:
        shutil.copytree(trained[0] / "stages" / name / "checkpoints", tmp_path / "stages" / name / "checkpoints")
    met = []
    monkeypatch.setattr(train_script, "fit", lambda config, stage, *_, compare: met.append((stage.name, compare)))
    status, _, err = called(train_script.main, "--config", folder / "mine.py", "--run", tmp_path)
    assert status == 0, err
    assert met == [("1_rpn", False), ("2_detector", True), ("3_rpn", True), ("4_detector", True)]


def test_stored_proposals_are_reused_only_for_the_same_weights_and_images(trained, tmp_path):
    run = trained[0]
    config, model = checkpoint.load_run_config(run), checkpoint.load(run)
    dataset = open_split(config.data, "test")
    path = tmp_path / "test.safetensors"
    first = stored_proposals(path, model, dataset, batch_size=1)
    written = path.stat().st_mtime_ns
    for found, expected in zip(stored_proposals(path, model, dataset, batch_size=1), first, strict=True):
        np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:100])  # a truncated file, as after a disk fault
    np.testing.assert_array_equal(stored_proposals(path, model, dataset, batch_size=1)[0].boxes, first[0].boxes)
    others = {name: found._replace(boxes=found.boxes + 1) for name, found in read_proposals(path)[0].items()}
    write_proposals(path, others, made_by="other")
    np.testing.assert_array_equal(stored_proposals(path, model, dataset, batch_size=1)[0].boxes, first[0].boxes)
    fewer = dataset._replace(records=dataset.records[1:])
    assert len(stored_proposals(path, model, fewer, batch_size=1)) == len(first) - 1
    with pytest.raises(InputError, match=r"test.safetensors: has no proposals for 1 images, the first is test0"):
        given_proposals(path, dataset)
