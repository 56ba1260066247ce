"""The floors: the folder is the floor, and a file imports only from the floors below it."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["main", "evaluate", "predict", "export"]
FLOORS = [
    ["runtime"],
    ["networks", "pairs"],
    ["model"],
    ["metrics"],
    ["losses", "dataset"],
    ["visualize"],
    ["training", "scoring", "mapping"],
    SCRIPTS,
]  # those side by side never import each other
FLOOR = {place: number for number, floor in enumerate(FLOORS) for place in floor}
FILES = sorted(
    path for place in FLOOR for path in [*ROOT.glob(f"{place}.py"), *(ROOT / place).rglob("*.py")]
)
OUTSIDE = {
    "torch", "torchvision", "numpy", "scipy", "PIL", "matplotlib", "tensorboard", "mlflow", "tqdm",
}  # fmt: skip
OPTIONAL = {
    "pyogrio",
    "shapely",
    "timm",
    "rasterio",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
}
SCIENCE = ["networks", "pairs", "model", "metrics", "losses", "dataset"]
ENGINEERING = {"argparse", "mlflow", "runtime.config", "runtime.tracking", "training"}


def place_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it: "runtime.errors", "torch.nn"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_file_has_a_floor() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} <= set(FLOOR)
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms == {place for place in FLOOR if not (ROOT / f"{place}.py").exists()}
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = place_of(path)
    for other in {name.split(".")[0] for name in imports(path)} & set(FLOOR) - {own}:
        assert FLOOR[other] < FLOOR[own], f"{own} imports {other}"


def test_no_imports_in_a_circle() -> None:
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): imports(p) for p in FILES}
    left = {name: found & set(modules) - {name} for name, found in modules.items()}
    while free := [name for name, found in left.items() if not found & set(left)]:
        for name in free:
            del left[name]
    assert not left


def test_only_the_promised_packages_are_needed() -> None:
    for path in FILES:
        foreign = {name.split(".")[0] for name in imports(path)} - set(FLOOR)
        foreign -= set(sys.stdlib_module_names) | OPTIONAL | OUTSIDE
        assert not foreign, f"{path} imports {foreign}"


def test_the_science_knows_nothing_of_the_engineering() -> None:
    for path in FILES:
        if place_of(path) in SCIENCE:
            assert not imports(path) & ENGINEERING, path


def test_no_name_shadows_an_installed_package() -> None:
    installed = set(packages_distributions()) | set(sys.stdlib_module_names)
    assert not set(FLOOR) & installed


def test_each_room_says_in_a_sentence_what_it_answers() -> None:
    for path in ROOT.glob("*/__init__.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert len(tree.body) == 1 and ast.get_docstring(tree), path
