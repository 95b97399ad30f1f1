"""The notebook of the tour, from a folder of pictures to a repository."""

import json
import re

import pytest
from hub_server import LoopbackHub
from pages import ROOT, check_command, check_python, commands_of, environment


TOKEN = "hf_" + "s3cr3t" * 5
NOTEBOOK = ROOT / "notebooks" / "tour.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[str]:
    """The code of its cells."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_its_ten_cells_are_python_and_commands_that_their_parsers_take(cells, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(cells) == 10
    shell = r"^( *)!((?:.*\\\n)*.*)$"
    for cell in cells:
        for _, code in re.findall(shell, cell, flags=re.MULTILINE):
            for words in commands_of(code.replace("{PUSH_TO}", "user/name")):
                check_command(words, {})
        check_python(re.sub(shell, r"\1pass", cell, flags=re.MULTILINE))


def test_it_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 400_000
    assert not re.search(r"/tmp/|/home/|/root/|Traceback", text)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_pushes(cells, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace("PUSH_TO = None", 'PUSH_TO = "user/tour"')
    with LoopbackHub(TOKEN) as hub:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment(tmp_path, hub.endpoint, TOKEN).items():
            monkeypatch.setenv(name, value)
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            monkeypatch.setenv(name, str(tmp_path / name.lower()))
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
        pushed = hub.files("user/tour")
    assert {"model_index.json", "README.md", "samples.png"} <= set(pushed)
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    for place in (1, 2, 3, 4, 5, 7):
        assert any("image/png" in output.get("data", {}) for output in outputs[place]), place
    measured = "".join(output.get("text", "") for output in outputs[6])
    assert "label accuracy" in measured and "Fréchet distance" in measured
    assert TOKEN not in json.dumps(notebook)
