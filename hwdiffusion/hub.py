"""The model card of a run, and its way to the Hub."""

from pathlib import Path

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, ModelCardData

from hwdiffusion import __version__
from hwdiffusion.config import Config


_CARD = """---
{metadata}
---

# {title}

{what}, trained from scratch with `hwdiffusion` {version}.
All components are stock [diffusers](https://github.com/huggingface/diffusers) classes.

![samples](samples.png)

## Use

With diffusers alone; the repository carries the source of its pipeline, one file, which `trust_remote_code` runs:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repository}", trust_remote_code=True)
image = pipe({call}).images[0]
```

With the package, nothing of the repository is run:

```python
from hwdiffusion.pipelines import ClassConditionalPipeline

pipe = ClassConditionalPipeline.from_pretrained("{repository}")
```

## Training

{data}.

{steps} steps of {batch} pictures a process; the weights are {weights}. The picture above has one row a label, drawn
with the pipeline's defaults: {scheduler}, {inference_steps} steps, guidance {guidance}.

The whole configuration:

```yaml
{config}```
"""


def write_model_card(config: Config, pipeline: DiffusionPipeline, data_summary: str, steps: int):
    """Write `README.md` into the run folder: what the model is, how to load it, what it was trained on and how."""
    args, output_dir = config.args, Path(config.args.output_dir)
    names = list(pipeline.id2label.values())
    space = "pixels" if pipeline.vqvae is None else "the latent space of a VQModel"
    kind = (
        f"A class-conditional diffusion model of {len(names)} classes" if names else "An unconditional diffusion model"
    )
    on_hub = args.dataset_name is not None and "/" in args.dataset_name
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["hwdiffusion", "diffusion", *(["class-conditional"] if names else [])],
        datasets=[args.dataset_name] if on_hub else None,
    )
    settings = config.to_dict()
    flags = settings[config.script]
    for key in ("train_data_dir", "vqvae"):  # a whole path would tell of a machine
        if flags.get(key) is not None and Path(flags[key]).exists():
            flags[key] = Path(flags[key]).name
    card = _CARD.format(
        metadata=metadata.to_yaml(),
        title=output_dir.resolve().name,
        what=f"{kind}, on {space}, for pictures of {'x'.join(map(str, pipeline.image_size))}",
        version=__version__,
        repository=output_dir.resolve().name,
        call=f"labels=[{names[min(3, len(names) - 1)]!r}]" if names else "",
        data=data_summary,
        steps=steps,
        batch=args.train_batch_size * args.gradient_accumulation_steps,
        weights="averaged over training (EMA)" if args.use_ema else "those of the last step",
        scheduler=type(pipeline.scheduler).__name__,
        inference_steps=pipeline.config.default_num_inference_steps,
        guidance=pipeline.config.default_guidance_scale,
        config=yaml.safe_dump(settings, sort_keys=False),
    )
    ModelCard(card).save(output_dir / "README.md")


def push(run: Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload a run's pipeline, card and samples, without checkpoints, to the Hub; the address is returned.

    Args:
        run: a run folder.
        repo_id: `USER/NAME`; made if it isn't there.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    card = (run / "README.md").read_text(encoding="utf-8")
    own_name = f'from_pretrained("{run.resolve().name}"'
    (run / "README.md").write_text(card.replace(own_name, f'from_pretrained("{repo_id}"'), encoding="utf-8")
    files = ["model_index.json", "pipeline_*.py", "README.md", "samples.png", "loss.png", "config.yaml"]
    folders = ["unet/*", "scheduler/*", "vqvae/*"]
    api.upload_folder(
        repo_id=repo_id, folder_path=run, allow_patterns=files + folders, commit_message="Upload pipeline"
    )
    return f"{api.endpoint}/{repo_id}"
