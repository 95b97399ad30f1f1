"""Runs that are killed, stopped, continued, lengthened, or meet what they can't go on with."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import (
    MAIN,
    TINY_PRESET,
    assert_identical,
    command,
    final_state,
    kill_once_it_has,
    losses,
    seconds_taken,
    signal_once,
    write_preset,
)
from safetensors import SafetensorError

from hwdiffusion.checkpoints import CHECKSUMS, STATE_FILE, clear_unfinished, find_checkpoints, flaw_of, write_checksums
from hwdiffusion.failures import sentence_of
from hwdiffusion.figures import read_metrics
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.randomness import BatchOrder
from hwdiffusion.train_scripts import train_ddpm, train_ldm, train_vqgan
from hwdiffusion.trainer import TRIAL_STEPS
from hwdiffusion.training_log import TrainingLog


# -- killed and continued ---------------------------------------------------------------------------------------------


def assert_same_run(ours, theirs):
    """Bit for bit: raw and averaged weights, optimizers, schedules, every logged figure, what is saved."""
    assert_identical(final_state(ours), final_state(theirs))
    assert losses(ours / "metrics.jsonl") == losses(theirs / "metrics.jsonl")
    weights = [path.relative_to(theirs) for path in theirs.rglob("*.safetensors")]
    assert weights and all((ours / path).read_bytes() == (theirs / path).read_bytes() for path in weights)


# what of a GAN has a state besides weights
WITH_A_STATE = ["--critic.spectral_norm", "true", "--generator.norm_type", "batch"]
# train_ldm.py trains the first stage too, and a UNet by the loop of train_ddpm.py
BUT_FOR_THE_FIRST_STAGE = [
    pytest.param(name, marks=[pytest.mark.slow] if name in ("train_vqgan", "train_ddpm") else [])
    for name in sorted(MAIN)
]


@pytest.mark.parametrize("script", BUT_FOR_THE_FIRST_STAGE)
def test_a_run_killed_twice_ends_bit_identical_to_an_unbroken_one(script, preset, tmp_path):
    """SIGKILL in the middle of an epoch (100 pictures, 32 a step): at a random moment, then while a checkpoint is
    written; each time the same command again."""
    options = ["--preset", preset, "--gradient_accumulation_steps", "2", "--checkpointing_steps", "8"]
    options += ["--unet.dropout", "0.1"] if script == "train_ddpm" else []
    options += ["--guidance_unet_at", "0.3"] if script in ("train_ddpm", "train_ldm") else []
    options += ["--train_vqgan.checkpointing_steps", "20"] if script == "train_ldm" else []
    options += WITH_A_STATE if script == "train_wgan" else []
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    argv = command(script, *options, "--output_dir", broken)
    moment = random.uniform(0, 0.1)
    print(f"killed {moment} s after checkpoint-8")
    code, said = signal_once((broken / "checkpoint-8").exists, argv, then_wait=moment)
    assert code == -signal.SIGKILL, said
    left_over = set(broken.glob("checkpoint-*.part"))
    assert len(read_metrics(broken / "metrics.jsonl")) < 40
    code, said = signal_once(lambda: bool(set(broken.glob("checkpoint-*.part")) - left_over), argv)
    assert code == -signal.SIGKILL, said

    assert MAIN[script]([*options, "--output_dir", str(broken)]) == 0
    assert MAIN[script]([*options, "--output_dir", str(whole)]) == 0
    assert_same_run(broken, whole)
    assert not list(broken.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_vqgan", "train_ldm", "train_ddpm"])
def test_a_run_killed_ten_times_ends_bit_identical_to_an_unbroken_one(script, tmp_path):
    """SIGKILL at random moments, every third time while a checkpoint is written; both stages of a latent diffusion."""
    preset = {**TINY_PRESET, "max_train_steps": 240, "checkpointing_steps": 6, "gradient_accumulation_steps": 2}
    preset["train_vqgan"] = {**TINY_PRESET["train_vqgan"], "max_train_steps": 120}
    options = ["--preset", write_preset(tmp_path / "long.yaml", preset)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    argv = command(script, *options, "--output_dir", broken)
    moments = random.Random(script)

    def written(pattern: str) -> list:  # not by rglob, which would walk into folders that are being deleted
        return [path for stage in (broken, broken / "first-stage") for path in stage.glob(pattern)]

    def checkpoints() -> set:
        return {path for path in written("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()}

    for kill in range(10):
        before, more = checkpoints(), moments.randint(1, 3)

        def ready() -> bool:
            if kill % 3 == 2:  # noqa: B023
                return bool(checkpoints() - before) and bool(written("checkpoint-*.part"))  # noqa: B023
            return len(checkpoints() - before) >= min(more, 2)  # noqa: B023

        code, said = signal_once(ready, argv, then_wait=0 if kill % 3 == 2 else moments.uniform(0, 0.3))
        assert code == -signal.SIGKILL, f"kill {kill}: the run was over: {said}"
    assert MAIN[script]([*options, "--output_dir", str(broken)]) == 0
    assert MAIN[script]([*options, "--output_dir", str(whole)]) == 0
    assert_same_run(broken, whole)
    if script == "train_ldm":
        assert_same_run(broken / "first-stage", whole / "first-stage")


@pytest.mark.slow
def test_a_run_killed_in_its_first_stage_continues(preset, tmp_path):
    run = tmp_path / "run"
    kill_once_it_has(
        run / "first-stage" / "checkpoint-8", command("train_ldm", "--preset", preset, "--output_dir", run)
    )
    assert train_ldm.main(["--preset", preset, "--output_dir", str(run)]) == 0
    assert ClassConditionalPipeline.from_pretrained(run).vqvae is not None


def test_a_finished_run_started_again_changes_nothing(preset, tmp_path):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "4"]
    assert train_ddpm.main(argv) == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".safetensors", ".pt", ".jsonl")]
    before = {path: path.read_bytes() for path in files}
    assert train_ddpm.main(argv) == 0
    assert {path: path.read_bytes() for path in files} == before


def test_going_back_to_an_older_checkpoint_leaves_the_abandoned_course(preset, tmp_path):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--checkpoints_total_limit", "9", "--max_train_steps"]
    assert train_ddpm.main([*argv, "12"]) == 0
    argv = [*argv, "8", "--resume_from_checkpoint"]
    assert train_ddpm.main([*argv, str(run / "checkpoint-4")]) == 0
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, 9))


def test_a_checkpoint_of_another_batch_script_or_model_is_refused(preset, tmp_path, capsys):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "4"]
    assert train_ddpm.main(argv) == 0
    checkpoint = tmp_path / "run" / "checkpoint-4"
    state = torch.load(checkpoint / STATE_FILE, weights_only=True)
    torch.save({**state, "step_size": 32}, checkpoint / STATE_FILE)  # as two processes leave it
    write_checksums(checkpoint)
    assert train_ddpm.main(argv) == 2
    assert "32 pictures a step over all processes, but now there are 16" in capsys.readouterr().err
    torch.save(state, checkpoint / STATE_FILE)
    write_checksums(checkpoint)
    checkpoint = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4")]
    other = ["--preset", preset, "--output_dir", str(tmp_path / "other"), "--max_train_steps", "4", *checkpoint]
    assert train_vqgan.main(other) == 2
    assert "is a checkpoint of train_ddpm, not of train_vqgan" in capsys.readouterr().err
    assert train_ddpm.main([*other, "--unet.block_out_channels", "[16, 16]"]) == 2
    assert "is of another model than this run's unet" in capsys.readouterr().err


def test_latest_on_a_new_folder_starts_a_run(preset, tmp_path):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "2"]
    assert train_ddpm.main([*argv, "--resume_from_checkpoint", "latest"]) == 0


def test_a_run_with_other_settings_is_refused_and_continued_on_demand(preset, tmp_path, capsys):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run")]
    assert train_ddpm.main([*argv, "--max_train_steps", "4"]) == 0
    longer = [*argv, "--max_train_steps", "8", "--learning_rate", "5e-4"]
    assert train_ddpm.main(longer) == 2
    said = capsys.readouterr().err
    assert "max_train_steps" in said and "learning_rate" in said and "--overwrite_output_dir" in said
    assert train_ddpm.main([*longer, "--adam_beta2", "0.9", "--resume_from_checkpoint", "latest"]) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 8
    part = final_state(tmp_path / "run")["models"]["unet"]
    (group,) = part["optimizer"]["param_groups"]
    assert group["initial_lr"] == 5e-4 and group["betas"] == (0.9, 0.9) and part["lr_scheduler"]["base_lrs"] == [5e-4]
    keepsake = tmp_path / "run" / "notes.txt"
    keepsake.write_text("mine")
    assert train_ddpm.main([*argv, "--max_train_steps", "2", "--overwrite_output_dir"]) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    assert keepsake.exists() and not (tmp_path / "run" / "checkpoint-8").exists()


# -- told to stop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_same_command_continues(number, tmp_path):
    preset = write_preset(tmp_path / "p.yaml", {**TINY_PRESET, "max_train_steps": 60, "checkpointing_steps": 59})
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = ["--preset", preset, "--logging_steps", "1", "--output_dir"]
    argv = command("train_ddpm", *options, run)
    code, said = signal_once((run / "metrics.jsonl").exists, argv, number, then_wait=0.1)
    assert code == 128 + number and "Traceback" not in said
    (checkpoint,) = find_checkpoints(run)
    step = int(checkpoint.name.split("-")[1])
    assert 0 < step < 59 and [line["step"] for line in losses(run / "metrics.jsonl")] == list(range(1, step + 1))
    assert f"stopped by {number.name} after step {step} of 60" in said and str(checkpoint) in said
    assert len(ClassConditionalPipeline.from_pretrained(checkpoint)(labels=[3]).images) == 1
    if number == signal.SIGINT:
        return  # from here on it is the same
    assert train_ddpm.main([*options, str(run)]) == 0
    assert train_ddpm.main([*options, str(whole)]) == 0
    assert_identical(final_state(run), final_state(whole))
    assert losses(run / "metrics.jsonl") == losses(whole / "metrics.jsonl")


def test_a_signal_in_the_first_stage_does_not_start_the_second(tmp_path):
    stages = {**TINY_PRESET, "train_vqgan": {**TINY_PRESET["train_vqgan"], "max_train_steps": 300}}
    run = tmp_path / "run"
    argv = command("train_ldm", "--preset", write_preset(tmp_path / "p.yaml", stages), "--output_dir", run)
    code, said = signal_once((run / "first-stage" / "checkpoint-4").exists, argv, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "stopped by SIGTERM" in said
    assert not (run / "latents.safetensors").exists() and not find_checkpoints(run)


def test_a_signal_at_the_end_of_the_first_stage_stops_there_too(preset, tmp_path):
    run = tmp_path / "run"
    argv = command("train_ddpm", "--preset", preset, "--output_dir", run, "--max_train_steps", "8")
    code, said = signal_once(lambda: any(run.glob("checkpoint-8.part")), argv, signal.SIGTERM)
    assert code in (0, 143), said  # 0: it was over before the signal came
    if code == 143:
        assert "stopped by SIGTERM after step 8 of 8" in said
    assert train_ddpm.main(["--preset", preset, "--output_dir", str(run), "--max_train_steps", "8"]) == 0


def test_a_second_start_in_the_folder_of_a_running_one_is_refused(preset, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--max_train_steps", "20000"]
    process = subprocess.Popen(command("train_ddpm", *argv), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (run / "checkpoint-4").exists():
            assert process.poll() is None
            time.sleep(0.01)
        assert train_ddpm.main(argv) == 2
        assert "is being trained in by another process" in capsys.readouterr().err
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    assert find_checkpoints(run)


def test_a_second_signal_stops_at_once():
    program = (
        "import os, signal, time\n"
        "from hwdiffusion.interruption import Interruption\n"
        "with Interruption() as interruption:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"  # a launcher passes on what the terminal has sent already
        "    assert interruption.agreed() == signal.SIGINT\n"
        "    time.sleep(1.2)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(1)\n"
        "    print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and "alive" not in done.stdout, done.stderr
    assert "once more stops at once" in done.stderr


# -- broken checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["truncated weights", "no optimizer", "one flipped bit", "half a checkpoint"])
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(kind, preset, tmp_path):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--max_train_steps", "12"]
    assert train_ddpm.main(argv) == 0
    expected, expected_losses = final_state(run), losses(run / "metrics.jsonl")
    newest = run / "checkpoint-12"
    weights = newest / "unet" / "diffusion_pytorch_model.safetensors"
    if kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no optimizer":
        (newest / STATE_FILE).unlink()
    elif kind == "one flipped bit":
        content = bytearray((newest / STATE_FILE).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / STATE_FILE).write_bytes(content)
    else:  # as a copy that was broken off leaves it
        (newest / CHECKSUMS).unlink()
    with pytest.warns(UserWarning, match="checkpoint-12 is broken .*; going back to the one before"):
        assert train_ddpm.main(argv) == 0
    assert flaw_of(newest) is None
    assert_identical(final_state(run), expected)
    assert losses(run / "metrics.jsonl") == expected_losses


def test_a_run_whose_checkpoints_are_all_broken_is_not_started_anew_unasked(preset, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--max_train_steps", "8"]
    assert train_ddpm.main(argv) == 0
    for checkpoint in find_checkpoints(run):
        (checkpoint / STATE_FILE).write_bytes(b"")
    with pytest.warns(UserWarning, match="is broken"):
        assert train_ddpm.main(argv) == 2
    assert "every checkpoint" in capsys.readouterr().err
    assert train_ddpm.main([*argv, "--resume_from_checkpoint", str(run / "checkpoint-8")]) == 2
    assert "is broken (training_state.pt has 0 bytes instead of" in capsys.readouterr().err
    assert train_ddpm.main([*argv, "--overwrite_output_dir"]) == 0


def test_what_a_kill_left_under_another_name_gets_its_own_back(tmp_path):
    names = ("best.old", "best.part", "checkpoint-4.old", "checkpoint-8.old", "checkpoint-8", "unet.old", "mine.old")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    clear_unfinished(tmp_path)
    left = {path.name: (path / "content").read_text() for path in tmp_path.iterdir()}
    assert left == {
        "best": "best.old", "checkpoint-4": "checkpoint-4.old", "checkpoint-8": "checkpoint-8", "mine.old": "mine.old"
    }  # fmt: skip


def test_averages_that_start_in_the_middle_start_from_the_weights_there(preset, tmp_path):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "8"]
    assert train_ddpm.main([*argv, "--use_ema", "false"]) == 0
    assert train_ddpm.main([*argv, "--use_ema", "true", "--resume_from_checkpoint", "latest"]) == 0
    saved = ClassConditionalPipeline.from_pretrained(tmp_path / "run").unet.state_dict()
    assert_identical(dict(saved), dict(final_state(tmp_path / "run")["models"]["unet"]["model"]))


def test_half_a_checkpoint_is_not_taken(preset, tmp_path):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "8"]
    assert train_ddpm.main(argv) == 0
    expected = final_state(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-8"
    newest.rename(tmp_path / "run" / "checkpoint-8.part")  # as a kill during the writing leaves it
    assert train_ddpm.main(argv) == 0
    assert_identical(final_state(tmp_path / "run"), expected)
    assert not list((tmp_path / "run").glob("*.part"))


# -- disks and memory -------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_checkpoint_before_and_says_what_to_do(preset, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--max_train_steps", "12", "--checkpoints_total_limit", "1"]
    save = torch.save

    def full(state, file):
        if state["step"] == 8:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run))
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    assert train_ddpm.main(argv) == 1
    said = capsys.readouterr().err
    assert "no space is left on the device; free some, or keep fewer checkpoints" in said
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]  # and the half one gave its space back
    assert len(ClassConditionalPipeline.from_pretrained(run / "checkpoint-4")(labels=[3]).images) == 1
    monkeypatch.undo()
    assert train_ddpm.main(argv) == 0
    assert train_ddpm.main([*argv[:2], "--output_dir", str(tmp_path / "whole"), *argv[4:]]) == 0
    assert_same_run(run, tmp_path / "whole")


def test_what_libraries_raise_on_a_full_disk_is_understood():
    class Full:
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises((OSError, RuntimeError)) as raised:  # torch reports its writer's state, after the cause
        torch.save(torch.zeros(10**6), Full())
    assert "no space is left on the device" in sentence_of(raised.value)
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "no space is left on the device" in sentence_of(error)


def test_only_what_is_known_is_put_into_a_sentence():
    assert "permission is denied" in sentence_of(PermissionError(errno.EACCES, "denied", "runs/a"))
    assert "halve --train_batch_size" in sentence_of(torch.OutOfMemoryError("CUDA out of memory"))
    assert sentence_of(ValueError("a mistake in the program")) is None
    assert sentence_of(FileNotFoundError(errno.ENOENT, "gone", "a")) is None


def test_a_folder_that_cannot_be_written_to_is_refused(preset, tmp_path, capsys, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("hwdiffusion.run_folder.tempfile.TemporaryFile", refuse)
    assert train_ddpm.main(["--preset", preset, "--output_dir", str(tmp_path / "run")]) == 2
    assert "can't be made or written to (Read-only file system)" in capsys.readouterr().err


# -- numbers that are none --------------------------------------------------------------------------------------------


@pytest.fixture
def broken_step(monkeypatch):
    """The loss of step 7 is not a number."""
    from hwdiffusion import objectives

    original, calls = objectives.diffusion_loss, []

    def loss(*args):
        calls.append(args)
        return original(*args) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(objectives, "diffusion_loss", loss)


def test_a_loss_that_is_no_number_stops_the_run_before_anything_is_saved_of_it(
    broken_step, preset, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--max_train_steps", "12"]
    assert train_ddpm.main(argv) == 1
    said = capsys.readouterr().err
    pictures = BatchOrder(0, 100, 0, 16).of_step(6)
    assert f"is nan at step 7, on the training pictures {', '.join(map(str, pictures))};" in said
    assert f"the last good checkpoint is {run / 'checkpoint-4'};" in said and "--skip_nonfinite_steps" in said
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    assert len(read_metrics(run / "metrics.jsonl")) == 4
    monkeypatch.undo()
    assert train_ddpm.main(argv) == 0  # and goes on from there


def test_steps_that_are_no_numbers_are_left_out_and_counted_where_asked_for(broken_step, preset, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--max_train_steps", "12", "--skip_nonfinite_steps", "true"]
    assert train_ddpm.main(argv) == 0
    assert "1 of 12 steps were skipped" in capsys.readouterr().out
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [7] and "loss" not in lines[6]
    state = final_state(run)["models"]["unet"]
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    assert {int(entry["step"]) for entry in state["optimizer"]["state"].values()} == {11}


def test_the_overflows_of_a_gradient_scaler_are_its_own_business(preset, tmp_path, monkeypatch):
    """With fp16 the scale is raised until a gradient overflows, by design; here on a CPU, after every step."""
    from accelerate import Accelerator

    make = Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_factor=16.0, growth_interval=1)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "12"]
    assert train_ddpm.main(argv) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any("gradient_norm" not in line for line in lines) and any("gradient_norm" in line for line in lines)
    assert all("loss" in line for line in lines)


def test_a_run_that_skips_every_step_is_stopped(preset, tmp_path, capsys):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--skip_nonfinite_steps", "true"]
    assert train_ddpm.main([*argv, "--learning_rate", "1e25", "--lr_warmup_steps", "0"]) == 1
    assert "25 steps in a row were skipped" in capsys.readouterr().err
    assert find_checkpoints(tmp_path / "run")[0].name in ("checkpoint-20", "checkpoint-24")


def test_every_step_tells_its_gradient_norm_and_learning_rate_and_some_the_speed_and_the_memory(preset, tmp_path):
    argv = ["--preset", preset, "--max_train_steps", "12", "--logging_steps", "5"]
    assert train_vqgan.main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["gradient_norm"] > 0 and 0 <= line["learning_rate"] <= 1e-3 for line in lines)
    assert [line["step"] for line in lines if "images_per_second" in line] == [4, 5, 8, 10, 12]
    assert all(0.1 < line["peak_memory_gb"] < 100 for line in lines if "images_per_second" in line)
    adversarial = [line for line in lines if "adaptive_weight" in line]
    assert [line["step"] for line in adversarial] == list(range(3, 13))
    assert all(line["discriminator_gradient_norm"] > 0 for line in adversarial)
    assert [line["step"] for line in lines if "codebook_usage" in line] == [3, 6, 9, 12]


# -- how long ---------------------------------------------------------------------------------------------------------


def test_a_constant_learning_rate_is_lengthened_by_the_same_command_with_more_steps(preset, tmp_path):
    argv = ["--preset", preset, "--lr_scheduler", "constant", "--output_dir"]
    assert train_ddpm.main([*argv, str(tmp_path / "run"), "--max_train_steps", "6"]) == 0
    assert train_ddpm.main([*argv, str(tmp_path / "run"), "--max_train_steps", "10"]) == 0
    assert train_ddpm.main([*argv, str(tmp_path / "whole"), "--max_train_steps", "10"]) == 0
    ours, theirs = final_state(tmp_path / "run"), final_state(tmp_path / "whole")
    assert_identical(ours, theirs)
    assert losses(tmp_path / "run" / "metrics.jsonl") == losses(tmp_path / "whole" / "metrics.jsonl")


def test_another_end_is_refused_where_the_schedule_depends_on_it_and_stretches_it_on_demand(preset, tmp_path, capsys):
    argv = ["--preset", preset, "--output_dir", str(tmp_path / "run"), "--lr_warmup_steps", "2", "--max_train_steps"]
    assert train_ddpm.main([*argv, "8"]) == 0
    assert train_ddpm.main([*argv, "16"]) == 2
    said = capsys.readouterr().err
    assert "(max_train_steps); its linear learning-rate schedule spans the whole run" in said
    assert "--resume_from_checkpoint latest" in said
    assert train_ddpm.main([*argv, "16", "--resume_from_checkpoint", "latest"]) == 0
    said = capsys.readouterr().out
    assert "the run now ends at step 16 instead of 8" in said
    assert "goes on from 0.000571, where the shorter one had come to 0" in said
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    np.testing.assert_allclose(rates[8:], [1e-3 * (16 - step) / 14 for step in range(8, 16)])
    assert train_ddpm.main([*argv, "12", "--resume_from_checkpoint", "latest"]) == 2
    assert "has done more than --max_train_steps 12" in capsys.readouterr().err
    epoch = [*argv[:-1], "--num_train_epochs", "1", "--resume_from_checkpoint", "latest"]
    assert train_ddpm.main(epoch) == 2
    assert "has done 16 steps, but the run should now end after 7" in capsys.readouterr().err


@pytest.fixture
def clock(monkeypatch):
    """The trainer's clock, on which a step takes the seconds that `clock.pace` says, as long as `clock.steps` says."""
    clock = SimpleNamespace(now=0.0, steps=0, pace=lambda step: 1.0, perf_counter=lambda: clock.now)

    def end_step(log):
        clock.now += clock.pace(clock.steps)
        clock.steps += 1
        return as_it_is(log)

    as_it_is = TrainingLog.end_step
    monkeypatch.setattr(TrainingLog, "end_step", end_step)
    monkeypatch.setattr("hwdiffusion.run_clock.time", clock)
    return clock


@pytest.mark.parametrize("script", ["train_vqgan", "train_ddpm", "train_wgan"])
def test_a_time_budget_at_an_even_pace_is_a_number_of_steps_and_its_trial_leaves_no_trace(
    script, preset, tmp_path, clock
):
    options = ["--preset", preset, "--checkpointing_steps", "4"]
    options += WITH_A_STATE if script == "train_wgan" else []
    timed = [*options, "--output_dir", str(tmp_path / "timed"), "--max_train_seconds", "19"]
    assert MAIN[script](timed) == 0
    assert final_state(tmp_path / "timed")["max_steps"] == 19 - TRIAL_STEPS
    assert MAIN[script](timed) == 0  # it is done
    assert clock.steps == 19

    assert MAIN[script]([*options, "--output_dir", str(tmp_path / "counted"), "--max_train_steps", "9"]) == 0
    assert_identical(final_state(tmp_path / "timed")["models"], final_state(tmp_path / "counted")["models"])


@pytest.mark.parametrize(("later", "budget"), [(0.5, 60), (3.0, 150)])
def test_a_time_budget_is_met_on_a_machine_whose_pace_changes(later, budget, preset, tmp_path, clock):
    clock.pace = lambda step: 1.0 if step < 30 else later
    run = tmp_path / "run"
    options = ["--preset", preset, "--checkpointing_steps", "1000", "--output_dir", str(run)]
    assert train_ddpm.main([*options, "--max_train_seconds", str(budget)]) == 0
    assert clock.now == pytest.approx(budget, rel=0.02)
    lines = read_metrics(run / "metrics.jsonl")
    rates = [line["learning_rate"] for line in lines]
    assert len(lines) == clock.steps - TRIAL_STEPS and len({line["step"] for line in lines}) == len(lines)
    assert rates[-1] < 0.05 * max(rates) < rates[len(rates) // 2]  # the schedule has come to its end with the run
    assert (run / "samples" / f"step-{len(lines)}.png").is_file()


def test_a_stopped_run_uses_what_is_left_of_its_time_and_a_longer_budget_goes_on(preset, tmp_path, clock, capsys):
    run = tmp_path / "run"
    timed = ["--preset", preset, "--output_dir", str(run), "--checkpointing_steps", "5", "--max_train_seconds"]
    assert train_ddpm.main([*timed, "40"]) == 0
    newest = find_checkpoints(run)[0]
    (newest / STATE_FILE).unlink()  # as if it had been killed before its end
    with pytest.warns(UserWarning, match="is broken"):
        assert train_ddpm.main([*timed, "40"]) == 0
    assert seconds_taken(run) == 40 and final_state(run)["step"] == 40 - TRIAL_STEPS

    assert train_ddpm.main([*timed, "60"]) == 2
    assert "max_train_seconds" in capsys.readouterr().err
    assert train_ddpm.main([*timed, "60", "--resume_from_checkpoint", "latest"]) == 0
    assert seconds_taken(run) == pytest.approx(60, abs=1)


def test_a_run_whose_time_is_used_up_is_finished_without_another_step(preset, tmp_path, clock):
    run = tmp_path / "run"
    argv = ["--preset", preset, "--output_dir", str(run), "--checkpointing_steps", "5", "--max_train_seconds", "30"]
    assert train_ddpm.main(argv) == 0
    (run / "model_index.json").unlink()
    newest = find_checkpoints(run)[0] / STATE_FILE
    state = torch.load(newest, weights_only=True)
    torch.save({**state, "max_steps": state["max_steps"] + 3, "seconds": 31.0}, newest)
    write_checksums(newest.parent)
    steps = clock.steps
    assert train_ddpm.main(argv) == 0
    assert clock.steps == steps and (run / "model_index.json").is_file()


def test_what_starts_late_keeps_its_start_when_a_time_budget_moves_the_end(preset, tmp_path, clock):
    clock.pace = lambda step: 1.0 if step < TRIAL_STEPS + 16 else 0.5  # then 0.3 of the run moves from 15 to 25
    run = tmp_path / "run"
    late = ["--discriminator_weight", "0.1", "--discriminator_start", "0.3"]
    argv = ["--preset", preset, "--output_dir", str(run), *late, "--logging_steps", "1"]
    assert train_vqgan.main([*argv, "--max_train_seconds", "60"]) == 0
    lines = read_metrics(run / "metrics.jsonl")
    with_it = ["discriminator_loss" in line for line in lines]
    assert len(lines) > 80 and with_it == sorted(with_it) and with_it.index(True) == 15
    rates = [line["discriminator_learning_rate"] for line in lines if "discriminator_loss" in line]
    assert rates[-1] < 0.1 * max(rates)  # its schedule spans what was left


def test_a_time_budgets_checkpoints_are_tenths_of_the_run_that_it_became(tmp_path, clock):
    clock.pace = lambda step: 1.0 if step < 15 else 0.25
    run, settings = tmp_path / "run", {key: TINY_PRESET[key] for key in TINY_PRESET if key != "checkpointing_steps"}
    preset = write_preset(tmp_path / "tenths.yaml", settings)
    argv = ["--preset", preset, "--output_dir", str(run), "--checkpoints_total_limit", "100"]
    assert train_ddpm.main([*argv, "--max_train_seconds", "40"]) == 0
    steps = sorted(int(path.name.split("-")[1]) for path in find_checkpoints(run))
    assert len(steps) <= 14 and steps[-1] > 80  # a first plan's tenths, of 30 steps, would be over 30
