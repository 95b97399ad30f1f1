"""The documentation: every link leads somewhere, every command and every piece of Python in it runs."""

import re
import shlex

import pytest
from hub_server import LoopbackHub
from pages import (
    LANGUAGES,
    PAGES,
    ROOT,
    Block,
    Shelf,
    all_blocks,
    blocks_of,
    check_command,
    check_python,
    commands_of,
    environment,
    known_flags,
    make_place,
    run_blocks,
)


TOKEN = "hf_" + "s3cr3t" * 5
BLOCKS = all_blocks()
OF_THE_BENCHMARKS = ROOT / "benchmarks" / "README.md"  # its commands take hours: they are checked, and not run
CHECKED = {**BLOCKS, OF_THE_BENCHMARKS: blocks_of(OF_THE_BENCHMARKS.read_text(), "benchmarks/README.md")}
FILES = {block.file: block.code for blocks in BLOCKS.values() for block in blocks if block.file is not None}
# flags that the pages speak of and that are others'
OF_OTHERS = {"--help", "--debug", "--json", "--private", "--space", "--vae", "--steps", "--num_processes", "--cpu",
             "--dynamo_backend", "--dynamo_use_regional_compilation"}  # fmt: skip


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_and_picture_is_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_and_picture_is_linked_from_another():
    texts = {page: page.read_text() for page in PAGES}
    for path in (*PAGES[1:], *(ROOT / "docs" / "images").iterdir()):
        assert any(f"{path.name})" in text or f"{path.name}#" in text for text in texts.values()), path


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_one_that_its_parser_takes(page, tmp_path, monkeypatch):
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)  # presets among them
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for block in CHECKED[page]:
        if block.language == "python":
            check_python(block.code)
        for words in commands_of(block.code) if block.language == "bash" else []:
            try:
                check_command(words, FILES)
            except Exception as error:
                raise AssertionError(f"{block.where}: {shlex.join(words)}: {error}") from error
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page.read_text())):
        if re.match("hwdiffusion|accelerate launch|python ", code) and not re.search("…|COMMAND|NAME", code):
            words = shlex.split(code.replace("\n", " "))
            if any(word.startswith("--") for word in words):  # else it is the name of a command alone
                check_command(words, FILES)


@pytest.mark.parametrize("page", CHECKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_flag_that_is_spoken_of_exists(page):
    spoken = set(re.findall(r"`(--[a-z]\w*)[^`.]*`", prose(page.read_text())))
    assert spoken - known_flags() - OF_OTHERS == set()


@pytest.mark.parametrize(
    "wrong",
    [
        "accelerate launch train_scripts/train_ldm.py --preset mnist-lmd",
        "accelerate launch train_scripts/train_ldm.py --learning_rat 1",
        "accelerate launch train_scripts/train_ldm.py --unet.blok_out_channels 1",
        "accelerate launch train_scripts/train_lmd.py",
        "accelerate lunch train_scripts/train_ldm.py",
        "accelerate launch --num_procs 2 train_scripts/train_ldm.py",
        "hwdiffusion smaple runs/digits",
        "hwdiffusion sample runs/digits --step 5",
        "hwdiffusion push runs/digits",
        "hwdiffusion presets --jason",
        "hwdiffusion train lmd",
        "python benchmarks/samplers.py runs/digits --clasifier runs/classifier",
        "python benchmarks/label_binding.py --classifier a --label_sets b --unet.blok_out_channels 1",
        "make deom",
        'eval "$(hwdiffusion presets --jason)"',
        "curl https://example.org",
    ],
)
def test_a_wrong_command_is_found(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (words,) = commands_of(wrong)
    with pytest.raises((Exception, SystemExit)):
        check_command(words, {})


def test_a_block_that_would_not_be_tested_is_found():
    for text in (
        "```sh\nls\n```",
        "<!-- test: skip -->\n```bash\nls\n```",
        "<!-- test: ignore, why not -->\n```bash\nls\n```",
        "<!-- test: skip, a reason -->\n\n```bash\nls\n```",
    ):
        with pytest.raises(ValueError, match="page, line 1|page, line 2"):
            blocks_of(text, "page")
    assert {block.language for blocks in CHECKED.values() for block in blocks} <= LANGUAGES
    with pytest.raises(ImportError, match="has no ClassConditionalPipelin"):
        check_python("from hwdiffusion.pipelines import ClassConditionalPipelin")


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hub():
    with LoopbackHub(TOKEN) as hub:
        yield hub


@pytest.fixture(scope="session")
def shelf(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf") / "place"
    return Shelf(folder, environment(folder, hub.endpoint, TOKEN), BLOCKS)


@pytest.mark.slow
@pytest.mark.xdist_group("docs")  # one worker: what several pages need is made once
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_all_of_a_page_runs_as_it_is_written(page, hub, shelf, tmp_path):
    folder = make_place(tmp_path / "place")
    run_blocks(BLOCKS[page], folder, environment(folder, hub.endpoint, TOKEN), shelf)


@pytest.mark.parametrize(
    "language, code",
    [
        ("bash", "hwdiffusion smaple"),
        ("bash", "false | true"),
        ("bash", "false\ntrue"),
        ("python", "x = 1\nx.y"),
        ("python", "raise SystemExit(0)"),
    ],
)
def test_a_block_that_fails_fails_the_test(language, code, tmp_path):
    good = [Block("page", 1, "python", "x = 1\n"), Block("page", 2, "bash", "test 1 = 1\n")]
    env = environment(tmp_path, "http://127.0.0.1:9", TOKEN)
    run_blocks([*good, Block("page", 3, "python", "assert x == 1\n")], tmp_path, env)
    with pytest.raises(AssertionError, match="page, line 4"):
        run_blocks([*good, Block("page", 4, language, code)], tmp_path, env)
