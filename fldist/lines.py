"""Files that grow by whole lines. A line that cannot be written now is kept, and written when there is room again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


class Lines:
    """Appends to one file, unbuffered: what `write` has taken is in the file when it returns, or waits in `waiting`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting = b""
        self.problem: str | None = None
        """Why lines wait (a full disk), or None."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.size = os.fstat(self._file).st_size

    def write(self, lines: Iterable[str] = ()) -> None:
        """Append lines, and those that wait before them; never half of what it is given."""
        data = self.waiting + "".join(lines).encode()
        if not data:
            return
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
            self.waiting = data
            self.problem = f"{self.path.name} cannot be written ({error.strerror}): its lines are kept in memory"
            return
        self.size += len(data)
        self.waiting, self.problem = b"", None

    def sync(self) -> None:
        """Have what is written outlive a power failure."""
        os.fsync(self._file)

    def close(self) -> None:
        """Write what waits and close; OSError when it still cannot be written."""
        if self._file < 0:
            return
        self.write()
        os.close(self._file)
        self._file = -1
        if self.problem is not None:
            raise OSError(self.problem)
