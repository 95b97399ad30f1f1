"""The average of a model's weights, beside that of diffusers."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from hwdiffusion.trained_model import TrainedModel


SETTINGS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.0, "use_8bit_adam": False}
SETTINGS |= {"ema_max_decay": 0.7, "ema_power": 0.75, "max_grad_norm": 1.0, "skip_nonfinite_steps": False}
SETTINGS |= {"lr_scheduler": "constant", "lr_warmup_steps": 0}


def test_the_average_is_that_of_diffusers_and_what_no_optimizer_trains_is_averaged_too():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)  # as a codebook of moving averages
    trained = TrainedModel(Accelerator(), model, 0.1, SimpleNamespace(**SETTINGS), ema=True)
    trained.schedule(10)
    theirs = EMAModel(model.parameters(), decay=0.7, use_ema_warmup=True, power=0.75)
    bias = model.bias.detach().clone()
    for _ in range(8):  # the last ones by `decay`
        trained.update(model(torch.randn(4, 3)).square().mean())
        model.bias.data += 1
        trained.update_average()
        theirs.step(model.parameters())
        bias = theirs.cur_decay_value * bias + (1 - theirs.cur_decay_value) * model.bias
    assert trained.ema.optimization_step == theirs.optimization_step == 8 and theirs.cur_decay_value == 0.7
    torch.testing.assert_close(trained.average_of(model.weight), theirs.shadow_params[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(trained.average_of(model.bias), bias, rtol=0, atol=1e-5)
    assert (trained.average_of(model.weight) - model.weight).abs().max() > 0.05
    assert (trained.average_of(model.bias) - model.bias).abs().min() > 0.1
    trained.update_average()  # without a step in between
    assert trained.ema.optimization_step == 8
