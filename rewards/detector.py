"""What the detector experts share: their options, and the reward from what they find."""

from typing import Any

import torch
from torch import Tensor

from rewards.detection import Detections, detection_scores, questions_of, suppress


class DetectorExpert:
    """The reward of rewards/detection.py over what a detector finds. A subclass finds it."""

    name: str

    def __init__(
        self,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        box_threshold: float,
        iou_threshold: float,
        attributes: bool,
        batch_size: int,
    ) -> None:
        """
        Args:
            dtype: of the matrix products, bf16 and fp16 through autocast.
            box_threshold: a box shows a name above this confidence.
            iou_threshold: of two boxes of a name that overlap more, the surer one stays.
            attributes: look for "red cube" where a row has it; False looks for "cube".
            batch_size: pictures in one forward; bounds the memory.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._device = torch.device(device)
        self._dtype = dtype
        self._box_threshold = box_threshold
        self._iou_threshold = iou_threshold
        self._attributes = attributes
        self._batch_size = batch_size

    @torch.inference_mode()
    def score(self, prompts: list[str], images: Tensor, metadata: list[dict[str, Any]]) -> Tensor:
        """The detector reward, (B,) fp32 in [0, 1]; see rewards/detection.py.

        Args:
            prompts: B; not used, the rows say what to look for.
            images: (B, 3, H, W) float in [0, 1].
            metadata: B prompt rows.
        Raises: ValueError naming the row that names nothing, an unknown locality, or names that
            the detector cannot be asked for.
        """
        questions = questions_of(metadata, attributes=self._attributes)
        found = suppress(self.detect(images, questions.names), self._iou_threshold)
        size = (images.shape[-2], images.shape[-1])
        scores = detection_scores(questions.to(self._device), found, image_size=size)
        return scores.to(images.device)

    def detect(self, images: Tensor, names: list[list[str]]) -> Detections:
        """Where each picture shows each of its names; repetitions are not suppressed.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            names: B lists of what to look for.
        Returns: on the expert's device; every box above the threshold for some name has scores.
        """
        raise NotImplementedError

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32)
