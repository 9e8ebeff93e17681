"""Prompt formats: how a model is asked to continue a text, to chat, or to translate.

A model is prompted as it was trained. A conversation is written by the model's own chat template. A
translation is asked for by the prompt that training wrote next to the weights (prompt.json). Models
without these get our plain template, and the prompt of ALMA.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from inference.sampling import SamplingParams, StoppingCriteria
from languages.language import ALMA, language_of, read_normaliser
from languages.normalise import Normaliser
from runtime.console import UserError
from runtime.model_files import has_model_file, read_model_json, read_model_json_if_present
from runtime.strict_json import shorten
from tokenization.chat_template import ChatTemplate
from tokenization.tokenizer import Tokenizer

TRUNCATED_NOTICE = "the conversation outgrows the context; its first messages are left out"
MAX_PROMPT_CHARS = 1 << 16  # of a translation prompt
MAX_LANGUAGES, MAX_LANGUAGE_CHARS = 256, 100  # that a prompt names, and of each code and name

USES = ("text", "chat", "translate")  # each has an entry clean_* in prompt.json

Messages = list[dict[str, str]]
PromptOrMessages = str | Messages  # a text, or the messages of a conversation


@dataclass(frozen=True)
class TranslationPrompt:
    """A text with {source}, {target} and {text}, and the names of languages that it uses."""

    text: str = ALMA
    languages: Mapping[str, str] = field(default_factory=dict)  # code -> name
    as_chat: bool = False  # the prompt is the user's message of a conversation

    @classmethod
    def read(cls, file: Path) -> TranslationPrompt | None:
        """The first translation prompt of a prompt.json; None if it has none."""
        try:
            prompts = read_model_json(file.parent, file.name).get("translate")
            if prompts is None:  # trained on conversations
                return None
            prompt = prompts[0]
            text, languages = prompt["text"], prompt["languages"]
            as_chat = prompt.get("as_chat", False)
            if type(text) is not str or "{text}" not in text or len(text) > MAX_PROMPT_CHARS:
                raise ValueError("its text has no {text}, or is too long")
            if not 2 <= len(languages) <= MAX_LANGUAGES:
                raise ValueError(f"it names {len(languages)} languages, expected 2 to "
                                 f"{MAX_LANGUAGES}")
            for name in [*languages.keys(), *languages.values()]:
                if type(name) is not str or not 0 < len(name) <= MAX_LANGUAGE_CHARS:
                    raise ValueError(f"{shorten(name)} is not the code or name of a language")
            if type(as_chat) is not bool:
                raise ValueError(f"as_chat is {shorten(as_chat)}, expected true or false")
        except (UserError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise UserError(f"{file}: expected a translation prompt with text and languages, "
                            f"found a fault ({e}). Correct the file, or remove it to use ALMA's "
                            "prompt") from None
        return cls(text, languages, as_chat)

    def name_of(self, code: str) -> str:
        """The name of a language in this prompt; UserError if it is not known."""
        return self.languages.get(code) or language_of(code).english_name

    def fill(self, text: str, direction: str) -> str:
        """The prompt of a text. Its words are separated by single spaces, as in training."""
        source, target = direction.split("-")
        values = {"{source}": self.name_of(source), "{target}": self.name_of(target),
                  "{text}": " ".join(text.split())}
        return re.sub(r"\{(?:source|target|text)\}", lambda m: values[m[0]], self.text)


def read_translation_prompt(folders: Sequence[Path]) -> TranslationPrompt | None:
    """The translation prompt of the first folder that has one."""
    for folder in folders:
        file = folder / "prompt.json"
        prompt = None
        if has_model_file(folder, file.name):
            prompt = TranslationPrompt.read(file)
        if prompt:
            return prompt
    return None


def read_normalisers(folders: Sequence[Path],
                     bins_prompt: Mapping[str, Any] | None = None) -> dict[str, Normaliser]:
    """How the training text of a model was cleaned, by USES, from the first prompt.json that says
    so. A use without an entry is left out: its text is asked as it is. `bins_prompt`: the entries
    of the bins that the model is being trained on, which come first."""
    prompts = [("the bins", bins_prompt or {})]
    prompts += [(str(folder / "prompt.json"), read_model_json_if_present(folder, "prompt.json"))
                for folder in folders]
    normalisers: dict[str, Normaliser] = {}
    for place, prompt in prompts:
        for use in USES:
            key = f"clean_{use}"
            if key in prompt and use not in normalisers:
                normalisers[use] = read_normaliser(prompt[key], f"{place}: {key}")
    return normalisers


@dataclass(frozen=True)
class PromptFormat:
    """How a model is prompted: a text as it is, or inside a translation prompt; messages by a
    chat template.

    `folders` hold what was trained: the model's folder and, of an adapter, its base's.
    """

    folders: tuple[Path, ...]
    tokenizer: Tokenizer
    direction: str = ""  # of a translation, such as eng-kin
    translation: TranslationPrompt = TranslationPrompt()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of the chat template

    @classmethod
    def load(cls, folders: Sequence[Path], tokenizer: Tokenizer, direction: str = "",
             names: Mapping[str, str] | None = None,
             template_kwargs: Mapping[str, Any] | None = None) -> PromptFormat:
        """The format that the folders say; ALMA's prompt for a model that was not trained to
        translate. Given by the user: `names`, names of languages by code, and `template_kwargs`,
        variables of the chat template."""
        translation = TranslationPrompt()
        if direction:
            translation = read_translation_prompt(folders) or translation
            languages = {**translation.languages, **(names or {})}
            translation = replace(translation, languages=languages)
            for code in direction.split("-"):
                translation.name_of(code)  # refuses an unknown one
        return cls(tuple(folders), tokenizer, direction, translation, template_kwargs or {})

    @classmethod
    def load_all(cls, folders: Sequence[Path], tokenizer: Tokenizer,
                 template_kwargs: Mapping[str, Any] | None = None) -> dict[str, PromptFormat]:
        """All formats that a model was trained for, by name: directions of translation, chat; and
        text, which every model continues."""
        text = cls.load(folders, tokenizer, template_kwargs=template_kwargs)
        translation = read_translation_prompt(folders)
        formats = {}
        if translation:
            for pair in permutations(translation.languages, 2):
                direction = "-".join(pair)
                formats[direction] = replace(text, direction=direction, translation=translation)
        if text.own_template:
            formats["chat"] = text
        return {**formats, "text": text}

    @cached_property
    def own_template(self) -> ChatTemplate | None:
        """The model's chat template, or for an adapter its base's."""
        for folder in self.folders:
            template = ChatTemplate.from_folder(folder, self.tokenizer)
            if template:
                return template.with_kwargs(self.template_kwargs)
        return None

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's own template, else our plain one."""
        plain = ChatTemplate.plain(self.tokenizer)
        return self.own_template or plain.with_kwargs(self.template_kwargs)

    @cached_property
    def normalisers(self) -> dict[str, Normaliser]:
        """How the text that the model was trained on was cleaned, by use."""
        return read_normalisers(self.folders)

    def clean(self, text: str, use: str) -> str:
        """A text, cleaned as the training text of this use was."""
        normalise = self.normalisers.get(use)
        return normalise(text)[0] if normalise else text

    def _clean_messages(self, messages: Messages) -> Messages:
        cleaned = []
        for message in messages:
            # anything else is refused by the template, with the number of the message
            if isinstance(message, Mapping) and isinstance(message.get("content"), str):
                message = {**message, "content": self.clean(message["content"], "chat")}
            cleaned.append(message)
        return cleaned

    def render(self, prompt: PromptOrMessages) -> str:
        """The text that the model reads: a prompt, or a conversation as its template writes it.
        What is asked is cleaned as the training text was."""
        if not isinstance(prompt, str):
            return self.template.render(self._clean_messages(prompt), add_generation_prompt=True)
        if self.direction:
            return self.translation.fill(self.clean(prompt, "translate"), self.direction)
        return self.clean(prompt, "text")

    def encode(self, prompt: PromptOrMessages) -> list[int]:
        """The ids that the model reads, with BOS where the tokenizer has one."""
        if isinstance(prompt, str) and self.direction and self.translation.as_chat:
            question = [{"role": "user", "content": self.render(prompt)}]
            return self.template.encode(question, add_generation_prompt=True)
        if not isinstance(prompt, str):
            return self.template.encode(self._clean_messages(prompt), add_generation_prompt=True)
        start = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        return start + self.tokenizer.encode(self.render(prompt))

    def truncate_conversation(self, messages: Sequence[dict[str, str]],
                              max_tokens: int) -> tuple[Messages, list[int]]:
        """The end of a conversation that fits into `max_tokens`, and its ids.

        First exchanges (two messages each) are removed; the last message always stays.
        """
        messages = list(messages)
        ids = self.encode(messages)
        if len(ids) > max_tokens and len(messages) > 2:
            starts = range(2, len(messages), 2)
            # binary search: a conversation may be long, and every try renders it
            first = bisect_left(starts, -max_tokens, key=lambda i: -len(self.encode(messages[i:])))
            messages = messages[starts[min(first, len(starts) - 1)] :]
            ids = self.encode(messages)
        return messages, ids


class GenerationConfig(NamedTuple):
    """How to prompt a model, how to choose the tokens of its answer, and what ends it."""

    prompt_format: PromptFormat
    sampling: SamplingParams
    stopping: StoppingCriteria
