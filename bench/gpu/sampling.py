"""The GPU check's sampling ops.

A sampled token is right when its perturbed logit in fp64 is within a tie of the best.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.case import EPS, Call, Case, Step, Tensors
from bench.gpu.models import CFG_WEIGHT
from kernels import cfg_sample, reference
from kernels.head_sample import head_sample, head_workspace
from kernels.philox import gumbel
from kernels.reference.sampling import head_logits
from kernels.sample_step import sample_step, sample_workspace
from kernels.state import Draw, StepState

TIE = 1e-3
SEED, NOISE_STEP = 11, 1 << 20
DRAW = Draw(cfg_weight=CFG_WEIGHT, seed=SEED, first_step=NOISE_STEP)


def draw_errors(
    logits: Callable[[], tuple[Tensor, Tensor]], got: Tensors, ids: Tensor, tie: float
) -> tuple[float, float]:
    """Errors of (tokens, log-probs, guided log-probs) against fp64 logits (cond, uncond)."""
    cond, uncond = logits()
    guided = reference.guide(cond, uncond, CFG_WEIGHT)
    steps = torch.tensor([NOISE_STEP], device=cond.device)
    scores = guided + gumbel(SEED, ids, steps, cond.shape[1])[0]
    tokens = got[0][:, None]
    gap = (scores.amax(-1) - scores.gather(1, tokens)[:, 0]).max().item()
    exact = [x.log_softmax(-1).gather(1, tokens)[:, 0] for x in (cond, guided)]
    errors = [(a - b).abs().max().item() for a, b in zip(got[1:], exact, strict=True)]
    # As a share of what is allowed: a tie, and the rounding of guided logits.
    worst = torch.tensor([gap / tie, *(e / tie for e in errors)]).max().item()
    return worst, 1.0


def _rollout_state(s: Step, table: Tensor, workspace: Tensor) -> StepState:
    """Outputs of a sampling step that writes column 0."""
    images, width = s.images, s.shape.width
    floats = torch.zeros((2, images, s.suffix), device=s.device)
    return StepState(
        step=s.index([0]),
        sample_ids=torch.arange(images, device=s.device),
        table=table,
        x=s.normal(2 * images, width),
        tokens=torch.zeros((images, s.suffix), dtype=torch.int64, device=s.device),
        logprobs=floats[0],
        guided_logprobs=floats[1],
        error=torch.zeros(1, dtype=torch.int64, device=s.device),
        workspace=workspace,
    )


def _first_column(state: StepState) -> Tensors:
    """What step 0 wrote."""
    assert not state.error.any()
    return state.tokens[:, 0], state.logprobs[:, 0], state.guided_logprobs[:, 0]


def cfg(s: Step) -> Case:
    images, vocab = s.images, s.shape.image_vocab
    ids = torch.arange(images, device=s.device)

    def prepare() -> Call:
        cond, uncond = s.normal(2 * images, vocab, scale=3.0).split(images)

        def run() -> Tensors:
            return cfg_sample(
                cond,
                uncond,
                cfg_weight=CFG_WEIGHT,
                temperature=1.0,
                seed=SEED,
                sample_ids=ids,
                step=NOISE_STEP,
            )

        return Call(
            run, lambda: draw_errors(lambda: (cond.double(), uncond.double()), run(), ids, TIE / 10)
        )

    least = 2 * images * vocab * s.dtype.itemsize
    return Case(op="cfg_sample", shape=f"2 x {images} x {vocab}", least=least, prepare=prepare)


def sample(s: Step) -> Case:
    images, vocab = s.images, s.shape.image_vocab
    table = s.normal(vocab, s.shape.width)

    def prepare() -> Call:
        cond, uncond = s.normal(2 * images, vocab, scale=3.0).split(images)
        state = _rollout_state(s, table, sample_workspace(images, vocab, s.device))

        def run() -> None:
            sample_step(cond, uncond, DRAW, state)

        def errors() -> tuple[float, float]:
            run()
            wide = cond.double(), uncond.double()
            return draw_errors(lambda: wide, _first_column(state), state.sample_ids, TIE / 10)

        return Call(run, errors)

    least = (2 * images * vocab + 3 * images * s.shape.width) * s.dtype.itemsize
    return Case(op="sample_step", shape=f"2 x {images} x {vocab}", least=least, prepare=prepare)


def head(s: Step) -> Case:
    return _head(s, fused=True)


def head_gemm(s: Step) -> Case:
    """What the fused head replaces: cuBLAS's product, whose logits are rounded, and sample_step."""
    return _head(s, fused=False)


def _head(s: Step, *, fused: bool) -> Case:
    images, vocab, width = s.images, s.shape.image_vocab, s.shape.width
    table = s.normal(vocab, width)

    def prepare() -> Call:
        inputs = s.normal(2 * images, width)
        cond, uncond = inputs.split(images)
        weight, bias = s.normal(vocab, width, scale=3 * width**-0.5), s.normal(vocab)
        logits = s.normal(2 * images, vocab)
        scratch = sample_workspace(images, vocab, s.device)
        if fused:
            scratch = head_workspace(cond, weight)
        state = _rollout_state(s, table, scratch)

        def run() -> None:
            if fused:
                head_sample(cond, uncond, weight, bias, DRAW, state)
                return
            torch.addmm(bias, inputs, weight.t(), out=logits)
            sample_step(*logits.split(images), DRAW, state)

        def errors() -> tuple[float, float]:
            run()
            wide = [t.double() for t in (cond, uncond, weight, bias)]
            # Rounded logits of about 3 are off by 2^-8 * 8, which guidance enlarges ninefold.
            tie = TIE if fused else TIE + 9 * 8 * EPS[s.dtype]
            column = _first_column(state)
            return draw_errors(lambda: head_logits(*wide), column, state.sample_ids, tie)

        return Call(run, errors)

    least = (vocab * (width + 1) + (2 * width + 3 * width) * images) * s.dtype.itemsize
    name = "head_sample" if fused else "addmm + sample_step"
    shape = f"2 x {images} x {width} x {vocab}"
    return Case(op=name, shape=shape, least=least, prepare=prepare)


CASES = (cfg, sample, head, head_gemm)
