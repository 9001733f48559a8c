"""Prompt files, and prompts as token ids."""
