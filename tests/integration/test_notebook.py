"""The notebook of the documentation runs from its first to its last cell."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # those of Jupyter; the kernel is another process
def test_it_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace("render.steps=64", "render.steps=8").replace("size=128", "size=64")
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    images = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) == 5 and not any(o.output_type == "error" for c in notebook.cells for o in c.get("outputs", []))
