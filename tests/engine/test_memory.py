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

from engine import train
from engine.memory import fits
from engine.memory.counts import count_weights
from engine.memory.needs import Lengths, Run, activation_bytes, memory_needed
from engine.model.adapter import attach_adapter
from engine.model.policy import trunk_shape
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

    parts, counts = theirs.model, count_weights(read_config(folder), TrainConfig())
    assert counts.language_model == count(parts.language_model, theirs.lm_head)
    assert counts.trunk == sum(
        p.numel() for p in parts.language_model.layers.parameters() if p.ndim == 2
    )
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


LENGTHS = Lengths(first=300, second=100, plan=64, image=576)


def needed(folder, dtype=torch.bfloat16, device="cuda", batch=8, **flags):
    flags = {"prompts_per_step": 2, "num_generations": 4} | flags
    config, model = TrainConfig(model=str(folder), **flags), read_config(folder)
    run = Run(model, count_weights(model, config), LENGTHS, config, dtype, device)
    return memory_needed(run, micro_batch_size=batch, rollout_size=8)


def test_memory_of_the_published_models(published):
    size, folder = published
    model = read_config(folder)
    counts = count_weights(model, TrainConfig())
    memory = needed(folder)
    each_token = {"1b": 196_608, "7b": 491_520}[size]  # research/rollout.md
    assert trunk_shape(model).kv_bytes(torch.bfloat16) == each_token
    image = memory.stages["image tokens"]
    assert image["KV cache, 16 rows of 576 tokens"] == 16 * 576 * each_token
    assert memory.held["weights"] == 2 * counts.policy
    assert memory.held["reference policy"] == 2 * counts.language_model
    # The bits that bf16 lacks, and two fp32 moments; what other optimizers keep.
    state = "optimizer's state"
    assert memory.held[state] == (2 + 4 + 4) * counts.language_model
    half = needed(folder, optim_state_dtype="bfloat16").held[state]
    assert half == (2 + 2 + 2) * counts.language_model
    assert needed(folder, torch.float32).held[state] == 8 * counts.language_model
    assert needed(folder, optim="adamw_torch").held[state] == 4 * counts.language_model
    assert needed(folder, optim="adamw_8bit").held[state] < 2.1 * counts.language_model
    # Nothing of a stage is there in the next.
    update = memory.stages["update, token level"]
    assert update["gradients"] == 2 * counts.language_model
    sums = [sum(stage.values()) for stage in memory.stages.values()]
    assert memory.peak == sum(memory.held.values()) + max(sums)
    assert sum(memory.stages[memory.largest].values()) == max(sums)
    alone = needed(folder, beta=0, train_levels=["token"], batch=1)
    assert alone.held["reference policy"] == 0 and "update, semantic level" not in alone.stages


def test_what_saves_memory_is_in_the_plan(published):
    size, folder = published
    plain = needed(folder)

    def activations(memory) -> int:
        return sum(b for k, b in memory.stages["update, token level"].items() if "activations" in k)

    saved = activations(needed(folder, gradient_checkpointing=True))
    assert saved < activations(plain) / 8
    assert activations(needed(folder, batch=4)) == activations(plain) / 2
    offloaded = needed(folder, ref_offload=True).held["reference policy"]
    assert offloaded < 0.35 * plain.held["reference policy"]
    lora = needed(folder, use_peft=True)
    assert lora.held["reference policy"] == 0
    assert lora.held["optimizer's state"] == 2 * lora.held["adapter"] < 0.04 * plain.held["weights"]
    # Published LoRA on the large one fits a small card; nothing else does.
    options = {"gradient_checkpointing": True, "prompts_per_step": 1, "batch": 1}
    if size == "7b":
        assert needed(folder, use_peft=True, lora_merge="in_place", **options).peak < 24e9
        assert needed(folder, **options).peak > 80e9


def test_plan_prints_counts_and_memory_without_weights(published, capsys, tmp_path):
    size, folder = published
    runs = tmp_path / "runs"
    where = ["--model", str(folder), "--output_dir", str(runs)]
    train.main(["--plan", *where, "--dtype", "bfloat16", "--device", "cuda:63"])
    text = capsys.readouterr().out
    assert {"1b": "1,652,656,128", "7b": "6,910,365,696"}[size] in text
    words = ("KV cache, 128 rows of 576", "reference policy", "optimizer's state", "gradients")
    for word in (*words, "on cuda:63"):
        assert word in text
    each = trunk_shape(read_config(folder)).kv_bytes(torch.bfloat16)
    assert f"{each / 1024:.1f} KiB (16-bit)" in text
    assert not list(folder.glob("*.safetensors")) and not runs.exists()


def test_plan_counts_the_tower_that_is_in_the_files(tmp_path, capsys):
    model = small_model(layers=1)
    tensors = write_original(tmp_path, model, form="bin", shards=2)
    tower = sum(t.numel() for k, t in tensors.items() if k.startswith(("vision_", "aligner.")))
    train.main(["--plan", "--model", str(tmp_path)])
    assert f"stays on disk{tower:>32,}".split()[-1] in capsys.readouterr().out.replace("\n", " ")


def test_plan_says_what_card_holds_a_run(published, capsys):
    size, folder = published
    flags = ["--plan", "--model", str(folder), "--device", "cuda:63", "--dtype", "bfloat16"]
    flags += ["--prompts_per_step", "1", "--micro_batch_size", "1", "--gradient_checkpointing"]
    train.main([*flags, "--use_peft", "--lora_merge", "in_place"])
    assert "Cards that hold it: 24 GB, 40 GB, 80 GB, 141 GB." in capsys.readouterr().out
    train.main([*flags, "--beta", "0"])
    cards = {"1b": "40 GB, 80 GB, 141 GB", "7b": "141 GB"}[size]
    assert f"Cards that hold it: {cards}." in capsys.readouterr().out


def test_a_run_that_cannot_fit_is_refused_with_the_numbers(published, tmp_path, monkeypatch):
    _, folder = published
    arguments = ["--model", str(folder), "--output_dir", str(tmp_path / "runs"), "--device", "cpu"]
    monkeypatch.setattr(fits, "device_memory", lambda device: (device, 12 * fits.GIB))
    with pytest.raises(UserError) as caught:
        train.main([*arguments, "--dtype", "bfloat16"])
    message = str(caught.value)
    config = TrainConfig(model=str(folder), device="cpu")
    least = fits.memory_of(config, torch.bfloat16, micro_batch_size=1, rollout_size=1)
    assert "\n" not in message and f"needs {least.peak / fits.GIB:.1f} GiB" in message
    assert "has 12.0" in message and "optimizer's state" in message and "--use_peft" in message
    assert not (tmp_path / "runs").exists()
    # With room enough it goes on, to the weights that are not there.
    monkeypatch.setattr(fits, "device_memory", lambda device: (device, 10**15))
    with pytest.raises(UserError, match="no such file"):
        train.main(arguments)


def test_micro_batch_is_the_largest_that_fits(published, monkeypatch):
    _, folder = published
    config = TrainConfig(model=str(folder), beta=0, device="cpu", gradient_checkpointing=True)
    run = fits._run(config, torch.bfloat16)
    peaks = [fits._needed(run, n, 1).peak / fits.SPARE for n in range(1, 65)]
    for room, expected in ((peaks[63] + 1, 64), (peaks[31] + 1, 32), (1, 1)):
        monkeypatch.setattr(fits, "device_memory", lambda device, room=room: (device, room))
        assert fits.fitting_micro_batch(config, torch.bfloat16) == expected
    # 40 fit: two equal halves rather than 40 and 24.
    monkeypatch.setattr(fits, "device_memory", lambda device: (device, peaks[39] + 1))
    assert fits.fitting_micro_batch(config, torch.bfloat16) == 32
    monkeypatch.setattr(fits, "device_memory", lambda device: (device, None))
    assert fits.fitting_micro_batch(config, torch.bfloat16) == 64


def test_device_memory():
    name, size = fits.device_memory("cpu")
    assert name == "cpu" and 2**28 < size < 2**50
    name, size = fits.device_memory("cuda:63")
    assert size is None and "lacks" in name


def test_kv_cache_and_chunk_are_what_is_allocated(pair, make_prompts, monkeypatch):
    _, policy = pair()
    made = []
    allocate = DecodeStep._allocate

    def counted(self, *args):
        allocate(self, *args)
        made.append(sum(layer.nbytes for layer in self.suffix))  # keys and values

    monkeypatch.setattr(DecodeStep, "_allocate", counted)
    prompts = make_prompts(9) * 4  # they share their prefix: rows hold image tokens only
    sample_images(policy, prompts)
    assert sum(made) == 2 * 4 * 16 * policy.shape.kv_bytes(torch.float32)

    config = TrainConfig(prompts_per_step=2, num_generations=2)
    counts, lengths = count_weights(policy.config, config), Lengths(9, 9, 40, 16)
    run = Run(policy.config, counts, lengths, config, torch.float32, "cpu")
    memory = memory_needed(run, micro_batch_size=4, rollout_size=4)
    assert memory.stages["image tokens"]["KV cache, 8 rows of 16 tokens"] == sum(made)
    weight = policy.lm_head.weight
    ids = torch.zeros(1, dtype=torch.int64)
    head = HeadInputs(weight[:1], weight, ids, None, None, None, 1.0, None)
    rows = min(_chunk_rows(head, Needs(weight=True)), 4 * 40)
    assert memory.stages["update, semantic level"]["head"] == (
        rows * len(weight) * 4 + 4 * weight.numel()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [None, [], ["q_proj", "v_proj"], ["o_proj", "down_proj"]])
def test_activations_are_what_autograd_keeps(dtype, targets):
    """Of an image-level forward, all layers, without and with checkpointing."""
    policy = load_policy("tiny", dtype=dtype)
    config = TrainConfig(use_peft=targets is not None, lora_r=4, lora_target_modules=targets or [])
    if targets is not None:
        attach_adapter(policy, r=4, alpha=8, targets=config.adapted_layers)
    owned = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    prompts = [torch.tensor([0, 9 + i, 4]) for i in range(4)]
    image_ids = torch.randint(512, (4, policy.image_tokens))

    def measured(checkpointing: bool) -> int:
        kept: dict[int, torch.Tensor] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in owned:
                kept[x.untyped_storage().data_ptr()] = x
            return x

        policy.set_training(attn_implementation="sdpa", gradient_checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            policy.completion_hidden(Sequences("token", prompts, image_ids, share=False))
        return sum(x.untyped_storage().nbytes() for x in kept.values())

    tokens, layers = 4 * (policy.image_tokens + 2), policy.shape.layers
    counts = count_weights(policy.config, config)
    layer = tokens * activation_bytes(Run(policy.config, counts, LENGTHS, config, dtype, "cpu"))
    # Before the first layer's first adapter nothing has a gradient, and so nothing is kept.
    assert 0.9 < layers * layer / measured(False) < (1.05 if targets is None else 1.1)
    inputs = tokens * policy.shape.width * dtype.itemsize
    assert 0.85 < ((layers - 1) * inputs + layer) / measured(True) < 1.1


@pytest.mark.parametrize("names", [[], ["q_proj"], ["k_proj", "down_proj"]])
def test_an_adapter_s_weights_are_counted_as_they_train(new_policy, names):
    policy = new_policy(kv_heads=2)
    config = TrainConfig(use_peft=True, lora_r=4, lora_target_modules=names, beta=0.1)
    counts = count_weights(policy.config, config)
    attach_adapter(policy, r=4, alpha=8, targets=config.adapted_layers)
    assert counts.adapters == sum(p.numel() for p in policy.trainable().values())
