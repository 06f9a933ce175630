"""
Command lines of hf_trim in processes of their own. They are forked from one process that has imported everything
already, which takes 0.1 s in the place of the 8 s of a new interpreter.
"""

import contextlib
import fcntl
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import struct
import sys
import termios
import threading

from transformers import Trainer, TrainerState

from tests.support.quick import measure_input_briefly, use_no_clock


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.preloaded"])


class Forked:
    """
    `python -m MODULE ARGUMENTS...`, started at once.

    Args:
        module (`str`): The module.
        arguments: Its arguments.
        environment (`dict[str, str]`): Variables to set.
        file_size (`int`): Files cannot grow beyond this number of bytes, as on a full disk.
        columns (`int`): Its output is a terminal of this width.
        kill (`tuple[str, int]`): The process kills itself with SIGKILL after this optimizer step of a trimmed
            training: `("step", 8)` when the next step begins, `("save", 8)` when all files of the checkpoint are
            written but the last.
    """

    def __init__(self, module, *arguments, environment=None, file_size=None, columns=None, kill=None):
        self._output, writer = _context.Pipe(duplex=False)
        self._terminal = None if columns is None else Terminal(columns)
        name = None if self._terminal is None else self._terminal.name
        options = (module, [str(argument) for argument in arguments], writer, environment or {}, file_size, name, kill)
        self.process = _context.Process(target=_run, args=options)
        self.process.start()
        writer.close()

    def finish(self):
        """Wait for the end; returns exit status (−9 if killed) and output, errors among it."""
        with open(self._output.fileno(), "rb", closefd=False) as file:
            output = file.read().decode()
        if self._terminal is not None:
            output = self._terminal.close()
        self._output.close()
        self.process.join(60)
        return self.process.exitcode, output


class Terminal:
    """A pseudo-terminal, and all that is written to it."""

    def __init__(self, columns):
        self._master, self._slave = os.openpty()
        self.name, self._output = os.ttyname(self._slave), []
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(self._master, 65536):
                self._output.append(chunk)

    def close(self):
        os.close(self._slave)
        self._reader.join()
        os.close(self._master)
        return b"".join(self._output).decode()


def _run(module, arguments, writer, environment, file_size, terminal, kill):
    output = writer.fileno() if terminal is None else os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    measure_input_briefly()
    use_no_clock()
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, in the place of the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if kill is not None:
        _kill_at(*kill)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _kill_at(moment, step):
    def in_step(trainer):
        return trainer.state.global_step == step and trainer.args.trim_select != "none"

    def in_checkpoint(state):  # the trainer's state is the last file of a checkpoint
        return state.global_step == step

    owner, name, is_due = {
        "step": (Trainer, "training_step", in_step),
        "save": (TrainerState, "save_to_json", in_checkpoint),
    }[moment]
    method = getattr(owner, name)

    def call(self, *args, **kwargs):
        if is_due(self):
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **kwargs)

    setattr(owner, name, call)


def distributed_environments(processes):
    """The variables by which torchrun describes a group of processes on one machine, for each of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(processes)
    ]
