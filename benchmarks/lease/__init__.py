"""Check and time the CUDA path on a machine that is available for minutes only.

Run `benchmarks/lease.sh`. The modules are:

plan         the items, in their order and with their time limits
runner       runs each item in a process of its own, and writes the archive
report       saves what an item measures, after each measurement
switches     fallbacks for what a check found broken
fake_driver  the Triton driver of a dry run

The other modules contain the work of the items.
"""
