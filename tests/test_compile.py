"""Compiles every kernel at its intended sizes to the machine code of an H200, on any machine.

The tests run benchmarks/compile_for_gpu.py, which needs JAX's CUDA plugin and ptxas but no GPU: `pytest -m aot`, or
`pytest -m "aot and not slow"` without the whole programs.
The ceilings are slightly above the results at the time of writing; a result above its ceiling needs an explanation.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compile_for_gpu.py"
MB, GB = 1e6, 1e9

# Launches of our kernels, registers per thread of the largest kernel, workspace in MB. The workspace of a gradient
# includes what the forward pass stores for it. That of `nms classes 8 x 90` has the boxes twice, padded and as planes:
# padding the planes instead would take one more launch.
KERNELS = {
    "nms proposals 1": (3, 96, 21),
    "nms proposals 8": (3, 96, 164),
    "nms levels 8": (3, 96, 164),
    "nms classes 8": (1, 80, 33),
    "nms classes 8 x 90": (1, 80, 28),
    "roi_align fpn float32 forward": (1, 96, 2),
    "roi_align fpn float32 gradient": (1, 128, 92),
    "roi_align fpn bfloat16 forward": (1, 96, 2),
    "roi_align fpn bfloat16 gradient": (1, 128, 92),
    "roi_align c4 float32 forward": (1, 128, 10),
    "roi_align c4 float32 gradient": (1, 184, 10),
    "roi_align c4 bfloat16 forward": (1, 72, 10),
    "roi_align c4 bfloat16 gradient": (1, 184, 10),
    "roi_pool c4 float32 forward": (1, 64, 1),
    "roi_pool c4 float32 gradient": (2, 104, 412),
    "roi_pool c4 bfloat16 forward": (1, 64, 1),
    "roi_pool c4 bfloat16 gradient": (2, 104, 309),
    "roi_pool vgg16 float32 forward": (1, 64, 1),
    "roi_pool vgg16 float32 gradient": (2, 120, 412),
    "roi_pool vgg16 bfloat16 forward": (1, 64, 1),
    "roi_pool vgg16 bfloat16 gradient": (2, 120, 309),
}
# Launches of our kernels; ceilings of all launches (a sort has one for every pass) and of the peak memory in GB, which
# does not count what cuDNN allocates for itself.
PROGRAMS = {
    "detect small batch 2": (5, 150, 0.25),
    "detect small batch 2, bfloat16": (5, 160, 0.2),
    "train step small batch 2": (5, 530, 0.5),
    "detect resnet101-c4 batch 1": (7, 390, 0.4),
    "detect resnet101-c4 batch 1, bfloat16": (7, 390, 0.3),
    "detect resnet101-c4 batch 8": (3, 390, 1.45),
    "detect resnet101-c4 batch 8, bfloat16": (3, 395, 0.85),
    "train step resnet101-c4 batch 1": (5, 1345, 1.7),
    "train step resnet101-c4 batch 8": (5, 1360, 9.2),
    "train step resnet101-c4 batch 8, not donated": (5, 1760, 9.4),
    "train step resnet101-c4 batch 8, bfloat16": (5, 1360, 4.85),
    "train step resnet101-c4 batch 8, remat": (5, 1645, 6.65),
    "train step resnet101-c4 batch 8, 4 parts": (5, 1425, 3.4),
    "train step resnet101-c4 batch 8, bfloat16, remat, 4 parts": (5, 1710, 1.7),
    "detect resnet50-fpn batch 8": (5, 275, 2.2),
    "detect resnet50-fpn batch 8, bfloat16": (5, 285, 1.25),
    "train step resnet50-fpn batch 8": (5, 825, 8.9),
    "train step resnet50-fpn batch 8, not donated": (5, 1030, 9.1),
    "train step resnet50-fpn batch 8, bfloat16": (5, 835, 4.9),
    "train step resnet50-fpn batch 8, remat": (5, 955, 4.4),
    "train step resnet50-fpn batch 8, 4 parts": (5, 920, 3.7),
    "train step resnet50-fpn batch 8, bfloat16, remat, 4 parts": (5, 1080, 2.15),
}


# By version of JAX: bytes that all launches read and write, those of XLA's elementwise launches (MB), and launches.
TRAFFIC = {
    "detect small batch 2, bfloat16": {"0.11": (490, 50, 160), "0.12": (490, 50, 160)},
    "detect resnet50-fpn batch 8, bfloat16": {"0.11": (16_000, 1_500, 282), "0.12": (16_000, 1_500, 282)},
    "train step resnet50-fpn batch 8, bfloat16": {"0.11": (46_000, 13_800, 820), "0.12": (46_000, 13_800, 820)},
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compile_for_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(SCRIPT.parent)
        spec.loader.exec_module(module)
    return module


def compiled(script, out, *words):
    """Returns the script's rows with any of these words in their name, by name."""
    command = [sys.executable, str(SCRIPT), *words, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == script.UNAVAILABLE:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        pytest.fail(done.stderr, pytrace=False)
    return {row["name"]: row for row in json.loads(out.read_text())["programs"]}


@pytest.fixture(scope="module")
def kernels(script, tmp_path_factory):
    return compiled(script, tmp_path_factory.mktemp("compiled") / "kernels.json", "nms", "roi_align", "roi_pool")


@pytest.fixture(scope="module")
def programs(script, tmp_path_factory):
    return compiled(script, tmp_path_factory.mktemp("compiled") / "programs.json", "detect", "train step")


@pytest.mark.aot
def test_every_kernel_has_its_ceilings(kernels):
    assert set(kernels) == set(KERNELS)


@pytest.mark.aot
@pytest.mark.slow
def test_every_program_has_its_ceilings(programs):
    assert set(programs) == set(PROGRAMS)


@pytest.mark.aot
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_keep_to_their_registers_and_workspace(kernels, name):
    launches, registers, workspace = KERNELS[name]
    row = kernels[name]
    assert row["mosaic_launches"] == launches
    assert row["scatters"] == 0
    assert row["kernels"]
    for kernel in row["kernels"]:
        assert kernel["target"] == "sm_90a"
        assert kernel["spill"] == 0
    assert max(kernel["registers"] for kernel in row["kernels"]) <= registers
    assert row["workspace"] <= workspace * MB


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_whole_programs_hold_the_kernels_and_keep_to_their_launches_and_memory(programs, name):
    mosaic_launches, launches, peak = PROGRAMS[name]
    row = programs[name]
    assert row["mosaic_launches"] == mosaic_launches
    assert row["launches"] <= launches
    assert row["peak_memory"] <= peak * GB


@pytest.fixture(scope="module")
def small(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("compiled") / "small.json"
    return compiled(script, out, "detect small batch 2, bfloat16")


def check_traffic(script, name, row):
    version = ".".join(importlib.metadata.version("jax").split(".")[:2])
    # A version without numbers of its own must keep to those of the newest that has some.
    newest = max(TRAFFIC[name], key=lambda known: int(known.split(".")[1]))
    everything, elementwise, launches = TRAFFIC[name].get(version, TRAFFIC[name][newest])
    assert row["traffic"]["all"] <= everything * MB
    assert row["traffic"]["elementwise"] <= elementwise * MB
    assert row["launches"] <= launches
    assert not row["has_float64"] and not row["calls_host"]


@pytest.mark.aot
def test_a_small_detection_moves_no_more_bytes_than_it_must(script, small):
    (name,) = small
    check_traffic(script, name, small[name])


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRAFFIC if "small" not in name])
def test_a_whole_program_moves_no_more_bytes_than_it_must(script, programs, name):
    check_traffic(script, name, programs[name])


HLO = """
HloModule jit_f, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused_computation (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  ROOT %sine.1 = f32[8]{0} sine(%param_0)
}

%compare (a: f32[], b: f32[]) -> pred[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %value = f32[8]{0} get-tuple-element(%state), index=1
  %kernel = f32[8]{0} custom-call(%value), custom_call_target="mosaic_gpu_v2"
  ROOT %next = (s32[], f32[8]{0}) tuple(%number, %kernel)
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]{0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  ROOT %fusion.1 = pred[] fusion(%number), kind=kLoop, calls=%fused_computation
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %sort.1 = (f32[8]{0}, u8[4]{0}) custom-call(%x), custom_call_target="__cub$DeviceRadixSort"
  %sorted = f32[8]{0} get-tuple-element(%sort.1), index=0
  %sort.2 = f32[8]{0} sort(%sorted), dimensions={0}, to_apply=%compare
  %start = (s32[], f32[8]{0}) tuple(%zero, %sort.2)
  %while.1 = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %while.2 = (s32[], f32[8]{0}) while(%while.1), condition=%condition, body=%body
  ROOT %copy.1 = f32[8]{0} copy(%while.2)
}
"""


def test_launches_are_counted_inside_loops_and_not_inside_fusions(script):
    opcodes = sorted(line.split()[0] for line in script.launched(HLO))
    assert opcodes == ["copy", "custom-call", "custom-call", "fusion", "sort"]


@pytest.mark.parametrize(
    "length, types, passes",
    [
        (819, "pred f32 s32 s32", 1),
        (4096, "pred f32 s32 s32", 3),
        (4097, "pred f32 s32 s32", 6),
        (8192, "f32", 3),
        (12_000, "bf16", 6),
        (12_000, "f32 f32", 6),
        (12_000, "f32 f32 f32", 6),
        (12_000, "f32 f32 f32 f32", 10),
        (12_000, "f32 f32 f32 f32 f32 f32", 10),
        (12_000, "f32 f32 f32 f32 f32 f32 f32", 15),
        (201_600, "f32 s32", 28),
        (201_600, "pred f32 s32 s32", 36),
        (268_569, "pred f32 s32 s32", 45),
    ],
)
def test_a_sort_launches_a_kernel_for_every_pass(script, length, types, passes):
    """The numbers of kernels that the assembler compiled for such sorts with JAX 0.11.2."""
    shapes = [f"{dtype}[8,{length}]{{1,0}}" for dtype in types.split()]
    result = shapes[0] if len(shapes) == 1 else f"({', '.join(shapes)})"
    line = f"ROOT %sort.1 = {result} sort(%a, %b), dimensions={{1}}, to_apply=%compare"
    assert script.launches_of(f"sort {line}") == passes
    # As XLA writes some of them.
    fused = f"%fused (a: f32[8]) -> f32[8] {{\n  {line}\n}}\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n"
    fused += f"  ROOT %fusion = {result} fusion(%a), kind=kCustom, calls=%fused\n}}\n"
    assert [script.launches_of(each) for each in script.launched(fused)] == [passes]


def test_other_instructions_launch_one_kernel(script):
    assert [script.launches_of(line) for line in script.launched(HLO)] == [1] * 5
    large = HLO.replace("%sort.2 = f32[8]{0} sort", "%sort.2 = f32[12000]{0} sort")
    assert sum(map(script.launches_of, script.launched(large))) == 4 + 6


def test_every_launch_counts_the_bytes_of_its_operands_and_results(script):
    found = script.traffic(HLO)
    # The fusion reads s32[] and writes pred[]; the other four read and write f32[8]; one sort also writes u8[4], and
    # the copy also reads s32[].
    assert found == {"all": 5 + 4 * 64 + 8, "convolution": 0, "elementwise": 5, "other": 4 * 64 + 8}


def test_products_are_told_from_other_launches(script):
    hlo = """
ENTRY %main (x: f32[8]) -> bf16[2,4] {
  %x = bf16[2,4]{1,0} parameter(0)
  %conv = (bf16[2,4]{1,0}, u8[8]{0}) custom-call(%x), custom_call_target="__cudnn$convBiasActivationForward"
  %part = bf16[2,4]{1,0} get-tuple-element(%conv), index=0
  ROOT %gemm_fusion_dot = bf16[2,4]{1,0} fusion(%part), kind=kCustom, calls=%c, op_name="dot"
}
"""
    assert script.traffic(hlo) == {"all": 72, "convolution": 72, "elementwise": 0, "other": 0}


def test_a_fusion_that_reads_a_matrix_product_is_elementwise(script):
    hlo = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %gemm_fusion_dot.1 = f32[8]{0} parameter(0)
  ROOT %loop_add_fusion = f32[8]{0} fusion(%gemm_fusion_dot.1), kind=kLoop, calls=%c, op_name="add"
}
"""
    assert script.traffic(hlo) == {"all": 64, "convolution": 0, "elementwise": 64, "other": 0}


def test_a_scatter_moves_what_it_writes_and_not_the_whole_array(script):
    hlo = """
%fused_scatter (p: f32[1000], q: s32[2], r: f32[2]) -> f32[1000] {
  %p = f32[1000]{0} parameter(0)
  %q = s32[2]{0} parameter(1)
  %r = f32[2]{0} parameter(2)
  ROOT %scatter.1 = f32[1000]{0} scatter(%p, %q, %r), to_apply=%add
}

ENTRY %main (x: f32[1000], y: s32[2], z: f32[2]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  %y = s32[2]{0} parameter(1)
  %z = f32[2]{0} parameter(2)
  ROOT %input_scatter_fusion = f32[1000]{0} fusion(%x, %y, %z), kind=kInput, calls=%fused_scatter
}
"""
    assert script.traffic(hlo) == {"all": 48, "convolution": 0, "elementwise": 0, "other": 48}


def test_the_assemblers_report_is_read_and_removed(script, tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "1").write_text(
        """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    24 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 182 registers, used 2 barriers, 24 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compile time = 3.962 ms
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compile time = 1.0 ms
"""
    )
    one, two = script.read_kernels(tmp_path)
    assert one == ("one", "sm_90a", 182, 12, 24, 4096)
    assert two == ("two", "sm_90a", 10, 0, 0, 0)
    assert script.read_kernels(tmp_path) == []


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ({"jax": "0.10.2"}, "JAX 0.10.2 is older than 0.11"),
        ({"jax": "0.11.2"}, "jax-cuda13-plugin is not installed"),
        ({"jax": "0.11.2", "jax-cuda13-plugin": "0.11.2"}, "jax-cuda13-pjrt is not installed"),
        (
            {"jax": "0.12.0.1", "jax-cuda13-plugin": "0.11.2", "jax-cuda13-pjrt": "0.12.0.1"},
            "jax-cuda13-plugin 0.11.2 does not fit JAX 0.12.0.1",
        ),
        (
            {"jax": "0.12.0.1", "jax-cuda13-plugin": "0.12.0.1", "jax-cuda13-pjrt": "0.12.0.1"},
            "no CUDA toolkit with ptxas and libdevice was found",
        ),
    ],
)
def test_a_machine_that_cannot_compile_is_told_what_is_missing(script, installed, reason, monkeypatch, capsys):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(script, "toolkit", lambda: None)
    monkeypatch.setattr(sys, "argv", ["compile_for_gpu.py"])
    with pytest.raises(SystemExit) as exit_:
        script.main()
    assert exit_.value.code == script.UNAVAILABLE
    assert reason in capsys.readouterr().err
