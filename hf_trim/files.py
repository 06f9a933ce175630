"""Files that are written whole or not at all, and the errors of writing them."""

import errno
import json
import os
from pathlib import Path

from safetensors import SafetensorError


# Of an error while a file is written: no space, too large, over quota, read-only, not allowed, no folder, broken disk.
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
    Write a file so that a reader, or a rerun after a crash, sees the old content or the new, never a part of it.

    Args:
        path (`Path`): The file; its folder is made.
        content: What JSON can hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8") as file:
        if isinstance(content, list):  # one element a line
            file.write("[\n" + ",\n".join(json.dumps(each, sort_keys=True) for each in content) + "\n]\n")
        else:
            file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def is_write_error(error: BaseException) -> bool:
    """
    Args:
        error (`BaseException`): What was raised.

    Returns:
        `bool`: Whether a file could not be written: by Python, safetensors or torch, each of which has its own error.
    """
    if isinstance(error, OSError):
        return error.errno in WRITE_ERRORS
    if isinstance(error, SafetensorError):
        return any(f"os error {number}" in str(error) for number in WRITE_ERRORS)
    torch_writes = ("PytorchStreamWriter", "inline_container.cc", "iostream error")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in torch_writes)
