"""The one place that decides what may be written or removed in a folder that a user names.

Such a folder may come from a stranger, so the names in its files and the links in it are not to be
trusted: a manifest line, or a link called `images`, must not lead anywhere else. The folder itself
may be a link, for its path is what the user typed.
"""

import os
import shutil
import stat
from pathlib import Path

from engine.settings.errors import UserError

PART_BYTES, NAME_BYTES = 255, 1024  # what file systems hold; far more than any name of ours


def inside(root: str | Path, name: object) -> Path:
    """The file or folder `name` of `root`, there or not, once it is sure to lie in it.

    Every part of the name below `root` is looked at, so what is returned is its real place: its
    `os.path.realpath` is that of `root`, a slash and `name`. Call it right before each use.

    Args:
        name: relative, with "/"; from a file it may be anything.
    Raises: UserError where it is no plain name (empty, absolute, with "..", "." or NUL), or a
        symbolic link, a pipe or a device lies on the way or at its end.
    """
    parts = _parts(name)
    if parts is None:
        raise UserError(f"{root}: {_short(name)} cannot be the name of a file in this folder")
    path = os.fspath(root)
    for part in parts:
        parent, path = path, os.path.join(path, part)
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            break  # nor is there anything below it
        except OSError as error:
            raise UserError(f"{parent}: {error.strerror}") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            link = f"a symbolic link, which is not followed below {root}"
            raise UserError(f"{path}: {link if stat.S_ISLNK(mode) else 'no file and no folder'}")
    return Path(root, *parts)


def inside_or_none(root: str | Path, name: object) -> Path | None:
    """As `inside`, for names that are passed over where they cannot be used."""
    try:
        return inside(root, name)
    except UserError:
        return None


def remove_folder(root: str | Path, name: str) -> None:
    """Remove a folder of `root` with all that is in it; links in it go, what they name stays."""
    shutil.rmtree(inside(root, name))


def write_new(path: Path, data: bytes) -> None:
    """Write a temporary file, in place of one that a killed process left under the same name.

    Made anew: opened to be overwritten, a link of that name would be followed.
    """
    path.unlink(missing_ok=True)
    with path.open("xb") as handle:
        handle.write(data)


def _parts(name: object) -> list[str] | None:
    if not isinstance(name, str) or len(name) > NAME_BYTES or "\0" in name:
        return None
    try:
        size = len(os.fsencode(name))
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return None
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts)
    short = size <= NAME_BYTES and all(len(os.fsencode(part)) <= PART_BYTES for part in parts)
    return parts if plain and short else None


def _short(name: object) -> str:
    text = ascii(name[:60] if isinstance(name, str) else type(name).__name__)
    return text if len(text) <= 60 else f"{text[:57]}..."
