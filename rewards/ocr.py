"""Text that a prompt quotes, looked for in the picture: 1 - edit distance / length of the text.

The formula is Flow-GRPO's (arXiv:2505.05470): max(1 - N_e / N_ref, 0), N_e the fewest edits
between the text read and the text wanted, N_ref the letters wanted. As in its code, letter case
and white space do not count, and neither does what else the picture says; there only a picture
that holds the text unharmed is forgiven the rest, here every picture is.

The network is PP-OCR: detection and recognition, run by rapidocr and onnxruntime. Its trained
weights ship in rapidocr's wheel, so nothing is fetched. They are ONNX graphs: data, no code.
"""

import os
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Row = dict[str, Any]

_PAIRS = (
    # A digit before it makes " and ” the sign of an inch.
    r'(?<!\d)"([^"]*)"',
    r"“([^“”]+)”",
    r"„([^„“”]+)[“”]",
    r"(?<!\d)”([^“”]+)”",
    r"«([^«»]+)»",
    r"»([^«»]+)«",
    r"「([^「」]+)」",
    r"『([^『』]+)』",
)
# Apostrophes look the same. A quote starts before a word and not within one, ends where no word
# goes on, and is none of the words that begin with an apostrophe: the '90s, rock 'n' roll.
_SINGLE = (
    r"(?<!\w){open}(?!\s|\d\ds\b|(?:n|em|til|tis|twas)\b)"
    r"((?:[^\n\"“”{open}{close}]|(?<=\w){close}(?=\w))+)(?<!\s){close}(?!\w)"
)
_QUOTE = re.compile(
    "|".join((*_PAIRS, *(_SINGLE.format(open=a, close=b) for a, b in ("''", "‘’")))),
    re.IGNORECASE,
)
_SAME = str.maketrans(
    dict.fromkeys("‘’‚ʼ´`", "'") | dict.fromkeys("“”„«»", '"') | dict.fromkeys("‐‑‒–—―−", "-")
)
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # scripts without spaces
_PIECE = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")


@lru_cache(maxsize=65536)
def quoted_texts(prompt: str) -> tuple[str, ...]:
    """What a prompt puts in quotation marks, in order, without the marks.

    The marks are " ", “ ”, „ “, ” ”, « », » «, 「 」, 『 』, ' ' and ‘ ’; of nested ones the outer.
    An apostrophe in or after a word is none, nor are the signs of feet and inches after a number.
    """
    found = (match[match.lastindex or 0].strip() for match in _QUOTE.finditer(prompt))
    return tuple(filter(None, found))


def texts_of(prompt: str, row: Row) -> list[str]:
    """The texts that a picture is to show, folded.

    Args:
        row: `text`, a string or a list of them, goes before what the prompt quotes; null or
            empty counts as absent.
    Raises: ValueError for a `text` that is neither.
    """
    given = row.get("text") or quoted_texts(prompt)
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"text: wanted a string or a list of strings, got {given!r}")
    return [folded for folded in map(fold, texts) if folded]


def fold(text: str) -> str:
    """Text as it is compared: no white space, one case, one form of quotes, dashes and widths."""
    return "".join(_fold(text).split())


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text.translate(_SAME)).casefold()


def fewest_edits(text: str, pieces: Iterable[str]) -> int:
    """Letters to insert, delete or replace to make a run of consecutive pieces into `text`.

    Of all runs the nearest counts. The empty one is among them: at most len(text).
    """
    # edits[i]: from the best run that ends here to text[:i].
    edits, fewest = list(range(len(text) + 1)), len(text)
    for piece in pieces:
        edits = [min(i, e) for i, e in enumerate(edits)]  # a run may start here
        for letter in piece:
            diagonal, edits[0] = edits[0], edits[0] + 1
            for i, wanted in enumerate(text, 1):
                replaced = diagonal + (letter != wanted)
                diagonal = edits[i]
                edits[i] = min(replaced, edits[i] + 1, edits[i - 1] + 1)
        fewest = min(fewest, edits[-1])
    return fewest


def text_score(texts: list[str], lines: list[str], *, whole: bool = False) -> float:
    """How much of the wanted texts the lines hold, in [0, 1].

    Args:
        texts: at least one, folded. Each is scored by itself; the mean counts.
        lines: as read, in reading order.
        whole: the texts, joined, against all the lines, joined: every letter too many counts.
            Else the nearest run of words is compared with a text and the other words are free; a
            letter too many within a word is not.
    """
    pieces = [piece for line in lines for piece in _PIECE.findall(_fold(line))]
    if whole:
        texts, pieces = ["".join(texts)], ["".join(pieces)]
    return sum(1 - fewest_edits(text, pieces) / len(text) for text in texts) / len(texts)


class OCR:
    """The text expert. A picture whose prompt names no text is not read and scores 0.

    That is the same for every picture of its group, so it moves no advantage.
    """

    name = "ocr"

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        whole: bool = False,
        confidence: float = 0.5,
        threads: int | None = None,
    ) -> None:
        """
        Args:
            device: taken as by every expert. The network is CPU code wherever the pictures are.
            whole: letters that nobody asked for count as wrong; see `text_score`.
            confidence: lines read with less, of 1, count as not there; the default is rapidocr's.
            threads: onnxruntime's for one operation, at most the machine's cores; None: all.
        Raises: ValueError naming the argument, or the package that is missing and how to get it.
        """
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence must be in [0, 1], got {confidence}")
        # rapidocr would take no notice of a number that is out of bounds.
        cores = os.cpu_count() or 1
        if threads is not None and not 1 <= threads <= cores:
            raise ValueError(
                f"threads must be in [1, {cores}], this machine's cores, got {threads}"
            )
        try:
            import onnxruntime  # noqa: F401  rapidocr reports its absence in a log
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ValueError(
                f"the expert 'ocr' needs the extra [ocr] ({error}): pip install rapidocr onnxruntime"
            ) from error
        params = {
            "Global.log_level": "critical",
            "Global.text_score": confidence,
            # Turns text upright that stands on its head, which is not what was asked for.
            "Global.use_cls": False,
            "EngineConfig.onnxruntime.intra_op_num_threads": -1 if threads is None else threads,
        }
        try:
            self._engine = RapidOCR(params=params)
            # rapidocr opens a network when it first needs it: here, and not in the first batch.
            blank = np.full((48, 48, 3), 255, dtype=np.uint8)
            self._engine(blank, use_det=False)
            self._engine(blank, use_det=True)
        # Whatever rapidocr and onnxruntime raise for files that are damaged.
        except Exception as error:
            reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
            raise ValueError(f"rapidocr cannot open its networks: {reason}") from error
        self._whole = whole

    def prepare(self, prompts: list[str], metadata: list[Row]) -> None:
        """Find the quotes ahead, while the pictures are still being drawn."""
        for prompt, row in zip(prompts, metadata, strict=True):
            texts_of(prompt, row)

    @torch.inference_mode()
    def score(self, prompts: list[str], images: Tensor, metadata: list[Row]) -> Tensor:
        """How much of the text that each prompt quotes is in its picture, (B,) fp32 in [0, 1].

        Args:
            prompts: B.
            images: (B, 3, H, W) float in [0, 1]. Equal ones are read once.
            metadata: B prompt rows; `text` says what is wanted in place of the prompt's quotes.
        Raises: ValueError for a row whose `text` is no text.
        """
        wanted = [texts_of(p, row) for p, row in zip(prompts, metadata, strict=True)]
        # (B, H, W, 3), channels in OpenCV's order
        pictures = (images.float() * 255).round().clamp(0, 255).byte().flip(1).permute(0, 2, 3, 1)
        lines: dict[bytes, list[str]] = {}
        scores = torch.zeros(len(wanted))
        for b, (texts, picture) in enumerate(zip(wanted, pictures.cpu(), strict=True)):
            if not texts:
                continue
            pixels = picture.contiguous().numpy()
            key = pixels.tobytes()
            if key not in lines:
                lines[key] = self._read(pixels)
            scores[b] = text_score(texts, lines[key], whole=self._whole)
        return scores.to(images.device)

    def _read(self, picture: np.ndarray) -> list[str]:
        """The lines of text in reading order.

        Args: picture: (H, W, 3) uint8, BGR. rapidocr takes an array as OpenCV would have it and
            turns only what it opens itself.
        """
        return list(getattr(self._engine(picture), "txts", None) or ())
