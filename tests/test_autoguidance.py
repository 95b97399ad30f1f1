"""The early weights that a run keeps to be guided by."""

from pathlib import Path

import pytest
import torch
from tiny import make_pipeline

from hwdiffusion.autoguidance import EarlierSelf
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.train_scripts import train_ddpm, train_ldm


def test_until_it_is_taken_the_model_stands_there_itself_and_a_state_tells_which():
    pipe = make_pipeline("pixel")
    earlier_self = EarlierSelf(pipe)
    assert pipe.guidance_unet is pipe.unet and not earlier_self.taken
    untaken = {key: tensor.clone() for key, tensor in earlier_self.state_dict().items()}
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1
    earlier_self.take()
    with torch.no_grad():
        pipe.unet.conv_in.weight += 1
    assert pipe.guidance_unet is earlier_self.unet
    torch.testing.assert_close(pipe.guidance_unet.conv_in.weight, pipe.unet.conv_in.weight - 1)
    assert not any(parameter.requires_grad for parameter in earlier_self.parameters())

    other = make_pipeline("pixel")
    continued = EarlierSelf(other)
    continued.load_state_dict(earlier_self.state_dict())
    assert continued.taken and set(continued.alike) == set(earlier_self.state_dict())
    torch.testing.assert_close(other.guidance_unet.conv_in.weight, pipe.guidance_unet.conv_in.weight)
    continued.load_state_dict(untaken)
    assert not continued.taken and other.guidance_unet is other.unet


def weights(folder: Path) -> bytes:
    return (folder / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("end", [["--max_train_steps", "8"], ["--max_train_seconds", "3"]])
def test_a_run_saves_the_average_that_it_had_then(end, preset, tmp_path):
    """The guide of the run is the model of the checkpoint at that part of it; before, it is the model."""
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), *end, "--guidance_unet_at", "0.5", "--label_dropout", "0"]
    assert train_ddpm.main([*argv, "--checkpointing_steps", "1", "--checkpoints_total_limit", "1000"]) == 0
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    models = [weights(path / "unet") for path in checkpoints]
    guides = [weights(path / "guidance_unet") for path in checkpoints]
    of_itself = [model == guide for model, guide in zip(models, guides)]
    taken = of_itself.index(False)  # the first checkpoint after the weights were taken
    assert all(of_itself[:taken]) and not any(of_itself[taken:])
    assert all(guide == models[taken - 1] for guide in guides[taken:])
    assert weights(run / "guidance_unet") == models[taken - 1]
    if end[0] == "--max_train_steps":
        assert taken == 4

    pipe = ClassConditionalPipeline.from_pretrained(run)
    call = {"labels": [0], "num_inference_steps": 2, "output_type": "latent"}
    guided = pipe(**call, generator=torch.Generator().manual_seed(0)).images  # by the scale that the run recommends
    plain = pipe(**call, generator=torch.Generator().manual_seed(0), guidance_scale=1).images
    assert (guided - plain).abs().max() > 0

    assert train_ddpm.main(["--preset", preset, "--output_dir", str(run), *end, "--overwrite_output_dir"]) == 0
    assert not (run / "guidance_unet").exists()


def test_in_latents_it_is_named_on_the_card(preset, tmp_path):
    run = tmp_path / "run"
    argv = [
        "--preset",
        preset,
        "--output_dir",
        str(run),
        "--max_train_steps",
        "4",
        "--train_vqgan.max_train_steps",
        "4",
    ]
    assert train_ldm.main([*argv, "--guidance_unet_at", "0.5", "--label_dropout", "0"]) == 0
    card = (run / "README.md").read_text()
    assert "it is guided by its `guidance_unet` alone" in card and "autoguidance 1.5" in card
