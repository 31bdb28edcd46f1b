"""Check and time the CUDA path on a machine that is there for minutes; see `benchmarks/lease.sh`.

plan        the items: what runs, in which order, for how long
runner      one process an item, time limits, the archive
report      what an item measured, saved as it goes
switches    fallbacks for what a check found broken
fake_driver the dry run's Triton driver
"""
