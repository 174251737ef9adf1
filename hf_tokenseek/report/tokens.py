"""The token map: a watched sequence's tokens with their scores, for the page."""

from typing import NamedTuple

from .record import RunRecord
from .statistics import DITCHED, EVIDENCE, LOSS, chosen, overlaps, visits_of

KIND_NAMES = {DITCHED: "ditched", EVIDENCE: "evidence", LOSS: "loss"}
LEVELS = 10
# longer sequences show the surroundings of what was selected
MOST_SHOWN, MARGIN = 2048, 12


class Token(NamedTuple):
    """
    One token of the map.

    Args:
        place (`int`): from 0.
        text (`str`): readable also where it is a line break or nothing.
        kind (`str`): one of `KIND_NAMES`.
        level (`int`, *optional*): tenth of the sequence's scores that its score is in, 9 the largest.
    """

    place: int
    text: str
    kind: str
    level: int | None


class Gap(NamedTuple):
    """So many ditched tokens that are not shown."""

    count: int


class TokenMap(NamedTuple):
    """
    The latest visit of one watched sequence.

    Args:
        number (`int`): from 1.
        summary (`str`): sizes of the selection, and what stayed since the visit before.
        parts (`list[Token | Gap]`): in the order of the text.
        details (`dict`): lists for the readout, token by token: `names` of the columns, `columns`, `ranks`, `kinds`,
            `selected` (in how many of the `visits`).
    """

    number: int
    summary: str
    parts: list[Token | Gap]
    details: dict


def token_maps(run: RunRecord) -> list[TokenMap]:
    """A map for each watched sequence that was visited."""
    return [_token_map(run, sample) for sample in sorted(run.samples) if visits_of(run, sample)]


def _token_map(run: RunRecord, sample: int) -> TokenMap:
    visits = visits_of(run, sample)
    last, texts = visits[-1], run.samples[sample]["texts"]
    ranks = None if last["scores"] is None else ranks_of(last["scores"])
    tokens = [
        Token(place, visible(text), KIND_NAMES[kind], None if ranks is None else level_of(ranks[place], len(ranks)))
        for place, (text, kind) in enumerate(zip(texts, last["kinds"], strict=True))
    ]
    selected = [chosen(visit, EVIDENCE + LOSS) for visit in visits]
    details = {
        "names": [] if ranks is None else ["score", *last["terms"]],
        "columns": [] if ranks is None else [last["scores"], *last["terms"].values()],
        "ranks": ranks,
        "kinds": [token.kind for token in tokens],
        "selected": [sum(place in places for places in selected) for place in range(len(tokens))],
        "visits": len(visits),
    }
    return TokenMap(sample + 1, _summary(run, sample, visits), folded(tokens), details)


def ranks_of(scores: list[float | None]) -> list[int]:
    """1 for the largest score; among equals the earlier token comes first, one without a score last."""
    order = sorted(range(len(scores)), key=lambda place: (scores[place] is None, -(scores[place] or 0.0), place))
    ranks = [0] * len(scores)
    for rank, place in enumerate(order, start=1):
        ranks[place] = rank
    return ranks


def level_of(rank: int, count: int) -> int:
    """Which tenth of the scores: attention sinks are so large that colours by value would show nothing else."""
    return LEVELS - 1 - (rank - 1) * LEVELS // count


def visible(text: str) -> str:
    """A token's text where line breaks, tabs and nothing can be seen, too."""
    return text.replace("\r", "␍").replace("\t", "→\t").replace("\n", "↵\n") or "∅"


def folded(tokens: list[Token], most: int = MOST_SHOWN, margin: int = MARGIN) -> list[Token | Gap]:
    """All tokens of a short sequence; of a long one those that stand within `margin` of a selected one."""
    if len(tokens) <= most:
        return list(tokens)
    near = {
        place
        for token in tokens
        if token.kind != KIND_NAMES[DITCHED]
        for place in range(token.place - margin, token.place + margin + 1)
    }
    parts: list[Token | Gap] = []
    for token in tokens:
        if token.place in near:
            parts.append(token)
        elif parts and isinstance(parts[-1], Gap):
            parts[-1] = Gap(parts[-1].count + 1)
        else:
            parts.append(Gap(1))
    return parts


def _summary(run: RunRecord, sample: int, visits: list[dict]) -> str:
    last = visits[-1]
    count = len(last["kinds"])
    place = f"visit {len(visits)}, optimizer step {last['step']}"
    if last["scores"] is None:
        return f"{count} tokens; {place}: trained plainly, without a selection."
    loss, evidence = (len(chosen(last, kind)) for kind in (LOSS, EVIDENCE))
    said = (
        f"{count} tokens, of which {loss} loss rows and {evidence} evidence "
        f"({(loss + evidence) / max(1, count):.0%} selected); {place}."
    )
    if found := overlaps(run, sample):
        said += f" Overlap of the evidence with the visit before {found[-1].found:.2f}"
        said += f" (by chance {found[-1].by_chance:.2f})."
    return said
