"""The C ops' threads: torch's own, and as many as there are make no difference."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from engine.rollout.decoder import Decoder
from engine.rollout.prefill import Prepared
from engine.rollout.request import Prompts
from engine.rollout.sample import image_request
from kernels.state import Draw

pytestmark = pytest.mark.usefixtures("c_ops")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("samples", [1, 3, 21])
def test_any_number_of_threads_gives_the_same_bits(pair, make_prompts, samples):
    """Threads that waited for each other too little would differ, now and then."""
    _, policy = pair(2)
    rows = Prompts.of(make_prompts(*range(5, 5 + samples)))
    request = image_request(policy, rows.order, Draw(seed=3, cfg_weight=5.0))
    prepared = Prepared(policy, rows, request)
    found = []
    for threads in (1, 2, 3, 5, 2, 5):
        with torch_threads(threads):
            decoder = Decoder(prepared, rows, request)
            assert decoder.step.in_c
            found.append(decoder.decode())
    for drawn in found[1:]:
        assert torch.equal(drawn.ids, found[0].ids)
        assert torch.equal(drawn.logprobs, found[0].logprobs)
        assert torch.equal(drawn.guided_logprobs, found[0].guided_logprobs)


def test_threads_are_torch_s():
    """One OpenMP runtime in the process: another one's threads would fight torch's."""
    program = (
        "import torch; torch.set_grad_enabled(False); from kernels import rms_norm;"
        "x = torch.ones(64, 64); rms_norm(x, torch.ones(64), 1e-6); (x @ x).sum();"
        "maps = open('/proc/self/maps').read().split();"
        "print(len({m for m in maps if 'libgomp' in m or 'libiomp' in m or 'libomp' in m}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "1", out.stdout + out.stderr
