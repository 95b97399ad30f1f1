"""`hwdiffusion demo`: a page in the browser that draws with a run, or with two of them side by side.

The page is made with Gradio, an extra that nothing else imports. What a browser sends is numbers within bounds,
choices out of lists, and a picture: none of it names a file, and nothing of it is written anywhere but, by Gradio, an
uploaded picture into its own cache. The page asks the network for nothing.
"""

import base64
import errno
import html
import importlib.util
import json
import logging
import numbers
import random
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hwdiffusion import InputError, RunError
from hwdiffusion.arguments import SAMPLERS
from hwdiffusion.compare import check_alike
from hwdiffusion.drawing import load_on, seeds
from hwdiffusion.evaluation import choose_scheduler
from hwdiffusion.figures import animated, denoising, evenly, trajectory_frames, trajectory_strip
from hwdiffusion.label_sets import names_of
from hwdiffusion.pipelines import guidance_of, label_ids
from hwdiffusion.places import file_of, is_here
from hwdiffusion.report import as_table, sweep_table
from hwdiffusion.samples import image_mode_of, scheduler_name, weights_digest


# The bounds of what the page takes; a model's own, such as its number of timesteps, may be narrower.
MOST_PICTURES, MOST_STEPS, HIGHEST_GUIDANCE, HIGHEST_SEED = 16, 250, 10.0, 2**32 - 1
LOWEST_TRUNCATION, HIGHEST_TRUNCATION = 0.1, 3.0  # at the highest, noise is left as it is
LOWEST_STRENGTH = 0.05
LARGEST_UPLOAD, MOST_PIXELS = "10mb", 2**24
MOST_WAITING = 20  # in the queue

MOMENTS, COLUMNS = 24, 8  # of a trajectory: in the animation, and of these in the strip
EACH, NO_LABEL = -1, -2  # choices besides the labels' ids
OWN = "own"  # the scheduler that the run was saved with

_COLOURS = ["#ffffff", "#000000", "#d62728", "#2ca02c", "#1f77b4"]  # to draw with
_CSS = ".crisp img { image-rendering: pixelated; }"  # small pictures are shown large


class Stopped(Exception):
    """Whoever asked for the pictures doesn't want them any more."""


@dataclass(frozen=True)
class Drawn:
    """What a run has drawn: the pictures and what each is of, and how they came from noise, if that was asked for."""

    pictures: list[Image.Image]
    names: list[str]
    strip: Image.Image | None = None
    animation: bytes | None = None  # a WebP


class Exhibit:
    """A run on the page: its pipeline, what of it can be set, its scores.

    Args:
        run: a run folder or Hub id, of a diffusion model or of a GAN.
        device: by its name. Default: a GPU if there is one.

    Raises:
        InputError: there is no such run, or no such device.
    """

    def __init__(self, run: str, device: str | None = None):
        self.run = run
        self.name = Path(run).resolve().name if is_here(run, "the run") else run
        self.pipe = load_on(run, device)
        self.in_steps = scheduler_name(self.pipe) is not None  # a GAN draws in one pass
        self.scores = scores(run, self.pipe)
        if self.in_steps:
            self._own = self.pipe.scheduler
            self.schedulers = [OWN, *self._usable_schedulers()]
            self.default_steps = self.pipe.config.default_num_inference_steps
            trained = self.pipe.scheduler.config.num_train_timesteps
            self.most_steps = max(self.default_steps, min(MOST_STEPS, trained))
            self.takes_guidance = self._takes(guidance_scale=2.0)

    def _takes(self, **options) -> bool:
        try:
            self.pipe.check_inputs(num_inference_steps=self.pipe.config.default_num_inference_steps, **options)
        except ValueError:
            return False
        return True

    def _usable_schedulers(self) -> list[str]:
        usable = []
        for name in SAMPLERS:
            try:
                choose_scheduler(self.pipe, name)
            except InputError:  # of models of another kind
                continue
            if self._takes():
                usable.append(name)
            self.pipe.scheduler = self._own
        return usable

    def labels(self, choice, count: int) -> tuple[list | None, list[str]]:
        """The labels of `count` pictures as a call takes them, and what they are called.

        Args:
            choice: the id of a label, `EACH` for all in turn, or `NO_LABEL`; of a model of sets a list of ids.

        Raises:
            InputError: what the model doesn't know, or doesn't take.
        """
        known = self.pipe.id2label
        if not known:
            return None, [""] * count
        if self.pipe.config.max_labels > 1:
            labels = [list(choice or [])] * count
        elif choice == EACH:
            labels = [place % len(known) for place in range(count)]
        else:
            labels = [None if choice == NO_LABEL else choice] * count
        _accepted(self.pipe.encode_labels, labels)
        sets = label_ids(labels, known, self.pipe.config.max_labels)  # (B, T)
        return labels, [", ".join(names_of(ids, known)) or "no label" for ids in sets]

    def prepare(
        self,
        choice=None,
        count: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        interval: Sequence[float] | None = None,
        scheduler: str = OWN,
        truncation: float | None = None,
        image: Image.Image | None = None,
        strength: float | None = None,
        trajectory: bool = False,
    ) -> Callable[[Callable[[int, int], None]], Drawn]:
        """Check what was asked for, and return what draws it, which may be called before the next `prepare`.

        Args:
            choice: see [`~Exhibit.labels`].
            count: how many pictures, 1 to `MOST_PICTURES`.
            seed: of the first; the others have those after it.
            steps, guidance, interval: of a diffusion model; by default its own.
            scheduler: one of `schedulers`.
            truncation: of a GAN; none at `HIGHEST_TRUNCATION`, and by default.
            image, strength: what a diffusion model is to vary, and how far; a GAN leaves them.
            trajectory: draw the way from noise besides.

        Returns:
            A function that is told what to call after each step, with how many are done and how many there are.

        Raises:
            InputError: anything out of its bounds, or that the model doesn't take.
        """
        count = bounded("the number of pictures", count, 1, MOST_PICTURES, whole=True)
        seed = bounded("the seed", seed, 0, HIGHEST_SEED, whole=True)
        labels, names = self.labels(choice, count)
        call: dict = {"labels": labels, "num_images_per_prompt": 1 if labels else count}
        if not self.in_steps:
            if truncation is not None:
                truncation = bounded("truncation", truncation, LOWEST_TRUNCATION, HIGHEST_TRUNCATION)
                call["truncation"] = None if truncation == HIGHEST_TRUNCATION else truncation
            return lambda after_step: self._draw_at_once(names, seeds(seed, count), call, after_step)

        if steps is not None:
            steps = bounded("the number of steps", steps, 1, self.most_steps, whole=True)
        if guidance is not None:
            guidance = bounded("guidance", guidance, 1, max(HIGHEST_GUIDANCE, self._default_guidance()))
        scale, interval = guidance_of(self.pipe.config, guidance, interval)
        if scheduler not in self.schedulers:
            raise InputError(f"the scheduler must be one of {', '.join(self.schedulers)}, not {scheduler!r}")
        settings = {
            "num_inference_steps": self.default_steps if steps is None else steps,
            "guidance_scale": scale,
            "guidance_interval": tuple(bounded("the guided part", end, 0, 1) for end in interval),
        }
        if image is not None:
            call |= {"image": image, "strength": bounded("strength", strength, LOWEST_STRENGTH, 1)}
            _accepted(self.pipe.preprocess_image, image)
        self.pipe.scheduler = self._own
        choose_scheduler(self.pipe, None if scheduler == OWN else scheduler)
        _accepted(self.pipe.check_inputs, **settings, strength=call.get("strength"))
        call |= settings
        return lambda after_step: self._draw_in_steps(names, seeds(seed, count), call, trajectory, after_step)

    def _default_guidance(self) -> float:
        return self.pipe.config.default_guidance_scale

    def _draw_at_once(self, names, generators, call, after_step) -> Drawn:
        pictures = _accepted(self.pipe, generator=generators, **call).images
        after_step(1, 1)
        return Drawn(pictures, names)

    def _draw_in_steps(self, names, generators, call, trajectory, after_step) -> Drawn:
        def watch(pipe, step, timestep, tensors):
            after_step(step + 1, pipe.num_timesteps)
            return {}

        call = {**call, "generator": generators, "callback_on_step_end": watch}
        if not trajectory:
            return Drawn(_accepted(self.pipe, **call).images, names)
        moments = _accepted(denoising, self.pipe, MOMENTS, **call)
        strip = trajectory_strip(evenly(moments, COLUMNS), names if any(names) else None)
        return Drawn(moments[-1][1], names, strip, animated(trajectory_frames(moments), "webp"))


def _accepted(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def bounded(what: str, value, low: float, high: float, whole: bool = False) -> float:
    """The value, if it is a number, or a whole one, in the bounds.

    Raises:
        InputError: it isn't.
    """
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not low <= value <= high or (whole and value != int(value)):
        raise InputError(f"{what} must be a {'whole ' * whole}number from {low:g} to {high:g}, not {value!r:.40}")
    return int(value) if whole else float(value)


def scores(run: str, pipe) -> str:
    """What the run's evaluation and sweep say of the present weights, in Markdown; without any, how to make them."""
    digest, parts = weights_digest(pipe), []
    try:
        report = _saved(run, "evaluation.json")
        if report is not None and report["sampling"]["weights_sha256"] == digest:
            parts.append(as_table(report, markdown=True))
        rows = [row for row in _saved(run, "sweep/sweep.json") or [] if row["sampling"]["weights_sha256"] == digest]
        parts += [sweep_table(rows)] if rows else []
    except (OSError, ValueError, TypeError, KeyError, LookupError, AttributeError) as error:
        parts.append(f"The saved evaluation can't be read ({type(error).__name__}).")
    return "\n\n".join(parts) or "No evaluation of these weights is saved; `hwdiffusion evaluate` makes one."


def _saved(run: str, name: str):
    path = file_of(run, name)
    return None if path is None else json.loads(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def build(exhibits: list[Exhibit]):
    """The page of one run, or of two of the same labels and pictures: a `gradio.Blocks`."""
    import gradio as gr

    stops: dict[str, threading.Event] = {}  # of those who are being drawn for, by their session
    one_at_a_time = threading.Lock()  # a pipeline and its scheduler serve one drawing

    with gr.Blocks(title="hwdiffusion", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# {html.escape(' and '.join(exhibit.name for exhibit in exhibits))}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                shared, own, shown = _shared_controls(gr, exhibits), [], []
                with gr.Row():
                    draw_button = gr.Button("Draw", variant="primary", min_width=100, elem_id="draw")
                    stop_button = gr.Button("Stop", variant="stop", min_width=100, elem_id="stop")
                if len(exhibits) == 1:
                    own.append(_own_controls(gr, exhibits[0]))
                if any(exhibit.in_steps for exhibit in exhibits):
                    shared |= _variation_controls(gr, exhibits[0].pipe)
            with gr.Column(scale=3), gr.Row():
                for number, exhibit in enumerate(exhibits):
                    with gr.Column(min_width=320, elem_id=f"run-{number}"):
                        if len(exhibits) > 1:
                            gr.Markdown(f"### {html.escape(exhibit.name)}")
                            own.append(_own_controls(gr, exhibit))
                        shown.append(_results(gr, exhibit))

        def draw(values: dict, request: gr.Request, progress=gr.Progress()):  # noqa: B008  as Gradio wants it
            stop = stops[request.session_hash] = threading.Event()

            def reading(controls: dict) -> dict:
                return {name: values[control] for name, control in controls.items()}

            def after_step(number: int, done: int, steps: int):
                if stop.is_set():
                    raise Stopped
                progress((done, steps), desc=exhibits[number].name, unit="steps")

            try:
                with one_at_a_time:
                    asked = [_asked(exhibit, reading(shared), reading(one)) for exhibit, one in zip(exhibits, own)]
                    prepared = [exhibit.prepare(**one) for exhibit, one in zip(exhibits, asked)]
                    results = []
                    for number, drawn_by in enumerate(prepared):
                        after_step(number, 0, 1)
                        drawn = drawn_by(lambda done, steps, number=number: after_step(number, done, steps))
                        results += _results_of(gr, exhibits[number], drawn)
                    return results
            except Stopped:
                return [gr.skip() for one in shown for _ in one]
            except InputError as error:
                raise gr.Error(_sentence(error), print_exception=False) from error
            finally:
                if stops.get(request.session_hash) is stop:
                    del stops[request.session_hash]

        def stop(request: gr.Request):
            if request.session_hash in stops:
                stops[request.session_hash].set()

        drawing = draw_button.click(
            draw,
            inputs={*shared.values(), *(control for controls in own for control in controls.values())},
            outputs=[component for one in shown for component in one],
            show_progress_on=[one[0] for one in shown],
            api_visibility="private",
        )
        # what is drawn ends after its step; what waits in the queue leaves it
        stop_button.click(stop, queue=False, api_visibility="private")
        stop_button.click(None, cancels=[drawing], queue=False, api_visibility="private")
        page.unload(stop)
    page.queue(max_size=MOST_WAITING, api_open=False, default_concurrency_limit=1)
    return page


def _sentence(error: InputError) -> str:
    said = str(error)
    return said[:1].upper() + said[1:] + "."


def _shared_controls(gr, exhibits: list[Exhibit]) -> dict:
    """What is the same for both runs: what to draw."""
    controls, pipe = {}, exhibits[0].pipe
    known = [(name, index) for index, name in pipe.id2label.items()]
    if known and pipe.config.max_labels > 1:
        most = pipe.config.max_labels
        controls["choice"] = gr.Dropdown(
            known, value=[known[0][1]], multiselect=True, max_choices=most, label=f"labels (at most {most})",
            elem_id="labels",
        )  # fmt: skip
    elif known:
        null = all(exhibit.pipe.config.get("has_null_label", False) for exhibit in exhibits)
        choices = [("each in turn", EACH), *known, *([("no label", NO_LABEL)] if null else [])]
        controls["choice"] = gr.Dropdown(choices, value=EACH, label="label", elem_id="labels")
    controls["count"] = gr.Slider(1, MOST_PICTURES, value=8, step=1, label="pictures", elem_id="count")
    controls["seed"] = gr.Number(
        0, precision=0, minimum=0, maximum=HIGHEST_SEED, label="seed of the first", elem_id="seed"
    )
    another = gr.Button("Another seed", size="sm")
    another.click(
        lambda: random.randrange(HIGHEST_SEED + 1), outputs=controls["seed"], queue=False, api_visibility="private"
    )
    if any(exhibit.in_steps for exhibit in exhibits):
        controls["trajectory"] = gr.Checkbox(True, label="show the way from noise")
    return controls


def _variation_controls(gr, pipe) -> dict:
    """What both runs start from, if not from noise."""
    with gr.Accordion("Variation", open=False, elem_id="variation"):
        return {
            "varied": gr.Checkbox(False, label="start from this picture, drawn or uploaded"),
            "picture": _canvas(gr, pipe),
            "strength": gr.Slider(LOWEST_STRENGTH, 1, value=0.6, step=0.05, label="strength: how far it is noised"),
        }


def _canvas(gr, pipe):
    """Where a picture is drawn with the mouse, or uploaded: white on black for a model without colours."""
    height, width = pipe.image_size
    scale = max(1, round(280 / max(height, width)))
    ground, ink = ("black", "#ffffff") if image_mode_of(pipe) == "L" else ("white", "#000000")
    empty = Image.new("RGB", (width * scale, height * scale), ground)
    return gr.ImageEditor(
        {"background": empty, "layers": [], "composite": empty},
        type="pil",
        image_mode="RGB",
        sources=("upload", "clipboard"),
        canvas_size=empty.size,
        brush=gr.Brush(default_size=max(4, 2 * scale), default_color=ink, colors=_COLOURS),
        layers=False,
        transforms=(),
        buttons=[],
        show_label=False,
        format="png",
    )


def _own_controls(gr, exhibit: Exhibit) -> dict:
    """What is set for each run by itself: how it samples."""
    controls = {}
    with gr.Accordion("Sampling", open=True):
        if not exhibit.in_steps:
            controls["truncation"] = gr.Slider(
                LOWEST_TRUNCATION, HIGHEST_TRUNCATION, value=HIGHEST_TRUNCATION, step=0.1,
                label=f"truncation (none at {HIGHEST_TRUNCATION:g})",
            )  # fmt: skip
            return controls
        names = [(f"the run's own ({type(exhibit.pipe.scheduler).__name__})", OWN)]
        controls["scheduler"] = gr.Dropdown(
            [*names, *((name, name) for name in exhibit.schedulers[1:])], value=OWN, label="scheduler"
        )
        controls["steps"] = gr.Slider(1, exhibit.most_steps, value=exhibit.default_steps, step=1, label="steps")
        if exhibit.takes_guidance:
            default = exhibit.pipe.config.default_guidance_scale
            highest = max(HIGHEST_GUIDANCE, default)
            controls["guidance"] = gr.Slider(1, highest, value=default, step=0.1, label="guidance scale (none at 1)")
            start, stop = exhibit.pipe.config.default_guidance_interval
            controls["start"] = gr.Slider(0, 1, value=start, step=0.05, label="guided from")
            controls["stop"] = gr.Slider(0, 1, value=stop, step=0.05, label="to this part")
    return controls


def _results(gr, exhibit: Exhibit) -> list:
    """Where a run's pictures appear, the way from noise, and its scores."""
    shown = [
        gr.Gallery(
            show_label=False, columns=4, object_fit="contain", format="png", interactive=False, height="auto",
            buttons=["download", "fullscreen"], elem_classes=["crisp", "pictures"],
        )
    ]  # fmt: skip
    if exhibit.in_steps:
        with gr.Accordion("From noise", open=True), gr.Row():
            with gr.Column(scale=3, min_width=320):
                buttons = ["download", "fullscreen"]
                strip = gr.Image(
                    show_label=False, format="png", interactive=False, buttons=buttons, elem_classes="strip"
                )
            with gr.Column(scale=1, min_width=160):
                shown += [strip, gr.HTML(elem_classes="animation")]
    with gr.Accordion("Scores", open=False):
        gr.Markdown(exhibit.scores, elem_classes=["scores"])
    return shown


def _asked(exhibit: Exhibit, shared: dict, own: dict) -> dict:
    """What the controls say, as `prepare` takes it.

    Raises:
        InputError: a variation of nothing.
    """
    asked = {**shared, **own}
    varied, picture = asked.pop("varied", False), asked.pop("picture", None)
    if "start" in asked:
        asked["interval"] = (asked.pop("start"), asked.pop("stop"))
    if not exhibit.in_steps or not varied:
        asked.pop("strength", None)
        return asked
    image = picture.get("composite") if picture else None
    if image is None:
        raise InputError("there is no picture to vary: draw or upload one, or start from noise")
    return {**asked, "image": image}


def _results_of(gr, exhibit: Exhibit, drawn: Drawn) -> list:
    """What a run has drawn as its components take it."""
    pictures = list(zip(drawn.pictures, drawn.names))
    if not exhibit.in_steps:
        return [pictures]
    if drawn.animation is None:
        return [pictures, None, ""]
    encoded = base64.b64encode(drawn.animation).decode()
    return [pictures, drawn.strip, f'<img alt="the way from noise" src="data:image/webp;base64,{encoded}">']


# ---------------------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------------------


def serve(runs: Sequence[str], host: str = "127.0.0.1", port: int = 7860, device: str | None = None):
    """Serve the page of one run or two until Ctrl-C.

    Args:
        runs: run folders or Hub ids.
        host: the address to listen on: by default this machine alone can reach it, at `0.0.0.0` everybody.
        port: 0 for any that is free.

    Raises:
        InputError: before anything is loaded, Gradio isn't installed, the port is taken or the host isn't this
            machine's; then, that there is no such run, or that two don't go together.
        RunError: the server doesn't start.
    """
    check_installed()
    port = check_address(host, port)
    exhibits = [Exhibit(run, device) for run in runs]
    check_alike({exhibit.run: exhibit.pipe for exhibit in exhibits})
    if len({exhibit.name for exhibit in exhibits}) < len(exhibits):  # "best" of two runs
        for exhibit in exhibits:
            exhibit.name = exhibit.run
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # of an upload: a small file may hold a huge picture
    page = build(exhibits)
    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host and host[0] != "[" else host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            show_error=False,  # those that we raise are shown all the same
            prevent_thread_lock=True,
            allowed_paths=[],
            max_file_size=LARGEST_UPLOAD,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            css=_CSS,
        )
    except (OSError, RuntimeError) as error:
        raise RunError(f"the page can't be served at {host}:{port}: {' '.join(str(error).split())[:200]}") from error
    print(f"{' and '.join(exhibit.name for exhibit in exhibits)}: {page.local_url} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would tell of what it breaks off
        page.server.force_exit = True  # it would wait for the tabs that are open
        page.close(verbose=False)


def check_installed():
    """Raise InputError where Gradio isn't installed."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError('hwdiffusion demo needs Gradio; install it with `pip install "hwdiffusion[demo]"`')


def check_address(host: str, port: int) -> int:
    """The port, or for 0 one that is free, if a server can listen there.

    Raises:
        InputError: it can't, and why.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be in 0 to 65535, not {port}")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(address)
            return probe.getsockname()[1]
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        if number == errno.EADDRINUSE:
            raise InputError(f"port {port} of {host} is taken; name another --port, or 0 for any free one") from None
        if number == errno.EACCES:
            raise InputError(f"port {port} of {host} needs an administrator; name one from 1024 to 65535") from None
        raise InputError(f"--host {host} is no address of this machine; give 127.0.0.1 or 0.0.0.0") from None
