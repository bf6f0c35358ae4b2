"""What networks are made of: layers that know their weights. How a device computes them is known to `qvl.kernels`."""
