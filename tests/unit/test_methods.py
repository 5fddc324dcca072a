"""The baselines' losses against values worked out by hand, and their trainer against transformers' own losses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import TrainingArguments

from cluster import training
from cluster.config import Lora, Train
from cluster.errors import JobFailure, UserError
from cluster.models import load_model, load_tokenizer, save_directory
from cluster.recorder import Recorder
from cluster.training import with_lora
from jobs.rule import methods
from jobs.rule.baseline import BaselineTrainer, Ids, TrainingStep, freeze, joined, sample_ids
from jobs.rule.config import Baseline
from jobs.rule.corpora import Sample
from jobs.rule.icu import INSTRUCTION, prompt_only, with_instruction
from jobs.rule.methods.base import Scored
from jobs.rule.methods.dpo import dpo_loss
from jobs.rule.methods.ga import ga_loss
from jobs.rule.methods.npo import npo_loss
from jobs.rule.methods.retain import gradient_descent, kl_divergence
from jobs.rule.methods.rmu import rmu_loss
from jobs.rule.methods.simnpo import simnpo_loss
from jobs.rule.methods.wga import wga_loss
from jobs.rule.plan import settled

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
TEXTS = [Sample("", "abc"), Sample("", "a longer text"), Sample("who?", "nobody")]


def scored(logprobs, tokens=(1.0, 1.0), original=None) -> Scored:
    tensor = torch.tensor
    return Scored(tensor(logprobs), tensor(list(tokens)), None if original is None else tensor(original))


def by_token(logprobs) -> Scored:
    """One text of these tokens."""
    each = torch.tensor(logprobs)
    return Scored(each.sum()[None], torch.tensor([float(len(logprobs))]), token_logprobs=each)


# sigma(0) = 1/2; ln sigma(x) = -ln(1 + exp(-x))
@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (lambda: ga_loss(scored([-2.0, -4.0], (2, 3))), -1.2),
        (lambda: gradient_descent(scored([-2.0, -4.0], (2, 3))), 1.2),
        # (.5^2 ln .5 + .25^2 ln .25) / 2
        (
            lambda: wga_loss(by_token([math.log(0.5), math.log(0.25)]), 2.0),
            (0.25 * math.log(0.5) + 0.0625 * math.log(0.25)) / 2,
        ),
        # d = (-1, 0), beta 0.2: 10 * (ln(1 + e^-0.2) + ln 2) / 2
        (
            lambda: npo_loss(scored([-2.0, -4.0], original=[-1.0, -4.0]), 0.2),
            5 * (math.log1p(math.exp(-0.2)) + math.log(2)),
        ),
        # an average token of 2 nats stands on the margin of 2
        (lambda: simnpo_loss(scored([-4.0, -6.0], (2, 3)), 0.1, 2.0), 20 * math.log(2)),
        (lambda: simnpo_loss(scored([-2.0, -2.0], (2, 2)), 0.1, 2.0), 20 * math.log1p(math.exp(0.1))),
        # (-1 + 2) - (-3 + 1) = 3
        (lambda: dpo_loss(scored([-1.0], (1,), [-2.0]), scored([-3.0], (1,), [-1.0]), 0.5), math.log1p(math.exp(-1.5))),
        # (1 + 4) / 2 + 3 * (0.25 + 0) / 2
        (
            lambda: rmu_loss(
                torch.tensor([[1.0, 2.0]]), torch.zeros(2), torch.tensor([[0.5, 1.0]]), torch.tensor([[0.0, 1.0]]), 3.0
            ),
            2.875,
        ),
        (
            lambda: kl_divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())[0],
            0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5),
        ),
    ],
)
def test_a_loss_has_the_value_worked_out_by_hand(loss, value):
    assert loss().item() == pytest.approx(value, rel=1e-5)


def test_what_is_forgotten_already_is_hardly_pushed_on():
    logprobs = torch.tensor([0.5, 0.01]).log().requires_grad_()
    wga_loss(Scored(logprobs.sum()[None], torch.tensor([2.0]), token_logprobs=logprobs), 1.0).backward()
    assert logprobs.grad.tolist() == pytest.approx([0.5 / 2, 0.01 / 2])


def test_every_method_of_the_table_is_there():
    table = (
        "GA GA+GDR GA+KLR NPO NPO+GDR NPO+KLR SimNPO SimNPO+GDR SimNPO+KLR WGA WGA+GDR WGA+KLR DPO RT RMU ICU RULE RS"
    )
    assert set(table.split()) <= set(methods.names())
    for name in set(methods.names()) - {"RULE", "RS", "ICU"}:
        method = methods.find(name)
        assert method.name == name
        assert method.source
        assert name.partition("+")[2] == (method.retain_term or "")
    trained = {name: methods.find(name) for name in table.split() if methods.find(name) is not None}
    reads = {name for name, method in trained.items() if "retain" in method.corpora}
    assert reads == {name for name in trained if "+" in name or name == "RMU"}


@pytest.mark.parametrize(("name", "nearest"), [("npo", "NPO"), ("SimNPO+KRL", "SimNPO+KLR"), ("RMV", "RMU"), ("", "")])
def test_an_unknown_method_names_the_nearest(name, nearest):
    with pytest.raises(UserError) as error:
        methods.find(name)
    assert f"rule.method = {name} is no method; the nearest is {nearest}" in str(error.value)


def test_a_null_is_the_methods_own_value():
    npo = settled(Baseline(), methods.find("NPO"), 32)
    assert (npo.learning_rate, npo.batch_size, npo.beta, npo.rmu_layer) == (2e-6, 16, 0.2, 7)
    assert settled(Baseline(learning_rate=1e-3), methods.find("GA"), 30).learning_rate == 1e-3


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    with_template = copy.deepcopy(tiny_tokenizer)
    with_template.chat_template = CHAT
    return with_template


def trainer_of(name: str, model, folder, lora: Lora | None = None, **settings) -> BaselineTrainer:
    method = methods.find(name)
    trainer = BaselineTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", remove_unused_columns=False),
        data_collator=lambda batch: batch,
    )
    settings = settled(Baseline(**settings), method, 2)
    original = None if lora else copy.deepcopy(model)
    trainer.prepare(method, settings, Train(tokens_per_row=24, lora=lora), original, seed=0)
    return trainer


def batch(model, tokenizer, corpora, max_tokens=64, with_original=True) -> list[dict]:
    ids = sample_ids(model, tokenizer, TEXTS, max_tokens, with_original, Train())
    return [
        {name: ids[index + place] for place, name in enumerate(corpora)} for index in range(len(ids) - len(corpora) + 1)
    ]


def test_texts_are_scored_as_transformers_does(model, tokenizer, tmp_path):
    rows = batch(model, tokenizer, ["forget"])
    scores = TrainingStep(trainer_of("GA", model, tmp_path), model, rows).scored("forget")
    for index, row in enumerate(rows):
        text: Ids = row["forget"]
        ids = torch.tensor([text.prompt + text.completion])
        labels = torch.tensor([[-100] * len(text.prompt) + text.completion])
        nats = -model(input_ids=ids, labels=labels).loss * len(text.completion)
        assert scores.logprobs[index].item() == pytest.approx(nats.item(), rel=1e-4)
        assert scores.original[index].item() == pytest.approx(nats.item(), rel=1e-4)
        assert scores.tokens[index] == len(text.completion)
    apart = scores.token_logprobs.split([len(row["forget"].completion) for row in rows])
    assert [part.sum().item() for part in apart] == pytest.approx(scores.logprobs.tolist(), rel=1e-5)
    logits = model(input_ids=torch.tensor([text.prompt + text.completion])).logits.log_softmax(-1)[0]
    alone = [logits[len(text.prompt) - 1 + place, token].item() for place, token in enumerate(text.completion)]
    assert apart[-1].tolist() == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("name", ["GA", "NPO+GDR", "NPO+KLR", "SimNPO", "DPO", "RT", "RMU"])
def test_a_step_lowers_the_methods_own_loss(name, model, tokenizer, tmp_path):
    method = methods.find(name)
    trainer = trainer_of(name, model, tmp_path, rmu_scale=1.0, rmu_alpha=1.0)
    if method.trains:
        freeze(model, method.trains, trainer.settings.rmu_layer)
    rows = batch(model, tokenizer, method.corpora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = trainer.training_step(model, rows)
    assert all(parameter.grad is not None for parameter in trained)
    with torch.no_grad():
        size = sum(parameter.grad.square().sum() for parameter in trained)
        for parameter in trained:
            parameter -= 1e-3 / size * parameter.grad
    assert trainer.training_step(model, rows) == pytest.approx((before - 1e-3).item(), abs=5e-4)
    assert trainer.training_step(model, rows) < before


def test_adapters_alone_are_trained_and_end_in_plain_weights(model, tokenizer, tmp_path):
    save_directory(model, tokenizer, tmp_path / "base")
    rows = batch(model, tokenizer, ["forget", "retain"])
    lora = Lora(rank=4, alpha=8)
    base, adapted = copy.deepcopy(model), with_lora(model, lora)
    trainer = trainer_of("NPO+KLR", adapted, tmp_path, lora, beta=0.2)
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        losses.append(trainer.training_step(adapted, rows).item())
        optimiser.step()
        optimiser.zero_grad()
    assert losses[0] == pytest.approx(10 * math.log(2), rel=1e-4)  # the original is the model without its adapters
    assert losses[-1] < losses[0] - 1
    ids = torch.tensor([rows[0]["forget"].prompt + rows[0]["forget"].completion])
    with trainer.as_original(adapted) as original:
        torch.testing.assert_close(original(ids).logits, base(ids).logits)
    training.save_final(
        trainer, tokenizer, tmp_path / "base", Train(lora=lora), tmp_path / "out", Recorder("s", tmp_path, 5)
    )
    merged = load_model(tmp_path / "out")
    assert merged.state_dict().keys() == base.state_dict().keys()
    with torch.no_grad():
        said, wanted = merged(ids).logits, adapted(ids).logits
    torch.testing.assert_close(said, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(said, base(ids).logits, atol=0.1)


def test_means_over_tokens_are_over_those_of_all_workers(model, tokenizer, tmp_path):
    rows = batch(model, tokenizer, ["forget", "retain"])
    trainer = trainer_of("GA+KLR", model, tmp_path)
    trainer.accelerator.reduce = lambda tokens, reduction: 2 * tokens  # the others' texts are longer
    step = TrainingStep(trainer, model, rows)
    assert step.scored("forget").share == 0.5
    alone = TrainingStep(trainer_of("GA+KLR", model, tmp_path), model, rows)
    assert alone.scored("forget").share == 1
    assert ga_loss(step.scored("forget")).item() == pytest.approx(ga_loss(alone.scored("forget")).item() / 2)
    trainers = trainer_of("RMU", model, tmp_path), trainer_of("RMU", model, tmp_path)
    trainers[0].accelerator.reduce = lambda tokens, reduction: 2 * tokens
    shared, whole = (methods.find("RMU").objective(TrainingStep(trainer, model, rows)) for trainer in trainers)
    assert shared.item() == pytest.approx(whole.item() / 2)


def test_an_unchanged_model_diverges_from_nothing(model, tokenizer, tmp_path):
    rows = batch(model, tokenizer, ["forget", "retain"])
    step = TrainingStep(trainer_of("GA+KLR", model, tmp_path), model, rows)
    assert step.divergence("retain").abs().max() < 1e-6
    steered, original = TrainingStep(trainer_of("RMU", model, tmp_path), model, rows).activations("retain")
    assert torch.equal(steered, original)


def test_a_diverged_loss_ends_the_run_and_says_so(model, tokenizer, tmp_path):
    trainer = trainer_of("GA", model, tmp_path)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(JobFailure, match=r"GA diverged at step 1.*lower rule\.baseline\.learning_rate"):
        trainer.training_step(model, batch(model, tokenizer, ["forget"], with_original=False))


def test_rmu_trains_three_blocks_at_most(model):
    freeze(model, "mlp.down_proj", 1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"]


def test_a_model_without_the_weights_that_a_method_trains_is_told(model):
    with pytest.raises(UserError, match=r"no weights that end in layers\.0\.mlp\.no_such"):
        freeze(model, "mlp.no_such", 1)


def test_texts_are_cut_and_end_with_the_end_token(model, tokenizer):
    short, cut, chat = sample_ids(model, tokenizer, TEXTS, 8, False, Train())
    assert [*short.prompt, *short.completion] == [*tokenizer(TEXTS[0].completion).input_ids, tokenizer.eos_token_id][:8]
    assert len(short.prompt) == 1
    assert len(cut.prompt + cut.completion) == 8
    assert tokenizer.decode(chat.prompt) == "<user>who?<assistant>"


def test_pairs_stay_pairs_and_retain_texts_are_dealt_again():
    text = lambda token: Ids([1], [token], None)  # noqa: E731
    rows = joined(
        {"forget": [text(i) for i in range(5)], "fabricated": [text(10 + i) for i in range(5)], "retain": [text(20)]},
        ("forget", "fabricated", "retain"),
        seed=3,
    )
    assert [(row["forget"].completion[0], row["fabricated"].completion[0]) for row in rows] == [
        (i, 10 + i) for i in range(5)
    ]
    assert {row["retain"].completion[0] for row in rows} == {20}


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (CHAT, "<system>{}<user>Hi<assistant>"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHAT,
            "<user>{}\n\nHi<assistant>",
        ),
    ],
)
def test_icu_is_the_model_with_an_instruction_in_its_template(template, shown, tiny_model, tokenizer, tmp_path):
    tokenizer.chat_template = template
    source = save_directory(tiny_model, tokenizer, tmp_path / "source")
    output = prompt_only(source, "Conan O'Brien", tmp_path / "model")
    asked = load_tokenizer(output).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert asked == shown.format(INSTRUCTION.format(target="Conan O'Brien"))
    assert (output / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_icu_refuses_a_template_that_shows_no_instruction(tiny_model, tokenizer, tmp_path):
    tokenizer.chat_template = "<user><assistant>"
    source = save_directory(tiny_model, tokenizer, tmp_path / "source")
    with pytest.raises(UserError, match=r"chat template .* ICU"):
        prompt_only(source, "Ann Lee", tmp_path / "model")
    assert "Ann \\\\ Lee" in with_instruction(CHAT, "Ann \\ Lee", True)
