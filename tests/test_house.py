"""How the house is built: its rooms, who imports whom, and what stands in requirements.txt."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train_cv", "heatmap", "svm", "ttest", "predict", "meta", "compare", "simulate"}
MODULES = {"models", "dataset", "utils"}
PACKAGES = {"attribution", "run_folder", "loading", "reporting", "comparing"}
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # where it is not the module's name
PRODUCT = [
    *sorted(ROOT.glob("*.py")),
    *(p for d in sorted(PACKAGES) for p in (ROOT / d).rglob("*.py")),
]
PEERS = {"zennit", "monai", "nimare", "SimpleITK"}  # done without where they are missing
OTHERS = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]


def room_of(path: Path) -> str:
    """Return a root module's name, or the package that a file lies in."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """Return the first names of all modules that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by dots"
            names.add(node.module.split(".")[0])
    return names


def test_rooms():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS | MODULES
    assert {room_of(path) for path in PRODUCT} == SCRIPTS | MODULES | PACKAGES
    assert 29 <= len(PRODUCT) <= 56


@pytest.mark.parametrize(
    ("rooms", "strangers"),
    [
        ({"utils"}, SCRIPTS | MODULES | PACKAGES),
        ({"attribution"}, (SCRIPTS | MODULES | PACKAGES) - {"attribution"}),
        ({"models"}, (SCRIPTS | MODULES | PACKAGES) - {"models", "utils"}),
        ({"run_folder"}, (SCRIPTS | MODULES | PACKAGES) - {"run_folder", "utils"}),
        ({"loading"}, SCRIPTS | {"models", "dataset", "attribution", "reporting", "comparing"}),
        ({"dataset"}, SCRIPTS | {"models", "attribution", "reporting", "comparing"}),
        ({"reporting"}, SCRIPTS | {"models", "dataset", "attribution", "comparing"}),
        ({"comparing"}, SCRIPTS | {"models", "dataset", "attribution"}),
        (SCRIPTS, SCRIPTS),
    ],
    ids=lambda value: ",".join(sorted(value)) if len(value) < 6 else "",
)
def test_nothing_imports_upwards(rooms, strangers):
    for path in PRODUCT:
        if room_of(path) in rooms:
            assert not imports_of(path) & strangers, path


@pytest.mark.parametrize("script", ["svm", "ttest", "meta", "compare", "simulate"])
def test_what_runs_without_torch_does_not_wait_for_it(script):
    """Nor, for its options, for what draws pictures or fits models."""
    code = (
        f"import sys, runpy; sys.argv = ['{script}.py', '-h']\n"
        f"try: runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'matplotlib', 'nilearn', 'sklearn') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_only_scripts_see_a_namespace():
    may = {ROOT / f"{name}.py" for name in (*SCRIPTS, "utils")}
    for path in set(PRODUCT) - may - {ROOT / "run_folder" / "processes.py"}:
        assert "Namespace" not in path.read_text(), path


def test_every_imported_package_is_required():
    own = {path.stem for path in (*PRODUCT, *OTHERS)} | PACKAGES | {"benchmarks"}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {re.split(r"[=<>~\[ ]", line)[0].lower() for line in lines if line[:1] != "#"}
    for path in (*PRODUCT, *OTHERS):
        foreign = imports_of(path) - own - sys.stdlib_module_names
        foreign -= PEERS if room_of(path) in ("benchmarks", "tests") else set()
        missing = {DISTRIBUTIONS.get(name, name) for name in foreign} - required
        assert not missing, path
