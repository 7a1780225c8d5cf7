"""The shapes and options of a decoder-only transformer that every architecture maps onto.

Knows neither Hugging Face's names nor ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from edgelm.bundle.manifest import KVCacheShape

from .rope import RopeConfig

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

ROTARY_MULTIPLE: Final = 16
"""The attention kernel can rotate if the number of rotating elements is a multiple of this."""

HEAD_SIZE_MULTIPLE: Final = 8
"""The attention kernel requires head sizes that are a multiple of this."""


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Options of a layer. rope None: no rotation. window: positions visible to a token, itself included; None: all."""

    rope: RopeConfig | None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Shapes and options of a gated decoder with grouped-query attention.

    Widths count elements, `context` counts positions. A branch (attention, MLP) reads the residual stream through a
    norm (`pre_norm`); its result may be normed before it is added (`post_norm`). Norms are RMS norms (Zhang & Sennrich
    2019, arXiv:1910.07467) times `norm_offset` + the stored weight. `qk_norm` norms queries and keys before rotation,
    each head separately or the whole projection. A soft cap limits a score x to cap * tanh(x / cap). Scales multiply
    embeddings, each branch, and logits.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int
    context: int
    norm_epsilon: float
    has_tied_head: bool
    attention_scale: float
    rotary_size: int
    activation: Activation = "silu"
    pre_norm: bool = True
    post_norm: bool = False
    norm_offset: float = 0.0
    qk_norm: Literal["head", "projection"] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def padded_head_size(self) -> int:
        """Head size in the graph: padded to a multiple of `HEAD_SIZE_MULTIPLE`."""
        return -(-self.head_size // HEAD_SIZE_MULTIPLE) * HEAD_SIZE_MULTIPLE

    @property
    def cache(self) -> KVCacheShape:
        """Shape of the KV cache."""
        return KVCacheShape("shared", len(self.layers), self.kv_heads, self.padded_head_size)

    @property
    def has_fused_rotary(self) -> bool:
        """Whether the attention kernel rotates; otherwise nodes before it do."""
        return self.rotary_size % ROTARY_MULTIPLE == 0 and self.padded_head_size % ROTARY_MULTIPLE == 0

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The different rotary embeddings of the layers, in order of first use."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @property
    def parameters(self) -> int:
        """Number of weights of the checkpoint, without padding; a tied head counts once."""
        heads = (self.heads + 2 * self.kv_heads) * self.head_size
        layer = self.hidden_size * (heads + self.heads * self.head_size + 3 * self.mlp_size)
        layer += self.hidden_size * 2 * (self.pre_norm + self.post_norm)
        layer += {None: 0, "head": 2, "projection": self.heads + self.kv_heads}[self.qk_norm] * self.head_size
        layer += self.qkv_bias * heads + self.output_bias * self.hidden_size
        layer += self.mlp_bias * (2 * self.mlp_size + self.hidden_size)
        tables = self.vocab_size * self.hidden_size * (1 if self.has_tied_head else 2)
        return tables + len(self.layers) * layer + self.hidden_size

    def long_from(self, context: int) -> int | None:
        """Return the length above which sequences need long factors; None if no rope has them at this context."""
        return next((switch for rope in self.ropes if (switch := rope.long_from(context)) is not None), None)


@dataclass(frozen=True, slots=True)
class TensorNames:
    """A checkpoint's tensor names; `{i}` is the layer. The name of a bias is its weight's with `.bias`.

    An empty name is a tensor that the architecture does not have. `qkv` and `gate_up` name projections stored as one
    tensor.
    """

    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    final_norm: str = "model.norm.weight"
    attention_norm: str = "model.layers.{i}.input_layernorm.weight"
    attention_post_norm: str = ""
    query: str = "model.layers.{i}.self_attn.q_proj.weight"
    key: str = "model.layers.{i}.self_attn.k_proj.weight"
    value: str = "model.layers.{i}.self_attn.v_proj.weight"
    qkv: str = ""
    query_norm: str = "model.layers.{i}.self_attn.q_norm.weight"
    key_norm: str = "model.layers.{i}.self_attn.k_norm.weight"
    output: str = "model.layers.{i}.self_attn.o_proj.weight"
    mlp_norm: str = "model.layers.{i}.post_attention_layernorm.weight"
    mlp_post_norm: str = ""
    gate: str = "model.layers.{i}.mlp.gate_proj.weight"
    up: str = "model.layers.{i}.mlp.up_proj.weight"
    gate_up: str = ""
    down: str = "model.layers.{i}.mlp.down_proj.weight"
