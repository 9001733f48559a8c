"""The GPU check's parity: graph against launches, and ours against transformers' loop."""

from typing import Any

import torch

from bench.gpu.models import (
    PARITY,
    Item,
    Plan,
    Shape,
    image_decoder,
    peer_loop,
    prompts_of,
    random_policy,
)
from bench.rollout import suite as rollout


def items(
    device: torch.device, plan: Plan | None = None, shapes: dict[str, Shape] | None = None
) -> list[Item]:
    """The graph against eager launches in the plan's dtype; ours against the loop in fp32."""
    plan = plan or Plan()
    found: list[Item] = []
    for name, shape in (shapes or PARITY).items():
        found += [
            (f"{name} graph", lambda shape=shape: [graph_against_launches(shape, plan, device)]),
            (f"{name} loop", lambda shape=shape: [against_loop(shape, plan, device)]),
        ]
    first = next(iter((shapes or PARITY).values()))
    if device.type == "cuda":
        found.append(("profiled kernels", lambda: [profiled_kernels(first, plan, device)]))
    return found


def profiled_kernels(shape: Shape, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Kernels of one step as the profiler sees them: cuBLAS may split one product into two."""
    policy = random_policy(shape, plan.dtype, device)
    decoder = image_decoder(policy, prompts_of(policy, 8, plan.prompt), 1, seed=7)
    decoder.step.launch()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decoder.step.launch()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == cuda]
    return {
        "check": "kernels of a step",
        "model": shape.name,
        "layers": shape.layers,
        "kernels": len([name for name in names if not name.startswith("Mem")]),
        "most_launches": 10 * shape.layers + 6,
    }


def graph_against_launches(shape: Shape, plan: Plan, device: torch.device) -> dict[str, Any]:
    """The replayed graph and the same launches one by one give the same bits."""
    policy = random_policy(shape, plan.dtype, device)
    distinct = prompts_of(policy, 3, plan.prompt)
    graph, launches = (
        image_decoder(policy, distinct, 2, seed=7).decode(capture=capture)
        for capture in (True, False)
    )
    return {
        "check": "graph replay = eager launches, bit for bit",
        "model": shape.name,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "tokens": graph.ids.numel(),
        "different_tokens": int((graph.ids != launches.ids).sum()),
        "correct": torch.equal(graph.ids, launches.ids)
        and torch.equal(graph.logprobs, launches.logprobs)
        and torch.equal(graph.guided_logprobs, launches.guided_logprobs),
    }


def against_loop(shape: Shape, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Greedy and sampled tokens of ours, fed to transformers' loop in fp32."""
    policy = random_policy(shape, torch.float32, device)
    prompts = prompts_of(policy, plan.checked, plan.prompt)
    gap, error = rollout.disagreement(policy, peer_loop(policy), prompts, None)
    return {
        "check": "tokens and log-probs = transformers' loop, fp32",
        "model": shape.name,
        "greedy_gap_over_allowed": gap,
        "logprob_error_over_allowed": error,
        "correct": gap <= 1 and error <= 1,
    }
