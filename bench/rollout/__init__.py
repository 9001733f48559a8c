"""Rollouts against loops as published."""
