"""What tests of resuming share."""

import contextlib
from collections.abc import Callable, Iterator

import pytest

from lepton_fl.files import BlobStore
from lepton_simulations import appended, book


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs, not even what tidies up."""


@pytest.fixture
def killed_at_write(monkeypatch) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """A block whose simulation dies just before its n-th write of any kind; what it had written stays."""

    @contextlib.contextmanager
    def killed(at: int) -> Iterator[None]:
        count = 0

        def dying(function):
            def wrapped(*arguments):
                nonlocal count
                count += 1
                if count == at:
                    raise Killed
                return function(*arguments)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(book, "write_atomic", dying(book.write_atomic))
            patch.setattr(BlobStore, "put", dying(BlobStore.put))
            patch.setattr(appended.AppendedFile, "append", dying(appended.AppendedFile.append))
            patch.setattr(appended.AppendedFile, "sync", dying(appended.AppendedFile.sync))
            with pytest.raises(Killed):
                yield

    return killed
