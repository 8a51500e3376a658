"""Losses per example: what they compute, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sdi.errors import LossError
from sdi.losses import causal_lm_loss, check_losses, masked_lm_loss


class Tiny(nn.Module):
    """Embedding and head; ``style`` says how the logits are returned."""

    def __init__(self, style: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)
        self.style = style

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = self.head(self.embed(input_ids))
        shapes = {
            "tensor": logits,
            "tuple": (logits, None),
            "object": SimpleNamespace(logits=logits),
            "mapping": {"logits": logits},
            "flat": logits.mean(1),
        }
        assert attention_mask is None or attention_mask.shape == input_ids.shape
        return shapes[self.style]


class NoMask(nn.Module):
    """A plain torch model: its first argument has a name of its own, and it takes no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny()

    def forward(self, idx: Tensor) -> Any:
        return self.inner(idx)


def make_batch(lengths: tuple[int, ...] = (5, 3), width: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    labels = torch.where(mask, ids, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def by_hand(model: nn.Module, batch: dict[str, Tensor], shift: int) -> list[list[float]]:
    """Return each row's list of token losses, from the definition and one token at a time."""
    logs = model(batch["input_ids"]).detach().double().log_softmax(-1)
    rows = []
    for row, labels in enumerate(batch["labels"].tolist()):
        rows.append(
            [
                -float(logs[row, t - shift, label])
                for t, label in enumerate(labels)
                if t >= shift and label != -100
            ]
        )
    return rows


@pytest.mark.parametrize(("loss", "shift"), [(causal_lm_loss, 1), (masked_lm_loss, 0)])
def test_losses_follow_their_definition(loss: Any, shift: int) -> None:
    """The loss shifts once (or not at all) and averages over the row's own targets."""
    model, batch = Tiny(), make_batch()
    rows = by_hand(model, batch, shift)
    mean = torch.tensor([sum(r) / len(r) for r in rows])
    total = torch.tensor([sum(r) for r in rows])
    torch.testing.assert_close(loss(model, batch), mean)
    torch.testing.assert_close(loss(model, batch, reduce="sum"), total)


def test_padding_and_neighbours_change_nothing() -> None:
    """A row alone and unpadded has the loss it has in a padded batch."""
    model, batch = Tiny(), make_batch((5, 3), width=8)
    alone = {name: value[1:, :3] for name, value in batch.items()}
    torch.testing.assert_close(causal_lm_loss(model, alone)[0], causal_lm_loss(model, batch)[1])


@pytest.mark.parametrize("style", ["tuple", "object", "mapping"])
def test_logits_are_found_in_every_usual_output(style: str) -> None:
    """Tensor, tuple, object and mapping outputs give the same losses."""
    batch = make_batch()
    torch.testing.assert_close(causal_lm_loss(Tiny(style), batch), causal_lm_loss(Tiny(), batch))


def test_only_what_the_forward_takes_is_passed() -> None:
    """Extra batch entries and an own name for the first argument are no obstacle."""
    batch = make_batch() | {"row": torch.arange(2)}
    expected = causal_lm_loss(Tiny(), make_batch())
    torch.testing.assert_close(causal_lm_loss(Tiny(), batch), expected)
    torch.testing.assert_close(causal_lm_loss(NoMask(), batch), expected)


def test_wrapped_models_are_seen_through() -> None:
    """A data-parallel wrapper's (*args, **kwargs) forward gets what the inner model takes."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any, **kwargs: Any) -> Any:
            return self.module(*inputs, **kwargs)

    batch = make_batch() | {"row": torch.arange(2)}
    for model in (Tiny(), NoMask()):
        expected = causal_lm_loss(model, batch)
        torch.testing.assert_close(causal_lm_loss(Wrapper(model), batch), expected)


def test_padding_a_model_cannot_see_is_refused() -> None:
    """Left padding, or any padding for a masked loss, is refused where no mask is taken."""
    left = {name: value.flip(1) for name, value in make_batch().items()}
    with pytest.raises(LossError, match=r"padded on the left.*pad on the right"):
        causal_lm_loss(NoMask(), left)
    with pytest.raises(LossError, match="takes no attention_mask"):
        masked_lm_loss(NoMask(), make_batch())


class Adapted(nn.Module):
    """As peft wraps a model: a forward of its own, which hands on what it does not name."""

    active_peft_config = SimpleNamespace(is_prompt_learning=False)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def get_base_model(self) -> nn.Module:
        """The model within."""
        return self.base_model["model"]

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        """As the model within."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.get_base_model()(**given, **others)


@pytest.mark.parametrize("wrap", [lambda model: model, Adapted], ids=["plain", "peft"])
def test_padding_on_the_left_is_refused_where_it_would_tell(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    """A target predicted from padding, and positions counted from it; with neither it is right."""

    class Placed(nn.Module):
        """Logits of each token's position and of those before it that are the row's own."""

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
        ) -> Tensor:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
            seen = (functional.one_hot(input_ids, 12) * attention_mask[..., None]).cumsum(dim=1)
            return seen.float() + torch.sin(position_ids[..., None] * torch.arange(12.0))

    right = make_batch()
    pads = (right["attention_mask"] == 0).sum(dim=1).tolist()
    left = {
        name: torch.stack([row.roll(pad) for row, pad in zip(value, pads, strict=True)])
        for name, value in right.items()
    }
    own = left["attention_mask"]
    expected = causal_lm_loss(wrap(Placed()), right)
    with pytest.raises(LossError, match=r"row \d of the batch .* predicted from padding"):
        causal_lm_loss(wrap(Placed()), left)
    left["labels"][(own.cumsum(dim=1) == 1) & (own == 1)] = -100  # the first token
    with pytest.raises(LossError, match=r"row \d of the batch .* has no position_ids"):
        causal_lm_loss(wrap(Placed()), left)
    with pytest.raises(LossError, match="has no position_ids"):
        masked_lm_loss(wrap(Placed()), left)
    left["position_ids"] = (own.cumsum(dim=1) - 1).clamp_min(0)
    torch.testing.assert_close(causal_lm_loss(wrap(Placed()), left), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_positions_reach_a_model_within_peft() -> None:
    """Peft's own wrapper does not name position_ids; they count all the same."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 12, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(model, lora).eval()
    ids = torch.arange(1, 6)[None]
    right = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    right["labels"][:, 0] = -100
    pads = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    left = {name: functional.pad(value, (2, 0), value=pads[name]) for name, value in right.items()}
    with pytest.raises(LossError, match="has no position_ids"):
        causal_lm_loss(wrapped, left)
    left["position_ids"] = (left["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    torch.testing.assert_close(causal_lm_loss(wrapped, left), causal_lm_loss(wrapped, right))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_row_without_targets_is_named(reduce: Any) -> None:
    """A row whose labels are all -100 is refused by id; it does not pass as a loss of zero."""
    batch = make_batch()
    batch["labels"][1] = -100
    losses = causal_lm_loss(Tiny(), batch, reduce=reduce)
    assert torch.isfinite(losses[0])
    with pytest.raises(LossError, match=r"not finite for b \(nan\).*all -100") as caught:
        check_losses(losses, ["a", "b"])
    assert caught.value.ids == ("b",)


def test_missing_labels_and_strange_logits_are_refused() -> None:
    """The message says what the batch holds, or what the model returned."""
    batch = make_batch()
    with pytest.raises(LossError, match=r"no 'labels'"):
        causal_lm_loss(Tiny(), {"input_ids": batch["input_ids"]})
    with pytest.raises(LossError, match=r"returned \(2, 11\) where labels are \(2, 5\)"):
        causal_lm_loss(Tiny("flat"), batch)
    with pytest.raises(LossError, match="'median'; expected 'mean' or 'sum'"):
        causal_lm_loss(Tiny(), batch, reduce="median")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        (torch.tensor(1.0), r"a scalar for 2 examples; expected shape \(2,\)"),
        (torch.ones(2, 3), r"shape \(2, 3\) for 2 examples"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(2, dtype=torch.int64), "int64; expected a floating"),
        (0.5, "returned a float"),
        (torch.tensor([1.0, torch.inf]), r"not finite for b \(inf\)"),
    ],
)
def test_wrong_losses_are_refused(losses: object, text: str) -> None:
    """Scalars, wrong shapes, integers, plain numbers and infinities are each refused."""
    with pytest.raises(LossError, match=text):
        check_losses(losses, ["a", "b"])


def test_good_losses_come_back_with_their_graph() -> None:
    """A (B,) floating finite tensor passes through, gradients attached."""
    losses = causal_lm_loss(Tiny(), make_batch())
    assert check_losses(losses, ["a", "b"]) is losses
    assert losses.requires_grad


def test_half_precision_logits_are_reduced_in_float32() -> None:
    """A bf16 model gives float32 losses."""
    losses = causal_lm_loss(Tiny().bfloat16(), make_batch())
    assert losses.dtype == torch.float32
