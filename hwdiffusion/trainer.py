"""What every training loop shares: devices, averaged weights, checkpoints, resuming, logging, sample grids.

It knows no loss. A script adds its models, then iterates over `batches`; what is around a step happens in there:

    trainer = Trainer(config, len(dataset))
    unet = trainer.add_model("unet", unet, learning_rate=1e-3)
    for batch in trainer.batches(dataset, save=..., preview=...):
        loss = ...
        trainer.update("unet", loss)
        trainer.log(loss=loss)
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from hwdiffusion import InputError, figures
from hwdiffusion.config import Config
from hwdiffusion.randomness import BatchOrder, Draws
from hwdiffusion.run_folder import (
    CHECKPOINT,
    STATE_FILE,
    checkpoint_to_resume,
    find_checkpoints,
    replace_folder,
    sync_to_disk,
    use_all_cores,
)


BEST_FILE = "evaluation.json"
DRY_RUN_STEPS = 6


@dataclass
class Batch:
    """Some samples of a step: what the data set gave for them, and their random numbers."""

    data: Any
    draws: Draws
    step: int


@dataclass
class _Part:
    model: torch.nn.Module  # as wrapped for distributed training
    optimizer: torch.optim.Optimizer
    lr_scheduler: Any
    ema: EMAModel | None


@dataclass
class Evaluation:
    """What is measured while a run is trained: every so many `steps`, and at the end."""

    steps: int
    measure: Callable[[], dict[str, float]]
    rank: Callable[[dict[str, float]], float]  # the best is the one that ranks highest
    judge: dict  # what must be the same for figures to compare


def _as_it_is(batch):
    return batch


def _load_part(part: _Part, model: torch.nn.Module, saved: dict):
    """Load a model with its optimizer, schedule and average, but keep the settings that the run has now."""
    model.load_state_dict(saved["model"])
    settings = [{k: v for k, v in group.items() if k != "params"} for group in part.optimizer.param_groups]
    part.optimizer.load_state_dict(saved["optimizer"])
    base_lrs = part.lr_scheduler.base_lrs
    part.lr_scheduler.load_state_dict({**saved["lr_scheduler"], "base_lrs": base_lrs})
    lambdas = part.lr_scheduler.lr_lambdas
    for group, now, base_lr, factor in zip(part.optimizer.param_groups, settings, base_lrs, lambdas):
        group.update(now, lr=base_lr * factor(part.lr_scheduler.last_epoch))
    if part.ema is not None and saved["ema"] is not None:
        now = {key: getattr(part.ema, key) for key in ("decay", "power", "inv_gamma", "use_ema_warmup")}
        part.ema.load_state_dict({**saved["ema"], **now})
        part.ema.to(next(model.parameters()).device)


# ---------------------------------------------------------------------------------------------------------------------
# The trainer
# ---------------------------------------------------------------------------------------------------------------------


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
        )
        self.device = self.accelerator.device
        use_all_cores(self.device)
        self.step = 0  # optimizer steps done
        self.epoch_size = epoch_size
        self.step_size = (
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        )
        self.steps_per_epoch = max(1, epoch_size / self.step_size)
        self.max_steps = self.args.max_train_steps or -(-epoch_size * self.args.num_train_epochs // self.step_size)
        self.planned_steps = self.max_steps
        self.checkpointing_steps = self.args.checkpointing_steps or max(1, self.max_steps // 10)
        self.sample_steps = {self.max_steps, *(self.args.sample_steps or [])}
        self.sample_steps |= {round(epoch * self.steps_per_epoch) for epoch in self.args.sample_epochs or []}
        self._parts: dict[str, _Part] = {}
        self._states: dict[str, torch.nn.Module] = {}
        self._micro_batch_logs: list[dict[str, torch.Tensor]] = []
        self._step_logs: list[dict[str, torch.Tensor]] = []

    def print(self, text: str):
        """Print once, whatever the number of processes."""
        self.accelerator.print(text)

    @property
    def is_main_process(self) -> bool:
        return self.accelerator.is_main_process

    # -- models and other state ---------------------------------------------------------------------------------------

    def add_model(
        self, name: str, model: torch.nn.Module, learning_rate: float, ema: bool = True, steps: int | None = None
    ) -> torch.nn.Module:
        """Register a model for training by AdamW; the wrapped model is returned.

        With `ema` an average of its weights is kept, if the run wants one, and is what `save` and `preview` see.
        `steps` is the number of updates that its learning-rate schedule spans, if not the whole run.
        """
        args = self.args
        steps = steps or self.max_steps
        model.to(self.device).train()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.adam_weight_decay,
            fused=True,
        )
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=min(args.lr_warmup_steps, steps // 2),
            num_training_steps=steps,
        )
        average = None
        if ema and args.use_ema:
            average = EMAModel(
                model.parameters(), decay=args.ema_max_decay, use_ema_warmup=True, power=args.ema_power, foreach=True
            )
        wrapped, optimizer = self.accelerator.prepare(model, optimizer)
        self._parts[name] = _Part(wrapped, optimizer, lr_scheduler, average)
        return wrapped

    def add_state(self, name: str, module: torch.nn.Module):
        """Register a module without optimizer whose buffers belong into checkpoints; each process keeps its own."""
        self._states[name] = module.to(self.device)

    def average(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """What is kept as the average of a parameter, if anything is."""
        part = self._parts[name]
        if part.ema is None:
            return None
        pairs = zip(part.model.parameters(), part.ema.shadow_params)
        return next(average for own, average in pairs if own is parameter)

    def unwrap(self, name: str) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self._parts[name].model)

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        return self._parts[name].optimizer

    @contextlib.contextmanager
    def averaged_weights(self):
        """Within it the models are in evaluation mode and have their averaged weights."""
        for part in self._parts.values():
            part.model.eval()
            if part.ema is not None:
                part.ema.store(part.model.parameters())
                part.ema.copy_to(part.model.parameters())
        try:
            with torch.no_grad():
                yield
        finally:
            for part in self._parts.values():
                if part.ema is not None:
                    part.ema.restore(part.model.parameters())
                part.model.train()

    # -- within a step ------------------------------------------------------------------------------------------------

    def update(self, name: str, loss: torch.Tensor):
        """Backward; on a step's last micro-batch clip the gradients and step the optimizer."""
        part = self._parts[name]
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            # of this optimizer only: another model's micro-batches may not be complete yet
            self.accelerator.unscale_gradients(part.optimizer)
            torch.nn.utils.clip_grad_norm_(part.model.parameters(), self.args.max_grad_norm)
        part.optimizer.step()
        if self.accelerator.sync_gradients:
            part.lr_scheduler.step()
        part.optimizer.zero_grad()

    def log(self, **values: torch.Tensor | float):
        """Note figures of this micro-batch; they stay on the device until they are written, some steps at once."""
        self._micro_batch_logs.append(
            {name: torch.as_tensor(value, device=self.device).detach().float() for name, value in values.items()}
        )

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
            dataset: `dataset[list of indices]` gives the data of a batch.
            save: writes the artefact (a pipeline, a model) with the present weights into a folder.
            preview: returns a picture of what the model does.
            evaluation: measures what the model does; the best artefact is kept in `best`.
        """
        if self.args.dry_run:
            self.max_steps = DRY_RUN_STEPS
        else:
            self.resume()
            self.accelerator.init_trackers("hwdiffusion")
        order = BatchOrder(
            self.args.seed,
            len(dataset),
            self.step,
            self.args.train_batch_size,
            self.args.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        workers = self.args.dataloader_num_workers if getattr(dataset, "reads_files", False) else 0
        if torch.multiprocessing.get_start_method() != "fork":
            workers = 0  # sources are closures, which another process can only inherit
        loader = iter(
            torch.utils.data.DataLoader(
                dataset,
                batch_sampler=order,
                collate_fn=_as_it_is,
                num_workers=workers,
                pin_memory=self.device.type == "cuda",
            )
        )
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
        models = [part.model for part in self._parts.values()]
        started = []
        while self.step < self.max_steps:
            if self.args.dry_run and self.device.type == "cuda":
                torch.cuda.synchronize()
            started.append(time.perf_counter())
            for micro_batch in range(self.args.gradient_accumulation_steps):
                data = [tensor.to(self.device, non_blocking=True) for tensor in next(loader)]
                places = torch.from_numpy(order.places(micro_batch)).to(self.device)
                # for what draws by itself, dropout: it too must not depend on the run's history
                coordinates = [self.args.seed, self.step, micro_batch, self.accelerator.process_index]
                torch.manual_seed(int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0] >> 1))
                with self.accelerator.accumulate(*models):
                    yield Batch(data, Draws(self.args.seed, self.step, places), self.step)
            self._finish_step(progress, save, preview, evaluation)
        progress.close()
        if self.args.dry_run:
            self._report_dry_run(started)
        else:
            self._finish(save)

    def _finish_step(self, progress, save, preview, evaluation):
        for part in self._parts.values():
            if part.ema is not None:
                part.ema.step(part.model.parameters())
        self.step += 1
        names = {name for logs in self._micro_batch_logs for name in logs}
        step_log = {}
        for name in sorted(names):
            values = [logs[name] for logs in self._micro_batch_logs if name in logs]
            step_log[name] = torch.stack(values).mean()
        self._step_logs.append(step_log)
        self._micro_batch_logs = []
        progress.update(self.step_size)
        if self.args.dry_run:
            self._step_logs = []
            return

        last = self.step == self.max_steps
        if self.step % self.args.logging_steps == 0 or self.step % self.checkpointing_steps == 0 or last:
            self._write_logs(progress)
        if self.step in self.sample_steps and preview is not None:
            self._draw(preview)
        if evaluation is not None and (self.step % evaluation.steps == 0 or last):
            if self._step_logs:
                self._write_logs(progress)
            self._evaluate(evaluation, save)
        if self.step % self.checkpointing_steps == 0 or last:
            self.save_checkpoint(save)

    def _finish(self, save):
        """The artefact itself goes into the run folder; done again, it does no harm."""
        if self.is_main_process:
            with self.averaged_weights():
                save(self.output_dir)
            figures.loss_curve(self.output_dir / "metrics.jsonl", self.output_dir / "loss.png")
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()  # end_training would also part the processes, which a second stage still needs

    def _report_dry_run(self, started: list[float]):
        if not self.is_main_process:
            return
        durations = sorted(later - earlier for earlier, later in zip(started[1:], started[2:]))
        seconds = durations[len(durations) // 2]  # the first one warms up
        steps = self.planned_steps
        print(yaml.safe_dump(self.config.to_dict(), sort_keys=False))
        for name, part in self._parts.items():
            print(f"{name}: {sum(parameter.numel() for parameter in part.model.parameters()):,} parameters")
        print(f"{steps} steps of {self.step_size} pictures ({steps / self.steps_per_epoch:.1f} epochs)")
        print(f"{seconds:.3f} s a step on {self.device}, about {steps * seconds / 60:.1f} minutes in all")

    def _write_logs(self, progress):
        first = self.step - len(self._step_logs) + 1
        rows: dict[str, dict[int, float]] = {}
        for name in sorted({name for logs in self._step_logs for name in logs}):
            steps = [first + place for place, logs in enumerate(self._step_logs) if name in logs]
            values = torch.stack([logs[name] for logs in self._step_logs if name in logs])
            rows[name] = dict(zip(steps, self.accelerator.reduce(values, "mean").tolist()))
        self._step_logs = []
        if not self.is_main_process:
            return
        learning_rate = next(iter(self._parts.values())).lr_scheduler.get_last_lr()[0]
        with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            for step in range(first, self.step + 1):
                values = {name: row[step] for name, row in rows.items() if step in row}
                file.write(json.dumps({"step": step, **values}) + "\n")
                self.accelerator.log(values, step=step)
        self.accelerator.log({"learning_rate": learning_rate}, step=self.step)
        shown = {name: f"{row[max(row)]:.4g}" for name, row in rows.items() if name.endswith("loss")}
        progress.set_postfix(step=f"{self.step}/{self.max_steps}", **shown, refresh=False)

    def _draw(self, preview):
        if self.is_main_process:
            with self.averaged_weights():
                picture = preview()
            (self.output_dir / "samples").mkdir(exist_ok=True)
            for path in (self.output_dir / "samples" / f"step-{self.step}.png", self.output_dir / "samples.png"):
                picture.save(path)
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    tracker.log_images({"samples": np.asarray(picture)[None]}, step=self.step, **layout)
        self.accelerator.wait_for_everyone()

    def _evaluate(self, evaluation: Evaluation, save):
        if self.is_main_process:
            with self.averaged_weights():
                measured = evaluation.measure()
                best = self.output_dir / "best"
                earlier = self._best_so_far(evaluation)
                if earlier is None or evaluation.rank(measured) > evaluation.rank(earlier):
                    part = best.with_name("best.part")
                    shutil.rmtree(part, ignore_errors=True)
                    save(part)
                    said = {"step": self.step, **measured, "judge": evaluation.judge}
                    (part / BEST_FILE).write_text(json.dumps(said), encoding="utf-8")
                    replace_folder(part, best)
            with open(self.output_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **measured}) + "\n")
            self.accelerator.log(measured, step=self.step)
            tqdm.write(", ".join([f"step {self.step}", *(f"{name} {value:.4g}" for name, value in measured.items())]))
        self.accelerator.wait_for_everyone()

    def _best_so_far(self, evaluation: Evaluation) -> dict | None:
        """What was measured of the best pipeline, if by the same judge, and not on a course that the run has left."""
        path = self.output_dir / "best" / BEST_FILE
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        same = said is not None and said["judge"] == evaluation.judge and said["step"] <= self.step
        return said if same else None

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, save: Callable[[Path], None]):
        """Write `checkpoint-STEP` beside and rename it into place: a kill at any moment leaves the last good one."""
        states = {name: module.state_dict() for name, module in self._states.items()}
        # The states are counts: their sum over processes is what matters, and it suits any number of processes.
        states = {
            name: {key: self.accelerator.reduce(tensor.clone(), "sum").cpu() for key, tensor in state.items()}
            for name, state in states.items()
        }
        if self.is_main_process:
            part = self.output_dir / f"{CHECKPOINT}{self.step}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            with self.averaged_weights():
                save(part)
            state = {
                "script": self.config.script,
                "step": self.step,
                "step_size": self.step_size,
                "epoch_size": self.epoch_size,
                "parts": {
                    name: {
                        "model": self.unwrap(name).state_dict(),
                        "optimizer": part_.optimizer.state_dict(),
                        "lr_scheduler": part_.lr_scheduler.state_dict(),
                        "ema": None if part_.ema is None else part_.ema.state_dict(),
                    }
                    for name, part_ in self._parts.items()
                },
                "states": states,
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            }
            torch.save(state, part / STATE_FILE)
            sync_to_disk(part)
            final = self.output_dir / f"{CHECKPOINT}{self.step}"
            replace_folder(part, final)
            for old in find_checkpoints(self.output_dir)[self.args.checkpoints_total_limit :]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def resume(self):
        """Continue from the checkpoint that the folder or the command names, if there is one."""
        checkpoint = checkpoint_to_resume(self.args)
        if checkpoint is None:
            self._truncate_metrics()
            return
        # weights_only: nothing but tensors and plain values is unpickled
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        self._check_fits(checkpoint, state)
        for name, part in self._parts.items():
            try:
                _load_part(part, self.unwrap(name), state["parts"][name])
            except (KeyError, RuntimeError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"{checkpoint} is of another model than this run's {name}: {reason}") from error
        for name, module in self._states.items():
            share = 1 if self.is_main_process else 0  # sums over processes: the first one carries them on
            module.load_state_dict({key: tensor * share for key, tensor in state["states"][name].items()})
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self._truncate_metrics()
        if self.is_main_process:
            for later in find_checkpoints(self.output_dir):
                if int(later.name.removeprefix(CHECKPOINT)) > self.step:
                    shutil.rmtree(later)  # of a course that the run has left
        self.accelerator.wait_for_everyone()

    def _check_fits(self, checkpoint: Path, state: dict):
        for key, what in (("step_size", "pictures a step over all processes"), ("epoch_size", "training pictures")):
            if state[key] != getattr(self, key) and self.args.resume_from_checkpoint is None:
                raise InputError(
                    f"{checkpoint} was made with {state[key]} {what}, but now there are {getattr(self, key)}; start "
                    "it as before, or give --resume_from_checkpoint latest to go on all the same"
                )

    def _truncate_metrics(self):
        # An interrupted run may have logged steps that are about to be done again.
        path = self.output_dir / "metrics.jsonl"
        if self.is_main_process and path.is_file():
            kept = [line for line in figures.read_metrics(path) if line["step"] <= self.step]
            part = path.with_name(path.name + ".part")
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(part, path)
        self.accelerator.wait_for_everyone()
