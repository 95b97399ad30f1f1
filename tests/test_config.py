from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from hwdiffusion import InputError, models
from hwdiffusion.config import (
    MODEL_SECTIONS,
    SAMPLERS,
    SCRIPTS,
    DataArguments,
    MachineArguments,
    TrainingArguments,
    load_preset,
    parse,
    preset_names,
    run_script,
)
from hwdiffusion.precision import precision_here


def write_preset(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def saved(config, folder: Path) -> dict:
    config.save(folder / "config.yaml")
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def test_the_command_line_beats_the_scripts_section_beats_the_preset_beats_the_default(tmp_path):
    base = "dataset_name: digits\nmax_train_steps: 3\n"
    flag, section = "learning_rate: 0.25\n", "train_ddpm: {learning_rate: 0.5}\n"
    rates = []
    for text, argv in (
        (base, []),
        (base + flag, []),
        (base + flag + section, []),
        (base + flag + section, ["--learning_rate", "0.75"]),
    ):
        preset = write_preset(tmp_path, text)
        rates.append(parse("train_ddpm", ["--preset", preset, *argv]).args.learning_rate)
    assert rates == [TrainingArguments.learning_rate, 0.25, 0.5, 0.75]


def test_a_section_holds_for_its_own_script_only(tmp_path):
    preset = write_preset(
        tmp_path,
        "dataset_name: digits\nmax_train_steps: 30\n"
        "train_ddpm: {learning_rate: 0.5}\ntrain_ldm: {learning_rate: 0.25}\ntrain_vqgan: {learning_rate: 0.125}\n",
    )
    scripts = [script for script in SCRIPTS if script != "train_distill"]  # which starts from a teacher, not a preset
    rates = {script: parse(script, ["--preset", preset]).args.learning_rate for script in scripts}
    own = {"train_ddpm": 0.5, "train_ldm": 0.25, "train_vqgan": 0.125}
    assert rates == {**{script: SCRIPTS[script].learning_rate for script in scripts}, **own}


@pytest.mark.parametrize(
    "argv, unknown, nearest",
    [
        (["--learning_rat", "1"], "--learning_rat", "--learning_rate"),
        (["--learning_rat=1"], "--learning_rat", "--learning_rate"),
        (["--train_ldm.learning_rat", "1"], "learning_rat", "learning_rate"),
        (["--train_vqgan.comitment_beta", "1"], "comitment_beta", "commitment_beta"),
        (["--unett.norm_num_groups", "1"], "unett", "unet"),
        (["--preset", "digit"], "digit", "digits"),
    ],
)
def test_an_unknown_name_on_the_command_line_is_an_error_that_names_the_nearest(argv, unknown, nearest):
    with pytest.raises(InputError, match=rf"{unknown}\b.*did you mean (--)?{nearest}\?"):
        parse("train_ldm", argv)


@pytest.mark.parametrize(
    "line, unknown, nearest",
    [
        ("resolutoin: 16", "resolutoin", "resolution"),
        ("noise_sheduler: {}", "noise_sheduler", "noise_scheduler"),
        ("train_ldm: {guidence_scale: 2}", "guidence_scale", "guidance_scale"),
        ("train_vqgan: {comitment_beta: 2}", "comitment_beta", "commitment_beta"),
    ],
)
def test_an_unknown_key_of_a_preset_is_an_error_that_names_the_nearest(tmp_path, line, unknown, nearest):
    preset = write_preset(tmp_path, f"dataset_name: digits\nmax_train_steps: 3\n{line}\n")
    with pytest.raises(InputError, match=rf"{unknown}\b.*did you mean (--)?{nearest}\?"):
        parse("train_ldm", ["--preset", preset])


def test_a_flag_of_another_script_may_stand_in_a_preset_but_not_on_the_command_line(tmp_path):
    preset = write_preset(tmp_path, "dataset_name: digits\nmax_train_steps: 3\ncommitment_beta: 0.5\n")
    assert parse("train_vqgan", ["--preset", preset]).args.commitment_beta == 0.5
    assert not hasattr(parse("train_ddpm", ["--preset", preset]).args, "commitment_beta")
    with pytest.raises(InputError, match="unknown flag --commitment_beta"):
        parse("train_ddpm", ["--preset", preset, "--commitment_beta", "0.5"])


@pytest.mark.parametrize(
    "text, said",
    [("a: [", "not valid YAML"), ("- 1\n", "must be a mapping"), ("unet: 3\n", "'unet'.*must be a mapping")],
)
def test_a_preset_that_is_no_mapping_is_refused(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        parse("train_ddpm", ["--preset", write_preset(tmp_path, text)])


def test_a_missing_preset_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no preset file .*gone.yaml"):
        parse("train_ddpm", ["--preset", str(tmp_path / "gone.yaml")])


def test_numbers_that_yaml_takes_for_strings_are_numbers(tmp_path):
    preset = write_preset(tmp_path, "dataset_name: digits\nmax_train_steps: 3\nlearning_rate: 1e-3\n")
    assert load_preset(preset)["learning_rate"] == "1e-3"  # YAML 1.1 wants a point in it
    assert parse("train_ddpm", ["--preset", preset]).args.learning_rate == 0.001


@pytest.mark.parametrize("flag", [["--train_data_dir", "PICTURES"], ["--train_data_dir=PICTURES"]])
def test_the_users_folder_takes_the_place_of_the_presets_data_set(tmp_path, flag):
    preset = write_preset(
        tmp_path,
        "dataset_name: somebody/pictures\ndataset_config_name: small\nimage_column: img\nlabel_column: kind\n"
        "image_mode: L\nmax_train_steps: 3\n",
    )
    args = parse("train_ddpm", ["--preset", preset, *flag]).args
    assert args.train_data_dir == "PICTURES"
    assert (args.dataset_name, args.dataset_config_name, args.image_column, args.label_column) == (None,) * 4
    assert args.image_mode == "L"
    stage = parse("train_ldm", ["--preset", preset, *flag]).first_stage(tmp_path).args
    assert (stage.train_data_dir, stage.dataset_name) == ("PICTURES", None)


def test_the_users_data_set_takes_the_place_of_the_presets_folder(tmp_path):
    preset = write_preset(tmp_path, "train_data_dir: PICTURES\nlabel_column: kind\nmax_train_steps: 3\n")
    args = parse("train_ddpm", ["--preset", preset, "--dataset_name", "digits", "--image_column", "img"]).args
    assert (args.train_data_dir, args.dataset_name, args.label_column) == (None, "digits", None)
    assert args.image_column == "img"


@pytest.mark.parametrize("form", [["--unet.block_out_channels", "[8, 16]"], ["--unet.block_out_channels=[8, 16]"]])
def test_a_dotted_override_changes_its_entry_and_nothing_else(form):
    plain, changed = (parse("train_ldm", ["--preset", "digits", *argv]).to_dict() for argv in ([], form))
    assert changed["unet"].pop("block_out_channels") == [8, 16]
    plain["unet"].pop("block_out_channels")
    assert changed == plain


def test_a_dotted_override_reaches_the_first_stage(tmp_path):
    config = parse("train_ldm", ["--train_vqgan.max_train_steps", "7", "--vqvae.latent_channels", "3"])
    stage = config.first_stage(tmp_path)
    assert stage.args.max_train_steps == 7
    assert stage.sections["vqvae"]["latent_channels"] == 3
    assert config.args.max_train_steps == load_preset("digits")["train_ldm"]["max_train_steps"]


def test_a_dotted_override_is_read_as_yaml():
    values = {"a": "null", "b": "true", "c": "1.5", "d": "word", "e": "[1, x]"}
    argv = [word for key, value in values.items() for word in (f"--unet.{key}", value)]
    unet = parse("train_ldm", argv).sections["unet"]
    assert [unet[key] for key in values] == [None, True, 1.5, "word", [1, "x"]]


def test_the_first_stage_shares_data_and_machine_flags_and_no_others(tmp_path):
    argv = ["--preset", "mnist-ldm"]
    shared = [
        "--train_data_dir", "PICTURES", "--image_column", "img", "--label_column", "kind", "--resolution", "16", "24",
        "--image_mode", "RGB", "--center_crop", "false", "--random_flip", "--validation_fraction", "0.3",
        "--max_train_samples", "99", "--skip_bad_images", "--image_memory_gb", "1", "--dataloader_num_workers", "1",
        "--dataset_config_name", "small", "--seed", "5", "--mixed_precision", "bf16", "--report_to", "wandb",
        "--logging_steps", "3", "--shuffle_buffer_size", "7", "--data_license", "mit",
    ]  # fmt: skip
    exclusive = {"streaming": ["--streaming"], "class_balance": ["--class_balance", "0.5"]}
    own = [
        "--train_batch_size", "3", "--learning_rate", "1", "--use_ema", "false", "--max_train_steps", "9",
        "--gradient_accumulation_steps", "2", "--adam_beta2", "0.5", "--lr_scheduler", "cosine",
    ]  # fmt: skip
    alone = parse("train_vqgan", argv).args
    for name, flags in exclusive.items():
        config = parse("train_ldm", [*argv, *shared, *own, *flags])
        stage = config.first_stage(tmp_path / "first-stage").args
        assert getattr(stage, name) == getattr(config.args, name) != getattr(alone, name)
    for cls in (DataArguments, MachineArguments):
        for item in fields(cls):
            assert getattr(stage, item.name) == getattr(config.args, item.name), item.name
            if item.name not in ("dataset_name", *exclusive):  # its folder took its place
                assert getattr(stage, item.name) != getattr(alone, item.name), f"the test leaves out {item.name}"
    inherited = {item.name for cls in (DataArguments, MachineArguments) for item in fields(cls)}
    for item in fields(alone):
        if item.name not in inherited | {"output_dir"}:
            assert getattr(stage, item.name) == getattr(alone, item.name), item.name
    assert stage.output_dir == str(tmp_path / "first-stage")


@pytest.mark.parametrize("script", ["train_ldm", "train_vqgan"])
def test_a_saved_configuration_has_no_changes_against_itself(tmp_path, script):
    config = parse(script, ["--learning_rate", "1e-5", "--seed", "12345", "--resolution", "16", "24"])
    assert config.changes(saved(config, tmp_path)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "argv, changed",
    [
        (["--learning_rate", "0.5"], ["learning_rate"]),
        (["--seed", "1", "--max_train_steps", "5"], ["seed", "max_train_steps"]),
        (["--unet.block_out_channels", "[8, 16]"], ["unet.block_out_channels"]),
        (["--unet.dropout", "0.1"], ["unet.dropout"]),
        (["--vqvae", "FOLDER"], ["vqvae"]),
        (["--train_vqgan.learning_rate", "0.5"], ["train_vqgan.learning_rate"]),
        (["--train_data_dir", "PICTURES"], ["dataset_name", "train_data_dir"]),
    ],
)
def test_a_setting_that_alters_the_result_is_a_change_whichever_run_was_first(tmp_path, argv, changed):
    plain, other = parse("train_ldm", []), parse("train_ldm", argv)
    assert set(other.changes(saved(plain, tmp_path))) == set(changed)
    assert set(plain.changes(saved(other, tmp_path))) == set(changed)


def test_what_does_not_alter_the_result_is_no_change(tmp_path):
    argv = [
        "--output_dir", "elsewhere", "--logging_steps", "7", "--report_to", "wandb", "--checkpointing_steps", "3",
        "--sample_steps", "1", "2", "--image_memory_gb", "1", "--dataloader_num_workers", "0", "--dry_run",
    ]  # fmt: skip
    plain, other = parse("train_ldm", []), parse("train_ldm", argv)
    assert other.changes(saved(plain, tmp_path)) == []


def test_guidance_without_label_dropout_is_refused():
    argv = ["--label_dropout", "0"]
    with pytest.raises(InputError, match="guidance_scale 1.5 needs a model trained with label dropout"):
        parse("train_ldm", argv)
    assert parse("train_ldm", [*argv, "--guidance_scale", "1"]).args.label_dropout == 0


@pytest.mark.parametrize(
    "script, argv, key",
    [
        ("train_ldm", ["--resolution", "0"], "resolution"),
        ("train_ldm", ["--resolution", "8", "8", "8"], "resolution"),
        ("train_ldm", ["--train_batch_size", "0"], "train_batch_size"),
        ("train_ldm", ["--max_train_steps", "0"], "max_train_steps"),
        ("train_ldm", ["--learning_rate", "0"], "learning_rate"),
        ("train_ldm", ["--learning_rate", "fast"], "learning_rate"),
        ("train_ldm", ["--validation_fraction", "1"], "validation_fraction"),
        ("train_ldm", ["--lr_scheduler", "cosin"], "lr_scheduler"),
        ("train_ldm", ["--image_mode", "CMYK"], "image_mode"),
        ("train_ldm", ["--seed", "-1"], "seed"),
        ("train_ldm", ["--label_dropout", "1"], "label_dropout"),
        ("train_ldm", ["--guidance_scale", "0.5"], "guidance_scale"),
        ("train_ldm", ["--guidance_interval", "0.6", "0.4"], "guidance_interval"),
        ("train_ldm", ["--snr_gamma", "0"], "snr_gamma"),
        ("train_ldm", ["--train_vqgan.learning_rate", "0"], "learning_rate"),
        ("train_vqgan", ["--discriminator_start", "1"], "discriminator_start"),
        ("train_vqgan", ["--codebook_restart_until", "1.1"], "codebook_restart_until"),
        ("train_ldm", ["--dataset_name", "digits", "--train_data_dir", "PICTURES"], "train_data_dir"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_its_flag(script, argv, key):
    with pytest.raises(InputError, match=f"--{key}"):
        parse(script, argv)


PRESETS = [(name, script) for name in preset_names() for script in SCRIPTS if script in load_preset(name)]


@pytest.mark.parametrize("preset, script", PRESETS)
def test_every_shipped_preset_says_what_its_scripts_train_with(preset, script):
    stored = load_preset(preset)
    config = parse(script, ["--preset", preset])
    flags = {key: value for key, value in stored.items() if key not in (*MODEL_SECTIONS, *SCRIPTS)}
    for key, value in {**flags, **stored[script]}.items():
        value = precision_here() if (key, value) == ("mixed_precision", "auto") else value
        assert getattr(config.args, key) == ([value] if key == "resolution" else value)
    assert config.sections == {section: stored.get(section, {}) for section in config.sections}
    assert config.args.output_dir == str(Path("runs", preset))


def test_every_shipped_preset_serves_some_script():
    assert {preset for preset, _ in PRESETS} == set(preset_names())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(script, ["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert [item.name for item in fields(SCRIPTS[script]) if f"--{item.name}" not in text] == []


def test_a_script_says_in_one_line_what_input_is_wrong_and_hides_no_other_error(capsys):
    def broken(config):
        raise ZeroDivisionError

    assert run_script("train_ldm", broken, ["--preset", "nothing-of-the-kind"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1 and output.err.startswith("train_ldm.py: error: unknown preset")
    with pytest.raises(ZeroDivisionError):
        run_script("train_ldm", broken, [])


def test_a_saved_configuration_serves_as_a_preset(tmp_path):
    config = parse("train_ldm", ["--learning_rate", "1e-5", "--unet.dropout", "0.1", "--train_vqgan.l1_weight", "0.7"])
    config.save(tmp_path / "config.yaml")
    again = parse("train_ldm", ["--preset", str(tmp_path / "config.yaml")])
    assert again.to_dict() == config.to_dict()


def test_epochs_of_the_command_line_win_over_steps_of_the_preset():
    for flag in ("--num_train_epochs", "--num-train-epochs"):
        assert parse("train_ldm", [flag, "2"]).args.max_train_steps is None
    both = parse("train_ldm", ["--num_train_epochs", "2", "--max_train_steps", "7"]).args
    assert both.max_train_steps == 7


def test_an_empty_section_takes_overrides(tmp_path):
    (tmp_path / "p.yaml").write_text("dataset_name: digits\nmax_train_steps: 1\nunet:\n")
    config = parse("train_ddpm", ["--preset", str(tmp_path / "p.yaml"), "--unet.norm_num_groups", "8"])
    assert config.sections["unet"] == {"norm_num_groups": 8}


def test_a_mistake_in_the_section_of_another_script_is_found():
    with pytest.raises(InputError, match="unknown flag --train_vqgan.learning_rat .did you mean learning_rate"):
        parse("train_ddpm", ["--preset", "mnist-ddpm", "--train_vqgan.learning_rat", "1"])


def test_the_samplers_that_can_be_named_are_those_that_can_be_made():
    assert tuple(models.SAMPLERS) == SAMPLERS


# -- presets on top of others -----------------------------------------------------------------------------------------


def test_a_preset_on_top_of_another_says_only_what_differs(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text(
        "dataset_name: digits\nlabel_column: label\nresolution: 16\nmax_train_steps: 9\n"
        "vqvae: {latent_channels: 4, layers_per_block: 1}\n"
        "train_ddpm: {num_train_epochs: 3, learning_rate: 0.25}\n"
    )
    preset = write_preset(
        tmp_path,
        f"base: {base}\nresolution: 32\nvqvae: {{layers_per_block: 2}}\ntrain_ddpm: {{max_train_steps: 5}}\n",
    )
    assert load_preset(preset) == {
        "dataset_name": "digits",
        "label_column": "label",
        "resolution": 32,
        "max_train_steps": 9,
        "vqvae": {"latent_channels": 4, "layers_per_block": 2},
        "train_ddpm": {"learning_rate": 0.25, "max_train_steps": 5},
    }
    other_data = write_preset(tmp_path, "base: base.yaml\ntrain_data_dir: pictures\n")  # beside the one that names it
    assert {"dataset_name", "label_column"}.isdisjoint(load_preset(other_data))


def test_what_a_preset_says_for_all_scripts_beats_what_its_base_says_for_one(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "dataset_name: digits\n"
        "train_ddpm: {num_train_epochs: 3, learning_rate: 0.25, image_column: img, adam_beta1: 0.5}\n"
    )
    preset = write_preset(tmp_path, "base: base.yaml\nmax_train_steps: 5\nlearning_rate: 0.125\ntrain_data_dir: x\n")
    args = parse("train_ddpm", ["--preset", preset]).args
    assert (args.max_train_steps, args.num_train_epochs, args.learning_rate) == (5, None, 0.125)
    assert (args.train_data_dir, args.dataset_name, args.image_column, args.adam_beta1) == ("x", None, None, 0.5)


def test_a_configuration_saved_before_a_flag_existed_has_not_changed(tmp_path):
    config = parse("train_ldm", ["--preset", "mnist-ldm"])
    before = saved(config, tmp_path)
    for flag in ("class_balance", "latent_scaling", "guidance_interval"):
        del before["train_ldm"][flag]
    assert config.changes(before) == []
    config.args.class_balance = 0.5
    assert config.changes(before) == ["class_balance"]


def test_a_base_that_is_not_there_or_that_stands_on_itself_is_refused(tmp_path):
    with pytest.raises(InputError, match="unknown preset 'mnist-ldn' .did you mean mnist-ldm"):
        load_preset(write_preset(tmp_path, "base: mnist-ldn\n"))
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"base: {second}\n")
    second.write_text(f"base: {first}\n")
    with pytest.raises(InputError, match="second.yaml stands on itself; its base must be another one"):
        load_preset(str(first))
    with pytest.raises(InputError, match="base of preset .* must be the name or the path of another preset, not 3"):
        load_preset(write_preset(tmp_path, "base: 3\n"))


@pytest.mark.parametrize(
    "script, argv, said",
    [
        ("train_ldm", ["--class_balance", "2"], "--class_balance must be in 0 to 1, not 2.0"),
        ("train_vqgan", ["--discriminator_warmup", "-1"], "--discriminator_warmup must be in 0 to 1"),
        ("train_vqgan", ["--adaptive_weight_max", "0"], "--adaptive_weight_max must be positive"),
        ("train_vqgan", ["--codebook_ema_decay", "1"], "--codebook_ema_decay must be between 0 and 1"),
        ("train_vqgan", ["--entropy_weight", "-1"], "--entropy_weight must be at least 0"),
        ("train_vqgan", ["--evaluation_steps", "0"], "--evaluation_steps must be at least 1"),
        ("train_vqgan", ["--commitment_beta", "-0.1"], "--commitment_beta must be at least 0"),
        ("train_vqgan", ["--mse_weight", "inf"], "--mse_weight must be at least 0, not inf"),
        ("train_vqgan", ["--mse_weight", "0", "--l1_weight", "0"], "one of --mse_weight, .* must be positive"),
        (
            "train_vqgan",
            ["--discriminator_weight", "1", "--discriminator_layers", "5"],
            "--discriminator_layers 5 halves pictures of 16 pixels too often; give at most 4",
        ),
        ("train_ldm", ["--latent_scaling", "config"], "--latent_scaling config is for an autoencoder that is given"),
        ("train_ldm", ["--vae", "a", "--vqvae", "b"], "--vae is another name of --vqvae; give one of them"),
        (
            "train_ldm",
            ["--vae", "a", "--vqvae.latent_channels", "8"],
            "--vqvae.latent_channels is for the first stage, whose place --vae takes; give one of them",
        ),
        ("train_ldm", ["--vqvae", "a", "--train_vqgan.l1_weight", "1"], "--train_vqgan.l1_weight is for the first st"),
        ("train_ldm", ["--train_vqgan.rotation_trik", "1"], "^unknown flag --train_vqgan.rotation_trik .did you mean"),
        ("train_ldm", ["--rotation_trick", "1"], "for the first stage give --train_vqgan.rotation_trick"),
    ],
)
def test_values_that_are_not_allowed_are_refused(script, argv, said):
    with pytest.raises(InputError, match=said):
        parse(script, argv)


def test_an_optimizer_that_is_not_installed_is_refused(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--use_8bit_adam needs `pip install"):
        parse("train_ddpm", ["--preset", "mnist-ddpm", "--use_8bit_adam", "true"])


def test_vae_is_another_name_of_vqvae():
    for script in ("train_ldm", "train_classifier"):
        argv = ["--noise_aware"] if script == "train_classifier" else []
        assert parse(script, [*argv, "--vae", "runs/vae"]).args.vqvae == "runs/vae"
