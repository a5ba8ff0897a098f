"""Runs examples/folder_to_report.ipynb and stores it with its outputs.

    pip install -e '.[notebook]' && python tests/write_notebook.py

What differs between two runs on one machine is removed from the outputs: progress, times, speeds and paths.
"""

import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "folder_to_report.ipynb"
# A cell takes long on a machine that does much else.
SECONDS_OF_A_CELL = 3600
# Lines that a second run or another terminal would print in another way: bars, progress by time, times, speeds.
NOISE = re.compile(r".*%\|.*|(.*: )?\d+ of \d+ \w+(, .*)?\d\d:\d\d.*|(expected|took|speed) .*")
# Cursor movements and colours of a terminal.
CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
# IPython keeps the exit status of a command and goes on.
STRICT = """
def _strict(command, shell=get_ipython(), system=get_ipython().system):
    system(command)
    if shell.user_ns["_exit_code"]:
        raise RuntimeError(f"exit status {shell.user_ns['_exit_code']}: {command}")

get_ipython().system = _strict
"""


def executed(notebook: dict, folder: Path) -> dict:
    """Returns the notebook after its cells ran in an empty folder, with cleaned outputs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised, or a command of a cell failed.
    """
    import nbclient
    import nbformat

    ran = nbformat.from_dict(json.loads(json.dumps(notebook)))
    ran.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    environment = dict(os.environ)
    # The commands of a cell are those of this environment, as in an activated one.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    options = {"timeout": SECONDS_OF_A_CELL, "record_timing": False, "resources": {"metadata": {"path": str(folder)}}}
    nbclient.NotebookClient(ran, kernel_name="python3", **options).execute(env=environment)
    del ran.cells[0]
    return cleaned(json.loads(json.dumps(ran)), folder)


def cleaned(notebook: dict, folder: Path) -> dict:
    """Returns the notebook without what another run or another machine would change, and with a digest of its code."""
    number = 0
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] != "code":
            continue
        number += 1
        cell["execution_count"] = number
        text = CONTROL.sub("", _text(cell))
        others = [output for output in cell["outputs"] if output["output_type"] != "stream"]
        lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace(str(folder), ".").splitlines()]
        lines = [line for line in lines if line.strip() and not NOISE.fullmatch(line)]
        streams = [{"name": "stdout", "output_type": "stream", "text": "\n".join(lines) + "\n"}] if lines else []
        cell["outputs"] = streams + others
        for output in others:
            output["metadata"] = {}
            if "image/jpeg" in output.get("data", {}):
                output["data"].pop("image/png", None)  # the same image in ten times the bytes
            if "execution_count" in output:
                output["execution_count"] = number
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook["metadata"] = {
        "kernelspec": kernel,
        "language_info": {"name": "python"},
        "sha256_of_code": digest_of_code(notebook),
    }
    return notebook


def digest_of_code(notebook: dict) -> str:
    """Returns the SHA-256 of the code of all cells, which the stored outputs belong to."""
    code = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def structure(notebook: dict) -> list[list[str]]:
    """Returns the kinds of the outputs of each code cell, and the first words of their lines: no number of them.

    Which classes a detector finds depends on the rounding of the machine: a line of a detection is only that.
    """
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            kinds = [" ".join(sorted(output.get("data", [output["output_type"]]))) for output in cell["outputs"]]
            text = re.sub(r"^\w+ (?=\d\.\d+ \[)", "detection ", _text(cell), flags=re.MULTILINE)
            words = re.findall(r"^[a-z]\w+", text, re.MULTILINE)
            cells.append(kinds + sorted(set(words)))
    return cells


def _text(cell: dict) -> str:
    return "".join(output["text"] for output in cell["outputs"] if output["output_type"] == "stream")


def main() -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ran = executed(json.loads(NOTEBOOK.read_text()), Path(folder))
    NOTEBOOK.write_text(json.dumps(ran, indent=1, ensure_ascii=False) + "\n")
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size / 1e6:.2f} MB, ran in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
