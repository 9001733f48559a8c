# Shared by the scripts of this folder; to be sourced from the repository's root.

# gate NAME COMMAND...: run a gate, and say its name and seconds.
gate() {
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    if ! "$@"; then
        echo "== $name: FAILED after $((SECONDS - began)) s" >&2
        exit 1
    fi
    echo "== $name: passed in $((SECONDS - began)) s"
}

gate_lint() { ruff check .; }
gate_format() { ruff format --check .; }
gate_types() { mypy; }

# The C ops without a warning.
gate_c() {
    T2I_CPU_CFLAGS="-Wall -Wextra -Werror" python -c "from kernels.cpu.build import build; build()"
}

# The C ops' tests under AddressSanitizer and UndefinedBehaviorSanitizer; leaks are torch's own.
# -O1: gcc takes minutes over the sanitizers' checks at -O3. Built first, since a compiler that is
# itself run under the sanitizer is slower still. -s: a report is not to be lost in pytest's capture.
# One thread: what races is the threads' test's business, and spinning teams are slow under it.
gate_sanitizers() {
    local cc=${CC:-gcc}
    local -x T2I_CPU_CFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
    python -c "
from kernels.cpu.build import build
from tests.kernels.cpu.test_ops import INSTRUCTION_SETS
for flags in ((), *INSTRUCTION_SETS.values()):
    build(flags)" &&
        LD_PRELOAD="$("$cc" -print-file-name=libasan.so):$("$cc" -print-file-name=libubsan.so)" \
            ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
            python -m pytest tests/kernels/cpu/test_ops.py -s -p no:cacheprovider \
            -k "not compiled_once and not cannot_be_written"
}

# The README's first command with few steps, then its second; whatever the first leaves behind.
gate_main_job() { python -m engine.train --max_steps 2 --eval_prompts 4; }
gate_tests() { python -m pytest tests; }
