"""
Scenes described in words, from which the demo's language model learns before it sees any picture.

In place of the image it gets, for each of the 16 cells, the sum of the embeddings of the words that describe the
cell. The text around it has the form of `vicuna_v1`, or of `plain` for captions.
"""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from modeling_movekd.chat_templates import DEFAULT_SYSTEM_PROMPT as SYSTEM_PROMPT
from modeling_movekd.chat_templates import set_chat_template
from modeling_movekd.processing import add_image_token
from train.demo.scenes import (
    CAPTION_REQUEST,
    COLORS,
    COLUMNS,
    COUNTS,
    FAMILIES,
    GRID,
    ROWS,
    SHAPES,
    Question,
    Scene,
    SceneObject,
    ask,
)


CELLS = GRID * GRID


def build_tokenizer(more_words: str = "") -> PreTrainedTokenizerFast:
    """
    A word-level tokenizer of the words of the scenes, the chat prompt and `more_words`; digits are single tokens.

    It is built like Llama's (a leading "▁" marks a space), so that text survives a round trip and an image placeholder
    between spaces is handled alike. It has no image token yet.
    """
    words = (
        f"{SYSTEM_PROMPT} USER: ASSISTANT: {CAPTION_REQUEST} What colour is the shape object? Is there a left or "
        "right above below of number yes no How many objects are Which written at Where "
    )
    words += " ".join((*COLORS, *SHAPES, *COUNTS, *COLUMNS, more_words))
    splitter = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always"),
            tokenizers.pre_tokenizers.Punctuation(),
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    found = [piece for piece, _ in splitter.pre_tokenize_str(words)]
    vocabulary = list(dict.fromkeys([*special, "▁", "\n", *"0123456789", *found]))
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def with_short_template(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """
    A copy of the tokenizer with a shortened `vicuna_v1` template: without the system prompt, which is half of a text
    here, and without the new line after the image.
    """
    probe = copy.deepcopy(tokenizer)
    add_image_token(probe)
    template = set_chat_template(probe, "vicuna_v1").chat_template
    for left_out, instead in ((SYSTEM_PROMPT, ""), ("image_suffix + '\\n'", "''")):
        if left_out not in template:
            raise ValueError(f"The template vicuna_v1 has no {left_out!r} to leave out.")
        template = template.replace(left_out, instead)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


class TextScenes:
    """Scenes as the input of a language model: 16 vectors, one per cell, in place of the image tokens."""

    def __init__(
        self,
        scenes: list[Scene],
        tokenizer: PreTrainedTokenizerFast,
        object_words: Callable[[SceneObject], Sequence[str]] = lambda item: (item.color, item.shape),
    ) -> None:
        self.scenes, self.tokenizer = scenes, tokenizer
        words = [_cell_words(scene, object_words) for scene in scenes]
        ids = [[tokenizer.convert_tokens_to_ids(cell) for cell in cells] for cells in words]
        longest = max(len(cell) for cells in ids for cell in cells)
        self.words = torch.tensor([[cell + [-1] * (longest - len(cell)) for cell in cells] for cells in ids])
        # Conversations consist of few strings, so their ids are kept
        self._pieces: dict[str, list[int]] = {}

    def chat(self, turns: list[tuple[str, str]], system_prompt: bool = True) -> tuple[list[int], list[int], list[int]]:
        """Ids before the image, ids after it, and labels after it, in the form of `vicuna_v1`."""
        after: list[int] = []
        labels: list[int] = []
        for i, (question, answer) in enumerate(turns):
            asked = self._ids(f"{'' if i == 0 else 'USER:'} {question} ASSISTANT:")
            answered = self._ids(f" {answer}</s>")
            after, labels = after + asked + answered, labels + [-100] * len(asked) + answered
        before = f"{SYSTEM_PROMPT} USER: " if system_prompt else "USER: "
        return [self.tokenizer.bos_token_id, *self._ids(before)], after, labels

    def plain(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """The same in the form of `plain`: the image and a caption."""
        after = self._ids(f"{text}\n")
        return [self.tokenizer.bos_token_id], after, after

    def batch(
        self,
        embedding: nn.Embedding,
        rows: list[int],
        texts: list[tuple[list[int], list[int], list[int]]],
        noise: float,
    ) -> dict[str, Tensor]:
        """
        Inputs of a language model, padded on the right. All texts must begin alike.

        Args:
            noise (`float`): Standard deviation of the noise on the vectors, relative to their root mean square.
        """
        words = self.words[rows]
        image = (embedding(words.clamp(min=0)) * (words >= 0).unsqueeze(-1)).sum(2)
        image = image + noise * image.detach().pow(2).mean().sqrt() * torch.randn_like(image)
        before, length = texts[0][0], max(len(after) for _, after, _ in texts)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[*before, *after, *[pad] * (length - len(after))] for _, after, _ in texts])
        text = embedding(ids)
        embeds = torch.cat([text[:, : len(before)], image, text[:, len(before) :]], dim=1)
        skipped = [-100] * (len(before) + CELLS)
        labels = torch.tensor([[*skipped, *labels, *[-100] * (length - len(labels))] for _, _, labels in texts])
        return {"inputs_embeds": embeds, "labels": labels}

    def _ids(self, text: str) -> list[int]:
        if text not in self._pieces:
            self._pieces[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._pieces[text]


def lesson(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """
    The questions of one training conversation with their answers, in random order.

    There is one question of each family, a second one of the three hard families, and three easier ones as steps
    towards them: where an object is, whether a color occurs, whether a shape occurs.
    """
    questions = [ask(scene, family, rng) for family in (*FAMILIES, "attribute", "relation", "presence")]
    turns = [(question.text, question.answer) for question in questions]
    item = scene.objects[rng.integers(len(scene.objects))]
    turns.append((f"Where is the {item.name}?", f"{COLUMNS[item.column]} {ROWS[item.row]}"))
    for kinds, present, ending in (
        (tuple(COLORS), sorted({item.color for item in scene.objects}), " object"),
        (SHAPES, sorted({item.shape for item in scene.objects}), ""),
    ):
        choices = present if rng.integers(2) else [kind for kind in kinds if kind not in present] or present
        kind = choices[rng.integers(len(choices))]
        turns.append((f"Is there a {kind}{ending}?", "yes" if kind in present else "no"))
    return [turns[i] for i in rng.permutation(len(turns))]


def facts(scene: Scene, rng: np.random.Generator, count: int = 10) -> str:
    """
    Color, shape and place of random objects, each in random order: "circle red B two, B two circle red".

    Any word of such a text may have to be completed from its cell, which is the skill that all questions need.
    Questions alone, with one answer each, take several times as long to teach it.
    """
    told = []
    for i in rng.integers(len(scene.objects), size=count):
        item = scene.objects[i]
        parts = [item.color, item.shape, f"{COLUMNS[item.column]} {ROWS[item.row]}"]
        told.append(" ".join(parts[j] for j in rng.permutation(len(parts))))
    return ", ".join(told)


@torch.no_grad()
def language_model_scores(
    model: LlamaForCausalLM,
    told: TextScenes,
    families: Sequence[str] = FAMILIES,
    ask: Callable[[Scene, str, np.random.Generator], Question] = ask,
    seed: int = 0,
) -> dict[str, float]:
    """Share of the questions of each family, one per scene, that a language model answers exactly by greedy search."""
    rng, scores = np.random.default_rng([seed, 2]), {}
    rows = list(range(len(told.scenes)))
    for family in families:
        asked = [ask(scene, family, rng) for scene in told.scenes]
        texts = [told.chat([(question.text, question.answer)]) for question in asked]
        batch = told.batch(model.get_input_embeddings(), rows, texts, 0.0)
        labels = batch.pop("labels")[:, 1:]
        right = (model(**batch).logits[:, :-1].argmax(-1) == labels) | (labels == -100)
        scores[family] = right.all(1).float().mean().item()
    return scores


def _cell_words(scene: Scene, object_words: Callable[[SceneObject], Sequence[str]]) -> list[list[str]]:
    """The tokens that describe each of the 16 cells: its content, its column and its row."""
    words: list[list[str]] = [[] for _ in range(CELLS)]
    for item in scene.objects:
        words[item.row * GRID + item.column] += [f"▁{word}" for word in object_words(item)]
    for offset in range(2):
        words[scene.number_row * GRID + scene.number_column + offset].append(scene.number[offset])
    places = [[f"▁{column}", f"▁{row}"] for row in ROWS for column in COLUMNS]
    return [cell + place for cell, place in zip(words, places, strict=True)]
