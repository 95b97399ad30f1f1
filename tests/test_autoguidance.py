"""The early weights that a run keeps to be guided by."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_UNET
from running import TINY_PRESET, command, write_preset
from tiny import make_pipeline

from hwdiffusion.autoguidance import EarlierSelf
from hwdiffusion.checkpoints import STATE_FILE
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.train_scripts import train_ddpm


def test_until_it_is_taken_the_model_stands_there_itself_and_a_state_tells_which():
    pipe = make_pipeline("pixel")
    earlier_self = EarlierSelf(pipe, at=0.5)
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
    continued = EarlierSelf(other, at=0.5)
    continued.load_state_dict(earlier_self.state_dict())
    assert continued.taken and set(continued.alike) == set(earlier_self.state_dict())
    torch.testing.assert_close(other.guidance_unet.conv_in.weight, pipe.guidance_unet.conv_in.weight)
    continued.load_state_dict(untaken)
    assert not continued.taken and other.guidance_unet is other.unet


def weights(folder: Path) -> bytes:
    return (folder / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("at, steps, expected", [(0.5, 8, 4), (0.01, 8, 1), (0.99, 8, 7), (0.5, 1, None)])
def test_weights_are_taken_at_their_part_of_the_run_but_none_untrained_and_none_too_late(at, steps, expected):
    earlier_self, taken = EarlierSelf(make_pipeline("pixel"), at), None
    for step in range(steps):
        trainer = SimpleNamespace(step=step, max_steps=steps, step_at=lambda part: round(part * steps))
        if earlier_self.is_due(trainer):
            assert taken is None
            earlier_self.take()
            taken = step
    assert taken == expected


ENDS = [["--max_train_steps", "8"], ["--max_train_seconds", "4"]]
EARLY = ["--guidance_unet_at", "0.5", "--label_dropout", "0"]


@pytest.mark.parametrize("end", ENDS)
def test_a_run_saves_the_average_that_it_had_then(end, preset, tmp_path):
    """The guide of the run is the model of the checkpoint at that part of it; before, it is the model."""
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), *end]
    each = ["--checkpointing_steps", "1", "--checkpoints_total_limit", "1000"]
    assert train_ddpm.main([*argv, *EARLY, *each]) == 0
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    models = [weights(path / "unet") for path in checkpoints]
    guides = [weights(path / "guidance_unet") for path in checkpoints]
    of_itself = [model == guide for model, guide in zip(models, guides)]
    taken = of_itself.index(False)  # the first checkpoint after the weights were taken, of one a step
    before, after = (torch.load(path / STATE_FILE, weights_only=True) for path in checkpoints[taken - 1 : taken + 1])
    # a run whose end moves may be told at a step that its half was over at the one before
    assert 0.5 not in before["passed"] and after["passed"][0.5] <= taken
    if end[0] == "--max_train_steps":
        assert taken == 4
    assert all(of_itself[:taken]) and not any(of_itself[taken:])
    assert all(guide == models[taken - 1] for guide in guides[taken:])
    assert weights(run / "guidance_unet") == models[taken - 1]

    pipe = ClassConditionalPipeline.from_pretrained(run)
    call = {"labels": [0], "num_inference_steps": 2, "output_type": "latent"}
    guided = pipe(**call, generator=torch.Generator().manual_seed(0)).images  # by the scale that the run recommends
    plain = pipe(**call, generator=torch.Generator().manual_seed(0), guidance_scale=1).images
    assert (guided - plain).abs().max() > 0

    assert train_ddpm.main([*argv, "--overwrite_output_dir"]) == 0
    assert not (run / "guidance_unet").exists()


def test_in_latents_in_bf16_without_averages_it_draws_as_the_model_does_and_is_named_on_the_card(preset, tmp_path):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", run, "--max_train_steps", "4", "--train_vqgan.max_train_steps", "4"]
    argv += ["--mixed_precision", "bf16", "--use_ema", "false", "--sample_steps", "1", "3"]
    argv += ["--guidance_interval", "0", "0.5"]
    done = subprocess.run(command("train_ldm", *argv, *EARLY), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # in a process of its own, since a process has one precision
    assert (run / "samples" / "step-3.png").is_file()
    assert weights(run / "guidance_unet") != weights(run / "unet")
    card = (run / "README.md").read_text()
    assert "leads away from its `guidance_unet`" in card and "autoguidance 1.5 in (0, 0.5) of the steps" in card


def test_a_model_without_labels_is_guided_by_its_earlier_self(tmp_path):
    unlabelled = {**TINY_PRESET, "unet": TINY_UNET}
    argv = ["--preset", write_preset(tmp_path / "unlabelled.yaml", unlabelled), "--max_train_steps", "4", *EARLY]
    assert train_ddpm.main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "run")
    assert pipe.config.default_guidance_scale == 1.5
    assert pipe(num_inference_steps=2).images[0].size == (16, 16)


def test_a_run_goes_on_with_the_guide_that_it_has_and_a_longer_one_is_another(preset, tmp_path, capsys):
    run = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--label_dropout", "0", "--max_train_steps"]
    constant = ["--lr_scheduler", "constant", "--lr_warmup_steps", "0"]
    assert train_ddpm.main([*run, "4", *constant, "--guidance_unet_at", "0.5"]) == 0
    assert train_ddpm.main([*run, "8", *constant, "--guidance_unet_at", "0.5"]) == 2
    assert "--guidance_unet_at is a part of the whole run" in capsys.readouterr().err
    again = [*run, "8", *constant, "--resume_from_checkpoint", "latest", "--guidance_unet_at"]
    assert train_ddpm.main([*again, "0.25"]) == 2
    assert "has taken its guidance_unet by --guidance_unet_at 0.5, not 0.25" in capsys.readouterr().err
    assert train_ddpm.main([*again, "0", "--guidance_scale", "1"]) == 2
    assert "was made with --guidance_unet_at; leave it as it was" in capsys.readouterr().err
    before = weights(tmp_path / "run" / "guidance_unet")
    assert train_ddpm.main([*again, "0.5"]) == 0
    assert weights(tmp_path / "run" / "guidance_unet") == before

    bare = ["--preset", preset, "--output_dir", str(tmp_path / "bare"), "--max_train_steps", "4"]
    assert train_ddpm.main(bare) == 0
    assert train_ddpm.main([*bare, "--resume_from_checkpoint", "latest", "--guidance_unet_at", "0.5"]) == 2
    assert "was made without --guidance_unet_at; give --guidance_unet_at 0" in capsys.readouterr().err
