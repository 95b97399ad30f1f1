"""hwdiffusion: train your own class-conditional image generator with Hugging Face diffusers."""

__version__ = "0.1.0"


class InputError(ValueError):
    """Something that the user gave can't be used.

    Its message is one sentence that says what is wrong, where, and what is allowed. It is raised before any work
    starts; scripts print it and exit with code 2.
    """


class RunError(RuntimeError):
    """A run can't go on: a loss that is not finite, a full disk.

    Its message is one sentence that says what happened, where, and what to change. What was saved stays whole;
    scripts print it and exit with code 1.
    """


class Interrupted(Exception):
    """A run was told to stop by a signal, has saved a checkpoint, and has stopped.

    Scripts print the message and exit with code 128 + `signal_number`, as programs do that end by a signal.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
