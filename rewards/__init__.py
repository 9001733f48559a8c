"""Reward experts for image generators, and the ensemble and pipeline that run them.

Nothing here imports the rest of the project: the folder may be lifted out whole.
"""

from rewards.ensemble import Ensemble, RewardError, RewardExpert, Scores
from rewards.hps import HPS
from rewards.pipeline import RewardPipeline

__all__ = ["HPS", "Ensemble", "RewardError", "RewardExpert", "RewardPipeline", "Scores"]
