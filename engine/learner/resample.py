"""Groups that teach nothing, drawn again (dynamic sampling, DAPO: arXiv:2503.14476)."""

from collections.abc import Callable, Sequence

from engine.generate.pictures import Generation
from engine.learner.credit import all_same
from engine.prompts.data import Row
from rewards import RewardPipeline, Scores

ATTEMPTS = 2


def resample(
    made: Generation,
    scores: Scores,
    batch: Sequence[Row],
    *,
    draw: Callable[[list[str], int], Generation],
    pipeline: RewardPipeline,
    group_size: int,
) -> int:
    """Draw the groups whose rewards are all the same again, up to ATTEMPTS times, in place.

    The same prompts: which ones a step trains on stays a function of seed and step.

    Args:
        made, scores: of B samples, groups adjacent; their rows are replaced.
        batch: the samples' prompt rows.
        draw: samples of the given prompts, with the noise of attempt n >= 1.
    Returns: groups drawn, counted each time.
    """
    count = 0
    for attempt in range(1, ATTEMPTS + 1):
        same = all_same(scores.total.view(-1, group_size))
        rows = same.repeat_interleave(group_size).nonzero()[:, 0]
        if not len(rows):
            break
        asked = [batch[i] for i in rows.tolist()]
        prompts = [row["prompt"] for row in asked]
        again = draw(prompts, attempt)
        made.put(rows.to(made.pixels.device), again)
        found = pipeline.score(prompts, again.pixels.float(), asked)
        scores.total[rows] = found.total
        for name, values in scores.by_expert.items():
            if name in found.by_expert:
                values[rows] = found.by_expert[name]
        count += len(rows) // group_size
    return count
