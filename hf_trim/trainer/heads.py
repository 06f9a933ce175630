"""
Step 2 (per-item losses) of: batch → per-item losses → keep decision → trimmed backward → logs.

Which heads of transformers can be trimmed, and what an item of their loss is: a sample, or a token (or pixel).
"""

from torch import nn

from hf_trim._compat import auto_class_names


# What an item of the loss is → the tasks (transformers' auto classes) and the `loss_type`s of such heads. Their losses
# are means (or sums) over these items, taken by torch's loss functions, which `losses.py` intercepts.
TASKS = {
    "sample": (
        "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION",
        "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION", "CTC",
    ),
    "token": (
        "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT",
        "TOKEN_CLASSIFICATION", "SEMANTIC_SEGMENTATION",
    ),
}  # fmt: skip
LOSS_TYPES = {
    "sample": (
        "ForSequenceClassification", "ForImageClassification", "ForVideoClassification", "ForAudioClassification",
        "ForQuestionAnswering", "ForCTC",
    ),
    "token": (
        "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForTokenClassification", "ForSemanticSegmentation",
    ),
}  # fmt: skip
# Two losses, over tokens and over pairs of sentences: each is trimmed among its own items.
PRETRAINING = {"AlbertForPreTraining", "BertForPreTraining", "BigBirdForPreTraining", "ErnieForPreTraining",
               "FNetForPreTraining", "MegatronBertForPreTraining", "MobileBertForPreTraining"}  # fmt: skip
# The end of messages about losses that cannot be intercepted.
PASS_A_LOSS = (
    "For any other model pass an unreduced loss, TrimmingTrainer(..., compute_loss_func=f) with "
    "f(outputs, labels, num_items_in_batch=None) returning one loss per sample [B], or one per label in the shape of "
    'the labels (e.g. F.cross_entropy(..., reduction="none")).'
)


def item_unit(model: nn.Module) -> str:
    """
    What an item of a head's loss is.

    Args:
        model (`torch.nn.Module`): A transformers model with a head, without PEFT's wrapper.

    Returns:
        `str`: `"sample"` or `"token"` (of a text, or a pixel of a label map).

    Raises:
        `ValueError`: If the head is not supported.
    """
    names = {base.__name__ for base in type(model).__mro__}
    if names & PRETRAINING:
        return "token"
    for unit, tasks in TASKS.items():
        if any(names & auto_class_names(task) for task in tasks):
            return unit
    loss_type = getattr(model, "loss_type", None)
    for unit, loss_types in LOSS_TYPES.items():
        if loss_type in loss_types:
            return unit
    raise ValueError(
        f"TrimmingTrainer does not know the loss of {type(model).__name__} (loss_type={loss_type!r}). It knows "
        "transformers' heads for classification and regression of texts, images, videos and audio, causal, masked and "
        "sequence-to-sequence language modelling, token classification, question answering, multiple choice, "
        "next-sentence prediction, semantic segmentation and CTC (and timm's classifiers through "
        f"TimmWrapperForImageClassification). {PASS_A_LOSS}"
    )
