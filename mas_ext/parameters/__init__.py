"""Which parameters are consolidated, under which names, and how they are found, on one rank or many."""
