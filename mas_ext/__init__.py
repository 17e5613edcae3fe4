"""Memory Aware Synapses for PyTorch: learning one task after another without forgetting."""
