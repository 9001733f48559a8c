"""What `python -m bench gpu_check` runs: ops against fp64, parity, rollouts, timings."""
