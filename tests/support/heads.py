"""A tiny model of each kind of head, with real data and the losses of its items; and a plain loop that trims them."""

import inspect

import torch
import torch.nn.functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    set_seed,
)

from tests.support.helpers import descend, digit_texts, digits


BERT = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LLAMA = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 16, "num_key_value_heads": 1, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MOE = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}


def texts(label):
    """Digits as token ids, padded to different lengths, with labels made of each row."""
    return [{**row, **label(row)} for row in digit_texts(43)]


def tokens_or_none(row):
    return {"labels": torch.where(row["attention_mask"] > 0, row["input_ids"], -100)}


def shifted(row):
    labels = F.pad(tokens_or_none(row)["labels"][1:], (0, 1), value=-100)
    return {"labels": tokens_or_none(row)["labels"], "shift_labels": labels}


def some_masked(row):
    place = torch.arange(len(row["input_ids"]))
    masked = (place % 3 == row["labels"] % 3) & (row["attention_mask"] > 0)
    return {"input_ids": row["input_ids"].where(~masked, 19), "labels": row["input_ids"].where(masked, -100)}


def span(row):
    end = int(row["attention_mask"].sum()) - 1
    return {"start_positions": row["labels"] % (end + 1), "end_positions": end}


def choices(row):
    twice = {name: torch.stack([row[name], row[name].flip(0)]) for name in ("input_ids", "attention_mask")}
    return {**twice, "labels": row["labels"] % 2}


def without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def label_maps():
    rows = []
    for row in digits(19):
        image = row["pixel_values"]
        labels = (image[0] * 2.9).long()
        labels[: row["labels"] % 4, 0] = 255  # what segmentation models ignore
        rows.append({"pixel_values": F.interpolate(image[None], scale_factor=4)[0], "labels": labels})
    return rows


def speech():
    rows = []
    for row in digits(19):
        labels = torch.full((3,), -100)
        length = 1 + row["labels"] % 3
        labels[:length] = 1 + row["labels"] % 5
        rows.append({"input_values": row["pixel_values"].flatten().repeat(2), "labels": labels})
    return rows


def cross_entropy(logits, labels, ignore_index=-100):
    """Losses of the labels that there are."""
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none")
    return losses[labels.flatten() != ignore_index]


def causal(outputs, batch):
    return [cross_entropy(outputs.logits[:, :-1], batch["labels"][:, 1:])]


def aligned(outputs, batch):
    return [cross_entropy(outputs.logits, batch["labels"])]


def answers(outputs, batch):
    start = cross_entropy(outputs.start_logits, batch["start_positions"])
    return [(start + cross_entropy(outputs.end_logits, batch["end_positions"])) / 2]


def pretraining(outputs, batch):
    return [
        cross_entropy(outputs.prediction_logits, batch["labels"]),
        cross_entropy(outputs.seq_relationship_logits, batch["next_sentence_label"]),
    ]


def pixels(outputs, batch):
    logits = F.interpolate(outputs.logits, size=batch["labels"].shape[-2:], mode="bilinear", align_corners=False)
    return [cross_entropy(logits.permute(0, 2, 3, 1), batch["labels"], 255)]


def ctc(outputs, batch):
    log_probs = F.log_softmax(outputs.logits, -1).transpose(0, 1)
    lengths = (batch["labels"] >= 0).sum(1)
    frames = torch.full_like(lengths, log_probs.shape[0])
    losses = F.ctc_loss(log_probs, batch["labels"].clamp(min=0), frames, lengths, reduction="none")
    return [losses / lengths]


def wav2vec2():
    config = Wav2Vec2Config(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=0,
        conv_dim=(8, 8), conv_stride=(3, 2), conv_kernel=(5, 3), num_feat_extract_layers=2, hidden_dropout=0.0,
        activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
        apply_spec_augment=False, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        ctc_loss_reduction="mean",
    )  # fmt: skip
    return Wav2Vec2ForCTC(config)


def segformer():
    config = SegformerConfig(
        num_channels=1, num_labels=3, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    return SegformerForSemanticSegmentation(config)


def bart():
    config = BartConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=16, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def t5():
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
                      pad_token_id=0, decoder_start_token_id=0)  # fmt: skip
    return T5ForConditionalGeneration(config)


def modernbert():
    config = ModernBertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, pad_token_id=0, sparse_prediction=True, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    return ModernBertForMaskedLM(config)


def modernbert_losses(outputs, batch):
    if outputs.logits.dim() == 2:  # of the masked tokens only
        return [cross_entropy(outputs.logits, batch["labels"][batch["labels"] != -100])]
    return aligned(outputs, batch)


# Model, rows, losses of its items (a list: those of different items apart).
HEADS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), lambda: texts(tokens_or_none), causal),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), lambda: texts(tokens_or_none), causal),
    "shift-labels": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), lambda: texts(shifted), causal),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**MOE, output_router_logits=True)),
        lambda: texts(tokens_or_none),
        causal,
    ),
    "masked-lm": (lambda: BertForMaskedLM(BertConfig(**BERT)), lambda: texts(some_masked), aligned),
    "masked-lm-sparse": (modernbert, lambda: texts(some_masked), modernbert_losses),
    "bart": (bart, lambda: texts(tokens_or_none), aligned),
    "t5": (t5, lambda: texts(tokens_or_none), aligned),
    "token-classification": (
        lambda: BertForTokenClassification(BertConfig(**BERT, num_labels=20)),
        lambda: texts(tokens_or_none),
        aligned,
    ),
    "question-answering": (
        lambda: BertForQuestionAnswering(BertConfig(**BERT)),
        lambda: without(texts(span), "labels"),
        answers,
    ),
    "multiple-choice": (lambda: BertForMultipleChoice(BertConfig(**BERT)), lambda: texts(choices), aligned),
    "next-sentence": (
        lambda: BertForNextSentencePrediction(BertConfig(**BERT)),
        lambda: texts(lambda row: {"labels": row["labels"] % 2}),
        aligned,
    ),
    "pretraining": (
        lambda: BertForPreTraining(BertConfig(**BERT)),
        lambda: texts(lambda row: {**some_masked(row), "next_sentence_label": row["labels"] % 2}),
        pretraining,
    ),
    "decoder-classification": (
        # With the problem type given, the model does not change its config in the first forward pass, and is not
        # compiled twice.
        lambda: GPT2ForSequenceClassification(
            GPT2Config(**GPT2, num_labels=10, problem_type="single_label_classification")
        ),
        lambda: texts(lambda row: {}),
        aligned,
    ),
    "segmentation": (segformer, label_maps, pixels),
    "ctc": (wav2vec2, speech, ctc),
}
# Heads that divide by the number of labels of the whole optimizer step.
COUNTING = {"llama", "gpt2", "shift-labels", "mixtral", "masked-lm-sparse"}


def make(head):
    set_seed(0)
    return HEADS[head][0]()


def hardest_mean(losses, fraction):
    kept = losses.sort(descending=True, stable=True).indices  # of equal losses the first are kept
    return losses[kept[: max(1, round(fraction * len(losses)))]].mean()


def is_believed_to_count(model, batch):
    """Of heads that take the number of labels, `Trainer` believes that they divide by it."""
    takes_count = any(x.kind == x.VAR_KEYWORD for x in inspect.signature(model.forward).parameters.values())
    return takes_count and "labels" in batch


def share(head, model, batch, step):
    """What plain `Trainer` lets a mini-batch count for in its optimizer step."""
    if head in COUNTING:

        def num_labels(batch, first):
            return int(
                ((batch["shift_labels"] if "shift_labels" in batch else batch["labels"])[:, first:] != -100).sum()
            )

        # The first label of a text predicts nothing. (Trainer counts it in models whose name does not tell it.)
        counted = head in ("llama", "mixtral")
        return num_labels(batch, counted or head == "gpt2") / sum(num_labels(x, counted) for x in step)
    return 1 if is_believed_to_count(model, batch) else 1 / len(step)


def reference_loop(head, batches, accumulate, fraction):
    model, item_losses = make(head), HEADS[head][2]

    def loss_of(step):
        loss = 0.0
        for batch in step:
            outputs = model(**batch)
            trimmed = sum(hardest_mean(losses, fraction) for losses in item_losses(outputs, batch))
            loss = loss + trimmed * share(head, model, batch, step)
            if "aux_loss" in outputs:
                loss = loss + 0.1 * outputs.aux_loss
        return loss

    steps = [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
    return model, descend(model, steps, loss_of)
