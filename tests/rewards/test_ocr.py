"""The text expert: quotes, edits and scores by plain maths, then the real network on drawn text."""

import random
import socket
import sys
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from engine.experts import build_ensemble
from engine.learner.credit import scaled
from engine.settings.errors import UserError
from rewards import Ensemble, RewardPipeline
from rewards.ocr import OCR, fewest_edits, fold, quoted_texts, text_score, texts_of


def plain_distance(a, b):
    """Levenshtein by its definition."""

    @cache
    def d(i, j):
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


def test_edits_are_levenshteins_and_of_runs_the_least():
    rng = random.Random(0)

    def word(longest):
        return "".join(rng.choices("abc", k=rng.randint(0, longest)))

    counts = []
    for _ in range(300):
        text, pieces = word(8), [word(5) for _ in range(rng.randint(0, 5))]
        places = range(len(pieces) + 1)
        runs = ["".join(pieces[i:j]) for i in places for j in places[i:]]
        counts.append(fewest_edits(text, pieces))
        assert counts[-1] == min(plain_distance(text, run) for run in runs), (text, pieces)
        joined = "".join(pieces)
        assert fewest_edits(text, [joined]) == min(plain_distance(text, joined), len(text))
    assert len(set(counts)) > 4


@pytest.mark.parametrize(
    "prompt, texts",
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ('"STOP" and "GO" on two signs', ["STOP", "GO"]),
        ("a cake with “Happy Birthday!” on it", ["Happy Birthday!"]),
        ("ein Schild „Halt“ und „Los“", ["Halt", "Los"]),
        ("en skylt med ”Stopp”", ["Stopp"]),
        ("un panneau « Arrêt » rouge", ["Arrêt"]),
        ("ein Schild »Halt« am Weg", ["Halt"]),
        ("写着“你好”的牌子", ["你好"]),
        ("看板に「営業中」『本日』", ["営業中", "本日"]),
        ("a sign saying 'it's open', red", ["it's open"]),
        ("a sign saying ‘it’s open’", ["it’s open"]),
        ("the dogs' bowl reads 'REX'.", ["REX"]),
        ("the dog's bowl reads \"REX'S\"", ["REX'S"]),
        ("a poster 'say \"HI\"'", ["HI"]),
        ("a poster \"the word 'HI'\"", ["the word 'HI'"]),
        ("mugs (\"A\", 'B') and “C”", ["A", "B", "C"]),
        ('says:"two\nlines"', ["two\nlines"]),
        ("it's a cat that doesn't care about dogs' toys or girls’ hats", []),
        ("O’Brien’s café, don’t you think, in the ’90s", []),
        ("rock 'n' roll in the '90s, the dogs' day", []),
        ("the revolt of '68 and a sign 'OPEN'", ["OPEN"]),
        ("'tis the season, the dogs' day", []),
        ('a 5" nail beside a 7" nail', []),
        ("a 6' man and a 5'10\" woman", []),
        ("a 5” nail beside a 7” nail", []),
        ('a 12" record labelled "BLUE"', ["BLUE"]),
        ('"Route 66" beside "Exit 7"', ["Route 66", "Exit 7"]),
        ('an unclosed "quote', []),
        ('empty "" and " " and \'\'', []),
        ("a red cube", []),
        ("", []),
    ],
)
def test_quotes(prompt, texts):
    assert list(quoted_texts(prompt)) == texts


def test_the_rows_text_goes_before_the_quotes():
    prompt = 'a sign "OPEN"'
    assert texts_of(prompt, {}) == ["open"]
    assert texts_of(prompt, {"text": "Late  Night"}) == ["latenight"]
    assert texts_of(prompt, {"text": ["A b", "C"]}) == ["ab", "c"]
    for absent in (None, "", []):
        assert texts_of(prompt, {"text": absent}) == ["open"]
    assert texts_of(prompt, {"text": " "}) == []
    for wrong in (7, {"a": 1}, ["A", 1]):
        with pytest.raises(ValueError, match="^text: wanted a string or a list of strings, got"):
            texts_of(prompt, {"text": wrong})


def test_case_space_widths_and_the_look_of_marks_do_not_count():
    assert fold(" It’s \n OPEN – “now” ") == 'it\'sopen-"now"'
    assert fold("ＡＢＣ！") == "abc!" and fold("Straße") == fold("STRASSE")


@pytest.mark.parametrize(
    "texts, lines, score, whole",
    [
        (["open"], ["OPEN"], 1, 1),
        (["open"], [], 0, 0),
        (["open"], ["OPAN"], 3 / 4, 3 / 4),
        (["open"], ["OPENN"], 3 / 4, 3 / 4),  # a letter too many in the word
        (["open"], ["OPEN", "24 hours"], 1, 0),
        (["open"], ["we are 'open'!"], 1, 0),  # marks around it are words of their own
        (["openlate"], ["closed", "open", "late"], 1, 2 / 8),
        (["latenight"], ["late night"], 1, 1),
        (["open"], ["reopened"], 0, 0),
        (["你好"], ["说你好吗"], 1, 0),
        (["a", "bc"], ["bc", "a"], 1, 1 / 3),
        (["a", "bc"], ["a"], 1 / 2, 1 / 3),
        (["3.50"], ["only 3.50 $"], 1, 0),
    ],
)
def test_scores_by_hand(texts, lines, score, whole):
    assert text_score(texts, lines) == pytest.approx(score)
    assert text_score(texts, lines, whole=True) == pytest.approx(whole)


def draw(*lines, size=40, height=320, width=320, ink=(20, 20, 60), paper=(240, 235, 220)):
    """(3, H, W) in [0, 1]: the lines one below the other in PIL's own font."""
    picture = Image.new("RGB", (width, height), paper)
    font = ImageFont.load_default(size=size)
    for i, line in enumerate(lines):
        place = (width // 2, height * (i + 1) // (len(lines) + 1))
        ImageDraw.Draw(picture).text(place, line, font=font, fill=ink, anchor="mm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@pytest.fixture(scope="module")
def expert():
    return OCR(threads=1)


def says(*texts):
    return [f'a sign that says "{text}"' for text in texts]


def test_drawn_text_scores_and_other_text_does_not(expert):
    for text, other, size in (
        ("OPEN", "CLOSED", 24),
        ("Hello 2026", "Goodbye 1999", 40),
        ("a red cube", "two blue spheres", 32),
        ("STOP", "GO", 64),
    ):
        images = torch.stack([draw(text, size=size), draw(other, size=size)])
        right, wrong = expert.score(says(text, text), images, [{}, {}]).tolist()
        assert right > 0.9 and wrong < 0.5, (text, size, right, wrong)


def test_a_misspelt_sign_earns_its_share(expert):
    (score,) = expert.score(says("BAKERY"), draw("BAKIRY")[None], [{}])
    assert score == pytest.approx(5 / 6)


def test_lines_read_without_confidence_do_not_count():
    assert OCR(threads=1, confidence=1).score(says("OPEN"), draw("OPEN")[None], [{}]).item() == 0


def test_lines_below_each_other_are_one_text_and_others_do_not_count(expert):
    image = draw("GRAND", "OPENING", "since 1987", size=36)
    (score,) = expert.score(says("Grand Opening"), image[None], [{}])
    assert score == 1
    (score,) = OCR(threads=1, whole=True).score(says("Grand Opening"), image[None], [{}])
    assert score == pytest.approx(1 - len("since1987") / len("grandopening"))


def test_channels_arrive_in_the_order_of_the_network(expert, monkeypatch):
    image, seen = draw("OPEN", height=200, ink=(255, 0, 0), paper=(0, 0, 80)), []
    monkeypatch.setattr(expert, "_read", lambda picture: seen.append(picture) or [])
    expert.score(says("OPEN"), image[None], [{}])
    (picture,) = seen
    assert picture.dtype == np.uint8 and picture.shape == (200, 320, 3)
    assert picture[0, 0].tolist() == [80, 0, 0] and picture[..., 2].max() == 255


def test_a_batch_scores_as_its_pictures_alone_and_equal_ones_are_read_once(expert, monkeypatch):
    texts = ["OPEN", "EXIT 7", "Hello", "OPEN"]
    images = torch.stack([draw(t) for t in ("OPEN", "EXIT 9", "Hallo", "OPEN")])
    reads = []
    read = expert._read
    monkeypatch.setattr(expert, "_read", lambda picture: reads.append(1) or read(picture))
    whole = expert.score(says(*texts), images, [{}] * 4)
    assert len(reads) == 3
    alone = [expert.score(says(t), i[None], [{}]) for t, i in zip(texts, images, strict=True)]
    assert torch.equal(whole, torch.cat(alone))
    assert whole.dtype == torch.float32 and 0.5 < whole[2] < whole[0] == 1


def test_pictures_without_text_and_an_empty_batch(expert):
    rng = torch.Generator().manual_seed(0)
    images = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])
    assert expert.score(says("A", "OPEN"), images, [{}, {}]).tolist() == [0, 0]
    noise = torch.rand(1, 3, 32, 32, generator=rng)
    assert expert.score(says("OPEN"), noise, [{}]).tolist() == [0]
    assert expert.score([], torch.zeros(0, 3, 64, 64), []).shape == (0,)


def test_a_prompt_without_text_is_not_read_and_moves_no_advantage(expert, monkeypatch):
    def read(picture):
        raise AssertionError("read for nothing")

    monkeypatch.setattr(expert, "_read", read)
    images = torch.rand(4, 3, 64, 64)
    scores = expert.score(["it's a cube"] * 4, images, [{}] * 4)
    assert scores.tolist() == [0] * 4

    class Other:
        name = "other"

        def score(self, prompts, images, metadata):
            return images.mean((1, 2, 3)) * 100

    batch = (["it's a cube"] * 4, images, [{}] * 4)
    alone = Ensemble([Other()]).score(*batch).total
    both = Ensemble([Other(), expert]).score(*batch).total
    assert torch.equal(both, alone / 2)
    advantages = [scaled(total.view(-1, 4)) for total in (alone, both)]
    torch.testing.assert_close(*advantages, rtol=1e-3, atol=1e-3)


def test_the_real_network_through_the_pipeline():
    ensemble = build_ensemble(["ocr"], model="tiny", device="cpu", dtype="bfloat16")
    (expert,) = ensemble.experts
    assert type(expert) is OCR
    images = torch.stack([draw("SALE"), draw("EXIT")])
    prompts, rows = ['a shop window "SALE"', "a door"], [{}, {"text": "Exit"}]
    with RewardPipeline(ensemble, "cpu", timeout=60) as pipeline:
        pipeline.prepare(prompts, rows)
        scores = pipeline.submit(prompts, images, rows).result()
        assert scores.by_expert["ocr"].tolist() == scores.total.tolist() == [1, 1]
        swapped = pipeline.submit(prompts, images.flip(0), rows).result()
        assert swapped.total.max() < 0.6


def test_nothing_is_fetched(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    assert OCR(threads=1).score(says("OPEN"), draw("OPEN")[None], [{}]).item() == 1


@pytest.mark.parametrize("missing", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_one_line_with_the_command(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    with pytest.raises(UserError, match="^--reward_funcs ocr: .*pip install") as error:
        build_ensemble(["ocr"], model="tiny", device="cpu")
    assert missing in str(error.value) and "\n" not in str(error.value)
    for package in ("rapidocr", "onnxruntime"):
        assert package in str(error.value).partition("pip install")[2]


def test_networks_that_do_not_open_are_one_line(monkeypatch):
    class Broken:
        def __init__(self, params):
            pass

        def __call__(self, picture, **_):
            raise RuntimeError(
                "Traceback (most recent call last):\n  ...\nInvalidProtobuf: det.onnx\n"
            )

    monkeypatch.setattr("rapidocr.RapidOCR", Broken)
    with pytest.raises(ValueError, match="^rapidocr cannot open its networks: Invalid.* det.onnx$"):
        OCR()


@pytest.mark.parametrize("option", [{"confidence": 1.5}, {"threads": 0}, {"threads": 10**6}])
def test_bad_arguments_are_named(option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))} must be in"):
        OCR(**option)
