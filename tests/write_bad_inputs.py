"""Reads every case of bad_cases.py and writes docs/bad_inputs.md: python tests/write_bad_inputs.py"""

import tempfile
from pathlib import Path

import bad_cases

PAGE = Path(__file__).parents[1] / "docs" / "bad_inputs.md"

HEADER = """# Bad inputs

103 ways in which labelled images are wrong, or odd, and what comes of each: what `tests/bad_cases.py` builds, read as
`data.faults` "error" (strict, the default) and "skip" (lenient) read it. Written by `python tests/write_bad_inputs.py`
and held by `test_bad_cases.py`. `{root}` is the folder of the data.

| outcome | means |
|---|---|
| read | read; there is nothing to say |
| read, noted | read by a rule, and a sentence says how many and which was the first |
| error | one sentence, and no data set; the scripts exit with status 2 |
| image skipped | left out with its objects; a sentence says how many and which was the first |
| object skipped | left out; its image and the other objects stay |

Lenient reading decodes every image once, because a cut file is seen only then; strict reading comes upon it in the
epoch that meets it, and stops with the file's name. What is wrong with a set as a whole (no list, no json, an id that
leaves the folder, two images of one id) is an error in both, and so is a set of which faults leave nothing.
Of what is skipped the last column holds what strict reading says; lenient reading says "Faulty images were skipped" or
"Faulty objects were skipped", how many, and that sentence about the first.

In no case is a file outside the folder opened, an entity expanded, or more than 200 MB used.
`python -m fasterrcnn_jax check` lists everything of this kind that is in a set.

"""


def page(folders: dict[str, Path]) -> str:
    """Returns the text of the page; `folders` holds every case."""
    lines = ["| case | strict | lenient | what is said |", "|---|---|---|---|"]
    for name, folder in folders.items():
        strict, lenient = (bad_cases.outcome(folder, faults=faults) for faults in ("error", "skip"))
        assert strict[1].rstrip(".") in lenient[1]
        said = strict[1].replace(str(folder), "{root}").replace("|", "\\|")
        lines.append(f"| {name} | {strict[0]} | {lenient[0]} | {said} |")
    return HEADER + "\n".join(lines) + "\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root) / name / "set" for name in bad_cases.CASES}
        for name, folder in folders.items():
            bad_cases.build(name, folder)
        PAGE.write_text(page(folders))
    print(f"{PAGE}: {len(folders)} cases")


if __name__ == "__main__":
    main()
