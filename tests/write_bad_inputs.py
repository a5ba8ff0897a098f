"""Reads every case of bad_cases.py and writes docs/bad_inputs.md: python tests/write_bad_inputs.py"""

import tempfile
from pathlib import Path

import bad_cases

PAGE = Path(__file__).parents[1] / "docs" / "bad_inputs.md"

HEADER = """# Bad inputs

This page lists 128 ways in which labelled images are wrong or unusual, and what happens with each. *Strict* is
`data.faults` "error", the default; *lenient* is `data.faults` "skip". `tests/bad_cases.py` builds the cases,
`python tests/write_bad_inputs.py` writes this page, and `test_bad_cases.py` checks it. `{root}` is the folder of the
data.

| outcome | meaning |
|---|---|
| read | the data is read without a message |
| read, noted | the data is read by a rule; a sentence says how many cases there are and which is the first |
| error | the reader stops with one sentence; the scripts exit with status 2 |
| image skipped | the image is left out with its objects; a sentence says how many there are and which is the first |
| object skipped | the object is left out; its image and the other objects stay |

Lenient reading decodes every image once, because only decoding shows that a file is truncated. Strict reading finds
such a file in the epoch that reads it, and stops with its name. Faults of the whole data set are errors in both modes:
no list, no json, no categories, a name of two categories. It is also an error if the faults leave nothing to read. The
last column holds the message of strict reading. For a skipped image or object, lenient reading says "Faulty images were
skipped" or "Faulty objects were skipped", how many, and the same message about the first.

In no case does a reader open a file outside the folder, expand an entity, or use more than 200 MB.
`python -m fasterrcnn_jax check` lists everything of this kind in a data set.

"""


def page(folders: dict[str, Path]) -> str:
    """Returns the text of the page; `folders` holds every case."""
    lines = ["| case | strict | lenient | message |", "|---|---|---|---|"]
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
