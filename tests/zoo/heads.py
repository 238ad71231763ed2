"""Losses that heads of transformers compute themselves, beside those of the zoo's language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zoo.packages import in_double, torchvision_models
from tests.zoo.setting import N, Setting, named

BERT = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {
    **{"n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
T5 = {
    **{"d_kv": 4, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0},
    **{"decoder_start_token_id": 0, "pad_token_id": 0},
}


class Sizes:
    """Sizes of models and data."""

    def __init__(self, samples: int, words: int, length: int, width: int, positions: int) -> None:
        self.samples, self.words, self.length = samples, words, length
        self.width, self.positions = width, positions

    def ids(self, *more: int) -> Tensor:
        return torch.randint(1, self.words, (self.samples, *more, self.length))

    def bert(self, kind: str, family: str = "Bert", **options: Any) -> Any:
        sizes = {"hidden_size": self.width, "intermediate_size": 2 * self.width}
        return self._made(
            family, kind, max_position_embeddings=self.positions, **sizes, **BERT, **options
        )

    def gpt2(self, kind: str, **options: Any) -> Any:
        sizes = {"n_embd": self.width, "n_positions": self.positions}
        return self._made("GPT2", kind, **sizes, **GPT2, **options)

    def t5(self) -> Any:
        sizes = {"d_model": self.width, "d_ff": 2 * self.width}
        return self._made("T5", "ForConditionalGeneration", **sizes, **T5)

    def _made(self, family: str, kind: str, **options: Any) -> Any:
        torchvision_models()  # transformers imports it where it is installed
        import transformers

        config = getattr(transformers, f"{family}Config")(vocab_size=self.words, **options)
        return getattr(transformers, family + kind)(config).eval()


def _setting(
    model: Any,
    inputs: dict[str, Tensor],
    criterion: Callable[[Tensor], Tensor],
    outputs: Callable[[Any], Tensor] = lambda out: out.logits,
    alone: bool = True,
) -> Setting:
    call = named(*inputs)
    if torch.get_default_dtype() == torch.float64:
        call = in_double(call)
    values = tuple(inputs.values())
    return Setting(model, values, criterion, call, outputs, lambda out: out.loss, alone=alone)


def _shifted(f: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(f[:, :-1].mT, target[:, 1:])


def _some(ids: Tensor) -> Tensor:
    """Labels of words that are masked, in each sample another number of them."""
    return ids.masked_fill(
        torch.arange(ids.shape[1]) % 3 == torch.arange(len(ids)).unsqueeze(1) % 3, -100
    )


def causal(s: Sizes) -> Setting:
    ids = s.ids()
    model = s.gpt2("LMHeadModel")
    return _setting(model, {"input_ids": ids, "labels": ids}, lambda f: _shifted(f, ids))


def causal_in_part(s: Sizes) -> Setting:
    """Of prompts and answers, whose prompts are no targets."""
    ids = s.ids()
    labels, model = _some(ids), s.gpt2("LMHeadModel")
    return _setting(
        model, {"input_ids": ids, "labels": labels}, lambda f: _shifted(f, labels), alone=False
    )


def masked(s: Sizes) -> Setting:
    ids = s.ids()
    labels = _some(ids)
    return _setting(
        *(s.bert("ForMaskedLM"), {"input_ids": ids, "labels": labels}),
        *(lambda f: F.cross_entropy(f.mT, labels),),
        alone=False,
    )


def pretraining(s: Sizes) -> Setting:
    """Masked words, and whether the second sentence is the next."""
    ids, following = s.ids(), torch.arange(s.samples) % 2
    labels = _some(ids)
    size = s.length * s.words

    def criterion(f: Tensor) -> Tensor:
        words = f[:, :size].reshape(-1, s.length, s.words)
        return F.cross_entropy(words.mT, labels) + F.cross_entropy(f[:, size:], following)

    return _setting(
        s.bert("ForPreTraining"),
        {"input_ids": ids, "labels": labels, "next_sentence_label": following},
        criterion,
        lambda out: torch.cat([out.prediction_logits.flatten(1), out.seq_relationship_logits], 1),
        alone=False,
    )


def sequence(s: Sizes) -> Setting:
    labels = torch.arange(s.samples) % 3
    return _setting(
        s.gpt2("ForSequenceClassification", num_labels=3),
        {"input_ids": s.ids(), "labels": labels},
        lambda f: F.cross_entropy(f, labels),
    )


def regression(s: Sizes) -> Setting:
    labels = torch.linspace(-1, 1, s.samples)
    return _setting(
        s.bert("ForSequenceClassification", num_labels=1),
        {"input_ids": s.ids(), "labels": labels},
        lambda f: F.mse_loss(f[:, 0], labels),
    )


def several_labels(s: Sizes) -> Setting:
    labels = (torch.arange(3 * s.samples).reshape(-1, 3) % 4 == 0).to(torch.get_default_dtype())
    kind = "multi_label_classification"
    return _setting(
        s.bert("ForSequenceClassification", num_labels=3, problem_type=kind),
        {"input_ids": s.ids(), "labels": labels},
        lambda f: F.binary_cross_entropy_with_logits(f, labels),
    )


def tokens(s: Sizes) -> Setting:
    labels = torch.randint(3, (s.samples, s.length))
    return _setting(
        s.bert("ForTokenClassification", "Roberta", num_labels=3),
        {"input_ids": s.ids(), "labels": labels},
        lambda f: F.cross_entropy(f.mT, labels),
    )


def question(s: Sizes) -> Setting:
    starts = torch.arange(s.samples) % s.length
    ends = (starts + 1) % s.length

    def criterion(f: Tensor) -> Tensor:
        return (F.cross_entropy(f[..., 0], starts) + F.cross_entropy(f[..., 1], ends)) / 2

    return _setting(
        s.bert("ForQuestionAnswering"),
        {"input_ids": s.ids(), "start_positions": starts, "end_positions": ends},
        criterion,
        lambda out: torch.stack([out.start_logits, out.end_logits], -1),
    )


def choice(s: Sizes) -> Setting:
    labels = torch.arange(s.samples) % 2
    return _setting(
        s.bert("ForMultipleChoice"),
        {"input_ids": s.ids(2), "labels": labels},
        lambda f: F.cross_entropy(f, labels),
    )


def translation(s: Sizes) -> Setting:
    labels = s.ids()
    return _setting(
        s.t5(), {"input_ids": s.ids(), "labels": labels}, lambda f: F.cross_entropy(f.mT, labels)
    )


HEADS: dict[str, Callable[[Sizes], Setting]] = {
    "causal": causal,
    "causal, in part": causal_in_part,
    "masked": masked,
    "pretraining": pretraining,
    "sequence": sequence,
    "regression": regression,
    "several labels": several_labels,
    "tokens": tokens,
    "question": question,
    "choice": choice,
    "translation": translation,
}
SMALL = Sizes(N, 7, 4, 8, 8)
# The words and positions of GPT-2; width is what a test can wait for.
REAL = Sizes(2, 50257, 32, 64, 512)
