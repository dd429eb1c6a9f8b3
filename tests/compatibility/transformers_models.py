"""Models of Hugging Face transformers, built from configurations with random weights; nothing is downloaded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from tests.compatibility.models import VOCAB, Batch, Entry, tokens


class HuggingFace(nn.Module):
    """A model with its own loss from labels.

    Args:
        model: the model.
        shifted: whether its loss compares each position with the next label.
    """

    def __init__(self, model: nn.Module, shifted: bool) -> None:
        super().__init__()
        self.model = model
        self.shifted = shifted

    def forward(self, batch: Batch) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[1]).loss

    def losses(self, batch: Batch) -> Tensor:
        logits, labels = self.model(input_ids=batch[0], labels=batch[1]).logits, batch[1]
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return HuggingFace(transformers.GPT2LMHeadModel(config), shifted=True)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
    )
    return HuggingFace(transformers.LlamaForCausalLM(config), shifted=True)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return HuggingFace(transformers.BertForMaskedLM(config), shifted=False)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=8,
        d_kv=4,
        d_ff=12,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=6,
    )
    return HuggingFace(transformers.T5ForConditionalGeneration(config), shifted=False)


def scaled(build):
    """Larger weights than the initialisation gives: gradients of every parameter that are no rounding errors."""

    def make() -> nn.Module:
        model = build()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.copy_(torch.randn_like(p) * 0.4)
        return model

    return make


# These models compute their losses, norms and rotations in single precision, whatever the precision of the rest.
TRANSFORMERS = [
    Entry("GPT-2 (transformers)", scaled(gpt2), tokens, single=True),
    Entry("Llama (transformers)", scaled(llama), tokens, single=True),
    Entry("BERT (transformers)", scaled(bert), tokens, single=True),
    Entry("T5 (transformers)", scaled(t5), tokens, single=True),
]
