import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the notebook machinery, not ours
def test_quickstart_runs_from_a_clean_copy(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for path in [*ROOT.glob("*.py"), *(room.parent for room in ROOT.glob("*/__init__.py"))]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    )
    client.execute()
    assert (tmp_path / "notebooks" / "results.png").is_file()
    (picture,) = [
        output
        for cell in notebook.cells
        if "plot_predictions(model" in cell.source
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    assert "image/png" in picture.data
    assert (tmp_path / "runs" / "notebook" / "best.pt").is_file()
