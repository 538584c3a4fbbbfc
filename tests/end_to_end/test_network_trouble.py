"""A fleet behind a network that delays, stalls, resets and parts: rounds that are under way go on.

The coordinator listens at 127.0.0.1 and is known as 127.0.0.2, where a proxy of our own forwards the three
ports of the devices. TCP repairs what a link loses, so loss is what an application sees of it: a stall, and
now and then a reset.
"""

import asyncio
import contextlib
import random
import re
import threading
import time

import pytest

from lepton_server.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]

OUTSIDE, INSIDE = "127.0.0.2", "127.0.0.1"
DEVICES, ROUNDS = 4, 5
RUN = f"""
[run]
task = "digits"
rounds = {ROUNDS}
evaluate_every = 0
[run.cohort]
size = {DEVICES}
min_reports = {DEVICES}
deadline_s = 150
fill_wait_s = 90
max_attempts = 10
[run.local]
learning_rate = 0.05
batch_size = 4
epochs = 5
"""


class Network:
    """Forwards ports, badly; its settings may be changed at any time and from any thread."""

    def __init__(self, ports):
        self.delay_s, self.stall_share, self.stall_s, self.reset_share = 0.0, 0.0, 0.3, 0.0
        self.connections = self.resets = self.stalls = self.bytes = 0
        self._rng, self._open, self._writers = random.Random(0), asyncio.Event(), set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._call(self._start(ports))

    def _call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _start(self, ports):
        self._open.set()
        self._servers = [
            await asyncio.start_server(lambda r, w, port=port: self._serve(r, w, port), OUTSIDE, port)
            for port in ports
        ]

    async def _serve(self, reader, writer, port):
        self.connections += 1
        try:
            there, back = await asyncio.open_connection(INSIDE, port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._pump(reader, back, writer), self._pump(there, writer, back))
        self._writers -= {writer, back}

    async def _pump(self, source, sink, other):
        with contextlib.suppress(ConnectionError, OSError):
            while data := await source.read(65536):
                await asyncio.sleep(self.delay_s)
                if self._rng.random() < self.stall_share:
                    self.stalls += 1
                    await asyncio.sleep(self.stall_s)
                await self._open.wait()
                if self._rng.random() < self.reset_share:
                    self.resets += 1
                    other.transport.abort()
                    break
                self.bytes += len(data)
                sink.write(data)
                await sink.drain()
        sink.close()

    def part(self):
        """Nothing comes through any more, and nobody is told."""
        self._call(self._shut())

    async def _shut(self):
        self._open.clear()

    def heal(self):
        """What was held back comes through."""
        self._loop.call_soon_threadsafe(self._open.set)

    def reset_all(self):
        """Every connection is gone at once."""

        async def abort():
            for writer in list(self._writers):
                writer.transport.abort()

        self._call(abort())

    def close(self):
        async def end():
            for server in self._servers:
                server.close()
            self._open.set()
            for writer in list(self._writers):
                writer.transport.abort()
            for _ in range(50):
                left = asyncio.all_tasks() - {asyncio.current_task()}
                if not left:
                    break
                await asyncio.wait(left, timeout=0.1)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def network(real_fleet):
    """Between the fleet and its coordinator."""
    text = real_fleet.config.read_text().replace(
        f'public_names = ["{INSIDE}"]', f'public_names = ["{OUTSIDE}"]'
    )
    assert OUTSIDE in text
    real_fleet.config.write_text(text)
    made = Network([int(port) for port in re.findall(r"(?:enrolment|device|fleet)_port = (\d+)", text)])
    yield made
    made.close()


def test_a_run_outlives_delay_stalls_resets_and_partitions(real_fleet, network, digit_files):
    fleet = real_fleet
    fleet.start_server()
    names = [f"dev{i}" for i in range(DEVICES)]
    fleet.join_all(names)
    for name, file in zip(names, digit_files, strict=False):
        fleet.start_client(name, file, "[connection]\nbackoff_min_s = 0.2\nbackoff_max_s = 2\n")
    network.delay_s, network.stall_share = 0.02, 0.03
    run_id = fleet.start_run(RUN)

    def committed():
        found = re.search(r"^lepton_rounds_total\{.*\} (\d+)", fleet.get("/metrics"), re.MULTILINE)
        return 0 if found is None else int(found[1])

    fleet.until(committed, "round 1 is committed over a slow network that loses something")
    network.part()  # in mid-round
    before, rounds = network.bytes, committed()
    time.sleep(5.0)
    assert network.bytes == before
    assert committed() <= rounds + 1  # of which everything had come
    network.heal()
    fleet.until(lambda: committed() >= 2, "round 2 is committed after a partition")
    network.reset_all()  # all connections at once, in mid-round
    fleet.until(lambda: committed() >= 3, "round 3 is committed over new connections")
    network.reset_share = 0.02  # now and then
    fleet.until(lambda: fleet.show(run_id)["state"] in ("completed", "failed"), "the run has ended")
    shown = fleet.show(run_id)
    assert shown["state"] == "completed", shown
    assert network.stalls
    assert network.connections > 3 * DEVICES

    with open_store(fleet.folder / "server" / "lepton.db") as store:
        rounds = store.rounds(run_id)
        found = store.participation(run_id)
        store.verify_journal()
    done = {(r.round, r.attempt) for r in rounds if r.state == "committed"}
    assert sorted(number for number, _ in done) == list(range(1, ROUNDS + 1))
    # Nobody's answer was lost or counted twice. An attempt is given up for devices that were not heard of for
    # long, as a machine that starves them shows; for nothing else, and that is said of each.
    counted = [
        (p.round, p.device_id) for p in found if (p.round, p.attempt) in done and p.outcome == "counted"
    ]
    assert sorted(counted) == [(n, d) for n in range(1, ROUNDS + 1) for d in sorted({d for _, d in counted})]
    assert len(counted) == DEVICES * ROUNDS
    for given_up in {(r.round, r.attempt) for r in rounds} - done:
        causes = {p.cause for p in found if (p.round, p.attempt) == given_up and p.outcome != "counted"}
        assert causes & {"gone", "half-open", "offline", "slow", "slow-link"}, (given_up, causes)
