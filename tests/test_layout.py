"""The floors: a file imports only from the floors below it."""

import ast
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = {
    "errors": 0, "file_lock": 0, "transforms": 0, "fusion": 0, "sample_scene": 0, "objects": 0,
    "classes": 1, "config": 1, "layouts": 1, "hardware": 1, "encoders": 1, "distributed": 1,
    "image_io": 2, "sample_data": 2, "model": 2, "pretrained": 2, "tracking": 2,
    "sync_batch_norm": 2, "output_folder": 1,
    "sources": 3, "data_check": 3, "metrics": 3, "optimizer": 3, "checkpoint": 3, "sample_run": 3,
    "raster": 3, "polygons": 4, "dataset": 4, "losses": 4, "engine": 4, "run_folder": 4,
    "scenes": 4, "corruptions": 4, "counts": 4, "visualize": 5, "catalogue": 5, "inference": 5,
    "splits": 5, "learner": 5, "matrices": 6, "attention": 6, "protocols": 6, "maps": 6,
    "recorder": 7, "evaluation": 7, "plots": 8, "score_report": 8, "evaluation_record": 9,
    "torch_file": 0, "download": 2,
    "main": 10, "evaluate": 10, "predict": 10, "export": 10,
}  # fmt: skip
OUTSIDE = {"torch", "torchvision", "numpy", "PIL", "matplotlib", "tensorboard", "mlflow", "tqdm"}
OPTIONAL = {
    "encoders": {"timm"},
    "raster": {"rasterio"},
    "polygons": {"rasterio"},
    "maps": {"rasterio"},
    "export": {"onnx", "onnx_ir", "onnxruntime", "onnxscript"},
}  # imported where they are asked for, with a remedy
# What each part of the science may not know of
IGNORANT = {
    "model": {"argparse", "mlflow", "config", "tracking", "engine"},
    "encoders": {"argparse", "mlflow", "config", "tracking", "engine", "model"},
    "fusion": {"argparse", "mlflow", "config", "tracking", "engine", "model"},
    "losses": {"argparse", "mlflow", "config", "tracking", "engine", "model"},
    "dataset": {"argparse", "mlflow", "config", "tracking", "engine", "model"},
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_file_says_its_floor() -> None:
    assert {p.stem for p in ROOT.glob("*.py")} == set(FLOORS)


def test_imports_go_down() -> None:
    for name, floor in FLOORS.items():
        for other in imports(ROOT / f"{name}.py") & set(FLOORS):
            assert FLOORS[other] < floor, f"{name} imports {other}"


def test_only_the_promised_packages_are_needed() -> None:
    for name in FLOORS:
        foreign = imports(ROOT / f"{name}.py") - set(FLOORS) - set(sys.stdlib_module_names)
        foreign -= OPTIONAL.get(name, set())
        assert foreign <= OUTSIDE, f"{name} imports {foreign - OUTSIDE}"


def test_the_science_knows_nothing_of_the_engineering() -> None:
    for name, strangers in IGNORANT.items():
        assert not imports(ROOT / f"{name}.py") & strangers


def test_no_file_shadows_an_installed_package() -> None:
    installed = set(packages_distributions()) | set(sys.stdlib_module_names)
    assert not set(FLOORS) & installed
