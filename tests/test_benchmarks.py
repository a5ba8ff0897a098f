"""The benchmarks on any device, at tiny sizes, as if torchvision were not installed: the times mean nothing."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import numpy as np
import pytest
import tiny

from fasterrcnn_jax.data.records import ImageDetections

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    # Imported for a test, `measure` sets it for its own process.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def benchmark(script, *arguments, folder):
    """Runs a benchmark in which torch cannot be imported; returns the process and the report."""
    planted = folder / "planted"
    planted.mkdir(exist_ok=True)
    (planted / "torch.py").write_text("raise ImportError('planted')\n")
    # One device and fast compilation; a process takes a repeated program from its cache.
    env = os.environ | {
        "PYTHONPATH": str(planted),
        "XLA_FLAGS": "",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    }
    command = [sys.executable, BENCHMARKS / script, "--out", folder / "report.json", *arguments]
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True)
    return done, json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_every_operation_is_timed_without_torchvision_and_the_report_says_so(tmp_path):
    done, report = benchmark("kernels.py", "--tiny", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["torchvision"] == "absent: ImportError: planted"
    assert report["ceilings"]["bytes_per_second"] > 0
    assert report["float32_products"]["jax"]
    assert len(report["cases"]) == 25
    goals = {name: case["goal"] for name, case in report["cases"].items()}
    assert goals["nms 12000 to 2000, batch 1"] == 3 and goals["nms 12000 to 2000, batch 8"] == 8
    assert goals["nms per class, 8 x 90 x 1000"] == 10 and goals["rpn, 5 levels, batch 8, detection"] == 5
    for maps in ("8 x 512, C=256, pyramid", "8 x 128, C=1024, 14x14"):
        assert goals[f"roi_align {maps}, bfloat16, forward"] == 2
        assert goals[f"roi_align {maps}, bfloat16, backward"] == 4
    for name, case in report["cases"].items():
        assert case["failed"] == {}, name
        assert case["times_ms"]["xla"]["ms"] > 0 and case["floor_ms"] > 0
        assert case["times_as_fast"] is None and case["agrees"] is None
        if "mosaic" not in case["times_ms"] and name.startswith(("nms", "rpn", "roi")):
            assert "Mosaic kernel" in case["unavailable"]["mosaic"], name


@pytest.mark.slow
def test_detection_and_training_of_a_whole_model_are_timed(tmp_path):
    done, report = benchmark("end_to_end.py", "--tiny", "--only", "c4", "bfloat16", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name.split()[-1] for name in report["cases"]] == ["detection", "training"]
    for name, case in report["cases"].items():
        side = case["sides"]["ours, plain JAX"]
        assert side["images_per_second"] > 0 and side["compile_seconds"] > 0 and side["finite"], name
        assert (side["first_loss"] is not None) == name.endswith("training")
        assert (side["kernels_compiled"] or 0) > 10 or name.endswith("training")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("finetune", "training"), ("finetune", "predict"), ("resnet50_fpn",), ("roi_align", "512")]
)
def test_a_cpu_is_measured_with_its_load(tmp_path, words):
    done, report = benchmark("end_to_end.py", "--cpu", "--tiny", "--only", *words, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["torchvision"] == "absent: ImportError: planted" and report["cores"] >= 1
    assert report["cases"]
    for name, case in report["cases"].items():
        assert case["times_ms"]["ours"]["fastest_ms"] <= case["times_ms"]["ours"]["ms"], name
        assert case["times_as_fast"] is None and len(case["load"]) == 2


def test_the_cases_of_a_cpu_have_the_goals_of_the_comparison_with_torchvision(importable):
    import on_cpu

    goals = {name: goal for name, (goal, _) in on_cpu.cases(tiny=False).items()}
    assert goals["resnet50_fpn 600x800 batch 1 float32 detection"] == pytest.approx(1 / 0.6)
    assert goals["resnet50_fpn 600x800 batch 1 float32 training"] == pytest.approx(1 / 0.9)
    assert goals["finetune 240x320 batch 4 float32 training"] == goals["finetune 480x640 pixels, predict"] == 1.2
    assert len(goals) == 13


def test_a_case_of_a_cpu_has_the_ratio_of_each_round_and_fails_where_results_differ(importable, monkeypatch, tmp_path):
    import measure
    import on_cpu

    rounds = iter([(10.0, 20.0), (20.0, 30.0), (10.0, 50.0)])

    def interleaved(sides, effort, turn):
        assert effort.rounds == 1 and list(sides) == ["torchvision", "ours"]
        ours, theirs = next(rounds)
        return {"ours": measure.Times(ours, 0, 0, 0), "torchvision": measure.Times(theirs, 0, 0, 0)}, {}

    monkeypatch.setattr(measure, "interleaved", interleaved)
    monkeypatch.setattr(measure, "environment", dict)
    sides = {"torchvision": None, "ours": None}
    listed = {"one": (2.0, lambda wanted: (sides, 0.5, 0.1)), "other": (None, lambda wanted: 1 / 0)}
    monkeypatch.setattr(on_cpu, "cases", lambda tiny: listed)
    assert on_cpu.main(["--rounds", "3", "--out", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())["cases"]
    assert report["one"]["times_as_fast"] == 2.0 and report["one"]["times_as_fast_from_to"] == [1.5, 5.0]
    assert report["one"]["times_ms"]["ours"]["ms"] == 10.0 and report["one"]["agrees"] is False
    assert report["other"] == {"error": "ZeroDivisionError: division by zero"}
    assert report["one"]["peak_memory_mb"] is None  # the peak of a process that ran both sides belongs to neither


def test_one_side_alone_reports_the_memory_of_its_process(importable, monkeypatch, tmp_path, capsys):
    import measure
    import on_cpu

    def build(wanted):
        assert list(wanted) == ["ours"]
        return {"ours": measure.Side([lambda: None], lambda _: None)}

    monkeypatch.setattr(measure, "environment", dict)
    monkeypatch.setattr(on_cpu, "cases", lambda tiny: {"one": (None, build)})
    assert on_cpu.main(["--rounds", "1", "--alone", "ours", "--out", str(tmp_path / "report.json")]) == 0
    (case,) = json.loads((tmp_path / "report.json").read_text())["cases"].values()
    assert 50 < case["peak_memory_mb"] < 100_000
    assert f"the process held at most {case['peak_memory_mb']:,.0f} MB" in capsys.readouterr().out


def test_boxes_on_objects_are_suppressed_and_even_boxes_survive(importable):
    import operations

    from fasterrcnn_jax.ops.suppression import nms

    scores = np.random.default_rng(1).random(12_000, np.float32)
    kept = []
    for draw in (operations.boxes_on_objects, operations.even_boxes):
        boxes = draw(np.random.default_rng(0), 1, 12_000, (600, 1000))[0]
        kept.append(int(nms(boxes, scores, iou_threshold=0.7, max_output=2000).valid.sum()))
    assert 1200 < kept[0] < 1800 and kept[1] == 2000


def test_cases_with_goals_come_first_and_the_first_cases_cover_every_kind(importable):
    import end_to_end

    listed = list(end_to_end.cases(tiny=False).values())
    assert [str(case) for case in listed[:2]] == [
        f"resnet50_fpn 800x1333 batch 8 bfloat16 {task}" for task in ("detection", "training")
    ]
    for is_tiny in (False, True):
        assert [*end_to_end.goals(tiny=is_tiny).values()][:2] == [2.5, 2.0]
        assert sum(goal is not None for goal in end_to_end.goals(tiny=is_tiny).values()) == 2
    assert len(listed) == 32
    assert {(case.family, case.dtype, case.batch) for case in listed[:12]} >= {
        ("resnet101_c4", "bfloat16", 8), ("resnet50_fpn", "float32", 8), ("resnet50_fpn", "bfloat16", 1)
    }  # fmt: skip


def test_the_commands_of_the_goals_choose_cases(importable):
    import end_to_end
    import operations

    names = [*operations.operations(tiny=False), *end_to_end.cases(tiny=False)]
    rows = [row.split(" | ") for row in (BENCHMARKS / "gpu_queue.md").read_text().splitlines()]
    commands = [shlex.split(row[2].strip("`")) for row in rows if row[-1] == "not timed |"]
    assert len(commands) == 10
    for words in commands:
        assert any(all(word in name for word in words) for name in names), words


CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import dataclasses
from pathlib import Path
import tiny
config = tiny.config(Path({folder!r}))
config = dataclasses.replace(config, train=dataclasses.replace(config.train, optimizer="adamw"))
"""


@pytest.mark.slow
def test_training_for_some_seconds_gives_a_curve(tmp_path):
    tiny.write_voc(tmp_path / "voc", train=6, test=4, image_hw=((48, 72),))
    (tmp_path / "config.py").write_text(CONFIG.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    arguments = ("--data", tmp_path / "voc", "--config", tmp_path / "config.py", "--minutes", 0.02)
    done, report = benchmark("train_minutes.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["sides"]["torchvision"]["unavailable"] == "ImportError: planted"
    ours = report["sides"]["ours"]
    assert 1 <= len(ours["curve"]) <= 4 and ours["curve"][-1]["loss"] > 0
    assert 0 <= ours["AP50"] <= 1 and ours["steps"] <= ours["planned_steps"]


def test_the_clock_of_training_stops_for_compilation_and_evaluation(tmp_path, importable):
    import train_minutes

    tiny.write_voc(tmp_path / "voc", train=9, test=3)
    made, stepped = [], []

    def make(config):
        shapes = set()
        made.append(config.train)
        stepped.append(0)

        def step(batch):
            # The first step compiles; later steps are slower than the trial promised.
            time.sleep(0.01 * len(made) ** 2 if batch.images.shape in shapes else 0.5)
            shapes.add(batch.images.shape)
            stepped[-1] += 1
            return lambda: 1.5

        def detect(dataset):
            time.sleep(0.2)
            nothing = ImageDetections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
            return [nothing] * len(dataset.records)

        return train_minutes.Trainer(step, detect)

    turns, kept = [], []
    config = tiny.config(tmp_path, warmup_steps=3, steps=1000, batch_size=2)
    result = train_minutes.train_for(make, config, seconds=0.4, turn=lambda: turns.append(1), keep=kept.append)
    # The trial steps are discarded, and the schedule has the number of steps that fit.
    assert len(made) == 2 and stepped[0] == 11
    assert made[1].steps == result["planned_steps"] and made[1].warmup_steps == min(3, made[1].steps // 10)
    assert 4 <= stepped[1] == result["steps"] < result["planned_steps"] <= 40
    assert result["seconds"] < 0.6 and 1.0 <= result["compile_seconds"] < 1.5
    # The time ended before the last quarter.
    assert 2 <= len(result["curve"]) <= 3 and {point["loss"] for point in result["curve"]} == {1.5}
    assert result["curve"][-1]["steps"] == result["steps"]
    assert result["AP50"] == 0.0 and len(turns) == 1 + len(result["curve"])
    assert kept[-1] == result and len(kept) == len(result["curve"])


# Child processes with cases that fail in different ways.

CHILD = """
import argparse, os, pathlib, sys, time
sys.path.insert(0, {benchmarks!r})
from isolated import DeviceLost, run_child

parser = argparse.ArgumentParser()
parser.add_argument("--child", type=pathlib.Path)
parser.add_argument("--cases", nargs="*")
parser.add_argument("--without", nargs="*")
arguments = parser.parse_args()

def run_case(case, without, turn, keep):
    if case == "before any side":
        os._exit(5)
    if case == "its own error":
        raise ValueError("no such thing\\nsecond line")
    sides = {{}}
    for side in ("first", "second", "third"):
        if side in without:
            continue
        turn(side)
        if side == "second" and case == "crash":
            os._exit(7)
        if side == "second" and case == "hang":
            time.sleep(60)
        if side == "second" and case == "lost":
            raise DeviceLost("illegal address")
        sides[side] = os.getpid()
        if case == "at the end with figures":
            keep({{"sides": sides}})
    if case.startswith("at the end"):
        time.sleep(60)
    return {{"sides": sides}}

def environment():
    if "unusable" in arguments.cases:
        raise RuntimeError("no device")
    return {{"device": "here"}}

run_child(arguments.child, arguments.cases, arguments.without, environment, run_case)
"""


@pytest.fixture
def isolated(tmp_path, importable):
    from isolated import run_isolated

    script = tmp_path / "child.py"
    script.write_text(textwrap.dedent(CHILD).format(benchmarks=str(BENCHMARKS)))

    def run(*cases, seconds=30.0, silence=10.0, each_alone=False):
        results = {}

        def done(case, result, environment):
            results[case] = result | {"environment": environment}

        command, journal = [sys.executable, str(script)], tmp_path / "journal"
        options = dict(seconds=seconds, silence=silence, each_alone=each_alone, done=done, kept=done)
        run_isolated(command, list(cases), journal, **options)
        return results

    return run


@pytest.mark.parametrize(
    ("case", "reason"),
    [("crash", "the process ended with status 7"), ("hang", "silent for 1 s"), ("lost", "illegal address")],
)
def test_a_side_that_ends_the_process_loses_only_its_own_result(isolated, case, reason):
    results = isolated("good", case, "later", silence=1.0)
    assert results[case]["failed"] == {"second": reason}
    assert list(results[case]["sides"]) == ["first", "third"]
    for other in ("good", "later"):
        assert list(results[other]["sides"]) == ["first", "second", "third"]
        assert results[other]["failed"] == {} and results[other]["environment"] == {"device": "here"}


def test_a_case_that_fails_outside_any_side_is_given_up(isolated):
    results = isolated("its own error", "before any side", "good")
    assert results["its own error"]["error"] == "ValueError: no such thing"
    assert results["before any side"]["error"] == "the process ended with status 5"
    assert results["good"]["failed"] == {}


def test_a_child_that_cannot_start_ends_the_run(isolated):
    results = isolated("unusable", "good")
    assert "status 1" in results["unusable"]["error"]
    assert list(results["good"]["sides"]) == ["first", "second", "third"]


def test_cases_that_are_not_reached_in_time_are_named(isolated):
    results = isolated("good", "at the end", "later", seconds=1.5)
    assert "error" not in results["good"]
    assert results["at the end"]["error"] == results["later"]["error"] == "no time left"
    assert results["at the end"]["at"] == "third" and results["at the end"]["failed"] == {}


def test_a_case_that_is_cut_keeps_its_figures_and_is_a_fault(tmp_path, importable, monkeypatch):
    """The time ends when the case has figures of all sides, however long the machine takes to start a process."""
    import isolated
    import suite

    script, results, passed = tmp_path / "child.py", {}, [0.0]
    script.write_text(textwrap.dedent(CHILD).format(benchmarks=str(BENCHMARKS)))

    def kept(case, result, environment):
        results[case] = result
        passed[0] = 1e6 if "third" in result["sides"] else 0.0

    def done(case, result, environment):
        results[case] = result

    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0], sleep=time.sleep)
    monkeypatch.setattr(isolated, "time", clock)
    options = dict(seconds=3600.0, silence=3600.0, each_alone=False, done=done, kept=kept)
    cases = ["at the end with figures", "later"]
    isolated.run_isolated([sys.executable, str(script)], cases, tmp_path / "journal", **options)
    cut = results["at the end with figures"]
    assert list(cut["sides"]) == ["first", "second", "third"] and "error" not in cut
    assert cut["cut"] == "no time left" and cut["at"] == "third"
    assert suite.faults_of(results) == dict.fromkeys(cases, "no time left")


def test_cases_share_a_process_unless_each_has_its_own(isolated):
    for each_alone, processes in ((False, 1), (True, 2)):
        results = isolated("good", "later", each_alone=each_alone)
        assert len({pid for result in results.values() for pid in result["sides"].values()}) == processes


# Measuring.


def test_sides_take_turns_and_one_that_fails_does_not_stop_the_others(importable):
    import measure

    called = []

    def calls(name, error_at=None):
        def call():
            called.append(name)
            if called.count(name) == error_at:
                raise MemoryError("too large\nmore")
            return name

        return call

    sides = {
        "a": measure.Side([calls("a")] * 2, lambda result: None),
        "b": measure.Side([calls("b", error_at=6)] * 2, lambda result: None),
        "c": measure.Side([calls("c")] * 2, lambda result: None),
    }
    turns, kept = [], []
    effort = measure.Effort(rounds=2, seconds=0.0, calls=4)
    times, failed = measure.interleaved(sides, effort, turns.append, kept.append)
    assert turns == ["a", "b", "c", "a", "b", "c", "a", "c"]
    assert failed == {"b": "MemoryError: too large"}
    assert list(times) == ["a", "c"]
    assert [list(each) for each in kept] == [["a", "c"]] * 2 and kept[-1] == times, "times after every round"
    # Two to warm up, a run of two; in each round a run of two and one alone.
    assert called.count("a") == 4 + 2 * 3


def test_times_are_medians_of_one_call(importable, monkeypatch):
    import measure

    # Runs of 4 calls that last 8, 40 and 12 ms; alone 3 ms each.
    lengths = iter([0.0, *[0.008, 0.003, 0.040, 0.003, 0.012, 0.003]])
    monkeypatch.setattr(measure, "_run", lambda side, count: next(lengths))
    side = measure.Side([lambda: None], lambda result: None)
    times, _ = measure.interleaved({"a": side}, measure.Effort(rounds=3, seconds=1.0, calls=4), lambda name: None)
    assert times["a"] == pytest.approx((3.0, 2.0, 10.0, 3.0))


def test_a_floor_is_the_longer_of_memory_time_and_compute_time(importable):
    import measure

    ceilings = measure.Ceilings(bytes_per_second=1e9, flops_per_second=1e10)
    assert ceilings.floor_ms(5e6, 1e7) == 5.0
    assert ceilings.floor_ms(5e6, 1e9) == 100.0


HLO = """HloModule jit_f, is_scheduled=true

%fused_computation (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} add(%p, %p)
  ROOT %m = f32[8]{0} multiply(%a, %p)
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8]{0} get-tuple-element(%carry), index=1
  %inner = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_computation
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %inner)
}

%less (a: f32[], b: f32[]) -> pred[] {
  %a.1 = f32[] parameter(0)
  %b.1 = f32[] parameter(1)
  ROOT %c = pred[] compare(%a.1, %b.1), direction=LT
}

%cond (carry: (s32[], f32[8])) -> pred[] {
  %carry.1 = (s32[], f32[8]{0}) parameter(0)
  ROOT %never = pred[] constant(false)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %s = f32[8]{0} sort(%x.1), dimensions={0}, to_apply=%less
  %z = s32[] constant(0)
  %t.1 = (s32[], f32[8]{0}) tuple(%z, %s)
  %w = (s32[], f32[8]{0}) while(%t.1), condition=%cond, body=%body
  %g = f32[8]{0} get-tuple-element(%w), index=1
  ROOT %cc = f32[8]{0} custom-call(%g), custom_call_target="mosaic_gpu_v2"
}
"""


def test_kernels_of_a_program_are_those_outside_of_fusions(importable):
    import measure

    assert measure.compiled_kernels(HLO) == 3  # the fusion in the loop, the sort, the custom call
    assert measure.compiled_kernels(HLO.replace("%s = f32[8]{0} sort", "%s = f32[12000]{0} sort")) == 2 + 6


# Comparison with torchvision, whose results are given by hand.


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Tensor(np.ndarray):
    """The parts of a torch tensor that the comparisons use."""

    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)

    def detach(self):
        return self

    def contiguous(self):
        return np.asarray(self)


def test_a_result_unlike_torchvisions_is_reported_and_fails(importable, monkeypatch):
    import suite

    kernels = load("kernels")
    measured = []
    for shift in (0.0, 0.1):
        operation = kernels.operations(tiny=True)["top-k 201600 to 2000, batch 8"]()

        def theirs(torch, torchvision, shift=shift, ours=operation.ours("xla")):
            return {"torchvision eager, float32": lambda scores: lambda: [
                (np.asarray(ours(scores)()[0]) + np.float32(shift)).view(Tensor)
            ]}  # fmt: skip

        planted = {"case": lambda operation=operation, theirs=theirs: operation._replace(theirs=theirs)}
        monkeypatch.setattr(kernels, "operations", lambda tiny, planted=planted: planted)
        torch = types.SimpleNamespace(compiler=types.SimpleNamespace(reset=lambda: None))
        monkeypatch.setattr(kernels.measure, "peer", lambda torch=torch: (torch, "torchvision"))
        monkeypatch.setattr(kernels.measure, "torch_wait", lambda result=None: None)
        kept = []
        result = kernels.measure_case("case", set(), lambda side: None, kept.append, tiny=True, compiled=False)
        measured.append(result)
        # After each side, and after each round of both.
        assert [list(figures["times_ms"]) for figures in kept] == [["xla"]] + [
            ["xla", "torchvision eager, float32"]
        ] * 4
        monkeypatch.undo()
    right, wrong = measured
    assert right["agrees"] and right["times_as_fast"] > 0 and suite._fault(right) is None
    assert not wrong["agrees"] and "differs from torchvision" in suite._fault(wrong)
    assert wrong["differences"]["xla"] > 0.01


def test_faults_are_those_of_our_sides_and_a_lack_of_time(importable):
    import suite

    assert suite._fault({"failed": {"torchvision compiled": "out of memory"}}) is None
    assert suite._fault({"failed": {}, "error": "no time left"}) == "no time left"
    assert suite._fault({"failed": {}, "cut": "no time left", "agrees": True}) == "no time left"
    assert suite._fault({"failed": {"mosaic": "illegal address"}}) == "{'mosaic': 'illegal address'}"
    assert suite._fault({"failed": {}, "error": "status 7"}) == "status 7"


def test_kept_boxes_are_compared_as_sets(importable):
    import operations

    valid = np.array([[True, True, True, False]])
    kept = np.array([[4, 2, 9, 0]])
    assert operations.kept_differently((kept, valid), [np.array([9, 4, 2]).view(Tensor)]) == 0.0
    assert operations.kept_differently((kept, valid), [np.array([9, 4, 3]).view(Tensor)]) == 0.5


def test_the_throughput_of_the_loader_is_measured_without_torchvision(tmp_path):
    tiny.write_voc(tmp_path / "voc", train=4, test=1)
    arguments = ("--data", tmp_path / "voc", "--batch_size", 2, "--steps", 2, "--rounds", 1)
    done, report = benchmark("throughput.py", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["torchvision"] == "absent: ImportError: planted" and report["difference"] is None
    assert report["images"] == 4 and len(report["load_before"]) == 3
    goals = {"ours, float32": 1, "ours, uint8": 1.5, "ours, float32, fast": 3, "ours, uint8, fast": 3}
    assert {name: side["goal"] for name, side in report["sides"].items()} == goals
    for side in report["sides"].values():
        assert side["images_per_second"] > 0 and side["images_per_core_second"] > 0 and "times_as_fast" not in side


@pytest.mark.slow
def test_the_stages_of_a_training_step_are_timed(tmp_path):
    words = ("resnet50_fpn", "float32", "training")
    done, report = benchmark("stages.py", "--tiny", "--calls", 1, "--only", *words, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (times,) = report["milliseconds"].values()
    stages = {name.rpartition(" ")[0] for name in times}
    # A scope that the library no longer has would be time of another stage.
    assert {"backbone", "fpn", "rpn_head", "rpn_losses", "roi_features", "box_head", "optimizer", "nms"} <= stages
    assert times["backbone forward"] > 0 and times["backbone backward"] > 0 and "rpn_head backward" not in times
    known = sum(time for name, time in times.items() if not name.startswith("other"))
    # XLA gives some of its products no name: a fifth of this small step.
    assert known > 0.6 * sum(times.values())


def test_an_operation_belongs_to_the_inner_scope_and_loops_are_left_out(importable):
    import stages

    assert stages.stage_of("jit(step)/jvp(backbone)/conv") == ("backbone", "forward")
    assert stages.stage_of("jit(step)/transpose(jvp(fpn))/add") == ("fpn", "backward")
    assert stages.stage_of("jit(detect)/vmap(proposals)/nms/sort") == ("nms", "forward")
    assert stages.stage_of("jit(step)/nmse/add") == ("other", "forward")
    program = """
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%c, metadata={op_name="jit(f)/fpn/add"}
  %while.2 = (s32[], f32[8]{0}) while(%t), body=%b, metadata={op_name="jit(f)/nms/while"}
"""
    names = stages.names_of(program)
    assert names == {"fusion.1": "jit(f)/fpn/add"}
    events = [
        {"ph": "X", "dur": 3000, "args": {"hlo_op": "fusion.1"}},
        {"ph": "X", "dur": 9000, "args": {"hlo_op": "while.2"}},
        {"ph": "M", "args": {}},
    ]
    assert stages.milliseconds(events, names, calls=2) == {("fpn", "forward"): 1.5}
    assert stages.rows_of({("fpn", "forward"): 1.0, ("nms", "forward"): 3.0}) == [
        ("nms", "3.0", "0.0", "75.0 %"),
        ("fpn", "1.0", "0.0", "25.0 %"),
        ("all", "4.0", "0.0", "100 %"),
    ]


@pytest.mark.slow
def test_growth_is_measured_for_each_quantity(tmp_path):
    done, report = benchmark("growth.py", "--tiny", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {(row["program"], row["grows"]): row for row in report["growth"]}
    area = "area of the image, by its side"
    programs = {(program, grows) for program in ("detection", "training step") for grows in (area, "classes")}
    assert set(rows) == programs | {("check", "boxes")}
    for row in rows.values():
        assert all(point["seconds"] > 0 and point["bytes"] > 0 for point in row["points"])
        assert np.isfinite([row["exponent_of_time"], row["exponent_of_memory"]]).all()
    # Twice the area is at least 1.3 times the memory.
    assert rows["training step", area]["exponent_of_memory"] > 0.4


def test_the_exponent_is_the_slope_over_the_last_points(importable):
    import growth

    assert growth.exponent([1, 2, 4, 8], [7, 5, 20, 80]) == pytest.approx(2.0)


def test_throughput_is_compared_round_by_round_in_seconds_of_the_core(importable):
    import throughput

    seconds = {
        throughput.BYTES: [(1.0, 0.5), (9.0, 1.0), (2.0, 0.8)],
        throughput.THEIRS: [(1.0, 1.0), (9.0, 3.0), (1.0, 0.8)],
    }
    report = throughput.summary(seconds, 60)
    ours = report[throughput.BYTES]
    assert ours["times_as_fast"] == 2 and "times_as_fast" not in report[throughput.THEIRS]
    assert ours["images_per_second"] == 30 and ours["images_per_core_second"] == 75
    assert ours["cores_for_one_h200"] == pytest.approx(throughput.ASSUMED_H200 / 75)
