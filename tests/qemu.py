"""The oracle: QEMU's own tools, run under a time limit, with crashes distinguished from refusals.

Every function runs one tool once. What a tool answered is an :class:`Outcome`; a tool that should
have succeeded and did not raises :class:`QemuError` with its words. Tests that need the tools carry
:data:`requires_qemu` (or call :func:`need` in a fixture): where the tools are absent they skip by
name, unless ``QCOW2_REQUIRE_QEMU=1``, which turns the skip into a failure.

Encrypted images take ``secret``; any other option of an image goes in ``opts``, which
become ``--image-opts`` (for example ``{"pass-discard-snapshot": "off"}``). QEMU takes relative data
file names, and backing names such as ``file:x``, from the folder it runs in: ``cwd``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TIMEOUT = 60.0  # seconds; QEMU hangs for ever on some hostile images
_TEMPLATE_SIZE = "1M"
_NO_TEMPLATE = {"data_file", "preallocation", "nocow"}  # options with which an image is more than one small file
_NO_FLUSH = {"cache.no-flush": "on"}  # nothing that a test writes need outlast a power failure
RETRIES = 50  # creating LUKS fails at random on busy machines, see _flaky
REQUIRED = os.environ.get("QCOW2_REQUIRE_QEMU") == "1"

templates = Path(tempfile.gettempdir())  # where images that are copied are kept: conftest.py sets it

Name = str | os.PathLike[str]
Options = Mapping[str, object]


class Outcome(NamedTuple):
    """What one run of a tool answered. ``rc`` is negative after a signal, None after a time-out."""

    rc: int | None
    stdout: bytes
    stderr: str

    @property
    def ok(self) -> bool:
        return self.rc == 0

    @property
    def crashed(self) -> bool:
        """Whether a signal ended the tool."""
        return self.rc is not None and self.rc < 0

    @property
    def timed_out(self) -> bool:
        return self.rc is None

    @property
    def text(self) -> str:
        return self.stdout.decode("utf-8", "replace")


class QemuError(AssertionError):
    """A tool failed where the test needed it to succeed."""

    def __init__(self, command: list[str], outcome: Outcome) -> None:
        what = "timed out" if outcome.timed_out else f"ended with {outcome.rc}"
        super().__init__(f"{' '.join(command)} {what}: {outcome.stderr.strip()} {outcome.text.strip()[:2000]}")
        self.outcome = outcome


class Check(NamedTuple):
    """``qemu-img check --output=json``: exit code, counters (None when it printed none), messages."""

    rc: int | None
    counters: dict[str, Any] | None
    stderr: str


def available() -> bool:
    """Whether qemu-img and qemu-io are there."""
    return bool(shutil.which("qemu-img") and shutil.which("qemu-io"))


def system_available(machine: str = "x86_64") -> bool:
    """Whether the system emulator of one architecture is there (needed for VM state)."""
    return bool(shutil.which(f"qemu-system-{machine}"))


def need(tool: str = "qemu-img") -> None:
    """Skip the running test by the tool's name when it is absent; fail it where tools are required."""
    if shutil.which(tool) and (tool != "qemu-img" or available()):
        return
    name = "qemu-img or qemu-io" if tool in ("qemu-img", "qemu-io") else tool  # they come in one package
    if REQUIRED:
        pytest.fail(f"{name} is required and absent")
    pytest.skip(f"{name} is absent")


requires_qemu = pytest.mark.skipif(not available() and not REQUIRED, reason="qemu-img or qemu-io is absent")
requires_qemu_system = pytest.mark.skipif(
    not system_available() and not REQUIRED, reason="qemu-system-x86_64 is absent"
)


def run(
    tool: str, *args: Name, check: bool = True, timeout: float = TIMEOUT, stdin: bytes = b"", cwd: Name | None = None
) -> Outcome:
    """Run a tool to its end or the time limit; raise :class:`QemuError` on failure when ``check``.

    Where the tool is absent the running test is skipped, see :func:`need`.
    """
    need(tool)
    command = [tool, *(os.fspath(arg) for arg in args)]
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=environment,
    )
    with process:
        try:
            out, err = process.communicate(stdin, timeout=timeout)
            outcome = Outcome(process.returncode, out, err.decode("utf-8", "replace"))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            outcome = Outcome(None, out, err.decode("utf-8", "replace"))
    if check and not outcome.ok:
        raise QemuError(command, outcome)
    return outcome


def img(*args: Name, check: bool = True, timeout: float = TIMEOUT, cwd: Name | None = None) -> Outcome:
    """Run qemu-img, and again while it fails only because the machine was busy."""
    for attempt in range(RETRIES):
        outcome = run("qemu-img", *args, check=False, timeout=timeout, cwd=cwd)
        if not _flaky(outcome):
            if check and not outcome.ok:
                raise QemuError(["qemu-img", *(os.fspath(arg) for arg in args)], outcome)
            return outcome
        time.sleep(0.01 * attempt)  # failing is quick: it stands and falls with the scheduler's mood
    return run("qemu-img", *args, check=check, timeout=timeout, cwd=cwd)


def _flaky(outcome: Outcome) -> bool:
    # LUKS key derivation is timed with getrusage, which may report no time at all.
    return not outcome.ok and "accurate CPU usage" in outcome.stderr


# --- arguments -----------------------------------------------------------------------------------


def _secret(secret: str | None) -> list[str]:
    return [] if secret is None else ["--object", f"secret,id=key0,data={_comma(secret)}"]


def _comma(text: object) -> str:
    return str(text).replace(",", ",,")


def _joined(options: Options) -> str:
    return ",".join(f"{key}={_comma(value)}" for key, value in options.items())


def _target(path: Name, fmt: str, secret: str | None, opts: Options | None) -> tuple[list[str], str]:
    """Return the options and the name that make a tool open ``path`` as wanted."""
    if secret is None and not opts:
        return ["-f", fmt], os.fspath(path)
    wanted: dict[str, object] = {"driver": fmt, "file.filename": os.fspath(path)}
    if secret is not None:
        wanted["encrypt.key-secret"] = "key0"
    wanted.update(opts or {})
    return [*_secret(secret), "--image-opts"], _joined(wanted)


# --- making images -------------------------------------------------------------------------------


def create(
    path: Path,
    size: int | str | None = None,
    *,
    fmt: str = "qcow2",
    backing: Name | None = None,
    backing_format: str | None = None,
    secret: str | None = None,
    encrypt: Options | None = None,
    unsafe: bool = False,
    cwd: Name | None = None,
    **options: object,
) -> Path:
    """Create an image; ``options`` are those of ``-o``, with underscores where QEMU has them.

    A ``secret`` encrypts it: with LUKS and quick key derivation, unless ``encrypt`` says otherwise
    (``{"format": "aes"}``, ``{"format": "luks", "cipher-mode": "cbc"}``). ``unsafe`` does not look
    at the backing file.
    """
    args: list[str] = [*_secret(secret), "-f", fmt]
    wanted = dict(options)
    if secret is not None:
        method = dict(encrypt or {"format": "luks"})
        if method["format"] == "luks":
            method.setdefault("iter-time", 10)
        wanted |= {f"encrypt.{key}": value for key, value in method.items()} | {"encrypt.key-secret": "key0"}
    if wanted:
        args += ["-o", _joined(wanted)]
    if unsafe:
        args.append("-u")
    if backing is not None:
        args += ["-b", os.fspath(backing)]
    if backing_format is not None:
        args += ["-F", backing_format]
    args.append(os.fspath(path))
    if fmt in ("qcow", "qcow2") and backing is None and cwd is None and options.keys().isdisjoint(_NO_TEMPLATE):
        is_luks = wanted.get("encrypt.format") == "luks"
        return _copy_of_template(args[:-1], path, size, secret, any_size=is_luks and not options)
    if size is not None:
        args.append(str(size))
    img("create", "-q", *args, cwd=cwd)
    return path


def _copy_of_template(
    args: list[str], path: Path, size: int | str | None, secret: str | None, *, any_size: bool
) -> Path:
    """Copy an image made by the same command before.

    QEMU takes two seconds to measure how fast it derives LUKS keys, so that small images of all sizes come from one
    (``any_size``): only the size in their headers differs.
    """
    wanted, size = size, _TEMPLATE_SIZE if any_size and _is_small(size) else size
    name = hashlib.sha256(repr((args, size)).encode()).hexdigest()[:16]
    template = templates / name
    with (templates / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be making the same one
        if not template.exists():
            own = templates / f"{name}.{os.getpid()}"
            img("create", "-q", *args, own, *([] if size is None else [str(size)]), timeout=10 * TIMEOUT)
            own.replace(template)
    _copy_sparse(template, path)
    if size != wanted:
        resize(path, str(wanted), secret=secret)
    return path


def _copy_sparse(source: Path, target: Path) -> None:
    """Copy a file with its holes, so that both take the same room."""
    with source.open("rb") as old, target.open("wb") as new:
        end = os.fstat(old.fileno()).st_size
        new.truncate(end)
        at = 0
        while at < end:
            try:
                start = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:  # no data follows
                return
            at = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            os.pwrite(new.fileno(), os.pread(old.fileno(), at - start, start), start)


def _is_small(size: int | str | None) -> bool:
    """Whether an image of the default cluster size is as large as one of any other such size: up to one L2 table."""
    found = re.fullmatch(r"(\d+)([kKmM]?)", str(size))
    return found is not None and 1 << 20 <= int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2].lower()] <= 1 << 28


def io(
    path: Name,
    *commands: str,
    fmt: str = "qcow2",
    secret: str | None = None,
    opts: Options | None = None,
    read_only: bool = False,
    check: bool = True,
    timeout: float = TIMEOUT,
    cwd: Name | None = None,
) -> Outcome:
    """Run qemu-io commands such as ``write -P 0x11 0 64k`` on an image, all in one process."""
    options, name = _target(path, fmt, secret, opts)
    # With --image-opts the format is inside the name; qemu-io takes no -f then.
    is_killed = any(command.startswith(("abort", "sigraise")) for command in commands)  # what is left then is asked for
    args = [*options, *(["-r", "-U"] if read_only else [] if is_killed else ["-t", "unsafe"])]
    for command in commands:
        args += ["-c", command]
    outcome = run("qemu-io", *args, name, check=check, timeout=timeout, cwd=cwd)
    if check and re.search(r"failed:", outcome.text):
        raise QemuError(["qemu-io", *args, name], outcome)
    return outcome


def snapshot(
    path: Name, name: str, *, action: str = "-c", opts: Options | None = None, secret: str | None = None
) -> None:
    """Create (``-c``), delete (``-d``) or apply (``-a``) an internal snapshot."""
    options, target = _target(path, "qcow2", secret, {**_NO_FLUSH, **(opts or {})})
    img("snapshot", *options, action, name, target)


def bitmap(path: Name, action: str, name: str, *args: str) -> None:
    """Run ``qemu-img bitmap``; ``action`` is ``--add``, ``--remove``, ``--disable`` and so on."""
    options, target = _target(path, "qcow2", None, _NO_FLUSH)
    img("bitmap", action, *args, *options, target, name)


def amend(path: Name, *, secret: str | None = None, **options: object) -> None:
    """Change options of an existing image."""
    target, name = _target(path, "qcow2", secret, _NO_FLUSH)
    img("amend", *target, "-o", _joined(options), name)


def resize(
    path: Name,
    size: int | str,
    *,
    shrink: bool = False,
    fmt: str = "qcow2",
    preallocation: str = "",
    secret: str | None = None,
) -> None:
    """Change the virtual size."""
    extra = ["--shrink"] if shrink else []
    if preallocation:
        extra += ["--preallocation", preallocation]
    target, name = _target(path, fmt, secret, _NO_FLUSH)
    img("resize", "-q", *target, *extra, name, str(size))


# --- asking about images -------------------------------------------------------------------------


def convert(
    path: Name,
    target: Path,
    *,
    fmt: str = "qcow2",
    target_format: str = "raw",
    snapshot: str | None = None,
    secret: str | None = None,
    opts: Options | None = None,
    compressed: bool = False,
    check: bool = True,
    timeout: float = TIMEOUT,
    target_options: Options | None = None,
    cwd: Name | None = None,
) -> Outcome:
    """Run ``qemu-img convert`` from ``path`` (one of its snapshots when named) to ``target``."""
    options, name = _target(path, fmt, secret, opts)
    args = [*options, "-U"] if "-U" not in options else options
    if snapshot is not None:
        args += ["-l", f"snapshot.name={_comma(snapshot)}"]
    if compressed:
        args.append("-c")
    if target_options:
        args += ["-o", _joined(target_options)]
    return img("convert", *args, "-O", target_format, name, target, check=check, timeout=timeout, cwd=cwd)


def raw_bytes(
    path: Name,
    *,
    fmt: str = "qcow2",
    snapshot: str | None = None,
    secret: str | None = None,
    opts: Options | None = None,
    cwd: Name | None = None,
) -> bytes:
    """Return the whole disk, or one snapshot's, as QEMU converts it to raw. For small disks."""
    with tempfile.TemporaryDirectory(prefix="qcow2-oracle-") as folder:
        target = Path(folder) / "raw"
        convert(path, target, fmt=fmt, snapshot=snapshot, secret=secret, opts=opts, cwd=cwd)
        return target.read_bytes()


_DUMP_LINE = re.compile(r"^[0-9a-f]{8,}:  ((?:[0-9a-f]{2} ){1,16})", re.MULTILINE)
_READ_END = re.compile(r"^read (?:failed: .*|\d+/\d+ bytes at offset .*)$|^.*out of range.*$", re.MULTILINE)


def reads(
    path: Name,
    ranges: Iterable[tuple[int, int]],
    *,
    fmt: str = "qcow2",
    secret: str | None = None,
    opts: Options | None = None,
    timeout: float = TIMEOUT,
    cwd: Name | None = None,
) -> list[bytes | None]:
    """Return the bytes of guest ranges as one qemu-io process reads them, None for each it cannot."""
    commands = [f"read -v {offset} {length}" for offset, length in ranges]
    outcome = io(
        path, *commands, fmt=fmt, secret=secret, opts=opts, read_only=True, check=False, timeout=timeout, cwd=cwd
    )
    found: list[bytes | None] = []
    start = 0
    for end in _READ_END.finditer(outcome.text):
        lines = _DUMP_LINE.findall(outcome.text, start, end.start())
        found.append(bytes.fromhex("".join(lines)) if lines else None)
        start = end.end()
    return found if len(found) == len(commands) else [None] * len(commands)


def read(
    path: Name,
    offset: int,
    length: int,
    *,
    fmt: str = "qcow2",
    secret: str | None = None,
    opts: Options | None = None,
    timeout: float = TIMEOUT,
    cwd: Name | None = None,
) -> bytes | None:
    """Return the bytes of one guest range as qemu-io reads them, None when it cannot."""
    return reads(path, [(offset, length)], fmt=fmt, secret=secret, opts=opts, timeout=timeout, cwd=cwd)[0]


def map_json(
    path: Name,
    *,
    fmt: str = "qcow2",
    secret: str | None = None,
    opts: Options | None = None,
    cwd: Name | None = None,
) -> list[dict[str, Any]]:
    """Return what ``qemu-img map --output=json`` prints."""
    options, name = _target(path, fmt, secret, opts)
    outcome = img("map", *options, "-U", "--output=json", name, cwd=cwd)
    ranges: list[dict[str, Any]] = json.loads(outcome.stdout)
    return ranges


def as_map_json(rows: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of our map without the field that this QEMU does not print yet (before 8.2), if it is not in ``wanted``."""
    known = any("compressed" in row for row in wanted)
    return [{key: value for key, value in row.items() if known or key != "compressed"} for row in rows]


def info_json(path: Name, *, fmt: str = "qcow2", chain: bool = False) -> Any:
    """Return what ``qemu-img info --output=json`` prints."""
    extra = ["--backing-chain"] if chain else []
    return json.loads(img("info", "-f", fmt, "-U", "--output=json", *extra, path).stdout)


def check_json(
    path: Name,
    *,
    fmt: str = "qcow2",
    secret: str | None = None,
    opts: Options | None = None,
    timeout: float = TIMEOUT,
    cwd: Name | None = None,
) -> Check:
    """Run ``qemu-img check`` without repairing anything."""
    options, name = _target(path, fmt, secret, opts)
    outcome = img("check", *options, "-U", "--output=json", name, check=False, timeout=timeout, cwd=cwd)
    counters: dict[str, Any] | None
    try:
        counters = json.loads(outcome.stdout)
    except ValueError:
        counters = None
    return Check(outcome.rc, counters, outcome.stderr)


# --- running machines ----------------------------------------------------------------------------


def monitor(
    path: Name,
    *commands: str,
    machine: str = "x86_64",
    memory: str = "16",
    drive: str = "if=ide",
    args: Iterable[str] = (),
    timeout: float = TIMEOUT,
) -> Outcome:
    """Start a stopped machine with ``path`` as its disk, run monitor commands, and quit.

    ``monitor(path, "savevm a")`` leaves an internal snapshot with VM state.
    """
    script = "".join(f"{command}\n" for command in (*commands, "quit")).encode()
    return run(
        f"qemu-system-{machine}",
        *("-accel", "tcg", "-m", memory, "-S", "-display", "none", "-nodefaults"),
        *("-drive", f"file={_comma(os.fspath(path))},format=qcow2,{drive}"),
        *("-monitor", "stdio"),
        *args,
        stdin=script,
        timeout=timeout,
    )
