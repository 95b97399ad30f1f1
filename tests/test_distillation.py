"""Few-step students: the equations against the schedulers that sample by them, and train_distill.py itself."""

import copy
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, UNet2DConditionModel
from running import TINY_PRESET, write_preset

from hwdiffusion.config import parse
from hwdiffusion.distillation import (
    TIMESTEP_SCALING,
    build_student,
    consistency,
    ddim_step,
    guided_prediction,
    pseudo_huber,
    steps_done,
    training_scheduler,
)
from hwdiffusion.models import swap_scheduler
from hwdiffusion.objectives import add_noise, draw_timesteps
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.randomness import Draws
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


@pytest.mark.parametrize("by", ["the null label", "a weaker UNet"])
def test_the_teacher_is_guided_as_the_pipeline_guides_it(by):
    teacher = pipeline(prediction_type="v_prediction", has_null_label=by == "the null label")
    if by == "a weaker UNet":
        weaker = copy.deepcopy(teacher.unet)
        with torch.no_grad():
            weaker.conv_out.weight += 0.1
        teacher.register_modules(guidance_unet=weaker)
    (noise,) = tensors(1, 2, 1, 8, 8)
    drawn = []

    def spy(pipe, index, timestep, tensors):
        drawn.append(tensors["latents"])
        return tensors

    call = {"labels": [3, 7], "latents": noise, "num_inference_steps": 20, "callback_on_step_end": spy}
    teacher(**call, guidance_scale=2.5, output_type="latent")
    tokens = torch.nn.functional.one_hot(torch.tensor([[3], [7]]), 10).float()
    first = torch.full((2,), 950)
    output = guided_prediction(teacher, noise, first, tokens, 2.5, (0, 1))
    teacher.scheduler.set_timesteps(20)
    theirs = teacher.scheduler.step(output, 950, noise).prev_sample
    torch.testing.assert_close(drawn[0], theirs, rtol=1e-4, atol=1e-5)
    part = guided_prediction(teacher, noise, torch.tensor([950, 400]), tokens, 2.5, (0.0, 0.5))
    plain = guided_prediction(teacher, noise, torch.tensor([950, 400]), tokens, 1.0, (0, 1))
    torch.testing.assert_close(part[0], output[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part[1], plain[1])
    assert (output - plain).abs().max() > 1e-3  # so that what is compared differs


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=["DDIM", "flow", "shifted flow"],
)
def test_the_part_of_the_steps_that_is_guided_is_that_of_a_call(scheduler):
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    teacher = pipeline(prediction_type="flow_prediction" if flow else "v_prediction", has_null_label=True)
    teacher.scheduler, passes = scheduler, []
    teacher.unet.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    call = {"labels": [3], "num_inference_steps": 20, "guidance_scale": 2.5, "guidance_interval": (0.2, 0.6)}
    teacher(**call, output_type="latent")
    guided = torch.tensor(passes) == 2  # with and without the label
    done = steps_done(scheduler.config, scheduler.timesteps.float())
    assert guided.sum() == 8 and torch.equal((done >= 0.2) & (done <= 0.6), guided)


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
    saved = (student / "unet" / "config.json").read_text()
    assert str(tmp_path) not in saved + (student / "README.md").read_text()
    assert "distilled from teacher with `hwdiffusion`" in (student / "README.md").read_text()
    config = yaml.safe_load((student / "config.yaml").read_text())
    assert config["train_distill"]["max_train_samples"] == 100  # the teacher's pictures, and its split of them
    assert config["train_distill"]["seed"] == 7


@pytest.mark.parametrize(
    "flags, scale, interval",
    [
        ([], 2.25, [0.0, 0.4]),
        (["--teacher_guidance_scale", "2.25"], 2.25, (0.0, 1.0)),  # of scales that are asked for all steps
        (["--teacher_guidance_scale", "3", "--teacher_guidance_interval", "0.1", "0.6"], 3.0, [0.1, 0.6]),
    ],
)
def test_a_student_learns_the_guidance_that_its_teacher_recommends_or_another(
    flags, scale, interval, preset, tmp_path, monkeypatch
):
    teacher, asked, loss = tmp_path / "teacher", [], train_distill.consistency_loss
    argv = ["--preset", preset, "--max_train_steps", "4", "--guidance_unet_at", "0.5", "--label_dropout", "0"]
    argv += ["--guidance_scale", "2.25", "--guidance_interval", "0", "0.4", "--output_dir", str(teacher)]
    assert train_ddpm.main(argv) == 0

    def spy(pipe, guidance_scale, guidance_interval, *others):
        asked.append((guidance_scale, [*guidance_interval], pipe.guidance_unet is not None))
        return loss(pipe, guidance_scale, guidance_interval, *others)

    monkeypatch.setattr(train_distill, "consistency_loss", spy)
    argv = ["--teacher", str(teacher), "--max_train_steps", "2", "--output_dir", str(tmp_path / "student"), *flags]
    assert train_distill.main(argv) == 0
    assert asked == [(scale, [*interval], True)]


def test_a_teacher_may_be_a_checkpoint_and_a_preset_of_ones_own_says_how(preset, tmp_path):
    teacher = tmp_path / "teacher"
    assert train_ddpm.main(["--preset", preset, "--output_dir", str(teacher), "--max_train_steps", "4"]) == 0
    of_checkpoint = parse("train_distill", ["--teacher", str(teacher / "checkpoint-4")]).args
    assert (of_checkpoint.dataset_name, of_checkpoint.max_train_samples) == ("digits", 100)
    assert (of_checkpoint.max_train_steps, of_checkpoint.learning_rate) == (1000, 3e-4)  # its own, not the teacher's

    own = write_preset(tmp_path / "own.yaml", {"dataset_name": "digits", "seed": 3, "max_train_steps": 9})
    args = parse("train_distill", ["--teacher", str(teacher), "--preset", own]).args
    assert (args.seed, args.max_train_steps, args.max_train_samples) == (3, 9, None)
    args = parse("train_distill", ["--teacher", str(teacher), "--preset", "mnist-ldm"]).args
    assert (args.dataset_name, args.max_train_steps) == ("ylecun/mnist", 1000)


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
    assert "--teacher_guidance_interval must be two numbers" in fails(*digits, "--teacher_guidance_interval", "0")
    assert "--num_inference_steps must be --num_ddim_timesteps at most" in fails(*digits, "--num_ddim_timesteps", "2")
    assert "--num_ddim_timesteps must divide the teacher's 1000" in fails(*digits, "--num_ddim_timesteps", "600")
    assert "--unet.layers_per_block is nothing that train_distill takes" in fails(*digits, "--unet.layers_per_block=2")
    names = dict(enumerate("abcdefghij"))
    pipeline(prediction_type="v_prediction", id2label=names).save_pretrained(tmp_path / "teacher")
    assert "has other labels than the pictures: the label '0' is only in the pictures" in fails(*digits)
    noisy = pipeline(prediction_type="epsilon", id2label={k: str(k) for k in range(10)})
    noisy.scheduler.register_to_config(prediction_type="epsilon", beta_schedule="squaredcos_cap_v2")
    noisy.save_pretrained(tmp_path / "teacher")
    assert "distil one of prediction_type v_prediction" in fails(*digits)


# -- the loss ---------------------------------------------------------------------------------------------------------


class Says(torch.nn.Module):
    """A UNet that predicts samples: the same times a label's weight, or what `of` says of the noisy ones."""

    def __init__(self, of):
        super().__init__()
        self.of, self.seen = of, []
        self.config = UNet2DConditionModel(
            **TINY_PRESET["unet"],
            sample_size=8,
            in_channels=1,
            out_channels=1,
            projection_class_embeddings_input_dim=3,
        ).config

    def forward(self, sample, timesteps, encoder_hidden_states=None, class_labels=None, return_dict=False):
        self.seen.append((timesteps, class_labels, torch.is_grad_enabled()))
        return (self.of(sample, class_labels),)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_loss_compares_a_point_with_where_the_guided_teacher_leads_from_it(guidance_scale):
    """Where a student's end is z itself but for the boundary's c_skip and c_out, both of which are known."""
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    given = torch.tensor([0.0, 1.0, 2.0])  # a teacher's clean picture: what its label is, and 0 without one
    unet = Says(lambda sample, labels: (labels @ given)[:, None, None, None].expand_as(sample))
    config = SimpleNamespace(max_labels=2)
    teacher = SimpleNamespace(unet=unet, guidance_unet=None, scheduler=noise_scheduler, config=config)
    student = Says(lambda sample, labels: sample)
    draws = Draws(0, 0, torch.arange(4))
    clean, labels = torch.zeros(4, 1, 8, 8), torch.tensor([[0], [1], [2], [2]])
    loss = train_distill.consistency_loss(teacher, guidance_scale, (0, 1), noise_scheduler, 50, 4)(
        student, clean, labels, draws
    )

    noise, timesteps = draws.normal("noise", (1, 8, 8)), draw_timesteps(draws, noise_scheduler, "stratified", 4)
    earlier = (timesteps - 20).clamp(min=0)
    noisy = noise_scheduler.add_noise(clean, noise, timesteps)
    alpha, sigma = (noise_scheduler.alphas_cumprod**0.5, (1 - noise_scheduler.alphas_cumprod) ** 0.5)
    ahead = (guidance_scale * given[labels[:, 0]])[:, None, None, None]
    at = lambda table, when: table[when][:, None, None, None]  # noqa: E731
    leads = (noisy - at(alpha, timesteps) * ahead) / at(sigma, timesteps) * at(sigma, earlier) + at(
        alpha, earlier
    ) * ahead
    scaled = [10.0 * when[:, None, None, None] for when in (timesteps, earlier)]
    factors = [0.25 / (times**2 + 0.25) + times / (times**2 + 0.25).sqrt() for times in scaled]
    expected = pseudo_huber(factors[0] * noisy, factors[1] * leads)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)

    (ours, told, learns), (theirs, _, still) = student.seen
    assert torch.equal(ours, timesteps) and torch.equal(theirs, earlier)
    assert (learns, still) == (True, False)  # the far end is taken as it is
    assert torch.equal(told.argmax(dim=1), labels[:, 0])


def test_a_flow_students_few_steps_are_even_and_none_is_wasted_on_no_noise():
    teacher = pipeline(prediction_type="flow_prediction", has_null_label=True)
    teacher.scheduler = FlowMatchEulerDiscreteScheduler()
    args = SimpleNamespace(num_ddim_timesteps=50, num_inference_steps=4)
    student = build_student(teacher, training_scheduler(teacher), args)
    student(labels=[1], output_type="np")
    torch.testing.assert_close(student.scheduler.sigmas, torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


@pytest.mark.parametrize("solver", ["euler", "dpmpp"])
def test_a_flow_is_distilled_by_the_shift_that_it_was_trained_with_whatever_samples_it(solver):
    teacher = pipeline(prediction_type="flow_prediction")
    teacher.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    swap_scheduler(teacher, solver)
    assert training_scheduler(teacher).config.shift == 3.0
