"""Files of a run, in a local or shared folder or at any URL of fsspec (s3://, gs://, memory://)."""

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import fsspec

from trainer.parsing import Json, one_line


class Folder:
    """A folder at `url`; names of files are relative to it, with `/` as separator."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        fs, path = fsspec.url_to_fs(self.url)
        self.fs: fsspec.AbstractFileSystem = fs
        self.path: str = path
        protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
        self.is_local = "file" in protocols

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
        """Create the folder and those above it, if they are missing."""
        self.fs.makedirs(self.path, exist_ok=True)
        return self

    def exists(self, name: str = "") -> bool:
        """Whether the folder has an entry `name`; without `name`, whether the folder exists."""
        return bool(self.fs.exists(self._at(name)))

    def names(self) -> list[str]:
        """Names of the files and folders directly in this one; empty if it does not exist."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.path):
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self.path, detail=False))

    def read(self, name: str, start: int = 0) -> bytes:
        """The bytes of the file `name` from `start` on."""
        return bytes(self.fs.cat_file(self._at(name), start=start or None))

    def write(self, name: str, content: bytes) -> None:
        """Write the file `name` atomically: a reader sees the old file or the new one."""
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
        """Append to the file `name`; object stores cannot append, so there it is written anew."""
        if self.is_local:
            with open(self._at(name), "ab", buffering=0) as file:
                end = file.tell()
                if file.write(content) != len(content):  # a full disk may accept half a line
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._at(name))
        else:
            self.fs.pipe_file(self._at(name), (self.read(name) if self.exists(name) else b"") + content)

    def lines(self, name: str) -> list[Json]:
        """The rows of the JSON Lines file `name`.

        A missing file has no rows, and an incomplete last line is left out.
        """
        return self.lines_from(name, 0)[0]

    def lines_from(self, name: str, start: int) -> tuple[list[Json], int]:
        """The rows of `name` from byte `start` on, and the byte at which the next row begins."""
        if not self.exists(name):
            return [], start
        # Object stores refuse a range that begins at the end of the file.
        content = self.read(name, start) if self.is_local else self.read(name)[start:]
        complete = content[: content.rfind(b"\n") + 1]
        return [json.loads(line) for line in complete.splitlines()], start + len(complete)

    def append_line(self, name: str, row: Mapping[str, object]) -> None:
        """Append `row` to the JSON Lines file `name`."""
        self.append(name, json.dumps(row).encode() + b"\n")

    def delete(self, name: str) -> None:
        """Delete the file `name` if it exists."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._at(name))

    def put(self, local: Path, name: str) -> None:
        """Copy the local file `local` into this folder as `name`."""
        self.write(name, local.read_bytes())

    def fetch(self, name: str, into: Path) -> Path:
        """The path of `name` if this folder is local, else of a copy in the folder `into`."""
        if self.is_local:
            return Path(self._at(name))
        copy = into / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        self.fs.get_file(self._at(name), str(copy))
        return copy

    def remove(self) -> None:
        """Remove the folder with all its content, if it exists."""
        if self.fs.exists(self.path):
            self.fs.rm(self.path, recursive=True)

    def rename_to(self, other: "Folder") -> None:
        """Rename a local folder to `other`.

        At a URL nothing is done: object stores cannot rename, and readers there wait for the
        manifest, which is written last.
        """
        if self.is_local:
            os.rename(self.path, other.path)


def absolute(url: str) -> str:
    """`url`, made absolute if it is a local path: a Ray worker has another working directory."""
    return url if "://" in url else str(Path(url).expanduser().absolute())


def check_writable(url: str, field: str) -> None:
    """Raises ValueError if the folder `url`, the value of the job's `field`, is not writable."""
    try:
        folder = Folder(url).make()
        folder.write(".writable", b"")
        folder.delete(".writable")
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(
            f"{field}: cannot write to {url} ({one_line(error)}); use a folder that you may write to"
        ) from None
