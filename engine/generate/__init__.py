"""Prompts to plans to pictures: python -m engine.generate."""
