"""A run's folder: files that survive a kill, metrics, pictures, progress."""
