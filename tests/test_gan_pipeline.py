"""The pipeline of a GAN: its call, and that what it saves loads everywhere."""

import ast
import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import diffusers.utils.dynamic_modules_utils as dynamic_modules
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from scipy.stats import kstest, truncnorm
from tiny import NAMES, make_gan, make_pipeline, seeds

from hwdiffusion import InputError, cli
from hwdiffusion.models import PIPELINES, load_pipeline
from hwdiffusion.pipelines import ClassConditionalGANPipeline, ClassConditionalPipeline, ResidualGenerator, truncate


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)  # batches of other sizes round otherwise


# -- the call ---------------------------------------------------------------------------------------------------------


def test_ids_names_sets_and_tensors_ask_for_the_same_pictures():
    pipe = make_gan(max_labels=2)

    def of(**call):
        return pipe(generator=seeds(0, 1), output_type="pt", **call).images

    expected = of(labels=["cat", "wild"])
    one_hot = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    for labels in (
        [0, 2],
        [["cat"], [2]],
        torch.tensor([0, 2]),
        np.array([[0, -1], [2, -1]]),
        one_hot,
        one_hot[:, None],
    ):
        assert torch.equal(of(labels=labels), expected)
    assert torch.equal(of(class_labels=[0, 2]), expected)
    sets = of(labels=[["cat", "dog"], ["dog", "wild"]])
    assert torch.equal(of(labels=[["dog", "cat"], torch.tensor([2, 1])]), sets)
    assert (sets - expected).abs().max() > 1e-3


def test_a_picture_belongs_to_its_generator_alone():
    pipe = make_gan()
    together = pipe(labels=[0, 1, 2], generator=seeds(5, 6, 7), output_type="pt").images
    for place in range(3):
        alone = pipe(labels=[place], generator=seeds(5 + place), output_type="pt").images
        close(alone[0], together[place])
    twice = pipe(labels=[0, 1], num_images_per_prompt=2, generator=seeds(5, 8, 6, 9), output_type="pt").images
    close(twice[[0, 2]], together[:2])
    one = pipe(labels=[0, 1], generator=seeds(5)[0], output_type="pt").images  # one generator draws them in turn
    noise = torch.randn(2, 8, generator=seeds(5)[0])
    assert torch.equal(pipe(labels=[0, 1], latents=noise, output_type="pt").images, one)


def test_every_output_type_and_both_forms():
    pipe = make_gan((3, 8, 12))
    call = {"labels": ["dog"], "generator": seeds(0)[0]}
    tensor = pipe(**call, output_type="pt").images
    array = pipe(**{**call, "generator": seeds(0)[0]}, output_type="np")[0]
    (image,) = pipe(**{**call, "generator": seeds(0)[0]}, return_dict=False)[0]
    assert tensor.shape == (1, 3, 8, 12) and tensor.min() >= 0 and tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert image.size == (12, 8) and image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), (array[0] * 255).round())
    assert make_gan()(labels=[0]).images[0].mode == "L"


def test_it_is_called_as_a_diffusion_pipeline_is():
    """By what draws samples of both: steps and guidance may be named, as 1."""
    pipe = make_gan()
    expected = pipe(labels=[1], generator=seeds(0), output_type="pt").images
    drawn = pipe(labels=[1], generator=seeds(0), num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    assert torch.equal(drawn, expected)
    unconditional = make_gan(names={})
    images = unconditional(labels=None, num_images_per_prompt=2, generator=seeds(0, 1), output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="unconditional"):
        unconditional(labels=[0])


@pytest.mark.parametrize("threshold", [0.3, 1.0, 2.0])
def test_truncated_noise_has_the_truncated_distribution_and_its_order(threshold):
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    truncated = truncate(noise, threshold)
    assert truncated.abs().max() <= threshold
    assert kstest(truncated.numpy(), truncnorm(-threshold, threshold).cdf).pvalue > 0.01
    assert torch.equal(truncated.argsort(stable=True), noise.argsort(stable=True))


def test_truncation_of_nothing_changes_nothing_and_of_all_leaves_one_picture():
    pipe = make_gan()

    def of(truncation):
        return pipe(labels=[1, 1], truncation=truncation, generator=seeds(0, 1), output_type="pt").images

    torch.testing.assert_close(of(12.0), of(None))
    first, second = of(1e-6)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=0)
    mean = pipe(labels=[1], latents=torch.zeros(1, 8), output_type="pt").images
    torch.testing.assert_close(first, mean[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "call, said",
    [
        ({"labels": ["dg"]}, "unknown label 'dg'; the nearest known one is 'dog'"),
        ({"labels": [3]}, "label 3 is out of range"),
        ({"labels": [["cat", "dog"]]}, "at most 1"),
        ({"labels": None}, "every picture needs a label"),
        ({"labels": []}, "labels is empty"),
        ({"labels": [0], "class_labels": [0]}, "alias"),
        ({"labels": torch.zeros(1, 4)}, r"must have the shape \(B, 3\)"),
        (
            {"labels": [0], "num_inference_steps": 50},
            "num_inference_steps=50 is for diffusion models; a GAN draws in one",
        ),
        ({"labels": [0], "guidance_scale": 1.5}, "guidance_scale=1.5 is for diffusion models"),
        ({"labels": [0], "num_images_per_prompt": 0}, "num_images_per_prompt must be a positive whole number"),
        ({"labels": [0], "truncation": 0}, "truncation must be a positive number, not 0"),
        ({"labels": [0], "truncation": float("nan")}, "truncation must be a positive number"),
        ({"labels": [0, 1], "generator": seeds(0)}, "a list of 1, but 2 pictures"),
        ({"labels": [0], "latents": torch.zeros(1, 9)}, r"latents must have the shape \(1, 8\), not \(1, 9\)"),
        ({"labels": [0], "output_type": "latent"}, "'pil', 'np' or 'pt', not 'latent'"),
    ],
)
def test_a_call_that_can_not_be_served_is_refused_before_anything_is_drawn(call, said):
    pipe = make_gan()
    pipe.generator.register_forward_pre_hook(lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(ValueError, match=said):
        pipe(**call)


def test_a_generator_whose_pictures_would_blend_is_refused():
    pipe = make_gan(norm_type="batch")
    assert pipe(labels=[0], output_type="pt").images.isfinite().all()
    pipe.generator.train()
    with pytest.raises(ValueError, match=r"call pipe.generator.eval\(\)"):
        pipe(labels=[0])


# -- persistence ------------------------------------------------------------------------------------------------------


WITHOUT_THE_PACKAGE = """
    import json, sys
    import torch

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hwdiffusion":
                raise ImportError(f"{name} is not here")

    sys.meta_path.insert(0, Blocker())
    from diffusers import DiffusionPipeline

    folder, again = sys.argv[1:]
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images = pipe(labels=["wild", 0], generator=generators, truncation=1.0, output_type="pt").images
    pipe.save_pretrained(again)
    # its own class asks for no more trust
    own = type(pipe).from_pretrained(folder)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    assert torch.equal(own(labels=["wild", 0], generator=generators, truncation=1.0, output_type="pt").images, images)
    torch.save(images, again + ".pt")
"""


def without_the_package(folder, again, cache) -> torch.Tensor:
    """Two pictures, by stock diffusers in another process, where the pipeline is also saved `again`."""
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_THE_PACKAGE), str(folder), str(again)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(f"{again}.pt", weights_only=True)


@pytest.mark.slow
def test_a_saved_folder_loads_without_the_package_also_after_being_saved_again(tmp_path):
    pipe = make_gan()
    pipe.save_pretrained(tmp_path / "first")
    images = pipe(labels=["wild", 0], truncation=1.0, generator=seeds(0, 1), output_type="pt").images
    assert torch.equal(without_the_package(tmp_path / "first", tmp_path / "second", tmp_path / "one"), images)
    assert torch.equal(without_the_package(tmp_path / "second", tmp_path / "third", tmp_path / "two"), images)
    for folder in ("first", "third"):  # and with it, and nothing of the folder is run
        again = ClassConditionalGANPipeline.from_pretrained(tmp_path / folder)
        assert type(again.generator) is ResidualGenerator and again.id2label == NAMES
        assert torch.equal(
            again(labels=[2, 0], truncation=1.0, generator=seeds(0, 1), output_type="pt").images, images
        )


def test_stock_diffusers_asks_for_trust(tmp_path):
    make_gan().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_the_saved_source_stands_alone(tmp_path):
    """One file for the pipeline and one for the generator; each name is defined once, nothing is imported of ours."""
    pipe = make_gan()
    pipe.save_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path)
    (source,), (model,) = tmp_path.glob("*.py"), (tmp_path / "generator").glob("*.py")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == [source.stem, "ClassConditionalGANPipeline"]
    assert index["generator"] == [model.stem, "ResidualGenerator"]
    tree = ast.parse(source.read_text())
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    defined += [node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)]
    assert len(defined) == len(set(defined)) and {"label_ids", "ClassConditionalGANPipeline"} <= set(defined)
    for path in (source, model):
        imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert all(node.level == 0 and not node.module.startswith("hwdiffusion") for node in imported)


def test_the_source_runs_from_a_repository_whose_name_has_a_dot(tmp_path, monkeypatch):
    """Of whose name diffusers makes a module path, in which relative imports find no package."""
    make_gan().save_pretrained(tmp_path / "saved")
    (source,) = (tmp_path / "saved").glob("*.py")
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dynamic_modules, "hf_hub_download", lambda repo, name, **_: str(tmp_path / "saved" / name))
    monkeypatch.setattr(dynamic_modules, "model_info", lambda *_, **__: SimpleNamespace(sha="0123abc"))
    cls = dynamic_modules.get_class_from_dynamic_module(
        "user/model-v1.0", source.name, class_name="ClassConditionalGANPipeline", trust_remote_code=True
    )
    assert cls.__name__ == "ClassConditionalGANPipeline" and cls is not ClassConditionalGANPipeline


def test_weights_load_in_the_dtype_and_variant_asked_for(tmp_path):
    make_gan().save_pretrained(tmp_path, variant="fp16")
    wanted = {"default": torch.bfloat16}
    pipe = ClassConditionalGANPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=wanted)
    assert pipe.generator.dtype == torch.bfloat16
    assert pipe(labels=[0], output_type="pt").images.dtype == torch.bfloat16
    given = make_gan().generator
    assert ClassConditionalGANPipeline.from_pretrained(tmp_path, variant="fp16", generator=given).generator is given


def test_each_pipeline_is_loaded_as_what_it_is(tmp_path):
    make_gan().save_pretrained(tmp_path / "gan")
    make_pipeline("pixel").save_pretrained(tmp_path / "diffusion")
    assert type(load_pipeline(str(tmp_path / "gan"), "cpu", PIPELINES)) is ClassConditionalGANPipeline
    assert type(load_pipeline(str(tmp_path / "diffusion"), "cpu", PIPELINES)) is ClassConditionalPipeline
    with pytest.raises(InputError, match="gan is a ClassConditionalGANPipeline, which draws in one pass"):
        load_pipeline(str(tmp_path / "gan"), "cpu")


def test_samples_are_drawn_of_truncated_noise(tmp_path, capsys):
    make_gan().save_pretrained(tmp_path / "gan")
    make_pipeline("pixel").save_pretrained(tmp_path / "diffusion")

    def sampled(run: str, output: str, *flags: str) -> int:
        command = ["sample", str(tmp_path / run), "--labels", "1", "--num", "2", "--output", str(tmp_path / output)]
        return cli.main([*command, "--device", "cpu", *flags])

    assert sampled("gan", "near", "--truncation", "0.5") == 0
    pipe = ClassConditionalGANPipeline.from_pretrained(tmp_path / "gan")
    expected = pipe(labels=[1, 1], truncation=0.5, generator=seeds(0, 1), output_type="np").images
    drawn = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "near").rglob("*.png"))]
    assert np.array_equal(np.stack(drawn), (expected.squeeze(-1) * 255).round().astype(np.uint8))
    assert sampled("gan", "wide") == 0
    wide = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "wide").rglob("*.png"))]
    assert not np.array_equal(drawn, wide)

    capsys.readouterr()
    assert sampled("gan", "none", "--truncation", "0") == 2
    assert "truncation must be a positive number, not 0" in capsys.readouterr().err
    assert sampled("diffusion", "none", "--truncation", "1") == 2
    assert "--truncation is for GANs" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
