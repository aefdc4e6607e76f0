"""Language modelling: texts, or prompts with completions, for causal models of transformers."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from svftool.errors import DataError, ModelError, UsageError, counted
from svftool.progress import SILENT, Progress
from svftool.tasks.at_once import tokens_at_once
from svftool.tasks.base import Part, Prepared, TaskMetric, device_of, forward_errors, to_device
from svftool.tasks.chat import encode_chat
from svftool.tasks.heads import logits_of, require_module
from svftool.tasks.options import LanguageOptions, StrPath
from svftool.tasks.splits import (
    draw_examples,
    left_out,
    nothing_left,
    others,
    require_held_out,
    require_query,
)
from svftool.tasks.texts import Text, list_texts
from svftool.tasks.tokens import (
    LONGEST_DEFAULT,
    Block,
    by_length,
    collate,
    cut,
    dropped,
    encode,
    length_limit,
    load_tokenizer,
    padding_within,
    refuse_misfit,
    refuse_unknown,
    vocabulary,
)

LOGITS_AT_ONCE = 1 << 26
"""Numbers that evaluation has a model put out in one batch, at most."""

LARGEST_LOSS = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Corpus:
    """Texts and their tokens.

    Attributes
    ----------
    texts : sequence of Text
    blocks : sequence of Block
    shortened : frozenset of int
        Texts whose prompt lost its beginning.
    untold : frozenset of int
        Conversations in which the chat template does not tell the assistant's turns.
    """

    texts: Sequence[Text]
    blocks: Sequence[Block]
    shortened: frozenset[int] = frozenset()
    untold: frozenset[int] = frozenset()

    def at(self, texts: Sequence[int]) -> Corpus:
        """Return the same texts with the blocks of those at these positions."""
        return replace(self, blocks=self.take(texts))

    def take(self, texts: Sequence[int]) -> list[Block]:
        """Return the blocks of the texts at these positions."""
        chosen = set(texts)
        return [block for block in self.blocks if block.text in chosen]


class Language:
    """The task ``language``.

    Parameters
    ----------
    data : path-like or sequence of Text
        Texts to draw the support set from; see `svftool.tasks.texts.list_texts`. Given as such
        they are the query set too, and may be of one token.
    config : mapping
        The checkpoint's ``config.json``.
    trust_remote_code : bool
        Whether code that lies beside the tokenizer may run.
    options
        Fields of `svftool.tasks.options.LanguageOptions`.

    Raises
    ------
    DataError
        If the texts cannot be read, or do not hold what was asked for.
    ModelError
        If there is no tokenizer.
    """

    name = "language"
    primary = TaskMetric("perplexity", higher_is_better=False)
    facts: Mapping[str, int] = MappingProxyType({})
    classes = None

    def __init__(
        self,
        data: StrPath | Sequence[Text],
        *,
        config: Mapping[str, Any] = MappingProxyType({}),
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        self.options = chosen = LanguageOptions(**options)
        given = None if isinstance(data, (str, os.PathLike)) else data
        texts = list_texts(Path(data)) if isinstance(data, (str, os.PathLike)) else data
        queries = [] if chosen.query_data is None else list_texts(chosen.query_data)
        if given is None:
            require_query(chosen.shots, chosen.evaluation, "texts")
        count, hold_out = len(texts), chosen.hold_out
        split = draw_examples(count, unit="texts", shots=chosen.shots, hold_out=hold_out)
        require_held_out(split, hold_out, "texts")
        self.tokenizer = load_tokenizer(chosen.tokenizer, trust_remote_code=trust_remote_code)
        self.shots = chosen.shots
        self.length = _length(chosen.sequence_length, length_limit(config, self.tokenizer))
        self.support = self._corpus(texts, short=given is not None)
        self.queries = self._corpus(queries) if given is None else self.support
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.padding: int = next((token for token in (pad, end) if token is not None), 0)

    def describe(self) -> dict[str, Any]:
        """Shots, length and how the texts were cut."""
        return {
            "shots": self.shots,
            "sequence_length": self.length,
            "texts": len(self.support.texts),
            "blocks": len(self.support.blocks),
            "hold_out": self.options.hold_out,
            "gradient_checkpointing": self.options.gradient_checkpointing,
            "head": self.options.head_name,
        }

    def draw(self, seed: int) -> LanguageDraw:
        """Draw the support set of a seed.

        Raises
        ------
        DataError
            If nothing is left to evaluate on.
        """
        split = draw_examples(
            len(self.support.texts),
            unit="texts",
            shots=self.shots,
            hold_out=self.options.hold_out,
            seed=seed,
        )
        query = self.queries
        if not query.texts and self.options.measured:
            query = self.support.at(split.rest)
            if not query.blocks:
                raise nothing_left(self.shots, "texts")
        return LanguageDraw(
            self,
            self.support.at(split.support),
            self.support.at(split.held_out),
            query,
        )

    def _corpus(self, texts: Sequence[Text], *, short: bool = False) -> Corpus:
        blocks: list[Block] = []
        shortened: set[int] = set()
        untold: set[int] = set()
        for position, text in enumerate(texts):
            ids, learned = self._encode(text, position, untold)
            if dropped(learned, self.length):
                shortened.add(position)
            found = cut(ids, learned, self.length, position)
            if not found and short and ids:
                found = [Block(torch.tensor(ids[-1:]), torch.zeros(1, dtype=torch.bool), position)]
            if not found:
                raise DataError(
                    f"{text.file}: line {text.line}: {counted(len(ids), 'tokens')}, expected two "
                    "or more, so that one is predicted from another. Remove the line"
                )
            blocks += found
        return Corpus(texts, blocks, frozenset(shortened), frozenset(untold))

    def _encode(self, text: Text, position: int, untold: set[int]) -> tuple[list[int], list[bool]]:
        if not text.turns:
            return encode(text, self.tokenizer)
        ids, learned, told = encode_chat(text, self.tokenizer)
        if not told:
            untold.add(position)
        return ids, learned


class LanguageDraw:
    """Support, held-out and query texts of one seed."""

    def __init__(self, task: Language, support: Corpus, held_out: Corpus, query: Corpus) -> None:
        self._task = task
        self._support = support
        self._parts = {"held_out": held_out, "query": query}

    @property
    def size(self) -> int:
        """Blocks to train on."""
        return len(self._support.blocks)

    @property
    def held_out(self) -> int:
        """Blocks held out of the support set."""
        return len(self._parts["held_out"].blocks)

    @property
    def measured(self) -> int:
        """Texts to measure with."""
        return len({block.text for block in self._parts["query"].blocks})

    def contents(self, part: Literal["support", "query"]) -> Iterator[bytes]:
        """Yield the texts' words; see `svftool.tasks.base.HasContents`."""
        support = (self._support, self._parts["held_out"])
        for corpus in support if part == "support" else (self._parts["query"],):
            for position in sorted({block.text for block in corpus.blocks}):
                text = corpus.texts[position]
                yield f"{text.prompt}\0{text.body}".encode()

    def prepare(self, model: nn.Module, *, start: bool = True) -> Prepared:
        """Check that the model takes the tokens; its head stays the checkpoint's.

        Raises
        ------
        ModelError
            If the model is no causal language model or has fewer tokens than the tokenizer.
        """
        known = vocabulary(model)
        self._task.padding, said = padding_within(self._task.padding, known)
        for corpus in (self._support, *self._parts.values()):
            refuse_unknown(corpus.texts, corpus.blocks, self._task.tokenizer, known)
        refuse_misfit(self._task.tokenizer, known)
        # Where nothing is trained, the support set may be the query set once more, or not be read.
        read = (self._support, *self._parts.values()) if start else (self._parts["query"],)
        said += describe_cuts(read, self._task.length)
        block = self._support.blocks[0]
        short = Block(block.ids[:2], block.targets[:2], 0)
        batch = to_device(collate([short], self._task.padding), device_of(model))
        with forward_errors("tokens"), torch.inference_mode():
            logits = self._logits(model.eval(), batch)
        if logits.ndim != 3:
            raise ModelError(
                f"the model returns {tuple(logits.shape)} for 1 text of "
                f"{counted(len(short.ids), 'tokens')}, expected logits for each token. Name a "
                "causal language model with --model"
            )
        if self._task.options.gradient_checkpointing:
            _enable_checkpointing(model)
        if self._task.options.head_name is not None:
            require_module(model, self._task.options.head_name)
        return Prepared(model, self._task.options.head_name, said=tuple(said))

    def subdivide(self, count: int, seed: int) -> list[LanguageDraw]:
        """Split the support set by texts; see `svftool.tasks.base.Subdivides`."""
        support, held_out = self._support, self._parts["held_out"]
        known = sorted({block.text for block in support.blocks})
        return [
            LanguageDraw(
                self._task,
                support.at([known[i] for i in others(fold, len(known))]),
                held_out,
                support.at([known[i] for i in fold]),
            )
            for fold in left_out([0] * len(known), count, seed=seed)
        ]

    def order(self, generator: torch.Generator) -> Tensor:
        """Shuffle the support set."""
        return torch.randperm(self.size, generator=generator)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Pad the blocks at `indices`; see `svftool.tasks.tokens.collate`."""
        blocks = [self._support.blocks[index] for index in indices.tolist()]
        return collate(blocks, self._task.padding)

    def terms(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens that a batch's loss is the mean over."""
        return int(batch["targets"].sum())

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy of the tokens that are learned."""
        return self.smoothed_loss(model, batch, 0.0)

    def smoothed_loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], smoothing: float
    ) -> Tensor:
        """Mean cross-entropy of the tokens that are learned, to smoothed labels."""
        chosen = batch["targets"][:, 1:]
        logits = self._logits(model, batch)[:, :-1][chosen].float()
        wanted = batch["input_ids"][:, 1:][chosen]
        return cross_entropy(logits, wanted, label_smoothing=smoothing)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, part: Part = "query", *, progress: Progress = SILENT
    ) -> dict[str, float]:
        """Perplexity, accuracy of the next token, and mean loss in nats a token.

        Nothing of no texts.
        """
        if not self._parts[part].blocks:
            return {}
        loss, correct, tokens = 0.0, 0, 0
        total = len(self._parts[part].blocks)
        with progress.task("evaluate", total=total, unit="blocks") as bar:
            for score in self._scores(model, part):
                loss, correct = loss + score.loss, correct + score.correct
                tokens += score.tokens
                bar.advance()
        mean = loss / tokens
        perplexity = math.exp(mean) if mean < LARGEST_LOSS else math.inf
        return {"perplexity": perplexity, "accuracy": correct / tokens, "loss": mean}

    @torch.inference_mode()
    def predictions(
        self, model: nn.Module, part: Part = "query", folder: Path | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield each text's line, its mean loss, how many tokens were predicted, and how well."""
        sums: dict[int, Score] = {}
        for score in self._scores(model, part):
            sums[score.text] = score + sums.get(score.text, Score(score.text))
        for position, score in sorted(sums.items()):
            text = self._parts[part].texts[position]
            yield {
                "file": text.file.name,
                "line": text.line,
                "loss": score.loss / score.tokens,
                "tokens": score.tokens,
                "accuracy": score.correct / score.tokens,
            }

    def _scores(self, model: nn.Module, part: Part) -> Iterator[Score]:
        for block, *parts in self.outputs(model, self._parts[part].blocks):
            yield score_block(block, *parts)

    @torch.inference_mode()
    def outputs(
        self, model: nn.Module, blocks: Sequence[Block]
    ) -> Iterator[tuple[Block, Tensor, Tensor, Tensor]]:
        """Run blocks through the model, the longest first.

        Yields
        ------
        tuple of Block and Tensor
            The block, its logits (T, V), its targets (T,), its tokens (T,); padded on the right.
        """
        room = max(1, LOGITS_AT_ONCE // (vocabulary(model) or len(self._task.tokenizer)))
        tokens = min(room, tokens_at_once(device_of(model)))
        model.eval()
        for positions in by_length(blocks, tokens):
            chosen = [blocks[position] for position in positions]
            batch = to_device(collate(chosen, self._task.padding), device_of(model))
            logits = self._logits(model, batch)
            yield from zip(chosen, logits, batch["targets"], batch["input_ids"], strict=True)

    @staticmethod
    def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        # A cache of keys and values is for writing, not for training.
        return logits_of(
            model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            )
        )


def describe_cuts(parts: Sequence[Corpus], length: int) -> list[str]:
    """Say how many texts are longer than what the model sees at once, and what is learned of chats.

    Parameters
    ----------
    parts : sequence of Corpus
        Of different texts, or of different blocks of the same.
    length : int
        Tokens at once.
    """
    total = cuts = short = chats = untold = learned = tokens = 0
    for part in parts:
        pieces = Counter(block.text for block in part.blocks)
        total += len(pieces)
        cuts += sum(number > 1 for number in pieces.values())
        short += len(part.shortened & pieces.keys())
        chats += sum(bool(part.texts[position].turns) for position in pieces)
        untold += len(part.untold & pieces.keys())
        tokens += sum(len(block.ids) for block in part.blocks)
        learned += sum(int(block.targets.sum()) for block in part.blocks)
    said = []
    if cuts:
        said.append(
            f"{counted(cuts, 'texts', 'are', of=total)} longer than the {length} tokens "
            "that the model sees at once: cut in blocks; see --sequence-length"
        )
    if short:
        said.append(
            f"{counted(short, 'prompts', 'are', of=total)} too long for {length} tokens: "
            f"{'it loses its' if short == 1 else 'they lose their'} beginning"
        )
    if untold:
        said.append(
            f"the chat template does not tell the assistant's turns in {untold} of "
            f"{counted(chats, 'conversations')}: all of their tokens are learned"
        )
    elif chats:
        said.append(
            f"{counted(chats, 'conversations')} by the tokenizer's chat template: the "
            "assistant's turns alone "
            f"are learned, {learned:,} of {tokens:,} tokens"
        )
    return said


@dataclass(frozen=True)
class Score:
    """How well tokens of one text were predicted: sums of losses and hits."""

    text: int
    loss: float = 0.0
    correct: int = 0
    tokens: int = 0

    def __add__(self, other: Score) -> Score:
        """Sum over both."""
        return Score(
            self.text,
            self.loss + other.loss,
            self.correct + other.correct,
            self.tokens + other.tokens,
        )


def score_block(block: Block, logits: Tensor, targets: Tensor, ids: Tensor) -> Score:
    """Score the tokens of a block that are predicted."""
    chosen = targets[1:]
    scores, wanted = logits[:-1][chosen].float(), ids[1:][chosen]
    return Score(
        block.text,
        float(cross_entropy(scores, wanted, reduction="sum")),
        int((scores.argmax(1) == wanted).sum()),
        len(wanted),
    )


def _length(asked: int | None, limit: int | None) -> int:
    if asked is None:
        return min(LONGEST_DEFAULT, limit or LONGEST_DEFAULT)
    if asked < 2:
        raise UsageError(f"--sequence-length is {asked}, expected at least 2")
    if limit is not None and asked > limit:
        raise UsageError(f"--sequence-length is {asked}, the model takes {limit} tokens at most")
    return asked


def _enable_checkpointing(model: nn.Module) -> None:
    # The reentrant kind needs an input that requires a gradient, and the embedding is frozen.
    kind = {"use_reentrant": False}
    newer = getattr(model, "activation_checkpointing_enable", None)
    older = getattr(model, "gradient_checkpointing_enable", None)
    if callable(newer):
        newer(activation_checkpointing_kwargs=kind)
    elif callable(older):
        older(gradient_checkpointing_kwargs=kind)
    else:
        raise ModelError(
            f"{type(model).__name__} has no gradient checkpointing, expected a model of "
            "transformers for --gradient-checkpointing"
        )
