import pytest

from hwdiffusion import InputError
from hwdiffusion.places import file_of, is_here


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "some.npz").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_there_is_here(folder):
    for name in ("runs", "runs/digits", "./runs/digits/", "../" + folder.name, folder / "runs", "some.npz"):
        assert is_here(name, "--run")


@pytest.mark.parametrize("name", ["digits", "user/name", "ylecun/mnist", "gpt2"])
def test_what_can_be_an_id_of_the_hub_is_looked_for_there(name):
    assert not is_here(name, "--run")


@pytest.mark.parametrize("name", ["./digits", "../digits", "/nowhere", "~/digits", "models/runs/digits", "runs/mnist"])
def test_what_can_only_be_a_path_is_refused(name):
    with pytest.raises(InputError, match=f"^--run {name} can't be loaded: there is no such file or folder$"):
        is_here(name, "--run")


def test_the_nearest_name_beside_is_told():
    with pytest.raises(InputError, match="no such file or folder; did you mean runs/digits.$"):
        is_here("runs/digit", "--run")


def test_a_file_of_a_run_is_found_or_is_not_there(folder):
    (folder / "runs" / "digits" / "evaluation.json").write_text("{}")
    assert file_of("runs/digits", "evaluation.json").read_text() == "{}"
    assert file_of("runs/digits", "sweep/sweep.json") is None
    with pytest.raises(InputError, match="the run runs/digts can't be loaded"):
        file_of("runs/digts", "evaluation.json")
