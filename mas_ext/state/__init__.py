"""The state of consolidation: one quadratic, the merge rules, its buffers and files."""
