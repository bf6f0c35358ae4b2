"""C code of this package, compiled on first use for the processor at hand and kept in the user's cache folder.

Knows compilers and the cache. Does not know what the code does. The folder must belong to the user alone; where it
does not, the library is built anew in a private one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SWITCH = "QVL_NATIVE_KERNELS"  # "0" turns compiled kernels off, to compare or to find a fault
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-pthread")
THREADS = Path(__file__).parent / "on_cpu" / "share.c"
COMPILE_SECONDS = 120
SMALL = 1 << 20  # of work: some 20 microseconds on one core; calling for help takes a few
READING = 6  # rows for which a product computes as long as it takes to read its weights


class NativeUnavailable(Exception):
    """Why there is no compiled library; the caller has a slower way and says so."""


def load_native(source: Path, flags: tuple[str, ...] = (), *, visible: bool = False) -> ctypes.CDLL:
    """The library compiled from `source`, from the cache when the source, the compiler and the processor are the same.
    `flags` go to the compiler after the usual ones; libraries loaded later find the functions of a `visible` one.
    Raises NativeUnavailable.
    """
    if os.environ.get(SWITCH) == "0":
        raise NativeUnavailable(f"{SWITCH}=0")
    load_threads()
    return _load_from_cache(source, flags, ctypes.RTLD_GLOBAL if visible else ctypes.DEFAULT_MODE)


@functools.cache
def load_threads() -> ctypes.CDLL:
    """What all libraries share their work with, in one place: they find its functions in the process."""
    return _load_from_cache(THREADS, (), ctypes.RTLD_GLOBAL)


def _load_from_cache(source: Path, flags: tuple[str, ...], mode: int) -> ctypes.CDLL:
    compiler = find_compiler()
    name = f"{source.stem}-{fingerprint(source, [*compiler, *flags])}.so"
    folder = cache_folder()
    try:
        if folder is not None:
            return _load(folder / name, source, compiler, flags, mode)
        with tempfile.TemporaryDirectory(prefix="qvl-kernels-") as scratch:  # a library in use needs its file no more
            return _load(Path(scratch) / name, source, compiler, flags, mode)
    except OSError as error:  # a full disk, a folder whose files may not be executed
        raise NativeUnavailable(f"the compiled library cannot be kept or loaded: {error}") from None


def _load(library: Path, source: Path, compiler: list[str], flags: tuple[str, ...], mode: int) -> ctypes.CDLL:
    if not library.exists():
        build(source, compiler, library, flags)
    return ctypes.CDLL(str(library), mode=mode)


def threads_for(rows: int, out: int, width: int, usable: int) -> int:
    """How many of the `usable` threads a product [rows, width] x [width, out] is worth."""
    return usable if out * width * (rows + READING) >= SMALL else 1


def find_compiler() -> list[str]:
    """The command of a C compiler: $CC, else the first of `COMPILERS` on the path."""
    if os.environ.get("CC"):
        command = shlex.split(os.environ["CC"])
        if command and shutil.which(command[0]):
            return command
    for name in COMPILERS:
        path = shutil.which(name)
        if path:
            return [path]
    raise NativeUnavailable("there is no C compiler (install gcc)")


def cache_folder() -> Path | None:
    """A folder of this user's that nobody else can write to; None where there is no such place."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "qvl" / "kernels"
    try:
        if not folder.is_absolute():
            raise FileNotFoundError("no home")  # a container's user without a name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        private = status.st_uid == os.getuid() and not status.st_mode & 0o022
        if private and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a read-only home, or none
    return None


def fingerprint(source: Path, compiler: list[str]) -> str:
    """Changes with the source, the compiler and the processor's abilities."""
    program = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
    headers = [header.read_text() for header in sorted(source.parent.glob("*.h"))]
    parts = (source.read_text(), *headers, str(FLAGS), str(compiler), str(program.stat().st_mtime_ns), processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def processor() -> str:
    """What distinguishes processors for -march=native."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def build(source: Path, compiler: list[str], library: Path, flags: tuple[str, ...] = ()) -> None:
    """Compile beside the target and rename, so that processes that start together never load half a file."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        linked = Path(scratch) / "code.so"
        run([*compiler, *FLAGS, *flags, "-shared", str(source), "-o", str(linked)])
        os.replace(linked, library)


def run(command: list[str]) -> None:
    """Run a compiler; NativeUnavailable carries the first line of what it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"the C compiler does not run: {type(error).__name__}") from None
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line.lower()), f"exit {done.returncode}")
        raise NativeUnavailable(f"the C compiler failed: {said.strip()[:200]}")
