"""What a training run needs in memory, stage by stage, and whether a device has it."""

from engine.memory.fits import fitting_micro_batch, require_memory
from engine.memory.plan import describe

__all__ = ["describe", "fitting_micro_batch", "require_memory"]
