"""What is remembered of the tasks: one quadratic, how tasks are merged into it, where it lies, its files."""
