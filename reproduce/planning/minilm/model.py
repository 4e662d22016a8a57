"""The sentence transformer all-MiniLM-L6-v2, its batches and its judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from reproduce import datasets
from reproduce.datasets import Pair

TOKENS = 128  # of a text at most
Batch = tuple[dict[str, Tensor], Tensor]


class SentenceEncoder(nn.Module):
    """BERT, the mean over the tokens, and the length one."""

    def __init__(self, config: BertConfig) -> None:
        """Build the encoder; the pooling layer of BERT, which it doesn't use, is left out."""
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return a vector of length one for each text."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counted = attention_mask.unsqueeze(2).to(states.dtype)
        return functional.normalize((states * counted).sum(1) / counted.sum(1), dim=1)  # texts, 384


def pretrained() -> SentenceEncoder:
    """Return the encoder with its published weights."""
    files = datasets.minilm()
    options = json.loads(files["config.json"].read_text(encoding="utf-8"))
    known = {name: value for name, value in options.items() if name in BertConfig().to_dict()}
    model = SentenceEncoder(BertConfig(**known))
    weights = load_file(files["model.safetensors"])
    unused = ("pooler.", "embeddings.position_ids")
    model.bert.load_state_dict({name: value for name, value in weights.items() if not name.startswith(unused)})
    return model.eval()


def linear_params(model: nn.Module) -> int:
    """Return the parameters of all linear layers of the encoder, of factors where they are factorised."""
    return sum(p.numel() for name, p in model.bert.encoder.named_parameters() if "LayerNorm" not in name)


@dataclass(frozen=True)
class Texts:
    """Texts as batches of equally long ones, and their places: `vectors[places[k]]` is the output of batch k."""

    batches: list[Batch]
    places: list[list[int]]

    @classmethod
    def of(cls, texts: Sequence[str], size: int = 64) -> Texts:
        """Tokenise texts, sort them by length, and pad them to batches; each with a random direction as its target."""
        tokenizer = Tokenizer.from_file(str(datasets.minilm()["tokenizer.json"]))
        tokenizer.no_padding()
        tokenizer.enable_truncation(TOKENS)
        ids = [torch.tensor(encoded.ids) for encoded in tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        places = [order[start : start + size] for start in range(0, len(order), size)]
        draw = torch.Generator().manual_seed(0)
        batches = []
        for group in places:
            padded = nn.utils.rnn.pad_sequence([ids[place] for place in group], batch_first=True)
            lengths = torch.tensor([len(ids[place]) for place in group])
            mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
            target = torch.randn(len(group), 384, generator=draw)
            batches.append(({"input_ids": padded, "attention_mask": mask}, target))
        return cls(batches, places)


def projected(output: Tensor, target: Tensor) -> Tensor:
    """Return the mean of the outputs' products with random directions.

    The gradients of this "loss" are those of the outputs themselves in random directions: their mean squares say
    how much each number inside moves the outputs. It takes no labels.
    """
    return (output * target).sum(1).mean()


class Judge:
    """Spearman's correlation in per cent between people's scores and cosines, on pairs."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        """Tokenise the pairs once."""
        self.texts = Texts.of([pair.first for pair in pairs] + [pair.second for pair in pairs])
        self.scores = [pair.score for pair in pairs]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        """Return the correlation of a model."""
        vectors = torch.empty(2 * len(self.scores), 384)
        for (inputs, _), places in zip(self.texts.batches, self.texts.places, strict=True):
            vectors[places] = model(**inputs)
        first, second = vectors.chunk(2)
        return 100 * float(spearmanr((first * second).sum(1).numpy(), self.scores)[0])
