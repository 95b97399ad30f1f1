"""The page that draws with a run: what it draws, what it takes, and what it refuses; and, slow, in a real browser."""

import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PROJECTION, TINY_UNET
from PIL import Image
from tiny import NAMES, make_gan, make_pipeline, seeds


gr = pytest.importorskip("gradio", reason='Gradio is not installed (pip install "hwdiffusion[demo]")')

from hwdiffusion import InputError, cli  # noqa: E402
from hwdiffusion.demo import (  # noqa: E402
    EACH,
    HIGHEST_SEED,
    HIGHEST_TRUNCATION,
    MOST_PICTURES,
    NO_LABEL,
    OWN,
    Exhibit,
    build,
    check_address,
    scores,
)
from hwdiffusion.models import build_unet, swap_scheduler  # noqa: E402
from hwdiffusion.pipelines import ClassConditionalPipeline  # noqa: E402
from hwdiffusion.samples import weights_digest  # noqa: E402


RECOMMENDED = {"default_guidance_scale": 1.5, "default_guidance_interval": (0.0, 0.5)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of every kind."""
    folder = tmp_path_factory.mktemp("runs")
    make_pipeline("latent", **RECOMMENDED).save_pretrained(folder / "latent")
    make_pipeline("pixel", "flow_prediction", has_null_label=False).save_pretrained(folder / "flow")
    make_pipeline("unconditional").save_pretrained(folder / "unconditional")
    make_pipeline("tokens", max_labels=2).save_pretrained(folder / "sets")
    make_gan().save_pretrained(folder / "gan")
    return folder


@pytest.fixture(scope="module")
def exhibits(folder) -> dict[str, Exhibit]:
    return {path.name: Exhibit(str(path)) for path in folder.iterdir()}


def draw(exhibit: Exhibit, **asked):
    steps = []
    return exhibit.prepare(**asked)(lambda *step: steps.append(step)), steps


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(
        np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(ours, theirs)
    )


# -- what is drawn ----------------------------------------------------------------------------------------------------


def test_pictures_are_those_of_a_call_with_what_was_asked_for(exhibits):
    exhibit = exhibits["latent"]
    asked = {"steps": 3, "guidance": 2.0, "interval": (0.0, 0.5), "scheduler": "dpmpp"}
    drawn, steps = draw(exhibit, choice=1, count=3, seed=5, **asked)
    assert drawn.names == ["dog"] * 3 and drawn.strip is None and drawn.animation is None
    assert steps == [(1, 3), (2, 3), (3, 3)]
    pipe = make_pipeline("latent")
    call = {"labels": [1] * 3, "num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.0, 0.5)}
    assert not same(drawn.pictures, pipe(**call, generator=seeds(5, 6, 7)).images)
    swap_scheduler(pipe, "dpmpp")
    assert same(drawn.pictures, pipe(**call, generator=seeds(5, 6, 7)).images)

    own, _ = draw(exhibit, choice=EACH, count=4)  # by its own scheduler again, and its own settings
    pipe = make_pipeline("latent", **RECOMMENDED)
    assert own.names == ["cat", "dog", "wild", "cat"]
    drawn = {"labels": [0, 1, 2, 0], "guidance_scale": 1.5}
    asked = {**drawn, "guidance_interval": (0.0, 0.5)}
    assert same(own.pictures, pipe(**asked, generator=seeds(0, 1, 2, 3)).images)
    assert not same(own.pictures, pipe(**drawn, generator=seeds(0, 1, 2, 3)).images)


def test_the_way_from_noise_ends_in_the_pictures(exhibits):
    plain, _ = draw(exhibits["latent"], choice=2, count=2, seed=1)
    drawn, steps = draw(exhibits["latent"], choice=2, count=2, seed=1, trajectory=True)
    assert same(plain.pictures, drawn.pictures) and steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    last = drawn.strip.crop((drawn.strip.width - 68, drawn.strip.height - 68, *drawn.strip.size)).crop((0, 0, 64, 64))
    assert np.array_equal(np.asarray(last)[::4, ::4, 0], np.asarray(drawn.pictures[1]))
    with Image.open(io.BytesIO(drawn.animation)) as moving:
        assert moving.format == "WEBP" and moving.n_frames == 4


def test_a_variation_starts_from_the_picture(exhibits):
    image = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    drawn, steps = draw(exhibits["latent"], choice=0, count=2, image=image, strength=0.5, trajectory=True)
    assert steps == [(1, 2), (2, 2)]
    pipe = make_pipeline("latent", **RECOMMENDED)
    assert same(drawn.pictures, pipe(labels=[0, 0], image=image, strength=0.5, generator=seeds(0, 1)).images)


def test_models_without_labels_and_of_sets(exhibits):
    drawn, _ = draw(exhibits["unconditional"], count=2, seed=3, trajectory=True)
    assert drawn.names == ["", ""]
    assert same(drawn.pictures, make_pipeline("unconditional")(num_images_per_prompt=2, generator=seeds(3, 4)).images)

    of_sets = make_pipeline("tokens", max_labels=2)
    drawn, _ = draw(exhibits["sets"], choice=[2, 0], count=2)
    assert drawn.names == ["wild, cat"] * 2
    assert same(drawn.pictures, of_sets(labels=[[2, 0]] * 2, generator=seeds(0, 1)).images)
    drawn, _ = draw(exhibits["sets"], choice=[], count=1)
    assert drawn.names == ["no label"]
    assert same(drawn.pictures, of_sets(labels=[[]], generator=seeds(0)).images)
    assert draw(exhibits["latent"], choice=NO_LABEL, count=1)[0].names == ["no label"]


def test_a_gan_draws_in_one_pass_and_leaves_what_it_has_not(exhibits):
    image = Image.new("RGB", (8, 8))
    drawn, steps = draw(exhibits["gan"], choice=1, count=2, truncation=0.5, image=image, strength=0.5, trajectory=True)
    assert steps == [(1, 1)] and drawn.strip is None
    assert same(drawn.pictures, make_gan()(labels=[1, 1], truncation=0.5, generator=seeds(0, 1)).images)
    free, _ = draw(exhibits["gan"], choice=1, count=2, truncation=HIGHEST_TRUNCATION)
    assert same(free.pictures, make_gan()(labels=[1, 1], generator=seeds(0, 1)).images)


def test_schedulers_are_those_that_the_pipeline_takes(exhibits):
    assert exhibits["latent"].schedulers == [OWN, "ddpm", "ddim", "dpmpp", "dpmpp_sde", "unipc", "euler",
                                             "euler_ancestral", "heun", "langevin"]  # fmt: skip
    assert exhibits["flow"].schedulers == [OWN, "dpmpp", "dpmpp_sde", "unipc", "euler", "heun"]
    for name in exhibits["flow"].schedulers:
        assert len(draw(exhibits["flow"], choice=0, count=1, scheduler=name)[0].pictures) == 1


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked, said",
    [
        ({"count": 0}, f"the number of pictures must be a whole number from 1 to {MOST_PICTURES}, not 0"),
        ({"count": MOST_PICTURES + 1}, "not 17"),
        ({"count": 2.5}, "whole number"),
        ({"count": None}, "not None"),
        ({"count": "8"}, "not '8'"),
        ({"count": True}, "not True"),
        ({"count": math.nan}, "not nan"),
        ({"seed": -1}, "the seed must be a whole number"),
        ({"seed": HIGHEST_SEED + 1}, "the seed must be"),
        ({"steps": 0}, "the number of steps must be a whole number from 1 to 250, not 0"),
        ({"steps": 251}, "not 251"),
        ({"guidance": 0.5}, "guidance must be a number from 1 to 10, not 0.5"),
        ({"guidance": math.inf}, "not inf"),
        ({"interval": (0.8, 0.2)}, "guidance_interval must be (start, stop)"),
        ({"interval": (-0.1, 1)}, "the guided part must be a number from 0 to 1"),
        ({"scheduler": "pndm"}, "the scheduler must be one of own, ddpm"),
        ({"scheduler": "../../etc/passwd"}, "the scheduler must be one of"),
        ({"choice": 3}, "label 3 is out of range"),
        ({"choice": "../cat"}, "unknown label '../cat'"),
        ({"choice": [0, 1]}, "at most 1"),
        ({"choice": {"path": "/etc/passwd"}}, "a set of labels is a list"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0.0}, "strength must be a number from 0.05 to 1"),
        ({"image": Image.new("RGB", (8, 8)), "strength": 0.1}, "less than one step"),
        ({"image": Image.new("RGB", (8, 8)), "strength": None}, "strength must be a number"),
        ({"image": "/etc/passwd", "strength": 0.5}, "image must be PIL images"),
    ],
)
def test_what_is_out_of_bounds_is_refused_in_a_sentence_before_it_is_drawn(asked, said, exhibits):
    with pytest.raises(InputError) as error:
        exhibits["latent"].prepare(**{"choice": 0, **asked})
    assert said in str(error.value)


def test_a_model_refuses_what_it_was_not_trained_for(exhibits):
    for name, asked, said in (
        ("flow", {"choice": 0, "guidance": 2.0}, "label dropout"),
        ("flow", {"choice": NO_LABEL}, "needs a label"),
        ("flow", {"choice": 0, "scheduler": "ddim"}, "the scheduler must be one of own, dpmpp"),
        ("sets", {"choice": [0, 1, 2]}, "at most 2"),
        ("gan", {"choice": NO_LABEL}, "needs a label"),
        ("gan", {"choice": 0, "truncation": 0.0}, "truncation must be a number from 0.1 to 3"),
    ):
        with pytest.raises(InputError, match=said):
            exhibits[name].prepare(**asked)


@pytest.fixture
def refused(capsys, monkeypatch):
    """What `hwdiffusion demo` says to input that it can't use, before it serves anything."""
    monkeypatch.setattr("hwdiffusion.demo.build", lambda exhibits: pytest.fail("a page was built"))

    def demo(*argv) -> str:
        assert cli.main(["demo", *map(str, argv)]) == 2
        *_, said = capsys.readouterr().err.strip().splitlines()
        assert said.startswith("hwdiffusion demo: error: ")
        return said

    return demo


def test_a_port_that_is_taken_and_a_host_that_is_elsewhere(folder, refused, monkeypatch):
    monkeypatch.setattr("hwdiffusion.demo.load_on", lambda *_: pytest.fail("a run was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is taken; name another --port" in refused(folder / "latent", "--port", port)
    assert check_address("127.0.0.1", port) == port
    assert check_address("127.0.0.1", 0) > 0
    assert "--port must be in 0 to 65535, not 65536" in refused(folder / "latent", "--port", 65536)
    assert "invalid int value: 'http'" in refused(folder / "latent", "--port", "http")
    for host in ("192.0.2.1", "no host"):
        assert f"--host {host} is no address of this machine" in refused(
            folder / "latent", "--host", host, "--port", 0
        )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "hwdiffusion[demo]"' in refused(folder / "latent", "--port", 0)


def test_runs_that_are_none_or_do_not_go_together(folder, refused, tmp_path):
    port = ("--port", 0)
    assert "there is no such file or folder; did you mean" in refused(folder / "latnt", *port)
    assert "is neither a run folder nor a pipeline" in refused(tmp_path, *port)
    assert "compare runs of the same labels" in refused(folder / "gan", folder / "unconditional", *port)
    assert "compare runs of the same pictures" in refused(folder / "latent", folder / "gan", *port)
    assert "one run, or two side by side, not 3" in refused(*[folder / "gan"] * 3, *port)
    assert "--device" in refused(folder / "gan", "--device", "nowhere", *port)


# -- the page ---------------------------------------------------------------------------------------------------------


def labels_of(page) -> list[str]:
    """Of everything that can be set, in its order."""
    (event,) = [fn for fn in page.fns.values() if fn.name == "draw"]
    return sorted(component.label for component in event.inputs if component.label)


SHARED = ["pictures", "seed of the first", "show the way from noise", "start from this picture, drawn or uploaded",
          "strength: how far it is noised"]  # fmt: skip
STEPS = ["scheduler", "steps"]
GUIDANCE = ["guidance scale (none at 1)", "guided from", "to this part"]


@pytest.mark.parametrize(
    "names, controls",
    [
        (["latent"], [*SHARED, "label", *STEPS, *GUIDANCE]),
        (["flow"], [*SHARED, "label", *STEPS]),
        (["unconditional"], [*SHARED, *STEPS]),
        (["sets"], [*SHARED, "labels (at most 2)", *STEPS, *GUIDANCE]),
        (["gan"], [*SHARED[:2], "label", "truncation (none at 3)"]),
        (["flow", "gan"], [*SHARED, "label", *STEPS, "truncation (none at 3)"]),
    ],
)
def test_the_page_has_controls_for_what_the_runs_take_alone(names, controls, exhibits):
    page = build([exhibits[name] for name in names])
    assert labels_of(page) == sorted(controls)
    assert not page.analytics_enabled
    assert all(fn.api_visibility == "private" for fn in page.fns.values() if fn.name in ("draw", "stop"))


@pytest.fixture
def page(exhibits):
    """A page of two runs as its events see it: draws with changed controls, and whatever its progress does."""
    built = build([exhibits["flow"], exhibits["gan"]])
    events = {fn.name: fn for fn in built.fns.values()}
    request = SimpleNamespace(session_hash="mine")

    def draw(progress=lambda *_, **__: None, **changed):
        values = {control: control.value for control in events["draw"].inputs}
        by_name = {(control.label or "picture").split()[0]: control for control in values}
        return events["draw"].fn(values | {by_name[name]: value for name, value in changed.items()}, request, progress)

    return SimpleNamespace(draw=draw, stop=lambda: events["stop"].fn(request))


def test_both_runs_draw_and_the_progress_of_each_is_told(page, exhibits):
    told = []
    shown = page.draw(lambda step, desc, unit: told.append((desc, step)), pictures=2, seed=7, label=1)
    pictures, strip, animation, of_gan = shown
    for drawn, name in ((pictures, "flow"), (of_gan, "gan")):
        assert [label for _, label in drawn] == ["dog", "dog"]
        assert same([picture for picture, _ in drawn], draw(exhibits[name], choice=1, count=2, seed=7)[0].pictures)
    assert isinstance(strip, Image.Image) and 'src="data:image/webp;base64,' in animation
    assert told == [("flow", (0, 1)), *(("flow", (step, 4)) for step in range(1, 5)), ("gan", (0, 1)), ("gan", (1, 1))]
    pictures, strip, animation, _ = page.draw(pictures=1, show=False)
    assert len(pictures) == 1 and strip is None and animation == ""


def test_a_drawing_that_is_stopped_ends_and_leaves_what_is_shown(page):
    told = []

    def progress(step, desc, unit):
        told.append(step)
        page.stop()

    shown = page.draw(progress)
    assert told == [(0, 1)] and len(shown) == 4 and all(one == gr.skip() for one in shown)
    assert len(page.draw(pictures=3)[0]) == 3  # the next one isn't
    page.stop()
    assert len(page.draw(pictures=3)[0]) == 3


def test_a_variation_on_the_page_takes_the_canvas(page, exhibits):
    image = Image.linear_gradient("L").convert("RGB")
    canvas = {"background": None, "layers": [], "composite": image}
    pictures, *_ = page.draw(pictures=2, label=0, start=True, picture=canvas, **{"strength:": 0.5})
    expected, _ = draw(exhibits["flow"], choice=0, count=2, image=image, strength=0.5)
    assert same([picture for picture, _ in pictures], expected.pictures)
    for nothing in (None, {"background": None, "layers": [], "composite": None}):
        with pytest.raises(gr.Error, match="There is no picture to vary: draw or upload one, or start from noise."):
            page.draw(start=True, picture=nothing)


def test_bad_input_is_said_on_the_page(page):
    with pytest.raises(gr.Error, match="The number of pictures must be a whole number from 1 to 16, not 99."):
        page.draw(pictures=99)
    assert len(page.draw(pictures=1)[0]) == 1


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_present_weights(folder, exhibits, tmp_path):
    pipe = make_gan()
    run = tmp_path / "run"
    pipe.save_pretrained(run)
    assert "`hwdiffusion evaluate` makes one" in scores(str(run), pipe)
    report = {
        "n": 250,
        "sampling": {"scheduler": None, "weights_sha256": weights_digest(pipe)},
        "reference": {"name": "digits", "split": "held-out", "n": 179},
        "extractor": {"extractor": "classifier", "model": "mine"},
        "floor": {"n": 179, "of": "held-out"},
        "memorisation": {"pixels": {"ratio": 1.25, "share_of_copies": 0.0}},
    }
    (run / "evaluation.json").write_text(json.dumps(report))
    said = scores(str(run), pipe)
    assert "250 samples (one pass of the generator) against 179 pictures of digits" in said and "| 1.250 | 1 |" in said
    report["sampling"]["weights_sha256"] = "of others"
    (run / "evaluation.json").write_text(json.dumps(report))
    assert "No evaluation of these weights" in scores(str(run), pipe)
    for broken in ("{", "[1]", '{"sampling": null}'):
        (run / "evaluation.json").write_text(broken)
        assert "The saved evaluation can't be read" in scores(str(run), pipe)


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that is installed on the machine; playwright's own would have to be downloaded."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium (apt-get install chromium)")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with playwright.sync_playwright() as started:
        # the canvas to draw on wants WebGL, which a machine without a GPU computes
        options = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", *quiet]
        browser = started.chromium.launch(executable_path=chromium, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`hwdiffusion demo` with two runs, the first slow enough to be stopped: its address, and its folders."""
    folder = tmp_path_factory.mktemp("served")
    pipe = make_pipeline("latent", **RECOMMENDED)
    wide = {**TINY_UNET, **PROJECTION, "block_out_channels": [64, 128]}
    pipe.register_modules(unet=build_unet(wide, pipe._latent_shape(), len(NAMES)).eval())
    pipe.save_pretrained(folder / "diffusion")
    make_gan((1, 16, 16)).save_pretrained(folder / "gan")
    (folder / "work").mkdir()
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "hwdiffusion.cli", "demo", str(folder / "diffusion"), str(folder / "gan")]
    with subprocess.Popen(
        [*command, "--port", "0"], cwd=folder / "work", env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline()).group()
            yield SimpleNamespace(address=address, folder=folder)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.fixture
def tab(browser, served):
    """The page, opened anew; whatever it asks for must come from the machine itself."""
    tab, asked = browser.new_page(viewport={"width": 1400, "height": 1300}), []
    tab.set_default_timeout(120_000)
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(served.address)
    tab.locator("#draw").wait_for()
    yield tab
    tab.close()
    assert asked and all(url.startswith((served.address, "data:", "blob:")) for url in asked)


def choose(tab, control: str, option: str):
    tab.get_by_label(control, exact=True).click()
    tab.get_by_role("option", name=option).click()


def fill(tab, control: str, value, run: int | None = None):
    """Set a number, of the shared controls or of a run's own."""
    place = tab if run is None else tab.locator(f"#run-{run}")
    box = place.get_by_label(f"number input for {control}", exact=True)
    box.fill(str(value))
    box.press("Tab")


def pictures_of(tab, run: int) -> list[str]:
    images = tab.locator(f"#run-{run} .pictures .grid-wrap img")
    return images.evaluate_all("images => images.map(image => image.src)")


def press_draw(tab, wait: bool = True):
    """Press the button; wait until the pictures have changed."""
    before = pictures_of(tab, 0)
    tab.locator("#draw").click()
    deadline = time.monotonic() + 120
    while wait and pictures_of(tab, 0) in (before, []):
        assert time.monotonic() < deadline, "nothing was drawn"
        time.sleep(0.1)
    return pictures_of(tab, 0)


@pytest.mark.slow
def test_a_label_is_chosen_and_the_pictures_change(tab, served):
    fill(tab, "pictures", 3)
    choose(tab, "label", "dog")
    dogs = press_draw(tab)
    assert len(dogs) == 3
    assert tab.locator("#run-0 .pictures .caption-label").all_inner_texts() == ["dog"] * 3
    assert tab.locator("#run-0 .strip img").evaluate("image => image.naturalWidth") > 200
    assert tab.locator("#run-0 .animation img").evaluate("image => image.naturalWidth") > 60
    assert tab.locator("#run-1 .pictures img").count() == 3 and not tab.locator("#run-1 .strip").count()

    choose(tab, "label", "cat")
    cats = press_draw(tab)
    assert tab.locator("#run-0 .pictures .caption-label").all_inner_texts() == ["cat"] * 3
    assert len(cats) == 3 and not set(cats) & set(dogs)
    pipe = ClassConditionalPipeline.from_pretrained(served.folder / "diffusion")
    shown = [Image.open(io.BytesIO(tab.request.get(url).body())) for url in cats]
    assert same(shown, pipe(labels=[0] * 3, generator=seeds(0, 1, 2)).images)

    tab.get_by_role("button", name="Another seed").click()
    press_draw(tab)
    choose(tab, "scheduler", "euler_ancestral")
    fill(tab, "steps", 7, run=0)
    press_draw(tab)
    tab.get_by_text("Scores").first.click()
    assert "No evaluation of these weights is saved" in tab.locator("#run-0 .scores").first.inner_text()


@pytest.mark.slow
def test_a_drawing_is_stopped_in_the_middle(tab):
    fill(tab, "pictures", 2)
    before = press_draw(tab)
    fill(tab, "pictures", 16)
    fill(tab, "steps", 250, run=0)
    began = time.monotonic()
    press_draw(tab, wait=False)
    progress = tab.locator("#run-0 .pictures").get_by_text(re.compile(r"\d+/250"))
    progress.wait_for()
    done = int(re.search(r"(\d+)/250", progress.inner_text()).group(1))
    left = (time.monotonic() - began) * (250 - done) / max(done, 1)
    tab.locator("#stop").click()
    progress.wait_for(state="detached")
    assert pictures_of(tab, 0) == before
    fill(tab, "steps", 2, run=0)
    fill(tab, "pictures", 1)
    began = time.monotonic()
    assert len(press_draw(tab)) == 1
    assert time.monotonic() - began < left / 2  # it hasn't waited for the steps that were left


@pytest.mark.slow
def test_a_picture_is_uploaded_or_drawn_and_varied(tab, served, tmp_path):
    fill(tab, "pictures", 1)
    of_noise = press_draw(tab)
    tab.get_by_text("Variation").click()
    tab.get_by_text("start from this picture").click()
    empty = press_draw(tab)
    canvas = tab.locator("#variation canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for move, part in ((tab.mouse.move, 0.35), (tab.mouse.down, None), (tab.mouse.move, 0.65), (tab.mouse.up, None)):
        move() if part is None else move(box["x"] + part * box["width"], box["y"] + part * box["height"], steps=10)
    time.sleep(3)  # the canvas tells the page of a stroke a moment later
    drawn = press_draw(tab)
    Image.radial_gradient("L").save(tmp_path / "mine.png")
    tab.locator("#variation input[type=file]").first.set_input_files(tmp_path / "mine.png")
    time.sleep(3)
    uploaded = press_draw(tab)
    assert len({*of_noise, *empty, *drawn, *uploaded}) == 4
    assert not any((served.folder / "work").iterdir())
    written = {path.name for path in served.folder.rglob("*") if path.is_file()}
    assert "mine.png" not in written - {path.name for path in (served.folder / "cache").rglob("*")}


@pytest.mark.slow
def test_what_is_wrong_is_said_and_no_file_is_given_away(tab, served):
    fill(tab, "guided from", 0.8, run=0)
    fill(tab, "to this part", 0.2, run=0)
    press_draw(tab, wait=False)
    tab.get_by_text("Guidance_interval must be (start, stop), 0 <= start <= stop <= 1").wait_for()
    for path in (served.folder / "diffusion" / "model_index.json", "/etc/passwd"):
        assert tab.request.get(f"{served.address}gradio_api/file={path}").status == 403
