"""Output vectors of the nodes of a catalogue's trie, in place of those of codes only.

The output vector of node v behind level l is E_l[code(v)] plus the mean of the vectors of the items
below v, so that at a leaf an item is scored by its own vector. With a state g before the level and
the parent u of v, p(v | u) is the softmax of g . o_v over the children of u. No node has parameters
of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from onerec.model.trie_mask import TrieMask


def node_tables(trie: TrieMask, head: Callable[[int], Tensor], items: Tensor) -> list[Tensor]:
    """The output vectors of the nodes behind each level.

    Args:
        trie: Of the catalogue.
        head: Gives the output vectors [K, d] of a level's codes.
        items: [N, d], item vectors.

    Returns:
        For each level [nodes, d], in the order of `TrieMask.after`.
    """
    tables = []
    for level in range(trie.levels):
        codes, node = trie.after(level, items.device)
        size = torch.bincount(node, minlength=len(codes)).unsqueeze(1)
        total = items.new_zeros(len(codes), items.shape[1]).index_add(0, node, items)
        tables.append(head(level)[codes] + total / size)
    return tables


def node_log_probs(
    trie: TrieMask, states: Tensor, items: Tensor, level: int, table: Tensor
) -> Tensor:
    """log p of the codes that items have at a level, given their codes before it.

    Args:
        trie: Of the catalogue.
        states: [T, d], the decoder's before the level.
        items: int64 [T].
        level: 0..L-1.
        table: [nodes, d], from `node_tables`.

    Returns:
        [T], at least float32.
    """
    target = trie.after(level, states.device)[1][items].unsqueeze(1)
    if level == 0:
        logits = _wide(states @ table.T)
        return (logits.gather(1, target) - logits.logsumexp(dim=1, keepdim=True)).squeeze(1)
    child, real = trie.children(trie.before(items, level), level)
    logits = _wide(torch.bmm(F.embedding(child, table), states.unsqueeze(2)).squeeze(2))
    logits = logits.masked_fill(~real, float("-inf"))
    wanted = logits.gather(1, target - child[:, :1])
    return (wanted - logits.logsumexp(dim=1, keepdim=True)).squeeze(1)


def node_logits(trie: TrieMask, states: Tensor, node: Tensor, level: int, table: Tensor) -> Tensor:
    """Logits of every code of a level, -inf where a node has no such child.

    Args:
        trie: Of the catalogue.
        states: [..., d], the decoder's before the level.
        node: int64 [...], the node that each state stands at.
        level: 0..L-1.
        table: [nodes, d], from `node_tables`.

    Returns:
        [..., K], at least float32.
    """
    rows, codes = states.flatten(0, -2), trie.after(level, states.device)[0]
    child, real = trie.children(node.flatten(), level)
    if level == 0:
        logits = rows @ table.T
    else:
        logits = torch.bmm(F.embedding(child, table), rows.unsqueeze(2)).squeeze(2)
    logits = _wide(logits).masked_fill(~real, float("-inf"))
    # Padding repeats the first child, whose own logit is the greatest at that place.
    out = logits.new_full((len(rows), trie.codebook_size), float("-inf"))
    out = out.scatter_reduce(1, codes[child], logits, "amax")
    return out.view(*states.shape[:-1], -1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
