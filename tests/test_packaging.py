"""The package as people get it: an uninstalled clone, an sdist, a wheel, an editable install.

All of it offline and out of a copy, so that the checkout under test stays as it is.
"""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fasterrcnn_jax
from fasterrcnn_jax import __main__ as entry

ROOT = Path(__file__).parents[1]

# Printed by a fresh interpreter: where the package and its kernels were found.
WHERE = "import fasterrcnn_jax, fasterrcnn_jax.kernels as k; print(fasterrcnn_jax.__file__); print(k.__file__)"
SHIPPED = {
    "fasterrcnn_jax/__main__.py",
    "fasterrcnn_jax/data/voc.py",
    "fasterrcnn_jax/kernels/__init__.py",
    "fasterrcnn_jax/configs/shapes.py",
    "fasterrcnn_jax/scripts/train.py",
    "fasterrcnn_jax/scripts/evaluate.py",
}


def run(*command, cwd, path=None):
    """Returns what a command prints; without network, and seeing `path` before what is installed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_package_and_kernels_lie_under(root, printed):
    package, kernels = (Path(line) for line in printed.split())
    assert package == root / "fasterrcnn_jax" / "__init__.py"
    assert kernels == root / "fasterrcnn_jax" / "kernels" / "__init__.py"
    assert kernels.resolve().is_relative_to(root.resolve())


def copy_clone(target):
    """Copies what a commit of everything would hold: files that git does not ignore, links as links."""
    if not (ROOT / ".git").exists():
        pytest.skip("this copy of the source is no git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def build(kind, source, target):
    """Returns the path of a built `sdist` or `wheel`; a jax that cannot be imported stands in the way."""
    poison = target / "poison"
    poison.mkdir(parents=True)
    (poison / "jax.py").write_text("raise RuntimeError('the build imports jax')\n")
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    run(sys.executable, "-c", code, cwd=source, path=poison)
    (built,) = (path for path in target.iterdir() if path.is_file())
    return built


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return copy_clone(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    # A clone of its own: what setuptools leaves in a source folder changes the next build there.
    source = copy_clone(tmp_path_factory.mktemp("sdist_source"))
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = copy_clone(tmp_path_factory.mktemp("wheel_source"))
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Returns a folder into which pip has installed the wheel."""
    target = tmp_path_factory.mktemp("installed")
    command = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel)
    run(*command, cwd=target)
    return target


def test_an_uninstalled_clone_uses_its_own_kernels(clone):
    assert_package_and_kernels_lie_under(clone, run(sys.executable, "-c", WHERE, cwd=clone))


def test_sdist_holds_kernels_configs_and_scripts_inside_the_package_only(sdist):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.split("/", 1)[1] for member in members if "/" in member.name}
    assert names >= SHIPPED | {"pyproject.toml", "LICENSE"}
    assert not {name.split("/")[0] for name in names} & {"kernels", "configs", "train.py", "evaluate.py"}


def test_wheel_holds_kernels_configs_and_scripts_inside_the_package_only(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= SHIPPED
    metadata = f"fasterrcnn_jax-{fasterrcnn_jax.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"fasterrcnn_jax", metadata}


def test_wheel_of_the_sdist_equals_the_wheel_of_the_clone(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build("wheel", source, tmp_path / "wheel")

    def contents(path):
        archive = zipfile.ZipFile(path)
        return {name: archive.read(name) for name in archive.namelist() if "dist-info" not in name}

    assert contents(again) == contents(wheel)


def test_installed_wheel_uses_its_own_kernels(installed, tmp_path):
    assert_package_and_kernels_lie_under(installed, run(sys.executable, "-c", WHERE, cwd=tmp_path, path=installed))


def test_installed_wheel_trains_with_a_shipped_config_from_anywhere(installed, tmp_path):
    command = ("-m", "fasterrcnn_jax", "train", "--config", "configs/shapes.py", "--help")
    shown = run(sys.executable, *command, cwd=tmp_path, path=installed)
    assert "--train.learning_rate" in shown
    assert str(installed / "fasterrcnn_jax") in "".join(shown.split()).replace("│", "")


def test_installed_command_runs_a_verb(installed, tmp_path):
    shown = run(installed / "bin" / "fasterrcnn-jax", "evaluate", "--help", cwd=tmp_path, path=installed)
    assert shown.startswith("usage: fasterrcnn-jax evaluate")
    assert "--ckpt" in shown


def test_editable_install_uses_the_kernels_of_its_clone(clone, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    # The new environment sees the dependencies of this one, which its own base need not have.
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    here = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (Path(purelib) / "here.pth").write_text("\n".join(sorted(here)) + "\n")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--editable")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, clone, cwd=tmp_path)
    assert_package_and_kernels_lie_under(clone, run(python, "-c", WHERE, cwd=tmp_path))


def test_kernels_import_jax_and_nothing_of_ours():
    allowed = {"jax", "numpy"} | sys.stdlib_module_names
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            beyond = [
                name
                for name in names
                if name.split(".")[0] not in allowed and not name.startswith("fasterrcnn_jax.kernels")
            ]
            assert not beyond, f"{path}:{node.lineno} imports {beyond}"


@pytest.mark.parametrize(("argv", "problem"), [([], ""), (["tran"], "unknown verb 'tran'")])
def test_no_verb_and_an_unknown_verb_show_the_verbs(argv, problem, capsys):
    assert entry.main(argv) == 2
    shown = capsys.readouterr().err
    assert all(verb in shown for verb in entry.VERBS)
    assert problem in shown


def test_help_shows_every_verb_with_its_meaning(capsys):
    assert entry.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown and meaning in shown for verb, meaning in entry.VERBS.items())


def test_every_verb_is_a_script_and_those_at_the_top_are_these_files():
    folder = ROOT / "fasterrcnn_jax" / "scripts"
    assert {path.stem for path in folder.glob("*.py")} == set(entry.VERBS)
    for verb in ("train", "evaluate"):
        assert (folder / f"{verb}.py").resolve() == ROOT / f"{verb}.py"
