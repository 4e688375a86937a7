"""Which code trains: the commit of the checkout, and whether it was changed since."""

import os
import re
import subprocess

from trainer.checkout import CHECKOUT


def code_version() -> dict[str, str | bool | None]:
    """`commit` (None where nobody knows) and `dirty`: from SWITCHWORK_COMMIT, which images and submitted jobs carry, else from git."""
    told = os.environ.get("SWITCHWORK_COMMIT") or _described()
    found = re.fullmatch(r"([0-9a-f]{7,40})(-dirty)?", told)
    return {"commit": found[1], "dirty": bool(found[2])} if found else {"commit": None, "dirty": False}


def code_name() -> str:
    """The same as one word, `<commit>` or `<commit>-dirty`; empty where nobody knows."""
    version = code_version()
    return f"{version['commit']}{'-dirty' * bool(version['dirty'])}" if version["commit"] else ""


def _described() -> str:
    """What git says of this checkout; empty without git, or where the code lies in somebody else's repository."""
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (CHECKOUT / ".git").exists():
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
