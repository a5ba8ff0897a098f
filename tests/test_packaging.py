"""The package as people get it: a source tree, an sdist, a wheel, an editable install, a zip, a clone on Windows.

Everything runs offline on a copy, so the checkout under test stays as it is.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import check_types
import pytest
from fasterrcnn_jax.kernels import choice

import fasterrcnn_jax
from fasterrcnn_jax import __main__ as entry

ROOT = Path(__file__).parents[1]

# Printed by a fresh interpreter: where the package, its kernels and its configurations were found.
WHERE = """
import fasterrcnn_jax, fasterrcnn_jax.kernels.nms as kernel
from fasterrcnn_jax import configs
from pathlib import Path
print(fasterrcnn_jax.__file__)
print(kernel.__file__)
print(*sorted(path.name for path in Path(configs.__file__).parent.glob("[!_]*.py")))
"""
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("[!_]*.py"))
SHIPPED = {
    "fasterrcnn_jax/__main__.py",
    "fasterrcnn_jax/py.typed",
    "fasterrcnn_jax/data/voc.py",
    "fasterrcnn_jax/kernels/__init__.py",
    "fasterrcnn_jax/kernels/nms.py",
    "fasterrcnn_jax/report/page/base.html",
    "fasterrcnn_jax/report/page/page.css",
    "fasterrcnn_jax/report/page/page.js",
    "fasterrcnn_jax/configs/shapes.py",
    "fasterrcnn_jax/scripts/train.py",
    "fasterrcnn_jax/scripts/evaluate.py",
}
# pip builds with the setuptools of this environment: the tests have no network.
PIP = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--quiet")


def run(*command, cwd, path=None):
    """Returns what a command prints; without network, and seeing `path` before what is installed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_works(folder, *, cwd, package, kernels, python=sys.executable):
    """Asserts that a fresh interpreter imports the package, lists its configurations, and runs `train --help`.

    Args:
      folder: searched for modules before what is installed; None where `python` has the package installed.
      package, kernels: the folders that the package and its kernels must come from.
    """
    found, kernel, configs = run(python, "-c", WHERE, cwd=cwd, path=folder).splitlines()
    assert Path(found) == package / "__init__.py"
    assert Path(kernel) == kernels / "nms.py"
    assert configs.split() == CONFIGS
    shown = run(python, "-m", "fasterrcnn_jax", "train", "--help", cwd=cwd, path=folder)
    assert "--train.learning_rate" in shown


def copy_clone(target):
    """Copies what a commit of everything would hold."""
    if not (ROOT / ".git").exists():
        pytest.skip("this copy of the source is no git checkout")
    check_types.copy_tree(target)
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


def assert_installs(source, tmp_path):
    """Installs `source` into an empty folder with pip and asserts that the package works from there."""
    target = tmp_path / "installed"
    run(*PIP, "--target", target, source, cwd=tmp_path)
    package = target / "fasterrcnn_jax"
    assert_works(target, cwd=tmp_path, package=package, kernels=package / "kernels")
    return target


def test_the_tree_holds_no_symbolic_links():
    if not (ROOT / ".git").exists():
        pytest.skip("this copy of the source is no git checkout")
    assert not [line for line in run("git", "ls-files", "-s", cwd=ROOT).splitlines() if line.startswith("120000")]


def test_a_source_tree_works_without_an_installation(clone):
    assert_works(clone, cwd=clone, package=clone / "fasterrcnn_jax", kernels=clone / "kernels")
    assert "--train.learning_rate" in run(sys.executable, "train.py", "--help", cwd=clone)


def test_a_source_tree_uses_its_own_kernels_where_another_one_is_installed(clone, tmp_path):
    """An editable install of another tree has a finder that knows `fasterrcnn_jax.kernels` as well."""
    other = copy_clone(tmp_path / "other")
    folder = tmp_path / "installed"
    run(*PIP, "--target", folder, "--editable", other, cwd=tmp_path)
    # Files ending in .pth are read in site folders only.
    code = f"import site; site.addsitedir({str(folder)!r})\n{WHERE}"
    found, kernel, _ = run(sys.executable, "-c", code, cwd=clone).splitlines()
    assert Path(found) == clone / "fasterrcnn_jax" / "__init__.py"
    assert Path(kernel) == clone / "kernels" / "nms.py"


def test_an_installed_wheel_works_from_any_folder(wheel, tmp_path):
    target = assert_installs(wheel, tmp_path)
    shown = run(target / "bin" / "fasterrcnn-jax", "evaluate", "--help", cwd=tmp_path, path=target)
    assert shown.startswith("usage: fasterrcnn-jax evaluate")
    assert "--ckpt" in shown


def test_an_installed_sdist_works_from_any_folder(sdist, tmp_path):
    assert_installs(sdist, tmp_path)


def test_a_zip_of_the_repository_installs(clone, tmp_path):
    """As a code host's download button gives it: one folder, no links, no git."""
    archive = tmp_path / "fasterrcnn_jax-main.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(path for path in clone.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            file.writestr(str(Path("fasterrcnn_jax-main") / path.relative_to(clone)), path.read_bytes())
    assert_installs(archive, tmp_path)


def test_a_clone_without_symbolic_links_installs(tmp_path):
    """`core.symlinks=false` is git's default on Windows."""
    source = copy_clone(tmp_path / "source")
    names = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    run("git", "init", "--quiet", cwd=source)
    run("git", "add", "--all", cwd=source)
    run("git", *names, "commit", "--quiet", "--message", "all", cwd=source)
    run("git", "clone", "--quiet", "--config", "core.symlinks=false", source, tmp_path / "clone", cwd=tmp_path)
    assert_installs(tmp_path / "clone", tmp_path)


def test_an_editable_install_uses_its_source_tree(tmp_path):
    source = copy_clone(tmp_path / "source")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    # The new environment sees the dependencies of this one, which its own base need not have.
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    here = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (Path(purelib) / "here.pth").write_text("\n".join(sorted(here)) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, *PIP[3:])
    run(*pip, "--ignore-installed", "--editable", source, cwd=tmp_path)
    package, kernels = source / "fasterrcnn_jax", source / "kernels"
    assert_works(None, cwd=tmp_path, package=package, kernels=kernels, python=python)


def test_archives_hold_nothing_beside_the_package(sdist, wheel):
    """Installed as `kernels` or `train`, they would take these names from everybody else."""
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert {member.name.split("/", 1)[1] for member in members if "/" in member.name} >= {"pyproject.toml", "LICENSE"}
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


def test_every_folder_with_modules_is_packaged():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fasterrcnn_jax").rglob("*.py")}
    inside = {".".join(folder.parts) for folder in folders}
    assert packages == inside | {"fasterrcnn_jax.configs", "fasterrcnn_jax.kernels"}


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


def test_every_verb_is_a_script():
    scripts = {path.stem for path in (ROOT / "fasterrcnn_jax" / "scripts").glob("[!_]*.py")} - {"cli"}
    assert scripts | {"train", "evaluate"} == set(entry.VERBS)


def test_the_gpu_extras_ask_for_the_jax_that_the_kernels_need():
    """Where it exists: with Python 3.12 or newer. The page says so."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    oldest = ".".join(map(str, choice.OLDEST_JAX))
    for name in ("cuda12", "cuda13"):
        assert extras[name] == [
            f"jax[{name}]>={oldest}; python_version >= '3.12'",
            f"jax[{name}]; python_version < '3.12'",
        ]
    assert "take Python 3.12 or 3.13 and install `'.[cuda12]'`" in (ROOT / "README.md").read_text()
