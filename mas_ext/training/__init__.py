"""Training on the tasks of a scenario: a run step by step, its settings, its samples."""
