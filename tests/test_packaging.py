"""What is packaged, where an op's files stand, and who may import whom."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastmeta
import fastmeta.ops  # noqa: F401  (fills the registry)
from fastmeta.dispatch.spec import REGISTRY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = ROOT / "fastmeta", ROOT / "kernels" / "triton"
MAPPED = {"kernels": KERNELS, "benchmarks": ROOT / "benchmarks"}  # stand at the top level, install inside the package
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OPS = sorted({spec.file for spec in REGISTRY.values()})


def installed_parts(path: Path) -> tuple[str, ...]:
    """Where a file of the project stands once it is installed, from `fastmeta` on."""
    for name, folder in MAPPED.items():
        if path.is_relative_to(folder):
            return "fastmeta", name, *path.relative_to(folder).parts
    return "fastmeta", *path.relative_to(PACKAGE).parts


def python_files() -> list[Path]:
    return [path for folder in (PACKAGE, *MAPPED.values()) for path in sorted(folder.rglob("*.py"))]


FILES = python_files()


def packages_on_disk():
    return {".".join(installed_parts(path)[:-1]) for path in FILES if path.name == "__init__.py"}


def test_the_list_of_packages_is_complete():
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages_on_disk())
    assert listed == sorted(listed)


def test_every_module_lies_in_a_package():
    """A folder without __init__.py would work from the source tree and be missing from the wheel."""
    bare = [str(p.relative_to(ROOT)) for p in FILES if not (p.parent / "__init__.py").exists()]
    assert not bare


def files_of_the_wheel(monkeypatch):
    """The pure-Python files that setuptools would install, from its own reading of pyproject.toml."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FASTMETA_NO_EXT", "1")
    distribution = setuptools.Distribution()
    distribution.script_name = "setup.py"
    distribution.parse_config_files(["pyproject.toml"])
    build = distribution.get_command_obj("build_py")
    build.build_lib = ""
    build.ensure_finalized()
    return {Path(path).as_posix().lstrip("/") for path in build.get_outputs(include_bytecode=False)}


def test_the_wheel_holds_every_module_and_one_top_level_name(monkeypatch):
    files = files_of_the_wheel(monkeypatch)
    assert {path.split("/")[0] for path in files} == {"fastmeta"}
    expected = {"/".join(installed_parts(path)) for path in FILES}
    splits = (PACKAGE / "tasks" / "splits").glob("*.txt")
    data = {"/".join(installed_parts(p)) for p in (PACKAGE / "py.typed", MAPPED["benchmarks"] / "peak.cpp", *splits)}
    assert len(data) > 1 and files == expected | data


def test_the_folder_kernels_is_no_package():
    """Else it would shadow a published package of that name for whoever runs Python at the root."""
    assert not (KERNELS.parent / "__init__.py").exists()
    assert (KERNELS / "__init__.py").exists()


def test_the_installed_distribution_has_one_top_level_name():
    try:
        names = importlib.metadata.distribution("fastmeta").read_text("top_level.txt")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fastmeta is not installed")
    assert names.split() == ["fastmeta"]


def test_one_version():
    assert PYPROJECT["project"]["version"] == fastmeta.__version__


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "folder, suffix",
    [("fastmeta/ops", "py"), ("kernels/triton", "py"), ("csrc/cpu", "cpp"), ("csrc/cuda", "cu")],
)
def test_an_op_has_the_same_basename_everywhere(folder, suffix, op):
    if not any((ROOT / folder).glob(f"*.{suffix}")):
        pytest.skip(f"{folder} holds no kernels")
    backend = {"csrc/cpu": "cpp", "csrc/cuda": "cuda", "kernels/triton": "triton"}.get(folder, "reference")
    has_kernels = any(backend in spec.backends for spec in REGISTRY.values() if spec.file == op)
    assert (ROOT / folder / f"{op}.{suffix}").is_file() == has_kernels


def test_every_file_of_ops_is_an_op():
    assert {p.stem for p in (PACKAGE / "ops").glob("[!_]*.py")} == set(OPS)


# A floor may import from the floors before it, `tasks` and `nn` from the first two alone.
FLOORS = (
    ("values", "_trees", "_cache"),
    ("batch",),
    ("tasks", "nn", "kernels", "dispatch"),
    ("ops", "testing"),
    ("functional",),
    ("engines",),
    ("algorithms",),
    ("fastmeta",),
    ("training",),
    ("irl", "estimators", "benchmarks"),
    ("compat", "cli"),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(FLOORS) for name in names}


def unit_of(path: Path) -> str:
    _, *folders, name = installed_parts(path)
    if name == "__main__.py" and folders in ([], ["benchmarks"]):  # each hands over to the command line
        return "__main__"
    return folders[0] if folders else "fastmeta" if path.stem == "__init__" else path.stem


def imports_at_run_time(node: ast.AST):
    """Import statements, also those inside functions, but not under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from imports_at_run_time(child)


def imported_units(path: Path):
    """The parts of fastmeta that a file imports, as named in LAYERS."""
    package = list(installed_parts(path)[:-1])
    for node in imports_at_run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [module] if len(module) > 1 else [[*module, alias.name] for alias in node.names]
        for parts in names:
            if parts[0] == "fastmeta":
                # `from fastmeta import use_backend` takes a name of the package itself
                yield parts[1] if len(parts) > 1 and parts[1] in MODULES else "fastmeta"


COMPILED = {"_C", "_build_info"}
MODULES = {unit_of(path) for path in FILES} | COMPILED


def test_every_module_has_its_floor():
    without = MODULES - set(RANK) - COMPILED
    assert not without, f"enter {sorted(without)} into FLOORS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    importer = unit_of(path)
    for imported in imported_units(path):
        if imported in COMPILED or imported == importer:
            continue
        assert RANK[imported] < RANK[importer], f"{importer} imports {imported}, which is not below it"
        if imported == "tasks":
            assert RANK[importer] >= RANK["fastmeta"], f"{importer} imports tasks, which training and cli alone use"
        of_tests = imported == "testing" and importer != "benchmarks"  # which do not time what is wrong
        assert not of_tests, f"{importer} imports testing, which is for tests"


def imported_files(path: Path, files: dict[str, Path]):
    """The files of the project that a file names in its imports, those for type checkers and in functions too."""
    package = list(installed_parts(path)[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" if f"{module}.{alias.name}" in files else module for alias in node.names]
        else:
            continue
        yield from (files[name] for name in names if name in files)


def included_files(path: Path):
    for name in re.findall(r'#include\s+"([^"]+)"', path.read_text()):
        yield (path.parent / name).resolve()
    for name in re.findall(r"#include\s+[<\"](fastmeta/[^>\"]+)", path.read_text()):
        yield (ROOT / "csrc" / "include" / name).resolve()


def circles(arrows: dict[Path, set[Path]]) -> list[list[str]]:
    """Groups of files that all reach each other, each once."""

    def reached(start: Path) -> set[Path]:
        seen: set[Path] = set()
        todo = list(arrows.get(start, ()))
        while todo:
            if (here := todo.pop()) not in seen:
                seen.add(here)
                todo += arrows.get(here, ())
        return seen

    reach = {path: reached(path) for path in arrows}
    in_circle = [path for path in arrows if path in reach[path]]
    groups = {frozenset(b for b in in_circle if b in reach[a] and a in reach[b]) for a in in_circle}
    return [sorted(path.relative_to(ROOT).as_posix() for path in group) for group in groups]


def test_no_circle_of_imports():
    names = {
        ".".join(installed_parts(path)).removesuffix(".py").removesuffix(".__init__"): path for path in FILES
    }
    # a package's own face names the files inside it, and these never name it
    arrows = {path: set(imported_files(path, names)) - {path} for path in FILES}
    assert sum(map(len, arrows.values())) > 200, "the imports are no longer seen"
    assert not circles(arrows)


def test_no_circle_of_includes():
    sources = [p.resolve() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")]
    arrows = {path: {p for p in included_files(path) if p in sources} for path in sources}
    assert sum(map(len, arrows.values())) > 60, "the includes are no longer seen"
    assert not circles(arrows)


def test_optional_packages_are_not_imported():
    """`import fastmeta` and an op work without the optional packages, and do not load them."""
    code = """if True:
        import sys
        refused = {"matplotlib", "pooch", "typer", "rich", "PIL", "safetensors", "tensorboard", "triton"}
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in refused:
                    asked.add(name.split(".")[0])
                    raise ModuleNotFoundError(name)
        asked = set()
        sys.meta_path.insert(0, Refuse())
        import torch
        import fastmeta
        fastmeta.functional.pairwise_distance(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
        # torch itself looks whether triton is there
        print(sorted(asked - {"triton"}), [name for name in sys.modules if "fastmeta.kernels" in name])
    """
    environment = {k: v for k, v in os.environ.items() if k != "FASTMETA_BACKEND"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] []"
