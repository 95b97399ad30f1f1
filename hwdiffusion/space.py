"""A Space of the Hub that runs the demo on a pushed run.

It carries this package itself, as it is installed here, so that it runs what the run was tried with.
"""

import importlib.metadata
import platform
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, RepoCard, SpaceCardData
from packaging.requirements import Requirement

import hwdiffusion
from hwdiffusion import InputError, RunError, pipelines, presets
from hwdiffusion.hub import refusal


_APP = '''"""The demo of {repository}."""

import os

from hwdiffusion.demo import serve


serve(["{repository}"], host="0.0.0.0", port=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
'''

_README = """---
{metadata}
---

# {title}

The demo of [{repository}](https://huggingface.co/{repository}): choose what to draw, and see how pictures of it come
out of noise. The folder `hwdiffusion` is that package, version {version}; on a machine of your own
`hwdiffusion demo {repository}` shows the same page.

If the repository is private, give this Space a token that may read it, as the secret `HF_TOKEN` in its settings.
"""


def push_space(run: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload the Space `repo_id` with the demo of the model repository of that name; its address is returned.

    Args:
        run: the run folder that was pushed there.
        repo_id: `USER/NAME`; the Space is made if it isn't there.

    Raises:
        RunError: the Hub refuses, with what it said.
    """
    try:
        api = HfApi()
        options = {"repo_type": "space", "space_sdk": "gradio", "private": private, "exist_ok": True}
        repo_id = api.create_repo(repo_id, **options).repo_id
        operations = [CommitOperationAdd(path, content) for path, content in space_files(repo_id).items()]
        api.create_commit(repo_id, operations, commit_message="Upload demo", repo_type="space")
        return f"{api.endpoint}/spaces/{repo_id}"
    except Exception as error:  # of the Hub, the network, or the client's own checks, which have no common class
        raise RunError(refusal(f"the Space of {run}", error)) from error


def check_space(run: str | Path):
    """Raise InputError where a folder holds nothing that draws, such as a classifier."""
    if not (Path(run) / "model_index.json").is_file():
        raise InputError(f"{run} holds no pipeline, of which a Space could show a demo; leave --space out")


def space_files(repository: str) -> dict[str, bytes]:
    """What a Space holds that runs the demo of a repository, by path."""
    title = repository.split("/")[-1]
    needed = _requirements()
    metadata = SpaceCardData(
        title=title,
        emoji="🎨",
        colorFrom="indigo",
        colorTo="pink",
        sdk="gradio",
        sdk_version=needed.pop("gradio"),
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file="app.py",
        models=[repository],
        tags=["hwdiffusion"],
    )
    readme = _README.format(
        metadata=metadata.to_yaml(), title=title, repository=repository, version=hwdiffusion.__version__
    )
    files = {
        "README.md": str(RepoCard(readme)).encode(),
        "app.py": _APP.format(repository=repository).encode(),
        "requirements.txt": "".join(f"{name}=={version}\n" for name, version in needed.items()).encode(),
    }
    licence = importlib.metadata.distribution("hwdiffusion").read_text("licenses/LICENSE")
    if licence is not None:
        files["hwdiffusion/LICENSE"] = licence.encode()
    # each by its own place: in a checkout they aren't in one folder
    for package in (hwdiffusion, pipelines, presets):
        inside = package.__name__.replace(".", "/")
        for path in sorted(Path(package.__file__).parent.iterdir()):
            if path.suffix in (".py", ".yaml"):
                files[f"{inside}/{path.name}"] = path.read_bytes()
    return files


def _requirements() -> dict[str, str]:
    """What the package and its demo need, each with the version that is installed, or the least that will do."""
    versions = {}
    for line in importlib.metadata.requires("hwdiffusion") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "demo"}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:  # Gradio, where a run is pushed only
            version = next(one.version for one in requirement.specifier if one.operator == ">=")
        versions[requirement.name] = version.split("+")[0]  # a build, such as a CPU's, isn't to be had everywhere
    return versions
