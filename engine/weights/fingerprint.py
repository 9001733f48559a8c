"""A short hash that tells one checkpoint folder from another."""

import hashlib
from pathlib import Path

from engine.settings.errors import UserError

SUFFIXES = (".json", ".safetensors", ".bin", ".pt")
WHOLE = 8 << 20  # bytes up to which a file is read whole
BLOCK, BLOCKS = 64 << 10, 64  # what is read of a larger one, spread evenly over it


def checkpoint_fingerprint(folder: Path) -> str:
    """16 hex digits of the names, sizes and contents of a checkpoint's files.

    Of a file above 8 MiB 64 blocks are read: training changes every weight, so that two
    checkpoints of one model differ there too, and 14 GB need no minute.

    Raises: UserError naming the folder or file that cannot be read.
    """
    digest = hashlib.sha256()
    try:
        files = sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file())
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            with file.open("rb") as handle:
                if size <= WHOLE:
                    digest.update(handle.read())
                    continue
                for block in range(BLOCKS):
                    handle.seek((size - BLOCK) * block // (BLOCKS - 1))
                    digest.update(handle.read(BLOCK))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no such checkpoint folder") from error
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    return digest.hexdigest()[:16]
