"""Models of transformers as installed, from tiny configurations; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import sdi
from tests.zoo.case import Case, pick, tokens
from tests.zoo.looped import lm

VOCABULARY = 11
HUB: dict[str, Callable[[], Case]] = {}


def _shape(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def _awake(model: nn.Module) -> nn.Module:
    """In evaluation mode, with weights large enough that every part has a gradient to compare."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _case(model: nn.Module, body: Any, batch: Any = None, **options: Any) -> Case:
    batch = batch or tokens()
    options.setdefault("loss", sdi.causal_lm_loss)
    return Case(model, batch, pick(batch), body, **options)


def albert(groups: int = 1, inner: int = 1, masked: bool = True) -> Case:
    """ALBERT: every layer group is called several times by one encoder."""
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        **_shape(embedding_size=12, num_hidden_layers=4, num_hidden_groups=groups,
                 inner_group_num=inner, max_position_embeddings=16),
    )  # fmt: skip
    model = _awake(AlbertForMaskedLM(config))
    batch = tokens()
    if not masked:
        return _case(model, "albert.encoder.albert_layer_groups", batch)
    hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    hidden[:, 1::2] = True
    batch = {
        "input_ids": batch["input_ids"].masked_fill(hidden, 3),
        "labels": batch["input_ids"].masked_fill(~hidden, -100),
        "attention_mask": torch.ones_like(batch["input_ids"]),
    }
    return _case(model, "albert.encoder.albert_layer_groups", batch, loss=sdi.masked_lm_loss)


HUB["ALBERT, masked language model"] = albert
HUB["ALBERT, shifted labels"] = lambda: albert(masked=False)
HUB["ALBERT, two groups"] = lambda: albert(groups=2)
HUB["ALBERT, two layers a group"] = lambda: albert(inner=2)


def hrm_text(body: Any, **more: Any) -> Case:
    """HRM-Text: a low and a high stack in nested cycles, the first low ones without gradient."""
    from transformers import HrmTextConfig, HrmTextForCausalLM

    config = HrmTextConfig(
        **_shape(num_hidden_layers=1, head_dim=8, max_position_embeddings=16, **more)
    )
    return _case(_awake(HrmTextForCausalLM(config)), body)


HUB["HRM-Text, both stacks"] = lambda: hrm_text(["model.L_module", "model.H_module"])
HUB["HRM-Text, the low stack"] = lambda: hrm_text("model.L_module")
HUB["HRM-Text, the high stack"] = lambda: hrm_text("model.H_module")
HUB["HRM-Text, all cycles with gradient"] = lambda: hrm_text(
    ["model.L_module", "model.H_module"], L_bp_cycles=[3, 3]
)


def zamba2(blocks: int = 1, adapters: bool = False) -> Case:
    """Zamba2: one attention block shared by several places of a Mamba-2 stack."""
    from transformers import Zamba2Config, Zamba2ForCausalLM

    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid", "hybrid", "hybrid"]
    config = Zamba2Config(
        **_shape(num_hidden_layers=6, layers_block_type=kinds, num_mem_blocks=blocks,
                 mamba_d_state=4, mamba_d_conv=3, n_mamba_heads=4, mamba_headdim=8, chunk_size=4,
                 use_shared_attention_adapter=adapters, adapter_rank=2, max_position_embeddings=16),
    )  # fmt: skip
    model = _awake(Zamba2ForCausalLM(config))
    places = [f"model.layers.{i}.shared_transformer" for i in (1, 3, 4, 5)]
    return _case(model, places, steps=4 // blocks)


HUB["Zamba2, the shared block"] = zamba2
HUB["Zamba2, two shared blocks"] = lambda: zamba2(2)
HUB["Zamba2, adapters per use"] = lambda: zamba2(1, adapters=True)


class Rounds(nn.Module):
    """A decoder of transformers whose layers are called in several rounds, by hand."""

    def __init__(self, decoder: nn.Module, layers: str, rounds: int = 3) -> None:
        super().__init__()
        self.decoder, self.rounds = decoder, rounds
        self.layers = getattr(decoder, layers)
        self.head = nn.Linear(16, VOCABULARY, bias=False)

    def embedded(self, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(B, T, d), and what every layer is given."""
        places = torch.arange(ids.shape[1])[None]
        if hasattr(self.decoder, "wte"):
            return self.decoder.wte(ids) + self.decoder.wpe(places), {}
        x = self.decoder.embed_tokens(ids)
        return x, {"position_embeddings": self.decoder.rotary_emb(x, places)}

    def forward(self, input_ids: Tensor) -> Tensor:
        x, given = self.embedded(input_ids)
        for _ in range(self.rounds):
            for layer in self.layers:
                out = layer(x, **given)
                x = out[0] if isinstance(out, tuple) else out
        norm = self.decoder.ln_f if hasattr(self.decoder, "ln_f") else self.decoder.norm
        return self.head(norm(x))


def gpt2() -> Case:
    """GPT-2: Conv1D throughout."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        bos_token_id=1,
        eos_token_id=2,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        vocab_size=VOCABULARY,
    )
    # `layers` is a second name of `decoder.h`
    return _case(_awake(Rounds(GPT2Model(config), "h")), "layers", loss=lm, steps=3)


def nanochat() -> Case:
    """nanochat: norms without weights, squared ReLU."""
    from transformers import NanoChatConfig, NanoChatModel

    config = NanoChatConfig(**_shape(num_hidden_layers=2, max_position_embeddings=16))
    return _case(_awake(Rounds(NanoChatModel(config), "layers")), "decoder.layers", loss=lm)


HUB["GPT-2 looped by hand"] = gpt2
HUB["nanochat looped by hand"] = nanochat


def gpt2_tied(body: str, tied: bool) -> Case:
    """GPT-2 as it is, with its functionally shared head and embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        bos_token_id=1,
        eos_token_id=2,
        n_embd=16,
        n_layer=3,
        n_head=2,
        n_positions=16,
        vocab_size=VOCABULARY,
    )
    return _case(_awake(GPT2LMHeadModel(config)), body, tied=tied)


HUB["GPT-2 untied"] = lambda: gpt2_tied("transformer.h", False)


def llama(repeats: int = 1) -> Case:
    """Llama: an ordinary stack, or its layers repeated in the list of layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**_shape(num_hidden_layers=3, num_key_value_heads=1, head_dim=8))
    model = _awake(LlamaForCausalLM(config))
    model.model.layers = nn.ModuleList(list(model.model.layers) * repeats)
    model.config.num_hidden_layers = 3 * repeats
    return _case(model, "model.layers", tied=repeats > 1, steps=3)


HUB["Llama untied"] = llama
HUB["Llama, layers repeated in the list"] = lambda: llama(3)


def _experts(family: str, how: str) -> nn.Module:
    import transformers

    shape = _shape(num_hidden_layers=2, num_key_value_heads=2, num_experts_per_tok=2)
    if family == "Mixtral":
        shape |= {"num_local_experts": 4}
    elif family == "Olmoe":
        shape |= {"num_experts": 4}
    else:
        shape |= {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}
    config = getattr(transformers, f"{family}Config")(**shape)
    config._experts_implementation = how
    model = _awake(getattr(transformers, f"{family}ForCausalLM")(config))
    assert model.config._experts_implementation == how, model.config._experts_implementation
    return model


def experts_untied(family: str, how: str) -> Case:
    """A mixture of experts as an ordinary stack."""
    return _case(_experts(family, how), "model.layers", tied=False)


def experts_looped(family: str, how: str) -> Case:
    """Its layers looped by hand."""
    return _case(Rounds(_experts(family, how).model, "layers"), "decoder.layers", loss=lm)


for _family in ("Mixtral", "Qwen3Moe", "Olmoe"):
    for _how in ("eager", "batched_mm", "grouped_mm"):
        HUB[f"{_family} untied, {_how}"] = lambda f=_family, h=_how: experts_untied(f, h)
    HUB[f"{_family} looped by hand"] = lambda f=_family: experts_looped(f, "eager")
