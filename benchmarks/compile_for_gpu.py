"""Compiles the kernels and whole programs for an H200 on a machine without a GPU, and prints what the compiler reports.

    python benchmarks/compile_for_gpu.py [--out FILE.json] [WORD ...]

Each WORD selects the rows whose names contain it. For every kernel at every production size, called through the
library's functions, the table has: registers, spilled bytes, stack and shared memory as the assembler reports them,
the workspace bytes that XLA adds, and the number of launches in the optimised program: a sort is one kernel per pass,
and what is inside of a loop counts once. It cannot tell the time, or
whether the results are right on hardware.

Needs JAX 0.11 or newer, its CUDA plugin (`jax-cuda13-plugin`, `jax-cuda13-pjrt`, of JAX's version, installed without
their dependencies) and `ptxas` with libdevice (`nvidia-cuda-nvcc`, `nvidia-nvvm`, or a CUDA 13 toolkit). If one is
missing, it says which one and exits with status 77.
"""

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from launch_counts import launched, launches_of, traffic

# A checkout need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Exit status that test harnesses read as "skipped".
UNAVAILABLE = 77
PLUGIN = ("jax-cuda13-plugin", "jax-cuda13-pjrt")

# From the data sheet.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 62914560
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""


class Kernel(NamedTuple):
    """One entry function, as `ptxas -v` describes it; sizes in bytes, shared memory without what a launch adds."""

    name: str
    target: str
    registers: int
    spill: int
    stack: int
    smem: int


class Row(NamedTuple):
    """One program; sizes in bytes."""

    name: str
    kernels: list[Kernel]  # of Mosaic; one that an earlier row has compiled is not compiled again
    mosaic_launches: int  # in the optimised program, those inside of loops counted once; a sort has several
    launches: int  # the same, with XLA's own kernels, copies and library calls
    scatters: int
    workspace: int
    peak_memory: int
    traffic: dict[str, int]  # bytes read and written, by kind of launch
    has_float64: bool
    calls_host: bool
    seconds: float  # of compilation


def toolkit() -> Path | None:
    """Returns the CUDA toolkit to compile with: from the wheels, from $CUDA_HOME, or from the `ptxas` in PATH."""
    candidates = [Path(entry) / "nvidia" / "cu13" for entry in sys.path]
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home))
    if found := shutil.which("ptxas"):
        candidates.append(Path(found).resolve().parents[1])
    candidates.append(Path("/usr/local/cuda"))
    needed = ("bin/ptxas", "nvvm/libdevice/libdevice.10.bc")
    return next((path for path in candidates if all((path / name).exists() for name in needed)), None)


def unavailable() -> str | None:
    """Returns a sentence about what is missing to compile for a GPU, or None if nothing is missing."""
    jax_version = importlib.metadata.version("jax")
    if tuple(map(int, jax_version.split(".")[:2])) < (0, 11):
        return f"JAX {jax_version} is older than 0.11, the first with these kernels"
    for name in PLUGIN:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"{name} is not installed"
        if version != jax_version:
            return f"{name} {version} does not fit JAX {jax_version}"
    return None if toolkit() else "no CUDA toolkit with ptxas and libdevice was found"


def listen_to_ptxas(folder: Path, cuda: Path) -> None:
    """Makes JAX compile with `cuda` as seen through `folder`, where ptxas leaves its reports in `log`."""
    (folder / "bin").mkdir()
    (folder / "log").mkdir()
    (folder / "nvvm").symlink_to(cuda / "nvvm")
    for name in ("nvlink", "fatbinary", "nvdisasm"):
        if (cuda / "bin" / name).exists():
            (folder / "bin" / name).symlink_to(cuda / "bin" / name)
    ptxas = folder / "bin" / "ptxas"
    ptxas.write_text(
        f"""#!/bin/sh
log="{folder}/log/$$"
"{cuda}/bin/ptxas" -v "$@" 2>"$log"
status=$?
cat "$log" >&2
exit $status
"""
    )
    ptxas.chmod(0o755)
    # Mosaic searches the path, XLA the folder that JAX reads from CUDA_ROOT.
    os.environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    os.environ["CUDA_ROOT"] = str(folder)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    flags = (
        "--xla_gpu_enable_libnvptxcompiler=false",  # compilers inside of the plugin report nothing
        "--xla_gpu_enable_libnvjitlink=false",
        "--xla_gpu_autotune_level=0",  # there is nothing to measure on
    )
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()


def read_kernels(folder: Path) -> list[Kernel]:
    """Returns the entry functions compiled since the last call."""
    kernels = []
    for log in sorted((folder / "log").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        entry = r"Compiling entry function '(\w+)' for '(\w+)'(.*?)Compile time"
        for name, target, body in re.findall(entry, log.read_text(), re.DOTALL):
            patterns = r"Used (\d+) reg", r"(\d+) bytes spill stores", r"(\d+) bytes stack", r"(\d+) bytes smem"
            found = (re.search(pattern, body) for pattern in patterns)
            kernels.append(Kernel(name, target, *(int(match[1]) if match else 0 for match in found)))
        log.unlink()
    return kernels


class Program(NamedTuple):
    name: str
    function: Callable
    arguments: tuple  # pytrees of what has shape and dtype
    donated: tuple[int, ...] = ()  # arguments whose memory the results take


def kernel_programs() -> Iterator[Program]:
    """Yields every kernel at the sizes it is made for, mapped over a batch as the library maps it."""
    import jax
    import jax.numpy as jnp

    from fasterrcnn_jax.ops.roi_alignment import roi_align
    from fasterrcnn_jax.ops.roi_pooling import roi_pool
    from fasterrcnn_jax.ops.suppression import nms

    array = jax.ShapeDtypeStruct

    # Problems, boxes, kept, threshold, boxes in groups.
    for name, problems, boxes, kept, threshold, grouped in (
        ("nms proposals 1", (1,), 12000, 2000, 0.7, False),
        ("nms proposals 8", (8,), 12000, 2000, 0.7, False),
        ("nms levels 8", (8,), 8768, 1000, 0.7, True),
        ("nms classes 8", (8,), 90000, 100, 0.5, True),
        ("nms classes 8 x 90", (8, 90), 1000, 100, 0.5, False),
    ):
        options = dict(iou_threshold=threshold, max_output=kept, implementation="mosaic")

        def suppress(boxes, scores, valid, groups, options=options):
            return nms(boxes, scores, valid, groups=groups, **options)

        for _ in problems:
            suppress = jax.vmap(suppress)
        shape = (*problems, boxes)
        arguments = array((*shape, 4), jnp.float32), array(shape, jnp.float32), array(shape, jnp.bool_)
        yield Program(name, suppress, (*arguments, array(shape, jnp.int32) if grouped else None))

    batch = 8
    for dtype in (jnp.float32, jnp.bfloat16):
        # Name, maps, strides, channels, regions, cells per side, samples, aligned.
        for name, maps, strides, channels, regions, side, samples, aligned in (
            ("fpn", ((200, 336), (100, 168), (50, 84), (25, 42)), (4, 8, 16, 32), 256, 512, 7, 2, True),
            ("c4", ((38, 63),), (16,), 1024, 128, 14, 0, False),
        ):
            options = dict(strides=strides, output_size=side, sampling_ratio=samples, aligned=aligned)
            operator = jax.vmap(functools.partial(roi_align, **options, implementation="mosaic"))
            arguments = (
                tuple(array((batch, *cells, channels), dtype) for cells in maps),
                array((batch, regions, 4), jnp.float32),
                array((batch, regions), jnp.int32),
            )
            pooled = array((batch, regions, side, side, channels), dtype)
            yield from forward_and_gradient(f"roi_align {name} {dtype.__name__}", operator, arguments, pooled)
        for name, channels, regions in (("c4", 1024, 128), ("vgg16", 512, 256)):
            options = dict(stride=16, output_size=7, quantisation="rounded", implementation="mosaic")
            operator = jax.vmap(functools.partial(roi_pool, **options))
            arguments = array((batch, 38, 63, channels), dtype), array((batch, regions, 4), jnp.float32)
            pooled = array((batch, regions, 7, 7, channels), dtype)
            yield from forward_and_gradient(f"roi_pool {name} {dtype.__name__}", operator, arguments, pooled)


def forward_and_gradient(name: str, operator: Callable, arguments: tuple, pooled: Any) -> Iterator[Program]:
    """Yields an operator on feature maps, and its gradient with the part of the forward pass that it needs."""
    import jax

    yield Program(f"{name} forward", operator, arguments)

    def gradient(cotangent, features, *rest):
        return jax.vjp(lambda features: operator(features, *rest), features)[1](cotangent)[0]

    yield Program(f"{name} gradient", gradient, (pooled, *arguments))


def whole_programs(mesh) -> Iterator[Program]:
    """Yields detection and the training step of published detectors, each at its own canvas."""
    from dataclasses import replace

    from flax import nnx

    from fasterrcnn_jax.config import families
    from fasterrcnn_jax.models.detector import create_detector
    from fasterrcnn_jax.models.faster_rcnn import detect

    for name, config, classes, canvas, batch_sizes in (
        ("small", families.resnet_fpn(18), 20, (256, 320), (2,)),
        ("resnet101-c4", families.resnet_c4(101), 20, (608, 1008), (1, 8)),
        ("resnet50-fpn", families.resnet_fpn(50), 90, (800, 1344), (8,)),
    ):
        class_names = tuple(f"class{k}" for k in range(1, classes + 1))
        for size, dtype in itertools.product(batch_sizes, ("float32", "bfloat16")):
            typed = replace(config, compute_dtype=dtype)
            model = nnx.eval_shape(lambda config=typed, names=class_names: create_detector(config, names, seed=0))
            batch = batch_of(size, canvas)
            suffix = ", bfloat16" if dtype == "bfloat16" else ""
            inputs = (model, batch.images, batch.image_hw, batch.scale)
            yield Program(f"detect {name} batch {size}{suffix}", detect, inputs)
        for size in batch_sizes:
            batch = batch_of(size, canvas)
            yield train_step(f"train step {name} batch {size}", config, class_names, batch, mesh)
        if name == "small":
            continue
        # What each means of saving memory saves, and all of them together.
        remat = replace(config, backbone=replace(config.backbone, remat=True))
        bfloat16 = replace(config, compute_dtype="bfloat16")
        every = replace(remat, compute_dtype="bfloat16")
        for variant, changed, accumulate, donates in (
            ("not donated", config, 1, False),
            ("bfloat16", bfloat16, 1, True),
            ("remat", remat, 1, True),
            ("4 parts", config, 4, True),
            ("bfloat16, remat, 4 parts", every, 4, True),
        ):
            yield train_step(
                f"train step {name} batch {size}, {variant}",
                changed, class_names, batch, mesh, accumulate=accumulate, donates=donates,
            )  # fmt: skip


def batch_of(size: int, canvas: tuple[int, int]) -> Any:
    """Returns the shapes of a batch with 50 objects per image."""
    import jax
    import jax.numpy as jnp

    from fasterrcnn_jax.structures import Batch, GroundTruth

    array = jax.ShapeDtypeStruct
    images, pair = array((size, *canvas, 3), jnp.float32), array((size, 2), jnp.float32)
    ground_truth = GroundTruth(
        array((size, 50, 4), jnp.float32), array((size, 50), jnp.int32), array((size, 50), jnp.bool_)
    )
    return Batch(images, pair, pair, array((size,), jnp.int32), array((size,), jnp.bool_), ground_truth)


def train_step(
    name: str,
    config: Any,
    class_names: tuple[str, ...],
    batch: Any,
    mesh: Any,
    *,
    accumulate: int = 1,
    donates: bool = True,
) -> Program:
    """Returns the training step of one device with momentum SGD, state included."""
    import jax
    from flax import nnx
    from jax.sharding import PartitionSpec

    from fasterrcnn_jax.config import TrainConfig
    from fasterrcnn_jax.models.detector import create_detector
    from fasterrcnn_jax.processes import AXIS
    from fasterrcnn_jax.training.optimizer import create_optimizer
    from fasterrcnn_jax.training.step import create_state, make_train_step

    optimizer = create_optimizer(TrainConfig(steps=1, batch_size=1, learning_rate=0.001))
    model = nnx.eval_shape(lambda: create_detector(config, class_names, seed=0))
    # What is static about the state comes out beside its arrays.
    structure = []

    def first_state():
        graphdef, state = create_state(model, optimizer, seed=0)
        structure.append(graphdef)
        return state

    state = jax.eval_shape(first_state)
    step = jax.shard_map(
        make_train_step(structure[0], optimizer, axis_name=AXIS, accumulate=accumulate),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return Program(name, step, (state, batch), donated=(0,) if donates else ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="compile only rows whose name contains any WORD")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write the table to, as JSON")
    arguments = parser.parse_args()
    if reason := unavailable():
        print(f"cannot compile for a GPU: {reason}", file=sys.stderr)
        sys.exit(UNAVAILABLE)
    with tempfile.TemporaryDirectory() as folder:
        listen_to_ptxas(Path(folder), toolkit())
        report = compile_all(Path(folder), arguments.words)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def compile_all(folder: Path, words: list[str]) -> dict[str, Any]:
    """Prints one line per kernel and program; returns all of it with date and versions."""
    import jax
    import numpy as np
    from fasterrcnn_jax.kernels import choice
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from fasterrcnn_jax.processes import AXIS

    # A program from a cache would not meet the assembler.
    jax.config.update("jax_enable_compilation_cache", False)
    # The library asks for the device that programs go to: here it is none of this machine's.
    choice.device = lambda: ("cuda", choice.HOPPER)
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh = Mesh(np.array(topology.devices[:1]), (AXIS,))
    replicated = NamedSharding(mesh, PartitionSpec())

    def compile_one(program: Program) -> Row:
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), program.arguments
        )
        start = time.perf_counter()
        traced = jax.jit(program.function, donate_argnums=program.donated).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
        seconds = time.perf_counter() - start
        hlo = compiled.as_text()
        launches = launched(hlo)
        memory = compiled.memory_analysis()
        return Row(
            name=program.name,
            kernels=[kernel for kernel in read_kernels(folder) if kernel.name.endswith("mosaic_gpu_kernel")],
            mosaic_launches=sum('custom_call_target="mosaic_gpu' in line for line in launches),
            launches=sum(map(launches_of, launches)),
            scatters=len(re.findall(r" scatter\(", hlo)),
            workspace=memory.temp_size_in_bytes,
            peak_memory=memory.peak_memory_in_bytes,
            traffic=traffic(hlo),
            has_float64="f64[" in hlo,
            calls_host="callback" in hlo,
            seconds=round(seconds, 1),
        )

    print("| program | kernel | target | registers | spill | stack | smem | launches | workspace | peak | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for program in itertools.chain(kernel_programs(), whole_programs(mesh)):
        if words and not any(word in program.name for word in words):
            continue
        row = compile_one(program)
        rows.append(row)
        whole = (
            f"{row.mosaic_launches} of {row.launches} | {row.workspace / 1e6:.1f} MB | {row.peak_memory / 1e6:.0f} MB"
            f" | {row.seconds} |"
        )
        for kernel in row.kernels or [Kernel(*[""] * 6)]:
            short = kernel.name.removesuffix("_mosaic_gpu_kernel")
            print(f"| {row.name} | {short} |", *(f"{value} |" for value in kernel[1:]), whole, flush=True)
    version = subprocess.run([folder / "bin" / "ptxas", "--version"], check=True, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": "NVIDIA H200, compiled for and not run on",
        "jax": jax.__version__,
        "ptxas": re.search(r"release [\d.]+, (V[\d.]+)", version.stdout)[1],
        "programs": [row._asdict() | {"kernels": [kernel._asdict() for kernel in row.kernels]} for row in rows],
    }


if __name__ == "__main__":
    main()
