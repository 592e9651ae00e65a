"""The notebook about temperatures runs in a kernel, cell by cell, and draws."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from disttempnet.cli.main import main
from tests.examples.forks import EXAMPLES, environment

NOTEBOOK = EXAMPLES / "temperatures.ipynb"
PARAMETERS = 1  # the cell that sets them


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """The notebook, for a kernel that imports this checkout's package."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook: nbformat.NotebookNode, folder: Path) -> tuple[str, int]:
    """Return what the cells print, and how many pictures they draw."""
    NotebookClient(notebook, timeout=580, resources={"metadata": {"path": folder}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


def test_it_is_valid_and_stores_no_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert 'RUN = Path("runs/temperatures")' in notebook.cells[PARAMETERS].source


def test_it_opens_a_run_and_draws(notebook: nbformat.NotebookNode, tmp_path: Path) -> None:
    """A histogram, and a gallery a side; of as many pairs as were asked for."""
    main(["train", "debug", f"out={tmp_path}", "name=mine", "data.limit=64", "eval.tasks=[]", "train.epochs=1"])
    notebook.cells[PARAMETERS].source += f"\nRUN, PAIRS = Path({str(tmp_path / 'mine')!r}), 100"
    notebook.cells.append(nbformat.v4.new_code_cell("print(len(captions), tau.shape, bool(tau.std(1).all()))"))
    text, pictures = run(notebook, tmp_path)
    assert text.startswith("disttempnet-v1, step 2\nτ of the image side: 0.")
    assert text.endswith("100 torch.Size([2, 100]) True\n")
    assert pictures == 3


@pytest.mark.slow
def test_it_trains_a_run_in_which_flags_have_the_highest_temperatures(
    notebook: nbformat.NotebookNode, tmp_path: Path
) -> None:
    """As it stands: what it says about flags is what it draws."""
    highest = "print([[captions[i] for i in sides[side].argsort().flip(0)[:8]] for side in sides])"
    notebook.cells.append(nbformat.v4.new_code_cell(highest))
    text, pictures = run(notebook, tmp_path)
    assert pictures == 3
    for captions in ast.literal_eval(text.splitlines()[-1]):
        assert sum("flag" in caption for caption in captions) >= 6, captions
