"""examples/folder_to_report.ipynb: its stored outputs belong to its code, and it still runs and gives the same kinds.

`python tests/write_notebook.py` stores it again.
"""

import ast
import base64
import json
import re
import sys

import pytest
from write_notebook import NOTEBOOK, cleaned, digest_of_code, executed, structure

AGAIN = "run python tests/write_notebook.py"


@pytest.fixture(scope="module")
def stored():
    return json.loads(NOTEBOOK.read_text())


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def only_defines(source):
    """Returns whether a cell has imports and functions alone, and so no output."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a command of the shell
        return False
    return all(isinstance(one, ast.Import | ast.ImportFrom | ast.FunctionDef) for one in statements)


def test_the_stored_outputs_belong_to_the_code(stored):
    assert stored["metadata"].get("sha256_of_code") == digest_of_code(stored), AGAIN
    counts = [cell["execution_count"] for cell in code_cells(stored)]
    assert counts == list(range(1, len(counts) + 1)), AGAIN
    for cell in code_cells(stored):
        assert cell["outputs"] or only_defines(cell["source"]), f"this cell has no output; {AGAIN}:\n{cell['source']}"
        assert not any(output["output_type"] == "error" for output in cell["outputs"])


def test_it_goes_from_a_folder_to_a_report(stored):
    code = "\n".join(cell["source"] for cell in code_cells(stored))
    verbs = re.findall(r"^!fasterrcnn-jax (\w+)", code, re.MULTILINE)
    assert verbs == ["check", "train", "evaluate", "predict"] and "report.html" in code
    kinds = structure(stored)
    assert sum("image/jpeg text/plain" in cell for cell in kinds) >= 4
    assert any("checkpoint" in cell for cell in kinds) and any("detections" in cell for cell in kinds)


def test_it_is_small_and_names_no_machine(stored):
    assert NOTEBOOK.stat().st_size < 1_500_000
    text = NOTEBOOK.read_text()
    for output in (output for cell in code_cells(stored) for output in cell["outputs"]):
        for picture in (value for kind, value in output.get("data", {}).items() if kind == "image/jpeg"):
            text = text.replace(json.dumps(picture)[1:-1], "")
            assert base64.b64decode(picture).startswith(b"\xff\xd8")
    assert len(text) < 60_000
    for name in (
        sys.prefix,
        "/tmp/",
        "/home/",
        "/root/",
        str(NOTEBOOK.parents[1]),
        "site-packages",
        "steps, 0",
        "images/s",
    ):
        assert name not in text, name


def test_times_progress_and_paths_are_removed_from_outputs(tmp_path):
    lines = [
        "1 of 60 steps, 06:52",
        "  1%|▍       | 1/100 [00:04<…, 77.04s/step]\x1b[A",
        "comparing images: 84 of 120 images, 00:15",
        f"run        {tmp_path}/runs/shapes",
        "speed      8.5 images/s, with compilation",
        "images     6",
    ]
    stream = {"output_type": "stream", "name": "stderr", "text": "\n".join(lines)}
    cell = {"cell_type": "code", "source": "x", "metadata": {"a": 1}, "outputs": [stream], "execution_count": 7}
    (found,) = cleaned({"cells": [cell], "metadata": {}}, tmp_path)["cells"]
    assert found["outputs"][0]["text"] == "run        ./runs/shapes\nimages     6\n"
    assert found["execution_count"] == 1 and found["metadata"] == {}


def test_the_class_of_a_detection_is_no_kind_of_output():
    def printed(text):
        stream = {"output_type": "stream", "name": "stdout", "text": text}
        return structure({"cells": [{"cell_type": "code", "outputs": [stream]}]})

    assert printed("0.png 240 x 192\ncross 0.28 [8, 110, 101, 166]\n") == printed("1.png\ndisc 0.30 [1, 2, 3, 4]\n")
    assert printed("cross 0.28 [8, 110]\n") != printed("cross            48     0.132\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the Jupyter client
def test_it_runs_and_gives_the_stored_kinds_of_outputs(stored, tmp_path, monkeypatch):
    """Needs `pip install -e '.[notebook]'`. The folder is empty, so nothing comes from an earlier run."""
    pytest.importorskip("nbclient", reason="pip install -e '.[notebook]'")
    pytest.importorskip("ipykernel", reason="pip install -e '.[notebook]'")
    # Programs are compiled as for a user: conftest.py changes them for the suite.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    ran = executed(stored, tmp_path)
    assert structure(ran) == structure(stored), AGAIN


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_cell_that_raises_and_a_command_that_fails_are_errors(stored, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebook]'")
    pytest.importorskip("ipykernel", reason="pip install -e '.[notebook]'")
    for source, said in (("1 / 0", "ZeroDivisionError"), ("!exit 3", "exit status 3: exit 3")):
        broken = stored | {"cells": [code_cells(stored)[0] | {"source": source}]}
        with pytest.raises(nbclient.exceptions.CellExecutionError, match=said):
            executed(broken, tmp_path)
