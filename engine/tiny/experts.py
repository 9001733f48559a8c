"""The tiny world's reward experts: a trained CLIP, and exact analysis for the other three slots.

`gdino` answers as a detector does (boxes with words, fed to the published formulas), `git` as
a yes/no attribute model does, `orm` as a whole-prompt model does. The three share one
`SceneReader`, so a batch is analysed once.
"""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.settings.errors import UserError
from engine.tiny.scene_reader import MAX_OBJECTS, Reading, SceneReader
from engine.tiny.world import COLORS, IMAGE_SIZE, SHAPES, SIZES, TEXTURES
from rewards import HPS, RewardExpert
from rewards.detection import LOCALITIES, Detections, asked_names, detection_scores, questions_of

EXPERT_NAMES = ("hps", "gdino", "git", "orm")
VOCABULARY = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "texture": TEXTURES,
    "size": tuple(SIZES),
}
WORDS = {word: (kind, i) for kind, words in VOCABULARY.items() for i, word in enumerate(words)}
ANY, UNSURE, NEVER = -1, -2, -3  # beside a word's index: not asked, not told, not to be had
Row = dict[str, Any]


def _named(reading: Reading, b: int, name: str) -> Tensor:
    """(4,) probability that each slot of picture b is what `name` says."""
    probability = reading.present[b]
    for word in name.split():
        if word not in WORDS:
            raise UserError(f"the tiny world has no word {word!r} (in {name!r})")
        kind, i = WORDS[word]
        probability = probability * getattr(reading, kind)[b, :, i]
    return probability


class Detector:
    """The GroundingDINO slot: hard detections, scored by the paper's formulas."""

    name = "gdino"

    def __init__(self, reader: SceneReader) -> None:
        self._reader = reader

    def score(self, prompts: list[str], images: Tensor, metadata: list[Row]) -> Tensor:
        """(B,) fp32 in [0, 1]; see `rewards.RewardExpert`."""
        questions = questions_of(metadata).to(images.device)
        found = self.detect(self._reader.read(images), questions.names)
        return detection_scores(questions, found, image_size=(IMAGE_SIZE, IMAGE_SIZE))

    def detect(self, reading: Reading, names: list[list[str]]) -> Detections:
        """What stands out as an object and has all of a name's words among its surest ones.

        Args: names: what to look for in each of the B pictures.
        """
        surest = [getattr(reading, kind).max(-1) for kind in VOCABULARY]
        seen = torch.stack([i.where(sure > 0.4, UNSURE) for sure, i in surest], -1)  # (B, S, 4)
        wanted = _word_indices(names).to(seen.device)[:, :, None]  # (B, P, 1, 4)
        named = ((wanted == ANY) | (wanted == seen[:, None])).all(-1)
        present = reading.present * (reading.present > 0.5)
        return Detections(reading.boxes, present[:, None] * named)


def _word_indices(names: list[list[str]]) -> Tensor:
    """(B, P, 4) for each kind of word the index that a name asks for, ANY or NEVER."""
    kinds = list(VOCABULARY)
    indices = torch.full((len(names), max(map(len, names)), len(kinds)), NEVER)
    for b, row in enumerate(names):
        for p, name in enumerate(row):
            asked = [ANY] * len(kinds)
            for word in name.split():
                kind, i = WORDS.get(word, (kinds[0], NEVER))
                k = kinds.index(kind)
                asked[k] = i if asked[k] in (ANY, i) else NEVER  # nothing is two colours
            indices[b, p] = torch.tensor(asked)
    return indices


class AttributeVQA:
    """The GIT slot: the mean over the asked names of a soft P(yes)."""

    name = "git"

    def __init__(self, reader: SceneReader) -> None:
        self._reader = reader

    def score(self, prompts: list[str], images: Tensor, metadata: list[Row]) -> Tensor:
        """(B,) fp32 in [0, 1]; see `rewards.RewardExpert`."""
        reading = _on_cpu(self._reader.read(images))
        scores = []
        for b, row in enumerate(metadata):
            answers = torch.stack([_named(reading, b, name).max() for name in asked_names(row)])
            scores.append(answers.mean())
        return torch.stack(scores).to(images.device)


class WholePromptORM:
    """The ORM slot: a soft P(yes) that the picture shows the prompt, all of it and no more."""

    name = "orm"

    def __init__(self, reader: SceneReader) -> None:
        self._reader = reader

    def score(self, prompts: list[str], images: Tensor, metadata: list[Row]) -> Tensor:
        """(B,) fp32 in [0, 1]; see `rewards.RewardExpert`."""
        reading = _on_cpu(self._reader.read(images))
        return torch.stack([_whole_prompt(reading, b, row) for b, row in enumerate(metadata)]).to(
            images.device
        )


def _whole_prompt(reading: Reading, b: int, row: Row) -> Tensor:
    names = asked_names(row)
    slots = [_named(reading, b, name) for name in names]
    counts = row.get("numeracy_info")
    if counts:
        wanted = sum(item["num"] for item in counts)
        answers = [
            torch.exp(-(s.sum() - item["num"]).abs()) * s.max()
            for s, item in zip(slots, counts, strict=True)
        ]
    else:
        wanted = len(names)
        answers = [s.max() for s in slots]
    # The geometric mean keeps one missing object from hiding progress on the others.
    yes = torch.stack(answers).clamp(min=1e-6).log().mean().exp()
    info = row.get("spatial_info")
    if info:
        yes = yes * _relation(reading, b, info)
    number = torch.exp(-0.7 * (reading.present[b].sum() - wanted).abs())
    return yes * number * (1 - reading.stray[b])


def _relation(reading: Reading, b: int, info: dict[str, str]) -> Tensor:
    """How sure it is that the best slot for obj1 stands as told to the best for obj2."""
    if info["locality"] not in LOCALITIES:
        raise UserError(f"unknown locality {info['locality']!r} in spatial_info")
    side = LOCALITIES[info["locality"]]
    first, second = _named(reading, b, info["obj1"]), _named(reading, b, info["obj2"])
    both = first[:, None] * second[None, :] * (1 - torch.eye(MAX_OBJECTS))
    delta = reading.center[b][None, :] - reading.center[b][:, None]  # [i, j]: from i to j
    if side is None:
        return both.max()
    axis, sign = side
    margin = sign * delta[..., axis] - delta[..., 1 - axis].abs()
    return (both * torch.sigmoid(margin / 4)).max()


def _on_cpu(reading: Reading) -> Reading:
    """The small tables of a reading, where scalar work on them is cheap."""
    return Reading(*(getattr(reading, f).cpu() for f in Reading.__slots__))


def build_experts(
    names: list[str], weights_dir: Path, device: torch.device | str
) -> list[RewardExpert]:
    """The experts called `names`, in that order.

    Args: weights_dir: holds the folder `hps`, read only when hps is asked for.
    Raises: UserError naming an unknown expert or an unusable weights file.
    """
    reader = SceneReader()
    exact: dict[str, Callable[[SceneReader], RewardExpert]] = {
        "gdino": Detector,
        "git": AttributeVQA,
        "orm": WholePromptORM,
    }
    experts: list[RewardExpert] = []
    for name in names:
        if name == "hps":
            try:
                experts.append(HPS(weights_dir / "hps", device=device))
            except ValueError as error:
                raise UserError(str(error)) from error
        elif name in exact:
            experts.append(exact[name](reader))
        else:
            near = get_close_matches(name, EXPERT_NAMES, 1, 0.0)[0]
            raise UserError(f"unknown reward {name!r}; nearest: {near!r}")
    return experts
