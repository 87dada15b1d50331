"""The habits that a tool can hold: format, lint, types, layers, short files, no pickle, no shadowing name."""

import ast
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted([*(ROOT / "offload_trainer").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def check(package: str, *command: str) -> None:
    """Runs a tool of the test extra in the repository."""
    pytest.importorskip(package, reason="comes with the test extra")
    quiet = {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | quiet)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint():
    check("ruff", sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_format():
    check("ruff", sys.executable, "-m", "ruff", "format", "--check", "--no-cache", ".")


def test_layers():
    check("importlinter", str(Path(sys.executable).with_name("lint-imports")), "--no-cache")


def test_types():
    check("pyright", sys.executable, "-m", "pyright", "--pythonpath", sys.executable)


def test_files_are_short():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in CODE}
    assert {path: length for path, length in lengths.items() if length > 300} == {}


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0]}
            assert node.module != "torch" or not {"load", "save"} & {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and node.attr in ("load", "save"):
            assert ast.unparse(node.value) != "torch", f"torch.{node.attr}, line {node.lineno}"
        elif isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", f"allow_pickle, line {node.value.lineno}"
        assert not names & PICKLES


def test_no_module_shadows_another():
    """`accelerate launch offload_trainer/run.py` puts that folder first on the path."""
    ours = {path.stem for path in (ROOT / "offload_trainer").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not ours & (sys.stdlib_module_names | packages_distributions().keys())


def test_the_tables_of_both_pages_are_those_of_the_results():
    done = subprocess.run([sys.executable, "tools/tables.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run: python tools/tables.py"
