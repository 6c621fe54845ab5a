"""Sweeps on a Ray cluster of two workers on this machine: the same results, also if a worker dies."""

import contextlib
import os
import signal
import socket
import sys
import threading

import pytest
from sweeping import figures, lines, make_study, run_sweep

from torchlamp.sweep import ray_engine
from torchlamp.sweep.folder import open_folder
from torchlamp.sweep.points import Point
from torchlamp.sweep.ray_engine import check_address
from torchlamp.sweep.ray_points import MAX_ATTEMPTS, Queue, RayEngine
from torchlamp.sweep.run import sweep

STUDY = """
models: MODEL
texts: FOX
windows: 2
window_length: 24
threads: 1
accumulate: [ps2, ps3]
tokens: [real, shuffled]
rules: [none, "random:0.2", {name: strict, thresholds: [0.1], }]
grids:
- name: thresholds
- rules: {name: strict, target_rates: [0.1]}
"""


def points(number: int, text: str) -> list[Point]:
    return [Point("m", text, "real", 1, 8, f"ps{n + 1}+none", None, 0) for n in range(number)]


def test_workers_stay_with_their_group():
    a, b = points(4, "a"), points(2, "b")
    queue = Queue([*a, *b])
    assert [queue.next(0), queue.next(1), queue.next(0), queue.next(1)] == [a[0], b[0], a[1], b[1]]
    # The second worker helps with what is left.
    assert [queue.next(1), queue.next(0), queue.next(0), queue.next(1)] == [a[2], a[3], None, None]
    queue.put_back(b[0])
    assert queue.next(0) == b[0]
    assert queue.next(0) is None


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one processor each, on this machine."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'torchlamp[ray]'")
    from ray.cluster_utils import Cluster

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=node)
    nodes.add_node(num_cpus=1)
    ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
    assert len([n for n in ray.nodes() if n["Alive"]]) == 2
    yield ray
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("local")
    config = make_study(folder, tiny_folder, STUDY)
    run_sweep(config, folder / "out")
    return config, figures(folder / "out")


def test_the_results_are_those_of_the_local_engine(cluster, local, tmp_path):
    config, expected = local
    with open_folder(tmp_path / "out") as folder:
        summary = sweep(config, folder, RayEngine(config, workers=2))
    assert (summary.done, summary.failed) == (16, 0)
    assert figures(tmp_path / "out") == expected
    assert {r["result"]["environment"]["threads"] for r in lines(tmp_path / "out")} == {1}


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_a_worker_that_dies_is_survived(cluster, local, tmp_path):
    config, expected = local
    engine = RayEngine(config, workers=2)
    killed = []

    def kill_one(progress) -> None:
        if progress.done in (2, 9) and len(killed) < 2:
            killed.append(engine.pids()[len(killed)])
            os.kill(killed[-1], signal.SIGKILL)

    with open_folder(tmp_path / "out") as folder:
        summary = sweep(config, folder, engine, progress=kill_one)
    assert len(set(killed)) == 2
    assert (summary.done, summary.failed) == (16, 0)
    assert figures(tmp_path / "out") == expected


class Deadly:
    """Dies of one point, computes the others."""

    def compute(self, point: Point, found: str | None):
        from torchlamp.sweep.folder import Outcome

        if point.policy == "ps2+none":
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(point, {"kl_mean": 0.0}, None, 0.0)


@pytest.mark.skipif(os.name == "nt", reason="signals of Unix")
def test_a_point_that_kills_its_workers_fails(cluster, local, monkeypatch):
    monkeypatch.setattr("torchlamp.sweep.ray_points.Worker", lambda *_: Deadly())
    # The workers can't import this module.
    cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    outcomes = list(RayEngine(local[0], workers=1).run(points(3, "a"), lambda point: None))
    assert len(outcomes) == 3
    failed = [o for o in outcomes if o.error]
    assert [o.point.policy for o in failed] == ["ps2+none"]
    assert f"its worker died {MAX_ATTEMPTS} times" in failed[0].error
    assert "\n" not in failed[0].error


class Broken:
    def __init__(self, *_) -> None:
        raise ImportError("no module here")


def test_workers_that_can_not_start(cluster, local, monkeypatch):
    monkeypatch.setattr("torchlamp.sweep.ray_points.Worker", Broken)
    cluster.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(OSError, match="no Ray worker could be started: ImportError: no module here"):
        list(RayEngine(local[0], workers=1).run(points(1, "a"), lambda point: None))


def test_too_many_workers(cluster, local):
    with pytest.raises(ValueError, match="9 Ray workers of 1 processors each: the cluster has room for 2"):
        list(RayEngine(local[0], workers=9).run(points(1, "a"), lambda point: None))


def test_an_address_where_nobody_answers():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address in (
        f"127.0.0.1:{port}",
        f"ray://127.0.0.1:{port}",
        "no.such.host.invalid:6379",
        "127.0.0.1:99999",
    ):
        with pytest.raises(OSError, match=f"RAY_ADDRESS='{address}': no Ray cluster answers there"):
            check_address(address)
    for address in ("auto", "local", "ray://head"):
        check_address(address)


@pytest.fixture
def server():
    """Starts a server that gives each client the same answer (None: none, and waits), and gives its address."""
    with contextlib.ExitStack() as stack:

        def start(answer: bytes | None) -> str:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        client = stack.enter_context(listener.accept()[0])
                        if answer is not None:
                            client.recv(100)
                            client.sendall(answer)
                            client.shutdown(socket.SHUT_WR)

            threading.Thread(target=serve, daemon=True).start()
            return f"127.0.0.1:{listener.getsockname()[1]}"

        yield start


@pytest.mark.parametrize("prefix", ["", "ray://"])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "no answer within 0 s"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "another server does"),
        (b"", "another server does"),
    ],
)
def test_a_server_that_is_no_ray_cluster(server, monkeypatch, prefix, answer, said):
    monkeypatch.setattr(ray_engine, "_PATIENCE", 10.0 if answer is not None else 0.3)
    address = prefix + server(answer)
    with pytest.raises(
        OSError, match=rf"RAY_ADDRESS='{address}': no Ray cluster answers there \({said}\); start"
    ):
        check_address(address)


def test_a_server_of_http_2_that_is_no_ray_cluster(server, monkeypatch):
    pytest.importorskip("ray", reason="needs Ray: pip install 'torchlamp[ray]'")
    monkeypatch.setattr(ray_engine, "_CHECKUP", 0.2)
    address = server(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
    with pytest.raises(OSError, match="another server does, or the cluster isn't well"):
        check_address(address)


def test_the_address_of_a_cluster(cluster):
    check_address(cluster.get_runtime_context().gcs_address)
