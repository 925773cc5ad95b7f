"""Code that runs on the device. These modules import triton, and nothing imports them before a launch."""
