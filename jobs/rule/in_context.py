"""MUSE's way to ask a base model: ten question and answer pairs, then the question; no chat.

The pairs become the chat template of a linked copy of the model, so that both stages, the evaluation and whoever loads
the unlearned model ask in that form without knowing of it.
Source: RULE, settings for MUSE-Books (stage 1 and the `train_icl` form of stage 2).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import folders
from cluster.errors import UserError
from cluster.models import ModelSource, cache_root, load_tokenizer
from cluster.report import digest
from jobs.rule.config import Rule
from jobs.rule.muse import QaRow
from jobs.rule.rows import load_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIRS_FILE = "knowmem_train_qa_icl.json"
_TURNS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ message['content'] }}\nAnswer: "
    "{% elif message['role'] == 'assistant' %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
)


def in_form(rule: Rule, source: ModelSource, folder: Path | None) -> ModelSource:
    """The model with the chat template that `rule.chat_template` asks for; `folder` is that of the data."""
    return source if rule.chat_template == "model" else prompted(source, folder)


def prompted(source: ModelSource, folder: Path | None) -> ModelSource:
    """The model with the pairs of `folder` as its chat template, linked once under the cache folder.

    Raises:
        UserError: the data have no file of such pairs.
    """
    pairs = None if folder is None else load_rows(folder / PAIRS_FILE, QaRow)
    if not pairs:
        raise UserError(
            f"rule.chat_template = in_context needs question and answer pairs in {PAIRS_FILE}, which the data lack; "
            "add the file, or take rule.chat_template=model"
        )
    tokenizer = load_tokenizer(source.path, chat=False)
    wanted = template(pairs, tokenizer)
    if wanted in (tokenizer.chat_template or ""):  # it was made in this form, and ICU's instruction stands before it
        return source
    tokenizer.chat_template = wanted
    version = digest([source.name, source.version, tokenizer.chat_template])
    target = cache_root() / "models" / f"in-context-{version}"
    if not target.exists():
        _link_with(tokenizer, source.path, target)
    return ModelSource(source.name, target, version)


def template(pairs: Sequence[QaRow], tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template: the pairs as they stand, then each turn; a beginning token where the tokenizer puts one."""
    shown = "".join(f"Question: {pair.question}\nAnswer: {pair.answer}\n\n" for pair in pairs)
    quoted = "'" + shown.replace("\\", "\\\\").replace("'", "\\'") + "'"
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a").input_ids[0] == bos
    return f"{'{{ bos_token }}' if begins else ''}{{{{ {quoted} }}}}{_TURNS}"


def _link_with(tokenizer: PreTrainedTokenizerBase, model: Path, target: Path) -> None:
    try:
        with folders.whole(target) as partial:
            tokenizer.save_pretrained(partial)
            for file in model.resolve().iterdir():
                if file.is_file() and not (partial / file.name).exists():
                    os.symlink(file.resolve(), partial / file.name)
    except OSError:
        if not target.exists():  # else another job was faster
            raise
