"""`python -m cluster doctor | up | down`: check this machine, and run a cluster on it."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cluster import doctor as checks
from cluster import local, processes
from cluster.cli import main

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Storage = Annotated[
    Path,
    typer.Option(
        envvar="RAYWARD_STORAGE",
        help="Where results, the tracking store and the cluster's logs live.",
        resolve_path=True,
    ),
]
STORAGE = Path(__file__).parent.parent / "results"
PORTS = local.Ports()


@app.command()
def doctor(storage: Storage = STORAGE) -> None:
    """Check versions, hardware, Java, memory, disk, ports, tokens and the hub; each problem with its remedy."""
    raise typer.Exit(checks.show(checks.run(storage)))


@app.command()
def up(
    storage: Storage = STORAGE,
    dashboard_port: Annotated[int, typer.Option(min=1, max=65535)] = PORTS.dashboard,
    ray_port: Annotated[int, typer.Option(min=1, max=65535)] = PORTS.ray,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = PORTS.mlflow,
    num_cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that Ray may schedule; all by default.")] = None,
) -> None:
    """Start a Ray head with its dashboard, and MLflow, on loopback; they run until `down`."""
    began = time.monotonic()
    running, started = local.up(storage, local.Ports(dashboard_port, ray_port, mlflow_port), num_cpus)
    print(f"Up after {time.monotonic() - began:.0f} s." if started else "Already up.")
    print(f"  Ray dashboard  {running.dashboard_uri}\n  MLflow         {running.mlflow_uri}")
    print(f"  Logs           {storage / 'cluster'}, {running.temp / 'session_latest' / 'logs'}")
    print("Submit a job from any shell, after the first line:")
    direct = ""
    if processes.proxied(os.environ):
        processes.spare_loopback(os.environ)
        direct = " " + " ".join(f"{name}={shlex.quote(os.environ[name])}" for name in processes.DIRECT)
    print(f"  {running.token.export()} RAY_API_SERVER_ADDRESS={running.dashboard_uri}{direct}")
    ray = shlex.quote(str(Path(sys.executable).parent / "ray"))
    print(f"  {ray} job submit --working-dir . -- python -m jobs.rule run --profile laptop")


@app.command()
def down(storage: Storage = STORAGE) -> None:
    """End what `up` started, and nothing else."""
    began = time.monotonic()
    ended = local.down(storage)
    print(f"Down after {time.monotonic() - began:.0f} s." if ended else f"Nothing is up under {storage}.")


if __name__ == "__main__":
    sys.exit(main(app))
