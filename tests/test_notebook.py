"""The notebook runs from top to bottom, in a folder of its own and without a network."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tour.ipynb"


@pytest.mark.documentation
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Proactor event loop|There is no current event loop")  # of jupyter_client, elsewhere
def test_tour__runs_and_keeps_its_promises(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what is committed has none
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [output.get("text") or output["data"]["text/plain"] for output in outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert "(88718340, 88718340)" in texts
    assert "True" in texts
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert texts[-1].startswith("digits.onnx, ")
