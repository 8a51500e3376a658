from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import UsageError
from curate.tokens import BOS, EOS, IGNORE, ByteTokenizer, Document, HFTokenizer, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair tokenizer with merges across the alphabet, saved as transformers saves one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["what is seven plus eight? fifteen it is"] * 5, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
    wrapped.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("tokenizer")
    wrapped.save_pretrained(directory)
    return directory


def target_ids(labels: object) -> list[int]:
    return [int(label) for label in labels if label != IGNORE]  # type: ignore[attr-defined]


@given(st.text())
def test_bytes_decode_what_they_encode(text: str) -> None:
    """Any text survives the byte tokenizer, between BOS and EOS."""
    (encoded,) = ByteTokenizer().encode([Document(text)])
    assert encoded.ids[0] == BOS
    assert encoded.ids[-1] == EOS
    assert ByteTokenizer().decode(encoded.ids.tolist()) == text


@given(st.text(), st.text(min_size=1))
def test_byte_targets_are_the_span_and_the_end(prompt: str, response: str) -> None:
    """With a masked prompt, exactly the response's bytes and EOS are targets, accents included."""
    span = (len(prompt), len(prompt) + len(response))
    (encoded,) = ByteTokenizer().encode([Document(prompt + response, (span,))])
    assert target_ids(encoded.labels) == [*response.encode(), EOS]


def test_byte_chat_masks_all_but_the_assistant() -> None:
    """In a conversation only the assistant's words, line end and EOS are targets."""
    turns = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "jo"}]
    tokenizer = ByteTokenizer()
    (encoded,) = tokenizer.encode([tokenizer.chat(turns, True)])
    assert tokenizer.decode(encoded.ids.tolist()) == "user: hé\nassistant: jo\n"
    assert target_ids(encoded.labels) == [*b"jo\n", EOS]


def test_hf_targets_are_the_tokens_that_hold_the_span(hf_directory: Path) -> None:
    """A Hugging Face tokenizer sees the whole text, and its masked targets decode to the answer."""
    tokenizer = load_tokenizer(f"hf:{hf_directory}")
    prompt, answer = "what is seven plus eight?\n", "fifteen ☃"
    document = Document(prompt + answer, ((len(prompt), len(prompt + answer)),))
    (masked,) = tokenizer.encode([document])
    (plain,) = tokenizer.encode([Document(prompt + answer)])
    assert masked.ids.tolist() == plain.ids.tolist()
    assert masked.ids[-1] == masked.labels[-1] == 1
    assert tokenizer.decode(target_ids(masked.labels)) == answer
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (len(set(range(tokenizer.vocab_size))), 0)


def test_hf_chat_template_masks_all_but_the_assistant(hf_directory: Path) -> None:
    """The chat template writes the text; what it writes for the assistant's turns is the target."""
    tokenizer = HFTokenizer(str(hf_directory))
    turns = [
        {"role": role, "content": text}
        for role, text in [("user", "a"), ("assistant", "is"), ("user", "b"), ("assistant", "it")]
    ]
    (encoded,) = tokenizer.encode([tokenizer.chat(turns, True)])
    assert tokenizer.decode(encoded.ids.tolist()) == (
        "<user>a\n<assistant>is\n<user>b\n<assistant>it\n"
    )
    assert tokenizer.decode(target_ids(encoded.labels)) == "is\nit\n"


def test_a_template_that_rewrites_earlier_turns_is_refused(hf_directory: Path) -> None:
    """Where turns cannot be told apart in the text, masking is refused with the remedy."""
    tokenizer = HFTokenizer(str(hf_directory))
    tokenizer._inner.chat_template = "{{ messages | length }}:{% for m in messages %}x{% endfor %}"
    with pytest.raises(UsageError, match="leave mask_prompt out"):
        tokenizer.chat(
            [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], True
        )


@pytest.mark.parametrize("name", ["byte", "hf:", None])
def test_an_unknown_tokenizer_names_the_known_ones(name: str | None) -> None:
    """A misspelt tokenizer says which there are."""
    with pytest.raises(UsageError, match="expected 'bytes' or 'hf:DIR'"):
        load_tokenizer(name)


def test_a_directory_without_a_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    """A directory that holds no tokenizer is refused by name, without a traceback of loaders."""
    with pytest.raises(UsageError, match="no tokenizer could be loaded from") as caught:
        load_tokenizer(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)
