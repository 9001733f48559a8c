"""Training the embedded policy on, from its folder."""

import random
import shutil
from pathlib import Path

import torch

import engine.tiny
from engine.policy import load_policy
from engine.prompts.conversation import Conversation
from engine.prompts.data import load_template
from engine.tiny import supervised
from engine.tiny.pretrain import main
from engine.tiny.supervised import Example
from engine.weights.read import folder_of, guidance_scale


def test_the_shipped_policy_can_be_trained_on(tmp_path, capsys):
    out = tmp_path / "world"
    shutil.copytree(Path(engine.tiny.__file__).parent / "data", out / "data")
    flags = ["--start", "tiny", "--out", str(out), "--work", str(tmp_path / "work")]
    sizes = ["--examples=64", "--noisy_examples=64", "--noisy_steps=1", "--threads=1"]
    main([*flags, *sizes, "--stages", "examples", "noisy"])
    assert "policy 1/1" in capsys.readouterr().out
    folder = str(out / "weights" / "policy")
    made, shipped = load_policy(folder), load_policy("tiny")
    assert guidance_scale(folder, None) == guidance_scale("tiny", None)
    up = (policy.model.language_model.layers[0].mlp.up_proj for policy in (made, shipped))
    assert not torch.equal(*(layer.weight for layer in up))
    for a, b in zip(
        made.model.vqmodel.parameters(), shipped.model.vqmodel.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_some_pictures_are_drawn_without_a_plan(monkeypatch):
    policy = load_policy("tiny")
    conversation = Conversation(policy, load_template(folder_of("tiny"), None))
    asked = []
    stage2 = conversation.stage2
    monkeypatch.setattr(
        conversation, "stage2", lambda p, plan: asked.append(plan) or stage2(p, plan)
    )
    ids = torch.zeros(policy.image_tokens, dtype=torch.int16).numpy()
    batch = [Example("a red circle", "large plain red circle center", ids)] * 100
    with torch.no_grad():
        supervised.image_loss(policy, conversation, batch, random.Random(0))
    assert 0.2 < asked.count(None) / 100 < 0.4
