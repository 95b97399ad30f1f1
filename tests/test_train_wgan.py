"""train_wgan.py through its command line: what it trains and when, what it leaves."""

import os
import subprocess

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from running import LAUNCH_TWO, ROOT, TINY_PRESET, command, final_state, write_preset
from test_gan_pipeline import without_the_package
from tiny import seeds

from hwdiffusion.config import parse
from hwdiffusion.data import load_data
from hwdiffusion.figures import read_metrics, sample_grid
from hwdiffusion.label_sets import sets_to_draw
from hwdiffusion.pipelines import ClassConditionalGANPipeline, label_tokens
from hwdiffusion.randomness import epoch_order
from hwdiffusion.train_scripts import train_classifier, train_wgan
from hwdiffusion.wgan import standing_statistics


def test_a_run_leaves_a_pipeline_of_averaged_weights_and_says_what_it_is(preset, tmp_path):
    run = tmp_path / "run"
    assert train_wgan.main(["--preset", preset, "--output_dir", str(run), "--sample_steps", "7"]) == 0
    pipe = ClassConditionalGANPipeline.from_pretrained(run)
    assert pipe.id2label == {digit: str(digit) for digit in range(10)} and pipe.image_size == (16, 16)
    images = pipe(labels=[2, 0], truncation=1.0, generator=seeds(0, 1), output_type="pt").images
    saved, state = list(pipe.generator.parameters()), final_state(run)["models"]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(saved, state["generator"]["ema"]["shadow_params"]))
    assert state["critic"]["ema"] is None and images.shape == (2, 1, 16, 16)

    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 41))
    every = {"critic_loss", "critic_gap", "gradient_penalty", "critic_gradient_norm"}
    assert all(every <= line.keys() for line in lines)
    for line in lines:  # eq. 3, by its parts
        parts = 10 * line["gradient_penalty"] - line["critic_gap"]
        assert line["critic_loss"] == pytest.approx(parts, rel=1e-4, abs=1e-4)
    assert [line["step"] for line in lines if "generator_loss" in line] == list(range(2, 41, 2))
    assert {path.name for path in (run / "samples").iterdir()} == {"step-7.png", "step-40.png"}
    assert Image.open(run / "loss.png").size[0] > 100

    card = (run / "README.md").read_text()
    assert "Wasserstein GAN" in card and "40 steps of the critic, 2 to one of the generator" in card
    assert "import ClassConditionalGANPipeline" in card and "one pass of the generator" in card
    for word in ("diffusion model", "DDIM", "guidance", "All components are stock"):
        assert word not in card, word
    assert yaml.safe_load((run / "config.yaml").read_text())["script"] == "train_wgan"


def test_the_generator_moves_at_every_so_many_steps_and_its_schedule_ends_with_the_run(preset, tmp_path):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--max_train_steps", "11", "--critic_steps", "3"]
    argv += ["--checkpointing_steps", "1", "--checkpoints_total_limit", "99", "--lr_warmup_steps", "0"]
    assert train_wgan.main(argv) == 0
    weights, averages, critics = [], [], []
    for step in range(1, 12):
        state = torch.load(run / f"checkpoint-{step}" / "training_state.pt", weights_only=True)["models"]
        weights.append(state["generator"]["model"]["conv_out.weight"])
        averages.append(torch.cat([part.flatten() for part in state["generator"]["ema"]["shadow_params"]]))
        critics.append(state["critic"]["model"]["conv_in.weight"])
    moved = [place + 2 for place in range(10) if not torch.equal(weights[place], weights[place + 1])]
    averaged = [place + 2 for place in range(10) if not torch.equal(averages[place], averages[place + 1])]
    assert moved == averaged == [3, 6, 9]
    assert not any(torch.equal(one, other) for one, other in zip(critics, critics[1:]))
    assert state["generator"]["ema"]["optimization_step"] == 3
    rates = [line["learning_rate"] for line in read_metrics(run / "metrics.jsonl") if "learning_rate" in line]
    assert rates == pytest.approx([3e-4, 2e-4, 1e-4])  # linear, over its own three steps


def test_accumulated_micro_batches_train_as_one_batch(preset, tmp_path):
    argv = ["--preset", preset, "--max_train_steps", "10", "--output_dir"]
    assert train_wgan.main([*argv, str(tmp_path / "one"), "--train_batch_size", "16"]) == 0
    halves = ["--train_batch_size", "8", "--gradient_accumulation_steps", "2"]
    assert train_wgan.main([*argv, str(tmp_path / "two"), *halves]) == 0
    assert_trained_alike(tmp_path / "one", tmp_path / "two")


def assert_trained_alike(one, two):
    lines = [read_metrics(run / "metrics.jsonl") for run in (one, two)]
    for name in ("critic_gap", "gradient_penalty", "generator_loss"):
        ours, theirs = ([line[name] for line in of_run if name in line] for of_run in lines)
        assert len(ours) > 2
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3, err_msg=name)
    weights = [final_state(run)["models"] for run in (one, two)]
    for model in ("generator", "critic"):
        ours, theirs = (of_run[model]["model"] for of_run in weights)
        apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).abs()
        assert apart.mean() < 1e-4, model  # a tenth or less of how far ten steps at 3e-4 lead


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(preset, tmp_path):
    argv = ["--preset", preset, "--max_train_steps", "10", "--output_dir"]
    script = [str(ROOT / "train_scripts" / "train_wgan.py"), *argv, str(tmp_path / "two"), "--train_batch_size", "8"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*LAUNCH_TWO, *script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "10 steps of 16 pictures on 2 processes" in done.stdout
    assert train_wgan.main([*argv, str(tmp_path / "one"), "--train_batch_size", "16"]) == 0
    assert_trained_alike(tmp_path / "one", tmp_path / "two")


def test_what_is_saved_and_looked_at_has_the_statistics_of_the_averaged_weights(preset, tmp_path):
    run, argv = tmp_path / "run", ["--preset", preset, "--max_train_steps", "6", "--generator.norm_type", "batch"]
    assert train_wgan.main([*argv, "--output_dir", str(run)]) == 0
    pipe = ClassConditionalGANPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    saved = {name: buffer.clone() for name, buffer in pipe.generator.named_buffers() if "running" in name}
    trained = final_state(run)["models"]["generator"]["model"]
    assert saved and not any(torch.equal(buffer, trained[name]) for name, buffer in saved.items())

    args = parse("train_wgan", [*argv, "--output_dir", str(run)]).args
    held_out = load_data(args).validation
    labels = held_out.labels[epoch_order(args.seed, 0, len(held_out))[:1024]]
    with standing_statistics(pipe.generator, label_tokens(labels, 10), args.seed, args.train_batch_size):
        for name, buffer in pipe.generator.named_buffers():
            if name in saved:
                torch.testing.assert_close(buffer, saved[name])
    grid = sample_grid(pipe, args.seed, sets_to_draw(pipe, held_out))
    assert np.array_equal(np.asarray(grid), np.asarray(Image.open(run / "samples.png")))


def test_a_run_that_ends_before_the_generator_was_trained_says_so(preset, tmp_path, capsys):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--max_train_samples", "60"]
    argv += ["--train_batch_size", "64", "--critic_steps", "3"]
    assert train_wgan.main([*argv, "--num_train_epochs", "2"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "ended after 2 steps of the critic, before the generator's first, at --critic_steps 3" in said


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_what_was_trained_draws_the_same_without_the_package(mode, preset, tmp_path):
    run = tmp_path / "run"
    options = ["--image_mode", mode, "--max_train_steps", "4", "--generator.norm_type", "batch"]
    assert train_wgan.main(["--preset", preset, "--output_dir", str(run), *options]) == 0
    index = run / "model_index.json"
    index.write_text(index.read_text().replace('"2": "2"', '"2": "wild"'))  # the name that is asked for there
    pipe = ClassConditionalGANPipeline.from_pretrained(run)
    images = pipe(labels=["wild", 0], truncation=1.0, generator=seeds(0, 1), output_type="pt").images
    assert images.shape[1] == (1 if mode == "L" else 3)
    assert torch.equal(without_the_package(run, tmp_path / "again", tmp_path / "cache"), images)


def test_pictures_without_labels_train_an_unconditional_generator(tmp_path):
    for index in range(30):
        path = tmp_path / "pictures" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (16, 16), dtype=np.uint8)).save(path)
    preset = write_preset(tmp_path / "p.yaml", {**TINY_PRESET, "max_train_steps": 4})
    argv = ["--preset", preset, "--train_data_dir", str(tmp_path / "pictures"), "--output_dir", str(tmp_path / "run")]
    assert train_wgan.main(argv) == 0
    pipe = ClassConditionalGANPipeline.from_pretrained(tmp_path / "run")
    assert pipe.num_classes == 0 and len(pipe(num_images_per_prompt=2).images) == 2
    assert "An unconditional generator" in (tmp_path / "run" / "README.md").read_text()


def test_sets_of_labels_train_and_their_order_does_not_matter(tmp_path):
    preset = {**TINY_PRESET, "dataset_name": "shapes", "image_mode": "RGB", "max_train_steps": 4}
    run = tmp_path / "run"
    assert train_wgan.main(["--preset", write_preset(tmp_path / "p.yaml", preset), "--output_dir", str(run)]) == 0
    pipe = ClassConditionalGANPipeline.from_pretrained(run)
    assert pipe.num_classes == 24 and pipe.config.max_labels == 3
    drawn = [
        pipe(labels=[order], generator=seeds(0), output_type="pt").images
        for order in (["red sphere", "cyan cube"], ["cyan cube", "red sphere"], ["cyan cube", "gray cube"])
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_training_is_judged_and_the_best_pipeline_is_kept(preset, tmp_path):
    judge, run = tmp_path / "judge", tmp_path / "run"
    assert train_classifier.main(["--preset", preset, "--max_train_steps", "4", "--output_dir", str(judge)]) == 0
    argv = ["--preset", preset, "--output_dir", str(run), "--max_train_steps", "7", "--evaluation_steps", "3"]
    argv += ["--evaluation_samples", "60", "--evaluation_classifier", str(judge), "--generator.norm_type", "batch"]
    assert train_wgan.main(argv) == 0
    measured = [line for line in read_metrics(run / "metrics.jsonl") if "eval_frechet_distance" in line]
    assert [line["step"] for line in measured] == [3, 6, 7] and "eval_label_accuracy" in measured[0]
    assert ClassConditionalGANPipeline.from_pretrained(run / "best").num_classes == 10


def test_bfloat16_trains(preset, tmp_path):
    """In a process of its own: a process has one precision."""
    run = tmp_path / "run"
    argv = command("train_wgan", "--preset", preset, "--output_dir", run, "--max_train_steps", "8")
    done = subprocess.run([*argv, "--mixed_precision", "bf16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(run / "metrics.jsonl")
    assert len(lines) == 8 and all(np.isfinite([*line.values()]).all() for line in lines)
    assert ClassConditionalGANPipeline.from_pretrained(run).generator.dtype == torch.float32


def test_a_dry_run_reports_both_networks_and_writes_nothing(preset, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_wgan.main(["--preset", preset, "--output_dir", str(run), "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert not run.exists() and "critic_steps: 2" in said
    assert "generator: " in said and "critic: " in said and "s a step" in said


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--critic_steps", "0"], "--critic_steps must be at least 1, not 0"),
        (["--gradient_penalty_weight", "-1"], "--gradient_penalty_weight must be at least 0"),
        (["--critic_learning_rate", "0"], "--critic_learning_rate must be positive"),
        (["--evaluation_steps", "3"], "--evaluation_steps needs --evaluation_classifier"),
        (["--label_dropout", "0.1"], "unknown flag --label_dropout"),
        (["--generator.block_out_channel", "[8]"], "did you mean block_out_channels"),
        (["--generator.block_out_channels", "[8, 8, 8, 8, 8, 8]"], "16x16 is not divisible by 32"),
        (["--critic.block_out_channels", "[8, 8, 8, 8, 8, 8]"], "give at most 5 block_out_channels"),
        (["--resolution", "17"], "17x17 is not divisible by 2"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence_before_anything_is_written(flags, said, preset, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_wgan.main(["--preset", preset, "--output_dir", str(run), *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("train_wgan.py: error: ") and said in line and not run.exists()
