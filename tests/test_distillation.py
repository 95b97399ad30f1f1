"""Few-step students: the equations against the schedulers that sample by them, and train_distill.py itself."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, UNet2DConditionModel
from running import TINY_PRESET, write_preset

from hwdiffusion.distillation import TIMESTEP_SCALING, build_student, consistency, ddim_step, guided_prediction
from hwdiffusion.objectives import add_noise
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.train_scripts import train_ddpm, train_distill, train_ldm


def tensors(count: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("timestep", [0, 3, 500, 979])
def test_the_end_of_the_path_is_what_the_stock_scheduler_steps_by(prediction_type, timestep):
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type, "clip_sample": False}
    scheduler = LCMScheduler(**settings, timestep_scaling=TIMESTEP_SCALING)
    scheduler.set_timesteps(1)
    scheduler.timesteps = torch.tensor([timestep])
    output, sample = tensors(2, 3, 2, 4, 4)
    theirs = scheduler.step(output, timestep, sample).denoised
    ours = consistency(DDPMScheduler(**settings), output, sample, torch.full((3,), timestep))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_step_of_the_teacher_is_a_step_of_ddim_and_none_stays(prediction_type):
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": prediction_type, "clip_sample": False}
    scheduler, noise_scheduler = DDIMScheduler(**settings), DDPMScheduler(**settings)
    scheduler.set_timesteps(50)
    output, sample = tensors(2, 3, 2, 4, 4)
    for timestep in (40, 500, 980):
        theirs = scheduler.step(output, timestep, sample).prev_sample
        there, back = torch.full((3,), timestep), torch.full((3,), timestep - 20)
        torch.testing.assert_close(
            ddim_step(noise_scheduler, output, sample, there, back), theirs, rtol=1e-4, atol=1e-4
        )
    assert torch.equal(ddim_step(noise_scheduler, output, sample, *[torch.zeros(3).long()] * 2), sample)


def test_on_a_flow_a_step_is_eulers_and_the_true_velocity_leads_to_the_end():
    noise_scheduler = FlowMatchEulerDiscreteScheduler()
    clean, noise = tensors(2, 3, 2, 4, 4)
    timesteps, earlier = torch.tensor([1000.0, 600.0, 20.0]), torch.tensor([900.0, 500.0, 0.0])
    noisy = add_noise(noise_scheduler, clean, noise, timesteps)
    step = ddim_step(noise_scheduler, noise - clean, noisy, timesteps, earlier)
    moved = (timesteps - earlier)[:, None, None, None] / 1000
    torch.testing.assert_close(step, noisy - moved * (noise - clean), rtol=1e-4, atol=1e-5)
    end = consistency(noise_scheduler, noise - clean, noisy, timesteps)
    torch.testing.assert_close(end, clean, rtol=1e-4, atol=1e-5)
    assert torch.equal(consistency(noise_scheduler, noise, clean, torch.zeros(3)), clean)  # f(z_0, 0) = z_0


def pipeline(**config) -> ClassConditionalPipeline:
    torch.manual_seed(0)
    sizes = dict(TINY_PRESET["unet"].items())
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, projection_class_embeddings_input_dim=10, **sizes
    )
    return ClassConditionalPipeline(
        unet=unet.eval(), scheduler=DDIMScheduler(prediction_type="v_prediction"), **config
    )


def test_the_teacher_is_guided_as_the_pipeline_guides_it():
    teacher = pipeline(prediction_type="v_prediction", has_null_label=True)
    (noise,) = tensors(1, 2, 1, 8, 8)
    drawn = []

    def spy(pipe, index, timestep, tensors):
        drawn.append(tensors["latents"])
        return tensors

    call = {"labels": [3, 7], "latents": noise, "num_inference_steps": 20, "callback_on_step_end": spy}
    teacher(**call, guidance_scale=2.5, output_type="latent")
    tokens = torch.nn.functional.one_hot(torch.tensor([[3], [7]]), 10).float()
    first = torch.full((2,), 950)
    output = guided_prediction(teacher, noise, first, tokens, 2.5)
    teacher.scheduler.set_timesteps(20)
    theirs = teacher.scheduler.step(output, 950, noise).prev_sample
    torch.testing.assert_close(drawn[0], theirs, rtol=1e-4, atol=1e-5)


def test_a_student_begins_as_its_teacher_and_knows_one_guidance():
    teacher = pipeline(prediction_type="v_prediction", has_null_label=True, default_guidance_scale=2.0)
    student = build_student(
        teacher,
        DDPMScheduler(prediction_type="v_prediction"),
        SimpleNamespace(num_ddim_timesteps=50, num_inference_steps=4),
    )
    for name, weight in teacher.unet.state_dict().items():
        assert torch.equal(student.unet.state_dict()[name], weight)
    assert student.unet is not teacher.unet
    assert student.config.default_guidance_scale == 1 and student.config.default_num_inference_steps == 4
    with pytest.raises(ValueError, match="label dropout"):
        student(labels=[1], guidance_scale=2.0)


@pytest.mark.parametrize("kind", ["latent", "pixel", "flow"])
def test_a_run_is_distilled_by_one_command_and_loads_as_a_pipeline(kind, tmp_path):
    settings = {**TINY_PRESET, "max_train_steps": 4, "seed": 7}
    if kind == "flow":
        settings["noise_scheduler"] = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    preset, script = write_preset(tmp_path / "tiny.yaml", settings), train_ldm if kind == "latent" else train_ddpm
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert script.main(["--preset", preset, "--output_dir", str(teacher)]) == 0
    argv = [
        "--teacher",
        str(teacher),
        "--max_train_steps",
        "3",
        "--train_batch_size",
        "16",
        "--output_dir",
        str(student),
    ]
    assert train_distill.main([*argv, "--dry_run"]) == 0 and not student.exists()
    assert train_distill.main(argv) == 0
    before = (student / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert before != (teacher / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert train_distill.main(argv) == 0  # it is done
    assert (student / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before

    pipe = ClassConditionalPipeline.from_pretrained(student)
    assert type(pipe.scheduler).__name__ == ("FlowMatchLCMScheduler" if kind == "flow" else "LCMScheduler")
    seen = []
    pipe(labels=[3, 4], callback_on_step_end=lambda pipe, index, timestep, tensors: seen.append(timestep) or {})
    assert len(seen) == 4  # as it recommends
    config = yaml.safe_load((student / "config.yaml").read_text())
    assert config["train_distill"]["max_train_samples"] == 100  # the teacher's pictures, and its split of them
    assert config["train_distill"]["seed"] == 7


def test_what_cannot_be_distilled_is_refused_before_anything_is_made(tmp_path, capsys):
    def fails(*flags) -> str:
        assert train_distill.main([*flags, "--output_dir", str(tmp_path / "student")]) == 2
        assert not (tmp_path / "student").exists()
        return capsys.readouterr().err

    assert "--teacher needs a run folder or Hub id" in fails()
    assert "--teacher needs a run folder or Hub id" in fails("--preset", "mnist-ldm")
    assert "is neither a run folder nor" in fails("--teacher", str(tmp_path), "--dataset_name", "digits")
    teacher = ["--teacher", str(tmp_path / "teacher")]
    pipeline(prediction_type="v_prediction").save_pretrained(tmp_path / "teacher")
    assert "give --train_data_dir FOLDER or --dataset_name" in fails(*teacher)
    digits = [*teacher, "--dataset_name", "digits"]
    assert "give --resolution 8 8 and its --image_mode" in fails(*digits, "--resolution", "16", "--image_mode", "L")
    digits += ["--resolution", "8", "--image_mode", "L"]
    assert "has no guidance to distil; give --teacher_guidance_scale 1" in fails(
        *digits, "--teacher_guidance_scale", "2"
    )
    assert "--teacher_guidance_scale must be at least 1, not 0.5" in fails(*digits, "--teacher_guidance_scale", "0.5")
    assert "--num_inference_steps must be --num_ddim_timesteps at most" in fails(*digits, "--num_ddim_timesteps", "2")
    assert "--num_ddim_timesteps must divide the teacher's 1000" in fails(*digits, "--num_ddim_timesteps", "600")
    names = dict(enumerate("abcdefghij"))
    pipeline(prediction_type="v_prediction", id2label=names).save_pretrained(tmp_path / "teacher")
    assert "knows the labels a, b, c, d, e, f, g, h, but the pictures have 0, 1, 2" in fails(*digits)
