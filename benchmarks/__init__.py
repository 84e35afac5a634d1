"""Speed, one script a bar: `python -m benchmarks` runs them all, `python -m benchmarks attention` one."""
