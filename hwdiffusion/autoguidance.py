"""The weak model that guides (autoguidance, Karras et al. 2024): the UNet in training, as it was early in the run."""

import copy

import torch

from hwdiffusion import InputError


STATE = "guidance_unet"  # of a checkpoint


class EarlierSelf(torch.nn.Module):
    """A copy of a pipeline's UNet that goes into the pipeline as its `guidance_unet`.

    Until its weights are `taken` the UNet stands there itself, away from which no guidance leads. A run registers it
    by `Trainer.add_state` as `STATE`, since it must be found again when the run continues.

    Args:
        pipeline: whose UNet is not yet prepared for training.
        at: the part of the run, in (0, 1), after which the weights are taken.
    """

    def __init__(self, pipeline, at: float):
        super().__init__()
        self.at, self._pipeline = at, pipeline
        self.unet = copy.deepcopy(pipeline.unet).requires_grad_(False).eval()
        self._stand_in(taken=False)
        self.alike = tuple(self.state_dict())  # all of it is the same on all processes

    def is_due(self, trainer) -> bool:
        """Whether the weights are to be taken before the present step: never those that nothing has trained."""
        if self.taken:
            return False
        return trainer.step >= max(1, min(trainer.step_at(self.at), trainer.max_steps - 1))

    def take(self):
        """Take the weights that the UNet has now."""
        self.unet.load_state_dict(self._pipeline.unet.state_dict())
        self._stand_in(taken=True)

    # Whether they are taken is part of the state, but no buffer: to ask for it at every step mustn't wait for a GPU.
    def get_extra_state(self) -> torch.Tensor:
        """The part of the run after which they were taken, or 0."""
        return torch.tensor(self.at if self.taken else 0.0, dtype=torch.float64)

    def set_extra_state(self, state: torch.Tensor):
        self._stand_in(taken=bool(state > 0))

    def _stand_in(self, taken: bool):
        self.taken = taken
        self._pipeline.guidance_unet = self.unet if taken else self._pipeline.unet


def check_continues(checkpoint, states: dict, at: float):
    """Raise InputError where a run that has taken its early weights at one part of it, or takes none, would go on from
    a checkpoint that says otherwise.

    Args:
        states: of the checkpoint, by their names.
        at: the run's `--guidance_unet_at`.
    """
    if (STATE in states) != (at > 0):
        made, remedy = ("with", "leave it as it was") if at == 0 else ("without", "give --guidance_unet_at 0")
        raise InputError(f"{checkpoint} was made {made} --guidance_unet_at; {remedy}, or name another --output_dir")
    taken = float(states[STATE]["_extra_state"]) if at > 0 else 0.0
    if taken not in (0.0, at):
        raise InputError(
            f"{checkpoint} has taken its guidance_unet by --guidance_unet_at {taken:g}, not {at:g}; leave it as it "
            "was, or name another --output_dir"
        )
