"""What every training loop shares: devices, averaged weights, checkpoints, resuming, logging, sample grids.

It knows no loss. A script adds its models, then iterates over `batches`; what is around a step happens in there:

    trainer = Trainer(config, len(dataset))
    unet = trainer.add_model("unet", unet, learning_rate=1e-3)
    for batch in trainer.batches(dataset, save=..., preview=...):
        loss = ...
        trainer.update("unet", loss)
        trainer.log(loss=loss)
"""

import atexit
import contextlib
import json
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from tqdm.auto import tqdm

from hwdiffusion import InputError, Interrupted, RunError, figures
from hwdiffusion.checkpoints import (
    CHECKPOINT,
    STATE_FILE,
    checkpoint_to_resume,
    delete_other_checkpoints,
    find_checkpoints,
    flaw_of,
    write_checksums,
    write_folder,
    write_into,
)
from hwdiffusion.compilation import compile_in_place, eager
from hwdiffusion.config import Config
from hwdiffusion.failures import sentence_of
from hwdiffusion.host import prepare_host
from hwdiffusion.interruption import Interruption, leave_signals_to_the_parent
from hwdiffusion.labels import balanced_order
from hwdiffusion.randomness import BatchOrder, Draws, epoch_order, seed_modules
from hwdiffusion.run_clock import RunClock
from hwdiffusion.sources import few
from hwdiffusion.trained_model import TrainedModel
from hwdiffusion.training_log import TrainingLog
from hwdiffusion.training_record import note_progress, note_start


BEST_FILE = "best.json"
TRIAL_STEPS, WARM_UP_STEPS = 10, 2  # a run in small, by which the time of a step is measured


@dataclass
class Batch:
    """Some samples of a step: what the data set gave for them, and their random numbers."""

    data: Any
    draws: Draws
    step: int


@dataclass
class Evaluation:
    """What is measured while a run is trained: every so many `steps`, and at the end."""

    steps: int | None
    measure: Callable[[], dict[str, float]]  # called on all processes, which share the work
    rank: Callable[[dict[str, float]], float] | None = None  # the best, which is kept, is the one that ranks highest
    judge: dict | None = None  # what must be the same for figures to compare
    draws: bool = False  # whether a preview goes with the figures


def _as_it_is(batch):
    return batch


class Trainer:
    """Runs one training in its folder, and continues it where it stopped.

    Args:
        config: the script's configuration.
        epoch_size: the number of samples of an epoch.
    """

    def __init__(self, config: Config, epoch_size: int):
        self.config, self.args = config, config.args
        self.output_dir = Path(self.args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=self.args.mixed_precision,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            log_with=self.args.report_to,
            project_dir=str(self.output_dir),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            dynamo_backend="no",  # else it would compile every model, and those that no compiler can follow
        )
        self.device = self.accelerator.device
        prepare_host(self.device)
        self.step = 0  # optimizer steps done
        self.epoch_size = epoch_size
        self.step_size = (
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        )
        self.steps_per_epoch = max(1, epoch_size / self.step_size)
        self._sample_steps = {
            *(self.args.sample_steps or []),
            *(round(epoch * self.steps_per_epoch) for epoch in self.args.sample_epochs or []),
        }
        self._clock = RunClock(self.args.max_train_seconds)
        self._passed: dict[float, int] = {}  # the parts of the run that were asked for and are over, and when
        self.max_steps: int | None = None  # of a run with a time budget what the clock says, and again and again
        if self.args.max_train_seconds is None:
            epochs = self.args.num_train_epochs
            self.max_steps = self.args.max_train_steps or -(-epoch_size * epochs // self.step_size)
        self._models: dict[str, TrainedModel] = {}
        self._compiled = False
        self._states: dict[str, torch.nn.Module] = {}
        self._log = TrainingLog(self.accelerator, self.output_dir, self.step_size, self._stop_at_what_is_not_finite)
        self._order: BatchOrder | None = None
        self._streams = False
        self._saved_step: int | None = None

    def print(self, text: str):
        """Print once, whatever the number of processes."""
        self.accelerator.print(text)

    @property
    def is_main_process(self) -> bool:
        return self.accelerator.is_main_process

    # -- models and other state ---------------------------------------------------------------------------------------

    def add_model(
        self,
        name: str,
        model: torch.nn.Module,
        learning_rate: float,
        ema: bool = True,
        starts_at: float = 0.0,
        every: int = 1,
        torch_compile: str = "no",
    ) -> torch.nn.Module:
        """Register a model for training by AdamW; the wrapped model is returned.

        With `ema` an average of its weights is kept, if the run wants one, and is what `save` and `preview` see.
        `starts_at` is the part of the run after which its training starts; its learning-rate schedule spans the rest.
        With `every` it is trained at every so many steps only, which are those that its schedule counts.
        `torch_compile` says what of its training steps is compiled ([`compile_in_place`]).
        """
        model.to(self.device).train()
        ema = ema and self.args.use_ema
        trained = TrainedModel(self.accelerator, model, learning_rate, self.args, ema, starts_at, every)
        self._models[name] = trained
        self._compiled |= compile_in_place(trained.stock, torch_compile, self.device)
        return trained.model

    def add_state(self, name: str, module: torch.nn.Module):
        """Register a module without optimizer whose state belongs into checkpoints: counts, of which each process has
        its own, or, if its attribute `alike` names them, what is the same on all processes."""
        self._states[name] = module.to(self.device)

    def average(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """What is kept as the average of a parameter, if anything is."""
        return self._models[name].average_of(parameter)

    def unwrap(self, name: str) -> torch.nn.Module:
        return self._models[name].stock

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        return self._models[name].optimizer

    @contextlib.contextmanager
    def averaged_weights(self):
        """Within it the models are in evaluation mode and have their averaged weights."""
        for trained in self._models.values():
            trained.show_average()
        try:
            with torch.no_grad(), eager(self._compiled):
                yield
        finally:
            for trained in self._models.values():
                trained.hide_average()

    # -- within a step ------------------------------------------------------------------------------------------------

    def update(self, name: str, loss: torch.Tensor):
        """Backward; on a step's last micro-batch clip the gradients and step the optimizer."""
        trained = self._models[name]
        prefix = "" if name == next(iter(self._models)) else f"{name}_"
        learning_rate = trained.optimizer.param_groups[0]["lr"]
        norm = trained.update(loss)
        if norm is not None:
            self._log.add({f"{prefix}gradient_norm": norm, f"{prefix}learning_rate": learning_rate})
            if trained.skipped:
                self._log.add({"skipped": 1.0})

    def log(self, **values: torch.Tensor | float):
        """Note figures of this micro-batch; they stay on the device until they are written, some steps at once."""
        self._log.add(values)

    def step_at(self, part: float) -> int:
        """The step at which a part of the run, in [0, 1], is over; what is over stays so, if the run's end moves."""
        if part in self._passed:
            return self._passed[part]
        step = round(part * self.max_steps)
        if step <= self.step:
            self._passed[part] = step
        return step

    def ends_interval(self, steps: int) -> bool:
        """Whether this is the last micro-batch of every so many steps; never if `steps` is 0."""
        return steps > 0 and self.accelerator.sync_gradients and (self.step + 1) % steps == 0

    def mean_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, "mean")

    # -- the loop -----------------------------------------------------------------------------------------------------

    def batches(
        self,
        dataset,
        save: Callable[[Path], None],
        preview: Callable[[], Any] | None = None,
        evaluation: Evaluation | None = None,
    ) -> Iterator[Batch]:
        """Yield micro-batches until the run is done; checkpoints, logs and grids are made in between.

        Args:
            dataset: `dataset[list of indices]` gives the data of a batch; or a stream, which reads a `BatchOrder`.
            save: writes the artefact (a pipeline, a model) with the present weights into a folder.
            preview: returns a picture of what the model does; called on all processes, which share the work.
            evaluation: measures what the model does; the best artefact is kept in `best`, if it ranks them.

        Raises:
            Interrupted: by SIGTERM or SIGINT, after a checkpoint.
            RunError: a loss or a gradient is not finite.
        """
        state = None if self.args.dry_run else self._state_to_resume()
        if state is not None and "seconds" in state:  # earlier versions kept none
            self._clock.resume(state["seconds"])
            self._passed = dict(state.get("passed", {})) if self._keeps_its_budget(state) else {}
            if self.max_steps is None:
                self.max_steps = self._end_of_budget(state)
        if self.args.dry_run or self.max_steps is None:
            seconds_a_step = yield from self._trial(dataset)
            if self.args.dry_run:
                self._report_dry_run(seconds_a_step)
                return
            done = 0 if state is None else state["step"]
            self.max_steps = max(1, done + self._steps_within(seconds_a_step))
        self._plan()
        self._resume(state)
        if self.is_main_process:
            self.config.save(self.output_dir / "config.yaml")
            if self.step < self.max_steps:  # else nothing is trained, and the record is of what was
                note_start(self.output_dir, self.config.command, self.device, self.accelerator.num_processes)
        self.accelerator.init_trackers("hwdiffusion")
        processes = self.accelerator.num_processes
        self.print(
            f"{self.config.script}: {self.max_steps} steps of {self.step_size} pictures on {processes} "
            f"{'process' if processes == 1 else 'processes'} ({self.device.type}), from step {self.step}"
        )
        progress = tqdm(
            total=self.max_steps * self.step_size,
            initial=self.step * self.step_size,
            unit="img",
            desc=self.config.script,
            disable=not self.is_main_process,
            mininterval=1.0,
        )
        with contextlib.ExitStack() as stack:
            interruption = stack.enter_context(Interruption())
            stack.callback(progress.close)
            loader = self._loader(dataset)
            stack.callback(self._close, loader)
            self._log.clear()
            self._clock.mark(self.step)
            while self.step < self.max_steps:
                yield from self._micro_batches(loader)
                self._finish_step(progress, save, preview, evaluation)
                self._log.resume_clock()
                signal_number = interruption.agreed()
                if signal_number:
                    self._close(loader)
                    self._stop(signal_number, save)
        self._finish(save)

    def _loader(self, dataset) -> Iterator:
        self._order = BatchOrder(
            self.args.seed,
            self.epoch_size,
            self.step,
            self.args.train_batch_size,
            self.args.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            balanced_order(dataset.labels, self.args.class_balance) if self.args.class_balance > 0 else epoch_order,
        )
        self._streams = hasattr(dataset, "read")
        if self._streams:
            return dataset.read(self._order)
        workers = self.args.dataloader_num_workers if getattr(dataset, "reads_files", False) else 0
        if not sys.platform.startswith("linux"):
            workers = 0  # sources are closures, which another process can only inherit, by fork
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=self._order,
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=leave_signals_to_the_parent,
        )
        iterator = iter(loader)
        # Not left to the garbage collector: any traceback that a library keeps would keep the workers, which ignore
        # the signal by which Python ends them.
        atexit.register(self._close, iterator)
        return iterator

    def _close(self, loader: Iterator):
        atexit.unregister(self._close)
        close = getattr(loader, "_shutdown_workers" if hasattr(loader, "_shutdown_workers") else "close", None)
        if close is not None:
            close()

    def _micro_batches(self, loader: Iterator) -> Iterator[Batch]:
        models = [trained.model for trained in self._models.values()]
        for micro_batch in range(self.args.gradient_accumulation_steps):
            try:
                data = [tensor.to(self.device, non_blocking=True) for tensor in next(loader)]
            except InputError as error:  # a process that reads pictures sends a whole traceback
                raise InputError(str(error).strip().splitlines()[-1].split("InputError: ", 1)[-1]) from error
            places = torch.from_numpy(self._order.places(micro_batch)).to(self.device, non_blocking=True)
            # for what draws by itself, dropout: it too must not depend on the run's history
            coordinates = [self.args.seed, self.step, micro_batch, self.accelerator.process_index]
            seed = int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0] >> 1)
            seed_modules(seed, self.device)
            with self.accelerator.accumulate(*models):
                yield Batch(data, Draws(self.args.seed, self.step, places), self.step)
        for trained in self._models.values():
            trained.update_average()
        self.step += 1
        self._log.end_step()

    def _finish_step(self, progress, save, preview, evaluation):
        progress.update(self.step_size)
        if self._clock.is_to_look(self.step, self.max_steps):
            self._replan(progress)
        last = self.step == self.max_steps
        evaluated = evaluation is not None and (last or self.step % (evaluation.steps or self.max_steps) == 0)
        wanted = last or self.step in self._sample_steps or (evaluated and evaluation.draws)
        drawn = preview is not None and wanted
        saved = last or self._ends_checkpoint()
        if evaluated or drawn or saved or self.step % self.args.logging_steps == 0:
            lines = self._log.fetch(self.step)  # before anything is saved of weights that may not be finite
            if evaluated:
                lines[-1].update(self._evaluate(evaluation, save))
            self._log.write(lines)
            shown = {name: f"{value:.4g}" for name, value in self._log.latest.items()}
            progress.set_postfix(step=f"{self.step}/{self.max_steps}", **shown, refresh=False)
        if drawn:
            self._draw(preview)
        if saved:
            self.save_checkpoint(save)

    def _stop(self, signal_number: int, save):
        self._log.write(self._log.fetch(self.step))
        if self._saved_step != self.step:
            self.save_checkpoint(save)
        self._finish_trackers()
        how = "the same command continues from it"
        if self.args.overwrite_output_dir:
            how = "the same command without --overwrite_output_dir continues from it"
        elif self.args.resume_from_checkpoint not in (None, "latest"):
            how = "the same command with --resume_from_checkpoint latest continues from it"
        raise Interrupted(
            f"stopped by {signal.Signals(signal_number).name} after step {self.step} of {self.max_steps}; "
            f"{self.output_dir / f'{CHECKPOINT}{self.step}'} is saved, and {how}",
            signal_number,
        )

    def _finish(self, save):
        """The artefact itself goes into the run folder; done again, it does no harm."""

        def write():
            with self.averaged_weights():
                write_into(self.output_dir, save, last=("config.json", "model_index.json"))
            figures.loss_curve(self._log.path, self.output_dir / "loss.png")

        self._by_main_process(write)
        skipped = self._log.skipped_steps()
        if skipped:
            self.print(f"{skipped} of {self.max_steps} steps were skipped: their gradient was not finite")
        self._finish_trackers()

    def _by_main_process(self, write: Callable[[], None]):
        """Let one process write, while the others wait; where the disk refuses, all stop, with one sentence."""
        refused: list[str | None] = [None]
        if self.is_main_process:
            try:
                write()
            except Exception as error:
                refused = [sentence_of(error)]
                if refused == [None]:
                    raise
        if self.accelerator.num_processes > 1:
            broadcast_object_list(refused)
        if refused[0] is not None:
            raise RunError(refused[0])

    def _finish_trackers(self):
        for tracker in self.accelerator.trackers:
            tracker.finish()  # end_training would also part the processes, which a second stage still needs

    def _stop_at_what_is_not_finite(self, step: int, name: str, value: float):
        whole = (path for path in find_checkpoints(self.output_dir) if flaw_of(path) is None)
        checkpoint = next(whole, None)
        where = "no checkpoint was made before" if checkpoint is None else f"the last good checkpoint is {checkpoint}"
        if self._streams:
            pictures = f"{(step - 1) * self.step_size} to {step * self.step_size - 1} of the stream"
        else:
            pictures = few(self._order.of_step(step - 1), 64)
        raise RunError(
            f"{name} is {value} at step {step}, on the training pictures {pictures}; {where}; lower --learning_rate, "
            "look at those pictures, or leave such steps out by --skip_nonfinite_steps true, and go on with "
            "--resume_from_checkpoint latest"
        )

    # -- how long -----------------------------------------------------------------------------------------------------

    def _plan(self):
        """What depends on the number of steps: the learning-rate schedules."""
        for trained in self._models.values():
            trained.schedule(self.max_steps - self.step_at(trained.starts_at))

    def _ends_checkpoint(self) -> bool:
        """Whether a checkpoint is due: by default every tenth of the run."""
        tenth = max(1, self.max_steps // 10)
        if self.args.checkpointing_steps is None and self.args.max_train_seconds is not None:
            return self.step - (self._saved_step or 0) >= tenth  # of a run whose end moves
        return self.step % (self.args.checkpointing_steps or tenth) == 0

    def _trial(self, dataset) -> Generator[Batch, None, float]:
        """A run in small, which leaves no trace; it returns the seconds that a step takes."""
        planned = self.max_steps
        self.max_steps = TRIAL_STEPS
        self._plan()
        models = {name: trained.snapshot() for name, trained in self._models.items()}
        states = {
            name: {key: tensor.clone() for key, tensor in module.state_dict().items()}
            for name, module in self._states.items()
        }
        scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        loader = self._loader(dataset)
        try:
            while self.step < TRIAL_STEPS:
                if self.step == WARM_UP_STEPS:
                    self._synchronize()
                    began = self._clock.seconds
                yield from self._micro_batches(loader)
            self._synchronize()
            seconds = max(1e-9, (self._clock.seconds - began) / (TRIAL_STEPS - WARM_UP_STEPS))
        finally:
            self._close(loader)
        for name, trained in self._models.items():
            trained.load_state_dict(models[name])
        for name, module in self._states.items():
            module.load_state_dict(states[name])
        if scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        self._log.clear()
        self._passed.clear()
        self.step, self.max_steps = 0, planned
        return seconds

    def _synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _steps_within(self, seconds_a_step: float) -> int:
        """The steps for which a time budget still has time."""
        steps = self._agreed(self._clock.steps_within(seconds_a_step))
        self.print(f"{steps} steps of {seconds_a_step:.3f} s within --max_train_seconds {self._clock.budget:g}")
        return steps

    def _end_of_budget(self, state: dict[str, Any]) -> int:
        """At which step a run ends that has a time budget and was stopped."""
        if state["step"] == state["max_steps"] and self._keeps_its_budget(state):
            return state["step"]  # it was done
        return state["step"] + self._steps_within(max(1e-9, state["seconds"]) / state["step"])

    def _keeps_its_budget(self, state: dict[str, Any]) -> bool:
        """Whether a run with a time budget goes on with the same one: then only the clock moves its end."""
        budget = self.args.max_train_seconds
        return budget is not None and state.get("max_train_seconds") == budget

    def _agreed(self, number: int) -> int:
        """The main process's number, on all of them."""
        numbers = [number]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(numbers)
        return numbers[0]

    def _replan(self, progress):
        """Fit the end of the run, and with it the learning-rate schedules, to the time that is left."""
        self._synchronize()
        self.max_steps = self.step + self._agreed(self._clock.steps_left(self.step))
        for trained in self._models.values():
            trained.stretch(self.max_steps - self.step_at(trained.starts_at))
        progress.total = self.max_steps * self.step_size

    def _report_dry_run(self, seconds: float):
        steps = self.max_steps
        if steps is None:
            steps = self._steps_within(seconds)
        if not self.is_main_process:
            return
        print(yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        for name, trained in self._models.items():
            print(f"{name}: {sum(parameter.numel() for parameter in trained.model.parameters()):,} parameters")
        print(f"{steps} steps of {self.step_size} pictures ({steps / self.steps_per_epoch:.1f} epochs)")
        print(f"{seconds:.3f} s a step on {self.device}, about {steps * seconds / 60:.1f} minutes in all")

    # -- pictures and figures of what the model does ------------------------------------------------------------------

    def _draw(self, preview):
        with self.averaged_weights():
            picture = preview()

        def write():
            (self.output_dir / "samples").mkdir(exist_ok=True)
            for path in (self.output_dir / "samples" / f"step-{self.step}.png", self.output_dir / "samples.png"):
                picture.save(path)
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"samples": np.asarray(picture)[None]}, step=self.step, **layout)

        self._by_main_process(write)

    def _evaluate(self, evaluation: Evaluation, save) -> dict[str, float]:

        def write(part: Path):
            save(part)
            said = {"step": self.step, **measured, "judge": evaluation.judge}
            (part / BEST_FILE).write_text(json.dumps(said), encoding="utf-8")

        def keep_the_best():
            if evaluation.rank is not None:
                earlier = self._best_so_far(evaluation)
                if earlier is None or evaluation.rank(measured) > evaluation.rank(earlier):
                    write_folder(self.output_dir / "best", write)
            said = [f"step {self.step}", *(f"{name} {value:.4g}" for name, value in measured.items())]
            tqdm.write(", ".join(said))

        with self.averaged_weights():
            measured = evaluation.measure()
            self._by_main_process(keep_the_best)
        return measured

    def _best_so_far(self, evaluation: Evaluation) -> dict | None:
        """What was measured of the best pipeline, if by the same judge, and not on a course that the run has left."""
        path = self.output_dir / "best" / BEST_FILE
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        same = said is not None and said["judge"] == evaluation.judge and said["step"] <= self.step
        return said if same else None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, save: Callable[[Path], None]):
        """Write `checkpoint-STEP`: what a run continues from, and the artefact with its averaged weights."""
        states = {name: module.state_dict() for name, module in self._states.items()}
        # Of counts the sum over processes is what matters, and it suits any number of processes.
        states = {
            name: {
                key: tensor.cpu() if key in self._alike(name) else self.accelerator.reduce(tensor.clone(), "sum").cpu()
                for key, tensor in state.items()
            }
            for name, state in states.items()
        }

        def write_all():
            seconds = self._clock.seconds
            state = {
                "script": self.config.script,
                "step": self.step,
                "max_steps": self.max_steps,
                "seconds": seconds,
                "max_train_seconds": self.args.max_train_seconds,
                "passed": self._passed,
                "step_size": self.step_size,
                "epoch_size": self.epoch_size,
                "models": {name: trained.state_dict() for name, trained in self._models.items()},
                "states": states,
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            }

            def write(part: Path):
                with open(part / STATE_FILE, "wb") as file:
                    torch.save(state, file)
                with self.averaged_weights():
                    save(part)
                write_checksums(part)

            write_folder(self.output_dir / f"{CHECKPOINT}{self.step}", write)
            delete_other_checkpoints(self.output_dir, self.step, self.args.checkpoints_total_limit)
            note_progress(self.output_dir, self.step, seconds)

        self._by_main_process(write_all)
        self._saved_step = self.step

    def _alike(self, name: str) -> tuple[str, ...]:
        return getattr(self._states[name], "alike", ())

    def _state_to_resume(self) -> dict[str, Any] | None:
        checkpoint = checkpoint_to_resume(self.args)
        found = [None if checkpoint is None else checkpoint.name]
        if self.accelerator.num_processes > 1 and len(set(gather_object(found))) > 1:
            raise InputError(
                f"the processes find different checkpoints in --output_dir {self.output_dir}; it must be on a disk "
                "that all machines share"
            )
        if checkpoint is None:
            return None
        # weights_only: nothing but tensors and plain values is unpickled
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        for key, what in (("step_size", "pictures a step over all processes"), ("epoch_size", "training pictures")):
            if state[key] != getattr(self, key) and self.args.resume_from_checkpoint is None:
                raise InputError(
                    f"{checkpoint} was made with {state[key]} {what}, but now there are {getattr(self, key)}; start "
                    "it as before, or give --resume_from_checkpoint latest to go on all the same"
                )
        return {**state, "of": checkpoint}

    def _resume(self, state: dict[str, Any] | None):
        """Continue from a checkpoint's state, if there is one, and leave the course that an interrupted run was on."""
        if state is not None:
            for name, trained in self._models.items():
                try:
                    trained.load_state_dict(state["models"][name])
                except (KeyError, RuntimeError, ValueError) as error:
                    reason = " ".join(str(error).split())[:200]
                    raise InputError(f"{state['of']} is of another model than this run's {name}: {reason}") from error
            for name, module in self._states.items():
                alike, first = self._alike(name), self.is_main_process  # which carries sums over processes on
                saved = state["states"][name].items()
                module.load_state_dict({key: tensor * (first or key in alike) for key, tensor in saved})
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step = self._saved_step = state["step"]
            if self.max_steps < self.step:
                raise InputError(
                    f"{state['of']} has done {self.step} steps, but the run should now end after {self.max_steps}; "
                    "give it a longer end, or name another --output_dir"
                )
            if state["max_steps"] != self.max_steps and not self._keeps_its_budget(state):
                self._say_what_another_end_changes(state)
        self.accelerator.wait_for_everyone()  # all have read before one of them writes
        self._log.forget_after(self.step)

    def _say_what_another_end_changes(self, state: dict[str, Any]):
        self.print(f"the run now ends at step {self.max_steps} instead of {state['max_steps']}")
        for name, trained in self._models.items():
            before = state["models"][name]["lr_scheduler"]["_last_lr"][0]
            now = trained.optimizer.param_groups[0]["lr"]
            if before != now:
                self.print(
                    f"the {self.args.lr_scheduler} schedule of {name} is stretched over all of it: its learning rate "
                    f"goes on from {now:.3g}, where the shorter one had come to {before:.3g}"
                )
