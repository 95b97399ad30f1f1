"""hwdiffusion: train your own class-conditional image generator with Hugging Face diffusers."""

__version__ = "0.1.0"


class InputError(ValueError):
    """Something that the user gave can't be used.

    Its message is one sentence that says what is wrong, where, and what is allowed. It is raised before any work
    starts; scripts print it and exit with code 2.
    """
