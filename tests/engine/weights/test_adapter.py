"""An adapter's folder: peft's own reads ours, ours reads peft's, and a stranger's is data."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration

from engine.convert import main as convert
from engine.model.adapter import adapted
from engine.policy import load_policy
from engine.settings.errors import UserError
from engine.weights.adapter import merge_adapter, save_adapter
from engine.weights.layout import ORIGINAL, renamed
from tests.engine.adapters import fill, with_adapter
from tests.engine.test_policy import their_image_logits
from tests.engine.weights.conftest import equal_states, prompts_of, weights_in
from tests.engine.weights.original_layout import CODES

MODEL = (2, False, 2)
FIRST = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
IDS = torch.arange(16) * 7 % CODES


@pytest.fixture
def base(folders) -> str:
    return str(folders("transformers", MODEL))


@pytest.fixture
def theirs(base) -> JanusForConditionalGeneration:
    return JanusForConditionalGeneration.from_pretrained(base).eval()


@pytest.fixture
def ours(base, tmp_path):
    """An adapted policy and its folder."""
    policy = with_adapter(load_policy(base))
    return policy, save_adapter(policy, tmp_path / "adapter", base=base)


@torch.no_grad()
def image_logprobs(model, prompt):
    """Of our policy, or of transformers' model."""
    if hasattr(model, "image_logprobs"):
        return model.image_logprobs(prompt, IDS)
    logits = their_image_logits(model, prompt, IDS)
    return logits.log_softmax(-1).gather(1, IDS[:, None])[:, 0]


def assert_same_logprobs(one, other):
    for prompt in prompts_of(7, 12):
        wanted = image_logprobs(other, prompt)
        torch.testing.assert_close(image_logprobs(one, prompt), wanted, rtol=0, atol=1e-5)


def differs(one, other) -> bool:
    (prompt,) = prompts_of(7)
    return bool((image_logprobs(one, prompt) - image_logprobs(other, prompt)).abs().mean() > 0.1)


@torch.no_grad()
def test_peft_puts_our_adapter_on_transformers_janus(ours, theirs, base):
    policy, folder = ours
    (prompt,), completion = prompts_of(9), torch.tensor([9, 20, 31])
    assert differs(theirs, policy)
    loaded = peft.PeftModel.from_pretrained(theirs, folder).eval()
    assert loaded.peft_config["default"].base_model_name_or_path == base
    assert_same_logprobs(loaded.get_base_model(), policy)
    logits = loaded(input_ids=torch.cat((prompt, completion))[None]).logits[0]
    wanted = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, completion[:, None])[:, 0]
    found = policy.text_logprobs(prompt, completion)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_our_folder_is_as_peft_would_write_it(ours, theirs, tmp_path):
    policy, folder = ours
    loaded = peft.PeftModel.from_pretrained(theirs, folder)
    loaded.save_pretrained(tmp_path / "again")
    found, again = weights_in(folder), weights_in(tmp_path / "again")
    assert f"{FIRST}.lora_A.weight" in found and found.keys() == again.keys()
    assert all(torch.equal(found[key], again[key]) for key in found)
    texts = [(f / "adapter_config.json").read_text() for f in (folder, tmp_path / "again")]
    assert json.loads(texts[0]) == json.loads(texts[1])
    assert len(found) == 2 * len(adapted(policy))


# Made by peft on transformers' Janus; names of a list are found in the vision tower too.
THEIRS = {
    "list": {"target_modules": ["q_proj", "gate_proj"]},
    "pattern": {"target_modules": r".*language_model.*\.(q_proj|down_proj)"},
    "rank-stabilised": {"target_modules": ["v_proj"], "use_rslora": True},
    "ranks": {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {"up_proj": 2, r"^model\.language_model\.layers\.1\.mlp\.down_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 1.5},
    },
    "image head": {
        "target_modules": ["generation_head.proj_out", "vision_head", "generation_aligner.fc1"]
    },
    "16 bits": {"target_modules": ["o_proj"]},
}


def made_by_peft(theirs, folder, **settings):
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | settings))
    model = peft.get_peft_model(theirs, config)
    fill(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", THEIRS)
def test_an_adapter_made_by_peft_is_loaded(case, theirs, base, tmp_path):
    model = made_by_peft(theirs, tmp_path / "made", **THEIRS[case])
    if case == "16 bits":
        model.bfloat16().save_pretrained(tmp_path / "made")
        model.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
        fresh = JanusForConditionalGeneration.from_pretrained(base)
        model = peft.PeftModel.from_pretrained(fresh.eval(), tmp_path / "made")
    policy = load_policy(base, adapter=str(tmp_path / "made"))
    assert differs(policy, load_policy(base))
    assert_same_logprobs(policy, model.get_base_model().eval())


def test_the_tower_s_part_is_left_out_with_one_line(theirs, base, tmp_path, capsys):
    made_by_peft(theirs, tmp_path / "made", target_modules=["q_proj"])
    assert merge_adapter(load_policy(base), tmp_path / "made") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "adapter_model.safetensors" in line and "vision_model" in line and "left out" in line
    edit(tmp_path / "made", lambda key, t: t * 0 if "vision_model" in key else t)
    merge_adapter(load_policy(base), tmp_path / "made")
    assert capsys.readouterr().err == ""


def test_names_of_the_original_layout_are_known(ours, base):
    policy, folder = ours
    prefix = "base_model.model."

    def old(key):
        name, _, part = key.removeprefix(prefix).rpartition(".lora_")
        found = renamed(f"{name}.weight", ORIGINAL)
        assert found is not None
        return f"{prefix}{found.removesuffix('.weight')}.lora_{part}"

    save_file({old(k): t for k, t in weights_in(folder).items()}, folder / WEIGHTS)
    assert_same_logprobs(load_policy(base, adapter=str(folder)), policy)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_convert_merges(ours, base, tmp_path, layout, folders, capsys):
    policy, folder = ours
    model = folders(layout, MODEL)
    flags = ["--model", str(model), "--merge", str(folder), "--out", str(tmp_path / "merged")]
    convert([*flags, "--layout", layout])
    merged = load_policy(str(tmp_path / "merged"))
    assert_same_logprobs(merged, policy)
    assert equal_states(merged, load_policy(base, adapter=str(folder)))
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    if layout == "transformers":
        plain = JanusForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        assert_same_logprobs(plain, policy)


def test_merging_rounds_once(ours, base):
    policy, folder = ours
    half = load_policy(base, dtype=torch.bfloat16, adapter=str(folder))
    plain = load_policy(base, dtype=torch.bfloat16).state_dict()
    for name, layer in adapted(policy).items():
        wanted = (plain[f"{name}.weight"].float() + layer.get_delta_weight("default")).bfloat16()
        assert torch.equal(half.state_dict()[f"{name}.weight"], wanted)


def test_only_an_adapter_of_ours_is_replaced(ours, base, tmp_path):
    policy, folder = ours
    save_adapter(policy, folder, base=base)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        save_adapter(policy, folder, base=base)
    (folder / "notes.txt").unlink()
    (tmp_path / "thesis.txt").write_text("mine")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        save_adapter(policy, folder, base=base)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def edit(folder, change, **more):
    tensors = {k: change(k, t) for k, t in load_file(folder / WEIGHTS).items()}
    save_file({k: t for k, t in (tensors | more).items() if t is not None}, folder / WEIGHTS)


def configure(folder, **values):
    content = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps(content))


def without(key):
    return lambda folder: edit(folder, lambda k, t: None if k == key else t)


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def wrong_shape(folder):
    edit(folder, lambda k, t: t[:, :-1].clone() if k == f"{FIRST}.lora_A.weight" else t)


def foreign(folder):
    edit(
        folder,
        lambda k, t: None,
        **{f"base_model.model.model.text.0.lora_{part}.weight": torch.ones(4, 4) for part in "AB"},
    )


CASES = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"{CONFIG}: no such file"),
    "pickle only": (pickled, "adapter_model.bin: pickled adapters are not read"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"pickle"), WEIGHTS),
    "cut short": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), WEIGHTS),
    "not JSON": (lambda f: (f / CONFIG).write_text("{"), f"{CONFIG}: not JSON"),
    "wrong shape": (wrong_shape, "q_proj.lora_A.weight': wanted shape (4, 48), got (4, 47)"),
    "another rank": (lambda f: configure(f, r=8), "wanted shape (8, 80), got (4, 80)"),
    "no counterpart": (foreign, "model.text.0.lora_A.weight' has no counterpart"),
    "half a pair": (without(f"{FIRST}.lora_B.weight"), "q_proj.lora_B.weight' is missing"),
    "unexpected key": (
        lambda f: edit(f, lambda k, t: t, **{f"{FIRST}.lora_magnitude_vector": torch.ones(4)}),
        "unexpected key",
    ),
    "whole numbers": (lambda f: edit(f, lambda k, t: t.int()), "wanted floating point"),
    "nothing": (lambda f: edit(f, lambda k, t: None), "holds no adapter"),
    "r 0": (lambda f: configure(f, r=0), f"{CONFIG}: r: wanted a whole number >= 1, got 0"),
    "alpha": (lambda f: configure(f, lora_alpha="x"), f"{CONFIG}: lora_alpha"),
    "another method": (lambda f: configure(f, peft_type="IA3"), f"{CONFIG}: peft_type"),
    "DoRA": (lambda f: configure(f, use_dora=True), f"{CONFIG}: 'use_dora': not supported"),
    "later method": (lambda f: configure(f, use_newra={"a": 1}), "'use_newra': not supported"),
    "biases": (lambda f: configure(f, bias="all"), f"{CONFIG}: bias"),
    "saved modules": (lambda f: configure(f, modules_to_save=["lm_head"]), "'modules_to_save'"),
    "changed base": (lambda f: configure(f, init_lora_weights="pissa"), "init_lora_weights"),
    "slow pattern": (lambda f: configure(f, rank_pattern={"(a+)+$": 4}), "rank_pattern"),
    "targets": (lambda f: configure(f, target_modules={"a": 1}), f"{CONFIG}: target_modules"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_used_is_one_line_and_changes_nothing(case, ours, base):
    _, folder = ours
    spoil, named = CASES[case]
    spoil(folder)
    policy = load_policy(base)
    with pytest.raises(UserError) as error:
        merge_adapter(policy, folder)
    text = str(error.value)
    assert named in text and str(folder) in text and "\n" not in text, text
    assert equal_states(policy, load_policy(base))


def test_a_pattern_of_a_stranger_is_not_run(ours, base):
    policy, folder = ours
    configure(folder, target_modules="(((a|model|.)+)+)+!")
    assert_same_logprobs(load_policy(base, adapter=str(folder)), policy)


def test_no_folder_is_named(base):
    with pytest.raises(UserError, match="nowhere: no such adapter folder"):
        load_policy(base, adapter="nowhere")


def test_a_tied_head_is_refused(folders, tmp_path):
    base = folders("transformers", (4, True, 4))
    folder = save_adapter(with_adapter(load_policy(str(base))), tmp_path / "tied", base="")
    head = {"A": torch.ones(4, 48), "B": torch.ones(320, 4)}
    more = {f"base_model.model.lm_head.lora_{part}.weight": t for part, t in head.items()}
    edit(folder, lambda k, t: t, **more)
    with pytest.raises(UserError, match=r"lm_head.*tied to the embedding"):
        load_policy(str(base), adapter=str(folder))
