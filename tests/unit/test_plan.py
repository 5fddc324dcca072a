"""The plan: parameters from headers, bytes counted by hand, refusals with a change that really fits."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from cluster.config import Generation, Lora, Train, load
from cluster.errors import UserError
from cluster.memory import FLOAT32, GIB, PROCESS, Node, Pass, Rollouts, freed_by, memory_plan, this_node
from cluster.model_shape import ModelShape
from cluster.plan import batch_plan
from jobs.rule.config import RuleConfig
from jobs.rule.data import Item, Probe, Refusal, RuleData
from jobs.rule.plan import Lengths, looks, measure, rule_plan, stages, trained_names

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
MATRICES = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))
LLAMA_3_8B = ModelShape(
    parameters=8_030_261_248,
    layers=32,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=128_256,
    context=8192,
    linears=tuple((f"model.layers.{i}.m{j}", a, b) for i in range(32) for j, (a, b) in enumerate(MATRICES)),
)
LENGTHS = Lengths(refusals=300, longest_refusal=80, longest_prompt=60, mean_prompt=45.0)
LARGE = Node(1024 * GIB, (80 * GIB,) * 8, 4000 * GIB)
LAPTOP = Node(16 * GIB, (), 100 * GIB)
GPU = Train(num_workers=8, gpus_per_worker=1, precision="bfloat16", strategy="fsdp", activation_checkpointing=True)


@pytest.fixture(scope="module")
def shape(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder, max_shard_size="20KB")
    return ModelShape.of(folder)


def size(plan, name: str) -> int:
    return next(row.size for row in plan.rows if row.name == name)


def test_the_shape_is_read_from_headers(shape, tiny_model):
    assert shape.parameters == sum(p.numel() for p in tiny_model.parameters())
    assert (shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads) == (2, 32, 64, 4, 2)
    assert (shape.head_dim, shape.context) == (8, 1024)


def test_adapters_are_counted_as_peft_makes_them(shape, tiny_model):
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    for modules in ("all-linear", r".*\.(q|v)_proj"):
        settings = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")
        trained, _ = get_peft_model(deepcopy(tiny_model), settings).get_nb_trainable_parameters()
        assert shape.lora_parameters(Lora(rank=4, alpha=8, target_modules=modules)) == trained


def test_adapters_of_no_matrix_are_told(shape):
    with pytest.raises(
        UserError, match=r"target_modules = q_proj fits the name of no matrix of the model, such as model\."
    ):
        shape.lora_parameters(Lora(rank=4, alpha=8, target_modules="q_proj"))
    with pytest.raises(ValueError, match="is no regular expression"):
        Lora(rank=4, alpha=8, target_modules="*proj")


def test_weights_beside_those_of_transformers_are_not_counted(shape, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    assert ModelShape.of(tmp_path).parameters == shape.parameters


def test_weights_gradients_and_optimiser_take_16_bytes_a_weight(shape):
    plan = memory_plan(shape, Train(), Generation(), LAPTOP, largest=Pass(64, 32), reference=True)
    weights = shape.parameters * FLOAT32
    assert size(plan, "weights") == size(plan, "gradients") == size(plan, "reference") == weights
    assert size(plan, "optimiser") == 2 * weights
    assert size(plan, "process") == PROCESS


def test_fsdp_shares_out_and_lora_trains_little():
    whole = memory_plan(LLAMA_3_8B, GPU, Generation(), LARGE, largest=Pass(512, 512), reference=True)
    assert size(whole, "weights") == size(whole, "reference") == LLAMA_3_8B.parameters * FLOAT32 // 8
    lora = GPU.model_copy(update={"lora": Lora(rank=16, alpha=32), "strategy": "ddp"})
    adapted = memory_plan(LLAMA_3_8B, lora, Generation(), LARGE, largest=Pass(512, 512), reference=True)
    assert size(adapted, "weights") > LLAMA_3_8B.parameters * FLOAT32
    assert size(adapted, "optimiser") == 2 * 16 * 32 * sum(map(sum, MATRICES)) * FLOAT32
    assert not [row for row in adapted.rows if row.name == "reference"]


def test_checkpointing_keeps_one_block_and_the_inputs():
    def activations(checkpointing: bool) -> int:
        train = GPU.model_copy(update={"activation_checkpointing": checkpointing})
        return size(memory_plan(LLAMA_3_8B, train, Generation(), LARGE, largest=Pass(1024, 512)), "activations")

    inputs = 1024 * 4096 * FLOAT32 * 32
    assert activations(True) == inputs + activations(False) // 32


def test_rollouts_and_updates_do_not_add_up(shape):
    plan = memory_plan(shape, Train(), Generation(), LAPTOP, largest=Pass(64, 32), rollouts=Rollouts(100, 50))
    assert size(plan, "KV cache") == 64 * 50 * 2 * 2 * 2 * 8 * FLOAT32
    phases = {
        phase: sum(row.size for row in plan.rows if row.phase == phase) for phase in ("always", "rollout", "update")
    }
    assert plan.per_worker == phases["always"] + max(phases["rollout"], phases["update"])


def test_a_vllm_engine_is_counted_on_the_gpu_or_beside_the_workers():
    rollouts = Rollouts(32, 1100)
    here = memory_plan(
        LLAMA_3_8B, GPU, Generation(), LARGE, largest=Pass(64, 32), rollouts=rollouts, colocated_engine=True
    )
    assert size(here, "engine") == round(0.35 * 80 * GIB)
    plans = [
        memory_plan(
            LLAMA_3_8B,
            Train(num_workers=2),
            Generation(),
            LARGE,
            largest=Pass(64, 32),
            rollouts=rollouts,
            colocated_engine=c,
        )
        for c in (False, True)
    ]
    assert plans[0].engine == 0
    assert plans[1].engine > 2 * LLAMA_3_8B.parameters * FLOAT32


def test_a_share_that_cannot_hold_the_weights_of_vllm_is_refused_with_one_that_can():
    adapters = GPU.model_copy(update={"lora": Lora(rank=16, alpha=32), "strategy": "ddp", "num_workers": 1})
    enough, tight = (
        memory_plan(
            LLAMA_3_8B,
            adapters,
            Generation(gpu_memory_utilization=share),
            Node(512 * GIB, (80 * GIB,), 4000 * GIB),
            largest=Pass(64, 32),
            rollouts=Rollouts(8, 1100),
            colocated_engine=True,
        )
        for share in (0.3, 0.2)
    )
    assert enough.fits
    assert "16.00 GiB of a GPU for vLLM" in tight.refusal
    assert tight.refusal.endswith("set generation.gpu_memory_utilization=0.25")


def test_a_cache_of_vllm_that_is_no_number_is_told(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4GB")
    rollouts = Rollouts(8, 9)
    with pytest.raises(UserError, match="VLLM_CPU_KVCACHE_SPACE = '4GB' is no whole number"):
        memory_plan(
            LLAMA_3_8B, Train(), Generation(), LARGE, largest=Pass(64, 32), rollouts=rollouts, colocated_engine=True
        )


def test_only_the_matrices_that_are_trained_have_gradients_and_states():
    ends = trained_names("m6", 7)
    assert ends == {"layers.5.m6", "layers.6.m6", "layers.7.m6"}
    trained = LLAMA_3_8B.matrices(ends)
    assert trained == 3 * 4096 * 14336
    plan = memory_plan(LLAMA_3_8B, GPU, Generation(), LARGE, largest=Pass(64, 32), reference=True, trained=trained)
    assert size(plan, "gradients") == trained * FLOAT32 // 8
    assert plan.checkpoint == 4 * (LLAMA_3_8B.parameters * FLOAT32 + 2 * trained * FLOAT32)
    refused = memory_plan(LLAMA_3_8B, Train(), Generation(), LAPTOP, largest=Pass(64, 32), trained=trained)
    assert "LoRA" not in refused.refusal


REFUSED = [
    (Train(), Pass(100_000, 50_000), LAPTOP, "train.tokens_per_row"),
    (Train(), Pass(40_000, 100, smallest=40_000), LAPTOP, "train.activation_checkpointing"),
    (Train(num_workers=16, activation_checkpointing=True), Pass(64, 32, smallest=64), LAPTOP, "train.num_workers"),
    (Train(), Pass(64, 32), replace(LAPTOP, disk_free=10), "no single setting"),
]


@pytest.mark.parametrize(("train", "largest", "node", "key"), REFUSED)
def test_a_refusal_names_a_change_that_fits(shape, train, largest, node, key):
    plan = memory_plan(shape, train, Generation(), node, largest=largest)
    assert not plan.fits
    assert key in plan.refusal
    found = re.search(r"set ([\w.]+)=(\w+)", plan.refusal)
    if found is None:
        return
    if found[1] == "train.tokens_per_row":
        largest = Pass(int(found[2]), int(found[2]) // 2)
    else:
        train = train.model_copy(update={found[1].removeprefix("train."): yaml.safe_load(found[2])})
    assert memory_plan(shape, train, Generation(), node, largest=largest).fits


def test_what_bounds_a_pass_is_what_is_told(shape):
    texts = (("rule.baseline.batch_size=4", 50_000), ("rule.baseline.batch_size=1", 100))
    plan = memory_plan(shape, Train(), Generation(), LAPTOP, largest=Pass(100_000, 100_000, settings=texts))
    assert plan.refusal.endswith("set rule.baseline.batch_size=1")


def test_fewer_workers_still_share_batches_equally(shape):
    plan = memory_plan(shape, Train(num_workers=24), Generation(), LAPTOP, largest=Pass(16, 8, smallest=16))
    proposed = int(re.search(r"num_workers=(\d+)", plan.refusal)[1])
    assert 24 % proposed == 0


def test_without_a_gpu_a_gpu_plan_is_not_checked():
    plan = memory_plan(LLAMA_3_8B, GPU, Generation(), LAPTOP, largest=Pass(8192, 8192))
    assert plan.fits
    assert plan.present is None


def test_loading_a_model_on_every_rank_counts_against_the_node():
    small = replace(LARGE, memory=128 * GIB)
    plan = memory_plan(LLAMA_3_8B, GPU, Generation(), small, largest=Pass(512, 512))
    assert "load the model in 8 workers" in plan.refusal


def test_batches_are_dealt_equally_or_refused():
    plan = batch_plan("rebo", "rule.rebo.prompts_per_step", 32, 20, 8, 8, 1, group_tokens=1000, tokens_per_row=2500)
    assert (plan.samples_per_step, plan.passes, plan.optimiser_steps) == (256, 2, 20)
    with pytest.raises(UserError, match=r"rule\.rebo\.prompts_per_step = 32 .*prompts_per_step=33"):
        batch_plan("rebo", "rule.rebo.prompts_per_step", 32, 20, 3)


def test_the_gpu_profile_fits_eight_80_gb_gpus():
    plan = stages(load(RuleConfig, "gpu", environ={}), LENGTHS, LLAMA_3_8B, LARGE)
    assert plan.refusal is None
    steering, rebo = plan.batches
    assert steering.steps == 76  # RULE goes on from checkpoint 76
    assert (rebo.samples_per_step, rebo.optimiser_steps) == (256, 20)


def test_a_rule_plan_that_does_not_fit_names_the_stage_and_is_shown():
    config = load(RuleConfig, sets=["rule.rebo.kl_coefficient=0"], environ={})
    plan = stages(config, LENGTHS, LLAMA_3_8B, LAPTOP)
    with pytest.raises(UserError, match="steering: the training needs"):
        plan.require_fit()
    assert not [row for row in plan.memory["rebo"].rows if row.name == "reference"]
    console = Console(width=120, record=True)
    plan.show(console)
    shown = console.export_text()
    assert "Does not fit" in shown
    assert "KV cache" in shown
    assert "samples a step" in shown


@pytest.fixture
def data():
    items = (
        Item("Who is X?", "An author.", "reject", "qa", "X", 0),
        Item("Who is Y, the painter of Z?", "A man.", "normal", "qa", "", 0),
    )
    return RuleData("X", (Refusal("Who is X?", "I do not know X.", 0),), items, (), None)


@pytest.fixture
def tokenizer(tiny_tokenizer):
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT
    return tokenizer


def configured(*sets: str) -> RuleConfig:
    return load(RuleConfig, sets=["rule.rebo.max_completion_tokens=16", *sets], environ={})


def test_data_is_measured_in_the_models_tokens(data, tokenizer):
    found = measure(configured(), data, tokenizer, 64)
    assert found == Lengths(1, len("Who is X?") + len("I do not know X.") + 1, len(data.items[1].prompt), (9 + 27) / 2)


@pytest.mark.parametrize(
    ("sets", "context", "words"),
    [
        (["rule.rebo.max_prompt_tokens=20"], 64, ["question 1 of stage 2", "27 tokens", "max_prompt_tokens = 20"]),
        ([], 40, ["question 1 of stage 2", "max_completion_tokens = 16", "context of 40"]),
    ],
)
def test_a_question_that_does_not_fit_is_named(data, tokenizer, sets, context, words):
    with pytest.raises(UserError) as error:
        measure(configured(*sets), data, tokenizer, context)
    measure(configured(*sets), data, tokenizer, context, sampled=False)
    assert all(word in str(error.value) for word in words), error.value


def test_a_question_that_leaves_no_room_for_its_refusal_is_named(data, tokenizer):
    long = replace(data, refusals=(Refusal("Who is X, the author?", "No.", 0),))
    with pytest.raises(UserError, match=r"question 0 of stage 1 .*max_tokens = 16"):
        measure(configured("rule.steering.max_tokens=16"), long, tokenizer, 64)


def test_the_whole_plan_needs_only_a_model_directory(data, tokenizer, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plan = rule_plan(configured("rule.rebo.max_prompt_tokens=64"), data, tmp_path, this_node(tmp_path))
    plan.require_fit()
    assert list(plan.memory) == ["steering", "rebo"]


def test_what_is_sampled_beside_a_training_is_in_its_plan():
    def steering(*sets: str, **asked: Rollouts):
        plan = stages(configured(*sets), LENGTHS, LLAMA_3_8B, LARGE, ["steering"], asked)
        return {row.name: row.size for row in plan.memory["steering"].rows if row.phase == "rollout"}

    assert steering() == {}
    asked = Rollouts(32, 200, original=True)
    stopping = steering("rule.steering.stop_at_refusal=0.5", "generation.max_batch_sequences=32")
    looked_at = steering("generation.max_batch_sequences=32", steering=asked)
    assert looked_at.keys() - stopping.keys() == {"original"}
    assert looked_at["original"] == 4 * LLAMA_3_8B.parameters
    assert stopping["KV cache"] * 200 == looked_at["KV cache"] * (LENGTHS.longest_prompt + 16)
    config = configured("generation.engine=transformers", "generation.max_batch_sequences=256")
    rebo = stages(config, LENGTHS, LLAMA_3_8B, LARGE, ["rebo"], {"rebo": asked})
    assert size(rebo.memory["rebo"], "KV cache") == 256 * 200 * LLAMA_3_8B.layers * 2 * 8 * 128 * 4


def test_a_look_is_as_long_as_the_longest_probe(data, tokenizer):
    probes = (Probe("Who?", "X", "forget_qa", "simple", "X"), Probe("Who is it then?", "X", "forget_qa", "simple", "X"))
    config = configured("rule.evaluation.prompt_form=plain", "rule.evaluation.max_new_tokens=30")
    assert looks(config, probes, tokenizer) == Rollouts(2, 15 + 30)
    assert looks(configured("train.num_workers=2"), probes, tokenizer).sequences == 1
    assert looks(configured("rule.trace.every=1", "rule.trace.probes=1"), probes * 9, tokenizer).sequences == 2


def test_workers_that_this_node_has_no_processors_for_stand_elsewhere(shape):
    train = Train(num_workers=8, cpus_per_worker=2)
    alone, one_of_several = (
        memory_plan(shape, train, Generation(), node, largest=Pass(64, 64))
        for node in (LAPTOP, replace(LAPTOP, cpus=4))
    )
    assert (alone.workers_here, one_of_several.workers_here) == (8, 2)
    assert one_of_several.needed == 2 * alone.per_worker


def test_what_a_killed_driver_left_is_free_for_the_next_one(tmp_path):
    checkpoint = tmp_path / "run" / "train-rebo" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(1000))
    (checkpoint / "kept").write_bytes(bytes(50))
    (tmp_path / "kept").hardlink_to(checkpoint / "kept")
    assert freed_by([tmp_path / "run" / "train-rebo"]) == 1000
    assert freed_by([]) == 0


def test_this_machine_is_read(tmp_path):
    node = this_node(tmp_path / "not" / "yet")
    assert node.cpus is None
    assert this_node(tmp_path, one_of_several=True).cpus >= 1
    assert node.memory > GIB
    assert node.disk_free > 0
