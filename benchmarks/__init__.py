"""Measurements: of the penalty, of importance, of whole training steps."""
