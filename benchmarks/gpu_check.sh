#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: build against PYTHON's torch, the tests on CUDA, compute-sanitizer on
# a small set, the benchmarks. Needs no network. OUT names the folder for the results; PYTHON the interpreter; STEPS some
# of the steps, such as "build tests", where one command may not take long; WORKERS how many processes share the tests.
# "build conv" is what convolutions need: their ops' battery on both GPU backends, then their rows in float32 and
# bfloat16. DRY=1 says what would run. Every step runs even if an earlier one failed; the exit status says whether all
# passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-check}
ALL="build info tests sanitizer benchmarks conv"
STEPS=${STEPS:-$ALL}
WORKERS=${WORKERS:-8}
DRY=${DRY:-}
for name in $STEPS; do
    [[ " $ALL " == *" $name "* ]] || { echo "STEPS has '$name'; the steps are: $ALL" >&2; exit 2; }
done
failed=()
step() { # name, command...
    local name=$1 start=$SECONDS
    shift
    [[ " $STEPS " == *" ${name%%-*} "* ]] || return
    if [ -n "$DRY" ]; then
        printf '== %s: %s\n' "$name" "${*@Q}"
        return
    fi
    echo "== $name"
    "$@" >"$OUT/$name.log" 2>&1 || failed+=("$name")
    tail -n 12 "$OUT/$name.log"
    echo "   $((SECONDS - start)) s"
}

if [ -z "$DRY" ]; then
    "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 1
    mkdir -p "$OUT"
fi
export FASTMETA_BUILD_CUDA=1
step build "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --editable .
step info "$PYTHON" -m fastmeta info
step tests "$PYTHON" -m pytest --numprocesses "$WORKERS" --tb short --junitxml "$OUT/tests.xml" tests/test_ops.py \
    tests/test_transforms.py tests/ops tests/test_errors.py tests/test_properties.py tests/test_engines.py \
    tests/test_formulas.py tests/test_algorithms.py tests/test_inner_loops.py tests/test_lowrank_module.py tests/test_linears.py \
    tests/test_irl.py tests/algorithms
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
for tool in memcheck racecheck; do
    step "sanitizer-$tool" "$sanitizer" --tool "$tool" --error-exitcode 1 \
        "$PYTHON" -m pytest tests/test_ops.py -k "test_value and cuda-float32 and (T3 or T2)"
done
step benchmarks "$PYTHON" -m benchmarks --device cuda --out "$OUT"
step conv-tests timeout 150 "$PYTHON" -m pytest --numprocesses "$WORKERS" --tb short --junitxml "$OUT/conv-tests.xml" \
    tests/test_ops.py -k "(task_conv2d or norm_moments or norm_act_pool) and (cuda or triton)"
step conv-benchmarks timeout 180 "$PYTHON" -m benchmarks.conv --device cuda --dtype float32 --dtype bfloat16 --seconds 1 \
    --without JAX --without compile --rows conv4-1shot-k1-t4 --rows conv4-1shot-k5-t4 --rows conv4-1shot-k5-t16 \
    --rows conv4-84-k5-t4 --rows resnet12-second-order --rows protonet --rows sensors --out "$OUT"
[ -z "$DRY" ] || exit 0
"$PYTHON" - "$OUT" "${failed[@]}" <<'PY'
import json, pathlib, sys, xml.etree.ElementTree as tree

out, *failed = sys.argv[1:]
out = pathlib.Path(out)
suites = [suite for path in out.glob("*tests.xml") for suite in tree.parse(path).iter("testsuite")]
counts = {key: sum(int(suite.get(key)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
(out / "gpu_check.json").write_text(json.dumps({"failed_steps": failed, "tests": counts}, indent=1) + "\n")
print("failed steps:", ", ".join(failed) or "none", "| tests:", counts)
PY
[ ${#failed[@]} -eq 0 ]
