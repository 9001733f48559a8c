"""A folder that a stranger prepared, and an audit of what lies outside it."""

import os
from argparse import Namespace
from pathlib import Path

from tests.engine.generate.test_folder import fill


def prepare(tmp_path: Path) -> Namespace:
    """A folder to be filled, `out`, beside files that are no one's to touch."""
    outside = tmp_path / "outside"
    for name in ("thesis.txt", "images/00000-a-0.png", "samples/0000.png", "0000.png", "1.png"):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_bytes(b"precious " * 9)
    (outside / "empty").mkdir()
    fill(tmp_path / "out")
    return Namespace(out=tmp_path / "out", outside=outside)


def audit(folder: Path) -> dict[str, tuple]:
    """Everything below: kind, content or target, time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        if path.is_symlink():
            content = os.readlink(path)
        else:
            content = path.read_bytes() if path.is_file() else sorted(os.listdir(path))
        found[str(path)] = (state.st_mode, state.st_mtime_ns, state.st_ino, content)
    return found


def hostile_names(outside: Path) -> list:
    target = f"{outside}/thesis.txt"
    return [
        target, f"/{target}", f"//{target}", f"///{target}", f"./{target}", f"./../{target}",
        "../outside/thesis.txt", "images/../../outside/thesis.txt", "00000/..//../outside/thesis.txt",
        "00000/samples/../../../outside/1.png", "../outside/1.png", f"/{outside}/1.png",
        f"/{outside}/images/00000-a-0.png", "../outside/images/00000-a-0.png", f"{outside}/empty",
        "/", "//", ".", "./", "..", "", " ", "\0", "00000/samples/0000.png\0", f"{target}\0.png",
        "a" * 300, "a/" * 5000, "1" * 5000 + ".png", "images/" + "0-" * 50_000 + ".png",
        "samples/" + "_000000" * 10_000 + ".png", "\ud800.png", "samples/\ud800_000000.png", "~",
        [], {}, [[target]], {"file": target}, None, True, 3, -1.5, 1e308, [f"/{target}"],
    ]  # fmt: skip


def swap(path: Path, target: Path) -> None:
    """Put a link where a file or a folder was, and what was there, at the link's target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
