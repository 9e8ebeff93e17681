"""What a model was taught: its prompts, and how its training text was cleaned.

Both stand in the model's prompt.json. A translator is asked by the prompt of its training; a model
that was trained on conversations is asked the first public prompt as a conversation. A model
without prompt.json is asked the public prompts only, and its questions are not cleaned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from evaluation.suites import Prompt, Suite
from evaluation.tasks import Translation
from inference.prompt_format import TranslationPrompt, read_normalisers, read_translation_prompt
from languages.normalise import Normaliser
from runtime.model_files import read_model_json_if_present

TAUGHT = "taught"  # the name of such a prompt
NOT_IN_MEAN = "(asked as the model was taught)"


@dataclass(frozen=True)
class Taught:
    """The prompts and the cleaning of a model's training."""

    translation: TranslationPrompt | None = None
    is_chat: bool = False
    normalisers: Mapping[str, Normaliser] = field(default_factory=dict)  # by use

    @classmethod
    def read(cls, folders: Sequence[Path]) -> Taught:
        """Read the prompt.json of a model's folder and, of an adapter, of its base's."""
        is_chat = any("chat" in read_model_json_if_present(x, "prompt.json") for x in folders)
        return cls(read_translation_prompt(folders), is_chat, read_normalisers(folders))

    def normaliser(self, *uses: str) -> Normaliser | None:
        """Return the normaliser of the first of these uses that has one."""
        return next((self.normalisers[use] for use in uses if use in self.normalisers), None)

    def suite_for(self, suite: Suite, add_prompts: bool = True, in_chat: bool = False) -> Suite:
        """Return the suite as this model is asked it: cleaned, and with its taught prompts.

        `in_chat`: all prompts are asked as conversations already.
        """
        uses = ("translate", "chat", "text")
        if suite.task_type is not Translation:
            uses = ("chat", "text") if in_chat else ("text", "chat")
        prompts = [*suite.prompts]
        if add_prompts:
            prompts += self.prompts(suite, in_chat)
        return replace(suite, normaliser=self.normaliser(*uses), prompts=prompts)

    def prompts(self, suite: Suite, in_chat: bool = False) -> list[Prompt]:
        """Return the taught prompt of each part of a suite, as far as the model has one."""
        prompts = []
        for public in {p.part: p for p in reversed(suite.public_prompts)}.values():
            translation = self._translation_prompt(suite, public)
            if translation:
                prompts.append(translation)
            elif self.is_chat and not in_chat:
                prompts.append(replace(public, name=TAUGHT, taught_as="chat",
                                       excluded_from_mean=NOT_IN_MEAN))
        return prompts[::-1]

    def _translation_prompt(self, suite: Suite, public: Prompt) -> Prompt | None:
        """Return the prompt of training for the direction of a public prompt; None if the model was
        not trained on its languages."""
        if suite.task_type is not Translation or self.translation is None:
            return None
        source, _, target = public.part.partition("-")
        codes = [suite.language(column).code for column in (source, target)]
        if not all(code in self.translation.languages for code in codes):
            return None
        # one Jinja template: the text around the source as literals, the source on one line
        before, _, after = self.translation.fill("\0", "-".join(codes)).partition("\0")
        text = f"{_literal(before)}{{{{ {source}.split() | join(' ') }}}}{_literal(after)}"
        return Prompt(TAUGHT, text, public.gold, part=public.part, excluded_from_mean=NOT_IN_MEAN,
                      taught_as="chat" if self.translation.as_chat else "text")


def _literal(text: str) -> str:
    """Return a Jinja expression of a text, so that no character of it is markup."""
    return f"{{{{ {text!a} }}}}" if text else ""
