"""The report's charts: what moved during a run, and at which level."""

from engine.report.data import Run
from engine.report.page import Curve, chart
from engine.settings.train import LEVELS


def curves(run: Run, found: list[tuple[int, int, str]]) -> str:
    """The charts of a run, HTML.

    Args: found: (first step, last step, text) where reward and judge part.
    """
    if not run.metrics:
        return '<p class="muted">No steps were logged.</p>'
    steps = run.steps

    def single(title: str, *keys: str, note: str = "") -> str:
        lines = [Curve(key.split("/")[-1].replace("_", " "), run.values(key)) for key in keys]
        return chart(title, steps, lines, note=note)

    def by_level(title: str, key: str, note: str = "") -> str:
        keys = [
            f"{key}/{level}" for level in LEVELS if any(f"{key}/{level}" in r for r in run.metrics)
        ]
        return single(title, *(keys if keys else [key]), note=note)

    both = [Curve("reward (paid)", run.values("reward")), Curve("judge", run.values("judge"))]
    note = "Both on the training pictures of the step; faint: the steps, strong: rolling mean of 9."
    note += " Shaded: reward rises while judge falls." if found else ""
    bands = [(start, end) for start, end, _ in found]
    first = chart("Reward and judge", steps, both, note=note, bands=bands, wide=True)
    experts = [Curve(name, values) for name, values in run.experts.items()]
    charts = [
        chart("Reward of each expert", steps, experts),
        single("Loss", "loss"),
        by_level("KL to the reference", "kl", "nats a token"),
        by_level("Entropy", "entropy", "nats a token; a collapse shows here"),
        by_level("Clip fraction", "clip_fraction"),
        single("Policy drift", "policy_drift", note="log-prob of rollout against training"),
        single("Spread of rewards in a group", "reward_std", note="none left: nothing to learn"),
        by_level("Groups without spread", "zero_std_groups", "their share: they teach nothing"),
        by_level(
            "Share of the gradient", "gradient_share", "of its squared norm: which level learns"
        ),
        single("Plan length", "completion_length", note="tokens"),
        single("Gradient norm", "grad_norm"),
        single("Seconds a step", "seconds/rollout", "seconds/train", "seconds/rewards_exposed"),
        single("Images a second", "images_per_s"),
    ]
    return f'{first}<div class="charts">{"".join(charts)}</div>'
