"""Streams: every picture once an epoch, the same batches for any number of processes, resumed runs, bad pictures."""

import io
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from running import MAIN, TINY_PRESET, assert_identical, final_state, losses, write_preset

from hwdiffusion import InputError
from hwdiffusion.arguments import DataArguments
from hwdiffusion.data import load_data
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.randomness import BatchOrder
from hwdiffusion.train_scripts import train_ddpm, train_distill, train_ldm


COUNT = 50


def png(value: int) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16), value, dtype=np.uint8)).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(folder, pictures: list[dict], labels=None, kind=None, split="train"):
    folder.mkdir(exist_ok=True)
    kind = ClassLabel(names=["even", "odd"]) if kind is None else kind
    labels = [index % 2 for index in range(len(pictures))] if labels is None else labels
    columns = {"image": pictures, "label": labels}
    features = Features({"image": ImageFeature(), "label": kind})
    Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def arguments(folder, **changes) -> SimpleNamespace:
    settings = {**vars(DataArguments()), "seed": 3, "train_data_dir": str(folder), "resolution": [16, 16]}
    settings |= {"image_mode": "L", "streaming": True, "shuffle_buffer_size": 16, **changes}
    return SimpleNamespace(**settings)


@pytest.fixture
def folder(tmp_path):
    """Fifty pictures, each of a gray of its own, and four for validation."""
    write_parquet(tmp_path / "pictures", [png(4 * index) for index in range(COUNT)])
    write_parquet(tmp_path / "pictures", [png(250 + index) for index in range(4)], split="test")
    return tmp_path / "pictures"


def grays(stream, batches: int, **order) -> list[list[int]]:
    settings = {"seed": 3, "size": len(stream), "first_step": 0, "batch_size": 8, **order}
    read = islice(stream.read(BatchOrder(**settings)), batches)
    return [(images[:, 0, 0, 0].int() // 4).tolist() for images, _ in read]


def test_an_epoch_has_every_picture_once_with_its_label_and_the_next_has_another_order(folder):
    data = load_data(arguments(folder))
    assert len(data.train) == COUNT and data.id2label == {0: "even", 1: "odd"} and data.max_labels == 1
    read = data.train.read(BatchOrder(3, COUNT, 0, 10))
    batches = list(islice(read, 10))
    read.close()
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    assert images.shape == (100, 1, 16, 16) and images.dtype == torch.uint8
    indices = images[:, 0, 3, 5].int() // 4
    assert torch.equal(labels[:, 0], indices.long() % 2)
    first, second = indices[:50].tolist(), indices[50:].tolist()
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second and first != list(range(COUNT))


def test_the_held_out_pictures_are_those_of_the_own_split_or_else_not_trained_on(folder):
    data = load_data(arguments(folder))
    assert sorted(data.validation.images[:, 0, 0, 0].tolist()) == [250, 251, 252, 253]
    (folder / "test-00000-of-00001.parquet").unlink()
    data = load_data(arguments(folder))
    held_out = (data.validation.images[:, 0, 0, 0].int() // 4).tolist()
    trained_on = sum(grays(data.train, 9, batch_size=5), [])
    assert len(held_out) == 5 and len(data.train) == 45 and sorted(held_out + trained_on) == list(range(COUNT))


def test_batches_are_the_same_for_any_number_of_processes_and_micro_batches(folder):
    stream = load_data(arguments(folder)).train
    one = grays(stream, 12)
    ranks = [grays(stream, 12, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks)] == one
    micro = grays(stream, 24, batch_size=4, micro_batches=2)
    assert [micro[i] + micro[i + 1] for i in range(0, 24, 2)] == one


def test_reading_starts_at_any_step_also_past_the_first_epoch(folder):
    stream = load_data(arguments(folder)).train
    whole = grays(stream, 20)
    for step in (1, 6, 7, 15):
        assert grays(stream, 5, first_step=step) == whole[step : step + 5]


def test_the_number_of_threads_changes_nothing(folder):
    assert grays(load_data(arguments(folder, dataloader_num_workers=0)).train, 9) == grays(
        load_data(arguments(folder, dataloader_num_workers=4)).train, 9
    )


def test_a_bad_picture_is_named_or_another_of_its_batch_takes_its_place(tmp_path):
    pictures = [png(4 * index) for index in range(COUNT)]
    pictures[7] = {"bytes": pictures[7]["bytes"][:40], "path": None}
    write_parquet(tmp_path / "pictures", pictures)
    options = {"validation_fraction": 0.02}
    with pytest.raises(InputError, match=r"picture \d+ of pass 0 over .* can't be read as a picture"):
        grays(load_data(arguments(tmp_path / "pictures", **options)).train, 7)
    read = grays(load_data(arguments(tmp_path / "pictures", skip_bad_images=True, **options)).train, 6)
    assert all(len(batch) == 8 for batch in read) and 7 not in sum(read, [])
    (twice,) = [batch for batch in read if len(set(batch)) < 8]
    assert len(set(twice)) == 7


def test_what_cannot_be_streamed_is_refused(folder, tmp_path):
    def said(**changes) -> str:
        with pytest.raises(InputError) as raised:
            load_data(arguments(folder, **changes))
        return str(raised.value)

    assert "--streaming is for data sets of the Hub and parquet files" in said(
        train_data_dir=None, dataset_name="digits"
    )
    (tmp_path / "class" / "a").mkdir(parents=True)
    assert "--streaming is for data sets" in said(train_data_dir=str(tmp_path / "class"))
    assert "max_train_samples" in said(max_train_samples=3)
    assert "has no label column 'kind'; its columns are image, label" in said(label_column="kind")
    write_parquet(tmp_path / "names", [png(0)] * 4, labels=["a", "b", "a", "b"], kind=Value("string"))
    assert "must be a ClassLabel" in said(train_data_dir=str(tmp_path / "names"), label_column="label")


def test_a_label_out_of_range_is_named(tmp_path):
    write_parquet(tmp_path / "p", [png(0)] * 20, labels=[0, 1, None, 1] * 5)
    with pytest.raises(InputError, match="has the label None; allowed are the ids 0 to 1"):
        grays(load_data(arguments(tmp_path / "p")).train, 3, batch_size=6)


@pytest.mark.parametrize("script", sorted(MAIN))
def test_every_script_trains_on_a_stream_and_continues_as_if_unbroken(script, folder, tmp_path):
    preset = write_preset(tmp_path / "p.yaml", {**TINY_PRESET, "max_train_samples": None, "train_batch_size": 8})
    argv = ["--preset", preset, "--train_data_dir", str(folder), "--streaming", "--lr_scheduler", "constant"]
    argv += ["--train_vqgan.max_train_steps", "4"] if script == "train_ldm" else []
    broken = [*argv, "--output_dir", str(tmp_path / "broken"), "--max_train_steps"]
    resumed = ["--resume_from_checkpoint", "latest"]
    assert MAIN[script]([*broken, "6"]) == 0
    assert MAIN[script]([*broken, "10", *resumed]) == 0
    assert MAIN[script]([*argv, "--output_dir", str(tmp_path / "whole"), "--max_train_steps", "10"]) == 0
    if script != "train_vqgan":  # whose discriminator starts at a part of the run
        assert_identical(final_state(tmp_path / "broken"), final_state(tmp_path / "whole"))
        assert losses(tmp_path / "broken" / "metrics.jsonl") == losses(tmp_path / "whole" / "metrics.jsonl")


def test_a_latent_diffusion_on_a_stream_keeps_no_latents_and_leaves_a_pipeline(folder, tmp_path):
    preset = write_preset(tmp_path / "p.yaml", {**TINY_PRESET, "max_train_samples": None, "max_train_steps": 4})
    argv = ["--preset", preset, "--train_data_dir", str(folder), "--streaming", "--output_dir", str(tmp_path / "run")]
    assert train_ldm.main([*argv, "--dry_run"]) == 0 and not (tmp_path / "run").exists()
    assert train_ldm.main(argv) == 0
    assert not list((tmp_path / "run").rglob("latents.safetensors"))
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "run")
    assert len(pipe(labels=["odd"]).images) == 1
    student = ["--teacher", str(tmp_path / "run"), "--max_train_steps", "2", "--output_dir", str(tmp_path / "student")]
    assert train_distill.main([*student, "--dry_run"]) == 0 and not (tmp_path / "student").exists()
    assert train_distill.main(student) == 0
    assert not list((tmp_path / "student").rglob("latents.safetensors"))
    # a stream knows its length, so that epochs can be counted
    assert train_ddpm.main([*argv[:-1], str(tmp_path / "b"), "--num_train_epochs", "1"]) == 0
    assert len(losses(tmp_path / "b" / "metrics.jsonl")) == -(-COUNT // 16)
