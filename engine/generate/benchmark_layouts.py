"""Folder and file names that each benchmark's own evaluator expects of a set of pictures.

`plain` is ours: `images/00012-a-red-circle-3.png`, prompt and picture counted from 0. The others:

* `t2i-compbench`: `samples/{prompt}_{index:06d}.png`. The index runs over all pictures, a prompt's
  being adjacent; the evaluators take as the prompt what stands before the first underscore, and
  read every file of `samples/`. Source: Karine-Huang/T2I-CompBench, Readme.md "Evaluation",
  GORS_finetune/inference_eval.py, BLIPvqa_eval/BLIP_vqa.py, UniDet_eval/numeracy_eval.py.
* `geneval`: `00012/metadata.jsonl`, the prompt's line of evaluation_metadata.jsonl, and
  `00012/samples/0003.png`; `grid.png` is optional and left out. Source: djghosh13/geneval,
  README.md "Image generation", evaluation/evaluate_images.py.
* `wise`: `{prompt_id}.png` with ids 1 to 1000, one picture a prompt. Source: PKU-YuanGroup/WISE,
  README.md "WISE_Verified Evaluation", vllm_eval.py, and WISE_legacy/gpt_eval.py.
"""

import json
import re
from dataclasses import dataclass, field

from engine.prompts.files import Row
from engine.settings.errors import UserError

LAYOUTS = ("plain", "t2i-compbench", "geneval", "wise")
NAME_BYTES = 240  # of the 255 that file systems hold; the rest is a temporary name's
WISE_IDS = range(1, 1001)
_OURS = re.compile(  # each read once from left to right, however long the name
    r"images/[0-9][a-z0-9-]*\.png|samples/[^/\x00-\x1f\x7f]+_[0-9]{6,}\.png"
    r"|[0-9]+/samples/[0-9]+\.png|[0-9]+/metadata\.jsonl|[0-9]+\.png"
)


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a set of pictures, as paths relative to its folder, with "/".

    Attributes:
        pictures: P x num_generations names, a prompt's adjacent; all distinct, also where case
            does not count.
        texts: other files that the evaluator reads, by name.
        altered: numbers, from 0, of the prompts that an evaluator will not read as they are.
    """

    pictures: list[str]
    texts: dict[str, str] = field(default_factory=dict)
    altered: list[int] = field(default_factory=list)


def layout_files(layout: str, rows: list[Row], num_generations: int, source: str) -> Files:
    """Names for `num_generations` pictures of each row.

    Args:
        layout: one of LAYOUTS.
        source: the prompt file, for errors.
    Raises: UserError naming the row and the key that the benchmark asks for.
    """
    numbered = [(i, k) for i in range(len(rows)) for k in range(num_generations)]
    if layout == "geneval":
        texts = {
            f"{i:05d}/metadata.jsonl": _geneval_line(row, i, source) for i, row in enumerate(rows)
        }
        return Files([f"{i:05d}/samples/{k:04d}.png" for i, k in numbered], texts)
    if layout == "wise":
        if num_generations != 1:
            raise UserError(
                "--layout wise: its evaluator reads one picture a prompt, "
                f"num_generations must be 1, got {num_generations}"
            )
        return Files([f"{number}.png" for number in _wise_ids(rows, source)])
    prompts = [row["prompt"] for row in rows]
    if layout == "t2i-compbench":
        spelt = [_compbench_prompt(prompt) for prompt in prompts]
        return Files(
            [f"samples/{spelt[i]}_{n:06d}.png" for n, (i, _) in enumerate(numbered)],
            altered=[i for i, prompt in enumerate(prompts) if spelt[i] != prompt],
        )
    assert layout == "plain", layout
    slugs = [_slug(prompt) for prompt in prompts]
    return Files([f"images/{i:05d}{slugs[i]}-{k}.png" for i, k in numbered])


def is_ours(name: object) -> bool:
    """Whether `layout_files` may have made this name; what it made, may be removed."""
    return isinstance(name, str) and _OURS.fullmatch(name) is not None


def _slug(prompt: str) -> str:
    """At most 60 of the characters that every file system takes, led by a dash; perhaps none."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "".join(f"-{word}" for word in words)[:60]


def _compbench_prompt(prompt: str) -> str:
    # A slash ends a folder's name and an underscore the prompt.
    text = re.sub(r"[\x00-\x1f\x7f/\\_]", " ", prompt).strip() or "prompt"
    room = NAME_BYTES - len("_000000000.png")
    return text.encode()[:room].decode(errors="ignore").rstrip()


def _geneval_line(row: Row, index: int, source: str) -> str:
    for key in ("tag", "include"):
        if key not in row:
            raise UserError(
                f"{source}: prompt {index + 1}: --layout geneval needs {key!r}, "
                "as in GenEval's evaluation_metadata.jsonl"
            )
    return json.dumps(row, default=str) + "\n"


def _wise_ids(rows: list[Row], source: str) -> list[int]:
    """`prompt_id` of each row; where no row has one, the rows' numbers."""
    if not any("prompt_id" in row for row in rows):
        ids = list(range(1, len(rows) + 1))
    else:
        ids = [_whole(row.get("prompt_id")) for row in rows]
    seen: set[int] = set()
    for i, number in enumerate(ids):
        if number not in WISE_IDS or number in seen:
            got = rows[i].get("prompt_id", number)
            raise UserError(
                f"{source}: prompt {i + 1}: --layout wise needs a 'prompt_id' of its own "
                f"between 1 and 1000, got {str(got)[:40]!r}"
            )
        seen.add(number)
    return ids


def _whole(value: object) -> int:
    """A whole number or its digits, as a CSV holds them; else 0."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,4}", value.strip()):
        return int(value)
    return value if type(value) is int else 0
