"""Writing files so that none is ever incomplete, and recognising the errors of writing."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


# Error numbers of the operating system: no space left, file too large, over quota, read-only file system, permission
# denied (two), not a folder, input/output error.
WRITE_ERRORS = (
    errno.ENOSPC,
    errno.EFBIG,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EIO,
)


def write_json(path: Path, content) -> None:
    """
    Write a file as JSON. A reader always sees the old content or the new, even after a crash.

    Args:
        path (`Path`): The file. Its folder is created.
        content: The content.
    """
    if isinstance(content, list):  # one element a line
        text = "[\n" + ",\n".join(json.dumps(element, sort_keys=True) for element in content) + "\n]\n"
    else:
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """
    Write a file anew: in this context a part is written, which then takes its name. A reader always sees the old
    content or the new, even after a crash.

    Args:
        path (`Path`): The file. Its folder is created.

    Yields:
        `Path`: The part to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    yield part
    with open(part, "rb+") as file:
        os.fsync(file.fileno())  # on disk before it takes the name: else a power failure may leave an empty file
    os.replace(part, path)


def is_write_error(error: BaseException) -> bool:
    """
    Recognise the errors of Python, safetensors and torch when a file cannot be written.

    Args:
        error (`BaseException`): The error.

    Returns:
        `bool`: Whether it is one of these.
    """
    if isinstance(error, OSError):
        return error.errno in WRITE_ERRORS
    if isinstance(error, SafetensorError):
        return any(f"os error {number}" in str(error) for number in WRITE_ERRORS)
    torch_messages = (
        "PytorchStreamWriter",
        "inline_container.cc",
        "iostream error",
    )  # the only mark that torch leaves
    return isinstance(error, RuntimeError) and any(message in str(error) for message in torch_messages)
