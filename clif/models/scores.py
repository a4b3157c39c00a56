"""How a layer's attention makes scores of query and key, beside the causal mask.

Sources: sliding windows (Beltagy et al. 2020; Jiang et al. 2023, Mistral); soft caps (Gemma 2, Gemma Team 2024);
sinks (Xiao et al. 2023; gpt-oss, OpenAI 2025).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa


class Scores(NamedTuple):
    """scale: of products of query and key. window: tokens that a row sees, its own included; None: all before it.

    softcap: scores s become softcap * tanh(s / softcap); None: they stay. sinks [heads]: scores that take their share
    of each row's softmax and give nothing; None: there are none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether they are products times the scale, of all tokens before a row."""
        return self.window is None and self.fusible

    @property
    def fusible(self) -> bool:
        """Whether they are products times the scale, under some mask."""
        return self.softcap is None and self.sinks is None

    def softmax(self, products: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
        """Of capped and masked products [.., tokens], where dimensions `kv_heads` and `heads` are those of KV heads and
        of the query heads of each."""
        if self.sinks is None:
            return products.softmax(-1)
        shape = [1] * products.dim()
        shape[kv_heads], shape[heads] = products.shape[kv_heads], -1
        sinks = self.sinks.to(products.dtype).view(shape).expand(*products.shape[:-1], 1)
        return torch.cat((products, sinks), -1).softmax(-1)[..., :-1]

    @property
    def plain_scale(self) -> float:
        """The scale, for kernels that compute nothing else. Raises ValueError where there is more."""
        if not self.plain:
            raise ValueError(f"a kernel of plain attention was asked for {self}")
        return self.scale


def cap_(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Cap scores in place."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def cap_gradient_(grad: torch.Tensor, capped: torch.Tensor, softcap: float) -> torch.Tensor:
    """The gradient of scores, in place, from that of capped ones of the same shape."""
    return grad.mul_(1.0 - (capped / softcap).square())


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """query [heads, rows, d], key and value [kv_heads, tokens, d], seen [rows, tokens] bool -> [rows, heads * d].

    The window is that of `seen`.
    """
    if scores.fusible:
        q, k, v = (t.unsqueeze(0) for t in (query, key, value))
        got = sdpa(q, k, v, attn_mask=seen, scale=scores.scale, enable_gqa=True)[0]
    else:
        grouped = (query * scores.scale).unflatten(0, (len(key), -1))
        products = cap_(torch.matmul(grouped, key.transpose(-1, -2).unsqueeze(1)), scores.softcap)
        products.masked_fill_(~seen, -torch.inf)
        got = torch.matmul(scores.softmax(products, 1, 0), value.unsqueeze(1)).flatten(0, 1)
    return got.transpose(0, 1).flatten(1)
