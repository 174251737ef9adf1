import pytest
import torch

from recipes.data import IGNORED, PadCollator, encode, prompt_ids

PROMPT_COMPLETION = {"prompt": "Which animal jumps?", "completion": "The quick brown fox."}
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Who jumps?"},
        {"role": "assistant", "content": "The fox."},
        {"role": "user", "content": "Over whom?"},
        {"role": "assistant", "content": "The dog."},
    ]
}


def labelled_text(encoded, tokenizer):
    return tokenizer.decode([label for label in encoded["labels"] if label != IGNORED])


def test_only_the_answer_and_its_end_are_labelled(tokenizer):
    encoded = encode(PROMPT_COMPLETION, tokenizer, max_length=512)
    assert tokenizer.decode(encoded["input_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich animal jumps?<|im_end|>\n"
        "<|im_start|>assistant\nThe quick brown fox.<|im_end|>"
    )
    assert labelled_text(encoded, tokenizer) == "The quick brown fox.<|im_end|>"
    for token, label in zip(encoded["input_ids"], encoded["labels"], strict=True):
        assert label in (IGNORED, token)


def test_every_assistant_turn_is_labelled(tokenizer):
    encoded = encode(CONVERSATION, tokenizer, max_length=512)
    assert labelled_text(encoded, tokenizer) == "The fox.<|im_end|>The dog.<|im_end|>"


def test_prompt_completion_equals_its_conversation(tokenizer):
    conversation = {
        "messages": [
            {"role": "user", "content": PROMPT_COMPLETION["prompt"]},
            {"role": "assistant", "content": PROMPT_COMPLETION["completion"]},
        ]
    }
    assert encode(PROMPT_COMPLETION, tokenizer, 512) == encode(conversation, tokenizer, 512)


def test_text_beyond_ascii_is_labelled_whole(tokenizer):
    record = {"prompt": "Wie heißt 狐?", "completion": "Füchschen 🦊 é"}
    assert labelled_text(encode(record, tokenizer, 512), tokenizer) == "Füchschen 🦊 é<|im_end|>"


def test_truncation_takes_the_left_of_the_prompt_and_keeps_opening_and_answer(tokenizer):
    record = {"prompt": "0123456789" * 20, "completion": "The quick brown fox."}
    whole = encode(record, tokenizer, max_length=10_000)
    opening = len(tokenizer("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")["input_ids"])
    max_length = len(whole["input_ids"]) - 55
    encoded = encode(record, tokenizer, max_length)
    assert len(encoded["input_ids"]) == max_length
    assert encoded["input_ids"] == whole["input_ids"][:opening] + whole["input_ids"][opening + 55 :]
    assert labelled_text(encoded, tokenizer) == "The quick brown fox.<|im_end|>"


def test_a_sequence_that_just_fits_is_not_truncated(tokenizer):
    whole = encode(PROMPT_COMPLETION, tokenizer, max_length=10_000)
    assert encode(PROMPT_COMPLETION, tokenizer, len(whole["input_ids"])) == whole


def test_prompt_ids_are_what_the_template_gives_for_generation(tokenizer):
    for record in (PROMPT_COMPLETION, CONVERSATION):
        asked = record["messages"][:-1] if record is CONVERSATION else [{"role": "user", "content": record["prompt"]}]
        expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(prompt_ids(encode(record, tokenizer, 512))) == expected


def test_without_a_chat_template_the_record_is_plain_text(tokenizer):
    tokenizer.chat_template = None
    encoded = encode({"prompt": "the dog", "completion": " jumps"}, tokenizer, 64)
    assert tokenizer.decode(encoded["input_ids"]) == "the dog jumps<|im_end|>"
    assert labelled_text(encoded, tokenizer) == " jumps<|im_end|>"
    with pytest.raises(ValueError, match="no chat template"):
        encode(CONVERSATION, tokenizer, 64)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="renders a turn differently"):
        encode(CONVERSATION, tokenizer, 512)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, r"keys \['prompt'\]\. Expected"),
        ({"text": "a"}, r"keys \['text'\]\. Expected"),
        ({"prompt": "a", "completion": None}, "without text"),
        ({"prompt": "a", "completion": " \n"}, "empty answer"),
        ({"messages": []}, "without a role or without text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "last turn must be the assistant's, got 'user'"),
        ({"messages": [{"content": "a"}]}, "without a role"),
    ],
)
def test_bad_records_are_refused(tokenizer, record, message):
    with pytest.raises(ValueError, match=message):
        encode(record, tokenizer, 512)


def test_an_answer_that_does_not_fit_is_refused_with_the_length_it_needs(tokenizer):
    record = {"prompt": "x" * 50, "completion": "0123456789" * 3}
    with pytest.raises(ValueError, match="do not fit into max_length=20") as error:
        encode(record, tokenizer, max_length=20)
    needed = int(str(error.value).partition("Raise it to ")[2].split()[0])
    assert len(encode(record, tokenizer, needed)["input_ids"]) == needed
    with pytest.raises(ValueError, match="do not fit"):
        encode(record, tokenizer, needed - 1)


def test_padding_follows_length_and_spares_end_tokens(tokenizer):
    short, long = encode(PROMPT_COMPLETION, tokenizer, 512), encode(CONVERSATION, tokenizer, 512)
    batch = PadCollator(tokenizer.pad_token_id)([short, long])
    n, longest = len(short["input_ids"]), len(long["input_ids"])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (2, longest)
    )
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert batch["input_ids"][0].tolist() == short["input_ids"] + [tokenizer.pad_token_id] * (longest - n)
    assert batch["labels"][0].tolist() == short["labels"] + [IGNORED] * (longest - n)
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (longest - n), [1] * longest]
    # the end token, which is also the padding, stays a label where it ends an answer
    assert batch["labels"][0, n - 1] == tokenizer.eos_token_id == tokenizer.pad_token_id
