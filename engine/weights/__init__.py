"""Checkpoint folders of both layouts, read and written."""
