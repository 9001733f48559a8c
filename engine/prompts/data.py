"""What a policy is asked: the order in which prompts are drawn, and the text around a prompt."""

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from engine.prompts.files import EMBEDDED, Row, load_prompts, parse_json
from engine.settings.errors import UserError

__all__ = [
    "EMBEDDED",
    "REASONING_FILE",
    "ROLES",
    "SYSTEM",
    "PromptSampler",
    "PromptTemplate",
    "Row",
    "load_prompts",
    "load_template",
    "spread",
]

REASONING_FILE = Path(__file__).parent / "reasoning.txt"
ROLES = ("<|User|>", "<|Assistant|>")
SYSTEM = (
    "You are a helpful assistant that understands both language and pictures, "
    "and answers in natural language."
)


def spread(rows: list[Row], count: int) -> list[Row]:
    """`count` rows, or all if there are fewer, from all over a file: its task types are in runs."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


@dataclass(frozen=True, slots=True)
class PromptSampler:
    """Which rows a step trains on: shuffled epochs, as a pure function of (seed, step).

    Every row comes once an epoch; a batch may span the end of one and the start of the next.
    """

    num_rows: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.batch < 1:
            raise ValueError(f"num_rows and batch must be >= 1, got {self.num_rows}, {self.batch}")

    def rows(self, step: int) -> list[int]:
        """Indices in [0, num_rows) of step `step` >= 0; `batch` of them."""
        places = range(step * self.batch, (step + 1) * self.batch)
        return [
            _epoch_order(self.num_rows, self.seed, place // self.num_rows)[place % self.num_rows]
            for place in places
        ]


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    # A string seed is hashed by Random itself: (seed, epoch) pairs do not collide.
    return tuple(random.Random(f"{seed}/{epoch}").sample(range(num_rows), num_rows))


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The Janus "deepseek" conversation around a prompt, as text without the BOS token.

    Attributes:
        system: opens stage 1; empty: no system prompt.
        reasoning: the instruction to plan; its first `{}` stands for the prompt.
        roles: who asks and who answers. T2I-R1 writes plain "User" and "Assistant".
    """

    system: str
    reasoning: str
    roles: tuple[str, str] = ROLES

    def stage1_text(self, prompt: str) -> str:
        """What the semantic CoT continues."""
        # Not str.format: prompts and instructions may hold braces of their own.
        return self._conversation(self.system, self.reasoning.replace("{}", prompt, 1))

    def stage2_text(self, prompt: str, cot: str | None) -> str:
        """What precedes the image-start token; cot None: the bare prompt, as Janus itself draws."""
        return self._conversation("", prompt if cot is None else f"{prompt}. {cot}")

    def _conversation(self, system: str, message: str) -> str:
        opening = f"{system}\n\n" if system else ""
        user, assistant = self.roles
        return f"{opening}{user}: {message.strip()}\n\n{assistant}:"


def load_template(checkpoint_dir: Path | None, reasoning_prompt_path: str | None) -> PromptTemplate:
    """The template of a checkpoint, with the user's instruction where one is given.

    Args:
        checkpoint_dir: its `prompt_template.json` {"system", "reasoning"} and perhaps
            {"roles": [user, assistant]}, if there is one, replaces the packaged texts.
        reasoning_prompt_path: text file that replaces the instruction alone; T2I-R1's
            `data/prompt/reasoning_prompt.txt` can be used as it is.
    Raises: UserError naming the file that is unreadable or has no `{}` slot.
    """
    system, reasoning, source = SYSTEM, _read_text(REASONING_FILE), REASONING_FILE
    roles = ROLES
    template_file = checkpoint_dir / "prompt_template.json" if checkpoint_dir else None
    if template_file is not None and template_file.exists():
        source = template_file
        found = parse_json(_read_text(source), source)
        for key in ("system", "reasoning"):
            if not isinstance(found, dict) or not isinstance(found.get(key), str):
                raise UserError(f"{source}: must be an object with a string {key!r}")
        system, reasoning = found["system"], found["reasoning"]
        given = found.get("roles", list(ROLES))
        if not isinstance(given, list) or [type(role) for role in given] != [str, str]:
            raise UserError(f"{source}: 'roles' must be a list of two strings")
        roles = (given[0], given[1])
    if reasoning_prompt_path is not None:
        source = Path(reasoning_prompt_path)
        reasoning = _read_text(source)
    if "{}" not in reasoning:
        raise UserError(f"{source}: the instruction has no {{}} slot for the prompt")
    return PromptTemplate(system, reasoning, roles)


def _read_text(path: Path) -> str:
    """A text file without the newline that editors put at its end."""
    try:
        return path.read_text(encoding="utf-8-sig").rstrip("\r\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
