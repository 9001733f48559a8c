"""A run that trains nothing says so, and stops."""

from engine.settings.errors import UserError
from rewards import Scores


class NothingLearned:
    """Counts the steps in a row in which no group's rewards differed.

    GRPO learns from differences within a group alone: in such a step every advantage is 0.

    Args: patience: stop after so many; 0: never.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.steps = patience, 0

    def look(self, zero_std_groups: float, scores: Scores) -> None:
        """Take a step's share of groups without variance, and its scores.

        Raises: UserError naming each reward with the values it gave, when patience is at its end.
        """
        self.steps = self.steps + 1 if zero_std_groups == 1 else 0
        if not self.patience or self.steps < self.patience:
            return
        said = []
        for name, values in scores.by_expert.items():
            low, high = float(values.min()), float(values.max())
            said.append(f"{name} {low:g}" if low == high else f"{name} {low:g} to {high:g}")
        raise UserError(
            f"nothing to learn: in {self.steps} steps in a row no group's rewards differed "
            f"(last: {', '.join(said)}); see --reward_funcs, or --max_zero_std_steps 0 to go on"
        )
