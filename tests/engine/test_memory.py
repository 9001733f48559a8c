"""The memory plan: counts against transformers' own modules, bytes against what is allocated."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from engine import memory as plan
from engine import train
from engine.model.adapter import attach_adapter
from engine.model.sequences import Sequences
from engine.policy import load_policy
from engine.rollout import sample_images
from engine.rollout.step import DecodeStep
from engine.settings.errors import UserError
from engine.settings.train import TrainConfig
from engine.weights.read import read_config
from kernels.chunked_head import HeadInputs, Needs, _chunk_rows
from tests.engine.weights.original_layout import original_config, small_model, write_original

# hidden_size, intermediate_size, layers, heads; then what the original's config.json leaves out
PUBLISHED = {
    "1b": (2048, 5632, 24, 16),
    "7b": (4096, 11008, 30, 32),
}


@pytest.fixture(
    params=[(size, layout) for size in PUBLISHED for layout in ("original", "transformers")]
)
def published(request, tmp_path) -> tuple[str, Path]:
    """Janus-Pro's size and a folder with nothing but its config.json."""
    size, layout = request.param
    hidden, inner, layers, heads = PUBLISHED[size]
    if layout == "original":
        language = {
            "max_position_embeddings": 16384,
            "num_hidden_layers": layers,
            "vocab_size": 102400,
        }
        if size == "1b":  # 7B's are the defaults, which are not written
            language |= {"hidden_size": hidden, "intermediate_size": inner,
                         "num_attention_heads": heads, "num_key_value_heads": heads}  # fmt: skip
        values = original_config(
            language=language, width=hidden, codes=16384, code_width=8, tower=1024, size=384
        )
    else:
        values = full_config(size).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    return size, tmp_path


def full_config(size: str) -> JanusConfig:
    hidden, inner, layers, heads = PUBLISHED[size]
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=102400,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=16384,
        ),
        vision_config=JanusVisionConfig(projection_dim=hidden),
        vq_config=JanusVQVAEConfig(projection_dim=hidden, image_token_embed_dim=hidden),
        tie_word_embeddings=False,
    )


def test_counts_of_the_published_models_are_those_of_transformers(published):
    size, folder = published
    with torch.device("meta"):
        theirs = JanusForConditionalGeneration(full_config(size))

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    parts, counts = theirs.model, plan.count_weights(read_config(folder))
    assert counts.language_model == count(parts.language_model, theirs.lm_head)
    assert counts.image_tokenizer == count(parts.vqmodel)
    assert counts.image_modules == count(
        parts.generation_embeddings, parts.generation_aligner, parts.generation_head
    )
    assert counts.policy == count(theirs) - count(parts.vision_model, parts.aligner)
    # The published sizes, by hand: embeddings and head, then attention, feed-forward and norms.
    hidden, inner, layers, _ = PUBLISHED[size]
    each = 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    assert counts.language_model == 2 * 102400 * hidden + layers * each + hidden
    assert counts.language_model == {"1b": 1_652_656_128, "7b": 6_910_365_696}[size]


def test_memory_of_the_published_models(published):
    size, folder = published
    model = read_config(folder)
    config = TrainConfig(model=str(folder), prompts_per_step=2, num_generations=4)
    counts = plan.count_weights(model)
    memory = plan.memory_needed(model, counts, config, torch.bfloat16, "cuda")
    each_token = {"1b": 196_608, "7b": 491_520}[size]  # research/rollout.md
    assert plan.trunk_shape(model).kv_bytes(torch.bfloat16) == each_token
    assert list(memory.rollout.values()) == [16 * 576 * each_token]
    assert memory.held["weights"] == 2 * counts.policy
    assert memory.held["reference copy"] == memory.held["gradients"] == 2 * counts.language_model
    assert memory.held["Adam's two moments"] == 4 * counts.language_model
    assert memory.peak >= sum(memory.held.values()) + 16 * 576 * each_token
    wide = plan.memory_needed(model, counts, config, torch.float32, "cuda")
    assert wide.held == {name: 2 * size for name, size in memory.held.items()}
    alone = TrainConfig(model=str(folder), beta=0, train_levels=["token"], micro_batch_size=1)
    alone = plan.memory_needed(model, counts, alone, torch.bfloat16, "cuda")
    assert alone.held["reference copy"] == 0
    assert list(alone.update.values()) == [576 * plan.activation_bytes(model, torch.bfloat16)]


def test_plan_prints_counts_and_memory_without_weights(published, capsys, tmp_path):
    size, folder = published
    runs = tmp_path / "runs"
    where = ["--model", str(folder), "--output_dir", str(runs)]
    train.main(["--plan", *where, "--dtype", "bfloat16", "--device", "cpu"])
    text = capsys.readouterr().out
    assert {"1b": "1,652,656,128", "7b": "6,910,365,696"}[size] in text
    for word in ("KV cache, 128 rows of 576", "reference copy", "Adam", "gradients", "on cpu"):
        assert word in text
    assert (
        f"{plan.trunk_shape(read_config(folder)).kv_bytes(torch.bfloat16) / 1024:.1f} KiB (16-bit)"
        in text
    )
    assert not list(folder.glob("*.safetensors")) and not runs.exists()


def test_plan_counts_the_tower_that_is_in_the_files(tmp_path, capsys):
    model = small_model(layers=1)
    tensors = write_original(tmp_path, model, form="bin", shards=2)
    tower = sum(t.numel() for k, t in tensors.items() if k.startswith(("vision_", "aligner.")))
    train.main(["--plan", "--model", str(tmp_path)])
    assert f"stays on disk{tower:>32,}".split()[-1] in capsys.readouterr().out.replace("\n", " ")


def test_a_run_that_cannot_fit_is_refused_with_the_numbers(published, tmp_path, monkeypatch):
    _, folder = published
    arguments = ["--model", str(folder), "--output_dir", str(tmp_path / "runs"), "--device", "cpu"]
    monkeypatch.setattr(plan, "device_memory", lambda device: (device, 24 * plan.GIB))
    with pytest.raises(UserError) as caught:
        train.main([*arguments, "--dtype", "bfloat16"])
    message = str(caught.value)
    model = read_config(folder)
    config = TrainConfig(model=str(folder))
    needed = plan.memory_needed(model, plan.count_weights(model), config, torch.bfloat16, "cpu")
    assert "\n" not in message and f"at least {needed.peak / plan.GIB:.1f} GiB" in message
    assert "has 24.0" in message and "gradients" in message and "activations" in message
    assert not (tmp_path / "runs").exists()
    # With room enough it goes on, to the weights that are not there.
    monkeypatch.setattr(plan, "device_memory", lambda device: (device, 10**15))
    with pytest.raises(UserError, match="no such file"):
        train.main(arguments)


def test_device_memory():
    name, size = plan.device_memory("cpu")
    assert name == "cpu" and 2**28 < size < 2**50
    name, size = plan.device_memory("cuda:63")
    assert size is None and "lacks" in name


def test_kv_cache_and_chunk_are_what_is_allocated(pair, make_prompts, monkeypatch):
    _, policy = pair()
    made = []
    allocate = DecodeStep._allocate

    def counted(self, *args):
        allocate(self, *args)
        made.append(self.suffix.nbytes)  # keys and values of all layers

    monkeypatch.setattr(DecodeStep, "_allocate", counted)
    prompts = make_prompts(9) * 4  # they share their prefix: rows hold image tokens only
    sample_images(policy, prompts)
    assert sum(made) == 2 * 4 * 16 * policy.shape.kv_bytes(torch.float32)

    config = TrainConfig(prompts_per_step=2, num_generations=2)
    counts = plan.count_weights(policy.config)
    memory = plan.memory_needed(policy.config, counts, config, torch.float32, "cpu")
    assert sum(memory.rollout.values()) == sum(made)
    weight = policy.lm_head.weight
    ids = torch.zeros(1, dtype=torch.int64)
    head = HeadInputs(weight[:1], weight, ids, None, None, None, 1.0, None)
    rows = _chunk_rows(head, Needs(weight=True))
    assert memory.update["logits chunk of the text head"] == rows * len(weight) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_a_tight_lower_bound(dtype):
    """What autograd really keeps for an image-level forward."""
    policy = load_policy("tiny", dtype=dtype)
    owned = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in owned:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    prompts = [torch.tensor([0, 9 + i, 4]) for i in range(4)]
    image_ids = torch.randint(512, (4, policy.image_tokens))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy.completion_hidden(Sequences("token", prompts, image_ids))
    measured = sum(x.untyped_storage().nbytes() for x in kept.values())
    tokens = 4 * policy.image_tokens
    assert 0.65 * measured < tokens * plan.activation_bytes(policy.config, dtype) < measured


@pytest.mark.parametrize("names", [[], ["q_proj"], ["k_proj", "down_proj"]])
def test_an_adapter_s_weights_are_counted_as_they_train(new_policy, names):
    """And neither a reference nor gradients and moments of the rest are."""
    policy = new_policy(kv_heads=2)
    config = TrainConfig(use_peft=True, lora_r=4, lora_target_modules=names, beta=0.1)
    counts = plan.count_weights(policy.config)
    attach_adapter(policy, r=4, alpha=8, targets=config.adapted_layers)
    trained = sum(p.numel() for p in policy.trainable().values())
    assert plan.adapter_weights(policy.config, config) == trained
    memory = plan.memory_needed(policy.config, counts, config, torch.bfloat16, "cpu")
    assert memory.held["gradients"] == 4 * trained and memory.held["reference copy"] == 0
    assert memory.held["Adam's two moments"] == 8 * trained
    copies = [
        layer.nbytes
        for part in policy.weights.layers()
        for layer in (part.qkv.weight, part.out.weight, part.up.weight, part.down.weight)
    ]
    least = memory.rollout["merged weights"]  # of the layers adapted, in 2 bytes
    assert least <= sum(copies) / 2
    assert names or least == sum(copies) / 2
