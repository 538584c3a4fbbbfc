"""The costly checks of what is the same for a whole cohort: a roster's adverts, a certificate's signatures.

A device makes each once a round. Where one process is many devices (simulations, rehearsals), n of them would
verify the same n signatures; ``SharedChecks`` verifies them once. What it remembers is found by the very
bytes that were checked, so nobody is told another answer than its own check would have given; what fails is
never remembered.
"""

from dataclasses import dataclass
from typing import Final

from lepton_fl.errors import TrustError
from lepton_fl.secagg.messages import Advert, Certificate, Consent, Roster, verify

_MOST: Final = 64  # results kept: more sums than one round has


@dataclass(frozen=True)
class Cohort:
    """A roster that was read."""

    adverts: tuple[bytes, ...]
    peers: tuple[Advert, ...]  # the same, decoded and their signatures verified
    digest: bytes  # R


class Checks:
    """Each check, made whenever it is asked for: what a device uses."""

    def cohort(self, roster: bytes, context: bytes) -> Cohort:
        """Read message 2 and verify the signature of every advert, under the key that it shows.

        Args:
            roster: the message.
            context: the digest that it must be for, or none of its signatures is looked at.

        Raises:
            UpdateRejected: MALFORMED.
            TrustError: it is for another context, or a signature is wrong.
        """
        read = Roster.decode(roster)
        if read.context != context:
            raise TrustError("a roster of another context")
        return Cohort(read.adverts, tuple(map(Advert.decode, read.adverts)), read.digest)

    def consents(self, cohort: Cohort, certificate: Certificate) -> None:
        """Verify that each signature of message 8 is that of a consent to the set that it names.

        Raises:
            TrustError: one is not.
        """
        for sender, signature in certificate.signatures:
            peer = cohort.peers[sender]
            statement = Consent(cohort.digest, sender, certificate.survivors).frame()
            verify(peer.signing_key, signature, statement, peer.device)


class SharedChecks(Checks):
    """For the devices of one process."""

    def __init__(self) -> None:
        self._cohorts: dict[tuple[bytes, bytes], Cohort] = {}
        self._good: dict[tuple[bytes, Certificate], None] = {}

    def cohort(self, roster: bytes, context: bytes) -> Cohort:
        """See ``Checks``."""
        key = (roster, context)
        if key not in self._cohorts:
            _forget_oldest(self._cohorts)
            self._cohorts[key] = super().cohort(roster, context)
        return self._cohorts[key]

    def consents(self, cohort: Cohort, certificate: Certificate) -> None:
        """See ``Checks``."""
        key = (cohort.digest, certificate)
        if key not in self._good:
            super().consents(cohort, certificate)
            _forget_oldest(self._good)
            self._good[key] = None


def _forget_oldest(kept: dict[tuple[bytes, bytes], Cohort] | dict[tuple[bytes, Certificate], None]) -> None:
    while len(kept) >= _MOST:
        del kept[next(iter(kept))]  # type: ignore[arg-type]  # a key of the very dict
