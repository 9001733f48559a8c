"""Device functions shared by the sampling kernels.

Work is cut into (group of rows) x (tile of the vocabulary). A program reduces its tile to a few
numbers a row, the partials; whoever comes last merges a row's partials in the order of the tiles,
so that the result depends neither on which program that is nor on the batch.

Numbers are those of `kernels.philox` and `kernels.reference`: the same Philox integers, the same
uniform variables (exact in fp32), guidance with one rounding (torch.add with alpha is a fused
multiply-add too) and true division by the temperature. What may still differ by a unit in the last
place is libm: log in -log(-log(u)) comes from CUDA's libdevice here, from SLEEF or numpy on a CPU.
A token differs only where the two best scores are closer than that, about 1e-6: one draw in a
million.
"""

import triton
import triton.language as tl

# Partials of a row and tile, fields first, so that a merge reads each field contiguously.
FIELDS = 8
BEST, INDEX, GUIDED_MAX, GUIDED_SUM, GUIDED_AT, COND_MAX, COND_SUM, COND_AT = (
    tl.constexpr(i) for i in range(FIELDS)
)
_FIELDS = tl.constexpr(FIELDS)

# Where the noise comes from.
NO_NOISE, DRAWN_NOISE = 0, 1
DRAWN = tl.constexpr(DRAWN_NOISE)

# Tickets: [0] first bad row, [1] groups that are done, then one for each group.
BAD, DONE, TICKETS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def ticket_words(groups: int) -> int:
    """Tickets of a launch in 32-bit words, padded so that what follows is aligned."""
    return (TICKETS.value + groups + 31) // 32 * 32


def signed(seed: int) -> int:
    """The seed's low 64 bits as a signed integer, the one type that kernels take."""
    return (seed + 2**63) % 2**64 - 2**63


@triton.jit
def gumbel_noise(seed, step, sample_ids, first, BLOCK: tl.constexpr):
    """Gumbel noise of the BLOCK vocabulary entries from `first`: (ROWS,) ids -> (ROWS, BLOCK).

    One Philox call serves four consecutive entries.
    """
    blocks = (first // 4 + tl.arange(0, BLOCK // 4))[None, :]
    low = (sample_ids & 0xFFFFFFFF).to(tl.uint32)[:, None]
    high = (sample_ids >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, blocks, step.to(tl.uint32), low, high)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # word >> 9 has 23 bits: plus one half and times a power of two is exact.
    uniform = ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))


@triton.jit
def guide(cond, uncond, cfg_weight):
    """uncond + cfg_weight * (cond - uncond), rounded after the difference and after the sum."""
    difference = cond - uncond
    return tl.fma(tl.full(difference.shape, cfg_weight, tl.float32), difference, uncond)


@triton.jit
def exp_sum(x):
    """Row maximum m and sum of exp(x - m). NaN anywhere makes the sum NaN; all -inf makes it 0."""
    top = tl.max(x, 1)
    base = tl.where(top == -float("inf"), 0.0, top)
    return top, tl.sum(tl.exp(x - base[:, None]), 1)


@triton.jit
def store_partials(
    partials_ptr,
    row,
    use_row,
    tile,
    tiles,
    vocab,
    cond,
    guided,
    score,
    HAS_COND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reduce a tile (ROWS, BLOCK) of tempered logits and scores to its partials."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = tile * BLOCK + column < vocab
    target = partials_ptr + row * _FIELDS * tiles + tile
    # torch.argmax takes NaN for the largest; the row is flagged all the same.
    score = tl.where(score == score, score, float("inf"))
    best, at = tl.max(tl.where(inside, score, -float("inf")), 1, return_indices=True)
    tl.store(target + BEST * tiles, best, mask=use_row)
    # Exact: a vocabulary has fewer than 2**24 entries.
    tl.store(target + INDEX * tiles, (tile * BLOCK + at).to(tl.float32), mask=use_row)
    hit = column == at[:, None]
    tl.store(target + GUIDED_AT * tiles, tl.sum(tl.where(hit, guided, 0.0), 1), mask=use_row)
    top, total = exp_sum(tl.where(inside, guided, -float("inf")))
    tl.store(target + GUIDED_MAX * tiles, top, mask=use_row)
    tl.store(target + GUIDED_SUM * tiles, total, mask=use_row)
    if HAS_COND:
        tl.store(target + COND_AT * tiles, tl.sum(tl.where(hit, cond, 0.0), 1), mask=use_row)
        top, total = exp_sum(tl.where(inside, cond, -float("inf")))
        tl.store(target + COND_MAX * tiles, top, mask=use_row)
        tl.store(target + COND_SUM * tiles, total, mask=use_row)


@triton.jit
def _load_field(source, field, tiles, mask, other):
    # Written by other programs of the same launch: past L1.
    return tl.load(source + field * tiles, mask=mask, other=other, cache_modifier=".cg")


@triton.jit
def _merge_logprob(source, chosen, mask, tiles, MAX: tl.constexpr):
    """Log-prob of the drawn token from the fields MAX, MAX + 1 (sum), MAX + 2 (its logit)."""
    tops = _load_field(source, MAX, tiles, mask, -float("inf"))
    sums = _load_field(source, MAX + 1, tiles, mask, 0.0)
    logits = _load_field(source, MAX + 2, tiles, mask, 0.0)
    top = tl.max(tops, 1)
    total = tl.sum(sums * tl.exp(tops - top[:, None]), 1)  # NaN where every logit is -inf
    # Not logit - (top + log(total)): at logits of 1e4 that difference is off by 3e-4 nats.
    return (tl.sum(tl.where(chosen, logits, 0.0), 1) - top) - tl.log(total)


@triton.jit
def merge_partials(partials_ptr, row, use_row, tiles, HAS_COND: tl.constexpr, TILES: tl.constexpr):
    """Token, log-prob, guided log-prob of each row, (ROWS,). The first tile wins ties."""
    tile = tl.arange(0, TILES)[None, :]
    source = partials_ptr + (row * _FIELDS * tiles)[:, None] + tile
    mask = use_row[:, None] & (tile < tiles)
    best = _load_field(source, BEST, tiles, mask, -float("inf"))
    _, winner = tl.max(best, 1, return_indices=True)
    chosen = tile == winner[:, None]
    index = _load_field(source, INDEX, tiles, mask, 0.0)
    token = tl.sum(tl.where(chosen, index, 0.0), 1).to(tl.int64)
    guided_logprob = _merge_logprob(source, chosen, mask, tiles, GUIDED_MAX)
    logprob = guided_logprob
    if HAS_COND:
        logprob = _merge_logprob(source, chosen, mask, tiles, COND_MAX)
    return token, logprob, guided_logprob


@triton.jit
def is_last(ticket_ptr, count):
    """Whether this program is the last of `count` to ask; the ticket is then 0 again.

    What the others wrote before they asked is visible to the last one.
    """
    tl.debug_barrier()  # the writes of every warp come before the ticket
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    tl.store(ticket_ptr, 0, mask=last)
    return last


@triton.jit
def sample_tile(
    partials_ptr,
    cond_ptr,
    stride_cond,
    uncond_ptr,
    stride_uncond,
    kept_ptr,
    sample_ids_ptr,
    row,
    use_row,
    read_row,
    tile,
    tiles,
    vocab,
    cfg_weight,
    temperature,
    seed,
    step,
    GUIDED: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Read a tile of logits, guide, heat, add noise, and store the partials of `use_row`.

    Logits outside `read_row` count as 0.
    kept (B, V) fp32, contiguous: tempered guided logits, -inf where top-k or top-p excludes.
    """
    first = tile * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    mask = read_row[:, None] & (column < vocab)
    cond = tl.load(cond_ptr + row[:, None] * stride_cond + column, mask=mask, other=0.0)
    cond = cond.to(tl.float32)
    guided = cond
    if GUIDED:
        uncond = tl.load(uncond_ptr + row[:, None] * stride_uncond + column, mask=mask, other=0.0)
        uncond = uncond.to(tl.float32)
        guided = guide(cond, uncond, cfg_weight)
    if temperature != 1.0:
        cond = tl.div_rn(cond, temperature)
        guided = tl.div_rn(guided, temperature)
    score = guided
    if HAS_KEPT:
        score = tl.load(kept_ptr + row[:, None] * vocab + column, mask=mask, other=0.0)
    if NOISE == DRAWN:
        sample_ids = tl.load(sample_ids_ptr + row, mask=use_row, other=0)
        score += gumbel_noise(seed, step, sample_ids, first, BLOCK)
    store_partials(
        partials_ptr, row, use_row, tile, tiles, vocab, cond, guided, score, GUIDED, BLOCK
    )


@triton.jit
def finish_rows(
    # outputs
    tokens_ptr,
    stride_tokens,
    logprobs_ptr,
    stride_logprobs,
    guided_logprobs_ptr,
    stride_guided,
    x_ptr,
    stride_x,
    # in and out
    tickets_ptr,
    error_ptr,
    step_ptr,
    alive_ptr,
    # inputs
    table_ptr,
    stride_table,
    token,
    logprob,
    guided_logprob,
    group,
    row,
    use_row,
    column,
    rows,
    groups,
    columns,
    width,
    eos,
    pad,
    # constants
    PAIRED: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    HAS_GUIDED: tl.constexpr,
    HAS_EOS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a step's results of a group of rows and gather their next inputs.

    Column `column` of the outputs is written; next inputs go to rows `row` and, if PAIRED,
    `rows + row` of x. The last group notes the first bad row and advances the step.
    """
    finite = (tl.abs(logprob) < float("inf")) & (tl.abs(guided_logprob) < float("inf"))
    bad = use_row & (finite == 0)
    written = token
    if HAS_EOS:
        live = tl.load(alive_ptr + row, mask=use_row, other=0) != 0
        bad = bad & live
        written = tl.where(live, token, pad)
        logprob = tl.where(live, logprob, 0.0)
        guided_logprob = tl.where(live, guided_logprob, 0.0)
        tl.store(alive_ptr + row, (live & (token != eos)).to(tl.uint8), mask=use_row)
    # A step too many writes nothing outside.
    use_column = use_row & (column < columns)
    tl.store(tokens_ptr + row * stride_tokens + column, written, mask=use_column)
    if HAS_LOGPROBS:
        tl.store(logprobs_ptr + row * stride_logprobs + column, logprob, mask=use_column)
    if HAS_GUIDED:
        at_column = guided_logprobs_ptr + row * stride_guided + column
        tl.store(at_column, guided_logprob, mask=use_column)
    # Row by row from scalars: the copy is then one-dimensional, with 128-bit accesses.
    for i in range(ROWS):
        here = row == group * ROWS + i
        source = table_ptr + tl.sum(tl.where(here, written, 0), 0) * stride_table
        target = x_ptr + (group * ROWS + i).to(tl.int64) * stride_x
        in_batch = group * ROWS + i < rows
        for start in range(0, width, BLOCK_D):
            at = start + tl.arange(0, BLOCK_D)
            mask = in_batch & (at < width)
            embedding = tl.load(source + at, mask=mask)
            tl.store(target + at, embedding, mask=mask)
            if PAIRED:
                tl.store(target + rows.to(tl.int64) * stride_x + at, embedding, mask=mask)
    # The first bad row has the largest rows - row; 0 is none.
    tl.atomic_max(tickets_ptr + BAD, tl.max(tl.where(bad, rows - row, 0), 0).to(tl.int32))
    if is_last(tickets_ptr + DONE, groups):
        worst = tl.atomic_xchg(tickets_ptr + BAD, 0)
        code = 1 + column.to(tl.int64) * rows + (rows - worst)
        first = (worst > 0) & (tl.load(error_ptr) == 0)
        tl.store(error_ptr, code, mask=first)
        tl.store(step_ptr, column + 1)
