"""The frozen reference policy, and what several forwards of a micro-batch share."""

import pytest
import torch

from engine.learner.objective import (
    reference_policy,
    score,
)
from engine.model.token_tree import TokenTree
from engine.rollout import sample_images
from tests.engine.learner.conftest import (
    CFG,
    changed,
    make_config,
    policy_loss,
    run,
    scores,
    shifted,
    trained,
)


@pytest.mark.parametrize("tied", [False, True])
def test_reference_is_a_frozen_copy_that_shares_what_does_not_train(new_policy, experience, tied):
    policy = new_policy(4, tied)
    sample_images(
        policy, experience.levels[1].prompts
    )  # packed weights must be copied all the same
    reference = reference_policy(policy)
    assert reference.model.generation_head is policy.model.generation_head
    assert reference.model.vqmodel is policy.model.vqmodel
    assert not reference.trainable() and policy.trainable()
    mine = {p.untyped_storage().data_ptr() for p in policy.trainable().values()}
    for name, parameter in reference.state_dict().items():
        if name.startswith(("model.language_model.", "lm_head.")):
            assert parameter.untyped_storage().data_ptr() not in mine, name
    embed = reference.model.language_model.embed_tokens.weight
    assert (reference.lm_head.weight is embed) == tied

    config = make_config(beta=0.1)
    start = scores(policy, experience, config)
    for name, got in scores(reference, experience, config).items():
        assert torch.equal(got, start[name])
    e = changed(experience, **{name: {"ref": values} for name, values in start.items()})
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=0.5)
    totals, _ = run(policy, e, config)
    assert totals["kl"] == pytest.approx(0, abs=1e-6)
    optimizer.step()
    for name, got in scores(reference, experience, config).items():
        assert torch.equal(got, start[name])
    assert run(policy, e, config)[0]["kl"] > 1e-4
    # It can be sampled from too, and gives its own tokens.
    prompts = experience.levels[1].prompts
    drawn = sample_images(reference, prompts, cfg_weight=CFG, seed=1)
    assert torch.equal(drawn.ids, experience.levels[1].ids)


def test_what_sequences_share_is_found_once(new_policy, experience, monkeypatch):
    """For the policy's, the reference's and two updates' forwards of a micro-batch."""
    made, make = [], TokenTree.__init__
    monkeypatch.setattr(
        TokenTree, "__init__", lambda self, *a, **k: (made.append(self), make(self, *a, **k))[1]
    )
    policy, config = new_policy(), make_config(logprob_policy="guided", beta=0.1)
    e = trained(changed(shifted(experience)), config, size=2)
    for part in e.parts:
        for rows in part:
            score(policy, rows, 1.0), score(policy, rows, 1.0)
        for _ in range(2):
            policy_loss(policy, part, config)
    assert len(made) == 2 * 3  # two micro-batches; plans, pictures, pictures without the prompt
