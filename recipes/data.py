"""Records to training batches: chat template, labels on the answers only, left truncation, right padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from recipes.records import FORMATS, Record

IGNORED = -100


class Rendered(NamedTuple):
    """A record as one text; positions count characters."""

    text: str
    opening: int  # where the first user turn's content starts
    answers: list[tuple[int, int]]  # start and stop of every answer


def encode(record: Record, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[int]]:
    """Tokenise a record, with labels on the answers only (all assistant turns, end-of-turn token included).

    A sequence that is too long loses tokens from the left of what was said before its last answer; the template's own
    opening (system prompt, role header of the first user turn) and the last answer always stay whole.

    Args:
        record (`Mapping[str, Any]`):
            `{"prompt", "completion"}` or `{"messages"}`; other keys are ignored.
        tokenizer (`PreTrainedTokenizerBase`):
            A fast tokenizer. Its chat template is applied; without one a prompt/completion record becomes plain text
            with an end token.
        max_length (`int`):
            Most tokens of the result.

    Returns:
        `dict[str, list[int]]`: `input_ids` and `labels`, both of length n <= `max_length`; labels are -100 outside the
        answers.

    Raises:
        `ValueError`: if keys are missing, an answer is empty, the template cannot be split into turns, or the opening
        and the last answer do not fit into `max_length`.
    """
    rendered = _render(_messages(record), tokenizer)
    # one pass over the whole text: tokens that span two turns come out as they do when the model is used
    tokens = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids, ends = tokens["input_ids"], [end for _, end in tokens["offset_mapping"]]
    labels = [
        token if any(start < end <= stop for start, stop in rendered.answers) else IGNORED
        for token, end in zip(input_ids, ends, strict=True)
    ]
    opening = sum(end <= rendered.opening for end in ends)
    answer = sum(end > rendered.answers[-1][0] for end in ends)
    if opening + answer > max_length:
        raise ValueError(
            f"The last answer ({answer} tokens) and the template's opening ({opening}) do not fit into "
            f"max_length={max_length}. Raise it to {opening + answer} or more, or leave the record out: "
            f"{_shown(record)}"
        )
    dropped = slice(opening, opening + max(0, len(input_ids) - max_length))
    del input_ids[dropped], labels[dropped]
    return {"input_ids": input_ids, "labels": labels}


def prompt_ids(encoded: Mapping[str, list[int]]) -> list[int]:
    """The tokens before the last answer of an encoded record: what to generate from."""
    last_unlabelled = max(position for position, label in enumerate(encoded["labels"]) if label == IGNORED)
    return encoded["input_ids"][: last_unlabelled + 1]


def _messages(record: Record) -> list[dict[str, str]]:
    """The record's turns, checked: the last one is an answer and no answer is empty."""
    if "messages" in record:
        messages = record["messages"]
    elif "prompt" in record and "completion" in record:
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    else:
        raise ValueError(f"A record has the keys {sorted(record)}. Expected {FORMATS}.")
    if not messages or not all(isinstance(message.get("content"), str) and "role" in message for message in messages):
        raise ValueError(f"A record has a turn without a role or without text. Expected {FORMATS}: {_shown(record)}")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"The last turn must be the assistant's, got {messages[-1]['role']!r}: {_shown(record)}")
    if not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
        raise ValueError(f"There is nothing to learn from an empty answer. Leave this record out: {_shown(record)}")
    return messages


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if tokenizer.chat_template is None:
        return _render_plain(messages, tokenizer)
    text, answers = "", []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not (asked.startswith(text) and answered.startswith(asked)):
            raise ValueError(
                "The tokenizer's chat template renders a turn differently once another follows, so the answers cannot "
                f"be told apart. Split the conversation into records of one answer each: {_shown(messages)}"
            )
        # white space after the end-of-turn token belongs to the template, not to the answer
        text = answered.rstrip()
        answers.append((len(asked), len(text)))
    question = next((message["content"].strip() for message in messages if message["role"] == "user"), "")
    return Rendered(text, max(0, text.find(question)), answers)


def _render_plain(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise ValueError(
            "The tokenizer has no chat template, so it cannot format a conversation. Use an instruction-tuned model, "
            f'set `tokenizer.chat_template`, or give {{"prompt", "completion"}} records: {_shown(messages)}'
        )
    prompt, completion = (message["content"] for message in messages)
    opening = tokenizer.bos_token or ""
    asked = opening + prompt
    text = asked + completion + (tokenizer.eos_token or "")
    return Rendered(text, len(opening), [(len(asked), len(text))])


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


@dataclass
class PadCollator:
    """Stack encoded records into a batch, padded on the right to its longest one.

    Padding is told by length, never by token id: many tokenizers pad with their end token, which is also the last
    token to learn of every answer.

    Args:
        pad_token_id (`int`):
            Filler of `input_ids`.
    """

    pad_token_id: int

    def __call__(self, batch: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Returns int64 `input_ids`, `labels` (padding -100) and `attention_mask` (padding 0), each [batch, n]."""
        longest = max(len(encoded["input_ids"]) for encoded in batch)

        def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

        return {
            "input_ids": padded([encoded["input_ids"] for encoded in batch], self.pad_token_id),
            "labels": padded([encoded["labels"] for encoded in batch], IGNORED),
            "attention_mask": padded([[1] * len(encoded["input_ids"]) for encoded in batch], 0),
        }
