"""This job's connection to Ray: a running cluster, or a private one on this machine that ends with the job."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from cluster import processes
from cluster.config import Config, TrainingConfig
from cluster.errors import JobFailure, UserError

# Ray redirects print() in training workers, which breaks dill's use of dis inside `datasets` (thousands of log lines).
# Threads that spin while they wait cost a factor of ten as soon as anything else runs on the cores.
# oneDNN keeps a kernel for each of the last 1024 shapes, and rows and batches are of ever new ones: GiB in bfloat16.
# A trial of Ray Tune stays in the folder of its driver, where relative paths mean what they say.
WORKER_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "GOMP_SPINCOUNT": "10000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
CONTROL_PORT = "RAY_GCS_SERVER_PORT"
PREEMPTION = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "RAYWARD_CACHE", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")


def prepare(config: Config) -> None:
    """Sets this process's environment for Ray; called before anything imports it, for it reads some then.

    Raises:
        UserError: nothing listens at the cluster's address; or this machine's own Ray would be too small, or could
            start no worker.
    """
    os.environ.update(WORKER_ENVIRONMENT)
    processes.spare_loopback(os.environ)
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"  # a submitted job may have set what is passed on here
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = _address(config)
    if address is not None:
        _require_listener(address)
    else:
        processes.require_startable()
        section, number, cpus, _ = config.workers
        given = config.cluster.num_cpus
        if given is not None and given < number * cpus:
            raise UserError(
                f"cluster.num_cpus = {given}, but {section}.num_workers x {section}.cpus_per_worker takes "
                f"{number * cpus}; raise the first or lower the others"
            )
        # With 0 a Ray of one machine stays on the loopback address, else its control ports listen on every interface.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def connected(config: Config) -> Iterator[None]:
    """Ray for the time of a job; where this process has a Ray already, as in a trial of Ray Tune, that one.

    The address is `cluster.address`, or RAY_ADDRESS, as it is set inside a submitted job; with neither, a cluster is
    started on this machine, bound to loopback and guarded by a token of its own, and ended with the job.

    Raises:
        UserError: no cluster answers at the address, or it cannot place the training workers.
    """
    address = _address(config)
    environment = WORKER_ENVIRONMENT | {name: os.environ[name] for name in PASSED_ON if name in os.environ}

    import joblib
    import ray

    if ray.is_initialized():
        _require_room(config)
        yield
        return
    demanded, given = config.workers.number * config.workers.cpus, os.environ.get(CONTROL_PORT)
    options = {"runtime_env": {"env_vars": environment}, "log_to_driver": True, "configure_logging": False}
    # Ray Train's cleaner of placement groups asks the State API, which finds its Ray by these; another one may be near.
    environment["RAY_API_SERVER_ADDRESS"] = ""
    with _folder(config, address) as folder:
        if address is None:
            # Nobody takes back a node of this Ray; the actor that would look out for it takes seconds of every stage.
            environment[PREEMPTION] = "0"
            cpus = config.cluster.num_cpus or max(joblib.cpu_count(), demanded)  # a container's limit counts
            options |= {"num_cpus": cpus, "_node_ip_address": "127.0.0.1", "dashboard_host": "127.0.0.1"}
            # The usual port is left to `make up`; without a dashboard Ray Tune would hang.
            options |= {"dashboard_port": processes.free_port()}
            options |= {} if folder is None else {"_temp_dir": str(folder)}
            os.environ[CONTROL_PORT] = given or str(processes.free_port(options["dashboard_port"]))
            environment["RAY_ADDRESS"] = f"127.0.0.1:{os.environ[CONTROL_PORT]}"
        elif not address.startswith("ray://"):
            environment["RAY_ADDRESS"] = address
        try:
            try:
                _join(address, options, environment)
            finally:
                if given is None:
                    os.environ.pop(CONTROL_PORT, None)
            processes.leave_on_sigterm()
            _require_room(config)
            yield
        finally:
            ray.shutdown()


def _join(address: str | None, options: dict, environment: dict[str, str]) -> None:
    """Starts or joins Ray; `environment` is that of its workers, and gets the address in full."""
    import ray
    from ray._private.services import canonicalize_bootstrap_address_or_die  # 2.60 has no public call for it
    from ray.exceptions import AuthenticationError

    try:
        if environment.get("RAY_ADDRESS") == "auto":
            environment["RAY_ADDRESS"] = canonicalize_bootstrap_address_or_die("auto")
        started = ray.init(address=address or "local", **options)
    except AuthenticationError as error:
        raise UserError(
            f"the Ray cluster at {address} wants its token: {str(error).splitlines()[0]}; set RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH, as `make up` says"
        ) from None
    except (ConnectionError, ValueError) as error:
        if address is None:
            raise JobFailure(f"no Ray could be started on this machine: {str(error).splitlines()[0]}") from None
        raise UserError(
            f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}; start one with `make up`"
        ) from None
    except RuntimeError as error:
        if address is None:
            raise
        raise UserError(
            f"this process cannot join the Ray cluster at {address}: {' '.join(str(error).split())}; run it on a node "
            "of the cluster with its Ray and Python, or hand it over by `ray job submit`"
        ) from None
    if address is None and not started.dashboard_url:
        raise JobFailure(
            f"Ray's dashboard did not start at port {options['dashboard_port']}, and without it a search would wait "
            "for ever; run the same command again"
        )


@contextmanager
def _folder(config: Config, address: str | None) -> Iterator[Path | None]:
    """Where a Ray of the job's own keeps its files, removed with it; after a failure its logs are kept in storage."""
    folder = processes.ray_folder() if address is None else None
    logs = None
    try:
        yield folder
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:
        logs = storage(config) / "ray-logs"
        raise
    finally:
        if folder is not None:
            processes.forget_ray_folder(folder, logs)


def on_worker(function, config: TrainingConfig, *arguments, seconds: float):
    """`function(*arguments)` in a Ray task that has what a training worker has.

    Its process stays for the next task, which is spared the imports, except where it would keep the memory of a GPU or
    of vLLM.

    Raises:
        JobFailure: it took longer than `seconds`, or its process died.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayTaskError, WorkerCrashedError

    from cluster.generation import chosen_engine

    train = config.train
    keeps_memory = train.gpus_per_worker or chosen_engine(config.generation, train) == "vllm"
    # "DEFAULT": a trial of Ray Tune would place it in its own group, which has no room for it
    task = ray.remote(
        num_cpus=train.cpus_per_worker,
        num_gpus=train.gpus_per_worker,
        max_calls=1 if keeps_memory else 0,
        max_retries=1,
        scheduling_strategy="DEFAULT",
    )(function)
    reference = task.remote(*arguments)
    try:
        return ray.get(reference, timeout=seconds)
    except GetTimeoutError:
        ray.cancel(reference, force=True)
        raise JobFailure(f"the driver waited {seconds:.0f} s for {function.__name__}, which did not end") from None
    except WorkerCrashedError as error:
        raise JobFailure(f"the process of {function.__name__} died: {str(error).splitlines()[0]}") from None
    except RayTaskError as error:
        raise error.as_instanceof_cause() from None


def _address(config: Config) -> str | None:
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


def _require_listener(address: str) -> None:
    """Ray itself would try a dead address for minutes."""
    why = processes.silence_of(address.removeprefix("ray://"))
    if why is not None:
        raise UserError(
            f"no Ray cluster answers at {address} ({why}); start one with `make up`, or mend cluster.address or "
            "RAY_ADDRESS"
        )


def storage(config: Config) -> Path:
    """The absolute folder of all results."""
    return Path(config.cluster.storage).expanduser().resolve()


def has_other_nodes(config: Config) -> bool:
    """Whether a job may meet other nodes than this one: on a cluster that runs already, unless it is loopback's."""
    address = _address(config)
    if address is None:
        return False
    host = urlsplit(address if "//" in address else f"//{address}").hostname
    return host not in processes.THIS_MACHINE


def places(cpus: float, gpus: float) -> int:
    """How many workers of so many CPUs and GPUs the nodes of the connected cluster hold; none spans two of them."""
    import ray

    found = 0
    for node in (node["Resources"] for node in ray.nodes() if node["Alive"]):
        # in ten-thousandths, as Ray counts: 1.0 // 0.2 is 4
        wanted = {name: round(amount * 10_000) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
        found += min(round(node.get(name, 0) * 10_000) // amount for name, amount in wanted.items())
    return found


def _require_room(config: Config) -> None:
    import ray

    section, number, cpus, gpus = config.workers
    total = ray.cluster_resources()
    for resource, each in (("CPU", cpus), ("GPU", gpus)):
        demanded, present = number * each, total.get(resource, 0)
        if demanded > present:
            raise UserError(
                f"{section}.num_workers = {number} x {each:g} {resource} needs {demanded:g} {resource}, "
                f"but the cluster has {present:g}; lower {section}.num_workers or add nodes"
            )
    room = places(cpus, gpus)
    if isinstance(config, TrainingConfig) and room < number:  # other jobs place their tasks and actors apart
        each = f"{cpus:g} CPU" + f" and {gpus:g} GPU" * bool(gpus)
        raise UserError(
            f"{section}.num_workers = {number} workers, each of {each} on one node, do not fit: the cluster's nodes "
            f"hold {room}; lower {section}.num_workers or what each takes, or add nodes"
        )
