"""What a step costs, counted without a GPU on tensors without content: operations, memory, time.

fake_cuda.py   CUDA tensors without content on any machine
backward.py    the backward pass of such tensors
fake_run.py    a run's networks made of them, and its counted step
counter.py     follows what is called: operations by phase, memory alive
operations.py  FLOPs, bytes and kernels of one operation
waits.py       where the host waits for the device
memory.py      memory of a step for any batch; size of a checkpoint
devices.py     data sheets of GPUs, the hardware that a config names
roofline.py    from counts to seconds: eager, fused, ideal
prediction.py  images/s, memory and hours of a run
settings.py    the cheapest settings that fit
"""
