"""A folder that a job fills with pictures, however often it is stopped and started again.

Beside the pictures: `settings.json`, what they were made with, written first; `manifest.jsonl`,
one object a picture {file, prompt, plan, seed, sample_id, settings}, a batch's lines appended
after its pictures are on disk. A picture counts as made when its line and its file are there. One
process at a time fills a folder.

Both files may be a stranger's. Nothing is written or removed through a link below the folder, and
what the files name is removed only where it is a name that this program gives.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.generate.benchmark_layouts import is_ours
from engine.run.checkpoint import atomic_write_text
from engine.run.grids import save_picture
from engine.run.inside import inside, inside_or_none
from engine.settings.errors import UserError

SETTINGS, MANIFEST = "settings.json", "manifest.jsonl"
LINE_BYTES = 1 << 25  # of the manifest; the prompt and the plan of one picture are far shorter
_LEFTOVER = re.compile(r"\.(.+)\.tmp-[0-9]+")
Record = dict[str, Any]


class PictureFolder:
    """The folder, as it was found.

    Args:
        path: it need not exist; nothing is written before `begin`.
        pictures: relative name of each picture; see engine.generate.benchmark_layouts.
        texts: other files, by name.
        settings: JSON values that decide the pictures.
        shown: more of them, for the reader of settings.json, such as paths: they may change.
        overwrite: forget what an earlier job made.
    Raises: UserError naming the setting that differs from an earlier job's, the picture that
        another program made, or the link that would lead out of the folder.

    Attributes:
        records: picture number -> manifest line, of the pictures that are there.
    """

    def __init__(
        self,
        path: Path,
        pictures: list[str],
        texts: dict[str, str],
        settings: dict[str, Any],
        *,
        shown: dict[str, Any],
        overwrite: bool = False,
    ) -> None:
        self.path, self.pictures, self.texts, self.overwrite = path, pictures, texts, overwrite
        # As JSON gives them back, so that they compare equal when read.
        self.settings = json.loads(json.dumps(settings))
        self.shown = shown
        canonical = json.dumps(settings, sort_keys=True)
        self.settings_hash = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        self.earlier = self._read_settings()
        for name in (MANIFEST, *pictures, *texts):
            inside(path, name)  # now, before anything is drawn or removed
        self.records: dict[int, Record] = {}
        if overwrite:
            return
        if self.earlier is None:
            made = next((name for name in pictures if (path / name).exists()), None)
            if made is not None:
                raise UserError(
                    f"{path / made}: there already, with no {SETTINGS} beside it; "
                    "--overwrite replaces it"
                )
            return
        then = self.earlier["settings"]
        for key in dict.fromkeys([*self.settings, *then]):
            if self.settings.get(key) != then.get(key):
                raise UserError(
                    f"{path}: {_key(key)} was {_short(then.get(key))}, now "
                    f"{_short(self.settings.get(key))}; --overwrite starts anew"
                )
        numbers = {name: i for i, name in enumerate(pictures)}
        for record in self._read_manifest():
            number = numbers.get(record["file"])
            wanted = record.get("settings") == self.settings_hash
            if number is not None and wanted and (path / pictures[number]).is_file():
                self.records[number] = record

    @property
    def complete(self) -> bool:
        return len(self.records) == len(self.pictures)

    def begin(self) -> None:
        """Make the folder fit to be added to. Raises: UserError naming what cannot be written."""
        try:
            if self.overwrite and self.earlier is not None:
                self._clear()
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers("")
            parents = (name.rpartition("/")[0] for name in (*self.pictures, *self.texts))
            for folder in filter(None, dict.fromkeys(parents)):
                inside(self.path, folder).mkdir(parents=True, exist_ok=True)
                self._remove_leftovers(f"{folder}/")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from error
        content = {"settings": self.settings, "texts": list(self.texts), **self.shown}
        atomic_write_text(inside(self.path, SETTINGS), json.dumps(content, indent=1) + "\n")
        self.finish()
        for name, text in self.texts.items():
            atomic_write_text(inside(self.path, name), text)

    def add(self, made: dict[int, tuple[Tensor, Record]]) -> None:
        """Write pictures, (3, H, W) in [0, 1], and then their lines; those there are left alone."""
        new = {number: made[number] for number in made if number not in self.records}
        lines = []
        for number, (pixels, record) in new.items():
            file = self.pictures[number]
            save_picture(inside(self.path, file), pixels)
            self.records[number] = {"file": file, **record, "settings": self.settings_hash}
            lines.append(_line(self.records[number]))
        manifest = inside(self.path, MANIFEST)
        try:
            with manifest.open("a", encoding="utf-8") as handle:
                handle.writelines(lines)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise UserError(f"{manifest}: cannot be written: {error.strerror}") from error

    def finish(self) -> None:
        """Bring the manifest into the pictures' order, without lines that hold no longer."""
        text = "".join(_line(self.records[number]) for number in sorted(self.records))
        manifest = inside(self.path, MANIFEST)
        if not manifest.exists() or manifest.read_text(encoding="utf-8", errors="replace") != text:
            atomic_write_text(manifest, text)

    def _read_settings(self) -> dict[str, Any] | None:
        file = inside(self.path, SETTINGS)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not JSON: {error}") from error
        known = isinstance(found, dict) and isinstance(found.get("settings"), dict)
        if not known or not isinstance(found.get("texts", []), list):
            raise UserError(f"{file}: not the settings of engine.generate")
        return found

    def _read_manifest(self) -> Iterator[Record]:
        """The lines that may be this program's: flat objects with the name of a file.

        Others are passed over: a kill while lines were appended leaves half of one.
        """
        try:
            with inside(self.path, MANIFEST).open("rb") as handle:
                while line := handle.readline(LINE_BYTES):
                    try:
                        record = json.loads(line)
                    except (ValueError, RecursionError):
                        continue
                    if isinstance(record, dict) and isinstance(record.get("file"), str):
                        if not any(isinstance(value, (dict, list)) for value in record.values()):
                            yield record
        except OSError:
            return

    def _remove_leftovers(self, folder: str) -> None:
        """The temporary files of a write that was killed, in "" or "some/folder/"."""
        for entry in os.listdir(self.path / folder):
            match = _LEFTOVER.fullmatch(entry)
            if match and (is_ours(folder + match[1]) or folder + match[1] in (SETTINGS, MANIFEST)):
                leftover = inside_or_none(self.path, folder + entry)
                if leftover is not None and leftover.is_file():
                    leftover.unlink()

    def _clear(self) -> None:
        """Remove the files of an earlier job, so that no evaluator finds them among the new."""
        folders = set()
        names = (record["file"] for record in self._read_manifest())
        for name in chain((self.earlier or {}).get("texts", []), names):
            file = inside_or_none(self.path, name) if is_ours(name) else None
            if file is None:
                continue
            if file.is_file():
                file.unlink()
            for folder in list(file.parents)[: name.count("/")]:
                if folder not in folders and folder.is_dir():
                    folders.add(folder)
        for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
        inside(self.path, MANIFEST).unlink(missing_ok=True)


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _key(name: str) -> str:
    return name if name.isidentifier() and len(name) <= 60 else _short(name)
