"""The house: who may import whom, and how long a file may be."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "kernels", "bindings", "rewards", "bench")
# What each folder may import of ours.
ARROWS = {
    "kernels": {"kernels"},
    "rewards": {"rewards"},
    "engine": {"engine", "kernels", "rewards"},
    "bindings": {"bindings", "kernels", "engine"},
    "bench": set(FOLDERS),
}
# A room of engine/ imports only from floors below its own.
FLOORS = (
    ("settings",),
    ("model", "run"),
    ("weights", "report"),
    ("policy",),
    ("prompts", "rollout", "convert"),
    ("generate", "tiny", "memory"),
    ("learner", "experts"),
    ("evaluate",),
    ("train",),
)
LONGEST_FILE = 350


def files() -> dict[str, Path]:
    """Module name -> file, of all our modules."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in found
    }


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Our modules that a file imports, inside functions too."""
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in known else node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in known and name != module}


def graph() -> dict[str, set[str]]:
    known = files()
    return {module: imports(module, path, known) for module, path in known.items()}


def test_no_two_files_import_each_other():
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        raise AssertionError(f"imports in a circle: {' -> '.join(error.args[1])}") from None


def test_folders_import_along_the_arrows_only():
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if other.split(".")[0] not in ARROWS[module.split(".")[0]]
    ]
    assert not wrong


def test_rooms_import_from_lower_floors_only():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for module, others in graph().items():
        for other in others:
            ours, theirs = module.split("."), other.split(".")
            if ours[0] != "engine" or theirs[0] != "engine" or ours[1:2] == theirs[1:2]:
                continue
            if floor[theirs[1]] >= floor[ours[1]]:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_files_are_short():
    paths = [path for folder in (*FOLDERS, "tests") for path in (ROOT / folder).glob("**/*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert not {str(p.relative_to(ROOT)): n for p, n in lengths.items() if n > LONGEST_FILE}
