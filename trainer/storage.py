"""Files of a run: a local or shared folder, or any URL that fsspec knows (s3://, gs://, memory://)."""

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec

from trainer.parsing import one_line


class Folder:
    """A folder at `url`; names are relative to it, with `/` between."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        fs, path = fsspec.url_to_fs(self.url)
        self.fs: Any = fs
        self.path: str = path
        self.is_local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of the folder's path."""
        return self.url.rsplit("/", 1)[-1]

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    def make(self) -> "Folder":
        self.fs.makedirs(self.path, exist_ok=True)
        return self

    def exists(self, name: str = "") -> bool:
        return bool(self.fs.exists(self._at(name)))

    def names(self) -> list[str]:
        """What lies directly in the folder; nothing if there is no such folder."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.path):
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self.path, detail=False))

    def read(self, name: str, start: int = 0) -> bytes:
        """The bytes of `name`, from `start` on."""
        return bytes(self.fs.cat_file(self._at(name), start=start or None))

    def write(self, name: str, content: bytes) -> None:
        """Write `name` so that a reader sees the old file or the new one, never half of it."""
        if self.is_local:
            target = Path(self._at(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, target)
            except OSError:
                os.unlink(temporary)
                raise
        else:
            self.fs.pipe_file(self._at(name), content)

    def append(self, name: str, content: bytes) -> None:
        """Add to the end of `name`. Object stores cannot: there the file is written again."""
        if self.is_local:
            with open(self._at(name), "ab", buffering=0) as file:
                end = file.tell()
                if file.write(content) != len(content):  # a full disk may take half a line
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._at(name))
        else:
            self.fs.pipe_file(self._at(name), (self.read(name) if self.exists(name) else b"") + content)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The rows of the JSON Lines file `name`; a last line that was cut off is left out, and a missing file has no rows."""
        return self.lines_from(name, 0)[0]

    def lines_from(self, name: str, start: int) -> tuple[list[dict[str, Any]], int]:
        """The rows of `name` from byte `start` on, and the byte where the next row will begin."""
        if not self.exists(name):
            return [], start
        content = (
            self.read(name, start) if self.is_local else self.read(name)[start:]
        )  # object stores refuse a range at the end
        whole = content.rfind(b"\n") + 1
        return [json.loads(line) for line in content[:whole].splitlines()], start + whole

    def append_line(self, name: str, row: Mapping[str, Any]) -> None:
        """Add `row` to the JSON Lines file `name`."""
        self.append(name, json.dumps(row).encode() + b"\n")

    def delete(self, name: str) -> None:
        """Delete the file `name`, if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._at(name))

    def put(self, local: Path, name: str) -> None:
        """Bring the local file `local` here as `name`."""
        self.write(name, local.read_bytes())

    def fetch(self, name: str, into: Path) -> Path:
        """`name` as a local file: itself where this folder is local, else a copy in the folder `into`."""
        if self.is_local:
            return Path(self._at(name))
        copy = into / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self._at(name), str(copy))
        return copy

    def remove(self) -> None:
        if self.fs.exists(self.path):
            self.fs.rm(self.path, recursive=True)

    def rename_to(self, other: "Folder") -> None:
        """One rename where the file system has it; object stores have none, and need none: their manifest is written last."""
        if self.is_local:
            os.rename(self.path, other.path)


def absolute(url: str) -> str:
    """A local path made absolute (a Ray worker's working folder is not the user's); a URL as it is."""
    return url if "://" in url else str(Path(url).expanduser().absolute())


def check_writable(url: str, field: str) -> None:
    """Raises ValueError if nothing can be written to the folder `url`, which `field` of the job names."""
    try:
        folder = Folder(url).make()
        folder.write(".writable", b"")
        folder.delete(".writable")
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(
            f"{field}: cannot write to {url} ({one_line(error)}); name a folder that you may write to"
        ) from None
