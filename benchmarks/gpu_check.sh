#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: build against PYTHON's torch, the tests on CUDA, compute-sanitizer on
# a small set, the benchmarks. Needs no network. OUT names the folder for the results; PYTHON the interpreter.
# Every step runs even if an earlier one failed; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-gpu-check}
mkdir -p "$OUT"
failed=()
step() { # name, command...
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@" >"$OUT/$name.log" 2>&1 || failed+=("$name")
    tail -n 4 "$OUT/$name.log"
    echo "   $((SECONDS - start)) s"
}

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 1
export FASTMETA_BUILD_CUDA=1
step build "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index --editable .
step info "$PYTHON" -m fastmeta info
step tests "$PYTHON" -m pytest tests/test_ops.py tests/test_transforms.py tests/ops tests/test_errors.py \
    tests/test_properties.py tests/test_engines.py tests/test_algorithms.py --junitxml "$OUT/tests.xml"
for tool in memcheck racecheck; do
    step "sanitizer-$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
        "$PYTHON" -m pytest tests/test_ops.py -k "test_value and cuda-float32 and (T3 or T2)"
done
step benchmarks "$PYTHON" -m benchmarks --device cuda --out "$OUT" --label gpu
"$PYTHON" - "$OUT" "${failed[@]}" <<'PY'
import json, pathlib, sys, xml.etree.ElementTree as tree

out, *failed = sys.argv[1:]
out = pathlib.Path(out)
suite = next(tree.parse(out / "tests.xml").iter("testsuite"), None) if (out / "tests.xml").exists() else None
counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")} if suite is not None else None
(out / "gpu_check.json").write_text(json.dumps({"failed_steps": failed, "tests": counts}, indent=1) + "\n")
print("failed steps:", ", ".join(failed) or "none", "| tests:", counts)
PY
[ ${#failed[@]} -eq 0 ]
