"""Errors cross gRPC and come out as what they were; what a stranger sends does no harm."""

import subprocess
import sys

import pytest

from lepton_fl import errors
from lepton_fl.errors import LeptonError, Rejection, TrustError, UpdateRejected
from lepton_fl.wire.status import (
    CODE_KEY,
    HINT_KEY,
    MAX_DETAIL,
    MAX_RETRY_S,
    PATIENCE_KEY,
    RETRY_KEY,
    error_from,
    metadata_of,
    retry_after,
    status_of,
    waited_s,
)


def classes(cls=LeptonError):
    return [
        cls,
        *(
            deeper
            for sub in cls.__subclasses__()
            if sub.__module__ == errors.__name__
            for deeper in classes(sub)
        ),
    ]


# A device refuses releases by itself and reports the fault in words of its own; the error stays there.
@pytest.mark.parametrize("cls", [cls for cls in classes() if cls is not errors.ReleaseRefused])
def test_every_error_of_ours_survives_the_way(cls):
    if cls is UpdateRejected:
        error = UpdateRejected(Rejection.MALFORMED, "a message", hint="ein Rat: ü")
    else:
        error = cls("a message", hint="ein Rat: ü")
    back = error_from(status_of(error), str(error), metadata_of(error))
    assert type(back) is cls
    assert (str(back), back.hint) == ("a message", "ein Rat: ü")


def test_statuses_are_names_of_grpc():
    import grpc

    for cls in classes():
        error = cls.__new__(cls)
        assert status_of(error) in grpc.StatusCode.__members__


def test_a_subclass_elsewhere_has_the_status_of_its_parent():
    class Special(TrustError):
        pass

    assert status_of(Special("x")) == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        ("UNAVAILABLE", errors.ConnectionFailed),
        ("DEADLINE_EXCEEDED", errors.ConnectionFailed),
        ("UNAUTHENTICATED", TrustError),
        ("UNIMPLEMENTED", errors.ConfigError),
        ("A_NEW_STATUS", LeptonError),
    ],
)
def test_without_our_metadata_the_status_decides(status, cls):
    assert type(error_from(status, "text")) is cls
    assert type(error_from(status, "text", [("other", "x"), (CODE_KEY, "no-such-code")])) is cls


def test_what_a_stranger_sends_is_cut_and_printable():
    error = error_from(
        "INTERNAL", "\x1b[31m" + "x" * 10_000, [(HINT_KEY, b"\xff\x00" * 5000), (CODE_KEY, b"\xff")]
    )
    assert len(str(error)) <= MAX_DETAIL
    assert len(error.hint) <= MAX_DETAIL
    assert (str(error) + error.hint).isprintable()
    assert "without a reason" in str(error_from("INTERNAL", "\n"))


def test_when_to_come_again_is_told_and_bounded():
    error = errors.ConnectionFailed("busy", hint="later")
    assert retry_after(metadata_of(error, 1.5)) == 1.5
    assert retry_after(metadata_of(error, 1e-9)) == 0.001
    assert type(error_from(status_of(error), "busy", metadata_of(error, 1.5))) is errors.ConnectionFailed
    for none in (metadata_of(error), None, [(RETRY_KEY, "soon")], [(RETRY_KEY, b"-1")], [(RETRY_KEY, "nan")]):
        assert retry_after(none) == 0
    assert retry_after([(RETRY_KEY, "inf")]) == MAX_RETRY_S


def test_how_long_a_call_has_waited():
    assert waited_s([("other", "x"), (PATIENCE_KEY, "20.0")], 17.5) == 2.5
    assert waited_s([(PATIENCE_KEY, "20.0")], 21.0) == 0
    for unknown in (None, [], [(PATIENCE_KEY, "long")], [(PATIENCE_KEY, b"\xff")], [(PATIENCE_KEY, "nan")]):
        assert not waited_s(unknown, 1.0) > 0
    assert waited_s([(PATIENCE_KEY, "20.0")], None) == 0


def test_nothing_here_imports_grpc():
    code = "import sys, lepton_fl.wire.status; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
