"""The weak model that guides (autoguidance, Karras et al. 2024): the UNet in training, as it was early in the run."""

import copy

import torch


class EarlierSelf(torch.nn.Module):
    """A copy of a pipeline's UNet that goes into the pipeline as its `guidance_unet`.

    Until its weights are `taken` the UNet stands there itself, away from which no guidance leads. A run registers it
    by `Trainer.add_state`, since it must be found again when the run continues.

    Args:
        pipeline: whose UNet is not yet prepared for training.
    """

    def __init__(self, pipeline):
        super().__init__()
        self._pipeline = pipeline
        self.unet = copy.deepcopy(pipeline.unet).requires_grad_(False).eval()
        self._stand_in(taken=False)

    @property
    def alike(self) -> tuple[str, ...]:
        """All of it is the same on all processes."""
        return tuple(self.state_dict())

    def take(self):
        """Take the weights that the UNet has now."""
        self.unet.load_state_dict(self._pipeline.unet.state_dict())
        self._stand_in(taken=True)

    # Whether they are taken is part of the state, but no buffer: to ask for it at every step mustn't wait for a GPU.
    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.taken)

    def set_extra_state(self, state: torch.Tensor):
        self._stand_in(taken=bool(state))

    def _stand_in(self, taken: bool):
        self.taken = taken
        self._pipeline.guidance_unet = self.unet if taken else self._pipeline.unet
