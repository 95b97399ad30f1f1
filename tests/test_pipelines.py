"""The pipeline's contract, on tiny random models of every kind that training makes."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import PROJECTION, TINY_UNET
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tiny import (
    AUTOENCODERS,
    KINDS,
    NAMES,
    PREDICTION_TYPES,
    ask,
    make_autoencoder,
    make_classifier,
    make_pipeline,
    make_unet,
    seeds,
)

from hwdiffusion.models import build_unet
from hwdiffusion.pipelines import (
    ClassConditionalPipeline,
    class_conditional,
    label_ids,
    label_tokens,
    unet_conditioning,
)
from hwdiffusion.schedulers import AnnealedLangevinScheduler


# -- labels -----------------------------------------------------------------------------------------------------------


def test_ids_names_sets_and_tensors_are_one_encoding():
    expected = label_ids([2, 0], NAMES)
    for same in (["wild", "cat"], [[2], ["cat"]], torch.tensor([2, 0]), torch.tensor([[2], [0]]), np.array([2, 0])):
        assert torch.equal(label_ids(same, NAMES), expected)
    assert torch.equal(label_ids("dog", NAMES), label_ids([1], NAMES))
    assert torch.equal(label_ids(1, NAMES), label_ids([1], NAMES))


def test_a_label_twice_in_a_set_is_refused():
    for twice in ([["cat", 2], ["dog", 1]], torch.tensor([[0, 2], [1, 1]])):
        with pytest.raises(ValueError, match="labels.1. holds 1 twice; a set has each label once"):
            label_ids(twice, NAMES, max_labels=2)


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


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 1.5], r"labels\[1\] holds 1.5 where an id or a name is wanted; a set of labels is a list of these"),
        ([True], r"labels\[0\] holds True"),
        ([[None]], r"labels\[0\] holds None"),
        ([[[2]]], r"labels\[0\] holds \[2\]"),
        ([np.array([0.5, 0.5])[:1]], r"labels\[0\] holds 0.5"),
        ([torch.tensor([[1]])], r"labels\[0\] holds \[1\]"),
        ([{"cat"}], r"labels\[0\] holds {'cat'}"),
        ({"cat"}, "labels must be an id, a name, or a sequence of them, not {'cat'}"),
        (3.5, "labels must be an id, a name, or a sequence of them, not 3.5"),
        (np.array(["cat"]), r"labels given as a tensor must be integer ids .* not <U3 of shape \(1,\)"),
        (torch.tensor([[True, False, False]]), r"labels given as a tensor must be integer ids .* not bool"),
    ],
)
def test_labels_of_another_type_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(labels=labels)


def test_a_label_may_be_a_number_of_numpy_or_torch():
    for same in ([np.int64(2)], [np.array(2)], [torch.tensor(2)], [torch.tensor([2])], [np.str_("wild")]):
        assert label_ids(same, NAMES).tolist() == [[2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3)])
def test_label_vectors_that_are_not_finite_are_refused(value, shape):
    vectors = torch.zeros(shape)
    vectors[1, ..., 2] = value
    for same in (vectors, vectors.numpy()):
        with pytest.raises(ValueError, match=r"floating-point labels must be finite, but labels\[1\] is not"):
            make_pipeline()(labels=same)


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
    pipe.scheduler.set_timesteps(1)
    (last,) = pipe.scheduler.timesteps
    assert last == 999
    with torch.no_grad():
        outputs = [
            pipe.unet(noise, last, **unet_conditioning(pipe.unet.config, tokens)).sample
            for tokens in (torch.zeros(1, 1, 3), label_tokens(torch.tensor([[1]]), 3))
        ]
    expected = pipe.scheduler.step(outputs[0] + w * (outputs[1] - outputs[0]), last, noise).prev_sample
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


def test_a_pipeline_is_guided_in_the_part_that_it_recommends(tmp_path):
    make_pipeline(default_guidance_scale=3.0, default_guidance_interval=(0.5, 1.0)).save_pretrained(tmp_path)
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path)
    run = lambda **kwargs: pipe(labels=[1], generator=seeds(0), output_type="latent", **kwargs).images  # noqa: E731
    own, everywhere = run(), run(guidance_interval=(0, 1))
    torch.testing.assert_close(own, run(guidance_interval=(0.5, 1.0)))
    assert (own - everywhere).abs().max() > 1e-3
    torch.testing.assert_close(run(guidance_scale=3.0), everywhere)  # it is said of what is recommended with it
    settings = json.loads((tmp_path / "model_index.json").read_text())
    del settings["default_guidance_interval"]  # as of before there was one
    (tmp_path / "model_index.json").write_text(json.dumps(settings))
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(run(), everywhere)


def test_rescaled_guidance_has_the_deviation_of_the_conditional_output():
    from hwdiffusion.pipelines.class_conditional import rescale_guidance

    guided, cond = 5 * torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8)
    rescaled = rescale_guidance(guided, cond, 1.0)
    torch.testing.assert_close(rescaled.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))
    assert torch.equal(rescale_guidance(guided, cond, 0.0), guided)


ALL_SCHEDULERS = sorted(name for name in diffusers._import_structure["schedulers"] if name.endswith("Scheduler"))
SDE = {"algorithm_type": "sde-dpmsolver++"}
SCHEDULERS = [
    *((name, {}) for name in ALL_SCHEDULERS),
    ("DPMSolverMultistepScheduler", SDE),
    ("DPMSolverSinglestepScheduler", SDE),
    ("AnnealedLangevinScheduler", {}),
    ("AnnealedLangevinScheduler", {"predictor": None, "num_corrector_steps": 2}),
]
USABLE = {
    "AnnealedLangevinScheduler",
    *("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
    *("LCMScheduler", "TCDScheduler", "SASolverScheduler"),
}
NEED_MORE = {"AmusedScheduler", "RFD4ProteinaScheduler", "VQDiffusionScheduler"}  # than a config can give


def scheduler_class(name: str):
    return AnnealedLangevinScheduler if name == "AnnealedLangevinScheduler" else getattr(diffusers, name)


@pytest.mark.parametrize("name, settings", SCHEDULERS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_picture_belongs_to_its_generator_or_the_scheduler_is_refused_by_name(name, settings):
    if name in NEED_MORE:
        pytest.skip(f"{name} can't be made from the config of another")
    options = {"output_type": "latent", "num_inference_steps": 5, "eta": 0.7}
    if name not in USABLE:
        for prediction_type in ("epsilon", "v_prediction"):
            pipe = make_pipeline("pixel", prediction_type)
            pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the UNet was called"))
            pipe.scheduler = scheduler_class(name).from_config(pipe.scheduler.config, **settings)
            with pytest.raises(ValueError, match=name):
                pipe(labels=[0, 1, 2], generator=seeds(5, 6, 7), **options)
        return
    pipe = make_pipeline("pixel")
    pipe.scheduler = scheduler_class(name).from_config(pipe.scheduler.config, **settings)
    together = pipe(labels=[0, 1, 2], generator=seeds(5, 6, 7), **options).images
    assert torch.isfinite(together).all()
    alone = pipe(labels=[1], generator=seeds(6), **options).images
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    reversed_order = pipe(labels=[2, 1, 0], generator=seeds(7, 6, 5), **options).images
    torch.testing.assert_close(together, reversed_order.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_a_picture_of_every_kind_of_model_belongs_to_its_generator(kind, scheduler):
    pipe = make_pipeline(kind)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    options = {"output_type": "latent", "num_inference_steps": 5}
    guided = {} if kind == "unconditional" else {"guidance_scale": 2.0}
    together = pipe(**ask(kind, 0, 1, 2), generator=seeds(5, 6, 7), **options, **guided).images
    alone = pipe(**ask(kind, 1), generator=seeds(6), **options, **guided).images
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)


def test_a_scheduler_that_draws_from_the_global_state_is_refused_by_name():
    class DPMSolverSDEScheduler(DDIMScheduler):  # the real one can't be made without torchsde
        pass

    pipe = make_pipeline("pixel")
    pipe.scheduler = DPMSolverSDEScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DPMSolverSDEScheduler takes no generator"):
        pipe(labels=[0])


@pytest.mark.parametrize("name", sorted(USABLE - {"AnnealedLangevinScheduler"}))
def test_a_swapped_scheduler_has_the_noise_of_the_training(name):
    """Most have other betas by default, which `from_config` would take where ours are a default, too."""
    pipe = make_pipeline("pixel")
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    pipe = ClassConditionalPipeline.from_pipe(pipe)
    trained = pipe.scheduler.alphas_cumprod
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, trained)
    assert pipe.scheduler.config.get("timestep_spacing", "leading") == "leading"


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [61, 250, 300, 600, 1000])
@pytest.mark.parametrize("name", sorted(USABLE - {"LCMScheduler", "TCDScheduler"}))
def test_many_steps_begin_at_noise_or_are_refused(name, steps, spacing):
    """ "leading" divides whole numbers: DPM-Solver++ would begin at 750 of 1000 in 250 steps, DDIM at 599 in 600; and
    "trailing" ends at -1 in 61, by rounding."""
    pipe = make_pipeline("pixel")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    pipe.scheduler = scheduler_class(name).from_config(pipe.scheduler.config)
    try:
        pipe.check_inputs(num_inference_steps=steps)
        pipe._set_timesteps(steps)
    except ValueError as error:
        refused = {"DDIM": "begin at timestep", "PNDM": "begin at timestep", "Anne": "begin at timestep"}
        assert refused.get(name[:4], "visit a timestep twice") in str(error)
        assert 1000 % steps or name == "DPMSolverSinglestepScheduler"
        return
    assert pipe.scheduler.timesteps[0] >= (890 if pipe.scheduler.order == 2 else 900)
    assert pipe.scheduler.timesteps[-1] >= 0
    assert pipe.scheduler.config.get("timestep_spacing", spacing) == spacing
    repeated = (
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "PNDMScheduler",
        "AnnealedLangevinScheduler",
    )
    if name not in repeated:  # as they do on purpose; elsewhere a step from a timestep to itself divides by zero
        assert len(pipe.scheduler.timesteps.unique()) == len(pipe.scheduler.timesteps)


@pytest.mark.parametrize(
    "name, spacing",
    [
        *((name, "linspace") for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler")),
        *(
            (name, "trailing")
            for name in ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "PNDMScheduler")
        ),
        ("KDPM2AncestralDiscreteScheduler", "linspace"),
    ],
)
def test_solvers_of_second_order_do_not_leap_out_of_a_cosine_schedule(name, spacing):
    """Such a spacing begins at a noise of 20,000, and from there ends far outside of any data."""
    pipe = make_pipeline("pixel")
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, timestep_spacing=spacing)
    images = pipe(labels=[0], generator=seeds(0), num_inference_steps=5, output_type="latent").images
    assert images.std() < 5
    assert pipe.scheduler.config.timestep_spacing == spacing  # it is the user's, for the next call


def test_noise_that_float16_can_not_hold_is_not_begun_with():
    pipe = make_pipeline("pixel")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert pipe._set_timesteps(10) > 1e4
    pipe.unet.to(torch.float16)
    assert pipe._set_timesteps(10) < 100


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
    "arguments, message",
    [
        ({"num_inference_steps": 0}, "from 1 to 1000"),
        ({"num_inference_steps": 1001}, "from 1 to 1000"),
        ({"timesteps": [500, 100]}, "takes no custom timesteps"),
        ({"guidance_interval": (0.8, 0.2)}, "start <= stop"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be a number in \[0, 1\]"),
        ({"eta": -0.1}, r"eta must be a number in \[0, 1\]"),
        ({"guidance_interval": ("a", "b")}, "start <= stop"),
        ({"generator": [None]}, "generator must be a torch.Generator or a list of them, not None"),
        ({"callback_on_step_end_tensor_inputs": "noise"}, r"not \['noise'\]"),
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


def test_trailing_ddim_with_steps_that_do_not_divide_is_done_by_leading_ones(caplog):
    pipe = make_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    leading = pipe(labels=[0], generator=seeds(0), num_inference_steps=30, output_type="latent").images
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    drawn = pipe(labels=[0], generator=seeds(0), num_inference_steps=30, output_type="latent").images
    torch.testing.assert_close(drawn, leading)
    assert "needs steps that divide 1000; 'leading' is used instead" in caplog.text
    assert pipe.scheduler.config.timestep_spacing == "trailing"  # for the next call
    pipe(labels=[0], num_inference_steps=25, output_type="latent")
    assert pipe.scheduler.timesteps[0] == 999


def test_zero_terminal_snr_is_refused_with_steps_that_do_not_divide():
    pipe = make_pipeline()
    settings = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    with pytest.raises(ValueError, match="must divide 1000"):
        pipe(labels=[0], num_inference_steps=30)


# -- persistence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_pipeline_loads_with_the_package_and_draws_the_same(kind, tmp_path, caplog):
    pipe = make_pipeline(kind)
    pipe.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert type(loaded) is ClassConditionalPipeline
    assert not caplog.records  # nor is anything warned of
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
    labels = json.loads(labels)
    images = pipe(labels=labels, generator=generators, output_type="pt").images
    made = {"images": images, **tasks(pipe, labels, images)}
    torch.save(made, again + ".pt")
    pipe.save_pretrained(again)
"""


def tasks(pipe, labels, images) -> dict[str, torch.Tensor]:
    """Everything that a pipeline does with pictures, by itself alone."""

    def one():
        return torch.Generator().manual_seed(3)

    call = {"labels": labels[:1], "output_type": "pt"}
    mask = torch.zeros(1, 1, *images.shape[-2:])
    mask[..., :5] = 1
    made = {
        "varied": pipe(image=images[:1], strength=0.5, generator=one(), **call).images,
        "inpainted": pipe(image=images[:1], mask_image=mask, generator=one(), **call).images,
        "between": pipe.interpolate(labels, num_images=3, generator=one(), output_type="pt").images,
        "inverted": pipe.invert(images[:1], labels[:1], num_refinements=1),
    }
    if pipe.classifier is not None:
        options = {"guidance_scale": 2.0, "classifier_guidance_scale": 2.0}
        made["guided"] = pipe(generator=one(), **options, **call).images
    return made


def run_without_the_package(folder, again, cache, labels=("wild", 0)):
    """Two pictures of the labels, and what `tasks` makes of them, by stock diffusers in another process, where the
    pipeline is also saved `again`."""
    script = textwrap.dedent(WITHOUT_THE_PACKAGE)
    script = script.replace("folder, again, labels =", inspect.getsource(tasks) + "\n\nfolder, again, labels =", 1)
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache)}
    command = [sys.executable, "-c", script, str(folder), str(again), json.dumps(labels)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(f"{again}.pt", weights_only=True)


def test_a_saved_folder_does_everything_without_the_package_also_after_being_saved_again(tmp_path):
    pipe = make_pipeline()
    pipe.classifier, pipe.guidance_unet = make_classifier(pipe), make_unet("latent", (2, 8, 8), seed=1)
    pipe.save_pretrained(tmp_path / "first")
    labels = ["wild", 0]
    images = pipe(labels=labels, generator=seeds(0, 1), output_type="pt").images
    expected = {"images": images, **tasks(pipe, labels, images)}
    first = run_without_the_package(tmp_path / "first", tmp_path / "second", tmp_path / "cache1")
    # what stock diffusers saved again still loads, with and without the package
    second = run_without_the_package(tmp_path / "second", tmp_path / "third", tmp_path / "cache2")
    assert first.keys() == second.keys() == expected.keys()
    for name in expected:
        assert torch.equal(first[name], expected[name]) and torch.equal(second[name], expected[name]), name
    ours = ClassConditionalPipeline.from_pretrained(tmp_path / "second")
    ours.set_progress_bar_config(disable=True)
    assert torch.equal(ours(labels=labels, generator=seeds(0, 1), output_type="pt").images, images)


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


# -- what diffusers asks of its own pipelines -------------------------------------------------------------------------


def test_a_label_may_be_repeated_in_a_list_with_one_generator_for_all():
    """As diffusers' own tests call pipelines: an int that batching turns into a list."""
    pipe = make_pipeline()
    for batch in (1, 2):
        for each in (1, 2):
            images = pipe(
                class_labels=batch * [1], num_images_per_prompt=each, generator=seeds(0)[0], output_type="pt"
            )[0]
            assert images.shape[0] == batch * each
    assert pipe(class_labels=1, output_type="pt")[0].shape[0] == 1


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_weights_survive_a_variant(tmp_path, safe_serialization):
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path, variant="fp16", safe_serialization=safe_serialization)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path, variant="fp16")
    for name in ("unet", "vqvae"):
        ours, theirs = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    with pytest.raises(ValueError, match="variant=other"):
        ClassConditionalPipeline.from_pretrained(tmp_path, variant="other")


def test_optional_components_can_be_taken_out_saved_and_given_again(tmp_path):
    pipe = make_pipeline()
    pipe.classifier = make_classifier(pipe)
    pipe.guidance_unet = make_unet("latent", (2, 8, 8), seed=1)
    pipe.save_pretrained(tmp_path / "all")
    index = json.loads((tmp_path / "all" / "model_index.json").read_text())
    assert index["classifier"] == ["transformers", "ResNetForImageClassification"]
    assert index["guidance_unet"] == ["diffusers", "UNet2DConditionModel"]
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path / "all")
    options = {"labels": [1], "guidance_scale": 2.0, "classifier_guidance_scale": 1.0, "output_type": "latent"}
    loaded.set_progress_bar_config(disable=True)
    ours, theirs = (p(**options, generator=seeds(0)).images for p in (pipe, loaded))
    assert torch.equal(ours, theirs)
    for name in pipe._optional_components:
        setattr(loaded, name, None)
    expected = loaded(labels=[1], generator=seeds(0), output_type="pt").images
    loaded.save_pretrained(tmp_path / "none")
    again = ClassConditionalPipeline.from_pretrained(tmp_path / "none")
    assert all(getattr(again, name) is None for name in pipe._optional_components)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(labels=[1], generator=seeds(0), output_type="pt").images, expected)
    given = ClassConditionalPipeline.from_pretrained(tmp_path / "none", guidance_unet=pipe.guidance_unet)
    assert given.guidance_unet is pipe.guidance_unet


def test_each_component_loads_in_the_dtype_that_is_asked_of_it(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    wanted = {"unet": torch.bfloat16, "default": torch.float16}
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path, torch_dtype=wanted)
    assert (loaded.unet.dtype, loaded.vqvae.dtype) == (torch.bfloat16, torch.float16)
    assert loaded(labels=[1], output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("kind", ["latent", "tokens"])
def test_attention_slicing_and_offloading_draw_the_same(kind):
    """Offloading is to the CPU and back, so that its hooks are tried where there is no other device."""
    pipe = make_pipeline(kind)
    pipe.guidance_unet = make_unet(kind, pipe._latent_shape(), seed=1)
    pipe.classifier = make_classifier(pipe)
    mask = torch.zeros(1, 1, *pipe.image_size)
    mask[..., :3] = 1

    def run():
        options = {"guidance_scale": 2.0, "classifier_guidance_scale": 1.0, "output_type": "pt"}
        image = torch.full((1, 1, *pipe.image_size), 0.3)
        return pipe(labels=[1], image=image, mask_image=mask, generator=seeds(0), **options).images

    expected = run()
    pipe.enable_attention_slicing(slice_size=1)
    torch.testing.assert_close(run(), expected, atol=1e-4, rtol=0)
    pipe.disable_attention_slicing()
    pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(run(), expected, atol=1e-6, rtol=0)
    pipe.remove_all_hooks()
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    torch.testing.assert_close(run(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_every_kind_of_autoencoder_encodes_varies_and_decodes(name, tmp_path):
    vae = make_autoencoder(name)
    vae.register_to_config(scaling_factor=0.7, **({} if name == "VQModel" else {"shift_factor": 0.3}))
    plain = make_pipeline()
    pipe = ClassConditionalPipeline(make_unet("latent", (3, 8, 8)), plain.scheduler, vae, id2label=NAMES,
                                    has_null_label=True, prediction_type="v_prediction")  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pictures = torch.rand(2, 1, 16, 16) * 2 - 1
    encoded = vae.encode(pictures)
    raw = encoded.latent_dist.mean if name == "AutoencoderKL" else encoded.latents
    shift = 0.0 if name == "VQModel" else 0.3
    torch.testing.assert_close(pipe.encode_images(pictures), (raw - shift) * 0.7)
    torch.testing.assert_close(pipe.decode_latents((raw - shift) * 0.7), vae.decode(raw).sample, rtol=0, atol=1e-4)

    kept = pipe(labels=[1, 2], image=pictures / 2 + 0.5, strength=0.0, output_type="pt").images
    torch.testing.assert_close(kept, (vae.decode(raw).sample / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    drawn = pipe(labels=[1], num_inference_steps=3, generator=seeds(0), output_type="pt").images
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    # not to the last bit: weights lie in memory as in their file, and some CPUs add up unaligned ones otherwise
    loaded = again(labels=[1], num_inference_steps=3, generator=seeds(0), output_type="pt").images
    torch.testing.assert_close(loaded, drawn, rtol=0, atol=1e-5)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe(labels=[1], num_inference_steps=3, generator=seeds(0), output_type="pt").images, drawn)
    pipe.remove_all_hooks()
    half = pipe.to(torch.bfloat16)(labels=[1], num_inference_steps=3, generator=seeds(0), output_type="pt").images
    assert half.isfinite().all() and half.shape == drawn.shape


@torch.no_grad()
def test_an_autoencoder_that_says_it_overflows_in_float16_works_in_float32():
    vae, seen = make_autoencoder("AutoencoderKL").half(), []
    assert vae.config.force_upcast
    pipe = ClassConditionalPipeline(make_unet("latent", (3, 8, 8)), DDIMScheduler(), vae, id2label=NAMES)
    for name in ("encode", "decode"):
        method = getattr(vae, name)
        setattr(vae, name, lambda x, method=method: seen.append((x.dtype, vae.dtype)) or method(x))
    pipe.encode_images(torch.rand(1, 1, 16, 16))
    pipe.decode_latents(torch.randn(1, 3, 8, 8).half())
    assert seen == [(torch.float32, torch.float32)] * 2 and vae.dtype == torch.float16


def test_a_unet_and_an_autoencoder_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="works on 2 channels, but the AutoencoderKL's latents have 3"):
        ClassConditionalPipeline(make_unet("latent", (2, 8, 8)), DDIMScheduler(), make_autoencoder("AutoencoderKL"))


@torch.no_grad()
def test_many_latents_are_decoded_in_slices(monkeypatch):
    pipe, latents, seen = make_pipeline(), torch.randn(11, 2, 8, 8), []
    whole = pipe.decode_latents(latents)
    decode = pipe.vqvae.decode
    monkeypatch.setattr(pipe.vqvae, "decode", lambda some: seen.append(len(some)) or decode(some))
    monkeypatch.setattr(class_conditional, "DECODED_AT_ONCE", 4 * 16 * 16)
    torch.testing.assert_close(pipe.decode_latents(latents), whole, rtol=0, atol=1e-5)
    assert seen == [4, 4, 3]


@pytest.mark.parametrize(
    "kind, guidance",
    [
        ("pixel", {}),
        ("tokens", {"guidance_scale": 2.0}),
        ("unconditional", {}),
        ("pixel", {"guidance_scale": 2.0, "guided by": "a weaker UNet"}),
        ("pixel", {"guidance_scale": 1.0, "classifier_guidance_scale": 2.0}),
        ("pixel", {"guidance_scale": 2.0, "label_guidance_scale": [[3.0]] * 5}),
    ],
)
def test_many_pictures_are_denoised_in_slices(kind, guidance, monkeypatch):
    pipe, sizes = make_pipeline(kind), []
    if guidance.pop("guided by", None) is not None:
        pipe.register_modules(guidance_unet=make_unet(kind, seed=1))
    if "classifier_guidance_scale" in guidance:
        pipe.classifier = make_classifier(pipe)
    call = {**ask(kind, 0, 1, 2, 0, 1), **guidance, "num_inference_steps": 2, "output_type": "pt"}
    whole = pipe(**call, generator=seeds(*range(5))).images
    for model in filter(None, (pipe.unet, pipe.guidance_unet, pipe.classifier)):
        called = lambda _, inputs, named: sizes.append(len(inputs[0] if inputs else named["pixel_values"]))  # noqa: E731
        model.register_forward_pre_hook(called, with_kwargs=True)
    monkeypatch.setattr(class_conditional, "DENOISED_AT_ONCE", 2 * 8 * 8)
    torch.testing.assert_close(pipe(**call, generator=seeds(*range(5))).images, whole, rtol=0, atol=1e-4)
    assert max(sizes) == 2 and len(sizes) >= 6


def test_layerwise_casting_stores_the_unet_in_8_bits():
    pipe = make_pipeline().to(torch.bfloat16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in pipe.unet.parameters()}
    images = pipe(labels=[1], guidance_scale=2.0, output_type="pt").images
    assert images.isfinite().all() and images.dtype == torch.bfloat16


def test_a_callback_sees_all_tensors_and_may_turn_guidance_up_at_every_step():
    pipe, seen = make_pipeline(), []

    def callback(pipeline, index, timestep, tensors):
        assert set(tensors) == set(pipeline._callback_tensor_inputs)
        seen.append(tensors["pred_original_sample"])
        pipeline._guidance_scale += 1.0
        return tensors

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs}
    pipe(labels=[0], guidance_scale=2.0, **options)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps == 2.0 + len(seen)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_predicted_clean_sample_is_the_schedulers(prediction_type):
    """DDIM says it itself; and one step of Euler from any σ to 0 ends at it."""
    pipe, seen, expected = make_pipeline("pixel", prediction_type), [], []
    step = pipe.scheduler.step

    def remember(model_output, t, sample, **options):
        done = step(model_output, t, sample, **{**options, "return_dict": True})
        if prediction_type == "flow_prediction":
            expected.append(sample - t / 1000 * model_output)
        else:
            expected.append(done.pred_original_sample)
        return (done.prev_sample,)

    remember.__signature__ = inspect.signature(step)
    pipe.scheduler.step = remember
    pipe(
        labels=[0, 2],
        num_inference_steps=6,
        callback_on_step_end=lambda pipeline, i, t, tensors: seen.append(tensors["pred_original_sample"]),
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
    )
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected), atol=1e-4, rtol=1e-4)


class OnDevice(torch.Tensor):
    """A sample as on another device: all that is made of it is there too; to read a value of it is to wait."""

    WAITING = {"item", "tolist", "numpy", "cpu", "nonzero", "equal", "__bool__", "__float__", "__int__", "__index__"}

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in cls.WAITING:
            raise AssertionError(f"the loop waits for the device: {function.__name__}")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize(
    "name", [*sorted(USABLE), "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
)
def test_the_loop_never_waits_for_the_device(name):
    """With all that a loop can have in it: both guidances, in an interval, and what a mask keeps."""
    flow = name.startswith("Flow")
    pipe = make_pipeline("pixel", "flow_prediction" if flow else "v_prediction")
    pipe.classifier, pipe.guidance_unet = make_classifier(pipe), make_unet("pixel", seed=1)
    pipe.scheduler = scheduler_class(name).from_config(pipe.scheduler.config)
    noise = torch.randn(2, 1, 8, 8).as_subclass(OnDevice)
    options = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.8), "guidance_rescale": 0.5}
    options |= {
        "classifier_guidance_scale": 1.0,
        "mask_image": torch.ones(8, 8).tril(),
        "image": torch.rand(1, 1, 8, 8),
    }
    images = pipe(labels=[0, 1], latents=noise, num_inference_steps=5, output_type="latent", **options).images
    assert type(images) is OnDevice  # it was on the device all the way


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize("name", sorted(USABLE))
def test_schedulers_sample_what_the_model_predicts_or_are_refused(name, prediction_type):
    pipe = make_pipeline("pixel", prediction_type)
    pipe.scheduler = scheduler_class(name).from_config(pipe.scheduler.config)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        images = pipe(labels=[0], generator=seeds(0), num_inference_steps=5, output_type="latent").images
    except ValueError as error:
        assert f"{name} can't sample prediction_type='sample'" in str(error) and not calls
    else:
        assert images.isfinite().all()


def test_a_call_leaves_no_trace_in_the_next():
    pipe = make_pipeline("pixel")
    for scheduler in (DPMSolverMultistepScheduler, scheduler_class("HeunDiscreteScheduler"), DDPMScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        config = dict(pipe.scheduler.config)
        run = lambda **call: pipe(labels=[1], generator=seeds(0), output_type="latent", **call).images  # noqa: E731
        first = run(num_inference_steps=10)
        run(num_inference_steps=250)
        run(num_inference_steps=10, image=torch.rand(1, 1, 8, 8), strength=0.3, guidance_scale=3.0)
        assert torch.equal(run(num_inference_steps=10), first)
        assert dict(pipe.scheduler.config) == config


# -- compiling --------------------------------------------------------------------------------------------------------


def test_a_compiled_pipeline_draws_and_saves_the_same(tmp_path):
    pipe, compiled = make_pipeline("latent"), make_pipeline("latent")
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled.compile(backend=counting)
    call = {"labels": [1], "generator": seeds(2), "num_inference_steps": 2, "output_type": "pt"}
    images, same = pipe(**call).images, compiled(**{**call, "generator": seeds(2)}).images
    assert len(graphs) >= 2  # of the UNet and the decoder
    assert torch.equal(images, same)
    compiled.save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert again.unet.state_dict().keys() == pipe.unet.state_dict().keys()


def test_without_a_compiler_nothing_is_compiled_and_a_warning_says_so(monkeypatch):
    pipe, said = make_pipeline("latent"), []
    monkeypatch.setattr(class_conditional.shutil, "which", lambda name: None)
    monkeypatch.setattr(class_conditional.logger, "warning", said.append)
    pipe.compile()
    assert "needs a C++ compiler" in said[0] and pipe.unet._compiled_call_impl is None
