"""Training an adapter as a user meets it: what is sampled, kept, resumed, written and refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from engine.convert import main as convert
from engine.evaluate.__main__ import main as evaluate
from engine.generate.__main__ import main as generate
from engine.model.adapter import MergedWeights
from engine.model.weight_source import packed
from engine.policy import load_policy
from engine.settings.errors import UserError, run_command
from engine.train import Trainer, main, train
from rewards import RewardPipeline
from tests.engine.test_train import SMALL, assert_same_run, final_tensors, metrics, small

LORA = ("--use_peft", "--learning_rate=3e-3")
ROWS = [{"prompt": p, "nouns": ["circle"]} for p in ("two circles", "a red circle", "a cross")]


class BaseWeights(MergedWeights):
    """What a rollout that forgets the adapter would sample."""

    def _joined(self, where, *linears):
        return packed(where, *(m.get_base_layer() for m in linears))


def test_the_rollout_samples_what_is_trained_and_would_not_without_the_merge(tmp_path):
    """20 updates at a rate that learns; then the rollout is made to read the base model."""
    trainer = Trainer(small(tmp_path, "drift", *LORA, "--max_steps=30"), ROWS, ROWS)
    with RewardPipeline(trainer.ensemble, "cpu") as pipeline:
        found = [trainer.step(step, pipeline)[0] for step in range(1, 22)]
        trainer.policy.weights = BaseWeights(trainer.policy.model.language_model)
        forgot = trainer.step(22, pipeline)[0]
    assert max(float(f["policy_drift"]) for f in found) < 1e-5
    assert float(found[0]["kl"]) == pytest.approx(0, abs=1e-7)
    assert float(found[-1]["kl"]) > 1e-3  # far from the base model by now
    assert float(forgot["policy_drift"]) > 1e-2


def test_a_run_leaves_an_adapter_and_the_base_as_it_was(tmp_path):
    config = small(tmp_path, "run", *LORA, "--max_steps=2", "--lora_target_modules=q_proj,up_proj")
    train(config)
    run = tmp_path / "run"
    assert not (run / "policy").exists()
    values = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "tiny" and values["r"] == 16
    tensors, _ = final_tensors(run)
    kept = {k.removeprefix("policy/"): t for k, t in tensors.items() if k.startswith("policy/")}
    assert kept and all(".lora_" in name for name in tensors)
    written = load_file(run / "adapter" / "adapter_model.safetensors")
    named = {f"base_model.model.{k.replace('.default.', '.')}": t for k, t in kept.items()}
    assert written.keys() == named.keys() and all(torch.equal(written[k], named[k]) for k in named)
    assert any(t.any() for k, t in kept.items() if ".lora_B." in k)


def test_training_leaves_the_base_weights_bit_for_bit(tmp_path):
    trainer = Trainer(small(tmp_path, "base", *LORA), ROWS, ROWS)
    with RewardPipeline(trainer.ensemble, "cpu") as pipeline:
        for step in (1, 2, 3):
            trainer.step(step, pipeline)
    plain, found = load_policy("tiny").state_dict(), trainer.policy.state_dict()
    base = {k.replace(".base_layer.", "."): t for k, t in found.items() if ".lora_" not in k}
    assert base.keys() == plain.keys() and all(torch.equal(base[k], plain[k]) for k in plain)


def test_resumed_run_is_bit_identical_with_dropout_too(tmp_path):
    flags = (*LORA, "--num_iterations=2", "--lora_dropout=0.2", "--lora_r=4")
    train(small(tmp_path, "whole", "--max_steps=4", *flags))
    train(small(tmp_path, "parts", "--max_steps=2", *flags))
    train(small(tmp_path, "parts", "--max_steps=4", *flags, "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UserError, match="lora_r was 4"):
        train(small(tmp_path, "parts", "--max_steps=5", *flags, "--lora_r=8", "--resume"))
    with pytest.raises(UserError, match="use_peft"):
        train(small(tmp_path, "parts", "--max_steps=5", *flags, "--no-use_peft", "--resume"))


def test_a_bf16_model_trains_its_adapter(tmp_path):
    train(small(tmp_path, "half", *LORA, "--max_steps=2", "--dtype=bfloat16"))
    tensors, _ = final_tensors(tmp_path / "half")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    rows = metrics(tmp_path / "half")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] > 0
    assert all(row["policy_drift"] < 0.05 for row in rows)


@pytest.fixture
def adapter(tmp_path):
    train(small(tmp_path, "run", *LORA, "--learning_rate=2e-2", "--max_steps=2"))
    return tmp_path / "run" / "adapter"


def test_pictures_of_an_adapter_are_those_of_the_merged_checkpoint(adapter, tmp_path):
    convert(
        ["--model=tiny", f"--merge={adapter}", f"--out={tmp_path / 'merged'}", "--layout=original"]
    )
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue stars\n")
    made = {}
    for name, how in {
        "adapter": [f"--adapter={adapter}"],
        "merged": [f"--model={tmp_path / 'merged'}"],
        "base": [],
    }.items():
        out = tmp_path / f"{name}-pictures"
        generate([f"--prompts={tmp_path / 'prompts.txt'}", f"--out={out}", *how])
        made[name] = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.png")}
    assert made["adapter"] == made["merged"] != made["base"]
    with pytest.raises(UserError, match="adapter"):  # the folder's pictures are another model's
        generate(
            [f"--prompts={tmp_path / 'prompts.txt'}", f"--out={tmp_path / 'adapter-pictures'}"]
        )


def test_evaluate_takes_an_adapter_and_compares_it_with_its_base(adapter, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    flags = [f"--prompts={tmp_path / 'prompts.jsonl'}", "--reward_funcs=gdino", "--out"]
    evaluate([f"--adapter={adapter}", "--compare=tiny", *flags, str(tmp_path / "one.json")])
    evaluate([*flags, str(tmp_path / "base.json")])
    one, base = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "base"))
    plans = [[row["plan"] for row in rows] for rows in (one["rows"], one["compare_rows"])]
    assert plans[1] == [row["plan"] for row in base["rows"]] != plans[0]


BAD = {
    "rank 0": (main, ["--use_peft", "--lora_r", "0"], "lora_r must be >= 1, got 0"),
    "no such layer": (main, ["--use_peft", "--lora_target_modules", "q_prof"], "nearest: q_proj"),
    "no such dropout": (main, ["--use_peft", "--lora_dropout", "1"], "lora_dropout"),
    "no adapter": (generate, ["--prompt", "a", "--adapter", "nowhere"], "nowhere"),
    "a checkpoint": (
        convert,
        ["--model=tiny", "--layout=original", "--out=x", "--merge={tmp}"],
        "adapter_config.json: no such file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    command, flags, named = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", *(f.format(tmp=tmp_path) for f in flags)])
    assert run_command(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], lines
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_way_is_refused_before_the_run(tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        train(small(tmp_path, "run", *LORA, "--max_steps=1"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "adapter").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        train(small(tmp_path, "linked", *LORA, "--max_steps=1"))


def test_peft_is_imported_only_where_an_adapter_is_trained():
    code = "import sys, engine.train, engine.generate.__main__; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(not flag.startswith("--lora") for flag in SMALL)
