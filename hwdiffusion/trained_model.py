"""A model with what trains it: its optimizer, its learning-rate schedule, the average of its weights."""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.optim.swa_utils import get_ema_multi_avg_fn


_OF_PROCESSES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class TrainedModel:
    """A model in training by AdamW.

    Args:
        accelerator: wraps the model and its optimizer.
        model: on its device.
        learning_rate: the highest.
        args: the [`TrainingArguments`].
        ema: keep an average of the weights.
        starts_at: the part of the run after which its training starts; its learning-rate schedule spans the rest.
        every: it is trained at every so many steps of the run, which are those that its schedule counts.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model,
        learning_rate: float,
        args,
        ema: bool,
        starts_at: float = 0.0,
        every: int = 1,
    ):
        self.accelerator, self.args = accelerator, args
        self.learning_rate, self.starts_at, self.every = learning_rate, starts_at, every
        optimizer = build_optimizer(
            model.parameters(),
            args.use_8bit_adam,
            lr=learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
        )
        self.ema: EMAModel | None = None
        if ema:
            self.ema = EMAModel(
                model.parameters(), decay=args.ema_max_decay, use_ema_warmup=True, power=args.ema_power, foreach=True
            )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)  # wrapped for distributed training
        # accelerate's optimizer asks at every step which packages are installed, a hundredth of a small UNet's step;
        # where it has nothing to do, the one that it wraps steps
        bare = accelerator.scaler is None and accelerator.distributed_type in _OF_PROCESSES
        self._stepped = self.optimizer.optimizer if bare else self.optimizer
        self.parameters = list(self.model.parameters())  # to find them anew takes a thirtieth of a small UNet's step
        self.lr_scheduler: Any = None
        self.skipped = False  # whether the last update was left out, because it was not finite
        self._trained = False  # in this step, which then counts for the average

    @property
    def stock(self) -> torch.nn.Module:
        """The model itself, without what wraps it."""
        return self.accelerator.unwrap_model(self.model)

    def schedule(self, steps: int):
        """Begin the learning-rate schedule of so many steps of the run."""
        steps = max(1, steps // self.every)
        for group in self.optimizer.param_groups:
            group.pop("initial_lr", None)
            group["lr"] = self.learning_rate
        self.lr_scheduler = get_scheduler(
            self.args.lr_scheduler,
            self.optimizer.optimizer,
            num_warmup_steps=min(self.args.lr_warmup_steps, steps // 2),
            num_training_steps=steps,
        )

    def stretch(self, steps: int):
        """Go on with a schedule of another length, from the step that this one has come to."""
        going = self.lr_scheduler
        self.schedule(steps)
        going.lr_lambdas, self.lr_scheduler = self.lr_scheduler.lr_lambdas, going
        for group, base_lr, factor in zip(self.optimizer.param_groups, going.base_lrs, going.lr_lambdas):
            group["lr"] = base_lr * factor(going.last_epoch)
        going._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def update(self, loss: torch.Tensor) -> torch.Tensor | None:
        """Backward; on a step's last micro-batch clip the gradients, and step the optimizer and the schedule.

        Returns:
            The norm of the gradients before they are clipped, on a last micro-batch.
        """
        self.accelerator.backward(loss)
        if not self.accelerator.sync_gradients:
            return None
        self._trained = True
        # of this optimizer only: another model's micro-batches may not be complete yet
        self.accelerator.unscale_gradients(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        # with fp16 the gradient scaler leaves such steps out by itself
        watched = self.args.skip_nonfinite_steps and self.accelerator.scaler is None
        self.skipped = watched and not bool(torch.isfinite(norm))
        if not self.skipped:
            self._stepped.step()
        self.lr_scheduler.step()
        self._stepped.zero_grad()
        return norm

    def average_of(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """What is kept as the average of a parameter, if anything is."""
        if self.ema is None:
            return None
        pairs = zip(self.parameters, self.ema.shadow_params)
        return next(average for own, average in pairs if own is parameter)

    def update_average(self):
        trained, self._trained = self._trained, False
        if self.ema is None or not trained:
            return
        # as EMAModel.step, but in half the time, and what the optimizer doesn't train, a codebook of moving averages,
        # is averaged, too, not copied
        self.ema.optimization_step += 1
        average = get_ema_multi_avg_fn(self.ema.get_decay(self.ema.optimization_step))
        average(self.ema.shadow_params, self.parameters, None)

    def show_average(self):
        """Evaluation mode, and the averaged weights in the place of the trained ones."""
        self.model.eval()
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)

    def hide_average(self):
        if self.ema is not None:
            self.ema.restore(self.parameters)
        self.model.train()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.stock.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]):
        """Take up a saved state, but keep the settings that the run has now.

        Raises:
            ValueError: its moments are of 8 bits and the run's are not, or the other way round.
        """
        in_8_bits = any("exp_avg" not in moments for moments in saved["optimizer"]["state"].values())
        if saved["optimizer"]["state"] and in_8_bits != self.args.use_8bit_adam:
            raise ValueError(f"it was trained with --use_8bit_adam {str(in_8_bits).lower()}")
        self.stock.load_state_dict(saved["model"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        base_lrs = self.lr_scheduler.base_lrs
        self.lr_scheduler.load_state_dict({**saved["lr_scheduler"], "base_lrs": base_lrs})
        lambdas = self.lr_scheduler.lr_lambdas
        for group, now, base_lr, factor in zip(self.optimizer.param_groups, settings, base_lrs, lambdas):
            group.update(now, lr=base_lr * factor(self.lr_scheduler.last_epoch))
        if self.ema is not None and saved["ema"] is None:  # the run had none so far: it starts from here
            self.ema.shadow_params = [parameter.detach().clone() for parameter in self.parameters]
        elif self.ema is not None:
            now = {key: getattr(self.ema, key) for key in ("decay", "power", "inv_gamma", "use_ema_warmup")}
            self.ema.load_state_dict({**saved["ema"], **now})
            self.ema.to(self.parameters[0].device)

    def snapshot(self) -> dict[str, Any]:
        """A copy of the present state, for `load_state_dict`."""
        return copy.deepcopy(self.state_dict())


def build_optimizer(parameters, in_8_bits: bool, **settings) -> torch.optim.Optimizer:
    """AdamW: fused, or by bitsandbytes with moments of 8 bits (Dettmers et al. 2022), in a quarter of the memory."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not in_8_bits:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    from bitsandbytes.optim import AdamW8bit  # an extra

    return AdamW8bit(parameters, **settings)
