"""Shell completion, by really pressing the key: in bash, and in zsh where it is installed."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest

from hwdiffusion import cli
from hwdiffusion.config import preset_names


pytest.importorskip("shtab")
MARK = "@end@"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[str, str]:
    """What `hwdiffusion completion` prints, in a file for each shell."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        with open(folder / shell, "w") as file:
            done = subprocess.run([sys.executable, "-c", SAY_BOTH, shell], stdout=file, stderr=subprocess.PIPE)
        assert done.returncode == 0, done.stderr
    return {shell: str(folder / shell) for shell in ("bash", "zsh")}


SAY_BOTH = "import sys; from hwdiffusion import cli; sys.exit(cli.main(['completion', sys.argv[1]]))"
COMPLETE = r"""
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
function=$(complete -p hwdiffusion | sed 's/.*-F \([^ ]*\).*/\1/')
$function hwdiffusion "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}" 2>/dev/null
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def offered(scripts, tmp_path):
    """A function of the words of a line, the last of which is to be completed, to what bash offers."""

    def offer(*words: str) -> set[str]:
        command = ["bash", "--norc", "--noprofile", "-c", COMPLETE, "bash", scripts["bash"], "hwdiffusion", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return {word.strip() for word in done.stdout.split("\n") if word.strip()}

    return offer


def test_commands_flags_and_values_are_completed(offered, tmp_path):
    assert set(cli.COMMANDS) <= offered("")
    assert offered("ev") == {"evaluate"}
    assert offered("train", "") >= {"ldm", "ddpm", "wgan", "vqgan", "distill", "classifier"}
    assert offered("evaluate", "--num_s") == {"--num_samples", "--num_seeds"}
    assert {"--push_to_hub", "--max_train_steps"} <= offered("train", "ldm", "--")
    assert offered("train", "ldm", "--preset", "mnist-f") == {"mnist-fast", "mnist-flow"}
    assert offered("presets", "show", "digits") == {name for name in preset_names() if name.startswith("digits")}
    assert offered("sweep", "runs/x", "--scheduler", "dpm") == {"dpmpp", "dpmpp_sde"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.txt").write_text("no folder")
    assert offered("sample", "mi") == {"mine"} and offered("train", "ldm", "--train_data_dir", "mi") == {"mine"}


@pytest.mark.parametrize("command", sorted(set(cli.COMMANDS) - {"train"}))
def test_every_command_has_its_flags(command, offered):
    assert "--help" in offered(command, "--")


def keys(shell: list[str], lines: list[str], pressed: str, wanted: str) -> str:
    """What an interactive shell shows after some lines and some keys, until it shows what is wanted."""
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "PS1": "> ", "INPUTRC": "/dev/null"}
    process = subprocess.Popen(shell, stdin=other, stdout=other, stderr=other, env=environment, close_fds=True)
    os.close(other)
    shown = ""

    def read_until(text: str):
        nonlocal shown
        deadline = time.monotonic() + 60
        while text not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([main], [], [], 0.2)[0]:
                shown += os.read(main, 65536).decode(errors="replace")

    try:
        for number, line in enumerate(lines):
            os.write(main, f"{line}; echo {MARK[:2]}''{number}{MARK[2:]}\n".encode())  # not what is echoed as typed
            read_until(f"{MARK[:2]}{number}{MARK[2:]}")
        shown = ""
        os.write(main, pressed.encode())
        read_until(wanted)
    finally:
        process.kill()
        process.wait()
        os.close(main)
    return shown


def test_the_tab_key_completes_in_bash(scripts):
    shell, line = ["bash", "--norc", "--noprofile", "-i"], "hwdiffusion evaluate"
    assert line in keys(shell, [f"source {scripts['bash']}"], "hwdiffusion ev\t", line)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_the_tab_key_completes_in_zsh(scripts):
    lines = ["autoload -Uz compinit", "compinit -u -D", f'eval "$(cat {scripts["zsh"]})"']
    line = "hwdiffusion train ldm --preset mnist-fast"
    assert line in keys(["zsh", "-f", "-i"], lines, line[:-2] + "\t", line)


def test_without_shtab_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert 'completion needs `pip install "hwdiffusion[completion]"`' in line
    assert cli.main(["completion", "fish"]) == 2 and "invalid choice: 'fish'" in capsys.readouterr().err
