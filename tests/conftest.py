"""What all tests share: a quiet environment and a real PostgreSQL."""

import contextlib
import glob
import os
import pwd
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

# Before torch or flwr is imported anywhere: one thread each on shared cores (OpenMP's barriers cost a hundred
# times the work), and no calls home. Processes that tests start inherit it.
os.environ.update(
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
)


class Postgres:
    """A private PostgreSQL server in a temporary folder, reachable by Unix socket only."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries = binaries
        self._folder = folder
        self._data = folder / "data"
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._user = _unprivileged()

    def start(self) -> None:
        if self._user is not None:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        options = ["-D", str(self._data), "-A", "trust", "-U", "lepton", "-E", "UTF8", "--no-locale", "-N"]
        self._run("initdb", *options)
        socket = ["-c", f"unix_socket_directories={self._folder}", "-c", "listen_addresses="]
        quick = ["-c", "fsync=off", "-c", "max_connections=50", "-c", "shared_buffers=16MB"]
        with open(self._folder / "log", "wb") as log:
            self._process = subprocess.Popen(
                [str(self._binaries / "postgres"), "-D", str(self._data), *socket, *quick],
                stdout=log,
                stderr=log,
                **self._as_user(),
            )
        deadline = time.monotonic() + 60
        ready = [str(self._binaries / "pg_isready"), "-q", "-h", str(self._folder), "-U", "lepton"]
        while subprocess.run(ready, check=False).returncode != 0:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self._folder / "log").read_text(encoding="utf-8", errors="replace"))
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # "fast shutdown": ends sessions, then itself
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def new_database(self) -> str:
        """Return the URL of an empty schema; a database of its own would cost ten times as much."""
        import psycopg

        self._count += 1
        name = f"lepton{self._count}"
        with psycopg.connect(
            host=str(self._folder), user="lepton", dbname="postgres", autocommit=True
        ) as server:
            server.execute(f"CREATE SCHEMA {name}")
        options = quote(f"-csearch_path={name}")
        return f"postgresql://lepton@/postgres?host={quote(str(self._folder))}&options={options}"

    def _run(self, binary: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._binaries / binary), *arguments], capture_output=True, check=False, **self._as_user()
        )
        if done.returncode:
            raise RuntimeError(f"{binary}: {done.stderr.decode(errors='replace')}")

    def _as_user(self) -> dict:
        """PostgreSQL refuses to run as root."""
        if self._user is None:
            return {"cwd": self._folder}
        user, group = self._user.pw_uid, self._user.pw_gid
        return {"cwd": self._folder, "user": user, "group": group, "extra_groups": []}


def _unprivileged() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("PostgreSQL needs a user other than root, and there is neither postgres nor nobody.")


def _postgres_binaries() -> Path | None:
    folders = sorted(
        glob.glob("/usr/lib/postgresql/*/bin"), key=lambda f: float(Path(f).parts[-2]), reverse=True
    )
    on_path = shutil.which("initdb")
    if on_path:
        folders.append(str(Path(on_path).parent))
    wanted = ("initdb", "postgres", "pg_isready")
    return next((Path(f) for f in folders if all((Path(f) / name).exists() for name in wanted)), None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL; skips without one, or fails when LEPTON_REQUIRE_POSTGRES=1."""
    binaries = _postgres_binaries()
    if binaries is None:
        reason = "no PostgreSQL server binaries on PATH or in /usr/lib/postgresql"
        if os.environ.get("LEPTON_REQUIRE_POSTGRES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    # Not below pytest's own folder: that one is private to this user, and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="lepton-pg-"))
    server = Postgres(binaries, folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """The URL of an empty PostgreSQL database."""
    return postgres.new_database()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The path or URL of an empty database, on each engine in turn."""
    if request.param == "sqlite":
        return str(tmp_path / "lepton.db")
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def free_ports() -> Iterator[Callable[[int], list[int]]]:
    """``free_ports(n)``: ports that are this test's as long as it lasts, also while nobody listens there."""
    from lepton_simulations import demo_fleet

    with contextlib.ExitStack() as held:

        def take(count: int) -> list[int]:
            taken: list[int] = []
            while len(taken) < count:
                claim = held.enter_context(socket.socket(type=socket.SOCK_DGRAM))
                with contextlib.suppress(OSError):  # another test has claimed it
                    claim.bind(("127.0.0.1", port := demo_fleet.free_ports(1)[0]))
                    taken.append(port)
            return taken

        yield take


@pytest.fixture
def small_files() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """``with small_files(limit):`` no file can be written beyond ``limit`` bytes, as on a full disk."""

    @contextlib.contextmanager
    def limited(limit: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def make_variant() -> Callable[..., Path]:
    """``make_variant(folder, seed=…, round=…)``: a variant's three files, with a small real ONNX model in it.

    ``damage`` says what is wrong with it: ``"parity"`` computes something else than it says, ``"model"`` is
    no ONNX at all. ``like`` keeps most weights of another seed, as the next round of a run does.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.numpy import save

    from lepton_fl.compression.card import CARD, MODEL, PARITY, Card
    from lepton_fl.files import sha256_hex

    def weights(seed: int, like: int | None, width: int) -> "np.ndarray":
        own = np.random.default_rng(seed).normal(0, 0.3, (width, 10)).astype(np.float32)
        if like is None:
            return own
        other = np.random.default_rng(like).normal(0, 0.3, (width, 10)).astype(np.float32)
        return np.where(np.abs(own) > 0.6, own, other)

    def make(
        folder: Path,
        *,
        seed: int = 1,
        round: int = 1,
        run: str = "r1",
        name: str = "int8",
        task: str = "lepton_fl.tasks.images:digits",
        width: int = 64,
        like: int | None = None,
        damage: str = "",
        profiles: tuple[str, ...] = ("gateway",),
        failed: tuple[str, ...] = (),
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        matrix = weights(seed, like, width)
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["input", "w"], ["output"])],
            "digits",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", width])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 10])],
            [numpy_helper.from_array(matrix, "w")],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        model = made.SerializeToString() if damage != "model" else b"no graph " * 100
        rows = np.random.default_rng(0).random((4, width), np.float32)
        output = rows @ matrix + (1.0 if damage == "parity" else 0.0)
        parity = save({"input": rows, "output": output.astype(np.float32)})
        lineage = {
            "run": run,
            "round": round,
            "global_sha256": sha256_hex(matrix.tobytes()),
            "candidate_sha256": "2" * 64,
            "recipe_sha256": "3" * 64,
        }
        measured = {
            "wire_bytes": len(model),
            "parameters": matrix.size,
            "nonzero": matrix.size,
            "macs": matrix.size,
            "energy_uj": 1.0,
            "energy_model": "none",
            "rows": 4,
            "metrics": {"accuracy": 0.9},
            "deviation": 0.0,
            "p50_ms": 0.1,
            "p95_ms": 0.1,
            "peak_memory": 0,
            "build_seconds": 0.0,
            "processor": "test",
        }
        gate = [{"profile": profile, "passed": True} for profile in profiles]
        gate += [{"profile": p, "passed": False, "reasons": ("too slow",)} for p in failed]
        card = Card.model_validate(
            {
                "gate": gate,
                "name": name,
                "task": task,
                "task_version": "1",
                "opset": 17,
                "model_sha256": sha256_hex(model),
                "model_bytes": len(model),
                "input": {"name": "input", "dtype": "float32", "shape": (None, width)},
                "output": {"name": "output", "dtype": "float32", "shape": (None, 10)},
                "steps": ("test",),
                "predicted_bytes": 1.0,
                "lineage": lineage,
                "measured": measured,
                "parity": {
                    "sha256": sha256_hex(parity),
                    "rows": 4,
                    "tolerance": 1e-3,
                    "torch_error": 0.0,
                },
            }
        )
        (folder / MODEL).write_bytes(model)
        (folder / PARITY).write_bytes(parity)
        (folder / CARD).write_bytes(card.to_bytes())
        return folder

    return make
