"""`hwdiffusion evaluate` through its command line: what moves which figure, resuming, bad input."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import PROJECTION, TINY_UNET
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.datasets import load_digits
from tiny import make_pipeline

from hwdiffusion import cli
from hwdiffusion.config import parse_evaluation
from hwdiffusion.figures import read_metrics
from hwdiffusion.pipelines import ClassConditionalPipeline
from hwdiffusion.report import how_drawn
from hwdiffusion.samples import sampling_options
from hwdiffusion.train_scripts import train_classifier, train_ddpm


pytestmark = pytest.mark.xdist_group("evaluation")  # they share a classifier
SMALL = ["--classifier.embedding_size", "16", "--classifier.hidden_sizes", "[16, 32]", "--classifier.depths", "[1, 1]"]
SIZE = ["--resolution", "8", "--image_mode", "L"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Digits in three disjoint parts: a folder with train and test to compare with, and 600 others, a perfect
    generator's samples; and a classifier that was trained on the first."""
    folder = tmp_path_factory.mktemp("world")
    digits = load_digits()
    images, labels = (digits.images * (255 / 16)).round().astype(np.uint8), digits.target
    order = np.random.default_rng(0).permutation(len(images))
    parts = {"train": order[:700], "test": order[700:1197]}
    for split, places in parts.items():
        for place in places:
            path = folder / "real" / split / str(labels[place]) / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[place]).save(path)
    argv = ["--preset", "mnist-classifier", "--train_data_dir", str(folder / "real"), *SIZE, *SMALL]
    argv += ["--classifier.image_size", "[32, 32]", "--num_train_epochs", "25", "--train_batch_size", "50"]
    assert train_classifier.main([*argv, "--output_dir", str(folder / "classifier")]) == 0
    return {
        "folder": folder,
        "real": folder / "real",
        "classifier": folder / "classifier",
        "train": (images[parts["train"]], labels[parts["train"]]),
        "other": (images[order[1197:]], labels[order[1197:]]),
    }


def report_of(world, images, labels=None, name="pictures", flags=()) -> dict:
    path = world["folder"] / f"{name}.npz"
    names = {} if labels is None else {"labels": labels, "class_names": np.array([str(k) for k in range(10)])}
    np.savez(path, images=images, **names)
    output = world["folder"] / name
    argv = ["--images", str(path), "--reference", str(world["real"]), "--classifier", str(world["classifier"]), *SIZE]
    assert cli.main(["evaluate", *argv, "--output_dir", str(output), *flags]) == 0
    return json.loads((output / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def base(world):
    return report_of(world, *world["other"], name="base")


def unmoved(report, base, *but):
    """The figures that may not move are those of unseen real pictures."""
    if "accuracy" not in but:
        assert report["labels"]["accuracy"] == pytest.approx(base["labels"]["accuracy"], abs=0.03)
    if "frechet" not in but:
        assert report["distances"]["frechet_distance"] < 2 * base["distances"]["frechet_distance"]
    for name in ("precision", "recall", "coverage"):
        if name not in but:
            assert report["manifold"][name] == pytest.approx(base["manifold"][name], abs=0.08), name
    if "memorisation" not in but:
        assert report["memorisation"]["pixels"]["ratio"] == pytest.approx(1, abs=0.1)
        assert report["memorisation"]["pixels"]["share_of_copies"] < 0.05


def test_unseen_real_pictures_reach_the_floor(base):
    assert base["n"] == 600 and base["reference"].items() >= {"name": "real", "split": "held-out", "n": 497}.items()
    assert base["extractor"]["test_accuracy"] > 0.93
    assert base["labels"]["accuracy"] == pytest.approx(base["extractor"]["test_accuracy"], abs=0.03)
    assert base["distances"]["frechet_distance"] < 2 * base["floor"]["distances"]["frechet_distance"]
    for name in ("precision", "recall", "density", "coverage"):
        assert base["manifold"][name] == pytest.approx(base["floor"]["manifold"][name], abs=0.08)
    unmoved(base, base)


def test_shuffled_labels_move_the_accuracy_alone(world, base):
    images, labels = world["other"]
    report = report_of(world, images, np.random.default_rng(1).permutation(labels), "shuffled")
    assert report["labels"]["accuracy"] < 0.2 and report["labels"]["confidence"] < 0.2
    for key in ("distances", "manifold", "memorisation", "floor"):
        assert report[key] == base[key]


def test_copies_move_the_memorisation(world, base):
    report = report_of(world, *world["train"], name="copied")
    for space in ("features", "pixels"):
        assert report["memorisation"][space]["ratio"] < 1e-3
        assert report["memorisation"][space]["share_of_copies"] == 1
    # that copies obey their labels a little better than unseen pictures is the classifier's having seen them
    unmoved(report, base, "accuracy", "memorisation")
    assert (world["folder"] / "copied" / "nearest.png").is_file()


def test_a_dropped_mode_moves_recall_and_coverage_and_not_precision(world, base):
    images, labels = world["other"]
    kept = np.flatnonzero((labels != 7) & (labels != 4) & (labels != 1))
    report = report_of(world, images[kept], labels[kept], "dropped")
    assert report["labels"]["per_class"]["7"] is None
    assert report["manifold"]["coverage"] < base["manifold"]["coverage"] - 0.15
    assert report["manifold"]["recall"] < base["manifold"]["recall"] - 0.15
    assert report["distances"]["frechet_distance"] > 3 * base["distances"]["frechet_distance"]
    unmoved(report, base, "recall", "coverage", "frechet")


def test_blurred_and_shifted_pictures_move_the_distance(world, base):
    images, labels = world["other"]
    pictures = torch.from_numpy(images).float()[:, None]
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1)), 3, stride=1).to(torch.uint8)[:, 0].numpy()
    shifted = np.roll(images, 2, axis=2)
    for name, changed in (("blurred", blurred), ("shifted", shifted)):
        report = report_of(world, changed, labels, name)
        assert report["distances"]["frechet_distance"] > 5 * base["distances"]["frechet_distance"], name
        assert report["distances"]["kernel_distance"] > 5 * base["distances"]["kernel_distance_sd"], name
        assert report["manifold"]["precision"] < base["manifold"]["precision"] - 0.1, name
        assert report["memorisation"]["pixels"]["share_of_copies"] < 0.05, name


def test_pngs_and_arrays_give_one_report(world, base):
    images, labels = world["other"]
    for index, (image, label) in enumerate(zip(images, labels)):
        path = world["folder"] / "pngs" / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    argv = ["--images", str(world["folder"] / "pngs"), "--reference", str(world["real"]), *SIZE]
    output = world["folder"] / "of-pngs"
    assert cli.main(["evaluate", *argv, "--classifier", str(world["classifier"]), "--output_dir", str(output)]) == 0
    report = json.loads((output / "evaluation.json").read_text())
    assert report["labels"]["accuracy"] == base["labels"]["accuracy"]
    assert report["distances"]["frechet_distance"] == pytest.approx(base["distances"]["frechet_distance"], rel=1e-4)
    ours = {key: report["memorisation"]["pixels"][key] for key in ("ratio", "share_of_copies")}
    assert ours == pytest.approx(base["memorisation"]["pixels"], rel=1e-4)


# -- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(world):
    preset = {"resolution": 8, "image_mode": "L", "unet": {**TINY_UNET, **PROJECTION}, "max_train_steps": 2,
              "noise_scheduler": {"prediction_type": "v_prediction"}, "num_inference_steps": 2}  # fmt: skip
    (world["folder"] / "tiny.yaml").write_text(yaml.safe_dump({**preset, "train_data_dir": str(world["real"])}))
    run = world["folder"] / "run"
    assert train_ddpm.main(["--preset", str(world["folder"] / "tiny.yaml"), "--output_dir", str(run)]) == 0
    return run


def evaluate_run(world, run, name, *flags) -> dict:
    output = world["folder"] / name
    argv = [str(run), "--classifier", str(world["classifier"]), "--num_samples", "600", "--output_dir", str(output)]
    assert cli.main(["evaluate", *argv, *flags]) == 0
    return json.loads((output / "evaluation.json").read_text())


def test_an_interrupted_evaluation_continues_and_ends_as_an_unbroken_one(world, run, monkeypatch):
    unbroken = evaluate_run(world, run, "unbroken")
    assert unbroken["n"] == 600 and set(unbroken["labels"]["per_class"]) == {str(k) for k in range(10)}
    draw, drawn = ClassConditionalPipeline.__call__, []

    def interrupted(self, *args, **kwargs):
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(len(kwargs["labels"]))
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(ClassConditionalPipeline, "__call__", interrupted)
    argv = ["--classifier", str(world["classifier"]), "--num_samples", "600"]
    assert cli.main(["evaluate", str(run), *argv, "--output_dir", str(world["folder"] / "broken")]) == 130
    monkeypatch.setattr(ClassConditionalPipeline, "__call__", draw)
    (chunk,) = (world["folder"] / "broken").glob("samples-*/*.npz")
    written = chunk.stat().st_mtime_ns
    monkeypatch.setattr("hwdiffusion.samples.Samples.keep", lambda self, how, output_dir: None)
    assert evaluate_run(world, run, "broken", "--save_images", "npz") == unbroken
    assert chunk.stat().st_mtime_ns == written and len(list(chunk.parent.iterdir())) == 3


def test_steps_without_guidance_and_half_precision_reach_the_pipeline(world, run, monkeypatch):
    draw, calls = ClassConditionalPipeline.__call__, []

    def watched(self, *args, **kwargs):
        calls.append((self.unet.dtype, kwargs.get("guidance_interval")))
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(ClassConditionalPipeline, "__call__", watched)
    flags = ("--guidance_scale", "3", "--guidance_interval", "0.2", "0.6", "--torch_dtype", "bfloat16")
    report = evaluate_run(world, run, "half", "--num_samples", "60", *flags)
    assert calls == [(torch.bfloat16, [0.2, 0.6])]
    own = evaluate_run(world, run, "own", "--num_samples", "60")["sampling"]
    assert report["sampling"]["weights_sha256"] == own["weights_sha256"]  # what was saved, whatever it is drawn in
    calls.pop()
    assert report["sampling"]["guidance_interval"] == [0.2, 0.6] and report["sampling"]["torch_dtype"] == "bfloat16"
    evaluate_run(world, run, "half", "--num_samples", "60", "--guidance_scale", "3")  # another setting: drawn anew
    assert calls[1:] == [(torch.float32, None)]


def test_a_report_says_in_which_part_of_the_steps_a_pipeline_guides_by_itself():
    pipe = make_pipeline(default_guidance_scale=2.0, default_guidance_interval=(0.0, 0.5))

    def said(*argv):
        options = sampling_options(pipe, parse_evaluation("evaluate", ["run", *argv]))
        return how_drawn({"scheduler": "DDIMScheduler", **options})

    assert said() == "DDIMScheduler, 4 steps, guidance 2.0 in (0, 0.5) of the steps"
    assert said("--guidance_interval", "0", "1") == "DDIMScheduler, 4 steps, guidance 2.0"
    assert said("--guidance_scale", "3") == "DDIMScheduler, 4 steps, guidance 3.0"
    assert said("--guidance_scale", "3", "--guidance_interval", "0.2", "1").endswith("3.0 in (0.2, 1) of the steps")


def test_labels_are_drawn_as_often_as_held_out_pictures_have_them(world, run, refused):
    held_out = [int(path.parent.name) for path in (world["real"] / "test").rglob("*.png")]
    count = str(len(held_out))
    alike = evaluate_run(world, run, "alike", "--num_samples", count)
    flags = ("--num_samples", count, "--label_frequencies", "held_out", "--save_images", "npz")
    report = evaluate_run(world, run, "as-held-out", *flags)
    frequencies = {str(digit): held_out.count(digit) for digit in range(10)}
    assert report["sampling"]["label_frequencies"] == frequencies and len(set(frequencies.values())) > 1
    (kept,) = (world["folder"] / "as-held-out").glob("*.npz")
    drawn = np.load(kept, allow_pickle=False)["labels"]
    assert {str(digit): int((drawn == digit).sum()) for digit in range(10)} == frequencies
    assert "label_frequencies" not in alike["sampling"]
    some = evaluate_run(world, run, "some-as-held-out", "--num_samples", "200", "--label_frequencies", "held_out")
    assert sum(some["sampling"]["label_frequencies"].values()) == 200  # of what was drawn
    said = "--label_frequencies is for what a run draws of single labels"
    pictures = ["--images", world["folder"] / "base.npz", "--reference", world["real"], *SIZE]
    assert said in refused(*pictures, "--label_frequencies", "held_out")


def test_a_noise_aware_classifier_guides_the_samples(world, run, refused):
    guide = world["folder"] / "guide"
    argv = ["--preset", str(world["folder"] / "tiny.yaml"), "--train_data_dir", str(world["real"]), "--noise_aware"]
    assert train_classifier.main([*argv, *SMALL, "--num_train_epochs", "1", "--output_dir", str(guide)]) == 0
    plain = evaluate_run(world, run, "unguided", "--num_samples", "60")
    with_it = ("--num_samples", "60", "--guide", str(guide), "--classifier_guidance_scale")
    still, pushed = (evaluate_run(world, run, f"guide-{scale}", *with_it, scale) for scale in ("0", "30"))
    assert still["distances"] == plain["distances"] and pushed["distances"] != plain["distances"]
    assert pushed["sampling"]["classifier_guidance_scale"] == 30
    assert pushed["sampling"]["guide"]["model"] == "guide"
    assert pushed["sampling"]["weights_sha256"] == plain["sampling"]["weights_sha256"]  # of the run, without its guide
    assert "can't guide" in refused(run, "--guide", world["classifier"])
    assert "needs --guide" in refused(run, "--classifier_guidance_scale", "2")


def test_samples_can_be_kept_and_judged_again(world, run):
    report = evaluate_run(world, run, "kept", "--save_images", "png", "--batch_size", "70")
    assert not list((world["folder"] / "kept").glob("samples-*"))
    assert len(list((world["folder"] / "kept" / "samples" / "3").iterdir())) == 60
    argv = ["--images", str(world["folder"] / "kept" / "samples"), "--reference", str(world["real"]), *SIZE]
    output = world["folder"] / "again"
    assert cli.main(["evaluate", *argv, "--classifier", str(world["classifier"]), "--output_dir", str(output)]) == 0
    again = json.loads((output / "evaluation.json").read_text())
    assert again["labels"]["per_class"] == report["labels"]["per_class"]
    assert again["distances"]["frechet_distance"] == pytest.approx(report["distances"]["frechet_distance"], rel=1e-4)


def test_json_is_all_that_goes_to_stdout(world, run, capsys):
    capsys.readouterr()
    report = evaluate_run(world, run, "as-json", "--json", "--num_samples", "60")
    assert json.loads(capsys.readouterr().out) == report
    assert cli.main(["evaluate", str(run), "--json", "--num_samples", "0"]) == 2
    assert capsys.readouterr().out == ""


def test_the_card_has_one_evaluation_the_last(world, run):
    for guidance in ("1.0", "2.0"):
        argv = [
            str(run),
            "--classifier",
            str(world["classifier"]),
            "--num_samples",
            "60",
            "--guidance_scale",
            guidance,
        ]
        assert cli.main(["evaluate", *argv]) == 0
    evaluate_run(
        world, run, "elsewhere-carded", "--guidance_scale", "1.5"
    )  # an experiment, which the card doesn't tell
    assert json.loads((run / "evaluation.json").read_text())["sampling"]["guidance_scale"] == 2.0
    card = (run / "README.md").read_text()
    assert card.count("## Evaluation") == 1 and "guidance 2.0" in card and "guidance 1.0)" not in card
    results = {result.metric_type: result for result in ModelCard(card).data.eval_results}
    report = json.loads((run / "evaluation.json").read_text())
    assert results["accuracy"].metric_value == pytest.approx(report["labels"]["accuracy"], abs=1e-6)
    assert results["accuracy"].metric_args["n"] == 60 and results["accuracy"].dataset_split == "held-out"
    argv = ["--preset", str(world["folder"] / "tiny.yaml"), "--output_dir", str(run)]
    assert train_ddpm.main(argv) == 0  # a finished run, started again
    assert (run / "README.md").read_text() == card
    assert "against 497 pictures of real (held-out)" in card and "test accuracy" in card


@pytest.mark.slow
def test_cas_tells_pictures_that_teach_from_those_that_do_not(world, monkeypatch):
    short = {"num_train_epochs": 6}
    monkeypatch.setattr("hwdiffusion.judge.parse", lambda script, argv: shortened(script, argv, short))
    images, labels = world["other"]
    images, labels = np.concatenate([images, images]), np.concatenate([labels, labels])  # more than were trained on
    good = report_of(world, images, labels, name="cas", flags=["--metrics", "cas", "labels"])
    assert good["cas"]["n"] == 700 and "distances" not in good
    assert good["cas"]["generated"] > 0.7 and good["cas"]["real"] > 0.7
    shuffled = np.random.default_rng(1).permutation(labels)  # the same folder: nothing of the first may be taken
    bad = report_of(world, images, shuffled, name="cas", flags=["--metrics", "cas"])
    assert bad["cas"]["generated"] < 0.4 and bad["cas"]["real"] == good["cas"]["real"]
    assert not list((world["folder"] / "cas").glob("cas-*"))
    # class names in another order are the same classes
    backwards = np.array([str(k) for k in range(9, -1, -1)])
    path = world["folder"] / "backwards.npz"
    np.savez(path, images=images, labels=9 - labels, class_names=backwards)
    argv = ["--images", str(path), "--reference", str(world["real"]), "--classifier", str(world["classifier"]), *SIZE]
    argv += ["--metrics", "cas", "labels", "--output_dir", str(world["folder"] / "backwards")]
    assert cli.main(["evaluate", *argv]) == 0
    again = json.loads((world["folder"] / "backwards" / "evaluation.json").read_text())
    assert again["cas"] == good["cas"] and again["labels"] == good["labels"]


def shortened(script, argv, settings):
    from hwdiffusion.config import parse

    config = parse(script, argv)
    vars(config.args).update(settings)
    return config


def test_a_sweep_measures_every_combination_once(world, run, monkeypatch, capsys):
    output = world["folder"] / "sweep"
    argv = [
        "sweep",
        str(run),
        "--classifier",
        str(world["classifier"]),
        "--num_samples",
        "100",
        "--num_inference_steps",
    ]
    argv += ["1", "3", "--guidance_scale", "1", "2", "--scheduler", "ddim", "euler", "--output_dir", str(output)]
    assert cli.main(argv) == 0
    rows = json.loads((output / "sweep.json").read_text())
    combined = [
        tuple(row["sampling"][key] for key in ("scheduler", "num_inference_steps", "guidance_scale")) for row in rows
    ]
    names = ("DDIMScheduler", "EulerDiscreteScheduler")
    assert combined == [(name, steps, scale) for name in names for steps in (1, 3) for scale in (1.0, 2.0)]
    assert all(row["n"] == 100 and row["images_per_second"] > 0 for row in rows)
    assert all((output / name).stat().st_size for name in ("sweep.md", "sweep.png", "sweep.svg"))
    assert len((output / "sweep.md").read_text().splitlines()) == 2 + 2 + 8
    monkeypatch.setattr(ClassConditionalPipeline, "__call__", None)  # nothing is drawn again
    capsys.readouterr()
    assert cli.main([*argv, "--guidance_scale", "1", "2", "2.0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": rows}  # and nothing else on stdout
    assert json.loads((output / "sweep.json").read_text()) == rows
    assert len((output / "sweep.md").read_text().splitlines()) == 2 + 2 + 8


def test_training_is_judged_and_the_best_pipeline_is_kept(world, capsys):
    preset = {
        "resolution": 8,
        "image_mode": "L",
        "unet": {**TINY_UNET, **PROJECTION},
        "num_inference_steps": 2,
        "noise_scheduler": {"prediction_type": "v_prediction"},
        "train_data_dir": str(world["real"]),
    }
    (world["folder"] / "judged.yaml").write_text(yaml.safe_dump(preset))
    run = world["folder"] / "judged"
    argv = ["--preset", str(world["folder"] / "judged.yaml"), "--output_dir", str(run), "--max_train_steps", "7"]
    argv += ["--evaluation_steps", "3", "--evaluation_samples", "60", "--learning_rate", "3e-2"]
    assert train_ddpm.main([*argv, "--evaluation_classifier", str(world["classifier"])]) == 0
    measured = [line for line in read_metrics(run / "metrics.jsonl") if "eval_frechet_distance" in line]
    assert [line["step"] for line in measured] == [3, 6, 7]
    assert len({line["eval_frechet_distance"] for line in measured}) == 3
    assert all(0 <= line["eval_label_accuracy"] <= 1 for line in measured)
    best = json.loads((run / "best" / "best.json").read_text())
    assert best.pop("judge")["n"] == 60
    nearest = min(measured, key=lambda line: line["eval_frechet_distance"])
    assert best == {name: nearest[name] for name in ("step", "eval_frechet_distance", "eval_label_accuracy")}
    assert ClassConditionalPipeline.from_pretrained(run / "best").num_classes == 10
    argv[3] = str(world["folder"] / "elsewhere")
    assert train_ddpm.main([*argv, "--evaluation_classifier", str(world["folder"] / "nowhere")]) == 2
    assert "nowhere can't be loaded" in capsys.readouterr().err and not (world["folder"] / "elsewhere").exists()


def test_an_unconditional_model_is_judged_without_labels(world, capsys):
    preset = {"resolution": 8, "image_mode": "L", "unet": TINY_UNET, "num_inference_steps": 2, "max_train_steps": 2,
              "train_data_dir": str(world["real"])}  # fmt: skip
    (world["folder"] / "unconditional.yaml").write_text(yaml.safe_dump(preset))
    run = world["folder"] / "unconditional"
    argv = ["--preset", str(world["folder"] / "unconditional.yaml"), "--output_dir", str(run)]
    argv += ["--evaluation_steps", "1", "--evaluation_samples", "60"]
    argv += ["--evaluation_classifier", str(world["classifier"])]
    assert train_ddpm.main([*argv, "--best_metric", "label_accuracy"]) == 2
    assert "--best_metric label_accuracy needs a model" in capsys.readouterr().err
    assert train_ddpm.main(argv) == 0
    assert "eval_label_accuracy" not in (run / "metrics.jsonl").read_text()
    report = evaluate_run(world, run / "checkpoint-2", "of-unconditional")
    assert "labels" not in report and report["reference"]["name"] == "real"


def test_without_a_classifier_one_is_trained_on_the_real_side_and_kept(world, run, monkeypatch, refused):
    trained, train = [], train_classifier.train
    monkeypatch.setattr(train_classifier, "train", lambda *args: trained.append(args) or train(*args))
    monkeypatch.setattr(
        "hwdiffusion.judge.parse", lambda script, argv: shortened(script, argv, {"max_train_steps": 2})
    )
    assert "at least 129 pictures to judge" in refused(run, "--num_samples", "100")
    assert not trained
    for _ in range(2):
        assert cli.main(["evaluate", str(run), "--num_samples", "150"]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    assert report == json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert len(trained) == 1 and len(list(run.glob("classifier-*"))) == 1
    assert report["extractor"]["trained_on"].startswith("700 training and 497 validation pictures")


@pytest.mark.slow
def test_two_processes_draw_the_samples_of_one(world, run):
    one = evaluate_run(world, run, "one-process")
    output = world["folder"] / "two-processes"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29581"]
    command += ["-m", "hwdiffusion.cli", "evaluate", str(run), "--classifier", str(world["classifier"])]
    command += ["--num_samples", "600", "--output_dir", str(output)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((output / "evaluation.json").read_text()) == one


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(world, capsys):
    def evaluate(*argv) -> str:
        output = world["folder"] / "refused"
        assert cli.main(["evaluate", *map(str, argv), "--output_dir", str(output)]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("hwdiffusion evaluate: error: ")
        assert not output.exists()
        return said

    return evaluate


def test_too_few_pictures_for_the_features(world, base, refused):
    few = world["folder"] / "few.npz"
    np.savez(few, images=world["other"][0][:30], labels=world["other"][1][:30])
    judge = ["--reference", world["real"], "--classifier", world["classifier"], *SIZE]
    assert "needs at least 33 pictures to judge, but there are 30" in refused("--images", few, *judge)
    said = refused("--images", few, *judge, "--metrics", "manifold", "labels")
    assert "density and coverage need at least 50 pictures to judge, but there are 30; give more, or leave" in said


def test_figures_that_need_more_pictures_are_left_out_with_a_word(world, capsys):
    report = report_of(world, *(part[:49] for part in world["other"]), name="forty-nine")
    assert "manifold" not in report and "distances" in report and "manifold" not in report["floor"]
    word = "precision, recall, density and coverage, which need 50 pictures a side"
    assert report["left_out"] == word and f"Left out: {word}." in capsys.readouterr().out
    report = report_of(world, *(part[:50] for part in world["other"]), name="fifty")
    assert report["manifold"]["n"] == 50 and "left_out" not in report


def test_label_metrics_without_labels(world, base, refused):
    path = world["folder"] / "unlabelled.npz"
    np.savez(path, images=world["other"][0])
    judge = ["--reference", world["real"], "--classifier", world["classifier"], *SIZE]
    assert "has no labels" in refused("--images", path, *judge, "--metrics", "labels")
    report = report_of(world, world["other"][0], name="without-labels")
    assert "labels" not in report and report["distances"] == base["distances"]


def test_a_classifier_of_other_classes(world, base, refused):
    path = world["folder"] / "letters.npz"
    names = np.array(list("abcdefghij"))
    np.savez(path, images=world["other"][0], labels=world["other"][1], class_names=names)
    judge = ["--reference", world["real"], "--classifier", world["classifier"], *SIZE]
    assert "but there are pictures of 'a'" in refused("--images", path, *judge)


def test_a_corrupt_picture_is_named_and_skipped_on_demand(world, base, refused):
    folder = world["folder"] / "corrupt"
    for index, image in enumerate(world["other"][0][:200]):
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    (folder / "077.png").write_bytes((folder / "077.png").read_bytes()[:40])
    judge = ["--images", folder, "--reference", world["real"], "--classifier", world["classifier"], *SIZE]
    assert "077.png can't be read" in refused(*judge)
    output = world["folder"] / "skipped"
    argv = ["evaluate", *map(str, judge), "--skip_bad_images", "--output_dir", str(output)]
    assert cli.main(argv) == 0
    assert json.loads((output / "evaluation.json").read_text())["n"] == 199


def test_what_can_not_be_loaded_or_chosen(world, base, run, refused):
    assert "nowhere can't be loaded: there is no such file or folder" in refused(world["folder"] / "nowhere")
    assert "neither a run folder nor a pipeline" in refused("nowhere")
    (world["folder"] / "thesis").mkdir(exist_ok=True)
    (world["folder"] / "thesis" / "thesis.tex").write_text("precious")
    argv = ["evaluate", str(run), "--classifier", str(world["classifier"])]
    assert cli.main([*argv, "--output_dir", str(world["folder"] / "thesis")]) == 2
    assert "needs --reference" in refused("--images", world["folder"] / "base.npz", *SIZE)
    judge = ["--images", world["folder"] / "base.npz", "--reference", world["real"], *SIZE]
    assert "nowhere can't be loaded: there is no such" in refused(*judge, "--classifier", world["folder"] / "nowhere")
    assert f"--classifier {run} is a pipeline, no classifier" in refused(*judge, "--classifier", run)
    judge[3] = world["folder"] / "reall"
    assert f"reall can't be loaded: there is no such file or folder; did you mean {world['real']}" in refused(*judge)
    assert "--scheduler must be one of" in refused(run, "--scheduler", "pndm")
    assert "did you mean manifold" in refused(run, "--metrics", "manifolds")
    assert "num_inference_steps must be" in refused(run, "--num_inference_steps", "5000")
    assert "not both" in refused(run, "--images", "x.npz")
    assert "--resolution is for --images" in refused(run, "--resolution", "8")
    assert "--guidance_scale must be at least 0" in refused(run, "--guidance_scale", "nan")
    assert "--guidance_interval must be two numbers" in refused(run, "--guidance_interval", "0.5")
    pictures = ["--images", world["folder"] / "base.npz", "--reference", world["real"], *SIZE]
    assert "are for samples of a run" in refused(*pictures, "--torch_dtype", "bfloat16")
    assert "are for samples of a run" in refused(*pictures, "--truncation", "1")
    assert "--guidance_interval must be two numbers" in refused(run, "--guidance_interval", "0.8", "0.2")
    assert "--device gpu is not there" in refused(run, "--device", "gpu")
    assert "--resolution must be" in refused("--images", "x.npz", "--resolution", "0")
    assert "--batch_size must be in 1 to 250" in refused(run, "--batch_size", "251")
    assert "did you mean --num_samples" in refused(run, "--num_sample", "5")
