"""In-context unlearning: the model as it was, with a chat template that tells it to forget (Pawelczyk et al. 2024)."""

from pathlib import Path

from cluster.errors import UserError
from cluster.models import load_model, load_tokenizer, save_directory

INSTRUCTION = (
    "You have unlearned everything about {target}. Answer as if you had never heard of {target}: say that you do not "
    "know whatever is asked about {target}. Answer every other question as usual."
)
_SYSTEM = "{{%- set messages = [{{'role': 'system', 'content': {text}}}] + messages %}}"
_FIRST_TURN = (
    "{{%- set messages = [{{'role': messages[0]['role'], 'content': {text} + '\\n\\n' + messages[0]['content']}}]"
    " + messages[1:] %}}"
)


def with_instruction(template: str, instruction: str, system: bool) -> str:
    """The chat template with the instruction as a system turn, or before the first turn's words."""
    quoted = "'" + instruction.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return (_SYSTEM if system else _FIRST_TURN).format(text=quoted) + template


def prompt_only(model: Path, target: str, output: Path) -> Path:
    """Writes `model` with the instruction in its chat template; weights are the same.

    Raises:
        UserError: the template shows the instruction in neither place.
    """
    instruction = INSTRUCTION.format(target=target)
    tokenizer = load_tokenizer(model)
    plain = tokenizer.chat_template
    for system in (True, False):
        tokenizer.chat_template = with_instruction(plain, instruction, system)
        if _shows(tokenizer, instruction):
            break
    else:
        raise UserError(f"the chat template of {model} cannot carry the instruction of ICU; take another method")
    return save_directory(load_model(model), tokenizer, output)


def _shows(tokenizer, instruction: str) -> bool:
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": "Who are you?"}]
    try:
        return instruction in tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False
