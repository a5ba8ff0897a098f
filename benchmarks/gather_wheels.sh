#!/usr/bin/env bash
# Gathers the wheels that `benchmarks/gpu.sh --wheels FOLDER` installs on a machine that reaches no package index.
#
#   benchmarks/gather_wheels.sh FOLDER [PYTHON_VERSION]
#
# They are what the stages `tests` and `train` need beside JAX, Flax, optax, NumPy, jaxtyping, torch and torchvision
# with their own dependencies, pytest and hypothesis: about 7 MB for Python 3.12 on Linux with x86-64.
# PYTHON     the interpreter whose pip downloads; default: python3
set -euo pipefail

WHEELS=(typeguard beartype pycocotools tensorboardX tyro docstring_parser)

[[ -n ${1:-} ]] || {
    echo "usage: benchmarks/gather_wheels.sh FOLDER [PYTHON_VERSION]" >&2
    exit 2
}
# pip takes the newest platform tag by its exact number only.
platforms=()
for tag in manylinux_2_34 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${tag}_x86_64")
done
mkdir -p "$1"
rm -f "$1"/*.whl
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
    --python-version "${2:-3.12}" "${platforms[@]}" --dest "$1" "${WHEELS[@]}"
du -ch "$1"/*.whl
