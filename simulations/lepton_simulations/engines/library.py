"""The functions of ``native.c``, compiled on this machine by the user's own compiler.

The first use takes some seconds; afterwards the library lies in the user's cache folder, under a name that
changes with the source, the flags, the compiler and the processor. Only a library that belongs to this user,
in a folder that nobody else may write to, is loaded; where there is no such folder, one that is made and
removed on the spot takes its place.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path

from lepton_fl.errors import LeptonError
from lepton_fl.files import make_private_folder
from lepton_simulations.engines.contract import Unsupported

SOURCE = Path(__file__).with_name("native.c")
PATIENCE_S = 120.0  # for the compiler


@cache
def library(*, double: bool = False) -> ctypes.CDLL:
    """The functions, for float32 or float64.

    Raises:
        Unsupported: there is no compiler, or it fails.
    """
    command = [*_compiler(), *_flags(), *(["-DDOUBLE"] if double else []), str(SOURCE)]
    name = f"{_digest(command)}.so"
    with ExitStack() as stack:
        folder = _folder() or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / name
        if path.exists():
            with suppress(OSError):  # it is damaged: made anew
                return _typed(ctypes.CDLL(str(path)))
        _compile(command, path)
        try:
            return _typed(ctypes.CDLL(str(path)))
        except OSError as error:
            raise Unsupported(f"its library cannot be loaded ({error})") from error


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lepton-fl" / "native"


def _compiler() -> list[str]:
    """The command of the compiler, as ``$CC`` names it, or the system's."""
    given = shlex.split(os.environ.get("CC", ""))
    for words in [given] if given else [["cc"], ["gcc"], ["clang"]]:
        if found := shutil.which(words[0]):
            return [found, *words[1:]]
    raise Unsupported(f"there is no C compiler ({given[0] if given else 'cc, gcc or clang'})")


def _flags() -> list[str]:
    own = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return ["-std=gnu11", "-O3", own, "-ffp-contract=fast", "-shared", "-fPIC"]


def _digest(command: list[str]) -> str:
    version = _run([command[0], "--version"])
    parts = [SOURCE.read_bytes(), "\0".join(command).encode(), version, _processor()]
    return hashlib.sha256(b"\0\0".join(parts)).hexdigest()


def _processor() -> bytes:
    """What tells processors apart that "native" means other instructions on."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_bytes().partition(b"\n\n")
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.release()}".encode()
    wanted = (b"model name", b"flags", b"Features", b"CPU implementer", b"CPU part", b"isa", b"cpu\t")
    return b"\n".join(line for line in first.splitlines() if line.startswith(wanted))


def _folder() -> Path | None:
    """The cache folder; None where it cannot be made, or others could have put a library into it."""
    try:
        folder = cache_folder()
        make_private_folder(folder)
        found = os.lstat(folder)
    except (LeptonError, OSError, RuntimeError):  # the last: there is no home
        return None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return folder if private else None


def _compile(command: list[str], path: Path) -> None:
    """Make the library, whole or not at all; two processes may do so at the same time."""
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(descriptor)
        try:
            _run([*command, "-o", temporary, "-lm"])
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise Unsupported(f"its library cannot be written ({error.strerror or error})") from error


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(  # noqa: S603 - the user's own compiler, and no words from outside
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=PATIENCE_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Unsupported(f"the C compiler {command[0]} cannot be run ({type(error).__name__})") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise Unsupported(f"the C compiler {command[0]} fails ({said.strip()[:200].rstrip('.')})")
    return done.stdout


def _typed(found: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.lepton_room.restype, found.lepton_train.restype = number, None
    found.lepton_room.argtypes = [pointer, number, number, number]
    found.lepton_finish.restype, found.lepton_finish.argtypes = None, [pointer, pointer, number]
    found.lepton_train.argtypes = [pointer, number, number, *[pointer] * 2, number, number, *[pointer] * 2]
    found.lepton_forward.restype = found.lepton_back.restype = found.lepton_descend.restype = None
    found.lepton_forward.argtypes = [pointer, pointer, pointer, number, number, number, pointer]
    found.lepton_back.argtypes = [pointer, pointer, number, number, number, pointer]
    found.lepton_descend.argtypes = [pointer, pointer, number, number, number, ctypes.c_double, pointer]
    found.lepton_unpool.restype, found.lepton_unpool.argtypes = None, [pointer] * 10
    found.lepton_order.restype = None
    found.lepton_order.argtypes = [ctypes.c_uint64, *[number] * 4, pointer]
    if hasattr(found, "lepton_add"):  # of float32 only
        found.lepton_look.restype = found.lepton_add.restype = None
        found.lepton_look.argtypes = [pointer, number, number, number, pointer, pointer]
        found.lepton_add.argtypes = [pointer, number, number, number, *[pointer] * 4]
        found.lepton_add_looking.restype, real = None, ctypes.c_float
        found.lepton_add_looking.argtypes = [pointer, *[number] * 3, real, real, pointer, pointer]
        found.lepton_add_moves.restype = None
        found.lepton_add_moves.argtypes = [pointer, pointer, number, pointer, real, *[pointer] * 3]
        found.lepton_reach.restype = None
        found.lepton_reach.argtypes = [pointer, pointer, number, pointer, pointer]
    return found
