"""The private and unstable names of other packages are there, with the parameters that hf_trim relies on."""

import importlib
import inspect
import types
from importlib.metadata import version

import pytest
import torch

from hf_trim import TrimmingTrainer, _compat
from hf_trim._compat import NEEDED, TRAINER_FIELDS, HubConnectionError, Need
from hf_trim.hub.push import PushMixin
from hf_trim.trainer.trainer import TrimmingMixin
from tests.support.helpers import digits, tiny_vit, train


def complaint(need: Need, owner: object) -> str | None:
    """What is wrong with a name, in a sentence; `None` if nothing is."""
    package = need.owner.split(".")[0]
    place = f"{package} {version(package)} has no {need.owner.removeprefix(f'{package}.')}.{need.name}"
    wanted = "" if need.parameters is None else f"({', '.join(need.parameters)})"
    why = f"hf_trim needs it for {need.purpose}"
    if not hasattr(owner, need.name):
        return f"{place}{wanted}: {why}"
    if need.parameters is None:
        return None
    parameters = list(inspect.signature(getattr(owner, need.name)).parameters)
    # In this order, too: an overriding method passes its arguments on by position.
    if [name for name in parameters if name in need.parameters] != list(need.parameters):
        return f"{place}{wanted}, only {need.name}({', '.join(parameters)}): {why}"
    return None


def find_owner(path: str) -> object:
    """A module, or a class in one."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, name = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("need", NEEDED, ids=lambda need: f"{need.owner}.{need.name}")
def test_names(need):
    problem = complaint(need, find_owner(need.owner))
    assert problem is None, problem


def test_the_sentence_for_a_name_that_is_gone_or_has_changed():
    need = next(need for need in NEEDED if need.name == "_save")
    assert complaint(need, types.SimpleNamespace()) == (
        f"transformers {version('transformers')} has no Trainer._save(output_dir, state_dict): hf_trim needs it for "
        "saving timm's own names of weights"
    )
    for changed in (lambda output_dir: None, lambda state_dict, output_dir: None, lambda folder, state_dict: None):
        assert ", only _save(" in complaint(need, types.SimpleNamespace(_save=changed))


@pytest.mark.parametrize("cls", [TrimmingMixin, PushMixin])
def test_every_overridden_method_is_in_the_table(cls):
    trainer = find_owner(_compat.TRAINER)
    overridden = {name for name in vars(cls) if inspect.isfunction(getattr(trainer, name, None))} - {"__init__"}
    assert overridden and overridden <= {need.name for need in NEEDED if need.owner == _compat.TRAINER}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return train(tiny_vit(), digits(8), tmp_path_factory.mktemp("trainer"), num_train_epochs=1)


@pytest.mark.parametrize("name", TRAINER_FIELDS)
def test_fields_of_a_trainer(name, trainer):
    assert hasattr(trainer, name), f"A Trainer has no {name}: hf_trim needs it for {TRAINER_FIELDS[name]}"


def test_what_the_names_do(trainer):
    assert _compat.find_batch_size({"pixel_values": torch.zeros(3, 1, 8, 8)}) == 3
    assert _compat.unwrap_peft_model(trainer.model) is trainer.model
    assert _compat.PREFIX_CHECKPOINT_DIR == "checkpoint"
    assert "image-classification" in _compat.TASK_MAPPING
    assert "learning_rate" in _compat.extract_hyperparameters_from_trainer(trainer)
    assert issubclass(HubConnectionError, Exception) and HubConnectionError is not Exception
    with _compat.safe_globals():
        pass
    assert isinstance(trainer, TrimmingTrainer) and trainer.compute_loss.func == trainer._compute_trimmed_loss
