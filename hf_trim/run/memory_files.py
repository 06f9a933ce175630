"""What a run with `trim_memory` writes beside the model: the table, a data map, and a page of the hardest samples."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from hf_trim.data import Data
from hf_trim.files import replaced
from hf_trim.report.data_map import plot_data_map
from hf_trim.report.sample_page import write_sample_page
from hf_trim.run.recipe import Job
from hf_trim.trainer.memory import SampleMemory


TABLE, PAGE, DATA_MAP = "trim_memory.parquet", "hard_samples.html", "data_map.png"


def write_memory(job: Job, data: Data, memory: SampleMemory, folder: Path) -> None:
    """
    Write the memory of losses of a finished training.

    Args:
        job ([`Job`]): The recipe. Texts and pictures are shown only with its `show_samples`: data may be private.
        data ([`Data`]): Its data.
        memory ([`~hf_trim.trainer.memory.SampleMemory`]): What the training has seen of them.
        folder (`Path`): The output folder.
    """
    write_table(memory, folder / TABLE, data.rows)
    data_map = None
    if memory.is_classification:
        data_map = folder / DATA_MAP
        plot_data_map(memory, data_map, f"{job.name}: data map")
    write_sample_page(
        memory,
        folder / PAGE,
        job.name,
        data.label_names,
        data.rows,
        data.show if job.run.show_samples else None,
        data_map if data_map is not None and data_map.is_file() else None,
    )


def write_table(memory: SampleMemory, path: Path, rows: Any = None) -> None:
    """
    Write the table as Parquet, with a column for each of [`SampleMemory.to_dict`].

    Args:
        memory ([`~hf_trim.trainer.memory.SampleMemory`]): The table.
        path (`Path`): The file.
        rows (`Sequence[int]`, *optional*): A further column `row`: where the sample is in the data as they were read.
    """
    columns: dict[str, Any] = {} if rows is None else {"row": np.asarray(rows)}
    columns |= memory.to_dict()
    if len(memory.history):
        losses = memory.history.T.astype(np.float32).ravel()
        columns["losses"] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(losses), len(memory.history))
    with replaced(path) as part:
        pyarrow.parquet.write_table(pyarrow.table(columns), part)
