"""What a step costs, counted without a GPU on tensors without content: operations, bytes, memory, time."""
