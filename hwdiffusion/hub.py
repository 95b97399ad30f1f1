"""The model cards of runs, and their way to the Hub."""

import json
import re
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData

from hwdiffusion import InputError, RunError, __version__
from hwdiffusion.config import REPOSITORY, Config
from hwdiffusion.pipelines import ClassConditionalGANPipeline, ClassConditionalPipeline
from hwdiffusion.samples import weights_digest
from hwdiffusion.sources import few


_CARD = """---
{metadata}
---

# {title}

{what}, {origin} with `hwdiffusion` {version}.
{components}

![samples](samples.png)

## Use

With diffusers and transformers alone; the repository carries the source of its {carried}, which
`trust_remote_code` runs:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repository}", trust_remote_code=True)
image = pipe({call}).images[0]
```

With the package, nothing of the repository is run:

```python
from hwdiffusion.pipelines import {pipeline}

pipe = {pipeline}.from_pretrained("{repository}")
```

## Training

{data}.

{steps} {steps_of} {batch} pictures a process; the weights are {weights}. The picture above has one row a {row}, drawn
{drawn}.

The whole configuration:

```yaml
{config}```
"""


_CLASSIFIER_CARD = """---
{metadata}
---

# {title}

A stock `ResNetForImageClassification` of [transformers](https://github.com/huggingface/transformers), trained from
scratch with `hwdiffusion` {version}. {purpose}

Test accuracy: **{accuracy:.4f}** (95 % interval {low:.4f} to {high:.4f}), on {judged} the validation pictures named
below, which it has not seen in training{noised}.

## Inputs

`pixel_values` are `{shape}`: pictures in [-1, 1], scaled to that size. {inputs}
The outputs are {classes}.

## Training

{data}; {steps} steps of {batch} pictures a process. The whole configuration:

```yaml
{config}```
"""


def write_classifier_card(config: Config, model_config, interval: tuple[float, float], steps: int):
    """Write `README.md` into a classifier's folder: what it is, what goes in, how often it is right."""
    args, output_dir = config.args, Path(config.args.output_dir)
    names = [model_config.id2label[k] for k in sorted(model_config.id2label)]
    sets = model_config.problem_type == "multi_label_classification"
    kind = "latents, times their scaling factor," if model_config.latent else "pictures"
    inputs = f"Here they are {kind} noised, and in the last channel the timestep, over the number of them in training."
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="image-classification", tags=["hwdiffusion"], metrics=["accuracy"]
    )
    card = _CLASSIFIER_CARD.format(
        metadata=metadata.to_yaml(),
        title=output_dir.resolve().name,
        version=__version__,
        purpose="It guides sampling." if model_config.noise_aware else "It judges generated pictures.",
        accuracy=model_config.test_accuracy,
        judged="all labels of all sets, of a picture with k labels its k likeliest classes being taken, of"
        if sets
        else "",
        noised=", at all levels of noise" if model_config.noise_aware else "",
        low=interval[0],
        high=interval[1],
        shape=f"(B, {model_config.num_channels}, {', '.join(map(str, model_config.image_size))})",
        inputs=inputs if model_config.noise_aware else "",
        classes="by how many quarters a picture is turned"
        if model_config.pretext == "rotation"
        else f"the classes {few(names, 20)}" + (", each by itself: a sigmoid, no softmax" if sets else ""),
        data=model_config.trained_on,
        steps=steps,
        batch=args.train_batch_size * args.gradient_accumulation_steps,
        config=yaml.safe_dump(_without_paths(config.to_dict()), sort_keys=False),
    )
    ModelCard(card).save(output_dir / "README.md")


def _without_paths(settings: dict) -> dict:
    flags = settings[settings["script"]]
    for key in ("train_data_dir", "vqvae", "teacher", "evaluation_classifier"):  # a whole path would tell of a machine
        if flags.get(key) is not None and Path(flags[key]).exists():
            flags[key] = Path(flags[key]).name
    return settings


def write_model_card(config: Config, pipeline: DiffusionPipeline, data_summary: str, steps: int):
    """Write `README.md` into the run folder: what the model is, how to load it, what it was trained on and how."""
    args, output_dir = config.args, Path(config.args.output_dir)
    names = list(pipeline.id2label.values())
    of_a_gan = isinstance(pipeline, ClassConditionalGANPipeline)
    said = _said_of_a_gan(config) if of_a_gan else _said_of_a_diffusion(pipeline)
    model, most = said.pop("kind"), pipeline.config.max_labels
    kind, example, row = f"An unconditional {model}", None, "label"
    if names:
        kind, example = f"A class-conditional {model} of {len(names)} classes", names[min(3, len(names) - 1)]
    if most > 1:  # neighbours among the names are often alike
        kind, example, row = f"{kind}, in sets of at most {most}", [names[0], names[-1]], "set of labels"
    on_hub = args.dataset_name is not None and "/" in args.dataset_name
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["hwdiffusion", "gan" if of_a_gan else "diffusion", *(["class-conditional"] if names else [])],
        datasets=[args.dataset_name] if on_hub else None,
    )
    card = _CARD.format(
        metadata=metadata.to_yaml(),
        title=output_dir.resolve().name,
        what=f"{kind}, on {said.pop('space')}, for pictures of {'x'.join(map(str, pipeline.image_size))}",
        origin=_origin(args),
        pipeline=type(pipeline).__name__,
        version=__version__,
        repository=output_dir.resolve().name,
        call=f"labels=[{example!r}]" if names else "",
        row=row,
        data=data_summary,
        steps=steps,
        batch=args.train_batch_size * args.gradient_accumulation_steps,
        weights="averaged over training (EMA)" if args.use_ema else "those of the last step",
        **said,
        config=yaml.safe_dump(_without_paths(config.to_dict()), sort_keys=False),
    )
    evaluation = _evaluation_of(output_dir, type(pipeline))
    ModelCard(card).save(output_dir / "README.md")
    if evaluation is not None:
        add_to_card(output_dir, evaluation)


def _origin(args) -> str:
    teacher = getattr(args, "teacher", None)
    return "trained from scratch" if teacher is None else f"distilled from {Path(teacher).name}"


def _said_of_a_diffusion(pipeline: ClassConditionalPipeline) -> dict[str, str]:
    config = pipeline.config
    return {
        "kind": "diffusion model",
        "space": "pixels" if pipeline.vqvae is None else f"the latent space of its {type(pipeline.vqvae).__name__}",
        "components": "All components are stock [diffusers](https://github.com/huggingface/diffusers) classes.",
        "carried": "pipeline, one file",
        "steps_of": "steps of",
        "drawn": f"with the pipeline's defaults: {type(pipeline.scheduler).__name__}, "
        f"{config.default_num_inference_steps} steps, guidance {config.default_guidance_scale}",
    }


def _said_of_a_gan(config: Config) -> dict[str, str]:
    return {
        "kind": "generator",
        "space": "pixels",
        "components": "It is that of a Wasserstein GAN with gradient penalty (Gulrajani et al. 2017), and was trained "
        "against a\nprojection critic (Miyato and Koyama 2018).",
        "carried": "pipeline and of its generator, a file each",
        "steps_of": f"steps of the critic, {config.args.critic_steps} to one of the generator, each of",
        "drawn": "in one pass of the generator",
    }


_EVALUATION, _END_OF_EVALUATION = "<!-- evaluation -->", "<!-- end of evaluation -->"


def add_to_card(run: Path, evaluation: str):
    """Put an evaluation into a run's card, in the place of the one before."""
    path = run / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, after = card, ""
    if _EVALUATION in card and _END_OF_EVALUATION in card:
        before, rest = card.split(_EVALUATION, 1)
        after = rest.split(_END_OF_EVALUATION, 1)[1].strip("\n")
    section = f"{_EVALUATION}\n## Evaluation\n\n{evaluation}\n{_END_OF_EVALUATION}\n"
    part = path.with_name("README.md.part")
    part.write_text(f"{before.rstrip()}\n\n{section}{after}", encoding="utf-8")
    part.replace(path)


def _evaluation_of(run: Path, cls: type) -> str | None:
    """The evaluation in a run's card, if it is of these very weights."""
    card, report = run / "README.md", run / "evaluation.json"
    if not card.is_file() or not report.is_file():
        return None
    evaluated = json.loads(report.read_text(encoding="utf-8"))["sampling"]["weights_sha256"]
    text = card.read_text(encoding="utf-8")
    # of the weights that are saved: those in memory are not averaged
    if evaluated != weights_digest(cls.from_pretrained(run)) or _END_OF_EVALUATION not in text:
        return None
    section = text.split(_EVALUATION, 1)[1].split(_END_OF_EVALUATION, 1)[0]
    return section.strip().removeprefix("## Evaluation").strip()


def push(run: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a run's pipeline or classifier with its card, without checkpoints, to the Hub; the address is returned.

    Args:
        run: a run folder.
        repo_id: `USER/NAME`; made if it isn't there.

    Raises:
        InputError: the folder holds no finished pipeline or classifier with a card.
        RunError: the Hub refuses, with what it said; the run is as it was.
    """
    folder = Path(run)
    whole = (folder / "model_index.json").is_file() or (folder / "config.json").is_file()
    if not whole or not (folder / "README.md").is_file():
        raise InputError(f"{run} is no finished run: model_index.json or config.json, and README.md, must be in it")
    if not re.fullmatch(REPOSITORY, repo_id):
        raise InputError(f"name the repository as USER/NAME, not {repo_id!r}")
    try:
        return _upload(folder, repo_id, private)
    except Exception as error:  # of the Hub, the network, or the client's own checks, which have no common class
        raise RunError(refusal(run, error)) from error


def refusal(what: str | Path, error: Exception) -> str:
    """What an upload was answered, in a sentence."""
    reason = " ".join(str(error).split())[:200]
    return f"the Hub did not take {what}: {reason}; the run is whole, and can be pushed again"


def _upload(run: Path, repo_id: str, private: bool) -> str:
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    card = (run / "README.md").read_text(encoding="utf-8")
    card = re.sub(r'from_pretrained\("[^"]+"', f'from_pretrained("{repo_id}"', card)
    patterns = [
        "model_index.json",
        "pipeline_*.py",
        "README.md",
        "samples.png",
        "loss.png",
        "config.yaml",
        "evaluation.json",
        "config.json",
        "model*.safetensors*",
        *(f"{name}/*" for name in ("unet", "scheduler", "vqvae", "classifier", "guidance_unet", "generator")),
    ]
    paths = sorted({path.relative_to(run).as_posix() for pattern in patterns for path in run.glob(pattern)})
    contents = {path: run / path for path in paths} | {"README.md": card.encode()}
    if "config.yaml" in contents:
        settings = _without_paths(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
        contents["config.yaml"] = yaml.safe_dump(settings, sort_keys=False).encode()
    operations = [CommitOperationAdd(path, content) for path, content in contents.items()]
    api.create_commit(repo_id, operations, commit_message="Upload pipeline")
    return f"{api.endpoint}/{repo_id}"
