"""How rotary position embeddings may tie the channels of a head, as candidates for scales of q against k."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

LARGEST_HEAD = 512
SMALLEST_HEAD = 4


def head_sizes(block: nn.Module, width: int) -> list[int]:
    """Likely sizes of an attention head: what the block's modules call a head's size, then the divisors of
    ``width``."""
    said = [
        value
        for module in block.modules()
        for key, value in vars(module).items()
        if "head" in key and isinstance(value, int) and not isinstance(value, bool)
    ]
    known = [size for size in dict.fromkeys(said) if SMALLEST_HEAD <= size <= width and width % size == 0]
    limit = min(width, LARGEST_HEAD)
    divisors = [size for size in range(limit, SMALLEST_HEAD - 1, -1) if width % size == 0 and size % 2 == 0]
    return list(dict.fromkeys(known + divisors))


def key_query_ties(queries: int, keys: int, sizes: list[int], norm: bool) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Candidate index maps (entries of q's channels, entries of k's channels, number of entries), freest first.

    Key heads are repeated over the query heads that they serve. Within a head channels are free, or tied as rotary
    embeddings pair them: first with second half, or neighbours, over the whole head or its first half or quarter.
    norm: the channels are those of a norm applied to each head, whose whole vector is one head.
    """
    if queries % keys:
        return
    seen = set()
    for head in sizes:
        shared = queries // keys
        for entries in _within(head):
            size = int(entries.max()) + 1
            heads = torch.arange(keys // head)[:, None] * size
            key_entries = (heads + entries).reshape(-1)
            query_entries = (heads + entries).repeat_interleave(shared, 0).reshape(-1)
            mark = (tuple(query_entries.tolist()), tuple(key_entries.tolist()))
            if mark not in seen:
                seen.add(mark)
                yield query_entries, key_entries, int(key_entries.max()) + 1


def _within(head: int) -> Iterator[Tensor]:
    """Entry of each channel of one head, consecutive from 0."""
    channels = torch.arange(head)
    yield channels
    for turned in (head, head // 2, head // 4, 3 * head // 4):
        if turned < 2 or turned % 2:
            continue
        halves, neighbours = channels.clone(), channels.clone()
        halves[turned // 2 : turned] = channels[: turned // 2]
        neighbours[1:turned:2] = channels[0:turned:2]
        for tied in (halves, neighbours):
            yield tied.unique(return_inverse=True)[1]
