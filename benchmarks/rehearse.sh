#!/usr/bin/env bash
# Rehearses benchmarks/gpu.sh on a CPU, as on a machine with a GPU that has few packages and no package index.
#
#   benchmarks/rehearse.sh FOLDER DATA [STAGE ...]
#
# FOLDER     gets the environment, the wheels, the results, the log and a summary of it
# DATA       images for the stage `train`: a folder in VOC layout with the splits train and test
# PYTHON     of version 3.12; default: python3.12, or the one of pyenv
#
# The environment holds JAX 0.11.2, Flax, optax, NumPy, jaxtyping, torch and torchvision, with what these need, pytest
# and hypothesis. The stages that time operations and detectors run with imports of everything else blocked
# (benchmarks/rehearsal); `tests` and `train` also get the wheels of benchmarks/gather_wheels.sh. All sizes are tiny.
#
# Exits with 1 when a stage failed.
set -uo pipefail

MACHINE=(jax==0.11.2 flax optax numpy jaxtyping torch==2.13.0 torchvision==0.28.0 pytest hypothesis)
# jinja2, filelock and safetensors came with other packages of such a machine, as did these.
MACHINE+=(cloudpickle filelock jinja2 safetensors tqdm)
BLOCKED=" nms regions detection step ops e2e "

[[ -d ${2:-} ]] || {
    echo "usage: benchmarks/rehearse.sh FOLDER DATA [STAGE ...]" >&2
    exit 2
}
folder=$(realpath -m "$1") data=$(realpath "$2")
shift 2
stages=("$@")
((${#stages[@]})) || stages=(nms regions detection step tests train ops e2e)
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$folder/bin"

python=${PYTHON:-}
for candidate in python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python; do
    [[ -n $python ]] || ! "$candidate" -c "" 2>/dev/null || python=$candidate
done
[[ -x $folder/env/bin/python ]] || {
    "$python" -m venv "$folder/env" && "$folder/env/bin/pip" install --quiet "${MACHINE[@]}" || exit 1
}
"$root/benchmarks/gather_wheels.sh" "$folder/wheels" 3.12 || exit 1
# There is no `python` on the path, only `python3`.
printf '#!/bin/sh\nexec "%s" "$@"\n' "$folder/env/bin/python" >"$folder/bin/python3"
chmod +x "$folder/bin/python3"
for name in bash dirname realpath mkdir mktemp rm find sort awk tar mv timeout tee; do
    ln -sf "$(command -v "$name")" "$folder/bin/$name"
done

failed=0
summary=$folder/summary.md
{
    echo "| stage | imports | seconds | exit status | faults |"
    echo "|---|---|---|---|---|"
} >"$summary"
: >"$folder/rehearsal.log"
for stage in "${stages[@]}"; do
    arguments=(--tiny --out "$folder/results" --data "$data")
    variables=("PATH=$folder/bin" "HOME=$HOME" "PYTEST_ADDOPTS=-p no:cacheprovider -k choice"
        # The machine may be busy, and compilation is most of the work.
        STAGE_SECONDS=3600 JAX_DISABLE_MOST_OPTIMIZATIONS=1 OMP_NUM_THREADS=1)
    imports="the machine's and the wheels"
    if [[ $BLOCKED == *" $stage "* ]]; then
        variables+=("PYTHONPATH=$root/benchmarks/rehearsal")
        imports="the machine's, all others blocked"
    else
        arguments+=(--wheels "$folder/wheels")
    fi
    start=$SECONDS
    env -i "${variables[@]}" bash "$root/benchmarks/gpu.sh" "${arguments[@]}" "$stage" 2>&1 | tee -a "$folder/rehearsal.log"
    status=${PIPESTATUS[0]}
    ((status == 0)) || failed=1
    faults=$("$folder/env/bin/python" -c '
import json, sys
report = json.load(open(sys.argv[1]))
print(len(report.get("faults") or report.get("not_passed") or ()))' "$folder/results/$stage.json") || failed=1
    echo "| $stage | $imports | $((SECONDS - start)) | $status | $faults |" >>"$summary"
done
"$folder/env/bin/pip" list --format=freeze 2>/dev/null | grep -iE '^(jax|jaxlib|flax|optax|numpy|jaxtyping|torch|torchvision)=' |
    paste -sd ' ' >>"$summary"
cat "$summary"
exit "$failed"
