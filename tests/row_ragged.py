"""Sequences, bags, lists of images, episodes and users, as they are written with torch alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
)

import backpack as bp
from tests.row_cases import (
    BAG,
    FURTHER,
    IDS,
    IMAGES,
    INSTANCES,
    LENGTHS,
    SAME,
    SENTENCE,
    SEQUENCES,
    TOKENS,
    USERS,
    RowCase,
    bags,
    data,
    mlp,
)
from tests.row_graphs import add, softmax

# --------------------------------------------------------------------------------------
# Sequences

PADDED = pad_sequence(list(TOKENS.split(LENGTHS)), batch_first=True)
LONG = torch.tensor(LENGTHS)
HERE = torch.arange(3) < LONG[:, None]  # [sentences, places]


def packed(x: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, LONG, batch_first=True, enforce_sorted=False)


class Attended(nn.Module):
    """Ids, two directions and layers, attention over the words that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3, padding_idx=0)
        self.rnn = nn.LSTM(3, 2, 2, batch_first=True, bidirectional=True)
        self.score, self.head = nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        h = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        h, length = pad_packed_sequence(self.rnn(h)[0], batch_first=True)
        there = torch.arange(h.shape[1])[None] < length[:, None]
        weight = self.score(h.tanh()).squeeze(-1).masked_fill(~there, -torch.inf).softmax(1)
        return self.head(torch.bmm(weight.unsqueeze(1), h).squeeze(1))


class Stacked(nn.Module):
    """Two recurrent layers, a norm and a residual connection of packed rows between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.GRU(3, 2, bidirectional=True), nn.LayerNorm(4)
        self.skip, self.second = nn.Linear(3, 4), nn.GRU(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: PackedSequence) -> Tensor:
        rows = self.norm(self.first(x)[0].data) + self.skip(x.data)
        last = self.second(x._replace(data=rows))[1]
        return self.head(last.squeeze(0))


class LearnedStart(nn.Module):
    """States before the first step are parameters; the sum of both last states."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 2, batch_first=True), nn.Linear(2, 2)
        self.h0, self.c0 = nn.Parameter(torch.randn(1, 1, 2)), nn.Parameter(torch.randn(1, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        start = self.h0.expand(-1, len(x), -1).contiguous(), self.c0.repeat(1, len(x), 1)
        _, (h, c) = self.rnn(packed(x), start)
        return self.head(h[-1] + c[-1])


class TwoResults(nn.Module):
    """Of one call of a recurrent layer all states and the last ones are read."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 2, batch_first=True), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, last = self.rnn(x)
        last = last[0] + last[1] if isinstance(last, tuple) else last
        return self.head(h.tanh().sum(1) + last[-1])


class Translator(nn.Module):
    """An encoder of packed words; a decoder in a loop, which is told the words."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell = nn.GRU(3, 3, batch_first=True), nn.GRUCell(2, 3)
        self.words, self.head = nn.Embedding(4, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        memory, state = self.encoder(packed(x))
        memory, _ = pad_packed_sequence(memory, batch_first=True)
        h, made = state[0], []
        for t in range(target.shape[1]):
            h = self.cell(self.words(target[:, t]), h)
            score = (memory @ h[:, :, None])[..., 0].masked_fill(~HERE, -1e9).softmax(-1)
            made.append(self.head(h + torch.einsum("nt,ntd->nd", score, memory)))
        return torch.stack(made, 1)


class Convolved(nn.Module):
    """Convolutions over padded words, gated; the mean and largest of those that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = F.glu(self.conv(x.mT), 1) * mask[:, None]
        mean = h.sum(-1) / mask.sum(-1, keepdim=True)
        most = h.masked_fill(~mask[:, None], -1e9).amax(-1)
        return self.head(torch.cat([mean, most], -1))


class EachSentence(nn.Module):
    """A recurrent layer for each sentence of a list, without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 2), nn.Linear(2, 2)

    def forward(self, sentences: list[Tensor]) -> Tensor:
        return torch.stack([self.head(self.rnn(each)[0][-1]) for each in sentences])


class Hierarchy(nn.Module):
    """Words of sentences, and sentences of documents, both packed."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.sentences = nn.GRU(3, 2, batch_first=True), nn.GRU(2, 2, batch_first=True)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor, lengths: Tensor, document: Tensor) -> Tensor:
        h = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h = self.words(h)[1][0]
        counts = torch.bincount(document)
        h = pad_sequence(list(h.split(counts.tolist())), batch_first=True)
        h = pack_padded_sequence(h, counts, batch_first=True, enforce_sorted=False)
        return self.head(self.sentences(h)[1][0])


DOCUMENT = torch.tensor([0, 0, 1])

# --------------------------------------------------------------------------------------
# Bags


class GatedAttention(nn.Module):
    """Attention of multiple-instance learning, with a gate, in a batch of bags."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.V, self.U, self.w = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, bag: Tensor) -> Tensor:
        h = self.embed(x)
        score = self.w(self.V(h).tanh() * self.U(h).sigmoid())
        return self.head(add(softmax(score, bag, 3) * h, bag, 3))


class GatedEach(GatedAttention):
    """The same for one bag after the other."""

    def forward(self, bags: list[Tensor]) -> Tensor:
        out = []
        for bag in bags:
            h = self.embed(bag)
            weight = torch.softmax(self.w(self.V(h).tanh() * self.U(h).sigmoid()).T, 1)
            out.append(self.head(weight @ h))
        return torch.cat(out)


class Critical(nn.Module):
    """The instance that scores highest, and what all others make of their likeness to it."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.q, self.v = nn.Linear(3, 1), nn.Linear(3, 2), nn.Linear(3, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, bags: tuple[Tensor, ...]) -> Tensor:
        out = []
        for bag in bags:
            scores, q = self.score(bag), self.q(bag)
            best = q[scores[:, 0].argmax()]
            weight = (q @ best / 2**0.5).softmax(0)
            out.append(self.head(weight @ self.v(bag)) + scores.amax())
        return torch.stack(out)


class PaddedSets(nn.Module):
    """Sets padded with zeros; induced points attend to them, as transformers of sets do."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(1, 2, 4))
        self.embed, self.mix = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h, points = self.embed(x), self.points.repeat(len(x), 1, 1)
        h = self.norm(points + self.mix(points, h, h, key_padding_mask=~mask)[0])
        return self.head(h.mean(1))


PADDED_BAGS = pad_sequence(bags(), batch_first=True)
IN_BAG = torch.arange(3) < torch.tensor([1, 3, 2])[:, None]

# --------------------------------------------------------------------------------------
# Images


class Boxes(nn.Module):
    """A prediction for each box: cut out of its image's features, of a list of images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.head = nn.Linear(16, 2)

    def forward(self, images: list[Tensor], boxes: list[list[tuple[int, int]]]) -> Tensor:
        found = []
        for image, corners in zip(images, boxes, strict=True):
            h = self.norm(self.conv(image[None])).tanh()
            for top, left in corners:
                found.append(h[..., top : top + 2, left : left + 2].flatten(1))
        return self.head(torch.cat(found))


BOXES = [[(0, 0), (1, 1)], [(2, 1)], [(0, 0), (0, 1), (1, 1)]]


class Pyramid(nn.Module):
    """Pooling to several sizes, so that images may have any; strides and an upsampled branch."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.same = nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(2, 3, 1)
        self.head = nn.Linear(3 * 5, 2)

    def forward(self, images: list[Tensor]) -> Tensor:
        out = []
        for image in images:
            x = image.unsqueeze(0)
            low = F.interpolate(self.down(x).tanh(), size=x.shape[2:], mode="bilinear")
            h = low + self.same(x)
            pooled = [F.adaptive_avg_pool2d(h, size).flatten(1) for size in (1, 2)]
            out.append(self.head(torch.cat(pooled, 1)))
        return torch.cat(out, 0)


class PaddedImages(nn.Module):
    """Images copied into one batch of the largest size; a mask says what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, images: list[Tensor]) -> Tensor:
        size = [max(each.shape[d] for each in images) for d in (1, 2)]
        batch = images[0].new_zeros(len(images), 2, *size)
        mask = torch.zeros(len(images), 1, *size, dtype=torch.bool)
        for n, image in enumerate(images):
            batch[n, :, : image.shape[1], : image.shape[2]].copy_(image)
            mask[n, :, : image.shape[1], : image.shape[2]] = True
        h = self.conv(batch).tanh() * mask
        return self.head(h.sum((2, 3)) / mask.sum((2, 3)))


# --------------------------------------------------------------------------------------
# Episodes and users


class Recurrent(nn.Module):
    """A policy with a state, one step in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        return self.head(h), h


def steps_together(model: nn.Module) -> Tensor:
    """All episodes take a step in each call, which hands its state to the next."""
    h, made = None, []
    for t in range(3):
        logits, h = model(PADDED[:, t], h)
        made.append(logits)
    return torch.cat(made)


def whole_episodes(model: nn.Module) -> Tensor:
    """A call for each episode, with all its steps as rows, which are one sample's."""
    return torch.cat([model(bp.mark(part.clone(), 0)) for part in TOKENS.split(LENGTHS)])


def steps_marked(model: nn.Module) -> Tensor:
    """All steps of all episodes in one call."""
    return model(bp.mark(TOKENS.clone(), SENTENCE))


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh())
        self.actor, self.critic = nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        logits, value = self.actor(h), self.critic(h)
        return logits.log_softmax(-1) * (1 + value.tanh())


class UserImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 2), nn.InstanceNorm2d(2, affine=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).tanh().flatten(1))


class UserSequences(nn.Module):
    """Sequences of users, and a row of a table for each user."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.rnn = nn.Embedding(3, 2), nn.LSTM(3, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, user: Tensor) -> Tensor:
        return self.head(torch.cat([self.rnn(x)[0][:, -1], self.users(user)], 1))


class Windows(nn.Module):
    """Each token is predicted from those in a window before it; tokens are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(6, 2)

    def forward(self, windows: Tensor) -> Tensor:
        return self.head(self.embed(windows).flatten(1).tanh())


USER_IMAGES, USER_SEQUENCES = data(6, 1, 3, 3, seed=22), data(6, 2, 3, seed=23)
THREE = [0, 1, 2]
ORDERED = pack_sequence(list(TOKENS.split(LENGTHS)), enforce_sorted=False)
PADDED_IDS = pad_sequence(list(IDS.split(LENGTHS)), batch_first=True)

RAGGED_CASES: dict[str, RowCase] = {
    "packed, attended": RowCase(Attended, lambda m: m(PADDED_IDS, LONG), THREE, 3),
    "packed, stacked": RowCase(Stacked, lambda m: m(ORDERED), THREE, 3),
    "packed, learned start": RowCase(LearnedStart, lambda m: m(PADDED), THREE, 3),
    "two results, LSTM": RowCase(lambda: TwoResults(nn.LSTM), lambda m: m(SEQUENCES), [0, 1], 2),
    "two results, GRU": RowCase(lambda: TwoResults(nn.GRU), lambda m: m(SEQUENCES), [0, 1], 2),
    "packed, translator": RowCase(
        *(Translator, lambda m: m(PADDED, torch.tensor([[1, 2], [0, 3], [2, 2]])).flatten(0, 1)),
        *([0, 0, 1, 1, 2, 2], 3),
    ),
    "convolved words": RowCase(Convolved, lambda m: m(PADDED, HERE), THREE, 3),
    "each sentence": RowCase(
        *(EachSentence, lambda m: m(list(TOKENS.split(LENGTHS))), THREE, 3),
        lambda m: bp.extend(m, samples="sentences"),
    ),
    "documents": RowCase(
        *(Hierarchy, lambda m: m(PADDED, LONG, DOCUMENT), [0, 1], 2),
        lambda m: bp.extend(m, samples=lambda x, lengths, document: (x, document)),
    ),
    "bags, gated": RowCase(
        *(GatedAttention, lambda m: m(INSTANCES, BAG), THREE, 3),
        lambda m: bp.extend(m, samples=lambda x, bag: (x, bag)),
    ),
    "bags, gated, each": RowCase(
        GatedEach, lambda m: m(bags()), THREE, 3, lambda m: bp.extend(m, samples="bags")
    ),
    "bags, critical instance": RowCase(
        Critical, lambda m: m(tuple(bags())), THREE, 3, lambda m: bp.extend(m, samples="bags")
    ),
    "bags, padded sets": RowCase(PaddedSets, lambda m: m(PADDED_BAGS, IN_BAG), THREE, 3),
    "boxes of images": RowCase(
        *(Boxes, lambda m: m(IMAGES, BOXES), [0, 0, 1, 2, 2, 2], 3),
        lambda m: bp.extend(m, samples="images"),
    ),
    "images, pyramid": RowCase(
        Pyramid, lambda m: m(IMAGES), THREE, 3, lambda m: bp.extend(m, samples="images")
    ),
    "images, padded": RowCase(
        PaddedImages, lambda m: m(IMAGES), THREE, 3, lambda m: bp.extend(m, samples="images")
    ),
    "episodes, steps together": RowCase(Recurrent, steps_together, THREE * 3, 3, options=SAME),
    "episodes, whole": RowCase(mlp, whole_episodes, SENTENCE.tolist(), 3, options=FURTHER),
    "episodes, marked": RowCase(ActorCritic, steps_marked, SENTENCE.tolist(), 3),
    "episodes, actor and critic": RowCase(
        *(ActorCritic, lambda m: torch.cat([m(part) for part in TOKENS.split(LENGTHS)])),
        *(list(range(6)), 6),
        options=FURTHER,
    ),
    "users' images": RowCase(
        UserImages, lambda m: m(bp.mark(USER_IMAGES.clone(), USERS)), USERS.tolist(), 3
    ),
    "users' sequences": RowCase(
        *(UserSequences, lambda m: m(USER_SEQUENCES, USERS), USERS.tolist(), 3),
        lambda m: bp.extend(m, samples=lambda x, user: [(x, user), (user, user)]),
    ),
    "windows of tokens": RowCase(
        Windows, lambda m: m(torch.stack([IDS[:-1], IDS[1:]], 1)), list(range(5)), 5
    ),
}
