"""Code that runs on the device. These modules import triton, so only a launch imports them."""
