"""Sampling plans and image tokens."""

from engine.rollout.sample import ImageRollout, TextRollout, sample_images, sample_text

__all__ = ["ImageRollout", "TextRollout", "sample_images", "sample_text"]
