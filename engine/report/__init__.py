"""The page that shows a run: python -m engine.report."""
