"""Settings: invalid values are refused with field and value; JSON keeps every value; all sources are checked."""

import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

import fasterrcnn_jax.config as config_module
from fasterrcnn_jax.config import (
    BackboneConfig,
    BoxCoderConfig,
    BoxHeadConfig,
    Config,
    DataConfig,
    FpnConfig,
    ImageConfig,
    LossConfig,
    ModelConfig,
    PostprocessConfig,
    ProposalConfig,
    RoiFeaturesConfig,
    RoiSamplingConfig,
    RpnConfig,
    ShapesConfig,
    TrainConfig,
)
from fasterrcnn_jax.config.rules import differences, unread_fields
from fasterrcnn_jax.config.text import field_help, from_json, load_config, to_json, with_fields
from fasterrcnn_jax.errors import InputError

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("[!_]*.py"))
TRAIN = dict(steps=10, batch_size=2, learning_rate=0.1, warmup_steps=2)
TINY = tiny.config(Path("somewhere"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_json(path):
    config = load_config(path)
    assert from_json(to_json(config), "here") == config
    assert hash(config.model) == hash(load_config(path).model)  # a static argument of the programs


def test_json_keeps_what_differs_from_the_defaults():
    config = dataclasses.replace(
        TINY,
        data=DataConfig(root=Path("a b/ü"), class_names=("x y", "ß"), shapes=ShapesConfig(num_train=3, seed=5)),
        train=TrainConfig(**TRAIN, seed=7, optimizer="adamw", weight_decay=0.0),
    )
    again = from_json(to_json(config), "here")
    assert again == config and isinstance(again.data.root, Path) and hash(again) == hash(config)


def test_every_field_has_its_help_text_in_the_source():
    """tyro shows the docstring under a field as its help text."""
    for cls in vars(config_module).values():
        if dataclasses.is_dataclass(cls) and cls not in (Config, ModelConfig):
            assert set(field_help(cls)) == {field.name for field in dataclasses.fields(cls)}, cls.__name__


INVALID = [
    (lambda: ImageConfig(short_side=0), "short_side must be positive, got 0"),
    (lambda: ImageConfig(short_side=800, long_side=700), "700 < 800"),
    (lambda: ImageConfig(canvases=((608, 1024),)), "no canvas of .* 1000 x 600"),
    (lambda: ImageConfig(canvases=()), "no canvas of"),
    (lambda: ImageConfig(canvases=((608, 1024), (1024, 609))), r"multiples of 16, got \(1024, 609\)"),
    (lambda: ImageConfig(std=(1.0, 0.0, 1.0)), "std must be positive, got 0.0"),
    (lambda: BackboneConfig(width=12), "width must be .*8, got 12"),
    (lambda: BackboneConfig(width=0), "width .* got 0"),
    (lambda: BackboneConfig(norm="none"), "norm none is for vgg16, resnet101"),
    (lambda: BackboneConfig(fixed_stages=5), r"fixed_stages must be in 0..4 for resnet101, got 5"),
    (
        lambda: ModelConfig(backbone=BackboneConfig(fixed_stages=4)),
        r"fixed_stages must be in 0..3 without a pyramid, got 4",
    ),
    (lambda: BackboneConfig(name="vgg16", fixed_stages=6), r"fixed_stages must be in 0..5 for vgg16, got 6"),
    (lambda: RpnConfig(fg_iou=1.5), r"fg_iou must be in \[0, 1\], got 1.5"),
    (lambda: RpnConfig(fg_iou=0.2), "bg_iou <= fg_iou, got 0.3 and 0.2"),
    (lambda: RpnConfig(anchor_scales=()), "anchor_scales"),
    (lambda: RpnConfig(anchor_sizes=((32.0,),)), "anchor_sizes needs anchor_rounding half or none"),
    (lambda: RpnConfig(anchor_sizes=((32.0,), (1.0, 2.0)), anchor_rounding="none"), "equally many sizes for every"),
    (lambda: RpnConfig(anchor_sizes=((), ()), anchor_rounding="none"), "equally many sizes for every"),
    (lambda: RpnConfig(anchor_sizes=((-1.0,),), anchor_rounding="none"), "anchor_sizes must be positive, got -1.0"),
    (
        lambda: RpnConfig(anchor_sizes=((32.0,),), anchor_rounding="none", anchor_scales="auto"),
        "anchor_scales auto has no effect with anchor_sizes",
    ),
    (
        lambda: ModelConfig(rpn=RpnConfig(anchor_sizes=((32.0,), (64.0,)), anchor_rounding="none")),
        r"rpn.anchor_sizes must hold 1 tuple, got \(\(32.0,\), \(64.0,\)\)",
    ),
    (lambda: BackboneConfig(name="vgg16", fixed_stem=True), "fixed_stem must be False for vgg16"),
    (
        lambda: RoiFeaturesConfig(operator="crop", crop_max_pool=False, output_size=1),
        "output_size must be at least 2 with crop_max_pool False, got 1",
    ),
    (lambda: RpnConfig(anchor_base=0.0), "anchor_base must be positive, got 0.0"),
    (lambda: RpnConfig(allowed_border=-1.0), "allowed_border must not be negative, got -1.0"),
    (lambda: RpnConfig(anchor_ratios=(1.0, -2.0)), "anchor_ratios must be positive, got -2.0"),
    (lambda: RpnConfig(anchors_per_image=0), "anchors_per_image must be positive, got 0"),
    (lambda: ProposalConfig(pre_nms_top_n=0, post_nms_top_n=20), "pre_nms_top_n must be positive, got 0"),
    (
        lambda: ModelConfig(test_proposals=ProposalConfig(pre_nms_top_n=10, post_nms_top_n=20)),
        "got 10 and 20",
    ),
    (lambda: RpnConfig(convs=0), "convs must be positive, got 0"),
    (lambda: FpnConfig(channels=0), "channels must be positive, got 0"),
    (lambda: BoxHeadConfig(layers=0), "layers must be positive, got 0"),
    (lambda: BoxHeadConfig(convs=-1), "convs must not be negative, got -1"),
    (lambda: ProposalConfig(pre_nms_top_n=10, post_nms_top_n=2, nms_threshold=0.0), "nms_threshold"),
    (lambda: ProposalConfig(pre_nms_top_n=10, post_nms_top_n=2, min_size=-1.0), "min_size .* got -1.0"),
    (lambda: RoiSamplingConfig(bg_iou=(0.5, 0.1)), r"got \(0.5, 0.1\)"),
    (lambda: RoiSamplingConfig(fg_fraction=-0.1), "fg_fraction .* got -0.1"),
    (lambda: RoiSamplingConfig(box_stds=(1.0, 1.0, 0.0, 1.0)), "box_stds must be positive, got 0.0"),
    (lambda: RoiSamplingConfig(rois_per_batch=0), "rois_per_batch must be positive, got 0"),
    (lambda: RoiFeaturesConfig(output_size=0), "output_size must be positive, got 0"),
    (lambda: RoiFeaturesConfig(sampling_ratio=-1), "sampling_ratio must not be negative, got -1"),
    (lambda: BoxHeadConfig(dropout=1.0), "dropout .* got 1.0"),
    (lambda: BoxHeadConfig(channels=0), "channels must be positive, got 0"),
    (lambda: BoxCoderConfig(max_log_scale=0.0), "max_log_scale must be positive, got 0.0"),
    (lambda: LossConfig(rpn_sigma=0.0), "rpn_sigma must be positive, got 0.0"),
    (lambda: LossConfig(roi_sigma=-1.0), "roi_sigma must be positive, got -1.0"),
    (lambda: LossConfig(rpn_box_weight=-1.0), "rpn_box_weight must not be negative, got -1.0"),
    (lambda: LossConfig(roi_box_weight=-2.0), "roi_box_weight must not be negative, got -2.0"),
    (lambda: LossConfig(rpn_positive_weight=1.0), r"rpn_positive_weight must be in \(0, 1\), got 1.0"),
    (lambda: LossConfig(rpn_box_inside_weights=(1.0, 1.0, -1.0, 1.0)), "rpn_box_inside_weights .* got -1.0"),
    (lambda: LossConfig(roi_box_inside_weights=(1.0, 1.0, -3.0, 1.0)), "roi_box_inside_weights .* got -3.0"),
    (lambda: PostprocessConfig(max_detections=0), "max_detections must be positive, got 0"),
    (lambda: PostprocessConfig(score_threshold=2.0), "score_threshold .* got 2.0"),
    (lambda: ShapesConfig(num_test=0), "num_test must be positive, got 0"),
    (lambda: DataConfig(root=Path("x"), max_boxes=0), "max_boxes must be positive, got 0"),
    (lambda: DataConfig(root=Path("x"), crop_aspect=0.5), "crop_aspect must be at least 1, got 0.5"),
    (lambda: DataConfig(root=Path("x"), class_names=("a", "b", "a")), r"class_names contains \['a'\]"),
    (lambda: TrainConfig(**TRAIN | {"steps": 0}), "steps must be positive, got 0"),
    (lambda: TrainConfig(**TRAIN | {"learning_rate": float("nan")}), "learning_rate .* got nan"),
    (lambda: TrainConfig(**TRAIN | {"learning_rate": float("inf")}), "learning_rate .* got inf"),
    (lambda: TrainConfig(**TRAIN | {"warmup_steps": 10}), "warmup_steps < steps, got 10 and 10"),
    (lambda: TrainConfig(**TRAIN, seed=-1), "seed .* got -1"),
    (lambda: TrainConfig(**TRAIN, seed=2**32), "seed .* got 4294967296"),
    (lambda: TrainConfig(**TRAIN, momentum=1.0), "momentum .* got 1.0"),
    (lambda: TrainConfig(**TRAIN, clip_norm=0.0), "clip_norm must be positive, got 0.0"),
    (lambda: TrainConfig(**TRAIN, decay_steps=(5, 4)), r"decay_steps .* got \(5, 4\)"),
    (lambda: TrainConfig(**TRAIN, decay_steps=(0,)), r"decay_steps .* got \(0,\)"),
    (lambda: TrainConfig(**TRAIN, decay_steps=(4,), schedule="cosine"), r"got \(4,\) with cosine"),
    (lambda: TrainConfig(**TRAIN, decay_factor=0.0), "decay_factor .* got 0.0"),
    (lambda: TrainConfig(**TRAIN, weight_decay=-1e-4), "weight_decay .* got -0.0001"),
    (lambda: TrainConfig(**TRAIN, keep_checkpoints=0), "keep_checkpoints must be positive, got 0"),
    (lambda: TrainConfig(**TRAIN, checkpoint_every=4, evaluate_every=6), "evaluate_every .* got 6 and 4"),
]


def test_rois_of_a_batch_must_divide_over_its_images():
    model = replace(TINY.model, roi_sampling=RoiSamplingConfig(rois_per_batch=6))
    with pytest.raises(ValueError, match="rois_per_batch must be a multiple of batch_size, got 6 and 4"):
        replace(TINY, model=model)


UNREAD = [
    (dict(backbone=dict(name="vgg16", norm="none", stride_in="3x3")), r"backbone.stride_in = '3x3' .* vgg16"),
    (dict(backbone=dict(stem_pool="padded", name="vgg16", norm="none")), "backbone.stem_pool = 'padded' .* vgg16"),
    (dict(backbone=dict(name="vgg16"), box_head=dict(summary="flatten")), "box_head.summary = 'flatten' .* vgg16"),
    (dict(box_head=dict(channels=16)), "box_head.channels = 16 changes nothing with resnet101"),
    (dict(box_head=dict(dropout=0.1)), "box_head.dropout = 0.1 changes nothing with resnet101"),
    (dict(box_head=dict(convs=4)), "box_head.convs = 4 changes nothing with resnet101"),
    (dict(box_head=dict(layers=1)), "box_head.layers = 1 changes nothing with resnet101"),
    (dict(roi_features=dict(operator="pool", aligned=True)), "roi_features.aligned = True .* pool"),
    (dict(roi_features=dict(operator="crop", sampling_ratio=2)), "roi_features.sampling_ratio = 2 .* crop"),
    (dict(roi_features=dict(quantisation="floor")), "roi_features.quantisation = 'floor' .* align"),
    (dict(roi_features=dict(crop_max_pool=False)), "roi_features.crop_max_pool = False .* align"),
    (dict(backbone=dict(fixed_stem=True)), "backbone.fixed_stem = True changes nothing with fixed_stages 1"),
    (
        dict(rpn=dict(anchor_sizes=((32.0,),), anchor_rounding="none", anchor_base=8.0)),
        "rpn.anchor_base = 8.0 changes nothing with anchor_sizes",
    ),
]


@pytest.mark.parametrize("sizes", [(32.0, 64.0), 32.0])
def test_anchor_sizes_without_a_tuple_for_each_level_are_refused_with_an_example(sizes):
    rpn = RpnConfig(anchor_rounding="none")
    object.__setattr__(rpn, "anchor_sizes", sizes)  # without the tests' type checker, as users run it
    with pytest.raises(ValueError, match=r"anchor_sizes must hold one tuple for each level, as in .* got ") as caught:
        rpn.__post_init__()
    assert "((32,), (64,), " in str(caught.value) and str(caught.value).endswith(f"got {sizes}")


@pytest.mark.parametrize("parts, said", UNREAD, ids=[said for _, said in UNREAD])
def test_a_value_without_effect_is_named(parts, said):
    model = ModelConfig()
    for part, fields in parts.items():
        model = replace(model, **{part: replace(getattr(model, part), **fields)})
    (sentence,) = unread_fields(replace(TINY, model=model))
    assert re.search(said, sentence)


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(optimizer="adam", momentum=0.5), "train.momentum = 0.5 changes nothing with adam"),
        (dict(schedule="cosine", decay_factor=0.5), "train.decay_factor = 0.5 changes nothing with cosine"),
    ],
)
def test_a_setting_of_another_optimizer_or_schedule_is_named(fields, said):
    assert unread_fields(replace(TINY, train=TrainConfig(**TRAIN, **fields))) == [said]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_set_no_value_without_effect(path):
    assert unread_fields(load_config(path)) == []


@pytest.mark.parametrize("build, message", INVALID, ids=range(len(INVALID)))
def test_an_invalid_value_is_refused_by_name_and_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def change(path, value):
    """Returns the JSON of a valid configuration with one entry replaced; `...` removes it."""
    values = json.loads(to_json(TINY))
    *parents, name = path.split(".")
    entry = values
    for parent in parents:
        entry = entry[parent]
    if value is ...:
        del entry[name]
    else:
        entry[name] = value
    return json.dumps(values)


JSONS = [
    ("", "cannot be read"),
    ("[]", "config must hold fields, got []"),
    ("null", "config must hold fields, got None"),
    ('{"data": 3}', "config.data must hold fields, got 3"),
    (to_json(TINY)[:200], "cannot be read"),
    (change("train.stepz", 3), "config.train has no field 'stepz'"),
    (change("model.rpn.sizes", [3]), "config.model.rpn has no field 'sizes'"),
    (change("train.steps", ...), "'steps'"),
    (change("train.steps", 0), "steps must be positive, got 0"),
    (change("train.steps", {}), "cannot be read"),
    (change("run", {}), "cannot be read"),
    (change("model.image.short_side", 63.5), "model.image.short_side must be int, got 63.5"),
    (change("data.class_names", "ring"), "data.class_names must be tuple[str, ...], got 'ring'"),
    (change("model.backbone.name", "resnet19"), "model.backbone.name must be 'vgg16' or 'resnet18'"),
]


def fault(part, **fields):
    """Returns Python text that replaces fields of one part of `config`; values are Python text."""
    text = ", ".join(f"{name}={value}" for name, value in fields.items())
    names = part.split(".") if part else []
    for depth in range(len(names), 0, -1):
        owner = ".".join(["config", *names[:depth]])
        text = f"{names[depth - 1]}=replace({owner}, {text})"
    return f"config = replace(config, {text})"


FILES = [
    (fault("", run="'runs/x'"), "run must be Path, got 'runs/x'"),
    (fault("data", class_names="['a']"), "data.class_names must be tuple[str, ...], got ['a']"),
    (fault("data", class_names="'abc'"), "data.class_names must be tuple[str, ...], got 'abc'"),
    (fault("data", class_names="('a', 3)"), "data.class_names must be tuple[str, ...], got ('a', 3)"),
    (fault("data", shapes="4"), "data.shapes must be ShapesConfig or None, got 4"),
    (fault("train", learning_rate="'1'"), "'str'"),
    (fault("train", warmup_steps="1.5"), "train.warmup_steps must be int or 'auto', got 1.5"),
    (fault("train", optimizer="'sdg'"), "train.optimizer must be 'sgd' or 'adam' or 'adamw', got 'sdg'"),
    (fault("model.image", canvases="((64, 96), (96, 64.0))"), "model.image.canvases must be tuple"),
    (fault("model", rpn="None"), "model.rpn must be"),
    (fault("model", rpn="config.model.backbone"), "model.rpn must be"),
    (fault("model", rpn="type(config.model.rpn)"), "model.rpn must be"),
    (fault("train", stepz="3"), "unexpected keyword argument 'stepz'"),
    (fault("train", steps="0"), "steps must be positive, got 0"),
    ("config = 3", "defines no `config` of type Config"),
    ("del config", "defines no `config` of type Config"),
    ("raise KeyError('nothing')", "KeyError: 'nothing'"),
    ("import no_such_module", "No module named 'no_such_module'"),
    ("def (:", "SyntaxError"),
]

PROGRAM = """
import json, sys
from pathlib import Path
from fasterrcnn_jax.config.text import from_json, load_config
from fasterrcnn_jax.errors import InputError
for path in map(Path, sys.argv[1:]):
    try:
        load_config(path) if path.suffix == ".py" else from_json(path.read_text(), str(path))
        print(json.dumps("accepted"))
    except InputError as error:
        print(json.dumps(str(error)))
"""


def write(path, text):
    """Writes a config file: the tiny configuration, changed by Python text that sees `config`."""
    path.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import dataclasses, tiny\nfrom pathlib import Path\n"
        f"config = tiny.config(Path({str(path.parent)!r}))\nreplace = dataclasses.replace\n{text}\n"
    )
    return path


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """Returns the error message of every faulty text, from a process without the tests' type checker."""
    folder = tmp_path_factory.mktemp("faulty")
    paths = [write(folder / f"{number:02d}.py", text) for number, (text, _) in enumerate(FILES)]
    for number, (text, _) in enumerate(JSONS):
        paths.append(folder / f"{number:02d}.json")
        paths[-1].write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, paths)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {path.name: json.loads(line) for path, line in zip(paths, done.stdout.splitlines(), strict=True)}


@pytest.mark.parametrize("number", range(len(FILES)), ids=[text[:60] for text, _ in FILES])
def test_a_bad_config_file_is_named_with_field_and_value(messages, number):
    name = f"{number:02d}.py"
    assert name in messages[name] and FILES[number][1] in messages[name], messages[name]


@pytest.mark.parametrize("number", range(len(JSONS)))
def test_an_error_in_json_names_place_and_field(messages, number):
    name = f"{number:02d}.json"
    assert name in messages[name] and JSONS[number][1] in messages[name], messages[name]


def test_a_config_file_gives_its_config(tmp_path):
    assert load_config(write(tmp_path / "mine.py", "")) == tiny.config(tmp_path)


def test_an_absent_config_file_is_named(tmp_path):
    with pytest.raises(InputError, match="absent.py: no such file"):
        load_config(tmp_path / "absent.py")
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path)


# ---------------------------------------------------------------- fields by name


def test_fields_are_replaced_by_their_full_or_last_name():
    got = with_fields(TINY, {"train.batch_size": 8, "steps": 7, "run": "x", "split": [0.7], "class_names": ["a"]})
    assert (got.train.batch_size, got.train.steps, got.run) == (8, 7, Path("x"))
    assert got.data.split == (0.7,) and got.data.class_names == ("a",)
    assert with_fields(TINY, {}) == TINY


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 8}, "batchsize: no field has this name; batch_size or"),
        ({"pre_nms_top_n": 8}, "pre_nms_top_n: several fields have this name; model.train_proposals.pre_nms_top_n or"),
        ({"batch_size": 0}, "train.batch_size: batch_size must be positive, got 0"),
        ({"steps": "many"}, "train.steps must be int or 'auto', got 'many'"),
        ({"seed": 1.5}, "train.seed must be int, got 1.5"),
    ],
)
def test_a_field_that_does_not_exist_or_fit_is_named(values, message):
    with pytest.raises(InputError, match=re.escape(message)):
        with_fields(TINY, values)


def test_differences_between_configurations_have_names_and_both_values():
    first = tiny.config(Path("a"))
    assert differences(first, first) == []
    postprocess = replace(first.model.postprocess, soft_nms="linear")
    second = replace(first, run=Path("b"), model=replace(first.model, postprocess=postprocess))
    assert differences(first, second) == [
        ("model.postprocess.soft_nms", None, "linear"),
        ("run", str(first.run), "b"),
    ]
    assert differences(first.model, second.model) == [("postprocess.soft_nms", None, "linear")]
