"""Ships train.py and evaluate.py inside the package; everything else about the build is in pyproject.toml.

At the top of a repository they are the scripts that a reader looks for. Installed under those names they would
block other packages named `train`, so a wheel holds them as `fasterrcnn_jax.scripts.train` and `.evaluate`.
"""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithScripts(build_py):
    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        if package == "fasterrcnn_jax.scripts":
            modules += [(package, name, f"{name}.py") for name in ("train", "evaluate")]
        return modules


setup(cmdclass={"build_py": BuildWithScripts})
