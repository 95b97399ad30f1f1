"""The model cards of runs: written when a training ends, told of every evaluation, the same on the Hub.

A card is a `README.md` with metadata, as `huggingface_hub` has it. Training writes it anew, but for its evaluations,
which stay if they are of the same weights; an evaluation writes its own part alone, so that what else somebody has
written into a card stays.
"""

import json
import math
import re
import warnings
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import DatasetCard, EvalResult, ModelCard, ModelCardData

from hwdiffusion import __version__
from hwdiffusion.checkpoints import write_file
from hwdiffusion.config import REPOSITORY, Config
from hwdiffusion.figures import read_metrics
from hwdiffusion.metrics import wilson_interval
from hwdiffusion.pipelines import ClassConditionalGANPipeline, ClassConditionalPipeline
from hwdiffusion.report import as_table, how_drawn, in_part
from hwdiffusion.sources import EMBEDDED, few
from hwdiffusion.training_log import METRICS_FILE
from hwdiffusion.training_record import (
    command_in_words,
    hardware_in_words,
    read_record,
    time_in_words,
    without_path,
)


CARD_FILE = "README.md"
COPYING = 0.05  # a share of copies over it, where 0.01 is right, is taken as copying
_IMAGE_TASK = "unconditional-image-generation"  # the nearest that the Hub has
_EVALUATION, _END_OF_EVALUATION = "<!-- evaluation -->", "<!-- end of evaluation -->"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")

_CARD = """# {title}

{about}

## Use

{use}

{evaluation}

## Training

{training}

The whole configuration, which serves as a preset:

```yaml
{config}```

## Limits

{limits}
"""


# ---------------------------------------------------------------------------------------------------------------------
# The cards of what is trained
# ---------------------------------------------------------------------------------------------------------------------


def pipeline_card(config: Config, pipeline: DiffusionPipeline, data_summary: str, steps: int) -> str:
    """The card of a pipeline's run: what it is, how to load it, what it was trained on and how, what it can't.

    Args:
        data_summary: of the pictures, in a line.
        steps: how many it was trained for.
    """
    args = config.args
    names, most = list(pipeline.id2label.values()), pipeline.config.max_labels
    of_a_gan = isinstance(pipeline, ClassConditionalGANPipeline)
    said = _said_of_a_gan(config) if of_a_gan else _said_of_a_diffusion(pipeline)
    kind, example, row = f"An unconditional {said['kind']}", None, "label"
    if names:
        kind, example = f"A class-conditional {said['kind']} of {len(names)} classes", names[min(3, len(names) - 1)]
    if most > 1:  # neighbours among the names are often alike
        kind, example, row = f"{kind}, in sets of at most {most}", [names[0], names[-1]], "set of labels"
    size = "x".join(map(str, pipeline.image_size))
    about = (
        f"{kind}, on {said['space']}, for pictures of {size}, {_origin(args)} with `hwdiffusion` {__version__}.\n"
        f"{said['components']}"
    )
    if names:
        about += f" Its labels: {few(names, 30)}."
    cls, call = type(pipeline).__name__, f"labels=[{example!r}]" if names else ""
    use = _USE_OF_A_PIPELINE.format(
        carried=said["carried"], repository=_title(args), call=call, module="hwdiffusion.pipelines", pipeline=cls
    )
    length = f"{steps} {said['steps_of']} {_batch(args)} pictures a process; the weights are {_weights(args)}."
    drawn = f"The picture above has one row a {row}, drawn\n{said['drawn']}."
    limits = [
        f"It draws pictures of {size} such as it was trained on, of its labels alone, with their faults and biases."
        if names
        else f"It draws pictures of {size} such as it was trained on, with their faults and biases.",
        "What it was not evaluated for, under Evaluation, is not known of it: how well it obeys its labels, how far "
        "it is from real pictures, whether it copies.",
        "Whoever uses it has the licence of the pictures to heed, see Training.",
        "`trust_remote_code` runs the source that this repository carries: read it, or load a `revision` you know.",
        *said["limits"],
    ]
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag=_IMAGE_TASK,
        tags=["hwdiffusion", "gan" if of_a_gan else "diffusion", *(["class-conditional"] if names else [])],
        datasets=_datasets(args),
        base_model=_base_model(args),
    )
    return _filled(config, metadata, about, use, _training(config, data_summary, length, drawn), limits)


_USE_OF_A_PIPELINE = """With diffusers and transformers alone; the repository carries the source of its {carried},
which `trust_remote_code` runs:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repository}", trust_remote_code=True)
image = pipe({call}).images[0]
image.save("sample.png")
```

With the package, nothing of the repository is run:

```python
from {module} import {pipeline}

pipe = {pipeline}.from_pretrained("{repository}")
image = pipe({call}).images[0]
image.save("sample.png")
```"""


def _said_of_a_diffusion(pipeline: ClassConditionalPipeline) -> dict:
    config, limits, guidance = pipeline.config, [], "guidance"
    if pipeline.guidance_unet is not None:
        guidance = "autoguidance"
        limits = ["`guidance_scale` leads away from its `guidance_unet`, not from the null label."]
    elif pipeline.id2label and not config.has_null_label:
        limits = ["It was trained without label dropout, so classifier-free guidance is refused."]
    return {
        "kind": "diffusion model",
        "space": "pixels" if pipeline.vqvae is None else f"the latent space of its {type(pipeline.vqvae).__name__}",
        "components": "All components are stock [diffusers](https://github.com/huggingface/diffusers) classes.",
        "carried": "pipeline, one file",
        "steps_of": "steps of",
        "drawn": f"with the pipeline's defaults: {type(pipeline.scheduler).__name__}, "
        f"{config.default_num_inference_steps} steps, {guidance} {config.default_guidance_scale}"
        f"{in_part(config.default_guidance_interval)}",
        "limits": limits,
    }


def _said_of_a_gan(config: Config) -> dict:
    return {
        "kind": "generator",
        "space": "pixels",
        "components": "It is that of a Wasserstein GAN with gradient penalty (Gulrajani et al. 2017), and was trained "
        "against a\nprojection critic (Miyato and Koyama 2018).",
        "carried": "pipeline and of its generator, a file each",
        "steps_of": f"steps of the critic, {config.args.critic_steps} to one of the generator, each of",
        "drawn": "in one pass of the generator",
        "limits": ["It draws in one pass, so nothing of a call can trade time for quality."],
    }


def autoencoder_card(config: Config, vqvae, data_summary: str, steps: int) -> str:
    """The card of a `VQModel`'s run, with what was measured of its reconstructions at the end.

    Args:
        data_summary, steps: as of `pipeline_card`.
    """
    args, channels = config.args, vqvae.config.in_channels
    factor = 2 ** (len(vqvae.config.block_out_channels) - 1)
    codes, depth = vqvae.config.num_vq_embeddings, vqvae.config.latent_channels
    about = (
        f"An autoencoder with {codes} codes, a stock `VQModel` of "
        f"[diffusers](https://github.com/huggingface/diffusers), {_origin(args)} with\n`hwdiffusion` {__version__}: "
        f"from pictures (B, {channels}, H, W) in [-1, 1] to latents (B, {depth}, H/{factor}, W/{factor}) and back. "
        "It is the\nfirst stage of a latent diffusion model."
    )
    use = _USE_OF_AN_AUTOENCODER.format(repository=_title(args), channels=channels, size=_size(args))
    length = f"{steps} steps of {_batch(args)} pictures a process; the weights are {_weights(args)}."
    drawn = "Above, pictures that were held out, each beside what comes back of it."
    measured = _last_measured(Path(args.output_dir))
    section, results = "It was not measured how well it gives pictures back.", []
    if measured:
        rows = [(name, key, layout) for name, key, layout in _RECONSTRUCTION if key in measured]
        table = [f"| {name} | {layout.format(measured[key])} |" for name, key, layout in rows]
        of = f"The held-out pictures named under Training, each against what comes back of it, after step {steps}."
        section = "\n".join([of, "", "| | |", "|---|---|", *table])
        results = [
            _result(args, "image-to-image", key.removeprefix("eval_"), name, measured[key], "held-out", {})
            for name, key, _ in rows
        ]
    metadata = ModelCardData(
        library_name="diffusers",
        tags=["hwdiffusion", "vqgan" if args.discriminator_weight > 0 else "vq-vae", "autoencoder"],
        datasets=_datasets(args),
        model_name=_title(args),
        eval_results=results or None,
    )
    limits = [
        f"It has learned such pictures as it was trained on; pictures must have sides that {factor} divides.",
        "Whoever uses it has the licence of the pictures to heed, see Training.",
    ]
    return _filled(config, metadata, about, use, _training(config, data_summary, length, drawn), limits, section)


_USE_OF_AN_AUTOENCODER = """With diffusers:

```python
import torch
from diffusers import VQModel

vqvae = VQModel.from_pretrained("{repository}")
latents = vqvae.encode(torch.zeros(1, {channels}, {size})).latents
pictures = vqvae.decode(latents).sample
```

With the package, `hwdiffusion train ldm --vqvae` takes the name of this repository, and trains a diffusion model on
its latents; the scale of these is in its configuration."""

_RECONSTRUCTION = (
    ("PSNR (dB)", "eval_psnr", "{:.2f}"),
    ("SSIM", "eval_ssim", "{:.4f}"),
    ("codes used", "eval_codebook_used", "{:.0f}"),
    ("perplexity of the codes", "eval_codebook_perplexity", "{:.0f}"),
    ("Fréchet distance", "eval_frechet_distance", "{:.4f}"),
)


def _last_measured(run: Path) -> dict[str, float]:
    """What was measured last of reconstructions, from the run's log."""
    lines = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else []
    return next((line for line in reversed(lines) if "eval_psnr" in line), {})


def classifier_card(config: Config, model_config, data_summary: str, steps: int, judged: int) -> str:
    """The card of a classifier's run: what goes in, what comes out, how often it is right.

    Args:
        model_config: of the classifier, with its `test_accuracy`.
        data_summary, steps: as of `pipeline_card`.
        judged: the labels that the accuracy is of.
    """
    args = config.args
    names = [model_config.id2label[k] for k in sorted(model_config.id2label)]
    sets = model_config.problem_type == "multi_label_classification"
    turns = model_config.pretext == "rotation"
    shape = f"(B, {model_config.num_channels}, {', '.join(map(str, model_config.image_size))})"
    about = (
        "A stock `ResNetForImageClassification` of [transformers](https://github.com/huggingface/transformers), "
        f"trained from\nscratch with `hwdiffusion` {__version__}. "
        + ("It guides sampling." if model_config.noise_aware else "It judges generated pictures.")
    )
    inputs = f"`pixel_values` are `{shape}`: pictures in [-1, 1], scaled to that size."
    if model_config.noise_aware:
        kind = "latents, times their scaling factor," if model_config.latent else "pictures"
        inputs += (
            f" Here they are {kind} noised, and in the last channel the timestep, over the number of them in training."
        )
    classes = "by how many quarters a picture is turned" if turns else f"the classes {few(names, 20)}"
    if sets:
        classes += ", each by itself: a sigmoid, no softmax"
    use = _USE_OF_A_CLASSIFIER.format(
        repository=_title(args),
        shape=shape.replace("B", "1", 1),
        inputs=inputs,
        classes=classes,
        package="A pipeline of hwdiffusion takes it as `pipe.classifier`."
        if model_config.noise_aware
        else "`hwdiffusion evaluate RUN --classifier` takes the name of this repository, and judges samples by it.",
    )
    accuracy = model_config.test_accuracy
    low, high = wilson_interval(round(accuracy * judged), judged)
    of = "all labels of all sets, of a picture with k labels its k likeliest classes being taken, of " if sets else ""
    noised = ", at all levels of noise" if model_config.noise_aware else ""
    section = (
        f"Test accuracy: **{accuracy:.4f}** (95 % interval {low:.4f} to {high:.4f}, n = {judged}), on {of}the "
        f"validation pictures named\nbelow, which it has not seen in training{noised}."
    )
    told = {"n": judged, "confidence_interval_95": [round(low, 6), round(high, 6)]}
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["hwdiffusion", "resnet", *(["noise-aware"] if model_config.noise_aware else [])],
        datasets=_datasets(args),
        metrics=["accuracy"],
        model_name=_title(args),
        eval_results=[
            _result(args, "image-classification", "accuracy", "Test accuracy", accuracy, "held-out", told),
        ],
    )
    length = f"{steps} steps of {_batch(args)} pictures a process."
    limits = [
        "It tells apart how a picture is turned, and nothing else."
        if turns
        else "It knows its labels alone, and says of each how likely it is in a picture."
        if sets
        else "It knows its classes alone, and gives every picture one of them.",
        "Whoever uses it has the licence of the pictures to heed, see Training.",
    ]
    return _filled(config, metadata, about, use, _training(config, data_summary, length, ""), limits, section)


_USE_OF_A_CLASSIFIER = """With transformers:

```python
import torch
from transformers import ResNetForImageClassification

model = ResNetForImageClassification.from_pretrained("{repository}").eval()
logits = model(pixel_values=torch.zeros{shape}).logits
```

{inputs}
The outputs are {classes}. {package}"""


# ---------------------------------------------------------------------------------------------------------------------
# What cards have in common
# ---------------------------------------------------------------------------------------------------------------------


def _filled(
    config: Config, metadata: ModelCardData, about: str, use: str, training: str, limits: list[str], section: str = ""
) -> str:
    """The text of a card; `section` is its evaluation, if it was measured by training itself."""
    args = config.args
    if (Path(args.output_dir) / "samples.png").is_file() or not section:
        about += "\n\n![samples](samples.png)"
    body = _CARD.format(
        title=_title(args),
        about=about,
        use=use,
        evaluation=_as_section(section or _NOT_EVALUATED),
        training=training,
        config=yaml.safe_dump(settings_without_paths(config.to_dict()), sort_keys=False),
        limits="\n".join(f"- {limit}" for limit in limits),
    )
    return without_tokens(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


_NOT_EVALUATED = "It has not been evaluated yet: `hwdiffusion evaluate` does so, and writes what it finds here."


def _title(args) -> str:
    return Path(args.output_dir).resolve().name


def _size(args) -> str:
    return f"{args.resolution[0]}, {args.resolution[-1]}"


def _batch(args) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps


def _weights(args) -> str:
    return "averaged over training (EMA)" if args.use_ema else "those of the last step"


def _origin(args) -> str:
    teacher = getattr(args, "teacher", None)
    return "trained from scratch" if teacher is None else f"distilled from {Path(teacher).name}"


def _on_hub(name: str | None) -> bool:
    """Whether that names something on the Hub, not something here."""
    return name is not None and re.fullmatch(REPOSITORY, name) is not None and not Path(name).exists()


def _datasets(args) -> list[str] | None:
    return [args.dataset_name] if args.train_data_dir is None and _on_hub(args.dataset_name) else None


def _base_model(args) -> str | None:
    teacher = getattr(args, "teacher", None)
    return teacher if _on_hub(teacher) else None


def _training(config: Config, data_summary: str, length: str, drawn: str) -> str:
    """What was trained on, how long, on what, and by which command."""
    args, run = config.args, Path(config.args.output_dir)
    licence = licence_of(args)
    heeded = f"Their licence: {licence}." if licence else "Their licence is not stated (`--data_license` states it)."
    paragraphs = [f"{_data_in_words(args)}: {data_summary}. {heeded}", f"{length} {drawn}".strip()]
    record = read_record(run)
    first = read_record(run / "first-stage") if config.script == "train_ldm" and args.vqvae is None else {}
    if "seconds" in record:
        both = record["seconds"] + first.get("seconds", 0.0)
        took = f"It took {time_in_words(both)}"
        if "seconds" in first:
            took += f", of which {time_in_words(first['seconds'])} for the autoencoder,"
        if "hardware" in record:
            took += f" on {hardware_in_words(record['hardware'])}"
        versions = record.get("versions", {})
        by = f", with torch {versions['torch']}" if "torch" in versions else ""
        given = [
            what for what, flag in (("autoencoder", "vqvae"), ("teacher", "teacher")) if getattr(args, flag, None)
        ]
        apart = f" The training of the {given[0]}, which was given, isn't counted." if given else ""
        paragraphs.append(f"{took}{by}.{apart}")
    if record.get("commands"):
        processes = record.get("hardware", {}).get("processes", 1)
        on_cpu = record.get("hardware", {}).get("device") == "cpu"
        commands = "\n".join(command_in_words(command, processes, on_cpu) for command in record["commands"])
        ones = "The command" if len(record["commands"]) == 1 else "The commands, one after another"
        paragraphs.append(f"{ones}:\n\n```bash\n{commands}\n```")
    return "\n\n".join(paragraphs)


def _data_in_words(args) -> str:
    if args.train_data_dir is not None:
        return f"Pictures from a folder, `{Path(args.train_data_dir).resolve().name}`"
    if args.dataset_name in EMBEDDED:
        return EMBEDDED[args.dataset_name]["about"]
    if _on_hub(args.dataset_name):
        return f"[{args.dataset_name}](https://huggingface.co/datasets/{args.dataset_name})"
    return f"The data set `{without_path(args.dataset_name)}`"


def licence_of(args) -> str | None:
    """The licence of the pictures: what the user says, of what is embedded what is known, of a data set of the Hub
    what its page there says, if that can be reached."""
    if args.data_license is not None:
        return args.data_license
    if args.train_data_dir is None and args.dataset_name in EMBEDDED:
        return EMBEDDED[args.dataset_name]["license"]
    if _datasets(args) is None:
        return None
    try:
        said = DatasetCard.load(args.dataset_name, ignore_metadata_errors=True).data.to_dict().get("license")
    except Exception:  # no network, no such page: whatever it is, a card without it is better than none
        return None
    return ", ".join(map(str, said)) if isinstance(said, list) else said


def settings_without_paths(settings: dict) -> dict:
    """A run's configuration without what tells of the machine: of paths the last part."""
    named = settings.get(settings.get("script"), {})
    for key in ("train_data_dir", "vqvae", "teacher", "evaluation_classifier"):  # also those beside the run
        if isinstance(named, dict) and named.get(key) is not None and Path(named[key]).exists():
            named[key] = Path(named[key]).resolve().name

    def told(value):
        if isinstance(value, dict):
            return {key: told(item) for key, item in value.items()}
        if isinstance(value, list):
            return [told(item) for item in value]
        return without_path(value) if isinstance(value, str) else value

    return told(settings)


def without_tokens(text: str) -> str:
    """The same text with what looks like a token of the Hub made unreadable."""
    return _TOKEN.sub("hf_***", text)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluations
# ---------------------------------------------------------------------------------------------------------------------


def update_card(run: Path, weights: str):
    """Write what a run has been evaluated on into its card, and leave the rest of it as it is.

    Args:
        weights: the digest of the present ones, of which evaluations are told.
    """
    path = run / CARD_FILE
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_file(path, with_evaluations(card, list(evaluations_of(run, weights).values()), run.resolve().name))


def evaluations_of(run: Path, weights: str) -> dict[Path, dict]:
    """The evaluations in a run's folder that are of those weights, by their files: its own, then those of files of
    label sets."""
    found = {}
    for path in (run / "evaluation.json", *sorted(run.glob("evaluation-*/evaluation.json"))):
        if path.is_file():
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError:  # cut off, which must not end a training at its last step
                warnings.warn(f"{path} is no JSON, and left out of the card", stacklevel=2)
                continue
            if (report.get("sampling") or {}).get("weights_sha256") == weights:
                found[path] = report
    return found


def with_evaluations(card: str, reports: list[dict], name: str) -> str:
    """A card with these evaluations, in its text and in its metadata (as `model-index`), in place of those before.

    Args:
        name: of the model, for the metadata.
    """
    model_card = ModelCard(card, ignore_metadata_errors=True) if card.startswith("---") else None
    text = card if model_card is None else model_card.text
    before, after = text, ""
    if _EVALUATION in text and _END_OF_EVALUATION in text:
        before, rest = text.split(_EVALUATION, 1)
        after = rest.split(_END_OF_EVALUATION, 1)[1].strip("\n")
    section = "\n\n".join(map(_evaluation_in_words, reports)) or _NOT_EVALUATED
    text = f"{before.rstrip()}\n\n{_as_section(section)}\n" + (f"\n{after}\n" if after else "")
    if model_card is None:
        return text.lstrip("\n")
    model_card.data.model_name = name if reports else None
    model_card.data.eval_results = [result for report in reports for result in eval_results(report)] or None
    return f"---\n{model_card.data.to_yaml()}\n---\n\n{text.lstrip()}"


def _as_section(evaluation: str) -> str:
    return f"{_EVALUATION}\n## Evaluation\n\n{evaluation}\n{_END_OF_EVALUATION}"


def _evaluation_in_words(report: dict) -> str:
    file = (report["sampling"].get("label_sets") or {}).get("file")
    head = [] if file is None else [f"### The sets of {file}"]
    return "\n\n".join([*head, as_table(report, markdown=True), _copying_in_words(report)])


def _copying_in_words(report: dict) -> str:
    scores = report.get("memorisation")
    if not scores:
        return "**Copies**: whether samples are copies of training pictures was not measured here."
    told = [
        f"{of['ratio']:.3f} times as far by {space}, and {of['share_of_copies']:.1%} are nearer than all but 1 % of "
        "those"
        for space, of in scores.items()
    ]
    copies = any(of["share_of_copies"] > COPYING for of in scores.values())
    found = "which looks like copying" if copies else "which doesn't look like copying"
    return (
        f"**Copies**: against held-out pictures, samples are from the nearest training picture {'; '.join(told)}: "
        f"{found} (over {COPYING:.0%} would)."
    )


def eval_results(report: dict) -> list[EvalResult]:
    """Every figure of an evaluation as the Hub's metadata have it; with each its n, extractor and way of sampling, and
    what real pictures reach."""
    extractor, reference, sampling = report["extractor"], report["reference"], report["sampling"]
    floor, inception = report["floor"], extractor["extractor"] == "inception" and extractor["model"] == "standard"
    common = {"extractor": f"{extractor['extractor']} {extractor['model']}", "sampling": how_drawn(sampling)}
    file = (sampling.get("label_sets") or {}).get("file")
    if file is not None:
        common |= {"label_sets": file, "seeds": sampling["label_sets"]["seeds"]}
    results = []

    def add(kind: str, name: str, value: float | None, real: float | None, **more):
        if value is None or not math.isfinite(value):
            return
        told = {"n": report["n"], **common, **more}
        if real is not None and math.isfinite(real):
            told["real"] = round(real, 6)
        results.append(
            EvalResult(
                task_type=_IMAGE_TASK,
                task_name="Image generation",
                dataset_type=reference["name"],
                dataset_name=reference["name"],
                dataset_split=reference["split"],
                dataset_args={"n": reference["n"]},
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 6),
                metric_args=told,
            )
        )

    if "labels" in report:
        labels, real = report["labels"], floor.get("labels", {})
        value, interval, count = labels["accuracy"], labels["accuracy_95"], {"labels": labels["n"]}
        if "over_seeds" in labels:
            value, interval = labels["over_seeds"]["mean"], labels["over_seeds"]["mean_95"]
        if "by_size" not in labels or "over_seeds" in labels:  # labels of one picture aren't independent
            count["confidence_interval_95"] = [round(end, 6) for end in interval]
        add("accuracy", "Label accuracy", value, real.get("accuracy"), **count)
        add(
            "worst_class_accuracy", "Label accuracy of the worst class", labels["worst_class"], real.get("worst_class")
        )
        add("whole_sets", "Share of sets seen as a whole", labels.get("whole_sets"), real.get("whole_sets"))
    if "distances" in report:
        ours, real = report["distances"], floor.get("distances", {})
        # the usual names are for the usual network alone
        names = ("fid", "FID"), ("kid", "KID")
        if not inception:
            names = ("frechet_distance", "Fréchet distance"), ("kernel_distance", "Kernel distance")
        for (kind, name), key in zip(names, ("frechet_distance", "kernel_distance")):
            add(kind, name, ours[key], real.get(key))
    if "manifold" in report:
        ours, real = report["manifold"], floor.get("manifold", {})
        for key in ("precision", "recall", "density", "coverage"):
            add(key, key.capitalize(), ours[key], real.get(key), n=ours["n"])
    for space, scores in report.get("memorisation", {}).items():
        add(
            "nearest_training_ratio",
            f"Distance to the nearest training picture, ratio ({space})",
            scores["ratio"],
            1.0,
        )
        add("share_of_copies", f"Share of copies ({space})", scores["share_of_copies"], 0.01)
    if "cas" in report:
        scores = report["cas"]
        add("cas", "Classification accuracy score", scores["generated"], scores["real"], n=scores["n"])
    return results


def _result(args, task: str, kind: str, name: str, value: float, split: str, told: dict) -> EvalResult:
    """A figure that training itself has measured."""
    data = args.dataset_name if args.train_data_dir is None else Path(args.train_data_dir).resolve().name
    return EvalResult(
        task_type=task,
        dataset_type=without_path(data),
        dataset_name=without_path(data),
        dataset_split=split,
        metric_type=kind,
        metric_name=name,
        metric_value=round(value, 6),
        metric_args=told or None,
    )
