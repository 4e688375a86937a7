"""The version of the code: the commit of the checkout, and whether it has been changed since."""

import os
import re
import subprocess

from trainer.checkout import CHECKOUT


def code_version() -> dict[str, str | bool | None]:
    """`commit` (None if unknown) and `dirty`.

    They come from SWITCHWORK_COMMIT, which images and submitted jobs carry, else from git.
    """
    version = os.environ.get("SWITCHWORK_COMMIT") or _described()
    match = re.fullmatch(r"([0-9a-f]{7,40})(-dirty)?", version)
    return {"commit": match[1], "dirty": bool(match[2])} if match else {"commit": None, "dirty": False}


def code_name() -> str:
    """The version as one word, `<commit>` or `<commit>-dirty`; empty if unknown."""
    version = code_version()
    return f"{version['commit']}{'-dirty' * bool(version['dirty'])}" if version["commit"] else ""


def _described() -> str:
    """The description of this checkout by git.

    Empty without git, or if the code lies in another repository.
    """
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (CHECKOUT / ".git").exists():
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
