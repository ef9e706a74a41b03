#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: build against PYTHON's torch, the tests on CUDA, compute-sanitizer on
# a small set, the benchmarks. Needs no network. OUT names the folder for the results; PYTHON the interpreter; STEPS some
# of the steps, such as "build tests", where one command may not take long; WORKERS how many processes share the tests.
# Every step runs even if an earlier one failed; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-check}
STEPS=${STEPS:-build info tests sanitizer benchmarks}
WORKERS=${WORKERS:-8}
mkdir -p "$OUT"
failed=()
step() { # name, command...
    local name=$1 start=$SECONDS
    shift
    [[ " $STEPS " == *" ${name%%-*} "* ]] || return
    echo "== $name"
    "$@" >"$OUT/$name.log" 2>&1 || failed+=("$name")
    tail -n 12 "$OUT/$name.log"
    echo "   $((SECONDS - start)) s"
}

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 1
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
step benchmarks "$PYTHON" -m benchmarks --device cuda --out "$OUT" --label gpu
"$PYTHON" - "$OUT" "${failed[@]}" <<'PY'
import json, pathlib, sys, xml.etree.ElementTree as tree

out, *failed = sys.argv[1:]
out = pathlib.Path(out)
suites = [suite for path in out.glob("tests.xml") for suite in tree.parse(path).iter("testsuite")]
counts = {key: sum(int(suite.get(key)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
(out / "gpu_check.json").write_text(json.dumps({"failed_steps": failed, "tests": counts}, indent=1) + "\n")
print("failed steps:", ", ".join(failed) or "none", "| tests:", counts)
PY
[ ${#failed[@]} -eq 0 ]
