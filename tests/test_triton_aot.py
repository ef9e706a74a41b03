"""The Triton kernels compile for real GPUs: no GPU needed, no spilled registers, shared memory that every chip has.

Every kernel file names representative calls (`aot`). They are run on tensors without memory, launches are recorded in
place of being run, and what they would have compiled is compiled. So tile sizes are those that the launchers choose.
"""

import contextlib
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys

import pytest

CAPABILITIES = (80, 90, 100)
TARGETS = (("float32", 80), ("float32", 90), ("float32", 100), ("bfloat16", 90))  # dtype, compute capability * 10
# constants that choose what a kernel does; the others are sizes
BRANCHES = (
    "METRIC", "LOSS", "ACTIVATION", "HAS_BASE", "HAS_RATE", "HAS_BIAS", "SHARED_X", "TF32", "INDEX", "GIVEN",
    "MOMENTUM", "BACK", "ONE_TAP", "POOL", "NORM", "HAS_OUTER", "BENT", "GRADIENT",
)  # fmt: skip
# bytes that a block may have on the smallest GPU of compute capability 8 or later
SHARED_MEMORY = 99 * 1024


def _type_of(argument) -> str:
    import torch

    if isinstance(argument, torch.Tensor):
        names = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "int32": "i32", "int64": "i64"}
        return f"*{names[str(argument.dtype).removeprefix('torch.')]}"
    if isinstance(argument, float):
        return "fp32"
    # as at a real launch, an integer 1 is compiled in
    return "constexpr" if argument == 1 else "i32" if abs(argument) < 2**31 else "i64"


def _leaves(value, path):
    if isinstance(value, tuple):
        for i, element in enumerate(value):
            yield from _leaves(element, (*path, i))
    else:
        yield path, value


def _nested(value):
    if not isinstance(value, tuple):
        return _type_of(value)
    types = map(_nested, value)
    return type(value)(*types) if hasattr(value, "_fields") else tuple(types)  # kernels take fields by their names


def _source(launch):
    """What a launch would hand to the compiler."""
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = dict(zip(names, map(_nested, launch.arguments), strict=False))
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    signature.update(dict.fromkeys(launch.constants, "constexpr"))
    assert list(signature) == list(names), launch.kernel.__name__
    aligned = {}
    for path, value in _leaves(launch.arguments, ()):
        if isinstance(value, int) and value == 1:
            constants[path] = 1
        elif not isinstance(value, (int, float)) or (isinstance(value, int) and value % 16 == 0):
            aligned[path] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)


def _launches(dtype: str):
    """`{description: launch}` of the representative calls of all ops, one for each way that its code branches.

    Of launches that differ in tile sizes alone the first counts: files name their largest example first.
    """
    import torch

    from fastmeta.kernels import OPS, _common

    default, found = getattr(torch, dtype), {}
    for op in OPS:
        module = importlib.import_module(f"fastmeta.kernels.{op}")

        def new(*shape, dtype=default):
            return torch.empty(shape, dtype=dtype, device="meta")

        with _common.record_launches() as launches:
            module.aot(new)
        for launch in launches:
            constants = launch.constants | getattr(launch.constants.get("HOW"), "_asdict", dict)()
            kind = " ".join(f"{k}={constants[k]}" for k in BRANCHES if k in constants)
            found.setdefault(f"{launch.kernel.__name__} {kind}".strip(), launch)
    return found


def _compile(dtype: str, description: str, capability: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget

    launch = _launches(dtype)[description]
    target = GPUTarget("cuda", capability, 32)
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(_source(launch), target=target, options=launch.options)
    return {
        "kernel": description,
        "dtype": dtype,
        "capability": capability,
        "shared": compiled.metadata.shared,
        **_resources(log.getvalue()),
    }


def _resources(log: str) -> dict:
    """Registers and bytes of spills, from what the assembler said; nothing where it said nothing."""
    registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    return {"registers": int(registers[1]), "spilled": int(spills[1])} if registers and spills else {}


def _kernels() -> list[str]:
    """Names of all functions in the package that a launch may name: those that ask for their program's number, or for
    its tile by that (`tile_of`)."""
    import pkgutil

    import fastmeta.kernels

    names = []
    for info in pkgutil.iter_modules(fastmeta.kernels.__path__):
        module = importlib.import_module(f"fastmeta.kernels.{info.name}")
        for name, value in vars(module).items():
            source = getattr(value, "fn", None)
            own = inspect.isfunction(source) and source.__module__ == module.__name__
            if own and ("tl.program_id" in value.src or "tile_of(" in value.src):
                names.append(name)
    return sorted(set(names))


def _report() -> dict:
    """Compile everything on all cores; what the subprocess prints."""
    from concurrent.futures import ProcessPoolExecutor

    tasks = [(dtype, what, sm) for dtype, sm in TARGETS for what in _launches(dtype)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(_compile, *zip(*tasks, strict=True)))
    return {"kernels": _kernels(), "rows": rows}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("triton", reason="triton is not installed")
    # kernels imported under the interpreter cannot be compiled: a process of its own, and a cache of its own
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DUMP_PTXAS_LOG"] = "1"
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-8000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_every_kernel_is_compiled(report):
    compiled = {row["kernel"].split(" ")[0] for row in report["rows"]}
    assert compiled == set(report["kernels"]), "kernels without a representative call in their file's `aot`"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_shared_memory_fits_and_no_register_is_spilled(report, capability):
    rows = [row for row in report["rows"] if row["capability"] == capability]
    assert rows
    assert not [row for row in rows if row["shared"] > SHARED_MEMORY]
    assert not [row for row in rows if row.get("spilled")]


if __name__ == "__main__":
    print(json.dumps(_report()))
