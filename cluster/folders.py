"""Folders that are there whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A folder to fill, which stands at `target` after the block, or nowhere where the block fails.

    Raises:
        OSError: `target` holds something by then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sweep(target: Path) -> None:
    """Removes what killed processes had filled of `target`."""
    for partial in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(partial, ignore_errors=True)
