"""Tests weights files: every container gives the arrays back, no code of a file is run, no length is trusted."""

import argparse
import copyreg
import errno
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import budget
import foreign_files
import fuzz_weights
import hostile_weights
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from foreign_files import Call, Global

from fasterrcnn_jax import atomic_write
from fasterrcnn_jax.errors import InputError
from fasterrcnn_jax.weights import files, numpy_pickle, restricted_pickle, torch_files

WEIGHTS = {
    "stem.weight": np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32),
    "stem.bias": np.float32([0.5, -2.0, 3e-41, np.inf]),
    "empty": np.zeros((0, 3), np.float32),
}


def wrapped(weights):
    """Returns what a training program saves: the weights, an optimizer and other values."""
    momentum = {0: {"momentum_buffer": np.full(5, 7.0, np.float32)}}
    return {"epoch": 3, "model": OrderedDict(weights), "optimizer": {"state": momentum, "lr": 0.1}}


def write_pkl(path, weights, protocol):
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "somebody"}, protocol))


CONTAINERS = {
    "zip": lambda path, weights: foreign_files.write_zip(path, OrderedDict(weights)),
    "zip of a training": lambda path, weights: foreign_files.write_zip(path, wrapped(weights), folder="last"),
    "legacy": lambda path, weights: foreign_files.write_legacy(path, OrderedDict(weights)),
    "legacy of a training": lambda path, weights: foreign_files.write_legacy(path, wrapped(weights)),
    "legacy from a GPU": lambda path, weights: foreign_files.write_legacy(path, weights, torch="torch.cuda"),
    "pkl 2": lambda path, weights: write_pkl(path, weights, 2),
    "pkl 4": lambda path, weights: write_pkl(path, weights, 4),
    "pkl 5": lambda path, weights: write_pkl(path, weights, 5),
    "pkl of Python 2": lambda path, weights: foreign_files.write_python2_pkl(path, {"blobs": weights}),
    "safetensors": lambda path, weights: safetensors.numpy.save_file(weights, path),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_arrays_come_back_bit_for_bit_from_every_container(container, tmp_path):
    path = tmp_path / "weights"  # the name decides nothing
    CONTAINERS[container](path, WEIGHTS)
    found = files.read(path).arrays
    assert found.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("write", [foreign_files.write_zip, foreign_files.write_legacy])
def test_views_and_every_type_of_numbers_are_read(write, tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"whole": base, "transposed": base.T, "part": base[1:3, ::2], "scalar": base[2, 3:4].reshape(())}
    for dtype in (bool, np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float64, jnp.bfloat16):
        views[np.dtype(dtype).name] = np.arange(4).astype(dtype)
    write(tmp_path / "views.pth", views)
    found = files.read(tmp_path / "views.pth").arrays
    assert found.keys() == views.keys()
    for name, view in views.items():
        assert found[name].dtype == view.dtype
        np.testing.assert_array_equal(found[name], view, strict=True)


def test_the_items_that_python_2_gives_an_ordered_dictionary_are_read(tmp_path):
    items = [["a", np.ones(2, np.float32)]]
    foreign_files.write_legacy(tmp_path / "old.pth", Call(Global("collections", "OrderedDict"), (items,)))
    assert files.read(tmp_path / "old.pth").arrays["a"].tolist() == [1, 1]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_arrays_of_other_orders_have_the_same_values(protocol, tmp_path):
    arrays = {"big": np.array([1.5, -2.0], ">f4"), "columns": np.arange(6.0).reshape(2, 3).T}
    write_pkl(tmp_path / "a.pkl", arrays, protocol)
    found = files.read(tmp_path / "a.pkl").arrays
    assert found["big"].tolist() == [1.5, -2.0]
    assert found["columns"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_attributes_of_a_dictionary_are_dropped(tmp_path):
    """torch gives a state dictionary an attribute with versions; other attributes could replace its methods."""
    attributes = {"_metadata": {"": {"version": 2}}, "items": 1, "get": 1, "hook": Global("os", "system")}
    ordered = Call(Global("collections", "OrderedDict"), ([("a", np.ones(2, np.float32))],), attributes)
    foreign_files.write_zip(tmp_path / "a.pth", ordered)
    assert files.read(tmp_path / "a.pth").arrays["a"].tolist() == [1, 1]


def named(prefix):
    return OrderedDict((f"{prefix}{name}", array) for name, array in WEIGHTS.items())


def averaged():
    """Returns the averages of the weights, whose numbers must not be taken for the weights."""
    return OrderedDict({"n_averaged": np.array(3)} | {f"module.{name}": array + 1 for name, array in WEIGHTS.items()})


ADAM = {"state": {0: {"step": np.array(3.0), "exp_avg": np.ones(4, np.float32)}}, "param_groups": [{"lr": 0.1}]}
ARGUMENTS = argparse.Namespace(lr=0.02, data_path="coco", device="cuda")
MODEL_CHECKPOINT = {"best_model_score": np.array(0.4, np.float32), "best_model_path": "best.ckpt"}
# A buffer of mmengine: it holds arrays of NumPy and the names of its functions.
HISTORY = Call(
    Global("copyreg", "_reconstructor"),
    (Global("mmengine.logging.history_buffer", "HistoryBuffer"), Global("builtins", "object"), None),
    {
        "_log_history": Call(Global("numpy.core.multiarray", "_reconstruct"), (Global("numpy", "ndarray"), (0,), b"b")),
        "_statistics_methods": {"mean": Global("mmengine.logging.history_buffer", "HistoryBuffer.mean")},
    },
)
TRAININGS = {
    "PyTorch's tutorial": {
        "epoch": 5,
        "model_state_dict": named(""),
        "optimizer_state_dict": ADAM,
        "loss": np.array(1.5),
    },
    "torchvision's reference": {
        "model": named(""),
        "optimizer": ADAM,
        "lr_scheduler": {"milestones": Call(Global("collections", "Counter"), ({16: 1, 22: 1},))},
        "args": ARGUMENTS,
        "epoch": 25,
        "scaler": {"scale": 65536.0},
        "model_ema": averaged(),
    },
    "Lightning": {
        "epoch": 2,
        "global_step": 300,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": named("model."),
        "callbacks": {"ModelCheckpoint{'monitor': 'map'}": MODEL_CHECKPOINT},
        "optimizer_states": [ADAM],
        "lr_schedulers": [],
        "hparams_name": "hparams",
        "hyper_parameters": Call(
            Global("pytorch_lightning.utilities.parsing", "AttributeDict"), ({"backbone": ARGUMENTS},)
        ),
    },
    "Lightning before 1.5": {
        "state_dict": named("model."),
        "callbacks": {Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"): MODEL_CHECKPOINT},
        "optimizer_states": [ADAM],
    },
    "mmengine": {
        "meta": {"epoch": 12, "dataset_meta": {"classes": ("ring", "disc"), "palette": [(1, 2, 3)]}},
        "state_dict": named(""),
        "message_hub": {"log_scalars": OrderedDict({"train/loss": HISTORY}), "runtime_info": {}},
        "optimizer": ADAM,
        "param_schedulers": [{"last_step": 3}],
    },
    "mmcv": {"meta": {"CLASSES": ("ring",)}, "state_dict": named(""), "optimizer": ADAM},
    "fvcore": {"model": named(""), "optimizer": ADAM, "scheduler": {"last_epoch": 9}, "iteration": 90000},
    "timm": {
        "epoch": 3,
        "arch": "resnet50",
        "state_dict": named(""),
        "optimizer": ADAM,
        "version": 2,
        "args": ARGUMENTS,
        "state_dict_ema": averaged(),
        "metric": 77.1,
    },
    "faster-rcnn.pytorch": {"session": 1, "epoch": 7, "model": named(""), "optimizer": ADAM, "class_agnostic": False},
    "averages alone": {"ema": named("module."), "updates": 3},
    "DataParallel": named("module."),
    "DataParallel in Lightning": {"state_dict": named("model.module.")},
    "torch.compile": {"model": named("module._orig_mod.")},
    "a state_dict beside tensors": {"epoch": np.array(3), "model": {"state_dict": named("")}, "best": np.array(0.5)},
    "a configuration as model": {"model": {"backbone": "resnet50"}, "state_dict": named("")},
}


@pytest.mark.parametrize("write", [foreign_files.write_zip, foreign_files.write_legacy])
@pytest.mark.parametrize("program", TRAININGS)
def test_the_weights_in_a_checkpoint_of_a_training_program_are_found(program, write, tmp_path):
    write(tmp_path / "last.pth", TRAININGS[program])
    found = files.read(tmp_path / "last.pth").arrays
    assert found.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_prefixes_are_removed_in_safetensors_too(tmp_path):
    safetensors.numpy.save_file(named("_orig_mod."), tmp_path / "model.safetensors")
    assert files.read(tmp_path / "model.safetensors").arrays.keys() == WEIGHTS.keys()


def test_names_stay_where_two_would_be_one_without_their_prefixes(tmp_path):
    weights = {"model.a": np.zeros(1, np.float32), "module.a": np.ones(1, np.float32)}
    foreign_files.write_zip(tmp_path / "two.pth", weights)
    assert files.read(tmp_path / "two.pth").arrays.keys() == weights.keys()


@pytest.mark.parametrize("wrapping", [lambda model: model, lambda model: {"epoch": 3, "model": model, "ema": model}])
def test_a_whole_model_in_place_of_its_weights_is_refused_with_its_class(wrapping, tmp_path):
    model = Call(Global("ultralytics.nn.tasks", "DetectionModel"), (), {"weight": np.ones(2, np.float32)})
    foreign_files.write_zip(tmp_path / "best.pt", wrapping(model))
    with pytest.raises(InputError, match=r"best\.pt: .* use 'ultralytics\.nn\.tasks\.DetectionModel'"):
        files.read(tmp_path / "best.pt")


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 2), ("F8_E5M2", 2), ("F4", 1), ("C64", 16)])
def test_a_dtype_of_safetensors_that_we_do_not_read_is_named(dtype, size, tmp_path):
    header = hostile_weights.tensor_header(dtype, [2], size)
    hostile_weights.safetensors(tmp_path / "in.safetensors", header, data=bytes(size))
    with pytest.raises(InputError, match=rf"in\.safetensors: the dtype of 'a' must be one of BOOL, .*, got {dtype}"):
        files.read(tmp_path / "in.safetensors")


def test_every_dtype_of_safetensors_that_torch_has_is_read(tmp_path):
    for dtype, numpy_dtype in files.SAFETENSORS_DTYPES.items():
        array = np.arange(2).astype(numpy_dtype)
        header = hostile_weights.tensor_header(dtype, [2, 1], array.nbytes)
        hostile_weights.safetensors(tmp_path / "in.safetensors", header, data=array.tobytes())
        found = files.read(tmp_path / "in.safetensors").arrays["a"]
        np.testing.assert_array_equal(found, array[:, None], strict=True)


def test_names_of_a_file_are_printed_without_control_characters(tmp_path):
    """ESC and line feeds in a name could change or forge lines of a terminal."""
    bad = "\x1b[2J\nerror: all is well"
    weights = {"a": np.ones(2, np.float32)}
    beyond = Call(
        Global("torch._utils", "_rebuild_tensor_v2"), (foreign_files.Storage("0", weights["a"]), 9, (1,), (1,))
    )
    for obj, options in (
        ({bad: beyond}, {"extra": [("archive/data/0", bytes(8))]}),
        ({"a": Global("module", bad.replace("\n", "\r"))}, {}),
        (weights, {"folder": bad, "extra": [(f"{bad}/data/0", None)]}),
    ):
        foreign_files.write_zip(tmp_path / "bad.pth", obj, **options)
        with pytest.raises(InputError, match="all is well") as caught:
            files.read(tmp_path / "bad.pth")
        assert str(caught.value).isprintable()


def test_a_disk_that_is_full_keeps_the_old_file_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "out.safetensors"
    files.write(path, WEIGHTS, {"a": "old"})

    class FullFile(io.FileIO):
        def write(self, content):
            super().write(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_write, "open", FullFile, raising=False)
    with pytest.raises(InputError, match=r"out\.safetensors cannot be written: No space left on device"):
        files.write(path, WEIGHTS, {"a": "new"})
    assert files.read(path).metadata == {"a": "old"}
    assert list(tmp_path.iterdir()) == [path]


def test_written_arrays_and_metadata_come_back(tmp_path):
    arrays = WEIGHTS | {"scalar": np.float32(3).reshape(()), "transposed": WEIGHTS["stem.weight"].T}
    files.write(tmp_path / "out.safetensors", arrays, {"a": "b"})
    found = files.read(tmp_path / "out.safetensors")
    assert found.metadata == {"a": "b"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array, strict=True)


def harmful(marker):
    """Returns objects whose pickle, if run, creates the file `marker`, and the name that the error must contain."""
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    system = Global("os", "system")
    return {
        "os.system": (Call(system, (command,)), "os.system"),
        "posix.system": (Call(Global("posix", "system"), (command,)), "posix.system"),
        "builtins.exec": (Call(Global("builtins", "exec"), (code,)), "builtins.exec"),
        "__builtin__.eval": (Call(Global("__builtin__", "eval"), (code,)), "__builtin__.eval"),
        "subprocess": (Call(Global("subprocess", "getoutput"), (command,)), "subprocess.getoutput"),
        "as an argument": (Call(Global("torch._utils", "_rebuild_tensor_v2"), (system, 0, (), ())), "os.system"),
        "numpy's own loader": (Call(Global("numpy", "load"), (str(marker),)), "numpy.load"),
        "torch's loader": (Call(Global("torch", "load"), (str(marker),)), "torch.load"),
        "an attribute": (Call(Global("builtins", "getattr"), (system, "x")), "builtins.getattr"),
        "a dotted name": (Global("collections", "OrderedDict.fromkeys"), "collections.OrderedDict.fromkeys"),
    }


PICKLES = {
    "zip": foreign_files.write_zip,
    "legacy": foreign_files.write_legacy,
    "pkl": foreign_files.write_python2_pkl,
}


@pytest.mark.parametrize("container", PICKLES)
@pytest.mark.parametrize("attack", harmful(Path("marker")))
def test_no_code_of_a_pickle_is_run(attack, container, tmp_path):
    attacker, name = harmful(tmp_path / "marker")[attack]
    numbers = np.ones(2, np.float32)
    # In a .pkl the names of torch's files are unknown too.
    refused = rf"bad: refused, its weights use '({name}|torch\._utils\._rebuild_tensor_v2)'"
    for weights in (attacker, {"model": attacker}, {"model": {"a": attacker}}, {"a": numbers, "b": attacker}):
        PICKLES[container](tmp_path / "bad", weights)
        with pytest.raises(InputError, match=refused):
            files.read(tmp_path / "bad")
    PICKLES[container](tmp_path / "good", {"model": {"a": numbers}, "optimizer": attacker})
    assert files.read(tmp_path / "good").arrays["a"].tolist() == [1, 1]
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x05false\x85R.",  # STACK_GLOBAL
        b"\x80\x02(S'false'\niposix\nsystem\n.",  # INST
        b"\x80\x02cposix\nsystem\n)\x81.",  # NEWOBJ
        b"\x80\x02(cposix\nsystem\nS'false'\no.",  # OBJ
    ],
)
def test_no_instruction_reaches_another_name(code, tmp_path):
    (tmp_path / "bad.pkl").write_bytes(code)
    with pytest.raises(InputError, match=r"bad\.pkl: refused, its weights use 'posix\.system'"):
        files.read(tmp_path / "bad.pkl")


def test_names_that_the_program_has_registered_as_numbers_are_not_run(tmp_path):
    called = []
    code = 0xF1
    copyreg.add_extension(__name__, "witness", code)
    globals()["witness"] = called.append
    try:
        request = b"\x80\x02\x82" + bytes([code])
        pickle.loads(request + b".")  # from here on Python itself knows the number
        call = request[2:] + b"K\x01\x85R."
        (tmp_path / "bad.pkl").write_bytes(b"\x80\x02" + call)
        with pytest.raises(InputError, match="EXT1"):
            files.read(tmp_path / "bad.pkl")
        # A reader that obeys the frame can take the bytes for instructions.
        hidden = b"C" + bytes([len(call)]) + call
        for size in range(len(hidden) + 2):
            (tmp_path / "bad.pkl").write_bytes(b"\x80\x04\x95" + size.to_bytes(8, "little") + hidden + b".")
            with pytest.raises(InputError, match="contains no named tensors"):
                files.read(tmp_path / "bad.pkl")
    finally:
        copyreg.remove_extension(__name__, "witness", code)
        del globals()["witness"]
    assert called == []


@pytest.mark.parametrize("reader", [torch_files, numpy_pickle])
def test_a_pickle_cannot_change_our_functions(reader):
    """BUILD gives an object attributes; the next file would meet a changed function."""
    for name, function in reader.NAMES.items():
        module, _, last = name.rpartition(".")
        code = f"\x80\x02c{module}\n{last}\n}}U\x05extraK\x01sb.".encode("latin1")
        assert restricted_pickle.unpickle(io.BytesIO(code), reader.NAMES, where="x") is function
        assert not hasattr(function, "extra")


HUGE = 2**40


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (b"\x80\x02K\x01p" + b"9" * 30 + b"\n.", "memo entry"),
        (b"\x80\x02K\x01p-1\n.", "memo entry"),
        (b"\x80\x04\x8e" + HUGE.to_bytes(8, "little") + b"abc.", "expected"),
        (b"\x80\x05\x96" + HUGE.to_bytes(8, "little") + b"abc.", "expected"),
        (b"\x80\x02T\xff\xff\xff\x7fabc.", "expected"),
        (b"\x80\x02K\x01", "pickle exhausted"),
        (b"\x80\x02.", ""),
        (b"\x80\x02\x97.", "NEXT_BUFFER"),
        (b"\x80\x02(K\x01" + b"1" + b"1.", "IndexError"),
        (b"\x80\x02\x8b\x00\x02\x00\x00" + b"\x7f" * 512 + b".", "a number of 4095 bits"),
        (b"\x80\x09K\x01.", ""),
        (b"\x80\x02\xff.", ""),
    ],
)
def test_lengths_in_a_pickle_are_not_trusted(code, problem, tmp_path):
    (tmp_path / "bad.pkl").write_bytes(code)
    with pytest.raises(InputError, match=rf"bad\.pkl: the pickle is damaged.*{problem}"):
        files.read(tmp_path / "bad.pkl")


def tensor(offset, shape, strides, *, size=4, kind="FloatStorage"):
    """Returns a pickle of one tensor in a storage "0" that states `size` numbers."""

    class Announced(foreign_files.Pickler):
        def persistent_id(self, obj):
            return ("storage", Global("torch", kind), "0", "cpu", size) if obj is self else None

    file = io.BytesIO()
    pickler = Announced(file)
    pickler.dump({"a": Call(Global("torch._utils", "_rebuild_tensor_v2"), (pickler, offset, shape, strides))})
    return file.getvalue()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (dict(offset=0, shape=(5,), strides=(1,)), "do not fit"),
        (dict(offset=1, shape=(4,), strides=(1,)), "do not fit"),
        (dict(offset=0, shape=(2, 2), strides=(3, 1)), "do not fit"),
        (dict(offset=-1, shape=(2,), strides=(1,)), "a tensor must have"),
        (dict(offset=3, shape=(2,), strides=(-1,)), "a tensor must have"),
        (dict(offset=0, shape=(-1,), strides=(1,)), "a tensor must have"),
        (dict(offset=0, shape=(HUGE, HUGE), strides=(0, 0)), "do not fit"),
        (dict(offset=0, shape=(5,), strides=(0,)), "do not fit"),
        (dict(offset=0, shape=(5,), strides=(1,), size=5), "must have 5 numbers of float32, got 16 bytes"),
        (dict(offset=0, shape=(HUGE,), strides=(1,), size=HUGE), "must have .* numbers"),
        (dict(offset=0, shape=(4,), strides=(1,), size=4, kind="DoubleStorage"), "must have .* numbers"),
        (dict(offset=0, shape=(4,), strides=(1,), size=-4), "damaged"),
        (dict(offset=0, shape=(4,), strides=(1,), size="4"), "damaged"),
        (dict(offset="0", shape=(4,), strides=(1,)), "a tensor must have"),
        (dict(offset=0, shape=(True,), strides=(1,)), "a tensor must have"),
        (dict(offset=0, shape=(4,), strides=None), "a tensor must have"),
        (dict(offset=0, shape=(4,), strides=(1, 1)), "do not fit"),
        (dict(offset=0, shape=(1,) * 99, strides=(1,) * 99), "a tensor must have"),
        (dict(offset=0, shape=(0, 2**70), strides=(1, 1)), "a tensor must have"),
        (dict(offset=0, shape=(1,), strides=(2**70,)), "a tensor must have"),
        (dict(offset=0, shape=(4,), strides=(1,), kind="UntypedStorage"), "its weights use 'torch.UntypedStorage'"),
    ],
)
def test_tensors_beyond_their_numbers_are_errors(arguments, problem, tmp_path):
    content = {"archive/data.pkl": tensor(**arguments), "archive/data/0": np.zeros(4, np.float32).tobytes()}
    foreign_files.write_zip(tmp_path / "bad.pth", {}, extra=content.items())
    with pytest.raises(InputError, match=rf"bad\.pth: .*({problem})"):
        files.read(tmp_path / "bad.pth")


def test_numpy_arrays_beyond_their_bytes_are_errors(tmp_path):
    dtype = Call(Global("numpy", "dtype"), ("f4", False, True))
    reconstruct = Global("numpy.core.multiarray", "_reconstruct")
    for shape, kind, raw, problem in (
        ((HUGE,), dtype, b"1234", "shape .* has 4 bytes"),
        ((-1,), dtype, b"", "an array of shape"),
        ((1,), Call(Global("numpy", "dtype"), ("O8", False, True)), b"12345678", "dtype 'O8' are not supported"),
    ):
        state = (1, shape, kind, False, Call(Global("_codecs", "encode"), (raw.decode("latin1"), "latin1")))
        obj = {"a": Call(reconstruct, (Global("numpy", "ndarray"), (0,), "b"), state)}
        (tmp_path / "bad.pkl").write_bytes(foreign_files.pickled(obj))
        with pytest.raises(InputError, match=rf"bad\.pkl: the pickle is damaged.*{problem}"):
            files.read(tmp_path / "bad.pkl")


def test_small_hostile_files_cost_little_memory_and_time(tmp_path):
    paths = hostile_weights.write_all(tmp_path)
    ends = dict(
        zip((path.name for path in paths), budget.check("fasterrcnn_jax.weights.files:read", paths), strict=True)
    )
    assert [name for name, end in ends.items() if end == "returned"] == ["many views of one storage.pth"]
    assert all(end.startswith(str(tmp_path)) for end in ends.values() if end != "returned")
    assert "overlap the next entry" in ends["overlapping entries.pth"]
    assert "share numbers" in ends["many views of a whole storage.pth"]


def test_tied_tensors_share_the_numbers_of_one_storage(tmp_path):
    base = np.arange(6, dtype=np.float32)
    foreign_files.write_zip(tmp_path / "tied.pth", {"a": base, "b": base[2:]})
    found = files.read(tmp_path / "tied.pth").arrays
    assert np.shares_memory(found["a"], found["b"]) and found["b"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_cut_anywhere_is_one_clear_error(container, tmp_path):
    CONTAINERS[container](tmp_path / "whole", WEIGHTS)
    content = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    for end in sorted({*range(40), *range(0, len(content), 37), len(content) - 1}):
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match="cut: "):
            files.read(path)


def test_files_with_random_faults_are_read_or_one_clear_error(tmp_path):
    """A short version of `python tests/fuzz_weights.py --minutes 10`."""
    healthy = fuzz_weights.prepare(tmp_path)
    read = sum(fuzz_weights.attempt(tmp_path, seed, healthy) for seed in range(800))
    assert 10 < read < 700


def test_legacy_storages_larger_than_the_file_are_errors(tmp_path):
    foreign_files.write_legacy(tmp_path / "bad.pth", {"a": np.zeros(4, np.float32)})
    content = (tmp_path / "bad.pth").read_bytes()
    (tmp_path / "bad.pth").write_bytes(content[:-24] + HUGE.to_bytes(8, "little") + content[-16:])
    with pytest.raises(InputError, match=rf"bad\.pth: storage '0': the file ends before its {HUGE} numbers"):
        files.read(tmp_path / "bad.pth")
    (tmp_path / "bad.pth").write_bytes(content[:-24] + (3).to_bytes(8, "little") + content[-16:])
    with pytest.raises(InputError, match=r"bad\.pth: storage '0': must have 4 numbers of float32, got 12 bytes"):
        files.read(tmp_path / "bad.pth")


def test_zip_entries_with_false_sizes_are_errors(tmp_path):
    path, weights = tmp_path / "bad.pth", {"a": np.arange(4, dtype=np.float32)}
    foreign_files.write_zip(path, weights)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))  # in the directory
    for field in (20, 24):  # both of its sizes
        content[entry + field : entry + field + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(InputError, match="entry 'archive/data/0' states 2147483648 bytes"):
        files.read(path)

    foreign_files.write_zip(path, weights)
    content = path.read_bytes()
    path.write_bytes(content.replace(weights["a"].tobytes(), bytes(16), 1))
    with pytest.raises(InputError, match="entry 'archive/data/0' is damaged .*CRC"):
        files.read(path)

    foreign_files.write_zip(path, {"a": np.zeros(4096, np.float32)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"bad\.pth: entry .archive/data.* is compressed"):
        files.read(path)

    foreign_files.write_zip(path, weights)
    content = bytearray(path.read_bytes())
    content[entry + 10] = zipfile.ZIP_DEFLATED  # but not one byte shorter
    path.write_bytes(content)
    with pytest.raises(InputError, match="entry 'archive/data/0' is compressed"):
        files.read(path)


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"archive/data/0": None}, "entry 'archive/data/0' is missing"),
        ({"archive/byteorder": b"big"}, "entry 'archive/byteorder': only little-endian"),
        ({"archive/data.pkl": None}, "not a file of torch.save"),
        ({"other/data.pkl": b""}, "not a file of torch.save"),
    ],
)
def test_zips_that_torch_did_not_write_are_errors(extra, problem, tmp_path):
    foreign_files.write_zip(tmp_path / "bad.pth", {"a": np.zeros(4, np.float32)}, extra=extra.items())
    with pytest.raises(InputError, match=rf"bad\.pth: {problem}"):
        files.read(tmp_path / "bad.pth")


def test_other_content_is_named(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(InputError, match=r"weights\.pth: the file cannot be read"):
        files.read(path)
    for content in (b"", b"hello, this is no file of weights", b"\x89PNG\r\n\x1a\n" + bytes(20)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"weights\.pth: must be \.safetensors, a \.pth"):
            files.read(path)
    path.write_bytes(b"PK\x03\x04PK\x05\x06" + bytes(18))  # a fuzzer's finding
    with pytest.raises(InputError, match="must contain one data.pkl, got 0"):
        files.read(path)
    foreign_files.write_legacy(path, {"a": np.zeros(4, np.float32)}, little_endian=False)
    with pytest.raises(InputError, match="only little-endian"):
        files.read(path)
    for obj in ({}, [np.ones(2, np.float32)], {"epoch": 3}, 5):
        foreign_files.write_zip(path, obj)
        with pytest.raises(InputError, match="contains no named tensors"):
            files.read(path)
    foreign_files.write_zip(path, {3: np.ones(2, np.float32)})
    with pytest.raises(InputError, match="the name of a tensor must be text, got 3"):
        files.read(path)
    with pytest.raises(InputError, match=r"out\.safetensors: the name 'a\\udc80' cannot be written as UTF-8"):
        files.write(tmp_path / "out.safetensors", {"a\udc80": np.ones(2, np.float32)}, {})
