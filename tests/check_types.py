"""Checks the types of the package with pyright: python tests/check_types.py

pyright finds modules as files. In a source tree `kernels/`, `configs/`, `train.py` and `evaluate.py` lie where no
import names them (`fasterrcnn_jax/_source_tree.py`), so what is checked is the wheel: a copy of every file that git
does not ignore is built in a temporary folder. Users' scripts are checked beside it: the examples, and
tests/typed_user.py, which states the types of the public names. The configuration is the one in pyproject.toml.
Arguments are passed on to pyright. Findings are printed with the paths of the source tree, and the exit status is
pyright's.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Inside the wheel, and in the source tree.
HOMES = {
    "fasterrcnn_jax/configs/": "configs/",
    "fasterrcnn_jax/kernels/": "kernels/",
    "fasterrcnn_jax/scripts/evaluate.py": "evaluate.py",
    "fasterrcnn_jax/scripts/train.py": "train.py",
}
# Users' scripts: beside the wheel, and in the source tree.
USERS = {"examples": "examples", "typed_user.py": "tests/typed_user.py"}


def copy_tree(target: Path) -> None:
    """Copies what a commit of everything would hold: what is checked is what lies here now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def build(source: Path, target: Path) -> None:
    """Builds the wheel of `source` offline, with the setuptools of this environment, and unpacks it into `target`."""
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    subprocess.run([*command, "--wheel-dir", source / "wheel", source], check=True)
    (wheel,) = (source / "wheel").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    shutil.copy2(source / "pyproject.toml", target)
    for name, home in USERS.items():
        if (source / home).is_dir():
            shutil.copytree(source / home, target / name)
        else:
            shutil.copy2(source / home, target / name)


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        # Without links: pyright prints the real path.
        source, built = (Path(folder).resolve() / name for name in ("source", "built"))
        copy_tree(source)
        build(source, built)
        checked = subprocess.run(
            [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *arguments],
            cwd=built,
            # Otherwise it says, asked or not, that there is a newer version.
            env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        shown = checked.stdout.replace(f"{built}{os.sep}", "")
    for inside, home in (HOMES | USERS).items():
        shown = shown.replace(inside, home)
    print(shown, end="")
    return checked.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
