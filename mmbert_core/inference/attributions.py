"""How much each span of a text contributed to the predicted class: integrated gradients at the word embeddings.

B rows, C chunks, T tokens, S tokens of all rows, E size of a word embedding, K classes, W word scores.

Gradient x input at the text alone is unreliable: the softmax is flat where the model is confident, and layer
normalisation removes the rest. In a test it gave a word that decided the class a negative attribution. Gradients are
therefore averaged along the path from zero embeddings to the text's own (Sundararajan et al. 2017). The word scores of
a blend follow the same path: each token gets its share of them. Attributions hint at what the model used; they do not
prove a cause.
"""

from collections.abc import Sequence
from dataclasses import replace

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
STEPS = 16  # forward and backward passes of one explanation; 8 sometimes missed a word that decided the class


def explain_rows(
    loaded: LoadedModel,
    dataset: Dataset,
    positions: Sequence[int],
    *,
    predicted: Sequence[int],
    texts: Sequence[str],
    task: Task,
) -> list[Attributions]:
    """For each row of `positions` its spans with attributions -1 to 1, above 0 where a span contributed to `predicted`.

    `predicted`: class index of each row; with two classes it depends on the threshold, not on the larger logit.
    `texts`: the whole text of each row, as it was encoded. A row's spans joined are the part of its text that the model
    read; a span between tokens has attribution 0. Attributions are divided by the row's largest absolute value. A
    columns-only model has no spans. All rows are one batch.
    """
    if loaded.model.text_subnetwork is None:
        return [[] for _ in positions]
    batch = dataset.batch(positions)
    num_tokens = batch.attention_mask.flatten(1).sum(1).tolist()  # [B]
    by_row = token_attributions(loaded.model, batch, torch.tensor(list(predicted)), task=task).split(num_tokens)
    lengths = {"max_length": loaded.config.max_length, "max_chunks": loaded.config.max_chunks}
    explained = []
    for text, values in zip(texts, by_row, strict=True):
        offsets, read_text = token_spans(loaded.tokenizer, text, **lengths)
        explained.append(_normalise(_span_attributions(read_text, offsets, values.tolist())))
    return explained


def token_attributions(model: MultimodalBert, batch: Batch, predicted: torch.Tensor, *, task: Task) -> torch.Tensor:
    """[S] float32 by row, then chunk: each token's share of the logit of class `predicted` [B] minus the others' mean.

    The shares add up to about that difference minus its value for a text of zero embeddings. Computed in float32
    whatever the task's precision: small gradients would be 0 in fp16. The model must be in eval mode.
    """
    batch, predicted = batch.to(task.device), predicted.to(task.device)[:, None]
    # Embeddings are [1, S, E] if packed, else [B or chunks with tokens, T, E]; some encoders pad T to a multiple.
    products = torch.zeros(())  # summed over E, so [1, S] or [B or chunks with tokens, T]
    slopes = torch.zeros(())  # mean gradient of the word scores [B, W]
    for step in range(STEPS):
        factor = (step + 0.5) / STEPS
        with (
            torch.enable_grad(),
            autocast("fp32", task.device),
            _ScaledEmbeddings(model.text_subnetwork.encoder, factor) as embeddings,
        ):
            text = model.encode_text(batch.input_ids, batch.attention_mask)
            scaled = [] if text.words is None else [(factor * text.words.detach()).requires_grad_()]
            text = replace(text, words=scaled[0]) if scaled else text
            logits = model.merge(text, TabAE.combine_tab_data(batch), batch.categories)
            chosen = logits.gather(1, predicted).squeeze(1)  # [B]
            others = (logits.sum(1) - chosen) / (logits.shape[1] - 1)  # [B]
            difference = (chosen - others).sum()
            gradient, *of_words = torch.autograd.grad(  # [..., E], [B, W]; zeros for a network without weight
                difference, [embeddings.scaled, *scaled], allow_unused=True, materialize_grads=True
            )
        products = products + (gradient * embeddings.original).sum(-1).cpu() / STEPS
        slopes = slopes + of_words[0].cpu() / STEPS if of_words else slopes
    by_token = _of_tokens(products, batch.attention_mask, is_packed=model.text_subnetwork.is_packed)  # [S]
    if not scaled:
        return by_token
    shares = model.blend.words.contributions(batch.input_ids, batch.attention_mask).cpu()  # [B, (C,) T, W]
    slopes = slopes.reshape(len(slopes), *[1] * (shares.ndim - 2), -1)
    return by_token + (shares * slopes).sum(-1)[batch.attention_mask.bool().cpu()]


def _of_tokens(products: torch.Tensor, attention_mask: torch.Tensor, *, is_packed: bool) -> torch.Tensor:
    """[1, S] if packed, else [B or chunks with tokens, T] -> [S], the values of tokens alone."""
    if is_packed:
        return products[0]
    mask = attention_mask.flatten(0, -2).bool()  # [B or B C, T]
    mask = mask[mask.any(1)]  # without the padding of the chunk axis
    return products[:, : mask.shape[1]][mask]


class _ScaledEmbeddings:
    """Context in which the encoder's word embeddings are multiplied by `factor`.

    `original`: the embeddings of the last forward; `scaled`: the same times `factor`, a leaf of the graph.
    """

    original: torch.Tensor
    scaled: torch.Tensor

    def __init__(self, encoder: nn.Module, factor: float) -> None:
        self.module, self.factor = encoder.get_input_embeddings(), factor

    def __enter__(self) -> "_ScaledEmbeddings":
        self.handle = self.module.register_forward_hook(self._scale)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()

    def _scale(self, module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        self.original = output.detach()
        self.scaled = (self.factor * self.original).requires_grad_()
        return self.scaled


def _span_attributions(text: str, offsets: Sequence[tuple[int, int]], values: Sequence[float]) -> Attributions:
    """The whole text, split at the tokens' `offsets` (start, end), with the tokens' values and 0 between tokens.

    Tokens that share a character are one span, whose attribution is their sum.
    """
    spans: Attributions = []
    start, end, total = 0, 0, 0.0  # of the current span, which is empty before the first token
    for (first, last), value in zip(offsets, values, strict=True):
        if first == last:  # a special token
            continue
        if first < end:
            end, total = max(end, last), total + value
            continue
        spans += [(text[start:end], total), (text[end:first], 0.0)]
        start, end, total = first, last, value
    spans += [(text[start:end], total), (text[end:], 0.0)]
    return [span for span in spans if span[0]]


def _normalise(spans: Attributions) -> Attributions:
    largest = max((abs(value) for _, value in spans), default=0.0)
    return [(span, value / largest if largest else 0.0) for span, value in spans]


# ---- highlighting ----


def highlight_level(attribution: float) -> int:
    """1 to 3 for a span that contributed to the predicted class, -1 to -3 for one against it, 0: not highlighted."""
    level = sum(abs(attribution) >= threshold for threshold in HIGHLIGHT_LEVELS)
    return level if attribution > 0 else -level


def largest_attributions(attributions: Attributions, count: int = 5) -> tuple[Attributions, Attributions]:
    """The highlighted spans with the largest attributions: at most `count` for the predicted class, as many against it.

    White space around a span is removed; spans of white space alone are left out.
    """
    spans = [(span.strip(), value) for span, value in attributions if span.strip()]
    spans.sort(key=lambda span: -abs(span[1]))
    contributing = [span for span in spans if highlight_level(span[1]) > 0]
    opposing = [span for span in spans if highlight_level(span[1]) < 0]
    return contributing[:count], opposing[:count]
