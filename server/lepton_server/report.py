"""What ``lepton run show`` says of this moment: the board of a living coordinator, else what is recorded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton_fl.errors import Cause
from lepton_server.doctor import owner
from lepton_server.watchdog import ADVICE, Wait, read_board

if TYPE_CHECKING:
    from lepton_server.store import Run


@dataclass(frozen=True)
class Live:
    """A run at this moment."""

    wait: Mapping[str, Any] | None = None
    devices: Sequence[Mapping[str, Any]] = field(default_factory=tuple)  # with something wrong
    more: int = 0  # devices with something wrong that are not listed

    def row(self) -> dict[str, Any]:
        """For the first table."""
        if self.wait is None:
            return {}
        return {"waiting": self.wait["words"], "cause": self.wait["cause"], "advice": self.wait["advice"]}


def live(state_dir: Path, run: "Run") -> Live:
    """What a run waits for, and what is wrong with its devices, as its coordinator says at this moment."""
    if run.finished:
        return Live()
    told = read_board(state_dir).get(run.id)
    if told is not None:
        return Live(told["wait"], told["devices"], told["more"])
    if not owner(state_dir) and state_dir.exists():
        why = "no coordinator uses this state folder" + (f"; before: {run.waiting}" if run.waiting else "")
        wait = Wait("its coordinator", Cause.COORDINATOR_DOWN, why)
        return Live(wait.to_json())
    return Live()  # on another machine, or about to begin: what the journal has is shown


def troubles(now: Live, parts: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """One line for each device with something wrong: now, and in the newest attempt of the newest round."""
    found = {d["device_id"]: {k: d[k] for k in ("cause", "detail", "advice")} for d in now.devices}
    newest = max((part["attempt"] for part in parts), default=0)
    for part in parts:
        if part["attempt"] == newest and part["cause"] in set(Cause):
            said = {"cause": part["cause"], "detail": part["detail"], "advice": ADVICE[Cause(part["cause"])]}
            found.setdefault(part["device_id"], said)
    rows = [{"device": names.get(d, d), "device_id": d} | said for d, said in found.items()]
    if now.more:
        rows.append({"device": f"{now.more} more", "device_id": "", "cause": "", "detail": "", "advice": ""})
    return rows
