"""Who broke the protocol, and what shows it.

A coordinator acts on a blame by leaving the device out of the next attempt; whether it is revoked is the
operator's decision. ``proven`` says whether the evidence convinces who does not trust the coordinator.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from lepton_fl.secagg.codec import Reader, Writer


class Fault(StrEnum):
    """What a device did."""

    TWO_UPLOADS = "two-uploads"  # signed two different vectors; both signatures are the evidence
    BAD_SHARES = "bad-shares"  # more devices complain about its shares than can be corrupted
    FALSE_COMPLAINTS = "false-complaints"  # complains about more devices than can be corrupted
    WRONG_SHARE = "wrong-share"  # revealed a share that is not the one it had accepted
    POISONED_SHARES = "poisoned-shares"  # its shares, as committed to, do not make up its secret
    WITHHELD_SHARES = "withheld-shares"  # revealed less than it had accepted


@dataclass(frozen=True)
class Blame:
    """One device's fault."""

    device: str
    fault: Fault
    evidence: bytes = b""

    @property
    def proven(self) -> bool:
        """Whether the evidence convinces anyone (two signatures), not only this coordinator."""
        return self.fault is Fault.TWO_UPLOADS

    def encode(self) -> bytes:
        """For the journal."""
        return bytes(Writer().text(self.device).text(self.fault.value).blob(self.evidence))

    @classmethod
    def decode(cls, data: bytes) -> "Blame":
        """Read back."""
        reader = Reader(data)
        blame = cls(reader.text(), Fault(reader.text()), reader.blob())
        reader.finish()
        return blame


@dataclass(frozen=True)
class Settlement:
    """Which survivors to propose, after complaints."""

    members: frozenset[int]
    signers: frozenset[int]  # of the members: those who have usable shares of all members
    culprits: Mapping[int, Fault]


def settle_complaints(
    uploaded: frozenset[int],
    complaints: Mapping[int, frozenset[int]],
    corrupted: int,
    quorum: int,
    least: int,
) -> Settlement:
    """Choose the survivors so that enough of them can sign.

    A device signs only sets of which it holds usable shares, so a complaint costs the dealer's input or the
    complainer's signature. With at most ``corrupted`` dishonest devices, more complaints than that
    against one dealer include an honest one and convict it; more complaints than that by one device include a
    false one and convict the complainer (a coordinator knows what it delivered). What remains is a dispute:
    nobody is blamed, and the dealer with most complaints is left out while signatures are scarce.

    Args:
        uploaded: Whose vectors are there.
        complaints: Complainer -> dealers.
        corrupted: The most devices that may be dishonest.
        quorum: Signatures needed.
        least: Survivors needed.
    """
    against: dict[int, set[int]] = {}
    for complainer, dealers in complaints.items():
        for dealer in dealers:
            against.setdefault(dealer, set()).add(complainer)
    culprits = {p: Fault.FALSE_COMPLAINTS for p, dealers in complaints.items() if len(dealers) > corrupted}
    for dealer, complainers in against.items():
        if len(complainers - culprits.keys()) > corrupted:
            culprits[dealer] = Fault.BAD_SHARES
    members = uploaded - culprits.keys()
    while len(members) > least and len(_signers(members, complaints)) < (quorum + len(members)) / 2:
        worst = max(sorted(members), key=lambda d: len(against.get(d, set()) & members))
        if not against.get(worst, set()) & members:
            break
        members = members - {worst}
    return Settlement(frozenset(members), _signers(members, complaints), culprits)


def _signers(members: frozenset[int], complaints: Mapping[int, frozenset[int]]) -> frozenset[int]:
    return frozenset(m for m in members if not complaints.get(m, frozenset()) & members)
