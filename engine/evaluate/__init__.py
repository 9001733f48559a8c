"""Judge and experts on prompts: python -m engine.evaluate."""
