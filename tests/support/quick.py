"""What takes long in a run, and is checked by few tests."""

from pathlib import Path

from hf_trim.backward.tape.extension import Extension
from hf_trim.run.clock import samples_per_second
from hf_trim.trainer import timing


BUILD = Extension._build_it


def use_no_clock():
    """`trim_backward="auto"` takes the sparse backward pass where it may: tiny models would be faster without it."""
    timing.TRIAL_STEPS = 0


def build_when_asked_to():
    """The library of the tape is not built beside the tests, but where one waits for it: it takes half a minute."""
    Extension._build_it = lambda self, wait: BUILD(self, wait) if wait else None


def measure_input_briefly():
    """Each run draws from its input alone for 0.3 s, to measure its speed; here for 0.02 s."""
    samples_per_second.__defaults__ = (0.02,)


def save_no_figure(figure, path, **options):
    """In the place of matplotlib's `Figure.savefig`, which takes half a second."""
    Path(path).write_bytes(b"")
