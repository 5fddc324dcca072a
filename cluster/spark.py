"""Spark for the length of a `with`: on this machine, or on a cluster that `master` names. Importing starts nothing."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import datasets, doctor, processes
from cluster.errors import JobFailure, UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from py4j.java_gateway import JavaGateway
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
EXECUTOR_DEADLINE_S = 120
END_DEADLINE_S = 20  # for Spark's Java process, once it was told to end
_QUIET = """rootLogger.level = error
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
appender.stderr.target = SYSTEM_ERR
appender.stderr.layout.type = PatternLayout
appender.stderr.layout.pattern = spark: %p %c{1}: %m%n
logger.shell.name = org.apache.spark.api.python.PythonGatewayServer
logger.shell.level = error
logger.task.name = org.apache.spark.executor.Executor
logger.task.level = off
logger.context.name = org.apache.spark.TaskContextImpl
logger.context.level = off
logger.stage.name = org.apache.spark.scheduler.TaskSetManager
logger.stage.level = off
"""
# Without Java's second compiler a short job takes half the processor time (18 s against 34 s), and the work of a long
# one is done in Python.
_JAVA = "-XX:TieredStopAtLevel=1"
_OURS = re.compile(r"cluster\.errors\.(UserError|JobFailure): (.+)")
_CAUSE = re.compile(r"^(?:Caused by: )?([\w.$]+(?:Exception|Error)): (.+)$", re.MULTILINE)


@contextmanager
def session(name: str, cores: int, master: str | None = None) -> Iterator[SparkSession]:
    """A Spark session that ends with the block, its Java process included, also on Ctrl-C and SIGTERM.

    On this machine it listens on loopback only, and has no web page. It takes about 10 s to start.

    Args:
        name: shown by a Spark cluster's own pages.
        cores: of this machine, at least 1.
        master: a cluster's address such as spark://HOST:7077, which must see the same files and have this project
            installed; None is this machine.

    Raises:
        UserError: no Java that Spark runs on, no cluster at `master` or none that has room, or another session is open
            in this process.
        JobFailure: a Spark job in the block failed; told by its root cause. Errors of this project that were raised
            in Spark's workers come back as they are.
    """
    java = doctor.java(os.environ)
    if java.state != "ok":
        raise UserError(
            f"Spark needs Java 17 or 21, and here is {java.found}; install Java 17 (on Debian and Ubuntu: apt install "
            "openjdk-17-jre-headless), or set JAVA_HOME to where one is"
        )
    if master is not None and master.startswith("spark://"):
        # Spark itself would try for a minute, and not say why
        silent = [processes.silence_of(address) for address in master.removeprefix("spark://").split(",")]
        if all(silent):
            raise UserError(
                f"no Spark answers at cluster.spark_master = {master} ({silent[0]}); start it, or mend the key"
            )
    with ExitStack() as stack:
        # pyspark says at every import that it was not tried with this pandas
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="PySpark does not yet fully support pandas")
        from pyspark import SparkContext
        from pyspark.sql import SparkSession

        if SparkContext._active_spark_context is not None:
            raise UserError(f"a Spark session is open already in this process; end it before {name} starts its own")
        stack.enter_context(_interrupts())
        logging.getLogger().addFilter(_no_bridge)
        stack.callback(logging.getLogger().removeFilter, _no_bridge)
        python = sys.executable if master is None else os.environ.get("PYSPARK_PYTHON", sys.executable)
        local = {"SPARK_LOCAL_IP": processes.LOOPBACK} if master is None else {}
        stack.enter_context(_variables({"PYSPARK_PYTHON": python, **local}))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spark-", ignore_cleanup_errors=True)))
        builder = SparkSession.builder.appName(name).master(master or f"local[{cores}]")
        for key, value in _settings(scratch, cores, master is None).items():
            builder = builder.config(key, value)
        stack.callback(_end)
        with _failures():
            started = builder.getOrCreate()
            if master is not None:
                _require_executor(started, master)
            yield started


def _require_executor(session: SparkSession, master: str) -> None:
    """Spark itself waits in silence where all cores are taken, or where its workers do not reach this machine."""
    deadline = time.monotonic() + EXECUTOR_DEADLINE_S
    while session.sparkContext._jsc.sc().getExecutorMemoryStatus().size() < 2:  # the driver is one
        if time.monotonic() > deadline:
            raise UserError(
                f"no worker of the Spark at {master} took this job within {EXECUTOR_DEADLINE_S} s: its cores may be "
                "taken, or its workers do not reach this machine; free some, or see the master's page"
            )
        time.sleep(0.2)


def local(path: Path) -> str:
    """A path as Spark takes it for one of the file system, whatever its Hadoop configuration names."""
    return f"file://{path.resolve()}"


def save(
    frame: DataFrame, folder: Path, configuration: Mapping, shards: int, order: Sequence[str]
) -> datasets.Manifest:
    """Writes a frame as a data set (`cluster.datasets`), in place of an earlier one.

    Args:
        folder: seen by all workers.
        configuration: what decides the content, as JSON.
        shards: at most so many files, each of which fits into a worker's memory; an empty one is left out.
        order: the columns that all rows are ordered by; shards hold ranges of the first.

    Raises:
        UserError: the folder holds shards of which it is not known what made them.
        JobFailure: a shard could not be written.
    """
    datasets.clear(folder)
    datasets.prepare(folder, configuration)

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import pyarrow as pa
        from pyspark import TaskContext

        rows = list(batches)
        if any(map(len, rows)):
            index = TaskContext.get().partitionId()
            datasets.write_shard(folder, index, pa.Table.from_batches(rows))
            yield pa.RecordBatch.from_pydict({"shard": [index]})

    ordered = frame.repartitionByRange(shards, order[0]).sortWithinPartitions(*order)
    written = ordered.mapInArrow(write, "shard long").collect()
    return datasets.finish(folder, configuration, [row.shard for row in written])


def _settings(scratch: Path, cores: int, here: bool) -> dict[str, str]:
    quiet = scratch / "log4j2.properties"
    quiet.write_text(_QUIET, encoding="utf-8")
    common = {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": str(sys.stderr.isatty()).lower(),
        "spark.local.dir": str(scratch),
        "spark.sql.warehouse.dir": str(scratch / "warehouse"),
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        # its temporary files go with ours, also where it is killed
        "spark.driver.extraJavaOptions": (
            f'{_JAVA} "-Djava.io.tmpdir={scratch}" -Dlog4j2.configurationFile={quiet.as_uri()}'
        ),
        # functions of this project are sent by name
        "spark.executorEnv.PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    alone = {"spark.driver.bindAddress": processes.LOOPBACK, "spark.driver.host": processes.LOOPBACK}
    alone["spark.sql.shuffle.partitions"] = str(max(4, 2 * cores))
    # where the cluster gives executors as they are needed, one to see that it has room at all
    elsewhere = {"spark.dynamicAllocation.minExecutors": "1"}
    return common | (alone if here else elsewhere)


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _interrupts() -> Iterator[None]:
    """Puts back the handling of Ctrl-C, which pyspark replaces for good."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _no_bridge(record: logging.LogRecord) -> bool:
    """Leaves out the traces that py4j writes to the root logger on Ctrl-C and where Java ends, both told by errors."""
    return "py4j" not in record.pathname


@contextmanager
def _failures() -> Iterator[None]:
    """Tells a Spark failure by its root cause."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (Py4JError, PySparkException, ConnectionError) as error:
        status = _java_status()
        if status is not None:
            raise JobFailure(
                f"Spark's Java process has ended with status {status}, perhaps for want of memory; free some and run "
                "the same command again to continue"
            ) from None
        if isinstance(error, ConnectionError):
            raise
        message = str(error)
        logger.debug("Spark's own words: %s", message)
        # not `from error`: its text comes from the Java process, which has ended when somebody asks for it
        raise told(message) from None


def _java_status() -> int | None:
    """The exit status of Spark's Java process, None while it runs."""
    from pyspark import SparkContext

    process = SparkContext._gateway and SparkContext._gateway.proc
    try:
        return process.wait(1) if process else None
    except subprocess.TimeoutExpired:
        return None


def told(message: str) -> UserError | JobFailure:
    """The error that a message of Spark, with its Python and Java traces, stands for."""
    ours = _OURS.findall(message)
    if ours:
        kind, sentence = ours[-1]
        return (UserError if kind == "UserError" else JobFailure)(sentence.strip())
    causes = _CAUSE.findall(message)
    lines = message.strip().splitlines() or ["an unknown error"]
    return JobFailure(f"Spark failed: {': '.join(causes[-1]) if causes else lines[0]}")


def _end() -> None:
    """Stops the session and ends the Java process, which would else keep its memory until Python ends."""
    from py4j.protocol import Py4JError
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    open_one = SparkSession._instantiatedSession or SparkContext._active_spark_context
    gateway = SparkContext._gateway
    try:
        if open_one is not None:
            open_one.stop()
    except (Py4JError, OSError):
        # a Java process that died can be told nothing; what it died of is told by what it was doing
        SparkContext._active_spark_context = None
    finally:
        SparkContext._gateway = SparkContext._jvm = None
        SparkSession._instantiatedSession = None
        if gateway is not None:
            _end_java(gateway)


def _end_java(gateway: JavaGateway) -> None:
    gateway.shutdown()
    process = gateway.proc
    if process is None:
        return
    process.stdin.close()
    try:
        process.wait(END_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
