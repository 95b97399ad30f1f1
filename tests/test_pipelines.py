"""The pipeline's contract, on tiny random models of every kind that training makes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROJECTION, TINY_UNET, TINY_VQVAE, TOKENS
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from hwdiffusion.models import build_unet, build_vqvae, latent_shape
from hwdiffusion.pipelines import ClassConditionalPipeline, label_ids, label_tokens, unet_conditioning


NAMES = {0: "cat", 1: "dog", 2: "wild"}
KINDS = ("pixel", "latent", "tokens", "unconditional", "odd")


def make_pipeline(kind: str = "latent", **config) -> ClassConditionalPipeline:
    torch.manual_seed(0)
    vqvae, shape = None, (1, 8, 8)
    if kind == "latent":
        vqvae = build_vqvae(TINY_VQVAE, 1, (16, 16)).eval()
        vqvae.register_to_config(scaling_factor=1.7)
        shape = latent_shape(vqvae, (16, 16))
    if kind == "odd":
        shape = (3, 7, 9)
    odd = {"up_block_types": ["UpBlock2D", "UpBlock2D"]} if kind == "odd" else {}
    section = {**TINY_UNET, **odd, **({} if kind == "unconditional" else TOKENS if kind == "tokens" else PROJECTION)}
    unet = build_unet(section, shape, 0 if kind == "unconditional" else len(NAMES)).eval()
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    labelled = {} if kind == "unconditional" else {"id2label": NAMES, "has_null_label": True}
    pipe = ClassConditionalPipeline(
        unet=unet,
        scheduler=scheduler,
        vqvae=vqvae,
        prediction_type="v_prediction",
        **{**labelled, "default_num_inference_steps": 4, **config},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def ask(kind, *labels):
    return {"num_images_per_prompt": len(labels)} if kind == "unconditional" else {"labels": list(labels)}


# -- labels -----------------------------------------------------------------------------------------------------------


def test_ids_names_sets_and_tensors_are_one_encoding():
    expected = label_ids([2, 0], NAMES)
    for same in (["wild", "cat"], [[2], ["cat"]], torch.tensor([2, 0]), torch.tensor([[2], [0]]), np.array([2, 0])):
        assert torch.equal(label_ids(same, NAMES), expected)
    assert torch.equal(label_ids("dog", NAMES), label_ids([1], NAMES))
    assert torch.equal(label_ids(1, NAMES), label_ids([1], NAMES))


def test_tokens_are_one_hot_and_null_is_zero():
    tokens = label_tokens(label_ids([["dog", 2], None, []], NAMES, max_labels=2), 3)
    assert tokens.tolist() == [[[0, 1, 0], [0, 0, 1]], [[0, 0, 0]] * 2, [[0, 0, 0]] * 2]


def test_a_one_hot_float_tensor_is_the_same_as_an_id():
    pipe = make_pipeline()
    one_hot = torch.eye(3)[[2, 1]]
    assert torch.equal(pipe.encode_labels(one_hot), pipe.encode_labels([2, 1]))


@pytest.mark.parametrize(
    "labels, message",
    [
        ([3], "label 3 is out of range; this model knows the ids 0 to 2"),
        ([-2], "out of range"),
        (["catt"], "unknown label 'catt'; the nearest known one is 'cat'"),
        ([["cat", "dog"]], "holds 2 labels, but this model takes at most 1"),
        ([], "labels is empty"),
        (torch.rand(2, 5), r"\(B, 3\)"),
    ],
)
def test_wrong_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(labels=labels)


@pytest.mark.parametrize("labels", [[1.5], [True], {"cat"}, [object()]])
def test_labels_of_another_type_are_refused(labels):
    with pytest.raises(TypeError):
        make_pipeline()(labels=labels)


def test_a_unet_without_labels_never_ignores_them():
    with pytest.raises(ValueError, match="unconditional"):
        make_pipeline("unconditional")(labels=[1])
    with pytest.raises(ValueError, match="takes no labels"):
        unet_conditioning(make_pipeline("unconditional").unet.config, torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="labels of 3 classes"):
        unet_conditioning(make_pipeline().unet.config, torch.zeros(1, 1, 4))


@pytest.mark.parametrize("kind", ["latent", "tokens"])
def test_the_label_changes_the_picture(kind):
    pipe = make_pipeline(kind)
    cat, dog = (pipe(labels=[label], generator=seeds(0), output_type="latent").images for label in (0, 1))
    assert (cat - dog).abs().max() > 1e-3


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_guidance_is_the_equation_of_classifier_free_guidance():
    """One DDIM step by hand: uncond + w (cond - uncond)."""
    pipe, w = make_pipeline(), 2.5
    noise = torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        outputs = [
            pipe.unet(noise, 0, **unet_conditioning(pipe.unet.config, tokens)).sample
            for tokens in (torch.zeros(1, 1, 3), label_tokens(torch.tensor([[1]]), 3))
        ]
    pipe.scheduler.set_timesteps(1)
    expected = pipe.scheduler.step(outputs[0] + w * (outputs[1] - outputs[0]), 0, noise).prev_sample
    actual = pipe(labels=[1], latents=noise, num_inference_steps=1, guidance_scale=w, output_type="latent").images
    torch.testing.assert_close(actual, expected)


def test_guidance_of_one_is_no_guidance_and_its_interval_limits_it():
    pipe = make_pipeline()
    run = lambda **kwargs: pipe(labels=[1], generator=seeds(0), output_type="latent", **kwargs).images  # noqa: E731
    plain, guided = run(guidance_scale=1.0), run(guidance_scale=3.0)
    assert (plain - guided).abs().max() > 1e-3
    torch.testing.assert_close(run(guidance_scale=3.0, guidance_interval=(0.0, 1.0)), guided)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    run(guidance_scale=3.0, guidance_interval=(0.5, 1.0))
    assert calls == [1, 1, 2, 2]


def test_rescaled_guidance_has_the_deviation_of_the_conditional_output():
    from hwdiffusion.pipelines.class_conditional import rescale_guidance

    guided, cond = 5 * torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8)
    rescaled = rescale_guidance(guided, cond, 1.0)
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))
    assert torch.equal(rescale_guidance(guided, cond, 0.0), guided)


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_depends_on_its_generator_and_not_on_its_batch(kind):
    pipe = make_pipeline(kind)
    for scheduler in (DDIMScheduler, DDPMScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        options = {"output_type": "latent", "num_inference_steps": 5}
        together = pipe(**ask(kind, 0, 1, 2), generator=seeds(5, 6, 7), **options).images
        alone = pipe(**ask(kind, 1), generator=seeds(6), **options).images
        torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_output_types_agree(kind):
    pipe = make_pipeline(kind)
    size = {"latent": (16, 16), "odd": (7, 9)}.get(kind, (8, 8))
    outputs = {
        output_type: pipe(**ask(kind, 0, 1), generator=seeds(0, 1), output_type=output_type).images
        for output_type in ("pil", "np", "pt")
    }
    assert outputs["pt"].shape[-2:] == size and outputs["pt"].min() >= 0 and outputs["pt"].max() <= 1
    np.testing.assert_allclose(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    for image, array in zip(outputs["pil"], outputs["np"]):
        assert image.mode == ("RGB" if kind == "odd" else "L")
        np.testing.assert_allclose(np.asarray(image).reshape(array.shape) / 255, array, atol=0.5 / 255 + 1e-6)


def test_latents_are_divided_by_the_scaling_factor_before_decoding():
    pipe = make_pipeline("latent")
    latents = pipe(labels=[0], generator=seeds(0), output_type="latent").images
    decoded = pipe(labels=[0], generator=seeds(0), output_type="pt").images
    with torch.no_grad():
        expected = pipe.vqvae.decode(latents / 1.7).sample
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1))


def test_num_images_per_prompt_repeats_each_label():
    pipe = make_pipeline()
    many = pipe(labels=[0, 2], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), guidance_scale=2.0)
    each = pipe(labels=[0, 0, 2, 2], generator=seeds(0, 1, 2, 3), guidance_scale=2.0)
    for one, other in zip(many.images, each.images):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_tuple_and_dict_outputs_and_the_alias_of_labels():
    pipe = make_pipeline()
    as_dict = pipe(labels=[1], generator=seeds(0), output_type="pt").images
    (as_tuple,) = pipe(class_labels=[1], generator=seeds(0), output_type="pt", return_dict=False)
    assert torch.equal(as_dict, as_tuple)


def test_a_callback_sees_and_changes_the_latents():
    pipe, seen = make_pipeline(), []

    def callback(pipeline, index, timestep, tensors):
        seen.append((index, int(timestep)))
        last = index == pipeline.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"]) if last else tensors["latents"]}

    latents = pipe(labels=[0], output_type="latent", callback_on_step_end=callback).images
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))
    assert not latents.any()


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
    ],
)
def test_any_scheduler_can_be_swapped_in(scheduler):
    """Another sampler of the same v-prediction model ends near where a fine DDIM ends, from the same noise."""
    pipe, noise = make_pipeline("pixel"), torch.randn(1, 1, 8, 8)
    run = lambda steps: pipe(labels=[1], latents=noise, num_inference_steps=steps, output_type="latent").images  # noqa: E731
    fine = run(500)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    swapped = pipe(labels=[1], latents=noise, num_inference_steps=250, generator=seeds(0), output_type="latent").images
    if scheduler is DDPMScheduler:  # stochastic: the same distribution, not the same picture
        assert torch.isfinite(swapped).all()
    else:
        assert (swapped - fine).norm() < 0.15 * fine.norm()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"timesteps": [500, 100]}, "takes no custom timesteps"),
        ({"guidance_interval": (0.8, 0.2)}, "start <= stop"),
        ({"guidance_rescale": 1.5}, r"\[0, 1\]"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number of at least 0"),
        ({"guidance_scale": "2"}, "guidance_scale must be a number of at least 0"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a number of at least 0"),
        ({"eta": "a"}, "eta must be a number"),
        ({"generator": 5}, "generator must be a torch.Generator"),
        ({"latents": [[0.0]]}, "latents must be a tensor"),
        ({"generator": seeds(0, 1)}, "list of 2, but 1 pictures"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"\(1, 2, 8, 8\)"),
        ({"output_type": "jpg"}, "output_type"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"class_labels": [1]}, "alias"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_step(arguments, message):
    pipe = make_pipeline()
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the UNet was called"))
    with pytest.raises(ValueError, match=message):
        pipe(labels=[0], **arguments)


def test_timesteps_must_descend():
    pipe = make_pipeline()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="descending"):
        pipe(labels=[0], timesteps=[100, 500])
    assert len(pipe(labels=[0], timesteps=[900, 500, 0]).images) == 1


def test_guidance_needs_a_null_label():
    pipe = make_pipeline(has_null_label=False)
    with pytest.raises(ValueError, match="label dropout"):
        pipe(labels=[0], guidance_scale=2.0)
    with pytest.raises(ValueError, match="every picture needs a label"):
        pipe()


def test_a_scheduler_of_another_prediction_type_is_refused():
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="epsilon")
    with pytest.raises(ValueError, match="trained for prediction_type='v_prediction'"):
        pipe(labels=[0])
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="trained for prediction_type='v_prediction'"):
        pipe(labels=[0])


def test_trailing_ddim_with_steps_that_do_not_divide_is_refused():
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="divides 1000"):
        pipe(labels=[0], num_inference_steps=30)


# -- persistence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_pipeline_loads_with_the_package_and_draws_the_same(kind, tmp_path):
    pipe = make_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert type(loaded) is ClassConditionalPipeline
    assert loaded.id2label == pipe.id2label and loaded.config.prediction_type == "v_prediction"
    assert set(loaded.components) == set(pipe.components)
    loaded.set_progress_bar_config(disable=True)
    ours, theirs = (p(**ask(kind, 0, 1), generator=seeds(0, 1), output_type="pt").images for p in (pipe, loaded))
    assert torch.equal(ours, theirs)


def test_a_saved_folder_holds_stock_components_and_one_source_file(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    make_pipeline().save_pretrained(tmp_path)  # saving again leaves no second copy
    index = json.loads((tmp_path / "model_index.json").read_text())
    sources = [path.stem for path in tmp_path.glob("*.py")]
    assert index["_class_name"] == [*sources, "ClassConditionalPipeline"]
    assert {index[name][0] for name in ("unet", "vqvae", "scheduler")} == {"diffusers"}
    assert index["id2label"] == {"0": "cat", "1": "dog", "2": "wild"}


def test_a_variant_is_saved_and_loaded(tmp_path):
    make_pipeline().save_pretrained(tmp_path, variant="fp16")
    assert list((tmp_path / "unet").glob("*.fp16.safetensors"))
    assert ClassConditionalPipeline.from_pretrained(tmp_path, variant="fp16").num_classes == 3


WITHOUT_THE_PACKAGE = """
    import importlib.abc, json, sys

    class Refuse(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hwdiffusion":
                raise ModuleNotFoundError(f"{name} is not installed", name=name)

    sys.meta_path.insert(0, Refuse())
    import torch
    from diffusers import DiffusionPipeline

    folder, again, labels = sys.argv[1:]
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert not any(name.split(".")[0] == "hwdiffusion" for name in sys.modules)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = pipe(labels=json.loads(labels), generator=generators, output_type="pt").images
    torch.save(images, again + ".pt")
    pipe.save_pretrained(again)
"""


def run_without_the_package(folder, again, cache, labels=("wild", 0)):
    """Two pictures of the labels, by stock diffusers in another process; the pipeline is saved `again` there."""
    script = textwrap.dedent(WITHOUT_THE_PACKAGE)
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache)}
    command = [sys.executable, "-c", script, str(folder), str(again), json.dumps(labels)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(f"{again}.pt", weights_only=True)


def test_a_saved_folder_loads_without_the_package_also_after_being_saved_again(tmp_path):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "first")
    expected = pipe(labels=["wild", 0], generator=seeds(0, 1), output_type="pt").images
    first = run_without_the_package(tmp_path / "first", tmp_path / "second", tmp_path / "cache1")
    assert torch.equal(first, expected)
    # what stock diffusers saved again still loads, with and without the package
    second = run_without_the_package(tmp_path / "second", tmp_path / "third", tmp_path / "cache2")
    assert torch.equal(second, expected)
    ours = ClassConditionalPipeline.from_pretrained(tmp_path / "second")
    ours.set_progress_bar_config(disable=True)
    assert torch.equal(ours(labels=["wild", 0], generator=seeds(0, 1), output_type="pt").images, expected)


def test_stock_diffusers_asks_for_trust(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_holds_the_source_file(through, tmp_path, monkeypatch):
    """The Hub's client is replaced at its two requests; what it would have uploaded is looked at."""
    from types import SimpleNamespace

    import diffusers.utils.hub_utils as hub_utils

    import hwdiffusion.pipelines.class_conditional as module

    uploaded = {}

    def upload_folder(*, repo_id, folder_path, **_):
        files = (path for path in Path(folder_path).rglob("*") if path.is_file())
        uploaded[repo_id] = {path.relative_to(folder_path).as_posix() for path in files}

    for place in (hub_utils, module):
        monkeypatch.setattr(place, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    pipe = make_pipeline()
    if through == "push_to_hub":
        pipe.push_to_hub("user/name")
    else:
        pipe.save_pretrained(tmp_path, push_to_hub=True, repo_id="user/name")
    (files,) = uploaded.values()
    assert {"model_index.json", "unet/config.json", "vqvae/config.json"} <= files
    assert sum(name.endswith(".py") for name in files) == 1


def test_components_make_a_second_pipeline():
    pipe = make_pipeline()
    twin = ClassConditionalPipeline(**pipe.components, **{k: pipe.config[k] for k in ("prediction_type", "id2label")})
    assert twin.unet is pipe.unet and twin.id2label == NAMES
    assert ClassConditionalPipeline.from_pipe(pipe).config.prediction_type == "v_prediction"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_chooses_the_codes_of_full_precision(dtype):
    pipe = make_pipeline("latent")
    latents = torch.randn(4, 2, 8, 8)
    chosen = []
    pipe.vqvae.post_quant_conv.register_forward_pre_hook(lambda module, inputs: chosen.append(inputs[0].float()))
    pipe.vqvae.quantize.embedding.weight.data = torch.randn(32, 2).to(dtype).float()  # codes that both can hold
    with torch.no_grad():
        pipe.decode_latents(latents)
        pipe.vqvae.to(dtype)
        pipe.decode_latents(latents)
    torch.testing.assert_close(chosen[1], chosen[0], rtol=1e-2, atol=1e-2)


def test_the_whole_pipeline_runs_in_bfloat16():
    pipe = make_pipeline("latent").to(torch.bfloat16)
    assert pipe(labels=[1], guidance_scale=2.0, output_type="pt").images.dtype == torch.bfloat16


def test_a_callback_may_turn_guidance_on():
    pipe = make_pipeline()

    def callback(pipeline, index, timestep, tensors):
        pipeline._guidance_scale = 3.0
        return tensors

    noise = torch.randn(1, 2, 8, 8)
    run = lambda **kwargs: pipe(labels=[1], latents=noise, output_type="latent", **kwargs).images  # noqa: E731
    late = run(guidance_scale=1.0, callback_on_step_end=callback)
    torch.testing.assert_close(late, run(guidance_scale=3.0, guidance_interval=(0.1, 1.0)))


def test_many_names_keep_their_order_through_json(tmp_path):
    names = {index: f"class {index}" for index in range(12)}
    unet = build_unet({**TINY_UNET, **PROJECTION}, (1, 8, 8), 12)
    ClassConditionalPipeline(unet, DDIMScheduler(), id2label=names).save_pretrained(tmp_path)
    assert list(ClassConditionalPipeline.from_pretrained(tmp_path).id2label.items()) == list(names.items())


def test_components_that_do_not_fit_are_refused():
    pipe = make_pipeline("latent")
    with pytest.raises(ValueError, match="UNet works on 1 channels, but the VQModel's latents have 2"):
        ClassConditionalPipeline(make_pipeline("pixel").unet, pipe.scheduler, vqvae=pipe.vqvae)
    with pytest.raises(ValueError, match="must name the ids 0 to 2"):
        ClassConditionalPipeline(pipe.unet, pipe.scheduler, id2label={0: "cat"})
    with pytest.raises(ValueError, match="name of its own"):
        ClassConditionalPipeline(pipe.unet, pipe.scheduler, id2label={0: "cat", 1: "cat", 2: "dog"})


def test_schedulers_of_other_kinds_of_models_are_refused():
    pipe = make_pipeline()
    pipe.scheduler = EDMEulerScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="models of another kind"):
        pipe(labels=[0])
