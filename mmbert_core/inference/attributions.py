"""Which words of a text spoke for the predicted class: integrated gradients at the word embeddings.

B rows, C chunks, T tokens, S tokens of all rows, E size of a word embedding, K classes.

Gradient x input at the text itself is not enough: where the model is sure the softmax is flat, layer normalisation takes the rest, and a planted word
that decides the class came out against it. So gradients are averaged on the way from embeddings of zero to the text's own (Sundararajan et al. 2017).
The weights are a hint at what the model looked at, no proof of a cause.
"""

from collections.abc import Sequence

import torch
from torch import nn

from mmbert_core.data.dataset import Batch, Dataset
from mmbert_core.data.tokens import token_spans
from mmbert_core.inference.model_folder import LoadedModel
from mmbert_core.inference.precision import autocast
from mmbert_core.inference.scoring import Task
from mmbert_core.model.multimodal_bert import MultimodalBert
from mmbert_core.model.tabular_encoder import TabAE

Attributions = list[tuple[str, float]]  # spans of one text, in order, each with its attribution, -1 to 1
HIGHLIGHT_LEVELS = (0.1, 0.3, 0.6)  # absolute attributions from which a span is highlighted: weakly, clearly, strongly
STEPS = 16  # forwards and backwards of one explanation; 8 missed a planted word now and then


def explain_rows(
    loaded: LoadedModel,
    dataset: Dataset,
    positions: Sequence[int],
    *,
    predicted: Sequence[int],
    texts: Sequence[str],
    task: Task,
) -> list[Attributions]:
    """For each row of `positions` the pieces of its text, in order, each with a weight of -1 to 1; above 0 speaks for the predicted class.

    `predicted`: the class of each, which of two classes the threshold decides and not the larger logit. `texts`: the whole text of each, as it
    was encoded. The pieces of a row side by side are its text as far as the model read it; what lies between tokens weighs 0, and so does
    everything where nothing has a gradient. A columns-only model has no pieces. All rows are one batch.
    """
    if loaded.model.text_subnetwork is None:
        return [[] for _ in positions]
    batch = dataset.batch(positions)
    num_tokens = batch.attention_mask.flatten(1).sum(1).tolist()  # [B]
    parts = token_weights(loaded.model, batch, torch.tensor(list(predicted)), task=task).split(num_tokens)
    made = []
    for text, weights in zip(texts, parts, strict=True):
        spans, read = token_spans(
            loaded.tokenizer, text, max_length=loaded.config.max_length, max_chunks=loaded.config.max_chunks
        )
        made.append(_scaled(_pieces(read, spans, weights.tolist())))
    return made


def token_weights(model: MultimodalBert, batch: Batch, predicted: torch.Tensor, *, task: Task) -> torch.Tensor:
    """[S] float32, row after row, chunk after chunk: what each token gave to the logit of the class `predicted` [B] less the mean of the others.

    Their sum is about that score less the score without words. Computed in float32 whatever the task's precision: small gradients
    would be 0 in fp16. The model should be in eval mode; it is left as it was.
    """
    batch, predicted = batch.to(task.device), predicted.to(task.device)[:, None]
    products = torch.zeros(())
    for step in range(STEPS):
        with (
            torch.enable_grad(),
            autocast("fp32", task.device),
            _Scaled(model.text_subnetwork.encoder, (step + 0.5) / STEPS) as words,
        ):
            logits = _logits(model, batch)  # [B, K]
            chosen = logits.gather(1, predicted).squeeze(1)
            others = (logits.sum(1) - chosen) / (logits.shape[1] - 1)
            [gradient] = torch.autograd.grad((chosen - others).sum(), words.scaled)
        products = (
            products + (gradient * words.whole).sum(-1).cpu() / STEPS
        )  # [1, S] packed, else [real chunks, T] or longer, where the encoder pads once more
    if model.text_subnetwork.is_packed:
        return products[0]
    mask = batch.attention_mask.flatten(0, -2).bool()  # [B or B x C, T]
    mask = mask[mask.any(1)]
    return products[:, : mask.shape[1]][mask]


def _logits(model: MultimodalBert, batch: Batch) -> torch.Tensor:
    return model(batch.input_ids, batch.attention_mask, TabAE.combine_tab_data(batch), batch.categories)


class _Scaled:
    """Inside, the encoder reads its word embeddings times `factor`: `whole` as they are, `scaled` as a leaf of the graph."""

    whole: torch.Tensor
    scaled: torch.Tensor

    def __init__(self, encoder: nn.Module, factor: float) -> None:
        self.module, self.factor = encoder.get_input_embeddings(), factor

    def __enter__(self) -> "_Scaled":
        self.handle = self.module.register_forward_hook(self._scale)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def _scale(self, module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        self.whole = output.detach()
        self.scaled = (self.factor * self.whole).requires_grad_()
        return self.scaled


def _pieces(text: str, spans: Sequence[tuple[int, int]], weights: Sequence[float]) -> Attributions:
    """The whole text, cut where tokens begin and end; tokens that share a character are one piece."""
    pieces: Attributions = []
    start, end, total = 0, 0, 0.0  # of the piece in hand, which is empty before the first token
    for (first, last), weight in zip(spans, weights, strict=True):
        if first == last:  # a special token
            continue
        if first < end:
            end, total = max(end, last), total + weight
            continue
        pieces += [(text[start:end], total), (text[end:first], 0.0)]
        start, end, total = first, last, weight
    pieces += [(text[start:end], total), (text[end:], 0.0)]
    return [piece for piece in pieces if piece[0]]


def highlight_level(attribution: float) -> int:
    """1 to 3 for a span that contributed to the predicted class, -1 to -3 for one against it, 0: not highlighted."""
    level = sum(abs(attribution) >= threshold for threshold in HIGHLIGHT_LEVELS)
    return level if attribution > 0 else -level


def largest_attributions(attributions: Attributions, count: int = 5) -> tuple[Attributions, Attributions]:
    """The highlighted spans with the largest attributions, at most `count` for the predicted class and as many against it.

    White space around a span is removed; spans of white space alone are left out.
    """
    spans = [(span.strip(), value) for span, value in attributions if span.strip()]
    spans.sort(key=lambda pair: -abs(pair[1]))
    levels = [highlight_level(value) for _, value in spans]
    contributing = [span for span, level in zip(spans, levels, strict=True) if level > 0]
    opposing = [span for span, level in zip(spans, levels, strict=True) if level < 0]
    return contributing[:count], opposing[:count]


def _scaled(pieces: Attributions) -> Attributions:
    largest = max((abs(weight) for _, weight in pieces), default=0.0)
    return [(piece, weight / largest if largest else 0.0) for piece, weight in pieces]
