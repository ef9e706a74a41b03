"""One run in one folder: a lock that a process holds while it writes there, and that ends with the process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not POSIX: no lock
    fcntl = None

NAME = "run.lock"
_SIZE = 512  # of the file, which is written over in one piece: a crash leaves what it said before
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems that have none


class FolderLock:
    """The lock of a run's folder, which its holder may take again.

    The file `run.lock` stays when the lock is given back: were it removed, two processes could lock two files of this
    name. It says who holds the lock, and which run the folder is of. What counts is the system's lock on it, which a
    process gives back however it ends; what the file says of a process may be long past.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._depth, self._file = 0, None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold it, inside. Raises BlockingIOError, which names the process that has it, and OSError where the folder
        cannot be written."""
        if self._depth == 0:
            self._file = self._take()
        self._depth += 1
        try:
            if self._depth == 1:
                self.name_run(self.run())
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._file.close()
                self._file = None

    def run(self) -> str | None:
        """The name of the run that the folder is of, None where nobody has said."""
        run = self._read().get("run")
        return run if isinstance(run, str) else None

    def name_run(self, run: str | None) -> None:
        """Say which run the folder is of, if the lock is held."""
        if self._file is None:
            return
        says = {"pid": os.getpid(), "host": platform.node()[:100], "run": run}
        self._file.seek(0)
        self._file.write(json.dumps(says).ljust(_SIZE - 1).encode() + b"\n")
        os.fsync(self._file)

    def _take(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            holder = self._read()
            who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown machine')}"
            raise BlockingIOError(f"{self.path.parent} is in use by {who}: one run at a time writes there") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        return file

    def _read(self) -> dict[str, Any]:
        try:
            says = json.loads(self.path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return says if isinstance(says, dict) else {}
