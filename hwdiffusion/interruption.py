"""SIGTERM and SIGINT: the step is finished and saved before a run stops, on all of its processes at once."""

import os
import signal
import threading
import time

import torch
import torch.distributed


# Launchers pass a Ctrl-C on that the terminal has already sent to everybody: that is not a second one.
_SAME_SIGNAL_SECONDS = 1.0


class Interruption:
    """Within it, the first SIGTERM or SIGINT is noted, and a second one stops the process at once."""

    def __init__(self):
        self.signal_number = 0
        self._noted_at = 0.0
        self._handlers: dict[int, object] = {}
        # Flags go over a group of their own, on the CPU, so that asking for them doesn't wait for a GPU.
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._group = torch.distributed.new_group(backend="gloo") if distributed else None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame):
        if not self.signal_number:
            self.signal_number, self._noted_at = number, time.monotonic()
            text = f"\n{signal.Signals(number).name}: saving after this step; once more stops at once\n"
            if os.environ.get("RANK", "0") == "0":
                os.write(2, text.encode())  # print may be what was interrupted
        elif time.monotonic() - self._noted_at > _SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self) -> int:
        """The number of the signal that any of the processes was sent, else 0; all of them must ask."""
        if self._group is None:
            return self.signal_number
        number = torch.tensor(self.signal_number)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=self._group)
        return int(number)


def leave_signals_to_the_parent(_worker: int):
    """For processes that read pictures: the one that they read for ends them, when it has finished its step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
