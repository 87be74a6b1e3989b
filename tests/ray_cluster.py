"""A Ray cluster of several nodes on this machine, each with a raylet of its own. Only where Ray is installed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from tuneproof.demo import free_port

ROOT = Path(__file__).parents[1]
_STORE_BYTES = 150 << 20


@contextlib.contextmanager
def ray_cluster(
    nodes: int = 2, cpus: float = 2, env: Mapping[str, str] | None = None, port: int | None = None
) -> Iterator[tuple[str, Any]]:
    """The head's address and the `Cluster`: a head without cores, and beside it nodes with `cpus` cores each.

    Nothing runs on the head but what Ray itself keeps there, so any other node may be lost. `env` is what processes on
    the nodes are given beside this process's own variables; nodes that a test adds inside the block have it too.
    """
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-")  # short: a socket's path has at most 107 characters
    given = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "OMP_NUM_THREADS": "1",
        # Of Ray's own: a lost node is noticed within seconds, and no worker is started before it is asked for.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else 127.0.0.1 is taken for the machine's other address
        "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3", "RAY_enable_worker_prestart": "0",
    } | dict(env or {})  # fmt: skip
    loopback = mock.patch("ray._private.ray_constants.ENABLE_RAY_CLUSTER", new=False)
    with mock.patch.dict(os.environ, given), loopback, contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        Path(folder, "ray").mkdir()  # where a `Cluster` writes its address, if the folder is there
        cluster = Cluster()
        stack.callback(cluster.shutdown)
        add_node(cluster, 0, gcs_server_port=port or free_port())
        for _ in range(nodes):
            add_node(cluster, cpus)
        yield cluster.address, cluster


def add_node(cluster: Any, cpus: float = 2, **more: Any) -> Any:
    """One more node; `cluster.remove_node(node, allow_graceful=False)` is a machine that is lost."""
    common = {"node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    return cluster.add_node(num_cpus=cpus, **common, **more)
