"""
Records of many runs: found in folders, and put together by recipe and settings.

Paths → all records, in a fixed order → a title → the records of one comparison.
"""

import json
from contextlib import suppress
from pathlib import Path

from hf_trim.messages import plain
from hf_trim.report.summary import ARMS
from hf_trim.run.records import UNITS, fingerprint, read_records


def find_records(paths: list[str]) -> list[dict]:
    """
    Args:
        paths (`list[str]`): Files with records; folders with such files in subfolders `records`, at any depth; or
            folders that hold such files and nothing else.

    Returns:
        `list[dict]`: All records, without repetitions, in a fixed order.

    Raises:
        `ValueError`: If there is none, a file is broken, or two files have different records of the same run.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(path.rglob("records/*.json"))
            if not found and (path / "all_results.json").is_file():
                raise ValueError(_describe_single(path))
            files += found or sorted(path.glob("*.json"))
        elif path.is_file():
            if path.name == "all_results.json":
                raise ValueError(_describe_single(path.parent))
            files.append(path)
        else:
            raise ValueError(f"there is no file or folder {path}: give folders of comparisons, or files of records.")
    runs: dict[tuple, tuple[dict, Path]] = {}
    for file in files:
        for record in read_records(file):
            # A run that occurs in several files counts once.
            known, origin = runs.setdefault(_record_key(record), (record, file))
            if known is not record and _text(known) != _text(record):
                run = f"{record.get('recipe', '')}, {record['arm']}, seed {record['seed']}"
                raise ValueError(f"{origin} and {file} have different records of {run}: give one of them.")
    if not runs:
        raise ValueError(f"no records in {', '.join(paths)}: `python -m hf_trim.run RECIPE --compare` makes some.")
    return [runs[key][0] for key in sorted(runs)]


def group(records: list[dict]) -> dict[str, list[dict]]:
    """
    Args:
        records (`list[dict]`): Records of any runs.

    Returns:
        `dict[str, list[dict]]`: Those of each recipe and settings, by a title that names the settings in which the
        groups of one recipe differ, e.g. `"digits-vit, trim_keep_end 0.2"`.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        recipe, settings_hash, *_ = _record_key(record)
        groups.setdefault((recipe, settings_hash), []).append(record)
    by_title = {}
    for (recipe, _), members in groups.items():
        settings = _settings(members)
        variants = [_settings(runs) for (name, _), runs in groups.items() if name == recipe]
        names = sorted({name for variant in variants for name in variant})
        varied = [name for name in names if len({str(variant.get(name)) for variant in variants}) > 1]
        changes = [f"{name} {plain(settings[name])}" for name in varied if name in settings]
        by_title[", ".join([recipe, *changes])] = members
    return dict(sorted(by_title.items()))


def _text(record: dict) -> str:
    return json.dumps(record, sort_keys=True)  # as text, NaN equals NaN


def _describe_single(folder: Path) -> str:
    """What a folder of one finished training holds, in place of the records of a comparison."""
    result = ""
    with suppress(OSError, ValueError, KeyError, StopIteration):
        results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        name = next(name for name in UNITS if f"eval_{name}" in results)
        result = f", with a test {name} of {results[f'eval_{name}']:.2f}{UNITS[name]}"
    return (
        f"{folder} holds a single finished training{result}: see its README.md and all_results.json. A report needs "
        "the runs of a comparison: the same command with --compare and another --output_dir trains them."
    )


def _record_key(record: dict) -> tuple[str, str, int, int]:
    """Recipe, settings, arm and seed: what tells one run from another, and their order."""
    arm = ARMS.index(record["arm"])
    return record.get("recipe", ""), fingerprint(record.get("settings", {})), arm, record["seed"]


def _settings(members: list[dict]) -> dict:
    return members[0].get("settings", {})  # the members of a group have the same
