"""The end of a run: its card, and its way to the Hub."""

import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from hwdiffusion import InputError, RunError
from hwdiffusion.checkpoints import COMPONENTS, write_file
from hwdiffusion.config import REPOSITORY
from hwdiffusion.model_card import (
    CARD_FILE,
    evaluations_of,
    settings_without_paths,
    with_evaluations,
    without_tokens,
)
from hwdiffusion.models import PIPELINES, load_pipeline
from hwdiffusion.samples import weights_digest


# What of a run folder goes to the Hub: a pipeline with its source, an autoencoder or a classifier; never checkpoints.
PATTERNS = (
    "model_index.json",
    "pipeline_*.py",
    CARD_FILE,
    "samples.png",
    "loss.png",
    "config.yaml",
    "evaluation.json",
    "evaluation-*/evaluation.json",
    "config.json",
    "model*.safetensors*",
    "diffusion_pytorch_model*.safetensors*",
    *(f"{name}/*" for name in (*COMPONENTS, "classifier")),
)


def finish(trainer, card: Callable[[], str]):
    """Write the card of a run that is over, and upload it all if that was asked for; the main process does.

    Args:
        trainer: of the run.
        card: makes the card's text, but for what `hwdiffusion evaluate` has found of the same weights, which stays.

    Raises:
        RunError: the Hub refuses; the run is whole.
    """
    args = trainer.args
    if not trainer.is_main_process or args.dry_run:
        return
    run = Path(args.output_dir)
    reports = list(evaluations_of_present_weights(run).values())
    text = card()
    write_file(run / CARD_FILE, with_evaluations(text, reports, run.resolve().name) if reports else text)
    if args.push_to_hub:
        print(push(run, args.hub_model_id, args.hub_private))


def evaluations_of_present_weights(run: Path) -> dict[Path, dict]:
    """The evaluations in a run's folder that are of the weights that are saved in it, by their files."""
    files = any(run.glob(pattern) for pattern in ("evaluation.json", "evaluation-*/evaluation.json"))
    if not files or not (run / "model_index.json").is_file():
        return {}
    # those that are saved: the ones in memory are not averaged
    return evaluations_of(run, weights_digest(load_pipeline(str(run), "cpu", PIPELINES)))


def push(run: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a run's pipeline, autoencoder or classifier with its card, without checkpoints, to the Hub.

    Pushed again, what has changed is uploaded, and what the run no longer has goes; nothing is where nothing changed.

    Args:
        run: a run folder.
        repo_id: `USER/NAME`; made if it isn't there.

    Returns:
        The address of the repository.

    Raises:
        InputError: the folder holds nothing finished with a card; the name is none; nobody is logged in.
        RunError: the Hub refuses, with what it said; the run is as it was.
    """
    folder = Path(run)
    whole = (folder / "model_index.json").is_file() or (folder / "config.json").is_file()
    if not whole or not (folder / CARD_FILE).is_file():
        raise InputError(
            f"{run} is no finished run: model_index.json or config.json, and README.md, must be in it; name the run "
            "folder of a training that has ended"
        )
    if not re.fullmatch(REPOSITORY, repo_id):
        raise InputError(f"name the repository as USER/NAME, not {repo_id!r}")
    if get_token() is None:
        raise InputError("a push needs you to be logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    contents = contents_to_push(folder, repo_id)  # a flaw of the run's is said before anything is made
    try:
        return _upload(folder, contents, repo_id, private)
    except Exception as error:  # of the Hub, the network, or the client's own checks, which have no common class
        raise RunError(refusal(run, error)) from error


def refusal(what: str | Path, error: BaseException) -> str:
    """What an upload was answered, in a sentence: what the client says, with what it says of the cause, without
    tokens and signatures of addresses."""
    said, seen = [], error
    while seen is not None and len(said) < 3:
        said.append(" ".join(str(seen).split())[:200] or type(seen).__name__)
        seen = seen.__cause__
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", ": ".join(said))  # a signed address is a key for a while
    return f"the Hub did not take {what}: {without_tokens(text)}; the run is whole, and can be pushed again"


def _upload(run: Path, contents: dict[str, Path | bytes], repo_id: str, private: bool) -> str:
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    operations: list = [CommitOperationAdd(path, content) for path, content in contents.items()]
    for path in api.list_repo_files(repo_id):
        if path not in contents and any(fnmatch(path, pattern) for pattern in PATTERNS):
            operations.append(CommitOperationDelete(path))  # of an earlier push
    api.create_commit(repo_id, operations, commit_message=f"Upload {run.resolve().name}")
    return f"{api.endpoint}/{repo_id}"


def contents_to_push(run: Path, repo_id: str) -> dict[str, Path | bytes]:
    """What goes to the Hub, by its path there: files of the run, or what stands in their place.

    The card names the repository and tells the evaluations of the present weights; it and the configuration tell
    nothing of the machine.
    """
    paths = sorted({path.relative_to(run).as_posix() for pattern in PATTERNS for path in run.glob(pattern)})
    contents: dict[str, Path | bytes] = {path: run / path for path in paths if (run / path).is_file()}
    card = (run / CARD_FILE).read_text(encoding="utf-8")
    if "model_index.json" in contents:
        reports = evaluations_of_present_weights(run)
        for path in [path for path in contents if path.endswith("evaluation.json")]:
            if run / path in reports:
                contents[path] = json.dumps(reports[run / path], indent=2, ensure_ascii=False).encode()
            else:
                del contents[path]  # of weights that the run had before
        if reports or "<!-- evaluation -->" in card:
            card = with_evaluations(card, list(reports.values()), repo_id.split("/")[-1])
    card = re.sub(r'from_pretrained\("[^"/]+"', f'from_pretrained("{repo_id}"', card)
    contents[CARD_FILE] = without_tokens(card).encode()
    if "config.yaml" in contents:
        settings = settings_without_paths(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
        contents["config.yaml"] = without_tokens(yaml.safe_dump(settings, sort_keys=False)).encode()
    return contents
