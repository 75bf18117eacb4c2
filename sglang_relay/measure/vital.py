"""Whether a server that does not answer yet is getting on with its start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

START_LIMIT_S = 300.0
"""Seconds without a sign of life after which a start is given up. How long a start takes depends on the model and its
disk, so that nothing limits one that goes on."""

_WORK = 0.1
"""Least share of a core that counts: a process that waits polls now and then, and so do the requests that ask it."""
_BYTES = 1 << 16
"""Least bytes in a second that count, for the same reason."""
_ASKED = "/health"
"""Lines of the log that say no more than that the server was asked whether it is ready."""


class Process(NamedTuple):
    """seconds: of processor time; bytes: read and written, by calls and by the disk."""

    seconds: float
    bytes: int


class Signs(NamedTuple):
    """log: characters written to it; processes: by id, the server's own and all that it started."""

    log: int
    processes: Mapping[int, Process]


def signs(pid: int, log: Path) -> Signs:
    """Of the process ``pid`` and its descendants, which write ``log``."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return Signs(sum(len(line) for line in lines if _ASKED not in line), _processes(pid))


def _processes(pid: int) -> dict[int, Process]:
    found: dict[int, Process] = {}
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.Error:
        return found
    for process in family:
        try:
            times, io = process.cpu_times(), process.io_counters()
            moved = io.read_bytes + io.read_chars + io.write_chars
            found[process.pid] = Process(times.user + times.system, moved)
        except psutil.Error:  # it ended meanwhile
            continue
    return found


def alive(before: Signs, after: Signs, seconds: float) -> bool:
    """Whether, in the ``seconds`` between the two, the log grew, a process started, or the processes computed, read or
    wrote. One that spins is taken to work."""
    if after.log > before.log or after.processes.keys() - before.processes.keys():
        return True
    pairs = [(old, after.processes[pid]) for pid, old in before.processes.items() if pid in after.processes]
    worked = sum(new.seconds - old.seconds for old, new in pairs)
    moved = sum(new.bytes - old.bytes for old, new in pairs)
    return worked >= _WORK * seconds or moved >= _BYTES * seconds
