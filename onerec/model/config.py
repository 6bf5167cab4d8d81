"""What a OneRec network is made of, every choice that the paper leaves open included."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

_PRESETS: dict[str, dict[str, Any]] = {
    # The recipe that ranks best (docs/quality.md): a causal encoder over items that know their own
    # vectors, outputs of trie nodes, and the dense head as auxiliary loss.
    "items": {
        "history_length": 50,
        "history_tokens": "items",
        "encoder": "causal",
        "decoder_start": "state",
        "legal_softmax": True,
        "node_outputs": True,
        "item_loss": 1.0,
        "item_negatives": 1024,
        "item_dropout": 0.3,
        "vector_dropout": 0.5,
        "d_model": 64,
        "n_heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "d_ff": 128,
        "n_experts": 0,
        "dropout": 0.3,
        "decoder_dropout": 0.1,
        "share_codes": False,
    },
    # A model for a CPU: the decoder has experts all the same.
    "paper-tiny": {
        "history_length": 50,
        "history_tokens": "items",
        "d_model": 64,
        "n_heads": 4,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "d_ff": 256,
        "n_experts": 8,
        "expert_d_ff": 128,
    },
    # TIGER (arXiv 2305.05065, section 4): 3 codes of 256 and a collision digit, 4 + 4 layers of
    # width 128, ReLU, 20 items. Its 6 heads of 64 do not divide that width: 4 of 32 here.
    "tiger": {
        "codebook_size": 256,
        "levels": 4,
        "session_length": 1,
        "history_length": 20,
        "history_tokens": "codes",
        "d_model": 128,
        "n_heads": 4,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "d_ff": 1024,
        "n_experts": 0,
        "activation": "relu",
        "dropout": 0.1,
    },
    # arXiv 2506.13695, table 1: 0.121B, dense.
    "0.1b": {
        "d_model": 1024,
        "n_heads": 8,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "d_ff": 2048,
        "n_experts": 0,
    },
    # arXiv 2506.13695, table 1: 0.935B. Dense layers as in the table (2048), experts as in the text
    # (2/3 * 4d rounded up to a multiple of 128 = 2816): the reading whose size comes nearest.
    "1b": {
        "d_model": 1024,
        "n_heads": 8,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "d_ff": 2048,
        "n_experts": 24,
        "expert_d_ff": 2816,
    },
}


def preset_fields(name: str) -> dict[str, Any]:
    """The fields that `OneRecConfig.preset` sets.

    Raises:
        ValueError: An unknown name.
    """
    if name not in _PRESETS:
        raise ValueError(f"preset must be one of {list(_PRESETS)}, got {name!r}")
    return dict(_PRESETS[name])


@dataclass(frozen=True)
class OneRecConfig:
    """Shape and habits of a `OneRec` network (arXiv 2502.18965, section 3.2).

    "Open" marks what that paper does not state; the default is ours, or that of the source named.

    Attributes:
        codebook_size: K, codes a level. Paper: 8192.
        levels: L, codes an item. Paper: 3.
        session_length: m, items of a generated session. Paper: 5.
        history_length: n, items of history that the encoder reads, the latest ones. Paper: 256.
        history_tokens: "codes" gives the encoder n * L tokens, a code each (the paper); "items" n
            tokens, each the sum of an item's code embeddings, at a third of the work for L = 3.
        encoder: "bidirectional" (the paper), or "causal": a history item sees earlier ones only,
            and the decoder's attention to the history is cut off at its prefix, so that one pass
            supervises every prefix of a sequence. Needs `history_tokens` = "items".
        n_items: Size of the catalogue, decided by the data. With more than 0 the network knows its
            items (`OneRec.set_catalog`): the encoder adds an embedding of the item itself to its
            codes, and rows of codes carry the item's index last. Not in the paper, whose history is
            semantic ids only.
        item_dropout: Chance that a history item is read without its own embedding, in training;
            `item_loss` and `legal_softmax` give items one (`n_items`).
        vector_dim: Width of item vectors whose projection is added too; 0 for none.
        vector_dropout: Dropout on the projections of item vectors.
        item_loss: Weight of the cross entropy of the next item from the encoder's state at the end
            of the prefix, whose item table is the input's: the dense head, for `Recommender.rank`.
        item_negatives: Negatives of that loss, shared by a batch; 0 takes the whole catalogue.
        legal_softmax: Train the softmax of a level over the codes that the trie has after the
            codes before it. Decode such a network with the scoring "legal_softmax".
        decoder_start: What a BOS reads: "learned" one learned vector; "state" that vector plus the
            encoder's output at the latest item of the prefix, so that the decoder need not find
            that item by cross-attention. Needs a `causal` encoder or `history_tokens` = "items".
        node_outputs: Outputs of the trie's nodes instead of codes alone: the output vector of a
            child is its code's plus the mean of `OneRec.item_table` over the items below it (at a
            leaf the item's own vector). Needs `legal_softmax`.
        d_model: Width. Open; presets follow arXiv 2506.13695, table 1.
        n_heads: Attention heads; divides `d_model`. Open.
        encoder_layers: Open; the report has as many as `decoder_layers`.
        decoder_layers: Open.
        d_ff: Hidden width of dense feed-forward layers (encoder; decoder without experts). Open.
        n_experts: Experts of each decoder layer; 0 for a dense decoder. Paper: 24.
        experts_per_token: Paper: 2.
        expert_d_ff: Hidden width of an expert. Open; arXiv 2506.13695: 2/3 * 4 * d_model rounded up
            to a multiple of 128.
        normalize_gates: Divide the kept gates by their sum. Paper, as written: no.
        activation: "swiglu" (arXiv 2506.13695), "geglu", "gelu" or "relu". Open.
        loss_free_balancing: Choose experts with a bias that follows the load (arXiv 2408.15664).
            Not in v1; arXiv 2506.13695 adds it.
        balancing_rate: Step of that bias after each optimizer step. arXiv 2408.15664: 1e-3.
        router_balance_loss: Weight of the balance loss of arXiv 2101.03961. v1 names none.
        router_z_loss: Weight of the z-loss of arXiv 2202.08906. v1 names none.
        dropout: Rate on embeddings and on what each sublayer adds. Open.
        decoder_dropout: The same of the decoder; None for `dropout`.
        norm_eps: Epsilon of RMSNorm (pre-norm; T5's placement). Open.
        tie_heads: The head of a level is that level's code table. Open.
        share_codes: Encoder and decoder read one code table. Open.
        init_std: Standard deviation of every weight matrix; projections into the residual stream
            divide it by sqrt(2 * layers). Open.
    """

    codebook_size: int = 8192
    levels: int = 3
    session_length: int = 5
    history_length: int = 256
    history_tokens: Literal["codes", "items"] = "codes"
    encoder: Literal["bidirectional", "causal"] = "bidirectional"
    n_items: int = 0
    item_dropout: float = 0.0
    vector_dim: int = 0
    vector_dropout: float = 0.0
    item_loss: float = 0.0
    item_negatives: int = 0
    legal_softmax: bool = False
    decoder_start: Literal["learned", "state"] = "learned"
    node_outputs: bool = False
    d_model: int = 1024
    n_heads: int = 8
    encoder_layers: int = 4
    decoder_layers: int = 4
    d_ff: int = 2048
    n_experts: int = 24
    experts_per_token: int = 2
    expert_d_ff: int = 2816
    normalize_gates: bool = False
    activation: Literal["swiglu", "geglu", "gelu", "relu"] = "swiglu"
    loss_free_balancing: bool = True
    balancing_rate: float = 1e-3
    router_balance_loss: float = 0.0
    router_z_loss: float = 0.0
    dropout: float = 0.0
    decoder_dropout: float | None = None
    norm_eps: float = 1e-6
    tie_heads: bool = True
    share_codes: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _check_types(self)
        for name in (
            "codebook_size",
            "levels",
            "session_length",
            "history_length",
            "d_model",
            "n_heads",
            "encoder_layers",
            "decoder_layers",
            "d_ff",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if self.history_tokens not in ("codes", "items"):
            raise ValueError(
                f"history_tokens must be 'codes' or 'items', got {self.history_tokens!r}"
            )
        if self.encoder not in ("bidirectional", "causal"):
            raise ValueError(f"encoder must be 'bidirectional' or 'causal', got {self.encoder!r}")
        if self.encoder == "causal" and self.history_tokens != "items":
            raise ValueError(
                f"history_tokens must be 'items' for a causal encoder, got {self.history_tokens!r}"
            )
        for name in ("n_items", "vector_dim", "item_loss", "item_negatives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("vector_dim", "item_loss", "legal_softmax"):
            if getattr(self, name) and not self.n_items:
                raise ValueError(f"n_items must be given for {name}, which needs the catalogue")
        if self.n_items and self.history_tokens != "items":
            raise ValueError(
                f"history_tokens must be 'items' with n_items, got {self.history_tokens!r}"
            )
        if self.decoder_start not in ("learned", "state"):
            raise ValueError(
                f"decoder_start must be 'learned' or 'state', got {self.decoder_start!r}"
            )
        if self.decoder_start == "state" and self.history_tokens != "items":
            raise ValueError("history_tokens must be 'items' for decoder_start = 'state'")
        if self.node_outputs and not self.legal_softmax:
            raise ValueError("legal_softmax must be on for node_outputs")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model, got {self.n_heads} and {self.d_model}")
        if self.n_experts < 0:
            raise ValueError(f"n_experts must be 0 (dense) or more, got {self.n_experts}")
        if self.n_experts:
            if not 1 <= self.experts_per_token <= self.n_experts:
                raise ValueError(
                    f"experts_per_token must lie in 1..n_experts = {self.n_experts}, "
                    f"got {self.experts_per_token}"
                )
            if self.expert_d_ff < 1:
                raise ValueError(f"expert_d_ff must be at least 1, got {self.expert_d_ff}")
        if self.activation not in ("swiglu", "geglu", "gelu", "relu"):
            raise ValueError(
                f"activation must be 'swiglu', 'geglu', 'gelu' or 'relu', got {self.activation!r}"
            )
        for name in ("dropout", "decoder_dropout", "item_dropout", "vector_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {rate}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> OneRecConfig:
        """A named shape: "items" (the recipe that ranks best, for a CPU; needs `n_items`), or the
        paper's network as "paper-tiny" (CPU), "0.1b" (dense), "1b" (24 experts, 2 a token); or
        "tiger".

        "tiger" is the baseline of arXiv 2305.05065: a bidirectional encoder over the history's
        codes and a dense decoder of one item, for ids with a collision digit (`RQVAE`, its
        `distinct` "rank").

        Sizes and their source are in docs/paper.md.

        Args:
            name: One of the five.
            overrides: Fields to set otherwise.

        Raises:
            ValueError: An unknown name.
            TypeError: An unknown field.
        """
        return cls(**{**preset_fields(name), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return dataclasses.asdict(self)

    def least_parameters(self) -> int:
        """A number of parameters that every network of this shape has at least.

        By it a file that is too small is refused before anything is made in its size.
        """
        ffn = 3 if self.activation in ("swiglu", "geglu") else 2
        experts = self.n_experts * ffn * self.expert_d_ff if self.n_experts else ffn * self.d_ff
        rows = (
            self.levels * self.codebook_size
            + self.n_items
            + self.encoder_layers * (4 * self.d_model + ffn * self.d_ff)
            + self.decoder_layers * (8 * self.d_model + experts)
        )
        return rows * self.d_model


# What the engine can hold, and more than anybody has trained.
_MOST = {
    "codebook_size": 1 << 16,
    "levels": 8,
    "session_length": 1 << 20,
    "history_length": 1 << 20,
    "n_items": 2**31 - 1,
    "vector_dim": 1 << 20,
    "item_negatives": 2**31 - 1,
    "d_model": 1 << 20,
    "n_heads": 1 << 20,
    "encoder_layers": 4096,
    "decoder_layers": 4096,
    "d_ff": 1 << 20,
    "n_experts": 1 << 16,
    "expert_d_ff": 1 << 20,
}


def _check_types(config: object) -> None:
    """Refuses fields that are no integer, truth value or finite number where one is wanted."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        truth = isinstance(value, bool)
        if field.type == "int" and (truth or not isinstance(value, Integral)):
            raise TypeError(f"{field.name} must be an integer, got {value!r}")
        if field.type == "bool" and not truth:
            raise TypeError(f"{field.name} must be true or false, got {value!r}")
        number = isinstance(value, Real) and not truth and math.isfinite(value)
        if field.type == "float" and not number:
            raise ValueError(f"{field.name} must be a finite number, got {value!r}")


@dataclass(frozen=True)
class RewardModelConfig:
    """Shape of a `RewardModel` (arXiv 2502.18965, section 3.3), and what its outputs mean.

    Attributes:
        n_items: Items of the catalogue.
        feature_dim: Width of the item features that it is given (`RewardModel.item_features`).
        targets: Names of the outputs, one tower each. Paper: watch time, view, follow, like.
        weights: Share of each target in the fused score. Open.
        base_rates: Mean label of each target in training, in (0, 1).
        positive_weights: Weight that positive labels of each target had in training; taken out of
            the probabilities again.
        watch_cap: Seconds of watch time of an item that count as the label 1.
        labels: "item": a tower reads each item's state and a session's output is the mean over its
            items; "session": a tower reads the sum of the states (the paper's formula).
        history_length: Items of history that the target attention sees, the latest ones. Open.
        session_length: Most items of a session.
        d_model: Width. Open.
        n_heads: Attention heads; divides `d_model`. Open.
        tower_width: Hidden width of a tower. Open.
        item_ids: Whether items also have vectors of their own, learned here, beside their features.
        wide: Whether each output also has a linear part of the item's features and the logarithm of
            the history's length, past all layers (as in arXiv 1606.07792). Open.
        dropout: Rate on item states before the towers. Open.
    """

    n_items: int
    feature_dim: int
    targets: tuple[str, ...]
    weights: tuple[float, ...]
    base_rates: tuple[float, ...]
    positive_weights: tuple[float, ...]
    watch_cap: float = 1.0
    labels: Literal["item", "session"] = "item"
    history_length: int = 50
    session_length: int = 5
    d_model: int = 64
    n_heads: int = 4
    tower_width: int = 32
    item_ids: bool = True
    wide: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("targets", "weights", "base_rates", "positive_weights"):
            values = tuple(getattr(self, name))  # JSON has lists
            object.__setattr__(self, name, values)
            if not values or len(values) != len(self.targets):
                raise ValueError(
                    f"{name} must have a value for each of {len(self.targets)} targets, at least "
                    f"one, got {len(values)}"
                )
        for name in (
            "n_items",
            "feature_dim",
            "history_length",
            "session_length",
            "d_model",
            "n_heads",
            "tower_width",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model, got {self.n_heads} and {self.d_model}")
        if not all(0 < rate < 1 for rate in self.base_rates):
            raise ValueError(f"base_rates must lie in (0, 1), got {self.base_rates}")
        if not all(weight > 0 for weight in self.positive_weights):
            raise ValueError(f"positive_weights must be positive, got {self.positive_weights}")
        if not self.watch_cap > 0:
            raise ValueError(f"watch_cap must be positive, got {self.watch_cap}")
        if self.labels not in ("item", "session"):
            raise ValueError(f"labels must be 'item' or 'session', got {self.labels!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
